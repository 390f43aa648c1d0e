"""Estimate the memory, disk and work of a run, before you rent a machine."""

from __future__ import annotations

from typing import Literal, Optional

from wagle_pl.core.errors import check_positive
from wagle_pl.core.text import fields, table
from wagle_pl.planning import (
    GIB,
    MOMENTS,
    USABLE,
    Architecture,
    PlannedRun,
    architecture,
    at,
    choices,
    device_parts,
    disk_bytes,
    host_bytes,
    peak,
    step_flops,
    step_tokens,
)

#: GPUs by their memory in GiB.
SIZES = (24, 40, 80)
COUNTS = (1, 2, 4, 8)


def plan(
    *,
    model: str,
    task: str = "unlearning",
    strategy: str = "auto",
    devices: int = 1,
    precision: str = "bf16-true",
    accelerator: Literal["gpu", "cpu"] = "gpu",
    density: float = 0.2,
    hessian: str = "auto",
    optimizer: str = "MaskedAdamW",
    values: str = "fp32",
    batch_size: int = 1,
    max_length: int = 512,
    accumulate_grad_batches: int = 1,
    gradient_checkpointing: bool = False,
    frozen_copy: bool = False,
    tokens: Optional[int] = None,
    tokens_per_second: Optional[float] = None,
) -> None:
    """Estimate the memory, disk and work of a run from the model's configuration alone.

    Args:
        model: hub id, folder in Hugging Face format, or GGUF file.
        task: attribution, unlearning, finetuning or test.
        strategy: auto (one device, or DDP), ddp, zero1, zero2, zero3, zero3_offload, or Lightning's
            names for them.
        devices: how many share the run, over all machines.
        precision: as trainer.precision: 32-true, bf16-mixed, bf16-true, 16-mixed or 16-true.
        accelerator: gpu; or cpu, where a device is a process.
        density: share of weights in the mask; 1 is unlearning without one.
        hessian: of attribution, as model.hessian: scalar, auto, gauss_newton, fisher, hutchinson,
            or a class path.
        optimizer: MaskedAdamW, AdamW, AdamW8bit (two moments of 8 bits) or SGD.
        values: how the weights that move are kept, as model.values: fp32, or split (bf16-true on
            one device).
        batch_size: rows, or pairs of rows, a device and micro-batch.
        max_length: tokens a row, padding included.
        accumulate_grad_batches: micro-batches a step.
        gradient_checkpointing: recompute activations in the backward pass.
        frozen_copy: the objective keeps a copy of the model before unlearning (KL, UNDIAL, hidden
            states).
        tokens: of the whole run, over all streams and epochs, to estimate its time.
        tokens_per_second: measured throughput of all devices together, to estimate its time.
    """
    from wagle_pl.attribution.hessian import estimator_of  # brings all that attribution runs with

    named = estimator_of(hessian)
    estimator = named if task == "attribution" else None
    run = PlannedRun(
        task=task,
        strategy=strategy,
        devices=devices,
        precision=precision,
        accelerator=accelerator,
        density=density,
        estimator=estimator,
        diagonal=estimator is not None and hessian != "auto",
        optimizer=optimizer,
        values=values,
        batch_size=batch_size,
        max_length=max_length,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_checkpointing=gradient_checkpointing,
        frozen_copy=frozen_copy,
    )
    for option, value in (("tokens", tokens), ("tokens_per_second", tokens_per_second)):
        if value is not None:
            check_positive(value, option)
    shape = architecture(model)
    checkpointing = ", checkpointing" if gradient_checkpointing else ""
    about = [
        ("model", f"{model}: {shape.weights:,} weights, {shape.largest:,} in the largest tensor"),
        (
            "run",
            f"{task}, {strategy} on {devices} x {accelerator}, {precision}, "
            f"{batch_size} x {max_length} tokens a stream{checkpointing}",
        ),
    ]
    sums = [*needs(shape, run), *work(shape, run, tokens, tokens_per_second)]
    print(
        fields(about), memory_table(shape, run), fields(sums), choice_table(shape, run), sep="\n\n"
    )


def gib(size: float) -> str:
    """Bytes in GiB.

    >>> gib(3 << 29)
    '1.50'
    """
    return f"{size / GIB:.2f}"


def smallest(size: float) -> Optional[int]:
    """The smallest GPU of :data:`SIZES` that ``size`` bytes fit; None if none.

    >>> smallest(22 << 30), smallest(23 << 30), smallest(79 << 30)
    (24, 40, None)
    """
    return next((gpu for gpu in SIZES if size <= USABLE * gpu * GIB), None)


def memory_table(shape: Architecture, run: PlannedRun) -> str:
    """A device's memory by part and moment, in GiB; the peak's moment stands in stars."""
    parts = device_parts(shape, run)
    moment, _ = peak(shape, run)
    rows = [[p.name, *(gib(p.bytes) if m in p.moments else "" for m in MOMENTS)] for p in parts]
    rows.append(["total", *(gib(at(parts, m)) for m in MOMENTS)])
    device = "GPU" if run.accelerator == "gpu" else "process"
    return table([f"GiB a {device}", *(f"*{m}*" if m == moment else m for m in MOMENTS)], rows)


def needs(shape: Architecture, run: PlannedRun) -> list[tuple[str, str]]:
    """Peak, the GPU it fits, CPU memory and disk."""
    moment, size = peak(shape, run)
    lines = [("peak", f"{gib(size)} GiB, moment: {moment}")]
    if run.accelerator == "gpu":
        fits = smallest(size)
        found = f"a GPU of {fits} GB" if fits else f"no GPU of {', '.join(map(str, SIZES))} GB"
        lines.append(("fits", f"{found} ({1 - USABLE:.0%} are left to fragmentation)"))
        lines.append(("CPU memory", f"{gib(host_bytes(shape, run))} GiB a rank"))
    files = [
        f"{name} {gib(size)} GiB"
        for name, size in disk_bytes(run, shape.weights, shape.stored).items()
    ]
    return [*lines, ("disk", ", ".join(files) or "tables of results only")]


def work(
    shape: Architecture, run: PlannedRun, tokens: Optional[int], rate: Optional[float]
) -> list[tuple[str, str]]:
    """Operations of a micro-batch on all devices, and its time if the throughput is known."""
    flops, step = step_flops(shape, run), step_tokens(run)
    lines = [("work", f"{flops:.3g} FLOPs a micro-batch of {step:,} tokens, all devices")]
    if rate:
        whole = f"; {tokens / rate / 3600:.2f} h for {tokens:,} tokens" if tokens else ""
        lines.append(("time", f"{step / rate:.3g} s a micro-batch{whole}, at {rate:g} tokens/s"))
    elif tokens:
        lines.append(("time", f"unknown for {tokens:,} tokens: give --tokens_per_second too"))
    return lines


def choice_table(shape: Architecture, run: PlannedRun) -> str:
    """Peak of the run under every strategy and number of devices, and the GPU that it fits."""

    def cell(choice: PlannedRun) -> str:
        _, size = peak(shape, choice)
        return f"{gib(size)} ({smallest(size) or '-'})" if run.accelerator == "gpu" else gib(size)

    rows = [[name, *map(cell, runs)] for name, runs in choices(run, COUNTS)]
    what = "GiB a GPU (the smallest that fits, GB)" if run.accelerator == "gpu" else "GiB a process"
    return table([what, *(f"{count}" for count in COUNTS)], rows)


COMMANDS = plan
