"""What a file may hold: one function that checks a value against a type.

A schema is ``int``, ``float``, ``str``, ``bool``, :data:`Count`, :data:`Real`, :data:`Digits`,
:data:`Json`, ``Any``, any other class, ``Literal``, ``Union``, ``Optional``, ``list[T]``, ``tuple[S, T]`` (in
JSON, a list of as many items), ``dict[K, T]``, or a ``TypedDict`` of these. Keys that a
``TypedDict`` does not name are accepted, since a later version may write more of them; a key whose
type is ``Optional`` or ``Any`` may be missing.
"""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NewType,
    NoReturn,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from wagle_pl.core.errors import WagleError

Count = NewType("Count", int)  # an integer of 0 or more
Real = NewType("Real", float)  # a number, or NaN where there is none
Digits = NewType("Digits", str)  # such an integer as text, as keys of JSON are
Json = NewType("Json", object)  # anything that JSON can hold

_WORDS = {int: "an integer", Count: "an integer of 0 or more", str: "a text"}
_WORDS |= {float: "a number", Real: "a number"}
_WORDS |= {bool: "true or false", list: "a list", dict: "an object", NoneType: "null"}
_WORDS |= {Json: "what JSON can hold", Digits: "an integer of 0 or more, as a text"}


def check(value: Any, kind: Any, where: str, key: str = "") -> Any:
    """The value itself, if it is of the schema ``kind``; integers must fit into 64 bits.

    Raises:
        WagleError: with ``where``, the dotted ``key``, what was expected, and what was found.

    >>> check({"lineage": [{"steps": "x"}]}, dict[str, list[dict[str, int]]], "wagle.json")
    Traceback (most recent call last):
    wagle_pl.core.errors.WagleError: wagle.json: lineage[0].steps: must be an integer, got 'x'
    """
    kinds = [option for option in _options(kind) if _fits(value, option)]
    if not kinds:
        _refuse(value, kind, where, key)
    kind, args = kinds[0], get_args(kinds[0])
    if is_typeddict(kind):
        for name, inner in _fields(kind).items():
            if name in value:
                check(value[name], inner, where, _join(key, name))
            elif NoneType not in _options(inner) and inner is not Any:
                raise WagleError(f"{where}: key {_join(key, name)!r} is missing")
    elif get_origin(kind) is dict:
        for name, item in value.items():
            check(name, args[0], where, f"{key} key".strip())
            check(item, args[1], where, _join(key, str(name)))
    elif args == (Real,) and {*map(type, value)} <= {float}:
        return value  # the usual case, of many numbers
    elif get_origin(kind) in (list, tuple):
        items = args if get_origin(kind) is tuple else args * len(value)
        for index, (item, inner) in enumerate(zip(value, items, strict=True)):
            check(item, inner, where, f"{key}[{index}]")
    return value


def filled(value: Any, kind: Any) -> Any:
    """A copy of a value that :func:`check` accepts, with None for keys that may be missing and are."""
    kind = next(option for option in _options(kind) if _fits(value, option))
    if is_typeddict(kind):
        fields = _fields(kind).items()
        return {**value, **{name: filled(value.get(name), inner) for name, inner in fields}}
    if get_origin(kind) is dict:
        return {name: filled(item, get_args(kind)[1]) for name, item in value.items()}
    if get_origin(kind) is list:
        return [filled(item, get_args(kind)[0]) for item in value]
    return value


def schema_of(value: Any, integer: Any = float) -> Any:
    """The schema of what is like a value: with its keys, types and lengths of lists; what is None
    may be anything.

    Args:
        integer: the schema of an integer, which another time may be a number with a fraction.

    >>> check({"steps": "x"}, schema_of({"steps": 3}), "x.ckpt")
    Traceback (most recent call last):
    wagle_pl.core.errors.WagleError: x.ckpt: steps: must be a number, got 'x'
    """
    from torch import Tensor

    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        fields = {key: schema_of(item, integer) for key, item in value.items()}
        return TypedDict("Alike", fields)  # type: ignore[operator]
    if value is None:
        return Any
    if isinstance(value, (list, tuple)) and value:
        return tuple[tuple(schema_of(item, integer) for item in value)]  # type: ignore[misc]
    return integer if type(value) is int else type(value)


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Name of a parameter -> its type, with Any for names that only type checkers know."""
    names = defaultdict(lambda: Any, vars(builtins) | getattr(function, "__globals__", {}))
    try:
        return get_type_hints(function, localns=names)
    except TypeError:  # an annotation that is no type
        return {}


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any], within: str) -> None:
    """Check arguments of a function by its annotations; ``within`` precedes the names of options.

    A Path is taken for a text, a number of numpy or torch for Python's, and a ``class_path`` for an
    object: :func:`~wagle_pl.core.registry.resolve` checks it.
    """
    for name, kind in hints_of(function).items():
        value = values.get(name, ...)
        if value is not ... and not (isinstance(value, Mapping) and "class_path" in value):
            if isinstance(value, Path):
                value = str(value)
            elif getattr(value, "shape", None) == () and hasattr(value, "item"):
                value = value.item()
            check(value, kind, f"{within}{name}")


@lru_cache
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _outer(kind: Any) -> Any:
    return dict if is_typeddict(kind) else get_origin(kind) or kind


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, whatever its items are."""
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind in (int, Count):
        return type(value) is int and (0 if kind is Count else -(1 << 63)) <= value < 1 << 63
    if kind is Json:
        try:
            return bool(json.dumps(value))
        except (TypeError, ValueError, RecursionError):
            return False
    if kind is Digits:
        return isinstance(value, str) and re.fullmatch("[0-9]{1,15}", value) is not None
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(get_args(kind))
    if kind in (float, Real):  # NaN is no number; an integer may be too large to be one
        finite = type(value) is int and abs(value) <= sys.float_info.max
        return finite or (type(value) is float and (kind is Real or value == value))
    return isinstance(value, _outer(kind))


def _refuse(value: Any, kind: Any, where: str, key: str) -> NoReturn:
    expected = _either(map(_in_words, _options(kind)))
    place = f"{where}: {key}" if key else where
    large = type(value) is int and abs(value) >= 1 << 63
    shown = "an integer of more than 64 bits" if large else _short(repr(value))
    raise WagleError(f"{place}: must be {expected}, got {shown}")


def _either(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return _either(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))}"
    return _WORDS.get(_outer(kind)) or f"a {_outer(kind).__name__}"


def _join(key: str, name: str) -> str:
    return f"{key}.{_short(name)}" if key else _short(name)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"
