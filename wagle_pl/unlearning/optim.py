"""Optimisation in which frozen weights stay bit-identical.

Three parts, each enough to reason about alone:

* :func:`mask_gradients` zeroes the gradient of frozen weights as autograd delivers it, before any reduction or clipping;
* :class:`MaskedAdamW` decays selected weights only, and keeps state for selected weights only where that saves memory;
* :func:`guard` makes any other optimiser safe, by putting frozen weights back after its step where it could move them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from wagle_pl.masks import WeightMask, count_bits, unpack_bits

#: A tensor with at most this share selected keeps optimiser state for its selected weights only (12 bytes each, with
#: the index, against 8 bytes for every weight).
COMPACT_DENSITY = 0.5

#: Optimisers of torch that do not move a weight whose gradient has always been zero, unless they decay it.
STILL_AT_ZERO = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")


class ParameterMask:
    """The bits of one parameter on its device: one bit a weight, unpacked when used."""

    def __init__(self, packed: Tensor, parameter: nn.Parameter) -> None:
        self.packed = packed.to(parameter.device)
        self.shape = parameter.shape
        self.selected = count_bits(packed)

    @property
    def density(self) -> float:
        """Share of the parameter selected."""
        return self.selected / self.shape.numel()

    def bools(self) -> Tensor:
        """Bool tensor of the parameter's shape, True where selected."""
        return unpack_bits(self.packed, self.shape)


ParameterMasks = Mapping[nn.Parameter, ParameterMask]


def parameter_masks(parameters: Iterable[tuple[str, nn.Parameter]], mask: WeightMask) -> ParameterMasks:
    """The mask of each parameter that has one frozen weight at least; others need none."""
    masks = {parameter: ParameterMask(mask.packed(name), parameter) for name, parameter in parameters}
    return {parameter: m for parameter, m in masks.items() if m.selected < m.shape.numel()}


def mask_gradients(masks: ParameterMasks) -> list[Any]:
    """Zero the gradient of frozen weights in every backward pass from now on; returns the hooks' handles."""

    def hook(mask: ParameterMask) -> Callable[[Tensor], Tensor]:
        return lambda gradient: torch.where(mask.bools(), gradient, torch.zeros((), dtype=gradient.dtype))

    return [parameter.register_hook(hook(mask)) for parameter, mask in masks.items() if parameter.requires_grad]


class MaskedAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) that decays, and keeps state for, selected weights only.

    Without :meth:`bind` it is torch's AdamW. With it, a tensor of which at most half is selected keeps the two moments of
    its selected weights alone, so optimiser memory follows density; the arithmetic for a selected weight is the same.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay, on selected weights.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self._masks: ParameterMasks = {}
        self._indices: dict[nn.Parameter, Tensor] = {}

    def bind(self, masks: ParameterMasks) -> None:
        """Tell the optimiser which weights are selected; before the first step."""
        self._masks = masks
        for parameter, mask in masks.items():
            if mask.density <= COMPACT_DENSITY:
                index = mask.bools().view(-1).nonzero().view(-1)
                self._indices[parameter] = index.int() if parameter.numel() < 2**31 else index

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """One step; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        index = self._indices.get(parameter)
        decay = group["weight_decay"]
        if index is not None:
            weights = parameter.view(-1).index_select(0, index)
            gradient = parameter.grad.view(-1).index_select(0, index)
        else:
            weights, gradient = parameter, parameter.grad
            mask = self._masks.get(parameter)
            if mask is not None and decay:
                kept = torch.ones((), dtype=parameter.dtype, device=parameter.device)
                parameter.mul_(torch.where(mask.bools(), kept - group["lr"] * decay, kept))
                decay = 0.0
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(weights)
            state["exp_avg_sq"] = torch.zeros_like(weights)
        adamw(
            [weights],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=decay,
            eps=group["eps"],
            maximize=False,
        )
        if index is not None:
            parameter.view(-1).index_copy_(0, index.long(), weights)


def guard(optimizer: Optimizer, masks: ParameterMasks) -> bool:
    """Make an optimiser leave frozen weights alone; call after construction, with gradients masked.

    An optimiser with a ``bind`` method is told the masks. One of torch's that cannot move a weight with zero gradient
    is left as it is. Any other has its frozen weights put back, bit for bit, after each step, at the price of a copy of
    the weights.

    Returns:
        Whether frozen weights are put back.
    """
    if hasattr(optimizer, "bind"):
        optimizer.bind(masks)
        return False
    decays = any(group.get("weight_decay") for group in optimizer.param_groups)
    if type(optimizer).__name__ in STILL_AT_ZERO and type(optimizer).__module__.startswith("torch.") and not decays:
        return False
    saved: dict[nn.Parameter, Tensor] = {}

    def save(*_: Any) -> None:
        saved.update({parameter: parameter.detach().clone() for parameter in masks})

    def put_back(*_: Any) -> None:
        with torch.no_grad():
            for parameter, before in saved.items():
                parameter.copy_(torch.where(masks[parameter].bools(), parameter, before))
        saved.clear()

    optimizer.register_step_pre_hook(save)
    optimizer.register_step_post_hook(put_back)
    return True
