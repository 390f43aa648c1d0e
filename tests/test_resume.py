"""Invariant 5: kill a run anywhere, resume from its last checkpoint, and the result has the same bits."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file


class KillAt(Callback):
    """Stops the process's run after a number of batches, as a power cut would."""

    batches = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if type(self).batches == 0:
            raise KeyboardInterrupt
        type(self).batches -= 1


def arguments(kind, model, accumulate):
    module = {
        "finetune": ("FinetuneModule",),
        "npo": ("UnlearnModule", "--model.objective", "NPO", "--model.mask", "mask.safetensors"),
        "po": ("UnlearnModule", "--model.objective", "PO"),
    }[kind]
    often = ("--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.save_last", "true")
    return (
        "fit", "--model", *module, "--model.model", model, "--optimizer", "MaskedAdamW", "--optimizer.lr", "1e-3",
        "--optimizer.weight_decay", "0.1", "--data.batch_size", "3", "--trainer.max_epochs", "3",
        "--trainer.accumulate_grad_batches", accumulate, "--trainer.callbacks", "ModelCheckpoint", *often,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "accumulate", "killed_after"),
    [("finetune", 1, 3), ("npo", 1, 1), ("npo", 1, 4), ("npo", 1, 9), ("npo", 2, 5), ("po", 1, 6)],
)
def test_a_killed_run_continues_to_the_same_bits(wagle, tiny_model, tmp_path, kind, accumulate, killed_after):
    if kind == "npo":
        attribute = ("fit", "--model", "AttributionModule", "--trainer.max_epochs", "1")
        wagle(*attribute, "--model.model", tiny_model, "--model.output", "mask", "--model.density", "0.4")
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
    whole, resumed = load_file("whole/model.safetensors"), load_file("resumed/model.safetensors")
    for name in whole:
        assert torch.equal(whole[name].view(torch.int32), resumed[name].view(torch.int32)), name
