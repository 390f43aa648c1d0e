"""Parsers of the command line: mistakes in one line, options in any order, bare flags."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Optional

from jsonargparse import ArgumentParser

from wagle_pl.cli.messages import fail
from wagle_pl.core.mistakes import in_one_line

_CONFIG_HELP = (
    "YAML file, or the name of one that comes with the package, such as tofu/finetune; may be "
    "repeated, and later ones override earlier ones."
)


class OneLineErrors(ArgumentParser):
    """Prints one line and exits with code 2 on a mistake; takes no abbreviated options."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; the help of ``--config`` mentions names and repetition."""
        if "--config" in args:
            kwargs["help"] = _CONFIG_HELP
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Optional[Exception] = None) -> Any:
        """Print one line and exit; a parser within another raises, and the outer one prints."""
        if not self.exit_on_error:
            super().error(message, ex)
        fail(in_one_line(message, self.options))

    @property
    def options(self) -> set[str]:
        """The options of this parser and its commands, with their dashes."""
        choices = (action.choices for action in self._actions)
        commands = [found for found in choices if isinstance(found, Mapping)]
        parsers = [parser for found in commands for parser in found.values()]
        return set(self._option_string_actions).union(*(parser.options for parser in parsers))


class CommandParser(OneLineErrors):
    """Parser of a function: ``-o`` is ``--output``, ``--flag`` is true, lists take many words."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument as the function's signature has it, but for these."""
        if args == ("--overwrite",):
            kwargs["help"] = kwargs.get("help") or "replace the output if it exists."
        if args == ("--output",):
            args = ("--output", "-o")
        elif args in (("files",), ("runs",)):
            kwargs = {"type": str, "nargs": "+", "help": kwargs.get("help")}
        elif kwargs.get("type") is bool:
            kwargs |= {"nargs": "?", "const": True}
            # jsonargparse's groups come here too
            self._flags = {*getattr(self, "_flags", ()), *args}
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Optional[Sequence[str]] = None, *more: Any, **kwargs: Any) -> Any:
        """Parse; what follows a bare flag is its value only if it is true or false."""
        args = None if args is None else with_values(args, getattr(self, "_flags", ()))
        return super().parse_args(args, *more, **kwargs)


def with_values(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """Arguments with ``--flag=true`` for each ``--flag`` that no value follows.

    >>> with_values(["--overwrite", "runs", "--overwrite", "false"], {"--overwrite"})
    ['--overwrite=true', 'runs', '--overwrite', 'false']
    """
    following = [*(argument.lower() for argument in args[1:]), ""]
    return [
        f"{argument}=true" if argument in flags and after not in ("true", "false") else argument
        for argument, after in zip(args, following, strict=False)
    ]


#: Options without ``model.`` -> what each is without a value; None: as it stands.
SHORT = {"--robustness": "all", "--format": None}


def expand_short(args: Sequence[str]) -> list[str]:
    """``--robustness [ATTACKS]`` as ``--model.robustness ATTACKS``, ``all`` if none are named, and
    ``--format NAME`` as ``--model.format NAME``.

    They go to the end, where the class of the model is known.

    >>> expand_short(["test", "--robustness", "--config", "x.yaml"])
    ['test', '--config', 'x.yaml', '--model.robustness', 'all']
    """
    rest: list[str] = []
    short: dict[str, list[str]] = {}
    for option in _with_their_values(args):
        name, equals, value = option[0].partition("=")
        if name not in SHORT:
            rest += option
            continue
        values = [value] if equals else option[1:2]
        default = [] if SHORT[name] is None else [SHORT[name]]
        short[name] = [name.replace("--", "--model."), *(values or default)]
        rest += option[1:] if equals else option[2:]
    return [*rest, *(part for option in short.values() for part in option)]


def classes_first(args: Sequence[str], classes: Collection[str]) -> list[str]:
    """Arguments with ``--NAME CLASS`` before the options of NAME, which need to know the class.

    Args:
        args: of the command line.
        classes: the NAMEs, with dashes; what is below one may be another.

    >>> args = ["fit", "--model.lr=2", "--config", "x", "--model", "A", "--model.top_k", "3"]
    >>> classes_first(args, {"--model"})
    ['fit', '--config', 'x', '--model', 'A', '--model.lr=2', '--model.top_k', '3']
    """

    def name(option: list[str]) -> str:
        return option[0].partition("=")[0]

    options = _with_their_values(args)
    given = {name(option) for option in options}
    named = [n for n in given if any(f"{n}.".startswith(f"{cls}.") for cls in classes)]
    for cls in sorted(named, key=lambda n: n.count(".")):
        at = [name(option) for option in options].index(cls)
        early = [option for option in options[:at] if name(option).startswith(f"{cls}.")]
        kept = [option for option in options[:at] if option not in early]
        options[: at + 1] = [*kept, options[at], *early]
    return [part for option in options for part in option]


def _with_their_values(args: Sequence[str]) -> list[list[str]]:
    """Each option together with the arguments that follow it."""
    options: list[list[str]] = []
    for argument in args:
        if options and not argument.startswith("--"):
            options[-1].append(argument)
        else:
            options.append([argument])
    return options
