"""``main``: run a command; on failure exit with a one-line message and an exit code."""

from __future__ import annotations

import os
import select
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Optional, TextIO

from wagle_pl import __version__
from wagle_pl.cli.messages import EXIT_MISTAKE, fail, mistake, quiet
from wagle_pl.core import stopping
from wagle_pl.core.environment import prepare_libraries
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import did_you_mean

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

EXIT_UNREAD = 141  # as in shells: 128 + SIGPIPE

#: Command -> summary, the most used first.
SUMMARIES = {
    "quickstart": "train, attribute, unlearn and test on invented people, in a minute or two",
    "forget": "make a model forget rows, with defaults chosen by model size",
    "fit": "fine-tune, attribute or unlearn a model, as --model says",
    "test": "measure a model: what it has forgotten, what it has kept, what attacks bring back",
    "mask": "inspect, compare, combine, convert, make and plot masks",
    "study": "compare unlearning methods on one model, at equal forgetting",
    "plant": "train rows into known weights of a model, and check which scores find these weights",
    "request": "keep a record of requests to forget rows, forget them, and test them again",
    "report": "write the results of runs and studies to one HTML file",
    "plan": "estimate the memory, disk space and compute that a run needs",
    "patch": "make, apply and revert patches: small files of the weights that unlearning changed",
    "export": "turn a checkpoint, or a model in another format, into a model folder",
    "validate": "measure a model on test sets as fit does during training, and write nothing",
    "predict": "Lightning's predict, for your own modules",
}

#: Commands with many options -> file in ``help/`` that describes the most used ones.
SCREENS = {name: f"{name}.txt" for name in ("fit", "test", "study", "plant")}
SCREENS["validate"] = "test.txt"

#: Commands other than LightningCLI's -> a function, or a dict of subcommands and functions.
#: Options and help are generated from signatures and docstrings.
COMMANDS = {
    "export": "wagle_pl.cli.tools:export",
    "forget": "wagle_pl.cli.tools:forget_rows",
    "mask": "wagle_pl.cli.mask:VERBS",
    "patch": "wagle_pl.cli.tools:PATCH",
    "plan": "wagle_pl.lab.planning:plan",
    "plant": "wagle_pl.lab.study.plants:plant",
    "quickstart": "wagle_pl.cli.quickstart:quickstart",
    "report": "wagle_pl.lab.study.report.page:report",
    "request": "wagle_pl.lab.requests.commands:VERBS",
    "study": "wagle_pl.lab.study.study:study",
}


#: Libraries of the extra ``lab``.
LABORATORY = ("matplotlib", "pandas")


