"""TOFU's measures, OpenUnlearning's on top of them, and WAGLE's averages for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch

from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation import tofu
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.results import Results
from wagle_pl.evaluation.sets import MEMORISATION, SetMeasures, Table, Value, attempt
from wagle_pl.evaluation.suites import membership
from wagle_pl.evaluation.suites.base import Observations, Suite, defined, of_set
from wagle_pl.evaluation.suites.catalogue import Info

WAGLE_K = 0.2  # WAGLE's code reports Min-10% to Min-60%; this is the Min-K% paper's own choice


class TOFUSuite(Suite):
    """TOFU (arXiv 2401.06121) on ``forget``, ``retain``, ``real_authors`` and ``world_facts``.

    Model utility and forget quality are TOFU's, forget quality of the same questions on both sides (on request
    ``tofu/forget_quality`` beside it, of whatever rows the results hold, as TOFU's script has it); exact
    memorisation, extraction strength, membership inference and privacy leakage OpenUnlearning's (the last two
    against a test set ``holdout``). ``ue_average`` and ``ut_average`` are the averages of WAGLE's table 1 (arXiv
    2410.17509), whose parts are here as ``wagle/…``: UE of forget quality (as its code has it: the forget rows'
    truth ratios against the *retain rows'*, of the same model), membership inference (forget against retain rows),
    1 − forget accuracy and 1 − ROUGE-L; UT of accuracy and ROUGE-L on retain, real authors and world facts. With
    sentence embeddings the accuracies are WAGLE's own, otherwise by likelihood; with ``paraphrased`` observed,
    truth ratio and forget accuracy are asked with the paraphrased questions, as there.
    """

    sets = ("forget", *tofu.UTILITY_SETS)
    infos: ClassVar[Mapping[str, Info]] = {
        "tofu/forget_quality": Info(
            "p-value",
            "higher",
            "KS test of the forget rows' truth ratios against the retrained model's, whatever "
            "rows the two results hold: no questions are compared (TOFU's script)",
        ),
        "wagle/forget_quality": Info(
            "p-value",
            "higher",
            "KS test of forget against retain rows' truth ratios, this model (WAGLE's code)",
        ),
        "wagle/mia": Info(
            "AUC, 0 to 1",
            "higher",
            "Min-20% of question and answer: forget rows taken for unseen, retain rows not (WAGLE)",
        ),
        "wagle/forget_accuracy": Info(
            "share, 0 to 1", "lower", "right answer the nearest option, forget rows (WAGLE)"
        ),
        "wagle/retain_accuracy": Info(
            "share, 0 to 1", "higher", "right answer the nearest option, retain rows (WAGLE)"
        ),
    }

    def needs_of(self, name: str, names: Collection[str]) -> frozenset[str]:
        """Whole texts of forget and retain rows for WAGLE's attack, statistics of the vocabulary for the others."""
        needs = {"answer", "alternatives", "generation"}
        if name not in tofu.OPTION_SETS:
            needs |= {"tokens"}
        if name in ("forget", "retain"):
            needs |= {"text"}
        if "holdout" in names and name in ("forget", "holdout"):
            needs |= membership.NEEDS
        return frozenset(needs)

    def measures(self, seen: Observations) -> dict[str, Value]:
        """See :class:`TOFUSuite`."""
        found: dict[str, Value] = {}
        for name in seen.tables:
            found |= self._of_set(seen, name)
        parts = [f"{name}/{measure}" for name in tofu.UTILITY_SETS for measure in tofu.MEASURES]
        found["model_utility"] = attempt(lambda: tofu.model_utility(defined(found, *parts)))
        if "forget" in seen.tables:
            found["forget_quality"] = attempt(_forget_quality, seen)
            if seen.tofu_retrained is not None:
                found["tofu/forget_quality"] = attempt(
                    _tofu_forget_quality, seen, seen.tofu_retrained
                )
            if "holdout" in seen.tables:
                found |= membership.measures(seen, "forget", "holdout")
            found |= self._wagle(seen, found)
        return found

    def _of_set(self, seen: Observations, name: str) -> dict[str, Value]:
        if name in tofu.OPTION_SETS:
            found = of_set(self, seen, name, (*tofu.MEASURES, "contains_answer"))
            options = SetMeasures(seen.table(name)).option_probability
            return {**found, f"{name}/probability": attempt(options)}
        if not any(
            record.get("nll") is not None and record["question"] for record in seen.tables[name]
        ):
            return of_set(self, seen, name)  # a corpus, or multiple choice
        accuracy = ("accuracy", "nearest_answer") if _embedded(seen, name) else ("accuracy",)
        return of_set(
            self,
            seen,
            name,
            (*tofu.MEASURES, "truth_probability", *MEMORISATION, *accuracy, "degenerate"),
        )

    def _wagle(self, seen: Observations, found: dict[str, Value]) -> dict[str, Value]:
        """The parts of WAGLE's averages that are not measured already, and the averages."""
        parts: dict[str, Value] = {
            "wagle/forget_quality": attempt(_wagle_forget_quality, seen),
            "wagle/mia": attempt(_wagle_mia, seen),
            "wagle/forget_accuracy": attempt(_wagle_accuracy, seen, "forget"),
            "wagle/retain_accuracy": attempt(_wagle_accuracy, seen, "retain"),
        }
        known = found | parts

        def efficacy() -> float:
            forgotten = defined(known, "wagle/forget_quality", "wagle/mia")
            return F.unlearning_efficacy(
                forgotten, defined(known, "wagle/forget_accuracy", "forget/rougeL_recall")
            )

        def utility() -> float:
            names = ["wagle/retain_accuracy", "retain/rougeL_recall"]
            for name in tofu.OPTION_SETS:
                names += [f"{name}/contains_answer", f"{name}/rougeL_recall"]
            return F.mean(torch.tensor(defined(known, *names), dtype=torch.float64))

        return parts | {"ue_average": attempt(efficacy), "ut_average": attempt(utility)}


def _forget_quality(seen: Observations) -> float:
    if seen.retrained is None:
        raise Undefined("it compares with the retrained model: give --model.retrained")
    here = seen.table("forget")
    return _same_distribution(seen, here, seen.retrained.beside("forget", here))


def _tofu_forget_quality(seen: Observations, retrained: Results) -> float:
    return _same_distribution(seen, seen.table("forget"), retrained.table("forget"))


def _same_distribution(seen: Observations, *sides: Table) -> float:
    return F.ks_test(*(SetMeasures(table, form=seen.truth_ratio_form).ratios() for table in sides))[
        1
    ]


def _embedded(seen: Observations, name: str) -> bool:
    return any(record.get("nearest_answer") is not None for record in seen.tables[name])


def _as_wagle_asks(seen: Observations, name: str) -> list[dict[str, Any]]:
    """A set's records with the answers to the paraphrased questions, where those were asked."""
    prefix = "paraphrased_question_"
    return [
        record
        | {
            key.removeprefix(prefix): value
            for key, value in record.items()
            if key.startswith(prefix)
        }
        for record in seen.table(name)
    ]


def _wagle_forget_quality(seen: Observations) -> float:
    tables = (_as_wagle_asks(seen, name) for name in ("forget", "retain"))
    return F.ks_test(*(SetMeasures(table, form="arithmetic").ratios() for table in tables))[1]


def _wagle_mia(seen: Observations) -> float:
    sides = []
    for name in ("retain", "forget"):
        rows = SetMeasures(seen.table(name)).column(
            "text_logprobs", "log-probabilities of question and answer"
        )
        sides.append(
            torch.tensor([F.min_k(torch.tensor(row), WAGLE_K) for row in rows], dtype=torch.float64)
        )
    return F.membership_auc(*sides)


def _wagle_accuracy(seen: Observations, name: str) -> float:
    found = SetMeasures(_as_wagle_asks(seen, name))
    return found.nearest_answer() if _embedded(seen, name) else found.accuracy()
