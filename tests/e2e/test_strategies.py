"""DeepSpeed ZeRO as a user meets it: the command as it is typed, mistakes, a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, data_options, environment, weights, words
from ranks import Ranks

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask
from wagle_pl.strategies import ZeRO

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def typed(tiny_model: str, rows: dict[str, str]):
    """The command that a user types, on two CPU processes that Lightning starts."""

    def make(module: str, strategy: str, *options: Any) -> list[str]:
        common = ("--model.model", tiny_model, *data_options(rows), QUIET, "--model.output out")
        devices = f"--trainer.devices 2 --trainer.strategy {strategy}"
        fit = [sys.executable, "-m", "wagle_pl", "fit", "--model", module]
        return [*fit, *words(*common, devices, *options)]

    return make


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)


def test_the_command_as_typed(typed: Any, tiny_model: str):
    """Unlearning of what a mask selects, under ZeRO-3 on two processes."""
    parameters = load_model(tiny_model).named_parameters()
    mask = WeightMask.from_bools({name: torch.rand(p.shape) < 0.3 for name, p in parameters})
    options = ("--model.objective NPO --trainer.max_steps 3 --model.mask", mask.save("mask"))
    done = run(typed("UnlearnModule", "deepspeed_stage_3", *options))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("written to") == 1  # rank 0 speaks for all
    before, after = weights(tiny_model), weights("out")
    assert all(torch.equal(before[n][~mask[n]], after[n][~mask[n]]) for n in mask)
    assert any((before[n] != after[n]).any() for n in mask)


def test_a_mistake_is_told_once(typed: Any):
    few = "--model.train_on forget --data.limit_forget 1"
    done = run(typed("FinetuneModule", "ddp", few))
    told = [line for line in done.stderr.splitlines() if line.startswith("wagle: error")]
    assert done.returncode == 2 and len(told) == 1 and "Traceback" not in done.stderr
    assert "2 devices share 1 forget rows: use at most 1" in told[0]


def test_a_rank_that_dies_ends_the_run(typed: Any, ranks: Ranks):
    """Killed in mid-step: no hang, an exit code, a clear line; the last checkpoint is whole and resumes."""
    often = {"every_n_train_steps": 10, "save_top_k": -1, "dirpath": "kept", "filename": "{step}"}
    callback = json.dumps([{"class_path": "ModelCheckpoint", "init_args": often}])
    options = ("--trainer.max_epochs 100000 --trainer.callbacks", callback)
    command = typed("FinetuneModule", "deepspeed_stage_2", *options)
    with open("log", "w") as log:
        running = subprocess.Popen(
            command, env=environment(), stderr=log, stdout=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 600
            while not Path("kept/step=20.ckpt").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            exe = {int(child): Path(f"/proc/{child}/exe").resolve().name for child in children}
            (child,) = (pid for pid, name in exe.items() if "python" in name)
            os.kill(child, signal.SIGKILL)
            code = running.wait(timeout=600)
        finally:  # a failure leaves nothing behind that goes on
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert code
    assert code < 0 or "another rank of this run has ended" in Path("log").read_text()
    step = max(int(path.stem.split("=")[1]) for path in Path("kept").glob("step=*.ckpt"))
    end = (
        f"--ckpt_path kept/step={step}.ckpt --trainer.max_epochs -1 --trainer.max_steps {step + 1}"
    )
    none = "--trainer.callbacks null --trainer.enable_checkpointing false"
    ranks(*command[command.index("fit") :], *words(end, none))
    assert Path("out/model.safetensors").exists()


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_deepspeed_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    with pytest.raises(WagleError, match="needs DeepSpeed: pip install deepspeed"):
        ZeRO(stage=2)


def test_a_batch_that_deepspeed_cannot_divide(fails: Any, tiny_model: str):
    """A DeepSpeed configuration that fixes another global batch than rows a device times devices."""
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
    assert "DS_BUILD_CPU_ADAM=1 pip install" in told and "--optimizer MaskedAdamW" in told


def test_offload_to_disk_that_is_not_built(monkeypatch: pytest.MonkeyPatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(WagleError, match="DS_BUILD_AIO=1 pip install"):
        ZeRO(stage=3, offload_optimizer=True, offload_optimizer_device="nvme", nvme_path="x")


# -- collectives --------------------------------------------------------------------------------------------------


def test_collectives_are_no_ops_in_one_process():
    tensor = torch.arange(3)
    assert not distributed.is_distributed()
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.all_gather(["a"]) == ["a"] and distributed.all_reduce_max(3) == 3
    assert distributed.on_rank_zero(lambda: "x") == "x"
    for call in ("all_reduce_sum", "reduce_scatter", "all_gather_tensor"):
        assert getattr(distributed, call)(tensor) is tensor
