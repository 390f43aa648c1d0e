"""Parsers of the command line: mistakes in one line; for the commands beside LightningCLI's, what people type."""

from __future__ import annotations

import re
from typing import Any, Optional

from jsonargparse import ArgumentParser

from wagle_pl.commands import fail


class OneLineErrors(ArgumentParser):
    """Says what is wrong in one line, and exits with code 2."""

    def error(self, message: str, ex: Optional[Exception] = None) -> Any:
        """Print ``message``, shortened to what to do where jsonargparse's own is long, and exit with code 2."""
        unknown = re.search(r'Parser key "([^"]+)".*Expected a dot import path string: (\S+)', message, re.DOTALL)
        if unknown:
            option, name = unknown.groups()
            message = f"unknown class {name!r} for {option}: give a class path, or the name of a class of wagle_pl"
        if "is not accepted" in message:
            message += " (a class comes before its options: --model CLASS --model.option VALUE)"
        fail(message)


class CommandParser(OneLineErrors):
    """Parser of a function: ``-o`` is ``--output``, a bare ``--flag`` is true, ``files`` and ``runs`` are many."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument as the function's signature has it, but for these three."""
        if args == ("--output",):
            args = ("--output", "-o")
        elif args in (("files",), ("runs",)):
            kwargs = {"type": str, "nargs": "+", "help": kwargs.get("help")}
        elif kwargs.get("type") is bool:
            kwargs |= {"nargs": "?", "const": True}
        return super().add_argument(*args, **kwargs)
