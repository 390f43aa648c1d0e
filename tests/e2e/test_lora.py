"""LoRA through peft: trains adapters alone, merged or written as a folder; refused with a mask or without peft."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, two_steps, weights, write_model

from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm import models
from wagle_pl.lm.saving import read_record
from wagle_pl.masks import Restriction
from wagle_pl.unlearning import LoRA, UnlearnModule
from wagle_pl.unlearning.export import export

pytest.importorskip("peft")

LORA = "--model.adapter LoRA --model.adapter.r 2"


def arguments(*options: str, model: str, output: str = "out") -> list[str]:
    """A run of two steps with an adapter."""
    return two_steps(LORA, *options, model=model, output=output)


@pytest.fixture
def unlearn(wagle: Any) -> Callable[..., Any]:
    return lambda *options, **places: wagle(*arguments(*options, **places))


def load(folder: str | Path) -> dict[str, torch.Tensor]:
    return dict(models.load_model(str(folder)).named_parameters())


@pytest.mark.parametrize("objective", ["GradDiff", "NPO", "DPO", "KL"])
def test_merged_model_is_base_plus_adapter(unlearn: Any, tiny_model: str, objective: str) -> None:
    cli = unlearn(f"--model.objective {objective}", model=tiny_model)
    base, merged = load(tiny_model), load("out")
    assert base.keys() == merged.keys() and (Path("out") / "config.json").exists()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all("_proj" in name for name in changed)  # no embeddings, norms, output
    for name in changed:
        assert torch.linalg.matrix_rank(merged[name] - base[name], rtol=1e-3) <= 2
    record = read_record("out")["lineage"][-1]
    adapter = record["adapter"]
    assert (adapter["class"], adapter["r"], record["mask"]) == ("LoRA", 2, None)
    assert "LoRA" in Path("out/README.md").read_text()
    assert cli.model.lm.__class__.__name__ == "LlamaForCausalLM"


def test_references_are_those_of_theta0(
    unlearn: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first NPO step starts at the model itself: −(2/β) log σ(0)."""
    losses: list[dict[str, torch.Tensor]] = []
    compute = UnlearnModule.losses
    monkeypatch.setattr(
        UnlearnModule, "losses", lambda self, at: losses.append(compute(self, at)) or losses[-1]
    )
    unlearn("--model.objective NPO", model=tiny_model)
    assert losses[0]["forget_loss"].item() == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)
    assert losses[-1]["forget_loss"] < losses[0]["forget_loss"]


def test_adapter_folder_loads_on_top_of_the_base(wagle: Any, unlearn: Any, tiny_model: str) -> None:
    targets = "--model.adapter.target_modules [q_proj,v_proj]"
    cli = unlearn(targets, "--model.adapter.merge false", model=tiny_model, output="adapter")
    unlearn(targets, model=tiny_model, output="merged")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_model
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert not list(Path("adapter").glob("model*.safetensors"))
    ids = torch.arange(12).view(1, -1)
    adapter, merged = (models.load_model(folder).eval() for folder in ("adapter", "merged"))
    with torch.no_grad():
        expected = cli.model.lm.eval()(ids).logits
        torch.testing.assert_close(adapter(ids).logits, expected)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    test = "test --model EvaluationModule --model.model adapter --model.generate false"
    assert wagle(*test.split()).model.metrics


@pytest.mark.parametrize("restriction", ["mask m", "modules [mlp]", "layers 1"])
def test_with_a_mask_it_is_refused(fails: Any, tiny_model: str, restriction: str) -> None:
    line = fails(*arguments(f"--model.{restriction}", model=tiny_model))
    assert "give --model.adapter or those, not both" in line


def test_bad_options_are_refused(fails: Any, tiny_model: str) -> None:
    options = arguments("--model.adapter.target_modules [no_such_layer]", model=tiny_model)
    assert "no_such_layer" in fails(*options)
    for bad in ({"r": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(WagleError, match=f"adapter.{next(iter(bad))}"):
            LoRA(**bad)


def test_without_peft_it_says_what_to_install(
    fails: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install 'wagle-pl[lora]'" in fails(*arguments(model=tiny_model))


def test_resume_equals_the_uninterrupted_run(unlearn: Any, tiny_model: str) -> None:
    """And what is made of its last checkpoint is what it wrote."""
    longer = "--trainer.max_steps 4 --model.adapter.dropout 0.1"
    keep = "--trainer.enable_checkpointing true --trainer.callbacks ModelCheckpoint" + "".join(
        f" --trainer.callbacks.{option}"
        for option in ("dirpath ckpt", "every_n_train_steps 2", "filename {step}", "save_top_k -1")
    )
    unlearn(longer, keep, model=tiny_model, output="whole")
    resume = "--ckpt_path ckpt/step=2.ckpt --weights_only false"
    unlearn(longer, resume, model=tiny_model, output="resumed")
    whole, resumed = load("whole"), load("resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    export("ckpt/step=4.ckpt", "exported")
    assert difference(weights("whole"), weights("exported")) < 1e-6


def test_a_mask_file_is_not_needed_to_know(tiny_model: str) -> None:
    """Adapters put new parameters into the model: a mask of the plain model is for the plain model."""
    lm = models.load_model(tiny_model)
    mask = Restriction(modules=["mlp"]).mask(parameter_shapes(lm))
    LoRA().add(lm, tiny_model)
    with pytest.raises(WagleError, match="another model"):
        mask.check(parameter_shapes(lm))


@pytest.mark.parametrize("targets", ["all-linear", "[attn.c_proj]"])
def test_a_checkpoint_of_transposed_layers_becomes_the_same_model(
    unlearn: Any, tiny_model: str, targets: str
) -> None:
    """GPT-2 keeps its layers as (in, out); of a square one the shape does not tell."""
    tokenizer = models.load_tokenizer(tiny_model)
    write_model("GPT2", "gpt2", tokenizer, n_embd=32, n_layer=2, n_head=4)
    unlearn(
        f"--model.adapter.target_modules {targets}",
        "--trainer.enable_checkpointing true --trainer.callbacks ModelCheckpoint",
        "--trainer.callbacks.dirpath checkpoints",
        model="gpt2",
    )
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    export(checkpoint, "exported")
    base, merged, exported = load("gpt2"), load("out"), load("exported")
    assert any(not torch.equal(base[name], merged[name]) for name in base)
    for name in merged:
        torch.testing.assert_close(exported[name], merged[name])
