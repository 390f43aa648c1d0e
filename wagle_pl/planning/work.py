"""What a run writes, and what it computes."""

from __future__ import annotations

from typing import Union

from wagle_pl.planning.architecture import Architecture, Size
from wagle_pl.planning.memory import FP32, in_step_per_weight, moving, state_bytes, sums_per_weight
from wagle_pl.planning.planned import PlannedRun


def disk_bytes(model: Union[Architecture, Size], run: PlannedRun) -> dict[str, float]:
    """Bytes of what a run writes: file -> size.

    A mask N / 8; a model N weights as it is stored; a checkpoint 4 bytes for each of the S weights
    that move, and the optimiser's state; of attribution the sums that outlast a step.
    """
    n = model.weights
    if run.task == "test":
        return {}
    if run.task == "attribution":
        return {"mask": n / 8, "checkpoint": (sums_per_weight(run) - in_step_per_weight(run)) * n}
    checkpoint = FP32 * moving(model, run) + state_bytes(run.optimizer, moving(model, run))
    return {"checkpoint": checkpoint, "model": n * model.stored}


def step_tokens(run: PlannedRun) -> int:
    """Tokens of a micro-batch on all devices: rows of one stream, or as many of two."""
    return (
        run.batch_size
        * run.max_length
        * run.devices
        * (2 if run.task in ("attribution", "unlearning") else 1)
    )


def step_flops(model: Architecture, run: PlannedRun) -> float:
    """Floating-point operations of a micro-batch on all devices, without those of attention between
    tokens.

    2 N' a token forward and 4 N' backward (Kaplan et al. 2020, arXiv 2001.08361): 6 N' of training.
    N' is N without an embedding that is not the output matrix too. Checkpointing adds a forward
    pass. Attribution estimates a Hessian on half of its tokens (the retain rows): one more backward
    pass for a draw (under ZeRO-3 and a forward pass), three for Hutchinson's, none for the Fisher.
    """
    n = model.weights - (0 if model.tied else model.vocabulary * model.hidden)
    if run.task == "test":
        return 2.0 * n * step_tokens(run)
    forward = backward = 1.0
    if run.estimator is not None:
        backward += 0.5 * run.estimator.backward_passes
        forward += 0.5 if run.stage == 3 else 0
    if run.gradient_checkpointing:
        forward += backward
    return (2 * forward + 4 * backward) * n * step_tokens(run)
