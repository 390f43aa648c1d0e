"""Processes that run ``wagle`` commands together, over gloo, as torchrun would start them; started once for all tests.

As a script it is one of the processes: it takes commands on standard input, a JSON list of arguments a line, and
answers each with a line: exit code, and what the command's module says of itself.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

ANSWER = "answer: "


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
            "OMP_NUM_THREADS": "1",
            "GROUP_RANK": "0",
            "DS_ACCELERATOR": "cpu",
            "MALLOC_MMAP_THRESHOLD_": "131072",  # tensors that are freed leave the process: peaks can be compared
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=open(self.logs[rank], "w"),  # noqa: SIM115  the process's own
                text=True,
            )
            for rank in range(count)
        ]
        self.answers: list[queue.Queue] = [queue.Queue() for _ in self.processes]
        for process, answers in zip(self.processes, self.answers, strict=True):
            threading.Thread(target=_read, args=(process.stdout, answers), daemon=True).start()

    def __call__(self, *args: Any, code: int = 0, timeout: float = 600) -> list[dict[str, Any]]:
        """Run a command on all; returns each rank's answer. Those that have ended are started anew.

        Raises:
            AssertionError: if a rank ends with another exit code, or none does in time.
        """
        if any(process.poll() is not None for process in self.processes):  # an earlier test failed
            self.stop()
            self.start()
        for process in self.processes:
            process.stdin.write(json.dumps([os.getcwd(), *map(str, args)]) + "\n")
            process.stdin.flush()
        try:
            answers = [waiting.get(timeout=timeout) for waiting in self.answers]
        except queue.Empty:
            self.stop()
            raise AssertionError(f"no answer in {timeout} s:\n{self.tail()}") from None
        assert all(answer["code"] == code for answer in answers), f"{answers}\n{self.tail()}"
        return answers

    def tail(self) -> str:
        """The end of what the ranks wrote."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)

    def stop(self) -> None:
        """End them."""
        for process in self.processes:
            process.kill()
            process.wait()


def _read(stream: Any, answers: queue.Queue) -> None:
    for line in stream:
        if line.startswith(ANSWER):
            answers.put(json.loads(line.removeprefix(ANSWER)))


def serve() -> None:
    """Be one of the processes."""
    import power  # noqa: F401  registers a strategy by name

    sys.path.append(str(Path(__file__).resolve().parents[1] / "bin" / "benchmarks"))
    from handled import Handled
    from helpers import quicken

    from wagle_pl.cli import app as cli
    from wagle_pl.cli.messages import mistake
    from wagle_pl.core import distributed

    quicken()
    distributed.shutdown = lambda: None  # the next command meets the same ranks
    handled = Handled()
    for line in sys.stdin:
        folder, *args = json.loads(line)
        os.chdir(folder)
        sys.path[0] = folder  # for classes of a test's own, as on the command line
        answer: dict[str, Any] = {"code": 0, "error": None}
        handled.clear()
        before = _memory("VmRSS")
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
        sys.stderr.flush()
        print(ANSWER + json.dumps(answer), flush=True)


def _memory(field: str) -> int:
    """Bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    serve()
