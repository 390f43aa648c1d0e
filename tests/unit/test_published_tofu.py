"""``configs/tofu/README.md``: its tables follow from the stored runs of both folders."""

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from wagle_pl.core.text import markdown_table
from wagle_pl.evaluation.results import load_table
from wagle_pl.lab.study.plants import overview, summarise
from wagle_pl.lab.study.summary import compared_at, mean_std

CONFIGS = Path(__file__).parents[2] / "configs"
MASKS = ("curvature^1 0.2", "dense", "wagle 0.2", "random 0.2", "lora")
PEOPLE_MASKS = ("curvature^1 0.05", *MASKS)
FORGET01 = [
    *(("NPO", mask) for mask in ("curvature^1 0.2", "curvature^1 0.05", "dense")),
    *(("NPO", mask) for mask in ("random 0.2", "random 0.02", "wagle 0.2", "lora")),
]
PLANTS = {  # column -> folder and plant
    "random tenth": ("people", "random-0.1"),
    "random 2 %": ("tofu", "random-0.02"),
    "one MLP of 2": ("people", "block-1"),
    "one MLP of 30": ("tofu", "block-1"),
    "20 % of neurons": ("people", "spread-0.2"),
    "5 % of neurons": ("tofu", "spread-0.05"),
}
LOCATED = (
    *("wagle", "snip", "magnitude", "gradient", "signed"),
    *("curvature^1 gauss_newton", "random"),
)
ATTACKS = ("relearn_forget_20", "relearn_retain", "quantise_4bit")


