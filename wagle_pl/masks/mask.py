"""``WeightMask``: which weights of one model are selected, as a value.

A mask is a bit for every weight of every parameter tensor (tied weights once). On disk it is a
safetensors file with one ``uint8`` tensor a parameter (see :mod:`wagle_pl.masks.bits`) and, in the
metadata, the shapes, what made it and the fingerprint of the model it belongs to. In memory it is
the same bytes; a tensor is unpacked when asked for.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Optional, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent, atomic_path
from wagle_pl.core.tensorfiles import TensorFile
from wagle_pl.masks.bits import count_bits, filled_bits, pack_bits, random_bits, unpack_bits
from wagle_pl.masks.names import layer_of, module_label, module_type_of

FORMAT = "wagle_pl.mask"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"

Shapes = Mapping[str, Iterable[int]]
Key = TypeVar("Key", bound=Hashable)


def expected_jaccard(density: float, other: float) -> float:
    """Jaccard overlap to expect of two independent random masks: pq / (p + q − pq), in the limit of
    many weights."""
    both = density * other
    return both / (density + other - both) if both else 0.0


def check_shapes(ours: Shapes, theirs: Shapes, where: str, what: str) -> None:
    """Refuse a mask (``where``) with other tensors than a model or another mask (``what``).

    Raises:
        WagleError: naming the first difference.
    """
    ours = {name: tuple(shape) for name, shape in ours.items()}
    theirs = {name: tuple(shape) for name, shape in theirs.items()}
    for name in theirs:
        if name not in ours:
            raise WagleError(
                f"{where} has no tensor for parameter {name} of {what}: it was made for another "
                "model"
            )
    for name, shape in ours.items():
        if name not in theirs:
            raise WagleError(
                f"{where} has a tensor {name} that {what} lacks: it was made for another model"
            )
        if shape != theirs[name]:
            raise WagleError(f"{where}: {name} has shape {shape}, that of {what} is {theirs[name]}")


class WeightMask:
    """A bit for every weight of a model: selected (may move) or frozen.

    Args:
        packed: parameter name -> ``uint8`` tensor of ``ceil(n / 8)`` bytes (see :func:`pack_bits`),
            in the model's parameter order.
        shapes: parameter name -> shape, same names and order.
        metadata: what made the mask; JSON-serialisable. ``model_fingerprint`` is checked before
            use.

    Raises:
        WagleError: if names differ or a tensor has the wrong number of bytes.

    >>> mask = WeightMask.from_bools({"a": torch.tensor([[True, False], [False, True]])})
    >>> mask.density, mask["a"].shape
    (0.5, torch.Size([2, 2]))
    """

    def __init__(
        self,
        packed: Mapping[str, Tensor],
        shapes: Shapes,
        metadata: Optional[dict[str, Any]] = None,
    ) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.metadata = dict(metadata or {})
        self.source: Optional[Path] = None
        self._read: Callable[[str], Tensor] = packed.__getitem__
        self._counts: dict[str, int] = {}
        if set(packed) != set(self.shapes):
            raise WagleError(
                "mask tensors and shapes differ in names: "
                f"{sorted(set(packed) ^ set(self.shapes))[:3]}"
            )

    # -- make --------------------------------------------------------------------------------------

    @classmethod
    def from_bools(
        cls, bools: Mapping[str, Tensor], metadata: Optional[dict[str, Any]] = None
    ) -> WeightMask:
        """The mask of a ``{name: bool tensor}`` dict."""
        return cls(
            {n: pack_bits(b) for n, b in bools.items()},
            {n: b.shape for n, b in bools.items()},
            metadata,
        )

    @classmethod
    def from_torch(
        cls,
        path: str | Path,
        shapes: Optional[Shapes] = None,
        metadata: Optional[dict[str, Any]] = None,
    ) -> WeightMask:
        """The mask of a ``{name: bool tensor}`` dict that ``torch.save`` wrote; 0 and 1 of other
        dtypes do as well.

        Args:
            path: the file; read without unpickling code (``weights_only``).
            shapes: parameter name -> shape of the model it is for, checked; those of the file when
                None.
            metadata: of the model: ``model`` and ``model_fingerprint``.

        Raises:
            WagleError: if the file is missing, is no such dict, or does not fit the shapes.
        """
        path = Path(path)
        if not path.is_file():
            raise absent("mask file", path)
        try:
            found = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise WagleError(
                f"{path} is no file that torch.load(weights_only=True) reads: {reason}"
            ) from None
        if not isinstance(found, dict) or not all(
            isinstance(tensor, Tensor) for tensor in found.values()
        ):
            raise WagleError(f"{path} holds no {{parameter name: bool tensor}} dict")
        if shapes is not None:
            check_shapes(
                {n: t.shape for n, t in found.items()}, shapes, f"mask {path}", "the model"
            )
        packed = {name: pack_bits(_as_bool(found[name], name, path)) for name in shapes or found}
        made_by = {"operation": "import", "file": path.name}
        return cls(
            packed, {name: found[name].shape for name in packed}, {**(metadata or {}), **made_by}
        )

    def random_like(self, seed: int) -> WeightMask:
        """As many selected weights as here, spread uniformly at random over all weights.

        Raises:
            WagleError: if the seed is below 0.
        """
        if seed < 0:
            raise WagleError(f"seed must be 0 or more, got {seed}")
        packed = random_bits(
            {name: prod(shape) for name, shape in self.shapes.items()}, self.count(), seed
        )
        return WeightMask(
            packed, self.shapes, self._made_from("random_like", self) | {"seed": seed}
        )

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> WeightMask:
        """Open a mask file. Tensors are read when they are asked for (memory-mapped).

        Raises:
            WagleError: if the file is missing, is no mask, is of a newer format, is damaged or is
                cut short.
        """
        given, path = Path(path), mask_path(path)
        if not path.is_file() and given.is_file():
            raise WagleError(
                f"{given} is no {SUFFIX} file: for a mask that torch.save wrote, run wagle mask "
                f"convert {given} -o {given.with_suffix(SUFFIX)}"
            )
        if given.is_dir():
            raise absent("mask file", given)
        file = TensorFile(path, "mask file")
        header = file.metadata
        if header.get("format") != FORMAT:
            raise WagleError(
                f"{path} is not a wagle_pl mask (format {header.get('format')!r}, expected "
                f"{FORMAT!r})"
            )
        try:
            version = int(header["format_version"])
            shapes, made_by = (
                dict(json.loads(header["shapes"])),
                dict(json.loads(header["made_by"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WagleError(f"{path} is damaged: its header lacks or garbles {error}") from None
        if version > FORMAT_VERSION:
            raise WagleError(
                f"{path} has mask format {version}; this version reads {FORMAT_VERSION}"
            )
        for name, shape in shapes.items():
            size = (prod(shape) + 7) // 8
            if name not in file.names or (file.dtype(name), file.shape(name)) != ("U8", (size,)):
                raise WagleError(
                    f"{path} is damaged: the bits of {name} do not fit its shape {tuple(shape)}"
                )
        mask = cls(dict.fromkeys(file.names), shapes, made_by)
        mask.source, mask._read = path, safe_open(path, framework="pt").get_tensor
        return mask

    def save(self, path: str | Path) -> Path:
        """Write the mask file (``.safetensors`` is added when missing), whole or not at all; return
        its path."""
        path = mask_path(path)
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "shapes": json.dumps(self.shapes),
            "made_by": json.dumps(self.metadata),
        }
        with atomic_path(path) as temporary:
            save_file({name: self.packed(name) for name in self.names}, temporary, metadata=header)
        return path

    def to_torch(self, path: str | Path) -> Path:
        """Write a ``{name: bool tensor}`` dict with ``torch.save``, whole or not at all.

        The format wants a byte a weight, in the file and in memory meanwhile, and keeps no record
        of what made it.
        """
        with atomic_path(Path(path)) as temporary:
            torch.save({name: self[name] for name in self.names}, temporary)
        return Path(path)

    # -- look --------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Parameter names, in the model's parameter order."""
        return list(self.shapes)

    def packed(self, name: str) -> Tensor:
        """The packed bits of one parameter, ``uint8`` of ``ceil(n / 8)`` bytes."""
        tensor = self._read(name)
        expected = (prod(self.shapes[name]) + 7) // 8
        if tensor.numel() != expected:
            raise WagleError(f"mask tensor {name} has {tensor.numel()} bytes, expected {expected}")
        padded = prod(self.shapes[name]) % 8
        if padded and int(tensor[-1]) >> padded:
            raise WagleError(
                f"{self.label}, tensor {name}: bits beyond the last weight are set; the mask is "
                "damaged"
            )
        return tensor

    def __getitem__(self, name: str) -> Tensor:
        """The bool tensor of one parameter, in the parameter's shape."""
        if name not in self.shapes:
            raise KeyError(name)
        return unpack_bits(self.packed(name), self.shapes[name])

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMask):
            return NotImplemented
        return self.shapes == other.shapes and all(
            torch.equal(self.packed(n), other.packed(n)) for n in self.names
        )

    __hash__ = None  # a mask is a value that can be large: compare it, do not use it as a key

    def count(self, name: Optional[str] = None) -> int:
        """Number of selected weights, in one parameter or in all."""
        for wanted in [name] if name else self.names:
            if wanted not in self._counts:
                self._counts[wanted] = count_bits(self.packed(wanted))
        return self._counts[name] if name else sum(self._counts.values())

    @property
    def total(self) -> int:
        """Number of weights, selected or not."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """Share of weights selected."""
        return self.count() / self.total

    def digest(self) -> str:
        """The mask as one name: SHA-256 over names, shapes and bits."""
        digest = hashlib.sha256()
        for name, shape in self.shapes.items():
            digest.update(f"{name} {shape}\n".encode())
            digest.update(memoryview(self.packed(name).numpy()))
        return digest.hexdigest()

    def tally(self, group: Callable[[str], Key]) -> dict[Key, tuple[int, int]]:
        """``group(parameter name)`` -> (weights selected, weights), groups in parameter order."""
        counts: dict[Key, tuple[int, int]] = {}
        for name, shape in self.shapes.items():
            selected, size = counts.get(group(name), (0, 0))
            counts[group(name)] = selected + self.count(name), size + prod(shape)
        return counts

    def stats(self) -> dict[str, dict[str, float]]:
        """Share selected as ``{"tensor": {...}, "layer": {...}, "module": {...}}``."""
        groups = {"tensor": str, "layer": _layer_key, "module": module_type_of}
        return {
            group: {
                key: selected / max(1, size) for key, (selected, size) in self.tally(key_of).items()
            }
            for group, key_of in groups.items()
        }

    def grid(self) -> dict[str, dict[str, float]]:
        """Share selected as ``{layer: {module label: share}}``; what lies outside the layers is in
        ``other``."""

        def cell(name: str) -> tuple[str, str]:
            layer, module = _layer_key(name), module_type_of(name)
            return layer, module if layer == "other" else module_label(module)

        rows: dict[str, dict[str, float]] = {}
        for (layer, module), (selected, size) in self.tally(cell).items():
            rows.setdefault(layer, {})[module] = selected / max(1, size)
        return rows

    @property
    def label(self) -> str:
        """How messages name the mask."""
        return f"mask {self.source}" if self.source else "mask"

    @property
    def origin(self) -> str:
        """What made the mask, in a few words."""
        return describe_origin(self.metadata)

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """Prompts of the attributions that chose the weights, see
        :attr:`wagle_pl.data.template.Template.prompts`."""
        found: list[dict[str, Any]] = []
        waiting = [self.metadata]
        while waiting:
            metadata = waiting.pop(0)
            if metadata.get("prompts") and metadata["prompts"] not in found:
                found.append(metadata["prompts"])
            if (
                metadata.get("operation") != "random_like"
            ):  # which takes no more than the number of weights
                waiting += metadata.get("of", ())
        return found

    def check(
        self, shapes: Shapes, fingerprint: Optional[str] = None, where: Optional[str] = None
    ) -> None:
        """Refuse a model this mask was not made for.

        Args:
            shapes: parameter name -> shape of the model.
            fingerprint: the model's fingerprint; compared when both sides have one.
            where: how to name the mask in the message.

        Raises:
            WagleError: naming the first difference.
        """
        where = where or self.label
        check_shapes(self.shapes, shapes, where, "the model")
        made_for = self.metadata.get("model_fingerprint")
        if fingerprint and made_for and fingerprint != made_for:
            raise WagleError(
                f"{where} was made for the model with fingerprint {made_for[:12]}, this one is "
                f"{fingerprint[:12]}: same shapes, other weights; run attribution on this model"
            )

    # -- set algebra, a tensor of bytes at a time --------------------------------------------------

    def __and__(self, other: WeightMask) -> WeightMask:
        """Selected in both."""
        return self._combine(other, "and", torch.bitwise_and)

    def __or__(self, other: WeightMask) -> WeightMask:
        """Selected in one or both."""
        return self._combine(other, "or", torch.bitwise_or)

    def __sub__(self, other: WeightMask) -> WeightMask:
        """Selected here and not there."""
        return self._combine(other, "minus", lambda ours, theirs: ours & ~theirs)

    def __invert__(self) -> WeightMask:
        """Selected where this one is not."""
        packed = {
            n: self.packed(n) ^ filled_bits(prod(shape), True) for n, shape in self.shapes.items()
        }
        return WeightMask(packed, self.shapes, self._made_from("not", self))

    def jaccard(self, other: WeightMask) -> float:
        """Weights in both over weights in one or both; 1 when both are empty.

        Raises:
            WagleError: if the masks are for different models.
        """
        self._check_same_model(other)
        both = sum(count_bits(self.packed(name) & other.packed(name)) for name in self.names)
        either = self.count() + other.count() - both
        return both / either if either else 1.0

    def _combine(
        self, other: WeightMask, operation: str, bits: Callable[[Tensor, Tensor], Tensor]
    ) -> WeightMask:
        if not isinstance(other, WeightMask):
            return NotImplemented
        self._check_same_model(other)
        packed = {name: bits(self.packed(name), other.packed(name)) for name in self.names}
        return WeightMask(packed, self.shapes, self._made_from(operation, self, other))

    def _check_same_model(self, other: WeightMask) -> None:
        check_shapes(self.shapes, other.shapes, self.label, f"the other {other.label}")
        ours, theirs = (mask.metadata.get("model_fingerprint") for mask in (self, other))
        if ours and theirs and ours != theirs:
            raise WagleError(
                f"{self.label} was made for the model with fingerprint {ours[:12]}, the other "
                f"{other.label} for {theirs[:12]}: same shapes, other weights"
            )

    @staticmethod
    def _made_from(operation: str, *masks: WeightMask) -> dict[str, Any]:
        """Metadata of a result: the model the operands share, the operation, and what made the
        operands."""
        known = {
            k: m.metadata[k]
            for m in reversed(masks)
            for k in ("model", "model_fingerprint")
            if m.metadata.get(k)
        }
        return {**known, "operation": operation, "of": [mask.metadata for mask in masks]}


def describe_origin(metadata: Mapping[str, Any]) -> str:
    """What made a mask, in a few words, from its metadata.

    >>> describe_origin({"operation": "minus", "of": [{"score": "WAGLE", "density": 0.1}, {}]})
    '(WAGLE, density 0.1) minus (unknown)'
    """
    operation = metadata.get("operation")
    parts = [f"({describe_origin(of)})" for of in metadata.get("of", ())]
    if operation == "modules":
        where = f" in layers {metadata['layers']}" if metadata.get("layers") else ""
        return (", ".join(metadata["modules"]) or "all modules") + where
    if operation == "import":
        return f"imported from {metadata['file']}"
    if operation == "random_like":
        return f"random like {parts[0]}, seed {metadata['seed']}"
    if operation:
        return f" {operation} ".join(parts) if len(parts) > 1 else f"{operation} {parts[0]}"
    if "score" in metadata:
        passes = metadata.get("passes", 1)
        several = "" if passes == 1 else f", {passes:.4g} passes"
        return f"{metadata['score']}, density {metadata.get('density', 'unknown')}{several}"
    return "unknown"


def _layer_key(name: str) -> str:
    layer = layer_of(name)
    return "other" if layer is None else str(layer)


def _as_bool(tensor: Tensor, name: str, path: Path) -> Tensor:
    if tensor.dtype != torch.bool and not ((tensor == 0) | (tensor == 1)).all():
        raise WagleError(f"{path}: {name} holds other values than 0 and 1: it is no mask")
    return tensor.bool()


def mask_path(path: str | Path) -> Path:
    """``path`` with the mask suffix, added when missing."""
    path = Path(path)
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
