"""A report of runs shows what they wrote, stands alone, and says what is missing."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pages import EVIL, figures, numbers, records, section, step, write_run

from wagle_pl import WagleError
from wagle_pl.api.rows import row_digest
from wagle_pl.data.example import Example
from wagle_pl.evaluation.results import arrow, write_json
from wagle_pl.evaluation.suites import TOFUSuite
from wagle_pl.evaluation.tofu_result import to_result
from wagle_pl.lab.study.report.page import render
from wagle_pl.lab.study.report.sources import gather
from wagle_pl.masks import WeightMask


def by_run(runs: dict[str, dict[str, float]]) -> dict[tuple[str, str], float]:
    """(run, measure) -> number."""
    return {(run, name): value for run, found in runs.items() for name, value in found.items()}


def set_compared(run: str, **folders: str) -> None:
    """Note in a run's results what the test compared with."""
    file = Path(run, "test/metrics.info.json")
    write_json(file, {**json.loads(file.read_text()), "compared": folders})


@pytest.fixture
def refused(report):
    """What is wrong with arguments of a report."""

    def run(*runs: Any, **options: Any) -> str:
        with pytest.raises(WagleError) as error:
            report(*runs, **options)
        return str(error.value)

    return run


# -- runs in a report ------------------------------------------------------------------------------


def test_every_number_equals_metrics_json(runs, report):
    root, said = report("masked", "dense", "retrained")
    expected = by_run(runs)
    assert numbers(root) == expected
    assert "report of 2 runs written to out.html" in said and "left out" not in said
    everywhere = numbers(section(root, "measures"))
    assert everywhere == expected  # all of them in the section of all measures
    lead = {"forget/probability", "forget/rougeL_recall", "retain/probability"}
    found = {name for _, name in numbers(section(root, "summary"))}
    assert found == lead | {"model_utility", "forget_quality"}


def test_a_folder_of_runs_stands_for_its_runs(runs, report):
    everything, _ = report(*sorted(runs))
    Path("out.html").unlink()
    by_folder, _ = report(".")
    assert numbers(by_folder) == numbers(everything)


def test_summary_has_target_and_retrained_rows_and_arrows(runs, report):
    root, _ = report("masked", "dense", "retrained")
    rows = next(section(root, "summary").all("tbody")).children
    assert [row.children[0].text for row in rows] == ["target", "retrained", "1 masked", "2 dense"]
    body = next(section(root, "measures").all("tbody")).children
    cells = [cell for row in [*rows, *body] for cell in row.children[1:]]
    assert len(cells) == 4 * (5 + len(runs["target"]))
    suite = TOFUSuite()
    for cell in cells:
        (data,) = cell.all("data")
        run, name = data.attributes["data-run"], data.attributes["data-measure"]
        signs = [node.text[0] for node in cell.all("span") if node.attributes["class"] != "unseen"]
        direction = suite.info(name).direction
        sign = arrow(direction, *(runs[of][name] for of in (run, "target", "retrained")))
        assert signs == ([] if run in ("target", "retrained") else [sign]), (run, name)


def test_what_is_shown_of_runs(runs, report):
    root, _ = report("masked", "dense", "retrained")
    told = figures(root)
    mask = WeightMask.load("mask.safetensors")
    shares = re.findall(r"(\d+)%", told["Share of weights selected by layer and module: masked"])
    cells = [share for row in mask.grid().values() for share in row.values()]
    assert sorted(map(int, shares)) == sorted(round(100 * share) for share in cells)
    assert "dense: every weight could move (dense)" in section(root, "masks").text
    making = section(root, "making").text
    assert "NPO, beta 0.1, retain (NLL)" in making and "fingerprint of target"[:12] in making
    assert f"torch {torch.__version__.split('+')[0]}" in making
    times = [data.attributes["value"] for data in section(root, "making").all("data")]
    assert times.count("12.5") == 6  # runs; the one that made the target is in three lineages
    assert "it needs wagle/mia <b>which" in section(root, "measures").text
    assert "masked: no test set real_authors" in section(root, "measures").text


def test_answers_stand_side_by_side(runs, report):
    root, _ = report("masked", "dense", "retrained", examples=3)
    answers = section(root, "answers")
    articles = list(answers.all("article"))
    secrets, facts = [f"secret {i}?" for i in (0, 2, 5)], [f"fact {i}?" for i in (0, 3, 6)]
    assert [next(a.all("h4")).text for a in articles] == secrets + facts
    boxes = next(articles[1].all("dl")).children
    boxes = [(next(box.all("dt")), next(box.all("dd"))) for box in boxes]
    labels = ["true answer", "before: target", "after: masked", "after: dense", "retrained"]
    assert [label.text.split(" ROUGE")[0].strip() for label, _ in boxes] == labels
    assert [text.text for _, text in boxes] == ["It is secret 2."] * 2 + ["It is secret gone."] * 3
    scores = [float(next(label.all("data")).attributes["value"]) for label, _ in boxes[1:]]
    assert scores == [known / 3 for known in (0.9, 0.2, 0.05, 0.1)]


