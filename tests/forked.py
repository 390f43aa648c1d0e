"""Processes of their own that start at once: forked from one that has imported the package."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from helpers import environment

import wagle_pl
from wagle_pl.cli import app as cli
from wagle_pl.core import stopping

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, "wagle_pl.cli.lightning", "deepspeed"])


def start(
    target: Callable[..., None],
    *args: Any,
    output: Path | str,
    env: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Call a function in a new process, in this folder and a session of its own; what it prints goes to a file.

    Args:
        target: a function of a module.
        *args: its arguments.
        output: the file.
        env: environment variables beside those of a shell.
    """
    with pytest.MonkeyPatch.context() as patch:  # for the process that all others are forked from
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("DS_ACCELERATOR", "cpu")
        # tensors that are freed leave the process: peaks can be compared
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
        forkserver.ensure_running()
    of_shell = {**environment(), **(env or {})}
    process = FORKED.Process(
        target=_call, args=(target, args, os.getcwd(), str(output), of_shell), daemon=True
    )
    process.start()
    return process


def _call(
    target: Callable[..., None], args: Any, folder: str, output: str, env: Mapping[str, str]
) -> None:
    os.setsid()
    multiprocessing.current_process().daemon = False  # it may start others, as a command in a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        target(*args)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def command(*args: str) -> None:
    """What ``python -m wagle_pl`` does after its imports."""
    stopping.install(dict.fromkeys(stopping.SIGNALS, stopping.exit_at_once))
    # by which Lightning starts other ranks
    sys.argv = [str(Path(wagle_pl.__file__).with_name("__main__.py")), *args]
    cli.main(args)
