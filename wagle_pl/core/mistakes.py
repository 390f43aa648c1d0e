"""jsonargparse's report of a mistake, a tree of many lines, in one line that names the nearest."""

from __future__ import annotations

import re
from collections.abc import Collection
from pkgutil import resolve_name
from typing import Any, NamedTuple, Optional

from wagle_pl.core.registry import nearest, option_names, subclasses


class _Cause(NamedTuple):
    """A line of the report that a pattern matches, and what stands around it."""

    match: re.Match[str]
    option: str  # its dotted name
    cls: Any  # the class that the line is about, or None
    choices: dict[str, type]  # classes that the option may name
    value: str


def in_one_line(message: str, options: Collection[str] = ()) -> str:
    """A report of jsonargparse in one line; ``options`` are those of the parser, with dashes.

    >>> in_one_line('Parser key "x":\\n  Expected a <class \\'int\\'>. Got value: abc')
    'x: must be int; got abc'
    >>> in_one_line("unrecognized arguments: --epoch 3", ["--epochs", "--seed"])
    '--epoch: there is no such option; did you mean --epochs?'
    """
    if cause := _find(r"Option '(.+)' is not accepted", message):
        return _unknown_option(cause, options)
    unknown = r"unrecognized arguments: --([\w.]+)|Subcommand .* does not accept option '([\w.]+)'"
    if match := re.search(unknown, message):
        name = match[1] or match[2]
        group = f"--{name.partition('.')[0]}"
        known = any(option.startswith(f"{group}.") for option in options)
        hint = _meant(f"--{name}" if known else group, options, "--help lists all")
        return f"{'--' if match[1] else ''}{name}: there is no such option; {hint}"
    if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        names = re.findall(r"[^', ]+", match[2])
        return f"there is no command {match[1]!r}; {_meant(match[1], names)}"
    abstract = r"Expected an instantiatable class, but .* is abstract"
    text = r"Expected a dot import path string: (.*)"
    other = r"Import path .*does not correspond to a subclass of .*"
    if cause := _find(abstract, message) or _find(text, message) or _find(other, message):
        return _unknown_class(cause)
    if match := re.search(r"the following arguments are required: (.*)", message):
        cause = _find(re.escape(match[0]), message)
        start = f"{cause.option}." if cause and cause.option else ""
        names = [start + (n if start else n.rpartition(".")[2]) for n in match[1].split(", ")]
        given = [f"--{n}" if start or f"--{n}" in options else n.upper() for n in names]
        return f"{' and '.join(given)} must be given, on the command line or by a --config"
    if cause := _find(r"(?!Parser key|Does not validate|Expected|Subtypes).*", message, True):
        return f"{cause.option}: {cause.match[0]}"
    single, several = r"Expected an? (.*)\. Got value: (.*)", r"Subtypes: \[(.*)\]()"
    if cause := _find(single, message) or _find(several, message):
        value = cause.match[2][:120] or cause.value
        return f"{cause.option}: must be {_in_words(cause.match[1])}; got {value}"
    return message


def _find(pattern: str, message: str, in_class: bool = False) -> Optional[_Cause]:
    """The innermost line that a pattern matches; ``in_class``: just below one on a class."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    causes: list[tuple[int, _Cause]] = []
    above: list[tuple[int, str]] = []
    types = ""
    for number, line in enumerate(lines):
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        above = [(i, t) for i, t in above if i < indent]
        types = text if text.startswith("Subtypes:") else types
        match = re.fullmatch(pattern, text)
        if match and not (in_class and not (above and above[-1][1].startswith("Problem"))):
            enclosing = "\n".join(t for _, t in above)
            paths = re.findall(r"class_path '([^']+)'", enclosing)
            option = ".".join(re.findall(r'Parser key "([^"]+)"', enclosing))
            bases = filter(None, map(_class, re.findall(r"\w+(?:\.\w+)+", types)))
            choices = {sub.__name__: sub for base in bases for sub in subclasses(base)}
            values = [v.strip() for v in lines[number:] if v.strip().startswith("Given value: ")]
            value = values[0].removeprefix("Given value: ")[:120] if values else ""
            cls = _class(paths[-1]) if paths else None
            causes.append((len(above), _Cause(match, option, cls, choices, value)))
        above.append((indent, text))
    return max(causes, key=lambda cause: cause[0])[1] if causes else None


def _unknown_option(cause: _Cause, options: Collection[str]) -> str:
    """An option that a class does not have."""
    name, option, cls = cause.match[1], cause.option, cause.cls
    if name == "class_path":
        return f"{option}: it takes class_path and init_args, and nothing else"
    if cls.__name__ not in cause.choices and any(subclasses(cls)):  # a base class
        return f"{option}.{name}: no class is named for {option}; give --{option} CLASS before it"
    elsewhere = next((o for o in sorted(options) if o.endswith(f".{name}")), None)
    hint = f"see --{option}.help {cls.__name__}"
    hint = _meant(name, option_names(cls), f"did you mean {elsewhere}?" if elsewhere else hint)
    return f"{option}.{name}: {cls.__name__} has no such option; {hint}"


def _unknown_class(cause: _Cause) -> str:
    """A class that does not exist, is of another kind, or has yet to be named."""
    option, value = cause.option, cause.value
    if nested := re.match(r"NestedArg\(key='([\w.]+)'", value):
        said = f"{option}.{nested[1]}: no class is named for {option}"
        return f"{said}; give --{option} CLASS before it"
    ours = [n for n, cls in cause.choices.items() if cls.__module__.startswith("wagle_pl")]
    hint = f"choose one of {', '.join(sorted(ours))}, or a class path" if ours else "--help lists"
    return f"{option}: unknown class {value!r}; {_meant(value, cause.choices, hint)}"


def _meant(name: str, names: Collection[str], otherwise: str = "") -> str:
    near = nearest(name, names)
    return f"did you mean {near}?" if near else otherwise or f"choose one of {', '.join(names)}"


def _class(path: str) -> Optional[type]:
    """The class that a dotted path names, if it names one."""
    try:
        cls = resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None
    return cls if isinstance(cls, type) else None


def _in_words(types: str) -> str:
    """jsonargparse's types, shorter.

    >>> _in_words("<class 'int'>, typing.Literal['a', 'b'], list[str], <class 'NoneType'>")
    "int, Literal['a', 'b'], list[str], null"
    """
    words = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", words).replace("NoneType", "null")
