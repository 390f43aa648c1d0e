"""A checkpoint is data: none of its kinds runs code when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import trapped

from wagle_pl.core.errors import WagleError
from wagle_pl.strategies import ShardedCheckpoint
from wagle_pl.strategies.checkpoint import COMMON_FILE, save
from wagle_pl.unlearning.export import export


def test_the_trap_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({}, "plain.ckpt")
    torch.load(trapped(Path("plain.ckpt"), "zip"), weights_only=False)
    assert Path("trapped").is_dir()


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
