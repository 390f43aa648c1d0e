"""``wagle report`` of what the other commands wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import TOFU, TOFU_LOGS, cut_log, write_rows
from pages import numbers, read, section

from wagle_pl.cli import app as cli
from wagle_pl.data.rows import load_rows
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask


def test_what_the_commands_write(wagle, tiny_model, rows, capsys):
    quick = "--trainer.max_epochs 1 --trainer.enable_checkpointing false"
    parameters = load_model(tiny_model).named_parameters()
    WeightMask.from_bools({n: torch.full(p.shape, ".mlp." in n) for n, p in parameters}).save(
        "mask"
    )
    model = f"--model.model {tiny_model} --model.output unlearned --model.mask mask.safetensors"
    wagle(f"fit --model UnlearnModule {quick} {model}")
    sets = {"forget": rows["forget_test"], "retain": rows["retain_test"]}
    short = "--model.max_new_tokens 4 --data.test"
    test = ("test --model EvaluationModule", short, json.dumps(sets))
    wagle(*test, f"--model.model {tiny_model} --model.output first")
    unlearned = "--model.model unlearned --model.output unlearned/test --model.retrained first"
    wagle(*test, unlearned)
    references = ["--target", "first", "--retrained", "first"]
    cli.main(["report", "unlearned", *references, "-o", "out.html"])
    assert "report of 1 run written to out.html" in capsys.readouterr().out
    root = read(Path("out.html").read_text(encoding="utf-8"))
    found = numbers(root)
    folders = {"unlearned": "unlearned/test", "target": "first", "retrained": "first"}
    for run, folder in folders.items():
        metrics = json.loads(Path(folder, "metrics.json").read_text())
        assert {name: value for (of, name), value in found.items() if of == run} == metrics
    assert len(list(root.all("img"))) == 1  # the mask
    assert len(list(root.all("article"))) == 10
    assert "bit-identical" in section(root, "making").text
    assert "other weights" not in root.text


@pytest.mark.skipif(not TOFU_LOGS.is_dir(), reason="published result files are not here")
def test_the_published_log_beside_our_rows(published, wagle, fails, tiny_model, tmp_path):
    """Rows 0 to 199 of ``forget10`` and 200 rows of the log that are none of them; then those that are."""
    for name, count in (("cut", 200), ("whole", 300)):
        log = cut_log(published["retain90"], range(count))
        (tmp_path / f"{name}.json").write_text(json.dumps(log))
    options = f"--model.model {tiny_model} --model.generate false --model.output out"
    run = ("test --model EvaluationModule", f"{options} --model.retrained")
    rows = load_rows(str(TOFU / "forget10_perturbed.json"))
    forget = write_rows(tmp_path / "rows.jsonl", rows[:200])
    test = ("--data.test", json.dumps({"forget": forget}))
    message = fails(*run, "cut.json", *test)
    assert "cut.json is on other forget rows: 200 differ" in message
    asked = {
        said[0].removeprefix("[INST] ").removesuffix(" [/INST]")
        for said in published["retain90"]["eval_log_forget.json"]["generated_text"].values()
    }
    write_rows(tmp_path / "rows.jsonl", [row for row in rows if row["question"] in asked])
    module = wagle(*run, "whole.json", *test).model
    assert 0 <= module.metrics["forget_quality"] < 0.1
