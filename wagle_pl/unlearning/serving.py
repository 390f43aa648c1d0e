"""Patches where models are served: in a loaded model, in place; and as sparse weight updates.

A *sparse update* is a safetensors file of absolute values. For every changed tensor ``NAME`` of a
checkpoint it holds ``NAME.indices``, strictly increasing in the flattened tensor (int32, or int64
if it is too large), and ``NAME.values``, in the tensor's dtype. The metadata have its shape in
``shapes``, as JSON, and the digests of the models before and after.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from math import prod
from pathlib import Path
from typing import Optional
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.core.tensorfiles import DTYPES, TensorFiles, fill, lay_out, sealed
from wagle_pl.core.weights import persistent_buffers
from wagle_pl.unlearning.patch import End, Patch, digest_of

SPARSE_FORMAT = "wagle_pl.sparse"
SPARSE_VERSION = 1

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_FLOATS = {DTYPES[dtype]: dtype for dtype in DTYPES if dtype.is_floating_point}

_OTHER: dict[End, End] = {"base": "unlearned", "unlearned": "base"}

#: Patches attached to a model, the latest last, and the model's digest after each.
_attached: WeakKeyDictionary[nn.Module, list[tuple[Patch, str]]] = WeakKeyDictionary()


class LoadedTensors:
    """The tensors of a loaded model, read as :class:`TensorFiles` reads those of a folder."""

    folder = "the loaded model"

    def __init__(self, lm: nn.Module) -> None:
        self._tensors = {**dict(lm.named_parameters()), **persistent_buffers(lm)}
        self.names = list(self._tensors)
        for name, tensor in self._tensors.items():
            if tensor.is_meta or not tensor.is_contiguous():
                raise WagleError(f"{self.folder} does not hold {name} in memory, in one piece")

    def dtype(self, name: str) -> str:
        dtype = self._tensors[name].dtype
        return DTYPES.get(dtype, str(dtype))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def _flat(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach().view(-1)
        return tensor.view(_INTEGER[tensor.element_size()])

    def words(self, name: str) -> np.ndarray:
        words = self._flat(name).cpu().numpy()
        return words.view(f"<u{words.itemsize}")

    @torch.no_grad()
    def put(self, name: str, places: np.ndarray, words: np.ndarray) -> None:
        flat = self._flat(name)
        values = torch.from_numpy(words).view(flat.dtype)
        flat.index_copy_(0, torch.from_numpy(places).to(flat.device), values.to(flat.device))


def attach(patch: Patch, lm: nn.Module) -> None:
    """See :meth:`Patch.attach`."""
    if patch.attached_to is not None:
        raise WagleError(f"patch {patch.path} is attached already: detach it first")
    stack, tensors = _attached.get(lm, []), LoadedTensors(lm)
    if patch.identity in {other.identity for other, _ in stack}:
        raise WagleError(f"patch {patch.path} is attached to this model already")
    patch.check_layout(tensors)
    digest = digest_of(tensors)
    is_base = digest == patch.base
    if not is_base and not (stack and stack[0][0].base == patch.base and stack[-1][1] == digest):
        raise patch.wrong_model(tensors.folder, digest)
    if name := patch.differing(tensors, "base"):
        if is_base:
            raise patch.damaged(name, "nothing is changed")
        raise WagleError(
            f"patch {patch.path} overlaps one that is attached: both change {name}; detach that "
            "one first"
        )
    _switch(patch, tensors, "base")
    after = patch.unlearned if is_base else digest_of(tensors)
    _attached.setdefault(lm, []).append((patch, after))
    patch.attached_to = lm


def detach(patch: Patch) -> None:
    """See :meth:`Patch.detach`."""
    if patch.attached_to is None:
        raise WagleError(f"patch {patch.path} is not attached to a model")
    stack, tensors = _attached[patch.attached_to], LoadedTensors(patch.attached_to)
    place = [attached for attached, _ in stack].index(patch)
    for later, _ in stack[place + 1 :]:
        if later.base != patch.base:  # it is not beside this one, but on it
            raise WagleError(f"patch {later.path} was attached after {patch.path}: detach it first")
    patch.check_layout(tensors)
    if name := patch.differing(tensors, "unlearned"):
        raise WagleError(
            f"{name} of {tensors.folder} has changed since {patch.path} was attached: nothing is "
            "detached"
        )
    _switch(patch, tensors, "unlearned")
    del stack[place]
    if place < len(stack):
        stack[-1] = stack[-1][0], digest_of(tensors)
    patch.attached_to = None


def _switch(patch: Patch, tensors: LoadedTensors, source: End) -> None:
    """Write what becomes of the words of ``source``: all of them, or none."""
    frames = 0
    try:
        for _ in patch.write(tensors, source):
            frames += 1
    except BaseException:
        for _ in islice(patch.write(tensors, _OTHER[source]), frames):
            pass
        raise


# -- sparse updates --------------------------------------------------------------------------------


def write_sparse(
    base: str | Path,
    patch: str | Path,
    output: str | Path,
    inverse: Optional[str | Path] = None,
    overwrite: bool = False,
) -> None:
    """Write a patch as a sparse update, see the top of this module.

    Args:
        base: folder of the patch's base.
        inverse: also write the update that leads back to the base.
        overwrite: replace existing files.

    Raises:
        WagleError: if the patch changes a number to or from NaN, which stands for "unchanged" where
            these updates are loaded, or numbers that are no floats.
    """
    opened, files = Patch(patch), TensorFiles(base)
    outputs: dict[End, Path] = {"unlearned": Path(output)}
    if inverse is not None:
        outputs["base"] = Path(inverse)
    for path in outputs.values():
        refuse_existing(path, overwrite, "--overwrite")
    if (digest := digest_of(files)) != opened.base:
        raise opened.wrong_model(base, digest)
    opened.check_layout(files)
    if name := opened.differing(files, "base"):
        raise opened.damaged(name, "nothing is written")
    layout = []
    for name, entry in sorted(opened.tensors.items()):
        if entry["dtype"] not in _FLOATS:
            raise WagleError(f"a sparse update holds floats, and {name} is {entry['dtype']}")
        wide = torch.int64 if prod(entry["shape"]) > 2**31 else torch.int32
        layout.append((f"{name}.indices", wide, [entry["changed"]]))
        layout.append((f"{name}.values", _FLOATS[entry["dtype"]], [entry["changed"]]))
    metadata = {
        "format": SPARSE_FORMAT,
        "format_version": str(SPARSE_VERSION),
        "shapes": json.dumps({name: opened.tensors[name]["shape"] for name in opened.tensors}),
    }
    with ExitStack() as both:
        for end, path in outputs.items():
            temporary = both.enter_context(atomic_path(path))
            ends = {"before": getattr(opened, _OTHER[end]), "after": getattr(opened, end)}
            lay_out(temporary, layout, sealed(metadata | ends))
            fill(temporary, _parts(opened, files, end))


def _parts(patch: Patch, files: TensorFiles, end: End) -> Iterator[tuple[str, int, Tensor]]:
    """What :func:`fill` writes for the numbers at one end."""
    for name, entry in patch.tensors.items():
        at = 0
        for places, before, after in patch.moves(name, files.words(name), "base"):
            words = after if end == "unlearned" else before
            values = torch.from_numpy(words).view(_FLOATS[entry["dtype"]])
            if values.isnan().any():
                raise WagleError(f"a sparse update has no word for NaN, and {name} holds one")
            yield f"{name}.indices", at, torch.from_numpy(places)
            yield f"{name}.values", at, values
            at += len(values)
