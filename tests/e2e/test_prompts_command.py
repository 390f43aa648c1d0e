"""Prompts are recorded with masks and results, and those of another run are noticed."""

from __future__ import annotations

import json
import shutil

from helpers import LLAMA_3

from wagle_pl.cli.mask import info
from wagle_pl.masks import WeightMask

SYSTEM = ("--data.system_prompt", "Be brief.")
FIT = ("fit", "--trainer.enable_checkpointing=false", "--trainer.max_steps=1")
TEST = ("test", "--model=EvaluationModule", "--model.generate=false")


def test_a_mask_says_its_prompts_and_another_run_s_are_noticed(
    wagle, tiny_model, tmp_path, heard, capsys
):
    model = f"--model.model={tiny_model}"
    wagle(*FIT, "--model=AttributionModule", model, "--model.output=mask", *SYSTEM)
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
    unlearn = (*FIT, "--model=UnlearnModule", model, "--model.mask=mask")
    wagle(*unlearn, "--model.output=same", *SYSTEM)
    assert "other prompts" not in heard.text
    wagle(*unlearn, "--model.output=other")
    differ = "other prompts (system_prompt 'Be brief.' there, None here)"
    assert f"mask mask was made with {differ}: give both" in heard.text
    record = json.loads((tmp_path / "same/wagle.json").read_text())
    assert record["lineage"][-1]["prompts"] == prompts
    card = (tmp_path / "same/README.md").read_text()
    assert "## Prompts" in card and "system_prompt: Be brief." in card


def test_results_of_other_prompts(wagle, fails, tiny_model, tmp_path, heard):
    test = (*TEST, f"--model.model={tiny_model}")
    wagle(*test, "--model.output=brief", *SYSTEM)
    recorded = json.loads((tmp_path / "brief/metrics.info.json").read_text())["prompts"]
    assert recorded["system_prompt"] == "Be brief."
    line = fails(*test, "--model.output=plain", "--model.retrained=brief")
    differ = "other prompts (system_prompt 'Be brief.' there, None here)"
    assert f"model.retrained: brief was tested with {differ}" in line
    assert "test that model with these, or give" in line and not (tmp_path / "plain").exists()
    wagle(*test, "--model.output=plain", "--model.target=brief")
    differ = "other prompts: system_prompt 'Be brief.' there, None here"
    assert f"the target's results are of {differ}" in heard.text
    wagle(*test, "--model.output=brief_again", *SYSTEM, "--model.retrained=brief")


def test_the_command_line_takes_the_options(wagle, fails, tmp_path, tiny_model):
    folder = tmp_path / "llama"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(LLAMA_3)
    option = "--data.chat_template_kwargs"
    test = (*TEST, f"--model.model={folder}")
    wagle(*test, "--model.output=out", option, "{date_string: 26 Jul 2024}")
    prompts = json.loads((tmp_path / "out/metrics.info.json").read_text())["prompts"]
    assert "Today Date: 26 Jul 2024" in prompts["prompt"]
    assert prompts["chat_template_kwargs"] == {"date_string": "26 Jul 2024"}
    line = fails(*test, "--model.output=wrong", option, "{date: 1}")
    assert "does not read 'date'" in line
