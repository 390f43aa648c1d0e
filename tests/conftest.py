"""What the tests share: a tiny model, a few rows, small benchmark_folders."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they bring

import benchmark_folders
import lightning as L
import numpy as np
import torch
from helpers import TOFU_LOGS, write_rows
from hypothesis import HealthCheck, settings

from wagle_pl.cli import app as cli
from wagle_pl.data.people import bundled
from wagle_pl.lm.tiny import create_tiny_llama

# the same examples everywhere, and none too slow: what a machine is busy with is no finding about the code
settings.register_profile(
    "wagle", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("wagle")


#: Files of ``tests/unit`` whose tests make a Trainer.
WITH_A_TRAINER = {
    *("test_api.py", "test_ending.py", "test_frozen.py", "test_internals.py", "test_reuse.py"),
    *("test_device.py", "test_floor.py", "test_metrics.py", "test_plan_counted.py"),
    *("test_step.py", "test_step_rules.py"),
}
#: Fixtures that run commands.
COMMANDS = {"wagle", "fails", "ranks", "lone"}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what a test is by its folder: ``unit``, or ``integration`` and, if it runs commands, ``cli``."""
    in_folder = item.path.parent.name == "e2e" or item.path.name in WITH_A_TRAINER
    item.add_marker("integration" if in_folder else "unit")
    if COMMANDS & {*getattr(item, "fixturenames", ())}:
        item.add_marker("cli")


@pytest.fixture(autouse=True)
def no_trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is marked ``unit`` makes no Trainer."""
    if request.node.get_closest_marker("unit"):
        made = AssertionError(f"it makes a Trainer: add {request.path.name} to WITH_A_TRAINER")
        monkeypatch.setattr(L.Trainer, "__init__", Mock(side_effect=made))


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
    attached = caplog.handler in package.handlers  # if the logger was like this before the test
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
    return {name: write_rows(folder / f"{name}.jsonl", part) for name, part in sets.items()}


@pytest.fixture(scope="session")
def published() -> dict[str, Any]:
    """Name of a model -> the result file published for it with TOFU."""
    return {
        name: json.loads((TOFU_LOGS / f"llama2-7b_{name}.json").read_text())
        for name in ("full", "retain90")
    }


def _benchmark(name: str) -> Any:
    """A fixture: the folder of a small benchmark, see :mod:`benchmark_folders`."""

    @pytest.fixture(scope="session", name=name)
    def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return getattr(benchmark_folders, name)(tmp_path_factory.mktemp(name))

    return made


muse, wmdp, book, detox, knowundo, lume, rwku = map(
    _benchmark, ("muse", "wmdp", "book", "detox", "knowundo", "lume", "rwku")
)
