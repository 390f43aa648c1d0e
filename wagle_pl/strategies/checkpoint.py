"""Checkpoints of which each rank writes its shard, and which any number of ranks can read.

A folder, written under another name and then renamed, so that it is complete or does not exist::

    index.json             shapes of the parameters
    tensors.safetensors    weights (fp32 if trained) and state, of which each rank writes its part
    common.ckpt            what Lightning keeps: progress, callbacks, schedulers
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, TypedDict, Union

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.reading import read_json
from wagle_pl.core.schema import Count, check, schema_of
from wagle_pl.core.tensorfiles import TensorFile, check_version, fill, lay_out, load_plain
from wagle_pl.core.weights import assign, shapes_of, share_of
from wagle_pl.strategies.internals import Fragment

FORMAT = "wagle_pl.checkpoint"
FORMAT_VERSION = 2  # 1 had a file of tensors for each rank
INDEX_FILE = "index.json"
TENSORS_FILE = "tensors.safetensors"
COMMON_FILE = "common.ckpt"
WEIGHT = "weight"


class Piece(NamedTuple):
    """Consecutive numbers of a parameter, or of a tensor of the same shape."""

    key: str  # what they are: ``weight``, ``state/<key of the optimiser>`` or ``sum/<name>``
    name: str  # of the parameter
    start: int  # index of the first number in the flattened parameter
    values: Tensor  # a view of them, 1-D


# -- what a rank holds -----------------------------------------------------------------------------


def of_optimizer(
    optimizer: torch.optim.Optimizer, held: Iterable[Fragment]
) -> tuple[list[Piece], dict[str, dict[str, float]]]:
    """Weights and optimiser state in this rank's flat partitions; and, by parameter and key, state
    that is a single number (a step count)."""
    pieces: list[Piece] = []
    singles: dict[str, dict[str, float]] = {}
    for fragment in held:
        name, flat = fragment.name, fragment.flat
        tensors = {WEIGHT: flat.detach()}
        for key, value in optimizer.state.get(flat, {}).items():
            if torch.is_tensor(value) and value.dim():  # one number per weight
                tensors[f"state/{key}"] = value
            elif torch.is_tensor(value) or isinstance(value, (int, float)):
                singles.setdefault(name, {})[key] = float(value)
        for key, tensor in tensors.items():
            pieces.append(Piece(key, name, fragment.start, fragment.of(tensor)))
    return pieces, singles


def of_frozen(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[Piece]:
    """This rank's share of those (name, parameter) pairs that no optimiser holds."""
    for name, parameter in parameters:
        if not parameter.requires_grad:
            start, share = share_of(parameter)
            if len(share):
                yield Piece(WEIGHT, name, start, share)


# -- writing ---------------------------------------------------------------------------------------


