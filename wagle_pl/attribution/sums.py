"""Running fp32 sums of gradients and of their squares, sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import gcd, prod
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from wagle_pl.attribution.host import HostAdder, on_disk
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.late import LateReading
from wagle_pl.strategies.checkpoint import Piece, ShardedCheckpoint

#: Numbers that are copied to another dtype at a time.
PIECE = 1 << 22
BLOCK = 1 << 22  # weights of a larger tensor that are scored at a time
FP32 = 4  # bytes of a number in a sum
_OF_STEP = "of this step: "  # before the name of a step's sum, in a checkpoint


class Sums(NamedTuple):
    """Where attribution adds up gradients: the option ``sums``."""

    host: bool = False
    passes: int = 1

    @classmethod
    def parse(cls, option: str) -> Sums:
        if option in ("device", "host"):
            return cls(host=option == "host")
        name, _, number = option.partition("=")
        if name != "passes" or not number.isdecimal() or int(number) < 1:
            raise WagleError(f"must be device, host or passes=K, got {option!r}", option="sums")
        return cls(passes=int(number))


def runs_of(sizes: Sequence[int], count: int) -> list[range]:
    """Split tensors into ``count`` non-empty runs of consecutive ones, of about equal total size.

    >>> runs_of([5, 1, 1, 1, 2], 3)
    [range(0, 1), range(1, 4), range(4, 5)]
    """
    if count > len(sizes):
        raise WagleError(
            f"{count} passes are more than the {len(sizes)} parameters", "sums", "take fewer"
        )
    bounds = [0]
    for left in range(count, 1, -1):
        end = bounds[-1] + 1
        share, taken = sum(sizes[bounds[-1] :]) / left, sizes[bounds[-1]]
        while len(sizes) - end > left - 1 and taken + sizes[end] / 2 <= share:
            taken, end = taken + sizes[end], end + 1
        bounds.append(end)
    return [range(*bound) for bound in zip(bounds, [*bounds[1:], len(sizes)], strict=True)]


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor's numbers, at most :data:`PIECE` at a time."""
    return tensor.reshape(-1).split(PIECE)


