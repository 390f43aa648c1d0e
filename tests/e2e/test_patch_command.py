"""``wagle patch`` on a real model: what apply writes loads, and revert gives the base back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wagle_pl.cli import app as cli
from wagle_pl.core.tensorfiles import TensorFiles
from wagle_pl.lm import models
from wagle_pl.lm.saving import read_record
from wagle_pl.unlearning.patch import digest_of


def test_patch_commands_and_records(
    tmp_path: Path,
    tiny_model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real model, its tokenizer and its record: what apply writes loads, and says how it was made."""
    unlearned = tmp_path / "unlearned"
    shutil.copytree(tiny_model, unlearned)
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(unlearned / "model.safetensors")
    for tensor in tensors.values():
        mask = torch.rand(tensor.shape, generator=generator) < 0.1
        tensor.copy_(torch.where(mask, tensor * 1.01, tensor))
    save_file(tensors, unlearned / "model.safetensors", metadata={"format": "pt"})
    run = {"module": "UnlearnModule", "base": "base", "base_fingerprint": "0" * 64, "seed": 0}
    run |= {"data": {"forget": "f.jsonl"}, "streams": ["forget"], "objective": {"class": "NPO"}}
    run |= {"mask": None, "verified": None, "steps": 3, "seconds": 1.0, "config": {}}
    (unlearned / "wagle.json").write_text(json.dumps({"format_version": 1, "lineage": [run]}))
    before = (Path(tiny_model) / "wagle.json").read_text()
    monkeypatch.chdir(tmp_path)

    def patch(*args: str) -> None:
        cli.main(["patch", *args])

    patch("make", tiny_model, "unlearned", "-o", "forget.patch")
    patch("info", "forget.patch", "--tensors")
    assert "model.embed_tokens.weight" in capsys.readouterr().out
    patch("apply", tiny_model, "forget.patch", "-o", "applied")
    ours, theirs = (models.load_model(name).state_dict() for name in ("applied", "unlearned"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert models.load_tokenizer("applied").eos_token
    record = read_record("applied")
    assert record["lineage"] == [run]
    assert record["patched"]["fingerprint"] == digest_of(TensorFiles(unlearned))
    assert "f.jsonl" in Path("applied/README.md").read_text()
    patch("revert", "applied", "forget.patch", "-o", "back")
    assert "lineage" not in before
    for file in ("model.safetensors", "wagle.json", "README.md"):
        assert Path("back", file).read_bytes() == Path(tiny_model, file).read_bytes()
    update = ("--form", "sparse", "--inverse", "rollback.safetensors")
    patch("convert", tiny_model, "forget.patch", "-o", "update.safetensors", *update)
    assert "rollback.safetensors: " in capsys.readouterr().out
