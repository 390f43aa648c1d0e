"""``wagle report`` of what the other commands wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import numbers, read, section

from wagle_pl.cli import app as cli


def test_what_the_commands_write(wagle, tiny_model, rows, capsys):
    quick = ("--trainer.max_epochs", "1", "--trainer.enable_checkpointing", "false")
    cli.main(["mask", "modules", tiny_model, "--modules", "mlp", "-o", "mask"])
    wagle(
        "fit",
        "--model",
        "UnlearnModule",
        *quick,
        "--model.model",
        tiny_model,
        "--model.output",
        "unlearned",
        "--model.mask",
        "mask.safetensors",
    )
    sets = {"forget": rows["forget_test"], "retain": rows["retain_test"]}
    test = (
        "test",
        "--model",
        "EvaluationModule",
        "--model.max_new_tokens",
        "4",
        "--data.test",
        json.dumps(sets),
    )
    wagle(*test, "--model.model", tiny_model, "--model.output", "first")
    wagle(
        *test,
        "--model.model",
        "unlearned",
        "--model.output",
        "unlearned/test",
        "--model.retrained",
        "first",
    )
    references = ("--target", "first", "--retrained", "first")
    cli.main(["report", "unlearned", *references, "-o", "out.html"])
    assert "report of 1 run written to out.html" in capsys.readouterr().out
    root = read(Path("out.html").read_text(encoding="utf-8"))
    found = numbers(root)
    for run, folder in {
        "unlearned": "unlearned/test",
        "target": "first",
        "retrained": "first",
    }.items():
        metrics = json.loads(Path(folder, "metrics.json").read_text())
        assert {name: value for (of, name), value in found.items() if of == run} == metrics
    assert len(list(root.all("svg"))) == 5  # trade-off, forget twice, retain, mask
    assert len(list(root.all("article"))) == 10
    assert "bit-identical" in section(root, "making").text
    assert "other weights" not in root.text


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "nowhere", "-o", "out.html"])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said == ["wagle: error: run folder nowhere does not exist"]
