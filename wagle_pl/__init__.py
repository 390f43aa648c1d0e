"""Unlearning of language models guided by weight attribution (WAGLE), on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wagle_pl.api import Forgotten, forget
    from wagle_pl.attribution import AttributionModule, Score
    from wagle_pl.core.errors import WagleError
    from wagle_pl.data import ForgetRetainDataModule, PeopleDataModule, TOFUDataModule
    from wagle_pl.evaluation import Evaluate, EvaluationModule, Suite
    from wagle_pl.lab.benchmarks import (
        CopyrightDataModule,
        DetoxDataModule,
        KnowUnDoDataModule,
        LUMEDataModule,
        MUSEDataModule,
        RWKUDataModule,
        WMDPDataModule,
    )
    from wagle_pl.masks import WeightMask
    from wagle_pl.objectives import Objective
    from wagle_pl.strategies import ZeRO
    from wagle_pl.unlearning import FinetuneModule, LoRA, UnlearnModule

__version__ = "0.1.0"

_HOME = {
    "AttributionModule": "attribution",
    "CopyrightDataModule": "lab.benchmarks",
    "DetoxDataModule": "lab.benchmarks",
    "Evaluate": "evaluation",
    "EvaluationModule": "evaluation",
    "FinetuneModule": "unlearning",
    "Forgotten": "api",
    "ForgetRetainDataModule": "data",
    "KnowUnDoDataModule": "lab.benchmarks",
    "LUMEDataModule": "lab.benchmarks",
    "LoRA": "unlearning",
    "MUSEDataModule": "lab.benchmarks",
    "Objective": "objectives",
    "PeopleDataModule": "data",
    "RWKUDataModule": "lab.benchmarks",
    "Score": "attribution",
    "Suite": "evaluation",
    "TOFUDataModule": "data",
    "UnlearnModule": "unlearning",
    "WMDPDataModule": "lab.benchmarks",
    "WagleError": "core.errors",
    "WeightMask": "masks",
    "forget": "api",
    "ZeRO": "strategies",
}

__all__ = [
    "AttributionModule",
    "CopyrightDataModule",
    "DetoxDataModule",
    "Evaluate",
    "EvaluationModule",
    "FinetuneModule",
    "ForgetRetainDataModule",
    "Forgotten",
    "KnowUnDoDataModule",
    "LUMEDataModule",
    "LoRA",
    "MUSEDataModule",
    "Objective",
    "PeopleDataModule",
    "RWKUDataModule",
    "Score",
    "Suite",
    "TOFUDataModule",
    "UnlearnModule",
    "WMDPDataModule",
    "WagleError",
    "WeightMask",
    "ZeRO",
    "__version__",
    "forget",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import wagle_pl`` itself is instant."""
    if name in _HOME:
        return getattr(import_module(f"wagle_pl.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
