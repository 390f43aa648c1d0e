"""Safetensors files as bytes: read and written a block at a time, so that no tensor need fit in memory.

The format: the length of the header (``uint64``, little-endian), the header (JSON: name -> ``dtype``, ``shape``,
``data_offsets``, and ``__metadata__``; spaces may follow), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

#: Bytes a number, of every dtype whose numbers are whole bytes.
WIDTHS = {
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
    ),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}

_LENGTH = struct.Struct("<Q")


class TensorFile:
    """One safetensors file.

    Attributes:
        names: of its tensors, in the order of their bytes.
        metadata: text by key.

    Args:
        path: the file.
        what: how to name it in a message.

    Raises:
        WagleError: if it is missing or no whole safetensors file.
    """

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
            self._head = stream.read(_LENGTH.size)
            self._head += stream.read(*_LENGTH.unpack(self._head))
        entries: dict[str, Any] = json.loads(self._head[_LENGTH.size :])
        self.metadata: dict[str, str] = entries.pop("__metadata__", {})
        self.names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        self._entries = entries

    def head(self) -> bytes:
        """Everything before the first tensor's bytes."""
        return self._head

    def dtype(self, name: str) -> str:
        """A tensor's dtype, as the format names it."""
        return self._entries[name]["dtype"]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._entries[name]["shape"])

    @staticmethod
    def width(dtype: str) -> int:
        """Bytes a number.

        Raises:
            WagleError: if a number is no whole number of bytes, or the dtype unknown.
        """
        if dtype not in WIDTHS:
            raise WagleError(f"tensors of dtype {dtype} cannot be read bit by bit")
        return WIDTHS[dtype]

    def open(self, name: str) -> BinaryIO:
        """A buffered stream of one tensor's bytes."""
        return io.BufferedReader(
            _Span(self.path, len(self._head), *self._entries[name]["data_offsets"])
        )

    def blocks(self, name: str, numbers: int) -> Iterator[bytes]:
        """A tensor's bytes, in blocks of ``numbers`` numbers; the last may be shorter."""
        size = numbers * self.width(self.dtype(name))
        with self.open(name) as stream:
            while block := stream.read(size):
                yield block


class TensorFiles:
    """The weights of a model folder: one safetensors file, or the shards that its index names.

    Args:
        folder: in Hugging Face format.

    Raises:
        WagleError: if there is no such folder, it has no safetensors weights, or a shard is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise absent("model folder", folder)
        self.files = [TensorFile(self.folder / name, "weight file") for name in self._file_names()]
        self._file_of = {name: file for file in self.files for name in file.names}

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not (self.folder / SINGLE_FILE).is_file():
            raise WagleError(
                f"model folder {self.folder} has no {SINGLE_FILE} and no {INDEX_FILE}: give a folder with "
                "safetensors weights"
            )
        return [SINGLE_FILE]

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def dtype(self, name: str) -> str:
        """A tensor's dtype, as the format names it."""
        return self._file_of[name].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._file_of[name].shape(name)

    def blocks(self, name: str, numbers: int) -> Iterator[bytes]:
        """A tensor's bytes, in blocks of ``numbers`` numbers; the last may be shorter."""
        return self._file_of[name].blocks(name, numbers)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU."""
        with safe_open(self._file_of[name].path, framework="pt") as file:
            return file.get_tensor(name)


def write_header(
    stream: BinaryIO,
    spans: Mapping[str, tuple[str, Sequence[int], tuple[int, int]]],
    metadata: Mapping[str, str],
    room: int = 0,
) -> int:
    """Write the header of a safetensors file where the stream stands.

    Args:
        stream: to write to.
        spans: name -> dtype, shape, and where its bytes begin and end after the header.
        metadata: text by key.
        room: bytes to fill, at least; a header can be written again with what was not known before, in the room of one
            at least as long.

    Returns:
        Bytes written.
    """
    entries = {
        n: {"dtype": d, "shape": list(s), "data_offsets": list(o)} for n, (d, s, o) in spans.items()
    }
    text = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    size = max(room - _LENGTH.size, -(-len(text) // 8) * 8)
    return stream.write(_LENGTH.pack(size) + text.ljust(size))


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


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int], Callable[[], torch.Tensor]]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, a tensor at a time.

    Args:
        path: the file.
        tensors: name, dtype, shape, and what gives the tensor when its turn has come.
        metadata: text by key.
    """
    tensors = list(tensors)
    spans, end = {}, 0
    for name, dtype, shape, _ in tensors:
        begin, end = end, end + prod(shape) * dtype.itemsize
        spans[name] = (DTYPES[dtype], shape, (begin, end))
    with open(path, "wb") as stream:
        write_header(stream, spans, metadata)
        for _, dtype, _, read in tensors:
            values = read().detach().to(dtype).contiguous().cpu().reshape(-1)
            stream.write(memoryview(values.view(torch.uint8).numpy()))
        stream.flush()


class _Span(io.RawIOBase):
    """A part of a file as a stream of its own."""

    def __init__(self, path: Path, start: int, begin: int, end: int) -> None:
        self._stream = open(path, "rb", buffering=0)  # noqa: SIM115  closed with this one
        self._stream.seek(start + begin)
        self._left = end - begin

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: self._left]
        count = self._stream.readinto(view) if len(view) else 0
        self._left -= count
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()
