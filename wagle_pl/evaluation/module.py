"""``EvaluationModule``: a causal language model and the test loop. The other modules extend it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional

import lightning as L
import torch
from torch import Tensor

from wagle_pl import models
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation import tofu
from wagle_pl.evaluation.likelihood import forward_answers, sequence_logprobs
from wagle_pl.evaluation.tables import read_table, write_table
from wagle_pl.strategies import is_sharded
from wagle_pl.utilities import WagleError, atomic_path

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
RESULT_FILE = "tofu_result.json"


class EvaluationModule(L.LightningModule):
    """Tests a model on every test set of the data module: likelihoods, generations, TOFU's measures.

    ``wagle test`` writes, into the results folder, one Parquet table a test set (every example with its values and
    generation), ``tofu_result.json`` (the same keys as the files published with TOFU) and ``metrics.json`` (flat, one
    number a key). A test that was interrupted continues with the first test set that is not finished.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the model.
        output: folder for the results; ``<default_root_dir>/test`` when None.
        overwrite: replace an existing output.
        retrained: result file, or folder of a test, of the model retrained without the forget set: what forget quality
            compares with.
        truth_ratio_form: ``geometric`` (TOFU's script) or ``arithmetic`` (its paper).
        generate: also generate answers and report ROUGE; False saves most of the time.
        max_new_tokens: longest generation.
    """

    #: Streams of a training batch, see :class:`wagle_pl.data.ForgetRetainDataModule`.
    streams: tuple[str, ...] = ("forget", "retain")

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        overwrite: bool = False,
        retrained: Optional[str] = None,
        truth_ratio_form: Literal["geometric", "arithmetic"] = "geometric",
        generate: bool = True,
        max_new_tokens: int = 200,
    ) -> None:
        super().__init__()
        self.model_name = model
        self.output = output
        self.overwrite = overwrite
        self.retrained = retrained
        self.truth_ratio_form = truth_ratio_form
        self.generate = generate
        self.max_new_tokens = max_new_tokens
        self.lm: Any = None
        #: The whole configuration of the run, for records; the command line fills it.
        self.run_config: dict[str, Any] = {}
        #: Numbers of the last test, as in ``metrics.json``.
        self.metrics: dict[str, float] = {}
        self._tables: dict[str, list[dict[str, Any]]] = {}

    # -- model --------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model once, in the precision of the trainer."""
        if self.lm is None:
            self.lm = models.load_model(self.model_name, sharded=is_sharded(self.trainer.strategy))
            self.model_fingerprint = self.fingerprint()

    def fingerprint(self) -> str:
        """The model's weights as one name, wherever they are; a meeting of all ranks."""
        return models.fingerprint(models.whole(self.lm.named_parameters()))

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return models.load_tokenizer(self.model_name)

    @property
    def results_folder(self) -> Path:
        """Where a test writes."""
        return Path(self.output) if self.output else Path(self.trainer.default_root_dir) / "test"

    def setup(self, stage: str) -> None:
        """Read the retrained model's result before any work is done."""
        self._retrained_result = tofu.load_result(self.retrained) if self.retrained and stage == "test" else None

    # -- test loop ----------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        """Find the test sets that an earlier, interrupted test finished."""
        fingerprint = self.fingerprint()  # a checkpoint may have replaced the weights
        data = self.trainer.datamodule
        settings = {
            "model": fingerprint,
            "template": _digest(data.template.identity()),
            "generate": self.max_new_tokens if self.generate else 0,
            "precision": str(self.trainer.precision),
        }
        self._test_names = data.test_names()
        self._keys = {n: {**settings, "rows": _digest(json.dumps(data.rows(f"test/{n}")))} for n in self._test_names}
        self._tables = {}
        for name, key in self._keys.items():
            finished = read_table(self._table_path(name), key, self.overwrite)
            if finished is not None:
                log.info("test set %s: found finished in %s", name, self.results_folder)
                self._tables[name] = finished
        self._partial: dict[str, list[dict[str, Any]]] = {n: [] for n in self._test_names if n not in self._tables}

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score every answer of a batch of rows and generate from their prompts."""
        name = self._test_names[dataloader_idx]
        if name not in self._partial:
            return
        self._partial[name] += self._examples(batch)
        if batch_idx + 1 == self.trainer.num_test_batches[dataloader_idx]:
            self._finish_set(name)

    def _examples(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One dict a row of a test batch: what a table holds."""
        sums, counts = self._score(batch["candidates"])
        nll = (-sums / counts).tolist()
        owner, kind = batch["owner"].tolist(), batch["kind"].tolist()
        by_kind: list[list[list[int]]] = [[[], [], []] for _ in batch["rows"]]
        for candidate, (position, k) in enumerate(zip(owner, kind, strict=True)):
            by_kind[position][k].append(candidate)
        answers = [_answer(row) for row in batch["examples"]]
        texts: list[Optional[str]] = self._generations(batch["prompts"]) if self.generate else [None] * len(answers)
        rouge = F.rouge(texts, answers) if self.generate else None
        examples = []
        for position, row in enumerate(batch["rows"]):
            (own,), paraphrased, perturbed = by_kind[position]
            examples.append(
                {
                    "row": row,
                    "question": _question(batch["examples"][position]),
                    "answer": answers[position],
                    "generation": texts[position],
                    "nll": nll[own],
                    "tokens": int(counts[own]),
                    "paraphrased_nll": nll[paraphrased[0] if paraphrased else own],
                    "perturbed_nll": [nll[i] for i in perturbed],
                    "rouge1_recall": rouge["rouge1_recall"][position].item() if rouge else None,
                    "rougeL_recall": rouge["rougeL_recall"][position].item() if rouge else None,
                }
            )
        return examples

    def _score(self, candidates: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed log-probability and token count of each candidate, in parts of similar length."""
        lengths = candidates["attention_mask"].sum(-1)
        sums, counts = torch.zeros(len(lengths), dtype=torch.float64), torch.zeros(len(lengths), dtype=torch.long)
        for part in lengths.argsort(stable=True).split(self.trainer.datamodule.test_batch_size):
            width = int(lengths[part].max())
            output, labels = forward_answers(self.lm, {k: v[part, :width] for k, v in candidates.items()})
            part_sums, part_counts = sequence_logprobs(output.logits, labels)
            sums[part.cpu()], counts[part.cpu()] = part_sums.double().cpu(), part_counts.cpu()
        return sums, counts

    def _generations(self, prompts: Mapping[str, Tensor]) -> list[str]:
        """Greedy continuations of left-padded prompts, as text."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
        )
        ids = self.lm.generate(**prompts, generation_config=config)
        new = ids[:, prompts["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _finish_set(self, name: str) -> None:
        """Bring all ranks' examples of one test set together and write its table."""
        examples = {example["row"]: example for example in _gather(self._partial.pop(name))}
        self._tables[name] = [examples[row] for row in sorted(examples)]
        if self.trainer.is_global_zero:
            write_table(self._table_path(name), self._tables[name], self._keys[name])

    def on_test_epoch_end(self) -> None:
        """Compute the measures from the tables and write them."""
        result = tofu.to_result({name: self._tables[name] for name in self._test_names})
        self.metrics = self._measures(result)
        self.log_dict(self.metrics, rank_zero_only=True)
        if self.trainer.is_global_zero:
            for file, content in ((RESULT_FILE, result), (METRICS_FILE, self.metrics)):
                with atomic_path(self.results_folder / file) as temporary:
                    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            log.info("test results are in %s", self.results_folder)

    def _measures(self, result: tofu.Result) -> dict[str, float]:
        form = self.truth_ratio_form
        metrics = {
            f"{name}/{measure}": value
            for name in self._test_names
            for measure, value in tofu.tofu_measures(result, name, form).items()
        }
        try:
            metrics["model_utility"] = tofu.tofu_model_utility(result, form)
        except WagleError as error:
            log.info("model utility is not reported: %s", error)
        if self._retrained_result is not None:
            metrics["forget_quality"] = tofu.tofu_forget_quality(result, self._retrained_result, form)
        return metrics

    def _table_path(self, name: str) -> Path:
        return self.results_folder / f"{name}.parquet"


def _answer(row: Mapping[str, Any]) -> str:
    if row.get("messages") is not None:
        return row["messages"][-1]["content"]
    return next((row[column] for column in ("answer", "response", "text") if row.get(column) is not None), "")


def _question(row: Mapping[str, Any]) -> str:
    if row.get("messages") is not None:
        return "\n".join(message["content"] for message in row["messages"][:-1])
    return next((row[column] for column in ("question", "prompt") if row.get(column) is not None), "")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _gather(items: list[Any]) -> list[Any]:
    """The items of all ranks, on every rank."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return items
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
