"""A book to forget: continuations and questions ("Who's Harry Potter?", arXiv 2310.02238; as in SOUL and WAGLE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent
from wagle_pl.data.example import Row
from wagle_pl.data.rows import load_rows, readable, spread
from wagle_pl.data.sources import HubSet, need_columns
from wagle_pl.data.suite import C4, WIKITEXT, SuiteDataModule

#: Where the hub has the book that the papers forget, in four texts, and questions about it and about the rest.
HUB_BOOKS = "muse-bench/MUSE-Books"


class CopyrightDataModule(SuiteDataModule):
    """A book in chunks to forget, web text (C4) to keep.

    The papers' book is under copyright: they name it and give no file. ``book`` is a file of one's own; without it the
    Harry Potter books of MUSE-Books are taken from the hub, or from the folder. Each chunk is a prompt and its
    continuation, as in the papers. Test sets: ``forget`` (continuations: BLEU, ROUGE), ``forget_qa`` and ``retain_qa``
    (question and answer), ``wikitext`` (articles in chunks, for perplexity).

    A folder may hold ``book.txt`` (or ``.jsonl``, ``.parquet``, … with a column ``text``), ``forget_qa.jsonl``,
    ``retain_qa.jsonl`` (``question`` and ``answer``), and copies of ``allenai/c4``, ``Salesforce/wikitext`` and
    ``muse-bench/MUSE-Books`` by their names without owner.

    Args:
        book: text file, or file of rows with ``text``.
        chunk_size: longest chunk in ``chunk_unit``, prompt and continuation together.
        prompt_size: how much of a chunk is the prompt. Null makes rows of whole chunks, to fine-tune a target on.
        test_chunks: so many chunks, spread evenly over the book, make the test set ``forget``; null takes all.
        limit_retain: documents of C4 to use, from the start of the shard that the papers' code takes.
        kwargs: see :class:`wagle_pl.data.suite.SuiteDataModule`.
    """

    suite: ClassVar[str] = "copyright"
    joined: ClassVar[frozenset[str]] = frozenset({"forget", "test/forget"})
    chunked: ClassVar[frozenset[str]] = frozenset({"forget", "test/forget"})
    paired: ClassVar[frozenset[str]] = frozenset({"forget", "test/forget"})

    def __init__(
        self,
        book: Optional[str] = None,
        chunk_size: Optional[int] = 500,
        prompt_size: Optional[int] = 200,
        test_chunks: Optional[int] = 200,
        limit_retain: Optional[int] = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            chunk_size=chunk_size, prompt_size=prompt_size, limit_retain=limit_retain, **kwargs
        )
        if test_chunks is not None and test_chunks < 1:
            raise WagleError(f"data.test_chunks must be at least 1, got {test_chunks}")
        self.book = book
        self.test_chunks = test_chunks

    def sets(self) -> Mapping[str, Sequence[HubSet]]:
        """See :meth:`SuiteDataModule.sets`."""
        book = HubSet(HUB_BOOKS, "raw", "forget", aliases=("book.*",))
        return {
            "forget": [book],
            "retain": [C4],
            "test/forget": [book],
            "test/forget_qa": [HubSet(HUB_BOOKS, "knowmem", "forget_qa", aliases=("forget_qa.*",))],
            "test/retain_qa": [HubSet(HUB_BOOKS, "knowmem", "retain_qa", aliases=("retain_qa.*",))],
            "test/wikitext": [WIKITEXT],
        }

    def limit(self, name: str) -> Optional[int]:
        """C4 is read as far as it is used."""
        return self.limits["retain"] if name == "retain" else None

    def load_rows(self, name: str) -> Optional[list[Row]]:
        """See :meth:`SuiteDataModule.load_rows`; the book may be a file of one's own."""
        own = (
            name in ("forget", "test/forget")
            and self.book is not None
            and self._given(name) is None
        )
        if own and not (name.startswith("test/") and self.test_sources is not None):
            rows = self._cut(name, self.convert(name, read_book(self.book)))
        else:
            rows = super().load_rows(name)
        return spread(rows, self.test_chunks) if rows and name == "test/forget" else rows

    def convert(self, name: str, rows: list[Row]) -> list[Row]:
        """See :meth:`SuiteDataModule.convert`."""
        if not name.endswith("_qa"):
            return super().convert(name, rows)
        need_columns(rows, ("question", "answer"), f"{name} set ({self.describe(name)})")
        return [{"question": row["question"], "answer": row["answer"]} for row in rows]

    def describe(self, name: str) -> str:
        """See :meth:`SuiteDataModule.describe`."""
        own = (
            name in ("forget", "test/forget")
            and self.book is not None
            and self._given(name) is None
        )
        return self.book if own else super().describe(name)

    def _available(self, name: str) -> bool:
        return (name == "test/forget" and self.book is not None) or super()._available(name)


def read_book(source: str) -> list[Row]:
    """A text file as one row, or the rows of a file.

    Raises:
        WagleError: if the file is missing, empty or not in UTF-8.
    """
    path = Path(source)
    if path.suffix.lower() != ".txt":
        return load_rows(source)
    if not path.is_file():
        raise absent("data.book", source)
    with readable(path):
        text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise WagleError(f"data.book {source} has no text")
    return [{"text": text}]
