"""jsonargparse's report of a mistake, a tree of many lines, in one line that names the nearest."""

from __future__ import annotations

import re
from collections.abc import Collection
from pkgutil import resolve_name
from typing import Any, NamedTuple, Optional

from wagle_pl.core.registry import did_you_mean, option_names, subclasses

#: Lines of a report, each after the line that encloses it: what is wrong with a class or its
#: options; a type that was expected, and a value (that of a union is in a later line).
_IN_CLASS = (
    r"Problem.*\n(?!Parser key|Does not validate|Expected|Subtypes)(.*)|.*\n(Expected a dot import.*"
    r"|Expected an instantiatable class.*|Import path .*does not correspond to a subclass of.*)"
)
_TYPE = r".*\n(?:Expected an? (.*)\. Got value: (.*)|Subtypes: \[(.*)\])"
_OF_COMMAND = r"unrecognized arguments: --([\w.]+)|Subcommand .* not accept option '([\w.]+)'"


class _Cause(NamedTuple):
    match: re.Match[str]
    option: str  # dotted name
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
    if match := re.search(_OF_COMMAND, message):
        name = match[1] or match[2]
        group = f"--{name.partition('.')[0]}"
        known = any(option.startswith(f"{group}.") for option in options)
        hint = did_you_mean(f"--{name}" if known else group, options, "--help lists all")
        return f"{'--' if match[1] else ''}{name}: there is no such option; {hint}"
    if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        names = re.findall(r"[^', ]+", match[2])
        hint = did_you_mean(match[1], names, f"choose one of {', '.join(names)}")
        return f"there is no command {match[1]!r}; {hint}"
    cause = _innermost(_IN_CLASS, message)
    if match := re.search(r"the following arguments are required: (.*)", message):
        start = f"{cause.option}." if cause else ""
        names = [start + (n if start else n.rpartition(".")[2]) for n in match[1].split(", ")]
        words = [f"--{n}" if start or f"--{n}" in options else n.upper() for n in names]
        return f"{' and '.join(words)} must be given, on the command line or by a --config"
    if cause and cause.match[2]:
        return _unknown_class(cause)
    if cause:
        text = cause.match[1]
        match = re.fullmatch("Option '(.+)' is not accepted", text)
        return _unknown_option(match[1], cause, options) if match else f"{cause.option}: {text}"
    if cause := _innermost(_TYPE, message):
        types = re.sub(r"<class '([\w.]+)'>", r"\1", cause.match[1] or cause.match[3])
        types = re.sub(r"(?:\w+\.)+(\w+)", r"\1", types).replace("NoneType", "null")
        return f"{cause.option}: must be {types}; got {(cause.match[2] or cause.value)[:120]}"
    return message


def _innermost(pattern: str, message: str) -> Optional[_Cause]:
    """The innermost of the lines that match a pattern, together with those that enclose them."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    causes: list[tuple[int, _Cause]] = []
    above: list[tuple[int, str]] = []  # indent and text of the lines that enclose this one
    types = ""
    for number, line in enumerate(lines):
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        above = [(i, t) for i, t in above if i < indent]
        types = text if text.startswith("Subtypes:") else types
        if match := re.fullmatch(pattern, f"{above[-1][1] if above else ''}\n{text}"):
            enclosing = "\n".join(t for _, t in above)
            paths = re.findall(r"class_path '([^']+)'", enclosing)
            option = ".".join(re.findall(r'Parser key "([^"]+)"', enclosing))
            bases = filter(None, map(_class, re.findall(r"\w+(?:\.\w+)+", types)))
            choices = {sub.__name__: sub for base in bases for sub in subclasses(base)}
            value = re.search(r"Given value: (.*)", "\n".join(lines[number:]))
            cls = _class(paths[-1]) if paths else None
            cause = _Cause(match, option, cls, choices, value[1][:120] if value else "")
            causes.append((len(above), cause))
        above.append((indent, text))
    return max(causes, key=lambda cause: cause[0])[1] if causes else None


def _unknown_option(name: str, cause: _Cause, options: Collection[str]) -> str:
    """An option that a class does not have."""
    option, cls = cause.option, cause.cls
    if name == "class_path":
        return f"{option}: it takes class_path and init_args, and nothing else"
    if cls is None:
        return f"{option}.{name}: there is no such option".lstrip(".")
    if cls.__name__ not in cause.choices and any(subclasses(cls)):  # a base class
        return f"{option}.{name}: no class is named for {option}; give --{option} CLASS before it"
    elsewhere = next((o for o in sorted(options) if o.endswith(f".{name}")), None)
    hint = f"did you mean {elsewhere}?" if elsewhere else f"see --{option}.help {cls.__name__}"
    hint = did_you_mean(name, option_names(cls), hint)
    return f"{option}.{name}: {cls.__name__} has no such option; {hint}"


def _unknown_class(cause: _Cause) -> str:
    """A class that does not exist, is of another kind, or has yet to be named."""
    option, value = cause.option, cause.value
    if nested := re.match(r"NestedArg\(key='([\w.]+)'", value):
        hint = f"give --{option} CLASS before it"
        return f"{option}.{nested[1]}: no class is named for {option}; {hint}"
    ours = [n for n, cls in cause.choices.items() if cls.__module__.startswith("wagle_pl")]
    hint = f"choose one of {', '.join(sorted(ours))}, or a class path" if ours else "--help lists"
    return f"{option}: unknown class {value!r}; {did_you_mean(value, cause.choices, hint)}"


def _class(path: str) -> Optional[type]:
    """The class that a dotted path names, if it names one."""
    try:
        cls = resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None
    return cls if isinstance(cls, type) else None
