""":func:`evaluate` tests a model on the rows of a data module; :class:`Evaluation` does so in batches."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
from transformers import PreTrainedModel

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import fingerprint
from wagle_pl.data.example import raw_rows
from wagle_pl.evaluation import classifiers
from wagle_pl.evaluation import results as results_files
from wagle_pl.evaluation.ability import Ability, Harness
from wagle_pl.evaluation.attacks import attack as attacking
from wagle_pl.evaluation.attacks.attack import Attack, Finding, Subject
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.membership import membership_scores
from wagle_pl.evaluation.metrics import collection
from wagle_pl.evaluation.observe import GENERATED, Observer, Record, merge, observe_set
from wagle_pl.evaluation.openunlearning import summary, to_logs
from wagle_pl.evaluation.options import Options, Plan
from wagle_pl.evaluation.records import Info, defined_only, intervals
from wagle_pl.evaluation.results import Results
from wagle_pl.evaluation.suites import Suite
from wagle_pl.evaluation.tofu_result import Table, to_result
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.state import ModelState

log = logging.getLogger(__name__)


def evaluate(
    model: Union[str, PreTrainedModel],
    data: Any,
    suite: Union[Suite, str, None] = None,
    options: Optional[Options] = None,
    output: Union[str, Path, None] = None,
    overwrite: bool = False,
) -> Results:
    """Test a model on every row of every test set. Collective.

    Args:
        model: hub id, folder or GGUF file of a model, or a loaded Hugging Face model, which comes
            back as it was.
        data: a :class:`~wagle_pl.data.ForgetRetainDataModule`.
        suite: whose measures are computed; that of the options or of the data when None.
        options: see :class:`Options`.
        output: folder for the files that ``wagle test`` writes; an interrupted test continues with
            the first test set that has no table there. Nothing is written when None.
        overwrite: replace the tables of another test in that folder.
    """
    loaded = isinstance(model, PreTrainedModel)
    name = str(model.config.name_or_path if loaded else model)
    lm = model if loaded else load_model(name)
    if data.needs.tokenizer is None:
        data.needs = replace(data.needs, tokenizer=lambda: load_tokenizer(name))
    plan = Plan(data, options or Options(), data.test_names(), suite_given=suite)
    folder = None if output is None else Path(output)
    evaluation = Evaluation(plan, folder, overwrite, model_name=name)
    state = ModelState(lm)
    try:
        lm.eval()
        evaluation.start(lm, [list(loader.sampler) for loader in data.test_dataloader()])
        for number, batches in enumerate(evaluation.batches):
            for rows in batches:
                evaluation.observe({"rows": rows}, number)
        tested = evaluation.results()
    finally:
        state.restore()
    if folder is not None and distributed.rank() == 0:
        tested.write(folder)
    return tested


@dataclass(eq=False)
class Evaluation:
    """A test of a model: :meth:`start`, :meth:`observe` each batch, then :meth:`results`; or a
    validation, which ends with :meth:`values` and may start again.

    Raises:
        WagleError: if the options need the whole model on a device and its weights are sharded.
    """

    plan: Plan
    folder: Optional[Path] = None  # for the tables; None: they are not written
    overwrite: bool = False  # replace the tables of another test
    validates: bool = False
    model_name: str = ""
    sharded: bool = False  # the strategy shards the weights (ZeRO-3)
    precision: str = "32-true"
    step_context: Callable[[], AbstractContextManager[Any]] = nullcontext  # of a test step

    def __post_init__(self) -> None:
        if self.sharded and self.plan.options.gradient_norm and not self.validates:
            why = "it needs the whole model on a device, which ZeRO-3 does not give"
            raise WagleError(why, f"{self.plan.prefix}gradient_norm")
        self._skipped_attacks: dict[str, str] = {}
        self._harness: Optional[Harness] = None

    # -- observing --------------------------------------------------------------------------------

    def start(self, lm: Any, batches: Sequence[Sequence[Sequence[int]]] = ()) -> None:
        """Begin with a model in evaluation mode. Collective.

        Args:
            lm: a Hugging Face causal language model.
            batches: of each test set, the row numbers of this rank's batches.
        """
        plan, self.lm, self.batches = self.plan, lm, batches
        self._left = [len(of_set) for of_set in batches]  # batches that are not yet observed
        self.tables: dict[str, Table] = {}  # of finished sets
        if not self.validates or plan.options.val_generate:
            self.load_readers()
        if not self.validates:
            self._keys = self._table_keys()
            self.tables = distributed.on_rank_zero(self._finished)
            for name in self.tables:
                log.info("test set %s: found finished in %s", name, self.folder)
            if plan.options.lm_eval is not None:
                limits = plan.options.lm_eval_shots, plan.options.lm_eval_limit
                self._harness = Harness(plan.options.lm_eval, *limits, f"{plan.prefix}lm_eval")
            if plan.attacks:
                usable = attacking.usable_attacks(plan.attacks, self.subject(), plan.every_attack)
                self._usable_attacks, self._skipped_attacks = usable
        self.records: dict[str, list[Record]] = {n: [] for n in plan.names if n not in self.tables}

    def observer(self, lm: Any = None) -> Observer:
        """An observer of the model, or of another."""
        data, synced = self.plan.data, self.sharded and distributed.world_size() > 1
        longest = self.plan.options.max_new_tokens
        lm = self.lm if lm is None else lm
        return Observer(lm, data.template, data.test_batch_size, longest, synced)

    # tensors made in inference mode and kept, e.g. by ZeRO-3, cannot be used in training
    @torch.inference_mode(False)
    def observe(self, batch: Mapping[str, Any], number: int) -> None:
        """Observe a batch of rows of the test set with this number; the last one of a set writes
        its table."""
        name, rows = self.plan.names[number], batch["rows"]
        if name not in self.records:
            return
        needs = self.plan.needs_of(name)
        if self.validates:
            # a gradient norm would be added to the gradients of a step that has begun
            needs -= {"gradient"} if self.plan.options.val_generate else {"gradient", *GENERATED}
        where = f"{self.plan.data.place(name, test=True)} row"
        records = self.observer().observe(
            [self.plan.rows(name)[row] for row in rows],
            needs,
            names=[f"{where} {row + 1}" for row in rows],
            **self.plan.asked(name),
        )
        self.records[name] += [{"row": r} | made for r, made in zip(rows, records, strict=True)]
        if not self.validates:
            self._left[number] -= 1
            if not self._left[number]:
                self._finish_set(name)

    def observe_set(self, name: str, needs: frozenset[str]) -> Table:
        """Records of a whole test set at once. Collective."""
        table = observe_set(self.observer(), self.plan.rows(name), needs, **self.plan.asked(name))
        return self.annotated(name, table) if "generation" in needs else table

    def _finish_set(self, name: str) -> None:
        """Gather all ranks' records of a test set, and write its table."""
        records = merge(self.records.pop(name))

        def write() -> Table:
            self.annotated(name, records)
            if self.folder is not None:
                path = self.folder / f"{name}.parquet"
                results_files.write_table(path, records, self._keys[name])
            return records

        self.tables[name] = distributed.on_rank_zero(write)

    def _finished(self) -> dict[str, Table]:
        """The tables that an earlier, interrupted test has written."""
        tables = {}
        for name, key in self._keys.items() if self.folder is not None else ():
            table = results_files.read_table(self.folder / f"{name}.parquet", key, self.overwrite)
            if table is not None:
                tables[name] = table
        return tables

    def _table_keys(self) -> dict[str, dict[str, Any]]:
        """Test set -> what its table depends on. Collective."""
        plan, options, shortened = self.plan, self.plan.options, self._shortened()
        settings = {
            "model": fingerprint(self.lm),  # a checkpoint may have replaced the weights
            "template": _digest(plan.data.template.identity()),
            "precision": self.precision,
            "classifiers": [options.toxicity_classifier, options.sentence_model],
        }
        if options.gibberish_classifier is not None or options.format != "wagle":
            settings["openunlearning"] = [options.format, options.gibberish_classifier]
        keys: dict[str, dict[str, Any]] = {}
        for name in plan.names:
            needs, asked = plan.needs_of(name), plan.asked(name)
            generated = "generation" in needs
            further = {
                "header": asked["header"] if "choices" in needs else None,
                "stops": list(asked["stops"]) if generated else None,
                "tested rows": shortened.get(name),
            }
            keys[name] = {
                **settings,
                "rows": _digest(json.dumps(raw_rows(plan.rows(name)), default=str)),
                "needs": sorted(needs),
                "generate": asked["max_new_tokens"] if generated else 0,
                **{what: value for what, value in further.items() if value},
            }
        return keys

    def _shortened(self) -> dict[str, str]:
        """Test set -> how many of its rows are tested, if the batches leave some out. Collective.

        Batches have rows of similar length, the longest first, so that the number determines which
        rows they are.
        """
        counts = {}
        for name, batches in zip(self.plan.names, self.batches, strict=True):
            tested = len(set().union(*distributed.all_gather(batches)))
            if tested < (total := len(self.plan.rows(name))):
                counts[name] = f"{tested} of {total} rows"
                why = "test set %s: the trainer shortens this test, its measures are of %s"
                log.warning(why, name, counts[name])
        return counts

    # -- models that read generations --------------------------------------------------------------

    @cached_property
    def _readers(self) -> list[Any]:
        """Models that read generations, loaded; each has ``annotate``."""
        device = next(self.lm.parameters()).device
        return classifiers.readers(
            self.plan.options, device, self.plan.prefix, self.plan.suite.openunlearning
        )

    def load_readers(self) -> None:
        """Load the models that read generations, on rank 0, so that errors appear at once."""
        distributed.on_rank_zero(lambda: len(self._readers))

    def annotated(self, name: str, table: Table) -> Table:
        """The table, with what other models find in its generations."""
        for reader in self._readers:
            if self.plan.suite.forgets(name) or not reader.of_forget_rows:
                reader.annotate(table, self.plan.rows(name))
        return table

    # -- measuring --------------------------------------------------------------------------------

    def values(self) -> dict[str, float]:
        """The measures of a validation, by torchmetrics, which reduces them over ranks. Collective."""
        tables: Mapping[str, Table] = self.records
        if self.plan.options.val_generate:
            tables = {name: merge(records) for name, records in tables.items()}
            for name in tables:
                annotate = partial(self.annotated, name, tables[name])
                tables[name] = distributed.on_rank_zero(annotate)
        names = sorted({*distributed.all_gather(self.plan.measures(tables))})
        metrics = collection(self.plan.measures, names).to(self.lm.device)
        for name, table in tables.items():
            metrics.update(table, name)
        values = metrics.compute()
        return {name: values[name].item() for name in names if not metrics[name].undefined}

    def results(self) -> Results:
        """Measure what was observed, general ability and robustness. Collective."""
        plan = self.plan
        tables = {name: self.tables[name] for name in plan.names}
        others = {  # of results that are given, or of their rows
            name: results.metrics or defined_only(plan.measures(results.tables))
            for name, results in plan.results.items()
            if name in attacking.OTHERS
        }
        ability = self._ability()
        findings = self._attack(tables, others)
        skipped = {f"{attacking.PREFIX}/{n}": why for n, why in self._skipped_attacks.items()}
        measured = plan.measures(tables)
        attacked = {finding.key: finding.value for finding in findings}
        attacked |= {name: Undefined(why) for name, why in skipped.items()}
        values = {**measured, **ability.values, **attacked}
        infos = ability.infos | {finding.key: finding.info for finding in findings}
        infos |= dict.fromkeys(skipped, Info("", "retrained", "an attack"))
        infos = {name: infos.get(name) or plan.suite.info(name) for name in values}
        text = results_files.comparison(measured | ability.shown(), infos.__getitem__, **others)
        undefined = {name: str(v) for name, v in values.items() if isinstance(v, Undefined)}
        if plan.attacks:
            lines = [f"undefined: {n}: {undefined[n]}" for n in attacked if n in undefined]
            text = "\n".join([f"{text}\n", attacking.robustness_table(findings), *lines])
        tested = Results(defined_only(values), undefined, tables, infos, plan.prompts, text=text)
        tested.path = self.folder or Path()
        if distributed.rank() == 0:
            tested.files = self._files(tested)
            if plan.attacks:
                records = [finding.record() for finding in findings]
                tested.files[attacking.ROBUSTNESS_FILE] = records
        return tested

    def _files(self, tested: Results) -> dict[str, Any]:
        """File -> its content; ``metrics.json``, which says that the test is complete, is last."""
        plan, tables, files = self.plan, tested.tables, dict[str, Any]()
        if result := to_result(tables):
            files[results_files.RESULT_FILE] = result
        if plan.options.format == "openunlearning":
            scores = membership_scores(plan.observations(tables), *plan.suite.members)
            logs = to_logs(plan.suite.openunlearning, tables, tested.metrics, scores)
            files |= {f"{plan.suite.openunlearning}_EVAL.json": logs}
            files |= {f"{plan.suite.openunlearning}_SUMMARY.json": summary(logs)}
        about = {name: vars(info) for name, info in tested.infos.items()}
        info = {
            "model": self.model_name,
            "suite": type(plan.suite).__name__,
            "prompts": plan.prompts,
            "compared": plan.options.compared,
            "measures": {name: about[name] for name in tested.metrics},
            "undefined": {n: about[n] | {"why": why} for n, why in tested.undefined.items()},
            "rows": {name: len(table) for name, table in tables.items()},
            "absent_sets": [name for name in plan.suite.sets if name not in tables],
        }
        if plan.options.bootstrap:
            info["intervals"] = intervals(plan.measures, tables, plan.options.bootstrap)
        return files | {results_files.INFO_FILE: info, results_files.METRICS_FILE: tested.metrics}

    # -- general ability and attacks --------------------------------------------------------------

    @contextmanager
    def in_test_step(self) -> Iterator[None]:
        """Run the model in the precision of the test steps.

        Meanwhile autocast caches no copies of weights, since an attack that changes weights would
        make them stale.
        """
        cached = torch.is_autocast_cache_enabled()
        with self.step_context():
            torch.set_autocast_cache_enabled(False)
            try:
                yield
            finally:
                torch.set_autocast_cache_enabled(cached)

    def _ability(self) -> Ability:
        """General ability, if it was asked for; also kept for the suite's averages."""
        if self._harness is None:
            return Ability()
        with self.in_test_step():
            data = self.plan.data
            arguments = self.lm, data.tokenizer, data.test_batch_size, self.sharded
            ability = self._harness.measure(*arguments)
        self.plan.general |= ability.general
        return ability

    def subject(self, lm: Any = None, tables: Optional[Mapping[str, Table]] = None) -> Subject:
        """The model, or another, its data and its records, for attacks."""
        return Subject(self.plan, self.observer(lm), self.annotated, tables, self.sharded)

    def attack(
        self, attacks: Sequence[Attack], tables: Mapping[str, Table], *others: Any
    ) -> list[Finding]:
        """What usable attacks find on the model as it is now, with its records, and on others, see
        :func:`~wagle_pl.evaluation.attacks.attack.run_attacks`. Collective."""
        with self.in_test_step():
            return attacking.run_attacks(attacks, self.subject(tables=tables), *others)

    def _attack(
        self, tables: Mapping[str, Table], others: Mapping[str, Mapping[str, float]]
    ) -> list[Finding]:
        """Attack this model, and the target and the retrained model if they are available."""
        plan = self.plan
        if not plan.attacks:
            return []

        def load(name: str, folder: str) -> Subject:
            return self.subject(attacking.load_other(folder, self.lm, f"{plan.prefix}{name}"))

        loaders = {
            name: partial(load, name, folder)
            for name, path in plan.options.compared.items()
            if name in attacking.OTHERS and (folder := results_files.model_of(path))
        }
        if loaders and self.sharded:
            log.warning("under ZeRO-3 only this model is attacked, not %s", " and ".join(loaders))
            loaders = {}
        return self.attack(self._usable_attacks, tables, loaders, others)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
