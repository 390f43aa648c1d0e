"""The retain term ``kl``, and UNDIAL, over answers and padded batches, beside the reference code's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from wagle_pl import objectives as o
from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import collate
from wagle_pl.data.example import Example
from wagle_pl.data.template import Template
from wagle_pl.lm import models
from wagle_pl.lm.inference import Predictions, forward_answers
from wagle_pl.objectives.forget import Streams
from wagle_pl.objectives.retain import KL


def reference_kl(model: Any, target_model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``compute_kl_divergence`` of OpenUnlearning's ``src/trainer/utils.py``, as in TOFU's code."""
    with torch.no_grad():
        ref_outputs = target_model(**inputs)
    ref_probs = torch.nn.functional.log_softmax(ref_outputs.logits, dim=-1).view(
        -1, ref_outputs.logits.shape[-1]
    )
    outputs = model(**inputs)
    current_probs = torch.nn.functional.log_softmax(outputs.logits, dim=-1).view(
        -1, outputs.logits.shape[-1]
    )
    return torch.nn.functional.kl_div(
        current_probs, ref_probs, reduction="batchmean", log_target=True
    )


@pytest.fixture(scope="module")
def pair(tiny_model: str) -> tuple[Any, Any]:
    """The model a little way from θ₀, and θ₀."""
    lm = models.load_model(tiny_model).eval()
    theta0 = copy.deepcopy(lm)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lm, theta0


@pytest.fixture(scope="module")
def encoded(tiny_model: str) -> list[dict[str, list[int]]]:
    """Rows of three lengths."""
    template = Template(models.load_tokenizer(tiny_model))
    rows = ("Who?", "Nobody at all."), ("Where does the author live?", "Here."), ("When?", "1993.")
    return [template.encode(Example("answered", *row)) for row in rows]


def inputs_of(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in collate(rows, 0).items() if key != "labels"}


def term(pair: tuple[Any, Any], rows: list[dict[str, list[int]]], positions: str) -> Tensor:
    """(B,) the retain term of rows padded together."""
    objective = o.GradDiff(retain=KL(positions=positions))
    return objective.retain_loss(streams(pair, rows, objective))


def streams(pair: tuple[Any, Any], rows: list[dict[str, list[int]]], objective: Any) -> Streams:
    """Rows padded together, as forget and as retain rows."""
    lm, theta0 = pair
    count = len(rows)
    tensors = {**collate(rows, 0), "weight": torch.full((count,), 1 / count)}
    tensors["row"] = torch.arange(count)

    asked = [lm]

    def run(tensors: dict[str, Tensor]) -> Predictions:
        return forward_answers(asked[-1], tensors)

    @contextmanager
    def at_theta0() -> Iterator[None]:
        asked.append(theta0)
        with torch.no_grad():
            yield
        asked.pop()

    batch = dict.fromkeys(("forget", "retain"), tensors)
    return Streams(batch, run, {}, lm, theta0=at_theta0, logits_of=objective.whole_streams)


def test_batch_is_the_formula_of_the_reference_code(pair: Any, encoded: Any) -> None:
    """Value and gradient; positions of padding are counted there, too."""
    lm, theta0 = pair
    inputs = inputs_of(encoded)
    assert (inputs["attention_mask"] == 0).any()
    expected = reference_kl(lm, theta0, inputs)
    found = term(pair, encoded, "batch").mean()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, list(lm.parameters())) for loss in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def reference_undial(
    model: Any, target_model: Any, inputs: dict[str, Tensor], beta: float
) -> Tensor:
    """``compute_undial_loss`` of the same file."""
    logits, labels = model(**inputs).logits[:, :-1], inputs["labels"][:, 1:]
    with torch.no_grad():
        teacher = target_model(**inputs).logits[:, :-1]
    rows, places = torch.arange(len(labels))[:, None, None], torch.arange(labels.shape[1])[:, None]
    mask = torch.zeros_like(teacher)
    mask[rows, places, labels[..., None]] = 1.0  # -100 counts from the end of the vocabulary
    target = torch.softmax(teacher - beta * mask, -1)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))


@pytest.mark.parametrize("average", ["rows", "tokens"])
def test_undial_is_the_formula_of_the_reference_code(pair: Any, encoded: Any, average: str) -> None:
    """Value and gradient, over all positions; those of answers are the paper's."""
    lm, theta0 = pair
    objective = o.UNDIAL(3.0, positions="batch", retain="none", average=average)
    found = objective(streams(pair, encoded, objective))["loss"]
    expected = reference_undial(lm, theta0, collate(encoded, 0), 3.0)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, list(lm.parameters())) for loss in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    own = o.UNDIAL(3.0, retain="none", average=average)
    assert own(streams(pair, encoded, own))["loss"].item() != pytest.approx(found.item())


def test_only_batch_depends_on_how_rows_are_cut(pair: Any, encoded: Any) -> None:
    for positions in ("answer", "batch"):
        together = term(pair, encoded, positions)
        apart = torch.cat([term(pair, [row], positions) for row in encoded])
        assert torch.allclose(together, apart, rtol=1e-4) is (positions != "batch")


def test_another_name_is_refused() -> None:
    message = r"objective\.retain\.positions: must be 'answer' or 'batch', got 'all'"
    with pytest.raises(WagleError, match=message):
        KL(positions="all")
