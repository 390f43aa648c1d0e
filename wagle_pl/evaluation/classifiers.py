"""Models that read generations: a toxicity classifier, and sentence embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent, plainly_local
from wagle_pl.data.example import Example
from wagle_pl.evaluation.results import Table
from wagle_pl.lm.models import loading

LONGEST = 512  # tokens of a text that a classifier reads, as SOUL's evaluation cuts them
HARMLESS = ("neutral", "clean", "safe", "normal", "label_0", "not", "none")
HARMLESS_PREFIXES = ("non_", "not_", "no_", "nontoxic", "nothate")


def toxic_labels(labels: Sequence[str]) -> list[str]:
    """Those of a classifier's labels that say toxic; its only label does.

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


class ToxicityClassifier:
    """Toxicity of texts in [0, 1]: the largest probability of a toxic label.

    For a classifier whose labels are all toxic, such as ``unitary/toxic-bert``, this is the score
    of the top label, which SOUL's and WAGLE's evaluation takes.

    Args:
        name: folder or hub id of a text classifier.
        device: where it runs.
        option: name of the option that asks for it, for errors.

    Raises:
        WagleError: if there is no such classifier, or none of its labels is toxic.
    """

    def __init__(
        self,
        name: str,
        device: Optional[torch.device] = None,
        option: str = "model.toxicity_classifier",
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
        labels = [config.id2label[i] for i in range(config.num_labels)]
        self.toxic = toxic_labels(labels)
        if not self.toxic:
            raise WagleError(f"{option} {name!r} has no toxic label among {', '.join(labels)}")
        several = len(labels) == 1 or config.problem_type == "multi_label_classification"
        self.classify = TextClassificationPipeline(
            model=model,
            tokenizer=tokenizer,
            device=device,
            top_k=None,
            function_to_apply="sigmoid" if several else "softmax",
            truncation=True,
            max_length=min(LONGEST, getattr(config, "max_position_embeddings", LONGEST)),
        )

    def __call__(self, texts: Sequence[str], batch_size: int = 32) -> list[float]:
        """Toxicity of each text, cut at 512 tokens."""
        found = self.classify(list(texts), batch_size=batch_size) if texts else []
        return [max(x["score"] for x in text if x["label"] in self.toxic) for text in found]


class SentenceModel:
    """Sentence embeddings by ``sentence-transformers`` (an extra).

    Args:
        name: folder or hub id; WAGLE takes ``paraphrase-MiniLM-L6-v2``.
        option: name of the option that asks for it, for errors.

    Raises:
        WagleError: if the library is not installed, or there is no such model.
    """

    def __init__(self, name: str, option: str = "model.sentence_model") -> None:
        check_folder(name, option)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise WagleError(
                f"{option} needs sentence-transformers: pip install 'wagle-pl[embeddings]'"
            ) from None
        with loading(f"{option} {name!r}", name):
            self.model: Any = SentenceTransformer(name)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, D) embeddings of N texts."""
        return torch.as_tensor(self.model.encode(list(texts), convert_to_tensor=True)).float().cpu()


def nearest_answer(generation: Tensor, options: Tensor) -> bool:
    """Whether a (D,) generation is nearest to the first of (K, D) options by cosine, or ties: with
    the right answer's first this is WAGLE's accuracy."""
    similarity = torch.nn.functional.cosine_similarity(generation[None], options)
    return bool(similarity[0] >= similarity.max())


def add_toxicity(table: Table, classify: Callable[[Sequence[str]], Sequence[float]]) -> None:
    """Add the toxicity of every generation that is not empty to the records."""
    spoken = [record for record in table if record.get("generation")]
    values = classify([record["generation"] for record in spoken])
    for record, value in zip(spoken, values, strict=True):
        record["toxicity"] = value


def add_nearest(
    table: Table, rows: Sequence[Example], embed: Callable[[Sequence[str]], Tensor]
) -> None:
    """Add to the records of rows with perturbed answers whether a generation is nearest to the
    right one."""
    for record in table:
        row = rows[record["row"]]
        said = {
            name: record[f"{name}generation"]
            for name in ("", "paraphrased_question_")
            if record.get(f"{name}generation") is not None
        }
        if said and row.perturbed_answers:
            options = [row.paraphrased_answer or record["answer"], *row.perturbed_answers]
            vectors = embed([*said.values(), *options])
            for name, vector in zip(said, vectors, strict=False):
                nearest = nearest_answer(vector, vectors[len(said) :])
                record[f"{name}nearest_answer"] = float(nearest)


def check_folder(name: str, option: str) -> None:
    """Refuse a name that can only be a local folder and is none."""
    if plainly_local(name) and not Path(name).is_dir():
        raise absent(f"{option}: folder", name, hub=True)
