"""``WeightMask``: which weights of one model are selected, as a value.

On disk a mask is a safetensors file with the packed bits of each parameter as a ``uint8`` tensor.
Its metadata hold the shapes, how the mask was made, and the fingerprint of the model it is for.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Optional, TypedDict, TypeVar, Union

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wagle_pl.core.errors import WagleError, WrongType
from wagle_pl.core.files import absent, atomic_path
from wagle_pl.core.hub import card_of, upload
from wagle_pl.core.records import MadeBy
from wagle_pl.core.schema import Count, check
from wagle_pl.core.tensorfiles import DTYPES, TensorFile, load_plain, sealed
from wagle_pl.core.weights import mismatch, weights_digest
from wagle_pl.masks.bits import (
    count_bits,
    filled_bits,
    pack_bits,
    random_bits,
    unpack_bits,
    unpack_part,
)
from wagle_pl.masks.names import layer_of, module_label, module_type_of

FORMAT = "wagle_pl.mask"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"

Shapes = Mapping[str, Iterable[int]]
Key = TypeVar("Key", bound=Hashable)


class Header(TypedDict):
    """Metadata of a mask file."""

    shapes: dict[str, list[Count]]
    made_by: MadeBy
    checksums: Optional[dict[str, Count]]  # CRC-32 of each parameter's packed bits


def mask_path(path: str | Path) -> Path:
    """``path`` with the mask suffix, added when missing."""
    path = Path(check(path, Union[str, Path], "path"))
    if not path.name:
        raise WagleError(f"mask file {str(path)!r} has no name: name a file")
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def expected_jaccard(density: float, other: float) -> float:
    """Expected Jaccard overlap pq / (p + q − pq) of two independent, large random masks."""
    both = density * other
    return both / (density + other - both) if both else 0.0


class WeightMask:
    """One bit per weight of a model (tied weights count once): selected (trainable) or frozen.

    Args:
        packed: parameter name -> packed bits, see :func:`~wagle_pl.masks.bits.pack_bits`.
        shapes: parameter name -> shape, in the model's parameter order.
        metadata: how the mask was made, for JSON; ``model_fingerprint`` is checked before use.

    >>> mask = WeightMask.from_bools({"a": torch.tensor([[True, False], [False, True]])})
    >>> mask.density, mask["a"].shape
    (0.5, torch.Size([2, 2]))
    """

    __hash__ = None  # a mask is a value that can be large: compare it, do not use it as a key

    def __init__(
        self,
        packed: Mapping[str, Tensor],
        shapes: Shapes,
        metadata: Optional[Mapping[str, Any]] = None,
    ) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.metadata = dict(metadata or {})
        self.source: Optional[Path] = None
        self._read: Callable[[str], Tensor] = packed.__getitem__
        self._counts: dict[str, int] = {}
        self._checksums: dict[str, int] = {}  # of tensors in a file that have not been read yet
        if differing := sorted(set(packed) ^ set(self.shapes)):
            raise WagleError(f"mask tensors and shapes differ in names: {differing[:3]}")

    # -- make --------------------------------------------------------------------------------------

    @classmethod
    def from_bools(
        cls, bools: Mapping[str, Tensor], metadata: Optional[Mapping[str, Any]] = None
    ) -> WeightMask:
        """The mask of a ``{name: bool tensor}`` dict."""
        for name, tensor in check(bools, dict[str, Tensor], "bools").items():
            if tensor.dtype != torch.bool or tensor.is_meta:
                raise WrongType(f"{name} must be a bool tensor with values", "bools")
        packed = {name: pack_bits(tensor) for name, tensor in bools.items()}
        return cls(packed, {name: tensor.shape for name, tensor in bools.items()}, metadata)

    @classmethod
    def from_torch(
        cls,
        path: str | Path,
        shapes: Optional[Shapes] = None,
        metadata: Optional[Mapping[str, Any]] = None,
    ) -> WeightMask:
        """Read a ``{name: tensor of 0 and 1}`` dict of ``torch.save``, without running its code.

        Args:
            shapes: parameter name -> shape in the model it is for, to check the file against.
            metadata: ``model`` and ``model_fingerprint`` of that model.
        """
        path = Path(path)
        tensors = load_plain(path, f"mask file {path}")
        check(tensors, dict[str, Tensor], f"{path} holds no {{parameter name: bool tensor}} dict")
        packed = {}
        for name, tensor in tensors.items():
            plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
            if not plain or tensor.is_nested or tensor.dtype not in DTYPES:
                kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}"
                raise WagleError(f"{path}: {name} is no dense tensor of a mask ({kind})")
            if not ((tensor == 0) | (tensor == 1)).all():
                raise WagleError(f"{path}: {name} has values other than 0 and 1: not a mask")
            packed[name] = pack_bits(tensor.bool())
        made_by = {**(metadata or {}), "operation": "import", "file": path.name}
        mask = cls(packed, {name: tensor.shape for name, tensor in tensors.items()}, made_by)
        if shapes is not None:
            mask.check(shapes, where=f"mask {path}")
            mask.shapes = {name: mask.shapes[name] for name in shapes}
        return mask

    def random_like(self, seed: int) -> WeightMask:
        """A mask with as many selected weights, chosen uniformly at random from all weights."""
        check(seed, Count, "seed")
        sizes = {name: prod(shape) for name, shape in self.shapes.items()}
        made_by = self._made_from("random_like", self) | {"seed": seed}
        return WeightMask(random_bits(sizes, self.count(), seed), self.shapes, made_by)

    def moved(self, shapes: Shapes, made_for: Mapping[str, Any]) -> WeightMask:
        """The same bits for another model with the same parameters.

        Args:
            shapes: parameter name -> shape in that model; must equal this mask's.
            made_for: ``model`` and ``model_fingerprint`` of that model.
        """
        self.check(shapes)
        made_by = {**made_for, "operation": "moved", "of": [self.metadata]}
        return WeightMask({name: self.packed(name) for name in shapes}, shapes, made_by)

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> WeightMask:
        """Open a mask file; tensors are read on demand."""
        path, named = mask_path(path), Path(path)
        if not path.is_file() and named.is_file():
            raise WagleError(
                f"{named} is not a {SUFFIX} file: convert a mask of torch.save with wagle mask "
                f"convert {named} -o {named.with_suffix(SUFFIX)}"
            )
        if named.is_dir():
            raise absent("mask file", named)
        file = TensorFile(path, "mask file")
        header = file.header("mask", FORMAT_VERSION, Header)
        for name, shape in header["shapes"].items():
            size = (prod(shape) + 7) // 8
            if name not in file.names or (file.dtype(name), file.shape(name)) != ("U8", (size,)):
                raise WagleError(
                    f"{path} is damaged: the bits of {name} do not fit its shape {tuple(shape)}"
                )
        mask = cls(dict.fromkeys(file.names), header["shapes"], header["made_by"])
        if not mask.total:
            raise WagleError(f"{path} is a mask of no weights")
        mask.source, mask._read = path, safe_open(path, framework="pt").get_tensor
        mask._checksums = header.get("checksums") or {}
        return mask

    def save(self, path: str | Path) -> Path:
        """Write the mask file atomically; return its path, with the suffix."""
        path = mask_path(path)
        packed = {name: self.packed(name) for name in self}
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "shapes": json.dumps(self.shapes),
            "made_by": json.dumps(self.metadata),
            "checksums": json.dumps({n: _checksum(bits) for n, bits in packed.items()}),
        }
        with atomic_path(path) as temporary:
            save_file(packed, temporary, metadata=sealed(header))
        return path

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the mask as ``mask.safetensors``, with a card, see ``core.hub.upload``."""
        model = self.metadata.get("model") or "unknown"
        text = (
            f"# Mask\n\nIt selects {self.count():,} of {self.total:,} weights of `{model}`: "
            f"{self.origin}. For `--model.mask` of `wagle fit`, and `wagle mask info`."
        )
        with tempfile.TemporaryDirectory() as folder:
            file = self.save(Path(folder) / "mask")
            return upload(file, repo_id, card_of(model, "wagle_pl", text), **options)

    def to_torch(self, path: str | Path) -> Path:
        """Write a ``{name: bool tensor}`` dict with ``torch.save``, atomically."""
        with atomic_path(Path(path)) as temporary:
            torch.save({name: self[name] for name in self}, temporary)
        return Path(path)

    # -- look --------------------------------------------------------------------------------------

    def packed(self, name: str) -> Tensor:
        """The packed bits of one parameter, see :func:`~wagle_pl.masks.bits.pack_bits`."""
        size, tensor = prod(self.shapes[name]), self._read(name)
        spare = 8 * tensor.numel() - size
        if not 0 <= spare < 8 or (spare and int(tensor[-1]) >> 8 - spare):
            why = "its bytes do not match its shape, or bits beyond the last weight are set"
        elif self._checksums.pop(name, None) not in (None, _checksum(tensor)):
            why = "its bits do not match their checksum"
        else:
            return tensor
        raise WagleError(f"{self.label}, tensor {name}: {why}; the mask is damaged")

    def __getitem__(self, name: str) -> Tensor:
        """The bool tensor of one parameter, in the parameter's shape."""
        return unpack_bits(self.packed(name), self.shapes[name])

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """(stop − start,) bool: consecutive bits of one flattened parameter; unpacks only these."""
        return unpack_part(self.packed(name), start, stop)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMask):
            return NotImplemented
        return self.shapes == other.shapes and all(
            torch.equal(self.packed(name), other.packed(name)) for name in self
        )

    def count(self, name: Optional[str] = None) -> int:
        """Number of selected weights, in one parameter or in all."""
        if name is None:
            return sum(map(self.count, self))
        if name not in self._counts:
            self._counts[name] = count_bits(self.packed(name))
        return self._counts[name]

    @property
    def total(self) -> int:
        """Number of weights, selected or not."""
        return sum(map(prod, self.shapes.values()))

    @property
    def density(self) -> float:
        return self.count() / max(1, self.total)

    def digest(self) -> str:
        """SHA-256 over names, shapes, and digests of the bits. Collective."""
        bits = weights_digest((name, self.packed(name)) for name in self)  # bytes are exact in bf16
        return hashlib.sha256(f"{self.shapes} {bits}".encode()).hexdigest()

    def tally(self, group: Callable[[str], Key]) -> dict[Key, tuple[int, int]]:
        """``group(parameter name)`` -> (weights selected, weights), groups in parameter order."""
        counts: dict[Key, tuple[int, int]] = {}
        for name, shape in self.shapes.items():
            selected, size = counts.get(group(name), (0, 0))
            counts[group(name)] = selected + self.count(name), size + prod(shape)
        return counts

    def _shares(self, group: Callable[[str], Key]) -> dict[Key, float]:
        return {key: part / max(1, size) for key, (part, size) in self.tally(group).items()}

    def stats(self) -> dict[str, dict[str, float]]:
        """Share of selected weights, as ``{"tensor": {...}, "layer": {...}, "module": {...}}``."""
        shares: dict[str, dict[str, float]] = {"tensor": self._shares(str)}
        shares |= {"layer": self._shares(_layer_key), "module": self._shares(module_type_of)}
        return shares

    def grid(self) -> dict[str, dict[str, float]]:
        """``{layer: {module label: share selected}}``; weights outside layers are in ``other``."""

        def cell(name: str) -> tuple[str, str]:
            layer, module = _layer_key(name), module_type_of(name)
            return layer, module if layer == "other" else module_label(module)

        rows: dict[str, dict[str, float]] = {}
        for (layer, module), share in self._shares(cell).items():
            rows.setdefault(layer, {})[module] = share
        return rows

    @property
    def label(self) -> str:
        """Name of the mask in messages."""
        return f"mask {self.source or ''}".rstrip()

    @property
    def origin(self) -> str:
        """How the mask was made, in a few words."""
        return describe_origin(self.metadata)

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """Prompts of the attributions that chose the weights, see ``data.template.Template``."""
        prompts: list[dict[str, Any]] = []
        origins = [self.metadata]
        for origin in origins:
            if origin.get("prompts") and origin["prompts"] not in prompts:
                prompts.append(origin["prompts"])
            if origin.get("operation") != "random_like":  # it uses only their number
                origins += origin.get("of") or ()
        return prompts

    def check(
        self,
        shapes: Shapes,
        fingerprint: Optional[str] = None,
        where: Optional[str] = None,
        what: str = "the model",
    ) -> None:
        """Refuse a model, or another mask, that does not fit this mask; the error says why.

        Args:
            shapes: parameter name -> shape of the model.
            fingerprint: the model's; compared when both sides have one.
            where, what: how to name the mask and the other in the message.
        """
        where, made_for = where or self.label, self.metadata.get("model_fingerprint")
        for name in {**shapes, **self.shapes}:
            ours, theirs = self.shapes.get(name), shapes.get(name)
            if ours is None:
                difference = f"has no tensor for parameter {name} of {what}"
            elif theirs is None:
                difference = f"has a tensor {name} that {what} lacks"
            elif ours != tuple(theirs):
                difference = f"has another shape of {name} than {what}: {ours} and {tuple(theirs)}"
            else:
                continue
            raise WagleError(f"{where} {difference}: it was made for another model")
        if differing := mismatch(made_for, fingerprint):
            same = "shapes" if differing == "weights" else "shapes and weights"
            raise WagleError(
                f"{where} was made for the model with fingerprint {made_for[:12]}, {what} has "
                f"{fingerprint[:12]}: same {same}, other {differing}",
                hint="run attribution on this model" if what == "the model" else None,
            )

    # -- set operations on packed bits, one tensor at a time ---------------------------------------

    def __and__(self, other: WeightMask) -> WeightMask:
        return self._combine(other, "and", torch.bitwise_and)

    def __or__(self, other: WeightMask) -> WeightMask:
        return self._combine(other, "or", torch.bitwise_or)

    def __sub__(self, other: WeightMask) -> WeightMask:
        return self._combine(other, "minus", lambda ours, theirs: ours & ~theirs)

    def __invert__(self) -> WeightMask:
        flipped = {
            name: self.packed(name) ^ filled_bits(prod(shape), True)
            for name, shape in self.shapes.items()
        }
        return WeightMask(flipped, self.shapes, self._made_from("not", self))

    def jaccard(self, other: WeightMask) -> float:
        """Weights in both over weights in one or both; 1 when both are empty."""
        self._check_same_model(other)
        both = sum(count_bits(self.packed(name) & other.packed(name)) for name in self)
        either = self.count() + other.count() - both
        return both / either if either else 1.0

    def _combine(
        self, other: WeightMask, operation: str, bits: Callable[[Tensor, Tensor], Tensor]
    ) -> WeightMask:
        if not isinstance(other, WeightMask):
            return NotImplemented
        self._check_same_model(other)
        packed = {name: bits(self.packed(name), other.packed(name)) for name in self}
        return WeightMask(packed, self.shapes, self._made_from(operation, self, other))

    def _check_same_model(self, other: WeightMask) -> None:
        fingerprint = other.metadata.get("model_fingerprint")
        self.check(other.shapes, fingerprint, what=f"the other {other.label}")

    @staticmethod
    def _made_from(operation: str, *masks: WeightMask) -> dict[str, Any]:
        """Metadata of a result: the model that the operands share, and how each was made."""
        known = {
            key: mask.metadata[key]
            for mask in reversed(masks)
            for key in ("model", "model_fingerprint")
            if mask.metadata.get(key)
        }
        return {**known, "operation": operation, "of": [mask.metadata for mask in masks]}


