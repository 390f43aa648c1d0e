"""From rows to tokens to paired batches; one LightningDataModule per benchmark."""

from wagle_pl.data.benchmarks import (
    CopyrightDataModule,
    DetoxDataModule,
    MUSEDataModule,
    TOFUDataModule,
    WMDPDataModule,
)
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.people import PeopleDataModule
from wagle_pl.data.suite import SuiteDataModule

__all__ = [
    "CopyrightDataModule",
    "DetoxDataModule",
    "ForgetRetainDataModule",
    "MUSEDataModule",
    "PeopleDataModule",
    "SuiteDataModule",
    "TOFUDataModule",
    "WMDPDataModule",
]
