"""Suites: which measures a benchmark has, and what they need to be observed."""

from __future__ import annotations

from typing import Union

from wagle_pl.core.registry import resolve
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.sets import SetMeasures, Value, attempt
from wagle_pl.evaluation.suites.base import Observations, Suite, defined, of_set
from wagle_pl.evaluation.suites.benchmarks import (
    CopyrightSuite,
    DetoxSuite,
    GenericSuite,
    MUSESuite,
    WMDPSuite,
)
from wagle_pl.evaluation.suites.catalogue import Info
from wagle_pl.evaluation.suites.tofu import TOFUSuite

__all__ = [
    "CopyrightSuite",
    "DetoxSuite",
    "GenericSuite",
    "Info",
    "MUSESuite",
    "Observations",
    "SetMeasures",
    "Suite",
    "TOFUSuite",
    "Undefined",
    "Value",
    "WMDPSuite",
    "attempt",
    "defined",
    "find_suite",
    "of_set",
]

#: Short name, as a data module's attribute ``suite`` or ``--model.suite`` has it -> class.
SUITES = {
    "copyright": CopyrightSuite,
    "detox": DetoxSuite,
    "generic": GenericSuite,
    "muse": MUSESuite,
    "tofu": TOFUSuite,
    "wmdp": WMDPSuite,
}


def find_suite(suite: Union[Suite, str]) -> Suite:
    """A suite by its short name or class path.

    Raises:
        WagleError: listing the valid names.
    """
    if isinstance(suite, str) and suite.lower() in SUITES:
        return SUITES[suite.lower()]()
    return resolve(Suite, suite, "model.suite")
