"""Checkpoints that many ranks write, each its share, and any number of ranks reads.

A folder::

    index.json                         shapes; which file holds which numbers of which parameter
    rank-00000-of-00002.safetensors    what this rank holds: weights (fp32 where they are trained), optimiser state
    common.ckpt                        what Lightning keeps: progress, callbacks, schedulers, hyperparameters

It is written beside its place and renamed, so that it is whole or not there.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import atomic_path
from wagle_pl.core.tensorfiles import write_tensors
from wagle_pl.lm.weights import assign, shapes_of
from wagle_pl.strategies.fragments import Fragment

FORMAT = "wagle_pl.checkpoint"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
COMMON_FILE = "common.ckpt"
WEIGHT = "weight"


class Part(NamedTuple):
    """Consecutive numbers of a parameter, or of something of its shape.

    Attributes:
        key: what they are: ``weight``, ``state/<key of the optimiser>`` or ``sum/<name>``.
        name: of the parameter.
        start: the first number's place in the flattened parameter.
        numel: how many.
        dtype: of the numbers.
        read: gives them, (numel,), when they are to be written.
    """

    key: str
    name: str
    start: int
    numel: int
    dtype: torch.dtype
    read: Callable[[], Tensor]


# -- what a rank holds ------------------------------------------------------------------------------------------------


def of_optimizer(optimizer: torch.optim.Optimizer, found: Iterable[Fragment]) -> Iterator[Part]:
    """Weights and optimiser state in this rank's flat partitions."""
    for fragment in found:
        yield Part(
            WEIGHT, *fragment[:3], torch.float32, partial(fragment.of, fragment.flat.detach())
        )
    for fragment in found:
        for key in tensor_states(optimizer, fragment.flat):
            state = optimizer.state[fragment.flat][key]
            yield Part(f"state/{key}", *fragment[:3], state.dtype, partial(fragment.of, state))


def tensor_states(optimizer: torch.optim.Optimizer, flat: Tensor) -> list[str]:
    """Keys of the state that has one number a weight; others are single numbers."""
    state = optimizer.state.get(flat, {})
    return [key for key, value in state.items() if torch.is_tensor(value) and value.dim()]


