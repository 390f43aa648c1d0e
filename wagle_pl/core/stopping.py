"""How a process ends at a signal: exit code 128 + its number, and no traceback.

Imports the standard library only, so that handlers can be set before anything else is imported.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Optional

#: What a terminal, a scheduler or a container sends to end a process.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """A signal has ended the process; its exit code is 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


def exit_at_once(signum: int, frame: Optional[FrameType] = None) -> None:
    """Handler while libraries are imported, where an exception may be swallowed."""
    say(f"stopped by {signal.Signals(signum).name}")
    os._exit(128 + signum)


def raise_stopped(signum: int, frame: Optional[FrameType] = None) -> None:
    """Handler while there is nothing to save: unfinished files are removed on the way out. Python
    drops what is raised in a ``__del__``: there the signal is sent again, a moment later."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            threading.Timer(0.05, os.kill, (os.getpid(), signum)).start()
            return
        frame = frame.f_back
    say(f"stopped by {signal.Signals(signum).name}")
    raise Stopped(signum)


def is_first_rank() -> bool:
    """Whether this process prints for all ranks of its run."""
    return (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0") == "0"


def say(message: str) -> None:
    """Write one line to standard error, on rank 0; safe in a handler, where loggers may be busy."""
    if is_first_rank():
        os.write(2, f"wagle: {message}\n".encode())


def install(handlers: Mapping[int, Any]) -> dict[int, Any]:
    """Set signal handlers; returns the previous ones, to be restored later.

    Signals that the process ignores (``nohup``, a background job) stay ignored; outside the main
    thread nothing is set.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {signum: signal.getsignal(signum) for signum in handlers}
    before = {s: handler for s, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for signum in before:
        signal.signal(signum, handlers[signum])
    return before


@contextmanager
def undone_at_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises :class:`Stopped`, as Ctrl-C does KeyboardInterrupt, so that what is
    unfinished is undone; a handler that somebody has set stays."""
    ends_at_once = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    outer = install({signal.SIGTERM: raise_stopped} if ends_at_once else {})
    try:
        yield
    finally:
        install(outer)


def imports_done() -> None:
    """After the imports, signals raise :class:`Stopped` instead of ending the process at once."""
    waiting = [signum for signum in SIGNALS if signal.getsignal(signum) is exit_at_once]
    install(dict.fromkeys(waiting, raise_stopped))
