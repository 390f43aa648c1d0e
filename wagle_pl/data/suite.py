"""``SuiteDataModule``: a benchmark as a table of sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent
from wagle_pl.data.chunks import articles, chunk_rows, continuation
from wagle_pl.data.example import Example, Row, parse_rows
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.rows import HubSet, load_rows, local_files, read_set, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens of ``max_length`` left free when texts are cut by tokens: special tokens, and a seam that
#: tokenises anew.
SPARE = 8


def texts(rows: Sequence[Row], where: str) -> list[Row]:
    """Rows with a ``text``, the blank ones left out."""
    need_columns(rows[:1], ("text",), where)
    return [{"text": row["text"]} for row in rows if str(row.get("text") or "").strip()]


def questions(rows: Sequence[Row], where: str) -> list[Row]:
    """Rows with ``question`` and ``answer``, and nothing else of them."""
    need_columns(rows, ("question", "answer"), where)
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def choices(rows: Sequence[Row], where: str) -> list[Row]:
    """Multiple choices with the right one's index in ``answer``; MMLU's ``subject`` is kept.

    Raises:
        WagleError: naming ``where`` and the row if a column is missing, or the answer is no index.
    """
    columns = ("question", "choices", "answer", "subject")
    need_columns(rows, columns[:3], where)
    kept = [{column: row[column] for column in columns if column in row} for row in rows]
    examples = parse_rows(kept, where)
    for number, example in enumerate(examples, 1):
        if example.kind != "choices":
            raise WagleError(
                f"{where} row {number}: answer {example.answer!r} is no index of its choices"
            )
    return [example.row for example in examples]


class Source(NamedTuple):
    """Where the rows of one set of a benchmark are, and what becomes of them."""

    parts: Sequence[HubSet] = ()  # put one after the other
    #: (rows as the benchmark has them, what to call the set) -> rows of :data:`.example.KINDS`
    convert: Callable[[list[Row], str], list[Row]] = texts
    file: Optional[str] = None  # the user's own, in place of the parts
    converts_given: bool = False  # convert also what an option gives in place of the set
    limit: Optional[int] = None  # read at most so many rows: of corpora that nobody reads whole
    count: Optional[int] = None  # take so many of the rows, evenly spaced
    joined: bool = False  # the texts are one text in parts: put together before they are cut
    chunked: bool = False  # cut the texts into chunks, if ``chunk_size`` says so
    paired: bool = False  # make prompt and continuation of each, if ``prompt_size`` says so
    articles: bool = False  # lines of WikiText: put together, in chunks that fit ``max_length``


WIKITEXT = HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
#: The shard of C4 that the SOUL and WAGLE papers' code reads.
C4 = HubSet("allenai/c4", None, "train", "en/c4-train.00001-of-01024.json.gz")
#: WikiText's test articles, for perplexity.
ARTICLES = Source([WIKITEXT], articles=True)


class SuiteDataModule(ForgetRetainDataModule, ABC):
    """A benchmark of parts of hub datasets: those that :meth:`sets` and :meth:`tests` list.

    With ``folder`` everything is read from local files of the same names and columns, and a test
    set whose file is absent is left out. ``forget``, ``retain``, ``holdout`` and ``test`` replace
    parts of the benchmark by files of one's own.

    Args:
        folder: local copy of the hub repositories, each under its name without owner (as ``hf
            download cais/wmdp --repo-type dataset --local-dir FOLDER/wmdp`` makes it), or of the
            only one itself. JSON, CSV and Parquet will do.
        chunk_size: training texts are cut into rows of at most so many units; null leaves each text
            one row, which is cut off at ``max_length``.
        chunk_unit: ``tokens`` of the tokenizer, or ``characters`` (then words stay whole).
        prompt_size: each forget row becomes a prompt of so many units and the text that follows, on
            which alone the loss is; null takes the loss on the whole text. Objectives with refusals
            (PO, DPO) need it.
        **kwargs: passed to :class:`ForgetRetainDataModule`.
    """

    #: Name under which evaluation finds the suite's measures.
    suite: ClassVar[str] = ""

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
                f"data.prompt_size {prompt_size} leaves nothing of data.chunk_size {chunk_size} to "
                "follow"
            )
        self.folder = folder
        self.chunk_size = chunk_size
        self.chunk_unit = chunk_unit
        self.prompt_size = prompt_size

    @abstractmethod
    def sets(self) -> Mapping[str, Source]:
        """Training stream (``forget``, ``retain``, ``holdout``) -> where its rows are."""

    @abstractmethod
    def tests(self) -> Mapping[str, Source]:
        """Test set -> where its rows are."""

    # -- rows --------------------------------------------------------------------------------------

    def train_rows(self, stream: str) -> Optional[list[Row]]:
        """Rows of a part of the benchmark, or of what replaces it; texts cut as asked."""
        source, given = self.sets().get(stream, Source()), self.sources[stream]
        return self._rows(source, given, self._place(stream), required=stream != "holdout")

    def test_rows(self, name: str) -> Optional[list[Row]]:
        """Likewise of a test set."""
        given = (self.test_sources or {}).get(name)
        where = f"test set {name} ({self.describe_test(name)})"
        return self._rows(self.tests().get(name, Source()), given, where)

    def test_names(self) -> list[str]:
        """The test sets named by the user, or the benchmark's; with a folder, those it has."""
        if self.test_sources is not None:
            return list(self.test_sources)
        return [
            name
            for name, source in self.tests().items()
            if self.folder is None
            or source.file is not None
            or all(local_files(part, Path(self.folder)) for part in source.parts)
        ]

    def describe(self, stream: str) -> str:
        """Where the rows of a training stream come from, for messages and the model card."""
        return self.sources.get(stream) or self._described(self.sets().get(stream))

    def describe_test(self, name: str) -> str:
        """Where the rows of a test set come from, for messages."""
        return (self.test_sources or {}).get(name) or self._described(self.tests().get(name))

    def _described(self, source: Optional[Source]) -> str:
        if source is None:
            return type(self).__name__
        parts = ", ".join(map(str, source.parts))
        place = f" in {self.folder}" if self.folder and parts else ""
        return source.file or f"{parts}{place}" or type(self).__name__

    def _rows(
        self, source: Source, given: Optional[str], where: str, required: bool = False
    ) -> Optional[list[Row]]:
        rows: list[Row] = []
        file = given or source.file
        if file is not None:
            rows = load_rows(file, self.split)
        elif not source.parts:
            return None
        else:
            for part in source.parts:
                found = read_set(part, self.folder, source.limit)
                if found is None and required:
                    raise part.missing(str(self.folder))
                if found is None:
                    return None
                rows += found
        if given is None or source.converts_given:
            rows = source.convert(rows, where)
            if not rows:
                raise WagleError(f"{where} has no text")
        if all(row.get("text") is not None for row in rows):
            rows = self._cut(source, parse_rows(filter(_is_filled, rows), where), where)
        return spread(rows, source.count)

    def _cut(self, source: Source, examples: Sequence[Example], where: str) -> list[Row]:
        """Texts into chunks and pairs, as the source and the options say; other rows stay."""
        rows = [example.row for example in examples]
        if any(example.kind != "text" for example in examples):
            return rows
        whole = [example.answer for example in examples]
        if source.articles:
            if self.chunk_size is not None and self.chunk_unit == "characters":
                return chunk_rows(articles(whole), self.chunk_size)
            size = max(1, self.max_length - SPARE)
            return chunk_rows(articles(whole), size, self._cutter("tokens"))
        if self.chunk_size is not None and source.chunked:
            whole = ["\n\n".join(whole)] if source.joined else whole
            rows = chunk_rows(whole, self.chunk_size, self._cutter(self.chunk_unit))
        if self.prompt_size is not None and source.paired:
            cutter = self._cutter(self.chunk_unit)
            pairs = (continuation(row, self.prompt_size, cutter) for row in rows)
            rows = [pair for pair in pairs if pair is not None]
            if not rows:
                raise WagleError(
                    f"{where}: no text is longer than data.prompt_size={self.prompt_size} "
                    f"{self.chunk_unit}"
                )
        return rows

    def _cutter(self, unit: str) -> Optional[PreTrainedTokenizerBase]:
        """The tokenizer, where texts are cut by tokens."""
        if unit == "characters":
            return None
        if self.tokenizer_name is None and self.model_tokenizer is None:
            raise WagleError(
                "cutting texts by tokens needs a tokenizer: give data.tokenizer, or "
                "data.chunk_unit characters"
            )
        return self.tokenizer


def _is_filled(row: Row) -> bool:
    return not isinstance(row["text"], str) or bool(row["text"].strip())


def need_columns(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Check that every row has some columns, other than None.

    Raises:
        WagleError: naming ``where``, the row (counted from 1) and what it has.
    """
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) is None:
                raise WagleError(
                    f"{where} row {number} has no column {column!r}; it has {sorted(row)}"
                )
