"""However a fit ends, the model is whole, and what it was but for the weights that were to move."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import random_bools, trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from wagle_pl import AttributionModule, ForgetRetainDataModule, WagleError
from wagle_pl.masks import WeightMask
from wagle_pl.masks.selected import SelectedWeights
from wagle_pl.unlearning import FinetuneModule, LoRA, UnlearnModule

FROZEN = "model.layers.0.mlp.up_proj.weight"


class End(L.Callback):
    """Ends a run after two steps."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step < 2:
            return
        if self.how == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.how == "KeyboardInterrupt":
            raise KeyboardInterrupt
        elif self.how == "error":
            raise ValueError("of a callback")
        trainer.should_stop = True


RAISES = {
    "error": ValueError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "SIGINT": KeyboardInterrupt,
}


def given(tiny_model: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model with a frozen tensor, a module in evaluation mode, a cache, and a hook."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).train()
    lm.get_parameter(FROZEN).requires_grad_(False)
    lm.model.norm.eval()
    lm.config.use_cache = True
    lm.model.layers[0].register_forward_hook(lambda *_: None)
    return lm


def seen(lm: PreTrainedModel) -> Any:
    """All that a run could leave changed."""
    tensors = [*lm.named_parameters(), *lm.named_buffers()]
    about = [(n, id(t), t.shape, t.dtype, t.device, t.requires_grad) for n, t in tensors]
    modules = [
        (name, type(module), module.training, sorted(vars(module)), hooks_of(module))
        for name, module in lm.named_modules()
    ]
    return about, modules, lm.config.use_cache, lm.is_gradient_checkpointing


def hooks_of(module: torch.nn.Module) -> list[int]:
    return [len(value) for name, value in vars(module).items() if name.endswith("_hooks")]


def check_same(now: Any, before: Any) -> None:
    for left, right in zip(now[:2], before[:2], strict=True):
        assert [one for one, other in zip(left, right, strict=True) if one != other] == []
    assert now == before


def weights(lm: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in lm.state_dict().items()}


def fit(module: Any, rows: dict[str, str], how: str, precision: str) -> None:
    data = ForgetRetainDataModule(
        forget=rows["forget"], retain=rows["retain"], batch_size=3, tokenizer=module.model_name
    )
    run = trainer(max_epochs=4, callbacks=[End(how)], precision=precision)
    if how == "normal":
        run.fit(module, datamodule=data)
        return
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RAISES[how]):
        run.fit(module, datamodule=data)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("how", ["normal", *RAISES])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["masked", "dense", "finetuned"])
def test_a_given_model_comes_back(
    kind: str,
    dtype: torch.dtype,
    precision: str,
    how: str,
    tiny_model: str,
    rows: dict[str, str],
    tmp_path: Path,
) -> None:
    """With the values reached; frozen weights keep the bits they had, also of a wider dtype."""
    lm = given(tiny_model, dtype)
    before, start = seen(lm), weights(lm)
    bools = random_bools({name: p.shape for name, p in lm.named_parameters()})
    options: dict[str, Any] = {"warmup": 0, "lr": 0.01, "gradient_checkpointing": True}
    if kind != "finetuned":
        options["mask"] = WeightMask.from_bools(bools) if kind == "masked" else None
        options["objective"] = "GradDiff"
    module = (FinetuneModule if kind == "finetuned" else UnlearnModule)(lm, **options)
    fit(module, rows, how, precision)
    assert module.lm is lm
    check_same(seen(lm), before)
    for name, tensor in weights(lm).items():
        moved = tensor != start[name]
        may = (bools[name] if kind == "masked" and name in bools else torch.tensor(True)) & (
            name != FROZEN
        )
        assert not (moved & ~may).any(), name
        assert moved.any() == bool(may.any()), name
    lm.save_pretrained(tmp_path)
    again = weights(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(lm).items())


@pytest.mark.parametrize("how", ["normal", *RAISES])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_attribution_gives_the_model_back(
    how: str, precision: str, tiny_model: str, rows: dict[str, str]
) -> None:
    lm = given(tiny_model, torch.float32)
    before, start = seen(lm), weights(lm)
    module = AttributionModule(lm, hessian="fisher", gradient_checkpointing=True)
    fit(module, rows, how, precision)
    check_same(seen(lm), before)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(lm).items())


