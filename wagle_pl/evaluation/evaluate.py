"""``Evaluate``: the test and validation loops of every module; ``EvaluationModule``: a model to be
tested."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Optional, Union

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import raw_rows
from wagle_pl.evaluation import classifiers, results
from wagle_pl.evaluation.ability import Ability, Harness
from wagle_pl.evaluation.attacks import attack as attacking
from wagle_pl.evaluation.attacks.attack import OTHERS, Attack, RobustnessReport, Subject
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.measures import (
    Info,
    Observations,
    Value,
    defined_only,
    intervals,
    membership_scores,
)
from wagle_pl.evaluation.observe import GENERATED, NEEDS, Observer, Record, merge, observe_set
from wagle_pl.evaluation.openunlearning import summary, to_logs
from wagle_pl.evaluation.results import Results, Table, write_json
from wagle_pl.evaluation.suites import (
    MUSESuite,
    Suite,
    TOFUSuite,
    find_suite,
    more_of_openunlearning,
)
from wagle_pl.lm.module import LanguageModule

log = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class Evaluate(Callback):
    """Observes test sets, measures them as a suite says, and reports.

    ``trainer.test`` runs the model (a :class:`~wagle_pl.lm.module.LanguageModule`) once on every
    row of every test set of the data module. It writes, into the module's ``results_folder``, one
    Parquet table per test set (every row with its values and generation), ``metrics.json`` (flat,
    one number per key), ``metrics.info.json`` (unit and direction of each, and why others are
    undefined) and ``tofu_result.json`` (the same keys as the files published with TOFU), and prints
    the measures next to those of ``target`` and ``retrained``. An interrupted test continues with
    the first test set that is not finished.

    ``trainer.validate`` and ``trainer.fit`` measure the test sets that ``data.val`` names and log
    them as ``val/<measure>``, for callbacks such as ``EarlyStopping``.

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
            ``Quantise``, ``Paraphrase``, ``InContext``, ``Sample``, ``Probe``
            or class paths, each with its options if any. Written to ``robustness.json``.
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
        if self.max_new_tokens < 1:
            raise WagleError(f"max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if self.bootstrap < 0:
            raise WagleError(f"bootstrap: must be 0 or more, got {self.bootstrap}")
        self.attacks, self._every_attack = attacking.find_attacks(self.robustness)
        self._skipped_attacks: dict[str, str] = {}
        #: Where the options are given, for messages.
        self.options = "trainer.callbacks"
        #: Numbers of the last test, as in ``metrics.json``.
        self.metrics: dict[str, float] = {}
        #: Measures of the last test that are undefined, and why.
        self.undefined: dict[str, str] = {}
        #: Measures of general ability found elsewhere, task -> accuracy; some suites average them.
        self.general: dict[str, float] = {}
        self._names: list[str] = []  # sets that are tested or validated, in the loaders' order
        self._results: dict[str, Results] = {}
        self._tables: dict[str, Table] = {}
        self._partial: dict[str, list[Record]] = {}  # test set -> what this rank has observed of it
        self._infos: dict[str, Info] = {}  # of measures that the suite does not know

    # -- before any work --------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: LanguageModule, stage: str) -> None:
        """Find what a test compares with, and what it needs, before any work is done."""
        self._attach(trainer, pl_module)
        pl_module.evaluation = self
        pl_module.serve()  # the module's own setup comes after this one
        names = self.data.test_names() if stage == "test" else self._val_names()
        if stage == "validate" and not names:
            said = "validate measures the test sets that data.val names"
            raise WagleError(f"{said}: give --data.val '[forget, retain]'")
        if not names and stage != "test":
            return
        suite = type(self.active_suite).__name__
        log.info("measures are those of %s", suite)
        self._read_results()
        for option in ("toxicity_classifier", "gibberish_classifier", "sentence_model"):
            if getattr(self, option) is not None:
                classifiers.check_folder(getattr(self, option), f"{self.options}.{option}")
        tofu_only = "tofu_retrained" in self._results and self.benchmark != "TOFU"
        both_only = self.format != "wagle" and self.benchmark is None
        if tofu_only or both_only:
            option = "tofu_retrained" if tofu_only else f"format {self.format}"
            suites = "suite tofu" if tofu_only else "suites tofu and muse"
            raise WagleError(
                f"{self.options}.{option}: it is for the {suites}, the suite is {suite}: leave it out"
            )
        check_needs(self.active_suite, names)
        if stage == "test" and self.gradient_norm and pl_module.sharded:
            why = "it needs the whole model on a device, which ZeRO-3 does not give"
            raise WagleError(why, f"{self.options}.gradient_norm")
        for name in names:
            rows = [(row.question, row.answer) for row in self.data.test_examples(name)]
            results.check_rows(self._results, name, rows, f"{self.options}.tofu_retrained")

    def prepare(self, trainer: L.Trainer, module: LanguageModule) -> None:
        """Prepare for :meth:`observe_now`, so that errors appear before any work is done."""
        self._attach(trainer, module)
        self._names = self.data.test_names()
        self._read_results()
        self._load_readers()

    def _attach(self, trainer: L.Trainer, module: LanguageModule) -> None:
        """Observe this module's model on the trainer's data from now on."""
        self._trainer, self._module, self.data = trainer, module, trainer.datamodule
        #: The suite named, or the data module's.
        self.active_suite = find_suite(
            self.suite or getattr(self.data, "suite", "tofu") or "generic"
        )
        self._longest: dict[str, int] = {}  # recited test set -> its longest answer in tokens

    @property
    def benchmark(self) -> Optional[str]:
        """OpenUnlearning's name for the suite's benchmark; None if it has none."""
        kinds = {"TOFU": TOFUSuite, "MUSE": MUSESuite}
        return next((n for n, kind in kinds.items() if isinstance(self.active_suite, kind)), None)

    @property
    def _pair(self) -> tuple[str, str]:
        """Test sets of the suite's membership inference."""
        return ("members", "nonmembers") if self.benchmark == "MUSE" else ("forget", "holdout")

    def _val_names(self) -> list[str]:
        return self.data.val_names() if hasattr(self.data, "val_names") else []

    @property
    def compared(self) -> dict[str, str]:
        """Name of each given option for results to compare with -> its value."""
        names = ("retrained", "target", "reference", "tofu_retrained")
        return {name: str(path) for name in names if (path := getattr(self, name)) is not None}

    def _read_results(self) -> None:
        """Read the results to compare with, and check that their prompts are the same."""
        self._results = {}
        for name, path in self.compared.items():
            found = results.results_of(path)
            if found is not None or not self.attacks:  # attacks only need the model
                self._results[name] = Results(found or path, f"{self.options}.{name}")
        results.check_prompts(self._results, self._module.prompts)

    # -- observing --------------------------------------------------------------------------------

    def needs_of(self, name: str) -> frozenset[str]:
        """What to observe of a test set: what the suite needs, as far as the options allow."""
        needs = set(self.active_suite.needs_of(name, self._names))
        if self.paraphrased_questions and "alternatives" in needs and name in ("forget", "retain"):
            needs.add("paraphrased")
        if "vocabulary" in needs:
            needs |= {"gradient"} if self.gradient_norm else set()
            lower = self.format == "openunlearning" and name in self._pair
            needs |= {"lower"} if lower else set()
        return frozenset(needs if self.generate else needs - GENERATED)

    def max_new_tokens_of(self, name: str) -> int:
        """The longest generation for a test set: the benchmark's, or ``max_new_tokens``; for a
        recited set, its longest answer's length (at most ``data.max_length``) if that is more."""
        fixed = self.active_suite.max_new_tokens.get(name, self.max_new_tokens)
        if name not in self.active_suite.recited:
            return fixed
        if name not in self._longest:
            texts = [row.answer for row in self.data.test_examples(name)]
            tokens = self.data.tokenizer(texts, add_special_tokens=False)["input_ids"]
            self._longest[name] = min(max(map(len, tokens)), self.data.max_length)
        return max(fixed, self._longest[name])

    def make_observer(self, lm: Any = None) -> Observer:
        """An observer of the module's model, as it is now, or of another model."""
        return Observer(
            self._module.lm if lm is None else lm,
            self.data.template,
            max_rows=self.data.test_batch_size,
            max_new_tokens=self.max_new_tokens,
            synced_gpus=self._module.synced_gpus,
        )

    def observe_batch(
        self, name: str, numbers: Sequence[int], needs: frozenset[str]
    ) -> list[Record]:
        """Records of some rows of a test set by their numbers, each with its number as ``row``."""
        where = f"{self.data.place(name, test=True)} row"
        records = self.make_observer().observe(
            [self.data.test_examples(name)[number] for number in numbers],
            needs,
            self.max_new_tokens_of(name),
            self.active_suite.headers.get(name, ""),
            [f"{where} {number + 1}" for number in numbers],
            self.active_suite.stops.get(name, ()),
        )
        return [{"row": row, **record} for row, record in zip(numbers, records, strict=True)]

    def observe_now(self, name: str, needs: frozenset[str]) -> Table:
        """Records of a whole test set outside Lightning's loops. Collective."""
        suite, rows = self.active_suite, self.data.test_examples(name)
        header, stops = suite.headers.get(name, ""), suite.stops.get(name, ())
        length = self.max_new_tokens_of(name)
        table = observe_set(self.make_observer(), rows, needs, length, header, stops)
        return self.annotated(name, table) if "generation" in needs else table

    def annotated(self, name: str, table: Table) -> Table:
        """The table, with what other models find in its generations."""
        for reader in self._readers:
            if self.active_suite.forgets(name) or not isinstance(
                reader, classifiers.GibberishClassifier
            ):
                reader.annotate(table, self.data.test_examples(name))
        return table

    @cached_property
    def _readers(self) -> list[Any]:
        """Models that read generations, loaded; each has ``annotate``."""
        readers: list[Any] = []
        device, option = self._module.device, f"{self.options}.{{}}".format
        if (name := self.toxicity_classifier) is not None:
            readers.append(
                classifiers.ToxicityClassifier(name, device, option("toxicity_classifier"))
            )
        if (name := self.gibberish_classifier) is not None:
            longest = (
                32 if self.benchmark == "TOFU" else classifiers.LONGEST
            )  # as OpenUnlearning cuts them
            option_name = option("gibberish_classifier")
            readers.append(classifiers.GibberishClassifier(name, device, option_name, longest))
        if self.format == "openunlearning":
            readers.append(classifiers.Alternatives())
        if (name := self.sentence_model) is not None:
            readers.append(classifiers.SentenceModel(name, option("sentence_model")))
        return readers

    def _load_readers(self) -> None:
        """Load the models that read generations, on rank 0, so that errors appear at once."""
        distributed.on_rank_zero(lambda: len(self._readers))

    def measures(self, tables: Mapping[str, Table]) -> dict[str, Value]:
        """The suite's measures of some records; an Undefined where there is no number."""
        seen, suite = self._seen(tables), self.active_suite
        found = suite.measures(seen)
        for name, table in tables.items():
            if any(record.get("not_gibberish") is not None for record in table):
                found |= suite.of_set(seen, name, ["not_gibberish"])
        if self.format == "openunlearning":
            found |= more_of_openunlearning(suite, seen, *self._pair)
        return found

    def _seen(self, tables: Mapping[str, Table]) -> Observations:
        compared = ("retrained", "reference", "tofu_retrained")
        results = {name: self._results.get(name) for name in compared}
        form = "openunlearning" if self.format == "openunlearning" else self.truth_ratio_form
        corpus = getattr(self.data, "corpus", None)
        return Observations(
            tables, truth_ratio_form=form, general=self.general, corpus=corpus, **results
        )

    def info(self, measure: str) -> Info:
        return self._infos.get(measure) or self.active_suite.info(measure)

    # -- test loop --------------------------------------------------------------------------------

    def on_test_start(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Find the test sets that an earlier, interrupted test finished."""
        self._names = self.data.test_names()
        self._load_readers()
        trainer.test_loop.verbose = False  # its table would repeat ours
        self._keys = self._table_keys(self._shortened())
        self._tables = distributed.on_rank_zero(self._finished)
        for name in self._tables:
            log.info("test set %s: found finished in %s", name, pl_module.results_folder)
        self._partial = {name: [] for name in self._names if name not in self._tables}
        if self.lm_eval is not None:
            limits, option = (self.lm_eval_shots, self.lm_eval_limit), f"{self.options}.lm_eval"
            self._harness = Harness(self.lm_eval, *limits, option)
        if self.attacks:
            found = attacking.usable_attacks(self.attacks, self.subject(), self._every_attack)
            self._usable_attacks, self._skipped_attacks = found

    def _table_keys(self, shortened: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Test set -> what its table depends on."""
        settings = {
            "model": self._module.fingerprint(),  # a checkpoint may have replaced the weights
            "template": _digest(self.data.template.identity()),
            "precision": str(self._trainer.precision),
            "classifiers": [self.toxicity_classifier, self.sentence_model],
        }
        if self.gibberish_classifier is not None or self.format != "wagle":
            settings["openunlearning"] = [self.format, self.gibberish_classifier]
        keys: dict[str, dict[str, Any]] = {}
        for name in self._names:
            needs, header = self.needs_of(name), self.active_suite.headers.get(name)
            stops = list(self.active_suite.stops.get(name, ()))
            rows = json.dumps(raw_rows(self.data.test_examples(name)), default=str)
            keys[name] = {
                **settings,
                "rows": _digest(rows),
                "needs": sorted(needs),
                "generate": self.max_new_tokens_of(name) if "generation" in needs else 0,
                **({"header": header} if header and "choices" in needs else {}),
                **({"stops": stops} if stops and "generation" in needs else {}),
                **({"tested rows": shortened[name]} if name in shortened else {}),
            }
        return keys

    def _shortened(self) -> dict[str, str]:
        """Test set -> how many of its rows are tested, if the trainer's limits leave some out.
        Collective: all ranks must call it.

        Batches have rows of similar length, the longest first, so that the number determines which
        rows they are.
        """
        counts, trainer = {}, self._trainer
        said = "test set %s: the trainer shortens this test, its measures are of %s"
        loops = zip(self._names, trainer.test_dataloaders, trainer.num_test_batches, strict=True)
        for name, loader, batches in loops:
            if batches < len(loader):  # the same on all ranks
                rows = set().union(*distributed.all_gather(islice(loader.sampler, batches)))
                if len(rows) < (total := len(self.data.test_examples(name))):
                    counts[name] = f"{len(rows)} of {total} rows"
                    log.warning(said, name, counts[name])
        return counts

    def _finished(self) -> dict[str, Table]:
        folder, overwrite = self._module.results_folder, self._module.overwrite
        found = (
            (n, results.read_table(folder / f"{n}.parquet", k, overwrite))
            for n, k in self._keys.items()
        )
        return {name: table for name, table in found if table is not None}

    def test_batch(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int) -> None:
        """Observe a batch of test rows; the last one of a set writes its table."""
        name = self._names[dataloader_idx]
        if name not in self._partial:
            return
        self._partial[name] += self.observe_batch(name, batch["rows"], self.needs_of(name))
        if batch_idx + 1 == self._trainer.num_test_batches[dataloader_idx]:
            self._finish_set(name)

    def _finish_set(self, name: str) -> None:
        """Gather all ranks' records of one test set and write its table."""
        records = merge(self._partial.pop(name))
        path = self._module.results_folder / f"{name}.parquet"

        def write() -> Table:
            results.write_table(path, self.annotated(name, records), self._keys[name])
            return records

        self._tables[name] = distributed.on_rank_zero(write)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Compute the measures from the tables, write and print them."""
        tables = {name: self._tables[name] for name in self._names}
        with _as_in_test_steps(trainer.precision_plugin):
            ability = self._ability()
            report = self._attack(tables)
        values = {**self.measures(tables), **ability.values}
        self._infos = ability.infos | report.infos()
        self.metrics = defined_only(values) | report.metrics()
        self.undefined = {k: str(v) for k, v in values.items() if isinstance(v, Undefined)}
        self.undefined |= report.undefined()
        self.log_dict(self.metrics, rank_zero_only=True)
        if not trainer.is_global_zero:
            return
        self._write(tables)
        shown = {k: v for k, v in values.items() if k not in ability.values} | ability.shown()
        print(results.comparison(shown, self.info, **self._others()), flush=True)
        if self.attacks:
            write_json(pl_module.results_folder / attacking.ROBUSTNESS_FILE, report.records())
            print(f"\n{report.table()}", flush=True)
        log.info("test results are in %s", pl_module.results_folder)

    def _others(self) -> dict[str, dict[str, float]]:
        """Metrics of ``target`` and ``retrained`` if results are given, or those of their rows."""
        found = {name: self._results[name] for name in OTHERS if name in self._results}
        return {
            name: other.metrics or defined_only(self.measures(other.tables))
            for name, other in found.items()
        }

    def _write(self, tables: Mapping[str, Table]) -> None:
        folder = self._module.results_folder
        about = {name: vars(self.info(name)) for name in (*self.metrics, *self.undefined)}
        if result := results.to_result(tables):
            write_json(folder / results.RESULT_FILE, result)
        if self.format == "openunlearning":
            scores = membership_scores(self._seen(tables), *self._pair)
            logs = to_logs(self.benchmark, tables, self.metrics, scores)
            write_json(folder / f"{self.benchmark}_EVAL.json", logs)
            write_json(folder / f"{self.benchmark}_SUMMARY.json", summary(logs))
        info = {
            "model": self._module.model_name,
            "suite": type(self.active_suite).__name__,
            "prompts": self._module.prompts,
            "compared": self.compared,
            "measures": {name: about[name] for name in self.metrics},
            "undefined": {n: {**about[n], "why": why} for n, why in self.undefined.items()},
            "rows": {name: len(table) for name, table in tables.items()},
            "absent_sets": [name for name in self.active_suite.sets if name not in tables],
        }
        if self.bootstrap:
            info["intervals"] = intervals(self.measures, tables, self.bootstrap)
        write_json(folder / results.INFO_FILE, info)
        write_json(folder / results.METRICS_FILE, self.metrics)

    # -- general ability and attacks --------------------------------------------------------------

    def _ability(self) -> Ability:
        """General ability, if it was asked for; also kept for the suite's averages."""
        if self.lm_eval is None:
            return Ability()
        module, data = self._module, self.data
        found = self._harness.measure(
            module.lm, data.tokenizer, data.test_batch_size, module.sharded
        )
        self.general |= found.general
        return found

    def subject(self, lm: Any = None, tables: Optional[Mapping[str, Table]] = None) -> Subject:
        """A model (this one when None), its data and its records, for attacks."""
        names = [name for name in self._names if self.active_suite.forgets(name)]
        lm = self._module.lm if lm is None else lm
        return Subject(
            lm,
            self.make_observer(lm),
            self.active_suite,
            rows={name: self.data.test_examples(name) for name in names},
            needs={name: self.needs_of(name) for name in names},
            lengths={name: self.max_new_tokens_of(name) for name in names},
            measures=self.measures,
            training=self.data.examples,
            annotate=self.annotated,
            tables=tables,
            sharded=self._module.sharded,
        )

    def attacked(self, attacks: Sequence[Attack], tables: Mapping[str, Table]) -> RobustnessReport:
        """What usable attacks find on this model as it is now, with its records. Collective."""
        with _as_in_test_steps(self._trainer.precision_plugin):
            return attacking.run_attacks(attacks, self.subject(tables=tables), {}, {}, {})

    def _attack(self, tables: Mapping[str, Table]) -> RobustnessReport:
        """Attack this model, and the target and the retrained model if they are available."""
        if not self.attacks:
            return RobustnessReport([], {})
        found = {
            name: results.model_of(path) for name, path in self.compared.items() if name in OTHERS
        }
        others = {name: folder for name, folder in found.items() if folder is not None}
        if others and self._module.sharded:
            log.warning("under ZeRO-3 only this model is attacked, not %s", " and ".join(others))
            others = {}

        def loaded(name: str, folder: str) -> Subject:
            return self.subject(
                attacking.load_other(folder, self._module.lm, f"{self.options}.{name}")
            )

        loaders = {name: partial(loaded, name, folder) for name, folder in others.items()}
        subject, skipped = self.subject(tables=tables), self._skipped_attacks
        return attacking.run_attacks(
            self._usable_attacks, subject, loaders, self._others(), skipped
        )

    # -- validation loop --------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Prepare to observe what ``data.val`` names; loaders of another kind are left alone."""
        self._names = self._val_names()
        self._partial = {name: [] for name in self._names}
        if self._names and self.val_generate:
            self._load_readers()

    # tensors made in inference mode and kept, e.g. by ZeRO-3, cannot be used in training
    @torch.inference_mode(False)
    def validation_batch(self, batch: Mapping[str, Any], dataloader_idx: int) -> None:
        if not self._names:
            return
        name = self._names[dataloader_idx]
        # a gradient norm would be added to the gradients of a step that has begun
        needs = self.needs_of(name) - {"gradient"} - (set() if self.val_generate else GENERATED)
        self._partial[name] += self.observe_batch(name, batch["rows"], needs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Log the measures, unless this is Lightning's sanity check."""
        if self._names and not trainer.sanity_checking:
            tables = {name: merge(records) for name, records in self._partial.items()}
            for name in tables if self.val_generate else ():
                read = partial(self.annotated, name, tables[name])
                tables[name] = distributed.on_rank_zero(read)
            values = defined_only(self.measures(tables))
            self.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)
        self._names, self._partial = [], {}


class EvaluationModule(LanguageModule):
    """A model to be tested, with its own :class:`Evaluate`.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the model.
        output: folder for the results; ``<default_root_dir>/test`` when None.
        overwrite: replace an existing output.
        attn_implementation: see :class:`~wagle_pl.lm.module.LanguageModule`.
        **kwargs: passed to :class:`Evaluate`.
    """

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        overwrite: bool = False,
        attn_implementation: Optional[str] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, output, overwrite, attn_implementation)
        self.evaluation: Evaluate = Evaluate(**kwargs)
        self.evaluation.options = "model"

    def configure_callbacks(self) -> list[Callback]:
        return [self.evaluation]

    @property
    def results_folder(self) -> Path:
        return Path(self.output) if self.output else super().results_folder

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluation.metrics

    @property
    def undefined(self) -> dict[str, str]:
        return self.evaluation.undefined


def check_needs(suite: Suite, names: Sequence[str]) -> None:
    """Refuse a suite that needs something of a test set that nothing observes."""
    title = type(suite).__name__
    for name in names:
        if unknown := sorted(set(suite.needs_of(name, names)) - NEEDS):
            said = f"suite {title} needs {', '.join(map(repr, unknown))} of the test set {name}"
            hint = f"choose of {', '.join(sorted(NEEDS))}"
            raise WagleError(f"{said}, which nothing observes", hint=hint)
    said = (
        "suite %s says what it needs of the test set %r, which there is not: the test sets are %s"
    )
    for name in sorted(set(suite.needs) - set(suite.sets) - set(names)):
        log.warning(said, title, name, ", ".join(names))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _as_in_test_steps(precision: Any) -> Iterator[None]:
    """Run a model in the precision of the test steps.

    Meanwhile autocast caches no copies of weights, since an attack that changes weights would make
    them stale.
    """
    cached = torch.is_autocast_cache_enabled()
    with precision.test_step_context():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
