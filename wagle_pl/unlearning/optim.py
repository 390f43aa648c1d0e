"""Optimisation in which frozen weights stay bit-identical.

Three parts, each enough to reason about alone:

* :func:`mask_gradients` zeroes the gradient of frozen weights in every backward pass, before reduction and clipping;
* :class:`MaskedAdamW` and :class:`Sophia` decay selected weights only, and keep state for selected weights only where
  that saves memory;
* :func:`guard` makes any other optimiser safe, by putting frozen weights back after its step where it could move them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.adamw import adamw

from wagle_pl.masks import WeightMask, count_bits, unpack_bits
from wagle_pl.utilities import WagleError

#: A tensor with at most this share selected keeps optimiser state for its selected weights only (12 bytes each, with
#: the index, against 8 bytes for every weight).
COMPACT_DENSITY = 0.5

#: Numbers handled at a time where that keeps what is between two operations in the processor's cache.
CHUNK = 1 << 17

#: The same on a GPU, where what counts is that few operations are started and little memory is taken.
GPU_CHUNK = 1 << 24

#: Optimisers of torch that do not move a weight whose gradient has always been zero, as long as :func:`_stays_still`.
STILL_AT_ZERO = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")


class ParameterMask:
    """The bits of one parameter on its device: one bit a weight, unpacked when used."""

    def __init__(self, packed: Tensor, parameter: Tensor) -> None:
        self.packed = packed.to(parameter.device)
        self.shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))  # ds_shape: spread over ranks (ZeRO-3)
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


@torch.no_grad()
def zero_frozen(gradient: Tensor, mask: ParameterMask) -> Tensor:
    """Put +0 at frozen weights, in place, whatever stood there (NaN included); returns the gradient.

    On a CPU the words are combined with 0 or all ones, a chunk at a time: 4 times as fast as ``torch.where``.
    """
    words = {2: torch.int16, 4: torch.int32}.get(gradient.element_size())
    if gradient.device.type != "cpu" or words is None or not gradient.is_contiguous():
        return gradient.masked_fill_(~mask.bools().to(gradient.device), 0)
    selected = mask.bools().view(-1).view(torch.int8)
    for bits, ones in zip(gradient.view(-1).view(words).split(CHUNK), selected.split(CHUNK), strict=True):
        bits &= ones.to(words).neg_()
    return gradient


@torch.no_grad()
def decay_selected(parameter: Tensor, mask: ParameterMask, kept: float) -> None:
    """Multiply selected weights by ``kept``, in place and a part at a time: under ZeRO one tensor is a rank's all."""
    flat, size = parameter.view(-1), CHUNK if parameter.device.type == "cpu" else GPU_CHUNK
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size]
        selected = unpack_bits(mask.packed[start // 8 : -(-(start + len(part)) // 8)], part.shape)
        part.copy_(torch.where(selected, part * kept, part))


def mask_gradients(masks: ParameterMasks, accumulated: bool = True) -> list[Any]:
    """Zero the gradient of frozen weights in every backward pass from now on; returns the hooks' handles.

    Args:
        masks: of the parameters.
        accumulated: whether the gradient is looked at once it stands in ``parameter.grad``, where it may be changed in
            place. False looks at it on its way there: for strategies that let none stand (ZeRO).
    """

    def in_place(parameter: nn.Parameter) -> None:
        zero_frozen(parameter.grad, masks[parameter])

    def on_the_way(mask: ParameterMask, gradient: Tensor) -> Tensor:
        return zero_frozen(gradient.clone(memory_format=torch.contiguous_format), mask)

    if accumulated:
        return [p.register_post_accumulate_grad_hook(in_place) for p in masks if p.requires_grad]
    return [p.register_hook(partial(on_the_way, mask)) for p, mask in masks.items() if p.requires_grad]


def mask_whole_gradients(masks: ParameterMasks) -> None:
    """Zero the gradient of frozen weights, now: for gradients that were kept whole until they were clipped.

    A parameter without any selected weight loses its gradient, so that no optimiser touches it.
    """
    for parameter, mask in masks.items():
        if not mask.selected:
            parameter.grad = None
        elif parameter.grad is not None:
            zero_frozen(parameter.grad, mask)


class MaskedOptimizer(Optimizer):
    """An optimiser that moves, decays and keeps state for selected weights only. Override :meth:`update`.

    Without :meth:`bind` every weight is selected. With it, a tensor of which at most half is selected hands
    :meth:`update` its selected weights alone, so state follows density; any other hands over the whole tensor, whose
    frozen weights have zero gradient.

    Args:
        params: parameters or parameter groups.
        defaults: options of a group, with ``lr`` and ``weight_decay`` (decoupled) among them.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        for option in ("lr", "weight_decay"):
            if defaults[option] < 0:
                raise WagleError(f"optimizer.{option} must not be below 0, got {defaults[option]}")
        if not defaults["eps"] > 0:
            raise WagleError(f"optimizer.eps must be above 0, got {defaults['eps']}: 0 / 0 would move frozen weights")
        if not all(0 <= beta < 1 for beta in defaults["betas"]):
            raise WagleError(f"optimizer.betas must lie in [0, 1), got {defaults['betas']}")
        super().__init__(params, defaults)
        self._masks: ParameterMasks = {}
        self._indices: dict[nn.Parameter, Tensor] = {}

    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move ``weights`` in place, decay apart; must leave a weight alone whose gradient has always been zero.

        Args:
            weights: (selected,) of a compact tensor, or a whole parameter.
            gradient: same shape.
            state: empty at first; tensors of the same shape are kept for the next step.
            group: the parameter group's options.
        """
        raise TypeError(f"{type(self).__name__} must override update")

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
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        index = self._indices.get(parameter)
        kept = 1 - group["lr"] * group["weight_decay"]
        if index is None:
            mask = self._masks.get(parameter)
            if kept != 1 and mask is None:
                parameter.mul_(kept)
            elif kept != 1:
                decay_selected(parameter, mask, kept)
            self.update(parameter, parameter.grad, self.state[parameter], group)
            return
        weights = parameter.view(-1).index_select(0, index)
        gradient = parameter.grad.view(-1).index_select(0, index)
        if kept != 1:
            weights.mul_(kept)
        self.update(weights, gradient, self.state[parameter], group)
        for at, moved in zip(index.split(CHUNK), weights.split(CHUNK), strict=True):
            parameter.view(-1).scatter_(0, at.long(), moved)  # several times faster than index_copy_

    def spread(self, parameter: Tensor, state: Tensor) -> Tensor:
        """State of a parameter's selected weights, laid out like the parameter; 0 for those that have none."""
        index = self._indices.get(parameter)
        return state if index is None else state.new_zeros(parameter.numel()).scatter_(0, index.long(), state)

    def compact(self, parameter: Tensor, spread: Tensor) -> Tensor:
        """The way back from :meth:`spread`."""
        index = self._indices.get(parameter)
        return spread if index is None else spread.index_select(0, index)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state back.

        Raises:
            WagleError: if it is that of another mask.
        """
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            expected = self._indices.get(parameter, parameter).numel()
            sizes = {value.numel() for value in state.values() if torch.is_tensor(value) and value.dim()}
            if sizes - {expected}:
                raise WagleError("the optimiser's state is that of a run with another mask; start this run anew")


class MaskedAdamW(MaskedOptimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) that decays, and keeps state for, selected weights only.

    m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², θ ← (1 − ηλ)θ − η m̂ / (√v̂ + ε): torch's AdamW on the selected weights.

    Args:
        params: parameters or parameter groups.
        lr: learning rate η.
        betas: decay rates of the two moments.
        eps: ε, above 0.
        weight_decay: decoupled weight decay λ, on selected weights.

    Raises:
        WagleError: if an option has no meaning.
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

    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Torch's fused AdamW."""
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
            state["exp_avg"] = torch.zeros_like(weights)
            state["exp_avg_sq"] = torch.zeros_like(weights)
        state["step"] = state["step"].to(weights.device)  # a checkpoint's is on the CPU, the fused step wants it here
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
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


class Sophia(MaskedOptimizer):
    """Clipped second-order steps (Liu et al. 2023, arXiv 2305.14342), as in SOUL (Jia et al. 2024, arXiv 2404.18239).

    m ← β₁m + (1 − β₁)g; every ``interval`` steps h ← β₂h + (1 − β₂)ĥ; θ ← (1 − ηλ)θ − η clip(m / (ρh + ε), ±1), so no
    weight moves further than η a step. ĥ is the square of the step's own gradient: one backward pass a step and any
    objective. (The paper's Gauss–Newton–Bartlett estimate B ĝ² has the gradient ĝ of labels drawn from the model in its
    place; the batch size B, a constant factor, is part of ρ here.) ĥ falls with the square of a loss's scale, m in
    proportion: when the loss is rescaled, ρ has to be.

    Args:
        params: parameters or parameter groups.
        lr: learning rate η: the largest step of a weight.
        betas: decay rates of m and h.
        rho: ρ; larger means smaller steps where curvature is high. 0 takes the sign of m.
        interval: steps from one refresh of h to the next; the first step refreshes.
        eps: ε, above 0.
        weight_decay: decoupled weight decay λ, on selected weights.

    Raises:
        WagleError: if an option has no meaning.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        interval: int = 1,
        eps: float = 1e-15,
        weight_decay: float = 0.0,
    ) -> None:
        if rho < 0 or interval < 1:
            raise WagleError(f"optimizer.rho must not be below 0 and interval not below 1, got {rho} and {interval}")
        defaults = {"lr": lr, "betas": tuple(betas), "rho": rho, "interval": interval, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def update(self, weights: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One clipped step."""
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weights)
            state["hessian"] = torch.zeros_like(weights)
        if int(state["step"]) % group["interval"] == 0:
            state["hessian"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1 - beta1)
        ratio = momentum.float() / (group["rho"] * state["hessian"].float() + group["eps"])  # ε is 0 in fp16
        weights.add_(ratio.clamp_(-1, 1).to(weights.dtype), alpha=-group["lr"])


def guard(optimizer: Optimizer, masks: ParameterMasks) -> bool:
    """Make an optimiser leave frozen weights alone; call after construction, with gradients masked.

    A :class:`MaskedOptimizer` is told the masks. Any other has its frozen weights put back, bit for bit, after each
    step that could move them, at the price of a copy of the weights; one of torch's that cannot move a weight with zero
    gradient steps freely. That is decided anew before each step: a checkpoint may bring other options.

    Returns:
        Whether frozen weights have to be put back, as things stand.

    Raises:
        WagleError: if the optimiser evaluates the loss several times a step, which accumulated and clipped gradients
            do not allow.
    """
    if isinstance(optimizer, LBFGS):
        raise WagleError("optimizer LBFGS evaluates the loss several times a step, on micro-batches that are gone by "
                         "then; choose another, e.g. --optimizer MaskedAdamW")  # fmt: skip
    if isinstance(optimizer, MaskedOptimizer):
        optimizer.bind(masks)
        return False
    saved: dict[nn.Parameter, Tensor] = {}

    def save(*_: Any) -> None:
        if not _stays_still(optimizer):
            stepping = (p for group in optimizer.param_groups for p in group["params"])  # under ZeRO not all at once
            saved.update({parameter: parameter.detach().clone() for parameter in stepping if parameter in masks})

    def put_back(*_: Any) -> None:
        with torch.no_grad():
            for parameter, before in saved.items():
                parameter.copy_(torch.where(masks[parameter].bools(), parameter, before))
        saved.clear()

    optimizer.register_step_pre_hook(save)
    optimizer.register_step_post_hook(put_back)
    return not _stays_still(optimizer)


def _stays_still(optimizer: Optimizer) -> bool:
    """Whether a weight whose gradient has always been +0 keeps its bits: for sure, not perhaps.

    Decay moves it; an ε of 0 makes 0 / 0 of it; ``maximize`` negates the gradient, and −0 weights may become +0.
    """
    known = type(optimizer).__module__.startswith("torch.optim.") and type(optimizer).__name__ in STILL_AT_ZERO
    return known and not any(
        group.get("weight_decay") or group.get("maximize") or group.get("eps", 1.0) == 0
        for group in optimizer.param_groups
    )
