"""Safetensors files as bytes: no tensor has to fit in memory.

The format: the length of the header (``uint64``, little-endian), the header (JSON: name ->
``dtype``, ``shape``, ``data_offsets``, and ``__metadata__``; spaces may follow), then the tensors'
bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypedDict, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import absent
from wagle_pl.core.reading import parse_json, read_json
from wagle_pl.core.schema import check

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

#: torch's dtypes as the format names them.
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}

_LENGTH = struct.Struct("<Q")


class WeightIndex(TypedDict):
    """``model.safetensors.index.json``: which file holds which tensor."""

    weight_map: dict[str, str]


class TensorFile:
    """One safetensors file: the ``names`` of its tensors, its ``metadata``.

    Raises:
        WagleError: if it is missing or not a whole safetensors file; the error calls it ``what``.
    """

    mode: Literal["r", "r+"] = "r"  # of the mapped words

    def __init__(self, path: Path, what: str = "file") -> None:
        if not path.is_file():
            raise absent(what, path)
        try:
            with safe_open(path, framework="np"):  # checks header, offsets and size
                pass
        except (SafetensorError, OSError) as error:
            raise WagleError(f"{what} {path} is not a whole safetensors file: {error}") from None
        self.path = path
        with open(path, "rb") as stream:
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            self._entries: dict[str, Any] = json.loads(stream.read(length))
        self._start = _LENGTH.size + length
        self.metadata: dict[str, str] = self._entries.pop("__metadata__", {})
        self.names = list(self._entries)

    def check_format(self, kind: str, version: int) -> None:
        """Refuse a file that is not a ``wagle_pl`` file of this kind, or has a newer format."""
        written, expected = self.metadata.get("format"), f"wagle_pl.{kind}"
        if written != expected:
            raise WagleError(
                f"{self.path} is not a wagle_pl {kind} (format {written!r}, expected {expected!r})"
            )
        check_version(self.metadata.get("format_version"), version, f"{self.path} has {kind}")
        if "digest" in self.metadata and sealed(self.metadata) != self.metadata:
            raise WagleError(f"{self.path} is damaged: its metadata do not match their digest")

    def header(self, kind: str, version: int, schema: Any) -> dict[str, Any]:
        """The metadata of a ``wagle_pl`` file of a kind: what is not of type ``str`` is JSON."""
        self.check_format(kind, version)
        types, values = get_type_hints(schema), {}
        for key, text in self.metadata.items():
            is_text, where = types.get(key, str) is str, f"{self.path}: metadata key {key!r}"
            values[key] = text if is_text else parse_json(text, where, bytes_in=True)
        return check(values, schema, f"{self.path}: metadata")

    def dtype(self, name: str) -> str:
        """A tensor's dtype, as :data:`DTYPES` names it."""
        return self._entries[name]["dtype"]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def offset(self, name: str) -> int:
        """Where in the file a tensor's bytes begin."""
        return self._start + self._entries[name]["data_offsets"][0]

    def words(self, name: str) -> np.ndarray:
        """A tensor's numbers as unsigned integers of the same width, memory-mapped."""
        begin, end = self._entries[name]["data_offsets"]
        count = prod(self.shape(name))
        if not count:
            return np.empty(0, np.uint8)
        width, rest = divmod(end - begin, count)
        if rest or width not in (1, 2, 4, 8):
            raise WagleError(f"tensors of dtype {self.dtype(name)} cannot be read bit by bit")
        return np.memmap(self.path, f"<u{width}", self.mode, self.offset(name), (count,))


