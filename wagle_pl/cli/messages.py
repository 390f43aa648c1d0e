"""Messages of the command line: one-line errors, the package's log, silenced library output."""

from __future__ import annotations

import errno
import logging
import os
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, Optional

from wagle_pl.core.errors import WagleError, first_line

EXIT_MISTAKE = 2
EXIT_LOST_RANK = 1

_PACKAGE = str(Path(__file__).parents[1])
_NOT_THE_USERS = ("<", _PACKAGE, sysconfig.get_path("stdlib"))
#: Modules whose RuntimeErrors are about an option: a metric that nobody logs, a missing library.
_CONFIGURED = (
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.fabric.loggers.",
)
_NETWORK_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
#: gloo's messages when another rank has ended.
_DISCONNECTED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
#: Errors of the operating system about a path, which the user can correct.
_PATH_ERRORS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG),
}

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # Lightning's own progress bar does not use it
    "JSONARGPARSE_DEPRECATION_WARNINGS": "off",  # of Lightning's calls
}
_WARNINGS = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LightningCLI's args parameter.*",
    ".*treespec, LeafSpec.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*module\\(s\\) in eval mode at the start of training.*",  # as attribution wants it
    ".*DeepSpeed handles gradient clipping internally.*",
    ".*torch.distributed.*is deprecated.*",  # of DeepSpeed's calls
    ".*configure_optimizers.*returned .None.*",  # attribution trains nothing
    ".*sync_dist=True.*",  # what is logged is the same on all ranks
)
#: Lightning's loggers that repeat the user's options in every run, and how these messages begin.
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.seed",
)
_REPETITIVE = (
    "GPU available",
    "TPU available",
    "LOCAL_RANK: ",
    "Seed set to",
    "💡 Tip",
    "Loading `train_dataloader`",
    "`Trainer.fit` stopped: `max_",
)


def fail(message: str, code: int = EXIT_MISTAKE) -> NoReturn:
    print(f"wagle: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


# -- from an exception to a line -------------------------------------------------------------------


def failure(error: BaseException) -> Optional[tuple[str, int]]:
    """Message and exit code of an error; None if its traceback should be shown instead."""
    if (said := mistake(error)) is not None:
        return said, EXIT_MISTAKE
    if any(_is_lost_rank(cause) for cause in _causes(error)):
        said = f"another rank of this run has ended, so this rank stops ({first_line(error)[:200]})"
        return f"{said}; the last checkpoint is complete: resume with --ckpt_path", EXIT_LOST_RANK
    return None


def mistake(error: BaseException) -> Optional[str]:
    """The message of a user error, if the error or one of its causes is one; else None."""
    for cause in _causes(error):
        if isinstance(cause, WagleError):
            return str(cause)
        if _in_user_code(cause):
            return None
        # by name: Lightning may not be imported
        misconfigured = type(cause).__name__ == "MisconfigurationException"
        optional = isinstance(cause, (RuntimeError, ModuleNotFoundError))
        if misconfigured or (optional and _raised_in(cause).startswith(_CONFIGURED)):
            return str(cause)
    return _wrong_path(error)


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _in_user_code(error: BaseException) -> bool:
    """Whether an error passed through a callback or other code of the user."""
    called = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        called |= str(frame.f_globals.get("__name__", "")).startswith("lightning.")
        file = frame.f_code.co_filename
        installed = "site-packages" in file or "dist-packages" in file
        if called and not installed and not file.startswith(_NOT_THE_USERS):
            return True
    return False


def _raised_in(error: BaseException) -> str:
    """Name of the module that raised an error; empty if it was not raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _wrong_path(error: Optional[BaseException]) -> Optional[str]:
    """The operating system's message about a path that the user gave; None if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    if error is None or error.errno not in _PATH_ERRORS or _raised_in(error) == "subprocess":
        return None
    if not isinstance(error.filename, (str, os.PathLike)):
        return None
    path = Path(error.filename).absolute()
    if path.is_relative_to(sys.prefix) or path.is_relative_to(_PACKAGE):
        return None
    return f"{error.filename}: {error.strerror.lower()}; check the given paths"


def _is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank did not take part in a collective."""
    if type(error).__name__ in _NETWORK_ERRORS:
        return True
    return not isinstance(error, OSError) and any(said in str(error) for said in _DISCONNECTED)


def parent_ended(seconds: float) -> bool:
    """Whether the process that started this rank, if any, ends within ``seconds``.

    Lightning's rank 0 starts the other ranks of its machine, and prints errors for all of them.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return False
    parent, deadline = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != parent


# -- logs ------------------------------------------------------------------------------------------


def quiet() -> None:
    """Set up logging as ``wagle: MESSAGE``, and silence progress bars and advice of libraries."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_news)
    package = logging.getLogger("wagle_pl")
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        handler.addFilter(_is_first_rank)
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False


def _is_news(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return record.levelno > logging.INFO or not any(words in said for words in _REPETITIVE)


def _is_first_rank(record: logging.LogRecord) -> bool:
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
    return rank == 0 or record.levelno >= logging.ERROR


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"wagle: {level}{record.getMessage()}"
