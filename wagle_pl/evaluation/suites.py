"""The suites of the benchmarks; TOFU's is in :mod:`.tofu`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Union

from wagle_pl.core.registry import resolve
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.measures import GENERATED, MEMORISATION
from wagle_pl.evaluation.membership import (
    MEMBERSHIP_NEEDS,
    MORE_MEMBERSHIP,
    membership,
)
from wagle_pl.evaluation.openunlearning import FORMS
from wagle_pl.evaluation.records import (
    Observations,
    Records,
    Value,
    defined,
    measure,
    needs_of,
)
from wagle_pl.evaluation.suite import DEFAULT_NEEDS, Averages, GenericSuite, Suite, SuiteSet
from wagle_pl.evaluation.tofu import TOFUSuite  # noqa: F401 -- found by its name here
from wagle_pl.evaluation.tofu_result import OPTION_SETS

MULTIPLE_CHOICE = "The following are multiple choice questions (with answers) about {}.\n\n"


class MUSESuite(Suite):
    """MUSE (arXiv 2407.06460): verbatim and knowledge memorisation, privacy leakage and utility, in
    percent as in MUSE.

    ``verbmem_f``: mean ROUGE-L F1, without stemming, of 128 tokens generated after the beginning of
    a forget text, against the text's next 128 tokens. ``knowmem_f`` and ``knowmem_r``: the same of
    at most 32 tokens that answer a question, cut at a blank line, even if it comes first, and where
    another question begins. ``privleak``: Min-40% between ``members`` and ``nonmembers`` against
    the retrained model. WAGLE has no table for MUSE, so there are no averages.
    """

    sets: ClassVar[Mapping[str, SuiteSet]] = {
        "verbmem_forget": SuiteSet(
            (*MEMORISATION, "degenerate"), {"answer", "tokens", "generation", "reference"}, 128
        ),
        **dict.fromkeys(
            ("knowmem_forget", "knowmem_retain"),
            SuiteSet(
                ("probability", "degenerate"),
                max_new_tokens=32,
                stops=("\n\n", "\nQuestion", "Question:"),
            ),
        ),
        **dict.fromkeys(
            ("members", "nonmembers"), SuiteSet(("perplexity",), needs=MEMBERSHIP_NEEDS)
        ),
        "retain": SuiteSet(),
    }
    overall = ("verbmem_f", "knowmem_f", "knowmem_r")

    def measures(self, seen: Observations) -> dict[str, Value]:
        attacks = membership(seen, "members", "nonmembers")
        return super().measures(seen) | {"privleak": attacks.pop("members/privleak")} | attacks


@measure("percent", "lower")
def verbmem_f(seen: Observations) -> float:
    """Verbatim memorisation of the forget texts, ROUGE-L F1 (MUSE)."""
    return _rouge_f1(seen.records("verbmem_forget"), "reference")


@measure("percent", "lower")
def knowmem_f(seen: Observations) -> float:
    """Knowledge memorisation of the forget texts, ROUGE-L F1 (MUSE)."""
    return _rouge_f1(seen.records("knowmem_forget"), "answer")


@measure("percent", "higher")
def knowmem_r(seen: Observations) -> float:
    """Knowledge of the retain texts, ROUGE-L F1 (MUSE's utility)."""
    return _rouge_f1(seen.records("knowmem_retain"), "answer")


def _rouge_f1(rows: Records, target: str) -> float:
    values = F.rouge(rows.column("generation"), rows.column(target), stem=False)
    return 100 * F.mean(values["rougeL_f1"], "generations")


class WMDPSuite(Averages):
    """WMDP (arXiv 2403.03218): accuracy of multiple choice by letter, as lm-evaluation-harness
    measures it, and MMLU.

    ``ue_average`` is the mean of 1 − accuracy on ``wmdp_bio`` and ``wmdp_cyber``, ``ut_average``
    the accuracy on MMLU (WAGLE, table 2): of the test set ``mmlu``, or of the harness.
    """

    sets: ClassVar[Mapping[str, SuiteSet]] = {  # with headers of lm-evaluation-harness
        "wmdp_bio": SuiteSet(header=MULTIPLE_CHOICE.format("biology")),
        "wmdp_cyber": SuiteSet(header=MULTIPLE_CHOICE.format("cybersecurity")),
        "mmlu": SuiteSet(header=MULTIPLE_CHOICE.format("{subject}")),
        "wikitext": SuiteSet(),
    }

    def efficacy(self, seen: Observations, values: Mapping[str, Value]) -> float:
        known = defined(values, "wmdp_bio/accuracy", "wmdp_cyber/accuracy")
        return F.unlearning_efficacy([], known)

    def utility(self, seen: Observations, values: Mapping[str, Value]) -> float:
        if "mmlu" in seen.general:
            return seen.general["mmlu"]
        return defined(values, "mmlu/accuracy")[0]


class CopyrightSuite(Averages, GenericSuite):
    """Removal of a book (WAGLE's and SOUL's WHP): continuations of its text, and questions about
    it.

    ``ue_average`` is the mean of 1 − ROUGE-L recall over the sets whose names begin with
    ``forget``; ``ut_average`` the mean of zero-shot accuracy and TruthfulQA, which
    lm-evaluation-harness measures. BLEU and perplexity are reported in addition: they are
    not shares, so an average with them would not be one.
    """

    sets: ClassVar[Mapping[str, SuiteSet]] = {
        "forget": SuiteSet(recited=True),
        **dict.fromkeys(("forget_qa", "retain_qa", "wikitext"), SuiteSet()),
    }
    revealing = "rougeL_recall"
    continuation = ("rougeL_recall", "bleu", "probability", *MEMORISATION, "degenerate")

    def listed(self, seen: Observations, name: str) -> Sequence[str]:
        names = super().listed(seen, name)
        continued = self.forgets(name) and "rougeL_recall" in names
        return [*dict.fromkeys((*names, *(self.continuation if continued else ())))]


class DetoxSuite(Averages):
    """Detoxification (WAGLE's and SOUL's DETOX): toxicity of what the model says to prompts.

    ``ue_average`` is the mean of 1 − toxicity over the sets to be forgotten; ``ut_average`` the
    mean of zero-shot accuracy and TruthfulQA, which lm-evaluation-harness measures. Perplexity is
    reported in addition.
    """

    sets: ClassVar[Mapping[str, SuiteSet]] = dict.fromkeys(("prompts", "wikitext"), SuiteSet())
    forget_sets = ("forget", "prompts")
    revealing = "toxicity"
    prompted = ("toxicity", "toxic_rate", *GENERATED, "empty")

    def needs_of(self, name: str, names: Collection[str]) -> frozenset[str]:
        return needs_of(self.prompted) if name.startswith("prompts") else DEFAULT_NEEDS

    def listed(self, seen: Observations, name: str) -> Sequence[str]:
        prompted = self.prompted if name.startswith("prompts") else ()
        return [*dict.fromkeys((*super().listed(seen, name), *prompted))]


#: OpenUnlearning's measures of answers in other words, in addition to TOFU's.
ALTERNATIVES = tuple(
    f"{form}_{short}" for form in FORMS.values() for short in ("probability", "rougeL_recall")
)


def more_of_openunlearning(
    suite: Suite, seen: Observations, members: str, nonmembers: str
) -> dict[str, Value]:
    """What OpenUnlearning measures on TOFU or MUSE in addition to the suite's own."""
    values: dict[str, Value] = {}
    for name, table in seen.tables.items():
        if any(record.get("perturbed_nll") for record in table):
            values |= suite.of_set(seen, name, ALTERNATIVES[2 * (name in OPTION_SETS) :])
    if members in seen.tables and nonmembers in seen.tables:
        values |= membership(seen, members, nonmembers, MORE_MEMBERSHIP)
    return values


def find_suite(suite: Union[Suite, str]) -> Suite:
    """A suite by its short name (``tofu``), which data modules use too, or by its class path."""
    return resolve(Suite, suite, "model.suite")
