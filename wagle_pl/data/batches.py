"""Which rows make up which batch, and how rows become tensors.

One optimiser step sees one *global batch*, which depends only on (seed, epoch, step); only
:func:`deal` splits it. Every row has a weight such that adding ``weight x loss`` within a
micro-batch, then averaging over micro-batches and ranks (as Lightning, DDP and DeepSpeed do), gives
exactly the mean over the global batch, however unevenly it is split.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Optional, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from wagle_pl.core.errors import WagleError
from wagle_pl.core.schema import Count, check, schema_of
from wagle_pl.data.example import IGNORE

#: Rows are sorted by length within this many global batches, to reduce padding.
BUCKET = 32

#: (row, weight, occurrence) of each row of a micro-batch; occurrence is 0 the first time that an
#: epoch uses the row, then 1, ...
Cell = list[tuple[int, float, int]]
T = TypeVar("T")


class Draw(NamedTuple):
    """One micro-batch to build."""

    epoch: int  # refusals vary with it
    cells: dict[str, Cell]  # of each stream
    global_rows: Mapping[str, list[int]] = {}  # of the global batch, of each stream


def epoch_batches(
    lengths: Mapping[str, Sequence[int]], global_batch: int, seed: int, epoch: int
) -> list[dict[str, np.ndarray]]:
    """The global batches of one epoch: a dict of stream -> row indices for each step.

    Only one step may have fewer than ``global_batch`` rows.

    Args:
        lengths: stream -> token count of each of its rows. Each row of the first stream appears
            once. The others are drawn from their own shuffles, which continue in the next epoch, so
            that every row is used equally often.
    """
    epoch_size = len(next(iter(lengths.values())))
    positions = np.arange(epoch * epoch_size, (epoch + 1) * epoch_size)
    order = np.random.default_rng((seed, epoch)).permutation(-(-epoch_size // global_batch))
    steps: list[dict[str, np.ndarray]] = [{} for _ in order]
    for number, (stream, row_lengths) in enumerate(lengths.items()):
        rows = _shuffled_positions(positions, len(row_lengths), seed, number)
        token_counts = np.asarray(row_lengths)[rows]
        pool = BUCKET * global_batch
        if len(row_lengths) < epoch_size:
            # if they were sorted together, the copies of a row would form batches of their own
            pool = min(pool, max(1, len(row_lengths) // global_batch) * global_batch)
        by_length = [
            start + np.argsort(token_counts[start : start + pool], kind="stable")
            for start in range(0, epoch_size, pool)
        ]
        rows = rows[np.concatenate(by_length)]
        for step, chunk in zip(steps, order * global_batch, strict=True):
            step[stream] = rows[chunk : chunk + global_batch]
    return steps


def _shuffled_positions(positions: np.ndarray, n: int, seed: int, stream: int) -> np.ndarray:
    """The row at each position of an endless sequence of shuffles of ``range(n)``."""
    rows = np.empty_like(positions)
    for lap in np.unique(positions // n):
        here = positions // n == lap
        rows[here] = np.random.default_rng((seed, stream, lap)).permutation(n)[positions[here] % n]
    return rows


def deal(
    rows: np.ndarray,
    world_size: int,
    accumulate: int,
    seen: Optional[Counter[int]] = None,
    done: int = 0,
) -> list[list[Cell]]:
    """Split one global batch into ``accumulate`` micro-batches for each of ``world_size`` ranks.

    Args:
        seen: how often earlier batches of the epoch used each row; updated with this batch.
        done: rows to skip at the start of the batch; weights stay those of the whole batch.

    Returns:
        ``cells[micro_batch][rank]``; an empty one gets one row of weight 0.
    """
    weight = world_size * accumulate / len(rows)
    seen = Counter() if seen is None else seen
    dealt: list[tuple[int, float, int]] = []
    for row in rows.tolist():
        dealt.append((row, weight, seen[row]))
        seen[row] += 1
    cells = []
    for start, end in pairwise(_bounds(len(rows), accumulate)):
        ranks = [dealt[max(start, done) : end][rank::world_size] for rank in range(world_size)]
        cells.append([cell or [(int(rows[0]), 0.0, 0)] for cell in ranks])
    return cells


def _bounds(rows: int, accumulate: int) -> list[int]:
    """Start of size micro-batch in a global batch, and the end of the last one."""
    size, more = divmod(rows, accumulate)
    return [micro * size + min(micro, more) for micro in range(accumulate + 1)]


class Position(NamedTuple):
    """A position in the run's sequence of global batches, independent of how these are split."""

    epoch: int = 0
    step: int = 0  # finished global batches of the epoch
    rows: int = 0  # finished rows of the next global batch


