"""What jsonargparse says of a mistake, a tree over many lines, as one line that says what to do.

jsonargparse reports every alternative of a type that a value does not fit, and offers the report as text only. This
module reads that text; what it does not know is passed on as it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pkgutil import resolve_name
from typing import Any, NamedTuple, Optional

from jsonargparse import ArgumentParser

from wagle_pl.core.registry import nearest, subclasses

#: Types as jsonargparse names them -> as a user would.
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
}
_TYPES |= {
    "list": "a list",
    "Iterable": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "Any": "anything",
}
_LONGEST = 120  # characters of a value that are repeated


class _Line(NamedTuple):
    """A line of the report, and those that it is part of, outermost first."""

    text: str
    above: tuple[str, ...]

    def named_above(self, pattern: str) -> list[str]:
        """What the pattern's group matches in the lines above."""
        return [found[1] for found in (re.match(pattern, line) for line in self.above) if found]

    @property
    def keys(self) -> list[str]:
        """Names of the options that the line is about, one within the other."""
        return self.named_above(r'Parser key "([^"]+)"')

    @property
    def option(self) -> str:
        """The same as one dotted name."""
        return ".".join(self.keys)

    @property
    def cls(self) -> str:
        """Class path that the line is about; empty if none."""
        return next(reversed(self.named_above(r"Problem with given class_path '([^']+)'")), "")

    @property
    def bases(self) -> list[type]:
        """Classes from which a class may be chosen at this place."""
        types = next(reversed(self.named_above(r"Subtypes: \[(.*)\]$")), "")
        return [
            base for base in map(_at, re.findall(r"\w+(?:\.\w+)+", types)) if isinstance(base, type)
        ]


def in_one_line(message: str, options: Collection[str] = ()) -> str:
    """A report of jsonargparse in one line.

    Args:
        message: the report.
        options: options that the parser knows, with their dashes.

    >>> in_one_line('Parser key "x":\\n  Expected a <class \\'int\\'>. Got value: abc')
    'x must be an integer, got abc'
    >>> in_one_line("unrecognized arguments: --epoch 3", ["--epochs", "--seed"])
    'there is no option --epoch: did you mean --epochs?'
    """
    lines = list(_lines(message))
    given = [
        line.text.partition(": ")[2] for line in lines if line.text.startswith("Given value: ")
    ]
    for tell in (_unknown_option, _unknown_class, _other_class, _not_importable, _wrong_type):
        told = tell(lines, given[-1] if given else "", options)
        if told:
            return told
    return _outermost(message, options)


def _lines(message: str) -> Iterator[_Line]:
    """The lines of a report as a tree: by indentation; the types at a place are above the errors with each."""
    above: list[tuple[int, str]] = []
    for line in filter(str.strip, message.splitlines()):
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        while above and above[-1][0] >= indent + (
            text == "Errors:" and above[-1][1].startswith("Subtypes:")
        ):
            above.pop()
        yield _Line(text, tuple(part for _, part in above))
        above.append((indent, text))


def _unknown_option(lines: list[_Line], given: str, options: Collection[str]) -> Optional[str]:
    """An option that a class does not have."""
    line, found = _first(
        lines, r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)"
    )
    if found is None or not line.cls:
        return None
    option, cls = found[1] or found[2], _at(line.cls)
    where = f"{line.option}.{option}"
    if cls in line.bases and "'class_path'" in given:
        return f"{line.option} takes class_path and init_args, and nothing else"
    others = [
        other
        for base in line.bases
        for other in subclasses(base)
        if other is not cls and _is_ours(other)
    ]
    owners = list(dict.fromkeys(other.__name__ for other in others if option in _options_of(other)))
    has = [f"{', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"] if owners else []
    if cls in line.bases and any(subclasses(cls)):
        which = f"--{line.option} {owners[0] if owners else 'CLASS'}, or a --config that names one, before it"
        start = (
            f"no class is named for {line.option}, so there is no option {where} yet: give {which}"
        )
        return "; ".join([start, *has])
    known = _options_of(cls)
    near = nearest(option, known)
    hints = [f"did you mean {near}?"] if near else []
    hints += has or [
        f"did you mean {other}?" for other in sorted(options) if other.endswith(f".{option}")
    ]
    hints = hints or [
        f"it has {', '.join(known)}"
        if len(known) < 12
        else f"see --{line.option}.help {cls.__name__}"
    ]
    return f"{cls.__name__} has no option {option!r} (option {where}): {'; '.join(hints)}"


def _unknown_class(lines: list[_Line], given: str, _: Collection[str]) -> Optional[str]:
    """A class by a name that no class has."""
    line, found = _first(lines, r"Expected a dot import path string: (.*)")
    if found is None:
        return None
    nested = re.match(r"NestedArg\(key='([\w.]+)'", given)
    if nested and line.option == line.keys[0]:  # an option of what is no class
        return f"{line.option} {found[1]!r} is no class, so it has no option {nested[1]!r}: name a class before it"
    known = [cls for base in line.bases for cls in subclasses(base)]
    near = nearest(found[1], {cls.__name__ for cls in known})
    ours = sorted({cls.__name__ for cls in known if _is_ours(cls)})
    choices = (
        f"choose one of {', '.join(ours)}, or give a class path" if ours else "give a class path"
    )
    what = f"did you mean {near}?" if near else choices
    return f"unknown class {found[1]!r} for {line.option}: {what}"


