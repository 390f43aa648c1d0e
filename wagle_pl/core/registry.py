"""Classes by their names."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import Any, Optional, TypeVar, Union

from wagle_pl.core.errors import WagleError

T = TypeVar("T")


def resolve(base: type[T], value: Union[T, str], option: str) -> T:
    """The instance that an option names: given as an instance, a short name of a known subclass, or a class path.

    Short names ignore case and underscores: ``npo``, ``NPO``; ``forget_retain_ratio``, ``ForgetRetainRatio``.

    Args:
        base: the class it must derive from.
        value: what the user gave.
        option: its name, for the message.

    Raises:
        WagleError: listing the valid names.
    """
    if isinstance(value, base):
        return value
    known = {_fold(cls.__name__): cls for cls in list(subclasses(base)) or [base]}
    cls = known.get(_fold(value))
    if cls is None and "." in value:
        module, _, name = value.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise WagleError(f"{option} {value!r} cannot be imported: {error}") from None
    if cls is None or not (isinstance(cls, type) and issubclass(cls, base)):
        names = ", ".join(
            sorted(c.__name__ for c in known.values() if c.__module__.startswith("wagle_pl"))
        )
        near = nearest(value, names.split(", "))
        meant = f": did you mean {near}?" if near else ""
        raise WagleError(
            f"unknown {option} {value!r}; choose one of {names}, or a class path{meant}"
        )
    try:
        return cls()
    except TypeError as error:
        raise WagleError(f"{option} {value!r} needs arguments: {error}") from None


def nearest(name: str, names: Collection[str]) -> Optional[str]:
    """The one of some names that was probably meant, if any: case does not count.

    >>> nearest("npoo", ["GradDiff", "NPO"])
    'NPO'
    """
    folded = {other.lower(): other for other in sorted(names)}
    return next((folded[found] for found in get_close_matches(name.lower(), folded, n=1)), None)


def describe(value: Any) -> dict[str, Any]:
    """A configurable object as plain data: its class name and its public scalar attributes."""
    scalars = {
        k: v
        for k, v in vars(value).items()
        if not k.startswith("_") and isinstance(v, (str, int, float, bool))
    }
    return {"class": type(value).__name__, **scalars}


def _fold(name: str) -> str:
    return name.replace("_", "").lower()


def subclasses(base: type[T]) -> Iterator[type[T]]:
    """All classes that derive from one, as far as they are imported."""
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)
