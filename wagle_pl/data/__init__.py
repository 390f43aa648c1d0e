"""Rows to tokens to paired batches; one LightningDataModule a benchmark."""

from wagle_pl.data.copyright import CopyrightDataModule
from wagle_pl.data.detox import DetoxDataModule
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.muse import MUSEDataModule
from wagle_pl.data.people import PeopleDataModule
from wagle_pl.data.suite import SuiteDataModule
from wagle_pl.data.tofu import TOFUDataModule
from wagle_pl.data.wmdp import WMDPDataModule

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
