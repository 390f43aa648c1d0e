"""Parsers of the command line: mistakes in one line; for the commands beside LightningCLI's, what people type."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
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
            message += (" (a class, or the --config that names it, comes before its options: "
                        "--model CLASS --model.option VALUE)")  # fmt: skip
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
            self._flags = {*getattr(self, "_flags", ()), *args}
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Optional[Sequence[str]] = None, *more: Any, **kwargs: Any) -> Any:
        """Parse; what follows a bare flag is its value only if it is one."""
        args = None if args is None else spelt_out(args, getattr(self, "_flags", ()))
        return super().parse_args(args, *more, **kwargs)


def spelt_out(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """Arguments with ``--flag`` as ``--flag=true`` where no value follows, so that it takes no other argument as such.

    >>> spelt_out(["--overwrite", "runs", "--overwrite", "false"], {"--overwrite"})
    ['--overwrite=true', 'runs', '--overwrite', 'false']
    """

    def is_bare(i: int) -> bool:
        return args[i] in flags and (i + 1 == len(args) or args[i + 1].lower() not in ("true", "false"))

    return [f"{argument}=true" if is_bare(i) else argument for i, argument in enumerate(args)]
