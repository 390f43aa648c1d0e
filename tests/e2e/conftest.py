"""The command line: in this process, and on two processes together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, data_options, quicken, words
from ranks import Ranks

from wagle_pl.cli import app as cli

real_run = cli.run
quicken()


#: Files whose tests run in one of pytest's processes: they start others, or share what takes long to make.
GROUPS = {"test_strategies.py": "processes", "test_stopping.py": "processes"}
GROUPS |= {"test_study_runs.py": "study", "test_wheel.py": "wheel"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on two ranks run one after the other, in one of pytest's processes; xdist starts with the largest group."""
    for item in items:
        ranks = {"ranks", "lone"} & {*getattr(item, "fixturenames", ())}
        if group := "ranks" if ranks else GROUPS.get(item.path.name):
            item.add_marker(pytest.mark.xdist_group(group))


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
def wagle(empty_folder: None, rows: dict[str, str]):
    """Run ``wagle <args>`` in this process and in an empty folder; returns the CLI object of a fit or test.

    Arguments as :func:`helpers.words`. ``data=True`` adds the shared rows, and quiet CPU trainer options.
    """

    def run(command: str, *options: Any, data: bool = True) -> Any:
        common = [*data_options(rows), QUIET, "--trainer.devices 1"] if data else []
        return real_run(words(*command.split(), *common, *options))

    return run


@pytest.fixture
def fails(wagle: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run ``wagle <args>`` that must end with one line on stderr and exit code 2; returns that line."""

    def run(command: str, *options: Any, data: bool = True) -> str:
        capsys.readouterr()
        monkeypatch.setattr(cli, "run", lambda arguments, _: wagle(*arguments, data=data))
        with pytest.raises(SystemExit) as exit_:
            cli.main(words(*command.split(), *options))
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = (line for line in lines if line.startswith("wagle: error: "))
        return line

    return run