def _layer_key(name: str) -> str:
    layer = layer_of(name)
    return "other" if layer is None else str(layer)


def _checksum(packed: Tensor) -> int:
    return zlib.crc32(packed.numpy().data)


def describe_origin(metadata: Mapping[str, Any]) -> str:
    """What made a mask, in a few words, from its metadata.

    >>> describe_origin({"operation": "minus", "of": [{"score": "WAGLE", "density": 0.1}, {}]})
    '(WAGLE, density 0.1) minus (unknown)'
    """
    operation = metadata.get("operation")
    parts = [f"({describe_origin(of)})" for of in metadata.get("of") or ()] or ["(unknown)"]
    if operation == "modules":
        where = f" in layers {metadata['layers']}" if metadata.get("layers") else ""
        return (", ".join(metadata.get("modules") or ()) or "all modules") + where
    if operation == "import":
        return f"imported from {metadata.get('file', 'unknown')}"
    if operation == "random_like":
        return f"random like {parts[0]}, seed {metadata.get('seed', 'unknown')}"
    if operation:
        return f" {operation} ".join(parts) if len(parts) > 1 else f"{operation} {parts[0]}"
    if metadata.get("score"):
        passes = metadata.get("passes") or 1
        several = "" if passes == 1 else f", {passes:.4g} passes"
        unit = f", by {metadata['unit']}" if metadata.get("unit") else ""
        return f"{metadata['score']}, density {metadata.get('density', 'unknown')}{unit}{several}"
    return "unknown"
