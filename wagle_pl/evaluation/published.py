"""TOFU's numbers from result files, ours and the ones published with the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.measures import (
    MEASURES,
    Records,
    attempt,
    defined_only,
    option_probability,
)
from wagle_pl.evaluation.results import (
    OPTION_SETS,
    RESULT_KEYS,
    Result,
    Results,
    differing,
    from_result,
    pairs_of,
)
from wagle_pl.evaluation.suites import TOFU_MEASURES, UTILITY_SETS, model_utility


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
    """Means of one test set: ``probability``, ``rougeL_recall`` and ``truth_ratio`` (a score in
    [0, 1]).

    A measure that the rows do not allow (no perturbed answers, no generations) is left out.
    """
    rows = _records(result, name, form)
    makers = {each: MEASURES[each].compute for each in TOFU_MEASURES}
    if name in OPTION_SETS:
        makers["probability"] = option_probability
    return defined_only({each: attempt(make, rows) for each, make in makers.items()})


def truth_ratios(
    result: Result, name: str = "forget", form: F.TruthRatioForm = "geometric"
) -> Optional[Tensor]:
    """Truth ratio of every row of a test set, float64 (N,), in row order; None without perturbed
    answers."""
    try:
        return _records(result, name, form).truth_ratios()
    except Undefined:
        return None


def _records(result: Result, name: str, form: F.TruthRatioForm) -> Records:
    key = RESULT_KEYS.get(name, name)
    return Records(from_result({key: result[key]})[name], name == "forget", form)


def tofu_model_utility(result: Result, form: F.TruthRatioForm = "geometric") -> float:
    """Model utility: harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real
    authors and world facts (TOFU, section 2.2).

    Args:
        result: a TOFU result.
        form: of the truth ratio, see :func:`wagle_pl.evaluation.functional.truth_ratio`.

    Raises:
        WagleError: if one of the three sets or a measure is missing.
    """
    found: dict[str, float] = {}
    for name in UTILITY_SETS:
        if RESULT_KEYS[name] not in result:
            raise WagleError(
                f"model utility needs the test set {name!r}; the result has {sorted(result)}"
            )
        measures = tofu_measures(result, name, form)
        if len(measures) < len(TOFU_MEASURES):
            needed = ", ".join(TOFU_MEASURES)
            raise WagleError(f"model utility needs {needed}; {name} has {measures}")
        found |= {f"{name}/{each}": value for each, value in measures.items()}
    return model_utility(found)


def tofu_forget_quality(
    result: Result,
    retrained: Result,
    form: F.TruthRatioForm = "geometric",
    compare_rows: bool = True,
) -> float:
    """Forget quality: p-value of a Kolmogorov–Smirnov test between the forget rows' truth ratios of
    a model and of the retrained model (TOFU, section 2.2).

    Args:
        result: a TOFU result of the model.
        retrained: of the retrained model.
        form: of the truth ratio, see :func:`wagle_pl.evaluation.functional.truth_ratio`.
        compare_rows: refuse results on other questions and answers, in whatever order they are.
            False gives TOFU's own number: its script takes whatever forget rows each result holds.

    Raises:
        WagleError: if a side has no truth ratios, or the two hold other rows (with the number that
            differ).
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
        rows.append(pairs_of(from_result(side)["forget"]))
    if compare_rows and (count := differing(*rows)):
        raise WagleError(f"the retrained model's result is on other forget rows: {count} differ")
    return F.ks_test(*sides)[1]
