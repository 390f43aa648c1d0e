"""Membership inference between two test sets: which of them did the model see?"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.results import Results
from wagle_pl.evaluation.sets import SetMeasures, Table, Value, attempt
from wagle_pl.evaluation.suites.base import Observations

K = 0.4  # MUSE reports Min-40%; OpenUnlearning takes 0.4 for its Min-K attacks
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradnorm")
NEEDS = frozenset({"answer", "tokens", "vocabulary"})


def scores(table: Table, attack: str, reference: Optional[Table] = None) -> Tensor:
    """The attack's score of every row, float64 (N,); low for a member.

    Args:
        table: records of a test set.
        attack: one of :data:`ATTACKS`.
        reference: a reference model's records of the same rows, for ``reference``.

    Raises:
        Undefined: if the records lack what the attack needs.
    """
    found = SetMeasures(table)
    if attack == "loss":
        return found.nll()
    if attack == "zlib":
        pairs = zip(found.nll().tolist(), found.texts_scored(), strict=True)
        return torch.tensor([F.zlib_ratio(nll, text) for nll, text in pairs], dtype=torch.float64)
    if attack == "reference":
        if reference is None:
            raise Undefined("it needs the results of a reference model: give --model.reference")
        return found.nll() - SetMeasures(reference).nll()
    if attack == "gradnorm":
        return found.numbers("gradient_norm", "gradient norms (--model.gradient_norm true)")
    logprobs = [
        torch.tensor(row) for row in found.column("logprobs", "log-probabilities of tokens")
    ]
    if attack == "min_k":
        return torch.tensor([F.min_k(row, K) for row in logprobs], dtype=torch.float64)
    columns = [
        found.column(f"vocabulary_{name}", "statistics of the vocabulary")
        for name in ("mean", "std")
    ]
    rows = [[torch.tensor(row) for row in column] for column in columns]
    return torch.tensor(
        [F.min_k_plus_plus(*row, K) for row in zip(logprobs, *rows, strict=True)],
        dtype=torch.float64,
    )


def auc(seen: Observations, members: str, nonmembers: str, attack: str) -> float:
    """Area under the ROC curve of an attack between two test sets.

    Raises:
        Undefined: if a set is missing, or its records lack what the attack needs.
    """
    sides = []
    for name in (members, nonmembers):
        table = seen.table(name)
        reference = (
            seen.reference.beside(name, table) if attack == "reference" and seen.reference else None
        )
        sides.append(scores(table, attack, reference))
    return F.membership_auc(*sides)


def privacy_leakage(seen: Observations, members: str, nonmembers: str) -> float:
    """MUSE's PrivLeak by Min-40%, against the retrained model's records or its reported area.

    Raises:
        Undefined: without them.
    """
    here = auc(seen, members, nonmembers, "min_k")
    return F.privacy_leakage(here, _retrained_auc(seen.retrained, members, nonmembers))


def _retrained_auc(retrained: Optional[Results], members: str, nonmembers: str) -> float:
    if retrained is None:
        raise Undefined("it compares with the retrained model: give --model.retrained")
    reported = retrained.metrics.get(f"{members}/mia_min_k")
    if reported is not None:
        return reported
    return auc(Observations(retrained.tables), members, nonmembers, "min_k")


def measures(seen: Observations, members: str, nonmembers: str) -> dict[str, Value]:
    """All attacks between two test sets, ``<members>/mia_<attack>``, and privacy leakage, ``<members>/privleak``."""
    found: dict[str, Value] = {
        f"{members}/mia_{attack}": attempt(auc, seen, members, nonmembers, attack)
        for attack in ATTACKS
    }
    found[f"{members}/privleak"] = attempt(privacy_leakage, seen, members, nonmembers)
    return found
