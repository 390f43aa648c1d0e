"""``wagle report`` of studies, and the figures of reports."""

from __future__ import annotations

import base64
import json
import os
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import pytest
from pages import Strict, figures, section

from wagle_pl import WagleError
from wagle_pl.evaluation.results import load_table, write_json
from wagle_pl.lab.study import recovery
from wagle_pl.lab.study.recovery import HALF
from wagle_pl.lab.study.report.curves import panels, study_overview
from wagle_pl.lab.study.report.figures import image
from wagle_pl.lab.study.report.studies import mean_curves
from wagle_pl.lab.study.summary import AT_END, compared_at, mean_std
from wagle_pl.lab.study.text import about, by_objective, shown
from wagle_pl.masks import WeightMask

# -- studies ---------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A folder ``study``: 2 objectives × 3 arms × 2 learning rates × 2 seeds × 3 test points."""
    monkeypatch.chdir(tmp_path)
    rows = []
    arms = (("dense", 1.0), ("wagle 0.2", 0.2), ("wagle 0.5", 0.5))
    for objective, (mask, density), lr, seed, at in product(
        ("NPO", "GradDiff"), arms, (1e-5, 3e-5), (0, 1), (42, 84, 126)
    ):
        row = {"objective": objective, "mask": mask, "score": "Wagle", "density": density, "lr": lr}
        forget = 0.9 - at * lr * 100 * density - 0.001 * seed
        row |= {"seed": seed, "step": at, "run": f"{objective}-{mask}-{density}-{lr}-{seed}"}
        row |= {
            "objective_id": objective,
            "mask_id": mask,
            "forget": forget,
            "utility": 0.5 + forget / 10,
            "seconds": 1.5 * at,
        }
        rows.append(row)
    Path("study").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), "study/study.parquet")
    none = {"mean": None, "std": None, "n": 0, "dense": None, "difference": None, "p": None}
    dense = {"objective": "NPO", "mask": "dense", "mean": 0.50789, "std": None, "n": 1, "seeds": 1}
    dense |= {"reached": 1.0, "runs": 2, "learning_rates": {"0": 3e-5}, "steps": 42.0, "area": none}
    dense |= {"difference": None, "p": None, "why": "", "verdict": "", "equal_steps": None}
    dense |= dict.fromkeys(AT_END)
    arm = {**dense, "mask": "wagle", "mean": 0.51234, "std": 0.0123, "n": 2, "seeds": 2}
    arm |= {"difference": 0.00456, "p": None, "why": "n too small", "verdict": "not resolved"}
    arm |= {"reached": 0.75, "runs": 4, "learning_rates": {"0": 3e-5, "1": 1e-5}, "steps": 61.5}
    arm |= {"equal_steps": {"difference": 0.0321, "p": 0.25, "n": 3, "steps": 50.0}}
    arm |= {"area": {**none, "mean": 0.5555, "std": 0.0321, "n": 2, "dense": 0.5}}
    summary = {
        "forget": "forget/probability",
        "utility": "model_utility",
        "headline": [dense, arm],
        "forget_level": 0.25,
        "target": {"forget/probability": 0.994, "model_utility": 0.61},
        "retrained": {"forget/probability": 0.2, "model_utility": 0.6},
    }
    write_json(Path("study/study.json"), summary)
    return rows


def test_a_study(study, report):
    root, said = report("study")
    assert "report of 1 study written" in said
    part = section(root, "study-0")
    values = [float(data.attributes["value"]) for data in part.all("data")]
    assert {0.994, 0.61, 0.2, 0.6} <= set(values)
    lines = [[cell.text for cell in line.children] for line in list(part.all("table"))[1].all("tr")]
    header, rows = shown(by_objective(json.loads(Path("study/study.json").read_text()))["NPO"])
    assert lines == [header, *rows]
    assert lines[1][:6] == ["wagle", "0.512 ± 0.012", "2/2", "75%", "not resolved", "+0.005"]
    last = {row["run"]: row for row in study if row["step"] == 126}
    body = {
        line.children[0].text: [float(data.attributes["value"]) for data in line.all("data")]
        for line in list(part.all("tbody"))[-1].children
    }
    columns = ("density", "lr", "seed", "step", "forget", "utility", "seconds")
    assert body == {run: [row[name] for name in columns] for run, row in last.items()}
    assert "The study keeps no masks" in part.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda summary: [summary], "must be an object, got"),
        (lambda summary: {**summary, "headline": 5}, "headline: must be a list or null, got 5"),
        (lambda summary: {**summary, "target": {"a": "x"}}, "target.a: must be a number or null"),
        (lambda summary: {"headline": []}, "key 'forget' is missing"),
        (
            lambda summary: {**summary, "headline": [{**summary["headline"][0], "area": None}]},
            "headline[0].area: must be an object, got None",
        ),
    ],
)
def test_a_summary_that_is_none(study, report, change, said):
    file = Path("study/study.json")
    write_json(file, change(json.loads(file.read_text())))
    root, _ = report("study")
    assert f"study.json: {said}" in root.text


