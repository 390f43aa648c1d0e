"""What classes and options there are, and which one was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from difflib import get_close_matches
from functools import cache
from typing import Optional, TypeVar

T = TypeVar("T")


def nearest(name: str, names: Collection[str]) -> Optional[str]:
    """The one of some names that was probably meant, if any; case does not count.

    >>> nearest("npoo", ["GradDiff", "NPO"])
    'NPO'
    """
    folded = {other.lower(): other for other in sorted(names)}
    return next((folded[found] for found in get_close_matches(name.lower(), folded, n=1)), None)


def subclasses(base: type[T]) -> Iterator[type[T]]:
    """All classes that derive from one, as far as they are imported."""
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)


@cache
def option_names(cls: type) -> tuple[str, ...]:
    """Names of a class's options, those that it hands on to its bases among them."""
    from jsonargparse import ArgumentParser

    return tuple(ArgumentParser(exit_on_error=False).add_class_arguments(cls, fail_untyped=False))