class TensorFiles:
    """The weights of a folder in Hugging Face format: its ``files`` (one safetensors file, or the
    shards that its index names) and the ``names`` of all tensors.

    Args:
        writable: words may be written.

    Raises:
        WagleError: if there is no such folder, it has no safetensors weights, or lacks a shard.
    """

    def __init__(self, folder: str | Path, writable: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise absent("model folder", folder)
        index = self.folder / INDEX_FILE
        if index.is_file():
            places = read_json(index, WeightIndex)["weight_map"]
            files = sorted(set(places.values()))
        elif (self.folder / SINGLE_FILE).is_file():
            files = [SINGLE_FILE]
        else:
            raise WagleError(
                f"model folder {self.folder} has no {SINGLE_FILE} and no {INDEX_FILE}: give a "
                "folder with safetensors weights"
            )
        self.files = [TensorFile(self.folder / name, "weight file") for name in files]
        for file in self.files if writable else ():
            file.mode = "r+"
        self._file_of = {name: file for file in self.files for name in file.names}
        self.names = list(self._file_of)

    # of the file that holds a tensor

    def dtype(self, name: str) -> str:
        return self._file_of[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def words(self, name: str) -> np.ndarray:
        return self._file_of[name].words(name)

    def put(self, name: str, places: np.ndarray, words: np.ndarray) -> None:
        """Write some of a tensor's words."""
        self.words(name)[places] = words

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name].path, framework="pt") as file:
            return file.get_tensor(name)

    def part(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Numbers start to stop of a flattened tensor; only these are read from the mapped file."""
        return self.tensor(name).reshape(-1)[start:stop]


def check_version(written: Any, version: int, what: str) -> None:
    """Refuse a file whose format version is not one of 1 to ``version``."""
    number = int(written) if re.fullmatch(r"[0-9]{1,9}", str(written)) else 0
    if not 1 <= number <= version:
        raise WagleError(f"{what} format {str(written)[:60]}; this version reads {version}")


def sealed(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with their SHA-256 as ``digest``, by which damage shows when they are read."""
    texts = {key: text for key, text in sorted(metadata.items()) if key != "digest"}
    return {**texts, "digest": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def load_plain(path: Path, what: str) -> Any:
    """Load what ``torch.save`` wrote, on the CPU, if it is tensors and plain data; runs no code.

    Tensors are mapped into memory and read when they are used.

    Raises:
        WagleError: naming ``what`` (``checkpoint <path>``), if the file is missing or damaged, or
            holds any other object.
    """
    kind = what.removesuffix(f" {path}")
    if not path.is_file():
        raise absent(kind, path)
    try:
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # of any type, as damaged bytes are instructions
        reason = f"{what} is damaged, or no {kind}: give another ({first_line(error)})"
        if other := re.search(r"GLOBAL (\S+)", str(error)):
            reason = (
                f"{what} holds {other[1]}: only tensors and plain data are read, as anything else "
                "could run code; give a file without it"
            )
        raise WagleError(reason) from None


def write_header(
    stream: BinaryIO,
    spans: Mapping[str, tuple[str, Sequence[int], int]],
    metadata: Mapping[str, str],
) -> None:
    """Write the header of a safetensors file; the tensors' bytes follow, in the order of ``spans``
    (name -> dtype, shape and number of bytes)."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in spans.items():
        begin, end = end, end + size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    stream.write(_LENGTH.pack(len(text)) + text)


def lay_out(
    path: Path,
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str],
) -> None:
    """Create a safetensors file for tensors (name, dtype, shape) that :func:`fill` will write."""
    spans = {n: (DTYPES[d], shape, prod(shape) * d.itemsize) for n, d, shape in tensors}
    with open(path, "wb") as stream:
        write_header(stream, spans, metadata)
        stream.truncate(stream.tell() + sum(size for _, _, size in spans.values()))


def fill(path: Path, parts: Iterable[tuple[str, int, torch.Tensor]]) -> int:
    """Write (name, index of the first value in the flattened tensor, values) into a file that is
    laid out, in its dtypes; returns the number of bytes. Several processes may write their own."""
    file, written = TensorFile(path), 0
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    with open(path, "r+b") as stream:
        for name, start, values in parts:
            values = values.detach().to(dtypes[file.dtype(name)]).contiguous().cpu().reshape(-1)
            stream.seek(file.offset(name) + start * values.itemsize)
            written += stream.write(values.view(torch.uint8).numpy().data)
    return written
