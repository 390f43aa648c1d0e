"""One module used several times: tested before it is trained, and never trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import lightning as L
import pytest
import torch
from helpers import same_bits
from safetensors.torch import load_file

from wagle_pl import (
    AttributionModule,
    Evaluate,
    FinetuneModule,
    ForgetRetainDataModule,
    LoRA,
    UnlearnModule,
    WeightMask,
)
from wagle_pl import objectives as o
from wagle_pl.attribution import Score
from wagle_pl.attribution.hessian import GaussNewton
from wagle_pl.attribution.scores import Wagle
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm import models
from wagle_pl.lm.saving import read_record
from wagle_pl.masks import Restriction
from wagle_pl.unlearning import MaskedAdamW

OBJECTIVES = {
    "KL": lambda: o.KL(),
    "RMU": lambda: o.RMU(layer=1),
    "UNDIAL": lambda: o.UNDIAL(),
    "NPO": lambda: o.NPO(),
    "DPO": lambda: o.DPO(retain="kl"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trainer(**options: Any) -> L.Trainer:
    """For two epochs, with short tests."""
    options = {"callbacks": Evaluate(generate=False), "max_epochs": 2, **options}
    return helpers.trainer(**options)


@pytest.fixture
def data(rows: dict[str, str], tiny_model: str) -> Any:
    """Makes the data module."""
    sets = {"forget": rows["forget"], "retain": rows["retain"], "val": ["forget"]}
    test = {"forget": rows["forget_test"]}
    return lambda: ForgetRetainDataModule(tokenizer=tiny_model, **sets, test=test)


def module(model: str, output: str, objective: Any, **options: Any) -> UnlearnModule:
    made = UnlearnModule(model=model, output=output, objective=objective, **options)
    made.make_optimizer = lambda parameters: MaskedAdamW(parameters, lr=1e-3)
    return made


@pytest.mark.parametrize(
    ("name", "first"), [*((name, "test") for name in OBJECTIVES), ("DPO", "validate")]
)
def test_a_look_before_the_run_changes_nothing(
    tiny_model: str, data: Any, name: str, first: str
) -> None:
    mask = None if name == "RMU" else mask_of(tiny_model)
    for output in ("plain", "looked"):
        unlearn = module(tiny_model, output, OBJECTIVES[name](), mask=mask)
        if output == "looked":
            getattr(trainer(), first)(unlearn, data(), verbose=False)
        trainer().fit(unlearn, data())
    assert same_bits("plain", "looked") and not same_bits("plain", tiny_model)
    plain, looked = (read_record(name)["lineage"][-1]["steps"] for name in ("plain", "looked"))
    assert plain == looked


def mask_of(model: str) -> str:
    shapes = parameter_shapes(models.load_model(model))
    return str(Restriction(modules=["mlp"]).mask(shapes).save("mask"))


def test_a_look_before_the_run_with_an_adapter(tiny_model: str, data: Any) -> None:
    pytest.importorskip("peft")
    unlearn = module(tiny_model, "looked", o.KL(), adapter=LoRA(merge=True))
    trainer().test(unlearn, data(), verbose=False)
    trainer().fit(unlearn, data())
    names = (set(load_file(f"{folder}/model.safetensors")) for folder in ("looked", tiny_model))
    assert len(set(map(frozenset, names))) == 1


@pytest.mark.parametrize("kind", ["unlearn", "finetune"])
def test_a_second_run_is_refused(tiny_model: str, data: Any, kind: str) -> None:
    """Its weights are no longer those of the model it names: θ₀ and the lineage would be wrong."""
    fine = FinetuneModule(model=tiny_model, output="out")
    made = module(tiny_model, "out", o.KL()) if kind == "unlearn" else fine
    trainer().fit(made, data())
    before = load_file("out/model.safetensors")
    made.output = "second"
    again = r"trained already, .*: to train again, make a new one"
    with pytest.raises(WagleError, match=again) as raised:
        trainer().fit(made, data())
    assert "\n" not in str(raised.value) and not Path("second").exists()
    trainer().test(made, data(), verbose=False)  # what it has become may be tested
    assert json.loads(Path("out/wagle.json").read_text())["lineage"][-1]["base"] == tiny_model
    assert all(torch.equal(before[n], p) for n, p in made.lm.state_dict().items() if n in before)


def test_a_run_after_a_test_of_a_checkpoint_starts_at_theta0(tiny_model: str, data: Any) -> None:
    """The tested weights, references and random numbers are not those of the model that the run is to start from."""
    keep = L.pytorch.callbacks.ModelCheckpoint("ckpt")
    trainer(enable_checkpointing=True, callbacks=[keep]).fit(
        module(tiny_model, "plain", o.DPO(retain="kl")), data()
    )
    (checkpoint,) = Path("ckpt").glob("*.ckpt")
    looked = module(tiny_model, "looked", o.DPO(retain="kl"))
    trainer().test(looked, data(), ckpt_path=str(checkpoint), verbose=False)
    trainer().fit(looked, data())
    assert same_bits("plain", "looked")


def test_objects_give_the_masks_of_names(tiny_model: str, data: Any) -> None:
    found = []
    for score, hessian, samples in (
        ("wagle", "gauss_newton", 2),
        (Wagle(), GaussNewton(samples=2), 1),
    ):
        options = {"score": score, "hessian": hessian, "hessian_samples": samples}
        made = AttributionModule(model=tiny_model, output=None, **options)
        trainer().fit(made, data())
        found.append(made.mask)
        assert made.mask.metadata["hessian_samples"] == 2
    assert found[0] == found[1]


@pytest.mark.parametrize("score", [Score(), "wagle_pl.attribution.scores.Score"])
def test_an_abstract_score_is_refused_in_a_line(tiny_model: str, data: Any, score: Any) -> None:
    with pytest.raises(WagleError, match=r"^score: Score must override __call__$"):
        trainer().fit(AttributionModule(model=tiny_model, score=score), data())


def test_attribution_twice_gives_the_same_mask(tiny_model: str, data: Any) -> None:
    made = AttributionModule(model=tiny_model, output="first", save_scores="fp32")
    for output in ("first", "second"):
        made.output = output
        trainer(max_epochs=1).fit(made, data())
    assert WeightMask.load("first") == WeightMask.load("second")
