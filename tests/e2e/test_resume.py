"""Invariant 5: kill a run anywhere, resume from its last checkpoint, and the result has the same bits."""

import copy
import os
import pickle
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SaveAt, changed, moved, places, random_bools, same_bits, slow, trainer, trapped
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from wagle_pl import FinetuneModule, LoRA, UnlearnModule, WeightMask
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.evaluation import Evaluate
from wagle_pl.lm.models import load_model
from wagle_pl.lm.resume import check_restored
from wagle_pl.unlearning.checks import check_resumed
from wagle_pl.unlearning.export import export


class KillAt(Callback):
    """Stops the process's run after a number of batches, as a power cut would."""

    batches = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if type(self).batches == 0:
            raise KeyboardInterrupt
        type(self).batches -= 1


ATTRIBUTE = "fit --model AttributionModule --model.output mask --model.density 0.4"
MODULES = {
    "finetune": "FinetuneModule",
    "npo": "UnlearnModule --model.objective NPO",
    "po": "UnlearnModule --model.objective PO",
    "pdu": "UnlearnModule --model.objective PDU --model.objective.epsilon 5.5 "
    "--model.objective.dual_warmup 0",
    "mudman": "UnlearnModule --model.objective GradDiff --model.step_rule MUDMAN "
    "--model.step_rule.fork_every 3",
}


def training(kind, accumulate=1):
    return (
        f"fit --model {MODULES[kind]} --optimizer MaskedAdamW --optimizer.lr 1e-3 "
        "--optimizer.weight_decay 0.1 --data.batch_size 3 --trainer.max_epochs 3 "
        f"--trainer.accumulate_grad_batches {accumulate}"
    )


KEEP = (
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.every_n_train_steps 1 "
    "--trainer.callbacks.save_last true --trainer.callbacks.dirpath"
)


@pytest.mark.parametrize(
    ("kind", "accumulate", "kills"),
    [
        slow("finetune", 1, (3,)),
        ("npo", 1, (1, 4, 9)),
        slow("npo", 2, (5,)),
        ("po", 1, (6,)),
        ("pdu", 2, (7,)),
        slow("mudman", 2, (8,)),
    ],
)
def test_a_killed_run_continues_to_the_same_bits(
    wagle, tiny_model, tmp_path, kind, accumulate, kills
):
    fit = (training(kind, accumulate), "--model.model", tiny_model)
    if kind in ("finetune", "npo"):
        wagle(ATTRIBUTE, "--model.model", tiny_model)
        fit += ("--model.mask mask.safetensors",)
    wagle(*fit, "--model.output whole", KEEP, "whole_ckpt")
    for killed_after in kills:
        KillAt.batches, name = killed_after, f"resumed{killed_after}"
        resumed = (*fit, f"--model.output {name}", KEEP, f"ckpt{killed_after}")
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            wagle(*resumed, "--trainer.callbacks+=test_resume.KillAt")
        assert not (tmp_path / name).exists()
        last = f"ckpt{killed_after}/last.ckpt"
        assert 0 < torch.load(last, weights_only=False)["global_step"] <= killed_after
        wagle(*resumed, f"--ckpt_path {last}")
        assert same_bits("whole", name)


@pytest.mark.parametrize(
    ("accumulate", "saves"), [slow(1, (2, 5)), (2, (1, 5, 8)), slow(4, (3, 7))]
)  # an epoch has four micro-batches, or eight in steps of four
def test_a_checkpoint_at_any_batch_continues_to_the_same_bits(
    wagle, dropping_model, accumulate, saves
):
    """NPO with dropout, and in the middle of a step too, which is then made anew.

    A later run finds the log-probabilities at θ₀ that the first had to compute: no random number changes by that.
    """
    size = 3 if accumulate < 4 else 2
    short = f"--trainer.max_epochs 2 --data.batch_size {size} --trainer.enable_checkpointing false"
    fit = (training("npo", accumulate), "--model.model", dropping_model, short)
    wagle(*fit, "--model.output whole")
    for SaveAt.left in saves:
        output = f"resumed{SaveAt.left}"
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            wagle(*fit, f"--model.output {output}", "--trainer.callbacks helpers.SaveAt")
        wagle(*fit, f"--model.output {output}", "--ckpt_path middle.ckpt")
        assert same_bits("whole", output)
    if accumulate == 1:
        wagle(*fit, "--model.output again")
        assert same_bits("whole", "again")