def test_a_young_study_beside_a_run(runs, report, study):
    os.remove("study/study.json")
    WeightMask.load("mask.safetensors").save("study/masks/one")
    root, said = report("study", "masked")
    assert "report of 1 run and 1 study written" in said
    part = section(root, "study-0").text
    assert "it has no study.json" in part and "has not compared its arms" in part
    assert "no numbers of the target and the retrained model" in part
    titles = list(figures(root))
    assert "Share of weights selected by layer and module: one" in titles
    assert len(titles) == 1 + 1
    os.remove("study/study.parquet")
    write_json(Path("study/study.json"), {})
    root, said = report("study", "masked", overwrite=True)
    assert "study is left out: it has no study.parquet yet" in said
    assert "Left out: study" in root.text


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four masks of the published study of the bundled people, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    source = Path(__file__).parents[2] / "configs/people/results"
    masks = ("dense", "curvature^1 0.2", "wagle 0.05", "lora")
    told = json.loads((source / "study_full.json").read_text())
    told["headline"] = [arm for arm in told["headline"] if arm["mask"] in masks]
    write_json(Path("people/study.json"), told)
    table = pyarrow.parquet.read_table(source / "study_full.parquet")
    kept = table.filter(pyarrow.compute.is_in(table["mask"], pyarrow.array(masks)))
    pyarrow.parquet.write_table(kept, "people/study.parquet")
    return Path("people")


def _best_at(
    rows: list[dict[str, Any]], target: tuple[float, float], level: float
) -> dict[int, float]:
    """Seed -> the best utility over learning rates where forgetting first reaches ``level``."""
    best: dict[int, float] = {}
    for run in {row["run"] for row in rows}:
        points = sorted((row for row in rows if row["run"] == run), key=lambda row: row["step"])
        x, y = (
            np.array([target[i], *(row[name] for row in points)])
            for i, name in enumerate(("forget", "utility"))
        )
        kept = np.append(True, x[1:] < np.minimum.accumulate(x)[:-1])
        if x.min() <= level:
            seed = points[0]["seed"]
            best[seed] = max(best.get(seed, -1.0), float(np.interp(-level, -x[kept], y[kept])))
    return best


@pytest.mark.parametrize("level", [0.05, 0.4])
def test_a_study_at_another_level(published, report, level):
    told = json.loads((published / "study.json").read_text())
    rows = pyarrow.parquet.read_table(published / "study.parquet").to_pylist()
    root, _ = report(published, forget_level=level)
    part = section(root, "study-0")
    _, *tables = part.all("table")  # the first: target and retrained model
    objectives = list(dict.fromkeys(arm["objective"] for arm in told["headline"]))
    lines = {
        (objective, line.children[0].text.removesuffix("*")): line
        for objective, table in zip(objectives, tables, strict=False)
        for line in table.all("tr")
    }
    target = tuple(told["target"][told[axis]] for axis in ("forget", "utility"))
    for arm in told["headline"]:
        name = arm["objective"], arm["mask"]
        ours = [row for row in rows if (row["objective"], row["mask"]) == name]
        best = list(_best_at(ours, target, level).values())
        expected = mean_std(np.mean(best), np.std(best, ddof=1)) if len(best) > 1 else "–"
        assert len(best) == 1 or lines[name].children[1].text == expected
    assert f"{level:.3f}, the level asked for" in part.text