def test_a_redacted_page_has_digests_and_no_text_of_rows(runs, report):
    root, _ = report("masked", "dense", "retrained", redact=True)
    page = Path("out.html").read_text()
    texts = [r[key] for r in records("secret", 0.9) for key in ("question", "answer", "generation")]
    assert not [text for text in (*texts, "secret", "alert(1)") if text in page]
    salt = "fingerprint of target"
    digest = row_digest(Example.of({"question": "secret 0?", "answer": "It is secret 0."}), salt)
    headings = [node.text for node in section(root, "answers").all("h4")]
    assert len(headings) == 12 and digest in headings and "ROUGE-L" in page


def test_texts_are_escaped(runs, report):
    root, _ = report("masked", title=EVIL)
    assert next(root.all("h1")).text == EVIL
    assert sum(EVIL in node.text for node in root.all("dd")) >= 2
    notes = [yaml.safe_load(node.text)["model"]["init_args"]["note"] for node in root.all("pre")]
    assert notes == [EVIL] * 3  # of each run in both lineages


def test_same_sources_same_bytes(runs):
    assert render(gather(["masked", "dense"])) == render(gather(["masked", "dense"]))


def test_references_as_given_as_tested_and_as_fine_tuned(runs):
    # the folder of results does: what made the model is beside it
    sources = gather(["masked/test"])
    assert sources.models[0].name == "masked" and set(sources.references) == {"target"}
    assert sources.references["target"].metrics == runs["target"]
    assert "results of the retrained model were not found: give --retrained" in sources.notes
    given = gather(["masked"], retrained="retrained")
    assert given.references["retrained"].metrics == runs["retrained"]
    set_compared("masked", retrained="retrained/test")
    assert gather(["masked"]).references["retrained"].metrics == runs["retrained"]
    only = gather(["retrained"])
    assert [run.metrics for run in only.models] == [runs["retrained"]] and only.references == {}
    write_run(Path("other"), 0.5, 0.5, [step("UnlearnModule", "dense", objective={"class": "NPO"})])
    both = gather(["masked", "other"])
    assert set(both.references) == {"retrained"}
    assert "the runs have different target models" in both.notes[0]
    given = gather(["masked", "other"], target="target")
    assert given.references["target"].metrics == runs["target"]
    noted = ["another model than the target" in " ".join(run.notes) for run in given.models]
    assert noted == [False, True]


def test_results_named_by_their_file_are_those_of_the_folder(runs, report):
    """``--model.target target/test/metrics.json`` is the model that the run was made from."""
    set_compared(
        "masked", **{name: f"{name}/test/metrics.json" for name in ("target", "retrained")}
    )
    root, _ = report("masked", "retrained", "target", "dense")
    assert numbers(root) == by_run(runs) and "different target models" not in root.text
    rows = next(section(root, "summary").all("tbody")).children
    assert [row.children[0].text for row in rows] == ["target", "retrained", "1 masked", "2 dense"]
    sources = gather(["masked"], target="target/test/metrics.json", retrained="retrained")
    target = sources.references["target"]
    assert set(target.tables) == {"forget", "retain"} and target.lineage


def test_what_tests_compared_with_comes_before_what_the_models_were_made_from(runs):
    set_compared("masked", target="dense/test")
    assert gather(["masked"]).references["target"].metrics == runs["dense"]


@pytest.mark.parametrize(
    ("target", "other"), [(None, False), ("target", False), ("dense", False), ("retrained", True)]
)
def test_a_second_request_is_shown_beside_the_model_before_any_of_them(runs, target, other):
    steps = [
        step("UnlearnModule", base, objective={"class": "NPO"}) for base in ("target", "dense")
    ]
    write_run(Path("second"), 0.02, 0.6, [step("FinetuneModule", "base"), *steps])
    sources = gather(["second"], target=target)
    assert sources.references["target"].metrics == runs[target or "dense"]
    assert ["another model than the target" in " ".join(run.notes) for run in sources.models] == [
        other
    ]


def test_a_published_result_file_stands_for_the_retrained_model(runs, report):
    result = to_result({"forget": records("secret", 0.1)})
    write_json(Path("published.json"), result)
    root, _ = report("masked", retrained="published.json")
    said = "The retrained model's results, published.json, hold examples and no measures."
    assert said in root.text
    assert {run for run, _ in numbers(root)} == {"masked", "target"}


def test_numbers_that_are_not_finite(runs, report):
    metrics = {**runs["masked"], "retain/perplexity": math.inf, "model_utility": math.inf}
    write_json(Path("masked/test/metrics.json"), metrics)
    root, _ = report("masked")
    found = {name: value for (run, name), value in numbers(root).items() if run == "masked"}
    assert found == metrics


# -- what is missing -------------------------------------------------------------------------------


