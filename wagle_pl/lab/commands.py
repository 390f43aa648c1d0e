"""``wagle report`` and ``plan``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Optional

from wagle_pl.cli import LazyModule
from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.text import count, fields, table

planning = LazyModule("wagle_pl.lab.planning")

#: Memory of GPUs in GiB, and numbers of GPUs, for which plans are shown.
SIZES = (24, 40, 80)
COUNTS = (1, 2, 4, 8)


def report(
    runs: list[str],
    *,
    output: str,
    target: Optional[str] = None,
    retrained: Optional[str] = None,
    forget: Optional[str] = None,
    utility: Optional[str] = None,
    forget_level: Optional[float] = None,
    examples: int = 6,
    title: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Write the results of runs or studies to one HTML file, without scripts or network access.

    Args:
        runs: folders of test results, of models that contain test results, or of studies.
        output: HTML file to write.
        target: results of the model before unlearning; by default those of the model that the runs
            started from.
        retrained: results of the model retrained without the forget set; by default those that the
            tests were compared with, or those of the folder fine-tuned on retain rows only.
        forget: measure on the horizontal axis of the forget-utility figure, such as
            forget/probability.
        utility: measure on the vertical axis of that figure, such as model_utility.
        forget_level: value of the forget measure at which a study's arms are compared, instead of
            the study's own.
        examples: number of questions per set whose answers are shown.
        title: title of the page.
    """
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise WagleError(f"--output: must end in .html, got {output}")
    if examples < 0:
        raise WagleError(f"--examples: must be at least 0, got {examples}")
    refuse_existing(Path(output), overwrite, "--overwrite")
    from wagle_pl.lab.study.report.page import write_report
    from wagle_pl.lab.study.report.sources import gather
    from wagle_pl.lab.study.summary import compared_at

    sources = gather(runs, target, retrained)
    if forget_level is not None and not sources.studies:
        raise WagleError(
            "--forget_level: it is for studies, and there is none among the folders given"
        )
    for study in sources.studies if forget_level is not None else ():
        try:
            study.summary = compared_at(study.summary, study.rows, forget_level)
        except WagleError as error:
            raise WagleError(f"study {study.folder}: {error}") from None
    shown_as = {"title": title, "forget": forget, "utility": utility, "examples": examples}
    path = write_report(sources, output, overwrite, **shown_as)
    kinds = (sources.models, "run", None), (sources.studies, "study", "studies")
    shown = " and ".join(count(len(found), *words) for found, *words in kinds if found)
    print(f"report of {shown} written to {path}")


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
    sums: str = "device",
    optimizer: str = "MaskedAdamW",
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
        devices: number of devices, over all machines.
        precision: as trainer.precision: 32-true, bf16-mixed, bf16-true, 16-mixed or 16-true.
        accelerator: gpu, or cpu (a device is then a process).
        density: share of weights in the mask; 1 means no mask.
        hessian: for attribution, as model.hessian: scalar, auto, gauss_newton, fisher, hutchinson,
            or a class path.
        sums: for attribution, as model.sums: device, host or passes=K.
        optimizer: MaskedAdamW, AdamW, AdamW8bit (two 8-bit moments) or SGD.
        batch_size: rows, or pairs of rows, per device and micro-batch.
        max_length: tokens per row, padding included.
        accumulate_grad_batches: micro-batches per step.
        gradient_checkpointing: recompute activations in the backward pass.
        frozen_copy: whether the objective keeps a copy of the model before unlearning (KL, UNDIAL,
            hidden states).
        tokens: tokens of the whole run, forget and retain rows, all epochs; to estimate its time.
        tokens_per_second: measured throughput of all devices together, to estimate its time.
    """
    options = dict(locals())
    for option in ("model", "hessian", "tokens", "tokens_per_second"):
        del options[option]
    from wagle_pl.attribution.hessian import estimator_of

    named = estimator_of(hessian)
    estimator = named if task == "attribution" else None
    diagonal = estimator is not None and hessian != "auto"
    run = planning.PlannedRun(**options, estimator=estimator, diagonal=diagonal)
    for option, value in (("tokens", tokens), ("tokens_per_second", tokens_per_second)):
        if value is not None:
            check_positive(value, option)
    shape = planning.architecture(model)
    checkpointing = ", checkpointing" if gradient_checkpointing else ""
    rows = f"{batch_size} x {max_length} tokens per stream{checkpointing}"
    about = [
        ("model", f"{model}: {shape.weights:,} weights, {shape.largest:,} in the largest tensor"),
        ("run", f"{task}, {strategy} on {devices} x {accelerator}, {precision}, {rows}"),
    ]
    sums = [*needs(shape, run), *work(shape, run, tokens, tokens_per_second)]
    parts = [fields(about), memory_table(shape, run), fields(sums), choice_table(shape, run)]
    print(*parts, sep="\n\n")


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f}"


def smallest(size: float) -> Optional[int]:
    """The smallest GPU of :data:`SIZES` that ``size`` bytes fit into; None if there is none.

    >>> smallest(22 << 30), smallest(23 << 30), smallest(79 << 30)
    (24, 40, None)
    """
    return next((gpu for gpu in SIZES if size <= planning.USABLE * gpu * 2**30), None)


def memory_table(shape: planning.Architecture, run: planning.PlannedRun) -> str:
    """A device's memory by part and phase, in GiB; stars mark the phase of the peak."""
    parts, moments = planning.device_parts(shape, run), planning.MOMENTS
    moment, _ = planning.peak(shape, run)
    rows = [[p.name, *(gib(p.bytes) if m in p.moments else "" for m in moments)] for p in parts]
    rows.append(["total", *(gib(planning.at(parts, m)) for m in moments)])
    device = "GPU" if run.accelerator == "gpu" else "process"
    return table([f"GiB per {device}", *(f"*{m}*" if m == moment else m for m in moments)], rows)


