"""The ``wagle`` command: LightningCLI in subclass mode, layered configurations, one-line errors."""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, TextIO

import yaml

from wagle_pl import __version__
from wagle_pl.cli.commands import COMMANDS, EXIT_BAD_INPUT, SUMMARIES, fail, overview
from wagle_pl.core import stopping
from wagle_pl.core.environment import ready_to_run
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.registry import nearest

EXIT_UNREAD = 141  # as shells have it: 128 + SIGPIPE


def main(args: Optional[Sequence[str]] = None) -> None:
    """Run a command.

    Args:
        args: command-line arguments; those of the process when None.

    Raises:
        SystemExit: with code 2 on a mistake in the input, after one line that names it; with 128 + the number of a
            signal that ended it; with 141, as a shell has it of a command that SIGPIPE ended, when nobody reads what is
            printed any more (``wagle ... | head -1``).
    """
    try:
        try:
            _main(list(sys.argv[1:] if args is None else args))
        finally:
            sys.stdout.flush()  # here, for at the interpreter's exit it is too late to tell
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            raise
        for stream in unread:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(EXIT_UNREAD) from None


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream writes to a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream, 0)
    except ValueError:  # it writes to no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _main(args: list[str]) -> None:
    """Run a command, and tell of a mistake in one line."""
    _answer_at_once(args)
    outer = stopping.install(dict.fromkeys(stopping.SIGNALS, stopping.exit_at_once))
    quiet()
    if os.getcwd() not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # for class paths of the user's own modules; libraries of the same name come first
    try:
        if args and args[0] in COMMANDS:
            run_command(args[0], args[1:])
        else:
            run(expand_robustness(expand_bases(args)))
    except Exception as error:
        mistake = _mistake_in(error) or (None if _in_own_code(error) else _path_in(error))
        if mistake is None and not _lost_a_rank(error):
            raise
        if mistake is None:
            fail(
                f"another rank of this run has ended, so this one ends too ({first_line(error)[:200]}); the last "
                "checkpoint is whole: resume with --ckpt_path",
                code=1,
            )
        if _told_by_rank_zero():
            raise SystemExit(EXIT_BAD_INPUT) from None
        fail(str(mistake))
    except stopping.Stopped:
        if (
            "TORCHELASTIC_RUN_ID" not in os.environ
        ):  # Lightning's first rank is killed if one it started ends before it
            _told_by_rank_zero(60.0)
        raise
    finally:
        stopping.install(outer)


def _answer_at_once(args: Sequence[str]) -> None:
    """What needs no library: help, the version, and a command that there is not.

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
    mistake = f"there is no command {first!r}" if args else "no command is given"
    near = nearest(first, SUMMARIES)
    fail(
        f"{mistake}: did you mean {near}?"
        if near
        else f"{mistake}; choose one of {', '.join(SUMMARIES)}"
    )


def run(args: list[str]) -> Any:
    """Run a LightningCLI command and return the CLI object (its ``model`` and ``trainer`` hold what happened)."""
    from wagle_pl.cli.lightning import WagleCLI
    from wagle_pl.core import distributed

    ready_to_run()
    stopping.imported()
    try:
        return WagleCLI(args=args)
    finally:
        distributed.shutdown()


def run_command(name: str, args: list[str]) -> Any:
    """Run one of the other commands, e.g. ``wagle mask info FILE``; return what its function returns."""
    from jsonargparse import auto_cli

    from wagle_pl.cli.parser import CommandParser

    module = import_module(COMMANDS[name])
    stopping.imported()
    if args and args[0] in getattr(module, "SHORTHANDS", {}):
        args = [module.SHORTHANDS[args[0]], *args[1:]]
    if getattr(module, "LAYERED", False):
        args = expand_bases(args)
    return auto_cli(
        module.COMMANDS,
        args=args,
        as_positional=True,
        parser_class=CommandParser,
        prog=f"wagle {name}",
        description=module.__doc__,
    )


#: What callbacks and loggers raise of options: a metric to monitor that nobody logs, a library that is not there.
_LIGHTNINGS = (RuntimeError, ModuleNotFoundError)
_PARTS = ("lightning.pytorch.callbacks.", "lightning.pytorch.loggers.", "lightning.fabric.loggers.")


def _mistake_in(error: Optional[BaseException]) -> Optional[WagleError]:
    """The user's mistake behind an error, Lightning's word for it included: class instantiation and training loops wrap
    what they catch."""
    while error is not None and not isinstance(error, WagleError):
        if _in_own_code(error):
            return None
        misconfigured = (
            type(error).__name__ == "MisconfigurationException"
        )  # by name: Lightning may not be loaded
        if misconfigured or (
            isinstance(error, _LIGHTNINGS) and _raised_in(error).startswith(_PARTS)
        ):
            return WagleError(str(error))
        error = error.__cause__ or error.__context__
    return error


def _in_own_code(error: BaseException) -> bool:
    """Whether an error came by code of the user's that Lightning called: a callback, a logger, a module.

    Of these the traceback tells more than a line could.
    """
    called = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        called |= str(frame.f_globals.get("__name__", "")).startswith("lightning.")
        if called and not _is_installed(frame.f_code.co_filename):
            return True
    return False


def _is_installed(file: str) -> bool:
    """Whether a file is this package's, Python's or another library's; code that has no file is, too."""
    places = (str(Path(__file__).parent), sysconfig.get_path("stdlib"))
    return file.startswith(("<", *places)) or "site-packages" in file or "dist-packages" in file


