"""SIGTERM and SIGINT: a step is finished, a checkpoint written and named, the exit code tells; short runs keep none."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import data_options, difference, environment, weights
from safetensors.torch import load_file

from wagle_pl.cli.callbacks import EpochCheckpoint

NAMES = {signal.SIGTERM: ("SIGTERM", 143), signal.SIGINT: ("SIGINT", 130)}


#: A callback that runs import: a step of training lasts long enough to be hit.
SLOW = """
import time
from lightning.pytorch.callbacks import Callback

class Slow(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open(f"step-{trainer.global_rank}", "a") as file:
            file.write(f"{trainer.global_step}\\n")
        time.sleep(0.3)
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: str, rows: dict[str, str]):
    """A fit as it is typed, in an empty folder, whose steps are slow."""
    monkeypatch.chdir(tmp_path)
    Path("slow.py").write_text(SLOW)

    def make(module: str, *options: Any, slow: bool = True) -> list[str]:
        kind = (
            ["--model.objective", "GradDiff", "--trainer.max_epochs", "4"]
            if module == "UnlearnModule"
            else []
        )
        data = data_options(rows)
        quiet = [
            "--trainer.logger",
            "false",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.accelerator",
            "cpu",
        ]
        callback = ["--trainer.callbacks", "slow.Slow"] if slow else []
        options = (
            *kind,
            *data,
            "--data.batch_size",
            "1",
            "--trainer.accumulate_grad_batches",
            "4",
            *quiet,
            *callback,
            *options,
        )
        return [
            sys.executable,
            "-m",
            "wagle_pl",
            "fit",
            "--model",
            module,
            "--model.model",
            tiny_model,
            "--model.output",
            "out",
            *map(str, options),
        ]

    return make


def run(command: list[str], **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env={**environment(), **env}, capture_output=True, text=True, timeout=600
    )


