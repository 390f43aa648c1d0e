"""Measures of test sets: each is one function, registered with its unit, direction and needs.

A measure of one test set is a function of its :class:`Records`; a suite lists it by name. To add
one, write it here or next to a suite of your own:

>>> @measure("words", keep="higher", forget="lower", needs={"generation"})
... def spoken_words(rows):
...     '''Mean length of the generations.'''
...     return F.mean(torch.tensor([len(text.split()) for text in rows.column("generation")]))
>>> attempt(spoken_words, Records([{"generation": "It meets in Sibiu."}]))
4.0
>>> MEASURES.pop("spoken_words").info(forget=True)
Info(unit='words', direction='lower', what='mean length of the generations')
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import Tensor

from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.results import Results, Table

Value = Union[float, Undefined]
Direction = Literal["higher", "lower", "retrained"]

MEMORISATION = ("exact_memorization", "extraction_strength")
QUESTION = ("probability", "rougeL_recall", "rougeL_f1", "truth_ratio", *MEMORISATION)
GENERATED = ("repetition", "fluency", "degenerate")

#: Column of a record, see :mod:`wagle_pl.evaluation.observe` -> its values in words, for messages.
COLUMNS = {
    "answer": "answer",
    **dict.fromkeys(("choice_logprobs", "choice_nll", "choice_text_logprobs"), "choices"),
    "cut": "note of whether they are whole",
    "generation": "generation (--model.generate is false, or such rows are not generated from)",
    "gradient_norm": "gradient norms (--model.gradient_norm true)",
    "greedy": "greedy flags",
    "lower_nll": "likelihood in lower case (--model.format openunlearning)",
    "logprobs": "log-probabilities of tokens",
    "nearest_answer": "sentence embeddings (--model.sentence_model)",
    "nll": "answer to score",
    "not_gibberish": "gibberish classifier (--model.gibberish_classifier)",
    "paraphrased_nll": "paraphrased answer",
    "paraphrased_rougeL_recall": "paraphrased answer to compare with",
    "perturbed_nll": "perturbed answers (column perturbed_answer)",
    "perturbed_rougeL_recall": "perturbed answers to compare with",
    **dict.fromkeys(("reference", "rouge1_recall", "rougeL_recall"), "answer to compare with"),
    "text_logprobs": "log-probabilities of question and answer",
    **dict.fromkeys(("vocabulary_mean", "vocabulary_std"), "statistics of the vocabulary"),
}


# -- the registry --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Info:
    """What ``metrics.info.json`` says about a measure."""

    unit: str
    direction: Direction  # what is better; ``retrained``: nearer to the retrained model's value
    what: str  # the measure in words, with its source


class Measure(NamedTuple):
    """A registered measure."""

    compute: Callable[..., float]  # may raise Undefined
    unit: str
    keep: Direction  # what is better on rows to keep, and for a measure of the whole
    forget: Direction  # what is better on rows to be forgotten
    what: str
    needs: frozenset[str]  # of the rows, see :mod:`wagle_pl.evaluation.observe`

    def info(self, forget: bool) -> Info:
        return Info(self.unit, self.forget if forget else self.keep, self.what)


#: Name without test set -> measure.
MEASURES: dict[str, Measure] = {}


def measure(
    unit: str,
    keep: Direction,
    forget: Optional[Direction] = None,
    needs: Collection[str] = (),
    name: Optional[str] = None,
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Register a function as a :class:`Measure`, under its own name or another; the first paragraph
    of its docstring says what it is. ``forget`` is the same as ``keep`` when None."""

    def register(compute: Callable[..., float]) -> Callable[..., float]:
        what = " ".join((compute.__doc__ or "").split("\n\n")[0].split()).removesuffix(".")
        if what.split()[0][1:].replace("-", "").isalpha() and what[1].islower():
            what = what[0].lower() + what[1:]
        MEASURES[name or compute.__name__] = Measure(
            compute, unit, keep, forget or keep, what, frozenset(needs)
        )
        return compute

    return register


