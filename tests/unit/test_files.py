"""Files as they are written: whole or not at all, under names that nothing else has, and where they were asked for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wagle_pl.attribution.scoring import MaskSpec, check_names
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.core.stopping import Stopped
from wagle_pl.core.tensorfiles import fill, lay_out


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_writers_of_one_name_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Two containers whose processes have the same number, one path."""
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def write(path: Path, text: str) -> None:
        if kind == "folder":
            path.mkdir()
        (path / "part" if kind == "folder" else path).write_text(text)

    with atomic_path(tmp_path / "out") as first:
        write(first, "first")
        with atomic_path(tmp_path / "out") as second:
            write(second, "second")
            assert first != second and first.exists()
    found = tmp_path / "out/part" if kind == "folder" else tmp_path / "out"
    assert found.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_that_waits_is_not_followed(tmp_path: Path) -> None:
    """Whatever stands beside the output, no write goes through it: temporary names cannot be known beforehand."""
    (tmp_path / f".out.{os.getpid()}.tmp").symlink_to(tmp_path / "elsewhere")
    with atomic_path(tmp_path / "out") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "out").read_text() == "new" and not (tmp_path / "out").is_symlink()
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_written_may_be_read_by_others(tmp_path: Path) -> None:
    """The permissions are those of any new file."""
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "out") as temporary:
        temporary.write_text("")
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)]
)
def test_nothing_is_left_beside(tmp_path: Path, signum: int, raised: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(raised), atomic_path(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
        signal.raise_signal(signum)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_a_signal_between_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    replace, moves = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        moves.append(target)
        if len(moves) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "out") as temporary:
        temporary.mkdir()
        monkeypatch.setattr(os, "replace", interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/old").read_text() == "old"


@pytest.mark.parametrize("before", ["nothing", "a file", "a folder", "a link"])
def test_a_folder_takes_the_place_of_what_was_there(tmp_path: Path, before: str) -> None:
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    if before == "a file":
        place.write_text("old")
    elif before != "nothing":
        kept = place if before == "a folder" else elsewhere
        kept.mkdir()
        (kept / "old").write_text("old")
    if before == "a link":
        place.symlink_to(elsewhere)
    with atomic_path(place) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert [path.name for path in place.iterdir()] == ["new"]
    assert place.is_symlink() == (before == "a link")
    assert {path.name for path in tmp_path.iterdir()} <= {"place", "elsewhere"}


@pytest.mark.parametrize("name", ["../../x", "a/b", "/x", "..", ".", "a\0b"])
def test_a_mask_stays_in_its_folder(name: str) -> None:
    spec = MaskSpec(name=name)
    with pytest.raises(WagleError, match="masks: a name must be a file name without a folder, got"):
        check_names([spec])


def test_a_file_of_tensors_is_written_in_parts(tmp_path: Path) -> None:
    """In any order, and rounded to the file's dtypes: bit for bit what safetensors itself writes of it."""
    tensors = {"b": torch.randn(5, 7), "a": torch.randn(9).bfloat16(), "c": torch.zeros(0, 3)}
    expected, path = tmp_path / "whole", tmp_path / "parts"
    save_file(tensors, expected, {"format": "pt"})
    order = load_file(expected)
    lay_out(path, [(n, t.dtype, t.shape) for n, t in order.items()], {"format": "pt"})
    for start, stop in ((20, 35), (0, 3), (3, 20)):
        parts = [(n, start, t.double().view(-1)[start:stop]) for n, t in tensors.items()]
        assert fill(path, (part for part in parts if len(part[2]))) <= 4 * (stop - start) + 2 * 9
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert path.stat().st_size - expected.stat().st_size in range(-64, 65)
