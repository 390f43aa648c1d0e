"""Objectives on the command line: every one runs, and a mistake is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from wagle_pl.core.registry import describe
from wagle_pl.lm.saving import read_record
from wagle_pl.objectives import forget as o
from wagle_pl.objectives.forget import Objective


class Flat(Objective):
    """The example of the documentation."""

    def forget_loss(self, at):
        return (at["forget"].nll - 5.0) ** 2


def unlearn(tiny_model: str, *args: Any) -> list[str]:
    """Two steps of unlearning."""
    model = ["--model", "UnlearnModule", "--model.model", tiny_model, "--model.output", "out"]
    steps = ["--trainer.max_steps", "2", "--optimizer", "MaskedAdamW", "--optimizer.lr", "1e-3"]
    return ["fit", *model, *steps, *map(str, args)]


def moved(tiny_model: str) -> set[str]:
    """Names of the tensors that the run changed; all must be finite."""
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (tiny_model, "out")
    )
    assert all(tensor.isfinite().all() for tensor in after.values())
    return {name for name in before if not torch.equal(before[name], after[name])}


OBJECTIVES = [name for name in o.__all__ if name not in ("Answers", "Objective", "Streams", "RMU")]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs(wagle: Any, tiny_model: str, objective: str) -> None:
    wagle(*unlearn(tiny_model, "--model.objective", objective))
    assert len(moved(tiny_model)) > 10
    last = json.loads(Path("out/wagle.json").read_text())["lineage"][-1]
    expected = getattr(o, objective)()  # no option of the module's default objective is left over
    assert last["objective"] == {**describe(expected), "retain": describe(expected.retain)}


@pytest.mark.parametrize("retain", ["nll", "KL", "none", "hidden_mse"])
@pytest.mark.parametrize("objective", ["DPO", "CEU", "RMU"])
def test_any_forget_term_goes_with_any_retain_term(
    wagle: Any, tiny_model: str, objective: str, retain: str
) -> None:
    options = ["--model.objective", objective, "--model.objective.retain", retain]
    options += [
        "--model.objective.retain_weight",
        "linear:0.5->1",
        "--model.reference_logits",
        "top_k",
    ]
    options += ["--model.objective.layer", "1"] if objective == "RMU" else []
    done = wagle(
        *unlearn(
            tiny_model,
            *options,
            "--model.gradient_checkpointing",
            "true",
            "--trainer.precision",
            "bf16-mixed",
        )
    )
    assert moved(tiny_model)
    assert ("train/retain_loss" in done.trainer.logged_metrics) == (retain != "none")


def test_objective_and_mask_and_class_paths(wagle: Any, tiny_model: str) -> None:
    """A user's class, a retain term with arguments, and weights restricted to one module type."""
    config = f"""
model:
  class_path: UnlearnModule
  init_args:
    model: {tiny_model}
    output: out
    modules: [up_proj]
    objective:
      class_path: {__name__}.Flat
      init_args:
        forget_weight: cosine:1->0.1
        retain:
          class_path: HiddenMSE
          init_args:
            layer: 0
trainer:
  max_steps: 2
"""
    Path("run.yaml").write_text(config)
    wagle("fit", "-c", "run.yaml")
    assert moved(tiny_model) == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)}
    last = json.loads(Path("out/wagle.json").read_text())["lineage"][-1]["objective"]
    assert last["forget_weight"] == "cosine:1->0.1" and last["retain"] == {
        "class": "HiddenMSE",
        "layer": 0,
    }


def test_rmu_moves_the_matrices_near_its_block_alone(wagle: Any, tiny_model: str) -> None:
    done = wagle(*unlearn(tiny_model, "--model.objective", "RMU", "--model.objective.layer", "0"))
    assert moved(tiny_model) == {"model.layers.0.mlp.down_proj.weight"}
    assert done.model._needs_theta0
    assert (
        "bit-identical" in json.loads(Path("out/wagle.json").read_text())["lineage"][-1]["verified"]
    )


def test_mistakes_end_in_one_line(
    fails: Any, tiny_model: str, tmp_path: Path, rows: dict[str, str]
) -> None:
    def message(*args: Any, **options: Any) -> str:
        return fails(*unlearn(tiny_model, *args), **options)

    assert "objective.beta must be above 0, got -1.0" in message(
        "--model.objective", "NPO", "--model.objective.beta", "-1"
    )
    rmu = ("--model.objective", "RMU", "--model.objective.layer")
    assert "objective.layer must be from 0 to 1, the last block of this model; got 7" in message(
        *rmu, "7"
    )
    assert "matches no parameter" in message(*rmu, "1", "--model.objective.trainable", "experts")
    unknown = message("--model.objective", "npoo")
    assert (
        "unknown objective 'npoo'; choose one of CEU, DPO, FineTune" in unknown and "WGA" in unknown
    )
    assert "choose one of HiddenMSE, KL, NLL, NONE" in message(
        "--model.objective", "NPO", "--model.objective.retain", "x"
    )
    assert "model.top_k must be at least 1" in message("--model.top_k", "0")
    assert "neither a number nor a schedule" in message(
        "--model.objective", "PO", "--model.objective.retain_weight", "up"
    )

    empty = tmp_path / "refusals.txt"
    empty.write_text("\n")
    assert "has no lines" in message("--model.objective", "PO", "--data.refusals", empty)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "To be forgotten."}\n')
    assert "row 1: there is no question to refuse" in message(
        "--model.objective", "PO", "--data.forget", texts
    )
    no_retain = ["--data", "ForgetRetainDataModule", "--data.forget", rows["forget"]]
    assert "this run needs retain rows: give --data.retain" in message(*no_retain, data=False)


UNLEARN = (
    "fit",
    "--model",
    "UnlearnModule",
    "--model.objective",
    "GradDiff",
    "--trainer.max_steps",
    "2",
)


@pytest.mark.parametrize("positions", ["row", "batch"])
def test_positions_of_the_retain_term(
    wagle: Any, fails: Any, tiny_model: str, positions: str
) -> None:
    retain = {"row": "KL", "batch": "wagle_pl.objectives.retain.KL"}[positions]
    options = (
        *UNLEARN,
        "--model.objective.retain",
        retain,
        "--model.objective.retain.positions",
        positions,
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
    )
    line = fails(*options, "--model.reference_logits", "top_k")
    assert "reference_logits top_k keeps predictions of answer tokens only" in line
    done = wagle(*options, "--model.objective.retain_weight", "100")
    assert done.trainer.callback_metrics["train/retain_loss"] > 0
    assert read_record("out")["lineage"][-1]["objective"]["retain"]["positions"] == positions
