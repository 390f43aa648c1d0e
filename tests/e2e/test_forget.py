"""``wagle forget`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import same_bits, words

from wagle_pl.cli import app as cli


def run(command: str, *options: Any) -> None:
    cli.main(words(*command.split(), *options))


def test_forget_writes_a_model_a_patch_and_a_page(
    empty_folder: None, tiny_model: str, rows: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--retain {rows['retain']} --max_steps 2 --density 0.1 --patch p.safetensors"
    run(f"forget {tiny_model} {rows['forget']} -o out", options, "--report r.html")
    printed = capsys.readouterr().out
    assert "model written to out" in printed and "never seen" in printed
    step = json.loads(Path("out/wagle.json").read_text())["lineage"][-1]
    assert (step["objective"]["class"], step["steps"]) == ("NPO", 2)
    assert abs(step["mask"]["density"] - 0.1) < 1e-4
    assert "<h2>Answers</h2>" in Path("r.html").read_text()
    run(f"patch apply {tiny_model} p.safetensors -o applied")
    assert same_bits("out", "applied")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("ROWS -o taken", "taken"),
        ("no-rows.jsonl -o x", "no-rows.jsonl"),
        ("ROWS -o x --density 1.5", "must be in (0, 1], got 1.5"),
    ],
)
def test_a_mistake_of_forget_is_one_line(
    fails: Any, tiny_model: str, rows: dict[str, str], options: str, said: str
) -> None:
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    forget = f"forget {tiny_model} {options.replace('ROWS', rows['forget'])}"
    assert said in fails(forget, data=False)
