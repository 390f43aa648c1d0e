"""On a GPU: the strategies that need one, against the CPU's answer. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import data_options, environment
from safetensors.torch import load_file

from wagle_pl.masks import WeightMask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STRATEGIES = [
    "auto",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "deepspeed_stage_3_offload",
]


def fit(tiny_model: str, rows: dict[str, str], *options: str) -> None:
    """One command, as it is typed."""
    command = [
        sys.executable,
        "-m",
        "wagle_pl",
        "fit",
        "--model",
        options[0],
        "--model.model",
        tiny_model,
        *data_options(rows),
        "--trainer.logger",
        "false",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.devices",
        "1",
        *options[1:],
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gpu_gives_the_cpu_answer(
    tiny_model: str,
    rows: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
):
    """Attribution, then unlearning of its mask: frozen weights keep their bits, the others go where the CPU's go."""
    monkeypatch.chdir(tmp_path)
    masks = ["AttributionModule", "--model.density", "0.3", "--trainer.max_epochs", "1"]
    unlearn = [
        "UnlearnModule",
        "--model.objective",
        "NPO",
        "--model.mask",
        "cpu-mask",
        "--trainer.max_steps",
        "5",
    ]
    for device, chosen in (("cpu", []), ("gpu", ["--trainer.strategy", strategy])):
        where = ["--trainer.accelerator", device, *chosen]
        fit(tiny_model, rows, *masks, "--model.output", f"{device}-mask", *where)
        fit(tiny_model, rows, *unlearn, "--model.output", device, *where)
    mask, other = WeightMask.load("cpu-mask"), WeightMask.load("gpu-mask")
    assert mask.count() == other.count() and (mask & other).count() > 0.999 * mask.count()
    before = load_file(Path(tiny_model) / "model.safetensors")
    cpu, gpu = (load_file(f"{device}/model.safetensors") for device in ("cpu", "gpu"))
    assert all(torch.equal(before[n][~mask[n]], gpu[n][~mask[n]]) for n in mask)
    assert max(float((cpu[n] - gpu[n]).norm() / cpu[n].norm()) for n in mask) < 1e-4
