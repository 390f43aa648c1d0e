"""Optimisers against torch's and against the formula; their state's round trip, and options that have no meaning."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments, get_scheduler

from wagle_pl.core.errors import WagleError
from wagle_pl.unlearning.optim import MaskedAdamW, SignSGD, Sophia, warmup_and_decay

SHAPES = {"a": (13, 7), "b": (11,), "d": ()}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor) for name, tensor in tensors(seed).items()}


def run(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: range) -> None:
    """Steps with random gradients."""
    for step in steps:
        for name, gradient in tensors(100 + step).items():
            named[name].grad = gradient
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_masked_adamw_is_adamw(decay: float) -> None:
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": decay}
    run(MaskedAdamW(ours.values(), **options), ours, range(5))
    run(torch.optim.AdamW(theirs.values(), **options), theirs, range(5))
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_masked_adamw_can_be_clipped_under_loss_scaling() -> None:
    """Lightning does not clip for optimisers that undo the loss scale themselves, as torch's fused ones do."""
    from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling

    assert not _optimizer_handles_unscaling(MaskedAdamW(parameters().values()))


@pytest.mark.parametrize("interval", [1, 3])
def test_sophia_equals_its_formula(interval: int) -> None:
    ours, start = parameters(), parameters()
    lr, (beta1, beta2), rho, decay = 0.05, (0.9, 0.95), 0.5, 0.1
    options = {"lr": lr, "betas": (beta1, beta2), "rho": rho, "interval": interval}
    run(Sophia(ours.values(), **options, eps=1e-12, weight_decay=decay), ours, range(7))
    for name in SHAPES:
        theta = start[name].detach().double()
        m, h = torch.zeros_like(theta), torch.zeros_like(theta)
        for step in range(7):
            g = tensors(100 + step)[name].double()
            if step % interval == 0:
                h = beta2 * h + (1 - beta2) * g * g
            m = beta1 * m + (1 - beta1) * g
            theta = theta * (1 - lr * decay) - lr * (m / (rho * h + 1e-12)).clamp(-1, 1)
        torch.testing.assert_close(ours[name].double(), theta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sign_sgd_equals_its_formula(momentum: float) -> None:
    ours, start = parameters(), parameters()
    optimizer = SignSGD(ours.values(), lr=0.05, momentum=momentum, weight_decay=0.1)
    run(optimizer, ours, range(7))
    for name in SHAPES:
        theta = start[name].detach().double()
        m = torch.zeros_like(theta)
        for step in range(7):
            m = momentum * m + (1 - momentum) * tensors(100 + step)[name].double()
            theta = theta * (1 - 0.05 * 0.1) - 0.05 * m.sign()
        torch.testing.assert_close(ours[name].double(), theta, rtol=1e-5, atol=1e-6)
    assert len(optimizer.state) == (3 if momentum else 0)


def test_sign_sgd_steps_by_the_sign_of_adam() -> None:
    ours, theirs = parameters(), parameters()
    run(SignSGD(ours.values(), lr=0.01, momentum=0.9), ours, range(4))
    adam, moved = torch.optim.Adam(theirs.values(), lr=0.01), parameters()
    for step in range(4):
        before = {name: tensor.detach().clone() for name, tensor in theirs.items()}
        run(adam, theirs, range(step, step + 1))
        for name in SHAPES:
            moved[name].data += 0.01 * (theirs[name].detach() - before[name]).sign()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], moved[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [MaskedAdamW, Sophia, partial(SignSGD, momentum=0.9)])
def test_state_round_trip(make: type[torch.optim.Optimizer]) -> None:
    whole, halves = parameters(), parameters()
    run(make(whole.values(), lr=0.02, weight_decay=0.1), whole, range(6))
    first, second = (make(halves.values(), lr=0.02, weight_decay=0.1) for _ in range(2))
    run(first, halves, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, halves, range(3, 6))
    for name in SHAPES:
        assert torch.equal(whole[name], halves[name])


@pytest.mark.parametrize(
    "options", [{"eps": 0.0}, {"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}]
)
@pytest.mark.parametrize("make", [MaskedAdamW, Sophia])
def test_meaningless_options_are_refused(make: type[torch.optim.Optimizer], options: dict) -> None:
    with pytest.raises(WagleError, match=f"optimizer.{next(iter(options))}"):
        make(parameters().values(), **options)
    with pytest.raises(WagleError, match=r"optimizer.momentum: must lie in \[0, 1\), got 1.0"):
        SignSGD(parameters().values(), momentum=1.0)


@pytest.mark.parametrize("decay", ["linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 0.25])
def test_a_warm_up_from_zero_is_that_of_transformers(warmup: float, decay: str) -> None:
    parameters = [torch.zeros(1)]
    ours = warmup_and_decay(torch.optim.SGD(parameters), warmup, decay, 10, from_zero=True)
    warm = TrainingArguments("out", warmup_steps=warmup, use_cpu=True).get_warmup_steps(10)
    name = "linear" if decay == "linear" else "constant_with_warmup"
    theirs = get_scheduler(name, torch.optim.SGD(parameters), warm, 10)
    for step in range(11):
        assert ours.lr_lambdas[0](step) == theirs.lr_lambdas[0](step)
