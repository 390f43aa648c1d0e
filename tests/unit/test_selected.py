"""A model whose selected weights are its only parameters: against autograd, and its docstring a sentence at a time."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import CPU_CHUNK as CHUNK
from wagle_pl.masks.bits import (
    iter_places,
    pack_bits,
    place,
    put_,
    take_,
)
from wagle_pl.masks.selected import SUFFIX, SelectedWeights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Experts(nn.Module):
    """A 3-D weight, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, padding_idx=1)
        self.up = nn.Parameter(torch.randn(2, 6, 5))
        self.norm = nn.LayerNorm(5)
        self.down = nn.Linear(5, 6, bias=False)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(torch.einsum("bi,eio->bo", self.embed(tokens), self.up))
        return self.head(torch.tanh(self.down(hidden)))


UNITS = ["weight", "row", "column"]


def made(
    dtype: torch.dtype = torch.float32, density: float = 0.4, seed: int = 0, unit: str = "weight"
) -> tuple[Experts, WeightMask]:
    """A model, and a mask that selects all of one tensor and none of another."""
    torch.manual_seed(seed)
    model = Experts().to(dtype)
    bools = {}
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        if unit != "weight" and len(shape) == 2:
            shape[1 if unit == "row" else 0] = 1
        bools[name] = (torch.rand(shape) < density).expand(parameter.shape).clone()
    bools["norm.weight"].fill_(True)
    bools["norm.bias"].fill_(False)
    return model, WeightMask.from_bools(bools)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


TOKENS = torch.tensor([3, 1, 6, 3])


def loss_of(model: nn.Module) -> Tensor:
    return model(TOKENS).float().square().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", UNITS)
def test_gradients_are_the_selected_entries_of_autograds(dtype: torch.dtype, unit: str) -> None:
    model, mask = made(dtype, unit=unit)
    plain = copy.deepcopy(model)
    selected = SelectedWeights(model, mask)
    assert torch.equal(loss_of(model), loss_of(plain))
    loss_of(model).backward()
    loss_of(plain).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    seen = dict(selected.gradients())
    assert set(seen) == set(gradients) - {"norm.bias"}
    for name, gradient in seen.items():
        assert selected.tensors[name].values.dtype == gradient.dtype == torch.float32
        expected = gradients[name][mask[name]].float()
        exact = name != "embed.weight" and (unit == "weight" or name != "down.weight")
        # that of two layers is added up in fp32 here, in the model's dtype by autograd
        near = {"rtol": 0 if exact else 2 * torch.finfo(dtype).eps, "atol": 0 if exact else 1e-5}
        torch.testing.assert_close(gradient.view(-1), expected, **near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_weights_are_no_parameter_and_no_buffer(dtype: torch.dtype) -> None:
    model, mask = made(dtype)
    SelectedWeights(model, mask)
    assert not list(model.buffers())
    assert sum(p.numel() for p in model.parameters()) == mask.count()
    names = {f"{name}{SUFFIX}" for name in ("embed.weight", "head.weight", "up", "down.weight")}
    whole = "norm.weight" if dtype == torch.float32 else f"norm.weight{SUFFIX}"
    assert set(model.state_dict()) == {*names, whole}


def everything_written(model: nn.Module) -> None:
    """What any optimiser, decay, noise, averaging or communication hook can do to what it is given."""
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.buffers()]:
            parameter.data.mul_(0.9).add_(torch.randn_like(parameter))


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.001, 0.1, 0.5, 0.9, 1.0]),
    theta0=st.booleans(),
    seed=st.integers(0, 1000),
    unit=st.sampled_from(UNITS),
)
def test_writing_into_all_parameters_and_buffers_moves_no_frozen_bit(
    dtype: torch.dtype, density: float, theta0: bool, seed: int, unit: str
) -> None:
    model, mask = made(dtype, density, seed, unit)
    before = weights(model)
    selected = SelectedWeights(model, mask, keep_theta0=theta0)
    everything_written(model)
    selected.changed()
    computed = model(TOKENS)
    selected.release()
    after = weights(model)
    assert list(after) == list(before)
    assert torch.equal(model(TOKENS), computed)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    for name, tensor in after.items():
        moved = tensor.view(words) != before[name].view(words)
        assert not (moved & ~mask[name]).any()
    assert any((after[name] != before[name]).any() for name in after)


