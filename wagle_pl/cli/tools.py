"""``wagle forget``, ``export``, ``report``, ``patch`` and ``plan``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Optional

from wagle_pl.cli import LazyModule
from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.text import count, fields, table

api = LazyModule("wagle_pl.api")
patches = LazyModule("wagle_pl.unlearning.patch")
shira = LazyModule("wagle_pl.unlearning.adapters")
planning = LazyModule("wagle_pl.planning")

#: Memory of GPUs in GiB, and numbers of GPUs, for which plans are shown.
SIZES = (24, 40, 80)
COUNTS = (1, 2, 4, 8)


def forget_rows(
    model: str,
    forget: str,
    *,
    output: str,
    retain: Optional[str] = None,
    density: Optional[float] = 0.2,
    objective: str = "npo",
    score: Optional[str] = None,
    lr: Optional[float] = None,
    max_steps: int = 300,
    seed: int = 0,
    patch: Optional[str] = None,
    report: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Make a model forget rows, until they are no more probable than rows it has never seen.

    Args:
        model: hub id, folder or GGUF file.
        forget: file or hub dataset of rows to forget; if a question has no answer, the model's own
            answer is used.
        output: folder to write.
        retain: file or hub dataset of rows to keep; by default the model's own answers to bundled
            questions on other subjects.
        density: share of the weights to train; null for all.
        objective: objective to minimise, e.g. NPO, GradDiff or a class path.
        score: score that selects the weights, e.g. wagle or a class path; by default curvature of
            power 1.
        lr: learning rate of AdamW; by default chosen by model size.
        max_steps: maximum number of training steps.
        seed: random seed.
        patch: also write the change from the original model to this file.
        report: also write an HTML page of the result to this file.
    """
    refuse_existing(Path(output), overwrite, "--overwrite", kind="folder")
    options = {"lr": lr, "seed": seed, "max_steps": max_steps}
    result = api.forget(model, forget, retain, density, objective=objective, score=score, **options)
    print(f"{result.verdict}; model written to {result.save(output)}")
    if patch is not None:
        print(f"patch written to {result.patch(patch)}")
    if report is not None:
        print(f"report written to {result.report(report)}")


def export(
    checkpoint: str,
    *,
    output: str,
    model: Optional[str] = None,
    mask: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Turn a checkpoint into a model folder in Hugging Face format, on one CPU, tensor by tensor.

    Args:
        checkpoint: file or folder that a run wrote, with any strategy and any number of devices;
            or a model to convert: a GGUF file, an adapter folder, a hub id.
        output: folder to write.
        model: base model of the run; needed only if it has moved.
        mask: mask of the run; needed only if it has moved.
    """
    from wagle_pl.unlearning.export import export as write

    print(f"model written to {write(checkpoint, output, model, mask, overwrite)}")


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
    from wagle_pl.study.report.page import write_report
    from wagle_pl.study.report.sources import gather
    from wagle_pl.study.summary import compared_at

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


def make(base: str, unlearned: str, *, output: str, overwrite: bool = False) -> None:
    """Write the exact difference of two models to a compressed patch file.

    Args:
        base: folder of the model before unlearning.
        unlearned: folder of the model after unlearning.
        output: patch file to write.
    """
    _print_summary(patches.make_patch(base, unlearned, output, overwrite))


def apply(base: str, patch: str, *, output: str, overwrite: bool = False) -> None:
    """Turn the base model into the unlearned one, bit for bit.

    Args:
        base: folder of the patch's base model; patches of other weights may already be applied.
        patch: patch file.
        output: folder to write.
    """
    _write_model("apply", base, patch, output, overwrite)


def revert(unlearned: str, patch: str, *, output: str, overwrite: bool = False) -> None:
    """Turn the unlearned model back into the base model, bit for bit.

    Args:
        unlearned: folder of a model to which this patch, and maybe others, has been applied.
        patch: patch file.
        output: folder to write.
    """
    _write_model("revert", unlearned, patch, output, overwrite)


def info(patch: str, *, tensors: bool = False) -> None:
    """Show which weights of which model a patch changes.

    Args:
        patch: patch file.
        tensors: also list the changed tensors.
    """
    opened = patches.Patch(patch)
    _print_summary(opened)
    for name, tensor in opened.tensors.items() if tensors else ():
        shape = tuple(tensor["shape"])
        print(f"  {name}: {tensor['changed']:,} of shape {shape} {tensor['dtype']}")


def convert(base: str, patch: str, *, output: str, overwrite: bool = False) -> None:
    """Turn a patch into a SHiRA adapter of ``peft``, or an adapter folder into a patch.

    Args:
        base: folder of the base model of the patch or adapter.
        patch: patch file or adapter folder.
        output: adapter folder or patch file to write.
    """
    if Path(patch).is_dir():
        _print_summary(shira.patch_from_shira(base, patch, output, overwrite))
    else:
        print(f"adapter written to {shira.patch_to_shira(base, patch, output, overwrite)}")


def subtract(
    base: str,
    finetuned: str,
    *,
    output: str,
    origin: Optional[str] = None,
    scores: Optional[str] = None,
    scale: Optional[float] = None,
    mask: Optional[str] = None,
    strength: float = 1.0,
    overwrite: bool = False,
) -> None:
    """Unlearn without training: subtract the change made by fine-tuning on the forget rows.

    Args:
        base: model to unlearn.
        finetuned: the same model fine-tuned on the forget rows.
        output: folder to write.
        origin: model that was fine-tuned, if it is not the base.
        scores: file of scores that attribution saved; each weight's change is multiplied by
            S / (S + scale), where S is its score.
        scale: score at which that factor is one half; by default the median score. With scale 1 and
            forget_retain_ratio or fisher_ratio, the factor is forget / (forget + retain).
        mask: mask file; weights outside it stay bit-identical.
        strength: multiple of the change that is subtracted.
    """
    from wagle_pl.attribution import importance_from_scores
    from wagle_pl.unlearning.patch import subtract as write

    if scores is None and scale is not None:
        raise WagleError("--scale: it needs --scores: give both, or neither")
    options = {"origin": origin, "mask": mask, "strength": strength, "overwrite": overwrite}
    importance, about = (None, None) if scores is None else importance_from_scores(scores, scale)
    options |= {"importance": importance, "about": about}
    print(f"model written to {write(base, finetuned, output, **options)}")


PATCH = {verb.__name__: verb for verb in (make, apply, revert, convert, subtract, info)}


def _write_model(verb: str, model: str, patch: str, output: str, overwrite: bool) -> None:
    if Path(patch).is_dir() and not Path(model).is_dir():
        right = f"wagle patch {verb} {patch} {model}"
        raise WagleError(f"the model's folder comes first, then the patch file: {right}")
    write = {"apply": patches.apply_patch, "revert": patches.revert_patch}[verb]
    print(f"{output}: digest {write(model, patch, output, overwrite)}")


def _print_summary(patch: patches.Patch) -> None:
    share = f"({patch.changed / max(1, patch.weights):.4%}) in {len(patch.tensors)} tensors"
    print(f"{patch.path}: {patch.path.stat().st_size:,} bytes")
    print(f"  base       {patch.base}  ({patch.made_by['base']})")
    print(f"  unlearned  {patch.unlearned}  ({patch.made_by['unlearned']})")
    print(f"  changes {patch.changed:,} of {patch.weights:,} weights {share}")


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
