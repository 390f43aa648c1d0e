"""A real model, SmolLM2-135M-Instruct, from attribution to test. ``bin/test`` brings it; without it this skips."""

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
PRECISION = "32-true" if half_precision_is_slow() else "bf16-mixed"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SMOLLM2.is_dir(), reason="models/smollm2 is not here (bin/get-smollm2 brings it)"
    ),
]


def test_attribute_unlearn_and_test_a_real_model(wagle, tmp_path):
    if TOFU.is_dir():
        forget, retain = (
            load_rows(str(TOFU / f"{name}_perturbed.json")) for name in ("forget01", "retain")
        )
    else:
        forget, retain = bundled("forget"), bundled("retain")
    files = [
        write_rows(tmp_path / f"{name}.jsonl", rows[:4])
        for name, rows in (("f", forget), ("r", retain))
    ]
    data = ("--data.forget", files[0], "--data.retain", files[1], "--data.batch_size", "2")
    trainer = (
        "--trainer.max_epochs",
        "1",
        "--trainer.precision",
        PRECISION,
        "--trainer.enable_checkpointing",
        "false",
    )
    fit = ("fit", *trainer)
    model = ("--model.model", SMOLLM2)
    one = ("--trainer.max_epochs", "1")
    wagle(
        *fit,
        "--model",
        "AttributionModule",
        *model,
        "--model.output",
        "mask",
        "--model.density",
        "0.05",
        *data,
        *one,
    )
    mask = WeightMask.load("mask")
    assert mask.total == 134_515_008 and mask.count() == int(0.05 * mask.total)
    assert Path("mask.safetensors").stat().st_size <= 0.13 * mask.total

    steps = (
        "--trainer.max_epochs",
        "3",
        "--trainer.max_steps",
        "4",
        "--optimizer",
        "MaskedAdamW",
        "--optimizer.lr",
        "3e-4",
    )
    out = ("--model.output", "out", "--model.mask", "mask.safetensors")
    module = wagle(*fit, "--model", "UnlearnModule", *model, *out, *data, *steps).model
    assert module.global_step == 4
    moved = 0
    with (
        safe_open(SMOLLM2 / "model.safetensors", "pt") as base,
        safe_open("out/model.safetensors", "pt") as unlearned,
    ):
        for name in mask:
            changed = base.get_tensor(name).view(torch.int16) != unlearned.get_tensor(name).view(
                torch.int16
            )
            assert not changed[~mask[name]].any(), name
            moved += int(changed.sum())
    assert moved > 0

    sets = json.dumps({"forget": files[0], "retain": files[1]})
    test = (
        "test",
        "--model",
        "EvaluationModule",
        "--trainer.precision",
        PRECISION,
        "--model.max_new_tokens",
        "8",
    )
    probability = {}
    for name in (str(SMOLLM2), "out"):
        metrics = wagle(
            *test,
            "--model.model",
            name,
            "--model.output",
            f"t{len(probability)}",
            "--data.test",
            sets,
        ).model.metrics
        probability[name] = metrics["forget/probability"]
        assert 0 <= metrics["retain/rougeL_recall"] <= 1 and 0 <= metrics["retain/truth_ratio"] <= 1
    assert probability["out"] < probability[str(SMOLLM2)]
