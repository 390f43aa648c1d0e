"""On a GPU: the strategies that need one, against the CPU's answer. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import difference, environment, fit_arguments, moved, weights

from wagle_pl.masks import WeightMask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("empty_folder"),
]

STRATEGIES = ["auto", *(f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "3_offload"))]


@pytest.fixture
def fit(tiny_model: str, rows: dict[str, str]) -> Any:
    """Run a fit as it is typed: fit("FinetuneModule", "--option …")."""

    def run(module: str, *options: str) -> None:
        fit = fit_arguments(module, tiny_model, rows, "--trainer.devices 1", *options)
        typed = [sys.executable, "-m", "wagle_pl", *fit]
        done = subprocess.run(typed, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gpu_gives_the_cpu_answer(fit: Any, tiny_model: str, strategy: str):
    """Attribution, then unlearning of its mask: frozen weights keep their bits, the others go where the CPU's go."""
    attribute = "--model.density 0.3 --trainer.max_epochs 1"
    unlearn = "--model.objective NPO --model.mask cpu-mask --trainer.max_steps 5"
    for device, chosen in (("cpu", ""), ("gpu", f"--trainer.strategy {strategy}")):
        where = f"--trainer.accelerator {device} {chosen}"
        fit("AttributionModule", attribute, f"--model.output {device}-mask", where)
        fit("UnlearnModule", unlearn, f"--model.output {device}", where)
    mask, other = WeightMask.load("cpu-mask"), WeightMask.load("gpu-mask")
    assert mask.count() == other.count() and (mask & other).count() > 0.999 * mask.count()
    changed = moved(tiny_model, "gpu")
    assert not any((changed[name] & ~mask[name]).any() for name in mask)
    assert difference(weights("cpu"), weights("gpu")) < 1e-4
