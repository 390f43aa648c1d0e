"""Parsers of the command line: mistakes in one line; for the commands beside LightningCLI's, what people type."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Optional

from jsonargparse import ArgumentParser

from wagle_pl.cli.commands import fail
from wagle_pl.cli.mistakes import in_one_line


class OneLineErrors(ArgumentParser):
    """Says what is wrong in one line, and exits with code 2; takes no option by a part of its name."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str, ex: Optional[Exception] = None) -> Any:
        """Print one line and exit with code 2; as parser of a class within another, raise for that one to tell all."""
        if not self.exit_on_error:
            super().error(message, ex)
        fail(in_one_line(message, self.options))

    @property
    def options(self) -> set[str]:
        """The options of this parser and its commands, with their dashes."""
        commands = [
            action.choices for action in self._actions if isinstance(action.choices, Mapping)
        ]
        parsers = [parser for choices in commands for parser in choices.values()]
        return set(self._option_string_actions).union(*(parser.options for parser in parsers))


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
        return args[i] in flags and (
            i + 1 == len(args) or args[i + 1].lower() not in ("true", "false")
        )

    return [f"{argument}=true" if is_bare(i) else argument for i, argument in enumerate(args)]


def classes_first(args: Sequence[str], classes: Collection[str]) -> list[str]:
    """Arguments with ``--NAME CLASS`` before the options of NAME, which only the class gives a meaning to.

    Args:
        args: of the command line.
        classes: the NAMEs, with dashes; what is below one may be another.

    >>> args = ["fit", "--model.lr=2", "--config", "x", "--model", "A", "--model.top_k", "3"]
    >>> classes_first(args, {"--model"})
    ['fit', '--config', 'x', '--model', 'A', '--model.lr=2', '--model.top_k', '3']
    """
    options: list[list[str]] = []  # each with its value
    for argument in args:
        if options and not argument.startswith("--"):
            options[-1].append(argument)
        else:
            options.append([argument])

    def name_of(option: list[str]) -> str:
        return option[0].partition("=")[0]

    names = {
        name
        for name in map(name_of, options)
        if any(f"{name}.".startswith(f"{cls}.") for cls in classes)
    }
    for name in sorted(names, key=lambda name: name.count(".")):
        at = [name_of(option) for option in options].index(name)
        early = [option for option in options[:at] if name_of(option).startswith(f"{name}.")]
        options[: at + 1] = [
            *(option for option in options[:at] if option not in early),
            options[at],
            *early,
        ]
    return [part for option in options for part in option]
