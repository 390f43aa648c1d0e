"""``ForgetRetainDataModule``: pairs the forget and the retain stream, and serves the test sets."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Optional, Union

import lightning as L
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from wagle_pl.core.errors import WagleError, check_counts
from wagle_pl.core.hub import load_tokenizer
from wagle_pl.core.needs import Needs
from wagle_pl.core.reading import read_text
from wagle_pl.core.schema import check_arguments
from wagle_pl.data.batches import (
    Draw,
    GlobalBatchSampler,
    Loader,
    ResumableLoader,
    collate,
    deal_batches,
    token_batches,
)
from wagle_pl.data.example import (
    IGNORE,
    Example,
    Row,
    parse_rows,
    raw_rows,
    warn_of_repeats,
    without_overlap,
)
from wagle_pl.data.rows import load_rows, source_of, spread
from wagle_pl.data.template import Template, check_ids

log = logging.getLogger(__name__)

#: Where rows come from: a file or a hub dataset, or the rows themselves.
Source = Union[str, Sequence[Row]]

#: Streams made from another stream's rows: name -> the stream whose rows (and draws) they use.
ALIGNED = {"refusal": "forget", "alternate": "forget"}
UNUSED = "retain_unused"  # test set of retain rows that are kept out of the retain stream
REFUSALS = Path(__file__).parent / "refusals.txt"


class ForgetRetainDataModule(L.LightningDataModule):
    """Forget and retain rows for attribution and unlearning, and named test sets.

    A training batch is a dict of streams, by default ``{"forget": {...}, "retain": {...}}``; the
    LightningModule names those it :attr:`needs`: ``forget``, ``retain``, ``all`` (both,
    for fine-tuning), ``holdout``, ``refusal`` (the forget rows of the same batch with a refusal as
    answer), and ``alternate`` (with the answer in their column ``alternate``). Each stream holds
    ``input_ids``, ``attention_mask``, ``labels`` (int64, rows × longest row), ``weight`` (float,
    rows; see :mod:`wagle_pl.data.batches`), ``row`` (int64, index in its set) and ``occurrence``.

    To use rows from another source, override :meth:`train_rows`, and :meth:`test_rows` for your own
    test sets.

    Args:
        forget: rows to forget: a .json, .jsonl, .csv, .parquet or .txt file, or a hub dataset
            ``owner/name[:config]``; in Python also a list of dicts or a ``datasets.Dataset``.
        retain: rows to keep, in the same forms.
        holdout: rows of the same kind that the model has never seen, in the same forms.
        test: test set name -> file or hub dataset; None tests on the forget and the retain rows.
            TOFU's measures use ``forget``, ``retain``, ``real_authors`` and ``world_facts``.
        val: names of test sets that ``fit`` measures during training, at the end of each epoch or
            every ``trainer.val_check_interval`` batches.
        split: split of hub datasets.
        prompt_format: text of the prompt, with ``{question}``; None uses the chat template.
        answer_format: text of the answer, with ``{answer}``; needs ``prompt_format``.
        generation_prefix: text added after the prompt for generation; needs ``prompt_format``. None
            uses the text before ``{answer}``, without trailing spaces.
        system_prompt: system message for the chat template, if a conversation has none.
        chat_template_kwargs: variables for the chat template, e.g. ``{date_string: 26 Jul 2024}``.
            The default date is ``10 Apr 2025``, as in OpenUnlearning, never today's.
        max_length: longest sequence in tokens; longer rows are truncated, with a warning.
        batch_size: pairs of rows per device and micro-batch.
        test_batch_size: rows per device in a test batch.
        limit_forget: use only this many forget rows, from the start.
        limit_retain: use only this many retain rows, from the start.
        limit_test: use only this many rows of each test set, evenly spaced.
        unused_retain: number of rows of the test set ``retain``, evenly spaced, that are removed
            from the retain set, with all their paraphrases, and form the test set
            ``retain_unused``: rows that attribution and unlearning have not seen. Do not use it to
            fine-tune the target.
        overlap: what to do if forget rows are among the retain rows; ``drop`` removes them from the
            retain rows.
        refusals: text file with one refusal per line; None uses the bundled list.
        seed: random seed of the order of rows and the choice of refusals.
        tokenizer: hub id or folder, in Python also a tokenizer; None uses the model's.
    """

    def __init__(
        self,
        forget: Optional[Source] = None,
        retain: Optional[Source] = None,
        holdout: Optional[Source] = None,
        test: Optional[dict[str, Source]] = None,
        val: Optional[list[str]] = None,
        split: Optional[str] = None,
        prompt_format: Optional[str] = None,
        answer_format: Optional[str] = None,
        generation_prefix: Optional[str] = None,
        system_prompt: Optional[str] = None,
        chat_template_kwargs: Optional[dict[str, Any]] = None,
        max_length: int = 512,
        batch_size: int = 8,
        test_batch_size: int = 32,
        limit_forget: Optional[int] = None,
        limit_retain: Optional[int] = None,
        limit_test: Optional[int] = None,
        unused_retain: Optional[int] = None,
        overlap: Literal["error", "warn", "drop"] = "warn",
        refusals: Optional[str] = None,
        seed: int = 0,
        tokenizer: Optional[Union[str, PreTrainedTokenizerBase]] = None,
    ) -> None:
        sources = {"forget": forget, "retain": retain, "holdout": holdout}
        self.sources = {name: source_of(rows, f"data.{name}") for name, rows in sources.items()}
        if isinstance(test, Mapping):
            test = {name: source_of(rows, f"data.test.{name}") for name, rows in test.items()}
        check_arguments(ForgetRetainDataModule.__init__, {**locals(), **self.sources}, "data.")
        if seed < 0:
            raise WagleError(f"must be 0 or more, got {seed}", "data.seed")
        super().__init__()
        self.limits = {"forget": limit_forget, "retain": limit_retain, "test": limit_test}
        check_counts(
            "data.",
            max_length=max_length,
            batch_size=batch_size,
            test_batch_size=test_batch_size,
            unused_retain=unused_retain,
            **{f"limit_{name}": value for name, value in self.limits.items()},
        )
        self.unused_retain = unused_retain
        self.test_sources = test
        self.val, self.split = val, split
        self.prompt_format, self.answer_format = prompt_format, answer_format
        self.generation_prefix = generation_prefix
        self.system_prompt = system_prompt
        self.chat_template_kwargs = chat_template_kwargs
        self.max_length = max_length
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.overlap, self.refusals_file = overlap, refusals
        self.seed, self.given_tokenizer = seed, tokenizer
        self._examples: dict[str, Optional[list[Example]]] = {}
        self._test_examples: dict[str, list[Example]] = {}
        self._tokens: dict[str, list[dict[str, np.ndarray]]] = {}
        self.needs = Needs()  # a LightningModule sets its own before it asks for batches

    # -- what a subclass overrides -----------------------------------------------------------------

    def train_rows(self, stream: str) -> Optional[list[Row]]:
        """Rows of ``forget``, ``retain`` or ``holdout``, None if there are none.

        One dict per row, with columns as in :data:`wagle_pl.data.example.KINDS`.
        """
        source = self.sources[stream]
        return None if source is None else self.load(source)

    def test_rows(self, name: str) -> Optional[list[Row]]:
        """Rows of a test set; None takes the training rows of that name."""
        source = (self.test_sources or {}).get(name)
        return None if source is None else self.load(source)

    def own_tests(self) -> list[str]:
        """Names of the test sets if the option ``test`` gives none."""
        return [name for name in ("forget", "retain") if self.examples(name) is not None]

    def load(self, source: Source) -> list[Row]:
        """Rows of one source, as the options name it."""
        if isinstance(source, str):
            return load_rows(source, self.split)
        return [*source]

    def describe(self, name: str, test: bool = False) -> str:
        """Where the rows of a stream or a test set come from, for messages and the model card."""
        sources = (self.test_sources or {}) if test else self.sources
        source = sources.get(name)
        if source is not None and not isinstance(source, str):
            return f"{len(source)} rows given"
        return str(source or type(self).__name__)

    def place(self, name: str, test: bool = False) -> str:
        """Name of a stream or a test set in messages."""
        called = f"test set {name}" if test else f"{name} set"
        return f"{called} ({self.describe(name, test)})"

    # -- rows --------------------------------------------------------------------------------------

    def examples(self, stream: str) -> Optional[list[Example]]:
        """Rows of a training stream, read once; None if there are none."""
        if stream not in self._examples:
            examples = self._read(stream)
            if stream == "retain" and examples is not None and self.unused_retain:
                unused = {text for row in self._retain_tests[1] for text in row.texts}
                examples = [row for row in examples if row.texts.isdisjoint(unused)]
                if not examples:
                    raise WagleError("no retain row is left", "data.unused_retain", "lower it")
            self._examples[stream] = examples
        return self._examples[stream]

    def _read(self, stream: str) -> Optional[list[Example]]:
        if stream == "all":
            return [e for part in ("forget", "retain") for e in self.examples(part) or []] or None
        rows = self.train_rows(stream)
        if rows is None:
            return None
        examples = parse_rows(rows, self.place(stream))[: self.limits.get(stream)]
        if stream == "forget":
            warn_of_repeats(examples, self.describe("forget"))
        if stream == "retain":
            return without_overlap(examples, self.examples("forget") or [], self.overlap)
        return examples

    def test_examples(self, name: str) -> list[Example]:
        """Rows of a test set, read once."""
        if name not in self._test_examples:
            if self.unused_retain and name in ("retain", UNUSED):
                examples = self._retain_tests[name == UNUSED]
            else:
                examples = self._read_test(name)
            self._test_examples[name] = spread(examples, self.limits["test"])
        return self._test_examples[name]

    def _read_test(self, name: str) -> list[Example]:
        rows = self.test_rows(name)
        if rows is not None:
            return parse_rows(rows, self.place(name, test=True))
        examples = None
        if self.test_sources is None and name in self.sources:
            uncut = name == "retain" and self.unused_retain
            examples = self._read(name) if uncut else self.examples(name)
        if examples is None:
            raise WagleError(f"test set {name!r} has no rows: give its file under data.test")
        return examples

    @cached_property
    def _retain_tests(self) -> tuple[list[Example], list[Example]]:
        """Rows that stay in the test set ``retain``, and the unused ones."""
        rows = self._read_test("retain")
        if self.unused_retain >= len(rows):
            why = f"must be below {len(rows)}, the rows of the test set retain"
            raise WagleError(why, option="data.unused_retain")
        unused = spread(list(range(len(rows))), self.unused_retain)
        apart = set(unused)
        kept = [row for i, row in enumerate(rows) if i not in apart]
        return kept, [rows[i] for i in unused]

    def test_names(self) -> list[str]:
        names = self.own_tests() if self.test_sources is None else list(self.test_sources)
        return [*names, UNUSED] if self.unused_retain and "retain" in names else names

    def val_names(self) -> list[str]:
        """Names of the test sets that are measured during training."""
        names = list(dict.fromkeys(self.val or ()))
        if unknown := [name for name in names if name not in self.test_names()]:
            known = ", ".join(self.test_names())
            raise WagleError(f"data.val: there is no test set {unknown[0]!r}; choose of {known}")
        return names

    # -- tokens ------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the option names or is, or the model's."""
        if isinstance(self.given_tokenizer, (str, Path)):
            return load_tokenizer(str(self.given_tokenizer))
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        if self.needs.tokenizer is None:
            why = "a data module without a Trainer needs a tokenizer"
            raise WagleError(f"{why}: give data.tokenizer, a hub id or a folder")
        return self.needs.tokenizer()

    @cached_property
    def template(self) -> Template:
        formats = (self.prompt_format, self.answer_format, self.max_length, self.generation_prefix)
        return Template(self.tokenizer, *formats, self.system_prompt, self.chat_template_kwargs)

    @cached_property
    def refusals(self) -> list[str]:
        path = Path(self.refusals_file or REFUSALS)
        lines = [line.strip() for line in read_text(path, "refusals file").splitlines()]
        if not any(lines):
            raise WagleError(f"refusals file {path} has no lines")
        return [line for line in lines if line]

    def tokens(self, stream: str) -> list[dict[str, np.ndarray]]:
        """``input_ids`` and ``labels`` (int32) of each row of a training stream, made once."""
        if stream not in self._tokens:
            examples = self.examples(stream)
            if examples is None:
                raise WagleError(f"this run needs {stream} rows: give --data.{stream}")
            rows = [self._encode(stream, row) for row in range(len(examples))]
            if cut := sum(len(row["input_ids"]) >= self.max_length for row in rows):
                log.warning(
                    "%d of %d %s rows reach max_length=%d tokens and are cut there",
                    *(cut, len(rows), stream, self.max_length),
                )
            self._tokens[stream] = rows
        return self._tokens[stream]

    def _encode(self, stream: str, row: int, answer: Optional[str] = None) -> dict[str, np.ndarray]:
        """Tokens of one row, with its own answer or another."""
        example = self.examples(stream)[row]
        try:
            if answer is not None and example.kind in ("text", "tokens"):
                why = "there is no question to refuse: this objective or forget loss needs rows"
                raise WagleError(f"{why} with a question and an answer")
            encoded = self.template.encode(example, answer)
            if (vocabulary := self.needs.vocabulary()) is not None:
                check_ids([*encoded["input_ids"], *encoded["labels"]], vocabulary)
        except WagleError as error:
            raise WagleError(f"{self.place(stream)} row {row + 1}: {error}") from None
        return {name: np.array(ids, dtype=np.int32) for name, ids in encoded.items()}

    def _lengths(self, stream: str) -> list[int]:
        return [len(tokens["input_ids"]) for tokens in self.tokens(stream)]

    # -- loaders -----------------------------------------------------------------------------------

    @property
    def ranks(self) -> tuple[int, int]:
        """Number of ranks that share the rows, and this rank; 1 and 0 without a Trainer."""
        trainer = self.trainer
        return (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)

    def train_dataloader(self) -> ResumableLoader:
        """Micro-batches of the streams that the module needs, for this rank."""
        if getattr(self.trainer, "overfit_batches", 0):
            why = "its batches are not the sampler's: give --data.limit_forget and"
            raise WagleError(f"{why} --data.limit_retain instead", "trainer.overfit_batches")
        sets = dict.fromkeys(ALIGNED.get(stream, stream) for stream in self.needs.streams)
        lengths = {name: self._lengths(name) for name in sets}
        first, (world_size, rank) = next(iter(sets)), self.ranks
        if world_size > len(lengths[first]):
            raise WagleError(
                f"{world_size} devices share {len(lengths[first])} {first} rows: use at most "
                f"{len(lengths[first])} devices (--trainer.devices, --trainer.num_nodes), or give "
                "more rows"
            )
        accumulate = getattr(self.trainer, "accumulate_grad_batches", 1)
        cut = (self.batch_size, accumulate, world_size, rank)
        sampler = GlobalBatchSampler(lengths, *cut, self.seed, period=self.needs.period)
        digests = {}
        for name in sets:
            rows = json.dumps(raw_rows(self.examples(name)), default=str)
            digests[name] = hashlib.sha256(rows.encode()).hexdigest()[:16]
        return ResumableLoader(sampler, partial(self.build, self.needs.streams), digests)

    def stream_loader(
        self, stream: str, batch_size: Optional[int] = None, shared: bool = False
    ) -> Loader:
        """All rows of one stream once, in batches of similar length: for passes at θ₀.

        Args:
            batch_size: rows per batch; ``test_batch_size`` when None.
            shared: only this rank's batches; all ranks get equally many.
        """
        name = ALIGNED.get(stream, stream)
        batches = token_batches(self._lengths(name), batch_size or self.test_batch_size)
        if shared:
            batches = deal_batches(batches, *self.ranks)
        draws = [Draw(0, {name: [(row, 1.0, 0) for row in rows]}) for rows in batches]
        return Loader(draws, partial(self.build, (stream,)))

    def test_dataloader(self) -> list[Loader]:
        """One loader per test set, with batches ``{"rows": row numbers}``.

        The rows of a batch have similar lengths, so that generations end at about the same time.
        """
        return [self._test_loader(name) for name in self.test_names()]

    def val_dataloader(self) -> list[Loader]:
        """The same for :meth:`val_names`."""
        names = self.val_names()
        if not names:  # which is intended
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
        return [self._test_loader(name) for name in names]

    def _test_loader(self, name: str) -> Loader:
        lengths = [
            sum(len(v) for k, v in e.row.items() if isinstance(v, str) and "paraphrased" not in k)
            for e in self.test_examples(name)
        ]
        batches = deal_batches(token_batches(lengths, self.test_batch_size), *self.ranks)
        return Loader(batches, lambda rows: {"rows": rows})

    def build(self, streams: Sequence[str], draw: Draw) -> dict[str, dict[str, torch.Tensor]]:
        """The streams of one micro-batch."""
        batch = {}
        pad_id = self.tokenizer.pad_token_id
        if pad_id is None:
            pad_id = self.tokenizer.eos_token_id or 0
        for stream in streams:
            name = ALIGNED.get(stream, stream)
            rows, weights, occurrences = zip(*draw.cells[name], strict=True)
            columns: dict[str, Sequence[Any]] = {
                "weight": weights,
                "row": rows,
                "occurrence": occurrences,
            }
            if stream in self.needs.counted and name in draw.global_rows:
                every = [self._encoded(stream, row, draw.epoch) for row in draw.global_rows[name]]
                counts = [np.count_nonzero(tokens["labels"][1:] != IGNORE) for tokens in every]
                columns["mean_tokens"] = [float(np.mean(counts))] * len(rows)
            tensors = {column: torch.tensor(values) for column, values in columns.items()}
            encoded = [self._encoded(stream, row, draw.epoch) for row in rows]
            batch[stream] = {**collate(encoded, pad_id), **tensors}
        return batch

    def _encoded(self, stream: str, row: int, epoch: int) -> dict[str, np.ndarray]:
        """Tokens of one row of a stream; of a refusal in an epoch."""
        name = ALIGNED.get(stream, stream)
        if stream == "refusal":
            epoch = 0 if stream in self.needs.repeatable else epoch
            digest = hashlib.sha256(f"{self.seed} {epoch} {row}".encode()).digest()
            number = int.from_bytes(digest[:8], "big") % len(self.refusals)
            return self._encode(name, row, self.refusals[number])
        if stream != "alternate":
            return self.tokens(name)[row]
        if not (answer := self.examples(name)[row].alternate):
            why = f"{self.place(name)} row {row + 1} has no 'alternate'"
            raise WagleError(f"{why}: this objective needs another answer there in every row")
        return self._encode(name, row, answer)