def test_the_page_says_what_study_md_says(published, report):
    """What makes a comparison unfair or unfinished, and the rules behind its words."""
    told = json.loads((published / "study.json").read_text())
    told |= {"runs": {"finished": 100, "planned": 942}, "nothing_to_unlearn": True}
    told["headline"][0] |= {"diverged": 2, "model_utility": 0.7}
    end = {"objective": "NPO", "mask": "dense", "measure": HALF, "what": "relearn_retain"}
    end |= {"why": "", "values": {}}
    end |= {
        "mean": 12.34,
        "std": None,
        "n": 1,
        "seeds": 2,
        "verdict": "",
        "curve": [(0, 0.1), (9, 0.7)],
    }
    told["ends"] = [
        {**end, "target": 0.0, "retrained": None, "retrained_curve": [(0, 0.0), (9, 0.2)]}
    ]
    write_json(published / "study.json", told)
    part = section(report(published)[0], "study-0")
    assert "100 of 942 runs are finished." in part.text
    assert [line.text for line in part.all("li")] == [*about(told), *recovery.about(told["ends"])]
    assert "12.3 (1/2)" in part.text
    recovered = figures(part)["Recovery by relearn_retain"]
    assert "NPO, retrained: from (0, 0.00) to (9, 0.200)" in recovered
    for said in (
        "not resolved if it is within",
        "there is nothing to unlearn",
        "2 runs diverged",
        "*: tried with",
        "wait for the rest",
    ):
        assert said in part.text
    # LoRA has learning rates of its own: fewer runs even when all are finished
    finished = {**told, "runs": {"finished": 942, "planned": 942}}
    assert "wait for the rest" not in " ".join(about(finished))
    lines = [line for table in list(part.all("table"))[1:3] for line in table.all("tr")]
    names = [line.children[0].text for line in lines]
    assert names.count("lora*") == 2 and "lora" not in names
    other = compared_at(told, load_table(published / "study.parquet"), 0.05)
    assert "nothing to unlearn" not in " ".join(about(other))
    assert "0.050, the level asked for" in about(other)[0]
    for level, expected in (
        (told["forget_level"], "just past the level, where runs end."),
        (0.05, "not at equal forgetting."),
    ):
        (line,) = (line for line in about({**told, "forget_level": level}) if "at the ends" in line)
        assert line.endswith(f"best runs: {expected}")


@pytest.mark.parametrize(
    ("folder", "level", "message"),
    [
        (
            "people",
            0.0005,
            "people: --forget_level 0.0005 is outside of its runs, where forget/probability goes",
        ),
        ("people", 0.95, "--forget_level 0.95 is outside of its runs"),
        ("young", 0.05, "study young: it has not compared its arms yet"),
        ("masked", 0.05, "--forget_level: it is for studies"),
    ],
)
def test_a_level_that_a_study_has_not(published, runs, report, folder, level, message):
    Path("young").mkdir()
    shutil.copy("people/study.parquet", "young")
    with pytest.raises(WagleError, match=message):
        report(folder, forget_level=level)
    assert not Path("out.html").exists()


# -- figures ---------------------------------------------------------------------------------------


def test_a_figure_is_an_image_with_a_title_and_a_description():
    def draw() -> Any:
        figure, (axes,) = panels(3, 2)
        axes.plot([0, 1], [0, 1], "o-")
        axes.set_title("a < b & $c$")
        return figure

    drawn = image("what < it", "is & was", draw)
    assert drawn == image("what < it", "is & was", draw)  # the same figure, the same bytes
    root = Strict(drawn).root
    assert figures(root) == {"what < it": "is & was"}
    _, _, content = next(root.all("img")).attributes["src"].partition("base64,")
    text = base64.b64decode(content).decode()
    assert ">a &lt; b &amp; $c$</text>" in text


@pytest.mark.parametrize(("objectives", "masks"), [(1, 2), (1, 14), (2, 14), (3, 30)])
def test_a_legend_has_room(objectives, masks):
    curve = [(0.9, 0.9), (0.1, 0.5)]
    curves = {f"wagle gamma=1e-06 {k / 100}": curve for k in range(masks)}
    arms = {f"Objective{i}": curves for i in range(objectives)}
    figure = study_overview(arms, "dense", {"target": (0.9, 0.9)}, 0.1, ("forget", "utility"))
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x1 <= figure.bbox.width and legend.y0 >= 0
    assert legend.x0 > max(axes.get_tightbbox().x1 for axes in figure.axes)
    assert all(axes.bbox.width > figure.dpi * 1.5 for axes in figure.axes)


def test_the_best_arms_have_the_plainest_lines():
    curve, names = [(0.9, 0.9), (0.1, 0.5)], [f"mask {k}" for k in range(12)]
    headline = [
        {"objective": "NPO", "mask": name, "mean": None if k == 0 else k / 100, "curve": curve}
        for k, name in enumerate(names)
    ]
    summary = {"headline": headline, "forget": "forget/probability", "utility": "model_utility"}
    for sign, best in ((1, names[:0:-1]), (-1, names[1:])):
        lines = study_overview(*mean_curves({**summary, "utility_sign": sign})).axes[0].lines
        assert [line.get_label() for line in lines[:12]] == [*best, names[0]]
        assert [line.get_linestyle() == "-" for line in lines[:12]] == [True] * 8 + [False] * 4
        assert lines[0].get_linewidth() > lines[11].get_linewidth()
