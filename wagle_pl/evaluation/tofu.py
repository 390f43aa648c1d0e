"""TOFU's suite with the averages of WAGLE's tables, and TOFU's numbers from result files."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.measures import MEMORISATION, option_probability
from wagle_pl.evaluation.membership import MEMBERSHIP_NEEDS, membership, min_k_scores
from wagle_pl.evaluation.records import (
    MEASURES,
    Observations,
    Records,
    Value,
    attempt,
    defined,
    measure,
    needs_of,
)
from wagle_pl.evaluation.results import differing, pairs_of
from wagle_pl.evaluation.suite import Averages, Suite, SuiteSet
from wagle_pl.evaluation.tofu_result import OPTION_SETS, Result, Table, from_result

UTILITY_SETS = ("retain", *OPTION_SETS)
TOFU_MEASURES = ("probability", "rougeL_recall", "truth_ratio")
WAGLE_K = 0.2  # WAGLE's code has Min-10% to Min-60%; this is the Min-K% paper's own choice


class TOFUSuite(Averages):
    """TOFU (arXiv 2401.06121) on ``forget``, ``retain``, ``real_authors`` and ``world_facts``.

    Model utility and forget quality are TOFU's, where forget quality needs the same questions on
    both sides (on request also ``tofu/forget_quality``, on whatever rows the results hold, as in
    TOFU's script). Exact memorisation, extraction strength, membership inference and privacy
    leakage are OpenUnlearning's (the last two against a test set ``holdout``). ``ue_average`` and
    ``ut_average`` are the averages of WAGLE's table 1 (arXiv 2410.17509), whose parts are here as
    ``wagle/…``: UE of forget quality (as in its code: the forget rows' truth ratios against the
    *retain rows'*, of the same model), membership inference (forget against retain rows),
    1 − forget accuracy and 1 − ROUGE-L; UT of accuracy and ROUGE-L on retain, real authors and
    world facts. With sentence embeddings the accuracies are WAGLE's own, otherwise by likelihood;
    if ``paraphrased`` is observed, truth ratio and forget accuracy are those of the paraphrased
    questions, as in WAGLE's code.
    """

    sets: ClassVar[Mapping[str, SuiteSet]] = dict.fromkeys(("forget", *UTILITY_SETS), SuiteSet())
    openunlearning = "TOFU"
    asked = (*TOFU_MEASURES, "truth_probability", *MEMORISATION, "accuracy")
    with_options = (*TOFU_MEASURES, "contains_answer")

    def needs_of(self, name: str, names: Collection[str]) -> frozenset[str]:
        needs = needs_of(self.with_options if name in OPTION_SETS else self.asked)
        if name in ("forget", "retain"):
            needs |= {"text"}  # for WAGLE's attack
        if "holdout" in names and name in ("forget", "holdout"):
            needs |= MEMBERSHIP_NEEDS
        return needs

    def measures(self, seen: Observations) -> dict[str, Value]:
        values = Suite.measures(self, seen)  # the averages include what follows
        values["model_utility"] = attempt(model_utility, values)
        if "forget" in seen.tables:
            values["forget_quality"] = attempt(forget_quality, seen)
            if seen.tofu_retrained is not None:
                values["tofu/forget_quality"] = attempt(_tofu_forget_quality, seen)
            if "holdout" in seen.tables:
                values |= membership(seen, "forget", "holdout")
            for name in ("forget_quality", "mia", "forget_accuracy", "retain_accuracy"):
                values[f"wagle/{name}"] = attempt(MEASURES[f"wagle/{name}"].compute, seen)
            values |= self.averages(seen, values)
        return values

    def listed(self, seen: Observations, name: str) -> Sequence[str]:
        if name in OPTION_SETS:
            return self.with_options
        table = seen.tables[name]
        if not any(record.get("nll") is not None and record["question"] for record in table):
            return super().listed(seen, name)  # a corpus, or multiple choice
        nearest = ("nearest_answer",) if seen.records(name).has("nearest_answer") else ()
        return (*self.asked, *nearest, "degenerate")

    def of_set(self, seen: Observations, name: str, measures: Sequence[str]) -> dict[str, Value]:
        values = super().of_set(seen, name, measures)
        if name in OPTION_SETS:
            values[f"{name}/probability"] = attempt(option_probability, seen.records(name))
        return values

    def efficacy(self, seen: Observations, values: Mapping[str, Value]) -> float:
        forgotten = defined(values, "wagle/forget_quality", "wagle/mia")
        known = defined(values, "wagle/forget_accuracy", "forget/rougeL_recall")
        return F.unlearning_efficacy(forgotten, known)

    def utility(self, seen: Observations, values: Mapping[str, Value]) -> float:
        names = ["wagle/retain_accuracy", "retain/rougeL_recall"]
        for name in OPTION_SETS:
            names += [f"{name}/contains_answer", f"{name}/rougeL_recall"]
        return F.mean(torch.tensor(defined(values, *names), dtype=torch.float64))


@measure("score, 0 to 1", "higher")
def model_utility(values: Mapping[str, Value]) -> float:
    """Harmonic mean of nine measures on rows to keep (TOFU)."""
    names = [f"{name}/{short}" for name in UTILITY_SETS for short in TOFU_MEASURES]
    return statistics.harmonic_mean(defined(values, *names))


@measure("p-value", "higher")
def forget_quality(seen: Observations) -> float:
    """KS test of the forget rows' truth ratios against the retrained model's (TOFU)."""
    if seen.retrained is None:
        raise Undefined("it compares with the retrained model: give --model.retrained")
    table = seen.table("forget")
    return _same_ratios(seen, table, seen.retrained.beside("forget", table))


@measure("p-value", "higher", name="tofu/forget_quality")
def _tofu_forget_quality(seen: Observations) -> float:
    """KS test of the forget rows' truth ratios against the retrained model's, whatever rows the two
    results hold: no questions are compared (TOFU's script)."""
    return _same_ratios(seen, seen.table("forget"), seen.tofu_retrained.table("forget"))


def _same_ratios(seen: Observations, *sides: Table) -> float:
    ratios = (Records(table, form=seen.truth_ratio_form).truth_ratios() for table in sides)
    return F.ks_test(*ratios)[1]


@measure("p-value", "higher", name="wagle/forget_quality")
def _wagle_forget_quality(seen: Observations) -> float:
    """KS test of forget against retain rows' truth ratios, this model (WAGLE's code)."""
    sides = (_paraphrased(seen, name) for name in ("forget", "retain"))
    return F.ks_test(*(rows.truth_ratios() for rows in sides))[1]


@measure("AUC, 0 to 1", "higher", name="wagle/mia")
def _wagle_mia(seen: Observations) -> float:
    """Min-20% of question and answer, retain rows as members, forget rows as not (WAGLE)."""
    sides = (seen.records(name) for name in ("retain", "forget"))
    return F.membership_auc(*(min_k_scores(rows, WAGLE_K, "text_logprobs") for rows in sides))


@measure("share, 0 to 1", "lower", name="wagle/forget_accuracy")
def _wagle_accuracy(seen: Observations, name: str = "forget") -> float:
    """Right answer is the nearest option, forget rows (WAGLE)."""
    embedded = seen.records(name).has("nearest_answer")
    accuracy = MEASURES["nearest_answer" if embedded else "accuracy"]
    return accuracy.compute(_paraphrased(seen, name))


@measure("share, 0 to 1", "higher", name="wagle/retain_accuracy")
def _wagle_retain_accuracy(seen: Observations) -> float:
    """Right answer is the nearest option, retain rows (WAGLE)."""
    return _wagle_accuracy(seen, "retain")


def _paraphrased(seen: Observations, name: str) -> Records:
    """A set's records with the answers to the paraphrased questions, where those were asked."""
    prefix = "paraphrased_question_"
    table = [
        record | {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
        for record in seen.table(name)
    ]
    return Records(table, form="arithmetic")


# -- TOFU's numbers from result files, ours and the ones published with the benchmark -------------


def tofu_model_utility(result: Result, form: F.TruthRatioForm = "geometric") -> float:
    """Model utility: harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real
    authors and world facts (TOFU, section 2.2); a WagleError says which is missing."""
    seen = Observations(from_result(result), truth_ratio_form=form)
    utility = TOFUSuite().measures(seen)["model_utility"]
    if isinstance(utility, Undefined):
        raise WagleError(f"model utility is undefined: {utility}")
    return utility


def tofu_forget_quality(
    result: Result,
    retrained: Result,
    form: F.TruthRatioForm = "geometric",
    compare_rows: bool = True,
) -> float:
    """Forget quality: p-value of a Kolmogorov–Smirnov test between the forget rows' truth ratios of
    a model and of the retrained model (TOFU, section 2.2).

    ``compare_rows`` refuses results on other questions and answers; their order does not matter.
    Without it, this is TOFU's own number: its script takes whatever forget rows each result holds.
    """
    tables = [from_result(side).get("forget", []) for side in (result, retrained)]
    try:
        ratios = [Records(table, form=form).truth_ratios() for table in tables]
    except Undefined as error:
        why = "forget quality needs perturbed answers on both models' forget sets"
        raise WagleError(f"{why}: {error}") from None
    pairs = [pairs_of(table) for table in tables]
    if compare_rows and not all(question for rows in pairs for question, _ in rows):
        why = "a result does not hold its questions (generated_text)"
        raise WagleError(f"forget quality compares questions; {why}")
    if compare_rows and (count := differing(*pairs)):
        raise WagleError(f"the retrained model's result is on other forget rows: {count} differ")
    return F.ks_test(*ratios)[1]
