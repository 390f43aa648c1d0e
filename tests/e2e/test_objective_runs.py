"""Objectives on the command line: every one runs, and a mistake is one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import moved, weights, write_rows

from wagle_pl import objectives as o
from wagle_pl.core.registry import describe
from wagle_pl.lm.saving import read_record
from wagle_pl.objectives.forget import Objective


class Flat(Objective):
    """The example of the documentation."""

    def forget_loss(self, at):
        return (at["forget"].nll - 5.0) ** 2


@pytest.fixture
def options(tiny_model: str):
    """Command line of two steps of unlearning: options("NPO", beta=0.5, "--trainer.…")."""

    def make(objective: str, *args: Any, **given: Any) -> list[str]:
        model = ["--model", "UnlearnModule", "--model.model", tiny_model, "--model.output", "out"]
        steps = ["--trainer.max_steps", "2", "--optimizer", "MaskedAdamW", "--optimizer.lr", "1e-3"]
        of = [part for name in given for part in (f"--model.objective.{name}", str(given[name]))]
        return ["fit", *model, *steps, "--model.objective", objective, *of, *map(str, args)]

    return make


def changed(tiny_model: str) -> set[str]:
    """Names of the tensors that the run changed; all must be finite."""
    assert all(tensor.isfinite().all() for tensor in weights("out").values())
    return {name for name, bits in moved(tiny_model, "out").items() if bits.any()}


def recorded() -> dict[str, Any]:
    """What the run said of itself."""
    return read_record("out")["lineage"][-1]


OTHERS = ("AltPO", "Answers", "Objective", "PDU", "RMU", "RetainTerm", "Schedule", "Streams")
OBJECTIVES = [name for name in o.__all__ if name not in OTHERS]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs(wagle: Any, options: Any, tiny_model: str, objective: str) -> None:
    wagle(*options(objective))
    assert len(changed(tiny_model)) > 10
    expected = getattr(o, objective)()  # no option of the module's default objective is left over
    assert recorded()["objective"] == {**describe(expected), "retain": describe(expected.retain)}


@pytest.mark.parametrize("retain", ["nll", "KL", "none", "hidden_mse"])
@pytest.mark.parametrize("objective", ["DPO", "CEU", "RMU"])
def test_any_forget_term_goes_with_any_retain_term(
    wagle: Any, options: Any, tiny_model: str, objective: str, retain: str
) -> None:
    given = {"retain": retain, "retain_weight": "linear:0.5->1"}
    if objective == "RMU":
        given["layer"] = 1
    model = ("--model.gradient_checkpointing", "true")
    done = wagle(*options(objective, *model, "--trainer.precision", "bf16-mixed", **given))
    assert changed(tiny_model)
    assert ("train/retain_loss" in done.trainer.logged_metrics) == (retain != "none")


def test_objective_and_mask_and_class_paths(wagle: Any, tiny_model: str) -> None:
    """A user's class, a retain term with arguments, and weights restricted to one module type."""
    retain = {"class_path": "HiddenMSE", "init_args": {"layer": 0}}
    given = {"forget_weight": "cosine:1->0.1", "retain": retain}
    init = {"model": tiny_model, "output": "out", "modules": ["up_proj"]}
    init["objective"] = {"class_path": f"{__name__}.Flat", "init_args": given}
    config = {"model": {"class_path": "UnlearnModule", "init_args": init}}
    Path("run.yaml").write_text(json.dumps({**config, "trainer": {"max_steps": 2}}))
    wagle("fit", "-c", "run.yaml")
    assert changed(tiny_model) == {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)}
    assert recorded()["objective"]["forget_weight"] == "cosine:1->0.1"
    assert recorded()["objective"]["retain"] == {"class": "HiddenMSE", "layer": 0}


def test_rmu_moves_the_matrices_near_its_block_alone(
    wagle: Any, options: Any, tiny_model: str
) -> None:
    done = wagle(*options("RMU", layer=0))
    assert changed(tiny_model) == {"model.layers.0.mlp.down_proj.weight"}
    assert done.model.objective.needs_theta0
    assert "bit-identical" in recorded()["verified"]


def test_altpo_prefers_the_alternates(
    wagle: Any, fails: Any, options: Any, rows: dict[str, str], tiny_model: str
) -> None:
    line = fails(*options("AltPO"))
    assert "has no 'alternate': this objective needs another answer" in line
    forget = [json.loads(row) for row in Path(rows["forget"]).read_text().splitlines()]
    given = write_rows(Path("rows.jsonl"), [{**row, "alternate": "Nobody."} for row in forget])
    done = wagle(*options("AltPO", "--data.forget", given, "--trainer.max_steps 8"))
    assert changed(tiny_model)
    batch = next(iter(done.datamodule.stream_loader("alternate")))["alternate"]
    text = done.model.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert text.strip().endswith("Nobody.")
    assert done.trainer.logged_metrics["train/forget_loss"] < 2 / 0.1 * math.log(2)


def test_mistakes_end_in_one_line(
    fails: Any, options: Any, tmp_path: Path, rows: dict[str, str]
) -> None:
    def message(*args: Any, **given: Any) -> str:
        return fails(*options(*args, **given))

    assert "objective.layer: must be from 0 to 1, the last block of this model, got 7" in message(
        "RMU", layer=7
    )
    assert "matches no parameter" in message("RMU", layer=1, trainable="experts")

    empty, texts = tmp_path / "refusals.txt", tmp_path / "texts.jsonl"
    empty.write_text("\n")
    texts.write_text('{"text": "To be forgotten."}\n')
    assert "has no lines" in message("PO", "--data.refusals", empty)
    no_question = message("PO", "--data.forget", texts)
    assert "row 1: there is no question to refuse" in no_question


@pytest.mark.parametrize("retain", ["KL", "wagle_pl.objectives.retain.KL"])
def test_positions_of_the_retain_term(wagle: Any, fails: Any, options: Any, retain: str) -> None:
    given = {"retain": retain, "retain.positions": "batch"}
    done = wagle(*options("GradDiff", **given, retain_weight=100))
    assert done.trainer.callback_metrics["train/retain_loss"] > 0
    assert recorded()["objective"]["retain"]["positions"] == "batch"
