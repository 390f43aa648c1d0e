"""Patches: the difference of an unlearned model to its base, exact, small, and reversible.

A patch holds, for every tensor that changed, which words changed and by how much: the new word minus the old one, both
taken as integers modulo 2ʷ. So applying adds and reverting subtracts, exactly, whatever the bits mean. Fingerprints of
both ends, SHA-256 over the raw bytes of all tensors, are checked before a result takes its place.

A patch may also go on a model that other patches of the same base have changed, as long as they changed other words:
the record of such a model (``wagle.json``) names its base and its patches, and its own fingerprint vouches for it.

On disk a patch is a safetensors file with one ``uint8`` tensor for each changed tensor: frames of up to 2²⁰ words, each
two lengths (``uint64``, little-endian) and two zlib streams: the bits that tell which words changed (lowest first), and
the differences d of those, as 2d or −2d − 1 (a small step of a float is a small d), byte planes apart, so that whole
planes are zero. Everything is read and written a frame at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.core.tensorfiles import TensorFile, TensorFiles, write_header
from wagle_pl.lm import models
from wagle_pl.unlearning.card import model_card

FORMAT = "wagle_pl.patch"
FORMAT_VERSION = 1
FRAME = 1 << 20  # words
RECORDS = (models.RECORD_FILE, models.CARD_FILE)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")

_LENGTHS = struct.Struct("<QQ")


class Patch:
    """An open patch file.

    Attributes:
        base, unlearned: fingerprints of the two ends.
        tensors: name -> ``dtype``, ``shape``, ``changed`` (words) and ``base``, ``unlearned`` (SHA-256 of those words
            alone), for every tensor that changed.
        made_by: names of both ends; ``lineage``, the runs that led from one to the other; and ``records``, what the
            base says of itself: the text of its ``wagle.json`` and model card, as far as it has them.

    Args:
        path: the file.

    Raises:
        WagleError: if it is missing, is no patch, is of a newer format or is cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.file = TensorFile(Path(path), "patch file")
        header = self.file.metadata
        if header.get("format") != FORMAT:
            raise WagleError(
                f"{path} is not a wagle_pl patch (format {header.get('format')!r}, expected {FORMAT!r})"
            )
        if int(header["format_version"]) > FORMAT_VERSION:
            raise WagleError(
                f"{path} has patch format {header['format_version']}; this version reads {FORMAT_VERSION}"
            )
        self.path = Path(path)
        self.base, self.unlearned = header["base"], header["unlearned"]
        self.weights = int(header["weights"])
        self.tensors: dict[str, dict[str, Any]] = json.loads(header["tensors"])
        self.made_by: dict[str, Any] = json.loads(header["made_by"])

    @property
    def changed(self) -> int:
        """Number of weights that differ."""
        return sum(tensor["changed"] for tensor in self.tensors.values())

    @property
    def identity(self) -> str:
        """What the patch does, as one name: the same for every file that does the same."""
        return hashlib.sha256(f"{self.base} {self.unlearned}".encode()).hexdigest()

    def frames(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(changed, differences) a frame: bool of its words, and unlearned − base of the changed ones, modulo 2ʷ.

        Raises:
            WagleError: if the file is damaged.
        """
        tensor = self.tensors[name]
        word = _word(tensor["dtype"])
        with self.file.open(name) as stream:
            for words in _frame_sizes(prod(tensor["shape"])):
                try:
                    lengths = _LENGTHS.unpack(stream.read(_LENGTHS.size))
                    where = _inflate(stream, lengths[0], words)
                    planes = _inflate(stream, lengths[1], words * word.itemsize)
                    changed = np.unpackbits(
                        np.frombuffer(where, np.uint8), count=words, bitorder="little"
                    ).view(bool)
                    folded = (
                        np.frombuffer(planes, np.uint8).reshape(word.itemsize, int(changed.sum())).T
                    )
                except (struct.error, zlib.error, ValueError) as error:
                    raise WagleError(
                        f"patch {self.path} is damaged at tensor {name}: {error}"
                    ) from None
                folded = np.ascontiguousarray(folded).view(word).reshape(-1)
                yield changed, (folded >> 1) ^ -(folded & 1)


def fingerprint(files: TensorFiles) -> str:
    """SHA-256 over names, dtypes, shapes and raw bytes of all tensors of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(files.names):
        digest.update(_signature(name, files))
        for block in files.blocks(name, FRAME):
            digest.update(block)
    return digest.hexdigest()


def make_patch(
    base: str | Path, unlearned: str | Path, output: str | Path, overwrite: bool = False
) -> Patch:
    """Write the difference between two model folders.

    Args:
        base, unlearned: folders with safetensors files, of the same tensors.
        output: the patch file.
        overwrite: replace an existing file.

    Raises:
        WagleError: if a folder has no safetensors files, or names, shapes or dtypes differ (naming the first).
    """
    output = Path(output)
    refuse_existing(output, overwrite, "--overwrite")
    old, new = TensorFiles(base), TensorFiles(unlearned)
    _same_layout(old, new)
    made_by = {
        "base": str(base),
        "unlearned": str(unlearned),
        "lineage": _steps_between(base, unlearned),
        "records": _records(Path(base)),
    }
    digests = {"base": hashlib.sha256(), "unlearned": hashlib.sha256()}
    blank = "0" * 64

    def header(tensors: Mapping[str, Any], ends: Mapping[str, str]) -> dict[str, str]:
        weights = sum(prod(old.shape(name)) for name in old.names)
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            **ends,
            "weights": str(weights),
            "tensors": json.dumps(tensors),
            "made_by": json.dumps(made_by),
        }

    largest = {n: _entry(old, n, prod(old.shape(n)), blank, blank) for n in old.names}
    offsets = {n: ("U8", [2**63], (2**63, 2**63)) for n in old.names}
    with atomic_path(output) as temporary, open(temporary, "wb") as stream:
        room = write_header(stream, offsets, header(largest, {"base": blank, "unlearned": blank}))
        tensors: dict[str, Any] = {}
        spans: dict[str, tuple[str, list[int], tuple[int, int]]] = {}
        for name in sorted(old.names):
            begin = stream.tell() - room
            entry = _write_difference(stream, name, old, new, digests)
            end = stream.tell() - room
            if entry["changed"]:
                tensors[name], spans[name] = entry, ("U8", [end - begin], (begin, end))
            else:
                stream.seek(begin + room)
                stream.truncate()
        stream.seek(0)
        write_header(
            stream, spans, header(tensors, {k: d.hexdigest() for k, d in digests.items()}), room
        )
    return Patch(output)


