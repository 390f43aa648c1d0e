"""Turns jsonargparse's report of a mistake, a tree of many lines, into a line that says what to do.

If a value does not fit a type, jsonargparse reports every alternative of the type, as text only.
This module parses that text; what it does not recognise is passed on as it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from pkgutil import resolve_name
from typing import Any, NamedTuple, Optional

from wagle_pl.core.registry import nearest, option_names, subclasses

#: Types as jsonargparse names them -> in words.
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "Iterable": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "Any": "anything",
}


class _Line(NamedTuple):
    """A line of the report, and the lines that enclose it, outermost first."""

    text: str = ""
    above: tuple[str, ...] = ()

    def found_above(self, pattern: str) -> list[str]:
        """What the pattern's group matches in the lines above."""
        return [found[1] for found in (re.match(pattern, line) for line in self.above) if found]

    @property
    def keys(self) -> list[str]:
        """Names of the nested options that the line is about, outermost first."""
        return self.found_above(r'Parser key "([^"]+)"')

    @property
    def option(self) -> str:
        """The keys as one dotted name."""
        return ".".join(self.keys)

    @property
    def cls(self) -> str:
        """Class path that the line is about; empty if none."""
        return ["", *self.found_above(r"Problem with given class_path '([^']+)'")][-1]

    @property
    def bases(self) -> list[type]:
        """Base classes of the classes that may be chosen here."""
        types = ["", *self.found_above(r"Subtypes: \[(.*)\]$")][-1]
        return [cls for name in re.findall(r"\w+(?:\.\w+)+", types) if (cls := _class(name))]

    def owners(self, option: str, but: Any = None) -> str:
        """``A, B have it``: our classes, except ``but``, that have an option and are allowed."""
        others = {sub: None for base in self.bases for sub in subclasses(base) if sub is not but}
        found = [sub.__name__ for sub in others if _is_ours(sub) and option in option_names(sub)]
        names = list(dict.fromkeys(found))
        return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} it" if names else ""


def in_one_line(message: str, options: Collection[str] = ()) -> str:
    """A report of jsonargparse in one line; ``options`` are those of the parser, with dashes.

    >>> in_one_line('Parser key "x":\\n  Expected a <class \\'int\\'>. Got value: abc')
    'x: must be an integer, got abc'
    >>> in_one_line("unrecognized arguments: --epoch 3", ["--epochs", "--seed"])
    'there is no option --epoch: did you mean --epochs?'
    """
    lines = list(_tree(message))
    values = [line.text[13:] for line in lines if line.text.startswith("Given value: ")]
    value = values[-1] if values else ""
    return (
        _unknown_option(lines, value, options)
        or _unknown_class(lines, value)
        or _incomplete_class(lines)
        or _wrong_type(lines)
        or _outside_classes(message, options)
    )


def _tree(message: str) -> Iterator[_Line]:
    """The lines of a report, each with those above it by indentation; errors are below types."""
    above: list[tuple[int, str]] = []
    for line in filter(str.strip, message.splitlines()):
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        deeper = text == "Errors:"
        while above and above[-1][0] >= indent + (deeper and above[-1][1].startswith("Subtypes:")):
            above.pop()
        yield _Line(text, tuple(part for _, part in above))
        above.append((indent, text))


def _first(lines: list[_Line], pattern: str) -> tuple[_Line, Optional[re.Match[str]]]:
    """The first line that a pattern matches, and the match."""
    found = ((line, re.match(pattern, line.text)) for line in lines)
    return next(((line, match) for line, match in found if match), (_Line(), None))


def _unknown_option(lines: list[_Line], value: str, options: Collection[str]) -> Optional[str]:
    """An option that a class does not have."""
    unknown = r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)"
    line, found = _first(lines, unknown)
    if found is None or not line.cls:
        return None
    option, cls = found[1] or found[2], _class(line.cls)
    if cls in line.bases and "'class_path'" in value:
        return f"{line.option} takes class_path and init_args, and nothing else"
    if cls in line.bases and any(subclasses(cls)):
        return _no_class(line, option)
    known = option_names(cls)
    near = nearest(option, known)
    hints = [f"did you mean {near}?"] if near else []
    hints += filter(None, [line.owners(option, but=cls)])
    elsewhere = [other for other in sorted(options) if other.endswith(f".{option}")]
    hints = hints or [f"did you mean {other}?" for other in elsewhere]
    few = len(known) < 12
    hints = hints or [
        f"it has {', '.join(known)}" if few else f"see --{line.option}.help {cls.__name__}"
    ]
    said = f"{cls.__name__} has no option {option!r} (option {line.option}.{option})"
    return f"{said}: {'; '.join(hints)}"


def _no_class(line: _Line, option: str) -> str:
    """An option of a class that has yet to be named."""
    owners, name = line.owners(option), line.option
    example = re.split("[, ]", owners)[0] or "CLASS"
    said = f"no class is named for {name}, so there is no option {name}.{option} yet"
    hint = f"give --{name} {example}, or a --config that names one, before it"
    return f"{said}: {hint}" + (f"; {owners}" if owners else "")


