"""From rows to tokens to paired batches."""

from importlib import import_module
from typing import Any

from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.people import PeopleDataModule
from wagle_pl.data.tofu import TOFUDataModule

__all__ = ["ForgetRetainDataModule", "PeopleDataModule", "TOFUDataModule"]


def __getattr__(name: str) -> Any:
    """Data modules of benchmarks: earlier versions, and the files that they wrote, have them here."""
    if name.endswith("DataModule"):
        return getattr(import_module("wagle_pl"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