@pytest.mark.parametrize("how", ["normal", "KeyboardInterrupt"])
def test_an_adapter_is_merged(how: str, tiny_model: str, rows: dict[str, str]) -> None:
    pytest.importorskip("peft")
    lm = given(tiny_model, torch.float32)
    names, start = [name for name, _ in lm.named_parameters()], weights(lm)
    module = UnlearnModule(lm, adapter=LoRA(), objective="GradDiff", lr=0.01, warmup=0)
    fit(module, rows, how, "32-true")
    assert [name for name, _ in lm.named_parameters()] == names
    assert any((tensor != start[name]).any() for name, tensor in weights(lm).items())


def test_an_error_while_weights_are_selected(
    tiny_model: str, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = given(tiny_model, torch.float32)
    before, start = seen(lm), weights(lm)
    mask = WeightMask.from_bools(random_bools({n: p.shape for n, p in lm.named_parameters()}))
    module, packed, left = UnlearnModule(lm, mask=mask), WeightMask.packed, iter(range(7))

    def fails(self: WeightMask, name: str) -> Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return packed(self, name)

    select = SelectedWeights.__init__

    def selecting(self: Any, *args: Any, **options: Any) -> None:
        monkeypatch.setattr(WeightMask, "packed", fails)
        select(self, *args, **options)

    monkeypatch.setattr(SelectedWeights, "__init__", selecting)
    fit(module, rows, "KeyboardInterrupt", "32-true")
    check_same(seen(lm), before)
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(lm).items())


def test_a_mask_of_frozen_weights_alone_is_refused(tiny_model: str, rows: dict[str, str]) -> None:
    lm = given(tiny_model, torch.float32)
    bools = {n: torch.full(p.shape, n == FROZEN) for n, p in lm.named_parameters()}
    module = UnlearnModule(lm, mask=WeightMask.from_bools(bools))
    data = ForgetRetainDataModule(forget=rows["forget"], retain=rows["retain"])
    with pytest.raises(WagleError, match="selects nothing"):
        trainer(max_steps=1).fit(module, datamodule=data)
    assert not lm.get_parameter(FROZEN).requires_grad


# -- what Lightning offers beside fit and test --------------------------------------------------------


@pytest.fixture
def data(rows: dict[str, str]) -> ForgetRetainDataModule:
    return ForgetRetainDataModule(forget=rows["forget"], retain=rows["retain"], batch_size=3)


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
@pytest.mark.parametrize("kind", [UnlearnModule, AttributionModule])
def test_finders_are_refused(kind: Any, finder: Any, tiny_model: str, data: Any) -> None:
    with pytest.raises(WagleError, match=rf"trainer.callbacks: {finder.__name__} trains, tests"):
        trainer(callbacks=[finder()]).fit(kind(tiny_model), datamodule=data)


def test_there_is_no_prediction(tiny_model: str, data: Any) -> None:
    with pytest.raises(WagleError, match=r"predict has no answers to give; use trainer\.test"):
        trainer().predict(UnlearnModule(tiny_model), datamodule=data)


@pytest.mark.parametrize("masked", [True, False])
def test_a_checkpoint_of_a_run_on_objects(
    masked: bool, tiny_model: str, data: Any, tmp_path: Path
) -> None:
    """A model's name is enough; a mask has to be given again."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    bools = random_bools({name: p.shape for name, p in lm.named_parameters()})
    mask = WeightMask.from_bools(bools) if masked else None
    module = UnlearnModule(lm, objective="GradDiff", mask=mask, lr=0.01)
    run = trainer(max_steps=2, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(module, datamodule=data)
    path = run.checkpoint_callback.best_model_path
    assert not any("_given" in name for name in torch.load(path, weights_only=False)["state_dict"])
    load = partial(UnlearnModule.load_from_checkpoint, path, weights_only=False)
    if masked:
        with pytest.raises(WagleError, match="another mask: give that mask to load_from_check"):
            load()
    loaded = weights((load(mask=mask) if masked else load()).lm)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(lm).items())
