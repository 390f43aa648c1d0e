"""The README: each of its code blocks runs, as it stands there but for the model and the rows."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from helpers import random_bools
from torch import Tensor

from wagle_pl import WeightMask
from wagle_pl.api.verdict import Asked, Scores, judge
from wagle_pl.cli import app as cli
from wagle_pl.cli.parser import find
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.data.people import bundled
from wagle_pl.lm.models import load_model

README = Path(__file__).parents[2] / "README.md"
PAGES = (README, *(README.parent / f"configs/{page}.md" for page in ("testing", "own/README")))
FENCED = r"^```\w*\n(.*?)^```$"
#: Number of code blocks by heading; the tests below run each.
BLOCKS = {"Install": 1, "Three lines": 2, "Two commands": 1, "Your own data": 1, "Extend": 3}


def blocks(heading: str) -> list[str]:
    """The code blocks under a heading of the README."""
    text = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(FENCED, text, re.DOTALL | re.MULTILINE)


def run_command(line: str, tmp_path: Path, status: int = 0) -> str:
    """What ``wagle`` prints, run with a line's arguments by the shipped parser in its own process."""
    output = tmp_path / "printed.txt"
    _, *arguments = shlex.split(line, comments=True)
    process = forked.start(forked.command, *arguments, output=output)
    process.join(120)
    printed = output.read_text()
    assert process.exitcode == status, f"{line}\n{printed}"
    return printed


def test_every_block_has_a_test() -> None:
    text = README.read_text(encoding="utf-8")
    assert sum(BLOCKS.values()) == text.count("\n```") / 2
    assert {heading: len(blocks(heading)) for heading in BLOCKS} == BLOCKS


def test_install() -> None:
    """The wheel itself is installed in ``test_wheel.py``."""
    (block,) = blocks("Install")
    package = metadata("wagle-pl")
    assert f"pip install {package['Name']} " in block and f"{package['Name']}[lab]" in block
    assert "lab" in (package.get_all("Provides-Extra") or [])


def test_three_lines(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{key: row[key] for key in ("question", "answer")} for row in bundled("forget")[:2]]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, printed = blocks("Three lines")
    exec(code.replace("my-model", tiny_model), {})
    assert capsys.readouterr().out.startswith("not known before: the model knew 0 of 2")
    line = f"wagle forget {tiny_model} rows.jsonl -o unlearned"
    assert "not known before" in run_command(line, tmp_path, status=3)
    assert line.replace(tiny_model, "my-model") in README.read_text()
    known, gone = (Asked([p], [0.1], [1.0]) for p in (0.9, 0.1))
    sentence = judge(Scores(known, known, [0.9] * 2), Scores(gone, gone, [0.9] * 2)).sentence
    digits = re.compile(r"\d[\d.e-]*")
    assert digits.sub("0", printed.replace("\n", " ")).strip() == digits.sub("0", sentence)


def test_two_commands() -> None:
    """``bin/test`` is what runs this test; ``test_wheel.py`` runs a quickstart."""
    (block,) = blocks("Two commands")
    scripts = re.findall(r"^bin/(\w+)", block, re.MULTILINE)
    assert scripts == ["quickstart", "test"]
    for script in scripts:
        assert (README.parent / "bin" / script).stat().st_mode & 0o100
    assert "-m wagle_pl quickstart" in (README.parent / "bin/quickstart").read_text()


