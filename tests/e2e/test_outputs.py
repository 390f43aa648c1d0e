"""The output of a run: tried before the work, written by one run at a time, and not lost at the end."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from helpers import environment, same_bits
from safetensors import SafetensorError

from wagle_pl import WeightMask
from wagle_pl.core import outputs
from wagle_pl.core.errors import WagleError
from wagle_pl.core.outputs import Planned, check_space
from wagle_pl.lm import saving
from wagle_pl.masks import mask as masks

KINDS = {
    "FinetuneModule": ("fit", "--model", "FinetuneModule", "--trainer.max_steps", "2"),
    "UnlearnModule": ("fit", "--model", "UnlearnModule", "--trainer.max_steps", "2"),
    "AttributionModule": ("fit", "--model", "AttributionModule"),
}
KEEP = (
    "--trainer.callbacks",
    "ModelCheckpoint",
    "--trainer.callbacks.dirpath",
    "ckpt",
    "--trainer.callbacks.save_last",
    "true",
)
NO_CHECKPOINTS = ("--trainer.enable_checkpointing", "false")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training step an error."""
    for kind in KINDS:
        module = getattr(__import__("wagle_pl"), kind)
        monkeypatch.setattr(
            module, "training_step", lambda *_: pytest.fail("there was work before the refusal")
        )


def written(kind: str, output: str) -> Path:
    return Path(f"{output}.safetensors" if kind == "AttributionModule" else output)


# -- before the work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written(
    fails: Any, tiny_model: str, no_work: None, kind: str
) -> None:
    """Nobody can make a folder in /proc, not even root."""
    line = fails(*KINDS[kind], "--model.model", tiny_model, "--model.output", "/proc/nowhere/out")
    assert (
        "output /proc/nowhere/out" in line
        and "cannot be written" in line
        and "choose another" in line
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [KEEP, NO_CHECKPOINTS], ids=["checkpoints", "none"])
def test_a_disk_that_is_too_small(
    fails: Any,
    tiny_model: str,
    monkeypatch: pytest.MonkeyPatch,
    no_work: None,
    kind: str,
    keep: tuple[str, ...],
) -> None:
    """The line says what will be written and what is left; sizes are those that are written without a limit."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 20, (1 << 20) - 100, 100))
    line = fails(*KINDS[kind], *keep, "--model.model", tiny_model, "--model.output", "out")
    assert re.search(
        r"the disk of out(\.safetensors)? has 0\.00 MiB left, and this run writes .* MiB there",
        line,
    )
    assert ("checkpoint" in line) is (keep == KEEP) and not written(kind, "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planned_is_what_is_written(wagle: Any, tiny_model: str, kind: str) -> None:
    options = ("--model.save_scores", "fp32") if kind == "AttributionModule" else ()
    done = wagle(
        *KINDS[kind], *KEEP, *options, "--model.model", tiny_model, "--model.output", "out"
    )
    files = {
        "model": Path("out/model.safetensors"),
        "mask": Path("out.safetensors"),
        "scores": Path("out.scores/scores-00001.safetensors"),
        "checkpoint": Path("ckpt/last.ckpt"),
    }
    planned = {file.what: file.size for file in done.model.planned_files()}
    assert set(planned) == {"mask", "scores", "checkpoint"} if options else {"model", "checkpoint"}
    for what, size in planned.items():  # headers, tokenizer and records are beside
        assert size <= files[what].stat().st_size <= 1.6 * size + 60_000, what


def test_disks_are_looked_at_one_by_one(tmp_path: Path) -> None:
    check_space([Planned("model", tmp_path / "deep/er/out", 10)])
    with pytest.raises(
        WagleError, match=r"this run writes 2048\.00 GiB.*\(a 1024\.00 GiB, b 1024\.00 GiB\)"
    ):
        check_space(
            [Planned("a", tmp_path / "a", 2.0**40), Planned("b", tmp_path / "x/b", 2.0**40)]
        )


# -- one at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_second_run_into_an_output(
    fails: Any, wagle: Any, tiny_model: str, kind: str, overwrite: str
) -> None:
    """It is refused while the first runs; a lock that a killed run left is taken over, and none is left at the end."""
    options = (
        *KINDS[kind],
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--model.overwrite",
        overwrite,
    )
    hold = (
        "import sys, time; from pathlib import Path; from wagle_pl.core import outputs\n"
        "outputs.reserve(Path(sys.argv[1]), True, 'file'); print('held', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", hold, str(written(kind, "out"))],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    try:
        assert first.stdout.readline() == "held\n"
        line = fails(*options)
        assert (
            f"another run writes {written(kind, 'out')} (process {first.pid} on {socket.gethostname()}"
            in line
        )
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not written(kind, "out").exists()
    wagle(*options)
    assert written(kind, "out").exists() and not list(Path().glob(".*.lock"))


def test_a_run_after_one_that_failed_in_the_same_process(
    fails: Any, wagle: Any, tiny_model: str
) -> None:
    options = (*KINDS["UnlearnModule"], "--model.model", tiny_model, "--model.output", "out")
    assert "layers" in fails(*options, "--model.layers", "7") and not list(Path().glob(".*.lock"))
    wagle(*options)
    assert Path("out/model.safetensors").exists() and not list(Path().glob(".*.lock"))


def test_a_process_that_ends_takes_its_lock_with_it(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from wagle_pl.core import outputs\n"
        "outputs.reserve(Path('out'), False, 'file'); 1 / 0"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "ZeroDivisionError" in ended.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("locks", [True, False])
def test_a_run_that_was_killed_on_another_host(
    tmp_path: Path, heard: Any, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """A job that is queued again goes on elsewhere, if the disk knows that nobody holds the lock."""
    if not locks:
        monkeypatch.setattr(
            fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported"))
        )
    (tmp_path / ".out.lock").write_text(
        json.dumps({"pid": 1, "host": "elsewhere.invalid", "since": "then"})
    )
    if locks:
        outputs.reserve(tmp_path / "out", False, "file")
        assert (
            "took over the lock of a run that has ended (process 1 on elsewhere.invalid, since then)"
            in heard.text
        )
        outputs.release(tmp_path / "out")
    else:
        with pytest.raises(
            WagleError, match=r"process 1 on elsewhere\.invalid, since then.*delete .*\.out\.lock"
        ):
            outputs.reserve(tmp_path / "out", False, "file")


# -- at the end -------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the disk of the current folder (or all disks) full for results, with an error, or has room again (None)."""
    state: dict[str, Any] = {"error": None}

    def make(error: Exception | None, elsewhere: bool = True) -> None:
        state.update(error=error, elsewhere=elsewhere)

    def guarded(real: Any) -> Any:
        def save(path: Any, *args: Any, **kwargs: Any) -> Any:
            if state["error"] and (
                not state["elsewhere"] or os.getcwd() in str(Path(path).absolute())
            ):
                raise state["error"]
            return real(path, *args, **kwargs)

        return save

    for module in (masks, saving):
        monkeypatch.setattr(module, "atomic_path", guarded(module.atomic_path))
    return make