def _write_difference(
    stream: BinaryIO, name: str, old: TensorFiles, new: TensorFiles, digests: Mapping[str, Any]
) -> dict[str, Any]:
    """Write one tensor's frames; returns its entry. ``digests`` take both ends' bytes in."""
    word = _word(old.dtype(name))
    words = {"base": hashlib.sha256(), "unlearned": hashlib.sha256()}
    changed_words = 0
    for files, digest in ((old, digests["base"]), (new, digests["unlearned"])):
        digest.update(_signature(name, files))
    for before, after in zip(old.blocks(name, FRAME), new.blocks(name, FRAME), strict=True):
        digests["base"].update(before)
        digests["unlearned"].update(after)
        a, b = np.frombuffer(before, word), np.frombuffer(after, word)
        changed = a != b
        a, b = a[changed], b[changed]
        words["base"].update(a.tobytes())
        words["unlearned"].update(b.tobytes())
        changed_words += len(a)
        step = (b - a).view(f"<i{word.itemsize}")
        folded = (
            ((step << 1) ^ (step >> 8 * word.itemsize - 1))
            .view(np.uint8)
            .reshape(-1, word.itemsize)
        )
        where = _deflate(np.packbits(changed, bitorder="little").tobytes())
        planes = _deflate(folded.T.tobytes())
        stream.write(_LENGTHS.pack(len(where), len(planes)) + where + planes)
    return _entry(
        old, name, changed_words, words["base"].hexdigest(), words["unlearned"].hexdigest()
    )


def apply_patch(
    model: str | Path, patch: str | Path, output: str | Path, overwrite: bool = False
) -> str:
    """Write the unlearned model, from its base and a patch; returns its fingerprint.

    Args:
        model: folder of the patch's base, or of that base with other patches applied that changed other words.
        patch: patch file.
        output: folder to write, with the files of ``model``.
        overwrite: replace an existing model folder.

    Raises:
        WagleError: if the model is another one, or a word has been changed by a patch applied before.
    """
    return _rewrite(Path(model), Patch(patch), Path(output), overwrite, "base", "unlearned")