def _raised_in(error: BaseException) -> str:
    """The module whose code raised an error; empty if it was not raised."""
    raised = error.__traceback__
    while raised is not None and raised.tb_next is not None:
        raised = raised.tb_next
    return "" if raised is None else raised.tb_frame.f_globals.get("__name__", "")


#: What the operating system says of a path that the user can do something about.
_ABOUT_PATHS = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.ENAMETOOLONG,
    }
)


def _path_in(error: Optional[BaseException]) -> Optional[WagleError]:
    """What the operating system says of a path of the user's, if that is the error.

    A file of an installed package, or a program that is not there, is no path that the user gave: of these the
    traceback tells more.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    if (
        error is None
        or error.errno not in _ABOUT_PATHS
        or not isinstance(error.filename, (str, os.PathLike))
    ):
        return None
    path = Path(error.filename).absolute()
    installed = any(path.is_relative_to(place) for place in (sys.prefix, Path(__file__).parent))
    if installed or _raised_in(error) == "subprocess":
        return None
    return WagleError(
        f"{error.filename}: {error.strerror.lower()}; look at the paths that were given"
    )


_BROKEN = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)  # in gloo's words


def _lost_a_rank(error: Optional[BaseException]) -> bool:
    """Whether an error says that a rank did not come to a meeting."""
    while error is not None:
        said = str(error)
        network = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
        ours = isinstance(error, OSError)  # a file or a pipe of this process, not gloo's
        if network or (not ours and any(words in said for words in _BROKEN)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _told_by_rank_zero(seconds: float = 10.0) -> bool:
    """Whether the process that started this rank has ended meanwhile: with the same mistake, which it has told."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return False
    parent, deadline = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != parent


def expand_robustness(args: Sequence[str]) -> list[str]:
    """``--robustness [ATTACKS]`` is ``--model.robustness ATTACKS``, of ``all`` attacks if none are named.

    It goes to the end: the class of the model must come before it.

    >>> expand_robustness(["test", "--robustness", "--config", "x.yaml"])
    ['test', '--config', 'x.yaml', '--model.robustness', 'all']
    """
    rest, attacks = [], []
    for i, argument in enumerate(args):
        if argument == "--robustness":
            named = i + 1 < len(args) and not args[i + 1].startswith("-")
            attacks = ["--model.robustness", args[i + 1] if named else "all"]
        elif argument.startswith("--robustness="):
            attacks = ["--model.robustness", argument.partition("=")[2]]
        elif args[i - 1 : i] != ["--robustness"] or argument.startswith("-"):
            rest.append(argument)
    return [*rest, *attacks]


