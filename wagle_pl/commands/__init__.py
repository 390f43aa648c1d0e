"""The commands beside ``fit`` and ``test``: one module a command, thin functions that parse and compute nothing.

A module's ``COMMANDS`` maps a verb to a function; its signature and docstring make the options and their help.
"""

from __future__ import annotations

import sys
from typing import NoReturn

EXIT_BAD_INPUT = 2

#: Command -> the module whose ``COMMANDS`` (verb -> function) it offers.
COMMANDS = {
    "export": "wagle_pl.commands.export",
    "mask": "wagle_pl.commands.mask",
    "patch": "wagle_pl.commands.patch",
    "plan": "wagle_pl.commands.plan",
    "report": "wagle_pl.commands.report",
    "study": "wagle_pl.commands.study",
}


def fail(message: str, code: int = EXIT_BAD_INPUT) -> NoReturn:
    """Print one line and exit."""
    print(f"wagle: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
