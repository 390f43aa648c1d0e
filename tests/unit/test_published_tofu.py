"""``configs/tofu/README.md``: its tables follow from the stored runs of both folders."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import pytest

from wagle_pl.core.text import markdown_table, mean_std
from wagle_pl.evaluation.results import load_table
from wagle_pl.study.plants import overview, summarise

CONFIGS = Path(__file__).parents[2] / "configs"
MASKS = ("curvature^1 0.2", "dense", "wagle 0.2", "random 0.2", "lora")
PEOPLE_MASKS = ("curvature^1 0.05", *MASKS)
FORGET01_MASKS = ("curvature^1 0.2", "dense", "wagle 0.2")
PLANTS = ("random", "spread")
ATTACKS = ("relearn_forget_20", "relearn_retain", "quantise_4bit")


def study(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def cell(found: Optional[dict[str, Any]]) -> str:
    if not found or found["mean"] is None:
        return "–"
    return mean_std(found["mean"], found["std"])


def by_mask(objectives: Iterable[str], studies: Iterable[str]) -> str:
    """What each mask keeps at equal forgetting, a column per objective and study."""
    found = [
        {(arm["objective"], arm["mask"]): arm for arm in study(name)["headline"]}
        for name in studies
    ]
    columns = [(o, arms) for o in objectives for arms in found]
    rows = [[mask, *(cell(arms.get((o, mask))) for o, arms in columns)] for mask in MASKS]
    return rows_of(rows)


def ends(
    name: str, masks: Iterable[str], columns: Iterable[tuple[str, str]], objective: str = "NPO"
) -> str:
    """What runs end with, and what attacks bring back: a row per mask, one more for the retrained model."""
    found = {
        (e["mask"], e["measure"], e["what"]): e
        for e in study(name)["ends"]
        if e["objective"] == objective
    }
    rows = [[mask, *(cell(found[(mask, *column)]) for column in columns)] for mask in masks]
    first = next(iter(masks))
    retrained = [f"{found[(first, *column)]['retrained']:.3f}" for column in columns]
    return rows_of([*rows, ["retrained", *retrained]])


def rows_of(rows: list[list[str]]) -> str:
    return "\n".join(markdown_table([""] * len(rows[0]), rows).splitlines()[2:])


def kept(*sets: str) -> list[tuple[str, str]]:
    return [("probability kept", name) for name in sets]


def after(*attacks: str) -> list[tuple[str, str]]:
    return [("forget/probability", name) for name in attacks]


def planted() -> str:
    """AUROC and enrichment of some scores, as the page of the people tells of all."""
    rows = overview(summarise(load_table(CONFIGS / "people/results/plants.parquet")))[1]
    shown = {
        "wagle",
        "curvature^1 gauss_newton",
        "gradient",
        "snip",
        "signed",
        "magnitude",
        "random",
    }
    return rows_of([row for row in rows if row[0] in shown])


def from_csv(name: str) -> str:
    return rows_of(list(csv.reader((CONFIGS / name).open(encoding="utf-8")))[1:])


def true_masks() -> str:
    """What the plant's own mask keeps of the planted models, beside masks of scores of its size."""
    found = [
        {arm["mask"].split()[0]: arm for arm in study(f"people/results/plant_{kind}")["headline"]}
        for kind in PLANTS
    ]
    masks = ("plant", "curvature^1", "random", "wagle", "dense")
    return rows_of([[mask, *(cell(arms.get(mask)) for arms in found)] for mask in masks])


def rounded() -> str:
    """Where a run ends with weights rounded to bf16 after every step, beside the same with fp32 values."""
    rates = {"curvature^1 0.2": 7e-5, "dense": 3.5e-5}
    last = {
        (row["objective"], row["mask"]): f"{row['forget']:.3f} after {row['step']} steps"
        for row in load_table(CONFIGS / "tofu/results/study_forget01.parquet")
        if row["seed"] == 0 and row["lr"] == rates.get(row["mask"])
    }
    objectives = ("NPO", "NPO+RoundedAdamW")
    return rows_of([[mask, *(last[(o, mask)] for o in objectives)] for mask in rates])


TABLES = {
    "main": lambda: by_mask(("NPO", "GradDiff"), ("tofu/results/study", "tofu/results/study_2")),
    "hidden": lambda: ends(
        "people/results/study_recovery",
        PEOPLE_MASKS,
        [*kept("retain", "retain_unused"), *after("no attack", *ATTACKS)],
    ),
    "planted": planted,
    "true": true_masks,
    "smol": lambda: ends(
        "tofu/results/study_forget01",
        FORGET01_MASKS,
        [*kept("retain", "retain_unused"), *after("no attack", "paraphrase", *ATTACKS)],
    ),
    "rounded": rounded,
    "stable": lambda: from_csv("people/results/stability.csv"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_follow_from_the_runs(name: str) -> None:
    page = (CONFIGS / "tofu/README.md").read_text(encoding="utf-8")
    assert TABLES[name]() in page, TABLES[name]()


def test_the_page_is_short() -> None:
    assert (CONFIGS / "tofu/README.md").read_text().count("\n") <= 200
