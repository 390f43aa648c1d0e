"""Configurations: found by name, built on others, with names of the run filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import yaml

from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import nearest

_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # installed; in a checkout
#: Where ``--config NAME`` looks.
HOME = next((place for place in _PLACES if place.is_dir()), _PLACES[0])

_PLACEHOLDER = re.compile(r"\$\{run\.(\w+)\}")
#: Name -> a configuration that gives it.
_LAYERS = {
    "method": "method/npo",
    "name": "model/zephyr-7b-beta",
    "source": "model/zephyr-7b-beta",
}


def expand(args: Sequence[str]) -> list[str]:
    """Command-line arguments with the content of configurations in place of their names.

    Each ``--config FILE`` becomes one ``--config CONTENT`` for every file that FILE builds on
    (its ``base``: one or a list, relative to the file or by name), and one for FILE itself. Later
    files override earlier ones, key by key. A base that several files share is read once, where it
    comes first: read again it would undo what was built on it.

    ``${run.NAME}`` in a value stands for NAME in the ``run`` mapping of any of the files, or in
    ``--run.NAME VALUE``; of a mapping there, for the entry of ``run.name``, of ``run.method``, or
    ``default``.

    Raises:
        WagleError: if a file is missing, malformed or builds on itself, or a name has no value.
    """
    parts: list[Any] = []  # arguments, and the contents of configurations
    given: dict[str, Any] = {}
    read: set[Path] = set()
    pending = iter(args)
    for argument in pending:
        option, equals, value = argument.partition("=")
        if option not in ("-c", "--config") and not option.startswith("--run."):
            parts.append(argument)
            continue
        value = value if equals else next(pending, "")
        if option.startswith("--run."):
            given[option.removeprefix("--run.")] = yaml.safe_load(value)
            continue
        *bases, (path, content) = _layered(find(value))
        parts += [base for path, base in bases if path not in read]
        parts.append(content)  # a file that is named here is read here, wherever else it was
        read |= {path, *(path for path, _ in bases)}
    names: dict[str, Any] = {}
    for part in parts:
        names |= (part.pop("run", None) or {}) if isinstance(part, dict) else {}
    names |= given
    expanded: list[str] = []
    for part in parts:
        if isinstance(part, str):
            expanded.append(part)
        elif part:
            expanded += ["--config", yaml.safe_dump(_filled(part, names), sort_keys=False)]
    return expanded


def find(name: str, beside: Optional[Path] = None) -> Path:
    """The configuration of a path, or of a name such as ``tofu/data`` among the package's own.

    Args:
        name: what the user gave.
        beside: the file that names it, to which its path is relative.

    Raises:
        WagleError: if there is none.
    """
    own = Path(name) if beside is None else beside.parent / name
    for path in (own, HOME / name, HOME / f"{name}.yaml"):
        if path.is_file():
            return path
    known = {str(path.relative_to(HOME).with_suffix("")) for path in HOME.rglob("*.yaml")}
    near = nearest(name.removesuffix(".yaml"), known)
    hint = f"did you mean {near}?" if near else None
    where = "" if beside is None else f" (named in {beside})"
    raise WagleError(f"config file {own}{where} does not exist", hint=hint)


def _layered(file: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Resolved path and content of what a file builds on, most basic first, and of itself, last."""
    if file.resolve() in above:
        raise WagleError(f"config file {file} builds on itself")
    content = _read(file)
    bases = content.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise WagleError(
            f"config file {file}: base must name a file, or a list of files, that it builds on; "
            f"got {bases}"
        )
    found: dict[Path, dict[str, Any]] = {}
    for base in bases:
        for path, layer in _layered(find(base, file), (*above, file.resolve())):
            found.setdefault(path, layer)
    return [*found.items(), (file.resolve(), content)]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise WagleError(f"config file {file} is malformed: {error}") from None
    except UnicodeDecodeError as error:
        raise WagleError(
            f"config file {file} is not in UTF-8 (byte {error.start}): save it as such"
        ) from None
    if content is None:
        raise WagleError(f"config file {file} holds no options: write some, or leave it out")
    if not isinstance(content, dict):
        raise WagleError(f"config file {file} must hold options at its top level")
    return content


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """A value with every ``${run.NAME}`` replaced; one that is the whole text keeps its type."""
    if isinstance(value, dict):
        return {key: _filled(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, names) for entry in value]
    if not isinstance(value, str):
        return value
    if alone := _PLACEHOLDER.fullmatch(value):
        return _named(alone[1], names)
    return _PLACEHOLDER.sub(lambda found: str(_named(found[1], names)), value)


def _named(name: str, names: Mapping[str, Any]) -> Any:
    if name not in names:
        layer = _LAYERS.get(name)
        add = f"add --config {layer}, or another, or " if layer else ""
        raise WagleError(f"run.{name} has no value", hint=f"{add}give --run.{name}")
    value = names[name]
    if isinstance(value, dict):
        for key in (names.get("name"), names.get("method"), "default"):
            if key in value:
                value = value[key]
                break
        else:
            raise WagleError(
                f"run.{name} has no value for the method {_named('method', names)}",
                hint=f"it has values for {', '.join(map(str, value))}",
            )
    others = {key: entry for key, entry in names.items() if key != name}  # never by itself
    return _filled(value, others)
