"""Messages of the command line: one-line errors, the package's log, silenced library output."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from typing import NoReturn, Optional

from wagle_pl.core.errors import DISK_ERRORS, WagleError, causes
from wagle_pl.core.stopping import is_first_rank

EXIT_MISTAKE = 2

#: What a disk answers about a path, and code does not get wrong.
_OF_DISKS = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_OF_DISKS |= {errno.ELOOP, errno.EEXIST, *DISK_ERRORS}

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # Lightning's own progress bar does not use it
    "JSONARGPARSE_DEPRECATION_WARNINGS": "off",  # of Lightning's calls
}
_WARNINGS = (
    ".*(does not have many workers|smaller than the logging interval|in eval mode at the start).*",
    ".*(LightningCLI's args parameter|treespec, LeafSpec|Checkpoint directory .* is not empty).*",
    ".*(DeepSpeed handles gradient clipping|torch.distributed.*is deprecated).*",
    ".*(configure_optimizers.*returned .None|sync_dist=True).*",  # attribution trains nothing
)
#: Loggers that repeat the user's options in every run.
_LOGGERS = ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda", "fabric.utilities.seed")


def fail(message: str) -> NoReturn:
    print(f"wagle: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(EXIT_MISTAKE)


def mistake(error: BaseException) -> Optional[str]:
    """The message of a user error, if an error or one of its causes is one; else None."""
    for cause in causes(error):
        if isinstance(cause, WagleError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in (
            _OF_DISKS if cause.filename else DISK_ERRORS
        ):
            return f"{cause.filename or 'output'}: {cause.strerror.lower()}; choose another place"
    return None


def quiet() -> None:
    """Set up logging as ``wagle: MESSAGE``, and silence progress bars and advice of libraries."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in _LOGGERS:
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    package = logging.getLogger("wagle_pl")
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        handler.addFilter(lambda record: is_first_rank() or record.levelno >= logging.ERROR)
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"wagle: {level}{record.getMessage()}"
