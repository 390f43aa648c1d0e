"""What the tests share: a tiny model, a few rows, and the command line in this process."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they bring

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from ranks import Ranks
from safetensors.torch import load_file

from wagle_pl.cli import app as cli
from wagle_pl.data.people import bundled
from wagle_pl.lm.tiny import create_tiny_llama

real_run = cli.run

# the same examples everywhere, and none too slow: what a machine is busy with is no finding about the code
settings.register_profile(
    "wagle", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("wagle")

TOFU = Path(__file__).parents[2] / "shared/data/tofu"
TOFU_LOGS = Path(__file__).parents[2] / "shared/data/tofu_eval_logs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes of their own run one after the other, in one of pytest's processes."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()) or item.path.name == "test_strategies.py":
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """The same random numbers for a test, whichever ran before it in its process."""
    torch.manual_seed(0)
    module = getattr(request, "module", None)  # a doctest has none
    for value in vars(module).values() if module else ():
        if isinstance(value, torch.Generator):
            value.manual_seed(0)
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = type(value.bit_generator)(0).state


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, once, though the command line keeps it from other loggers."""
    cli.quiet()
    package = logging.getLogger("wagle_pl")
    attached = (
        caplog.handler in package.handlers
    )  # by pytest, if the logger was like this before the test
    package.addHandler(caplog.handler)
    yield caplog
    if not attached:
        package.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-block Llama with random weights (about 30,000 of them) and a tokenizer."""
    texts = [row[column] for row in bundled("forget") for column in ("question", "answer")]
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(create_tiny_llama(folder, texts, vocab_size=400, hidden_size=32, layers=2, heads=4))


@pytest.fixture
def dropping_model(tiny_model: str, tmp_path: Path) -> str:
    """The tiny model with dropout in its attention."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "dropping"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Set name -> JSON-lines file: 11 forget rows, 17 retain rows, 5 test rows each, in TOFU's columns."""
    folder = tmp_path_factory.mktemp("rows")
    sets = {"forget": bundled("forget")[:11], "retain": bundled("retain")[:17]}
    sets |= {f"{name}_test": part[:5] for name, part in sets.items()}
    for name, part in sets.items():
        write_rows(folder / f"{name}.jsonl", part)
    return {name: str(folder / f"{name}.jsonl") for name in sets}


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that run commands together, for the whole session."""
    running = Ranks(tmp_path_factory.mktemp("ranks"))
    yield running
    running.stop()


def environment() -> dict[str, str]:
    """Of a command typed in a shell: without what a strategy of another test has left in this process."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {name: value for name, value in os.environ.items() if name not in left}
    return {**own, "PYTHONPATH": str(Path(__file__).parents[1])}


def same_bits(a: str, b: str) -> bool:
    """Whether two model folders hold the same weights, bit for bit."""
    first, second = load_file(f"{a}/model.safetensors"), load_file(f"{b}/model.safetensors")
    return all(
        torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def wagle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: dict[str, str]):
    """Run ``wagle <args>`` in this process and in an empty folder; returns the CLI object of a fit or test.

    ``data=True`` adds the shared rows, and quiet CPU trainer options.
    """
    monkeypatch.chdir(tmp_path)

    def run(*args: Any, data: bool = True) -> Any:
        command, *options = [str(a) for a in args]
        if data:
            files = ["--data.forget", rows["forget"], "--data.retain", rows["retain"]]
            quiet = ["enable_progress_bar", "enable_model_summary", "logger"]
            trainer = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
            trainer += [part for name in quiet for part in (f"--trainer.{name}", "false")]
            options = ["--data", "ForgetRetainDataModule", *files, *trainer, *options]
        return real_run([command, *options])

    return run


@pytest.fixture
def fails(wagle: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run ``wagle <args>`` that must end with one line on stderr and exit code 2; returns that line."""

    def run(*args: Any, data: bool = True) -> str:
        capsys.readouterr()
        monkeypatch.setattr(cli, "run", lambda arguments: wagle(*arguments, data=data))
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(a) for a in args])
        assert exit_.value.code == 2
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith("wagle: error: ")
        ]
        assert len(lines) == 1
        return lines[0]

    return run