def test_your_own_data(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("forget", "retain"):
        rows = bundled(name)[:4]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (block,) = blocks("Your own data")
    _, *lines = block.splitlines()
    printed = [run_command(line.replace("$M", tiny_model), tmp_path) for line in lines]
    assert "nothing was forgotten" in printed[3]  # as the text below the block says
    assert "report of 1 run written to report.html" in printed[4]
    more = f"""
        wagle --help
        wagle --version
        wagle fit --help
        wagle fit --model.help UnlearnModule
        wagle fit --config own/data --config task/attribute --model.model {tiny_model} --print_config
        wagle mask info runs/own/masks/wagle.safetensors
        wagle mask random runs/own/masks/wagle.safetensors -o random.safetensors
        wagle mask compare runs/own/masks/wagle.safetensors random.safetensors
        wagle mask invert random.safetensors -o rest.safetensors
        wagle mask combine rest.safetensors and random.safetensors -o none.safetensors
        wagle mask plot random.safetensors -o plot.svg
        wagle patch make {tiny_model} runs/own/npo -o p.safetensors
        wagle patch info p.safetensors
        wagle patch apply {tiny_model} p.safetensors -o applied
        wagle patch revert applied p.safetensors -o reverted
        wagle plan --model {tiny_model}
    """
    for line in filter(None, map(str.strip, more.splitlines())):
        run_command(line, tmp_path)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(blocks("Extend")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)


def test_examples_run(mine, wagle, tiny_model, tmp_path):
    fit = (
        "fit --trainer.accelerator cpu --trainer.enable_checkpointing false --trainer.max_steps 3",
        "--trainer.logger false --data mine.Numbers --data.batch_size 4 --model.model",
        tiny_model,
    )
    attribute = "--model AttributionModule --model.score mine.Product --model.density 0.25"
    module = wagle(*fit, attribute, "--model.output mask", data=False).model
    assert type(module.specs[0].score).__name__ == "Product"
    assert WeightMask.load("mask").density == pytest.approx(0.25, abs=1e-4)
    unlearn = "--model UnlearnModule --model.objective mine.Flat --model.mask mask.safetensors"
    module = wagle(*fit, unlearn, "--model.output out", data=False).model
    assert type(module.objective).__name__ == "Flat" and module.global_step == 3
    assert (tmp_path / "out/model.safetensors").exists()


def test_use_from_python_runs(tiny_model, tmp_path, monkeypatch):
    """As printed, but on the tiny model and for two steps."""
    monkeypatch.chdir(tmp_path)
    code = blocks("Extend")[1]
    steps = "max_steps=2, accelerator='cpu', devices=1, logger=False, enable_checkpointing=False"
    short = {"runs/people/target": tiny_model, "max_epochs=2": steps}
    for printed, here in short.items():
        assert printed in code
        code = code.replace(printed, here)
    exec(code, {})
    assert (tmp_path / "runs/mine/model.safetensors").is_file()


def test_a_mask_without_a_trainer(tiny_model: str) -> None:
    lm = load_model(tiny_model, torch.float32)
    ids: Tensor = torch.randint(3, 90, (2, 3, 8))
    batches = [
        {
            name: {"input_ids": i, "labels": i}
            for name, i in zip(("forget", "retain"), ids, strict=True)
        }
    ]
    names: dict[str, Any] = {"lm": lm, "batches": batches}
    exec(blocks("Extend")[2], names)
    assert names["mask"].count() == int(0.2 * lm.num_parameters())


def test_testing_from_python_runs(tiny_model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGES[1].read_text(), re.DOTALL))
    files = {"forget.jsonl": rows["forget_test"], "retain.jsonl": rows["retain_test"]}
    for printed, here in {"runs/model": tiny_model, **files}.items():
        assert printed in code
        code = code.replace(printed, here)
    names: dict = {}
    exec(code, names)
    found = names["metrics"].compute()["forget/probability"].item()
    assert found == names["results"].metrics["forget/probability"]


def test_every_command_of_the_readme_exists():
    from pkgutil import resolve_name

    from wagle_pl.cli.app import COMMANDS

    text = "".join(page.read_text() for page in PAGES)
    for command, verbs in re.findall(r"`wagle (\w+) ([\w|]+)`", text):
        assert set(verbs.split("|")) <= set(resolve_name(COMMANDS[command]))
    for config in re.findall(r"--config (\S+)", text):
        assert find(config).is_file()


def _commands() -> list[list[str]]:
    """The pages' commands that take configurations, as lists of arguments."""
    text = "".join(page.read_text() for page in PAGES)
    code = "".join(re.findall(FENCED, text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    lines = [
        shlex.split(line, comments=True) for line in code.splitlines() if line.startswith("wagle ")
    ]
    return [line[1:] for line in lines if line[1] in ("fit", "test", "study")]


def test_every_option_of_the_readme_exists(monkeypatch, capsys):
    monkeypatch.chdir(README.parent)
    commands = _commands()
    assert len(commands) >= 10
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--print_config"])
        assert not ended.value.code, (command, capsys.readouterr().err)


def test_a_mask_in_the_trainer_of_transformers(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's code: every selected weight moves, with weight decay and clipping, and no other does."""
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    page = (README.parent / "configs/own/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    # a device of another test of this process cannot pin memory
    code = code.replace('save_strategy="no"', 'save_strategy="no", dataloader_pin_memory=False')
    lm, before = load_model(tiny_model), load_model(tiny_model)
    mask = WeightMask.from_bools(random_bools(parameter_shapes(lm), 0.3))
    mask.save("mask")
    ids = list(range(20))
    exec(code, {"lm": lm, "rows": [{"input_ids": ids, "labels": ids}] * 8})
    for (name, after), (_, weight) in zip(
        lm.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(after != weight, mask[name]), name