class Shard:
    """This rank's rows of a parameter: all of them on one device.

    They are whole rows, so that a score that compares the weights of a row needs none of other
    ranks, and so many that their bits fill whole bytes, so that packed masks can be concatenated.

    Args:
        shape: of the parameter. The rows of a vector are its numbers.
        rank, ranks: from the process group when None.

    >>> shard = Shard((5, 2), rank=1, ranks=2)
    >>> shard.start, shard.stop, shard.first
    (4, 5, 8)
    """

    def __init__(
        self, shape: Sequence[int], rank: Optional[int] = None, ranks: Optional[int] = None
    ) -> None:
        self.shape = tuple(shape)
        self.ranks = distributed.world_size() if ranks is None else ranks
        rank = distributed.rank() if rank is None else rank
        rows, *rest = self.shape or (1,)
        width = prod(rest)
        per_byte = 8 // gcd(8, width) if width else 1
        self._by_row = (rows, *rest)
        self._per_rank = rows
        if self.ranks > 1:
            self._per_rank = -(-rows // (self.ranks * per_byte)) * per_byte
        self.start, self.stop = (min(r * self._per_rank, rows) for r in (rank, rank + 1))
        #: The shape of this rank's rows.
        self.part = self.shape if self.ranks == 1 else (self.stop - self.start, *rest)
        #: Index of the first weight in the flattened parameter, and how many the parameter has.
        self.first, self.total = self.start * width, rows * width

    def of(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor of the parameter's shape: a view."""
        if self.ranks == 1:
            return tensor
        return tensor.reshape(self._by_row)[self.start : self.stop]

    def zeros(self, device: torch.device) -> Tensor:
        """fp32 zeros for this rank's rows."""
        return torch.zeros(self.part, dtype=torch.float32, device=device)  # whatever the default is

    def scatter_sum(self, tensor: Tensor) -> Tensor:
        """Reduce-scatter of tensors of the parameter's shape. Collective."""
        if self.ranks == 1:
            return tensor
        padded = _padded(tensor.reshape(self._by_row), self._per_rank * self.ranks)
        return distributed.reduce_scatter(padded)[: self.stop - self.start]

    def gather(self, rows: Tensor) -> Tensor:
        """All-gather of the ranks' rows, in the parameter's shape. Collective."""
        if self.ranks == 1:
            return rows
        rows = rows.to(distributed.device())
        tensor = distributed.all_gather_tensor(_padded(rows, self._per_rank))
        return tensor[: self._by_row[0]].reshape(self.shape)

    def gather_bits(self, packed: Tensor) -> Tensor:
        """All-gather of the packed bits of the ranks' rows. Collective."""
        if self.ranks == 1:
            return packed
        share = self._per_rank * prod(self._by_row[1:]) // 8
        bits = distributed.all_gather_tensor(_padded(packed.to(distributed.device()), share))
        return bits[: (self.total + 7) // 8].cpu()


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with rows of zeros appended."""
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((rows - len(tensor), *tensor.shape[1:]))])


class GradientSums:
    """Named sums: one fp32 tensor per parameter and name, created on first use; 4 bytes per weight.

    Each rank keeps its :class:`Shard` of every sum. On one device, gradients of fp32 parameters are
    accumulated by autograd into the sum itself; others are added in fp32 as soon as one parameter's
    is complete, and freed before the next.

    With several ``passes`` over the same rows, each is for a group of consecutive parameters, and
    only these require gradients: see :meth:`turn`. This works on one device only.

    Args:
        host: keep sums in host memory, and add to them there during the backward pass.
        passes: how many passes are made.
        folder: to which the sums of finished groups are moved; the system's folder for temporary
            files when None.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        host: bool = False,
        passes: int = 1,
        folder: Optional[Path] = None,
    ) -> None:
        named = dict(parameters)
        self.names, self.parameters = list(named), list(named.values())
        self.shards = [Shard(getattr(p, "ds_shape", p.shape)) for p in self.parameters]
        #: Whether the parameters themselves are sharded (ZeRO-3).
        self.sharded = any(hasattr(parameter, "ds_id") for parameter in self.parameters)
        #: Sums over the run: name -> this rank's rows of each parameter.
        self.sums: dict[str, list[Tensor]] = {}
        #: Sums over one optimiser step, zero between steps.
        self.step_sums: dict[str, list[Tensor]] = {}
        #: This rank's fp64 vectors, not of the parameter's shape: name -> parameter -> vector.
        self.vectors: dict[str, dict[str, Tensor]] = {}
        #: Numbers of rows that this rank has seen in the current pass.
        self.counts: dict[str, float] = {}
        self._groups = runs_of([shard.total for shard in self.shards], passes)
        self._folder = folder
        self._counts_of_first: dict[str, float] = {}
        self._adder = HostAdder(self.parameters[0].device) if host else None
        #: Of the losses, which may refuse the sums; and those of the last micro-batch, by stream.
        self.reading, self.losses = LateReading(), dict[str, float]()
        self._begin(0)

    # -- groups of parameters ----------------------------------------------------------------------

    def _begin(self, group: int) -> None:
        """Allocate the sums of a group; after the last, all parameters require gradients again."""
        ended = group == len(self._groups)
        #: The group that the pass is for, and the positions of its parameters.
        self.group, self.here = group, range(0) if ended else self._groups[group]
        if len(self._groups) > 1:
            for position, parameter in enumerate(self.parameters):
                parameter.requires_grad_(ended or position in self.here)
        for tensors in self.sums.values():
            for position in self.here:
                tensors[position] = self._zeros(position)

    def turn(self, group: int) -> None:
        """Begin the pass of a group, or end after the last; the previous group's sums move to the
        disk.

        Raises:
            WagleError: if a pass has seen other rows than the first.
        """
        if group == self.group or len(self._groups) == 1:
            return
        self._counts_of_first = self._counts_of_first or self.counts
        if group != self.group + 1 or self.counts != self._counts_of_first:
            raise WagleError(
                f"pass {self.group + 1} of {len(self._groups)} ended early, so there is no mask: "
                "resume the run from its last checkpoint"
            )
        for tensors in self.sums.values():
            for position in self.here:
                tensors[position] = on_disk(tensors[position], self._folder)
        self.step_sums.clear()
        if group < len(self._groups):
            self.counts = {}
        self._begin(group)

    def _zeros(self, position: int) -> Tensor:
        """A sum of this rank's rows; empty if another pass is for the parameter."""
        if position not in self.here:
            return torch.empty(0)
        host = self._adder is not None
        device = torch.device("cpu") if host else self.parameters[position].device
        return self.shards[position].zeros(device)

    def buffers(self, name: str, in_step: bool = False) -> list[Tensor]:
        """The sums of one name, over the run or over the step, in parameter order."""
        sums = self.step_sums if in_step else self.sums
        if name not in sums:
            sums[name] = list(map(self._zeros, range(len(self.parameters))))
        return sums[name]

    # -- while the pass runs -----------------------------------------------------------------------

    @contextmanager
    def into(
        self,
        total: Optional[str] = None,
        squares: Optional[str] = None,
        in_step: Optional[str] = None,
    ) -> Iterator[None]:
        """Context of one backward pass, whose gradient is added to the sums ``total`` and (see
        :meth:`fold`) ``in_step``, and its elementwise square to ``squares``.

        Collective: all ranks must enter it, whichever parameters have a gradient on which rank.
        """
        names = ((total, False), (in_step, True))
        totals = [self.buffers(name, within) for name, within in names if name]
        squared = self.buffers(squares) if squares else []
        several_ranks = distributed.is_distributed()
        # all ranks reduce in this order, which is nearly that in which backward finishes gradients
        left = list(range(len(self.parameters))) if several_ranks else []
        waiting: dict[int, Tensor] = {}

        add = partial(self._add_gradient, totals, squared)

        @torch.no_grad()
        def take(position: int, parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            if not several_ranks:
                return add(position, gradient)
            waiting[position] = gradient
            while left and left[-1] in waiting:
                position = left.pop()
                add(position, waiting.pop(position))

        hooks = []
        in_place = len(totals) == 1 and not squares and not several_ranks and not self.sharded
        in_place = in_place and self._adder is None
        for position in self.here:
            parameter = self.parameters[position]
            if in_place and parameter.dtype == torch.float32:
                parameter.grad = totals[0][position]
            else:
                parameter.grad = None
                hooks.append(parameter.register_post_accumulate_grad_hook(partial(take, position)))
        try:
            yield
            for position in reversed(left):  # other ranks may have gradients that this one lacks
                shape, device = self.shards[position].shape, self.parameters[position].device
                gradient = waiting.pop(position, None)
                with torch.no_grad():
                    add(
                        position,
                        torch.zeros(shape, device=device) if gradient is None else gradient,
                    )
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters:
                parameter.grad = None
            if self._adder is not None:
                self._adder.wait()

    def _add_gradient(
        self,
        totals: Sequence[Sequence[Tensor]],
        squared: Sequence[Tensor],
        position: int,
        gradient: Tensor,
    ) -> None:
        """Add a gradient to sums, and its square to others; it may be overwritten. Collective."""
        on_device, shard = self._adder is None, self.shards[position]
        if on_device or squared or distributed.is_distributed():  # else widened in host memory
            gradient = gradient.float()
        if totals:
            mine = shard.scatter_sum(gradient)
            for buffers in totals:
                self._add(buffers[position], mine)
        if squared:
            square = gradient.square_() if on_device else gradient.square()
            self._add(squared[position], shard.scatter_sum(square))

    def _add(self, total: Tensor, mine: Tensor) -> None:
        if self._adder is None:
            total.add_(mine.to(total.device))
        else:
            self._adder.add(total, mine)

    def add(self, buffers: Sequence[Tensor], position: int, tensor: Tensor) -> None:
        """Add the ranks' tensors of one parameter's shape to a sum. Collective."""
        self._add(buffers[position], self.shards[position].scatter_sum(tensor))
        if self._adder is not None:
            self._adder.wait()

    @torch.no_grad()
    def fold(
        self, name: str, squares: Optional[str] = None, squared_norm: Optional[str] = None
    ) -> None:
        """End a step: add the elementwise square of its sum, over all micro-batches and ranks, to
        the sum ``squares``, or each parameter's squared norm to a vector, and reset it."""
        for position in self.here if name in self.step_sums else ():
            gradient = self.step_sums[name][position]
            if squares:
                self.buffers(squares)[position].addcmul_(gradient, gradient)
            if squared_norm:
                parts = [piece.double().square().sum() for piece in pieces(gradient)]
                self.add_vector(squared_norm, str(position), sum(parts[1:], parts[0]))
            gradient.zero_()

    def count(self, name: str, amount: float) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    def add_vector(self, name: str, parameter: str, vector: Tensor) -> None:
        """Add to a vector of a parameter, in fp64 and without synchronising with the device."""
        vectors = self.vectors.setdefault(name, {})
        before = vectors.get(parameter)
        vectors[parameter] = vector.double() if before is None else before + vector

    # -- over all ranks, and in checkpoints --------------------------------------------------------

    def small(self) -> dict[str, Any]:
        """Vectors and counts, summed over ranks, once all losses have been checked. Collective."""
        self.reading.settle()
        total, device = distributed.all_reduce_sum, self.parameters[0].device
        shapes = {
            (name, key): tuple(vector.shape)
            for name, by_parameter in self.vectors.items()
            for key, vector in by_parameter.items()
        }
        vectors: dict[str, dict[str, Tensor]] = {}
        # a rank lacks the vectors of layers it has never run, such as experts
        for (name, key), shape in sorted(dict(distributed.all_gather(shapes.items())).items()):
            zeros = torch.zeros(shape, dtype=torch.float64, device=device)
            vectors.setdefault(name, {})[key] = total(
                self.vectors.get(name, {}).get(key, zeros).clone()
            )
        pairs = sorted(self.counts.items())
        counts = {name: float(total(torch.tensor(count).double())) for name, count in pairs}
        return {"vectors": vectors, "counts": counts}

    def _load_small(self, small: dict[str, Any]) -> None:
        """Restore vectors and counts on rank 0; other ranks start at zero, as they are summed."""
        first = distributed.rank() == 0
        device = self.parameters[0].device
        self.vectors = {
            name: {
                key: vector.to(device) if first else torch.zeros_like(vector, device=device)
                for key, vector in vectors.items()
            }
            for name, vectors in small["vectors"].items()
        }
        self.counts = {name: count if first else 0.0 for name, count in small["counts"].items()}

    def _stored(self) -> dict[str, list[Tensor]]:
        """Every sum by its name in a checkpoint."""
        return self.sums | {_OF_STEP + name: sums for name, sums in self.step_sums.items()}

    def _restored(self, name: str) -> list[Tensor]:  # the buffers of a name in a checkpoint
        return self.buffers(name.removeprefix(_OF_STEP), in_step=name.startswith(_OF_STEP))

    def state_dict(self) -> dict[str, Any]:
        """Whole sums, vectors and counts; with several ranks on the CPU of rank 0. Collective."""
        sums: dict[str, list[Tensor]] = {name: [] for name in self._stored()}
        for name, tensors in self._stored().items():
            for shard, tensor in zip(self.shards, tensors, strict=True):
                full = shard.gather(tensor)
                if distributed.rank() == 0:
                    sums[name].append(full.cpu() if distributed.is_distributed() else full)
        done = {"passes": len(self._groups), "group": self.group, "first": self._counts_of_first}
        return {"sums": sums, **done, **self.small()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if (passes := state_dict["passes"]) != len(self._groups):
            raise WagleError(
                f"the checkpoint's run made {passes} passes, this one makes {len(self._groups)}",
                "sums",
                f"give --model.sums {f'passes={passes}' if passes > 1 else 'device or host'}",
            )
        self._begin(min(state_dict["group"], passes))
        self._counts_of_first = state_dict["first"]
        for name, tensors in state_dict["sums"].items():
            buffers = self._restored(name)
            shapes = {at: tensor.shape for at, tensor in enumerate(tensors) if at in self.here}
            if shapes != {at: self.shards[at].shape for at in self.here}:
                raise WagleError(f"the checkpoint's sums: {name}: have shapes of other weights")
            for position, full in enumerate(tensors):
                if position in self.here:
                    buffers[position].copy_(self.shards[position].of(full))
                else:  # of a group that is finished or not yet begun
                    buffers[position] = on_disk(full, self._folder)
        self._load_small(state_dict)

    def parts(self) -> Iterator[Piece]:
        """This rank's rows of every sum, for a sharded checkpoint."""
        for name, tensors in self._stored().items():
            for parameter, shard, tensor in zip(self.names, self.shards, tensors, strict=True):
                if tensor.numel():
                    yield Piece(f"sum/{name}", parameter, shard.first, tensor.reshape(-1))

    def load(self, stored: ShardedCheckpoint) -> None:
        """Restore this rank's rows from a checkpoint that any number of ranks wrote."""
        for key in stored.pieces:
            buffers = self._restored(key.removeprefix("sum/"))
            for parameter, shard, tensor in zip(self.names, self.shards, buffers, strict=True):
                if size := tensor.numel():
                    rows = stored.read(key, parameter, shard.first, shard.first + size)
                    tensor.copy_(rows.view_as(tensor))
        self._load_small(stored.common["sums"])