def test_runs_without_metrics_are_left_out_and_said_so(runs, report):
    Path("untested").mkdir()
    Path("broken/test").mkdir(parents=True)
    Path("broken/test/metrics.json").write_text('{"a": ')
    root, said = report("untested", "masked", "broken")
    assert "untested is left out: it has no metrics.json" in said and "broken is left out" in said
    assert "Left out: untested: it has no metrics.json" in root.text
    assert "line 1: malformed JSON" in root.text
    assert {run for run, _ in numbers(root)} == {"masked", "target"}


def test_missing_pieces_are_said(runs, report):
    for file in ("masked/wagle.json", "masked/test/metrics.info.json"):
        os.remove(file)
    Path("masked/test/forget.parquet").write_bytes(b"no table")
    root, _ = report("masked", target="target")
    assert {run for run, _ in numbers(root)} == {"masked", "target"}
    lost = "metrics.info.json: units, directions and undefined measures are left out"
    for part, said in (
        ("making", "no wagle.json next to the results"),
        ("making", lost),
        ("making", "forget.parquet cannot be read"),
        ("masks", "no mask is known"),
        ("robustness", "no attacks were run"),
    ):
        assert said in section(root, part).text
    assert "retrained model were not found" in root.text
    root, _ = report("masked", overwrite=True)  # nothing says what the target is
    assert "Without the target model's results no arrows say" in section(root, "summary").text


@pytest.mark.parametrize("change", ["gone", "other model", "other weights", "damaged"])
def test_a_mask_that_is_not_the_runs_is_not_shown(runs, report, change):
    mask = WeightMask.load("mask.safetensors")
    if change == "other model":
        mask.metadata["model_fingerprint"] = "another"
        mask.save("mask")
    elif change == "other weights":
        (mask & mask.random_like(1)).save("mask")
    elif change == "damaged":
        Path("mask.safetensors").write_bytes(Path("mask.safetensors").read_bytes()[:-3])
    else:
        os.remove("mask.safetensors")
    root, _ = report("masked")
    assert not list(section(root, "masks").all("img"))
    noted = section(root, "making").text.replace("density", "", 1).split("12.5")[-1]
    assert "mask.safetensors" in noted


def test_robustness(runs, report):
    row = {"attack": "relearn", "option": "k=8", "measure": "forget/probability", "before": 0.2}
    row |= {"after": 0.65, "target": 0.9, "retrained": None}
    row |= {"unit": "probability, 0 to 1", "direction": "lower"}
    again = {**row, "attack": "quantise", "option": 4, "after": 0.1, "retrained": "results only"}
    write_json(Path("masked/test/robustness.json"), [row, again])
    root, _ = report("masked", "dense")
    part = section(root, "robustness")
    _, *body = [[cell.text for cell in line.children] for line in part.all("tr")]
    measure = "forget/probabilityprobability, 0 to 1"
    assert body == [
        ["relearn", "k=8", measure, "0.200", "0.650 ▼ worse", "0.900", "–"],
        ["quantise", "4", measure, "0.200", "0.100 ▲ better", "0.900", "results only"],
    ]
    assert "dense: no attacks were run" in part.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (5, "must be a list, got 5"),
        ({}, "must be a list, got {}"),
        ([5], "[0]: must be an object, got 5"),
        (
            [{"attack": 5, "measure": "m", "direction": "lower"}],
            "[0].attack: must be a text, got 5",
        ),
        ([{"attack": "a", "measure": "m"}], "key '[0].direction' is missing"),
    ],
)
def test_robustness_that_is_none(runs, report, content, said):
    write_json(Path("masked/test/robustness.json"), content)
    root, _ = report("masked")
    assert f"robustness.json: {said}" in root.text


# -- bad input -------------------------------------------------------------------------------------


def test_bad_input_is_refused(runs, refused):
    Path("there.html").write_text("mine")
    assert "run folder nowhere does not exist" in refused("nowhere")
    assert "is no folder" in refused("masked/wagle.json")
    line = refused("masked", output="there.html")
    assert "there.html exists already" in line and "--overwrite" in line
    assert "must end in .html" in refused("masked", output="a.pdf")
    assert "examples: must be at least 0" in refused("masked", examples=-1)
    assert "--target: nowhere does not exist" in refused("masked", target="nowhere")
    assert "metrics.json" in refused("masked", retrained=".")
    Path("untested").mkdir()
    assert "nothing to report: untested" in refused("untested")
    assert "runs: a folder's name is empty" in refused("")
    Path("site.html").mkdir()
    line = refused("masked", output="site.html", overwrite=True)
    assert "site.html is a folder: name a file in it" in line
    assert Path("there.html").read_text() == "mine" and not Path("out.html").exists()


def test_overwrite_and_a_write_that_fails(runs, report, monkeypatch):
    report("masked")
    before = Path("out.html").read_bytes()
    report("dense", overwrite=True)
    after = Path("out.html").read_bytes()
    assert after != before

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(OSError, match="disk full"):
        report("masked", overwrite=True)
    assert Path("out.html").read_bytes() == after and not list(Path().glob(".out.html*"))