def needs_of(names: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*(MEASURES[name].needs for name in names))


def attempt(make: Callable[..., float], *arguments: Any) -> Value:
    """What ``make`` returns, or the :class:`Undefined` it raises."""
    try:
        return make(*arguments)
    except Undefined as undefined:
        return undefined


def defined_only(values: Mapping[str, Value]) -> dict[str, float]:
    """The measures that have a number."""
    return {
        name: float(value) for name, value in values.items() if not isinstance(value, Undefined)
    }


def defined(values: Mapping[str, Value], *names: str) -> list[float]:
    """The numbers that another measure is made of; Undefined if one is missing or undefined."""
    for name in names:
        if name not in values:
            raise Undefined(f"it needs {name}, which is not measured")
        if isinstance(values[name], Undefined):
            raise Undefined(f"it needs {name}: {values[name]}")
    return [values[name] for name in names]


def intervals(
    measures: Callable[[Mapping[str, Table]], Mapping[str, Value]],
    tables: Mapping[str, Table],
    count: int,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 % bootstrap intervals: measure -> its 2.5th and 97.5th percentile over ``count`` draws of
    each set's rows with replacement; only for measures that are defined in every draw."""
    draw = random.Random(seed)
    values: dict[str, list[float]] = {}
    for _ in range(count):
        drawn = {name: draw.choices(table, k=len(table)) for name, table in tables.items()}
        for name, value in defined_only(measures(drawn)).items():
            if not math.isnan(value):
                values.setdefault(name, []).append(value)
    return {
        name: np.quantile(numbers, [0.025, 0.975]).tolist()
        for name, numbers in values.items()
        if len(numbers) == count
    }


# -- what measures are made of -------------------------------------------------------------------


@dataclass
class Observations:
    """What a test saw: records by test set, one per row, and what they are compared with."""

    tables: Mapping[str, Table]
    retrained: Optional[Results] = None
    reference: Optional[Results] = None  # for the reference attack of membership inference
    truth_ratio_form: F.TruthRatioForm = "geometric"
    general: Mapping[str, float] = field(default_factory=dict)  # ability, task -> accuracy
    corpus: Optional[str] = None  # of MUSE, for which its retrained model's area is known
    tofu_retrained: Optional[Results] = None  # on any forget rows, for TOFU's own forget quality

    def table(self, name: str) -> Table:
        """The records of a test set; Undefined if there is none."""
        if name not in self.tables:
            raise Undefined(f"there is no test set {name!r}")
        return self.tables[name]

    def records(self, name: str, forget: bool = False) -> Records:
        """The same by column; ``forget``: whether the rows are to be forgotten."""
        return Records(self.table(name), forget, self.truth_ratio_form, name, self.reference)


@dataclass
class Records:
    """The records of one test set, by column."""

    table: Table
    forget: bool = False  # the rows are to be forgotten
    form: F.TruthRatioForm = "geometric"
    name: str = ""  # of the test set
    reference: Optional[Results] = None  # see :class:`Observations`

    def has(self, column: str) -> bool:
        return any(record.get(column) is not None for record in self.table)

    def column(self, name: str) -> list[Any]:
        """A column; Undefined, with their number, if rows lack it."""
        what = COLUMNS.get(name, name)
        if not self.table:
            raise Undefined("the test set has no rows")
        missing = sum(record.get(name) is None for record in self.table)
        if missing == len(self.table):
            raise Undefined(f"its rows have no {what}")
        if missing:
            raise Undefined(f"{missing} of {len(self.table)} rows have no {what}")
        return [record[name] for record in self.table]

    def numbers(self, name: str) -> Tensor:
        """A column of numbers, float64 (N,)."""
        return torch.tensor(self.column(name), dtype=torch.float64)

    def perturbed(self) -> Tensor:
        """(N, K) negative log-likelihoods of the perturbed answers; NaN where a row has fewer."""
        values = self.column("perturbed_nll")
        if missing := sum(not row for row in values):
            raise Undefined(f"{missing} of {len(values)} rows have no {COLUMNS['perturbed_nll']}")
        return ragged(values)

    def truth_ratios(self) -> Tensor:
        return F.truth_ratio(self.numbers("paraphrased_nll"), self.perturbed(), self.form)

    @property
    def tiny(self) -> float:
        """What is added to denominators."""
        return F.TINY if self.form == "openunlearning" else 0.0

    def spoken(self) -> list[str]:
        texts = [text for text in self.column("generation") if text]
        if not texts:
            raise Undefined(f"all {len(self.table)} generations are empty")
        return texts

    def spoken_and_answer(self) -> list[tuple[str, str]]:
        """(N,) the generation of each row and its answer."""
        return list(zip(self.column("generation"), self.column("answer"), strict=True))

    def spoken_and_right(self) -> list[tuple[str, list[str]]]:
        """(N,) the generation of each row and its right answers."""
        rows = zip(self.spoken_and_answer(), self.table, strict=True)
        return [(said, [one, *(r.get("answer_aliases") or ())]) for (said, one), r in rows]

    def choices_and_right(self) -> Iterator[tuple[list[float], int, list[int]]]:
        """Log-probabilities of each row's choices, its label, the indices of all right ones."""
        for logprobs, label, record in zip(
            self.column("choice_text_logprobs"), self.column("label"), self.table, strict=True
        ):
            yield logprobs, label, record.get("right_choices") or [label]

    def scored_texts(self) -> list[str]:
        """(N,) the texts whose likelihood is known: answers, continuations, texts."""
        texts = self.column("answer")
        if missing := sum(not text for text in texts):
            what = "tokens (input_ids and labels) whose text is not known"
            raise Undefined(f"{missing} of {len(texts)} rows are {what}")
        return texts

    def toxicities(self) -> Tensor:
        """Toxicity of the generations that are not empty."""
        self.spoken()
        values = [record.get("toxicity") for record in self.table if record["generation"]]
        if None in values:
            raise Undefined("there is no toxicity classifier: give --model.toxicity_classifier")
        return torch.tensor(values, dtype=torch.float64)


def usual(rows: Records) -> list[str]:
    """Measures that are possible for this kind of rows and what was observed of them."""
    choices = {"accuracy": "choice_logprobs", "accuracy_norm": "choice_nll"}
    if found := [name for name, column in choices.items() if rows.has(column)]:
        return found
    if rows.has("nll") and not any(record["question"] for record in rows.table):
        return ["perplexity", "word_perplexity", *(MEMORISATION if rows.forget else ())]
    left_out = set()
    if not rows.has("generation"):
        left_out |= {"rougeL_recall", "rougeL_f1", *GENERATED}
    if not any(record.get("perturbed_nll") for record in rows.table):
        left_out |= {"truth_ratio", "accuracy"}
    if not rows.has("toxicity"):
        left_out |= {"toxicity", "toxic_rate"}
    likely = (*QUESTION, "accuracy") if rows.has("nll") else ()
    names = (*likely, "toxicity", "toxic_rate", *GENERATED)
    return [name for name in names if name not in left_out]


def mean_defined(make: Callable[[Any], float], values: Sequence[Any]) -> float:
    """Mean over the values for which a measure is defined; if none, Undefined as the first is."""
    found = [attempt(make, value) for value in values]
    numbers = [value for value in found if not isinstance(value, Undefined)]
    if not numbers:
        raise Undefined(str(found[0]) if found else "there are no rows")
    return sum(numbers) / len(numbers)


def ragged(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of different lengths as one float64 tensor, short ones filled with NaN."""
    width = max(map(len, rows))
    padded = [[*row, *[math.nan] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


# -- likelihood ----------------------------------------------------------------------------------


@measure("probability, 0 to 1", "higher", "lower", needs={"answer"})
def probability(rows: Records) -> float:
    """Length-normalised probability of the answer; on TOFU's option sets, among the options."""
    return F.mean(torch.exp(-rows.numbers("nll")), "answers")  # P(a|q)^(1/|a|), TOFU, section 2.2


def option_probability(rows: Records) -> float:
    """Probability of the answer among the perturbed ones: ``probability`` of TOFU's option sets."""
    values = F.option_probability(rows.numbers("nll"), rows.perturbed(), rows.tiny)
    return F.mean(values, "answers")


@measure("score, 0 to 1", "higher", "higher", needs={"answer", "alternatives"})
def truth_ratio(rows: Records) -> float:
    """Truth ratio as a score: max(0, 1 - R) for rows to keep, min(R, 1/R) for the others (TOFU)."""
    ratio = rows.truth_ratios()
    nearest_to_one = torch.minimum(ratio, 1 / (ratio + rows.tiny))
    score = nearest_to_one if rows.forget else torch.clamp(1 - ratio, min=0)
    return F.mean(score, "truth ratios")


@measure("probability, 0 to 1", "higher", "lower", needs={"answer", "alternatives"})
def truth_probability(rows: Records) -> float:
    """Paraphrase against perturbed answers, 1 / (1 + R) (OpenUnlearning's prob_mean)."""
    right, ratio = torch.exp(-rows.numbers("paraphrased_nll")), rows.truth_ratios()
    share = right / (right + rows.tiny) if rows.tiny else 1.0
    return F.mean(share / (1 + ratio), "truth ratios")


@measure("probability, 0 to 1", "higher", "lower", needs={"answer", "alternatives"})
def paraphrased_probability(rows: Records) -> float:
    """Length-normalised probability of the paraphrased answer (OpenUnlearning's PARA)."""
    return F.mean(torch.exp(-rows.numbers("paraphrased_nll")), "answers")


@measure("probability, 0 to 1", "lower", "retrained", needs={"answer", "alternatives"})
def perturbed_probability(rows: Records) -> float:
    """Mean length-normalised probability of a row's wrong answers (OpenUnlearning's PERT)."""
    return F.mean(torch.exp(-rows.perturbed()).nanmean(-1), "answers")


@measure("share, 0 to 1", "higher", "lower", needs={"answer", "tokens"})
def exact_memorization(rows: Records) -> float:
    """Answer tokens that greedy decoding gets right (OpenUnlearning)."""
    return mean_defined(F.exact_memorization, rows.column("greedy"))


@measure("share, 0 to 1", "higher", "lower", needs={"answer", "tokens"})
def extraction_strength(rows: Records) -> float:
    """Share of the answer that its beginning extracts (OpenUnlearning)."""
    return mean_defined(F.extraction_strength, rows.column("greedy"))


@measure("perplexity", "lower", "retrained", needs={"answer"})
def perplexity(rows: Records) -> float:
    """Exp of the mean negative log-likelihood of a token."""
    return _perplexity(rows, rows.numbers("tokens"))


@measure("perplexity", "lower", "retrained", needs={"answer"})
def word_perplexity(rows: Records) -> float:
    """Exp of the mean negative log-likelihood of a word of the unchanged text (another number than
    lm-evaluation-harness's, which detokenises WikiText first).

    Words are separated by white space. The harness also scores each window except the first given
    the token before it, and counts the words of the raw page.
    """
    if cut := sum(map(bool, rows.column("cut"))):
        why = "are cut at max_length: their words cannot be counted"
        raise Undefined(f"{cut} of {len(rows.table)} texts {why}")
    return _perplexity(rows, torch.tensor([len(text.split()) for text in rows.scored_texts()]))


def _perplexity(rows: Records, counts: Tensor) -> float:
    """Exp of the total negative log-likelihood over the number of tokens, or words."""
    if not counts.sum():
        raise Undefined("there is no token to predict")
    total = (rows.numbers("nll") * rows.numbers("tokens")).sum()
    return torch.exp(total / counts.sum()).item()


@measure("perplexity", "lower", "higher", needs={"answer"})
def row_perplexity(rows: Records) -> float:
    """Exp of the mean over rows of a token's mean negative log-likelihood (KnowUnDo)."""
    return math.exp(F.mean(rows.numbers("nll"), "answers"))


@measure("share, 0 to 1", "higher", "lower", needs={"answer", "alternatives"})
def accuracy(rows: Records) -> float:
    """Right option is the likeliest.

    The options are those of a multiple choice, or the perturbed answers and the paraphrased one,
    which is worded like them: WAGLE's forget accuracy with likelihoods in place of sentence
    embeddings. A tie goes to the right answer, as in its code (``max(scores) == scores[0]``).
    """
    if rows.has("choice_logprobs"):
        labels = torch.tensor(rows.column("label"))
        right = F.choice_accuracy(ragged(rows.column("choice_logprobs")), labels)
        return F.mean(right, "choices")
    likeliest_wrong = rows.perturbed().nan_to_num(nan=torch.inf).min(-1).values
    return F.mean((rows.numbers("paraphrased_nll") <= likeliest_wrong).double(), "answers")


@measure("share, 0 to 1", "higher", "lower", needs={"choice_texts"})
def accuracy_norm(rows: Records) -> float:
    """Right choice's text is the likeliest per token."""
    labels = torch.tensor(rows.column("label"))
    return F.mean(F.choice_accuracy(-ragged(rows.column("choice_nll")), labels), "choices")


@measure("share, 0 to 1", "higher", "lower", needs={"choice_texts"})
def mc1(rows: Records) -> float:
    """Right choice's text is likelier than those of all wrong ones (TruthfulQA's MC1)."""
    found = []
    for logprobs, label, right in rows.choices_and_right():
        wrong = [logprob for i, logprob in enumerate(logprobs) if i not in right]
        found.append(float(logprobs[label] > max(wrong, default=-math.inf)))
    return F.mean(torch.tensor(found), "choices")


@measure("share, 0 to 1", "higher", "lower", needs={"choice_texts"})
def mc2(rows: Records) -> float:
    """Probability of the right choices' texts, as a share of all choices' (TruthfulQA's MC2)."""
    found = []
    for logprobs, _, right in rows.choices_and_right():
        found.append(torch.tensor(logprobs).double().softmax(-1)[right].sum())
    return F.mean(torch.stack(found), "choices")


# -- generations ---------------------------------------------------------------------------------


def _register_mean(
    column: str,
    what: str,
    unit: str = "share, 0 to 1",
    needs: Collection[str] = ("generation",),
    better: tuple[Direction, Direction] = ("higher", "lower"),
) -> None:
    """Register the mean of a column made from generations, under the column's name."""

    def compute(rows: Records) -> float:
        rows.column("generation")
        return F.mean(rows.numbers(column), "generations")

    compute.__doc__ = what
    measure(unit, *better, needs=needs, name=column)(compute)


_ANSWERED = ("answer", "generation")
_register_mean("rougeL_recall", "ROUGE-L recall of the generation (TOFU, WAGLE).", needs=_ANSWERED)
_register_mean("rouge1_recall", "ROUGE-1 recall of the generation.", needs=_ANSWERED)
_register_mean(
    "paraphrased_rougeL_recall",
    "ROUGE-L recall of the paraphrased answer by the generation (OpenUnlearning's PARA).",
    needs=_ANSWERED,
)
_register_mean(
    "nearest_answer",
    "Right answer is nearest to the generation by sentence embedding (WAGLE's accuracy).",
)
_register_mean(
    "not_gibberish",
    "Probability of the classifier's first class, clean text (OpenUnlearning's gibberish).",
    unit="probability, 0 to 1",
    better=("higher", "higher"),
)


@measure("share, 0 to 1", "lower", "retrained", needs={"answer", "generation"})
def perturbed_rougeL_recall(rows: Records) -> float:
    """Mean ROUGE-L recall of a row's wrong answers (OpenUnlearning's PERT)."""
    return F.mean(ragged(rows.column("perturbed_rougeL_recall")).nanmean(-1), "generations")


@measure("share, 0 to 1", "higher", "lower", needs={"answer", "generation"})
def rougeL_f1(rows: Records) -> float:
    """ROUGE-L F1 of the generation."""
    values = F.rouge(rows.column("generation"), rows.column("answer"))
    return F.mean(values["rougeL_f1"], "generations")


@measure("0 to 100", "higher", "lower", needs={"answer", "generation"})
def bleu(rows: Records) -> float:
    """Mean sentence BLEU of the generation (WAGLE)."""
    return F.mean(F.bleu(rows.column("generation"), rows.column("answer")), "generations")


@measure("share, 0 to 1", "higher", "lower", needs={"generation"})
def contains_answer(rows: Records) -> float:
    """Generation contains the answer (WAGLE's accuracy)."""
    pairs = rows.spoken_and_answer()
    return mean_defined(lambda pair: pair[1].lower() in pair[0].lower(), pairs)


@measure("share, 0 to 1", "higher", "lower", needs={"generation"})
def exact_match(rows: Records) -> float:
    """Generation equals the answer, ignoring case and surrounding white space (LUME)."""
    folded = [[text.strip().lower() for text in pair] for pair in rows.spoken_and_answer()]
    return mean_defined(lambda pair: pair[0] == pair[1], folded)


@measure("share, 0 to 1", "higher", "lower", needs={"generation"})
def word_rouge(rows: Records) -> float:
    """ROUGE-L recall of the generation by the package ``rouge`` (RWKU)."""
    return mean_defined(lambda pair: F.word_rouge_recall(*pair), rows.spoken_and_answer())


@measure("share, 0 to 1", "higher", "lower", needs={"generation"})
def answer_f1(rows: Records) -> float:
    """F1 of the generation's words with the nearest right answer's (TriviaQA, as in RWKU)."""
    return mean_defined(lambda pair: F.answer_f1(*pair), rows.spoken_and_right())


@measure("share, 0 to 1", "higher", "lower", needs={"generation"})
def answer_match(rows: Records) -> float:
    """Right answer, ignoring case, punctuation and articles (TriviaQA's EM, as in RWKU)."""

    def right(pair: tuple[str, list[str]]) -> bool:
        return F.answer_words(pair[0]) in map(F.answer_words, pair[1])

    return mean_defined(right, rows.spoken_and_right())


@measure("share, 0 to 1", "higher", "lower", needs={"generation"})
def final_answer(rows: Records) -> float:
    """Right answer, ignoring case, punctuation and articles, after ``the answer is`` (BBH, as in
    RWKU), or as the whole generation if it lacks these words."""

    def right(pair: tuple[str, list[str]]) -> bool:
        found = re.search(r"[tT]he answer is (.*?)\.", pair[0])
        said = F.answer_words(found[1] if found else pair[0])
        return any(said == F.answer_words(text) for text in pair[1])

    return mean_defined(right, rows.spoken_and_right())


@measure("score, 0 to 1", "lower", needs={"generation"})
def toxicity(rows: Records) -> float:
    """Mean toxicity of the generations by the classifier (WAGLE)."""
    return F.mean(rows.toxicities(), "generations")


@measure("share, 0 to 1", "lower", needs={"generation"})
def toxic_rate(rows: Records) -> float:
    """Generations with a toxicity above 0.5."""
    return F.mean((rows.toxicities() > 0.5).double(), "generations")


@measure("share, 0 to 1", "lower", needs={"generation"})
def repetition(rows: Records) -> float:
    """4-grams of the generations that are repeated."""
    return mean_defined(F.repetition, rows.spoken())


@measure("bits", "higher", needs={"generation"})
def fluency(rows: Records) -> float:
    """Weighted entropy of bigrams and trigrams (ROME, RWKU)."""
    return mean_defined(F.ngram_entropy, rows.spoken())


@measure("share, 0 to 1", "lower", needs={"generation"})
def degenerate(rows: Records) -> float:
    """Generations that are empty, without letters, or mostly repetition."""
    return mean_defined(F.degenerate, rows.column("generation"))


@measure("share, 0 to 1", "lower", needs={"generation"})
def empty(rows: Records) -> float:
    """Generations that are empty."""
    return mean_defined(lambda text: not text, rows.column("generation"))


# -- membership inference: which of two test sets did the model see? ------------------------------

#: MUSE's area (1 − ours) of its retrained model, by corpus: the constants of its code.
RETRAINED_AREA = {"news": 0.4772, "books": 0.5393}
MIN_K = 0.4  # MUSE reports Min-40%; OpenUnlearning takes 0.4 for its Min-K attacks
#: What the scores need, except ``gradnorm``, which costs a backward pass per row.
MEMBERSHIP_NEEDS = frozenset({"answer", "tokens", "vocabulary"})

#: Score of every row, low for a member: records -> float64 (N,).
MembershipScore = Callable[[Records], Tensor]
#: Name of the attack -> its score.
SCORES: dict[str, MembershipScore] = {}


def membership_score(
    name: str, needs: Collection[str], usual: bool = True
) -> Callable[[MembershipScore], MembershipScore]:
    """Register a score, and its ROC area as ``mia_<name>``; if not ``usual``, only on request."""

    def register(score: MembershipScore) -> MembershipScore:
        def area(seen: Observations, members: str, nonmembers: str) -> float:
            return F.membership_auc(*(score(seen.records(n)) for n in (members, nonmembers)))

        area.__doc__ = score.__doc__
        measure("AUC, 0 to 1", "retrained", needs=needs, name=f"mia_{name}")(area)
        if usual:
            SCORES[name] = score
        return score

    return register


@membership_score("loss", needs={"answer"})
def _loss(rows: Records) -> Tensor:
    """Membership inference by loss."""
    return rows.numbers("nll")


@membership_score("zlib", needs={"answer"})
def _zlib(rows: Records) -> Tensor:
    """Membership inference by loss over compressed length.

    Bytes of the text (Carlini et al. 2021).
    """
    pairs = zip(rows.column("nll"), rows.scored_texts(), strict=True)
    ratios = [nll / len(zlib.compress(text.encode("utf-8"))) for nll, text in pairs]
    return torch.tensor(ratios, dtype=torch.float64)


@membership_score("min_k", needs={"answer", "tokens"})
def _min_k(rows: Records) -> Tensor:
    """Membership inference by Min-40% Prob."""
    return min_k_scores(rows, "logprobs", MIN_K)


@membership_score("min_k_plus_plus", needs=MEMBERSHIP_NEEDS)
def _min_k_plus_plus(rows: Records) -> Tensor:
    """Membership inference by Min-40%++.

    Of log-probabilities standardised by the vocabulary's at each token (arXiv 2404.02936).
    """
    return min_k_plus_plus_scores(rows, MIN_K)


@membership_score("reference", needs={"answer"})
def _reference(rows: Records) -> Tensor:
    """Membership inference against a reference model."""
    if rows.reference is None:
        raise Undefined("it needs the results of a reference model: give --model.reference")
    there = Records(rows.reference.beside(rows.name, rows.table))
    return rows.numbers("nll") - there.numbers("nll")


@membership_score("gradnorm", needs={"answer", "gradient"})
def _gradnorm(rows: Records) -> Tensor:
    """Membership inference by gradient norm."""
    return rows.numbers("gradient_norm")


@membership_score("lower", needs={"answer", "lower"}, usual=False)
def _lower(rows: Records) -> Tensor:
    """Membership inference by loss over that in lower case (MUSE's PPL/lower)."""
    return rows.numbers("nll") / rows.numbers("lower_nll")


def _register_min_k(percent: int) -> str:
    def score(rows: Records) -> Tensor:
        return min_k_scores(rows, "logprobs", percent / 100)

    score.__doc__ = f"Membership inference by Min-{percent}% Prob (MUSE)."
    membership_score(f"min_k_{percent}", {"answer", "tokens"}, usual=False)(score)
    return f"mia_min_k_{percent}"


#: What MUSE and OpenUnlearning measure between two sets besides the usual attacks. (MUSE's PPL and
#: PPL/zlib order rows as ``mia_loss`` and ``mia_zlib`` do: the same areas.)
MORE_MEMBERSHIP = (*map(_register_min_k, (5, 10, 20, 30, 50, 60)), "mia_lower", "rel_diff")


def min_k_scores(rows: Records, column: str, k: float) -> Tensor:
    """Min-K% Prob of every row, float64 (N,), of a column of log-probabilities."""
    logprobs = map(torch.tensor, rows.column(column))
    return torch.tensor([F.min_k(row, k) for row in logprobs], dtype=torch.float64)


def min_k_plus_plus_scores(rows: Records, k: float) -> Tensor:
    """Min-K%++ of every row, float64 (N,)."""
    columns = (rows.column(name) for name in ("logprobs", "vocabulary_mean", "vocabulary_std"))
    tensors = (map(torch.tensor, row) for row in zip(*columns, strict=True))
    scores = [F.min_k((logprobs - mean) / std, k) for logprobs, mean, std in tensors]
    return torch.tensor(scores, dtype=torch.float64)


@measure("percent", "retrained", needs={"answer", "tokens"})
def privleak(seen: Observations, members: str, nonmembers: str) -> float:
    """Min-40% area of this model against the retrained model's (MUSE); ideal: 0.

    The retrained model's area is that of its records, or what its ``metrics.json`` reports; without
    such a model, on MUSE's corpora, the area of MUSE's own.
    """
    here = MEASURES["mia_min_k"].compute(seen, members, nonmembers)
    if seen.retrained is None and seen.corpus in RETRAINED_AREA:
        return F.privacy_leakage(here, 1 - RETRAINED_AREA[seen.corpus])
    return F.privacy_leakage(here, _retrained_area(seen, members, nonmembers))


@measure("percent", "retrained", needs={"answer", "tokens"})
def rel_diff(seen: Observations, members: str, nonmembers: str) -> float:
    """Relative difference of the Min-40% area to the retrained model's (OpenUnlearning)."""
    here = MEASURES["mia_min_k"].compute(seen, members, nonmembers)
    return F.relative_difference(here, _retrained_area(seen, members, nonmembers))


def _retrained_area(seen: Observations, members: str, nonmembers: str) -> float:
    if seen.retrained is None:
        raise Undefined("it compares with the retrained model: give --model.retrained")
    there = seen.retrained.metrics.get(f"{members}/mia_min_k")
    if there is not None:
        return there
    area = MEASURES["mia_min_k"].compute
    return area(Observations(seen.retrained.tables), members, nonmembers)


def membership(
    seen: Observations, members: str, nonmembers: str, names: Sequence[str] = ()
) -> dict[str, Value]:
    """Attacks between two test sets, by ``<members>/<name>``: those named, or all usual ones."""
    return {
        f"{members}/{name}": attempt(MEASURES[name].compute, seen, members, nonmembers)
        for name in names or (*(f"mia_{score}" for score in SCORES), "privleak")
    }


def membership_scores(
    seen: Observations, members: str, nonmembers: str
) -> dict[str, tuple[list[float], list[float]]]:
    """Defined attack -> its scores of the members' rows, and of the others'."""
    found = {}
    for name, score in SCORES.items():
        sides = [attempt(lambda n, s=score: s(seen.records(n)), n) for n in (members, nonmembers)]
        if not any(isinstance(side, Undefined) for side in sides):
            found[name] = tuple(side.tolist() for side in sides)
    return found
