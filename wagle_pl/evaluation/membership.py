"""Membership inference: which of two test sets did the model see?"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial

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


def min_k_scores(rows: Records, k: float, column: str = "logprobs") -> Tensor:
    """Min-K% Prob of every row, float64 (N,), of a column of log-probabilities."""
    logprobs = map(torch.tensor, rows.column(column))
    return torch.tensor([F.min_k(row, k) for row in logprobs], dtype=torch.float64)


def min_k_plus_plus_scores(rows: Records, k: float) -> Tensor:
    """Min-K%++ of every row, float64 (N,)."""
    columns = (rows.column(name) for name in ("logprobs", "vocabulary_mean", "vocabulary_std"))
    tensors = (map(torch.tensor, row) for row in zip(*columns, strict=True))
    scores = [F.min_k((logprobs - mean) / std, k) for logprobs, mean, std in tensors]
    return torch.tensor(scores, dtype=torch.float64)


def _zlib(rows: Records) -> Tensor:
    """Loss over the bytes of the compressed text (Carlini et al. 2021), float64 (N,)."""
    pairs = zip(rows.column("nll"), rows.scored_texts(), strict=True)
    ratios = [nll / len(zlib.compress(text.encode("utf-8"))) for nll, text in pairs]
    return torch.tensor(ratios, dtype=torch.float64)


def _reference(rows: Records) -> Tensor:
    """Loss minus that of a reference model, float64 (N,)."""
    if rows.reference is None:
        raise Undefined("it needs the results of a reference model: give --model.reference")
    reference = Records(rows.reference.beside(rows.name, rows.table))
    return rows.numbers("nll") - reference.numbers("nll")


def _register(name: str, score: MembershipScore, what: str, needs: Collection[str]) -> str:
    """Register the ROC area of a score as ``mia_<name>``, which is returned."""
    what = f"membership inference {what}"

    @measure("AUC, 0 to 1", "retrained", needs=needs, name=f"mia_{name}", what=what)
    def area(seen: Observations, members: str, nonmembers: str) -> float:
        return F.membership_auc(*(score(seen.records(n)) for n in (members, nonmembers)))

    return f"mia_{name}"


#: Name of a usual attack -> its score of every row, low for a member, in words, and its needs.
_USUAL: dict[str, tuple[MembershipScore, str, Collection[str]]] = {
    "loss": (lambda rows: rows.numbers("nll"), "by loss", {"answer"}),
    "zlib": (_zlib, "by loss over compressed length", {"answer"}),
    "min_k": (partial(min_k_scores, k=MIN_K), "by Min-40% Prob", {"answer", "tokens"}),
    "min_k_plus_plus": (partial(min_k_plus_plus_scores, k=MIN_K), "by Min-40%++", MEMBERSHIP_NEEDS),
    "reference": (_reference, "against a reference model", {"answer"}),
    "gradnorm": (
        lambda rows: rows.numbers("gradient_norm"),
        "by gradient norm",
        {"answer", "gradient"},
    ),
}
SCORES = {name: score for name, (score, _, _) in _USUAL.items()}
for _name, _about in _USUAL.items():
    _register(_name, *_about)
#: What MUSE and OpenUnlearning measure between two sets besides the usual attacks. (MUSE's PPL and
#: PPL/zlib order rows as ``mia_loss`` and ``mia_zlib`` do: the same areas.)
MORE_MEMBERSHIP = (
    *(
        _register(
            f"min_k_{percent}",
            partial(min_k_scores, k=percent / 100),
            f"by Min-{percent}% Prob (MUSE)",
            {"answer", "tokens"},
        )
        for percent in (5, 10, 20, 30, 50, 60)
    ),
    _register(
        "lower",
        lambda rows: rows.numbers("nll") / rows.numbers("lower_nll"),
        "by loss over that in lower case (MUSE's PPL/lower)",
        {"answer", "lower"},
    ),
    "rel_diff",
)


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
