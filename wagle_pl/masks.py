"""``WeightMask``: which weights of one model are selected, as a value.

A mask is a bit for every weight of every parameter tensor (tied weights once). On disk it is a safetensors file with
one ``uint8`` tensor a parameter (eight weights a byte, lowest index in the lowest bit) and, in the metadata, the shapes,
what made it and the fingerprint of the model it belongs to. In memory it is the same bytes; a tensor is unpacked when
asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wagle_pl.utilities import WagleError, atomic_path

FORMAT = "wagle_pl.mask"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?:\.|$)")


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into ``ceil(n / 8)`` bytes, lowest index in the lowest bit.

    >>> pack_bits(torch.tensor([True, False, False, True]))
    tensor([9], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.detach().reshape(-1).cpu().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool tensor of ``shape`` that :func:`pack_bits` packed, on the device of ``packed``."""
    shape = tuple(shape)
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), count=prod(shape), bitorder="little")
        return torch.from_numpy(bits).view(torch.bool).view(shape)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) & powers) != 0).view(-1)[: prod(shape)].view(shape)


def count_bits(packed: Tensor) -> int:
    """Number of set bits in a packed ``uint8`` tensor."""
    counts = torch.bincount(packed.reshape(-1).cpu().int(), minlength=256)
    return int((counts * _BITS_IN_BYTE).sum())


_BITS_IN_BYTE = torch.tensor([bin(byte).count("1") for byte in range(256)])


def layer_of(name: str) -> Optional[int]:
    """Index of the transformer block a parameter belongs to, None outside the blocks.

    >>> layer_of("model.layers.7.mlp.up_proj.weight"), layer_of("lm_head.weight")
    (7, None)
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def module_type_of(name: str) -> str:
    """The name of the module a parameter belongs to, without its position.

    >>> module_type_of("model.layers.7.mlp.up_proj.weight")
    'up_proj'
    """
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else parts[0]


class WeightMask:
    """A bit for every weight of a model: selected (may move) or frozen.

    Args:
        packed: parameter name -> ``uint8`` tensor of ``ceil(n / 8)`` bytes (see :func:`pack_bits`), in the model's
            parameter order.
        shapes: parameter name -> shape, same names and order.
        metadata: what made the mask; JSON-serialisable. ``model_fingerprint`` is checked before use.

    Raises:
        WagleError: if names differ or a tensor has the wrong number of bytes.

    >>> mask = WeightMask.from_bools({"a": torch.tensor([[True, False], [False, True]])})
    >>> mask.density, mask["a"].shape
    (0.5, torch.Size([2, 2]))
    """

    def __init__(
        self,
        packed: Mapping[str, Tensor],
        shapes: Mapping[str, Iterable[int]],
        metadata: Optional[dict[str, Any]] = None,
    ) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.metadata = dict(metadata or {})
        self._packed = packed
        if set(packed) != set(self.shapes):
            raise WagleError(f"mask tensors and shapes differ in names: {sorted(set(packed) ^ set(self.shapes))[:3]}")

    @classmethod
    def from_bools(cls, bools: Mapping[str, Tensor], metadata: Optional[dict[str, Any]] = None) -> WeightMask:
        """The mask of a ``{name: bool tensor}`` dict."""
        return cls({n: pack_bits(b) for n, b in bools.items()}, {n: b.shape for n, b in bools.items()}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> WeightMask:
        """Open a mask file. Tensors are read when they are asked for (memory-mapped).

        Raises:
            WagleError: if the file is missing, is no mask, is of a newer format or is cut short.
        """
        path = mask_path(path)
        if not path.is_file():
            raise WagleError(f"mask file {path} does not exist")
        try:
            packed = _LazyTensors(path)
        except (SafetensorError, OSError) as error:
            raise WagleError(f"{path} is not a whole safetensors file: {error}") from None
        header = packed.metadata
        if header.get("format") != FORMAT:
            raise WagleError(f"{path} is not a wagle_pl mask (format {header.get('format')!r}, expected {FORMAT!r})")
        if int(header["format_version"]) > FORMAT_VERSION:
            raise WagleError(f"{path} has mask format {header['format_version']}; this version reads {FORMAT_VERSION}")
        return cls(packed, json.loads(header["shapes"]), json.loads(header["made_by"]))

    def save(self, path: str | Path) -> Path:
        """Write the mask file (``.safetensors`` is added when missing), whole or not at all; return its path."""
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

    @property
    def names(self) -> list[str]:
        """Parameter names, in the model's parameter order."""
        return list(self.shapes)

    def packed(self, name: str) -> Tensor:
        """The packed bits of one parameter, ``uint8`` of ``ceil(n / 8)`` bytes."""
        tensor = self._packed[name]
        expected = (prod(self.shapes[name]) + 7) // 8
        if tensor.numel() != expected:
            raise WagleError(f"mask tensor {name} has {tensor.numel()} bytes, expected {expected}")
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
        return self.shapes == other.shapes and all(torch.equal(self.packed(n), other.packed(n)) for n in self.names)

    __hash__ = None  # a mask is a value that can be large: compare it, do not use it as a key

    def count(self, name: Optional[str] = None) -> int:
        """Number of selected weights, in one parameter or in all."""
        return sum(count_bits(self.packed(n)) for n in ([name] if name else self.names))

    @property
    def total(self) -> int:
        """Number of weights, selected or not."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """Share of weights selected."""
        return self.count() / self.total

    def stats(self) -> dict[str, dict[str, float]]:
        """Share selected as ``{"tensor": {...}, "layer": {...}, "module": {...}}``."""
        counts: dict[str, dict[str, list[int]]] = {"tensor": {}, "layer": {}, "module": {}}
        for name in self.names:
            selected, size = self.count(name), prod(self.shapes[name])
            layer = layer_of(name)
            keys = {"tensor": name, "module": module_type_of(name), "layer": "other" if layer is None else str(layer)}
            for group, key in keys.items():
                entry = counts[group].setdefault(key, [0, 0])
                entry[0] += selected
                entry[1] += size
        return {group: {key: s / n for key, (s, n) in entries.items()} for group, entries in counts.items()}

    def check(
        self, shapes: Mapping[str, Iterable[int]], fingerprint: Optional[str] = None, where: str = "mask"
    ) -> None:
        """Refuse a model this mask was not made for.

        Args:
            shapes: parameter name -> shape of the model.
            fingerprint: the model's fingerprint; compared when both sides have one.
            where: how to name the mask in the message.

        Raises:
            WagleError: naming the first difference.
        """
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        for name in shapes:
            if name not in self.shapes:
                raise WagleError(f"{where} has no tensor for parameter {name}: it was made for another model")
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise WagleError(f"{where} has a tensor {name} that the model lacks: it was made for another model")
            if shape != shapes[name]:
                raise WagleError(f"{where}: {name} has shape {shape}, the model's is {shapes[name]}")
        made_for = self.metadata.get("model_fingerprint")
        if fingerprint and made_for and fingerprint != made_for:
            raise WagleError(
                f"{where} was made for the model with fingerprint {made_for[:12]}, this one is {fingerprint[:12]}: "
                "same shapes, other weights; run attribution on this model"
            )


class _LazyTensors(Mapping):
    """Tensors of a safetensors file, read when asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self.metadata = self._file.metadata() or {}
        self._names = set(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def mask_path(path: str | Path) -> Path:
    """``path`` with the mask suffix, added when missing."""
    path = Path(path)
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
