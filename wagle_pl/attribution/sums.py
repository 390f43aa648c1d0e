"""``GradientSums``: running fp32 sums of gradients, dressed as an optimiser that moves nothing.

As an optimiser it gives Lightning what it counts steps by and saves in checkpoints, so that attribution resumes like
training does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class GradientSums(Optimizer):
    """Sums of gradients by name, one fp32 tensor a parameter and name, made when first used.

    For fp32 parameters the sum *is* the gradient autograd accumulates into, so adding up costs nothing and no second
    buffer exists. For narrower parameters each gradient is added in fp32 as soon as it is whole, and freed.

    Args:
        params: the parameters.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.sums: dict[str, list[Tensor]] = {}
        #: Small running numbers that belong to the sums (counts of examples, of batches, ...).
        self.counts: dict[str, float] = {}
        self._target: Optional[str] = None
        self._position = {parameter: i for i, parameter in enumerate(self.parameters)}
        for parameter in self.parameters:
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self._add_narrow)

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
    def into(self, name: str) -> Iterator[None]:
        """Gradients of the backward passes inside are added to the sums of ``name``."""
        self._target = name
        buffers = self.buffers(name)
        for parameter, buffer in zip(self.parameters, buffers, strict=True):
            parameter.grad = buffer if parameter.dtype == torch.float32 else None
        try:
            yield
        finally:
            self._target = None
            for parameter in self.parameters:
                parameter.grad = None

    def _add_narrow(self, parameter: nn.Parameter) -> None:
        if self._target is not None:
            self.sums[self._target][self._position[parameter]].add_(parameter.grad)
            parameter.grad = None

    def count(self, name: str, amount: float) -> None:
        """Add to a running number."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def step(self, closure: Any = None) -> Any:
        """Move nothing; Lightning counts it."""
        return closure() if closure is not None else None

    def state_dict(self) -> dict[str, Any]:
        """Sums and counts."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take sums and counts, to this device, without a change of dtype."""
        devices = [parameter.device for parameter in self.parameters]
        self.sums = {
            name: [tensor.to(device) for tensor, device in zip(tensors, devices, strict=True)]
            for name, tensors in state_dict["sums"].items()
        }
        self.counts = dict(state_dict["counts"])
