"""Classes with options as a configuration names them: ``NPO``, or ``{class_path: NPO, init_args: {beta: 0.1}}``."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, Union

from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import resolve

T = TypeVar("T")
Entry = Union[str, Mapping[str, Any]]


def split(entry: Entry, option: str, extra: tuple[str, ...] = ()) -> tuple[str, dict[str, Any]]:
    """Class name and options of an entry.

    Args:
        entry: a name, or a mapping with ``class_path`` and ``init_args``.
        option: its name, for messages.
        extra: other keys that the mapping may have.

    Raises:
        WagleError: if it has another form.

    >>> split({"class_path": "NPO", "init_args": {"beta": 0.2}}, "objective")
    ('NPO', {'beta': 0.2})
    """
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_path"), str):
        raise WagleError(f"{option} must be a name, or class_path and init_args; got {entry!r}")
    unknown = sorted(set(entry) - {"class_path", "init_args", *extra})
    if unknown:
        raise WagleError(
            f"{option} {entry['class_path']}: unknown key {unknown[0]!r}; options of the class go under "
            "init_args"
        )
    return entry["class_path"], dict(entry.get("init_args") or {})


def make(base: type[T], entry: Entry, option: str, extra: tuple[str, ...] = ()) -> T:
    """The object that an entry describes, its options checked against the class.

    Args:
        base: the class it must derive from.
        entry: see :func:`split`.
        option: its name, for messages.
        extra: other keys that a mapping may have.

    Raises:
        WagleError: naming the classes there are, or the option that the class does not have.
    """
    name, options = split(entry, option, extra)
    cls = None if "." in name else _known(base).get(_fold(name))
    if cls is None and "." not in name:
        return resolve(base, name, option)  # a message that names the classes there are
    cls = cls or _imported(base, name, option)
    with _options_of(cls, f"{option} {name}") as parser:
        return parser.instantiate_classes(parser.parse_object({"it": options})).it


def typed(cls: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a class of the suite's modules, of the types that its signature has.

    A number that was written as text becomes one; all else stays as it was given, as it tells runs apart.

    Args:
        cls: the class.
        given: some of its options.
        where: they were given, for messages.

    Raises:
        WagleError: naming the option that the class does not have, or whose value is of another type.
    """
    with _options_of(cls, where) as parser:
        found = parser.parse_object({"it": {"model": "", **given}}).it

    def is_number(name: str) -> bool:
        return isinstance(given[name], str) and isinstance(found[name], (int, float))

    return {name: found[name] if is_number(name) else value for name, value in given.items()}


@contextmanager
def _options_of(cls: type, where: str) -> Iterator[Any]:
    """A parser of the options of a class; what it says becomes a :class:`WagleError`."""
    import jsonargparse

    try:
        yield _parser(cls)
    except jsonargparse.ArgumentError as error:
        what = (
            " ".join(str(error).split())
            .replace("Group 'it'", cls.__name__)
            .replace('Parser key "it.', 'option "')
        )
        raise WagleError(f"{where}: {what}") from None


@cache
def _parser(cls: type) -> Any:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it")
    return parser


def _known(base: type[T]) -> dict[str, type[T]]:
    """Classes that derive from one, or that one if none does, by folded name."""
    found: dict[str, type[T]] = {}
    for cls in base.__subclasses__():
        found |= {_fold(cls.__name__): cls, **_known(cls)}
    return found or {_fold(base.__name__): base}


def _fold(name: str) -> str:
    return name.replace("_", "").lower()


def _imported(base: type[T], path: str, option: str) -> type[T]:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise WagleError(f"{option} {path!r} cannot be imported: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise WagleError(f"{option} {path!r} is no {base.__name__}")
    return cls


def definition(made: Any, entry: Entry, option: str, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """What tells an entry from others, as plain data: the class of what it made, and the options given."""
    cls = type(made)
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "options": split(entry, option, extra)[1],
    }


def digest(value: Any) -> str:
    """Plain data as a short name: 16 hexadecimal digits of SHA-256 over its JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