def revert_patch(
    model: str | Path, patch: str | Path, output: str | Path, overwrite: bool = False
) -> str:
    """Write the base model, from the unlearned one and the patch; the reverse of :func:`apply_patch`.

    Raises:
        WagleError: if the patch is not in the model.
    """
    return _rewrite(Path(model), Patch(patch), Path(output), overwrite, "unlearned", "base")


def _rewrite(
    folder: Path, patch: Patch, output: Path, overwrite: bool, source: str, target: str
) -> str:
    """Write ``folder`` with the patch's words changed, whole or not at all; returns the result's fingerprint."""
    refuse_existing(output, overwrite, "--overwrite", kind="folder")
    files = TensorFiles(folder)
    stack = _stack(folder, files, patch, source)
    for name, tensor in patch.tensors.items():
        if name not in files.names or (files.dtype(name), list(files.shape(name))) != (
            tensor["dtype"],
            tensor["shape"],
        ):
            raise WagleError(
                f"patch {patch.path} changes {name}, which {folder} lacks or has in another shape or dtype"
            )
    with atomic_path(output) as temporary:
        temporary.mkdir()
        for file in files.files:
            with open(temporary / file.path.name, "wb") as stream:
                stream.write(file.head())
                for name in file.names:
                    for block in _changed(patch, name, files, source, folder, stack):
                        stream.write(block)
        _copy_other_files(folder, temporary)
        written = fingerprint(TensorFiles(temporary))
        if stack is None and written != getattr(patch, target):
            raise WagleError(
                f"patch {patch.path} is damaged: it makes another model than it should; nothing is written"
            )
        _write_record(folder, temporary, patch, stack, target, written)
    return written


def _stack(folder: Path, files: TensorFiles, patch: Patch, source: str) -> Optional[list[str]]:
    """Patches already in a model whose record vouches for it; None when the model is the patch's own end.

    Raises:
        WagleError: if it is neither.
    """
    found = fingerprint(files)
    if found == getattr(patch, source):
        return None
    noted = models.read_record(str(folder)).get("patched", {})
    if noted.get("fingerprint") == found and noted.get("base") == patch.base:
        if source == "unlearned" and patch.identity not in noted["patches"]:
            raise WagleError(
                f"patch {patch.path} has not been applied to {folder}: there is nothing to revert"
            )
        if source == "base" and patch.identity in noted["patches"]:
            raise WagleError(f"patch {patch.path} has been applied to {folder} already")
        return noted["patches"]
    verb = "applies to" if source == "base" else "reverts"
    raise WagleError(
        f"patch {patch.path} {verb} the model with fingerprint {getattr(patch, source)[:12]}, {folder} is "
        f"{found[:12]}"
    )


def _changed(
    patch: Patch,
    name: str,
    files: TensorFiles,
    source: str,
    folder: Path,
    stack: Optional[list[str]],
) -> Iterator[bytes]:
    """A tensor's raw bytes, a frame at a time, with the patch's words changed."""
    if name not in patch.tensors:
        yield from files.blocks(name, FRAME)
        return
    word, digest = _word(files.dtype(name)), hashlib.sha256()
    for block, (changed, step) in zip(files.blocks(name, FRAME), patch.frames(name), strict=True):
        words = np.frombuffer(block, word).copy()
        digest.update(words[changed].tobytes())
        words[changed] += step if source == "base" else -step
        yield words.tobytes()
    if digest.hexdigest() != patch.tensors[name][source]:
        if stack is None:
            raise WagleError(f"patch {patch.path} is damaged at tensor {name}: nothing is written")
        others = f"the {len(stack)} patches" if len(stack) > 1 else "the patch"
        raise WagleError(
            f"patch {patch.path} overlaps {others} applied to {folder} before: both change {name}; "
            "revert that one first, or unlearn on its result"
        )


def _copy_other_files(folder: Path, target: Path) -> None:
    """Copy what holds no weights: configuration, tokenizer, index. (Stray weights would bring the forgotten back.)"""
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copyfile(path, target / path.name)


