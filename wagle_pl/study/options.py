"""Options of a study that are another class's: checked before any work is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import lightning as L
import torch

from wagle_pl.core.environment import silence, trainer_errors
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import Entry, check_options, find_class, option_names, split
from wagle_pl.evaluation import Evaluate
from wagle_pl.unlearning import UnlearnModule

#: Options of UnlearnModule and Evaluate, and of Trainer, that the study sets itself.
_MODULE_OPTIONS = ("model", "output", "overwrite", "objective", "mask", "adapter", "lr")
_MODULE_OPTIONS += ("target", "retrained", "generate")
_TRAINER_OPTIONS = ("max_steps", "max_epochs", "min_steps", "min_epochs", "max_time")
_TRAINER_OPTIONS += ("accumulate_grad_batches", "limit_val_batches", "logger", "fast_dev_run")
_TRAINER_OPTIONS += ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
_TRAINER_OPTIONS += ("default_root_dir",)


def typed(cls: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a class, checked; what is text becomes what it stands for, all else stays."""
    found = check_options(cls, given, where)
    return {k: found[k] if isinstance(value, str) else value for k, value in given.items()}


def read_optimizer(entry: Entry) -> partial[torch.optim.Optimizer]:
    """The optimiser of all runs, without its learning rate.

    Raises:
        WagleError: if there is no such class, or it does not have the options.
    """
    name, options = split(entry, "optimizer")
    if "lr" in options:
        raise WagleError("optimizer.lr comes from --learning_rates: leave it out")
    cls = getattr(torch.optim, name, None)  # other libraries have classes of the same names
    if not isinstance(cls, type):
        cls = find_class(torch.optim.Optimizer, name, "optimizer")
    check_options(cls, options, f"optimizer {name}")
    made = partial(cls, **options)
    try:
        made([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
    except (TypeError, ValueError) as error:
        raise WagleError(f"optimizer {name}: {error}") from None
    return made


def read_module(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of :class:`UnlearnModule`, and of :class:`Evaluate`, that hold for all runs.

    Raises:
        WagleError: if there is no such option, its value has no meaning, or the study sets it.
    """
    _refuse("--module", given, _MODULE_OPTIONS)
    tests = {name: value for name, value in given.items() if name in option_names(Evaluate)}
    module = {name: value for name, value in given.items() if name not in tests}
    module, tests = typed(UnlearnModule, module, "--module"), typed(Evaluate, tests, "--module")
    try:
        UnlearnModule(model="", **module)
        Evaluate(**tests)
    except WagleError as error:
        raise WagleError(f"--module: {error}") from None
    return module, tests


def read_trainer(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of Lightning's Trainer that hold for all runs.

    Raises:
        WagleError: if the study sets it, it asks for several devices, or Lightning refuses it.
    """
    _refuse("--trainer", given, _TRAINER_OPTIONS)
    found = {"devices": 1, **given}
    if str(found["devices"]) != "1" or found.get("num_nodes", 1) != 1:
        raise WagleError(
            "a study runs on one device: leave trainer.devices and trainer.num_nodes out"
        )
    with silence(), trainer_errors():
        L.Trainer(**found, logger=False, enable_checkpointing=False)
    return found


def _refuse(option: str, given: Mapping[str, Any], ours: Collection[str]) -> None:
    for name in given:
        if name in ours:
            raise WagleError(f"the study sets {name} itself: leave it out", option=f"{option}:")
