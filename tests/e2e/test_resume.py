"""Invariant 5: kill a run anywhere, resume from its last checkpoint, and the result has the same bits."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits, trapped
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from wagle_pl.core.errors import WagleError
from wagle_pl.unlearning import FinetuneModule
from wagle_pl.unlearning.export import export


class KillAt(Callback):
    """Stops the process's run after a number of batches, as a power cut would."""

    batches = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if type(self).batches == 0:
            raise KeyboardInterrupt
        type(self).batches -= 1


class SaveAt(Callback):
    """Writes a checkpoint after a number of batches, wherever in a step that is, and then stops the run."""

    batches = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        type(self).batches -= 1
        if type(self).batches == 0:
            trainer.save_checkpoint("middle.ckpt")
            raise KeyboardInterrupt


def arguments(kind, model, accumulate):
    module = {
        "finetune": ("FinetuneModule",),
        "npo": ("UnlearnModule", "--model.objective", "NPO", "--model.mask", "mask.safetensors"),
        "po": ("UnlearnModule", "--model.objective", "PO"),
    }[kind]
    often = (
        "--trainer.callbacks.every_n_train_steps",
        "1",
        "--trainer.callbacks.save_last",
        "true",
    )
    return (
        "fit",
        "--model",
        *module,
        "--model.model",
        model,
        "--optimizer",
        "MaskedAdamW",
        "--optimizer.lr",
        "1e-3",
        "--optimizer.weight_decay",
        "0.1",
        "--data.batch_size",
        "3",
        "--trainer.max_epochs",
        "3",
        "--trainer.accumulate_grad_batches",
        accumulate,
        "--trainer.callbacks",
        "ModelCheckpoint",
        *often,
    )


@pytest.mark.parametrize(
    ("kind", "accumulate", "killed_after"),
    [("finetune", 1, 3), ("npo", 1, 1), ("npo", 1, 4), ("npo", 1, 9), ("npo", 2, 5), ("po", 1, 6)],
)
def test_a_killed_run_continues_to_the_same_bits(
    wagle, tiny_model, tmp_path, kind, accumulate, killed_after
):
    if kind == "npo":
        attribute = ("fit", "--model", "AttributionModule", "--trainer.max_epochs", "1")
        wagle(
            *attribute,
            "--model.model",
            tiny_model,
            "--model.output",
            "mask",
            "--model.density",
            "0.4",
        )
    args = arguments(kind, tiny_model, accumulate)
    folder = ("--trainer.callbacks.dirpath",)
    wagle(*args, "--model.output", "whole", *folder, "whole_ckpt")
    KillAt.batches = killed_after
    kill = ("--trainer.callbacks+=test_resume.KillAt",)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        wagle(*args, "--model.output", "resumed", *folder, "ckpt", *kill)
    assert not (tmp_path / "resumed").exists()
    last = tmp_path / "ckpt/last.ckpt"
    assert 0 < torch.load(last, weights_only=False)["global_step"] <= killed_after
    wagle(*args, "--model.output", "resumed", *folder, "ckpt", "--ckpt_path", last)
    assert same_bits("whole", "resumed")


def short(model, accumulate):
    """NPO for two epochs, on a model with dropout."""
    args = arguments("npo", model, accumulate)
    args = (
        *args[: args.index("--trainer.callbacks")],
        "--model.mask",
        "null",
        "--trainer.max_epochs",
        "2",
    )
    return (
        *args,
        "--data.batch_size",
        3 if accumulate < 4 else 2,
        "--trainer.enable_checkpointing",
        "false",
    )


def test_what_an_earlier_run_computed_changes_no_random_number(wagle, dropping_model):
    """The second run finds the log-probabilities at θ₀ that the first had to compute."""
    args = short(dropping_model, 1)
    wagle(*args, "--model.output", "first")
    wagle(*args, "--model.output", "second")
    assert same_bits("first", "second")


