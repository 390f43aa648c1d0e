"""The forest plot of a study: which differences it shows."""

import pytest
from scipy.stats import t

from wagle_pl.lab.study.forest import differences, forest


def entry(mask, measure, what, values):
    return {"objective": "NPO", "mask": mask, "measure": measure, "what": what, "values": values}


def test_differences_are_paired_and_drawn_with_their_interval():
    values = {"0": 0.5, "1": 0.7, "2": 0.9}
    ends = [entry("dense", "probability kept", "retain", {"0": 0.4, "1": 0.5, "2": 0.6, "3": 0.1})]
    ends += [entry("row", "probability kept", "retain", values)]
    ends += [entry("row", "forget/probability", "no attack", values)]  # not one to compare
    ends += [entry("none", "probability kept", "retain", {})]
    (panel,) = differences({"ends": ends, "forget": "forget/probability"}).items()
    assert panel == ("NPO\nretain", {"row": pytest.approx([0.1, 0.2, 0.3])})
    (axes,) = forest(dict([panel])).axes
    assert sorted(axes.lines[1].get_xdata()) == pytest.approx([0.1, 0.2, 0.3])
    (interval,) = axes.collections[0].get_segments()
    reach = t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert [x for x, _ in interval] == pytest.approx([0.2 - reach, 0.2 + reach])


def test_utility_at_equal_forgetting_and_in_equal_steps_is_drawn_too():
    arms = [
        {"objective": "NPO", "mask": "dense", "values": {"0": 0.5, "2": 0.6}, "equal_steps": None}
    ]
    equal_steps = {"values": {"0": 0.05}, "difference": 0.05}
    arms += [{"objective": "NPO", "mask": "row", "values": {"0": 0.7}, "equal_steps": equal_steps}]
    assert differences({"headline": arms, "forget": "forget/probability"}) == {
        "NPO\nequal forgetting": {"row": [pytest.approx(0.2)]},
        "NPO\nequal forgetting and steps": {"row": [0.05]},
    }
