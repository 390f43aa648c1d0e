"""Optimisers and schedules in addition to torch's.

With a mask, an optimiser gets vectors of selected weights (:mod:`wagle_pl.masks.selected`); any
optimiser that accepts vectors works.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor
from torch.optim import LBFGS, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from wagle_pl.core.errors import WagleError, first_line

if TYPE_CHECKING:
    from wagle_pl.unlearning.finetune import FinetuneModule

FP32 = 4  # bytes of a number that is trained
#: Bytes of an optimiser's state per number that it trains, by the name of its class.
STATE_BYTES = {"MaskedAdamW": 8, "AdamW": 8, "AdamW8bit": 2, "SignSGD": 4, "SGD": 0}

TRIED_STEPS = 10_000  # of a schedule before a run


def _check(**options: Any) -> None:
    for name, value in options.items():
        least = 1 if name == "interval" else 0
        if name in ("betas", "momentum"):
            betas = value if name == "betas" else (value,)
            good, must = all(0 <= beta < 1 for beta in betas), "lie in [0, 1)"
        elif name == "eps":  # a weight without gradient would become 0 / 0
            good, must = value > 0, "be above 0"
        else:
            good, must = value >= least, f"not be below {least}"
        if not good:
            raise WagleError(f"must {must}, got {value}", option=f"optimizer.{name}")


class MaskedAdamW(AdamW):
    """torch's AdamW, fused (Loshchilov & Hutter 2019, arXiv 1711.05101).

    m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², θ ← (1 − ηλ)θ − η m̂ / (√v̂ + ε).

    Args:
        lr: learning rate η.
        betas: decay rates of the two moments.
        eps: ε, above 0.
        weight_decay: decoupled weight decay λ.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps}
        options["weight_decay"] = weight_decay
        _check(**options)
        super().__init__(params, **options, fused=True)
        self._step_supports_amp_scaling = False  # Lightning then scales, and can clip


