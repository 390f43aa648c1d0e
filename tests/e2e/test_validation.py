"""Validation within fit: it measures what a test measures, it changes nothing, and callbacks can go by it."""

from pathlib import Path

import pytest
import torch
from helpers import same_bits, slow
from lightning.pytorch.callbacks import Callback

from wagle_pl import WeightMask

UNLEARN = (
    "fit --model UnlearnModule --model.objective GradDiff --optimizer MaskedAdamW "
    "--optimizer.lr 1e-2 --data.batch_size 3 --trainer.max_epochs 2 --trainer.log_every_n_steps 1"
)
WATCH = ("--data.val", "[retain, forget]", "--trainer.val_check_interval", "2")


class Watch(Callback):
    """Keeps what each validation found."""

    found: list = []  # noqa: RUF012  each test empties it

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            named = {name: float(value) for name, value in metrics if name.startswith("val/")}
            type(self).found.append((trainer.global_step, named))


@pytest.mark.parametrize("accumulate", [slow(1), 3])
def test_it_changes_nothing_and_measures_what_a_test_measures(wagle, dropping_model, accumulate):
    Watch.found.clear()
    common = (
        f"{UNLEARN} --model.model {dropping_model} --trainer.accumulate_grad_batches {accumulate}"
    )
    wagle(*common.split(), "--model.output", "plain")
    watch = (
        "--trainer.callbacks+=test_validation.Watch --trainer.callbacks+=Evaluate "
        "--trainer.callbacks.val_generate true --trainer.callbacks.max_new_tokens 6"
    )
    wagle(*common.split(), *WATCH, *watch.split(), "--model.output", "watched")
    assert same_bits("plain", "watched")
    steps, measures = zip(*Watch.found, strict=True)
    assert steps == ((2, 4, 6, 8) if accumulate == 1 else (0, 1, 2, 2, 3, 4))
    assert measures[-1]["val/forget/probability"] < measures[0]["val/forget/probability"]
    test = "test --model EvaluationModule --model.model watched --model.max_new_tokens 6"
    found = wagle(*test.split(), "--model.output", "tested").model.metrics
    assert {"forget/probability", "forget/rougeL_recall", "retain/probability"} <= set(found)
    named = {f"val/{name}": value for name, value in found.items()}
    assert named == pytest.approx(measures[-1], rel=1e-5)


def test_a_run_stops_once_it_has_forgotten(wagle, tiny_model):
    Watch.found.clear()
    stop = (
        "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor val/forget/probability "
        "--trainer.callbacks.stopping_threshold 0.0008 "
        "--trainer.callbacks+=test_validation.Watch --trainer.max_epochs 9"
    )
    common = (*UNLEARN.split(), "--model.model", tiny_model, *WATCH, *stop.split())
    done = wagle(*common, "--model.output", "out")
    probabilities = [each["val/forget/probability"] for _, each in Watch.found]
    assert probabilities[-1] < 0.0008 and all(p >= 0.0008 for p in probabilities[:-1])
    assert done.trainer.global_step == 2 * len(probabilities) < 36
    assert Path("out/model.safetensors").is_file()


def test_a_validated_run_resumes_to_the_same_bits(wagle, dropping_model):
    common = (*UNLEARN.split(), "--model.model", dropping_model, *WATCH)
    save = (
        "--trainer.callbacks ModelCheckpoint --trainer.callbacks.every_n_train_steps 3 "
        "--trainer.callbacks.save_top_k -1 --trainer.callbacks.filename {step} "
        "--trainer.callbacks.dirpath ckpt"
    )
    wagle(*common, *save.split(), "--model.output", "whole")
    for step in (3, 6):
        wagle(*common, "--model.output", f"resumed-{step}", "--ckpt_path", f"ckpt/step={step}.ckpt")
        assert same_bits("whole", f"resumed-{step}")


def test_validate(wagle, tiny_model):
    validate = ("validate", "--model", "EvaluationModule", "--model.model", tiny_model)
    names = set(wagle(*validate, "--data.val", "[forget]").trainer.callback_metrics)
    assert "val/forget/probability" in names and not any("retain" in name for name in names)


def test_attribution_is_left_alone(wagle, tiny_model):
    attribute = "fit --model AttributionModule --model.density 0.3 --model.model"
    masks = []
    for output, watch in (("plain", ()), ("watched", WATCH)):
        wagle(*attribute.split(), tiny_model, "--model.output", output, *watch)
        masks.append(WeightMask.load(f"{output}.safetensors"))
    plain, watched = masks
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
