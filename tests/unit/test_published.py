"""The numbers published with TOFU, from the result files published with it."""

import json

import pytest
from helpers import TOFU, TOFU_LOGS, cut_log

from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation import Observations, Records, Results, find_suite
from wagle_pl.evaluation.functional import ks_test
from wagle_pl.evaluation.tofu_result import from_result

pytestmark = pytest.mark.skipif(
    not TOFU_LOGS.is_dir(), reason="published result files are not here"
)


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        ("full", "geometric", 0.6226773637427151),
        ("retain90", "geometric", 0.613744995233942),
        ("full", "arithmetic", 0.5858860350928219),
        ("retain90", "arithmetic", 0.5752399175318537),
    ],
)
def test_model_utility(published, name, form, expected):
    seen = Observations(from_result(published[name]), truth_ratio_form=form)
    utility = find_suite("tofu").measures(seen)["model_utility"]
    assert utility == pytest.approx(expected, abs=1e-9)


def quality(result, retrained):
    """Forget quality of a result beside a retrained model's: of the same questions, and of any."""
    others = Results(tables=from_result(retrained))
    seen = Observations(from_result(result), retrained=others, tofu_retrained=others)
    measures = find_suite("tofu").measures(seen)
    return measures["forget_quality"], measures["tofu/forget_quality"]


def test_forget_quality(published):
    found = quality(published["full"], published["retain90"])
    assert found == pytest.approx((1.834066410994743e-21,) * 2, rel=1e-9)
    tables = [from_result(published[name])["forget"] for name in ("full", "retain90")]
    statistic, _ = ks_test(*(Records(table).truth_ratios() for table in tables))
    assert statistic == pytest.approx(0.3966666667, abs=1e-9)


@pytest.mark.parametrize("numbers", [range(200), range(300)])
def test_forget_quality_of_other_rows_of_the_same_number(published, numbers):
    """The published logs begin with row 200 of ``forget10``: its rows 0 to 199 are not theirs."""
    questions = [row["question"] for row in load_rows(str(TOFU / "forget10_perturbed.json"))]
    ours = json.loads(json.dumps(cut_log(published["full"], numbers)))
    for row, said in ours["eval_log_forget.json"]["generated_text"].items():
        said[0] = questions[int(row)]
    undefined, _ = quality(ours, cut_log(published["retain90"], numbers))
    assert "is on other forget rows" in str(undefined)
    assert quality(ours, published["retain90"])[1] < 1e-10
