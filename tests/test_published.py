"""The numbers published with TOFU, from the result files published with it."""

import json

import pytest
from conftest import TOFU_LOGS

from wagle_pl.evaluation import tofu_forget_quality, tofu_model_utility
from wagle_pl.evaluation.functional import ks_test
from wagle_pl.evaluation.tofu import truth_ratios

pytestmark = pytest.mark.skipif(not TOFU_LOGS.is_dir(), reason="published result files are not here")


@pytest.fixture(scope="module")
def results():
    return {name: json.loads((TOFU_LOGS / f"llama2-7b_{name}.json").read_text()) for name in ("full", "retain90")}


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
    assert tofu_forget_quality(results["full"], results["retain90"]) == pytest.approx(1.834066410994743e-21, rel=1e-9)
    statistic, _ = ks_test(truth_ratios(results["full"]), truth_ratios(results["retain90"]))
    assert statistic == pytest.approx(0.3966666667, abs=1e-9)