def study(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def cell(found: Optional[dict[str, Any]]) -> str:
    if not found or found["mean"] is None:
        return "–"
    return mean_std(found["mean"], found["std"])


def with_steps(arm: Optional[dict[str, Any]]) -> str:
    """The same, and the steps to the level."""
    return cell(arm) + (f" ({arm['steps']:.0f})" if arm and arm["mean"] is not None else "")


def by_mask(objectives: Iterable[str], studies: Iterable[str]) -> str:
    """What each mask keeps at equal forgetting, a column per objective and study."""
    found = [
        {(arm["objective"], arm["mask"]): arm for arm in study(name)["headline"]}
        for name in studies
    ]
    columns = [(o, arms) for o in objectives for arms in found]
    rows = [[mask, *(with_steps(arms.get((o, mask))) for o, arms in columns)] for mask in MASKS]
    return rows_of(rows)


def ends(name: str, arms: Iterable[tuple[str, str]], columns: Iterable[tuple[str, str]]) -> str:
    """What runs end with, and what attacks bring back: a row per arm, one more for the retrained model."""
    arms, columns = list(arms), list(columns)
    found = {(e["objective"], e["mask"], e["measure"], e["what"]): e for e in study(name)["ends"]}
    steps = {(a["objective"], a["mask"]): a["steps"] for a in study(name)["headline"]}
    rows = []
    for objective, mask in arms:
        label = mask if objective == "NPO" else f"{mask}, {objective}"
        cells = [cell(found[(objective, mask, *column)]) for column in columns]
        rows.append([label, f"{steps[objective, mask]:.0f}", *cells])
    retrained = [f"{found[(*arms[0], *column)]['retrained']:.3f}" for column in columns]
    return rows_of([*rows, ["retrained", "–", *retrained]])


def rows_of(rows: list[list[str]]) -> str:
    return "\n".join(markdown_table([""] * len(rows[0]), rows).splitlines()[2:])


def kept(*sets: str) -> list[tuple[str, str]]:
    return [("probability kept", name) for name in sets]


def after(*attacks: str) -> list[tuple[str, str]]:
    return [("forget/probability", name) for name in attacks]


def planted() -> str:
    """AUROC and enrichment of some scores, as the pages of the people and of TOFU's tables have of all."""
    cells = {}
    for folder in ("people", "tofu"):
        header, rows = overview(summarise(load_table(CONFIGS / folder / "results/plants.parquet")))
        for score, *values in rows:
            cells |= {(folder, p, score): v for p, v in zip(header[1:], values, strict=True)}
    return rows_of([[s, *(cells[(*where, s)] for where in PLANTS.values())] for s in LOCATED])


def by_planted_unit() -> str:
    """AUROC of weights by their own scores and by those of their units, after planting and before."""
    entries = summarise(load_table(CONFIGS / "people/results/plants_units.parquet"))
    found = {(e["plant"], e["score"]): (e["auroc"].mean, e["auroc_before"].mean) for e in entries}
    rows = []
    for plant, label in (("spread-0.2", "20 % of neurons"), ("heads-6", "six heads")):
        scores = [
            f"{s}{unit}" for s in ("curvature^1", "wagle") for unit in ("", " neuron", " head")
        ]
        rows.append([label, *("{:.2f} ({:.2f})".format(*found[plant, s]) for s in scores)])
    return rows_of(rows)


def test_what_attacks_bring_back_of_plants() -> None:
    """The table of the people's page, and the paired tests that it and TOFU's page tell."""
    table = pd.read_csv(CONFIGS / "people/results/plants_attacked.csv")
    page = (CONFIGS / "people/README.md").read_text(encoding="utf-8")
    runs = dict(iter(table.groupby(["plant", "mask"])))
    for (_, mask), of in runs.items():
        cells = [f"{of[c].mean():.3f} ± {of[c].std():.3f}" for c in table.columns[4:]]
        assert f"| {mask} | {of.steps.mean():.0f} | {' | '.join(cells)} |" in page
    for plant, first, second, column, told in (
        ("random-0.1", "curvature^1", "plant", "relearn_forget_20", "0.006"),
        ("random-0.1", "plant", "random", "relearn_forget_20", "0.97"),
        ("spread-0.2", "plant", "random", "relearn_forget_20", "0.017"),
        ("spread-0.2", "plant", "dense", "relearn_forget_20", "0.026"),
        ("spread-0.2", "curvature^1", "plant", "relearn_forget_20", "0.96"),
        ("random-0.1", "curvature^1", "plant", "kept", "0.10"),
        ("spread-0.2", "curvature^1", "plant", "kept", "0.028"),
    ):
        p = ttest_rel(runs[plant, first][column], runs[plant, second][column]).pvalue
        assert f"{p:.{len(told) - 2}f}" == told and f"p {told}" in page


def stable() -> str:
    """Jaccard overlaps of the people's masks, and of SmolLM2's beside them."""
    files = [CONFIGS / f"{folder}/results/stability.csv" for folder in ("people", "tofu")]
    lines = (file.read_text(encoding="utf-8").splitlines()[1:] for file in files)
    both = zip(*map(csv.reader, lines), strict=True)
    return rows_of([[*people, *smollm2[1:]] for people, smollm2 in both])


def same_speed() -> str:
    """What is kept at a level that both arms reach in as many steps, and the difference."""
    studies = []
    for name in ("study", "study_2"):
        rows = load_table(CONFIGS / f"tofu/results/{name}.parquet")
        studies.append(compared_at(study(f"tofu/results/{name}"), rows, 0.4)["headline"])
    columns = [
        {arm["mask"]: arm for arm in arms if arm["objective"] == objective}
        for objective in ("NPO", "GradDiff")
        for arms in studies
    ]
    rows = [[m, *(f"{c[m]['mean']:.3f} ({c[m]['steps']:.0f})" for c in columns)] for m in MASKS[:2]]
    pairs = [c["curvature^1 0.2"] for c in columns]
    return rows_of(
        [*rows, ["difference", *(f"+{arm['difference']:.3f} (p {arm['p']:.3f})" for arm in pairs)]]
    )


def test_what_the_page_says_of_single_differences() -> None:
    """Paired, plain differences, with scipy's test."""
    ends = {
        (e["objective"], e["mask"], e["what"]): e["values"]
        for e in study("tofu/results/study_forget01")["ends"]
        if e["measure"] == "forget/probability"
    }
    arm, dense = (ends[("NPO", mask, "quantise_4bit")] for mask in ("curvature^1 0.2", "dense"))
    test = ttest_rel(list(arm.values()), list(dense.values()))
    text = (CONFIGS / "tofu/README.md").read_text(encoding="utf-8")
    difference = np.mean(list(arm.values())) - np.mean(list(dense.values()))
    assert f"{difference:.3f} more than dense, which is not resolved (p {test.pvalue:.3f})" in text
    plants = {a["mask"]: a["values"] for a in study("people/results/plant_random")["headline"]}
    arm, true = (list(plants[mask].values()) for mask in ("curvature^1 0.1", "plant"))
    assert f"{np.mean(arm) - np.mean(true):.4f} more than the true mask" in text
    assert f"(p {ttest_rel(arm, true).pvalue:.3f}, not resolved)" in text


def true_masks() -> str:
    """What the plant's own mask keeps of the planted models, beside masks of scores of its size."""
    found = [
        {arm["mask"].split()[0]: arm for arm in study(name)["headline"]}
        for name in (
            "people/results/plant_random",
            "people/results/plant_spread",
            "tofu/results/plant_random",
        )
    ]
    masks = ("plant", "curvature^1", "random", "wagle", "dense")
    return rows_of([[mask, *(with_steps(arms[mask]) for arms in found)] for mask in masks])


def rounded() -> str:
    """Where a run ends with fp32 values, rounded to bf16 after every step, and rounded at a higher learning rate."""
    rates = {  # with fp32 values, and the higher one
        "curvature^1 0.2": (7e-5, 3e-4),
        "dense": (3.5e-5, 1.5e-4),
        "wagle 0.2": (5e-5, 2e-4),
    }
    last = {
        (
            row["objective"],
            row["mask"],
            row["lr"],
        ): f"{row['forget']:.3f}, {row['utility']:.3f} ({row['step']})"
        for row in load_table(CONFIGS / "tofu/results/study_forget01.parquet")
        if row["seed"] == 0
    }
    runs = (("NPO", 0), ("NPO+RoundedAdamW", 0), ("NPO+RoundedAdamW", 1))
    return rows_of([[m, *(last[(o, m, of[n])] for o, n in runs)] for m, of in rates.items()])


def by_unit() -> str:
    """What masks of whole units keep and let come back: unused retain rows, forget rows after relearning."""
    with open(CONFIGS / "people/results/units.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    rows = []
    for unit in ("weight", "row", "head", "neuron", "column"):
        cells = []
        for score in ("curvature^1", "wagle", "random"):
            mask = f"{score} 0.2" if unit == "weight" else f"{score} {unit} 0.2"
            ended = [run for run in runs if run["mask"] == mask and run["retain"]]
            for column in ("retain_unused", "relearn_forget_20"):
                values = [float(run[column]) for run in ended]
                few = f" ({len(values)} seeds)" if 0 < len(values) < 3 else ""
                mean = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if values else "–"
                cells.append(mean + few)
        rows.append([unit, *cells])
    return rows_of(rows)


TABLES = {
    "units": by_unit,
    "planted units": by_planted_unit,
    "same speed": same_speed,
    "main": lambda: by_mask(("NPO", "GradDiff"), ("tofu/results/study", "tofu/results/study_2")),
    "hidden": lambda: ends(
        "people/results/study_recovery",
        [("NPO", mask) for mask in PEOPLE_MASKS],
        [*kept("retain", "retain_unused"), *after("no attack", *ATTACKS)],
    ),
    "planted": planted,
    "true": true_masks,
    "smol": lambda: ends(
        "tofu/results/study_forget01",
        FORGET01,
        [*kept("retain", "retain_unused"), *after("no attack", "paraphrase", *ATTACKS)],
    ),
    "rounded": rounded,
    "stable": stable,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_follow_from_the_runs(name: str) -> None:
    page = "README.md" if name in ("main", "smol", "hidden") else "tables.md"
    text = (CONFIGS / "tofu" / page).read_text(encoding="utf-8")
    assert TABLES[name]() in text, TABLES[name]()


def test_the_page_is_short() -> None:
    assert (CONFIGS / "tofu/README.md").read_text().count("\n") <= 150


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).splitlines()
    titles = [line.lstrip("# ").lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*sorted(CONFIGS.rglob("*.md")), CONFIGS.parent / "README.md"])
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in headings(target), link


def test_the_controls_on_smollm2() -> None:
    """What is kept at the retrained model's level, read from the runs by linear interpolation."""
    table = pd.read_csv(CONFIGS / "tofu/results/controls.csv")
    kept: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}
    for (mask, _), run in table.groupby(["mask", "seed"]):
        points = [
            (0.966, 0.969, 0),
            *run[["forget", "retain_unused", "step"]].itertuples(index=False),
        ]
        crossed = [i for i, (forget, *_) in enumerate(points) if forget <= 0.123]
        if crossed:
            (before, *low), (after, *high) = points[crossed[0] - 1 : crossed[0] + 1]
            share = (before - 0.123) / (before - after)
            value, step = (a + share * (b - a) for a, b in zip(low, high, strict=True))
            kept.setdefault(mask, []).append(value)
            steps.setdefault(mask, []).append(step)
    page = (CONFIGS / "tofu/study.md").read_text(encoding="utf-8")
    for mask, values in kept.items():
        shown = f"{np.mean(values):.3f}" + (
            f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        )
        assert f"| {mask} | {len(values)} | {shown} | {np.mean(steps[mask]):.0f} |" in page
    assert "lowest h 0.2" not in kept and "| lowest h 0.2 | 1 | – | – |" in page
    test = ttest_rel(kept["shuffled 0.2"], kept["curvature^1 0.2"])
    difference = np.subtract(kept["shuffled 0.2"], kept["curvature^1 0.2"]).mean()
    assert f"{difference:.3f} more than `curvature^1` (p {test.pvalue:.3f})" in page


