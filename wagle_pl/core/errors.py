"""An error that is meant for the user."""

from __future__ import annotations


class WagleError(Exception):
    """A mistake in what the user gave (file, option, data). The message is one line: what, where, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says that is not empty; its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
