"""The studies that READMEs of ``configs/`` tell of: their tables, what is made of them, and what is written."""

import json
from pathlib import Path

import pytest

from wagle_pl.evaluation.tables import load_table
from wagle_pl.report.study import by_objective
from wagle_pl.study.summary import Compared, summarise
from wagle_pl.study.text import shown

STUDIES = sorted((Path(__file__).parents[1] / "configs").glob("*/study*.json"))


@pytest.fixture(scope="module", params=STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def study(request):
    return request.param


@pytest.fixture(scope="module")
def found(study):
    return json.loads(study.read_text())


def rounded(value):
    """Plain data with floats to nine digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 9))


def test_the_comparison_follows_from_the_table(found, study):
    by = Compared(
        found["forget"], found["utility"], found["target"], found["forget_level"], found["forget_sign"],
        found["utility_sign"],
    )  # fmt: skip
    rows = load_table(study.with_suffix(".parquet"))
    again = summarise(rows, by)
    told = [{name: arm[name] for name in ours} for arm, ours in zip(found["headline"], again, strict=True)]
    assert rounded(again) == rounded(told)
    assert found["target"]["forget/probability"] >= 0.8 and found["retrained"]["forget/probability"] < 0.3


def test_the_readme_says_what_was_found(found, study):
    said = (study.parent / "README.md").read_text()
    for objective, arms in by_objective(found).items():
        assert f"### {objective}" in said
        for row in shown(arms)[1]:
            assert f"| {' | '.join(row)} |" in said, row
