"""θ₀ without a second model: cached sums and the frozen copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_bools, words
from safetensors.torch import load_file
from torch import Tensor

from wagle_pl import WeightMask
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.data.batches import Draw
from wagle_pl.lm import models
from wagle_pl.lm.inference import Predictions, answer_places, sequence_logprobs
from wagle_pl.unlearning import UnlearnModule

OPTIONS = "--data.batch_size 4 --trainer.max_epochs 2 --optimizer MaskedAdamW --optimizer.lr 1e-3"
RETAIN_KL = "--model.objective.retain kl"


class SecondModelModule(UnlearnModule):
    """Keeps a second whole model and computes the references anew in each step, as others do."""

    def on_fit_start(self) -> None:
        self.second = [models.load_model(self.model_name).eval()]

    def losses(self, at):
        for stream in self.objective.references:
            batch = at.batch[stream]
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                logits = self.second[0](**inputs).logits.flatten(0, 1)
            predicted = Predictions(logits).at(answer_places(batch["labels"]))
            at[stream].reference = sequence_logprobs(predicted, batch["labels"])[0]
        return self.objective(at)


@pytest.fixture
def arguments(tiny_model: str):
    """Command line that unlearns the tiny model for six steps."""

    def make(output: str, *args: Any, module: str = "UnlearnModule") -> list[str]:
        model = ("--model", module, "--model.model", tiny_model, "--model.output", output)
        return ["fit", *words(*model, OPTIONS, *args)]

    return make


@pytest.fixture
def unlearn(wagle: Any, arguments: Any):
    """Unlearn the tiny model; returns (weights, CLI object)."""

    def run(output: str, *args: Any, **options: Any) -> tuple[dict[str, Tensor], Any]:
        done = wagle(*arguments(output, *args, **options))
        return load_file(Path(output) / "model.safetensors"), done

    return run


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference, in units of the tensor's largest weight."""
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in b)


@pytest.mark.parametrize("objective", ["NPO", "DPO"])
def test_the_cache_equals_a_second_model(unlearn: Any, tiny_model: str, objective: str) -> None:
    options = ("--model.objective", objective)
    cached, done = unlearn("cached", *options)
    second, _ = unlearn("second", *options, module=f"{__name__}.SecondModelModule")
    assert done.model.global_step == 6
    assert distance(cached, load_file(Path(tiny_model) / "model.safetensors")) > 1e-3
    assert distance(cached, second) < 1e-5
    assert done.model._references.sums.keys() == set(done.model.objective.references)


def test_the_same_weights_with_another_configuration_are_another_model(
    unlearn: Any, arguments: Any, fails: Any, tiny_model: str, tmp_path: Path
) -> None:
    shapes, lm = parameter_shapes(models.load_model(tiny_model)), models.load_model(tiny_model)
    made_for = {"model": tiny_model, "model_fingerprint": fingerprint(lm)}
    WeightMask.from_bools(random_bools(shapes, 0.5), made_for).save("mask")
    _, first = unlearn("first", "--model.mask", "mask")
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 1e-2}
    (folder / "config.json").write_text(json.dumps(config))
    _, other = unlearn("other", "--model.model", folder)
    sums, other_sums = (done.model._references.sums["forget"] for done in (first, other))
    assert (sums - other_sums).abs().max() > 0.01
    batch = next(iter(other.datamodule.stream_loader("forget", 11)))["forget"]
    logits = models.load_model(str(folder))(batch["input_ids"], batch["attention_mask"]).logits
    predicted = Predictions(logits.flatten(0, 1)).at(answer_places(batch["labels"]))
    expected, _ = sequence_logprobs(predicted, batch["labels"])
    assert torch.allclose(other_sums[batch["row"]], expected, atol=1e-5)
    message = fails(*arguments("no", "--model.model", folder, "--model.mask", "mask"))
    assert "mask mask was made for the model" in message and "other configuration" in message


@pytest.mark.parametrize(
    "options",
    [
        ("DPO",),
        ("UNDIAL",),
        ("KL", RETAIN_KL, "--model.objective.forget_weight", "linear:0->1"),
        ("RandomLabel",),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one(
    unlearn: Any, arguments: Any, fails: Any, options: tuple
) -> None:
    options = ("--model.objective", *options)
    saving = {"every_n_train_steps": 1, "save_top_k": -1, "dirpath": "checkpoints"}
    save = [part for name in saving for part in (f"--trainer.callbacks.{name}", saving[name])]
    whole, _ = unlearn("whole", *options, "--trainer.callbacks", "ModelCheckpoint", *save)
    for step in (3, 4):  # at the end of an epoch, and within one
        checkpoint = next(Path("checkpoints").glob(f"*step={step}.ckpt"))
        resumed, _ = unlearn(f"resumed{step}", *options, "--ckpt_path", checkpoint)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    if "DPO" in options:
        resume = ("no", "--ckpt_path", checkpoint, "--model.objective")
        message = fails(*arguments(*resume, "DPO", "--data.limit_forget", "10"))
        assert "checkpoint's run had 11 forget rows, this one has 10" in message


@pytest.mark.parametrize(("objective", "same"), [("DPO", True), ("PO", False)])
def test_refusals_of_dpo_stay_and_those_of_po_change(
    unlearn: Any, objective: str, same: bool
) -> None:
    """One number per row at θ₀ can only be known if its refusal is the same in every epoch."""
    _, done = unlearn("out", "--model.objective", objective)
    rows = {"forget": [(row, 1.0, 0) for row in range(11)]}
    batches = [done.datamodule.build(["refusal"], Draw(epoch, rows)) for epoch in (0, 1)]
    first, later = (batch["refusal"]["input_ids"] for batch in batches)
    assert torch.equal(first, later) == same
