"""From rows to tokens to paired batches."""

from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.people import PeopleDataModule
from wagle_pl.data.tofu import TOFUDataModule

__all__ = ["ForgetRetainDataModule", "PeopleDataModule", "TOFUDataModule"]
