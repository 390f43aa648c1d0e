"""DeepSpeed ZeRO as a user meets it: the command as it is typed, mistakes, a rank that dies, memory."""

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
from helpers import data_options, environment
from ranks import Ranks
from safetensors.torch import load_file

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.lm.tiny import create_tiny_llama
from wagle_pl.masks import WeightMask
from wagle_pl.strategies import ZeRO

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("empty_folder")


def typed(tiny_model: str, rows: dict[str, str], *options: Any, stage: int = 3) -> list[str]:
    """The command that a user types, on two CPU processes that Lightning starts."""
    quiet = [
        part
        for name in ("enable_progress_bar", "enable_model_summary", "logger")
        for part in (f"--trainer.{name}", "false")
    ]
    data = data_options(rows)
    devices = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        f"deepspeed_stage_{stage}",
    ]
    command = [
        sys.executable,
        "-m",
        "wagle_pl",
        "fit",
        "--model",
        options[0],
        "--model.model",
        tiny_model,
    ]
    return [*command, *data, *quiet, *devices, *map(str, options[1:])]


def test_the_command_as_typed(tiny_model: str, rows: dict[str, str]):
    """Attribution, then unlearning of what its mask selects, both under ZeRO-3 on two processes."""
    for options in (
        [
            "AttributionModule",
            "--model.output",
            "mask",
            "--model.density",
            "0.3",
            "--trainer.max_epochs",
            "1",
        ],
        [
            "UnlearnModule",
            "--model.objective",
            "NPO",
            "--model.mask",
            "mask.safetensors",
            "--model.output",
            "out",
            "--trainer.max_steps",
            "3",
        ],
    ):
        done = subprocess.run(
            typed(tiny_model, rows, *options),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("written to") == 1  # rank 0 speaks for all
    mask, before = WeightMask.load("mask"), load_file(Path(tiny_model) / "model.safetensors")
    after = load_file("out/model.safetensors")
    assert mask.count() == int(0.3 * mask.total)
    assert all(torch.equal(before[n][~mask[n]], after[n][~mask[n]]) for n in mask)
    assert any((before[n] != after[n]).any() for n in mask)


def test_a_mistake_is_told_once(tiny_model: str, rows: dict[str, str]):
    options = [
        "FinetuneModule",
        "--model.train_on",
        "forget",
        "--data.limit_forget",
        "1",
        "--model.output",
        "x",
    ]
    done = subprocess.run(
        typed(tiny_model, rows, *options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("wagle: error")]
    assert done.returncode == 2 and len(told) == 1
    assert (
        "2 devices share 1 forget rows: use at most 1" in told[0] and "Traceback" not in done.stderr
    )


def test_a_rank_that_dies_ends_the_run(tiny_model: str, rows: dict[str, str], ranks: Ranks):
    """Killed in mid-step: no hang, an exit code, a clear line; the last checkpoint is whole and resumes."""
    callback = [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {
                "every_n_train_steps": 10,
                "save_top_k": -1,
                "dirpath": "kept",
                "filename": "{step}",
            },
        }
    ]
    options = [
        "FinetuneModule",
        "--model.output",
        "out",
        "--trainer.max_epochs",
        "100000",
        "--trainer.callbacks",
        json.dumps(callback),
    ]
    command = typed(tiny_model, rows, *options, stage=2)
    with open("log", "w") as log:
        run = subprocess.Popen(
            command, env=environment(), stderr=log, stdout=log, start_new_session=True
        )
        try:
            assert _wait_for(lambda: (Path("kept") / "step=20.ckpt").exists(), 600), Path(
                "log"
            ).read_text()
            (child,) = _children(run.pid)
            os.kill(child, signal.SIGKILL)
            code = run.wait(timeout=600)
        finally:  # a failure leaves nothing behind that goes on
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert code not in (0, None)
    assert code < 0 or "another rank of this run has ended" in Path("log").read_text()
    last = sorted(Path("kept").glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))[
        -1
    ]
    step = int(last.stem.split("=")[1])
    resume = command[command.index("fit") :]
    resume[resume.index("100000")] = "-1"
    ranks(
        *resume,
        "--ckpt_path",
        last,
        "--trainer.max_steps",
        step + 1,
        "--trainer.callbacks",
        "null",
        "--trainer.enable_checkpointing",
        "false",
    )
    assert Path("out/model.safetensors").exists()