@pytest.mark.parametrize("kind", [slow("finetune"), "npo", slow("adapter")])
def test_load_from_checkpoint(wagle, tiny_model, rows, kind):
    """The module as Lightning gives it back has the weights that the run wrote, answers, and can be tested."""
    fit = [training(kind if kind != "adapter" else "po"), "--model.model", tiny_model]
    if kind in ("finetune", "npo"):
        wagle(ATTRIBUTE, "--model.model", tiny_model)
        fit.append("--model.mask mask.safetensors")
    if kind == "adapter":
        fit.append("--model.adapter LoRA --model.adapter.r 2")
    wagle(*fit, "--model.output out", KEEP, "ckpt")
    cls = FinetuneModule if kind == "finetune" else UnlearnModule
    options = {"adapter": LoRA(r=2)} if kind == "adapter" else {}
    module = cls.load_from_checkpoint("ckpt/last.ckpt", **options)
    assert module.model_name == tiny_model
    if kind != "adapter":
        written, here = load_file("out/model.safetensors"), dict(module.lm.named_parameters())
        assert all(torch.equal(written[name], here[name]) for name in here)
        mask, moves = WeightMask.load("mask"), moved(tiny_model, "out")
        assert not any((bits & ~mask[name]).any() for name, bits in moves.items())
        assert "frozen weights are bit-identical" in Path("out/README.md").read_text()
    ids = module.tokenizer("Who?", return_tensors="pt").input_ids
    assert module.lm.generate(ids, max_new_tokens=3, do_sample=False).shape[1] >= ids.shape[1]
    tester = trainer(callbacks=[evaluate := Evaluate()])
    data = ForgetRetainDataModule(rows["forget"], rows["retain"])
    tester.test(module, data, verbose=False)
    tested = wagle("test --model EvaluationModule --model.model out --model.output tested").model
    assert evaluate.results.metrics == pytest.approx(tested.metrics, rel=1e-4)
    with pytest.raises(WagleError, match="the checkpoint as ckpt_path"):
        tester.fit(module, data)


def test_a_checkpoint_file(wagle: Any, fails: Any, tiny_model: str) -> None:
    """One that holds code is not read, in whatever container."""
    fit = ("fit --model FinetuneModule --trainer.max_steps 1 --model.output out", "--model.model")
    wagle(*fit, tiny_model, KEEP, "ckpt")
    shutil.rmtree("out")
    whole = Path("ckpt/last.ckpt").read_bytes()
    for kind in ("zip", "legacy", "pickle"):
        Path("ckpt/last.ckpt").write_bytes(whole)
        path = trapped(Path("ckpt/last.ckpt"), kind)
        said = r"ckpt/last.ckpt (holds posix.mkdir|is damaged, or no checkpoint)"
        with pytest.raises(WagleError, match=said):
            export(path, "exported")
        assert "ckpt/last.ckpt" in fails(*fit, tiny_model, "--ckpt_path", path)
        with pytest.raises((WagleError, pickle.UnpicklingError)):
            FinetuneModule.load_from_checkpoint(path)
        assert not any(Path(name).exists() for name in ("trapped", "exported", "out"))


@pytest.fixture
def random_mask_file(tiny_model, tmp_path):
    lm = load_model(tiny_model)
    mask = WeightMask.from_bools(random_bools(parameter_shapes(lm)))
    mask.metadata["model_fingerprint"] = fingerprint(lm)
    return mask.save(tmp_path / "random")


def without(key):
    return lambda checkpoint: {name: value for name, value in checkpoint.items() if name != key}


DAMAGED = {
    "a list": (lambda checkpoint: [checkpoint], "must be an object"),
    "banana": (lambda c: {**c, "pytorch-lightning_version": "banana"}, "Invalid version: 'banana'"),
    "no version": (without("pytorch-lightning_version"), "'pytorch-lightning_version' is missing"),
    "weights alone": (without("optimizer_states"), "has no state of an optimizer"),
    "no step": (without("global_step"), "key 'global_step' is missing"),
    "a text of loops": (lambda c: {**c, "loops": "x"}, "loops: must be an object or null, got 'x'"),
    "no weights": (without("state_dict"), "does not hold the weights of this model"),
    "no model": (
        without("model"),
        "does not say which model",
    ),
    "a number of a mask": (lambda c: {**c, "mask": 3}, "mask: must be an object or null, got 3"),
    "no digest": (lambda c: {**c, "mask": {}}, "key 'mask.digest' is missing"),
    "a random state": (
        lambda c: {**c, "rng_state": 1},
        "rng_state: must be a Tensor or null, got 1",
    ),
    "references": (
        lambda c: {**c, "references": {"a": 1}},
        "references.a: must be an object, got 1",
    ),
}


