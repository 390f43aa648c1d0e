"""From an exception to the line that the command line prints, and its exit code."""

from __future__ import annotations

import errno
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from wagle_pl.cli.commands import EXIT_MISTAKE
from wagle_pl.core.errors import WagleError, first_line

EXIT_LOST_RANK = 1

_PACKAGE = str(Path(__file__).parents[1])
_NOT_THE_USERS = ("<", _PACKAGE, sysconfig.get_path("stdlib"))
#: Modules whose RuntimeErrors are about an option: a metric that nobody logs, a missing library.
_CONFIGURED = (
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.fabric.loggers.",
)
#: What gloo says when another rank has ended.
_DISCONNECTED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
#: Errors of the operating system that are about a path, and that the user can do something about.
_PATH_ERRORS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG),
}


def failure(error: BaseException) -> Optional[tuple[str, int]]:
    """Line and exit code of an error; None where its traceback tells more than a line could."""
    said = mistake(error)
    if said is not None:
        return said, EXIT_MISTAKE
    if _lost_a_rank(error):
        return (
            "another rank of this run has ended, so this one ends too "
            f"({first_line(error)[:200]}); the last checkpoint is whole: resume with --ckpt_path"
        ), EXIT_LOST_RANK
    return None


def mistake(error: BaseException) -> Optional[str]:
    """What the user did wrong, if that is what an error, or what it came of, is about."""
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
    """Whether an error came through a callback or other code of the user's."""
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
    """What the operating system says of a path that the user gave."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    if error is None or error.errno not in _PATH_ERRORS or _raised_in(error) == "subprocess":
        return None
    if not isinstance(error.filename, (str, os.PathLike)):
        return None
    path = Path(error.filename).absolute()
    if path.is_relative_to(sys.prefix) or path.is_relative_to(_PACKAGE):
        return None
    return f"{error.filename}: {error.strerror.lower()}; look at the paths that were given"


def _lost_a_rank(error: BaseException) -> bool:
    """Whether an error says that another rank did not take part in a collective."""
    network = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return any(
        type(cause).__name__ in network
        or (not isinstance(cause, OSError) and any(said in str(cause) for said in _DISCONNECTED))
        for cause in _causes(error)
    )


def parent_ended(seconds: float) -> bool:
    """Whether the process that started this rank, if one did, ends within some seconds.

    Lightning's rank 0 starts the others of its machine; it prints what all of them have to say.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return False
    parent, deadline = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != parent
