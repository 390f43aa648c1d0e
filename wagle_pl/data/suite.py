"""``SuiteDataModule``: a benchmark as a table of sources; long texts are cut into chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Optional

from wagle_pl.core.errors import WagleError, check_counts
from wagle_pl.core.files import absent
from wagle_pl.data.example import Row, parse_rows
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.rows import HubSet, load_rows, local_files, read_set, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens of ``max_length`` left free when texts are cut by tokens: for special tokens, and because
#: text at a cut may have other tokens.
SPARE = 8


class SourceRow(Row):
    """A row as a benchmark has it: a column that is missing or null is refused by name."""

    def __init__(self, row: Row, place: str) -> None:
        super().__init__(row)
        self.place = place  # the set and the row, counted from 1

    def __getitem__(self, column: str) -> Any:
        if self.get(column) is None:
            raise WagleError(f"{self.place} has no column {column!r}; it has {sorted(self)}")
        return super().__getitem__(column)


def source_rows(rows: Iterable[Row], where: str) -> list[SourceRow]:
    return [SourceRow(row, f"{where} row {number}") for number, row in enumerate(rows, 1)]


#: From rows of a benchmark to rows of :data:`.example.KINDS`.
Convert = Callable[[Sequence[SourceRow]], list[Row]]


def texts(rows: Sequence[SourceRow]) -> list[Row]:
    """Rows with a ``text``, without blank ones."""
    filled = (row for row in rows if "text" not in row or str(row.get("text") or "").strip())
    return [{"text": row["text"]} for row in filled]


def questions(rows: Sequence[SourceRow]) -> list[Row]:
    """Rows with ``question`` and ``answer``."""
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def choices(rows: Sequence[SourceRow]) -> list[Row]:
    """Multiple choice, with the right one's index in ``answer``; MMLU's ``subject`` is kept."""
    return [
        {"question": row["question"], "choices": row["choices"]}
        | ({"subject": row["subject"]} if row.get("subject") else {})
        | {"label": row["answer"]}
        for row in rows
    ]


class Source(NamedTuple):
    """Where the rows of one set of a benchmark are, and how they are converted."""

    parts: Sequence[HubSet] = ()  # put one after the other
    convert: Convert = texts
    file: Optional[str] = None  # the user's own, in place of the parts
    converts_given: bool = False  # also convert rows that an option gives in place of the set
    limit: Optional[int] = None  # read at most this many rows, of corpora too large to read whole
    count: Optional[int] = None  # take this many of the rows, evenly spaced
    joined: bool = False  # the texts are one text in parts: put together before they are cut
    chunked: bool = False  # cut the texts into chunks, if ``chunk_size`` says so
    paired: bool = False  # make prompt and continuation of each, if ``prompt_size`` says so
    articles: bool = False  # lines of WikiText: put together, in chunks that fit ``max_length``


class SuiteDataModule(ForgetRetainDataModule, ABC):
    """A benchmark made of parts of hub datasets, which :meth:`sets` and :meth:`tests` list.

    With ``folder`` everything is read from local files of the same names and columns, and a test
    set whose file is absent is left out. ``forget``, ``retain``, ``holdout`` and ``test`` replace
    parts of the benchmark with your own files.

    Args:
        folder: local copies of the hub repositories, each under its name without owner (as ``hf
            download cais/wmdp --repo-type dataset --local-dir FOLDER/wmdp`` makes it); or the copy
            of the only repository. JSON, CSV and Parquet are read.
        chunk_size: longest row of a training text in units; null cuts it off at ``max_length``.
        chunk_unit: ``tokens`` of the tokenizer, or ``characters`` (then words stay whole).
        prompt_size: length in units of a forget row's prompt, which has no loss and is needed for
            objectives with refusals (PO, DPO); null takes the loss on the whole text.
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
        check_counts("data.", chunk_size=chunk_size, prompt_size=prompt_size)
        if folder is not None and not Path(folder).is_dir():
            raise absent("data.folder", folder)
        if chunk_size is not None and prompt_size is not None and prompt_size >= chunk_size:
            raise WagleError(
                f"data.prompt_size: {prompt_size} leaves nothing of data.chunk_size {chunk_size} to "
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

    def train_rows(self, stream: str) -> Optional[list[Row]]:
        source, option = self.sets().get(stream, Source()), self.sources[stream]
        return self._rows(source, option, self.place(stream), required=stream != "holdout")

    def test_rows(self, name: str) -> Optional[list[Row]]:
        option = (self.test_sources or {}).get(name)
        return self._rows(self.tests().get(name, Source()), option, self.place(name, test=True))

    def own_tests(self) -> list[str]:
        return [
            name
            for name, source in self.tests().items()
            if self.folder is None
            or source.file is not None
            or all(local_files(part, Path(self.folder)) for part in source.parts)
        ]

    def describe(self, name: str, test: bool = False) -> str:
        options = (self.test_sources or {}) if test else self.sources
        source = (self.tests() if test else self.sets()).get(name, Source())
        parts = ", ".join(map(str, source.parts))
        place = f" in {self.folder}" if self.folder and parts else ""
        return options.get(name) or source.file or f"{parts}{place}" or type(self).__name__

    def _rows(
        self, source: Source, option: Optional[str], where: str, required: bool = False
    ) -> Optional[list[Row]]:
        file = option or source.file
        if file is None and not source.parts:
            return None
        rows = [] if file is None else load_rows(file, self.split)
        for part in source.parts if file is None else ():
            part_rows = read_set(part, self.folder, source.limit)
            if part_rows is None and required:
                kinds = "" if part.file else " (.jsonl, .csv and .parquet will do)"
                raise WagleError(
                    f"data.folder: {self.folder} has no {part}: expected "
                    f"{part.short_name}/{part.patterns[0]}{kinds}"
                )
            if part_rows is None:
                return None
            rows += part_rows
        if option is None or source.converts_given:
            rows = source.convert(source_rows(rows, where))
            if not rows:
                raise WagleError(f"{where} has no text")
        if all(row.get("text") is not None for row in rows):
            filled = [row for row in rows if str(row["text"]).strip()]
            examples = parse_rows(filled, where)
            rows = [example.row for example in examples]
            if all(example.kind == "text" for example in examples):
                rows = self._cut(source, rows, where)
        return spread(rows, source.count)

    def _cut(self, source: Source, rows: list[Row], where: str) -> list[Row]:
        """Texts into chunks and pairs, as the source and the options say."""
        contents, in_characters = [row["text"] for row in rows], self.chunk_unit == "characters"
        if source.articles:
            if self.chunk_size is not None and in_characters:
                return chunk_rows(articles(contents), self.chunk_size)
            return chunk_rows(articles(contents), max(1, self.max_length - SPARE), self.tokenizer)
        if self.chunk_size is not None and source.chunked:
            contents = ["\n\n".join(contents)] if source.joined else contents
            rows = chunk_rows(contents, self.chunk_size, None if in_characters else self.tokenizer)
        if self.prompt_size is not None and source.paired:
            tokenizer = None if in_characters else self.tokenizer
            pairs = (continuation(row, self.prompt_size, tokenizer) for row in rows)
            rows = [pair for pair in pairs if pair is not None]
            if not rows:
                raise WagleError(
                    f"{where}: no text is longer than data.prompt_size={self.prompt_size} "
                    f"{self.chunk_unit}"
                )
        return rows


def chunk_text(
    text: str, size: int, tokenizer: Optional[PreTrainedTokenizerBase] = None
) -> list[str]:
    """Cut a text into pieces that, joined, give the text again.

    Args:
        size: longest piece, in tokens or, without a tokenizer, in characters.
        tokenizer: cuts where a token of the whole text begins, every ``size`` tokens. None cuts at
            white space, so that words stay whole.

    >>> chunk_text("Down the rabbit-hole", 9)
    ['Down the', ' rabbit-h', 'ole']
    """
    cuts = [0]
    if tokenizer is None:
        while len(text) - cuts[-1] > size:
            start, end = cuts[-1], cuts[-1] + size
            if not text[end].isspace():
                space = next((i for i in range(end - 1, start, -1) if text[i].isspace()), end)
                end = space if text[start:space].strip() else end
            cuts.append(end)
    elif not tokenizer.is_fast:
        raise WagleError(
            "cutting by tokens needs a fast tokenizer; give data.chunk_unit characters"
        )
    else:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts = {start for start, _ in encoded["offset_mapping"][size::size]}
        cuts += sorted(start for start in starts if 0 < start < len(text))
    return [text[i:j] for i, j in pairwise([*cuts, len(text)]) if i < j]


def chunk_rows(
    contents: Iterable[str], size: int, tokenizer: Optional[PreTrainedTokenizerBase] = None
) -> list[Row]:
    """The chunks of some texts as rows, blank ones left out; ``partial`` where a text goes on."""
    rows: list[Row] = []
    for text in contents:
        chunks = [{"text": chunk, "partial": True} for chunk in chunk_text(text, size, tokenizer)]
        for last in chunks[-1:]:
            del last["partial"]
        rows += [row for row in chunks if row["text"].strip()]
    return rows


def continuation(
    row: Row, prompt_size: int, tokenizer: Optional[PreTrainedTokenizerBase] = None
) -> Optional[Row]:
    """A ``text`` row as a prompt of ``prompt_size`` and a response; None if nothing follows."""
    prompt = chunk_text(row["text"], prompt_size, tokenizer)[0]
    response = row["text"][len(prompt) :]
    if not prompt.strip() or not response.strip():
        return None
    kept = {column: value for column, value in row.items() if column != "text"}
    return {"prompt": prompt, "response": response, "continuation": True, **kept}


def articles(lines: Iterable[str]) -> list[str]:
    """WikiText's lines joined into articles; a line ``= Title =`` begins one.

    >>> articles([" = A = \\n", "One.\\n", " = = Part = = \\n", "", " = B = \\n", "Two.\\n"])
    [' = A = \\nOne.\\n = = Part = = \\n', ' = B = \\nTwo.\\n']
    """
    parts = [""]
    for line in lines:
        words = line.split()
        title = len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2])
        if title and parts[-1]:
            parts.append("")
        parts[-1] += line
    return [text for text in parts if text.strip()]