def _unknown_class(lines: list[_Line], value: str) -> Optional[str]:
    """A class name that does not exist, or a class of another kind."""
    line, found = _first(lines, r"Import path .*does not correspond to a subclass of (\w+)")
    if found is not None:
        return f"{_short(value)} is no {found[1]} (option {line.option})"
    line, found = _first(lines, r"Expected a dot import path string: (.*)")
    if found is None:
        return None
    nested = re.match(r"NestedArg\(key='([\w.]+)'", value)
    if nested and len(line.keys) == 1:  # an option of something that is not a class
        said = f"{line.option} {found[1]!r} is no class, so it has no option {nested[1]!r}"
        return f"{said}: name a class before it"
    known = [cls for base in line.bases for cls in subclasses(base)]
    ours = sorted({cls.__name__ for cls in known if _is_ours(cls)})
    choices = f"choose one of {', '.join(ours)}, or give a class path" if ours else ""
    what = _meant(found[1], {cls.__name__ for cls in known}, choices or "give a class path")
    return f"unknown class {found[1]!r} for {line.option}: {what}"


def _incomplete_class(lines: list[_Line]) -> Optional[str]:
    """A class path that cannot be imported, or a class that lacks an argument."""
    problem = "Problem with given"
    line = next((x for x in lines if x.above and x.above[-1].startswith(problem)), _Line())
    if not line.text or line.text.startswith("Parser key"):
        return None
    missing = re.match(r"the following arguments are required: (.*)", line.text)
    if not missing:
        return f"class {line.cls!r} of option {line.option}: {line.text}"
    name, first = line.cls.rpartition(".")[2], missing[1].partition(", ")[0]
    return f"{name} needs {missing[1]}: give --{line.option}.{first}"


def _wrong_type(lines: list[_Line]) -> Optional[str]:
    """A value of the wrong type."""
    keys = [line for line in lines if line.text.startswith("Parser key")]
    if not keys:
        return None
    innermost = max(keys, key=lambda line: len(line.above))
    place = (*innermost.above, innermost.text)
    below = [line for line in lines if line.above[: len(place)] == place]
    nested = _first(below, r"Given value: NestedArg\(key='([\w.]+)'")[1]
    if nested:  # an option of an abstract class
        return _no_class(max(below, key=lambda line: len(line.above)), nested[1])
    single = re.match(r"Expected an? (.*)\. Got value: (.*)", below[0].text) if below else None
    if single:
        types, value = single.groups()
    else:
        types = (_first(below, r"Subtypes: \[(.*)\]$")[1] or ["", ""])[1]
        value = (_first(below, r"Given value: (.*)")[1] or ["", ""])[1]
    return f"{below[0].option}: must be {_in_words(types)}, got {_short(value)}" if types else None


def _outside_classes(message: str, options: Collection[str]) -> str:
    """A command or an option that does not exist or is missing; else the message itself."""
    unknown = r"(unrecognized arguments: --|Subcommand '\w+' does not accept option ')([\w.]+)"
    if found := re.search(unknown, message):
        group, name = f"--{found[2].partition('.')[0]}", f"--{found[2]}"
        known = any(option.startswith(f"{group}.") for option in options)
        hint = _meant(name if known else group, options, "--help lists all")
        said = name if found[1].endswith("--") else found[2]  # as in the file
        return f"there is no option {said}: {hint}"
    if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
        names = re.findall(r"[^', ]+", found[2])
        hint = _meant(found[1], names, f"choose one of {', '.join(names)}")
        return f"there is no command {found[1]!r}: {hint}"
    if found := re.search(r"the following arguments are required: (.*)", message):
        names = [name.rpartition(".")[2] for name in found[1].split(", ")]
        words = [name.upper() for name in names if f"--{name}" not in options]
        if words:
            return f"{' and '.join(words)} must be given"
        listed = " and ".join(f"--{name}" for name in names)
        return f"{listed} must be given, on the command line or by a --config"
    return message


def _meant(name: str, names: Collection[str], otherwise: str) -> str:
    near = nearest(name, names)
    return f"did you mean {near}?" if near else otherwise


def _class(path: str) -> Optional[type]:
    """The class that a dotted path names, if it names one."""
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _is_ours(cls: type) -> bool:
    """Whether one of our packages exports a class, and not only the module that defines it."""
    package = cls.__module__.rpartition(".")[0]
    offered = getattr(sys.modules.get(package), cls.__name__, None) is cls
    return package.startswith("wagle_pl") and offered


def _in_words(types: str) -> str:
    """jsonargparse's types in words.

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
            article = "an" if name[0] in "AEIOU" else "a"
            words.append(_TYPES.get(name, f"{article} {name}"))
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} or {last}" if first else last


def _short(value: str) -> str:
    return value if len(value) <= 120 else f"{value[:120]}…"
