"""Where a run goes on: at a global batch, however it is cut into micro-batches.

A checkpoint may be asked for between two optimiser steps (by time, at an exception), when gradients
of some micro-batches have been added up. Training does not keep them: the checkpoint says that the
step has not begun. Attribution keeps its sums, and goes on behind the rows that are in them.

Lightning counts micro-batches. A checkpoint holds a :class:`~wagle_pl.data.batches.Position` beside
its counters, and when one is loaded the counters are written anew from it. Only this module knows
how Lightning lays out its loops in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import lightning as L
import torch
from torch import Tensor

if TYPE_CHECKING:
    from wagle_pl.lm.module import StreamData


class StepStart(NamedTuple):
    """The start of an optimiser step."""

    epoch: int
    batch: int  # how many micro-batches of the epoch came before
    step: int  # how many optimiser steps of the run
    random: dict[str, Tensor]  # see random_state


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout draws from: torch's own, and a CUDA device's."""
    states = {"rng_state": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_rng_state"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators where they were; those of which nothing is known stay as they are."""
    if "rng_state" in states:
        torch.set_rng_state(states["rng_state"].cpu())
    if "cuda_rng_state" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda_rng_state"].cpu(), device)


def keep_position(
    checkpoint: dict[str, Any], trainer: L.Trainer, epoch: int, micro_batches: int
) -> None:
    """Make a checkpoint that is being saved say that an epoch, counted from 0, has seen so many
    micro-batches: at most as many as Lightning has counted."""
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
    """Write Lightning's counters in a checkpoint anew for this run's batches, before they are read.

    Returns:
        The loader's state, for :func:`begin`; None, and nothing is written, where loaders are the
        user's own.

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
    # written by a hook at a step's end: Lightning ends that step when it goes on
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

    The loader may have been made before the checkpoint was read (counting the steps makes it), and
    Lightning takes the first epoch for one that is under way whenever ``max_steps`` is set.
    """
    if loader_state is not None:
        trainer.train_dataloader.load_state_dict(loader_state)
    if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
        trainer.fit_loop.epoch_loop.restarting = False
