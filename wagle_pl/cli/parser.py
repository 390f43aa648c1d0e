"""Parse the command line: configurations, options in any order, flags without a value, and
one-line errors."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import yaml
from jsonargparse import ActionYesNo, ArgumentParser

from wagle_pl.cli.messages import fail
from wagle_pl.core.errors import WagleError
from wagle_pl.core.mistakes import in_one_line
from wagle_pl.core.reading import parse_yaml, read_text
from wagle_pl.core.registry import did_you_mean

_CONFIG_HELP = (
    "YAML file, or the name of one in the package, such as tofu/finetune; may be repeated: later "
    "ones override earlier ones."
)

_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # installed; in a checkout
#: Where ``--config NAME`` looks.
HOME = next((place for place in _PLACES if place.is_dir()), _PLACES[0])

_PLACEHOLDER = re.compile(r"\$\{run\.(\w+)\}")
_NO_VALUE = object()


class OneLineErrors(ArgumentParser):
    """Prints one line and exits with code 2 on a user error; takes no abbreviated options."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if "--config" in args:
            kwargs["help"] = _CONFIG_HELP
        return super().add_argument(*args, **kwargs)

    def error(self, message: str, ex: Optional[Exception] = None) -> Any:
        """Print one line and exit; a nested parser raises instead, and the outer one prints."""
        if not self.exit_on_error:
            super().error(message, ex)
        fail(in_one_line(message, self.options))

    @property
    def options(self) -> set[str]:
        """The options of this parser and its commands, with their dashes."""
        commands = (a.choices for a in self._actions if isinstance(a.choices, Mapping))
        parsers = [parser for by_name in commands for parser in by_name.values()]
        return set(self._option_string_actions).union(*(parser.options for parser in parsers))


