"""Models that read generations: a toxicity classifier, and sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent, plainly_local
from wagle_pl.data.example import Example
from wagle_pl.evaluation.tofu_result import Table
from wagle_pl.lm.models import loading

LONGEST = 512  # tokens of a text that a classifier reads, as SOUL's evaluation cuts them
#: Labels that mean not toxic, and how such labels begin.
HARMLESS = ("neutral", "clean", "safe", "normal", "label_0", "not", "none")
HARMLESS_PREFIXES = ("non_", "not_", "no_", "nontoxic", "nothate")


def toxic_labels(labels: Sequence[str]) -> list[str]:
    """The labels of a classifier that mean toxic; a single label does.

    >>> toxic_labels(["neutral", "toxic"]), toxic_labels(["LABEL_0", "LABEL_1"])
    (['toxic'], ['LABEL_1'])
    """
    if len(labels) == 1:
        return list(labels)
    names = {label: label.lower().replace("-", "_").replace(" ", "_") for label in labels}
    return [
        label
        for label, name in names.items()
        if name not in HARMLESS and not name.startswith(HARMLESS_PREFIXES)
    ]


class TextClassifier:
    """A text classifier from the hub, with sigmoids if its labels do not exclude each other. It
    reads ``longest`` tokens of a text; errors name the ``option`` that asks for it."""

    column: str  # the column of a record that it writes
    reads_empty = False  # whether an empty generation is given to it
    of_forget_rows = False  # whether it only reads the answers to rows to be forgotten

    def __init__(
        self, name: str, device: Optional[torch.device], option: str, longest: int = LONGEST
    ) -> None:
        from transformers import (
            AutoModelForSequenceClassification,
            AutoTokenizer,
            TextClassificationPipeline,
        )

        check_folder(name, option)
        with loading(f"{option} {name!r}", name):
            model = AutoModelForSequenceClassification.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
        config = model.config
        self.labels = [config.id2label[i] for i in range(config.num_labels)]
        several = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        reads: dict[str, Any] = {"truncation": True, "top_k": None}
        reads["max_length"] = min(longest, getattr(config, "max_position_embeddings", longest))
        reads["function_to_apply"] = "sigmoid" if several else "softmax"
        self.classify = TextClassificationPipeline(
            model=model, tokenizer=tokenizer, device=device, **reads
        )

    def probabilities(
        self, texts: Sequence[str], labels: Sequence[str], batch_size: int = 32
    ) -> list[float]:
        read = self.classify(list(texts), batch_size=batch_size) if texts else []
        return [max(x["score"] for x in scores if x["label"] in labels) for scores in read]

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return self.probabilities(texts, self.labels[:1])

    def annotate(self, table: Table, rows: Sequence[Example]) -> None:
        """Add the column to the records whose generation is not empty, or to all."""
        texts = ((record, record.get("generation")) for record in table)
        records = [r for r, text in texts if text or (self.reads_empty and text is not None)]
        values = self([record["generation"] for record in records])
        for record, value in zip(records, values, strict=True):
            record[self.column] = value


class ToxicityClassifier(TextClassifier):
    """Toxicity of texts in [0, 1]: the largest probability of a toxic label.

    For a classifier whose labels are all toxic, such as ``unitary/toxic-bert``, this is the score
    of the top label, which SOUL's and WAGLE's evaluation takes.
    """

    column = "toxicity"

    def __init__(
        self,
        name: str,
        device: Optional[torch.device] = None,
        option: str = "model.toxicity_classifier",
    ) -> None:
        super().__init__(name, device, option)
        self.toxic = toxic_labels(self.labels)
        if not self.toxic:
            why = f"{option}: {name!r} has no toxic label among {', '.join(self.labels)}"
            raise WagleError(why)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return self.probabilities(texts, self.toxic)


class GibberishClassifier(TextClassifier):
    """Probability of the first label, clean text of ``madhurjindal/autonlp-Gibberish-Detector-
    492513457``, as OpenUnlearning takes it."""

    column = "not_gibberish"
    reads_empty = True
    of_forget_rows = True


class SentenceModel:
    """Sentence embeddings by ``sentence-transformers`` (an extra).

    Args:
        name: folder or hub id; WAGLE takes ``paraphrase-MiniLM-L6-v2``.
        option: name of the option that asks for it, for errors.
    """

    of_forget_rows = False

    def __init__(self, name: str, option: str = "model.sentence_model") -> None:
        check_folder(name, option)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            why = f"{option}: it needs sentence-transformers: pip install 'wagle-pl[embeddings]'"
            raise WagleError(why) from None
        with loading(f"{option} {name!r}", name):
            self.model: Any = SentenceTransformer(name)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, D) embeddings of N texts."""
        return torch.as_tensor(self.model.encode(list(texts), convert_to_tensor=True)).float().cpu()

    def annotate(self, table: Table, rows: Sequence[Example]) -> None:
        """Add ``nearest_answer``: whether the right one is nearest by cosine, or ties (WAGLE)."""
        for record in table:
            row = rows[record["row"]]
            texts = {p: record.get(f"{p}generation") for p in ("", "paraphrased_question_")}
            texts = {prefix: text for prefix, text in texts.items() if text is not None}
            if texts and row.perturbed_answers:
                options = [row.paraphrased_answer or record["answer"], *row.perturbed_answers]
                embeddings = self([*texts.values(), *options])
                generated, others = embeddings.tensor_split([len(texts)])
                similarity = cosine_similarity(generated[:, None], others[None], dim=-1)
                nearest = similarity[:, 0] >= similarity.max(-1).values
                for prefix, right in zip(texts, nearest.tolist(), strict=True):
                    record[f"{prefix}nearest_answer"] = float(right)


def readers(options: Any, device: torch.device, prefix: str, benchmark: Optional[str]) -> list[Any]:
    """The models that some options of a test name, loaded, in the order in which they read."""
    models: list[Any] = []
    if name := options.toxicity_classifier:
        models.append(ToxicityClassifier(name, device, f"{prefix}toxicity_classifier"))
    if name := options.gibberish_classifier:
        longest = 32 if benchmark == "TOFU" else LONGEST  # as OpenUnlearning cuts them
        option = f"{prefix}gibberish_classifier"
        models.append(GibberishClassifier(name, device, option, longest))
    if name := options.sentence_model:
        models.append(SentenceModel(name, f"{prefix}sentence_model"))
    return models


def check_folder(name: str, option: str) -> None:
    """Refuse a name that can only be a local folder, but is not one."""
    if plainly_local(name) and not Path(name).is_dir():
        raise absent(f"{option}: folder", name, hub=True)
