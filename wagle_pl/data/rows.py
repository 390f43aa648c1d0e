"""From a file or a hub dataset to a list of rows: plain dicts with the columns the file has."""

from __future__ import annotations

import datetime
import gzip
import json
import math
import numbers
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Optional, TextIO

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent, plainly_local

Row = dict[str, Any]

#: The accepted shapes of a row: the columns that must be present, in the order they are tried. ``label`` is the index
#: of the right one of ``choices`` (a whole number in ``answer`` will do); a row with a ``prompt`` alone can be
#: generated from, not trained on. A number or a date where a text belongs is taken as its text.
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

#: Columns that hold a text, and columns that hold a list of texts.
TEXTS = ("question", "answer", "prompt", "response", "text")
MORE_TEXTS = ("context", "paraphrased_question", "paraphrased_answer")
LISTS = ("choices", "perturbed_answer")

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


def check_rows(rows: list[Row], where: str) -> list[Row]:
    """Check that every row has the columns of one of :data:`COLUMNS`, of the right types, and a non-empty answer.

    The answer is the last of those columns; that of a multiple choice must be the index of one of its choices.

    Returns:
        The rows, with the text of what is a number or a date where a text belongs, and with the ``label`` that a
        multiple choice has in ``answer``.

    Raises:
        WagleError: naming ``where`` and the row (counted from 1).
    """
    if not rows:
        raise WagleError(f"{where} has no rows")
    rows = [_with_label(as_texts(row)) for row in rows]
    for number, row in enumerate(rows, 1):
        columns = row_kind(row)
        if columns is None:
            if nulls := _nulls(row):
                raise WagleError(
                    f"{where} row {number}: {nulls} null: give a value, or leave the row out"
                )
            kinds = ", ".join("+".join(kind) for kind in COLUMNS)
            raise WagleError(
                f"{where} row {number} has columns {sorted(row)}; needed is one of: {kinds}"
            )
        if fault := _fault(row, columns):
            raise WagleError(f"{where} row {number}: {fault}")
    return rows


def _nulls(row: Row) -> str:
    """Which columns, with their verb, would make the row one of a kind if they were not None; empty if none would."""
    for kind in COLUMNS:
        if all(column in row for column in kind):
            nulls = [repr(column) for column in kind if row[column] is None]
            return f"{' and '.join(nulls)} {'is' if len(nulls) == 1 else 'are'}"
    return ""


def _fault(row: Row, columns: tuple[str, ...]) -> Optional[str]:
    """What is wrong with a row of a kind, None if nothing is."""
    for column in (*columns, *MORE_TEXTS, "perturbed_answer"):
        value = row.get(column)
        if column in (*TEXTS, *MORE_TEXTS, *LISTS) and any(
            map(_is_nan, value if isinstance(value, list) else [value])
        ):
            return f"{column!r} is {value}, not a text: give it a value, or leave the row out"
        if column in (*TEXTS, *MORE_TEXTS) and not isinstance(value, (str, type(None))):
            return f"{column!r} is a {type(value).__name__}, not a text"
        if column in LISTS and value is not None and not _is_list_of(value, str):
            return f"{column!r} is no list of texts"
        if column in ("input_ids", "labels"):
            if not hasattr(value, "__len__") or not all(
                isinstance(item, numbers.Integral) for item in value
            ):
                return f"{column!r} is no list of tokens"
            lowest = -100 if column == "labels" else 0
            if wrong := [item for item in value if item < 0 and item != lowest]:
                return f"{column!r} has {wrong[0]}, which is no token id"
    if columns == ("messages",):
        messages = row["messages"]
        if not _is_list_of(messages, dict) or not all(
            isinstance(message.get(part), str)
            for message in messages
            for part in ("role", "content")
        ):
            return "'messages' is no list of messages, each with the texts 'role' and 'content'"
    if columns[-1] == "label":
        label = row["label"]
        right = isinstance(label, numbers.Integral) and label in range(len(row["choices"]))
        return None if right else f"label {label!r} is no index of its choices"
    if not _has_answer(row, columns):
        return f"{columns[-1]!r} is empty"
    if columns == ("messages",) and row["messages"][-1]["role"] in ("system", "user"):
        return f"the last of 'messages' is of the {row['messages'][-1]['role']}, where the answer must be"
    if columns == ("input_ids", "labels") and len(row["input_ids"]) != len(row["labels"]):
        return f"there are {len(row['input_ids'])} 'input_ids' and {len(row['labels'])} 'labels'"
    return None


def _has_answer(row: Row, columns: tuple[str, ...]) -> bool:
    value = row[columns[-1]]
    if columns == ("messages",):
        value = value[-1]["content"] if value else ""
    return bool(value.strip()) if isinstance(value, str) else len(value) > 0


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, kind) for item in value)


def as_texts(row: Row) -> Row:
    """A row with the text of numbers, truth values and dates in columns of texts: a year is an answer too.

    The ``answer`` of a multiple choice stays a number.

    >>> as_texts({"question": "When?", "answer": 1980})
    {'question': 'When?', 'answer': '1980'}
    """
    chosen = row.get("choices") is not None
    texts = {
        column: _text(row[column])
        for column in (*TEXTS, *MORE_TEXTS)
        if _has_text(row.get(column)) and not (chosen and column == "answer")
    }
    lists = {
        column: [_text(item) if _has_text(item) else item for item in row[column]]
        for column in LISTS
        if isinstance(row.get(column), (list, tuple)) and any(map(_has_text, row[column]))
    }
    return {**row, **texts, **lists} if texts or lists else row


def _has_text(value: Any) -> bool:
    return isinstance(value, (numbers.Number, datetime.date, datetime.time)) and not _is_nan(value)


def _is_nan(value: Any) -> bool:
    """Whether a value is what JSON writes as NaN or Infinity."""
    return isinstance(value, numbers.Real) and not math.isfinite(value)


def _text(value: Any) -> str:
    return (
        str(value).lower() if isinstance(value, bool) else str(value)
    )  # true, false: as JSON and most CSV have them


def _with_label(row: Row) -> Row:
    """A multiple choice with the whole number in ``answer``, or in ``label``, as its ``label``."""
    if row.get("choices") is None:
        return row
    source = "label" if row.get("label") is not None else "answer"
    value = row.get(source)
    if (
        type(value) is float and value.is_integer()
    ):  # what became of whole numbers in a column with gaps
        value = int(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Integral)
        or value is row.get("label")
    ):
        return row
    return {**{name: each for name, each in row.items() if name != source}, "label": int(value)}


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
    return next(
        (kind for kind in COLUMNS if all(row.get(column) is not None for column in kind)), None
    )


def row_key(row: Row) -> str:
    """What makes two rows the same: their training columns, whitespace folded."""
    values = [row[column] for column in row_kind(row) or sorted(row)]
    return json.dumps(
        [" ".join(v.split()) if isinstance(v, str) else v for v in values],
        sort_keys=True,
        default=list,
    )


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
            column_types=dict.fromkeys((*TEXTS, *MORE_TEXTS), pyarrow.string())
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
