"""The README's example of each extension point, as it stands there, run by class path."""

import re
import shlex
from pathlib import Path

import pytest

from wagle_pl import WeightMask
from wagle_pl.cli import app as cli
from wagle_pl.cli.parser import find

README = Path(__file__).parents[2] / "README.md"
PAGES = (README, README.parent / "configs/testing.md")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    )
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
    *_, code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    steps = "max_steps=2, accelerator='cpu', devices=1, logger=False, enable_checkpointing=False"
    short = {"runs/people/target": tiny_model, "max_epochs=2": steps}
    for printed, here in short.items():
        assert printed in code
        code = code.replace(printed, here)
    exec(code, {})
    assert (tmp_path / "runs/mine/model.safetensors").is_file()


def test_every_command_of_the_readme_exists():
    from pkgutil import resolve_name

    from wagle_pl.cli.app import COMMANDS

    text = "".join(page.read_text() for page in PAGES)
    for command, verbs in re.findall(r"`wagle (\w+) ([\w|]+)`", text):
        assert set(verbs.split("|")) == set(resolve_name(COMMANDS[command]))
    for config in re.findall(r"--config (\S+)", text):
        assert find(config).is_file()


def _commands() -> list[list[str]]:
    """The pages' commands that take configurations, as lists of arguments."""
    text = "".join(page.read_text() for page in PAGES)
    blocks = "".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [
        shlex.split(line, comments=True)
        for line in blocks.splitlines()
        if line.startswith("wagle ")
    ]
    return [line[1:] for line in lines if line[1] in ("fit", "test", "study")]


def test_every_option_of_the_readme_exists(monkeypatch, capsys):
    monkeypatch.chdir(README.parent)
    commands = _commands()
    assert len(commands) > 10
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--print_config"])
        assert not ended.value.code, (command, capsys.readouterr().err)
