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
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
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
    run = {
        "module": "UnlearnModule",
        "base": "base",
        "base_fingerprint": "0" * 64,
        "data": {"forget": "f.jsonl"},
        "streams": ["forget"],
        "objective": {"class": "NPO"},
        "mask": None,
        "verified": None,
        "steps": 3,
        "seconds": 1.0,
        "seed": 0,
        "config": {},
    }
    (unlearned / "wagle.json").write_text(json.dumps({"format_version": 1, "lineage": [run]}))
    before = (Path(tiny_model) / "wagle.json").read_text()
    cli.main(["patch", "make", tiny_model, str(unlearned), "-o", str(tmp_path / "forget.patch")])
    cli.main(["patch", "info", str(tmp_path / "forget.patch"), "--tensors", "true"])
    assert "model.embed_tokens.weight" in capsys.readouterr().out
    cli.main(
        [
            "patch",
            "apply",
            tiny_model,
            str(tmp_path / "forget.patch"),
            "-o",
            str(tmp_path / "applied"),
        ]
    )
    ours, theirs = (
        models.load_model(str(folder)).state_dict() for folder in (tmp_path / "applied", unlearned)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert models.load_tokenizer(str(tmp_path / "applied")).eos_token
    record = read_record(str(tmp_path / "applied"))
    assert record["lineage"] == [run] and record["patched"]["fingerprint"] == digest_of(
        TensorFiles(unlearned)
    )
    assert "f.jsonl" in (tmp_path / "applied" / "README.md").read_text()
    cli.main(
        [
            "patch",
            "revert",
            str(tmp_path / "applied"),
            str(tmp_path / "forget.patch"),
            "-o",
            str(tmp_path / "back"),
        ]
    )
    base, back = (
        (folder / "model.safetensors").read_bytes()
        for folder in (Path(tiny_model), tmp_path / "back")
    )
    assert base == back
    assert "lineage" not in before
    assert (tmp_path / "back/wagle.json").read_text() == before
    assert (tmp_path / "back/README.md").read_text() == (Path(tiny_model) / "README.md").read_text()
