"""``configs/people/survival.md``: its table follows from the stored runs."""

import json
from pathlib import Path
from typing import Any

from test_published_study import same

from wagle_pl.evaluation.results import load_table
from wagle_pl.study.recovery import at_the_level
from wagle_pl.study.summary import Compared

PEOPLE = Path(__file__).parents[2] / "configs/people"
ATTACKS = ("no attack", "relearn_forget_5", "relearn_forget_20", "relearn_retain", "quantise_4bit")


def lines(found: dict[str, Any]) -> list[str]:
    """The rows of the table: an arm of which a seed reaches the level each."""
    ends = {(e["objective"], e["mask"], e["measure"], e["what"]): e for e in found["ends"]}
    rows = []
    for arm in found["headline"]:
        key = arm["objective"], arm["mask"]
        kept = ends.get((*key, "probability kept", "retain"))
        if kept is None or kept["mean"] is None:
            continue
        came = [ends[(*key, "forget/probability", attack)] for attack in ATTACKS]
        cells = [
            f"{e['mean']:.3f}" + (f" ± {e['std']:.3f}" if e["n"] > 1 else "") for e in (kept, *came)
        ]
        rows.append(f"| {key[0]} | {key[1]} | {kept['n']}/{arm['seeds']} | {' | '.join(cells)} |")
    return rows


def test_the_table_follows_from_the_runs() -> None:
    found = json.loads((PEOPLE / "results/survival.json").read_text())
    by = Compared(
        *(found[name] for name in ("forget", "utility", "target", "forget_level")),
        *(found[name] for name in ("forget_sign", "utility_sign")),
    )
    rows = load_table(PEOPLE / "results/survival.parquet")
    ends = at_the_level(rows, by, found["retrained"])
    assert same(json.loads(json.dumps(ends)), found["ends"])
    page = (PEOPLE / "survival.md").read_text(encoding="utf-8")
    assert len(lines(found)) >= 16
    for line in lines(found):
        assert line in page, line