@pytest.mark.parametrize("unit", UNITS)
def test_a_nan_in_values_and_gradients_reaches_selected_weights_alone(unit: str) -> None:
    model, mask = made(unit=unit)
    before = weights(model)
    selected = SelectedWeights(model, mask)
    optimizer = torch.optim.RMSprop(model.parameters(), eps=0.0, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    selected.changed()
    selected.release()
    for name, tensor in weights(model).items():
        assert tensor[mask[name]].isnan().all()
        assert torch.equal(tensor[~mask[name]], before[name][~mask[name]])


def test_small_steps_add_up_in_bfloat16() -> None:
    """A thousand steps of a fortieth of a unit in the last place: bf16 weights alone would never move."""
    model, mask = made(torch.bfloat16)
    with torch.no_grad():
        model.down.weight.fill_(1.0)
    selected = SelectedWeights(model, mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-13)
    for _ in range(1024):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    selected.release()
    assert (model.down.weight[mask["down.weight"]] == 1.0 - 1024 * 2.0**-13).all()


@pytest.mark.parametrize("unit", UNITS)
def test_values_stay_in_fp32_whatever_the_model_is_cast_to(unit: str) -> None:
    model, mask = made(unit=unit)
    selected = SelectedWeights(model, mask, keep_theta0=True)
    values = {name: p for name, p in model.named_parameters() if name.endswith(SUFFIX)}
    fine = {name: torch.randn_like(parameter) for name, parameter in values.items()}
    with torch.no_grad():
        for name, parameter in values.items():
            parameter.copy_(fine[name])
            parameter.grad = fine[name].clone()
    model.to(torch.bfloat16)
    assert list(values) == [n for n, _ in model.named_parameters() if n.endswith(SUFFIX)]
    for name, parameter in values.items():
        assert all(torch.equal(kept, fine[name]) for kept in (parameter, parameter.grad))
    assert model(TOKENS).dtype == torch.bfloat16 and model.down.weight.dtype == torch.bfloat16
    selected.release()
    rounded = fine[f"down.weight{SUFFIX}"].bfloat16().view(-1)
    assert torch.equal(model.down.weight[mask["down.weight"]], rounded)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", UNITS)
def test_theta0(dtype: torch.dtype, masked: bool, unit: str) -> None:
    model, mask = made(dtype, unit=unit)
    start = model(TOKENS).detach()
    selected = SelectedWeights(model, mask if masked else None, keep_theta0=True)
    everything_written(model)
    selected.changed()
    moved = model(TOKENS)
    with selected.at_theta0() as lm:
        assert torch.equal(lm(TOKENS), start) and not lm.training
    assert model.training and torch.equal(model(TOKENS), moved) and not torch.equal(moved, start)
    moved.sum().backward()  # what the graph has kept is as it was
    if masked:  # beside the dense tensor, the old values of selected weights alone
        kept = [tensor.theta0 for tensor in selected.tensors.values()]
        assert sum(values.numel() for values in kept if values is not None) == mask.count()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_mask_only_narrow_weights_have_values_beside_them(dtype: torch.dtype) -> None:
    model, _ = made(dtype)
    names, shapes = list(weights(model)), [p.shape for p in model.parameters()]
    SelectedWeights(model)
    assert [name.removesuffix(SUFFIX) for name, _ in model.named_parameters()] == names
    assert [p.shape for p in model.parameters()] == shapes  # for optimisers that need matrices
    assert all(p.dtype == torch.float32 for p in model.parameters())
    beside = any(name.endswith(SUFFIX) for name, _ in model.named_parameters())
    assert beside == (dtype != torch.float32)


def test_without_a_mask_what_requires_no_gradient_is_left_alone() -> None:
    model, _ = made(torch.bfloat16)
    model.embed.weight.requires_grad_(False)
    SelectedWeights(model)
    assert model.embed.weight is model.head.weight and isinstance(model.embed.weight, nn.Parameter)


def test_a_copy_is_whole_and_independent() -> None:
    """Averaging callbacks copy the module."""
    model, mask = made()
    selected = SelectedWeights(model, mask)
    other = copy.deepcopy(model)
    start = model(TOKENS).detach()
    everything_written(model)
    selected.changed()
    assert torch.equal(other(TOKENS), start) and not torch.equal(model(TOKENS), start)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("unit", UNITS)
def test_clipping_by_the_norm_of_all_gradients(scale: float, unit: str) -> None:
    model, mask = made(unit=unit)
    plain = copy.deepcopy(model)
    selected = SelectedWeights(model, mask, keep_dense_gradients=True)
    for _ in range(2):  # micro-batches
        (loss_of(model) * scale).backward()
        loss_of(plain).backward()
    for parameter in model.parameters():
        parameter.grad /= scale  # as a gradient scaler does before it clips
    bound = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
    assert bound > 1e-3
    selected.clip_by_dense_norm(1e-3, scale)
    clipped = {name: p.grad[mask[name]] for name, p in plain.named_parameters()}
    for name, gradient in selected.gradients():
        torch.testing.assert_close(gradient.view(-1), clipped[name])
    assert all(tensor.dense_gradient is None for tensor in selected.tensors.values())


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_of_two_passes_and_of_recomputed_blocks(unit: str) -> None:
    model, mask = made(unit=unit)
    plain = copy.deepcopy(model)
    selected = SelectedWeights(model, mask)

    def twice(lm: nn.Module, run: Any) -> Tensor:
        return run(lm, TOKENS).square().mean() + run(lm, TOKENS.flip(0) // 2).square().mean()

    twice(model, partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)).backward()
    twice(plain, lambda lm, x: lm(x)).backward()
    gradients = {name: p.grad[mask[name]] for name, p in plain.named_parameters()}
    for name, gradient in selected.gradients():
        torch.testing.assert_close(gradient.view(-1), gradients[name])


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_in_place_are_autograds_step_after_step(unit: str) -> None:
    (model, mask), (other, _) = made(unit=unit), made(unit=unit)
    sides = [(lm, SelectedWeights(lm, mask)) for lm in (model, other)]
    buffers = []
    for step in range(2):
        for lm, selected in sides:
            lm.zero_grad()
            for part in range(2):  # micro-batches of two streams
                x = (TOKENS + step + part) % 5
                loss = lm(x).square().mean() + lm(x.flip(0) // 2).square().mean()
                with selected.gradients_in_place() if lm is model else nullcontext():
                    loss.backward()
        expected = dict(sides[1][1].gradients())
        for name, gradient in sides[0][1].gradients():
            torch.testing.assert_close(gradient, expected[name])
            if not sides[0][1].tensors[name].is_plain:
                buffers.append(gradient.data_ptr())
    assert len(buffers) == 2 * len(set(buffers))  # no new memory in the second step
    before = {name: gradient.clone() for name, gradient in sides[0][1].gradients()}
    values = [p for p in model.parameters() if p.requires_grad]
    assert all(g is not None for g in torch.autograd.grad(loss_of(model), values))
    assert all(torch.equal(gradient, before[name]) for name, gradient in sides[0][1].gradients())


@pytest.mark.parametrize("size", [1, 5, CHUNK, 2 * CHUNK + 13])
@pytest.mark.parametrize("dtype", DTYPES)
def test_take_put_and_place(size: int, dtype: torch.dtype) -> None:
    dense, bools = torch.randn(size).to(dtype), torch.rand(size) < 0.7
    bools[0] = True
    index, values = bools.nonzero().view(-1).int(), torch.randn(int(bools.sum()))
    for places in (index.split(CHUNK), iter_places(pack_bits(bools), size, CHUNK)):
        taken = take_(torch.empty_like(values), dense, places)
        assert torch.equal(taken, dense[bools].float())
    expected = dense.clone()
    expected[bools] = values.to(dtype)
    written = dense.clone()
    put_(written, iter_places(pack_bits(bools), size, CHUNK // 2), values)
    assert torch.equal(written, expected)
    placed = place(dense, bools, values)
    assert placed.dtype == torch.float32 and torch.equal(placed.to(dtype), expected)


@pytest.mark.parametrize("package", ["bitsandbytes.optim", "torchao.optim"])
def test_optimizers_with_state_of_eight_bits(package: str) -> None:
    make = pytest.importorskip(package).AdamW8bit
    moved = {}
    for name, kind in (("exact", torch.optim.AdamW), ("low", make)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 200), nn.Tanh(), nn.Linear(200, 64)).bfloat16()
        mask = WeightMask.from_bools(
            {n: torch.rand(p.shape) < 0.4 for n, p in model.named_parameters()}
        )
        before, inputs = weights(model), torch.randn(16, 256).bfloat16()
        selected = SelectedWeights(model, mask)
        optimizer = kind(list(model.parameters()), lr=1e-3)
        for _ in range(6):
            optimizer.zero_grad()
            model(inputs).float().square().mean().backward()
            optimizer.step()
            selected.changed()
        values = {n: t.values.detach().clone() for n, t in selected.tensors.items()}
        moved[name] = torch.cat([values[n].view(-1) - before[n][mask[n]].float() for n in values])
        selected.release()
        assert all(
            torch.equal(p[~mask[n]], before[n][~mask[n]]) for n, p in model.named_parameters()
        )
    assert torch.nn.functional.cosine_similarity(moved["exact"], moved["low"], dim=0) > 0.99