@pytest.mark.parametrize(
    ("accumulate", "saved_after"), [(1, 2), (1, 5), (2, 1), (2, 5), (2, 8), (4, 3), (4, 7)]
)  # an epoch has four micro-batches, or eight in steps of four
def test_a_checkpoint_at_any_batch_continues_to_the_same_bits(
    wagle, dropping_model, accumulate, saved_after
):
    """With dropout, and in the middle of a step too, which is then made anew."""
    args = short(dropping_model, accumulate)
    wagle(*args, "--model.output", "whole")
    SaveAt.batches = saved_after
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        wagle(*args, "--model.output", "resumed", "--trainer.callbacks", "test_resume.SaveAt")
    wagle(*args, "--model.output", "resumed", "--ckpt_path", "middle.ckpt")
    assert same_bits("whole", "resumed")


ADAPTER = ("--model.adapter", "LoRA", "--model.adapter.r", "2")


@pytest.mark.parametrize("kind", ["finetune", "npo", "adapter"])
def test_load_from_checkpoint(wagle, tiny_model, rows, kind):
    """The module as Lightning gives it back has the weights that the run wrote, answers, and can be tested."""
    import lightning as L

    from wagle_pl import FinetuneModule, LoRA, UnlearnModule
    from wagle_pl.core.errors import WagleError
    from wagle_pl.data import ForgetRetainDataModule
    from wagle_pl.evaluation import Evaluate

    if kind == "npo":
        wagle(
            "fit",
            "--model",
            "AttributionModule",
            "--model.model",
            tiny_model,
            "--model.output",
            "mask",
        )
    args = (
        arguments("po", tiny_model, 1) + ADAPTER
        if kind == "adapter"
        else arguments(kind, tiny_model, 1)
    )
    wagle(*args, "--model.output", "out", "--trainer.callbacks.dirpath", "ckpt")
    cls = FinetuneModule if kind == "finetune" else UnlearnModule
    options = {"adapter": LoRA(r=2)} if kind == "adapter" else {}
    module = cls.load_from_checkpoint("ckpt/last.ckpt", **options)
    assert module.model_name == tiny_model
    if kind != "adapter":
        written, here = load_file("out/model.safetensors"), dict(module.lm.named_parameters())
        assert all(torch.equal(written[name], here[name]) for name in here)
    ids = module.tokenizer("Who?", return_tensors="pt").input_ids
    assert module.lm.generate(ids, max_new_tokens=3, do_sample=False).shape[1] >= ids.shape[1]
    trainer = L.Trainer(
        callbacks=[evaluate := Evaluate()],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ForgetRetainDataModule(rows["forget"], rows["retain"])
    trainer.test(module, data, verbose=False)
    test = (
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        "out",
        "--model.output",
        "tested",
    )
    assert evaluate.metrics == pytest.approx(wagle(*test).model.metrics, rel=1e-4)
    with pytest.raises(WagleError, match="the checkpoint as ckpt_path"):
        trainer.fit(module, data)


FIT = ("fit", "--model", "FinetuneModule", "--trainer.max_steps", "1")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_checkpoint_file(wagle: Any, fails: Any, tiny_model: str, kind: str) -> None:
    keep = (
        "--trainer.callbacks",
        "ModelCheckpoint",
        "--trainer.callbacks.dirpath",
        "ckpt",
        "--trainer.callbacks.filename",
        "one",
    )
    wagle(*FIT, *keep, "--model.model", tiny_model, "--model.output", "out")
    shutil.rmtree("out")
    path = trapped(Path("ckpt/one.ckpt"), kind)
    with pytest.raises(
        WagleError, match=r"ckpt/one.ckpt (holds posix.mkdir|is damaged, or no checkpoint)"
    ):
        export(path, "exported")
    line = fails(*FIT, "--model.model", tiny_model, "--model.output", "out", "--ckpt_path", path)
    assert "ckpt/one.ckpt" in line
    with pytest.raises((WagleError, pickle.UnpicklingError)):
        FinetuneModule.load_from_checkpoint(path)
    assert not any(Path(name).exists() for name in ("trapped", "exported", "out"))
