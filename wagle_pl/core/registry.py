"""Classes, their options and objects, from a name or from a class path with options."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, Union

from wagle_pl.core.errors import WagleError, first_line

T = TypeVar("T")
#: Name of a base class -> module with more of its subclasses, imported once one is asked for.
FURTHER = {
    "Attack": "wagle_pl.lab.attacks",
    "LightningDataModule": "wagle_pl.lab.benchmarks",
    "Suite": "wagle_pl.lab.benchmarks",
}
Entry = Union[str, Mapping[str, Any]]


def did_you_mean(name: str, names: Collection[str], otherwise: str = "") -> str:
    """A question that proposes the nearest name, case ignored, or what to say ``otherwise``.

    >>> did_you_mean("npoo", ["GradDiff", "NPO"])
    'did you mean NPO?'
    """
    folded = {other.lower(): other for other in sorted(names)}
    near = get_close_matches(name.lower(), folded, n=1)
    return f"did you mean {folded[near[0]]}?" if near else otherwise


def subclasses(base: type[T]) -> Iterator[type[T]]:
    """All imported classes that derive from a class."""
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)


@cache
def option_names(cls: type) -> tuple[str, ...]:
    """Names of a class's options, including those that it passes on to its bases."""
    from jsonargparse import ArgumentParser

    return tuple(ArgumentParser(exit_on_error=False).add_class_arguments(cls, fail_untyped=False))


def resolve(base: type[T], value: Union[T, Entry], option: str, also: Collection[str] = ()) -> T:
    """The object that an option names.

    Args:
        base: the class it must derive from.
        value: an instance; a name, see :func:`find_class`; or a mapping with ``class_path`` and
            ``init_args``.
    """
    if isinstance(value, base):
        return value
    name, options = split(value, option)  # type: ignore[arg-type]
    cls = find_class(base, name, option, also)
    try:
        return cls(**check_options(cls, options, f"{option} {name}"))
    except WagleError:
        raise
    except TypeError as error:
        raise WagleError(f"{option}: {name!r} needs arguments: {error}") from None


def find_class(base: type[T], name: str, option: str, also: Collection[str] = ()) -> type[T]:
    """The imported subclass with a name, or the class at a class path; see :func:`resolve`.

    Short names ignore case and underscores, and may leave out the base's name at their end:
    ``npo``, ``forget_retain_ratio``, ``tofu`` for ``TOFUSuite``.
    """
    cls = _by_short_name(base, name)
    if cls is None and base.__name__ in FURTHER:
        import_further(base.__name__)
        cls = _by_short_name(base, name)
    if cls is None and "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise WagleError(f"{option}: {name!r} cannot be imported: {error}") from None
    if isinstance(cls, type) and issubclass(cls, base):
        return cls
    classes = [*subclasses(base)] or [base]
    ours = {c.__name__ for c in classes if c.__module__.startswith("wagle_pl")}
    names = [*also, *sorted(name for name in ours if not name.startswith("_"))]
    choices = f"choose one of {', '.join(names)}, or a class path"
    hint = did_you_mean(name, names)
    raise WagleError(f"{option}: unknown name {name!r}; {choices}" + (f": {hint}" if hint else ""))


def import_further(base: str) -> None:
    """Make the laboratory's subclasses of a class known by their names."""
    importlib.import_module(FURTHER[base])


def _by_short_name(base: type[T], name: str) -> Any:
    """The imported subclass with a short name; None if there is none."""
    classes = [*subclasses(base)] or [base]
    short = {_fold(cls.__name__).removesuffix(_fold(base.__name__)): cls for cls in classes}
    return (short | {_fold(cls.__name__): cls for cls in classes}).get(_fold(name))


def split(value: Entry, option: str) -> tuple[str, dict[str, Any]]:
    """Class name and options in a part of a configuration.

    >>> split({"class_path": "NPO", "init_args": {"beta": 0.2}}, "objective")
    ('NPO', {'beta': 0.2})
    """
    if isinstance(value, str):
        return value, {}
    if hasattr(value, "as_dict"):  # jsonargparse leaves its Namespace within some mappings
        value = value.as_dict()
    if not isinstance(value, Mapping) or not isinstance(value.get("class_path"), str):
        raise WagleError(f"{option}: must be a name, or class_path and init_args; got {value!r}")
    unknown = sorted(set(value) - {"class_path", "init_args"})
    if unknown:
        raise WagleError(
            f"{option} {value['class_path']}: unknown key {unknown[0]!r}; options of the class go "
            "under init_args"
        )
    return value["class_path"], dict(value.get("init_args") or {})


def check_options(cls: type, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert options to the types in a class's signature: mappings to objects, for example."""
    from jsonargparse import ArgumentError, ArgumentParser

    from wagle_pl.core.mistakes import in_one_line

    if not options:
        return {}
    names = option_names(cls)
    for name in options:
        if name not in names:
            hint = did_you_mean(name, names, f"it has {', '.join(names)}")
            raise WagleError(f"{where}: {cls.__name__} has no option {name!r}", hint=hint)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it", skip={*names} - {*options}, instantiate=False)
    try:
        parsed = parser.parse_object({"it": dict(options)})
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        made = instantiate(parsed).it
    except ArgumentError as error:
        raise WagleError(f"{where}: {in_one_line(str(error)).replace('it.', '', 1)}") from None
    except (WagleError, TypeError, ValueError) as error:
        raise WagleError(f"{where}: {first_line(error)}") from None
    return {name: made[name] for name in options}


def describe(value: Any) -> dict[str, Any]:
    """A configurable object as plain data: its class name and its public scalar attributes."""
    scalars = {
        name: attribute
        for name, attribute in vars(value).items()
        if not name.startswith("_") and isinstance(attribute, (str, int, float, bool))
    }
    return {"class": type(value).__name__, **scalars}


def _fold(name: str) -> str:
    return name.replace("_", "").lower()