def _other_class(lines: list[_Line], given: str, _: Collection[str]) -> Optional[str]:
    """A class of another kind."""
    line, found = _first(lines, r"Import path .*does not correspond to a subclass of (\w+)")
    return None if found is None else f"{_short(given)} is no {found[1]} (option {line.option})"


def _not_importable(lines: list[_Line], *_: Any) -> Optional[str]:
    """A class path that cannot be imported, or a class that lacks an argument."""
    line = next(
        (
            line
            for line in lines
            if line.above and line.above[-1].startswith("Problem with given class")
        ),
        None,
    )
    if line is None or line.text.startswith("Parser key"):
        return None
    missing = re.match(r"the following arguments are required: (.*)", line.text)
    if not missing:
        return f"class {line.cls!r} of option {line.option}: {line.text}"
    first = missing[1].partition(", ")[0]
    return f"{line.cls.rpartition('.')[2]} needs {missing[1]}: give --{line.option}.{first}"


def _wrong_type(lines: list[_Line], *_: Any) -> Optional[str]:
    """A value of another type."""
    innermost = max(
        (line for line in lines if line.text.startswith("Parser key")), key=_depth, default=None
    )
    if innermost is None:
        return None
    below = [
        line
        for line in lines
        if line.above[: _depth(innermost) + 1] == (*innermost.above, innermost.text)
    ]
    types = next(
        (
            found[1]
            for found in (re.match(r"Subtypes: \[(.*)\]$", line.text) for line in below)
            if found
        ),
        "",
    )
    value = next(
        (line.text.partition(": ")[2] for line in below if line.text.startswith("Given value: ")),
        "",
    )
    single = re.match(r"Expected an? (.*)\. Got value: (.*)", below[0].text) if below else None
    if single:
        types, value = single.groups()
    if not types:
        return None
    return f"{below[0].option} must be {_in_words(types)}, got {_short(value)}"


def _outermost(message: str, options: Collection[str]) -> str:
    """What concerns no class: a command or an option that there is not, or that is missing."""
    found = re.search(r"unrecognized arguments: (--[\w.]+)", message)
    if found:
        return f"there is no option {found[1]}: {_hint(found[1], options)}"
    found = re.search(r"Subcommand '\w+' does not accept option '([\w.]+)'", message)
    if found:
        group = found[1].partition(".")[0]
        known = any(option.startswith(f"--{group}.") for option in options)
        return (
            f"there is no option {found[1]}: {_hint(f'--{found[1] if known else group}', options)}"
        )
    found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if found:
        names = re.findall(r"[^', ]+", found[2])
        near = nearest(found[1], names)
        what = f"did you mean {near}?" if near else f"choose one of {', '.join(names)}"
        return f"there is no command {found[1]!r}: {what}"
    found = re.search(r"the following arguments are required: (.*)", message)
    if found:
        names = [name.rpartition(".")[2] for name in found[1].split(", ")]
        if f"--{names[0]}" in options:
            return f"{' and '.join(f'--{name}' for name in names)} must be given, on the command line or by a --config"
        return f"{' and '.join(name.upper() for name in names)} must be given"
    return message


def _hint(option: str, options: Collection[str]) -> str:
    near = nearest(option, options)
    return f"did you mean {near}?" if near else "--help lists all"


def _first(lines: Iterable[_Line], pattern: str) -> tuple[_Line, Optional[re.Match[str]]]:
    """The first line that a pattern matches, and the match."""
    found = ((line, re.match(pattern, line.text)) for line in lines)
    return next(((line, match) for line, match in found if match), (_Line("", ()), None))


def _depth(line: _Line) -> int:
    return len(line.above)


def _at(class_path: str) -> Any:
    """What a dotted path names; None if nothing."""
    try:
        return resolve_name(class_path)
    except (ImportError, AttributeError, ValueError):
        return None


@cache
def _options_of(cls: type) -> list[str]:
    """Names of a class's options, those of its bases among them."""
    return ArgumentParser(exit_on_error=False).add_class_arguments(cls, fail_untyped=False)


def _is_ours(cls: type) -> bool:
    """Whether a class is one that this package offers: not only within the module that defines it."""
    package = cls.__module__.rpartition(".")[0]
    return (
        package.startswith("wagle_pl") and getattr(sys.modules[package], cls.__name__, None) is cls
    )


def _in_words(types: str) -> str:
    """Types of jsonargparse's for a user.

    >>> _in_words("<class 'int'>, typing.Literal['a', 'b'], list[str], <class 'NoneType'>")
    'an integer, a, b, a list or null'
    """
    words: list[str] = []
    for part in re.findall(r"<class '[\w.]+'>|\w+(?:\.\w+)*(?:\[.*?\](?=, |$))?", types):
        name, _, content = part.removeprefix("<class '").removesuffix("'>").partition("[")
        name = name.rpartition(".")[2]
        if name == "Literal":
            words += re.findall(r"[^', \]]+", content)
        else:
            words.append(_TYPES.get(name, f"a {name}"))
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} or {last}" if first else last


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}…"
