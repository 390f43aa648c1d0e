"""Where a run continues: at a global batch, however it is split into micro-batches.

A checkpoint may be saved between two optimiser steps (by time, at an exception), when the gradients
of some micro-batches have been accumulated. Training does not save them: the checkpoint says that
the step has not begun. Attribution saves its sums, and continues after the rows in them.

Lightning counts micro-batches. In addition to these counters, a checkpoint holds a
:class:`~wagle_pl.data.batches.Position`, from which the counters are rewritten when it is loaded.
Only this module knows how Lightning lays out its loops in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, TypedDict

import lightning as L
import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.core.records import Record
from wagle_pl.core.schema import Count, check, schema_of
from wagle_pl.strategies.checkpoint import SmallSums

if TYPE_CHECKING:
    from wagle_pl.lm.module import StreamData


class Loaders(TypedDict):  # what each holds is checked by the loader that continues there
    combined_loader: Optional[list[dict[str, Any]]]


class FitLoop(TypedDict):
    state_dict: Loaders


class Loops(TypedDict):  # the rest is checked by :func:`check_restored`
    fit_loop: FitLoop


class OptimizerState(TypedDict):  # by the index of the parameter; empty without an optimiser
    state: Optional[dict[int, dict[str, Any]]]
    param_groups: Optional[list[dict[str, Any]]]


#: What Lightning and this package write into a checkpoint.
Checkpoint = TypedDict(
    "Checkpoint",
    {
        "pytorch-lightning_version": str,
        "epoch": Count,
        "global_step": Count,
        "loops": Optional[Loops],
        "callbacks": Optional[dict[str, dict[str, Any]]],
        "lr_schedulers": Optional[list[dict[str, Any]]],
        "optimizer_states": Optional[list[OptimizerState]],
        "state_dict": Optional[dict[str, Any]],
    },
)


class ModelFields(TypedDict):  # what a checkpoint says about its model
    name: str
    fingerprint: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    record: Record


class MaskFields(TypedDict):  # the digest of the run's mask, and what that was made from
    digest: str
    file: Optional[str]
    modules: Optional[list[str]]
    layers: Optional[str]
    matching: Optional[str]


class Reference(TypedDict):  # predictions at θ₀
    key: str
    logprobs: Tensor


class WholeSums(SmallSums):  # sums of an attribution in a checkpoint of one file
    sums: dict[str, list[Tensor]]
    passes: Count
    group: Count
    first: dict[str, float]


class Fields(TypedDict):  # what a module of this package adds to a checkpoint
    module: Optional[str]
    state_dict: Optional[dict[str, Tensor]]
    model: Optional[ModelFields]
    mask: Optional[MaskFields]
    references: Optional[dict[str, Reference]]
    objective: Optional[dict[str, float]]
    step_rule: Optional[dict[str, Any]]
    sums: Optional[dict[str, Any]]
    rng_state: Optional[Tensor]
    cuda_rng_state: Optional[Tensor]


def check_lightning(checkpoint: Any, where: str) -> None:
    """Refuse a checkpoint that Lightning would fail on; ``where`` names it."""
    check(checkpoint, Checkpoint, where)
    try:
        Version(checkpoint["pytorch-lightning_version"])
    except InvalidVersion as error:
        raise WagleError(f"{where}: pytorch-lightning_version: {error}") from None


def check_restored(checkpoint: Mapping[str, Any], trainer: L.Trainer, where: str) -> None:
    """Refuse states of loops and callbacks that are not like those which Lightning restores them
    into, since it does not check them."""
    check(checkpoint, Checkpoint, where)
    if not checkpoint.get("loops"):
        raise WagleError(f"{where} does not say at which step its run was: it has no loops")
    loop = schema_of(trainer.fit_loop.state_dict(), int)
    check(checkpoint["loops"]["fit_loop"], loop, f"{where}: loops.fit_loop")
    for callback in trainer.callbacks:
        state = (checkpoint.get("callbacks") or {}).get(callback.state_key)
        if state and type(callback).__module__.startswith(("lightning.", "wagle_pl.")):
            check(state, schema_of(callback.state_dict()), f"{where}: callbacks")


class StepStart(NamedTuple):
    """The start of an optimiser step."""

    epoch: int
    batch: int  # number of micro-batches of the epoch before it
    step: int  # number of optimiser steps of the run before it
    random: dict[str, Tensor]  # see random_state


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout draws from: torch's own, and a CUDA device's."""
    states = {"rng_state": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_rng_state"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states of the generators; those without a saved state stay as they are."""
    if "rng_state" in states:
        torch.set_rng_state(states["rng_state"].cpu())
    if "cuda_rng_state" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda_rng_state"].cpu(), device)


def keep_position(
    checkpoint: dict[str, Any], trainer: L.Trainer, epoch: int, micro_batches: int
) -> None:
    """Record in a checkpoint that is being saved how many micro-batches of an epoch, counted from
    0, are done: at most as many as Lightning has counted."""
    fit = checkpoint["loops"]["fit_loop"]
    progress = fit["epoch_loop.batch_progress"]
    ahead = progress["current"]["processed"] - micro_batches
    if ahead > 0:  # in the middle of a step
        progress["total"] = dict.fromkeys(progress["total"], progress["total"]["processed"] - ahead)
        progress["current"] = dict.fromkeys(progress["current"], micro_batches)
        progress["is_last_batch"] = False
    loader = trainer.train_dataloader
    if hasattr(loader, "state_at"):
        state = loader.state_at(epoch, micro_batches, trainer.num_training_batches)
        fit["state_dict"]["combined_loader"] = [state]


def recount(checkpoint: dict[str, Any], data: Optional[StreamData]) -> Optional[dict[str, Any]]:
    """Rewrite Lightning's counters in a checkpoint for this run's batches, before they are read.

    Returns:
        The loader's state, for :func:`begin`. If loaders are the user's own, it is None, and
        nothing is rewritten.

    Raises:
        WagleError: if the checkpoint is of a run with other global batches.
    """
    fit = checkpoint.get("loops", {}).get("fit_loop", {})
    states = fit.get("state_dict", {}).get("combined_loader")
    if not states or data is None:
        return None
    loader = data.train_dataloader()
    position, steps = loader.check(states[0]), checkpoint["global_step"]
    begun = bool(position.step or position.rows)
    done = loader.sampler.micro_batches(position)
    before = (steps - position.step) * loader.sampler.accumulate
    batches = fit["epoch_loop.batch_progress"]
    # if a hook at the end of a step wrote it, Lightning finishes that step when it resumes
    hooks_have_run = batches["current"]["completed"] == batches["current"]["processed"]
    ending = 0 if hooks_have_run or position.rows or not position.step else 1
    current = {**dict.fromkeys(batches["current"], done), "completed": done - ending}
    total = {name: before + count for name, count in current.items()}
    batches |= {"current": current, "total": total, "is_last_batch": False}
    epochs = dict.fromkeys(("ready", "started"), position.epoch + begun)
    epochs |= dict.fromkeys(("processed", "completed"), position.epoch)
    fit["epoch_progress"] |= {"current": epochs, "total": dict(epochs)}
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - ending
    return states[0]


def begin(trainer: L.Trainer, loader_state: Optional[Mapping[str, Any]] = None) -> None:
    """Do what Lightning leaves undone when training starts, with what :func:`recount` returned.

    The loader may have been created before the checkpoint was read (to count the steps), and
    Lightning treats the first epoch as already begun whenever ``max_steps`` is set.
    """
    if loader_state is not None:
        trainer.train_dataloader.load_state_dict(loader_state)
    if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
        trainer.fit_loop.epoch_loop.restarting = False