ERRORS = [
    OSError(28, "No space left on device"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["python", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_at_the_end_and_a_checkpoint(
    wagle: Any, fails: Any, tiny_model: str, full: Any, kind: str, error: Exception
) -> None:
    """One line names the checkpoint; the same command with it writes what the run would have written."""
    options = (*KINDS[kind], *KEEP, "--model.model", tiny_model)
    wagle(*options, "--model.output", "whole")
    shutil.rmtree("ckpt")
    full(error)
    line = fails(*options, "--model.output", "out")
    full(None)
    assert "No space left on device" in line and not written(kind, "out").exists()
    (checkpoint,) = re.findall(r"run the same command with --ckpt_path (\S+)$", line)
    wagle(*options, "--model.output", "out", "--ckpt_path", checkpoint)
    if kind == "AttributionModule":
        assert WeightMask.load("whole") == WeightMask.load("out")
    else:
        assert same_bits("whole", "out")


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_at_the_end_and_no_checkpoint(
    wagle: Any,
    fails: Any,
    tiny_model: str,
    full: Any,
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result is written elsewhere."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("elsewhere")))
    options = (*KINDS[kind], *NO_CHECKPOINTS, "--model.model", tiny_model)
    wagle(*options, "--model.output", "whole")
    full(ERRORS[0])
    line = fails(*options, "--model.output", "out")
    (beside,) = re.findall(r"it is in (\S+), move it from there$", line)
    if kind == "AttributionModule":
        assert WeightMask.load("whole") == WeightMask.load(beside)
    else:
        assert same_bits("whole", beside)


def test_several_masks_are_all_kept(
    fails: Any,
    tiny_model: str,
    full: Any,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("elsewhere")))
    full(ERRORS[0])
    specs = '[{"score": "magnitude", "density": 0.1}, {"score": "magnitude", "density": 0.3}]'
    line = fails(
        *KINDS["AttributionModule"],
        *NO_CHECKPOINTS,
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--model.masks",
        specs,
    )
    kept = re.findall(r"it is in (\S+), move", line)
    assert [round(WeightMask.load(path).density, 1) for path in kept] == [0.1, 0.3]


def test_when_nothing_can_be_written_anywhere(fails: Any, tiny_model: str, full: Any) -> None:
    full(ERRORS[0], elsewhere=False)
    line = fails(
        *KINDS["FinetuneModule"],
        *NO_CHECKPOINTS,
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
    )
    assert line.endswith("there is no checkpoint, and the result is lost")


def test_a_mask_that_would_leave_its_folder_is_refused_first(
    fails: Any, tiny_model: str, tmp_path: Path
) -> None:
    masks = '[{"score": "magnitude", "name": "../x"}]'
    line = fails(
        "fit",
        "--model",
        "AttributionModule",
        "--model.model",
        tiny_model,
        "--model.output",
        "masks",
        "--model.masks",
        masks,
    )
    assert "'../x'" in line and not list(tmp_path.rglob("x*"))
