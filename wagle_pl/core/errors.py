"""An error that is meant for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Optional

#: Errors of a disk that is full or may not be written.
DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}


class WagleError(ValueError):
    """A mistake in the user's input; the command line prints it in one line and exits with 2.

    Args:
        message: what is wrong.
        option: dotted name of the option or argument that is at fault, such as ``model.lr``.
        hint: what to do about it.

    >>> str(WagleError("must be at least 1, got 0", option="epochs", hint="give --epochs"))
    'epochs: must be at least 1, got 0; give --epochs'
    """

    def __init__(self, message: str, option: Optional[str] = None, hint: Optional[str] = None):
        super().__init__(message, option, hint)  # all of them, or pickling loses fields
        self.message, self.option, self.hint = message, option, hint

    def __str__(self) -> str:
        start = f"{self.option}: " if self.option else ""
        return f"{start}{self.message}" + (f"; {self.hint}" if self.hint else "")


class WrongType(WagleError, TypeError):
    """A value of a type that an option or argument does not take."""


class Diverged(WagleError):
    """A loss or a gradient became NaN or infinite: training cannot go on."""


def check_positive(value: float, option: str) -> float:
    """The value of an option; a :class:`WagleError` if it is not above 0, or not finite."""
    if not 0 < value < float("inf"):
        raise WagleError(f"must be above 0, got {value}", option=option)
    return value


def check_counts(within: str, **options: Optional[int]) -> None:
    """Raise :class:`WagleError` if an option that counts something is less than 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise WagleError(f"must be at least 1, got {value}", option=f"{within}{name}")


def check_density(density: float) -> None:
    """Raise :class:`WagleError` if a density is outside (0, 1]."""
    if not 0 < density <= 1:
        must = "the share of weights to select must be in (0, 1]"
        raise WagleError(f"{must}, got {density}", option="density")


def causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error and those that it was raised from or beside, the last one first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """First non-empty line of an error's text; its class name if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
