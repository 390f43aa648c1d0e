"""The registry of measures, and what they are computed from: the records of test sets.

A measure of one test set is a function of its :class:`Records`; a suite lists it by name. To add
one, write it next to a suite of your own:

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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Optional, TypedDict, Union

import numpy as np
import torch
from torch import Tensor

from wagle_pl.core.schema import Count, Real, check_arguments
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.results import Results
from wagle_pl.evaluation.tofu_result import Table

Value = Union[float, Undefined]
Direction = Literal["higher", "lower", "retrained"]

#: Column of a record, see :mod:`wagle_pl.evaluation.observe` -> its values in words, for messages,
#: where its name does not say what is missing.
COLUMNS = {
    **dict.fromkeys(("choice_logprobs", "choice_nll", "choice_text_logprobs"), "choices"),
    "generation": "generation (--model.generate is false, or such rows are not generated from)",
    "gradient_norm": "gradient norms (--model.gradient_norm true)",
    "lower_nll": "likelihood in lower case (--model.format openunlearning)",
    "nearest_answer": "sentence embeddings (--model.sentence_model)",
    "nll": "answer to score",
    "not_gibberish": "gibberish classifier (--model.gibberish_classifier)",
    "paraphrased_nll": "paraphrased answer",
    "perturbed_nll": "perturbed answers (column perturbed_answer)",
    **dict.fromkeys(("reference", "rouge1_recall", "rougeL_recall"), "answer to compare with"),
}

_NUMBERS = "nll tokens lower_nll paraphrased_nll paraphrased_tokens gradient_norm toxicity"
_NUMBERS += " not_gibberish rouge1_recall rougeL_recall paraphrased_rougeL_recall"
_LISTS = "perturbed_nll perturbed_rougeL_recall logprobs text_logprobs vocabulary_mean"
_LISTS += " vocabulary_std choice_logprobs choice_nll choice_text_logprobs"
_SCHEMA: dict[str, Any] = dict.fromkeys(("question", "answer", "generation", "reference"), str)
_SCHEMA |= dict.fromkeys(("row", "label"), Count) | dict.fromkeys(_NUMBERS.split(), Real)
_SCHEMA |= dict.fromkeys(_LISTS.split(), list[Real]) | {"answer_aliases": list[str]}
_SCHEMA |= {"right_choices": list[Count], "greedy": list[Union[bool, int]]}
#: What a record may hold; a column that a row lacks is missing or None.
RECORD: Any = TypedDict("RECORD", {n: Optional[t] for n, t in _SCHEMA.items()})  # type: ignore


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
    what: Optional[str] = None,
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Register a function as a :class:`Measure`, under its own name or another; the first paragraph
    of its docstring says ``what`` it is. ``forget`` is the same as ``keep`` when None."""

    def register(compute: Callable[..., float]) -> Callable[..., float]:
        text = (what or compute.__doc__ or "").split("\n\n")[0]
        text = " ".join(text.split()).removesuffix(".")
        if text.split()[0][1:].replace("-", "").isalpha() and text[1].islower():
            text = text[0].lower() + text[1:]
        MEASURES[name or compute.__name__] = Measure(
            compute, unit, keep, forget or keep, text, frozenset(needs)
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
    numbers = []
    for name in names:
        if name not in values:
            raise Undefined(f"it needs {name}, which is not measured")
        value = values[name]
        if isinstance(value, Undefined):
            raise Undefined(f"it needs {name}: {value}")
        numbers.append(value)
    return numbers


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

    def __post_init__(self) -> None:
        check_arguments(Observations.__init__, vars(self), "")

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
        what = COLUMNS.get(name, name.replace("_", " "))
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

    def generations(self) -> list[str]:
        """The generations that are not empty."""
        texts = [text for text in self.column("generation") if text]
        if not texts:
            raise Undefined(f"all {len(self.table)} generations are empty")
        return texts

    def answered(self) -> list[tuple[str, list[str]]]:
        """(N,) the generation of each row, and its answer and other right ones."""
        rows = zip(self.column("generation"), self.column("answer"), self.table, strict=True)
        return [(text, [right, *(row.get("answer_aliases") or ())]) for text, right, row in rows]

    def scored_texts(self) -> list[str]:
        """(N,) the texts whose likelihood is known: answers, continuations, texts."""
        texts = self.column("answer")
        if missing := sum(not text for text in texts):
            what = "tokens (input_ids and labels) whose text is not known"
            raise Undefined(f"{missing} of {len(texts)} rows are {what}")
        return texts

    def toxicities(self) -> Tensor:
        """Toxicity of the generations that are not empty."""
        self.generations()
        values = [record.get("toxicity") for record in self.table if record["generation"]]
        if None in values:
            raise Undefined("there is no toxicity classifier: give --model.toxicity_classifier")
        return torch.tensor(values, dtype=torch.float64)


def mean_defined(make: Callable[[Any], float], values: Sequence[Any]) -> float:
    """Mean over the values for which a measure is defined; if none, Undefined as the first is."""
    results = [attempt(make, value) for value in values]
    numbers = [value for value in results if not isinstance(value, Undefined)]
    if not numbers:
        raise Undefined(str(results[0]) if results else "there are no rows")
    return sum(numbers) / len(numbers)


def ragged(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows of different lengths as one float64 tensor, short ones filled with NaN."""
    width = max(map(len, rows))
    padded = [[*row, *[math.nan] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)