class _ByTensor(Optimizer, ABC):
    """An optimiser that moves one tensor at a time."""

    @abstractmethod
    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Move a parameter, which has a gradient, by the options of its group."""

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
                    self.move(parameter, group)
        return loss


class SignSGD(_ByTensor):
    """Every weight moves by η, in the direction of a sign (arXiv 1802.04434).

    m ← βm + (1 − β)g; θ ← (1 − ηλ)θ − η sign(m). One of the "downgraded" optimisers that unlearn
    more robustly (arXiv 2510.00761). Without momentum it has no state; with β = β₁ it steps by the
    sign of Adam's step (signAdam there). Only the step is one bit; m has full precision, as there.

    Args:
        lr: learning rate η: the step of a weight.
        momentum: β.
        weight_decay: decoupled weight decay λ.
    """

    def __init__(
        self, params: Any, lr: float = 1e-6, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        _check(**options)
        super().__init__(params, options)

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        direction = parameter.grad
        if beta := group["momentum"]:
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
            direction = state["exp_avg"].lerp_(direction, 1 - beta)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.sign(), alpha=-group["lr"])


class Sophia(_ByTensor):
    """Clipped second-order steps (arXiv 2305.14342), as in SOUL (arXiv 2404.18239).

    m ← β₁m + (1 − β₁)g; every ``interval`` steps h ← β₂h + (1 − β₂)ĥ; θ ← (1 − ηλ)θ − η clip(m /
    (ρh + ε), ±1), so no weight moves further than η per step. ĥ is the square of the step's own
    gradient: one backward pass per step, with any objective. (The paper's Gauss–Newton–Bartlett
    estimate B ĝ² uses the gradient ĝ of labels drawn from the model instead; the batch size B, a
    constant factor, is part of ρ here.) ĥ scales with the square of the loss's scale, m in
    proportion to it: if the loss is rescaled, ρ has to be, too.

    Args:
        lr: learning rate η: the largest step of a weight.
        betas: decay rates of m and h.
        rho: ρ; larger means smaller steps where curvature is high. 0 takes the sign of m.
        interval: steps from one refresh of h to the next; the first step refreshes.
        eps: ε, above 0.
        weight_decay: decoupled weight decay λ, on selected weights.
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
        options = {"lr": lr, "betas": tuple(betas), "rho": rho, "interval": interval, "eps": eps}
        options["weight_decay"] = weight_decay
        _check(**options)
        super().__init__(params, options)

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["hessian"] = torch.zeros_like(parameter)
        if int(state["step"]) % group["interval"] == 0:
            state["hessian"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1 - beta1)
        ratio = momentum / (group["rho"] * state["hessian"] + group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(ratio.clamp_(-1, 1), alpha=-group["lr"])


def optimizer_and_schedule(module: FinetuneModule) -> dict[str, Any]:
    """The optimiser over a module's trainable parameters, and its schedule, for Lightning."""
    options = {} if module.lr is None else {"lr": module.lr}
    trained: Any = [parameter for parameter in module.lm.parameters() if parameter.requires_grad]
    if not module.decay_norms_and_biases:
        tensors = {tensor.values: tensor.parameter for tensor in module.tensors.values()}
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for values in trained:
            shape = getattr(tensors[values], "ds_shape", tensors[values].shape)
            groups[len(shape) < 2]["params"].append(values)
        trained = [group for group in groups if group["params"]]
    masked = "" if module.mask is None else "(with a mask, parameters are vectors)"
    optimizer = make_optimizer(module.make_optimizer, trained, masked, **options)
    steps = module.trainer.estimated_stepping_batches
    make, interval = module.make_lr_scheduler, module.lr_interval
    if make is None:
        schedule = (module.warmup, module.decay, steps, module.warmup_from_zero)
        make, interval = (lambda optimizer: warmup_and_decay(optimizer, *schedule)), "step"
    elif interval == "epoch" and (module.trainer.max_epochs or 0) > 0:
        steps = min(steps, module.trainer.max_epochs)
    try_schedule(make, optimizer, steps)
    how = {"scheduler": (scheduler := make(optimizer)), "interval": interval}
    how["monitor"] = getattr(scheduler, "monitor", "train/loss")
    return {"optimizer": optimizer, "lr_scheduler": how}


class _Unmoved(Optimizer):
    """An optimiser with another's options, over one number in place of each parameter."""

    def __init__(self, other: Optimizer) -> None:
        groups = [{**group, "params": [torch.zeros(1)]} for group in other.param_groups]
        super().__init__(groups, dict(other.defaults))

    def step(self, closure: Any = None) -> None:
        """Move nothing."""


def try_schedule(make: Callable[[Optimizer], Any], optimizer: Optimizer, steps: float) -> None:
    """Step a schedule as often as the run will, at most :data:`TRIED_STEPS` times, before any work.

    Raises:
        WagleError: if it fails at a step, or gives rates that are negative, not finite, or all 0.
    """
    unmoved, name, step, moves = _Unmoved(optimizer), "", 0, False
    tries = 1 if steps == math.inf else int(min(steps, TRIED_STEPS))
    try:
        scheduler = make(unmoved)
        name, values = type(scheduler).__name__, [0.0] * isinstance(scheduler, ReduceLROnPlateau)
        while step < tries:
            rates = [float(group["lr"]) for group in unmoved.param_groups]
            if not all(-1e-12 <= rate < math.inf for rate in rates):  # rounding may end below 0
                raise ValueError(f"the learning rate becomes {min(rates):g}")
            step, moves = step + 1, moves or any(rates)
            unmoved.step()
            scheduler.step(*values)
    except WagleError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of an option
        where = f"{name} fails at step {step}: " if step else ""
        raise WagleError(f"{where}{first_line(error)}", option="lr_scheduler") from error
    if step and not moves:
        raise WagleError(f"no weight would move: the learning rate is 0 in {step} steps of {name}")


def make_optimizer(
    make: Callable[..., Optimizer], trained: Any, hint: str = "", **options: Any
) -> Optimizer:
    """The optimiser that ``make`` returns for parameters, or groups of them.

    Raises:
        WagleError: with the ``hint``, if it refuses them; if an option is not finite, or if it
            cannot train a language model.
    """
    try:
        optimizer = make(trained, **options)
    except WagleError:
        raise
    except ValueError as error:
        raise WagleError(f"optimizer: {first_line(error)} {hint}".rstrip()) from error
    for name, value in optimizer.defaults.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(n) for n in numbers if isinstance(n, float)):
            raise WagleError(f"must be finite, got {value}", option=f"optimizer.{name}")
    if optimizer.defaults.get("lr") == 0:
        raise WagleError("must be above 0, or no weight would move, got 0", "optimizer.lr")
    for kind, why in (
        (LBFGS, "evaluates the loss several times a step, on micro-batches that are gone then"),
        (SparseAdam, "takes sparse gradients alone, and those of a language model are dense"),
    ):
        if isinstance(optimizer, kind):
            message = f"{kind.__name__} {why}"
            raise WagleError(message, "optimizer", "choose another, e.g. MaskedAdamW")
    return optimizer


def warmup_and_decay(
    optimizer: Optimizer, warmup: float, decay: str, steps: float, from_zero: bool = False
) -> LambdaLR:
    """Linear warm-up, then linear decay to zero, or constant, by step.

    Args:
        warmup: a share of the steps (below 1) or a number of steps.
        decay: ``linear`` or ``constant``.
        steps: number of steps of the run; infinite if it is not known.
        from_zero: as transformers' schedules: the first step of a warm-up has rate 0, and a share
            of the steps is rounded up.

    Raises:
        WagleError: if the number of steps is needed but not known.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)])
    >>> (factor,) = warmup_and_decay(optimizer, 2, "linear", 6).lr_lambdas
    >>> [factor(step) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if steps == float("inf") and (decay != "constant" or 0 < warmup < 1):
        raise WagleError(
            "the run's steps are not known beforehand, and warm-up and decay are shares of them: "
            "give --trainer.max_steps or --trainer.max_epochs (max_time may end it earlier), or "
            "--model.decay constant with a --model.warmup of 0 or in steps"
        )
    rounded = math.ceil if from_zero else round
    warm = rounded(warmup * steps) if 0 < warmup < 1 else round(warmup)

    def factor(step: int) -> float:
        if step < warm:
            return (step + (not from_zero)) / warm
        return 1.0 if decay == "constant" else max(0.0, (steps - step) / max(1, steps - warm))

    return LambdaLR(optimizer, factor)