def stopped(
    command: list[str], signum: int, ready: Any, again: float = 0, group: bool = False, **env: str
) -> Any:
    """Start a command, signal it when ``ready(pid)``, again ``again`` seconds later; (exit code, stderr)."""
    with open("stderr", "w") as told:
        running = subprocess.Popen(
            command, env={**environment(), **env}, stderr=told, stdout=told, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 300
            while not ready(running.pid) and running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            send = os.killpg if group else os.kill
            send(running.pid, signum)
            if again:
                time.sleep(again)
                send(running.pid, signum)
            code = running.wait(timeout=300)
        finally:  # a failure leaves nothing behind that goes on
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    return code, Path("stderr").read_text()


def steps_begun(number: int, rank: int = 0):
    file = Path(f"step-{rank}")
    return lambda pid: file.exists() and len(file.read_text().split()) >= number


@pytest.mark.parametrize(
    ("signum", "module"), [(signal.SIGTERM, "UnlearnModule"), (signal.SIGINT, "AttributionModule")]
)
def test_a_signal_ends_the_run_with_a_checkpoint(command, signum, module):
    """Sent in the middle of a step, which is finished; the checkpoint it names goes on, with another cut."""
    name, code = NAMES[signum]
    found, told = stopped(command(module), signum, steps_begun(6))
    assert found == code, told
    assert f"wagle: {name}: the run stops after this step, with a checkpoint" in told
    assert "Traceback" not in told and "Exception ignored" not in told
    (path,) = re.findall(
        rf"stopped by {name} after step 2; to go on, add to the same command: --ckpt_path (\S+)",
        told,
    )
    assert path == "checkpoints/stopped-step=2.ckpt"
    assert torch.load(path, weights_only=False)["global_step"] == 2
    assert not list(Path().glob("out*"))
    cut = ("--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2", "--ckpt_path", path)
    done = run(command(module, *cut, slow=False))
    assert done.returncode == 0, done.stderr
    whole = run(command(module, "--model.output", "whole", slow=False))
    assert whole.returncode == 0, whole.stderr
    if module == "UnlearnModule":
        assert difference(weights("out"), weights("whole")) < 1e-5
    else:
        a, b = load_file("out.safetensors"), load_file("whole.safetensors")
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_interrupt_ends_at_once(command):
    found, told = stopped(
        command("UnlearnModule", "--trainer.accumulate_grad_batches", "100"),
        signal.SIGINT,
        steps_begun(1),
        again=1.3,
    )
    assert found == 130 and "stopped by a second SIGINT, without a checkpoint" in told
    assert "Traceback" not in told and not Path("checkpoints").exists()


def prepared(delay: float = 0.0):
    """Whether a process has set a handler of SIGTERM, and so long ago."""
    since: list[float] = []

    def ready(pid: int) -> bool:
        (line,) = (
            line
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("SigCgt")
        )
        if int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= delay

    return ready


@pytest.mark.parametrize("signum", NAMES)
@pytest.mark.parametrize("delay", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_during_imports_there_is_no_traceback(command, signum, delay):
    """At any time until the first step: nothing to save, one line, the code."""
    found, told = stopped(command("UnlearnModule"), signum, prepared(delay))
    name, code = NAMES[signum]
    assert found == code, told
    assert "Traceback" not in told and "Exception ignored" not in told
    assert f"wagle: stopped by {name}" in told or f"stopped by {name} after step" in told


@pytest.mark.parametrize("signum", NAMES)
def test_another_command(command, signum):
    mask = [sys.executable, "-m", "wagle_pl", "mask", "info", "none.safetensors"]
    found, told = stopped(mask, signum, prepared())
    assert found == NAMES[signum][1] and told == f"wagle: stopped by {NAMES[signum][0]}\n"


@pytest.mark.parametrize("group", [False, True], ids=["first rank", "all ranks"])
def test_ranks_stop_together(command, group):
    """Whichever rank the signal reaches: one checkpoint, one line, and the first rank's code."""
    two = (
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.accumulate_grad_batches",
        "2",
    )
    found, told = stopped(
        command("UnlearnModule", *two), signal.SIGTERM, steps_begun(3, rank=1), group=group
    )
    assert found == 143, told
    assert told.count("after step") == 1 and "Traceback" not in told
    (path,) = re.findall(r"--ckpt_path (\S+)", told)
    done = run(command("UnlearnModule", "--ckpt_path", path, slow=False))
    assert done.returncode == 0 and Path("out/model.safetensors").exists(), done.stderr


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_requeues(command, signum):
    """Lightning's signal for it: the job is put into the queue again, and its next start goes on by itself."""
    bin_ = Path("bin")
    bin_.mkdir()
    (bin_ / "scontrol").write_text('#!/bin/sh\necho "$@" >> requeued\n')
    (bin_ / "scontrol").chmod(0o755)
    slurm = {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "unlearn",
        "SLURM_JOB_ID": "77",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS_PER_NODE": "1",
        "PATH": f"{bin_.absolute()}:{os.environ['PATH']}",
    }
    found, told = stopped(command("UnlearnModule"), signum, steps_begun(2), **slurm)
    assert found == 128 + signum, told
    assert "after step 1; the same job goes on from" in told and "hpc_ckpt_1.ckpt by itself" in told
    assert Path("requeued").exists() == (signum == signal.SIGUSR1)
    assert Path("hpc_ckpt_1.ckpt").exists()
    if signum == signal.SIGTERM:  # its next start reads the same file
        return
    assert Path("requeued").read_text() == "requeue 77\n"
    Path("step-0").unlink()
    done = run(command("UnlearnModule"), **slurm)
    assert done.returncode == 0 and Path("out/model.safetensors").exists(), done.stderr
    assert len(Path("step-0").read_text().split()) == 4 * (12 - 1)


# -- checkpoints of short runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ((), 0),
        (
            (
                "EpochCheckpoint",
                "--trainer.callbacks.dirpath",
                "kept",
                "--trainer.callbacks.save_last",
                "link",
            ),
            0,
        ),
        (
            (
                "EpochCheckpoint",
                "--trainer.callbacks.dirpath",
                "kept",
                "--trainer.callbacks.after_minutes",
                "0",
            ),
            1,
        ),
        (
            (
                "EpochCheckpoint",
                "--trainer.callbacks.dirpath",
                "kept",
                "--trainer.callbacks.save_top_k=-1",
            ),
            2,
        ),
        (
            (
                "EpochCheckpoint",
                "--trainer.callbacks.dirpath",
                "kept",
                "--trainer.callbacks.every_n_train_steps",
                "1",
            ),
            1,
        ),
        (("ModelCheckpoint", "--trainer.callbacks.dirpath", "kept"), 1),
    ],
)
def test_a_short_run_leaves_no_checkpoint_unless_asked(wagle, tiny_model, options, written):
    callbacks = ("--trainer.callbacks", *options) if options else ()
    done = wagle(
        "fit",
        "--model",
        "FinetuneModule",
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--trainer.max_epochs",
        "2",
        *callbacks,
    )
    assert len(list(Path().rglob("*.ckpt"))) == written
    assert len(done.trainer.checkpoint_callbacks) == 1


def test_a_long_run_keeps_its_checkpoint(wagle, tiny_model, monkeypatch):
    monkeypatch.setattr(
        EpochCheckpoint, "_is_due", lambda self, trainer: trainer.current_epoch >= 1
    )
    wagle(
        "fit",
        "--model",
        "FinetuneModule",
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--trainer.max_epochs",
        "3",
    )
    (path,) = Path().rglob("*.ckpt")
    assert torch.load(path, weights_only=False)["epoch"] == 2
