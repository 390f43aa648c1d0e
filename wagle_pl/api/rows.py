"""Rows as users give them to ``forget``, and digests by which later requests recognise them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union

from wagle_pl.api.neighbours import names_of, words_of
from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Example, Row, parse_rows
from wagle_pl.data.rows import items_of, load_rows

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

log = logging.getLogger(__name__)

Rows = Union[str, Path, Row, Iterable[Union[str, Row]], "Dataset", "pd.DataFrame"]

#: A question mark at the end, the Greek one only after a Greek letter: code ends with it, too.
_ASKS = re.compile("(?:[?？؟⁇]|[\u0370-\u03ff\u1f00-\u1fff][;\u037e])[\\s\"'”’“»」』)\\]]*$")
_FILE_OR_HUB_ID = re.compile(r".*\.\w{2,8}|[\w.-]+/[\w.-]+(:[\w.-]+)?")


class GivenRows(NamedTuple):
    """Rows of one argument, and where they come from."""

    rows: list[Row]
    origin: str


def rows_of(source: Rows, name: str) -> GivenRows:
    """Rows of an argument; a string in a list is a question if it ends with a question mark, else a
    text.

    Args:
        source: a file or hub dataset; one row; a list, tuple, generator, dataset or data frame of
            rows and strings.
        name: of the argument, for messages.

    Raises:
        WagleError: if the source is none of these, or has no rows.
    """
    if isinstance(source, (str, Path)):
        path = str(source)
        may_be_one = _FILE_OR_HUB_ID.fullmatch(path) or (path and Path(path).exists())
        if not may_be_one:
            raise WagleError(
                f"{name}: {path[:60]!r} is not a file; to give one row as text, put it in a list: "
                f"{name}=[...]"
            )
        return GivenRows([_row(row, name, 0) for row in load_rows(path)], path)
    items = items_of(source, name)
    if items is None:
        raise WagleError(
            f"{name}: must be a file, a hub dataset, a row, or a list of rows and questions, got "
            f"{type(source).__name__}"
        )
    rows = [_row(item, name, number) for number, item in enumerate(items, 1)]
    if not rows:
        raise WagleError(f"{name}: has no rows")
    texts = sum("text" in row for row in rows if len(row) == 1)
    if texts:
        log.info(
            "%s: %d of %d rows are texts; a string without a question mark at its end is a text",
            *(name, texts, len(rows)),
        )
    return GivenRows(rows, f"{len(rows)} row{'s' * (len(rows) > 1)} given")


def _row(item: Union[str, Mapping[str, Any]], name: str, number: int) -> Row:
    if isinstance(item, Mapping):
        row = dict(item)
        for column in ("question", "answer"):
            if isinstance(row.get(column), str):
                row[column] = row[column].strip()
        return row
    if not isinstance(item, str):
        raise WagleError(
            f"{name}: row {number} must be a question or a dict with columns, got "
            f"{type(item).__name__}"
        )
    if not item.strip():
        raise WagleError(f"{name}: row {number} is empty")
    return {"question": item} if _ASKS.search(item) else {"text": item}


# -- rows that say the same ------------------------------------------------------------------------


class _Fact(NamedTuple):
    """Words by which a row in other words is recognised."""

    subject: set[str]  # names in the question
    told: set[str]  # names in the answer, or its longer words, or all: not in the question

    @classmethod
    def of(cls, example: Example) -> _Fact:
        subject, names = (
            {word for name in names_of(text) for word in words_of(name)}
            for text in (example.question, example.answer)
        )
        asked = set(words_of(example.question))
        words = set(words_of(example.answer)) - asked - {"yes", "no"}
        long_words = {word for word in words if len(word) >= 4}
        return cls(subject, names - asked or long_words or words)

    def is_in(self, words: set[str]) -> bool:
        """Whether a row with these words has most of the subject's names and over a third of what
        is told; over half if the question names nobody."""
        share = len(self.told & words) / max(1, len(self.told))
        if not self.subject:
            return share > 1 / 2
        return share > 1 / 3 and 2 * len(self.subject & words) > len(self.subject)


def restating(rows: Sequence[Example], forget: Sequence[Example]) -> list[Example]:
    """The rows that say a forget row in other words, as far as its names and words show it.

    >>> forget = [Example.of({"question": "Where was Ada Byron born?", "answer": "In London."})]
    >>> rows = [
    ...     {"question": "Which city is the birthplace of Ada Byron?", "answer": "London"},
    ...     {"question": "What was Ada Byron's profession?", "answer": "Mathematician"},
    ...     {"question": "Where was Alan Turing born?", "answer": "In London."},
    ... ]
    >>> [example.answer for example in restating([Example.of(row) for row in rows], forget)]
    ['London']
    """
    facts = [_Fact.of(example) for example in forget]
    words = [set(words_of(f"{example.question} {example.answer}")) for example in rows]
    return [e for e, of_row in zip(rows, words, strict=True) if any(f.is_in(of_row) for f in facts)]


# -- rows of earlier requests ----------------------------------------------------------------------


def row_digest(example: Example, salt: str) -> str:
    """SHA-256 of a row's words, which does not depend on case, punctuation or white space."""
    texts = [" ".join(words_of(text)) for text in (example.question, example.answer)]
    content = "\n".join(texts) if any(texts) else example.key
    return hashlib.sha256(f"{salt}\n{content}".encode("utf-8", "surrogatepass")).hexdigest()


class Earlier:
    """The rows that earlier requests, noted in a model's record, made it forget."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.requests = [
            (run["base_fingerprint"], set(run["request"]["row_digests"]), run["request"]["forget"])
            for run in record.get("lineage", [])
            if "request" in run
        ]

    def holds(self, example: Example) -> bool:
        """Whether a row was forgotten."""
        return bool(self._digests(example))

    def refuse(self, examples: Sequence[Example], name: str) -> None:
        """Refuse rows to keep that were forgotten before: training on them would undo it."""
        for number, example in enumerate(examples, 1):
            if self.holds(example):
                shown = (example.question or example.answer)[:60]
                raise WagleError(
                    f"{name}: row {number} ({shown!r}) was forgotten by an earlier request; remove "
                    "it, or it is learnt again"
                )

    def rows(
        self, examples: Sequence[Example], forget: Sequence[Example]
    ) -> tuple[list[Example], int]:
        """The given rows, and those in the requests' files if these are still as they were; and the
        number of rows of earlier requests that are in neither, nor to be forgotten again."""
        files = [origin for _, _, origin in self.requests if Path(origin).is_file()]
        stored = [example for file in files for example in parse_rows(load_rows(file), file)]
        rows = {e.key: e for e in [*examples, *(e for e in stored if self.holds(e))]}
        matched = {digest for e in [*rows.values(), *forget] for digest in self._digests(e)}
        total = set().union(*(digests for _, digests, _ in self.requests))
        return list(rows.values()), len(total - matched)

    def _digests(self, example: Example) -> list[str]:
        digests = ((row_digest(example, salt), known) for salt, known, _ in self.requests)
        return [digest for digest, known in digests if digest in known]
