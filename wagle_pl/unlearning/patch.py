"""Patches: the difference of an unlearned model to its base, exact, small, and reversible.

A patch holds, for every tensor that changed, which words changed and by how much: the new word
minus the old one, both taken as integers modulo 2ʷ. Applying therefore adds and reverting
subtracts, exactly, whatever the bits mean. Digests of both models are checked before a result is
put in place.

A patch can also be applied to a model that other patches of the same base have changed, if they
changed other words: such a model's record (``wagle.json``) names its base, patches and digest.

On disk a patch is a safetensors file with one ``uint8`` tensor for each changed tensor: frames of
up to 2²⁰ words, each with two lengths (``uint64``, little-endian) and two zlib streams: bits that
say which words changed (lowest first), and the differences d of these words, as 2d or −2d − 1 (a
small step of a float is a small d), in separate byte planes, so that whole planes are zero.
Everything is read and written one frame at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Optional, TypeAlias, TypedDict

import numpy as np
from torch import nn

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.core.hub import card_of, upload
from wagle_pl.core.records import Run
from wagle_pl.core.schema import Count
from wagle_pl.core.tensorfiles import TensorFile, TensorFiles, sealed, write_header
from wagle_pl.lm.saving import CARD_FILE, RECORD_FILE, read_record
from wagle_pl.unlearning.export import forgotten, model_card

if TYPE_CHECKING:
    from wagle_pl.unlearning.serving import LoadedTensors

    Tensors: TypeAlias = TensorFiles | LoadedTensors

FORMAT = "wagle_pl.patch"
FORMAT_VERSION = 1
FRAME = 1 << 20  # words
RECORDS = (RECORD_FILE, CARD_FILE)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")

End = Literal["base", "unlearned"]
_LENGTHS = struct.Struct("<QQ")


class ChangedTensor(TypedDict):
    """A tensor that a patch changes."""

    dtype: str
    shape: list[Count]
    changed: Count  # number of words
    base: str  # SHA-256 of only these words, before
    unlearned: str  # and after


class PatchMadeBy(TypedDict):
    """Where a patch comes from."""

    base: str  # names of both ends
    unlearned: str
    lineage: list[Run]  # runs that led from one to the other
    records: dict[Literal["wagle.json", "README.md"], str]  # the base's own, if it has them


class Header(TypedDict):
    """Metadata of a patch file."""

    base: str  # digests of both ends, see digest_of
    unlearned: str
    weights: Count  # how many the model has
    tensors: dict[str, ChangedTensor]
    made_by: PatchMadeBy


class Patch(AbstractContextManager["Patch"]):
    """An open patch file; its attributes are those of :class:`Header`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = TensorFile(self.path, "patch file")
        header = self.file.header("patch", FORMAT_VERSION, Header)
        self.base, self.unlearned, self.weights = (
            header[k] for k in ("base", "unlearned", "weights")
        )
        self.tensors: dict[str, ChangedTensor] = header["tensors"]
        self.made_by: PatchMadeBy = header["made_by"]
        self.attached_to: Optional[nn.Module] = None
        for name in self.tensors.keys() ^ set(self.file.names):
            raise WagleError(f"patch {path} is damaged: it describes or holds no tensor {name}")

    @property
    def changed(self) -> int:
        return sum(tensor["changed"] for tensor in self.tensors.values())

    def check_layout(self, files: Tensors) -> None:
        """Refuse a model that lacks a tensor of the patch, or has it in another shape or dtype."""
        for name, tensor in self.tensors.items():
            layout = (tensor["dtype"], tuple(tensor["shape"]))
            if name not in files.names or (files.dtype(name), files.shape(name)) != layout:
                raise WagleError(
                    f"patch {self.path} changes {name}, which {files.folder} lacks or has in "
                    "another shape or dtype"
                )

    @property
    def identity(self) -> str:
        """A name for what the patch does: the same for all files that do the same."""
        return hashlib.sha256(f"{self.base} {self.unlearned}".encode()).hexdigest()

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the file and a card, see :func:`wagle_pl.core.hub.upload`."""
        base, sets = self.made_by["base"], forgotten(self.made_by)
        text = (
            f"# Patch\n\nMade by `wagle_pl`. It changes {self.changed:,} of {self.weights:,} weights "
            f"of `{base}` (digest {self.base[:12]}): `wagle patch apply BASE {self.path.name} -o "
            "UNLEARNED`, and back: `wagle patch revert`."
        )
        text += f"\n\nForgotten: {', '.join(sets)}." if sets else ""
        card = card_of(base, "wagle_pl", text, self.made_by["records"].get(CARD_FILE) or "")
        return upload(self.path, repo_id, card, **options)

    def moves(
        self, name: str, words: np.ndarray, source: End
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each frame of a tensor's words, which are those of ``source``, yield the places of
        those that change (int64), and these before and after."""
        data, at, width = self.file.words(name), 0, words.itemsize
        for start in range(0, len(words), FRAME):
            count = min(FRAME, len(words) - start)
            try:
                lengths = _LENGTHS.unpack(data[at : at + _LENGTHS.size].tobytes())
                middle = at + _LENGTHS.size + lengths[0]
                bits = np.frombuffer(_inflate(data[at + _LENGTHS.size : middle], count), np.uint8)
                at = middle + lengths[1]
                planes = np.frombuffer(_inflate(data[middle:at], count * width), np.uint8)
                places = np.flatnonzero(np.unpackbits(bits, count=count, bitorder="little"))
                bytes_ = planes.reshape(width, len(places))
            except (struct.error, zlib.error, ValueError) as error:
                raise self.damaged(name, error) from None
            folded = np.ascontiguousarray(bytes_.T).view(words.dtype).reshape(-1)
            step = (folded >> 1) ^ -(folded & 1)
            before = words[places + start]
            yield places + start, before, before + (step if source == "base" else -step)

    def damaged(self, name: str, why: object) -> WagleError:
        return WagleError(f"patch {self.path} is damaged at tensor {name}: {why}")

    def differing(self, tensors: Tensors, source: End) -> Optional[str]:
        """A tensor whose words that the patch changes are not those of ``source``, or would not
        become those of the other end; None if there is none."""
        for name, entry in self.tensors.items():
            before, after = hashlib.sha256(), hashlib.sha256()
            for _, old, new in self.moves(name, tensors.words(name), source):
                before.update(old.tobytes())
                after.update(new.tobytes())
            digests = (before.hexdigest(), after.hexdigest())
            if digests[:: 1 if source == "base" else -1] != (entry["base"], entry["unlearned"]):
                return name
        return None

    def write(self, tensors: Tensors, source: End) -> Iterator[None]:
        """Write what becomes of the words of ``source``, a frame at each step."""
        for name in self.tensors:
            words = tensors.words(name)
            for places, _, after in self.moves(name, words, source):
                tensors.put(name, places, after)
                yield

    def wrong_model(self, model: str | Path, digest: str, source: End = "base") -> WagleError:
        """The error that a model with this digest is not the patch's ``source``."""
        verb, end = {"base": "applies to", "unlearned": "reverts"}[source], getattr(self, source)
        text = (
            f"patch {self.path} {verb} the model with digest {end[:12]}, {model} is {digest[:12]}"
        )
        return WagleError(text)

    # -- a loaded model ----------------------------------------------------------------------------

    def attach(self, lm: nn.Module) -> Patch:
        """Turn a loaded base model into the unlearned one, in place, bit for bit.

        As a context manager, the patch is detached at the end. Several can be attached: each to
        the model that the one before has made, which is then detached after it; or, if all have one
        base and change other weights, beside each other, to be detached in any order.

        Args:
            lm: a model with the base's weights, in the dtype of its files, on any device.

        Raises:
            WagleError: if it is another model, whose weights stay as they are.
        """
        from wagle_pl.unlearning import serving

        serving.attach(self, lm)
        return self

    def detach(self) -> None:
        """Turn the model back into what it was before :meth:`attach`, bit for bit.

        Raises:
            WagleError: if another patch has been attached later, to what this one has made, or
                weights have been changed or cast. They stay as they are.
        """
        from wagle_pl.unlearning import serving

        serving.detach(self)

    def __exit__(self, *_: object) -> None:
        self.detach()


