"""``GradientSums``: running fp32 sums of gradients and of their squares, dressed as an optimiser that moves nothing.

As an optimiser it gives Lightning what it counts steps by and saves in checkpoints, so that attribution resumes like
training does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class GradientSums(Optimizer):
    """Sums by name, one fp32 tensor a parameter and name, made when first used: four bytes a weight and name.

    For fp32 parameters a sum of gradients *is* the gradient autograd accumulates into, so adding up costs nothing and
    no second buffer exists. Gradients of narrower parameters, and those to be squared, are taken as soon as one
    parameter's is whole, added in fp32, and freed before the next parameter's.

    Args:
        params: the parameters.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.sums: dict[str, list[Tensor]] = {}
        #: Running fp64 vectors and numbers of a parameter that do not have its shape: name -> parameter -> sum.
        self.vectors: dict[str, dict[str, Tensor]] = {}
        #: Small running numbers that belong to the sums (counts of examples, of batches, ...).
        self.counts: dict[str, float] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in order."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def buffers(self, name: str) -> list[Tensor]:
        """The sums of one name, in parameter order."""
        if name not in self.sums:
            self.sums[name] = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
        return self.sums[name]

    @contextmanager
    def into(
        self, total: Optional[str] = None, squares: Optional[str] = None, squared_norm: Optional[str] = None
    ) -> Iterator[None]:
        """Say where the gradients of the backward passes inside go; they may go to several places.

        Args:
            total: name of the sum each backward pass's gradient is added to.
            squares: name of the sum its elementwise square is added to.
            squared_norm: name of the vectors each parameter's squared gradient norm is added to (one number each).
        """
        totals = self.buffers(total) if total else []
        squared = self.buffers(squares) if squares else []

        @torch.no_grad()
        def take(position: int, parameter: nn.Parameter) -> None:
            """Add one parameter's gradient, whole now, to where it goes, and free it."""
            gradient, parameter.grad = parameter.grad.float(), None
            if total:
                totals[position].add_(gradient)
            if squares:
                squared[position].addcmul_(gradient, gradient)
            if squared_norm:
                norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                self.add_vector(squared_norm, str(position), norm.square())

        hooks = []
        only_total = not (squares or squared_norm)
        for position, parameter in enumerate(self.parameters):
            if only_total and parameter.dtype == torch.float32:
                parameter.grad = totals[position]
            else:
                parameter.grad = None
                hooks.append(parameter.register_post_accumulate_grad_hook(partial(take, position)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters:
                parameter.grad = None

    def count(self, name: str, amount: float) -> None:
        """Add to a running number."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def add_vector(self, name: str, parameter: str, vector: Tensor) -> None:
        """Add to a running vector of a parameter, in fp64 and without waiting for the device."""
        vectors = self.vectors.setdefault(name, {})
        vectors[parameter] = vectors[parameter] + vector if parameter in vectors else vector.double()

    def step(self, closure: Any = None) -> Any:
        """Move nothing; Lightning counts it."""
        return closure() if closure is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Sums, vectors and counts."""
        return {"sums": self.sums, "vectors": self.vectors, "counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take sums, vectors and counts, to this device, without a change of dtype."""
        devices = [parameter.device for parameter in self.parameters]
        self.sums = {
            name: [tensor.to(device) for tensor, device in zip(tensors, devices, strict=True)]
            for name, tensors in state_dict["sums"].items()
        }
        self.vectors = {
            name: {parameter: vector.to(devices[0]) for parameter, vector in vectors.items()}
            for name, vectors in state_dict["vectors"].items()
        }
        self.counts = dict(state_dict["counts"])