def test_a_checkpoint_of_other_fields(wagle, fails, tiny_model, random_mask_file):
    """Each is refused in one line that names the checkpoint and its field, before a step."""
    options = f"--model.mask {random_mask_file} --trainer.max_steps 2"
    command = f"{training('npo')} --model.model {tiny_model} --model.output out {options}"
    wagle(f"{command} {KEEP} whole")
    Path("out").rename("done")
    checkpoint = torch.load("whole/last.ckpt", weights_only=True)
    for name, (change, said) in DAMAGED.items():
        torch.save(change(checkpoint), "x.ckpt")
        line = fails(f"{command} --ckpt_path x.ckpt")
        assert "x.ckpt" in line or "the checkpoint" in line, (name, line)
        assert re.search(said, line), (name, line)
    line = fails(
        f"{command} --ckpt_path whole/last.ckpt --lr_scheduler StepLR --lr_scheduler.step_size 2"
    )
    assert "whole/last.ckpt is of a run with another schedule of the learning rate" in line
    sgd = command.replace("MaskedAdamW", "torch.optim.SGD --optimizer.momentum 0.9", 1)
    line = fails(f"{sgd} --ckpt_path whole/last.ckpt")
    assert "of a run with another optimizer than SGD (its options have no 'dampening')" in line
    os.mkfifo("pipe")
    assert "pipe is a pipe: give a regular file" in fails(f"{command} --ckpt_path pipe")
    assert "ckpt_path: no checkpoint is the best" in fails(f"{command} --ckpt_path best")


OTHERS = (..., None, True, 3, "x", [1], {"a": 1}, torch.ones(3))


def test_any_state_that_lightning_restores(
    empty_folder: None, tiny_model: str, rows: dict[str, str]
) -> None:
    """Dropped, or of another type: it is refused in one line, or Lightning restores it."""
    module = FinetuneModule(tiny_model, lr=1e-3)
    saver = trainer(max_steps=2)
    saver.fit(module, ForgetRetainDataModule(rows["forget"], rows["retain"]))
    saver.save_checkpoint("x.ckpt")
    checkpoint = torch.load("x.ckpt", weights_only=True)
    read = ("fit_loop", "optimizer_states", "lr_schedulers")
    states = [at for at in places(checkpoint) if {*read} & {*map(str, at[:2])}]
    for at, other in [(at, other) for at in states for other in OTHERS][::7]:
        new = changed(checkpoint, at, other)
        with suppress(WagleError):
            check_restored(new, saver, "x")
            check_resumed(module, new)
            copy.deepcopy(saver.optimizers[0]).load_state_dict(new["optimizer_states"][0])
            saver.lr_scheduler_configs[0].scheduler.load_state_dict(new["lr_schedulers"][0])
            saver.fit_loop.load_state_dict(new["loops"]["fit_loop"])


def test_any_field_of_a_checkpoint(wagle, tiny_model, random_mask_file):
    """Dropped, or of another type: ``export`` writes a model, or says in one line what is wrong."""
    command = (
        f"{training('npo')} --model.model {tiny_model} --model.output out --trainer.max_steps 1"
    )
    wagle(f"{command} --model.mask {random_mask_file} {KEEP} whole")
    checkpoint = torch.load("whole/last.ckpt", weights_only=True)
    used = {key: checkpoint[key] for key in ("state_dict", "model", "mask", "references", "module")}

    tries = [(at, other) for at in places(used) for other in OTHERS]
    for at, other in tries[::5]:
        if "config" in at or "versions" in at:  # as the user wrote it, and only shown
            continue
        torch.save(changed(used, at, other), "x.ckpt")
        with suppress(WagleError):
            export("x.ckpt", "exported", overwrite=True)