def _write_record(
    folder: Path, target: Path, patch: Patch, stack: Optional[list[str]], end: str, written: str
) -> None:
    """Bring ``wagle.json`` and the model card up to date: the runs a patch stands for come with it and go with it, and
    the base is given back its own."""
    if end == "base" and written == patch.base and "records" in patch.made_by:
        for name in RECORDS:
            (target / name).unlink(missing_ok=True)
        for name, text in patch.made_by["records"].items():
            (target / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        return
    record = models.read_record(str(folder))
    runs, own = record.get("lineage", []), patch.made_by["lineage"]
    if end == "unlearned":
        patches = sorted([*(stack or ()), patch.identity])
        runs = runs + own
    else:
        patches = [identity for identity in stack or () if identity != patch.identity]
        runs = [run for run in runs if run not in own]
    record = {"format_version": 1, **record, "lineage": runs}
    record["patched"] = {"base": patch.base, "patches": patches, "fingerprint": written}
    if not patches:
        del record["patched"]
    if not runs and not patches:
        del record["lineage"]
        (target / models.RECORD_FILE).unlink(missing_ok=True)
        if record.keys() - {"format_version"}:
            (target / models.RECORD_FILE).write_text(
                json.dumps(record, indent=2) + "\n", encoding="utf-8"
            )
        (target / models.CARD_FILE).write_text(
            "Restored by `wagle patch revert`, bit for bit.\n", encoding="utf-8"
        )
        return
    (target / models.RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if runs and "base" in runs[-1]:
        (target / models.CARD_FILE).write_text(model_card(record), encoding="utf-8")


def _records(base: Path) -> dict[str, str]:
    """Text of the files in which a model says what it is."""
    files = [base / name for name in RECORDS]
    return {
        file.name: file.read_bytes().decode("utf-8", "surrogateescape")
        for file in files
        if file.is_file()
    }


def _steps_between(base: str | Path, unlearned: str | Path) -> list[dict[str, Any]]:
    """The runs in the unlearned model's lineage that its base has not gone through."""
    earlier = models.read_record(str(base)).get("lineage", [])
    return [
        run for run in models.read_record(str(unlearned)).get("lineage", []) if run not in earlier
    ]


def _same_layout(old: TensorFiles, new: TensorFiles) -> None:
    for name in sorted(set(old.names) ^ set(new.names)):
        has, lacks = (old, new) if name in old.names else (new, old)
        raise WagleError(
            f"{has.folder} has a tensor {name} that {lacks.folder} lacks: they are different models"
        )
    for name in old.names:
        ours, theirs = ((f.dtype(name), tuple(f.shape(name))) for f in (old, new))
        if ours != theirs:
            raise WagleError(
                f"{name} is {ours[0]} {ours[1]} in {old.folder} and {theirs[0]} {theirs[1]} in {new.folder}"
            )


def _entry(
    files: TensorFiles, name: str, changed: int, base: str, unlearned: str
) -> dict[str, Any]:
    shape = list(files.shape(name))
    return {
        "dtype": files.dtype(name),
        "shape": shape,
        "changed": changed,
        "base": base,
        "unlearned": unlearned,
    }


def _signature(name: str, files: TensorFiles) -> bytes:
    return f"{name} {files.dtype(name)} {list(files.shape(name))}\n".encode()


def _word(dtype: str) -> np.dtype:
    """An unsigned integer as wide as a safetensors dtype."""
    return np.dtype(f"<u{TensorFile.width(dtype)}")


def _deflate(data: bytes) -> bytes:
    """Compress; run lengths and a Huffman code are all there is to gain, and several times faster than matching."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return deflater.compress(data) + deflater.flush()


def _inflate(stream: BinaryIO, length: int, most: int) -> bytes:
    """Decompress the next ``length`` bytes into ``most`` at most, whatever a damaged file claims."""
    if length > most + most // 8 + 1024:  # what does not compress grows: by about a 300th
        raise ValueError(f"a frame of {length} bytes")
    inflater = zlib.decompressobj()
    inflated = inflater.decompress(stream.read(length), most)
    if not inflater.eof:
        raise ValueError("a frame that does not end")
    return inflated


def _frame_sizes(words: int) -> Iterator[int]:
    for start in range(0, words, FRAME):
        yield min(FRAME, words - start)
