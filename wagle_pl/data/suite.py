"""``SuiteDataModule``: what the benchmarks made of hub datasets and long texts have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent
from wagle_pl.data.chunks import chunk_rows, continuation
from wagle_pl.data.example import Row, parse_rows
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.rows import load_rows
from wagle_pl.data.sources import HubSet, local_files, missing, need_columns, read_set

#: Tokens of ``max_length`` left free when texts are cut by tokens: special tokens, and a seam that tokenises anew.
SPARE = 8

WIKITEXT = HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
#: The shard of C4 that the SOUL and WAGLE papers' code reads.
C4 = HubSet("allenai/c4", None, "train", "en/c4-train.00001-of-01024.json.gz")


class SuiteDataModule(ForgetRetainDataModule):
    """A benchmark whose rows are parts of hub datasets. Subclasses say which in :meth:`sets`.

    With ``folder`` everything is read from local files of the same names and columns, and a test set whose file is
    absent is left out. ``forget``, ``retain``, ``holdout`` and ``test`` replace parts of the benchmark by files of
    one's own.

    Args:
        folder: local copy of the hub repositories, each under its name without owner (as
            ``hf download cais/wmdp --repo-type dataset --local-dir FOLDER/wmdp`` makes it), or of the only one
            itself. JSON, CSV and Parquet will do.
        chunk_size: training texts are cut into rows of at most so many units; null leaves each text one row, which is
            cut off at ``max_length``.
        chunk_unit: ``tokens`` of the tokenizer, or ``characters`` (then words stay whole).
        prompt_size: each forget row becomes a prompt of so many units and the text that follows, on which alone the
            loss is; null takes the loss on the whole text. Objectives with refusals (PO, DPO) need it.
        kwargs: see :class:`ForgetRetainDataModule`.
    """

    #: Name under which evaluation finds the suite's measures.
    suite: ClassVar[str] = ""
    #: Sets whose texts are one text in parts: put together before they are cut.
    joined: ClassVar[frozenset[str]] = frozenset()
    #: Sets whose texts are cut into chunks.
    chunked: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "holdout"})
    #: Sets whose chunks become prompt and continuation.
    paired: ClassVar[frozenset[str]] = frozenset({"forget"})

    def __init__(
        self,
        folder: Optional[str] = None,
        chunk_size: Optional[int] = None,
        chunk_unit: Literal["tokens", "characters"] = "tokens",
        prompt_size: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for option, value in (("chunk_size", chunk_size), ("prompt_size", prompt_size)):
            if value is not None and value < 1:
                raise WagleError(f"data.{option} must be at least 1, got {value}")
        if folder is not None and not Path(folder).is_dir():
            raise absent("data.folder", folder)
        if chunk_size is not None and prompt_size is not None and prompt_size >= chunk_size:
            raise WagleError(
                f"data.prompt_size {prompt_size} leaves nothing of data.chunk_size {chunk_size} to follow"
            )
        self.folder = folder
        self.chunk_size = chunk_size
        self.chunk_unit = chunk_unit
        self.prompt_size = prompt_size

    # -- what a benchmark says ----------------------------------------------------------------------------------------

    def sets(self) -> Mapping[str, Sequence[HubSet]]:
        """Set name (``forget``, ``retain``, ``holdout``, ``test/<name>``) -> the parts it is made of."""
        raise TypeError(f"{type(self).__name__} must override sets")

    def convert(self, name: str, rows: list[Row]) -> list[Row]:
        """Rows of one set as the benchmark has them -> rows of :data:`wagle_pl.data.example.KINDS`.

        Texts unless overridden; blank ones are left out.
        """
        need_columns(rows[:1], ("text",), f"{name} set ({self.describe(name)})")
        return [{"text": row["text"]} for row in rows if str(row.get("text") or "").strip()]

    def limit(self, name: str) -> Optional[int]:
        """How many rows of a set to read at most: for corpora that nobody reads whole."""
        return None

    # -- rows ---------------------------------------------------------------------------------------------------------

    def load_rows(self, name: str) -> Optional[list[Row]]:
        """Rows of a part of the benchmark, or of what replaces it; texts cut as asked."""
        given = self._given(name)
        if given is not None:
            return self._cut(name, load_rows(given, self.split))
        if name.startswith("test/") and self.test_sources is not None:
            return None
        rows: list[Row] = []
        for part in self.sets().get(name, ()):
            found = read_set(part, self.folder, self.limit(name))
            if found is None:
                if name in ("forget", "retain"):
                    raise missing(part, str(self.folder))
                return None
            rows += found
        if name not in self.sets():
            return None
        rows = self.convert(name, rows)
        if not rows:
            raise WagleError(f"{name} set ({self.describe(name)}) has no text")
        return self._cut(name, rows)

    def test_names(self) -> list[str]:
        """The test sets named by the user, or the benchmark's; with a folder, those it has."""
        if self.test_sources is not None:
            return list(self.test_sources)
        return [
            name[5:] for name in self.sets() if name.startswith("test/") and self._available(name)
        ]

    def describe(self, name: str) -> str:
        """Where the rows of a set come from, for messages and the model card."""
        given = self._given(name)
        if given is not None:
            return given
        parts = ", ".join(str(part) for part in self.sets().get(name, ()))
        return (
            f"{parts} in {self.folder}" if self.folder and parts else parts or type(self).__name__
        )

    def _given(self, name: str) -> Optional[str]:
        return (
            (self.test_sources or {}).get(name[5:])
            if name.startswith("test/")
            else self.sources.get(name)
        )

    def _available(self, name: str) -> bool:
        return self.folder is None or all(
            local_files(part, Path(self.folder)) for part in self.sets()[name]
        )

    # -- cutting ------------------------------------------------------------------------------------------------------

    def _cut(self, name: str, rows: list[Row]) -> list[Row]:
        """Texts into chunks and pairs, as the options say; other rows stay what they are."""
        if name == "test/wikitext":
            return self.cut_articles(rows)
        if any(row.get("text") is None for row in rows):
            return rows
        rows = [row for row in rows if not _is_blank(row)]
        examples = parse_rows(rows, f"{name} set ({self.describe(name)})")
        if any(example.kind != "text" for example in examples):
            return rows
        if self.chunk_size is not None and name in self.chunked:
            texts = [example.answer for example in examples]
            texts = ["\n\n".join(texts)] if name in self.joined else texts
            rows = chunk_rows(
                texts, self.chunk_size, self.chunk_unit, self._cutter(self.chunk_unit)
            )
        if self.prompt_size is not None and name in self.paired:
            cutter = self._cutter(self.chunk_unit)
            pairs = [continuation(row, self.prompt_size, self.chunk_unit, cutter) for row in rows]
            rows = [pair for pair in pairs if pair is not None]
            if not rows:
                raise WagleError(
                    f"{name} set ({self.describe(name)}): no text is longer than "
                    f"data.prompt_size={self.prompt_size} {self.chunk_unit}"
                )
        return rows

    def cut_articles(self, rows: list[Row]) -> list[Row]:
        """Lines of WikiText as articles, in chunks that fit ``max_length``, for perplexity."""
        texts = articles([row["text"] for row in rows])
        if self.chunk_size is not None and self.chunk_unit == "characters":
            return chunk_rows(texts, self.chunk_size, "characters")
        return chunk_rows(texts, max(1, self.max_length - SPARE), "tokens", self._cutter("tokens"))

    def _cutter(self, unit: str) -> Any:
        """The tokenizer, where texts are cut by tokens."""
        if unit == "characters":
            return None
        if self.tokenizer_name is None and self.trainer is None:
            raise WagleError(
                "cutting texts by tokens needs a tokenizer: give data.tokenizer, or "
                "data.chunk_unit characters"
            )
        return self.tokenizer


