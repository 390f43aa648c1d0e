"""The ``wagle`` command."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Optional, TextIO

from wagle_pl import __version__
from wagle_pl.cli.commands import COMMANDS, EXIT_MISTAKE, SUMMARIES, fail, overview
from wagle_pl.cli.failures import failure, parent_ended
from wagle_pl.cli.logs import quiet
from wagle_pl.core import stopping
from wagle_pl.core.environment import prepare_libraries
from wagle_pl.core.registry import nearest

EXIT_UNREAD = 141  # as shells have it: 128 + SIGPIPE


def main(args: Optional[Sequence[str]] = None) -> None:
    """Run a command.

    Args:
        args: command-line arguments; those of the process when None.

    Raises:
        SystemExit: with code 2 on a mistake in the input, after one line that names it; with 128 +
            the number of a signal that ended it; with 141 when nobody reads what is printed any
            more (``wagle ... | head -1``).
    """
    try:
        try:
            _main(list(sys.argv[1:] if args is None else args))
        finally:
            sys.stdout.flush()  # at the interpreter's exit an error could not be handled
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(EXIT_UNREAD) from None


def _main(args: list[str]) -> None:
    _answer_at_once(args)
    outer = stopping.install(dict.fromkeys(stopping.SIGNALS, stopping.exit_at_once))
    quiet()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for class paths; last, so that it hides no library
    try:
        if args and args[0] in COMMANDS:
            run_command(args[0], args[1:])
        else:
            run(args)
    except Exception as error:
        found = failure(error)
        if found is None:
            raise
        line, code = found
        if code == EXIT_MISTAKE and parent_ended(10):  # rank 0 has said the same
            raise SystemExit(code) from None
        fail(line, code)
    except stopping.Stopped:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            parent_ended(60)  # Lightning kills rank 0 if a rank that it started ends before it
        raise
    finally:
        stopping.install(outer)


def _answer_at_once(args: Sequence[str]) -> None:
    """Print help or the version, or refuse an unknown command, before any library is imported.

    Raises:
        SystemExit: if that is all there is to do.
    """
    first = args[0] if args else ""
    if first in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0)
    if first == "--version":
        print(f"wagle {__version__}")
        raise SystemExit(0)
    if first.startswith("-") or first in SUMMARIES:
        return
    print(overview(), file=sys.stderr)
    near = nearest(first, SUMMARIES)
    mistake = f"there is no command {first!r}" if args else "no command is given"
    choices = f": did you mean {near}?" if near else f"; choose one of {', '.join(SUMMARIES)}"
    fail(f"{mistake}{choices}")


def run(args: Sequence[str]) -> Any:
    """Run a LightningCLI command.

    Returns:
        The CLI object, whose ``model`` and ``trainer`` hold the result.
    """
    from wagle_pl.cli.configs import expand
    from wagle_pl.cli.lightning import WagleCLI
    from wagle_pl.core import distributed

    arguments = expand_robustness(expand(args))
    prepare_libraries()
    stopping.imports_done()
    try:
        return WagleCLI(args=arguments)
    finally:
        distributed.shutdown()


def run_command(name: str, args: Sequence[str]) -> Any:
    """Run one of the other commands, e.g. ``wagle mask info FILE``; returns what it returns."""
    from jsonargparse import auto_cli

    from wagle_pl.cli.configs import expand
    from wagle_pl.cli.parser import CommandParser

    module = import_module(COMMANDS[name])
    stopping.imports_done()
    if args and args[0] in getattr(module, "SHORTHANDS", {}):
        args = [module.SHORTHANDS[args[0]], *args[1:]]
    return auto_cli(
        module.COMMANDS,
        args=expand(args),
        as_positional=True,
        parser_class=CommandParser,
        prog=f"wagle {name}",
        description=module.__doc__,
    )


def expand_robustness(args: Sequence[str]) -> list[str]:
    """``--robustness [ATTACKS]`` as ``--model.robustness ATTACKS``, ``all`` if none are named.

    It goes to the end, where the class of the model is known.

    >>> expand_robustness(["test", "--robustness", "--config", "x.yaml"])
    ['test', '--config', 'x.yaml', '--model.robustness', 'all']
    """
    rest: list[str] = []
    attacks: list[str] = []
    pending = list(args)
    while pending:
        option, equals, value = pending.pop(0).partition("=")
        if option != "--robustness":
            rest.append(option + equals + value)
            continue
        if not equals:
            named = pending and not pending[0].startswith("-")
            value = pending.pop(0) if named else "all"
        attacks = ["--model.robustness", value]
    return [*rest, *attacks]


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream writes to a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream, 0)
    except ValueError:  # it writes to no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