def _children(parent: int) -> list[int]:
    """Processes of Python that a process has started."""
    return [
        int(task)
        for task in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if "python" in Path(f"/proc/{task}/exe").resolve().name
    ]


def _wait_for(ready: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.1)
    return ready()


def test_no_rank_holds_the_whole_model(ranks: Ranks, tiny_model: str, rows: dict[str, str]):
    """Loaded under ZeRO-3, a rank's peak grows by its half of the weights and not much more."""
    texts = [Path(rows["forget"]).read_text()]
    folder = create_tiny_llama("model", texts, vocab_size=2000, hidden_size=512, layers=24, heads=8)
    whole = (folder / "model.safetensors").stat().st_size
    tensors = [t.numel() * 4 for t in load_file(folder / "model.safetensors").values()]
    common = [
        "fit",
        "--model",
        "AttributionModule",
        "--model.output",
        "mask",
        *data_options(rows),
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "2",
        "--trainer.logger",
        "false",
        "--trainer.max_epochs",
        "0",
        "--trainer.enable_checkpointing",
        "false",
    ]  # no step: exit code 2
    sharded, whole_each = [], []
    for strategy, answers in (("deepspeed_stage_3", sharded), ("ddp", whole_each)):
        for model in (tiny_model, folder):  # the first brings the libraries into memory
            answers[:] = ranks(
                *common, "--model.model", model, "--trainer.strategy", strategy, code=2
            )
    assert whole > 200e6 and max(tensors) < 0.03 * whole
    assert all(answer["peak"] < 0.7 * whole for answer in sharded), (sharded, whole)
    assert all(answer["peak"] > 0.9 * whole for answer in whole_each), (whole_each, whole)


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_deepspeed_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    with pytest.raises(WagleError, match="needs DeepSpeed: pip install deepspeed"):
        ZeRO(stage=2)


def test_a_batch_that_deepspeed_cannot_divide(fails: Any, tiny_model: str):
    """A DeepSpeed configuration that fixes another global batch than rows a device times devices."""
    config = json.dumps({"train_batch_size": 7, "zero_optimization": {"stage": 2}})
    strategy = ["--trainer.strategy", "ZeRO", "--trainer.strategy.config", config]
    told = fails(
        "fit",
        "--model",
        "FinetuneModule",
        "--model.model",
        tiny_model,
        "--model.output",
        "x",
        "--data.batch_size",
        "4",
        *strategy,
    )
    assert "train_batch_size 7, but 1 devices with data.batch_size 4" in told


def test_an_optimizer_that_cannot_be_built(
    fails: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
):
    from deepspeed.ops.op_builder import builder

    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Unable to JIT load the cpu_adam op due to ninja not being installed.")

    monkeypatch.setattr(builder.OpBuilder, "load", no_compiler)
    told = fails(
        "fit",
        "--model",
        "FinetuneModule",
        "--model.model",
        tiny_model,
        "--model.output",
        "x",
        "--trainer.strategy",
        "deepspeed_stage_2_offload",
        "--optimizer",
        "deepspeed.ops.adam.DeepSpeedCPUAdam",
    )
    assert "DS_BUILD_CPU_ADAM=1 pip install" in told and "--optimizer MaskedAdamW" in told


def test_offload_to_disk_that_is_not_built(monkeypatch: pytest.MonkeyPatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    with pytest.raises(WagleError, match="DS_BUILD_AIO=1 pip install"):
        ZeRO(stage=3, offload_optimizer=True, offload_optimizer_device="nvme", nvme_path="x")


# -- words over torch.distributed ---------------------------------------------------------------------------------


def test_collectives_are_no_ops_in_one_process():
    tensor = torch.arange(3)
    assert not distributed.is_distributed() and (distributed.world_size(), distributed.rank()) == (
        1,
        0,
    )
    assert distributed.all_gather(["a"]) == ["a"] and distributed.all_reduce_max(3) == 3
    assert distributed.on_rank_zero(lambda: "x") == "x"
    assert distributed.all_reduce_sum(tensor) is tensor
    assert (
        distributed.reduce_scatter(tensor) is tensor
        and distributed.all_gather_tensor(tensor) is tensor
    )
