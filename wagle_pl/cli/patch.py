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
    _tell(patches.make_patch(base, unlearned, _needed(output), overwrite))


def apply(base: str, patch: str, output: Optional[str] = None, overwrite: bool = False) -> None:
    """Turn the base model into the unlearned one, bit for bit.

    Args:
        base: folder of the patch's base model, or of that with patches applied that changed other weights.
        patch: patch file.
        output: folder to write (-o).
        overwrite: replace an existing model folder; a folder of other things is left alone.
    """
    _check_order("apply", base, patch)
    written = patches.apply_patch(base, patch, _needed(output), overwrite)
    print(f"{output}: digest {written}")


def revert(
    unlearned: str, patch: str, output: Optional[str] = None, overwrite: bool = False
) -> None:
    """Turn the unlearned model back into the base model, bit for bit.

    Args:
        unlearned: folder of the unlearned model, or of a base model that the patch, among others, was applied to.
        patch: patch file.
        output: folder to write (-o).
        overwrite: replace an existing model folder; a folder of other things is left alone.
    """
    _check_order("revert", unlearned, patch)
    written = patches.revert_patch(unlearned, patch, _needed(output), overwrite)
    print(f"{output}: digest {written}")


def info(patch: str, tensors: bool = False) -> None:
    """Say what a patch changes, in which model.

    Args:
        patch: patch file.
        tensors: also list the tensors it changes.
    """
    opened = patches.Patch(patch)
    _tell(opened)
    if tensors:
        for name, tensor in opened.tensors.items():
            print(
                f"  {name}: {tensor['changed']:,} of shape {tuple(tensor['shape'])} {tensor['dtype']}"
            )


def _check_order(verb: str, model: str, patch: str) -> None:
    """Refuse a patch in the model's place, and the model in its."""
    if Path(patch).is_dir() and not Path(model).is_dir():
        raise WagleError(
            f"the model's folder comes first, then the patch file: wagle patch {verb} {patch} {model}"
        )


def _needed(output: Optional[str]) -> str:
    if not output:
        raise WagleError("where to? give -o PATH")
    return output


def _tell(patch: patches.Patch) -> None:
    size = patch.path.stat().st_size
    share = patch.changed / max(1, patch.weights)
    print(f"{patch.path}: {size:,} bytes")
    print(f"  base       {patch.base}  ({patch.made_by['base']})")
    print(f"  unlearned  {patch.unlearned}  ({patch.made_by['unlearned']})")
    print(
        f"  changes {patch.changed:,} of {patch.weights:,} weights ({share:.4%}) in {len(patch.tensors)} tensors"
    )


COMMANDS = {"make": make, "apply": apply, "revert": revert, "info": info}
