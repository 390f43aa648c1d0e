"""From a file or a hub dataset to a list of rows: plain dicts with the columns the file has."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Optional, TextIO, TypeVar

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent, plainly_local
from wagle_pl.data.example import OPTIONAL_TEXTS, TEXTS, Row, as_texts

T = TypeVar("T")

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
        WagleError: naming the file, and the line where there is one: missing, empty, malformed, of an unknown kind, not
            in UTF-8, a broken archive.
    """
    path = Path(source)
    if path.name.lower().endswith(READERS):
        if not path.is_file():
            raise absent("data file", source)
        table = path.suffix.lower() in (".csv", ".parquet")
        rows = [
            as_texts(row)
            for row in (_read_table(path) if table else _read_json(path, limit))[:limit]
        ]
    elif path.is_dir() or (not path.exists() and plainly_local(source.partition(":")[0])):
        raise absent("data source", source, hub=True)
    elif path.exists() or source.count("/") != 1:
        raise WagleError(
            f"data source {source!r} is neither a .json, .jsonl, .csv or .parquet file nor a hub dataset 'owner/name'"
        )
    else:
        rows = read_hub(source, split or "train", limit=limit)
    if not rows:
        raise WagleError(f"data file {source} has no rows")
    return rows


def spread(rows: list[T], count: Optional[int]) -> list[T]:
    """So many of the rows, evenly spaced; all of them if there are no more, or for None.

    >>> spread(list("abcde"), 2)
    ['a', 'c']
    """
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say in one line what is wrong with a file that cannot be decoded or unpacked.

    Raises:
        WagleError: naming the file.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise WagleError(
            f"{path} is not UTF-8 text (it has the byte {byte:#04x}): save it as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise WagleError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _open_text(path: Path) -> TextIO:
    """A text file, unpacked if its name says so; only a line feed ends a line."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _read_json(path: Path, limit: Optional[int]) -> list[Row]:
    with readable(path), _open_text(path) as file:
        lines = enumerate(file, 1)
        number, line = next(((n, text) for n, text in lines if text.strip()), (1, ""))
        if line.lstrip().startswith("["):
            numbered = _json_list(path, "\n" * (number - 1) + line + file.read())
        else:
            numbered = _json_lines(path, chain([(number, line)], lines))
        rows = []
        for number, row in islice(numbered, limit):
            if not isinstance(row, dict):
                raise WagleError(
                    f"{path} line {number}: expected a JSON object, found {type(row).__name__}"
                )
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
    import pyarrow.parquet

    try:
        with readable(path):
            table = (
                _read_csv(path)
                if path.suffix.lower() == ".csv"
                else pyarrow.parquet.read_table(path)
            )
            return table.to_pylist()
    except pyarrow.ArrowException as error:
        raise WagleError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _read_csv(path: Path) -> Any:
    """A CSV file as a table whose columns of texts are texts, whatever their cells look like.

    Raises:
        WagleError: if a column is not in UTF-8.
    """
    import pyarrow
    import pyarrow.csv

    # one block: a column's type is that of all its cells, and a cell may be as long as a book
    size = min(max(path.stat().st_size + 1, 1 << 20), (1 << 31) - 1)
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(block_size=size),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys((*TEXTS, *OPTIONAL_TEXTS), pyarrow.string())
        ),
    )
    for field in table.schema:
        if pyarrow.types.is_binary(field.type):  # what pyarrow makes of text in another encoding
            raise WagleError(f"{path} is not UTF-8 text (column {field.name!r}): save it as UTF-8")
    return table


def read_hub(
    source: str, split: str, files: Optional[str] = None, limit: Optional[int] = None
) -> list[Row]:
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
    except (
        Exception
    ) as error:  # the hub client has many exception types; all mean: this could not be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WagleError(
            f"dataset {source!r} (split {split!r}) cannot be loaded: {reason}"
        ) from error
