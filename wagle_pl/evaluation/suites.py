"""Suites by their names, and what OpenUnlearning measures in addition to them."""

from __future__ import annotations

from typing import Union

from wagle_pl.core.registry import resolve
from wagle_pl.evaluation.membership import MORE_MEMBERSHIP, membership
from wagle_pl.evaluation.openunlearning import FORMS
from wagle_pl.evaluation.records import Observations, Value
from wagle_pl.evaluation.suite import Suite
from wagle_pl.evaluation.tofu import TOFUSuite  # noqa: F401 -- found by its name here
from wagle_pl.evaluation.tofu_result import OPTION_SETS

#: OpenUnlearning's measures of answers in other words, in addition to TOFU's.
ALTERNATIVES = tuple(
    f"{form}_{short}" for form in FORMS.values() for short in ("probability", "rougeL_recall")
)


def more_of_openunlearning(suite: Suite, seen: Observations) -> dict[str, Value]:
    """What OpenUnlearning measures on TOFU or MUSE in addition to the suite's own."""
    values: dict[str, Value] = {}
    for name, table in seen.tables.items():
        if any(record.get("perturbed_nll") for record in table):
            values |= suite.of_set(seen, name, ALTERNATIVES[2 * (name in OPTION_SETS) :])
    if {*suite.members} <= seen.tables.keys():
        values |= membership(seen, *suite.members, MORE_MEMBERSHIP)
    return values


def find_suite(suite: Union[Suite, str]) -> Suite:
    """A suite by its short name (``tofu``), which data modules use too, or by its class path."""
    return resolve(Suite, suite, "model.suite")