class CommandParser(OneLineErrors):
    """Parser of a function: ``-o`` is ``--output``, ``--flag`` is true, lists take many words."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if args == ("--overwrite",):
            kwargs["help"] = (
                "replace an existing output; a folder with other files is never replaced."
            )
        if args == ("--output",):
            args = ("--output", "-o")
        elif args in (("files",), ("runs",)):
            kwargs = {"type": str, "nargs": "+", "help": kwargs.get("help")}
        elif kwargs.get("type") is bool:
            kwargs = {key: kwargs[key] for key in kwargs if key != "type"} | {"action": ActionYesNo}
        return super().add_argument(*args, **kwargs)


# -- options in any order ----------------------------------------------------------------------


#: Options that may be written without ``model.`` -> their value if none is given.
SHORT = {"--robustness": ["all"], "--format": []}


def expand_short(args: Sequence[str]) -> list[str]:
    """Options of :data:`SHORT` as ``--model.`` options, at the end, where the class is known.

    >>> expand_short(["test", "--robustness", "--config", "x.yaml"])
    ['test', '--config', 'x.yaml', '--model.robustness', 'all']
    """
    rest: list[str] = []
    short: list[str] = []
    for option in _with_their_values(args):
        name, equals, value = option[0].partition("=")
        if name in SHORT:
            values = [value] if equals else option[1:]
            short += [name.replace("--", "--model."), *(values or SHORT[name])]
        else:
            rest += option
    return [*rest, *short]


def classes_first(args: Sequence[str], classes: Collection[str]) -> list[str]:
    """Arguments with ``--NAME CLASS`` moved before the options of NAME, which need the class.

    Args:
        args: command-line arguments.
        classes: the NAMEs, with dashes; ``--NAME.OPTION`` may be a NAME too.

    >>> args = ["fit", "--model.lr=2", "--config", "x", "--model", "A", "--model.warmup", "3"]
    >>> classes_first(args, {"--model"})
    ['fit', '--config', 'x', '--model', 'A', '--model.lr=2', '--model.warmup', '3']
    """

    options = _with_their_values(args)
    names = {option[0].partition("=")[0] for option in options}
    named = [n for n in names if any(f"{n}.".startswith(f"{cls}.") for cls in classes)]
    for cls in sorted(named, key=lambda n: n.count(".")):
        at = [option[0].partition("=")[0] for option in options].index(cls)
        early = [option for option in options[:at] if option[0].startswith(f"{cls}.")]
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


# -- configurations ------------------------------------------------------------------------------


def expand(args: Sequence[str]) -> list[str]:
    """Command-line arguments with configurations replaced by their content.

    Each ``--config FILE`` becomes one ``--config CONTENT`` for every file that FILE extends (its
    ``base``: one file or a list, relative to FILE or by name), and one for FILE itself. Later files
    override earlier ones, key by key. A base shared by several files is read only at its first
    place: reading it again would undo the files that extend it.

    ``${run.NAME}`` in a value is replaced by NAME from the ``run`` mapping of any of the files, or
    from ``--run.NAME VALUE``. If that is a mapping, its entry for ``run.name``, else for
    ``run.method``, else ``default`` is taken.
    """
    parts: list[Any] = []  # arguments, and the contents of configurations
    names: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    read: set[Path] = set()
    pending = iter(args)
    for argument in pending:
        option, equals, value = argument.partition("=")
        _check_argument(value or argument)
        if option not in ("-c", "--config") and not option.startswith("--run."):
            parts.append(argument)
            continue
        value = value if equals else next(pending, "")
        if option.startswith("--run."):
            variables[option.removeprefix("--run.")] = parse_yaml(value, option)
            continue
        *bases, named = _layered(find(value))  # the named file is read again if it was a base
        for path, content in [*(base for base in bases if base[0] not in read), named]:
            names |= content.pop("run", None) or {}
            parts.append(content)
            read.add(path)
    names |= variables
    expanded: list[str] = []
    for part in parts:
        if isinstance(part, str):
            expanded.append(part)
        elif part:
            expanded += ["--config", yaml.safe_dump(_filled(part, names), sort_keys=False)]
    return expanded


def _check_argument(argument: str) -> None:
    """Refuse what the parser would read, and never end: a pipe, YAML that multiplies."""
    try:
        kind = os.stat(argument).st_mode
    except (OSError, ValueError):
        if "&" in argument and "*" in argument:
            parse_yaml(argument, "an argument")
        return
    if stat.S_ISFIFO(kind):
        raise WagleError(f"{argument} is a pipe: give a regular file")


def find(name: str, beside: Optional[Path] = None) -> Path:
    """Find a configuration: a path, relative to the file ``beside`` that names it, or a name in the
    package, such as ``tofu/data``."""
    first = Path(name) if beside is None else beside.parent / name
    for path in (first, HOME / name, HOME / f"{name}.yaml"):
        if path.is_file():
            return path
    names = {str(path.relative_to(HOME).with_suffix("")) for path in HOME.rglob("*.yaml")}
    hint = did_you_mean(name.removesuffix(".yaml"), names)
    where = "" if beside is None else f" (named in {beside})"
    raise WagleError(f"config file {first}{where} does not exist", hint=hint)


def _layered(file: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Resolved path and content of the files a file extends, most basic first, then its own."""
    if file.resolve() in above:
        raise WagleError(f"config file {file} extends itself")
    content = parse_yaml(read_text(file, "config file"), f"config file {file}")
    if content is None:
        raise WagleError(f"config file {file} is empty: add options, or leave it out")
    if not isinstance(content, dict):
        raise WagleError(f"config file {file} must be a mapping of options")
    bases = content.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        what = "base must be a file, or a list of files, to extend"
        raise WagleError(f"config file {file}: {what}; got {bases}")
    layers: dict[Path, dict[str, Any]] = {}
    for base in bases:
        for path, layer in _layered(find(base, file), (*above, file.resolve())):
            layers.setdefault(path, layer)
    return [*layers.items(), (file.resolve(), content)]


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """A value with every ``${run.NAME}`` replaced; if it is the whole text, the type is kept."""
    if isinstance(value, dict):
        return {key: _filled(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, names) for entry in value]
    if not isinstance(value, str):
        return value
    if alone := _PLACEHOLDER.fullmatch(value):
        return _named(alone[1], names)
    return _PLACEHOLDER.sub(lambda match: str(_named(match[1], names)), value)


def _named(name: str, names: Mapping[str, Any]) -> Any:
    value = names.get(name, _NO_VALUE)
    if isinstance(value, dict):
        keys = (names.get("name"), names.get("method"), "default")
        value = next((value[key] for key in keys if key in value), _NO_VALUE)
    if value is _NO_VALUE:
        layers = "--config of a model (model/zephyr-7b-beta) or of a method (method/npo)"
        raise WagleError(f"run.{name} has no value", hint=f"add a {layers}, or --run.{name}")
    others = {key: entry for key, entry in names.items() if key != name}  # never by itself
    return _filled(value, others)
