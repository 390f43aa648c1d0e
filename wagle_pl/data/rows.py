"""From a file or a hub dataset to a list of rows: plain dicts with the columns the file has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

from wagle_pl.utilities import WagleError

Row = dict[str, Any]

#: The accepted shapes of a row: the columns that must be present, in the order they are tried.
COLUMNS = (
    ("input_ids", "labels"),
    ("messages",),
    ("question", "answer"),
    ("prompt", "response"),
    ("text",),
)


def load_rows(source: str, split: Optional[str] = None) -> list[Row]:
    """Read all rows of a local file or of a hub dataset.

    Args:
        source: a path ending in ``.json``, ``.jsonl``, ``.csv`` or ``.parquet``, or a hub dataset as
            ``owner/name`` or ``owner/name:config``.
        split: the split of a hub dataset; ``train`` when None.

    Returns:
        One dict a row. JSON may be lines or one list.

    Raises:
        WagleError: naming the file, and the line where there is one: missing, empty, malformed, of an unknown kind.
    """
    path = Path(source)
    readers = {".json": _read_json, ".jsonl": _read_json, ".csv": _read_table, ".parquet": _read_table}
    if path.suffix in readers:
        if not path.is_file():
            raise WagleError(f"data file {source} does not exist")
        rows = readers[path.suffix](path)
    elif path.exists() or source.count("/") != 1:
        raise WagleError(
            f"data source {source!r} is neither a .json, .jsonl, .csv or .parquet file nor a hub dataset 'owner/name'"
        )
    else:
        rows = _read_hub(source, split or "train")
    if not rows:
        raise WagleError(f"data file {source} has no rows")
    return rows


def check_rows(rows: list[Row], where: str) -> list[Row]:
    """Check that every row has the columns of one of :data:`COLUMNS` and a non-empty answer; return the rows.

    Raises:
        WagleError: naming ``where`` and the row (counted from 1).
    """
    if not rows:
        raise WagleError(f"{where} has no rows")
    for number, row in enumerate(rows, 1):
        columns = row_kind(row)
        if columns is None:
            kinds = ", ".join("+".join(kind) for kind in COLUMNS)
            raise WagleError(f"{where} row {number} has columns {sorted(row)}; needed is one of: {kinds}")
        if not _answer_of(row, columns):
            raise WagleError(f"{where} row {number}: {columns[-1]!r} is empty")
    return rows


def row_kind(row: Row) -> Optional[tuple[str, ...]]:
    """The entry of :data:`COLUMNS` that the row fits, None if none. A column holding None counts as absent."""
    return next((kind for kind in COLUMNS if all(row.get(column) is not None for column in kind)), None)


def row_key(row: Row) -> str:
    """What makes two rows the same: their training columns, whitespace folded."""
    values = [row[column] for column in row_kind(row) or sorted(row)]
    return json.dumps([" ".join(v.split()) if isinstance(v, str) else v for v in values], sort_keys=True, default=list)


def _answer_of(row: Row, columns: tuple[str, ...]) -> Any:
    value = row[columns[-1]]
    if columns == ("messages",):
        value = value[-1].get("content") if len(value) else None
    return value.strip() if isinstance(value, str) else value is not None and len(value)


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise WagleError(f"{path} line {error.lineno}: malformed JSON: {error.msg}") from None
        numbered = list(enumerate(rows, 1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise WagleError(f"{path} line {number}: malformed JSON: {error.msg}") from None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise WagleError(f"{path} line {number}: expected a JSON object, found {type(row).__name__}")
    return [row for _, row in numbered]


def _read_table(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    reader = pyarrow.csv.read_csv if path.suffix == ".csv" else pyarrow.parquet.read_table
    try:
        return reader(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise WagleError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _read_hub(source: str, split: str) -> list[Row]:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None, split=split).to_list()
    except Exception as error:  # the hub client has many exception types; all mean: this could not be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WagleError(f"dataset {source!r} (split {split!r}) cannot be loaded: {reason}") from error