def test_units_on_smollm2() -> None:
    """Means, differences, their p by a paired t-test, and Holm's correction, from every seed's value."""
    table = pd.read_csv(CONFIGS / "tofu/results/units.csv").pivot(index="seed", columns="unit")
    kept = table["kept"]
    page = (CONFIGS / "tofu/study.md").read_text(encoding="utf-8")
    tests = {
        unit: ttest_rel(kept[unit], kept["weight"])
        for unit in ("column", "head", "neuron", "row", "layer")
    }
    assert f"| weight | {kept['weight'].mean():.4f} ± {kept['weight'].std():.4f} |" in page
    for unit, test in tests.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {unit} | 0.9"))
        cells = line.split(" | ")
        assert cells[1] == f"{kept[unit].mean():.4f} ± {kept[unit].std():.4f}"
        assert cells[3] == f"{(kept[unit] - kept['weight']).mean():+.4f}"
        assert cells[4] == f"{test.pvalue:.3f}"
    low, high = tests["row"].confidence_interval()
    assert f"interval from {low:+.4f} to {high:+.4f}" in page
    corrected, largest = {}, 0.0
    for rank, unit in enumerate(sorted(tests, key=lambda name: tests[name].pvalue)):
        largest = max(largest, tests[unit].pvalue * (len(tests) - rank))
        corrected[unit] = largest
    assert f"p is {corrected['column']:.3f} for columns and {corrected['head']:.3f} for" in page
    assert round(corrected["neuron"], 3) == round(corrected["head"], 3)
