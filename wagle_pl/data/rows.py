"""Read a file or a hub dataset into a list of rows: plain dicts with the columns of the file."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import absent, plainly_local
from wagle_pl.core.reading import parse_json, readable
from wagle_pl.core.schema import check
from wagle_pl.data.example import TEXTS, Row

T = TypeVar("T")

READERS = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".json.gz", ".jsonl.gz")


def load_rows(source: str, split: Optional[str] = None, limit: Optional[int] = None) -> list[Row]:
    """Read the rows of a local file or of a hub dataset: one dict per row.

    Args:
        source: a path that ends in one of :data:`READERS`, or a hub dataset as ``owner/name`` or
            ``owner/name:config``. JSON is one list, one object, or one row per line; ``.txt`` is
            one row, ``text``.
        split: the split of a hub dataset; ``train`` when None.
        limit: read only this many rows, from the start.

    Raises:
        WagleError: names the file, and the line if there is one, if the file is missing, empty,
            malformed, of an unknown kind, not in UTF-8, or a damaged archive.
    """
    path = Path(source)
    if path.name.lower().endswith(READERS):
        if not path.is_file():
            raise absent("data file", source)
        with readable(path):
            rows = list(islice(_read(path), limit))
    elif path.is_dir() or (not path.exists() and plainly_local(source.partition(":")[0])):
        raise absent("data source", source, hub=True)
    elif path.exists() or source.count("/") != 1:
        why = f"data source {source!r} is neither a file of a known kind ({', '.join(READERS)})"
        raise WagleError(f"{why} nor a hub dataset 'owner/name'")
    else:
        name, _, config = source.partition(":")
        rows = read_hub(name, config or None, split or "train", limit=limit)
    if not rows:
        raise WagleError(f"data file {source} has no rows")
    return rows


def source_of(source: Any, name: str) -> Optional[Union[str, list[Row]]]:
    """A file or hub dataset as text; rows, see :func:`items_of`, as a list. Other sources are
    refused by the option's name."""
    if source is None or isinstance(source, (str, Path)):
        return source if source is None else str(source)
    items = items_of(source, name)
    rows = items and [dict(row) if isinstance(row, Mapping) else row for row in items]
    return check(source if rows is None else rows, list[Row], name)


def items_of(source: Any, name: str) -> Optional[list[Any]]:
    """The items of a list, generator, dataset, table or data frame, or one row; None if it is none.
    Datasets by split are refused by the option's name."""
    if isinstance(source, Mapping):
        if splits := [split for split, rows in source.items() if hasattr(rows, "column_names")]:
            raise WagleError(
                f"has rows by split: give one of them, such as its {splits[0]!r}", name
            )
        return [source]
    for method, *arguments in (("to_dicts",), ("to_pylist",), ("to_dict", "records")):
        if hasattr(source, "columns") and hasattr(source, method):  # a data frame, or a table
            return [*getattr(source, method)(*arguments)]
    if isinstance(source, (bytes, type)) or getattr(source, "shape", None) == ():
        return None
    if not isinstance(source, Iterable) and hasattr(source, "__getitem__"):  # torch's Dataset
        source = map(source.__getitem__, range(len(source)))
    return [*source] if isinstance(source, Iterable) else None


def spread(rows: list[T], count: Optional[int]) -> list[T]:
    """``count`` rows, evenly spaced; all rows if there are no more, or if ``count`` is None.

    >>> spread(list("abcde"), 2)
    ['a', 'c']
    """
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def _read(path: Path) -> Iterator[Row]:
    """Rows of a file. JSON has one row per line, one list, or one object over several lines; only a
    line feed ends a line."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _read_csv(path)
        return
    if suffix == ".parquet":
        from pyarrow.parquet import read_table

        yield from read_table(path).to_pylist()
        return
    if suffix == ".txt":
        text = path.read_text(encoding="utf-8-sig")
        if text.strip():
            yield {"text": text}
        return
    unpack = gzip.open if suffix == ".gz" else open
    with unpack(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(lines, (1, "[]"))
        if first.lstrip().startswith("[") or first.strip() == "{":
            content = parse_json("\n" * (number - 1) + first + file.read(), str(path))
            rows: Iterator[tuple[int, Any]] = enumerate(
                content if isinstance(content, list) else [content], 1
            )
        else:
            numbered = chain([(number, first)], lines)
            rows = ((n, parse_json(line, str(path), line=n)) for n, line in numbered)
        for number, row in rows:
            if not isinstance(row, dict):
                why = f"{path} line {number}: expected a JSON object, found {type(row).__name__}"
                raise WagleError(why)
            yield row


def _read_csv(path: Path) -> list[Row]:
    """Rows of a CSV file; text columns stay text, even if they look like numbers or dates."""
    import pyarrow
    from pyarrow import csv

    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    for separator in (";", "\t"):
        if separator in header and "," not in header:
            raise WagleError(f"{path} separates columns by {separator!r}: save it with commas")
    # one block, so that a column's type fits all its cells; a cell may be as long as a book
    size = min(max(path.stat().st_size + 1, 1 << 20), (1 << 31) - 1)
    table = csv.read_csv(
        path,
        read_options=csv.ReadOptions(block_size=size),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(TEXTS, pyarrow.string())),
    )
    for column in table.schema:
        if pyarrow.types.is_binary(column.type):  # what pyarrow makes of text in another encoding
            raise WagleError(f"{path} is not UTF-8 text (column {column.name!r}): save it as UTF-8")
    return table.to_pylist()


def read_hub(
    repo: str,
    config: Optional[str] = None,
    split: str = "train",
    file: Optional[str] = None,
    limit: Optional[int] = None,
) -> list[Row]:
    """Rows of a hub dataset, or of one of its files; with a limit, only these are streamed."""
    from datasets import load_dataset

    options: dict[str, Any] = {"split": split}
    if file is not None:
        options["data_files"] = {split: file}
    try:
        if limit is None:
            return load_dataset(repo, config, **options).to_list()
        return list(load_dataset(repo, config, streaming=True, **options).take(limit))
    except Exception as error:  # of many types, all of which mean that it is unavailable
        name = f"{repo}:{config}" if config else repo
        why = f"dataset {name!r} (split {split!r}) cannot be loaded: {first_line(error)}"
        raise WagleError(why) from error
