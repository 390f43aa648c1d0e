"""``GradientSums``: running fp32 sums of gradients and of their squares.

With several ranks each keeps its rows of every sum (:class:`~wagle_pl.attribution.shards.Shard`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from wagle_pl.attribution.shards import Shard
from wagle_pl.core import distributed
from wagle_pl.strategies.checkpoint import Piece, ShardedCheckpoint

_OF_STEP = "of this step: "  # before the name of a sum over a step, in a checkpoint


class GradientSums:
    """Sums by name: one fp32 tensor a parameter and name, made when first used, 4 bytes a weight and name.

    On one device the sum of fp32 parameters' gradients is the tensor that autograd accumulates into: no second buffer
    exists. Gradients of narrower parameters, of several ranks, and those to be squared are taken as soon as one
    parameter's is whole, added in fp32, and freed before the next parameter's.

    Args:
        parameters: of the model, in order.
        names: their names, for checkpoints of shards.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], names: Sequence[str] = ()) -> None:
        self.parameters = list(parameters)
        self.names = list(names)
        self.shards = [Shard(getattr(p, "ds_shape", p.shape)) for p in self.parameters]
        #: Sums over the run: name -> this rank's rows of each parameter's.
        self.sums: dict[str, list[Tensor]] = {}
        #: Sums over one step, zero between steps; checkpoints keep them within one.
        self.step_sums: dict[str, list[Tensor]] = {}
        #: fp64 vectors and numbers that do not have the parameter's shape: name -> parameter -> this rank's part.
        self.vectors: dict[str, dict[str, Tensor]] = {}
        #: Counts of examples, of batches, ...: this rank's part.
        self.counts: dict[str, float] = {}

    @classmethod
    def of(cls, lm: nn.Module) -> GradientSums:
        """For all parameters of a model."""
        names, parameters = zip(*lm.named_parameters(), strict=True)
        return cls(parameters, names)

    @property
    def sharded(self) -> bool:
        """Whether the parameters themselves are sharded over ranks (ZeRO-3)."""
        return any(hasattr(parameter, "ds_id") for parameter in self.parameters)

    def buffers(self, name: str) -> list[Tensor]:
        """The sums of one name, in parameter order: this rank's rows of each."""
        return self._buffers(self.sums, name)

    def _stored(self) -> dict[str, list[Tensor]]:
        """Every sum by its name in a checkpoint."""
        return {
            **self.sums,
            **{_OF_STEP + name: tensors for name, tensors in self.step_sums.items()},
        }

    def _restored(self, name: str) -> list[Tensor]:
        """The sums that a name in a checkpoint stands for."""
        if name.startswith(_OF_STEP):
            return self._buffers(self.step_sums, name.removeprefix(_OF_STEP))
        return self.buffers(name)

    def _buffers(self, where: dict[str, list[Tensor]], name: str) -> list[Tensor]:
        if name not in where:
            where[name] = [
                shard.zeros(p.device) for shard, p in zip(self.shards, self.parameters, strict=True)
            ]
        return where[name]

    @contextmanager
    def into(
        self,
        total: Optional[str] = None,
        squares: Optional[str] = None,
        in_step: Optional[str] = None,
    ) -> Iterator[None]:
        """Where the gradient of the one backward pass inside goes; it may go to several places.

        With several ranks it is collective, whichever parameters have a gradient on which rank.

        Args:
            total: name of the sum that the gradient is added to.
            squares: name of the sum that its elementwise square is added to.
            in_step: name of the sum over this step that it is added to, see :meth:`fold`.
        """
        totals = [
            *([self.buffers(total)] if total else []),
            *([self._buffers(self.step_sums, in_step)] if in_step else []),
        ]
        squared = self.buffers(squares) if squares else []
        distributed_run = distributed.is_distributed()
        # ranks reduce in one order, which is nearly that in which a backward pass finds gradients
        left = list(range(len(self.parameters))) if distributed_run else []
        waiting: dict[int, Tensor] = {}

        def add(position: int, gradient: Tensor) -> None:
            gradient = gradient.float()
            if totals:
                shared = self.shards[position].scatter_sum(gradient)
                for buffers in totals:
                    buffers[position].add_(shared.to(buffers[position].device))
            if squares:
                self.add(squared, position, gradient.square_())

        @torch.no_grad()
        def take(position: int, parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            if not distributed_run:
                return add(position, gradient)
            waiting[position] = gradient
            while left and left[-1] in waiting:
                position = left.pop()
                add(position, waiting.pop(position))

        hooks = []
        in_place = len(totals) == 1 and not squares and not distributed_run and not self.sharded
        for position, parameter in enumerate(self.parameters):
            if in_place and parameter.dtype == torch.float32:
                parameter.grad = totals[0][position]
            else:
                parameter.grad = None
                hooks.append(parameter.register_post_accumulate_grad_hook(partial(take, position)))
        try:
            yield
            for position in reversed(left):  # some rank may have a gradient that this one has not
                found = waiting.pop(position, None)
                with torch.no_grad():
                    add(position, self._zeros(position) if found is None else found)
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters:
                parameter.grad = None

    def _zeros(self, position: int) -> Tensor:
        parameter = self.parameters[position]
        return torch.zeros(self.shards[position].shape, device=parameter.device)

    def add(self, buffers: Sequence[Tensor], position: int, whole: Tensor) -> None:
        """Add the ranks' tensors of a parameter's shape to its sum; collective."""
        buffers[position].add_(
            self.shards[position].scatter_sum(whole).to(buffers[position].device)
        )

    @torch.no_grad()
    def fold(
        self, name: str, squares: Optional[str] = None, squared_norm: Optional[str] = None
    ) -> None:
        """End a step: square what was summed over it, over all its micro-batches and ranks, and begin anew.

        Args:
            name: of the sum over the step.
            squares: name of the sum its elementwise square is added to.
            squared_norm: name of the vectors each parameter's squared norm is added to (one number each).
        """
        for position, gradient in enumerate(self.step_sums.get(name, [])):
            if squares:
                self.buffers(squares)[position].addcmul_(gradient, gradient)
            if squared_norm:
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                self.add_vector(squared_norm, str(position), norm.square())
            gradient.zero_()

    def count(self, name: str, amount: float) -> None:
        """Add to a running number."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def add_vector(self, name: str, parameter: str, vector: Tensor) -> None:
        """Add to a running vector of a parameter, in fp64 and without waiting for the device."""
        vectors = self.vectors.setdefault(name, {})
        vectors[parameter] = (
            vectors[parameter] + vector if parameter in vectors else vector.double()
        )

    def step(self, closure: Any = None) -> Any:
        """Move nothing; Lightning counts it."""
        return closure() if closure is not None else None

    # -- over all ranks, and on disk ----------------------------------------------------------------------------------

    def small(self) -> dict[str, Any]:
        """Vectors and counts, summed over the ranks; collective."""
        vectors = {
            name: {
                key: distributed.all_reduce_sum(vector.clone())
                for key, vector in sorted(by_parameter.items())
            }
            for name, by_parameter in sorted(self.vectors.items())
        }
        counts = {
            n: float(distributed.all_reduce_sum(torch.tensor(c).double()))
            for n, c in sorted(self.counts.items())
        }
        return {"vectors": vectors, "counts": counts}

    def state_dict(self) -> dict[str, Any]:
        """Sums, vectors and counts, whole, where they are on one device, and on the CPU of rank 0 if there are more."""
        stored = self._stored()
        sums: dict[str, list[Tensor]] = {name: [] for name in stored}
        for name, tensors in stored.items():
            for shard, tensor in zip(self.shards, tensors, strict=True):
                whole = shard.gather(tensor)
                if not distributed.is_distributed():
                    sums[name].append(whole)
                elif distributed.rank() == 0:
                    sums[name].append(whole.cpu())
        return {"sums": sums, **self.small()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take sums, vectors and counts, to this device, without a change of dtype."""
        for name, tensors in state_dict["sums"].items():
            for shard, mine, whole in zip(self.shards, self._restored(name), tensors, strict=True):
                mine.copy_(shard.of(whole))
        self._load_small(state_dict)

    def _load_small(self, small: dict[str, Any]) -> None:
        """Rank 0 goes on from what all ranks had together."""
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

    def parts(self) -> Iterator[Piece]:
        """This rank's rows of every sum, for a checkpoint of shards."""
        for name, tensors in self._stored().items():
            for parameter, shard, tensor in zip(self.names, self.shards, tensors, strict=True):
                if tensor.numel():
                    read = partial(tensor.reshape, -1)
                    yield Piece(
                        f"sum/{name}", parameter, shard.first, tensor.numel(), torch.float32, read
                    )

    def load(self, stored: ShardedCheckpoint) -> None:
        """Take this rank's rows of every sum from a checkpoint that any number of ranks wrote."""
        for key in stored.pieces:
            buffers = self._restored(key.removeprefix("sum/"))
            for parameter, shard, tensor in zip(self.names, self.shards, buffers, strict=True):
                if tensor.numel():
                    tensor.copy_(
                        stored.read(key, parameter, shard.first, tensor.numel()).view_as(tensor)
                    )
        self._load_small(stored.common["sums"])