class CurrentFolder:
    """Finds modules of the current folder, after all libraries and not for them: what a library looks
    for and does not find is optional, whatever a folder here is called."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        asks = frame.f_globals.get("__name__", "").partition(".")[0]
        in_library = frame.f_code.co_filename.startswith(sysconfig.get_path("purelib"))
        if path is not None or (in_library and asks not in ("jsonargparse", "wagle_pl")):
            return None
        return PathFinder.find_spec(name, [""])


def main(args: Optional[Sequence[str]] = None, cli: Optional[type[LightningCLI]] = None) -> None:
    """Run a command, with the arguments of the process when ``args`` is None.

    ``cli`` takes the place of :class:`wagle_pl.cli.lightning.WagleCLI`, from which it derives.

    Raises:
        SystemExit: with code 2 after a user error, which is printed in one line; with 128 + the
            number of the signal that stopped the run; with 141 when the reader of the output has
            gone (``wagle ... | head -1``).
    """
    try:
        try:
            _main(list(sys.argv[1:] if args is None else args), cli)
        finally:
            sys.stdout.flush()  # at the interpreter's exit an error could not be handled
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(EXIT_UNREAD) from None


def _main(args: list[str], cli: Optional[type[LightningCLI]]) -> None:
    _answer_at_once(args)
    outer = stopping.install(dict.fromkeys(stopping.SIGNALS, stopping.exit_at_once))
    quiet()
    if CurrentFolder not in sys.meta_path:
        sys.meta_path.append(CurrentFolder)
    argv = sys.argv
    # by which Lightning starts other ranks
    sys.argv = [str(Path(__file__).parents[1] / "__main__.py"), *args]
    try:
        if args[0] in COMMANDS:
            run_command(args[0], args[1:])
        else:
            run(args, cli)
    except Exception as error:
        if (line := mistake(error)) is None:
            raise
        if _first_rank_ended(10):  # it has said the same
            raise SystemExit(EXIT_MISTAKE) from None
        fail(line)
    except stopping.Stopped:
        _first_rank_ended(60)
        raise
    finally:
        sys.argv = argv
        stopping.install(outer)


def _first_rank_ended(seconds: float) -> bool:
    """Whether rank 0 ends within ``seconds``, if it has started this rank: Lightning kills rank 0
    when a rank that it started ends before it."""
    if os.environ.get("LOCAL_RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    parent, deadline = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != parent


def _answer_at_once(args: Sequence[str]) -> None:
    """Print help or the version, or refuse an unknown command, before any library is imported."""
    first = args[0] if args else ""
    if first in ("-h", "--help", "help"):
        text = overview()
    elif first == "--version":
        text = f"wagle {__version__}"
    elif first in SCREENS and args[-1] != "all" and {"-h", "--help"}.intersection(args):
        file = Path(__file__).with_name("help") / SCREENS[first]
        text = file.read_text(encoding="utf-8").rstrip()
    elif first.startswith("-") or first in SUMMARIES:
        return
    else:
        print(overview(), file=sys.stderr)
        fault = f"there is no command {first!r}" if args else "no command is given"
        choices = f"choose one of {', '.join(SUMMARIES)}"
        fail(f"{fault}; {did_you_mean(first, SUMMARIES, choices)}")
    print(text)
    raise SystemExit(0)


def overview() -> str:
    width = max(map(len, SUMMARIES))
    commands = "\n".join(f"  {name.ljust(width)}  {what}" for name, what in SUMMARIES.items())
    return (
        "usage: wagle COMMAND [OPTIONS]\n\n"
        "Make a language model forget chosen data while it keeps the rest.\n\n"
        f"{commands}\n\n"
        "wagle COMMAND --help lists its options; wagle --version prints the version."
    )


def run(args: Sequence[str], cli: Optional[type[LightningCLI]] = None) -> Any:
    """Run a LightningCLI command; the CLI's ``model`` and ``trainer`` hold the result."""
    from wagle_pl.cli.lightning import WagleCLI
    from wagle_pl.cli.parser import expand, expand_short
    from wagle_pl.core import distributed

    arguments = expand_short(expand(_whole_help(args)))
    prepare_libraries()
    stopping.imports_done()
    try:
        return (cli or WagleCLI)(args=arguments)
    finally:
        distributed.shutdown()


def run_command(name: str, args: Sequence[str]) -> Any:
    """Run one of the other commands, e.g. ``wagle mask info FILE``; returns what it returns."""
    from jsonargparse import auto_cli

    from wagle_pl.cli.parser import CommandParser, expand

    if name == "mask" and args[:1] == ["--scores"]:  # wagle mask --scores FILE --density 0.4
        args = ["select", *args[1:]]
    try:
        offered = resolve_name(COMMANDS[name])
        stopping.imports_done()
        return auto_cli(
            offered,
            args=expand(_whole_help(args)),
            as_positional=True,
            parser_class=CommandParser,
            prog=f"wagle {name}",
            description=f"{SUMMARIES[name][0].upper()}{SUMMARIES[name][1:]}.",
        )
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        if library not in LABORATORY:
            raise
        install = "pip install 'wagle-pl[lab]'"
        raise WagleError(f"needs {library}", option=f"wagle {name}", hint=install) from None


def _whole_help(args: Sequence[str]) -> list[str]:
    """Arguments with ``--help`` in place of ``--help all``."""
    for_help = {"-h", "--help"}.intersection(args)
    return [*(args[:-1] if for_help and args[-1] == "all" else args)]


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream writes to a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream, 0)
    except ValueError:  # it writes to no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
