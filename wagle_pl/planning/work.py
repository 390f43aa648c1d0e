"""What a run writes, and what it computes."""

from __future__ import annotations

from wagle_pl.planning.architecture import Architecture
from wagle_pl.planning.memory import FP32, moving, state_bytes, sums_per_weight
from wagle_pl.planning.run import Run


def disk_bytes(model: Architecture, run: Run) -> dict[str, float]:
    """Bytes of what a run writes: file -> size.

    A mask N / 8; a model N weights as it is stored; a checkpoint 4 bytes for each of the S weights that move, and the
    optimiser's state; of attribution the sums that outlast a step.
    """
    n = model.weights
    if run.task == "test":
        return {}
    if run.task == "attribution":
        in_step = FP32 if run.hessian in ("auto", "gauss_newton") else 0
        return {"mask": n / 8, "checkpoint": (sums_per_weight(run.hessian) - in_step) * n}
    checkpoint = FP32 * moving(model, run) + state_bytes(run.optimizer, moving(model, run))
    return {"checkpoint": checkpoint, "model": n * model.stored}


def step_tokens(run: Run) -> int:
    """Tokens of a micro-batch on all devices: rows of one stream, or as many of two."""
    return run.batch_size * run.max_length * run.devices * (2 if run.task in ("attribution", "unlearning") else 1)


def step_flops(model: Architecture, run: Run) -> float:
    """Floating-point operations of a micro-batch on all devices, without those of attention between tokens.

    2 N' a token forward and 4 N' backward (Kaplan et al. 2020, arXiv 2001.08361): 6 N' of training. N' is N without an
    embedding that is not the output matrix too. Checkpointing adds a forward pass. Attribution estimates a Hessian on
    half of its tokens (the retain rows): one more backward pass for a draw (under ZeRO-3 and a forward pass), three for
    Hutchinson's, none for the Fisher.
    """
    n = model.weights - (0 if model.tied else model.vocabulary * model.hidden)
    if run.task == "test":
        return 2.0 * n * step_tokens(run)
    forward = backward = 1.0
    if run.task == "attribution":
        backward += {"auto": 0.5, "gauss_newton": 0.5, "hutchinson": 1.5}.get(run.hessian, 0)
        forward += 0.5 if run.stage == 3 and run.hessian != "scalar" else 0
    if run.gradient_checkpointing:
        forward += backward
    return (2 * forward + 4 * backward) * n * step_tokens(run)
