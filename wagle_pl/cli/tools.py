"""``wagle forget``, ``export`` and ``patch``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Optional

from wagle_pl.cli import LazyModule
from wagle_pl.core.files import refuse_base, refuse_existing

api = LazyModule("wagle_pl.api")
patches = LazyModule("wagle_pl.unlearning.patch")
serving = LazyModule("wagle_pl.unlearning.serving")

EXIT_NOT_FORGOTTEN = 3  # of ``wagle forget``


def forget_rows(
    model: str,
    forget: str,
    *,
    output: str,
    retain: Optional[str] = None,
    earlier: Optional[str] = None,
    density: Optional[float] = 0.2,
    objective: Optional[str] = None,
    score: Optional[str] = None,
    unit: str = "row",
    lr: Optional[float] = None,
    max_steps: int = 300,
    seed: int = 0,
    patch: Optional[str] = None,
    report: Optional[str] = None,
    redact: bool = False,
    overwrite: bool = False,
) -> None:
    """Make a model forget rows, until they are no more probable than rows it has never seen.

    The exit status is 0 only if the verdict is "forgotten", and 3 if it is "partly forgotten",
    "model damaged" or "not known before". In the last case nothing is written.

    Args:
        model: hub id, folder or GGUF file.
        forget: file or hub dataset of rows to forget; if a question has no answer, the model's own
            answer is used.
        output: folder to write.
        retain: file or hub dataset of rows to keep; by default the model's own answers to bundled
            questions on other subjects.
        earlier: file or hub dataset of rows that earlier requests made the model forget, to test
            them again.
        density: share of the weights to train; null for all.
        objective: objective to minimise, e.g. NPO, GradDiff or a class path; by default NPO with a
            beta chosen for the rows.
        score: score that selects the weights, e.g. wagle or a class path; by default curvature of
            power 1.
        unit: select whole units: weight, row, column, head, neuron, block:RxC, tensor or layer.
        lr: learning rate of AdamW; by default chosen by model size, and doubled every 25 steps.
        max_steps: maximum number of training steps.
        seed: random seed.
        patch: also write the change from the original model to this file.
        report: also write an HTML page of the result to this file.
        redact: show digests of rows on that page, and no text.
    """
    refuse_base(Path(output), model)
    refuse_existing(Path(output), overwrite, "--overwrite", kind="folder")
    for path in filter(None, (patch, report)):
        refuse_existing(Path(path), overwrite, "--overwrite")
    options = {"unit": unit, "lr": lr, "seed": seed, "max_steps": max_steps, "earlier": earlier}
    result = api.forget(model, forget, retain, density, objective=objective, score=score, **options)
    print(result.verdict)
    if result.outcome != "not known before":
        print(f"model written to {result.save(output, overwrite)}")
        if patch is not None:
            print(f"patch written to {result.patch(patch, overwrite)}")
        if report is not None:
            print(f"report written to {result.report(report, overwrite, redact)}")
    if result.outcome != "forgotten":
        raise SystemExit(EXIT_NOT_FORGOTTEN)


def export(
    checkpoint: str,
    *,
    output: str,
    model: Optional[str] = None,
    mask: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Turn a checkpoint into a model folder in Hugging Face format, on one CPU.

    Args:
        checkpoint: file or folder that a run wrote, with any strategy and any number of devices;
            or a model to convert: a GGUF file, an adapter folder, a hub id.
        output: folder to write.
        model: base model of the run; needed only if it has moved.
        mask: mask of the run; needed only if it has moved.
    """
    from wagle_pl.unlearning.export import export as write

    print(f"model written to {write(checkpoint, output, model, mask, overwrite)}")


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
    print(f"{output}: digest {patches.apply_patch(base, patch, output, overwrite)}")


def revert(unlearned: str, patch: str, *, output: str, overwrite: bool = False) -> None:
    """Turn the unlearned model back into the base model, bit for bit.

    Args:
        unlearned: folder of a model to which this patch, and maybe others, has been applied.
        patch: patch file.
        output: folder to write.
    """
    print(f"{output}: digest {patches.revert_patch(unlearned, patch, output, overwrite)}")


def convert(
    base: str,
    patch: str,
    *,
    output: str,
    form: Literal["sparse"] = "sparse",
    inverse: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Write a patch in a form that servers load: absolute values at flat indices of tensors.

    Args:
        base: folder of the patch's base model.
        patch: patch file.
        output: file to write.
        form: sparse: what vLLM's sparse weight updates take, see configs/own/README.md.
        inverse: also write the file that rolls the update back.
    """
    serving.write_sparse(base, patch, output, inverse, overwrite)
    weights = sum(file.path.stat().st_size for file in serving.TensorFiles(base).files)
    for path in filter(None, (output, inverse)):
        size, of_patch = Path(path).stat().st_size, Path(patch).stat().st_size
        print(f"{path}: {size:,} bytes; the patch has {of_patch:,}, the model {weights:,}")


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


PATCH = {verb.__name__: verb for verb in (make, apply, revert, convert, info)}


def _print_summary(patch: patches.Patch) -> None:  # type: ignore[name-defined]
    share = f"({patch.changed / max(1, patch.weights):.4%}) in {len(patch.tensors)} tensors"
    print(f"{patch.path}: {patch.path.stat().st_size:,} bytes")
    print(f"  base       {patch.base}  ({patch.made_by['base']})")
    print(f"  unlearned  {patch.unlearned}  ({patch.made_by['unlearned']})")
    print(f"  changes {patch.changed:,} of {patch.weights:,} weights {share}")
