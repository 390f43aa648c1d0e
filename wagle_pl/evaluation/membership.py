"""Membership inference: which of two test sets did the model see?"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.records import MEASURES, Observations, Records, Value, attempt, measure

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
    reference = Records(rows.reference.beside(rows.name, rows.table))
    return rows.numbers("nll") - reference.numbers("nll")


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
    area = MEASURES["mia_min_k"].compute(seen, members, nonmembers)
    if seen.retrained is None and seen.corpus in RETRAINED_AREA:
        return F.privacy_leakage(area, 1 - RETRAINED_AREA[seen.corpus])
    return F.privacy_leakage(area, _retrained_area(seen, members, nonmembers))


@measure("percent", "retrained", needs={"answer", "tokens"})
def rel_diff(seen: Observations, members: str, nonmembers: str) -> float:
    """Relative difference of the Min-40% area to the retrained model's (OpenUnlearning)."""
    area = MEASURES["mia_min_k"].compute(seen, members, nonmembers)
    return F.relative_difference(area, _retrained_area(seen, members, nonmembers))


def _retrained_area(seen: Observations, members: str, nonmembers: str) -> float:
    if seen.retrained is None:
        raise Undefined("it compares with the retrained model: give --model.retrained")
    reported = seen.retrained.metrics.get(f"{members}/mia_min_k")
    if reported is not None:
        return reported
    retrained = Observations(seen.retrained.tables)
    return MEASURES["mia_min_k"].compute(retrained, members, nonmembers)


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
    defined = {}
    for name, score in SCORES.items():
        sides = [attempt(lambda n, s=score: s(seen.records(n)), n) for n in (members, nonmembers)]
        if not any(isinstance(side, Undefined) for side in sides):
            defined[name] = tuple(side.tolist() for side in sides)
    return defined
