"""Mistakes that are found before the work they would spoil."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from wagle_pl import Objective
from wagle_pl import objectives as o
from wagle_pl.core.errors import WagleError
from wagle_pl.unlearning import UnlearnModule
from wagle_pl.unlearning import unlearn as unlearn_module

UNLEARN = "fit --model UnlearnModule --trainer.max_steps 2 --model.output"


class Scalar(o.NPO):
    """Averages over the rows itself."""

    def forget_loss(self, at):
        return super().forget_loss(at).mean()


class PerToken(o.NPO):
    """Forgets to average over the tokens of a row."""

    def forget_loss(self, at):
        return -at["forget"].token_logprobs


class NoTensor(Objective):
    """Gives a number of Python's."""

    def forget_loss(self, at):
        return 1.0


class Whole(Objective):
    """Overrides the whole and leaves the rows apart."""

    def forget_loss(self, at):
        return at["forget"].nll

    def __call__(self, at):
        return {"loss": self.forget_loss(at)}


class Draws(o.GradDiff):
    """Draws random numbers and takes a gradient of its own, as it may."""

    def forget_loss(self, at):
        (gradient,) = torch.autograd.grad(
            at["forget"].nll.sum(), at["forget"].predicted.states, retain_graph=True
        )
        return (at["forget"].nll - torch.rand(1)) ** 2 + 0 * gradient.sum()


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "Scalar": r"forget term: must be one number for each of 2 rows, shape \(2,\), got .*\(\)",
        "PerToken": r"forget term: must be one number for each of 2 rows, .* got shape \(2, ",
        "NoTensor": r"forget term: must be a tensor, .* got float",
        "Whole": r"loss must be a scalar, got shape \(2,\)",
    }.items(),
)
def test_an_objective_of_another_shape_is_refused(
    fails: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    """Before the pass at θ₀, which takes as long as a part of the run."""
    passes: list[str] = []
    prepare = unlearn_module.References.prepare

    def counted(*args: Any) -> Any:
        passes.append("pass")
        return prepare(*args)

    monkeypatch.setattr(unlearn_module.References, "prepare", counted)
    model = f"--model.model {tiny_model} --model.objective test_before_work.{name}"
    assert re.search(f"objective {name}(,|:) {said}", fails(f"{UNLEARN} out {model}"))
    assert not passes and not Path("out").exists()


@pytest.mark.parametrize("objective", ["DPO", "UNDIAL", "RMU", "RandomLabel"])
def test_the_trial_changes_no_bit(
    wagle: Any, dropping_model: str, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """A run with the trial equals one without, dropout included."""
    optimizer = "--optimizer MaskedAdamW --optimizer.lr 1e-3"
    own = "layer 1" if objective == "RMU" else "retain KL"
    options = (
        f"--model.model {dropping_model} --model.objective {objective} --model.objective.{own}",
        optimizer,
    )
    first = wagle(f"{UNLEARN} tried", *options)
    monkeypatch.setattr(UnlearnModule, "_try_objective", lambda self: None)
    second = wagle(f"{UNLEARN} untried", *options)
    for a, b in zip(first.model.lm.parameters(), second.model.lm.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_objective_that_draws_and_differentiates(wagle: Any, tiny_model: str) -> None:
    draws = "--model.objective test_before_work.Draws"
    wagle(f"{UNLEARN} out --model.model {tiny_model} {draws}")
    assert Path("out/model.safetensors").exists()


def test_a_wrong_shape_is_noticed_in_any_step() -> None:
    batch = {"forget": {"weight": torch.full((3,), 1 / 3)}}
    at = o.Streams(batch, lambda tensors: None, {})
    with pytest.raises(
        WagleError, match=r"one number for each of 3 rows, shape \(3,\), got shape \(3, 1\)"
    ):
        at.mean("forget", torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model.warmup", "-3"),
        ("model.warmup", ".nan"),
        ("trainer.gradient_clip_val", "-1"),
        ("trainer.gradient_clip_val", ".nan"),
    ],
)
@pytest.mark.parametrize("kind", ["FinetuneModule", "UnlearnModule"])
def test_negative_options_are_refused(
    fails: Any, tiny_model: str, option: str, value: str, kind: str
) -> None:
    run = f"fit --model {kind} --trainer.max_steps 2 --model.output out --model.model {tiny_model}"
    line = fails(run, f"--{option} {value}")
    must = rf"{option}: must be (0 or more|a number), got {value.removeprefix('.')}"
    assert re.search(must, line) and not Path("out").exists()
