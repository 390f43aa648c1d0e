"""The output of a run: tried before the work, written by one run at a time, and not lost at the end."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import start
from helpers import same_bits, small_files, wait_for
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wagle_pl import WeightMask
from wagle_pl.core import outputs
from wagle_pl.core.errors import WagleError
from wagle_pl.core.outputs import Planned, check_space
from wagle_pl.lm import saving
from wagle_pl.masks import mask as masks
from wagle_pl.unlearning.patch import make_patch

KINDS = ["FinetuneModule", "UnlearnModule", "AttributionModule"]
KEEP = (
    "--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath ckpt "
    "--trainer.callbacks.save_last true"
)
NO_CHECKPOINTS = "--trainer.enable_checkpointing false"


@pytest.fixture
def fit(tiny_model: str) -> Callable[..., tuple[str, ...]]:
    """Arguments of a short fit."""

    def make(kind: str, *options: str, output: str = "out") -> tuple[str, ...]:
        model = ("--model.model", tiny_model, f"--model.output {output}")
        steps = () if kind == "AttributionModule" else ("--trainer.max_steps 2",)
        return ("fit", "--model", kind, *model, *steps, *options)

    return make


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any training step an error."""
    for kind in KINDS:
        module = getattr(__import__("wagle_pl"), kind)
        monkeypatch.setattr(module, "training_step", lambda *_: pytest.fail("there was work"))


def written(kind: str, output: str = "out") -> Path:
    """What a run writes."""
    return Path(f"{output}.safetensors" if kind == "AttributionModule" else output)


def same(kind: str, a: str, b: str) -> bool:
    """Whether two runs wrote the same."""
    if kind == "AttributionModule":
        return WeightMask.load(a) == WeightMask.load(b)
    return same_bits(a, b)


# -- before the work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_cannot_be_written(fails: Any, fit: Any, no_work: None, kind: str) -> None:
    """Nobody can make a folder in /proc, not even root."""
    line = fails(*fit(kind, output="/proc/nowhere/out"))
    assert re.search(r"output /proc/nowhere/out\S* cannot be written .*choose another", line)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [KEEP, NO_CHECKPOINTS], ids=["checkpoints", "none"])
def test_a_disk_that_is_too_small(
    fails: Any, fit: Any, monkeypatch: pytest.MonkeyPatch, no_work: None, kind: str, keep: str
) -> None:
    """The line says what will be written and what is left."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 20, (1 << 20) - 100, 100))
    line = fails(*fit(kind, keep))
    place = r"the disk of out(\.safetensors)? has 0\.00 MiB left"
    assert re.search(rf"{place}, and this run writes .* MiB there", line)
    assert ("checkpoint" in line) is (keep == KEEP) and not written(kind).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planned_is_what_is_written(wagle: Any, fit: Any, kind: str) -> None:
    scores = kind == "AttributionModule"
    done = wagle(*fit(kind, KEEP, *(["--model.save_scores fp32"] if scores else [])))
    files = {
        "model": Path("out/model.safetensors"),
        "mask": Path("out.safetensors"),
        "scores": Path("out.scores"),
        "checkpoint": Path("ckpt/last.ckpt"),
    }
    planned = {file.what: file.size for file in done.model.planned_files()}
    assert set(planned) == ({"mask", "scores", "checkpoint"} if scores else {"model", "checkpoint"})
    for what, size in planned.items():  # headers, tokenizer and records are beside
        assert size <= files[what].stat().st_size <= 1.6 * size + 60_000, what


def test_disks_are_looked_at_one_by_one(tmp_path: Path) -> None:
    check_space([Planned("model", tmp_path / "deep/er/out", 10)])
    large = [Planned("a", tmp_path / "a", 2.0**40), Planned("b", tmp_path / "x/b", 2.0**40)]
    said = r"this run writes 2048\.00 GiB.*\(a 1024\.00 GiB, b 1024\.00 GiB\)"
    with pytest.raises(WagleError, match=said):
        check_space(large)


# -- one at a time ----------------------------------------------------------------------------------------------------


def hold(*names: str) -> None:
    """What a run does first, until it is killed."""
    for name in names:
        outputs.reserve(Path(name), True, "file")
    Path("held").touch()
    wait_for(Path("end").exists)


def test_a_second_run_into_an_output(fails: Any, wagle: Any, fit: Any) -> None:
    """It is refused while the first runs; the lock of one that is killed blocks nobody, and none is left at the end."""
    first = start(hold, *{str(written(kind)) for kind in KINDS}, output="said")
    try:
        wait_for(Path("held").exists)
        for kind in KINDS:
            for overwrite in ("false", "true"):
                line = fails(*fit(kind, f"--model.overwrite {overwrite}"))
                assert f"another run writes {written(kind)}" in line
    finally:
        first.kill()
        first.join(60)
    assert len(list(Path().glob(".*.lock"))) == 2
    for kind in ("UnlearnModule", "AttributionModule"):
        wagle(*fit(kind))
        assert written(kind).exists()
    assert not list(Path().glob(".*.lock"))


def test_a_run_after_one_that_failed_in_the_same_process(fails: Any, wagle: Any, fit: Any) -> None:
    options = fit("UnlearnModule")
    assert "layers" in fails(*options, "--model.layers 7") and not list(Path().glob(".*.lock"))
    wagle(*options)
    assert Path("out/model.safetensors").exists() and not list(Path().glob(".*.lock"))


def test_a_disk_without_locks(tmp_path: Path, heard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on there, and says so."""

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    outputs.reserve(tmp_path / "out", False, "file")
    assert "no locks" in heard.text
    outputs.release(tmp_path / "out")


