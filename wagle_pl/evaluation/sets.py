"""Measures of one test set, from the records of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

import torch
from torch import Tensor

from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined

Table = list[dict[str, Any]]
Value = Union[float, Undefined]


def defined_only(values: Mapping[str, Value]) -> dict[str, float]:
    """The measures that have a number."""
    return {
        name: float(value) for name, value in values.items() if not isinstance(value, Undefined)
    }


MEMORISATION = ("exact_memorization", "extraction_strength")
QUESTION = ("probability", "rougeL_recall", "rougeL_f1", "truth_ratio", *MEMORISATION)
GENERATED = ("repetition", "fluency", "degenerate")
CORPUS = ("perplexity", "word_perplexity")


class SetMeasures:
    """The measures of one test set; each raises :class:`Undefined` if the records do not allow it.

    Args:
        table: records of its rows.
        forget: whether they are to be forgotten.
        form: of the truth ratio.
    """

    def __init__(
        self, table: Table, forget: bool = False, form: F.TruthRatioForm = "geometric"
    ) -> None:
        self.table = table
        self.forget = forget
        self.form = form

    def usual(self) -> tuple[str, ...]:
        """Measures that the kind of rows, and what was observed of them, allow."""

        def has(name: str) -> bool:
            return any(record.get(name) is not None for record in self.table)

        generated = GENERATED if has("generation") else ()
        toxicity = ("toxicity", "toxic_rate") if has("toxicity") else ()
        if has("choice_logprobs") or has("choice_nll"):
            return ("accuracy",) * has("choice_logprobs") + ("accuracy_norm",) * has("choice_nll")
        if not has("nll"):
            return (*toxicity, *generated)
        if not any(record["question"] for record in self.table):
            return (*CORPUS, *(MEMORISATION if self.forget else ()))
        unasked = set() if has("generation") else {"rougeL_recall", "rougeL_f1"}
        unasked |= (
            set() if any(record.get("perturbed_nll") for record in self.table) else {"truth_ratio"}
        )
        accuracy = ("accuracy",) if "truth_ratio" not in unasked else ()
        return (
            *(name for name in QUESTION if name not in unasked),
            *accuracy,
            *toxicity,
            *generated,
        )

    # -- columns ------------------------------------------------------------------------------------------------------

    def column(self, name: str, what: str) -> list[Any]:
        """A column of the table.

        Args:
            name: of the column.
            what: its values in words.

        Raises:
            Undefined: if rows lack it, with their number.
        """
        if not self.table:
            raise Undefined("the test set has no rows")
        missing = sum(record.get(name) is None for record in self.table)
        if missing == len(self.table):
            raise Undefined(f"its rows have no {what}")
        if missing:
            raise Undefined(f"{missing} of {len(self.table)} rows have no {what}")
        return [record[name] for record in self.table]

    def numbers(self, name: str, what: str) -> Tensor:
        """A column of numbers, float64 (N,)."""
        return torch.tensor(self.column(name, what), dtype=torch.float64)

    def nll(self) -> Tensor:
        """(N,) mean negative log-likelihood per token of the answers."""
        return self.numbers("nll", "answer to score")

    def perturbed(self, name: str = "perturbed_nll") -> Tensor:
        """(N, K) those of the perturbed answers; NaN where a row has fewer than K."""
        values = self.column(name, "perturbed answers (column perturbed_answer)")
        missing = sum(not row for row in values)
        if missing:
            raise Undefined(
                f"{missing} of {len(values)} rows have no perturbed answers (column perturbed_answer)"
            )
        return ragged(values)

    def generations(self) -> list[str]:
        """(N,) texts."""
        return self.column(
            "generation",
            "generation (--model.generate is false, or such rows are not generated from)",
        )

    def texts(self) -> list[str]:
        """Generations that are not empty."""
        texts = [text for text in self.generations() if text]
        if not texts:
            raise Undefined(f"all {len(self.table)} generations are empty")
        return texts

    def texts_scored(self) -> list[str]:
        """(N,) the texts whose likelihood is known: answers, continuations, texts."""
        texts = self.column("answer", "text")
        missing = sum(not text for text in texts)
        if missing:
            raise Undefined(
                f"{missing} of {len(texts)} rows are tokens (input_ids and labels) whose text is not known"
            )
        return texts

    def ratios(self) -> Tensor:
        """(N,) truth ratios."""
        return F.truth_ratio(
            self.numbers("paraphrased_nll", "paraphrased answer"), self.perturbed(), self.form
        )

    # -- likelihood ---------------------------------------------------------------------------------------------------

    def probability(self) -> float:
        """Mean length-normalised probability of the answers."""
        return F.mean(F.answer_probability(self.nll()), "answers")

    def option_probability(self) -> float:
        """Mean probability of the answers among the perturbed ones."""
        return F.mean(F.option_probability(self.nll(), self.perturbed()), "answers")

    def truth_ratio(self) -> float:
        """Mean truth ratio as a score."""
        direction: Literal["closer_to_1", "true_better"] = (
            "closer_to_1" if self.forget else "true_better"
        )
        return F.mean(F.truth_ratio_score(self.ratios(), direction), "truth ratios")

    def truth_probability(self) -> float:
        """Mean probability of the paraphrase against the perturbed answers."""
        return F.mean(F.truth_ratio_score(self.ratios(), "prob_mean"), "truth ratios")

    def exact_memorization(self) -> float:
        """Mean exact memorisation."""
        return mean_defined(F.exact_memorization, self.column("greedy", "greedy flags"))

    def extraction_strength(self) -> float:
        """Mean extraction strength."""
        return mean_defined(F.extraction_strength, self.column("greedy", "greedy flags"))

    def perplexity(self) -> float:
        """Perplexity per token."""
        counts = self.numbers("tokens", "tokens")
        return F.perplexity(self.nll() * counts, counts).item()

    def word_perplexity(self) -> float:
        """Perplexity per word; words are separated by white space.

        Of the text as it stands, chunk by chunk. That is not lm-evaluation-harness's number on WikiText: it scores
        pages detokenised, each window but the first after the token before it, and counts the words of the raw page.
        """
        cut = sum(map(bool, self.column("cut", "note of whether they are whole")))
        if cut:
            raise Undefined(
                f"{cut} of {len(self.table)} texts are cut at max_length: their words cannot be counted"
            )
        words = torch.tensor([len(text.split()) for text in self.texts_scored()])
        return F.perplexity(self.nll() * self.numbers("tokens", "tokens"), words).item()

    def accuracy(self) -> float:
        """Share of rows whose right choice, or right answer among the perturbed ones, is the likeliest.

        The right answer is the paraphrased one: the perturbed answers are worded like it (WAGLE's forget accuracy).
        """
        if any(record.get("choice_logprobs") is not None for record in self.table):
            labels = torch.tensor(self.column("label", "label"))
            return F.mean(
                F.choice_accuracy(ragged(self.column("choice_logprobs", "choices")), labels),
                "choices",
            )
        right = self.numbers("paraphrased_nll", "paraphrased answer")
        return F.mean(F.nearest_option(right, self.perturbed()), "answers")

    def accuracy_norm(self) -> float:
        """Share of rows whose right choice has the largest likelihood per token."""
        labels = torch.tensor(self.column("label", "label"))
        return F.mean(
            F.choice_accuracy(-ragged(self.column("choice_nll", "choices")), labels), "choices"
        )

    # -- generations --------------------------------------------------------------------------------------------------

    def rougeL_recall(self) -> float:
        """Mean ROUGE-L recall, with stemming."""
        return F.mean(self._rouge("rougeL_recall"), "generations")

    def rouge1_recall(self) -> float:
        """Mean ROUGE-1 recall, with stemming."""
        return F.mean(self._rouge("rouge1_recall"), "generations")

    def rougeL_f1(self) -> float:
        """Mean ROUGE-L F1, with stemming."""
        values = F.rouge(self.generations(), self.column("answer", "answer"))
        return F.mean(values["rougeL_f1"], "generations")

    def _rouge(self, name: str) -> Tensor:
        self.generations()
        return self.numbers(name, "answer to compare with")

    def bleu(self) -> float:
        """Mean sentence BLEU, 0 to 100."""
        return F.mean(F.bleu(self.generations(), self.column("answer", "answer")), "generations")

    def contains_answer(self) -> float:
        """Share of generations that contain the answer."""
        return F.mean(
            F.contains_answer(self.generations(), self.column("answer", "answer")), "generations"
        )

    def nearest_answer(self) -> float:
        """Share of generations that are nearest to the right answer by sentence embedding."""
        return F.mean(
            self.numbers("nearest_answer", "sentence embeddings (--model.sentence_model)"),
            "generations",
        )

    def toxicity(self) -> float:
        """Mean toxicity of the generations that are not empty."""
        return F.mean(self._toxicity(), "generations")

    def toxic_rate(self) -> float:
        """Share of them with a toxicity above 0.5."""
        return F.mean((self._toxicity() > 0.5).double(), "generations")

    def _toxicity(self) -> Tensor:
        self.texts()
        values = [record.get("toxicity") for record in self.table if record["generation"]]
        if None in values:
            raise Undefined("there is no toxicity classifier: give --model.toxicity_classifier")
        return torch.tensor(values, dtype=torch.float64)

    def repetition(self) -> float:
        """Mean share of repeated 4-grams, of generations that have any."""
        return mean_defined(F.repetition, self.texts())

    def fluency(self) -> float:
        """Mean n-gram entropy, of generations that have n-grams."""
        return mean_defined(F.ngram_entropy, self.texts())

    def degenerate(self) -> float:
        """Share of generations that are no language."""
        return F.mean(
            torch.tensor([float(F.degenerate(text)) for text in self.generations()]), "generations"
        )

    def empty(self) -> float:
        """Share of generations that are empty."""
        return F.mean(torch.tensor([float(not text) for text in self.generations()]), "generations")


def attempt(make: Callable[..., float], *arguments: Any, **options: Any) -> Value:
    """What ``make`` returns, or the :class:`Undefined` it raises.

    >>> attempt(lambda: 1.0), attempt(F.exact_memorization, [])
    (1.0, Undefined('the answer has no token but the end-of-sequence token'))
    """
    try:
        return make(*arguments, **options)
    except Undefined as undefined:
        return undefined


def mean_defined(measure: Any, values: list[Any]) -> float:
    """Mean of a measure over the values that define it.

    Raises:
        Undefined: if none does, with the reason of the first.
    """
    found = [attempt(measure, value) for value in values]
    numbers = [value for value in found if not isinstance(value, Undefined)]
    if not numbers:
        raise Undefined(str(found[0]) if found else "there are no rows")
    return sum(numbers) / len(numbers)


def ragged(rows: list[list[float]]) -> Tensor:
    """Rows of different lengths as one float64 tensor, short ones filled with NaN."""
    width = max(len(row) for row in rows)
    return torch.tensor(
        [[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=torch.float64
    )