def digest_of(files: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and raw bytes of all tensors, in the order of their names.

    Unlike :func:`wagle_pl.core.weights.weights_digest`, it changes with the dtype and with every bit.
    """
    digest = hashlib.sha256()
    for name in sorted(files.names):
        digest.update(f"{name} {files.dtype(name)} {list(files.shape(name))}\n".encode())
        for frame in _frames(files.words(name)):
            digest.update(frame.data)
    return digest.hexdigest()


# -- making ----------------------------------------------------------------------------------------


def make_patch(
    base: str | Path, unlearned: str | Path, output: str | Path, overwrite: bool = False
) -> Patch:
    """Write the difference between two model folders with safetensors files of the same layout."""
    output, base, unlearned = Path(output), Path(base), Path(unlearned)
    refuse_existing(output, overwrite, "--overwrite")
    old, new = TensorFiles(base), TensorFiles(unlearned)
    _check_layout(old, new)
    earlier = read_record(str(base))["lineage"]
    later = read_record(str(unlearned))["lineage"]
    records = {name: base / name for name in RECORDS if (base / name).is_file()}
    made_by = {
        "base": str(base),
        "unlearned": str(unlearned),
        "lineage": [run for run in later if run not in earlier],
        "records": {
            name: path.read_bytes().decode("utf-8", "surrogateescape")
            for name, path in records.items()
        },
    }
    tensors: dict[str, Any] = {}
    spans: dict[str, tuple[str, list[int], int]] = {}
    with (
        atomic_path(output) as temporary,
        open(temporary, "wb") as stream,
        tempfile.TemporaryFile(dir=temporary.parent) as frames,
    ):
        for name in sorted(old.names):
            begin = frames.tell()
            entry = _write_difference(frames, name, old, new)
            if entry["changed"]:
                tensors[name] = entry
                spans[name] = ("U8", [frames.tell() - begin], frames.tell() - begin)
            else:
                frames.seek(begin)
                frames.truncate()
        header = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "base": digest_of(old),
            "unlearned": digest_of(new),
            "weights": str(sum(prod(old.shape(name)) for name in old.names)),
            "tensors": json.dumps(tensors),
            "made_by": json.dumps(made_by),
        }
        write_header(stream, spans, sealed(header))
        frames.seek(0)
        shutil.copyfileobj(frames, stream)
    return Patch(output)


def _check_layout(old: TensorFiles, new: TensorFiles) -> None:
    for name in sorted(set(old.names) ^ set(new.names)):
        has, lacks = (old, new) if name in old.names else (new, old)
        raise WagleError(
            f"{has.folder} has a tensor {name} that {lacks.folder} lacks: they are different models"
        )
    for name in old.names:
        ours, theirs = (f"{files.dtype(name)} {files.shape(name)}" for files in (old, new))
        if ours != theirs:
            raise WagleError(f"{name} is {ours} in {old.folder} and {theirs} in {new.folder}")


def _write_difference(
    stream: BinaryIO, name: str, old: TensorFiles, new: TensorFiles
) -> dict[str, Any]:
    """Write one tensor's frames; returns its entry."""
    count, digests = 0, {"base": hashlib.sha256(), "unlearned": hashlib.sha256()}
    for before, after in zip(_frames(old.words(name)), _frames(new.words(name)), strict=True):
        changed = before != after
        left, right = before[changed], after[changed]
        digests["base"].update(left)
        digests["unlearned"].update(right)
        count += len(left)
        width = before.itemsize
        step = (right - left).view(f"<i{width}")
        folded = (step << 1) ^ (step >> 8 * width - 1)
        bits = np.packbits(changed, bitorder="little").tobytes()
        where = min(_deflate(bits), zlib.compress(bits), key=len)  # the latter for whole columns
        planes = _deflate(folded.view(np.uint8).reshape(-1, width).T.tobytes())
        stream.write(_LENGTHS.pack(len(where), len(planes)) + where + planes)
    layout = {"dtype": old.dtype(name), "shape": list(old.shape(name)), "changed": count}
    return layout | {end: digest.hexdigest() for end, digest in digests.items()}


# -- applying and reverting ------------------------------------------------------------------------


def apply_patch(
    model: str | Path, patch: str | Path, output: str | Path, overwrite: bool = False
) -> str:
    """Write the unlearned model, from its base and a patch; returns its digest.

    Args:
        model: folder of the patch's base, or of that base with patches that changed other words.
        overwrite: replace an existing model folder.
    """
    return _rewrite(Path(model), Patch(patch), Path(output), overwrite, "base", "unlearned")


def revert_patch(
    model: str | Path, patch: str | Path, output: str | Path, overwrite: bool = False
) -> str:
    """Write the base model, from the unlearned one and the patch; reverses :func:`apply_patch`."""
    return _rewrite(Path(model), Patch(patch), Path(output), overwrite, "unlearned", "base")


def _rewrite(
    folder: Path, patch: Patch, output: Path, overwrite: bool, source: End, target: End
) -> str:
    """Write ``folder`` with the patch's words changed, whole or not at all; returns its digest."""
    refuse_existing(output, overwrite, "--overwrite", kind="folder")
    files = TensorFiles(folder)
    stack = _stack(folder, files, patch, source)
    patch.check_layout(files)
    if name := patch.differing(files, source):
        if stack is None:
            raise patch.damaged(name, "nothing is written")
        others = f"the {len(stack)} patches" if len(stack) > 1 else "the patch"
        raise WagleError(
            f"patch {patch.path} overlaps {others} applied to {folder} before: both change {name}; "
            "revert that one first, or unlearn on its result"
        )
    with atomic_path(output) as temporary:
        temporary.mkdir()
        _copy_other_files(folder, temporary)
        for file in files.files:
            shutil.copyfile(file.path, temporary / file.path.name)
        made = TensorFiles(temporary, writable=True)
        for _ in patch.write(made, source):
            pass
        written = digest_of(made)
        if stack is None and written != getattr(patch, target):
            raise WagleError(f"patch {patch.path} is damaged: nothing is written")
        _write_record(folder, temporary, patch, stack or [], written)
    return written


def _stack(folder: Path, files: TensorFiles, patch: Patch, source: End) -> Optional[list[str]]:
    """Patches that a model's record lists; None if the model is exactly the patch's ``source``."""
    digest = digest_of(files)
    if digest == getattr(patch, source):
        return None
    noted: Mapping[str, Any] = read_record(str(folder)).get("patched") or {}
    if noted.get("fingerprint") != digest or noted.get("base") != patch.base:
        raise patch.wrong_model(folder, digest, source)
    is_in = patch.identity in noted["patches"]
    if source == "unlearned" and not is_in:
        raise WagleError(
            f"patch {patch.path} has not been applied to {folder}: there is nothing to revert"
        )
    if source == "base" and is_in:
        raise WagleError(f"patch {patch.path} has been applied to {folder} already")
    return noted["patches"]


def _copy_other_files(folder: Path, target: Path) -> None:
    """Copy configuration, tokenizer and index; other weights could bring the forgotten back."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
            shutil.copyfile(path, target / path.name)


def _write_record(folder: Path, target: Path, patch: Patch, stack: list[str], written: str) -> None:
    """Write ``wagle.json`` and the card with or without the patch's runs; the base gets its own."""
    if written == patch.base:
        for name in RECORDS:
            (target / name).unlink(missing_ok=True)
        for name, text in patch.made_by["records"].items():
            (target / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        return
    record = read_record(str(folder))
    runs, patch_runs = record["lineage"], patch.made_by["lineage"]
    if patch.identity in stack:
        runs = [run for run in runs if run not in patch_runs]
        patches = [identity for identity in stack if identity != patch.identity]
    else:
        runs, patches = runs + patch_runs, sorted([*stack, patch.identity])
    record["lineage"] = runs
    record["patched"] = {"base": patch.base, "patches": patches, "fingerprint": written}
    text = json.dumps(record, indent=2) + "\n"
    (target / RECORD_FILE).write_text(text, encoding="utf-8")
    if runs:
        (target / CARD_FILE).write_text(model_card(record), encoding="utf-8")


# -- bytes -----------------------------------------------------------------------------------------


def _frames(words: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(words), FRAME):
        yield words[start : start + FRAME]


def _deflate(data: bytes) -> bytes:
    """Compress with run lengths and a Huffman code: as small here as matching, and much faster."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return deflater.compress(data) + deflater.flush()


def _inflate(data: np.ndarray, bound: int) -> bytes:
    """Decompress to ``bound`` bytes at most, whatever a damaged file claims."""
    inflater = zlib.decompressobj()
    inflated = inflater.decompress(data.data, bound)
    if not inflater.eof:
        raise ValueError("a frame that does not end")
    return inflated
