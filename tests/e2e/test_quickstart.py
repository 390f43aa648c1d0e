"""``wagle quickstart``: commands that run side by side end together. The whole of it runs in ``test_wheel.py``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from forked import command, start
from helpers import slow, wait_for

from wagle_pl.cli.quickstart import _commands

pytestmark = pytest.mark.usefixtures("empty_folder")


def processes(session: int) -> list[int]:
    """Ids of the processes of a session: a command's, and those that it has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):  # it has ended
            found += [int(path.name)] if os.getsid(int(path.name)) == session else []
    return found


def test_each_command_comes_after_what_it_reads() -> None:
    commands = _commands(trial=False)
    assert len(commands) == 12
    before: dict[str, set[str]] = {"base": set()}
    for name, (_, names) in commands.items():  # each after those that it needs
        before[name] = names.union(*(before[other] for other in names))
    reads = {
        "people/unlearn": "target",
        "task/attribute": "target",
        "--model.retrained": "retrained/test",
    }
    reads |= {"masks/wagle.safetensors": "wagle", "masks/random.safetensors": "random"}
    for name, (words, names) in commands.items():
        assert {needed for word, needed in reads.items() if word in words} <= before[name]
        assert name.removesuffix("/test") in {name, *names}


@pytest.mark.parametrize(
    ("send", "signum", "status"),
    [(os.killpg, signal.SIGINT, 130), slow(os.kill, signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_signal_ends_the_commands(
    send: Callable[[int, int], None], signum: int, status: int
) -> None:
    """To all of them, as from a terminal, or to the first process alone."""
    running = start(command, "quickstart", "--trial", output="printed")
    wait_for(lambda: Path("printed").is_file() and "people/finetune" in Path("printed").read_text())
    assert len(processes(running.pid)) > 2
    send(running.pid, signum)
    running.join(60)
    assert running.exitcode == status
    wait_for(lambda: not processes(running.pid), 10)
    printed = Path("printed").read_text()
    assert "Traceback" not in printed and printed.count("stopped by") == (signum == signal.SIGINT)
    assert signum == signal.SIGKILL or not list(Path().rglob(".wagle-*.tmp"))


def test_a_command_that_fails_ends_the_others() -> None:
    Path("runs/people").mkdir(parents=True)
    Path("runs/people/retrained").write_text("no folder")
    running = start(command, "quickstart", "--trial", output="printed")
    running.join(120)
    (line,) = (x for x in Path("printed").read_text().splitlines() if x.startswith("wagle: error"))
    assert running.exitcode == 2
    wait_for(lambda: not processes(running.pid), 10)
    assert "retrained" in line and "(in: wagle fit --config people/finetune" in line


def test_what_stands_in_its_way_is_kept() -> None:
    """A file named as the folder of the first model; a file in that folder."""
    for name in ("runs/people/base", "runs/people/base/thesis.tex"):
        path = Path(name)
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        running = start(command, "quickstart", "--trial", output="printed")
        running.join(60)
        assert running.exitcode == 2 and path.read_text() == "mine"
        assert Path("printed").read_text().startswith("wagle: error: output runs/people/base ")
        path.unlink()
        path.parent.rmdir()
