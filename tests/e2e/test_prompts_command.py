"""Prompts are recorded with masks and results, and those of another run are noticed."""

from __future__ import annotations

import json
import shutil

from helpers import LLAMA_3

from wagle_pl.cli.mask import info
from wagle_pl.masks import WeightMask

SYSTEM = ("--data.system_prompt", "Be brief.")


ONE_STEP = ("--trainer.max_steps", "1", "--trainer.enable_checkpointing", "false")


def test_a_mask_says_its_prompts_and_another_run_s_are_noticed(
    wagle, tiny_model, tmp_path, heard, capsys
):
    attribute = (
        "fit",
        "--model",
        "AttributionModule",
        "--model.model",
        tiny_model,
        "--model.output",
        "mask",
    )
    wagle(
        *attribute, *SYSTEM, "--trainer.max_epochs", "1", "--trainer.enable_checkpointing", "false"
    )
    prompts = WeightMask.load(tmp_path / "mask").metadata["prompts"]
    assert prompts == {
        "prompt": "<|system|>Be brief.<|user|>{question}<|assistant|>",
        "answer": "{answer}<|end|>",
        "system_prompt": "Be brief.",
        "chat_template_kwargs": {},
    }
    capsys.readouterr()
    info("mask")
    assert json.dumps(prompts) in capsys.readouterr().out
    unlearn = (
        "fit",
        "--model",
        "UnlearnModule",
        "--model.model",
        tiny_model,
        "--model.mask",
        "mask",
    )
    wagle(*unlearn, "--model.output", "same", *SYSTEM, *ONE_STEP)
    assert "other prompts" not in heard.text
    wagle(*unlearn, "--model.output", "other", *ONE_STEP)
    assert (
        "mask mask was made with other prompts (system_prompt 'Be brief.' there, None here): give both"
        in heard.text
    )
    record = json.loads((tmp_path / "same/wagle.json").read_text())
    assert record["lineage"][-1]["prompts"] == prompts
    assert "## Prompts" in (tmp_path / "same/README.md").read_text()
    assert "system_prompt: Be brief." in (tmp_path / "same/README.md").read_text()


def test_results_of_other_prompts(wagle, fails, tiny_model, tmp_path, heard):
    test = (
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        tiny_model,
        "--model.generate",
        "false",
    )
    wagle(*test, "--model.output", "brief", *SYSTEM)
    assert (
        json.loads((tmp_path / "brief/metrics.info.json").read_text())["prompts"]["system_prompt"]
        == "Be brief."
    )
    line = fails(*test, "--model.output", "plain", "--model.retrained", "brief")
    assert (
        "model.retrained: brief was tested with other prompts (system_prompt 'Be brief.' there, None here)"
        in line
    )
    assert "test that model with these, or give" in line and not (tmp_path / "plain").exists()
    wagle(*test, "--model.output", "plain", "--model.target", "brief")
    assert (
        "the target's results are of other prompts: system_prompt 'Be brief.' there, None here"
        in heard.text
    )
    wagle(*test, "--model.output", "brief_again", *SYSTEM, "--model.retrained", "brief")


def test_the_command_line_takes_the_options(wagle, fails, tmp_path, tiny_model):
    folder = tmp_path / "llama"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(LLAMA_3)
    test = (
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        folder,
        "--model.generate",
        "false",
    )
    wagle(
        *test, "--model.output", "out", "--data.chat_template_kwargs", "{date_string: 26 Jul 2024}"
    )
    prompts = json.loads((tmp_path / "out/metrics.info.json").read_text())["prompts"]
    assert "Today Date: 26 Jul 2024" in prompts["prompt"]
    assert prompts["chat_template_kwargs"] == {"date_string": "26 Jul 2024"}
    wagle(*test, "--model.output", "default")
    prompts = json.loads((tmp_path / "default/metrics.info.json").read_text())["prompts"]
    assert prompts["chat_template_kwargs"] == {"date_string": "10 Apr 2025"}
    line = fails(*test, "--model.output", "wrong", "--data.chat_template_kwargs", "{date: 1}")
    assert "does not read 'date'" in line
