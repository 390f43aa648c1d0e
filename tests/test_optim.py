"""Masked optimisers against torch's and against the formula; state, its round trip and its size; the put-back."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from wagle_pl.bits import pack_bits
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning.optim import (
    CHUNK,
    MaskedAdamW,
    MaskedOptimizer,
    ParameterMask,
    ParameterMasks,
    Sophia,
    decay_selected,
    guard,
    mask_gradients,
    mask_whole_gradients,
    parameter_masks,
)
from wagle_pl.utilities import WagleError

SHAPES = {"a": (13, 7), "b": (11,), "c": (6, 5), "d": ()}


def tensors(seed: int) -> dict[str, Tensor]:
    """A random tensor of each shape; a tenth of the numbers is −0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {n: torch.where(torch.rand(t.shape, generator=generator) < 0.1, -0.0, t) for n, t in drawn.items()}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(t.to(dtype)) for name, t in tensors(seed).items()}


def masks_of(named: dict[str, nn.Parameter], density: float, seed: int) -> tuple[ParameterMasks, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    bools = {n: torch.rand(p.shape, generator=generator) < density for n, p in named.items()}
    return parameter_masks(named.items(), WeightMask.from_bools(bools)), bools


def run(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], masks: ParameterMasks, steps: range) -> None:
    """Steps with random gradients, masked as the hooks would."""
    for step in steps:
        for name, gradient in tensors(100 + step).items():
            named[name].grad = gradient.to(named[name].dtype)
        for parameter, mask in masks.items():
            parameter.grad = torch.where(mask.bools(), parameter.grad, 0.0)
        optimizer.step()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_adamw_is_adamw_on_selected_weights(density: float, decay: float, dtype: torch.dtype) -> None:
    ours, theirs, start = parameters(dtype=dtype), parameters(dtype=dtype), parameters(dtype=dtype)
    masks, bools = masks_of(ours, density, seed=3)
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": decay}
    optimizer = MaskedAdamW(ours.values(), **options)
    optimizer.bind(masks)
    run(optimizer, ours, masks, range(5))
    # torch's sees the same gradients, so selected weights are moved by the same rule; only frozen ones differ
    run(torch.optim.AdamW(theirs.values(), **options), theirs, {}, range(5))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for name, mask in bools.items():
        torch.testing.assert_close(ours[name][mask], theirs[name][mask], **tolerance)
        assert torch.equal(bits(ours[name])[~mask], bits(start[name])[~mask])


@pytest.mark.parametrize("density", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("interval", [1, 3])
def test_sophia_equals_its_formula(density: float, interval: int) -> None:
    ours, start = parameters(), parameters()
    masks, bools = masks_of(ours, density, seed=4)
    lr, (beta1, beta2), rho, decay = 0.05, (0.9, 0.95), 0.5, 0.1
    optimizer = Sophia(
        ours.values(), lr=lr, betas=(beta1, beta2), rho=rho, interval=interval, eps=1e-12, weight_decay=decay
    )
    optimizer.bind(masks)
    run(optimizer, ours, masks, range(7))
    for name, mask in bools.items():
        theta = start[name].detach().double()
        m, h = torch.zeros_like(theta), torch.zeros_like(theta)
        for step in range(7):
            g = tensors(100 + step)[name].double()
            if step % interval == 0:
                h = beta2 * h + (1 - beta2) * g * g
            m = beta1 * m + (1 - beta1) * g
            theta = theta * (1 - lr * decay) - lr * (m / (rho * h + 1e-12)).clamp(-1, 1)
        torch.testing.assert_close(ours[name].double()[mask], theta[mask], rtol=1e-5, atol=1e-6)
        assert torch.equal(bits(ours[name])[~mask], bits(start[name])[~mask])


@pytest.mark.parametrize("make", [MaskedAdamW, Sophia])
def test_state_follows_density(make: type[MaskedOptimizer]) -> None:
    named = {"w": nn.Parameter(torch.randn(400, 500)), "v": nn.Parameter(torch.randn(100, 300))}
    masks, _ = masks_of(named, 0.1, seed=0)
    optimizer = make(named.values())
    optimizer.bind(masks)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values()] + list(optimizer._indices.values())
    dense = 8 * sum(p.numel() for p in named.values())
    assert sum(t.numel() * t.element_size() for t in state) <= 0.25 * dense


