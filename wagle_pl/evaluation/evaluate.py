"""``Evaluate``: the test and validation loops of every module, as a callback."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Optional, Union

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Example, raw_rows
from wagle_pl.data.template import differing_prompts
from wagle_pl.evaluation import classifiers
from wagle_pl.evaluation.ability import Ability, Harness
from wagle_pl.evaluation.attacks import (
    ROBUSTNESS_FILE,
    Attack,
    RobustnessReport,
    Subject,
    find_attacks,
    load_other,
    model_of,
    results_of,
    run_attacks,
    usable_attacks,
)
from wagle_pl.evaluation.comparison import comparison
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.measures import Info, Observations, Value, defined_only
from wagle_pl.evaluation.observe import GENERATED, NEEDS, Observer, Record, merge, observe_set
from wagle_pl.evaluation.results import (
    INFO_FILE,
    METRICS_FILE,
    RESULT_FILE,
    Results,
    Table,
    read_table,
    to_result,
    write_json,
    write_table,
)
from wagle_pl.evaluation.suites import Suite, TOFUSuite, find_suite
from wagle_pl.lm.module import LanguageModule

log = logging.getLogger(__name__)


class Evaluate(Callback):
    """Observes test sets, measures them as a suite says, and reports.

    ``trainer.test`` runs the model once on every row of every test set of the data module. It writes, into the
    module's ``results_folder``, one Parquet table a test set (every row with its values and generation),
    ``metrics.json`` (flat, one number a key), ``metrics.info.json`` (unit and direction of each, and why others are
    undefined) and ``tofu_result.json`` (the same keys as the files published with TOFU), and prints the measures
    beside those of ``target`` and ``retrained``. A test that was interrupted continues with the first test set that
    is not finished.

    ``trainer.validate``, and ``trainer.fit`` whenever it validates (``val_check_interval``), measure the test sets
    that ``data.val`` names and log them as ``val/<measure>``, which callbacks such as ``EarlyStopping`` can go by.

    The module must be a :class:`~wagle_pl.lm.module.LanguageModule`.

    Args:
        suite: which measures: ``tofu``, ``muse``, ``wmdp``, ``copyright``, ``detox``, ``generic`` or the class path of
            a :class:`~wagle_pl.evaluation.suites.Suite`; the data module's own when None.
        retrained: results of the model retrained without the forget set, which forget quality and privacy leakage
            compare with: folder of a test, its ``metrics.json``, a model's folder with a test in it, or a result file
            published with TOFU. Of the same rows, in any order, and prompts, as far as it says its prompts.
        target: results of the model before unlearning, likewise; shown beside this one's.
        reference: results of a reference model, likewise, for the reference attack of membership inference.
        tofu_retrained: results of the retrained model on whatever forget rows, likewise, for ``tofu/forget_quality``:
            forget quality as TOFU's script has it, which does not compare the questions.
        truth_ratio_form: ``geometric`` (TOFU's script) or ``arithmetic`` (its paper).
        generate: also generate answers; False saves most of the time and leaves out what is measured on them.
        val_generate: also generate answers in validation.
        max_new_tokens: longest generation, where the benchmark fixes none; a book's continuations are generated to
            their own length at least.
        paraphrased_questions: ask forget and retain rows with their ``paraphrased_question`` too, as WAGLE's code does
            for its forget quality and accuracy on TOFU.
        toxicity_classifier: folder or hub id of a text classifier that reads the generations, such as
            ``unitary/toxic-bert``.
        sentence_model: folder or hub id of a sentence-transformers model for accuracies by the nearest answer; WAGLE
            takes ``paraphrase-MiniLM-L6-v2``. By likelihood alone when None.
        gradient_norm: observe gradient norms for membership inference: a backward pass for each such row.
        robustness: attacks that try to bring forgotten knowledge back, after the test: ``all``, or a list of
            ``Relearn``, ``Quantise``, ``Paraphrase``, ``TranslatedStyle``, ``InContext``, ``Sample``, ``Probe`` or
            class paths, each with its options if any; see :mod:`wagle_pl.evaluation.attacks`. ``target`` and
            ``retrained`` are attacked too where they are, or lie in, a model's folder. Written to ``robustness.json``.
        lm_eval: tasks of lm-evaluation-harness (an extra) for general ability, e.g. ``[mmlu, arc_easy]``, or folders
            with task YAMLs.
        lm_eval_shots: worked examples before each of its questions; the task's own number when None.
        lm_eval_limit: only the first so many rows of each of its tasks.
    """

    def __init__(
        self,
        suite: Optional[str] = None,
        retrained: Optional[str] = None,
        target: Optional[str] = None,
        reference: Optional[str] = None,
        tofu_retrained: Optional[str] = None,
        truth_ratio_form: Literal["geometric", "arithmetic"] = "geometric",
        generate: bool = True,
        val_generate: bool = False,
        max_new_tokens: int = 200,
        paraphrased_questions: bool = False,
        toxicity_classifier: Optional[str] = None,
        sentence_model: Optional[str] = None,
        gradient_norm: bool = False,
        robustness: Optional[Union[bool, str, list[Union[Attack, str]]]] = None,
        lm_eval: Optional[Union[str, list[str]]] = None,
        lm_eval_shots: Optional[int] = None,
        lm_eval_limit: Optional[int] = None,
    ) -> None:
        if max_new_tokens < 1:
            raise WagleError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.suite_name = suite
        self.compared = {
            "retrained": retrained,
            "target": target,
            "reference": reference,
            "tofu_retrained": tofu_retrained,
        }
        self.truth_ratio_form = truth_ratio_form
        self.generate = generate
        self.val_generate = val_generate
        self.max_new_tokens = max_new_tokens
        self.paraphrased_questions = paraphrased_questions
        self.toxicity_classifier = toxicity_classifier
        self.sentence_model = sentence_model
        self.gradient_norm = gradient_norm
        self.attacks, self._every_attack = find_attacks(robustness)
        self._skipped_attacks: dict[str, str] = {}
        self.lm_eval = lm_eval
        self.lm_eval_shots = lm_eval_shots
        self.lm_eval_limit = lm_eval_limit
        #: Where the options are given, for messages.
        self.options = "trainer.callbacks"
        #: Numbers of the last test, as in ``metrics.json``.
        self.metrics: dict[str, float] = {}
        #: Measures of the last test that are undefined, and why.
        self.undefined: dict[str, str] = {}
        #: Measures of general ability found elsewhere, task -> accuracy; some suites average them.
        self.general: dict[str, float] = {}
        self._trainer: Optional[L.Trainer] = None
        #: Sets that are being tested or validated, in the order of the loaders.
        self._names: list[str] = []
        self._results: dict[str, Results] = {}
        self._tables: dict[str, Table] = {}
        #: Test set -> the records of rows that this rank has observed.
        self._partial: dict[str, list[Record]] = {}
        #: Recited test set -> its longest answer in tokens.
        self._longest: dict[str, int] = {}
        #: Measure -> what is known of it, where the suite does not know it.
        self._infos: dict[str, Info] = {}

    # -- before any work ----------------------------------------------------------------------------------------------

    def attach(self, trainer: L.Trainer, module: LanguageModule) -> None:
        """Observe this module's model on the trainer's data from now on."""
        if trainer is not self._trainer:
            self.__dict__.pop("suite", None)
            self._longest.clear()
        self._trainer, self._module = trainer, module

    def prepare(self, trainer: L.Trainer, module: LanguageModule) -> None:
        """Make ready for :meth:`observe_now`, before there is anything to lose."""
        self.attach(trainer, module)
        self._names = self.data.test_names()
        self._read_results()
        self._check_prompts()
        distributed.on_rank_zero(self._load_readers)

    @property
    def data(self) -> Any:
        """The data module."""
        return self._trainer.datamodule

    @cached_property
    def suite(self) -> Suite:
        """The suite named, or the data module's."""
        return find_suite(self.suite_name or getattr(self.data, "suite", "tofu") or "generic")

    def setup(self, trainer: L.Trainer, pl_module: LanguageModule, stage: str) -> None:
        """Find what a test compares with, and what it needs, before any work is done."""
        self.attach(trainer, pl_module)
        pl_module.evaluation = self
        pl_module.serve()  # the module's own setup comes after this one
        validated = [] if stage == "test" else self._val_names()
        if stage == "validate" and not validated:
            raise WagleError(
                "validate measures the test sets that data.val names: give --data.val '[forget, retain]'"
            )
        if stage != "test" and not validated:
            return
        log.info("measures are those of %s", type(self.suite).__name__)
        self._read_results()
        for option in ("toxicity_classifier", "sentence_model"):
            if getattr(self, option) is not None:
                classifiers.check_folder(getattr(self, option), f"{self.options}.{option}")
        if "tofu_retrained" in self._results and not isinstance(self.suite, TOFUSuite):
            name = type(self.suite).__name__
            raise WagleError(
                f"{self.options}.tofu_retrained is for the suite tofu, the suite is {name}: leave it out"
            )
        self._check_needs(validated or self.data.test_names())
        self._check_rows(validated)
        if stage == "test" and self.gradient_norm and pl_module.sharded:
            raise WagleError(
                f"{self.options}.gradient_norm needs the whole model on a device: it cannot be had under ZeRO-3"
            )

    def _read_results(self) -> None:
        """Results to compare with."""
        paths = {name: path for name, path in self.compared.items() if path is not None}
        if self.attacks:  # a model without results will do
            paths = {name: path for name, path in paths.items() if results_of(path) is not None}
        self._results = {
            name: Results(results_of(path) or path, f"{self.options}.{name}")
            for name, path in paths.items()
        }

    # -- test loop ----------------------------------------------------------------------------------------------------

    def needs_of(self, name: str, among: Optional[Sequence[str]] = None) -> frozenset[str]:
        """What to observe of a test set: what the suite needs, as far as the options allow.

        Args:
            name: of the test set.
            among: the sets that are tested; those of the loop when None.
        """
        needs = set(self.suite.needs_of(name, self._names if among is None else among))
        if self.paraphrased_questions and "alternatives" in needs and name in ("forget", "retain"):
            needs.add("paraphrased")
        if self.gradient_norm and "vocabulary" in needs:
            needs.add("gradient")
        if not self.generate:
            needs -= GENERATED
        return frozenset(needs)

    def max_new_tokens_of(self, name: str) -> int:
        """The longest generation from a test set's rows: the benchmark's, or ``max_new_tokens``.

        Of a set that is recited it is the longest answer's length if that is more, within the data's ``max_length``.
        """
        fixed = self.suite.max_new_tokens.get(name, self.max_new_tokens)
        if name not in self.suite.recited:
            return fixed
        if name not in self._longest:
            texts = [row.answer for row in self._rows(name)]
            tokens = self.data.tokenizer(texts, add_special_tokens=False)["input_ids"]
            self._longest[name] = min(max(map(len, tokens)), self.data.max_length)
        return max(fixed, self._longest[name])

    def on_test_start(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Check what is compared with, and find the test sets that an earlier, interrupted test finished."""
        data = self.data
        self._names = data.test_names()
        self._check_rows(self._names)
        distributed.on_rank_zero(self._load_readers)
        trainer.test_loop.verbose = False  # its table would hold what ours does
        settings = {
            "model": pl_module.fingerprint(),  # a checkpoint may have replaced the weights
            "template": _digest(data.template.identity()),
            "precision": str(trainer.precision),
            "classifiers": [self.toxicity_classifier, self.sentence_model],
        }
        shortened = self._shortened()
        for name, rows in shortened.items():
            log.warning(
                "test set %s: the trainer shortens this test, its measures are of %s", name, rows
            )
        self._keys = {
            name: {
                **settings,
                **self._key(name),
                **({"tested rows": shortened[name]} if name in shortened else {}),
            }
            for name in self._names
        }
        self._tables = distributed.on_rank_zero(self._finished)
        for name in self._tables:
            log.info("test set %s: found finished in %s", name, self.results_folder)
        self._partial = {name: [] for name in self._names if name not in self._tables}
        self.observer = self.make_observer()
        if self.lm_eval is not None:
            self._harness = Harness(self.lm_eval, self.lm_eval_shots, self.lm_eval_limit)
        if self.attacks:
            self._usable_attacks, self._skipped_attacks = usable_attacks(
                self.attacks, self.subject(), self._every_attack
            )

    def _key(self, name: str) -> dict[str, Any]:
        """What a set's table depends on, besides the model."""
        needs = self.needs_of(name)
        header = self.suite.headers.get(name)
        return {
            "rows": _digest(json.dumps(raw_rows(self._rows(name)), default=str)),
            "needs": sorted(needs),
            "generate": self.max_new_tokens_of(name) if "generation" in needs else 0,
            **({"header": header} if header and "choices" in needs else {}),
        }

    def _shortened(self) -> dict[str, str]:
        """Test set -> how many of its rows are tested, where the trainer's limits leave some out; a meeting.

        Batches are of rows of similar length, the longest first: the number says which rows they are.
        """
        counts = {}
        for name, loader, batches in zip(
            self._names,
            self._trainer.test_dataloaders,
            self._trainer.num_test_batches,
            strict=True,
        ):
            if batches < len(loader):  # the same on all ranks
                seen = {
                    row
                    for part in distributed.all_gather(islice(loader.sampler, batches))
                    for row in part
                }
                if len(seen) < len(self._rows(name)):
                    counts[name] = f"{len(seen)} of {len(self._rows(name))} rows"
        return counts

    def _rows(self, name: str) -> list[Example]:
        return self.data.test_examples(name)

    def _check_needs(self, names: Sequence[str]) -> None:
        """What the suite needs must be something that is observed."""
        suite = type(self.suite).__name__
        for name in names:
            unknown = sorted(set(self.suite.needs_of(name, names)) - NEEDS)
            if unknown:
                listed = ", ".join(map(repr, unknown))
                raise WagleError(
                    f"suite {suite} needs {listed} of the test set {name}, which nothing observes; choose "
                    f"of {', '.join(sorted(NEEDS))}"
                )
        for name in sorted(set(self.suite.needs) - set(self.suite.sets) - set(names)):
            log.warning(
                "suite %s says what it needs of the test set %r, which there is not: the test sets are %s",
                suite,
                name,
                ", ".join(names),
            )

    def _check_prompts(self) -> None:
        """Results to compare with must be of the same prompts."""
        for option, results in self._results.items():
            other = differing_prompts(results.prompts, self._module.prompts)
            if other and option != "target":
                raise WagleError(
                    f"{self.options}.{option}: {results.path} was tested with other prompts "
                    f"({other}): test that model with these, or give this run those"
                )
            if other:
                log.warning("the target's results are of other prompts: %s", other)

    def _check_rows(self, names: Sequence[str]) -> None:
        """Results to compare with must be on the same rows, whatever their order."""
        self._check_prompts()
        for option, results in self._results.items():
            for name in names:
                rows = [(row.question, row.answer) for row in self._rows(name)]
                differing = results.differing(name, rows)
                if option == "tofu_retrained":
                    if name == "forget":
                        there = len(results.tables.get(name, []))
                        log.warning(
                            "tofu/forget_quality compares %d forget rows here with %d in %s; %d are the same",
                            len(rows),
                            there,
                            results.path,
                            max(len(rows), there) - differing,
                        )
                elif differing and option == "target":
                    log.warning(
                        "the target's results are on other %s rows: %d differ", name, differing
                    )
                elif differing:
                    own = (
                        "; TOFU's own forget quality, which compares no rows, takes it as "
                        f"--{self.options}.tofu_retrained"
                    )
                    raise WagleError(
                        f"{self.options}.{option}: {results.path} is on other {name} rows: {differing} differ"
                        + (own if (option, name) == ("retrained", "forget") else "")
                    )

    def _finished(self) -> dict[str, Table]:
        tables = {
            name: read_table(self._path(name), key, self._module.overwrite)
            for name, key in self._keys.items()
        }
        return {name: table for name, table in tables.items() if table is not None}

    def test_batch(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int) -> None:
        """Observe a batch of test rows; the last one of a set writes its table."""
        name = self._names[dataloader_idx]
        if name not in self._partial:
            return
        self._partial[name] += self.observe_batch(self.observer, name, batch, self.needs_of(name))
        if batch_idx + 1 == self._trainer.num_test_batches[dataloader_idx]:
            self._finish_set(name)

    def _finish_set(self, name: str) -> None:
        """Bring all ranks' records of one test set together and write its table."""
        records = merge(self._partial.pop(name))

        def write() -> Table:
            write_table(self._path(name), self.annotated(name, records), self._keys[name])
            return records

        self._tables[name] = distributed.on_rank_zero(write)

    def make_observer(self, lm: Any = None) -> Observer:
        """What runs the module's model, as it is now, or another model, on rows."""
        return Observer(
            self._module.lm if lm is None else lm,
            self.data.template,
            max_rows=self.data.test_batch_size,
            max_new_tokens=self.max_new_tokens,
            meets=self._module.synced_gpus,
        )

    def observe_now(self, name: str, needs: frozenset[str]) -> Table:
        """Records of a whole test set outside a loop. Collective: all ranks must call it.

        Args:
            name: of the test set.
            needs: what to observe.
        """
        length, header = self.max_new_tokens_of(name), self.suite.headers.get(name, "")
        table = observe_set(self.make_observer(), self._rows(name), needs, length, header)
        return self.annotated(name, table) if "generation" in needs else table

    def observe_batch(
        self, observer: Observer, name: str, batch: Mapping[str, Any], needs: frozenset[str]
    ) -> list[Record]:
        """One record a row of a batch, with its number as ``row``.

        Args:
            observer: runs the model.
            name: the test set.
            batch: of its rows.
            needs: what to observe.
        """
        header = self.suite.headers.get(name, "")
        where = f"test set {name} ({self.data.describe_test(name)}) row"
        names = [f"{where} {row + 1}" for row in batch["rows"]]
        rows = [self._rows(name)[row] for row in batch["rows"]]
        records = observer.observe(rows, needs, self.max_new_tokens_of(name), header, names)
        return [{"row": row, **record} for row, record in zip(batch["rows"], records, strict=True)]

    def annotated(self, name: str, table: Table) -> Table:
        """The table, once the other models have read its generations."""
        if self.toxicity_classifier is not None:
            classifiers.add_toxicity(table, self._classifier)
        if self.sentence_model is not None:
            classifiers.add_nearest(table, self._rows(name), self._embeddings)
        return table

    def _load_readers(self) -> None:
        """Load the models that read the generations before there are any: what is wrong with them shows at once."""
        if self.toxicity_classifier is not None:
            self._classifier  # noqa: B018
        if self.sentence_model is not None:
            self._embeddings  # noqa: B018

    @cached_property
    def _classifier(self) -> Any:
        return classifiers.ToxicityClassifier(self.toxicity_classifier or "", self._module.device)

    @cached_property
    def _embeddings(self) -> Any:
        return classifiers.SentenceModel(self.sentence_model or "")

    # -- validation loop ----------------------------------------------------------------------------------------------

    def _val_names(self) -> list[str]:
        data = self.data
        return data.val_names() if hasattr(data, "val_names") else []

    def on_validation_start(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Make ready to observe what ``data.val`` names; loaders of another kind are left alone."""
        self._names = self._val_names()
        self._partial = {name: [] for name in self._names}
        if self._names and self.val_generate:
            distributed.on_rank_zero(self._load_readers)
        if self._names:
            self.observer = self.make_observer()

    # tensors made in inference mode and kept, by ZeRO-3 say, are of no use in training
    @torch.inference_mode(False)
    def validation_batch(self, batch: Mapping[str, Any], dataloader_idx: int) -> None:
        """Observe a batch of validation rows."""
        if not self._names:
            return
        # a gradient norm would be added to the gradients of a step that has begun
        left_out = frozenset({"gradient"}) | (frozenset() if self.val_generate else GENERATED)
        name = self._names[dataloader_idx]
        needs = self.needs_of(name) - left_out
        self._partial[name] += self.observe_batch(self.observer, name, batch, needs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Log the measures, unless this is Lightning's look at the first batches."""
        if self._names and not trainer.sanity_checking:
            tables = {name: merge(records) for name, records in self._partial.items()}
            if self.val_generate:
                read = {name: partial(self.annotated, name, tables[name]) for name in tables}
                tables = {name: distributed.on_rank_zero(read[name]) for name in tables}
            values = defined_only(self.measures(tables))
            self.log_dict({f"val/{name}": value for name, value in values.items()}, sync_dist=True)
        self._names, self._partial = [], {}

    # -- measures -----------------------------------------------------------------------------------------------------

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Compute the measures from the tables, write and print them."""
        tables = {name: self._tables[name] for name in self._names}
        with _as_in_test_steps(trainer.precision_plugin):
            ability = self._ability()
            report = self._attack(tables)
        values = {**self.measures(tables), **ability.values}
        self._infos = dict(ability.infos)
        self.metrics = defined_only(values)
        self.undefined = {
            name: str(value) for name, value in values.items() if isinstance(value, Undefined)
        }
        if report is not None:
            self.metrics |= report.metrics()
            self.undefined |= report.undefined()
            self._infos |= report.infos()
        self.log_dict(self.metrics, rank_zero_only=True)
        if trainer.is_global_zero:
            self._write(tables)
            shown = {
                name: self._metrics_of(name)
                for name in ("target", "retrained")
                if name in self._results
            }
            parts = {
                name: value for name, value in values.items() if name not in ability.values
            } | ability.shown()
            print(comparison(parts, self.info, **shown), flush=True)
            if report is not None:
                write_json(self.results_folder / ROBUSTNESS_FILE, report.records())
                print(f"\n{report.table()}", flush=True)
            log.info("test results are in %s", self.results_folder)

    def measures(self, tables: Mapping[str, Table]) -> dict[str, Value]:
        """The suite's measures of some records; an Undefined where there is no number."""
        seen = Observations(
            tables,
            retrained=self._results.get("retrained"),
            reference=self._results.get("reference"),
            tofu_retrained=self._results.get("tofu_retrained"),
            truth_ratio_form=self.truth_ratio_form,
            general=self.general,
        )
        return self.suite.measures(seen)

    def info(self, measure: str) -> Info:
        """What is known of a measure by its name."""
        return self._infos.get(measure) or self.suite.info(measure)

    # -- general ability and attacks ----------------------------------------------------------------------------------

    def _ability(self) -> Ability:
        """General ability, for its own sake and for the suite's averages; nothing if it was not asked for."""
        if self.lm_eval is None:
            return Ability()
        data, module = self.data, self._module
        found = self._harness.measure(
            module.lm, data.tokenizer, data.test_batch_size, module.sharded
        )
        self.general |= found.general
        return found

    def subject(self, lm: Any = None, tables: Optional[Mapping[str, Table]] = None) -> Subject:
        """A model on this test's data, for attacks.

        Args:
            lm: the model; this one when None.
            tables: test set -> its records without attack, if they are known.
        """
        names = [name for name in self._names if self.suite.forgets(name)]
        lm = self._module.lm if lm is None else lm
        return Subject(
            lm,
            self.make_observer(lm),
            self.suite,
            rows={name: self._rows(name) for name in names},
            needs={name: self.needs_of(name) for name in names},
            lengths={name: self.max_new_tokens_of(name) for name in names},
            measures=self.measures,
            training=self.data.examples,
            annotate=self.annotated,
            tables=tables,
            sharded=self._module.sharded,
        )

    def _attack(self, tables: Mapping[str, Table]) -> Optional[RobustnessReport]:
        """Attack this model, and the target and the retrained model where they are at hand."""
        if not self.attacks:
            return None
        plain = {
            name: self._metrics_of(name)
            for name in ("target", "retrained")
            if name in self._results
        }
        paths = {name: self.compared[name] for name in ("target", "retrained")}
        found = {name: model_of(path) for name, path in paths.items() if path is not None}
        others = {name: folder for name, folder in found.items() if folder is not None}
        if others and self._module.sharded:
            log.warning("under ZeRO-3 only this model is attacked, not %s", " and ".join(others))
            others = {}

        def loaded(name: str, folder: str) -> Subject:
            return self.subject(load_other(folder, self._module.lm, f"{self.options}.{name}"))

        makers = {name: partial(loaded, name, folder) for name, folder in others.items()}
        subject = self.subject(tables=tables)
        return run_attacks(self._usable_attacks, subject, makers, plain, self._skipped_attacks)

    def _metrics_of(self, name: str) -> dict[str, float]:
        """Metrics of results to compare with; of a published file they are computed."""
        results = self._results[name]
        if results.metrics or results.tofu is None:
            return results.metrics
        return defined_only(self.measures(results.tables))

    def _write(self, tables: Mapping[str, Table]) -> None:
        infos = {name: self.info(name) for name in (*self.metrics, *self.undefined)}
        result = to_result(tables)
        if result:
            write_json(self.results_folder / RESULT_FILE, result)
        write_json(
            self.results_folder / INFO_FILE,
            {
                "model": self._module.model_name,
                "suite": type(self.suite).__name__,
                "prompts": self._module.prompts,
                "compared": {name: path for name, path in self.compared.items() if path},
                "measures": {name: vars(infos[name]) for name in self.metrics},
                "undefined": {
                    name: {**vars(infos[name]), "why": why} for name, why in self.undefined.items()
                },
                "rows": {name: len(table) for name, table in tables.items()},
                "absent_sets": [name for name in self.suite.sets if name not in tables],
            },
        )
        write_json(self.results_folder / METRICS_FILE, self.metrics)

    @property
    def results_folder(self) -> Path:
        """Where a test writes."""
        return self._module.results_folder

    def _path(self, name: str) -> Path:
        return self.results_folder / f"{name}.parquet"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _as_in_test_steps(precision: Any) -> Iterator[None]:
    """Run a model in the precision of the test steps.

    Autocast keeps no copies of weights meanwhile: those of weights that an attack changes would be stale.
    """
    cached = torch.is_autocast_cache_enabled()
    with precision.test_step_context():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
