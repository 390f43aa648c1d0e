"""A checkpoint is data: none of its kinds runs code when it is read."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from wagle_pl.core.errors import WagleError
from wagle_pl.strategies import ShardedCheckpoint
from wagle_pl.strategies.checkpoint import COMMON_FILE, save
from wagle_pl.unlearning import FinetuneModule
from wagle_pl.unlearning.export import export

FIT = ("fit", "--model", "FinetuneModule", "--trainer.max_steps", "1")


class Trap:
    """What is unpickled into a call of ``os.mkdir("trapped")``."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def trapped(path: Path, kind: str) -> Path:
    """The checkpoint with a trap in it: in torch's own container, or as a plain pickle."""
    content = {**torch.load(path, weights_only=True), "more": Trap()}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def test_the_trap_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, "plain.ckpt")
    torch.load(trapped(Path("plain.ckpt"), "zip"), weights_only=False)
    assert Path("trapped").is_dir()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_checkpoint_file(wagle: Any, fails: Any, tiny_model: str, kind: str) -> None:
    keep = (
        "--trainer.callbacks",
        "ModelCheckpoint",
        "--trainer.callbacks.dirpath",
        "ckpt",
        "--trainer.callbacks.filename",
        "one",
    )
    wagle(*FIT, *keep, "--model.model", tiny_model, "--model.output", "out")
    shutil.rmtree("out")
    path = trapped(Path("ckpt/one.ckpt"), kind)
    with pytest.raises(
        WagleError, match=r"ckpt/one.ckpt (holds posix.mkdir|is damaged, or no checkpoint)"
    ):
        export(path, "exported")
    line = fails(*FIT, "--model.model", tiny_model, "--model.output", "out", "--ckpt_path", path)
    assert "ckpt/one.ckpt" in line
    with pytest.raises((WagleError, pickle.UnpicklingError)):
        FinetuneModule.load_from_checkpoint(path)
    assert not any(Path(name).exists() for name in ("trapped", "exported", "out"))


def test_a_checkpoint_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("ranks"), [], {"model": {"name": "base"}}, {"weight": (1, 1)})
    trapped(Path("ranks") / COMMON_FILE, "zip")
    checkpoint = ShardedCheckpoint("ranks")
    with pytest.raises(WagleError, match=r"checkpoint ranks .*mkdir"):
        _ = checkpoint.common
    with pytest.raises(WagleError, match=r"checkpoint ranks .*mkdir"):
        export("ranks", "exported")
    assert not Path("trapped").exists()