def needs(shape: planning.Architecture, run: planning.PlannedRun) -> Iterator[tuple[str, str]]:
    """Peak memory, the GPU that fits, CPU memory and disk space."""
    moment, size = planning.peak(shape, run)
    yield "peak", f"{gib(size)} GiB, moment: {moment}"
    if run.accelerator == "gpu":
        fits = smallest(size)
        found = f"a GPU of {fits} GB" if fits else f"no GPU of {', '.join(map(str, SIZES))} GB"
        yield "fits", f"{found} ({1 - planning.USABLE:.0%} are left to fragmentation)"
        yield "CPU memory", f"{gib(planning.host_bytes(shape, run))} GiB per rank"
    files = planning.disk_bytes(run, shape.weights, shape.stored).items()
    listed = ", ".join(f"{name} {gib(size)} GiB" for name, size in files)
    yield "disk", listed or "tables of results only"


def work(
    shape: planning.Architecture,
    run: planning.PlannedRun,
    tokens: Optional[int],
    rate: Optional[float],
) -> Iterator[tuple[str, str]]:
    """Operations of a micro-batch on all devices, and its time if the throughput is known."""
    flops, step = planning.step_flops(shape, run), planning.step_tokens(run)
    yield "work", f"{flops:.3g} FLOPs per micro-batch of {step:,} tokens, all devices"
    if rate:
        whole = f"; {tokens / rate / 3600:.2f} h for {tokens:,} tokens" if tokens else ""
        yield "time", f"{step / rate:.3g} s per micro-batch{whole}, at {rate:g} tokens/s"
    elif tokens:
        yield "time", f"unknown for {tokens:,} tokens: give --tokens_per_second too"


def choice_table(shape: planning.Architecture, run: planning.PlannedRun) -> str:
    """Peak under every strategy and number of devices, with the smallest GPU that fits."""

    def cell(choice: planning.PlannedRun) -> str:
        _, size = planning.peak(shape, choice)
        return f"{gib(size)} ({smallest(size) or '-'})" if run.accelerator == "gpu" else gib(size)

    rows = [[name, *map(cell, runs)] for name, runs in planning.choices(run, COUNTS)]
    what = "GiB per GPU (smallest that fits, GB)" if run.accelerator == "gpu" else "GiB per process"
    return table([what, *(f"{count}" for count in COUNTS)], rows)