@pytest.mark.parametrize("make", [MaskedAdamW, Sophia])
@pytest.mark.parametrize("density", [0.1, 0.7])
def test_state_round_trip(make: type[MaskedOptimizer], density: float) -> None:
    whole, halves = parameters(), parameters()
    masks, _ = masks_of(whole, density, seed=5)
    optimizer = make(whole.values(), lr=0.02, weight_decay=0.1)
    optimizer.bind(masks)
    run(optimizer, whole, masks, range(6))
    masks, _ = masks_of(halves, density, seed=5)
    first, second = (make(halves.values(), lr=0.02, weight_decay=0.1) for _ in range(2))
    first.bind(masks)
    second.bind(masks)
    run(first, halves, masks, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, halves, masks, range(3, 6))
    for name in whole:
        assert torch.equal(bits(whole[name]), bits(halves[name]))


def test_a_step_count_from_a_checkpoint_is_taken_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are read on the CPU, and loading leaves the count there: the fused step needs it beside the weights.
    The meta device stands for a GPU."""
    weight = nn.Parameter(torch.ones(4, device="meta"))
    weight.grad = torch.ones(4, device="meta")
    optimizer = MaskedAdamW([weight])
    on_cpu = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: on_cpu}})
    devices: list[str] = []
    monkeypatch.setattr(
        "wagle_pl.unlearning.optim.adamw",
        lambda weights, gradients, averages, squares, spare, steps, **_: devices.extend(
            tensor.device.type for tensors in (weights, averages, squares, steps) for tensor in tensors
        ),
    )
    optimizer.step()
    assert devices == ["meta"] * 4


def test_state_of_another_mask_is_refused() -> None:
    named = parameters()
    optimizers = []
    for seed in (1, 2):
        masks, _ = masks_of(named, 0.2, seed)
        optimizers.append(MaskedAdamW(named.values()))
        optimizers[-1].bind(masks)
    run(optimizers[0], named, masks, range(1))
    with pytest.raises(WagleError, match="another mask"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}])
@pytest.mark.parametrize("make", [MaskedAdamW, Sophia])
def test_meaningless_options_are_refused(make: type[MaskedOptimizer], options: dict) -> None:
    with pytest.raises(WagleError, match=f"optimizer.{next(iter(options))}"):
        make(parameters().values(), **options)


def test_lbfgs_is_refused() -> None:
    named = parameters()
    with pytest.raises(WagleError, match="LBFGS evaluates the loss several times"):
        guard(torch.optim.LBFGS(named.values()), {})


def test_options_that_arrive_later_are_guarded_against() -> None:
    """A scheduler or a checkpoint may turn decay on after the optimiser was judged harmless."""
    named, start = parameters(), parameters()
    masks, bools = masks_of(named, 0.3, seed=1)
    optimizer = torch.optim.AdamW(named.values(), lr=0.1, weight_decay=0.0)
    assert not guard(optimizer, masks)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    run(optimizer, named, masks, range(3))
    for name, mask in bools.items():
        assert torch.equal(bits(named[name])[~mask], bits(start[name])[~mask])


def test_whole_gradients_are_masked_in_place() -> None:
    named = parameters()
    bools = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in named.items()}
    bools["a"][0, 0] = True
    masks = parameter_masks(named.items(), WeightMask.from_bools(bools))
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    named["a"].grad[0, 0] = 2.0
    mask_whole_gradients(masks)
    assert all(named[name].grad is None for name in "bcd")
    assert named["a"].grad.sum() == 2 and not torch.signbit(named["a"].grad).any()


@pytest.mark.parametrize("accumulated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_masked_as_they_come(accumulated: bool, dtype: torch.dtype) -> None:
    """Two backward passes into one gradient; a tensor used twice; one gradient that two parameters share."""
    named = parameters(dtype=dtype)
    named["twin"] = nn.Parameter(named["a"].detach().clone())
    masks, bools = masks_of(named, 0.4, seed=6)
    handles = mask_gradients(masks, accumulated)
    weights = {n: t.to(dtype) for n, t in tensors(7).items()}

    def backward() -> None:
        both = (named["a"] + named["twin"]) * weights["a"]
        rest = sum((named[n] * weights[n]).sum() + named[n].sum() * torch.nan * 0 for n in "bcd")
        (both.sum() + rest + (named["b"] * weights["b"]).sum()).backward()

    backward()
    backward()
    for name, parameter in named.items():
        whole = weights[name if name != "twin" else "a"] * (4 if name == "b" else 2)
        if name in ("a", "twin"):
            torch.testing.assert_close(parameter.grad[bools[name]], whole[bools[name]])
        frozen = parameter.grad[~bools[name]]
        assert (frozen == 0).all() and not torch.signbit(frozen).any()
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("size", [5, CHUNK, 2 * CHUNK + 13])
def test_decay_a_part_at_a_time(size: int):
    weights = torch.randn(size, generator=torch.Generator().manual_seed(size))
    selected = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.7
    decayed = weights.clone()
    decay_selected(decayed, ParameterMask(pack_bits(selected), weights), 0.9)
    assert torch.equal(decayed, torch.where(selected, weights * 0.9, weights))
