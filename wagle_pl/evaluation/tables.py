"""One table of records a test set: written whole when the set is done, found again when a test is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path

_KEY = b"wagle_pl.key"


def write_table(path: Path, rows: list[dict[str, Any]], key: dict[str, Any]) -> None:
    """Write rows as Parquet, with ``key``, what they depend on, in the file's metadata."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({_KEY: json.dumps(key, sort_keys=True)})
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def read_table(
    path: Path, key: dict[str, Any], overwrite: bool = False
) -> Optional[list[dict[str, Any]]]:
    """Rows of a table written with the same ``key``; None if there is none.

    Raises:
        WagleError: if ``overwrite`` is False and the file is damaged, or written with another key, naming what differs.
    """
    if not path.is_file():
        return None
    try:
        written = table_key(path)
        if written == key:
            return load_table(path)
        differ = ", ".join(
            sorted(name for name in {*written, *key} if written.get(name) != key.get(name))
        )
        mistake = f"{path} holds results of another test (other {differ})"
    except WagleError as error:
        mistake = str(error)
    if overwrite:
        return None
    raise WagleError(mistake, hint="choose another --model.output or pass --model.overwrite true")


def table_key(path: Path) -> dict[str, Any]:
    """What a table's rows depend on; empty if the file does not say.

    Raises:
        WagleError: if the file is no Parquet file.
    """
    import pyarrow.parquet

    with _readable(path):
        return json.loads((pyarrow.parquet.read_schema(path).metadata or {}).get(_KEY, b"{}"))


def load_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table, whatever made it.

    Raises:
        WagleError: if the file is no Parquet file.
    """
    import pyarrow.parquet

    with _readable(path):
        return pyarrow.parquet.read_table(path).to_pylist()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise WagleError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
