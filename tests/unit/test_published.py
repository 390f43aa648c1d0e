"""The numbers published with TOFU, from the result files published with it."""

import json

import pytest
from conftest import TOFU, TOFU_LOGS, write_rows

from wagle_pl import WagleError
from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation import tofu_forget_quality, tofu_model_utility
from wagle_pl.evaluation.functional import ks_test
from wagle_pl.evaluation.published import truth_ratios

pytestmark = pytest.mark.skipif(
    not TOFU_LOGS.is_dir(), reason="published result files are not here"
)


@pytest.fixture(scope="module")
def results():
    return {
        name: json.loads((TOFU_LOGS / f"llama2-7b_{name}.json").read_text())
        for name in ("full", "retain90")
    }


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        ("full", "geometric", 0.6226773637427151),
        ("retain90", "geometric", 0.613744995233942),
        ("full", "arithmetic", 0.5858860350928219),
        ("retain90", "arithmetic", 0.5752399175318537),
    ],
)
def test_model_utility(results, name, form, expected):
    assert tofu_model_utility(results[name], form) == pytest.approx(expected, abs=1e-9)


def test_forget_quality(results):
    assert tofu_forget_quality(results["full"], results["retain90"]) == pytest.approx(
        1.834066410994743e-21, rel=1e-9
    )
    statistic, _ = ks_test(truth_ratios(results["full"]), truth_ratios(results["retain90"]))
    assert statistic == pytest.approx(0.3966666667, abs=1e-9)


@pytest.mark.parametrize("numbers", [range(200), range(300)])
def test_forget_quality_of_other_rows_of_the_same_number(results, numbers):
    """The published logs begin with row 200 of ``forget10``: its rows 0 to 199 are not theirs."""
    questions = [row["question"] for row in load_rows(str(TOFU / "forget10_perturbed.json"))]
    ours = json.loads(json.dumps(cut(results["full"], numbers)))
    for row, said in ours["eval_log_forget.json"]["generated_text"].items():
        said[0] = questions[int(row)]
    with pytest.raises(WagleError, match="on other forget rows"):
        tofu_forget_quality(ours, cut(results["retain90"], numbers))
    assert tofu_forget_quality(ours, results["retain90"], compare_rows=False) < 1e-10


def cut(result, numbers):
    log = result["eval_log_forget.json"]
    return {
        "eval_log_forget.json": {
            k: {str(n): column[str(n)] for n in numbers} for k, column in log.items()
        }
    }


def test_the_published_log_beside_our_rows(results, wagle, fails, tiny_model, tmp_path):
    """Rows 0 to 199 of ``forget10`` and 200 rows of the log that are none of them; then those that are."""
    for name, count in (("cut", 200), ("whole", 300)):
        (tmp_path / f"{name}.json").write_text(json.dumps(cut(results["retain90"], range(count))))
    run = (
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        tiny_model,
        "--model.generate",
        "false",
    )
    rows = load_rows(str(TOFU / "forget10_perturbed.json"))
    forget = write_rows(tmp_path / "rows.jsonl", rows[:200])
    test = ("--data.test", json.dumps({"forget": forget}))
    message = fails(*run, *test, "--model.output", "out", "--model.retrained", "cut.json")
    assert "cut.json is on other forget rows: 200 differ" in message
    asked = {
        said[0].removeprefix("[INST] ").removesuffix(" [/INST]")
        for said in results["retain90"]["eval_log_forget.json"]["generated_text"].values()
    }
    write_rows(tmp_path / "rows.jsonl", [row for row in rows if row["question"] in asked])
    module = wagle(*run, *test, "--model.output", "out", "--model.retrained", "whole.json").model
    assert 0 <= module.metrics["forget_quality"] < 0.1
