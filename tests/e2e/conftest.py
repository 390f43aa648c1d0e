"""The command line: in this process, and on two processes together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

from wagle_pl.cli import app as cli

real_run = cli.run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on two processes run one after the other, in one of pytest's processes; two files in the other."""
    for item in items:
        if item.path.name in ("test_strategies.py", "test_stopping.py"):
            item.add_marker(pytest.mark.xdist_group("strategies"))
        elif "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that run commands together, for the whole session."""
    running = Ranks(tmp_path_factory.mktemp("ranks"))
    yield running
    running.stop()


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


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