def save(
    path: Path,
    pieces: Iterable[Piece],
    common: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Write a checkpoint, replacing one that exists. Collective: all ranks must call it.

    Args:
        pieces: what this rank holds.
        common: what rank 0 writes for all.
        shapes: parameter name -> shape of the whole parameter.

    Raises:
        WagleError: if a rank cannot write its shard; no checkpoint appears then.
    """
    pieces, sizes = list(pieces), dict[tuple[str, torch.dtype], int]()
    spans = [(f"{p.key}/{p.name}", p.values.dtype, p.start + len(p.values)) for p in pieces]
    for name, dtype, end in distributed.all_gather(spans):
        sizes[name, dtype] = max(end, sizes.get((name, dtype), 0))
    tensors = [(*key, (size,)) for key, size in sizes.items()]

    def create(folder: Path) -> None:
        folder.mkdir()
        lay_out(folder / TENSORS_FILE, tensors, {})
        torch.save(dict(common), folder / COMMON_FILE)
        index = {"format": FORMAT, "format_version": FORMAT_VERSION, "shapes": shapes}
        (folder / INDEX_FILE).write_text(json.dumps(index) + "\n", encoding="utf-8")

    try:
        with distributed.shared_output(path, create) as folder:
            parts = ((f"{p.key}/{p.name}", p.start, p.values) for p in pieces)
            fill(folder / TENSORS_FILE, parts)
    except OSError as error:
        raise WagleError(f"checkpoint {path} cannot be written: {error}") from None


# -- reading ---------------------------------------------------------------------------------------


class Index(TypedDict):
    """``index.json`` of a checkpoint."""

    format: Literal["wagle_pl.checkpoint"]
    format_version: Union[str, int]
    shapes: dict[str, list[Count]]


class SmallSums(TypedDict):
    """What ranks add up of an attribution."""

    vectors: dict[str, dict[str, Tensor]]
    counts: dict[str, float]


class Common(TypedDict):
    """What :data:`COMMON_FILE` holds beside Lightning's own."""

    param_groups: Optional[list[dict[str, Any]]]
    single_states: Optional[dict[str, dict[str, float]]]
    buffers: Optional[dict[str, Tensor]]
    sums: Optional[SmallSums]


def check_optimizer(stored: Sequence[Mapping[str, Any]], optimizer: Optimizer, where: str) -> None:
    """Refuse to resume an optimiser from the options (``param_groups``) of another one, or from
    options of other types."""
    groups, fault = optimizer.param_groups, ""
    if missing := {key for group in stored for key in optimizer.defaults.keys() - group.keys()}:
        fault = f"its options have no {min(missing)!r}"
    elif len(stored) != len(groups):
        fault = f"it has {len(stored)} groups of parameters, and not {len(groups)}"
    if fault:
        raise WagleError(
            f"{where} is of a run with another optimizer than {type(optimizer).__name__} ({fault}): "
            "resume with the run's own --optimizer"
        )
    for group, options in zip(groups, stored, strict=True):
        ours = {key: value for key, value in group.items() if key != "params"}
        check(options, schema_of(ours), f"{where}: param_groups")
        for key in ours.keys() & {"amsgrad", "centered", "maximize", "nesterov"}:
            if options[key] != ours[key]:
                raise WagleError(
                    f"{where} is of a run with optimizer.{key} {options[key]}: resume with it"
                )


class ShardedCheckpoint:
    """A checkpoint folder, read a piece at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise WagleError(
                f"checkpoint {path} was written without DeepSpeed: resume it without "
                "--trainer.strategy deepspeed, or turn it into a model with wagle export"
            )
        index = read_json(self.path / INDEX_FILE, Index, "index of a checkpoint")
        check_version(index["format_version"], FORMAT_VERSION, f"checkpoint {path} has")
        self.shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        file = TensorFile(self.path / TENSORS_FILE, "file of a checkpoint")
        self._sizes = {name: prod(file.shape(name)) for name in file.names}
        self._tensors = safe_open(file.path, framework="pt")
        #: What numbers are, see :class:`Piece` -> names of the parameters that have some.
        self.pieces: dict[str, list[str]] = {}
        for key, _, name in (name.rpartition("/") for name in file.names):
            self.pieces.setdefault(key, []).append(name)

    @cached_property
    def common(self) -> dict[str, Any]:
        """What Lightning keeps."""
        common = load_plain(self.path / COMMON_FILE, f"checkpoint {self.path}")
        return check(common, Common, f"checkpoint {self.path}")

    def read(self, key: str, name: str, start: int, stop: int) -> Tensor:
        """Numbers start to stop of a flattened parameter."""
        stored = f"{key}/{name}"
        if stop > self._sizes.get(stored, 0):
            raise WagleError(
                f"checkpoint {self.path} does not hold all of {key} of {name}: it is of another "
                "model, or its run trained other parameters"
            )
        return self._tensors.get_slice(stored)[start:stop]

    def weight(self, name: str) -> Tensor:
        return self.read(WEIGHT, name, 0, prod(self.shapes[name])).view(self.shapes[name])

    def load_weights(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Set (name, parameter) pairs, whole or sharded over ranks; each rank reads its shard."""
        parameters = list(parameters)
        shapes = shapes_of(parameters)
        for name in [*shapes, *self.shapes]:
            here, stored = shapes.get(name, ()), self.shapes.get(name, ())
            # values of whole rows are a matrix, and a vector under ZeRO-3
            if here != stored and (min(len(here), len(stored)) != 1 or prod(here) != prod(stored)):
                raise WagleError(
                    f"checkpoint {self.path} is of another model: {name} has shape "
                    f"{self.shapes.get(name)} there, {shapes.get(name)} here"
                )
        for name, parameter in parameters:
            assign(parameter, partial(self.read, WEIGHT, name))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, held: Iterable[Fragment]) -> None:
        """Set the fp32 weights and the state in this rank's flat partitions, and the options."""
        groups, stored = optimizer.param_groups, self.common.get("param_groups") or []
        check_optimizer(stored, optimizer, f"checkpoint {self.path}")
        for group, options in zip(groups, stored, strict=True):
            group.update(options)
        # torch's own optimisers count steps on the CPU unless they are fused
        fused = any(group.get("fused") or group.get("capturable") for group in groups)
        for fragment in held:
            flat, state = fragment.flat, optimizer.state[fragment.flat]
            place = (fragment.name, fragment.start, fragment.start + fragment.numel)
            fragment.of(flat.data).copy_(self.read(WEIGHT, *place))
            for stored, names in self.pieces.items():
                if stored.startswith("state/") and fragment.name in names:
                    values, key = self.read(stored, *place), stored.removeprefix("state/")
                    if key not in state:
                        state[key] = torch.zeros(len(flat), dtype=values.dtype, device=flat.device)
                    fragment.of(state[key]).copy_(values)
            for key, value in (
                (self.common.get("single_states") or {}).get(fragment.name, {}).items()
            ):
                device = flat.device if fused else None
                state[key] = torch.tensor(value, dtype=torch.float32, device=device)