@dataclass(eq=False)
class GlobalBatchSampler:
    """Yields this rank's :class:`Draw` for every micro-batch of an epoch."""

    lengths: Mapping[str, Sequence[int]]  # stream -> tokens of each row, see epoch_batches
    batch_size: int  # rows per rank and micro-batch
    accumulate: int = 1  # micro-batches per step
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    epoch: int = 0
    period: Optional[int] = None  # epochs after which the batches repeat; None: never
    #: Where the next iteration begins, if it is in the same epoch.
    start: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        most = max(1000, len(next(iter(self.lengths.values()))))  # beyond the rows: empty batches
        if not 1 <= self.accumulate <= most:
            why = f"must be from 1 to {most:,} here, got {self.accumulate:,}"
            raise WagleError(why, option="trainer.accumulate_grad_batches")

    @property
    def global_batch(self) -> int:
        """Rows per step over all ranks and micro-batches."""
        return self.batch_size * self.accumulate * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch next; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps = -(-len(next(iter(self.lengths.values()))) // self.global_batch)
        return steps * self.accumulate

    def __iter__(self) -> Iterator[Draw]:
        start = self.start if self.start.epoch == self.epoch else Position(self.epoch)
        self.start = Position()
        skipped = self.micro_batches(start)
        seen: dict[str, Counter[int]] = {stream: Counter() for stream in self.lengths}
        for step, batch in enumerate(self._batches(self.epoch)):
            done = start.rows if step == start.step else 0
            global_rows = {stream: rows.tolist() for stream, rows in batch.items()}
            dealt = {
                stream: deal(rows, self.world_size, self.accumulate, seen[stream], done)
                for stream, rows in batch.items()
            }
            for micro in range(max(0, skipped - step * self.accumulate), self.accumulate):
                cells = {stream: cells[micro][self.rank] for stream, cells in dealt.items()}
                yield Draw(self._drawn(self.epoch), cells, global_rows)

    def position(self, epoch: int, micro_batches: int) -> Position:
        """The position in an epoch after some of its micro-batches."""
        step, more = divmod(micro_batches, self.accumulate)
        return Position(epoch, step, self._bounds(epoch, step)[more])

    def micro_batches(self, position: Position) -> int:
        """Number of micro-batches of the epoch that lie entirely before a position."""
        bounds = self._bounds(position.epoch, position.step)
        within = min(bisect_right(bounds, position.rows), self.accumulate) - 1
        return position.step * self.accumulate + within

    def _batches(self, epoch: int) -> list[dict[str, np.ndarray]]:
        return epoch_batches(self.lengths, self.global_batch, self.seed, self._drawn(epoch))

    def _drawn(self, epoch: int) -> int:
        """The epoch whose rows an epoch repeats."""
        return epoch % self.period if self.period else epoch

    def _bounds(self, epoch: int, step: int) -> list[int]:
        first = next(iter(self._batches(epoch)[step].values()))
        return _bounds(len(first), self.accumulate)


def token_batches(lengths: Sequence[int], max_rows: int) -> list[list[int]]:
    """Row indices in batches of at most ``max_rows`` of similar length.

    The longest come first, so that a run that needs too much memory fails at once.
    """
    rows = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [rows[start : start + max_rows] for start in range(0, len(rows), max_rows)]


def deal_batches(batches: Sequence[T], world_size: int, rank: int) -> list[T]:
    """Whole batches for one rank, round-robin; some go to two, so that all ranks get equally many.

    >>> deal_batches("abc", 2, 0), deal_batches("abc", 2, 1)
    (['a', 'c'], ['b', 'a'])
    """
    count = -(-len(batches) // world_size)
    return [batches[i % len(batches)] for i in range(rank, count * world_size, world_size)]


@dataclass(eq=False)
class Loader:
    """Batches that are planned beforehand, each built on demand.

    It replaces a DataLoader: rows are tokenised already, so workers have nothing to do, and each
    DataLoader iterator draws a seed from torch's generator, which changes a resumed run's dropout.
    """

    batch_sampler: ClassVar[None] = None  # Lightning looks for it where there is a sampler
    sampler: Any  # this rank's batches, in some short form: an iterable with a length
    build: Callable[[Any], Any]  # makes a batch from its short form

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        return map(self.build, self.sampler)


@dataclass(eq=False)
class ResumableLoader(Loader):
    """Resumes in the middle of an epoch, with the same global batches however they are split."""

    sampler: GlobalBatchSampler
    #: Stream -> digest of its rows: states of other rows are refused.
    digests: Mapping[str, str] = field(default_factory=dict)
    _handed_out: Optional[int] = None  # micro-batches of the epoch; None before the first

    def __iter__(self) -> Iterator[Any]:
        start, epoch = self.sampler.start, self.sampler.epoch
        self._handed_out = self.sampler.micro_batches(start) if start.epoch == epoch else 0
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The run's position by the micro-batches handed out (Lightning does not prefetch here)."""
        start, epoch = self.sampler.start, self.sampler.epoch
        if self._handed_out is None:
            return self._state(start if start.epoch == epoch else Position(epoch))
        return self.state_at(epoch, self._handed_out)

    def state_at(
        self, epoch: int, micro_batches: int, last: Optional[int] = None
    ) -> dict[str, Any]:
        """The run's position after some micro-batches of an epoch, which may end after ``last``."""
        end = len(self.sampler) if last is None else min(last, len(self.sampler))
        if micro_batches >= end:
            return self._state(Position(epoch + 1))
        return self._state(self.sampler.position(epoch, micro_batches))

    def _state(self, position: Position) -> dict[str, Any]:
        return {
            **position._asdict(),
            "global_batch": self.sampler.global_batch,
            "seed": self.sampler.seed,
            "sets": {
                name: {"rows": len(lengths), "digest": self.digests.get(name)}
                for name, lengths in self.sampler.lengths.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.sampler.start = self.check(state)
        self.sampler.epoch = state["epoch"]
        self._handed_out = None

    def check(self, state: Mapping[str, Any]) -> Position:
        """The position in a state; a state of other global batches is refused."""
        if "sets" not in state:
            why = "the checkpoint belongs to a run with another data module: resume with that one"
            raise WagleError(why)
        here, sampler, fault = self._state(Position()), self.sampler, None
        for key, value in here.items():
            kind = dict[str, dict[str, Any]] if key == "sets" else schema_of(value, Count)
            check(state.get(key), kind, f"the checkpoint's loader: {key}")
        sets, sets_here = state["sets"], here["sets"]
        if state["global_batch"] != here["global_batch"]:
            fault = (
                f"had a global batch of {state['global_batch']} rows, this one has "
                f"{here['global_batch']} ({sampler.world_size} devices x data.batch_size "
                f"{sampler.batch_size} x accumulate_grad_batches {sampler.accumulate}): choose "
                f"them so that their product is {state['global_batch']}"
            )
        elif state["seed"] != here["seed"]:
            fault = (
                f"drew its rows with data.seed {state['seed']}, this one with {here['seed']}: give "
                f"--data.seed {state['seed']}"
            )
        elif list(sets) != list(sets_here):
            fault = (
                f"drew from {' and '.join(sets)} rows, this one draws from "
                f"{' and '.join(sets_here)} rows: resume with the module and options it was "
                "started with"
            )
        elif differing := [name for name in sets if sets[name] != sets_here[name]]:
            name = differing[0]
            before, now = sets[name].get("rows"), sets_here[name]["rows"]
            fault = f"had {before} {name} rows, this one has {now}"
            if before == now:
                fault = f"had other {name} rows, or another order of them"
            fault += ": resume with the data it was started with"
        elif state["step"] * sampler.accumulate >= len(sampler) or (
            state["rows"] >= sampler.global_batch
        ):
            fault = f"was at row {state['rows']} of step {state['step']}, which no epoch has"
        if fault:
            raise WagleError(f"the checkpoint's run {fault}")
        return Position(state["epoch"], state["step"], state["rows"])


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Pad token lists to the longest of them.

    Args:
        rows: each with ``input_ids`` and, optionally, ``labels`` of the same length.
        pad_id: token that fills ``input_ids``; labels are filled with -100.

    Returns:
        These and ``attention_mask``: int64 tensors of shape (rows, longest).
    """

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        tensors = [torch.as_tensor(ids, dtype=torch.int64) for ids in values]
        return pad_sequence(tensors, batch_first=True, padding_value=fill)

    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": padded(ids, pad_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }
    if "labels" in rows[0]:
        batch["labels"] = padded([row["labels"] for row in rows], IGNORE)
    return batch
