"""``SuiteDataModule``: a benchmark as a table of sources; long texts are cut into chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional

from wagle_pl.core.errors import WagleError, check_counts
from wagle_pl.core.files import absent
from wagle_pl.data.example import Row, parse_rows
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.rows import READERS, load_rows, read_hub, spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens of ``max_length`` left free when texts are cut by tokens: for special tokens, and because
#: text at a cut may have other tokens.
SPARE = 8


class HubSet(NamedTuple):
    """One split of one configuration of a hub dataset."""

    repo: str  # ``owner/name``
    config: Optional[str] = None  # None for a dataset with just one
    split: str = "train"
    file: Optional[str] = None  # one file in the repository, in place of the whole split
    aliases: tuple[str, ...] = ()  # other names, with wildcards, that a folder may have for it

    def __str__(self) -> str:
        return f"{self.repo}{f':{self.config}' if self.config else ''} {self.file or self.split}"

    @property
    def short_name(self) -> str:
        """The repository without its owner: the name of its local copy."""
        return self.repo.rpartition("/")[2]

    @property
    def patterns(self) -> list[str]:
        """Where the rows may be in a copy of the repository, most likely first."""
        if self.file is not None:
            return [self.file, *self.aliases]
        names = [f"{self.split}{suffix}" for suffix in READERS] + [f"{self.split}-*-of-*.parquet"]
        places, files = ["", "data/", "data/*/"], []
        if self.config is not None:
            places, files = [f"{self.config}/"], [f"{self.config}{suffix}" for suffix in READERS]
        return [*(place + name for place in places for name in names), *files, *self.aliases]


def local_files(hub_set: HubSet, folder: Path) -> list[Path]:
    """The files of a set, in a folder of copies of repositories or in a copy of its repository."""
    for root in (folder / hub_set.short_name, folder):
        for pattern in hub_set.patterns:
            if files := sorted(root.glob(pattern)):
                return files
    return []


def read_set(
    hub_set: HubSet, folder: Optional[str], limit: Optional[int] = None
) -> Optional[list[Row]]:
    """The first ``limit`` rows of a set, from a folder or, without one, from the hub.

    None if the folder has no such set.
    """
    if folder is None:
        repo, config, split, file, _ = hub_set
        return read_hub(repo, config, split, file, limit)
    files = local_files(hub_set, Path(folder))
    rows = [row for file in files for row in load_rows(str(file), limit=limit)]
    return rows[:limit] if files else None


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
    taken: Optional[int] = None  # take this many of the rows, evenly spaced
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
        chunk_size: longest row of a training text in tokens; null cuts it off at ``max_length``.
        prompt_size: length in tokens of a forget row's prompt, which has no loss and is needed for
            objectives with refusals (PO, DPO); null takes the loss on the whole text.
    """

    #: Name under which evaluation finds the suite's measures.
    suite: ClassVar[str] = ""

    def __init__(
        self,
        folder: Optional[str] = None,
        chunk_size: Optional[int] = None,
        prompt_size: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_counts("data.", chunk_size=chunk_size, prompt_size=prompt_size)
        if folder is not None and not Path(folder).is_dir():
            raise absent("data.folder", folder)
        if chunk_size is not None and prompt_size is not None and prompt_size >= chunk_size:
            why = f"{prompt_size} leaves nothing of data.chunk_size {chunk_size} to follow"
            raise WagleError(why, option="data.prompt_size")
        self.folder, self.chunk_size, self.prompt_size = folder, chunk_size, prompt_size

    @abstractmethod
    def sets(self) -> Mapping[str, Source]:
        """Training stream (``forget``, ``retain``, ``holdout``) -> where its rows are."""

    @abstractmethod
    def tests(self) -> Mapping[str, Source]:
        """Test set -> where its rows are."""

    def train_rows(self, stream: str) -> Optional[list[Row]]:
        return self._rows(
            self.sets().get(stream, Source()),
            self.sources[stream],
            self.place(stream),
            required=stream != "holdout",
        )

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
        return str(options.get(name) or source.file or f"{parts}{place}" or type(self).__name__)

    def _rows(
        self, source: Source, option: Any, where: str, required: bool = False
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
                    f"{self.folder} has no {part}: expected "
                    f"{part.short_name}/{part.patterns[0]}{kinds}",
                    option="data.folder",
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
        return spread(rows, source.taken)

    def _cut(self, source: Source, rows: list[Row], where: str) -> list[Row]:
        """Texts into chunks and pairs, as the source and the options say."""
        contents = [row["text"] for row in rows]
        if source.articles:
            size = max(1, self.max_length - SPARE)
            return chunk_rows(articles(contents), size, self.tokenizer)
        if self.chunk_size is not None and source.chunked:
            contents = ["\n\n".join(contents)] if source.joined else contents
            rows = chunk_rows(contents, self.chunk_size, self.tokenizer)
        if self.prompt_size is not None and source.paired:
            pairs = (continuation(row, self.prompt_size, self.tokenizer) for row in rows)
            rows = [pair for pair in pairs if pair is not None]
            if not rows:
                limit = f"data.prompt_size={self.prompt_size} tokens"
                raise WagleError(f"{where}: no text is longer than {limit}")
        return rows


def chunk_text(text: str, size: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Cut a text where a token begins, every ``size`` tokens; the pieces, joined, are the text."""
    if not tokenizer.is_fast:
        raise WagleError("cutting texts needs a fast tokenizer", option="data.tokenizer")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = {start for start, _ in encoded["offset_mapping"][size::size]}
    cuts = [0, *sorted(start for start in starts if 0 < start < len(text)), len(text)]
    return [text[i:j] for i, j in pairwise(cuts) if i < j]


def chunk_rows(contents: Iterable[str], size: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The chunks of some texts as rows, blank ones left out; ``partial`` where a text goes on."""
    rows: list[Row] = []
    for text in contents:
        *parts, last = chunk_text(text, size, tokenizer)
        rows += [{"text": part, "partial": True} for part in parts if part.strip()]
        rows += [{"text": last}] if last.strip() else []
    return rows


def continuation(row: Row, prompt_size: int, tokenizer: PreTrainedTokenizerBase) -> Optional[Row]:
    """A ``text`` row as a prompt of ``prompt_size`` and a response; None if nothing follows."""
    kept = dict(row)
    text = kept.pop("text")
    prompt = chunk_text(text, prompt_size, tokenizer)[0]
    response = text[len(prompt) :]
    if not prompt.strip() or not response.strip():
        return None
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
