"""Processes that run ``wagle`` commands together, over gloo, as torchrun would start them; one start for all tests."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forked import FORKED, start
from helpers import quicken

from wagle_pl.cli import app as cli
from wagle_pl.cli.messages import mistake, quiet
from wagle_pl.core import distributed


class Ranks:
    """The processes, seen from a test.

    Args:
        folder: where their output goes.
        count: how many.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.logs = [folder / f"rank-{rank}.log" for rank in range(count)]
        self.start()

    def start(self) -> None:
        """Start them."""
        count = len(self.logs)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "TORCHELASTIC_RUN_ID": "tests",
            "GROUP_RANK": "0",
            "DS_ACCELERATOR": "cpu",
        }
        self.processes, self.pipes = [], []
        for rank, log in enumerate(self.logs):
            log.touch()
            ours, theirs = FORKED.Pipe()
            env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.processes.append(start(serve, theirs, output=log, env=env))
            self.pipes.append(ours)
            theirs.close()  # so that a process that has ended is noticed

    def __call__(
        self,
        *args: Any,
        code: int | list[int] = 0,
        timeout: float = 600,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Run a command on all; returns each rank's answer. Those that have ended are started anew.

        Args:
            *args: of the command.
            code: exit code of all, or of each.
            timeout: seconds.
            meanwhile: called once the command has begun.

        Raises:
            AssertionError: if a rank ends with another exit code, or none does in time.
        """
        if not all(process.is_alive() for process in self.processes):  # an earlier test failed
            self.stop()
            self.start()
        for pipe in self.pipes:
            pipe.send([os.getcwd(), *map(str, args)])
        if meanwhile:
            meanwhile()
        answers = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if not pipe.poll(timeout):
                self.stop()
                raise AssertionError(f"no answer in {timeout} s:\n{self.tail()}")
            try:
                answers.append(pipe.recv())
            except EOFError:  # it was killed
                process.join()
                answers.append({"code": process.exitcode})
        expected = code if isinstance(code, list) else [code] * len(answers)
        found = [answer["code"] for answer in answers]
        assert found == expected, f"{answers}\n{self.tail()}"
        return answers

    def said(self) -> str:
        """All that the ranks have written."""
        return "".join(log.read_text() for log in self.logs)

    def tail(self) -> str:
        """The end of it, of each."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)

    def stop(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.join()


def serve(pipe: Connection) -> None:
    """Be one of the processes: a command after the other, each answered with its exit code and what its module says."""
    import power  # noqa: F401  registers a strategy by name
    from lightning.pytorch.utilities import rank_zero_only

    sys.path.append(str(Path(__file__).resolve().parents[1] / "bin" / "benchmarks"))
    from handled import Handled

    quiet()
    quicken()
    rank_zero_only.rank = int(os.environ["RANK"])  # as Lightning does when it is imported
    distributed.shutdown = lambda: None  # the next command meets the same ranks
    handled = Handled()
    sys.path.insert(0, "")
    while True:
        folder, *args = pipe.recv()
        os.chdir(folder)
        sys.path[0] = folder  # for classes of a test's own, as on the command line
        answer: dict[str, Any] = {"code": 0, "error": None}
        handled.clear()
        before, sent = _memory("VmRSS"), _sent()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        try:
            done = cli.run(args)
            answer["metrics"] = getattr(done.model, "metrics", None)
            logged = done.trainer.callback_metrics.items()
            answer["logged"] = {name: value.item() for name, value in logged}
        except Exception as error:
            said = mistake(error)
            answer.update(code=1 if said is None else 2, error=said or str(error))
            if said is None:
                traceback.print_exc()
        except SystemExit as ended:  # what is wrong is in the log
            answer.update(code=ended.code, error="see the log")
        answer |= {"peak": _memory("VmHWM") - before, "bytes": handled.bytes}
        answer["bytes"]["sent"] = _sent() - sent - handled.bytes["written"]
        pipe.send(answer)


def _memory(field: str) -> int:
    """Bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _sent() -> int:
    """Bytes that this process has given Linux to write: to other ranks, and to files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))