# -- at the end -------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the disk of the current folder (or all disks) full for results, with an error, or has room again (None)."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("elsewhere")))
    state: dict[str, Any] = {"error": None}

    def make(error: Exception | None, elsewhere: bool = True) -> None:
        state.update(error=error, elsewhere=elsewhere)

    def guarded(real: Any) -> Any:
        def save(path: Any, *args: Any, **kwargs: Any) -> Any:
            here = os.getcwd() in str(Path(path).absolute())
            if state["error"] and (here or not state["elsewhere"]):
                raise state["error"]
            return real(path, *args, **kwargs)

        return save

    for module in (masks, saving):
        monkeypatch.setattr(module, "atomic_path", guarded(module.atomic_path))
    return make


FULL = OSError(28, "No space left on device")
AS_SAFETENSORS_SAYS = SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("keep", [KEEP, NO_CHECKPOINTS], ids=["a checkpoint", "none"])
@pytest.mark.parametrize(
    ("kind", "error"), [*((kind, FULL) for kind in KINDS), ("UnlearnModule", AS_SAFETENSORS_SAYS)]
)
def test_a_full_disk_at_the_end(
    wagle: Any, fails: Any, fit: Any, full: Any, kind: str, error: Exception, keep: str
) -> None:
    """One line names the checkpoint, with which the same command writes what the run would have written; or, if there
    is none, where else the result is."""
    wagle(*fit(kind, keep, output="whole"))
    shutil.rmtree("ckpt", ignore_errors=True)
    full(error)
    line = fails(*fit(kind, keep))
    full(None)
    assert not written(kind).exists()
    if keep == NO_CHECKPOINTS:
        (made,) = re.findall(r"it is in (\S+), move it from there$", line)
    else:
        (checkpoint,) = re.findall(r"run the same command with --ckpt_path (\S+)$", line)
        wagle(*fit(kind, KEEP, "--ckpt_path", checkpoint))
        assert "No space left on device" in line
        made = "out"
    assert same(kind, "whole", made)


def test_no_room_for_what_a_command_writes(wagle: Any, fails: Any, tiny_model: str) -> None:
    """One line names the output, and nothing is left of it."""
    other = Path(shutil.copytree(tiny_model, "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({name: t * 1.01 for name, t in tensors.items()}, other / "model.safetensors")
    mask = WeightMask.from_bools({name: t > 0 for name, t in tensors.items()}).save("mask")
    make_patch(tiny_model, other, "whole.patch")
    wagle(
        "test",
        "--model EvaluationModule --model.model",
        tiny_model,
        "--trainer.default_root_dir tested",
    )
    test = (
        "test",
        "--model EvaluationModule --model.model",
        tiny_model,
        "--trainer.default_root_dir",
    )
    commands = {
        "o.safetensors": ("mask invert", mask, "-o o.safetensors"),
        "o.pt": ("mask convert", mask, "-o o.pt"),
        "o.patch": ("patch make", tiny_model, other, "-o o.patch"),
        "o": ("patch apply", tiny_model, "whole.patch", "-o o"),
        "t/test/forget.parquet": (*test, "t"),
        "o.html": ("report tested/test", "-o o.html"),
    }
    for output, command in commands.items():
        with small_files(2000):
            line = fails(*command)
        assert re.search(
            f"output .*{output} cannot be written .*make room, or choose another", line
        )
        assert not Path(output).exists() and not list(Path(output).parent.glob(".wagle-*"))


def test_several_masks_are_all_kept(fails: Any, fit: Any, full: Any) -> None:
    full(FULL)
    specs = '[{"score": "magnitude", "density": 0.1}, {"score": "magnitude", "density": 0.3}]'
    line = fails(*fit("AttributionModule", NO_CHECKPOINTS, "--model.masks", specs))
    kept = re.findall(r"it is in (\S+), move", line)
    assert [round(WeightMask.load(path).density, 1) for path in kept] == [0.1, 0.3]


def test_when_nothing_can_be_written_anywhere(fails: Any, fit: Any, full: Any) -> None:
    full(FULL, elsewhere=False)
    line = fails(*fit("FinetuneModule", NO_CHECKPOINTS))
    assert line.endswith("there is no checkpoint, and the result is lost")


def test_a_mask_that_would_leave_its_folder_is_refused_first(
    fails: Any, fit: Any, tmp_path: Path
) -> None:
    masks = '[{"score": "magnitude", "name": "../x"}]'
    line = fails(*fit("AttributionModule", "--model.masks", masks))
    assert "'../x'" in line and not list(tmp_path.rglob("x*"))
