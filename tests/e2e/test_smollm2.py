"""A real model, SmolLM2-135M-Instruct, from attribution to test. ``bin/test --all`` brings it; else this skips."""

import json
from pathlib import Path

import pytest
import torch
from helpers import TOFU, write_rows
from safetensors import safe_open

from wagle_pl import WeightMask
from wagle_pl.core.environment import half_precision_is_slow
from wagle_pl.data.people import bundled
from wagle_pl.data.rows import load_rows

SMOLLM2 = Path(__file__).parents[2] / "models/smollm2"
PRECISION = f"--trainer.precision {'32-true' if half_precision_is_slow() else 'bf16-mixed'}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SMOLLM2.is_dir(), reason="models/smollm2 is not here (bin/get-smollm2 brings it)"
    ),
]


def test_attribute_unlearn_and_test_a_real_model(wagle, tmp_path):
    if TOFU.is_dir():
        names = ("forget01", "retain")
        forget, retain = (load_rows(str(TOFU / f"{name}_perturbed.json")) for name in names)
    else:
        forget, retain = bundled("forget"), bundled("retain")
    forget = write_rows(tmp_path / "forget.jsonl", forget[:2])
    retain = write_rows(tmp_path / "retain.jsonl", retain[:2])
    data = ("--data.batch_size 2 --data.forget", forget, "--data.retain", retain)
    fit = (PRECISION, "--trainer.enable_checkpointing false --model.model", SMOLLM2, *data)

    attribute = "fit --model AttributionModule --model.output mask --model.density 0.05"
    wagle(attribute, *fit, "--trainer.max_epochs 1")
    mask = WeightMask.load("mask")
    assert mask.total == 134_515_008 and mask.count() == int(0.05 * mask.total)
    assert Path("mask.safetensors").stat().st_size <= 0.13 * mask.total

    unlearn = "fit --model UnlearnModule --model.output out --model.mask mask.safetensors"
    steps = "--trainer.max_steps 2 --optimizer MaskedAdamW --optimizer.lr 3e-4"
    assert wagle(unlearn, *fit, steps).model.global_step == 2
    moved = 0
    with (
        safe_open(SMOLLM2 / "model.safetensors", "pt") as base,
        safe_open("out/model.safetensors", "pt") as unlearned,
    ):
        for name in mask:
            before, after = base.get_tensor(name), unlearned.get_tensor(name)
            changed = before.view(torch.int16) != after.view(torch.int16)
            assert not changed[~mask[name]].any(), name
            moved += int(changed.sum())
    assert moved > 0

    test = ("test --model EvaluationModule --model.max_new_tokens 4", PRECISION, "--data.test")
    sets = {"forget": forget, "retain": retain}
    after = wagle(*test, json.dumps(sets), "--model.model out --model.output after").model.metrics
    assert 0 <= after["retain/rougeL_recall"] <= 1 and 0 <= after["retain/truth_ratio"] <= 1
    model = ("--model.generate false --model.output before --model.model", SMOLLM2)
    before = wagle(*test, json.dumps({"forget": forget}), *model).model.metrics
    assert after["forget/probability"] < before["forget/probability"]