def expand_bases(args: Sequence[str]) -> list[str]:
    """Replace ``--config FILE`` by the configurations FILE builds on, then FILE itself.

    A configuration names what it builds on in a top-level ``base`` key: a path, or a list of paths, relative to the
    file. Later files override earlier ones, key by key, as repeated ``--config`` options do. What several build on is
    read once, where it comes first: read again it would undo what was built on it.

    Raises:
        WagleError: if a file is missing, malformed, or builds on itself.
    """
    expanded: list[str] = []
    read: set[Path] = set()
    rest = iter(args)
    for argument in rest:
        if argument in ("-c", "--config"):
            files = layers(Path(next(rest, "")))
        elif argument.startswith("--config="):
            files = layers(Path(argument.partition("=")[2]))
        else:
            expanded.append(argument)
            continue
        *bases, own = files  # a file that is named here is read here, wherever else it was
        for file in [*(base for base in bases if base.resolve() not in read), own]:
            expanded += ["--config", str(file)]
        read |= {file.resolve() for file in files}
    return expanded


def layers(file: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """The configurations that ``file`` builds on, each once, the most basic first, and ``file`` itself."""
    if not file.is_file():
        raise WagleError(
            f"config file {file} does not exist" + (f" (named in {above[-1]})" if above else "")
        )
    if file.resolve() in [path.resolve() for path in above]:
        raise WagleError(f"config file {file} builds on itself")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise WagleError(f"config file {file} is malformed: {error}") from None
    except UnicodeDecodeError as error:
        raise WagleError(
            f"config file {file} is not in UTF-8 (byte {error.start}): save it as such"
        ) from None
    if content is None:
        raise WagleError(f"config file {file} holds no options: write some, or leave it out")
    if not isinstance(content, dict):
        raise WagleError(f"config file {file} must hold options at its top level")
    bases = content.get("base") or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise WagleError(
            f"config file {file}: base must name a file, or a list of files, that it builds on; got {bases}"
        )
    found: dict[Path, Path] = {}
    for base in bases:
        for layer in layers(file.parent / base, (*above, file)):
            found.setdefault(layer.resolve(), layer)
    return [*found.values(), file]


def quiet() -> None:
    """Logging as a user wants to read it; libraries' progress and advice kept down."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # Lightning's own progress bar does not use it
    os.environ.setdefault(
        "JSONARGPARSE_DEPRECATION_WARNINGS", "off"
    )  # Lightning's calls, not the user's
    package = logging.getLogger("wagle_pl")
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        handler.addFilter(_first_rank_speaks)
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False
    for name in _LIGHTNINGS_LOGS:
        logging.getLogger(name).addFilter(_tells_something)
    for pattern in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*LightningCLI's args parameter.*",
        ".*treespec, LeafSpec.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # attribution means it
        ".*DeepSpeed handles gradient clipping internally.*",  # and it is told the user's bound
        ".*torch.distributed.*is deprecated.*",  # DeepSpeed's calls
        ".*sync_dist=True.*",  # what is logged is the same on all ranks
    ):
        warnings.filterwarnings("ignore", message=pattern)


#: Lightning's logs that say, in every run, what a user has asked for or can see; and words of them.
_LIGHTNINGS_LOGS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
_LIGHTNINGS_LOGS += ("lightning.fabric.utilities.seed",)
_IDLE = (
    "GPU available",
    "TPU available",
    "LOCAL_RANK: ",
    "Seed set to",
    "💡 Tip",
    "Loading `train_dataloader`",
)
_IDLE += ("`Trainer.fit` stopped: `max_",)


def _tells_something(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's is to be seen."""
    return record.levelno > logging.INFO or not any(words in record.getMessage() for words in _IDLE)


def _first_rank_speaks(record: logging.LogRecord) -> bool:
    """Whether a message is to be seen: what all ranks have to say, rank 0 says."""
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
    return rank == 0 or record.levelno >= logging.ERROR


class _Formatter(logging.Formatter):
    """``wagle: message``, with the level when it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"wagle: {level}{record.getMessage()}"