def of_frozen(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[Part]:
    """This rank's share of those (name, parameter) pairs that no optimiser holds."""
    ranks, rank = distributed.world_size(), distributed.rank()
    for name, parameter in parameters:
        if parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            share, here = parameter.partition_numel(), parameter.ds_tensor
            numel = min(share, parameter.ds_numel - rank * share)
            if numel > 0:
                yield Part(
                    WEIGHT,
                    name,
                    rank * share,
                    numel,
                    here.dtype,
                    partial(here.detach().narrow, 0, 0, numel),
                )
            continue
        share = -(-parameter.numel() // ranks)
        numel = min(share, parameter.numel() - rank * share)
        if numel > 0:
            read = partial(parameter.detach().view(-1).narrow, 0, rank * share, numel)
            yield Part(WEIGHT, name, rank * share, numel, parameter.dtype, read)


def single_states(
    optimizer: torch.optim.Optimizer, found: Iterable[Fragment]
) -> dict[str, dict[str, float]]:
    """Parameter -> key -> the state that is one number (a step count)."""
    singles: dict[str, dict[str, float]] = {}
    for fragment in found:
        for key, value in optimizer.state.get(fragment.flat, {}).items():
            if not (torch.is_tensor(value) and value.dim()) and isinstance(
                value, (int, float, Tensor)
            ):
                singles.setdefault(fragment.name, {})[key] = float(value)
    return singles


# -- writing ----------------------------------------------------------------------------------------------------------


def save(
    path: Path,
    parts: Iterable[Part],
    common: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Write a checkpoint; a meeting of all ranks.

    Args:
        path: where to; replaced if it exists.
        parts: what this rank holds.
        common: what rank 0 writes for all.
        shapes: parameter name -> shape of what is kept, whole.

    Raises:
        WagleError: if a rank cannot write its share: the checkpoint does not appear.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    file = f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
    parts = list(parts)
    with atomic_path(path) if rank == 0 else nullcontext() as temporary:
        folder = distributed.on_rank_zero(lambda: _made(temporary))
        spans = [(file, part.key, part.name, part.start, part.numel) for part in parts]
        problems = [
            problem for problem in distributed.all_gather([_write(folder / file, parts)]) if problem
        ]
        if problems:
            raise WagleError(f"checkpoint {path} cannot be written: {problems[0]}")
        index = _index(distributed.all_gather(spans), shapes)
        if rank == 0:
            torch.save(dict(common), folder / COMMON_FILE)
            (folder / INDEX_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")
    distributed.on_rank_zero(lambda: None)  # no rank goes on before the checkpoint is in its place


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write(path: Path, parts: list[Part]) -> Optional[str]:
    """Write one rank's file; what went wrong, if anything did."""
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    tensors = [(f"{part.key}/{part.name}", part.dtype, (part.numel,), part.read) for part in parts]
    try:
        write_tensors(path, tensors, header)
    except OSError as error:
        return f"rank {distributed.rank()}: {error}"
    return None


def _index(spans: list[tuple], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    pieces: dict[str, dict[str, list[Any]]] = {}
    for file, key, name, start, numel in spans:
        pieces.setdefault(key, {}).setdefault(name, []).append([file, start, numel])
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "shapes": shapes, "pieces": pieces}


# -- reading ----------------------------------------------------------------------------------------------------------


def load_plain(path: Path, what: Optional[str] = None) -> Any:
    """What ``torch.save`` wrote, on the CPU, if it is tensors and plain data: nothing in the file is run.

    Tensors are mapped into memory and read when they are used.

    Args:
        path: the file.
        what: how to name it in a message; ``checkpoint <path>`` when None.

    Raises:
        WagleError: if the file is damaged, or holds any other object.
    """
    what = what or f"checkpoint {path}"
    try:
        return torch.load(
            path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
        )
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        other = re.search(r"GLOBAL (\S+)", str(error))
        if other:
            raise WagleError(
                f"{what} holds {other[1]}: only tensors and plain data are read, as anything else could run code; "
                "give a checkpoint without it"
            ) from None
        raise WagleError(
            f"{what} is damaged, or no checkpoint: give another ({first_line(error)})"
        ) from None


class ShardedCheckpoint:
    """A checkpoint folder, read a piece at a time.

    Args:
        path: the folder.

    Raises:
        WagleError: if it is no such folder, or a shard is missing (named).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise WagleError(
                f"checkpoint {path} was written without DeepSpeed: resume it without --trainer.strategy "
                "deepspeed, or turn it into a model with wagle export"
            )
        if not (self.path / INDEX_FILE).is_file():
            raise WagleError(
                f"checkpoint {path} does not exist or has no {INDEX_FILE}: it is no checkpoint of ours"
            )
        index = json.loads((self.path / INDEX_FILE).read_text(encoding="utf-8"))
        if index.get("format") != FORMAT or index["format_version"] > FORMAT_VERSION:
            raise WagleError(
                f"checkpoint {path} has format {index.get('format')} {index.get('format_version')}; this "
                f"version reads {FORMAT} {FORMAT_VERSION}"
            )
        self.shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        self.pieces: dict[str, dict[str, list[tuple[str, int, int]]]] = index["pieces"]
        files = {
            file
            for by_name in self.pieces.values()
            for pieces in by_name.values()
            for file, _, _ in pieces
        }
        self._open = {file: self._opened(file) for file in sorted(files)}
        if not (self.path / COMMON_FILE).is_file():
            raise WagleError(f"checkpoint {path} lacks {COMMON_FILE}")

    def _opened(self, file: str) -> Any:
        if not (self.path / file).is_file():
            raise WagleError(
                f"checkpoint {self.path} lacks the shard {file}: copy the whole folder, of every rank"
            )
        try:
            return safe_open(self.path / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WagleError(
                f"shard {file} of checkpoint {self.path} is not whole: {error}"
            ) from None

    @cached_property
    def common(self) -> dict[str, Any]:
        """What Lightning keeps."""
        return load_plain(self.path / COMMON_FILE, f"checkpoint {self.path}")

    def keys(self, prefix: str, name: str) -> list[str]:
        """The keys under a prefix (``state/``) that a parameter has, without the prefix."""
        return [
            key[len(prefix) :]
            for key, by_name in self.pieces.items()
            if key.startswith(prefix) and name in by_name
        ]

    def read(self, key: str, name: str, start: int, numel: int) -> Tensor:
        """(numel,) consecutive numbers, from however many shards they lie in.

        Raises:
            WagleError: if the checkpoint does not hold all of them.
        """
        parts = []
        end = start + numel
        for file, first, count in sorted(
            self.pieces.get(key, {}).get(name, []), key=lambda piece: piece[1]
        ):
            low, high = max(start, first), min(end, first + count)
            if low < high:
                parts.append(
                    self._open[file].get_slice(f"{key}/{name}")[low - first : high - first]
                )
        if sum(len(part) for part in parts) != numel:
            raise WagleError(
                f"checkpoint {self.path} does not hold all of {key} of {name}: it is of another model, or "
                "its run trained other parameters"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def weight(self, name: str) -> Tensor:
        """A parameter, whole."""
        return self.read(WEIGHT, name, 0, prod(self.shapes[name])).view(self.shapes[name])

    def load_weights(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Set (name, parameter) pairs, whole or spread over ranks, a tensor at a time.

        Raises:
            WagleError: if the checkpoint holds others.
        """
        parameters = list(parameters)
        shapes = shapes_of(parameters)
        if shapes != self.shapes:
            name = next(n for n in [*shapes, *self.shapes] if shapes.get(n) != self.shapes.get(n))
            raise WagleError(
                f"checkpoint {self.path} is of another model: {name} has shape {self.shapes.get(name)} "
                f"there, {shapes.get(name)} here"
            )
        for name, parameter in parameters:
            assign(parameter, lambda name=name: self.weight(name))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, found: Iterable[Fragment]) -> None:
        """Set the fp32 weights, the state in this rank's flat partitions, and the options (learning rate, ...)."""
        found = list(found)
        common = self.common
        singles = common["single_states"]
        for group, stored in zip(optimizer.param_groups, common["param_groups"], strict=True):
            group.update(stored)
        for fragment in found:
            fragment.of(fragment.flat.data).copy_(self.read(WEIGHT, *fragment[:3]))
            state = optimizer.state[fragment.flat]
            for key in self.keys("state/", fragment.name):
                values = self.read(f"state/{key}", *fragment[:3])
                if key not in state:
                    state[key] = torch.zeros(
                        fragment.flat.numel(), dtype=values.dtype, device=fragment.flat.device
                    )
                fragment.of(state[key]).copy_(values)
        fused = any(
            group.get("fused") or group.get("capturable") for group in optimizer.param_groups
        )
        for fragment in found:
            device = (
                fragment.flat.device if fused else None
            )  # torch's own optimisers count on the CPU otherwise
            for key, value in singles.get(fragment.name, {}).items():
                optimizer.state[fragment.flat][key] = torch.tensor(
                    value, dtype=torch.float32, device=device
                )