def _is_blank(row: Row) -> bool:
    return isinstance(row.get("text"), str) and not row["text"].strip()


def articles(lines: Sequence[str]) -> list[str]:
    """WikiText's lines put together to articles; a line ``= Title =`` begins one.

    >>> articles([" = A = \\n", "One.\\n", " = = Part = = \\n", "", " = B = \\n", "Two.\\n"])
    [' = A = \\nOne.\\n = = Part = = \\n', ' = B = \\nTwo.\\n']
    """
    found: list[list[str]] = [[]]
    for line in lines:
        words = line.split()
        title = len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2])
        if title and found[-1]:
            found.append([])
        found[-1].append(line)
    texts = ["".join(part) for part in found]
    return [text for text in texts if text.strip()]


def choice_rows(rows: Sequence[Row], where: str) -> list[Row]:
    """Multiple-choice rows with the right one's index in ``answer`` -> ``question``, ``choices``, ``label``.

    MMLU's ``subject`` is kept.

    Raises:
        WagleError: naming ``where`` and the row if a column is missing, or the answer is no index.
    """
    columns = ("question", "choices", "answer")
    need_columns(rows, columns, where)
    kept = (*columns, "subject")
    examples = parse_rows(
        [{column: row[column] for column in kept if column in row} for row in rows], where
    )
    for number, example in enumerate(examples, 1):
        if example.kind != "choices":
            raise WagleError(
                f"{where} row {number}: answer {example.answer!r} is no index of its choices"
            )
    return [example.row for example in examples]
