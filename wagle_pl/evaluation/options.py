"""Options of a test, and :class:`Plan`: what a test does, before there is a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, Optional, Union

from wagle_pl.core.errors import WagleError, check_counts
from wagle_pl.core.schema import check_arguments
from wagle_pl.data.example import Example
from wagle_pl.evaluation import classifiers, results
from wagle_pl.evaluation.attacks.attack import Attack, find_attacks
from wagle_pl.evaluation.observe import GENERATED, NEEDS
from wagle_pl.evaluation.records import Observations, Value
from wagle_pl.evaluation.results import Results
from wagle_pl.evaluation.suites import Suite, find_suite, more_of_openunlearning
from wagle_pl.evaluation.tofu_result import Table

log = logging.getLogger(__name__)

#: Options that name results to compare with.
COMPARED = ("retrained", "target", "reference", "tofu_retrained")


@dataclass(frozen=True)
class Options:
    """Options of a test or a validation.

    Args:
        suite: ``tofu``, ``muse``, ``wmdp``, ``copyright``, ``detox``, ``knowundo``, ``lume``,
            ``rwku``, ``generic`` or the class path of a
            :class:`~wagle_pl.evaluation.suites.Suite`; the data module's own when None.
        retrained: results of the model retrained without the forget set, on the same rows and
            prompts: a test's folder or ``metrics.json``, a model's folder with a test in it, or a
            result file published with TOFU or written by OpenUnlearning (``TOFU_EVAL.json``).
        target: results of the model before unlearning, in the same forms; shown for comparison.
        reference: results of a reference model, in the same forms, for the reference attack of
            membership inference.
        tofu_retrained: results of the retrained model, in the same forms, on any forget rows, for
            ``tofu/forget_quality``: TOFU's script does not compare the questions.
        truth_ratio_form: ``geometric`` (TOFU's script) or ``arithmetic`` (its paper).
        format: ``openunlearning`` also computes OpenUnlearning's measures, takes its form of the
            truth ratio (and so its forget quality and utility), and writes its ``TOFU_EVAL.json``
            and ``TOFU_SUMMARY.json`` or MUSE's.
        generate: also generate answers; False saves most of the time but leaves out their measures.
        val_generate: also generate answers in validation.
        max_new_tokens: longest generation, unless the benchmark sets it; a book's continuations are
            generated at least to their own length.
        paraphrased_questions: also ask forget and retain rows with their ``paraphrased_question``,
            as WAGLE's code does for its forget quality and accuracy on TOFU.
        toxicity_classifier: folder or hub id of a text classifier that reads the generations, such
            as ``unitary/toxic-bert``.
        gibberish_classifier: folder or hub id of a text classifier whose first label is clean text,
            such as ``madhurjindal/autonlp-Gibberish-Detector-492513457``; reads the answers
            generated for forget rows.
        sentence_model: folder or hub id of a sentence-transformers model for accuracies by the
            nearest answer, such as WAGLE's ``paraphrase-MiniLM-L6-v2``; by likelihood when None.
        gradient_norm: record gradient norms for membership inference; one backward pass per row.
        robustness: attacks after the test, see :mod:`wagle_pl.evaluation.attacks`, also on
            ``target`` and ``retrained`` if they are models: ``all``, or a list of ``Relearn``,
            ``Quantise``, ``Paraphrase``, ``Sample``, ``Probe`` or class paths, each with its options
            if any. Written to ``robustness.json``.
        bootstrap: number of bootstrap samples of each set's rows, for 95 % intervals of measures
            in ``metrics.info.json``.
        lm_eval: tasks of lm-evaluation-harness (an extra) for general ability, e.g. ``[mmlu,
            arc_easy]``, or folders with task YAMLs.
        lm_eval_shots: number of few-shot examples in these tasks; each task's own when None.
        lm_eval_limit: use only this many rows of each of these tasks, from the start.
    """

    suite: Optional[str] = None
    retrained: Optional[str] = None
    target: Optional[str] = None
    reference: Optional[str] = None
    tofu_retrained: Optional[str] = None
    truth_ratio_form: Literal["geometric", "arithmetic"] = "geometric"
    format: Literal["wagle", "openunlearning"] = "wagle"
    generate: bool = True
    val_generate: bool = False
    max_new_tokens: int = 200
    paraphrased_questions: bool = False
    toxicity_classifier: Optional[str] = None
    gibberish_classifier: Optional[str] = None
    sentence_model: Optional[str] = None
    gradient_norm: bool = False
    robustness: Optional[Union[bool, str, list[Union[Attack, str]]]] = None
    bootstrap: int = 0
    lm_eval: Optional[Union[str, list[str]]] = None
    lm_eval_shots: Optional[int] = None
    lm_eval_limit: Optional[int] = None

    def __post_init__(self) -> None:
        of_attacks = {"robustness"}  # which may be mappings
        plain = {name: value for name, value in vars(self).items() if name not in of_attacks}
        check_arguments(Options.__init__, plain, "")
        check_counts("", max_new_tokens=self.max_new_tokens, bootstrap=self.bootstrap or None)
        find_attacks(self.robustness)

    @property
    def compared(self) -> dict[str, str]:
        """Each option that names results to compare with -> its value."""
        return {name: str(value) for name in COMPARED if (value := getattr(self, name)) is not None}


@dataclass(eq=False)
class Plan:
    """Test sets, what is observed of their rows, and what is measured of the records.

    Raises:
        WagleError: for options that the data do not allow, and for results of other rows.
    """

    data: Any  # a ForgetRetainDataModule
    options: Options
    names: Sequence[str]  # of the test sets
    prefix: str = ""  # of the options' names in messages, such as ``model.``
    suite_given: InitVar[Union[Suite, str, None]] = None  # in place of the option
    results: dict[str, Results] = field(default_factory=dict)  # option -> results to compare with
    general: dict[str, float] = field(default_factory=dict)  # general ability: task -> accuracy

    def __post_init__(self, suite_given: Union[Suite, str, None]) -> None:
        named = suite_given or self.options.suite or getattr(self.data, "suite", "tofu")
        self.suite = find_suite(named or "generic")
        self.attacks, self.every_attack = find_attacks(self.options.robustness)
        self._longest: dict[str, int] = {}  # recited test set -> its longest answer in tokens
        for name, path in self.options.compared.items():
            folder = results.results_of(path)
            if folder is not None or not self.attacks:  # attacks only need the model
                self.results[name] = Results.read(folder or path, f"{self.prefix}{name}")
        results.check_prompts(self.results, self.prompts)
        self._check_options()
        self._check_needs()
        for name in self.names:
            rows = [(row.question, row.answer) for row in self.rows(name)]
            results.check_rows(self.results, name, rows, f"{self.prefix}tofu_retrained")

    def _check_options(self) -> None:
        """Refuse what the suite does not use, and folders of models that do not exist."""
        for option in ("toxicity_classifier", "gibberish_classifier", "sentence_model"):
            if (folder := getattr(self.options, option)) is not None:
                classifiers.check_folder(folder, f"{self.prefix}{option}")
        option, suites = None, "suites tofu and muse"
        if "tofu_retrained" in self.results and self.suite.openunlearning != "TOFU":
            option, suites = "tofu_retrained", "suite tofu"
        elif self.options.format != "wagle" and self.suite.openunlearning is None:
            option = f"format {self.options.format}"
        if option:
            suite = type(self.suite).__name__
            why = f"it is for the {suites}, the suite is {suite}: leave it out"
            raise WagleError(why, f"{self.prefix}{option}")

    def _check_needs(self) -> None:
        """Refuse a suite that needs something of a test set that nothing observes."""
        suite = f"suite {type(self.suite).__name__}"
        for name in self.names:
            if unknown := sorted(set(self.suite.needs_of(name, self.names)) - NEEDS):
                needed = f"{suite} needs {', '.join(map(repr, unknown))} of the test set {name}"
                hint = f"choose of {', '.join(sorted(NEEDS))}"
                raise WagleError(f"{needed}, which nothing observes", hint=hint)

    @property
    def prompts(self) -> dict[str, Any]:
        """The texts around questions and answers; empty if the data have no template."""
        template = getattr(self.data, "template", None)
        return {} if template is None else template.prompts

    def rows(self, name: str) -> list[Example]:
        """Rows of a test set."""
        return self.data.test_examples(name)

    def needs_of(self, name: str) -> frozenset[str]:
        """What to observe of a test set: what the suite needs, as far as the options allow."""
        options, needs = self.options, set(self.suite.needs_of(name, self.names))
        asked_again = options.paraphrased_questions and name in ("forget", "retain")
        needs |= {"paraphrased"} if asked_again and "alternatives" in needs else set()
        if options.format == "openunlearning" and "generation" in needs:
            needs.add("recalls")
        if "vocabulary" in needs:
            needs |= {"gradient"} if options.gradient_norm else set()
            needs |= (
                {"lower"} if options.format != "wagle" and name in self.suite.members else set()
            )
        return frozenset(needs if options.generate else needs - GENERATED)

    def max_new_tokens_of(self, name: str) -> int:
        """The longest generation for a test set: the benchmark's, or ``max_new_tokens``; for a
        recited set, its longest answer's length (at most ``data.max_length``) if that is more."""
        suite_set = self.suite.set_of(name)
        fixed = suite_set.max_new_tokens or self.options.max_new_tokens
        if not suite_set.recited:
            return fixed
        if name not in self._longest:
            answers = [row.answer for row in self.rows(name)]
            tokens = self.data.tokenizer(answers, add_special_tokens=False)["input_ids"]
            self._longest[name] = min(max(map(len, tokens)), self.data.max_length)
        return max(fixed, self._longest[name])

    def asked(self, name: str) -> dict[str, Any]:
        """How the rows of a test set are asked, as arguments of :meth:`Observer.observe`."""
        suite_set, length = self.suite.set_of(name), self.max_new_tokens_of(name)
        return {"max_new_tokens": length, "header": suite_set.header, "stops": suite_set.stops}

    def observations(self, tables: Mapping[str, Table]) -> Observations:
        """Records by test set, with what they are compared with."""
        form = self.options.truth_ratio_form
        return Observations(
            tables,
            truth_ratio_form="openunlearning" if self.options.format == "openunlearning" else form,
            general=self.general,
            corpus=getattr(self.data, "corpus", None),
            **{name: self.results.get(name) for name in COMPARED if name != "target"},
        )

    def measures(self, tables: Mapping[str, Table]) -> dict[str, Value]:
        """The suite's measures of some records; an Undefined where there is no number."""
        observations = self.observations(tables)
        values = self.suite.measures(observations)
        for name, table in tables.items():
            if any(record.get("not_gibberish") is not None for record in table):
                values |= self.suite.of_set(observations, name, ["not_gibberish"])
        if self.options.format == "openunlearning":
            values |= more_of_openunlearning(self.suite, observations)
        return values
