"""The ``wagle`` command."""

from importlib import import_module
from typing import Any


class LazyModule:
    """A module that is imported when one of its names is first used, so help needs no library.

    Args:
        name: dotted path.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(import_module(self._name), attribute)
