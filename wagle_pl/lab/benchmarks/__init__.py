"""Benchmarks that the WAGLE paper does not use: KnowUnDo, LUME and RWKU."""

from wagle_pl.lab.benchmarks import suites
from wagle_pl.lab.benchmarks.sources import KnowUnDoDataModule, LUMEDataModule, RWKUDataModule

__all__ = ["KnowUnDoDataModule", "LUMEDataModule", "RWKUDataModule", "suites"]
