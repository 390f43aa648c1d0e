"""SIGTERM and SIGINT: a step is finished, a checkpoint written and named, the exit code tells; short runs keep none."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import command, start
from helpers import close, fit_arguments, wait_for
from ranks import Ranks
from safetensors.torch import load_file

from wagle_pl.cli.lightning import EpochCheckpoint
from wagle_pl.core import stopping

TERM, INT = signal.SIGTERM, signal.SIGINT
CODES = {TERM: 143, INT: 130}

#: A callback that runs import: a step of training lasts long enough to be hit.
SLOW = """
import os, time
from lightning.pytorch.callbacks import Callback

class Slow(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open(f"step-{trainer.global_rank}", "a") as file:
            file.write(f"{trainer.global_step}\\n")
        time.sleep(float(os.environ.get("PAUSE", "0.3")))
"""


@pytest.fixture
def fit(empty_folder: None, tiny_model: str, rows: dict[str, str]):
    """Arguments of a fit in an empty folder, whose steps are slow."""
    Path("slow.py").write_text(SLOW)

    def make(module: str, *options: Any, slow: bool = True) -> list[str]:
        unlearn = "--model.objective GradDiff --trainer.max_epochs 4"
        kind = [unlearn] if module == "UnlearnModule" else []
        steps = "--data.batch_size 1 --trainer.accumulate_grad_batches 4"
        callback = ["--trainer.callbacks slow.Slow"] if slow else []
        return fit_arguments(module, tiny_model, rows, *kind, steps, *callback, *options)

    return make


def typed(*arguments: str) -> None:
    """The command as in a shell, imports and all."""
    os.execv(sys.executable, [sys.executable, "-m", "wagle_pl", *arguments])


def stopped(
    arguments: list[str],
    signum: int,
    ready: Callable[[int], bool],
    again: float = 0,
    group: bool = False,
    how: Callable[..., None] = command,
    **env: str,
) -> tuple[int, str]:
    """Start a command, signal it when ``ready(pid)``, again ``again`` seconds later; (exit code, stderr)."""
    running = start(how, *arguments, output="stderr", env=env)
    try:
        wait_for(lambda: ready(running.pid) or not running.is_alive())
        send = os.killpg if group else os.kill
        send(running.pid, signum)
        if again:
            time.sleep(again)
            send(running.pid, signum)
        running.join(timeout=300)
    finally:  # a failure leaves nothing behind that goes on
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    said = Path("stderr").read_text()
    assert "Traceback" not in said and "Exception ignored" not in said, said
    return running.exitcode, said


def steps_begun(number: int, rank: int = 0):
    file = Path(f"step-{rank}")
    return lambda pid: file.exists() and len(file.read_text().split()) >= number


def prepared(delay: float = 0.0):
    """Whether a process has set a handler of SIGTERM, and so long ago."""
    since: list[float] = []

    def ready(pid: int) -> bool:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("SigCgt"))
        if int(line.split()[1], 16) >> (TERM - 1) & 1:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= delay

    return ready


@pytest.mark.parametrize(
    ("signum", "module"), [(TERM, "UnlearnModule"), (INT, "AttributionModule")]
)
def test_a_signal_ends_the_run_with_a_checkpoint(fit, wagle, signum, module):
    """Sent in the middle of a step, which is finished; the checkpoint it names goes on, with another cut."""
    code, said = stopped(fit(module), signum, steps_begun(6))
    name = signal.Signals(signum).name
    assert code == CODES[signum], said
    assert f"wagle: {name}: the run stops after this step, with a checkpoint" in said
    path = "checkpoints/stopped-step=2.ckpt"
    go_on = f"to resume, add to the same command: --ckpt_path {path}\n"
    assert f"stopped by {name} after step 2; {go_on}" in said
    assert torch.load(path, weights_only=False)["global_step"] == 2
    assert not list(Path().glob("out*"))
    cut = "--data.batch_size 2 --trainer.accumulate_grad_batches 2 --ckpt_path"
    wagle(*fit(module, cut, path, slow=False), data=False)
    wagle(*fit(module, "--model.output whole", slow=False), data=False)
    if module == "UnlearnModule":
        assert close("out", "whole")
    else:
        a, b = load_file("out.safetensors"), load_file("whole.safetensors")
        assert all(torch.equal(a[name], b[name]) for name in a)


def interrupted_in_a_destructor() -> None:
    """An interrupt reaches this process while Python calls a ``__del__``, which drops errors."""

    class Hit:
        def __del__(self) -> None:
            signal.raise_signal(INT)
            time.sleep(0)

    stopping.install({INT: stopping.raise_stopped})
    Hit()
    time.sleep(20)


def test_an_interrupt_in_a_destructor_is_not_lost(empty_folder):
    running = start(interrupted_in_a_destructor, output="said")
    running.join(timeout=15)
    said = Path("said").read_text()
    assert running.exitcode == 130 and said == "wagle: stopped by SIGINT\n", said


def test_a_second_interrupt_ends_at_once(fit):
    long = fit("UnlearnModule", "--trainer.accumulate_grad_batches 100")
    code, said = stopped(long, INT, steps_begun(1), again=1.3)
    assert code == 130 and "stopped by a second SIGINT, without a checkpoint" in said
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize(("signum", "delay"), [(TERM, 0.0), (INT, 1.0), (TERM, 3.0)])
def test_during_imports_there_is_no_traceback(fit, signum, delay):
    """At any time until the first step: nothing to save, one line, the code."""
    code, said = stopped(fit("UnlearnModule"), signum, prepared(delay), how=typed)
    name = signal.Signals(signum).name
    assert code == CODES[signum], said
    assert f"wagle: stopped by {name}" in said or f"stopped by {name} after step" in said


@pytest.mark.parametrize("signum", CODES)
def test_another_command(empty_folder, signum):
    code, said = stopped(["mask", "info", "none.safetensors"], signum, prepared(), how=typed)
    assert code == CODES[signum] and said == f"wagle: stopped by {signal.Signals(signum).name}\n"


TWO = "--trainer.devices 2 --trainer.strategy ddp --trainer.accumulate_grad_batches 2"


def goes_on(fit, wagle, said):
    """Whether what was said of a stop is one line, and its checkpoint goes on."""
    (path,) = re.findall(r"after step .* --ckpt_path (\S+)", said)
    wagle(*fit("UnlearnModule", "--ckpt_path", path, slow=False), data=False)
    return Path("out/model.safetensors").exists()


def test_ranks_stop_together(fit, wagle):
    """Those that Lightning starts: one checkpoint, one line, and the first rank's code."""
    code, said = stopped(fit("UnlearnModule", TWO), TERM, steps_begun(3, rank=1), group=True)
    assert code == 143 and goes_on(fit, wagle, said)


def test_one_rank_stops_all(fit, wagle, ranks: Ranks):
    """The same of those of torchrun, when the signal reaches the second alone."""
    before = ranks.said().count("after step")

    def stop() -> None:
        wait_for(lambda: steps_begun(3, rank=1)(0))
        os.kill(ranks.processes[1].pid, TERM)

    ranks(*fit("UnlearnModule", TWO), code=143, meanwhile=stop)
    assert ranks.said().count("after step") == before + 1
    assert goes_on(fit, wagle, ranks.tail())


@pytest.mark.parametrize("signum", [signal.SIGUSR1, TERM])
def test_slurm_requeues(fit, wagle, monkeypatch, signum):
    """Lightning's signal for it: the job is put into the queue again, and its next start goes on by itself."""
    scontrol = Path("bin/scontrol").absolute()
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" >> requeued\n')
    scontrol.chmod(0o755)
    for name, value in {"NTASKS": "1", "JOB_NAME": "unlearn", "JOB_ID": "77"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=":")
    code, said = stopped(fit("UnlearnModule"), signum, steps_begun(2))
    assert code == 128 + signum, said
    assert "after step 1; the same job resumes from" in said
    assert "hpc_ckpt_1.ckpt automatically" in said
    assert Path("requeued").exists() == (signum == signal.SIGUSR1)
    assert Path("hpc_ckpt_1.ckpt").exists()
    if signum == TERM:  # its next start reads the same file
        return
    assert Path("requeued").read_text() == "requeue 77\n"
    Path("step-0").unlink()
    monkeypatch.setenv("PAUSE", "0")
    monkeypatch.syspath_prepend(os.getcwd())
    wagle(*fit("UnlearnModule"), data=False)
    assert Path("out/model.safetensors").exists()
    assert len(Path("step-0").read_text().split()) == 4 * (12 - 1)


# -- checkpoints of short runs ----------------------------------------------------------------------------------------

KEPT = "--trainer.callbacks.dirpath kept --trainer.callbacks."
SHORT = "fit --model FinetuneModule --model.output out --trainer.max_epochs"


@pytest.mark.parametrize(
    ("callback", "written"),
    [
        ("", 0),
        (f"EpochCheckpoint {KEPT}save_last link", 0),
        (f"EpochCheckpoint {KEPT}after_minutes 0", 1),
        (f"EpochCheckpoint {KEPT}save_top_k=-1", 2),
        (f"EpochCheckpoint {KEPT}every_n_train_steps 1", 1),
        (f"ModelCheckpoint {KEPT}save_top_k 1", 1),
    ],
)
def test_a_short_run_leaves_no_checkpoint_unless_asked(wagle, tiny_model, callback, written):
    callbacks = [f"--trainer.callbacks {callback}"] if callback else []
    done = wagle(f"{SHORT} 2", "--model.model", tiny_model, *callbacks)
    assert len(list(Path().rglob("*.ckpt"))) == written
    assert len(done.trainer.checkpoint_callbacks) == 1


def test_a_long_run_keeps_its_checkpoint(wagle, tiny_model, monkeypatch):
    monkeypatch.setattr(
        EpochCheckpoint, "_is_due", lambda self, trainer: trainer.current_epoch >= 1
    )
    wagle(f"{SHORT} 3", "--model.model", tiny_model)
    (path,) = Path().rglob("*.ckpt")
    assert torch.load(path, weights_only=False)["epoch"] == 2
