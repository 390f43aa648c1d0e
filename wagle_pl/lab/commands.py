"""``wagle report`` and ``plan``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Optional

from wagle_pl.cli import LazyModule
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.text import count, fields, table

planning = LazyModule("wagle_pl.lab.planning")

COUNTS = (1, 2, 4, 8)  # of devices for which plans are shown


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
    shown = " and ".join(count(len(items), *words) for items, *words in kinds if items)
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
) -> None:
    """Estimate the memory and disk space of a run from the model's configuration alone.

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
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "hessian")}
    estimator = planning.hessians.estimator_of(hessian) if task == "attribution" else None
    diagonal = estimator is not None and hessian != "auto"
    run = planning.PlannedRun(**options, estimator=estimator, diagonal=diagonal)
    shape = planning.architecture(model)
    moment, size = planning.peak(shape, run)
    about = {
        "model": f"{model}: {shape.weights:,} weights, {shape.largest:,} in the largest tensor",
        "run": f"{task}, {strategy} on {devices} x {accelerator}, {precision}, "
        f"{batch_size} x {max_length} tokens per stream",
        "peak": f"{gib(size)} GiB, moment: {moment}",
    }
    if accelerator == "gpu":
        about["fits"] = (
            f"a GPU of {size / planning.USABLE / 2**30:.0f} GiB, with room for fragments"
        )
        about["CPU memory"] = f"{gib(planning.host_bytes(shape, run))} GiB per rank"
    files = planning.disk_bytes(run, shape.weights, shape.stored).items()
    about["disk"] = ", ".join(f"{name} {gib(size)} GiB" for name, size in files) or "tables only"
    print(fields([*about.items()]), *_tables(shape, run), sep="\n\n")


def _tables(shape: planning.Architecture, run: planning.PlannedRun) -> Iterator[str]:
    """Memory by part and moment, and the peak under every strategy and number of devices."""
    unit = "GiB per GPU" if run.accelerator == "gpu" else "GiB per process"
    parts, moments = planning.device_parts(shape, run), planning.MOMENTS
    rows = [[p.name, *(gib(p.bytes) if m in p.moments else "" for m in moments)] for p in parts]
    rows.append(["total", *(gib(planning.at(parts, m)) for m in moments)])
    yield table([unit, *moments], rows)
    others = [
        [name, *(gib(planning.peak(shape, other)[1]) for other in runs)]
        for name, runs in planning.choices(run, COUNTS)
    ]
    yield table([f"peak, {unit}, on", *map(str, COUNTS)], others)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.2f}"
