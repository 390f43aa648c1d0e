"""From a file or a hub dataset to a list of rows: plain dicts with the columns the file has."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Optional, TextIO

from wagle_pl.utilities import WagleError

Row = dict[str, Any]

#: The accepted shapes of a row: the columns that must be present, in the order they are tried. ``label`` is the index
#: of the right one of ``choices``; a row with a ``prompt`` alone can be generated from, not trained on.
#: Any row may add ``context`` (text before the question, e.g. worked examples), ``continuation`` (true: the response
#: continues the prompt word by word, no template is put around them) and ``partial`` (true: the text goes on after the
#: row, which gets no end-of-sequence token).
COLUMNS = (
    ("input_ids", "labels"),
    ("messages",),
    ("question", "choices", "label"),
    ("question", "answer"),
    ("prompt", "response"),
    ("text",),
    ("prompt",),
)

READERS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz")


def load_rows(source: str, split: Optional[str] = None, limit: Optional[int] = None) -> list[Row]:
    """Read the rows of a local file or of a hub dataset.

    Args:
        source: a path ending in ``.json``, ``.jsonl`` (either may be followed by ``.gz``), ``.csv`` or ``.parquet``, or
            a hub dataset as ``owner/name`` or ``owner/name:config``.
        split: the split of a hub dataset; ``train`` when None.
        limit: read only the first so many rows: no more of JSON lines or of a hub dataset is read than that.

    Returns:
        One dict a row. JSON may be lines or one list.

    Raises:
        WagleError: naming the file, and the line where there is one: missing, empty, malformed, of an unknown kind.
    """
    path = Path(source)
    if path.name.lower().endswith(READERS):
        if not path.is_file():
            raise WagleError(f"data file {source} does not exist")
        rows = _read_table(path) if path.suffix in (".csv", ".parquet") else _read_json(path, limit)
        rows = rows[:limit]
    elif path.exists() or source.count("/") != 1:
        raise WagleError(
            f"data source {source!r} is neither a .json, .jsonl, .csv or .parquet file nor a hub dataset 'owner/name'"
        )
    else:
        rows = read_hub(source, split or "train", limit=limit)
    if not rows:
        raise WagleError(f"data file {source} has no rows")
    return rows


def check_rows(rows: list[Row], where: str) -> list[Row]:
    """Check that every row has the columns of one of :data:`COLUMNS` and a non-empty answer; return the rows.

    The answer is the last of those columns; that of a multiple choice must be the index of one of its choices.

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
        if columns[-1] == "label":
            if row["label"] not in range(len(row["choices"])):
                raise WagleError(f"{where} row {number}: label {row['label']!r} is no index of its choices")
        elif not _answer_of(row, columns):
            raise WagleError(f"{where} row {number}: {columns[-1]!r} is empty")
    return rows


def spread(rows: list[Row], count: Optional[int]) -> list[Row]:
    """So many of the rows, evenly spaced; all of them if there are no more, or for None.

    >>> spread([{"text": letter} for letter in "abcde"], 2)
    [{'text': 'a'}, {'text': 'c'}]
    """
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


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


def _open_text(path: Path) -> TextIO:
    """A text file, unpacked if its name says so; only a line feed ends a line."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def _read_json(path: Path, limit: Optional[int]) -> list[Row]:
    with _open_text(path) as file:
        lines = enumerate(file, 1)
        number, line = next(((n, text) for n, text in lines if text.strip()), (1, ""))
        if line.lstrip().startswith("["):
            numbered = _json_list(path, "\n" * (number - 1) + line + file.read())
        else:
            numbered = _json_lines(path, chain([(number, line)], lines))
        rows = []
        for number, row in islice(numbered, limit):
            if not isinstance(row, dict):
                raise WagleError(f"{path} line {number}: expected a JSON object, found {type(row).__name__}")
            rows.append(row)
    return rows


def _json_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(json.loads(text), 1)
    except json.JSONDecodeError as error:
        raise WagleError(f"{path} line {error.lineno}: malformed JSON: {error.msg}") from None


def _json_lines(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank."""
    for number, line in lines:
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise WagleError(f"{path} line {number}: malformed JSON: {error.msg}") from None


def _read_table(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    reader = pyarrow.csv.read_csv if path.suffix == ".csv" else pyarrow.parquet.read_table
    try:
        return reader(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise WagleError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def read_hub(source: str, split: str, files: Optional[str] = None, limit: Optional[int] = None) -> list[Row]:
    """Rows of a hub dataset.

    Args:
        source: ``owner/name`` or ``owner/name:config``.
        split: of the dataset.
        files: path of one file in the repository, to be read in place of the whole split.
        limit: stream, and stop after so many rows.

    Raises:
        WagleError: if it cannot be had.
    """
    from datasets import load_dataset

    name, _, config = source.partition(":")
    options: dict[str, Any] = {"split": split}
    if files is not None:
        options["data_files"] = {split: files}
    try:
        if limit is not None:
            return list(load_dataset(name, config or None, streaming=True, **options).take(limit))
        return load_dataset(name, config or None, **options).to_list()
    except Exception as error:  # the hub client has many exception types; all mean: this could not be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WagleError(f"dataset {source!r} (split {split!r}) cannot be loaded: {reason}") from error
