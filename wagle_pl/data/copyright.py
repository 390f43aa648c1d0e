"""A book to forget ("Who's Harry Potter?", arXiv 2310.02238), as in SOUL and WAGLE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.rows import HubSet
from wagle_pl.data.suite import ARTICLES, C4, Source, SuiteDataModule, questions

#: Where the hub has the book that the papers forget, in four texts, and questions about it and
#: about the rest.
HUB_BOOKS = "muse-bench/MUSE-Books"


class CopyrightDataModule(SuiteDataModule):
    """A book in chunks to forget, web text (C4) to keep.

    The papers' book is under copyright: they name it and give no file. ``book`` is a file of one's
    own; without it the Harry Potter books of MUSE-Books are taken from the hub, or from the folder.
    Each chunk is a prompt and its continuation, as in the papers. Test sets: ``forget``
    (continuations: BLEU, ROUGE), ``forget_qa`` and ``retain_qa`` (question and answer),
    ``wikitext`` (articles in chunks, for perplexity).

    A folder may hold ``book.txt`` (or ``.jsonl``, ``.parquet``, … with a column ``text``),
    ``forget_qa.jsonl``, ``retain_qa.jsonl`` (``question`` and ``answer``), and copies of
    ``allenai/c4``, ``Salesforce/wikitext`` and ``muse-bench/MUSE-Books`` by their names without
    owner.

    Args:
        book: text file, or file of rows with ``text``.
        chunk_size: longest chunk in ``chunk_unit``, prompt and continuation together.
        prompt_size: how much of a chunk is the prompt. Null makes rows of whole chunks, to
            fine-tune a target on.
        test_chunks: so many chunks, spread evenly over the book, make the test set ``forget``; null
            takes all.
        limit_retain: documents of C4 to use, from the start of the shard that the papers' code
            takes.
        **kwargs: passed to :class:`wagle_pl.data.suite.SuiteDataModule`.
    """

    suite: ClassVar[str] = "copyright"

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
        self.book = Source(
            [HubSet(HUB_BOOKS, "raw", "forget", aliases=("book.*",))],
            file=book,
            joined=True,
            chunked=True,
            paired=True,
        )
        self.test_chunks = test_chunks

    def sets(self) -> Mapping[str, Source]:
        """The book, and C4 as far as it is used."""
        return {"forget": self.book, "retain": Source([C4], limit=self.limits["retain"])}

    def tests(self) -> Mapping[str, Source]:
        """Chunks of the book, questions, and WikiText."""
        asked = {
            name: Source([HubSet(HUB_BOOKS, "knowmem", name, aliases=(f"{name}.*",))], questions)
            for name in ("forget_qa", "retain_qa")
        }
        forget = self.book._replace(count=self.test_chunks)
        return {"forget": forget, **asked, "wikitext": ARTICLES}
