"""``ForgetRetainDataModule``: pairs the forget and the retain stream, and serves the test sets."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Optional

import lightning as L
from torch.utils.data import DataLoader

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent
from wagle_pl.data.batches import (
    DealtBatches,
    Draw,
    GlobalBatchSampler,
    QuietLoader,
    ResumableLoader,
    collate,
    deal_batches,
    token_batches,
)
from wagle_pl.data.example import Example, Row, parse_rows, raw_rows
from wagle_pl.data.rows import load_rows, readable, spread
from wagle_pl.data.template import Template, check_ids

log = logging.getLogger(__name__)

#: Streams made from other streams' rows: name -> the stream whose rows (and draws) they use.
ALIGNED = {"refusal": "forget"}


class ForgetRetainDataModule(L.LightningDataModule):
    """Forget and retain rows for attribution and unlearning, and named test sets.

    A training batch is a dict of streams, by default ``{"forget": {...}, "retain": {...}}``; the LightningModule names
    the streams it wants in its ``streams`` attribute: ``forget``, ``retain``, ``all`` (both, for fine-tuning),
    ``holdout``, and ``refusal`` (the forget rows of the same batch with a refusal as answer, another in every epoch
    unless the module names the stream in ``reference_streams``). The first stream sets the epoch's length. Each
    stream holds ``input_ids``, ``attention_mask``, ``labels`` (int64, rows × longest row), ``weight`` (float, rows; see
    :mod:`wagle_pl.data.batches`) and ``row`` (int64, index in its set).

    To bring rows of another kind, override :meth:`load_rows`.

    Args:
        forget: rows to forget: a .json, .jsonl, .csv or .parquet file, or a hub dataset ``owner/name[:config]``.
        retain: rows to keep, likewise.
        holdout: rows of the same kind that no model has seen, likewise.
        test: test set name -> file or hub dataset. The names ``forget``, ``retain``, ``real_authors`` and
            ``world_facts`` have a meaning for the TOFU measures. None tests on the forget and the retain rows.
        val: names of test sets that ``fit`` measures along the way, at each epoch's end or as
            ``trainer.val_check_interval`` says; none when null.
        split: split of hub datasets.
        prompt_format: text of the prompt, with ``{question}``; None takes the tokenizer's chat template.
        answer_format: text of the answer, with ``{answer}``; goes with ``prompt_format``.
        generation_prefix: text after the prompt when generating, byte for byte; None takes what stands before
            ``{answer}`` in ``answer_format``, without spaces at its end. Goes with ``prompt_format``.
        system_prompt: content of a system message for the chat template, before every conversation that has none of
            its own; None leaves it to the template.
        chat_template_kwargs: variables for the chat template, e.g. ``{date_string: 26 Jul 2024}``. No template sees
            today's date: ``date_string`` is ``10 Apr 2025``, as in OpenUnlearning, unless given here.
        max_length: longest sequence in tokens; longer rows are cut, with a warning that counts them.
        batch_size: pairs per device and step.
        test_batch_size: rows per device in a test batch.
        limit_forget: use only the first so many forget rows.
        limit_retain: use only the first so many retain rows.
        limit_test: use only so many rows of each test set, evenly spaced: benchmarks list an author's rows together.
        overlap: what to do when forget rows are among the retain rows: ``error``, ``warn`` or ``drop`` them there.
        refusals: text file with one refusal a line, for preference objectives; None takes the bundled list.
        seed: of the order of rows and the choice of refusals.
        cache: keep tokenised rows on disk (in the ``datasets`` cache) for the next run.
        tokenizer: hub id or folder; None takes the model's.
    """

    def __init__(
        self,
        forget: Optional[str] = None,
        retain: Optional[str] = None,
        holdout: Optional[str] = None,
        test: Optional[dict[str, str]] = None,
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
        overlap: Literal["error", "warn", "drop"] = "warn",
        refusals: Optional[str] = None,
        seed: int = 0,
        cache: bool = True,
        tokenizer: Optional[str] = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or test_batch_size < 1:
            raise WagleError(
                f"data.batch_size and data.test_batch_size must be at least 1, got {batch_size} and "
                f"{test_batch_size}"
            )
        limits = {
            "limit_forget": limit_forget,
            "limit_retain": limit_retain,
            "limit_test": limit_test,
        }
        for option, value in limits.items():
            if value is not None and value < 1:
                raise WagleError(
                    f"data.{option} must be at least 1, got {value}; null uses all rows"
                )
        self.sources = {"forget": forget, "retain": retain, "holdout": holdout}
        self.test_sources = test
        self.val = val
        self.split = split
        self.prompt_format = prompt_format
        self.answer_format = answer_format
        self.generation_prefix = generation_prefix
        self.system_prompt = system_prompt
        self.chat_template_kwargs = chat_template_kwargs
        self.max_length = max_length
        self.batch_size = batch_size
        self.test_batch_size = test_batch_size
        self.limits = {"forget": limit_forget, "retain": limit_retain}
        self.limit_test = limit_test
        self.overlap = overlap
        self.refusals_file = refusals
        self.seed = seed
        self.cache = cache
        self.tokenizer_name = tokenizer
        self._rows: dict[str, Optional[list[Example]]] = {}
        self._tokens: dict[str, Any] = {}

    # -- what a subclass overrides ------------------------------------------------------------------------------------

    def load_rows(self, name: str) -> Optional[list[Row]]:
        """Rows of one set; override to read another kind of source.

        Args:
            name: ``forget``, ``retain``, ``holdout``, or ``test/<name>`` for a test set.

        Returns:
            One dict a row, with columns as in :data:`wagle_pl.data.example.KINDS`; a test row may add
            ``paraphrased_answer`` and ``perturbed_answer`` (a list). None if there is no such set.
        """
        kind, _, test_name = name.partition("/")
        source = (self.test_sources or {}).get(test_name) if kind == "test" else self.sources[name]
        return None if source is None else load_rows(source, self.split)

    def test_names(self) -> list[str]:
        """Names of the test sets."""
        if self.test_sources is not None:
            return list(self.test_sources)
        return [name for name in ("forget", "retain") if self.rows(name) is not None]

    def val_names(self) -> list[str]:
        """Names of the test sets that are measured along the way.

        Raises:
            WagleError: if one is no test set.
        """
        names = list(dict.fromkeys(self.val or ()))
        known = self.test_names() if names else []
        for name in names:
            if name not in known:
                raise WagleError(
                    f"data.val: there is no test set {name!r}; choose of {', '.join(known)}"
                )
        return names

    # -- rows and tokens ----------------------------------------------------------------------------------------------

    def rows(self, name: str) -> Optional[list[Example]]:
        """The rows of one set, loaded once; ``all`` is forget and retain rows together."""
        if name not in self._rows:
            if name == "all":
                rows = [
                    row for part in ("forget", "retain") for row in self.rows(part) or []
                ] or None
            else:
                rows = self._load(name)
            self._rows[name] = rows
        return self._rows[name]

    def _load(self, name: str) -> Optional[list[Example]]:
        rows = self.load_rows(name)
        if rows is None:
            own = (
                name.removeprefix("test/")
                if name.startswith("test/") and self.test_sources is None
                else None
            )
            trained = self.rows(own) if own else None
            return None if trained is None else spread(trained, self.limit_test)
        rows = parse_rows(rows, where=f"{name} set ({self.describe(name)})")
        rows = (
            spread(rows, self.limit_test)
            if name.startswith("test/")
            else rows[: self.limits.get(name)]
        )
        if name == "forget":
            self._warn_of_repeats(rows)
        return self._without_overlap(rows) if name == "retain" else rows

    def describe(self, name: str) -> str:
        """Where the rows of a set come from, for messages and the model card."""
        source = (
            (self.test_sources or {}).get(name[5:])
            if name.startswith("test/")
            else self.sources.get(name)
        )
        return str(source or type(self).__name__)

    def _warn_of_repeats(self, forget: list[Example]) -> None:
        """Say how many forget rows are there twice, as they are attributed and forgotten twice."""
        first: dict[str, int] = {}
        repeats = [
            number
            for number, row in enumerate(forget, 1)
            if first.setdefault(row.key, number) != number
        ]
        if repeats:
            shown = ", ".join(map(str, repeats[:5])) + (", ..." if len(repeats) > 5 else "")
            log.warning(
                "%d of %d forget rows repeat earlier ones and weigh as much again: remove them, unless that is meant "
                "(%s, row %s)",
                len(repeats),
                len(forget),
                self.describe("forget"),
                shown,
            )

    def _without_overlap(self, retain: list[Example]) -> list[Example]:
        forget = {row.key for row in self.rows("forget") or []}
        kept = [row for row in retain if row.key not in forget]
        shared = len(retain) - len(kept)
        if not shared:
            return retain
        message = f"{shared} of {len(retain)} retain rows are also forget rows"
        if self.overlap == "error":
            raise WagleError(f"{message}; remove them or pass --data.overlap drop")
        if self.overlap == "warn":
            log.warning(
                "%s: the objective pulls them both ways (--data.overlap drop removes them)", message
            )
            return retain
        log.info("%s: dropped from the retain set", message)
        if not kept:
            raise WagleError(f"{message}: nothing is left to retain")
        return kept

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer named, or the model's.

        Raises:
            WagleError: if none is named and no Trainer knows a model.
        """
        if self.tokenizer_name is None:
            if self.trainer is None:
                raise WagleError(
                    "a data module without a Trainer needs a tokenizer: give data.tokenizer, a hub id or "
                    "a folder"
                )
            return self._module.tokenizer
        from wagle_pl.lm.models import load_tokenizer

        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def template(self) -> Template:
        """Turns rows into tokens."""
        return Template(
            self.tokenizer,
            self.prompt_format,
            self.answer_format,
            self.max_length,
            self.generation_prefix,
            self.system_prompt,
            self.chat_template_kwargs,
        )

    @cached_property
    def refusals(self) -> list[str]:
        """The refusal answers.

        Raises:
            WagleError: if the file is missing, has no lines or is not in UTF-8.
        """
        if self.refusals_file is None:
            text = (
                resources.files("wagle_pl.data")
                .joinpath("refusals.txt")
                .read_text(encoding="utf-8")
            )
        elif not Path(self.refusals_file).is_file():
            raise absent("refusals file", self.refusals_file)
        else:
            with readable(Path(self.refusals_file)):
                text = Path(self.refusals_file).read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise WagleError(f"refusals file {self.refusals_file} has no lines")
        return lines

    def tokens(self, name: str) -> Any:
        """Tokenised rows of a set: a ``datasets.Dataset`` with ``input_ids`` and ``labels``; made once and cached.

        Raises:
            WagleError: if there is no such set, or a row loses its whole answer to ``max_length``.
        """
        if name not in self._tokens:
            rows = self.rows(name)
            if rows is None:
                raise WagleError(f"this run needs {name} rows: give --data.{name}")
            self._tokens[name] = self._tokenise(name, rows)
        return self._tokens[name]

    def _tokenise(self, name: str, rows: list[Example]) -> Any:
        import datasets

        key = hashlib.sha256(
            (self.template.identity() + json.dumps(raw_rows(rows), default=str)).encode()
        ).hexdigest()
        cache_file = Path(datasets.config.HF_DATASETS_CACHE) / "wagle_pl" / f"{key}.arrow"

        def encode(index: int) -> dict[str, Any]:
            try:
                encoded = self.template.encode(rows[index])
            except WagleError as error:
                raise WagleError(
                    f"{name} set ({self.describe(name)}) row {index + 1}: {error}"
                ) from None
            return {**encoded, "length": len(encoded["input_ids"])}

        if self.cache and len(rows) > 1000:  # below, tokenising is faster than looking the cache up
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            indices = datasets.Dataset.from_dict({"index": range(len(rows))})
            tokens = indices.map(
                lambda row: encode(row["index"]),
                cache_file_name=str(cache_file),
                new_fingerprint=key[:32],
                remove_columns="index",
                desc=f"tokenise {name}",
            )
        else:
            tokens = datasets.Dataset.from_list([encode(index) for index in range(len(rows))])
        self._check_ids(name, tokens)
        cut = sum(length >= self.max_length for length in tokens["length"])
        if cut:
            log.warning(
                "%d of %d %s rows reach max_length=%d tokens and are cut there",
                cut,
                len(rows),
                name,
                self.max_length,
            )
        return tokens

    def _check_ids(self, name: str, tokens: Any) -> None:
        """Refuse tokens that the model does not know, where there is a model."""
        import pyarrow.compute

        known = getattr(self._module, "vocabulary", None)
        columns = [tokens.data.column(column) for column in ("input_ids", "labels")]
        if known is None or all(
            pyarrow.compute.max(pyarrow.compute.list_flatten(column)).as_py() < known
            for column in columns
        ):
            return
        for row, (ids, labels) in enumerate(
            zip(tokens["input_ids"], tokens["labels"], strict=True), 1
        ):
            try:
                check_ids([*ids, *labels], known)
            except WagleError as error:
                raise WagleError(f"{name} set ({self.describe(name)}) row {row}: {error}") from None

    # -- loaders ------------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> tuple[int, int]:
        """Number of ranks that share the rows, and which this one is: 1 and 0 without a Trainer."""
        return (
            (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        )

    @property
    def _module(self) -> Any:
        """The module that is trained; None without a Trainer."""
        return getattr(self.trainer, "lightning_module", None)

    def train_dataloader(self) -> ResumableLoader:
        """Micro-batches of the streams that the LightningModule names, for this rank.

        Without a Trainer, to look at batches: of forget and retain rows, all of them.

        Raises:
            WagleError: if there are more ranks than rows, or the trainer wants other batches.
        """
        if getattr(self.trainer, "overfit_batches", 0):
            raise WagleError(
                "trainer.overfit_batches would draw batches of its own: give --data.limit_forget and "
                "--data.limit_retain instead"
            )
        streams = getattr(self._module, "streams", ("forget", "retain"))
        sets = dict.fromkeys(ALIGNED.get(stream, stream) for stream in streams)
        rows = len(self.tokens(next(iter(sets))))
        ranks, rank = self.ranks
        if ranks > rows:
            raise WagleError(
                f"{ranks} devices share {rows} {next(iter(sets))} rows: use at most {rows} devices "
                "(--trainer.devices, --trainer.num_nodes), or give more rows"
            )
        sampler = GlobalBatchSampler(
            {name: list(self.tokens(name)["length"]) for name in sets},
            self.batch_size,
            getattr(self.trainer, "accumulate_grad_batches", 1),
            ranks,
            rank,
            self.seed,
        )
        return ResumableLoader(
            _Batches(self, streams), sampler, {name: self._digest(name) for name in sets}
        )

    def _digest(self, name: str) -> str:
        """The rows of a set as one name, in their order."""
        return hashlib.sha256(
            json.dumps(raw_rows(self.rows(name)), default=str).encode()
        ).hexdigest()[:16]

    def stream_loader(
        self, stream: str, batch_size: Optional[int] = None, shared: bool = False
    ) -> DataLoader:
        """All rows of one stream once, in batches of similar length, each with its ``row``: for passes at θ₀.

        Args:
            stream: a stream.
            batch_size: rows a batch; ``test_batch_size`` when None.
            shared: this rank's batches only, as many as any other rank's.
        """
        lengths = list(self.tokens(ALIGNED.get(stream, stream))["length"])
        batches = token_batches(lengths, batch_size or self.test_batch_size)
        if shared:
            batches = deal_batches(batches, *self.ranks)
        draws = [
            Draw(0, {ALIGNED.get(stream, stream): [(row, 1.0, 0) for row in rows]})
            for rows in batches
        ]
        return QuietLoader(_Batches(self, (stream,)), draws)

    def test_dataloader(self) -> list[DataLoader]:
        """One loader a test set, in the order of :meth:`test_names`; see :class:`TestBatches`."""
        return [TestBatches(self, name).loader() for name in self.test_names()]

    def val_dataloader(self) -> list[DataLoader]:
        """Likewise of :meth:`val_names`."""
        names = self.val_names()
        if not names:  # which is meant
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
        return [TestBatches(self, name).loader() for name in names]

    def build(self, stream: str, draw: Draw) -> dict[str, Any]:
        """One stream of one micro-batch."""
        import torch

        name = ALIGNED.get(stream, stream)
        cell = draw.cells[name]
        if stream == "refusal":
            fixed = "refusal" in getattr(self._module, "reference_streams", ())
            encoded = [self._refused(row, 0 if fixed else draw.epoch) for row, _, _ in cell]
        else:
            encoded = [self.tokens(name)[row] for row, _, _ in cell]
        batch = collate(encoded, self.pad_id)
        batch["weight"] = torch.tensor([weight for _, weight, _ in cell])
        batch["row"] = torch.tensor([row for row, _, _ in cell])
        batch["occurrence"] = torch.tensor([occurrence for _, _, occurrence in cell])
        return batch

    @property
    def pad_id(self) -> int:
        """Token that fills short rows (masked out everywhere)."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id or 0

    def _refused(self, row: int, epoch: int) -> dict[str, list[int]]:
        question = self.rows("forget")[row]
        if question.kind in ("text", "tokens"):
            raise WagleError(
                f"forget set ({self.describe('forget')}) row {row + 1} has no question to refuse: this "
                "objective or forget loss needs rows with a question and an answer"
            )
        digest = hashlib.sha256(f"{self.seed} {epoch} {row}".encode()).digest()
        refusal = self.refusals[int.from_bytes(digest[:8], "big") % len(self.refusals)]
        return self.template.encode(question, refusal)


class _Batches:
    """Map-style dataset whose keys are :class:`Draw`."""

    def __init__(self, data: ForgetRetainDataModule, streams: Sequence[str]) -> None:
        self.data = data
        self.streams = tuple(streams)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return {stream: self.data.build(stream, draw) for stream in self.streams}


class TestBatches:
    """Batches of one test set, rows of similar length together, so that generations end at about the same time.

    Each batch is a dict with ``rows``, the numbers of its rows in the set.
    """

    __test__ = False  # not a pytest class, whatever its name

    def __init__(self, data: ForgetRetainDataModule, name: str) -> None:
        self.data = data
        self.rows = data.rows(f"test/{name}")
        if self.rows is None:
            raise WagleError(f"test set {name!r} has no rows: give its file under data.test")

    def loader(self) -> DataLoader:
        """Batches for this rank, as many as for any other: a few may be another rank's too."""
        lengths = [len(row.question) + len(row.answer) for row in self.rows]
        batches = token_batches(lengths, self.data.test_batch_size)
        return QuietLoader(self, DealtBatches(deal_batches(batches, *self.data.ranks)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Any]:
        return {"rows": list(rows)}
