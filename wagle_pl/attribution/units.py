"""Units of weights that are selected whole: rows, columns, heads, neurons, tiles, tensors, layers.

A tensor is read as a matrix, along its last dimension. The weight in row i and column j belongs to
the unit ``of_row[i] + of_column[j]``; several tensors may share a unit. A unit's score is pooled
over its weights, and the units, which are few beside the weights, are sorted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from wagle_pl.attribution.scores import Score
from wagle_pl.attribution.selection import (
    CHUNK,
    Ranking,
    Scores,
    check_finite,
    exact_count,
    packed_parts,
)
from wagle_pl.attribution.sums import Shard
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import did_you_mean
from wagle_pl.masks.names import in_module, layer_of

log = logging.getLogger(__name__)

UNITS = ("weight", "row", "column", "head", "neuron", "block:RxC", "tensor", "layer")
Pool = Literal["mean", "sum", "max", "norm"]

_BLOCK = re.compile(r"block:([1-9]\d{0,5})[x×]([1-9]\d{0,5})")
#: Modules whose input, and not their output, has one part for each head or neuron.
_OUTPUTS = (
    "o_proj",
    "out_proj",
    "c_proj",
    "dense",
    "wo",
    "down_proj",
    "fc2",
    "dense_4h_to_h",
    "w2",
)
_INTERLEAVED = ("query_key_value",)  # queries, keys and values of a head follow each other


def check_unit(unit: str) -> None:
    """Refuse a unit that is none of :data:`UNITS`."""
    if unit not in {*UNITS} - {"block:RxC"} and not _BLOCK.fullmatch(unit):
        hint = did_you_mean(unit, UNITS)
        raise WagleError(f"must be one of {', '.join(UNITS)}, got {unit!r}", "unit", hint)


class Geometry(NamedTuple):
    """Sizes by which heads and neurons are found in a model's tensors."""

    heads: int
    kv_heads: int
    head_size: int
    neurons: list[int]  # of an MLP, of an expert
    transposed: bool  # linear layers store weights as (in, out)

    @classmethod
    def of(cls, lm: nn.Module) -> Geometry:
        """Of a transformers model; sizes that its configuration lacks are 0."""
        from transformers.pytorch_utils import Conv1D

        config: Any = getattr(lm, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config

        def size(*names: str) -> int:
            sizes = (getattr(config, name, None) for name in names)
            return next((size for size in sizes if isinstance(size, int)), 0)

        heads, width = size("num_attention_heads", "n_head"), size("hidden_size", "n_embd")
        inner = size("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner") or 4 * width
        experts = [size("moe_intermediate_size"), size("shared_expert_intermediate_size")]
        return cls(
            heads,
            size("num_key_value_heads", "num_kv_heads") or heads,
            size("head_dim") or (width // heads if heads else 0),
            [neurons for neurons in (inner, *experts) if neurons],
            any(isinstance(module, Conv1D) for module in lm.modules()),
        )


@dataclass
class Units:
    """The units of some tensors.

    Args:
        kind: one of :data:`UNITS`. A tensor without heads or neurons has rows instead.
        shapes: of the tensors, by name.
        geometry: of the model, for heads and neurons.
    """

    kind: str
    shapes: Mapping[str, Sequence[int]]
    geometry: Optional[Geometry] = None
    count: int = 0
    #: Tensors whose rows are the units, for want of heads or neurons.
    as_rows: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind in ("head", "neuron") and self.geometry is None:
            raise WagleError(
                f"the scores do not say which weights are a {self.kind}",
                option="unit",
                hint="run attribution again with this unit",
            )
        self._firsts: dict[Any, int] = {}
        self._layers: list[tuple[str, int]] = []  # of consecutive units: their layer and number
        self.places = {name: self._places(name, shape) for name, shape in self.shapes.items()}
        #: (units,) numbers of weights.
        self.sizes = torch.zeros(self.count, dtype=torch.int64)
        for places in self.places.values():
            (rows, heights), (columns, widths) = (p.unique(return_counts=True) for p in places)
            index = (rows[:, None] + columns).view(-1)
            self.sizes.index_add_(0, index, (heights[:, None] * widths).view(-1))

    def _first(self, key: Any, name: str, count: int) -> int:
        """Index of the first of ``count`` units, which tensors with the same key share."""
        if key not in self._firsts:
            layer = layer_of(name)
            self._firsts[key], self.count = self.count, self.count + count
            self._layers.append(("other" if layer is None else str(layer), count))
        return self._firsts[key]

    def _places(self, name: str, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(rows,) and (columns,) whose sum is the unit of each weight."""
        matrix = (*shape, 1) if len(shape) < 2 else tuple(shape)
        rows, columns = prod(matrix[:-1]), matrix[-1]
        row, column = torch.arange(rows), torch.arange(columns)
        if self.kind in ("head", "neuron"):
            parts = (
                self._heads(name, matrix) if self.kind == "head" else self._neurons(name, matrix)
            )
            if parts is not None:
                return parts
            self.as_rows.append(name)
        if self.kind == "column":
            return row.zero_() + self._first(name, name, columns), column
        if self.kind == "tensor":
            return row.zero_() + self._first(name, name, 1), column.zero_()
        if self.kind == "layer":
            layer = layer_of(name)
            key = name if layer is None else layer
            return row.zero_() + self._first(key, name, 1), column.zero_()
        if tile := _BLOCK.fullmatch(self.kind):
            height, width = min(int(tile[1]), rows), min(int(tile[2]), columns)
            down, across = -(-rows // height), -(-columns // width)
            first = self._first(name, name, down * across)
            return row // height * across + first, column // width
        return row + self._first(name, name, rows), column.zero_()

    def _heads(self, name: str, matrix: Sequence[int]) -> Optional[tuple[Tensor, Tensor]]:
        """Groups of heads that share keys and values; None if a tensor has no heads."""
        heads, groups, size, *_ = self.geometry
        if not in_module(name, "attn") or "linear_attn" in name or len(matrix) > 2 or not groups:
            return None
        module, leaf = _module_of(name)
        width, fused = heads * size, (heads + 2 * groups) * size
        query = torch.arange(width) // (size * (heads // groups))
        key = torch.arange(groups * size) // size
        if leaf in _INTERLEAVED:
            index = torch.arange(fused) // (fused // groups)
        elif fused in matrix:
            index = torch.cat([query, key, key])
        else:
            index = key if leaf in ("k_proj", "v_proj") else query
        return self._along(name, matrix, leaf, index, (module, groups), groups)

    def _neurons(self, name: str, matrix: Sequence[int]) -> Optional[tuple[Tensor, Tensor]]:
        """Neurons of an MLP or of all experts of a block; None if a tensor has none."""
        module, leaf = _module_of(name)
        if not in_module(name, "mlp") and "expert" not in name:
            return None
        experts = prod(matrix[:-2])
        for neurons in self.geometry.neurons:
            index = torch.arange(neurons)
            for index_of_part in (index, torch.cat([index, index])):  # a gate and its neurons
                key = (module, neurons)
                places = self._along(name, matrix, leaf, index_of_part, key, experts * neurons)
                if places is not None:
                    return places
        return None

    def _along(
        self, name: str, matrix: Sequence[int], leaf: str, index: Tensor, key: Any, count: int
    ) -> Optional[tuple[Tensor, Tensor]]:
        """Places of units along the one of the last two dimensions that is as long as ``index``;
        for a square matrix, that of the layer's output, or of its input in an output layer."""
        fits = [length == len(index) for length in matrix[-2:]]
        is_bias_of_output = leaf in _OUTPUTS and matrix[-1] == 1
        if is_bias_of_output or not any(fits):
            return None
        down = (leaf in _OUTPUTS) == self.geometry.transposed if all(fits) else fits[0]
        first = self._first(key, name, count)
        lead = torch.arange(prod(matrix[:-2])) * (count // prod(matrix[:-2])) + first
        if down:
            return (lead[:, None] + index).view(-1), torch.zeros(matrix[-1], dtype=torch.int64)
        return lead.repeat_interleave(matrix[-2]), index

    # -- scores and bits ---------------------------------------------------------------------------

    def _rows_here(self, name: str, shards: Mapping[str, Shard]) -> tuple[Tensor, Tensor]:
        """The places of this rank's rows."""
        rows, columns = self.places[name]
        if name not in shards:
            return rows, columns
        shard = shards[name]
        height = len(rows) // max(1, shard.shape[0] if shard.shape else 1)
        return rows[shard.start * height : shard.stop * height], columns

    def pooled(
        self, scores: Scores, ranking: Ranking, pool: Pool, shards: Mapping[str, Shard]
    ) -> Tensor:
        """(units,) fp64 scores of the units. Collective.

        Raises:
            WagleError: if a score is NaN or infinite, naming the parameter.
        """
        start = -torch.inf if pool == "max" else 0.0
        totals = torch.full((self.count,), start, dtype=torch.float64)
        not_finite: list[str] = []
        for name, tensor in scores():
            rows, columns = self._rows_here(name, shards)
            values = tensor.reshape(len(rows), len(columns))
            if not torch.isfinite(values).all():
                not_finite = not_finite or [name]
            block = max(1, CHUNK // max(1, len(columns)))
            for part, of_row in zip(values.split(block), rows.split(block), strict=True):
                _add(totals, part, of_row, columns, ranking.absolute or pool == "norm", pool)
        check_finite(not_finite)
        if pool == "max" and distributed.is_distributed():
            parts = distributed.all_gather_tensor(totals.to(distributed.device()))
            return parts.view(-1, self.count).amax(0).cpu()
        totals = distributed.all_reduce_sum(totals)
        return totals / self.sizes if pool == "mean" else totals

    def values(
        self,
        score: Union[Score, str, None],  # of a complete MaskSpec
        scores: Scores,
        ranking: Ranking,
        pool: Pool,
        shards: Mapping[str, Shard],
    ) -> Tensor:
        """(units,) scores: those that ``score`` has for units, or else :meth:`pooled`. Collective."""
        values = None if score is None else score.of_units(self.count)
        return self.pooled(scores, ranking, pool, shards) if values is None else values

    def choose(self, values: Tensor, densities: Sequence[float], low: bool) -> list[Tensor]:
        """Which units each density selects: the first in the ranking, of equal ones the first in
        parameter order, up to the last that leaves the weights at ⌊density · N⌋ or below; at least
        one unit."""
        order = torch.argsort(values, descending=not low, stable=True)
        ends = self.sizes[order].cumsum(0)
        chosen = []
        for density in densities:
            limit = exact_count(density, int(ends[-1]))
            number = int(torch.searchsorted(ends, limit, right=True))
            if not number:
                message = "density %g is less than one %s of %d weights: one is selected"
                log.warning(message, density, self.kind, int(ends[0]))
            taken = torch.zeros(self.count, dtype=torch.bool)
            taken[order[: max(1, number)]] = True
            chosen.append(taken)
        return chosen

    def _bits(self, name: str, chosen: Tensor, shards: Mapping[str, Shard]) -> Tensor:
        """Packed bits of this rank's rows of a tensor."""
        rows, columns = self._rows_here(name, shards)
        block = max(8, CHUNK // max(1, len(columns)) // 8 * 8)
        parts = (chosen[of_row[:, None] + columns].view(-1) for of_row in rows.split(block))
        return packed_parts(len(rows) * len(columns), parts)

    def select(
        self, chosen: Sequence[Tensor], shards: Mapping[str, Shard]
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """(name, packed bits of this rank's rows for each choice) of every tensor."""
        for name in self.shapes:
            yield name, [self._bits(name, units, shards) for units in chosen]

    def describe(self, chosen: Tensor) -> dict[str, Any]:
        """Units selected and units, by layer, for a mask's metadata."""
        counts: dict[str, list[int]] = {}
        start = 0
        for layer, count in self._layers:
            selected, total = counts.get(layer, (0, 0))
            taken = int(chosen[start : start + count].sum())
            counts[layer], start = [selected + taken, total + count], start + count
        return {"units": counts, "as_rows": self.as_rows}


def _add(
    totals: Tensor, part: Tensor, of_row: Tensor, of_column: Tensor, absolute: bool, pool: Pool
) -> None:
    """Add the scores of a block of rows to the totals of their units."""
    part = part.abs() if absolute else part
    part = part.double()
    part = part.square() if pool == "norm" else part
    reduce: Callable[..., Tensor] = torch.amax if pool == "max" else torch.sum
    if len(part) and part.shape[1] and bool((of_column == of_column[0]).all()):
        part, of_column = reduce(part, dim=1, keepdim=True), of_column[:1]
    if part.numel() and bool((of_row == of_row[0]).all()):
        part, of_row = reduce(part, dim=0, keepdim=True), of_row[:1]
    index = (of_row[:, None] + of_column).view(-1)
    how = "amax" if pool == "max" else "sum"
    totals.scatter_reduce_(0, index, part.reshape(-1).cpu(), how)


def _module_of(name: str) -> tuple[str, str]:
    """The module that holds a tensor's layer, and the layer's own name.

    >>> _module_of("model.layers.0.mlp.up_proj.weight"), _module_of("h.0.mlp.experts.down_proj")
    (('model.layers.0.mlp', 'up_proj'), ('h.0.mlp.experts', 'down_proj'))
    """
    parts = name.split(".")
    if parts[-1] in ("weight", "bias"):
        parts.pop()
    return ".".join(parts[:-1]), parts[-1]
