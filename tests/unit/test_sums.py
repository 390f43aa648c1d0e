"""Sums in host memory, and of several passes, against sums on the device: the same bits."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from wagle_pl.attribution import scoring
from wagle_pl.attribution.collect import Job, collect, jobs_for
from wagle_pl.attribution.hessian import DIAGONAL, Fisher, estimator_of
from wagle_pl.attribution.scoring import Collected, MaskSpec, complete
from wagle_pl.attribution.sums import GradientSums, HostAdder, on_disk, runs_of
from wagle_pl.core.errors import WagleError
from wagle_pl.lm import models
from wagle_pl.objectives.forget import GradDiff

DEFAULT = MaskSpec("wagle", 0.2, "high", "global", "weight", "mean")
SPECS = [
    {"score": "wagle"},
    {"score": "signed", "density": 0.3},
    {"score": "snip", "scope": "tensor"},
    {"score": "gradient", "select": "low"},
    {"score": "forget_retain_ratio", "scope": "row"},
    {"score": "magnitude"},
    {"score": "wanda"},
]


@cache
def loaded(folder: str, dtype: torch.dtype) -> nn.Module:
    return models.load_model(folder).to(dtype)


def batches(count: int = 2) -> list[dict[str, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (2 * count, 2, 9), generator=generator)
    streams = zip(("forget", "retain") * count, ids, strict=True)
    made = [{name: {"input_ids": rows, "labels": rows}} for name, rows in streams]
    return [one | two for one, two in zip(made[::2], made[1::2], strict=True)]


LENGTHS = ((9, 4, 2), (5,), (7, 3))  # of the rows of three batches


def padded(side: str, with_mask: bool, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A batch of rows whose second half is the answer."""
    ids = [torch.randint(5, 300, (length,)) for length in lengths]
    labels = [row.where(torch.arange(len(row)) >= len(row) // 2, -100) for row in ids]
    columns = {"input_ids": (ids, 0), "labels": (labels, -100)}
    if with_mask:
        columns["attention_mask"] = ([torch.ones_like(row) for row in ids], 0)
    return {
        name: pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
        for name, (tensors, value) in columns.items()
    }


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "right, without a mask"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_padding_changes_nothing(tiny_model: str, kind: str, side: str, by_row: bool):
    """Against gradients of one row at a time, without padding, by torch's cross entropy."""
    if kind == "Llama":
        lm = loaded(tiny_model, torch.float32)
    else:  # positions are absolute
        lm = GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        ).eval()
    torch.manual_seed(0)
    rows = [{"retain": padded("right", True, lengths)} for lengths in LENGTHS]
    parameters = list(lm.parameters())
    total, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for batch in rows:
        for ids, labels, mask in zip(*batch["retain"].values(), strict=True):
            ids, labels = ids[mask > 0], labels[mask > 0]
            loss = F.cross_entropy(lm(ids[None]).logits[0, :-1], labels[1:])
            for i, gradient in enumerate(torch.autograd.grad(loss, parameters)):
                total[i] += gradient
                squares[i] += gradient.square()
    torch.manual_seed(0)
    side, _, without = side.partition(", ")
    given = [{"retain": padded(side, not without, lengths)} for lengths in LENGTHS]
    job = Job("retain", total="g_r", squares="fisher_r" if by_row else None)
    jobs = [job, Job("retain", hessian=Fisher())] if by_row else [job]
    found = collect(lm, given, jobs)
    assert found.counts["retain_rows"] == 6
    expected = {"g_r": total} | ({"fisher_r": squares, DIAGONAL: squares} if by_row else {})
    for name, tensors in expected.items():
        for ours, theirs in zip(found.sums[name], tensors, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("hessian", ["gauss_newton", "hutchinson"])
def test_the_side_of_the_padding_changes_no_estimate(tiny_model: str, hessian: str):
    lm, found = loaded(tiny_model, torch.float32), []
    for side in ("left", "right"):
        torch.manual_seed(0)
        given = [{"retain": padded(side, True, lengths)} for lengths in LENGTHS]
        jobs = [Job("retain", hessian=estimator_of(hessian)(), activations=True)]
        sums = collect(lm, given, jobs)
        found.append([*sums.sums[DIAGONAL], *sums.vectors["activation"].values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def masks(lm: nn.Module, specs: list[Any], hessian: str, sums: str) -> list[Any]:
    """The packed bits of every mask of one run."""
    specs = complete(specs, DEFAULT)
    needs = {need for spec in specs for need in spec.score.needs}
    diagonal = hessian != "auto" or "h_diagonal" in needs
    estimator = estimator_of(hessian)(diagonal=diagonal)
    jobs, name = jobs_for(needs, GradDiff(), estimator)
    found = collect(lm, batches(), jobs, sums=sums)
    assert all(parameter.requires_grad for parameter in lm.parameters())
    scalar = hessian == "auto"
    collected = Collected(lm, found, hessian=estimator, diagonal=name, scalar=scalar)
    return [{n: mask.packed(n) for n in mask} for _, mask in collected.masks(specs, {})]


def alike(ours: list[Any], theirs: list[Any]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hessian", ["auto", "gauss_newton", "fisher", "hutchinson"])
def test_the_same_masks_wherever_the_sums_are(tiny_model: str, hessian: str, dtype: torch.dtype):
    torch.set_num_threads(1)
    lm = loaded(tiny_model, dtype)
    diagonal = [{"score": "curvature"}, {"score": "fisher_ratio"}]
    specs = SPECS + (diagonal if hessian != "hutchinson" else diagonal[:1])
    on_device = masks(lm, specs, hessian, "device")
    assert alike(on_device, masks(lm, specs, hessian, "host"))
    if hessian != "hutchinson":
        assert alike(on_device, masks(lm, specs, hessian, "passes=3"))


def test_the_same_masks_where_scores_are_computed_in_blocks(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
):
    torch.set_num_threads(1)
    lm, specs = loaded(tiny_model, torch.float32), [*SPECS, {"score": "curvature"}]
    whole = masks(lm, specs, "gauss_newton", "device")
    monkeypatch.setattr(scoring, "BLOCK", 8 * 32)
    assert alike(whole, masks(lm, specs, "gauss_newton", "passes=2"))


def test_a_pass_makes_gradients_of_its_group_alone(tiny_model: str):
    lm = loaded(tiny_model, torch.float32)
    sums = GradientSums(lm.named_parameters(), passes=3)
    seen = []
    for group in range(3):
        sums.turn(group)
        here = [i for i, p in enumerate(sums.parameters) if p.requires_grad]
        with sums.into("g"):
            lm(**{k: v[:1] for k, v in batches(1)[0]["forget"].items()}).loss.backward()
        assert [i for i, total in enumerate(sums.sums["g"]) if total.numel()][-1] == here[-1]
        seen += here
    assert seen == list(range(len(sums.parameters)))
    sums.turn(3)
    assert [t.shape for t in sums.sums["g"]] == [p.shape for p in lm.parameters()]


def test_a_pass_over_other_rows_is_refused(tiny_model: str):
    lm = loaded(tiny_model, torch.float32)
    jobs, _ = jobs_for({"g_f"}, GradDiff())
    with pytest.raises(WagleError, match="pass 2 of 3 ended early"):
        collect(lm, iter(batches()), jobs, sums="passes=3")  # an iterator is empty the second time
    for parameter in lm.parameters():
        parameter.requires_grad_()


@pytest.mark.parametrize("sums", ["disk", "passes=0", "passes=", "passes=two"])
def test_places_that_there_are_not(tiny_model: str, sums: str):
    with pytest.raises(WagleError, match="must be device, host or passes=K"):
        collect(loaded(tiny_model, torch.float32), [], [], sums=sums)
    with pytest.raises(WagleError, match="1000 passes"):
        collect(loaded(tiny_model, torch.float32), [], [], sums="passes=1000")


def test_groups_are_even():
    for sizes, count in itertools.product(([5, 1, 1, 1, 2], [1] * 40, [100, *[1] * 20]), (1, 2, 5)):
        runs = runs_of(sizes, count)
        assert [i for run in runs for i in run] == list(range(len(sizes)))
        assert len(runs) == count and all(len(run) for run in runs)
        largest = max(sum(sizes[i] for i in run) for run in runs)
        assert largest <= sum(sizes) / count + max(sizes)


def test_what_goes_wrong_beside_the_backward_pass_is_raised():
    adder, total = HostAdder(torch.device("cpu")), torch.zeros(3)
    adder.add(total, torch.ones(3, dtype=torch.bfloat16))
    adder.add(torch.zeros(2), torch.ones(4))
    with pytest.raises((RuntimeError, ValueError)):
        adder.wait()
    adder.add(total, torch.ones(3))
    adder.wait()
    assert total.tolist() == [2.0, 2.0, 2.0]


def test_a_tensor_on_disk_leaves_no_file(tmp_path):
    values = torch.randn(3, 5)
    stored = on_disk(values, tmp_path / "new")
    assert torch.equal(stored, values) and not list((tmp_path / "new").iterdir())
