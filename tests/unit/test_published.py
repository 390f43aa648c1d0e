"""The numbers published with TOFU, from the result files published with it."""

import json

import pytest
from helpers import TOFU, TOFU_LOGS, cut_log

from wagle_pl import WagleError
from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation import Records, tofu_forget_quality, tofu_model_utility
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
    assert tofu_model_utility(published[name], form) == pytest.approx(expected, abs=1e-9)


def test_forget_quality(published):
    assert tofu_forget_quality(published["full"], published["retain90"]) == pytest.approx(
        1.834066410994743e-21, rel=1e-9
    )
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
    with pytest.raises(WagleError, match="on other forget rows"):
        tofu_forget_quality(ours, cut_log(published["retain90"], numbers))
    assert tofu_forget_quality(ours, published["retain90"], compare_rows=False) < 1e-10
