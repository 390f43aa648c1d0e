"""What a process does when it is asked to end: with exit code 128 + the signal's number, and without a traceback.

Imports nothing beyond the standard library, so that it can be in place before anything else is imported.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Optional

#: What a terminal, a scheduler or a container sends to end a process.
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, Optional[FrameType]], Any]


class Stopped(SystemExit):
    """A signal has ended the process's work; its exit code is 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


def exit_at_once(signum: int, frame: Optional[FrameType] = None) -> None:
    """Handler while libraries are imported: there is nothing to clean up, and an exception may be lost in an import."""
    say(f"stopped by {signal.Signals(signum).name}")
    os._exit(128 + signum)


def raise_stopped(signum: int, frame: Optional[FrameType] = None) -> None:
    """Handler while there is nothing that could be saved: files half written are removed on the way out.

    Raises:
        Stopped: always.
    """
    say(f"stopped by {signal.Signals(signum).name}")
    raise Stopped(signum)


def say(message: str) -> None:
    """One line on standard error, of the first rank, from within a handler, where streams and loggers may be busy."""
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0:
        os.write(2, f"wagle: {message}\n".encode())


def install(handlers: dict[int, Any]) -> dict[int, Any]:
    """Set handlers of signals; returns those that were there, to be set again.

    Signals that the process is told to ignore (``nohup``, a job in the background) stay ignored, and outside the main
    thread nothing is set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {signum: signal.getsignal(signum) for signum in handlers}
    before = {
        signum: handler
        for signum, handler in before.items()
        if handler not in (signal.SIG_IGN, None)
    }
    for signum in before:
        signal.signal(signum, handlers[signum])
    return before


def imported() -> None:
    """Say that the libraries are imported: from now on a signal raises :class:`Stopped`."""
    install(
        {signum: raise_stopped for signum in SIGNALS if signal.getsignal(signum) is exit_at_once}
    )
