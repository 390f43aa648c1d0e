"""The one reader of text and JSON files: what is no such file is refused in one line."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import yaml

from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import absent
from wagle_pl.core.schema import check

DEPTH = 100  # of lists and objects within each other
NODES = 100_000  # of a YAML text


def read_json(path: Path, kind: Any = Any, what: str = "file") -> Any:
    """The content of a JSON file, checked against the schema ``kind``.

    Raises:
        WagleError: naming the file, and the line or the key at fault; a missing file is ``what``.
    """
    return parse_json(read_text(path, what), str(path), kind)


def read_text(path: Path, what: str = "file") -> str:
    """The content of a file in UTF-8; refused if it is a folder, a pipe or a device."""
    if not path.is_file():
        raise absent(what, path)
    with readable(path):
        return path.read_text(encoding="utf-8-sig")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors of reading, decoding or unpacking a file into a WagleError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise WagleError(
            f"{path} is not UTF-8 text (it has the byte {byte:#04x}): save it as UTF-8"
        ) from None
    except WagleError:
        raise
    except (OSError, EOFError, ValueError, NotImplementedError, zlib.error) as error:
        raise WagleError(f"{path} cannot be read: {first_line(error)}") from None


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, of at most :data:`NODES` nodes once its aliases are replaced.

    Raises:
        WagleError: if it is malformed, too large, too deep, or holds itself.
    """
    sizes: dict[int, Optional[int]] = {}

    def size(node: Optional[yaml.Node]) -> int:
        if node is None or isinstance(node.value, str):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = None  # while its parts are counted
            pairs = isinstance(node, yaml.MappingNode)
            parts = [part for pair in node.value for part in pair] if pairs else node.value
            sizes[id(node)] = 1 + sum(map(size, parts))
        if (count := sizes[id(node)]) is None:
            raise WagleError(f"{where} is malformed: a part of it holds itself")
        return count

    try:
        loader = yaml.SafeLoader(text)
        if size(node := loader.get_single_node()) > NODES:
            raise WagleError(f"{where} has more than {NODES:,} values once aliases are replaced")
        return None if node is None else loader.construct_document(node)
    except WagleError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WagleError(f"{where} is malformed: {reason}") from None


def parse_json(
    text: str, where: str, kind: Any = Any, line: Optional[int] = None, bytes_in: bool = False
) -> Any:
    """The value of a JSON text, checked against the schema ``kind``.

    Args:
        where: name of the text, for messages.
        line: number of the line, if the text is one line of a file.
        bytes_in: accept texts that hold bytes, as Python's ``surrogateescape`` decodes them.
    """
    place = where if line is None else f"{where} line {line}"
    try:
        value = json.loads(text)
        plain = json.dumps(value, ensure_ascii=False) if re.search(r"\\u[dD]", text) else ""
        plain.encode("utf-8", "surrogateescape" if bytes_in else "strict")
    except json.JSONDecodeError as error:
        lined = f"{where} line {line or error.lineno}"
        raise WagleError(f"{lined}: malformed JSON: {error.msg}") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        raise WagleError(f"{place}: a text has {half}, which is half of a character") from None
    except ValueError as error:  # an integer of thousands of digits
        raise WagleError(f"{place}: malformed JSON: {first_line(error)}") from None
    except RecursionError:
        raise WagleError(f"{place}: JSON nested more than {DEPTH} deep") from None
    if text.count("[") + text.count("{") > DEPTH:
        level, depth = [value], 0
        while level := [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]:
            if (depth := depth + 1) > DEPTH:
                raise WagleError(f"{place}: JSON nested more than {DEPTH} deep")
    return check(value, kind, place)
