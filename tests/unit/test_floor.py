"""The step floor: each selected weight is at θ₀ or in another bin of the form, which the quantisers themselves say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import moved, random_bools, trainer, weights

from wagle_pl import ForgetRetainDataModule, UnlearnModule, WeightMask
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm.models import load_model
from wagle_pl.lm.quantised import rounded_to
from wagle_pl.lm.saving import read_record
from wagle_pl.unlearning.floor import INTO, floored

FORMS = (4, 3, "nf4", "q8_0", "q4_0")


def bounds(weights: torch.Tensor, i: int, form: Any, direction: float) -> list[float]:
    """The next two bounds in a direction from weight i of a block, by bisection of what the quantiser says."""
    reach, found = float(weights.abs().max()), []
    at = float(weights.view(-1)[i])

    def level(value: float) -> float:
        other = weights.clone()
        other.view(-1)[i] = value
        return float(rounded_to(other, form).view(-1)[i])

    for _ in range(2):
        low, high, start = at, at + direction * reach / 2, level(at)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if level(middle) == start else (low, middle)
        found.append(high)
        at = high + direction * reach * 1e-6
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_rule_by_brute_force(form: Any) -> None:
    """One weight of a block at a time is trained a little; both its choices are priced."""
    torch.manual_seed(3)
    start = torch.randn(1, 64)
    start[0, [0, 1, 2, 7, 8]] = torch.tensor([0.1, -0.35, 0.6, -0.7, 0.2])  # not in the last bins
    start[0, [5, 40]], start[0, [6, 41]] = 3.0, -2.9  # these set the scales
    seen = set()
    for i, share in ((0, 0.3), (0, 0.9), (1, 0.6), (2, 0.99), (7, 0.55), (8, 0.8)):
        for direction in (1.0, -1.0):
            bound, after = bounds(start, i, form, direction)
            trained, gradient = start.clone(), torch.zeros(1, 64)
            trained[0, i] += share * (bound - float(start[0, i]))
            for slope in (1.0, -1.0):
                gradient[0, i] = slope
                result = floored(start, trained, gradient, form)
                crossing = bound + INTO * (after - bound)
                now, before = float(trained[0, i]), float(start[0, i])
                costs = slope * (crossing - now), slope * (before - now)
                crosses = costs[0] < costs[1] and abs(crossing - now) < abs(before - now)
                expected = start.clone()
                expected[0, i] = crossing if crosses else before
                torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5)
                seen.add(crosses)
    assert seen == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_each_weight_is_at_the_start_or_in_another_bin(form: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    start = (torch.randn(9, 96) * torch.logspace(-2, 0, 9)[:, None]).to(dtype).float()
    start[3] = start[3].abs()
    start[4] = 0
    size = 0.006 if form == "q8_0" else 0.1
    step = start.abs().amax(1, keepdim=True) * torch.randn(9, 96) * size
    selected = torch.rand(9, 96) < 0.5
    trained = torch.where(selected, start + step, start)
    result = floored(start, trained, torch.randn(9, 96), form, dtype)
    assert torch.equal(result.to(dtype).float(), result)
    changed = result != start
    before, after = rounded_to(start, form), rounded_to(result, form)
    assert torch.equal(before != after, changed)
    assert not (changed & ~selected).any()
    assert 0.1 < changed.sum() / selected.sum() < 0.95


def test_a_run_with_a_floor(tiny_model: str, rows: dict[str, str], tmp_path: Path) -> None:
    bools = random_bools(parameter_shapes(load_model(tiny_model)))
    mask, out = WeightMask.from_bools(bools), tmp_path / "out"
    options = {"objective": "GradDiff", "mask": mask, "lr": 0.01, "output": out}
    module = UnlearnModule(tiny_model, floor="nf4", **options)
    run = trainer(max_steps=3)
    run.fit(module, ForgetRetainDataModule(rows["forget"], rows["retain"]))
    start, result, changes = weights(tiny_model), weights(out), moved(tiny_model, out)
    count = 0
    for name, changed in changes.items():
        assert not (changed & ~bools[name]).any()
        if "proj" in name:
            other = rounded_to(start[name], "nf4") != rounded_to(result[name], "nf4")
            assert torch.equal(other, changed)
            count += int(changed.sum())
    record = read_record(str(out))["lineage"][-1]
    assert record["floor"]["left"] == count < record["floor"]["moved"]
    assert "frozen weights are bit-identical" in record["verified"]
    with pytest.raises(WagleError, match=r"model\.floor: must be 2 to 16, or one of nf4"):
        UnlearnModule(tiny_model, floor=99)
