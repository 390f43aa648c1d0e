"""The studies that READMEs of ``configs/`` tell of: their tables, what is made of them, and what is written."""

import json
import math
from pathlib import Path

import pytest

from wagle_pl.evaluation.results import load_table
from wagle_pl.lab.study.recovery import at_the_level, tables
from wagle_pl.lab.study.summary import Compared, mean_std, summarise
from wagle_pl.lab.study.text import by_objective, shown

CONFIGS = Path(__file__).parents[2] / "configs"
STUDIES = sorted(CONFIGS.glob("*/results/study*.json"))


@pytest.fixture(
    scope="module", params=STUDIES, ids=lambda path: f"{path.parents[1].name}/{path.stem}"
)
def study(request):
    return request.param


@pytest.fixture(scope="module")
def found(study):
    return json.loads(study.read_text())


def same(a, b):
    """Whether plain data are the same in the six digits that are stored."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=6e-6, abs_tol=1e-9)
    return a == b


def by(found):
    """What a study goes by."""
    names = ("forget", "utility", "target", "forget_level", "forget_sign", "utility_sign")
    return Compared(*(found[name] for name in names))


def test_the_comparison_follows_from_the_table(found, study):
    rows = load_table(study.with_suffix(".parquet"))
    arms = [arm for arm in found["headline"] if arm["own_learning_rates"]]
    own = {(arm["objective"], arm["mask"]) for arm in arms}
    assert same(json.loads(json.dumps(summarise(rows, by(found), own))), found["headline"])
    ends = at_the_level(rows, by(found), found["retrained"]) if found.get("ends") else []
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


# -- configs/people/survival.md -----------------------------------------------------------------------

ATTACKS = ("no attack", "relearn_forget_5", "relearn_forget_20", "relearn_retain", "quantise_4bit")


def survivors(found):
    """The rows of the table: an arm of which a seed reaches the level each."""
    ends = {(e["objective"], e["mask"], e["measure"], e["what"]): e for e in found["ends"]}
    rows = []
    for arm in found["headline"]:
        key = arm["objective"], arm["mask"]
        kept = ends.get((*key, "probability kept", "retain"))
        if kept is None or kept["mean"] is None:
            continue
        came = [ends[(*key, "forget/probability", attack)] for attack in ATTACKS]
        cells = [mean_std(e["mean"], e["std"]) for e in (kept, *came)]
        rows.append(f"| {key[0]} | {key[1]} | {kept['n']}/{arm['seeds']} | {' | '.join(cells)} |")
    return rows


def test_the_table_of_survivors_follows_from_the_runs():
    found = json.loads((CONFIGS / "people/results/survival.json").read_text())
    rows = load_table(CONFIGS / "people/results/survival.parquet")
    ends = at_the_level(rows, by(found), found["retrained"])
    assert same(json.loads(json.dumps(ends)), found["ends"])
    page = (CONFIGS / "people/survival.md").read_text(encoding="utf-8")
    assert len(survivors(found)) >= 16
    for line in survivors(found):
        assert line in page, line
