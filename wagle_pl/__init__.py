"""Weight-attribution-guided unlearning of language models (WAGLE, arXiv 2410.17509) on PyTorch Lightning."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AttributionModule": "attribution",
    "CopyrightDataModule": "data",
    "DetoxDataModule": "data",
    "EvaluationModule": "evaluation",
    "FinetuneModule": "unlearning",
    "ForgetRetainDataModule": "data",
    "LoRA": "unlearning",
    "MUSEDataModule": "data",
    "Objective": "objectives",
    "PeopleDataModule": "data",
    "Score": "attribution",
    "Suite": "evaluation",
    "TOFUDataModule": "data",
    "UnlearnModule": "unlearning",
    "WMDPDataModule": "data",
    "WagleError": "core.errors",
    "WeightMask": "masks",
    "ZeRO": "strategies",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import wagle_pl`` itself is instant."""
    if name in _HOME:
        return getattr(import_module(f"wagle_pl.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
