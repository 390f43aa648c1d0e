"""DeepSpeed ZeRO as a user meets it: the command as it is typed, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import command, start
from helpers import environment, fit_arguments, moved, random_bools

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask
from wagle_pl.strategies import ZeRO

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def fit(tiny_model: str, rows: dict[str, str]):
    """Arguments of a fit on two CPU processes that Lightning starts."""

    def make(module: str, strategy: str, *options: Any) -> list[str]:
        devices = f"--trainer.devices 2 --trainer.strategy {strategy}"
        return fit_arguments(module, tiny_model, rows, devices, *options)

    return make


def test_the_command_as_typed(fit: Any, tiny_model: str):
    """Unlearning of what a mask selects, under ZeRO-3 on two processes."""
    mask = WeightMask.from_bools(random_bools(parameter_shapes(load_model(tiny_model))))
    options = ("--model.objective NPO --trainer.max_steps 3 --model.mask", mask.save("mask"))
    typed = [sys.executable, "-m", "wagle_pl", *fit("UnlearnModule", "deepspeed_stage_3", *options)]
    done = subprocess.run(typed, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("written to") == 1  # rank 0 speaks for all
    changed = moved(tiny_model, "out")
    assert not any((changed[n] & ~mask[n]).any() for n in mask)
    assert any(bits.any() for bits in changed.values())


def test_a_mistake_is_told_once(fit: Any):
    few = "--model.train_on forget --data.limit_forget 1"
    running = start(command, *fit("FinetuneModule", "ddp", few), output="said")
    running.join(timeout=600)
    said = Path("said").read_text()
    told = [line for line in said.splitlines() if line.startswith("wagle: error")]
    assert running.exitcode == 2 and len(told) == 1 and "Traceback" not in said
    assert "2 devices share 1 forget rows: use at most 1" in told[0]


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_deepspeed_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    with pytest.raises(WagleError, match=r"strategy: .*pip install deepspeed"):
        ZeRO(stage=2)


def test_a_batch_that_deepspeed_cannot_divide(fails: Any, tiny_model: str):
    """A DeepSpeed configuration that fixes another global batch than rows per device times devices."""
    config = json.dumps({"train_batch_size": 7, "zero_optimization": {"stage": 2}})
    strategy = ("--trainer.strategy ZeRO --trainer.strategy.config", config)
    model = ("--model.output x --model.model", tiny_model)
    told = fails("fit --model FinetuneModule", *model, "--data.batch_size 4", *strategy)
    assert "train_batch_size 7, but 1 devices with data.batch_size 4" in told


def test_an_optimizer_that_cannot_be_built(
    fails: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
):
    from deepspeed.ops.op_builder import builder

    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Unable to JIT load the cpu_adam op due to ninja not being installed.")

    monkeypatch.setattr(builder.OpBuilder, "load", no_compiler)
    offload = "--trainer.strategy deepspeed_stage_2_offload --optimizer "
    options = (f"{offload}deepspeed.ops.adam.DeepSpeedCPUAdam --model.output x --model.model",)
    told = fails("fit --model FinetuneModule", *options, tiny_model)
    assert "DS_BUILD_CPU_ADAM=1" in told and "--optimizer MaskedAdamW" in told


# -- collectives --------------------------------------------------------------------------------------------------


def test_collectives_are_no_ops_in_one_process():
    tensor = torch.arange(3)
    assert not distributed.is_distributed()
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.all_gather(["a"]) == ["a"] and distributed.all_reduce_max(3) == 3
    assert distributed.on_rank_zero(lambda: "x") == "x"
    for call in ("all_reduce_sum", "reduce_scatter", "all_gather_tensor"):
        assert getattr(distributed, call)(tensor) is tensor
