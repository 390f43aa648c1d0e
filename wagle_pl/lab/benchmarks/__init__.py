"""Benchmarks: tables of sources, and suites of measures. (TOFU, whose suite is the default, is in
:mod:`wagle_pl.data` and :mod:`wagle_pl.evaluation`.)"""

from wagle_pl.lab.benchmarks import suites
from wagle_pl.lab.benchmarks.more import KnowUnDoDataModule, LUMEDataModule, RWKUDataModule
from wagle_pl.lab.benchmarks.paper import (
    CopyrightDataModule,
    DetoxDataModule,
    MUSEDataModule,
    WMDPDataModule,
)
from wagle_pl.lab.benchmarks.table import SuiteDataModule

__all__ = [
    "CopyrightDataModule",
    "DetoxDataModule",
    "KnowUnDoDataModule",
    "LUMEDataModule",
    "MUSEDataModule",
    "RWKUDataModule",
    "SuiteDataModule",
    "WMDPDataModule",
    "suites",
]
