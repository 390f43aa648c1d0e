"""TOFU's measures over result files, ours and the ones published with the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.results import Results, differing, raw_rows
from wagle_pl.evaluation.sets import SetMeasures
from wagle_pl.evaluation.tofu_results import (
    OPTION_SETS,
    RESULT_KEYS,
    Result,
    from_result,
    to_result,
)

__all__ = [
    "OPTION_SETS",
    "RESULT_KEYS",
    "Result",
    "from_result",
    "load_result",
    "model_utility",
    "to_result",
    "tofu_forget_quality",
    "tofu_measures",
    "tofu_model_utility",
    "truth_ratios",
]

UTILITY_SETS = ("retain", "real_authors", "world_facts")
MEASURES = ("probability", "rougeL_recall", "truth_ratio")


def load_result(path: str | Path) -> Result:
    """Read a TOFU result file, or the one in a folder that ``wagle test`` wrote.

    Raises:
        WagleError: if there is none.
    """
    result = Results(path).tofu
    if result is None:
        raise WagleError(f"{path} holds no TOFU result")
    return result


def tofu_measures(
    result: Result, name: str, form: F.TruthRatioForm = "geometric"
) -> dict[str, float]:
    """The means of one test set: ``probability``, ``rougeL_recall`` and ``truth_ratio`` (a score in [0, 1]).

    A measure the rows do not allow (no perturbed answers, no generations) is left out.
    """
    key = RESULT_KEYS.get(name, name)
    found = SetMeasures(from_result({key: result[key]})[name], name == "forget", form)
    measures = {}
    for measure in MEASURES:
        method = (
            "option_probability" if measure == "probability" and name in OPTION_SETS else measure
        )
        try:
            measures[measure] = getattr(found, method)()
        except Undefined:
            continue
    return measures


def truth_ratios(
    result: Result, name: str = "forget", form: F.TruthRatioForm = "geometric"
) -> Optional[Tensor]:
    """Truth ratio of every row of a test set, float64 (N,), in row order; None without perturbed answers."""
    key = RESULT_KEYS.get(name, name)
    try:
        return SetMeasures(from_result({key: result[key]})[name], form=form).ratios()
    except Undefined:
        return None


def tofu_model_utility(result: Result, form: F.TruthRatioForm = "geometric") -> float:
    """Model utility: harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors and world
    facts (TOFU, section 2.2).

    Args:
        result: a TOFU result.
        form: of the truth ratio, see :func:`wagle_pl.evaluation.functional.truth_ratio`.

    Raises:
        WagleError: if one of the three sets or a measure is missing.
    """
    numbers: list[float] = []
    for name in UTILITY_SETS:
        if RESULT_KEYS[name] not in result:
            raise WagleError(
                f"model utility needs the test set {name!r}; the result has {sorted(result)}"
            )
        measures = tofu_measures(result, name, form)
        if len(measures) < len(MEASURES):
            raise WagleError(f"model utility needs {', '.join(MEASURES)}; {name} has {measures}")
        numbers += measures.values()
    return model_utility(numbers)


def model_utility(numbers: Sequence[float]) -> float:
    """Model utility of its nine numbers."""
    return F.harmonic_mean(torch.tensor(numbers, dtype=torch.float64)).item()


def tofu_forget_quality(
    result: Result,
    retrained: Result,
    form: F.TruthRatioForm = "geometric",
    compare_rows: bool = True,
) -> float:
    """Forget quality: p-value of a Kolmogorov–Smirnov test between the forget rows' truth ratios of a model and of
    the retrained model (TOFU, section 2.2).

    Args:
        result: a TOFU result of the model.
        retrained: of the retrained model.
        form: of the truth ratio, see :func:`wagle_pl.evaluation.functional.truth_ratio`.
        compare_rows: refuse results on other questions and answers, in whatever order they are. False gives TOFU's
            own number: its script takes whatever forget rows each result holds.

    Raises:
        WagleError: if a side has no truth ratios, or the two hold other rows (with the number that differ).
    """
    sides, rows = [], []
    for side, label in ((result, "this"), (retrained, "the retrained")):
        ratios = truth_ratios(side, "forget", form) if RESULT_KEYS["forget"] in side else None
        if ratios is None:
            raise WagleError(
                f"forget quality needs perturbed answers on the forget set; {label} result has none"
            )
        if compare_rows and not side[RESULT_KEYS["forget"]].get("generated_text"):
            raise WagleError(
                f"forget quality compares questions; {label} result does not hold its questions "
                "(generated_text)"
            )
        sides.append(ratios)
        rows.append(raw_rows(from_result(side)["forget"]))
    if compare_rows and (count := differing(*rows)):
        raise WagleError(f"the retrained model's result is on other forget rows: {count} differ")
    return F.ks_test(*sides)[1]
