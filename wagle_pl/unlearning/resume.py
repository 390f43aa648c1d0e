"""Where a run goes on: at the start of an optimiser step, with the random numbers that it had there.

A checkpoint may be asked for between two steps (by time, at an exception), when gradients of some micro-batches have
been added up. They are not kept: the checkpoint says that the step has not begun, and a resumed run makes all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepStart(NamedTuple):
    """The start of an optimiser step.

    Attributes:
        batch: how many micro-batches of the epoch came before.
        step: how many optimiser steps.
        random: see :func:`random_state`.
    """

    batch: int
    step: int
    random: dict[str, Tensor]


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


def rewind(loops: Mapping[str, Any], batch: int) -> None:
    """Make Lightning's record of its loops say that an epoch has seen ``batch`` micro-batches and is about to go on.

    Args:
        loops: ``checkpoint["loops"]``; changed in place.
        batch: at most as many as it says.
    """
    fit = loops["fit_loop"]
    for loader in fit["state_dict"].get("combined_loader", []):
        loader["batches"] = batch
    progress = fit["epoch_loop.batch_progress"]
    ahead = progress["current"]["ready"] - batch
    before = progress["total"]["ready"] - ahead
    progress["current"] = dict.fromkeys(progress["current"], batch)
    progress["total"] = dict.fromkeys(progress["total"], before)
    progress["is_last_batch"] = False
