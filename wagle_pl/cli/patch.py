"""Ship what unlearning changed: make a patch of two models, apply it to the base, revert it."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.unlearning import patch as patches


def make(base: str, unlearned: str, output: Optional[str] = None, overwrite: bool = False) -> None:
    """Write the difference of two models, exact and compressed.

    Args:
        base: folder of the model before unlearning.
        unlearned: folder of the model after it.
        output: patch file to write (-o).
        overwrite: replace an existing file.
    """
    _print_summary(patches.make_patch(base, unlearned, _given(output), overwrite))


def apply(base: str, patch: str, output: Optional[str] = None, overwrite: bool = False) -> None:
    """Turn the base model into the unlearned one, bit for bit.

    Args:
        base: folder of the patch's base model, or of that with patches that changed other weights.
        patch: patch file.
        output: folder to write (-o).
        overwrite: replace an existing model folder; a folder of other things is left alone.
    """
    _check_order("apply", base, patch)
    written = patches.apply_patch(base, patch, _given(output), overwrite)
    print(f"{output}: digest {written}")


def revert(
    unlearned: str, patch: str, output: Optional[str] = None, overwrite: bool = False
) -> None:
    """Turn the unlearned model back into the base model, bit for bit.

    Args:
        unlearned: folder of the unlearned model, or of one with this patch among others.
        patch: patch file.
        output: folder to write (-o).
        overwrite: replace an existing model folder; a folder of other things is left alone.
    """
    _check_order("revert", unlearned, patch)
    written = patches.revert_patch(unlearned, patch, _given(output), overwrite)
    print(f"{output}: digest {written}")


def info(patch: str, tensors: bool = False) -> None:
    """Say what a patch changes, in which model.

    Args:
        patch: patch file.
        tensors: also list the tensors it changes.
    """
    opened = patches.Patch(patch)
    _print_summary(opened)
    for name, tensor in opened.tensors.items() if tensors else ():
        shape = tuple(tensor["shape"])
        print(f"  {name}: {tensor['changed']:,} of shape {shape} {tensor['dtype']}")


def _check_order(verb: str, model: str, patch: str) -> None:
    if Path(patch).is_dir() and not Path(model).is_dir():
        raise WagleError(
            "the model's folder comes first, then the patch file: "
            f"wagle patch {verb} {patch} {model}"
        )


def _given(output: Optional[str]) -> str:
    if not output:
        raise WagleError("no output is given: add -o PATH")
    return output


def _print_summary(patch: patches.Patch) -> None:
    share = patch.changed / max(1, patch.weights)
    print(f"{patch.path}: {patch.path.stat().st_size:,} bytes")
    print(f"  base       {patch.base}  ({patch.made_by['base']})")
    print(f"  unlearned  {patch.unlearned}  ({patch.made_by['unlearned']})")
    print(
        f"  changes {patch.changed:,} of {patch.weights:,} weights ({share:.4%}) "
        f"in {len(patch.tensors)} tensors"
    )


COMMANDS = {"make": make, "apply": apply, "revert": revert, "info": info}
