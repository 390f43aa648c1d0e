"""The verdict on an unlearned model: rules on probabilities of rows, before and after.

Every forget row is compared with a row of the same form that the model has never seen. A row is
*known* if it is clearly more probable than that row and the model also says its answer, asked
directly or in other words. The bound that ends training is the bound that the verdict uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from statistics import fmean
from typing import Literal, Optional

from wagle_pl.api.neighbours import words_of

Outcome = Literal["forgotten", "partly forgotten", "model damaged", "not known before"]

#: Two probabilities p, u are alike if p ≤ FACTOR · u + SLACK.
FACTOR, SLACK = 1.5, 0.02
#: Share of forget rows that may be known by chance in a model that has never seen them.
CHANCE = 0.1
#: Share of the retain rows' probability that unlearning must leave.
KEPT = 0.8
#: Below this probability of retain rows, a model may have been asked in a wrong prompt format.
IMPROBABLE = 0.1
UNKNOWN_RETAIN = (
    "The model hardly knows the retain rows, so they do not show what is lost: check the prompt "
    "format and the tokenizer, or give rows that it knows"
)


@dataclass(frozen=True)
class Asked:
    """Rows in one wording: a number per row in each list.

    Args:
        rows: probabilities of the rows.
        unseen: probabilities of rows of the same form that the model has never seen.
        recall: share of the answer's own words (those that are not in the question) which the
            model's greedy answer has; 1 if the answer has no own words, or if nothing was generated.
    """

    rows: Sequence[float]
    unseen: Sequence[float]
    recall: Sequence[float]

    @property
    def known(self) -> list[bool]:
        """Which rows the model knows."""
        triples = zip(self.rows, self.unseen, self.recall, strict=True)
        return [above(p, u) and recall > 0.5 for p, u, recall in triples]

    def means(self, chosen: Sequence[bool]) -> tuple[float, float]:
        """Means of some rows, and of their unseen counterparts."""
        return fmean(compress(self.rows, chosen)), fmean(compress(self.unseen, chosen))


@dataclass(frozen=True)
class Scores:
    """What was measured of a model at one moment."""

    direct: Asked
    reworded: Asked
    retain: Sequence[float]  # probabilities of the rows to keep
    earlier: Asked = field(default_factory=lambda: Asked([], [], []))
    #: Whether the model's greedy answer still has the whole answer, for each row; empty if unknown.
    still_answered: Sequence[bool] = ()

    @property
    def known(self) -> list[bool]:
        """Which rows the model knows, asked directly or in other words."""
        return [any(row) for row in zip(self.direct.known, self.reworded.known, strict=True)]


@dataclass(frozen=True)
class Verdict:
    """The outcome, and the sentence that gives its numbers."""

    outcome: Outcome
    sentence: str


def bound(unseen: float) -> float:
    """The largest probability that is like that of rows never seen."""
    return FACTOR * unseen + SLACK


def above(probability: float, unseen: float) -> bool:
    """Whether a probability is clearly above that of rows never seen.

    >>> above(0.057, 0.010), above(0.002, 0.0001), above(0.14, 0.1)
    (True, False, False)
    """
    return probability > bound(unseen)


def clearest(first: Asked, second: Asked) -> Asked:
    """Of two forms of each row, the one that is the further above its bound.

    >>> clearest(Asked([0.1], [0.0], [1.0]), Asked([0.3], [0.2], [0.5])).rows
    [0.1]
    """
    forms = [zip(a.rows, a.unseen, a.recall, strict=True) for a in (first, second)]
    rows = [max(pair, key=lambda row: row[0] / bound(row[1])) for pair in zip(*forms, strict=True)]
    return Asked(*map(list, zip(*rows, strict=True)))


def answer_recall(question: str, answer: str, generation: str) -> float:
    """Share of the words of an answer that are not in its question, and that a generation has.

    >>> answer_recall("Where was Ada born?", "Ada was born in Ulm.", "She was born in Bern.")
    0.5
    """
    own_words = set(words_of(answer)) - set(words_of(question))
    return len(own_words & set(words_of(generation))) / len(own_words) if own_words else 1.0


def was_known(before: Scores) -> bool:
    """Whether the model knew more of the forget rows than chance explains: more than a tenth, or one
    whose whole answer it says with a probability above a half."""
    known = before.known
    certain = zip(known, before.direct.rows, before.still_answered, strict=False)
    return sum(known) > CHANCE * len(known) or any(k and s and p > 0.5 for k, p, s in certain)


def left_rows(known: Sequence[bool], after: Scores) -> list[bool]:
    """Which rows a model still or newly knows, asked directly or in other words."""
    answered = after.still_answered or [False] * len(known)
    still = [k and s for k, s in zip(known, answered, strict=True)]
    return [any(row) for row in zip(after.known, still, strict=True)]


def returned(before: Asked, after: Asked) -> list[bool]:
    """Which rows of earlier requests are known now, and were not before."""
    return [now and not then for then, now in zip(before.known, after.known, strict=True)]


def is_damaged(before: Sequence[float], after: Sequence[float]) -> Optional[bool]:
    """Whether too little of the retain rows' mean probability is left, whichever row is left out;
    None if that depends on one row, and so cannot be told.

    >>> is_damaged([0.9] * 3, [0.1] * 3), is_damaged([0.9] * 3, [0.1, 0.9, 0.9])
    (True, None)
    """
    rows = range(len(before))
    if not all(p == p for p in after):  # NaN
        return True
    parts = [[j for j in rows if j != i] for i in rows if len(rows) > 1]
    left = {fmean(after[i] for i in p) >= KEPT * fmean(before[i] for i in p) for p in parts}
    return None if len(left) != 1 else left == {False}


def each_has_gone(
    asked: Asked, known: Sequence[bool], requests: Sequence[int] = (), share: float = 1.0
) -> bool:
    """Whether the mean of each request's known rows meets the bound.

    Args:
        requests: number of rows of each request; all are one request if empty. If no row of one of
            several requests is known, the mean is of all its rows.
        share: of the bound.
    """
    ends = [*accumulate(requests or [len(known)])]
    for start, end in zip([0, *ends], ends, strict=False):
        part = Asked(asked.rows[start:end], asked.unseen[start:end], [])
        chosen = known[start:end]
        if requests and not any(chosen):
            chosen = [True] * len(chosen)
        if any(chosen):
            mean, unseen = part.means(chosen)
            if not mean <= share * bound(unseen):  # NaN, too
                return False
    return True


def judge(
    before: Scores,
    after: Scores,
    untested: int = 0,
    note: str = "",
    requests: Sequence[int] = (),
    known: Sequence[bool] = (),
) -> Verdict:
    """The verdict on a model.

    Args:
        untested: number of rows that earlier requests made the model forget, and whose text is not
            at hand to test them again.
        note: a further sentence, such as how rows without an unseen counterpart are judged.
        requests: see :func:`each_has_gone`; they were found known by an earlier test.
        known: which rows count as known; by default those that were ``before``.
    """
    known, count = known or before.known, len(before.known)
    numbers = _numbers(before, after, known)
    ends = f". {note}" if note else ""
    if untested:
        told = f"{untested} rows of earlier requests were not tested again"
        ends = f". {told}: give their file as earlier{ends}"
    if fmean(before.retain) < IMPROBABLE:
        ends = f". {UNKNOWN_RETAIN}{ends}"
    if not requests and not was_known(before):
        return Verdict(
            "not known before",
            f"not known before: the model knew {sum(known)} of {count} forget rows: {numbers}; "
            f"the model was not changed{ends}",
        )
    left = left_rows(known, after)
    means_are_gone = all(
        each_has_gone(asked, known, requests) for asked in (after.direct, after.reworded)
    )
    again = returned(before.earlier, after.earlier)
    gone = means_are_gone and not any(left)
    outcome: Outcome = "forgotten" if gone and not any(again) else "partly forgotten"
    if (damaged := is_damaged(before.retain, after.retain)) is None:
        told = f"One of {len(after.retain)} retain rows decides whether the model is damaged"
        ends = f". {told}: give more{ends}"
    outcome = "model damaged" if damaged else outcome
    parts = [f"{outcome}: {sum(known)} of {count} forget rows were known before: {numbers}"]
    for state, of_kind in (("still", known), ("newly", [not k for k in known])):
        if number := sum(row and kind for row, kind in zip(left, of_kind, strict=True)):
            parts.append(f"{number} rows are {state} known, asked directly or in other words")
    if not means_are_gone and not any(left):
        parts.append("on average the rows are above the bound, though the model says no answer")
    if any(after.earlier.known):
        parts.append(f"{sum(after.earlier.known)} rows of earlier requests are known")
    return Verdict(outcome, "; ".join(parts) + ends)


def _numbers(before: Scores, after: Scores, known: Sequence[bool]) -> str:
    """Probabilities before and after, of the known rows or, if there are none, of all."""
    chosen = known if any(known) else [True] * len(known)

    def change(name: str) -> str:
        sides = (getattr(scores, name).means(chosen) for scores in (before, after))
        (row, unseen), (row_after, unseen_after) = sides
        return (
            f"{row:.3g} to {row_after:.3g} (rows never seen {unseen:.3g} to {unseen_after:.3g}, so "
            f"the bound is {bound(unseen_after):.3g})"
        )

    return (
        f"probability {change('direct')}; in other words {change('reworded')}; retain rows "
        f"{fmean(before.retain):.3g} to {fmean(after.retain):.3g}"
    )
