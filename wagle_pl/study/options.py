"""Options of a study that are checked before any work is done."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional

import lightning as L
import torch

from wagle_pl.core.environment import silence, trainer_in_the_making
from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation import Evaluate, EvaluationModule
from wagle_pl.study.configured import Entry, split, typed
from wagle_pl.study.grid import MaskChoice, ObjectiveChoice
from wagle_pl.unlearning import UnlearnModule, optim

#: What the study sets itself, for every run.
_OURS = {
    "model",
    "output",
    "overwrite",
    "objective",
    "mask",
    "adapter",
    "target",
    "retrained",
    "generate",
    "self",
}
_OURS |= {"lr"}  # of learning_rates
_TRAINER = {
    *(
        "max_steps",
        "max_epochs",
        "min_steps",
        "min_epochs",
        "max_time",
        "accumulate_grad_batches",
        "logger",
    ),
    *(
        "enable_checkpointing",
        "enable_progress_bar",
        "enable_model_summary",
        "default_root_dir",
        "fast_dev_run",
        "self",
    ),
}


def _names(cls: type) -> set[str]:
    """Options of a class and of those it hands ``kwargs`` on to."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.startswith("wagle_pl") and "__init__" in vars(base):
            found |= set(inspect.signature(base.__init__).parameters)
    return found - {"kwargs"}


#: Options of the tests, along a run and of target and retrained model.
TEST_OPTIONS = _names(Evaluate) - _OURS
#: Options that hold for target and retrained model too.
SHARED_OPTIONS = TEST_OPTIONS | _names(EvaluationModule) - _OURS


def split_module(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of ``--module``: those of :class:`UnlearnModule`, and those of its tests."""
    tests = {name: value for name, value in given.items() if name in TEST_OPTIONS}
    return {name: value for name, value in given.items() if name not in tests}, tests


def check_module(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of :class:`UnlearnModule` and of its tests that hold for all runs.

    Raises:
        WagleError: if there is no such option, its value has no meaning, or the study sets it.
    """
    _checked("module", given, _names(UnlearnModule) - _OURS | TEST_OPTIONS)
    own, tests = split_module(given)
    own = typed(UnlearnModule, own, "--module")
    tests = typed(EvaluationModule, tests, "--module")
    try:
        UnlearnModule(model="", **own)
        Evaluate(**tests)
    except WagleError as error:
        raise WagleError(f"--module: {str(error).removeprefix('model.')}") from None
    return {name: {**own, **tests}[name] for name in given}


def check_trainer(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of Lightning's Trainer that hold for all runs; one device unless said otherwise.

    Raises:
        WagleError: if there is no such option, the study sets it, it asks for several devices, or Lightning refuses it.
    """
    found = _checked(
        "trainer", given, set(inspect.signature(L.Trainer.__init__).parameters) - _TRAINER
    )
    if str(found.setdefault("devices", 1)) != "1" or found.get("num_nodes", 1) != 1:
        raise WagleError(
            "a study runs on one device: leave trainer.devices and trainer.num_nodes out"
        )
    with silence(), trainer_in_the_making():
        L.Trainer(**found, logger=False, enable_checkpointing=False)
    return found


def _checked(option: str, given: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    for name in given:
        if name not in known:
            raise WagleError(
                f"--{option} has no option {name!r} here; there are: {', '.join(sorted(known))}"
            )
    return dict(given)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Seeds, each there once."""
    found = list(seeds)
    if not found or len(set(found)) < len(found):
        raise WagleError(f"seeds must be different numbers, got {found}")
    return found


def check_length(steps: Optional[int], epochs: Optional[int]) -> dict[str, int]:
    """The length of a run as Trainer options."""
    if steps is not None and epochs is not None:
        raise WagleError("give --steps or --epochs, not both")
    check_positive(steps=steps, epochs=epochs)
    return {"max_epochs": epochs or 5} if steps is None else {"max_steps": steps}


def check_positive(**values: Optional[int]) -> None:
    """Refuse numbers below 1; None is no number."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise WagleError(f"--{name} must be at least 1, got {value}")


def check_only(
    names: Iterable[str], objectives: Sequence[ObjectiveChoice], masks: Sequence[MaskChoice]
) -> dict[str, set[str]]:
    """The objectives and masks to run in this sitting: kind -> names; a kind that is not named is not restricted.

    Raises:
        WagleError: if there is none of a name, naming those there are.
    """
    known = {
        "objective": [choice.name for choice in objectives],
        "mask": [choice.name for choice in masks],
    }
    found: dict[str, set[str]] = {}
    for name in names:
        kinds = [kind for kind, have in known.items() if name in have]
        if not kinds:
            raise WagleError(
                f"--only: no objective or mask is called {name!r}; there are: "
                f"{', '.join([*known['objective'], *known['mask']])}"
            )
        for kind in kinds:
            found.setdefault(kind, set()).add(name)
    return found


class Optimizer:
    """The optimiser of all runs.

    Args:
        entry: name of a class here or in ``torch.optim``, or ``class_path`` and ``init_args``.

    Raises:
        WagleError: if there is no such class, or it does not have the options.
    """

    def __init__(self, entry: Entry) -> None:
        name, self.options = split(entry, "optimizer")
        if "lr" in self.options:
            raise WagleError("optimizer.lr comes from --learning_rates: leave it out")
        module, _, short = name.rpartition(".")
        try:
            places = [importlib.import_module(module)] if module else [optim, torch.optim]
        except ImportError as error:
            raise WagleError(f"optimizer {name!r} cannot be imported: {error}") from None
        self.cls: Any = next(
            (getattr(place, short) for place in places if hasattr(place, short)), None
        )
        if not (isinstance(self.cls, type) and issubclass(self.cls, torch.optim.Optimizer)):
            raise WagleError(
                f"unknown optimizer {name!r}; choose MaskedAdamW, Sophia, one of torch.optim, or a class path"
            )
        try:
            self.at(1e-5)([torch.nn.Parameter(torch.zeros(1))])
        except (TypeError, ValueError) as error:
            raise WagleError(f"optimizer {name}: {error}") from None

    @property
    def definition(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"class": f"{self.cls.__module__}.{self.cls.__qualname__}", "options": self.options}

    def at(self, lr: float) -> Callable[[Any], torch.optim.Optimizer]:
        """Parameters -> optimiser, with a learning rate."""
        return lambda parameters: self.cls(parameters, lr=lr, **self.options)
