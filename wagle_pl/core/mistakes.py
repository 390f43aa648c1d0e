"""jsonargparse's report of a mistake, a tree of many lines, in one line that names the nearest."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from pkgutil import resolve_name

from wagle_pl.core.registry import did_you_mean, option_names, subclasses

_OF_COMMAND = r"unrecognized arguments: --([\w.]+)|Subcommand .* not accept option '([\w.]+)'"
_NO_CLASS = "Expected a dot import|Expected an instantiatable class|correspond to a subclass"


def in_one_line(message: str, options: Collection[str] = ()) -> str:
    """A report of jsonargparse in one line; ``options`` are those of the parser, with dashes.

    >>> in_one_line('Parser key "x":\\n  Expected a <class \\'int\\'>. Got value: abc')
    'x: must be int; got abc'
    >>> in_one_line("unrecognized arguments: --epoch 3", ["--epochs", "--seed"])
    '--epoch: there is no such option; did you mean --epochs?'
    """
    if match := re.search(_OF_COMMAND, message):
        name = match[1] or match[2]
        hint = did_you_mean(f"--{name.partition('.')[0]}", options, "--help lists all")
        hint = did_you_mean(f"--{name}", options, hint)
        return f"{'--' if match[1] else ''}{name}: there is no such option; {hint}"
    if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        names = re.findall(r"[^', ]+", match[2])
        hint = did_you_mean(match[1], names, f"choose one of {', '.join(names)}")
        return f"there is no command {match[1]!r}; {hint}"
    option = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if match := re.search(r"the following arguments are required: (.*)", message):
        names = [f"{option}.{n}" if option else n.rpartition(".")[2] for n in match[1].split(", ")]
        words = [f"--{n}" if option or f"--{n}" in options else n.upper() for n in names]
        return f"{' and '.join(words)} must be given, on the command line or by a --config"
    faults = re.findall(r"given class_path '(.+)':\n *(?!Parser key|Does not| )(.*)", message)
    value = re.search(r"(?:Given|Got) value: (.*)", message)  # the first is the innermost
    if faults and (match := re.fullmatch("Option '(.+)' is not accepted", faults[-1][1])):
        return _unknown_option(match[1], option, faults[-1][0], message, options)
    if faults:
        return f"{option}: {faults[-1][1]}"
    if value and re.search(_NO_CLASS, message):
        return _unknown_class(value[1], option, message)
    types = re.findall(r"Subtypes: \[(.*)\]|(?<!- )Expected an? (.*?)\. Got", message)
    if value and types:  # the last is the innermost; lists of subtypes begin with dashes
        expected = "".join(types[-1])
        expected = re.sub(r"<class '([\w.]+)'>", r"\1", expected)
        expected = re.sub(r"(?:\w+\.)+(\w+)", r"\1", expected).replace("NoneType", "null")
        if "Literal[" in expected:
            choices = re.findall(r"[^][', ]+", expected.replace("Literal", ""))
            *others, last = dict.fromkeys(choices)
            expected = f"{', '.join(others)} or {last}"
        return f"{option}: must be {expected}; got {value[1][:120]}"
    return message


def _unknown_option(
    name: str, option: str, path: str, message: str, options: Collection[str]
) -> str:
    """An option that the class at a path does not have."""
    if name == "class_path":
        return f"{option}: it takes class_path and init_args, and nothing else"
    cls: type = resolve_name(path)
    if cls in _bases(message) and [*subclasses(cls)]:  # no class was named
        return f"{option}.{name}: no class is named for {option}; give --{option} CLASS before it"
    elsewhere = next((o for o in sorted(options) if o.endswith(f".{name}")), None)
    hint = f"did you mean {elsewhere}?" if elsewhere else f"see --{option}.help {cls.__name__}"
    hint = did_you_mean(name, option_names(cls), hint)
    return f"{option}.{name}: {cls.__name__} has no such option; {hint}"


def _unknown_class(value: str, option: str, message: str) -> str:
    """A class that does not exist, is of another kind, or has yet to be named."""
    if nested := re.match(r"NestedArg\(key='([\w.]+)'", value):
        hint = f"give --{option} CLASS before it"
        return f"{option}.{nested[1]}: no class is named for {option}; {hint}"
    choices = {cls.__name__: cls for base in _bases(message) for cls in subclasses(base)}
    ours = sorted(n for n, cls in choices.items() if cls.__module__.startswith("wagle_pl"))
    hint = f"choose one of {', '.join(ours)}, or a class path" if ours else "--help lists them"
    return f"{option}: unknown class {value[:120]!r}; {did_you_mean(value, choices, hint)}"


def _bases(message: str) -> list[type[object]]:
    """The classes among the innermost types that a report names."""
    types = re.findall(r"Subtypes: \[(.*)\]", message)[-1:]
    bases: list[type[object]] = []
    for path in re.findall(r"\w+(?:\.\w+)+", "".join(types)):
        with suppress(ImportError, AttributeError):
            if isinstance(cls := resolve_name(path), type):
                bases.append(cls)
    return bases
