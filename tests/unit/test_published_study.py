"""The studies that READMEs of ``configs/`` tell of: their tables, what is made of them, and what is written."""

import json
import math
from pathlib import Path

import pytest

from wagle_pl.evaluation.results import load_table
from wagle_pl.study.recovery import at_the_level, tables
from wagle_pl.study.summary import Compared, summarise
from wagle_pl.study.text import by_objective, shown

STUDIES = sorted((Path(__file__).parents[2] / "configs").glob("*/results/study*.json"))


@pytest.fixture(
    scope="module", params=STUDIES, ids=lambda path: f"{path.parents[1].name}/{path.stem}"
)
def study(request):
    return request.param


@pytest.fixture(scope="module")
def found(study):
    return json.loads(study.read_text())


def same(a, b):
    """Whether plain data are the same but for the last bits of numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def test_the_comparison_follows_from_the_table(found, study):
    by = Compared(
        found["forget"],
        found["utility"],
        found["target"],
        found["forget_level"],
        found["forget_sign"],
        found["utility_sign"],
    )
    rows = load_table(study.with_suffix(".parquet"))
    arms = [arm for arm in found["headline"] if arm["own_learning_rates"]]
    own = {(arm["objective"], arm["mask"]) for arm in arms}
    assert same(json.loads(json.dumps(summarise(rows, by, own))), found["headline"])
    ends = at_the_level(rows, by, found["retrained"]) if found.get("ends") else []
    assert same(json.loads(json.dumps(ends)), found.get("ends", []))
    assert (
        found["target"]["forget/probability"] >= 0.8
        and found["retrained"]["forget/probability"] < 0.3
    )


def test_the_readme_says_what_was_found(found, study):
    said = "\n".join(page.read_text() for page in study.parents[1].glob("*.md"))
    for objective, arms in by_objective(found).items():
        assert f"### {objective}" in said
        for row in shown(arms)[1]:
            assert f"| {' | '.join(row)} |" in said, row
    for title, _, lines in tables(found.get("ends", [])):
        assert f"### {title}" in said
        for line in lines:
            assert f"| {' | '.join(line)} |" in said, (title, line)
