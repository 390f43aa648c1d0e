"""``Study``: a grid of unlearning runs over one target model, compared at equal forgetting."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Optional, Union

import lightning as L

from wagle_pl.core.environment import prepare_libraries, silence
from wagle_pl.core.errors import Diverged, WagleError, check_counts
from wagle_pl.core.files import refuse_existing, write_text
from wagle_pl.core.needs import Needs
from wagle_pl.core.text import count
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.evaluation import Observations, Options, Results
from wagle_pl.evaluation.attacks.attack import PREFIX, find_attacks
from wagle_pl.evaluation.records import defined_only
from wagle_pl.evaluation.results import write_json
from wagle_pl.lab.study import SUMMARY_FILE, grid, text
from wagle_pl.lab.study.recovery import at_the_level
from wagle_pl.lab.study.references import References, attacks_of, rows_of
from wagle_pl.lab.study.report.studies import save_curves
from wagle_pl.lab.study.runs import (
    Along,
    EvaluateAlong,
    Generate,
    RunTable,
    UnkeptModule,
    announced,
    as_before_the_end,
    attribute,
    locked,
    make_trainer,
    say,
)
from wagle_pl.lab.study.summary import Compared, decimals, summarise
from wagle_pl.lm import models
from wagle_pl.masks import SUFFIX, WeightMask
from wagle_pl.unlearning import UnlearnModule

log = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130  # as in shells: 128 + SIGINT
FORMAT_VERSION = 2  # 1 had the paths of modules in the ids of runs


@dataclass(kw_only=True, eq=False)
class Study:
    """A grid of objectives, masks, learning rates and seeds over one target model.

    Every run is tested several times, and arms (an objective with a mask) are compared at equal
    forgetting. The output folder holds ``study.parquet`` (one line per run and test point), the
    comparison as ``study.json``, ``study.md`` and ``study.svg``, the masks, and the results of
    target and retrained model. A study that is started again continues, and adds what is new.

    Args:
        target: hub id, folder or GGUF file of the model to unlearn.
        output: folder of the study.
        data: the data module: class_path and init_args, or --data CLASS --data.option VALUE.
        retrained: the model trained without the forget rows, which sets the level of forgetting
            unless forget_level does.
        objectives: names (NPO, GradDiff, PO, ...), or options: class_path, init_args, name, and
            its own step_rule, optimizer and learning_rates.
        masks: dense, lora, a score (wagle, random, ...), or options: score, density (or a list of
            them) and other options of attribution; adapter (class_path and init_args of a LoRA);
            file, a mask file; name; its own learning_rates.
        learning_rates: learning rates, the same for every mask.
        seeds: random seeds of the order of rows, of refusals, of dropout, and of random masks.
        steps: optimiser steps per run.
        epochs: passes over the forget rows, instead of steps; 5 if neither is given.
        accumulate: micro-batches per step.
        optimizer: name, or class_path and init_args; its lr comes from learning_rates.
        points: number of tests per run, the last one at its end.
        along: what tests before the last one measure: all of the suite, or only answers: the
            probability of answers in the test sets of forget and utility, which is much faster.
        until_level: stop a run at the first test at which the level of forgetting is reached.
        forget: forget measure, as <test set>/<measure>.
        utility: utility measure; model_utility if every test has it, else retain/probability.
        forget_level: value of the forget measure at which utilities are compared, instead of the
            retrained model's.
        generate: when tests also generate answers: always, at the end of a run only, or never.
        module: options of UnlearnModule and of tests, such as warmup, suite, max_new_tokens.
        trainer: options of Lightning's Trainer, such as precision, accelerator, gradient_clip_val.
        attacks: attack every model that reaches the level (needs until_level), as the option
            robustness of a test does: all, or a list of Relearn, Quantise, Sample, Probe, ... or
            class_path and init_args. What comes back is compared at equal forgetting, also with the
            target and the retrained model under the same attacks.
        only: this time run only these objectives or masks, by their names in the tables, e.g. NPO
            or '[NPO, dense, wagle 0.2]'.
        hours: start no new run after this many hours; 0 only writes the tables.
        keep_models: keep every unlearned model, in models/<run>.
        join: folders of the same study, run on other machines with only, whose finished runs are
            imported, e.g. '[runs/one, runs/two]'.
    """

    target: str
    output: str
    data: ForgetRetainDataModule
    retrained: Optional[str] = None
    objectives: Sequence[Union[str, dict[str, Any]]] = ("GradDiff", "NPO", "PO")
    masks: Sequence[Union[str, dict[str, Any]]] = ("dense", "random", "magnitude", "wagle")
    learning_rates: Sequence[float] = (1e-5, 3e-5, 1e-4)
    seeds: Sequence[int] = (0, 1, 2)
    steps: Optional[int] = None
    epochs: Optional[int] = None
    accumulate: int = 1
    optimizer: Union[str, dict[str, Any]] = "MaskedAdamW"
    points: int = 4
    along: Along = "all"
    until_level: bool = False
    forget: str = "forget/probability"
    utility: Optional[str] = None
    forget_level: Optional[float] = None
    generate: Generate = "end"
    module: Optional[dict[str, Any]] = None
    trainer: Optional[dict[str, Any]] = None
    attacks: Optional[Union[list[Union[str, dict[str, Any]]], str]] = None
    only: Optional[Union[list[str], str]] = None
    hours: Optional[float] = None
    keep_models: bool = False
    join: Optional[Union[list[str], str]] = None

    def __post_init__(self) -> None:
        self.folder = Path(self.output)
        refuse_existing(self.folder, overwrite=True, kind="files")  # it continues in its folder
        if self.retrained is None and self.forget_level is None:
            hint = "give --retrained, the model trained without the forget rows, or --forget_level"
            raise WagleError("a study compares at a level of forgetting", hint=hint)
        self.grid = grid.Grid.of(self.objectives, self.masks, self.learning_rates, self.seeds)
        if self.steps is not None and self.epochs is not None:
            raise WagleError("give --steps or --epochs, not both")
        check_counts("--", points=self.points, accumulate=self.accumulate)
        check_counts("--", steps=self.steps, epochs=self.epochs)
        if self.hours is not None and not self.hours >= 0:
            raise WagleError(f"must be 0 or more, got {self.hours:g}", option="--hours")
        if self.along == "answers" and self.generate == "always":
            message = "--along answers generates nothing before a run's end"
            raise WagleError(f"{message}: leave --generate always out")
        self._attacks, self._every_attack = find_attacks(self.attacks, "--attacks")
        if self._attacks and not self.until_level:
            message = "the attacked model is the one that reaches the level: give --until_level"
            raise WagleError(message, option="--attacks")
        self._length = {"max_steps": self.steps} if self.steps else {"max_epochs": self.epochs or 5}
        self._optimizer = grid.read_optimizer(self.optimizer)
        self._module, self._tests = grid.read_module(self.module or {})
        self._trainer_options = grid.read_trainer(self.trainer or {})
        self._trainer = partial(make_trainer, self.folder, self._trainer_options)
        for name in ("only", "join"):
            value = getattr(self, name) or []
            setattr(self, name, [value] if isinstance(value, str) else list(value))
        names = [choice.name for choice in (*self.grid.objectives, *self.grid.masks)]
        if unknown := [name for name in self.only if name not in names]:
            message = f"--only: no objective or mask is called {unknown[0]!r}"
            raise WagleError(message, hint=f"there are: {', '.join(names)}")
        self.data = copy.copy(self.data)
        self._retrained = str(self.folder / "retrained") if self.retrained else None  # results

    # -- from start to finish ----------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run what is not finished; returns the comparison (the content of ``study.json``)."""
        for model in filter(None, (self.target, self.retrained)):
            models.locate(model)
        with locked(self.folder):
            self._prepare()
            runs = list(self.grid.runs(self.settings))
            self.planned = {run.id for run in runs}
            if self.join:
                joined = self.table.join(self.join)
                say(f"{count(joined, 'run')} taken over from {', '.join(self.join)}")
            kinds = {"objective": self.grid.objectives, "mask": self.grid.masks}
            names = {c.id: c.name for choices in kinds.values() for c in choices}
            for row in self.table.rows:  # of earlier sessions: with names and measures of this one
                for kind in kinds:
                    id, name = row[f"{kind}_id"], row[kind]
                    other = f"{name} ({id[:4]})" if name in names.values() else name
                    row[kind] = names.get(id, other)
                row |= {"forget": row.get(self.forget), "utility": row.get(self.utility)}
            for kind, choices in kinds.items():
                if only := {choice.name for choice in choices} & set(self.only):
                    runs = [run for run in runs if getattr(run, kind).name in only]
            finished = self._finished()
            todo = [run for run in runs if run.id not in finished]
            done = f"{count(len(self.planned), 'run')}, {len(finished)} of them finished"
            say(f"{self.folder}: {done}; {len(todo)} to do{self._time_left(len(todo))}")
            if self.hours != 0 and todo:
                self._make_masks(todo)
            try:
                self._work(todo)
            except (KeyboardInterrupt, SystemExit):
                missing = f"{len(self.planned) - len(self._finished())} of {len(self.planned)}"
                say(f"stopped; the same command continues ({missing} runs are missing)")
                raise
            summary = self._write()
            save_curves(summary, self.folder)
        if summary["headline"]:
            say(f"\n{text.markdown(summary)}\n{self.folder / 'study.md'} has the same")
        return summary

    def _finished(self) -> set[str]:
        return self.planned & self.table.finished()

    def _time_left(self, runs: int) -> str:
        """How long this many runs will take, judging by finished ones; empty without any."""
        seconds = {row["run"]: row["seconds"] for row in self.table.rows}.values()
        if not seconds or not runs:
            return ""
        return f", {text.duration(runs * sum(seconds) / len(seconds))} left"

    def _work(self, todo: Sequence[grid.Run]) -> None:
        began = time.monotonic()
        for number, run in enumerate(todo, 1):
            if self.hours is not None and time.monotonic() - began > 3600 * self.hours:
                left = count(len(todo) - number + 1, "run")
                say(f"{self.hours:g} h are over; the same command continues with the {left} left")
                return
            with announced(f"[{number}/{len(todo)}] {run.name}"):
                rows = self._run(run)
            self.table.append(rows)
            last, left = rows[-1], self._time_left(len(todo) - number)
            forget, utility = (decimals(last.get(name)) for name in ("forget", "utility"))
            outcome = last.get("note") or f"forget {forget}, utility {utility}"
            say(f"{outcome}, {text.duration(last['seconds'])}{left}")
            self._write()

    # -- before the runs ---------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Prepare everything that all runs share; mistakes in the input show up here."""
        self.data.needs = Needs(tokenizer=lambda: models.load_tokenizer(self.target))
        if self.data.examples("forget") is None:
            raise WagleError("a study needs forget rows: give --data.forget")
        self.tested = References(
            self.folder,
            self._trainer,
            self.data,
            {**self._module, **self._tests},
            self.generate != "never",
            self._attacks,
            self._every_attack,
        )
        fingerprints: dict[str, Optional[str]] = {"retrained": None}
        self.references: dict[str, dict[str, float]] = {"target": {}, "retrained": {}}
        for name, model in (("retrained", self.retrained), ("target", self.target)):
            if model is not None:
                beside = self._retrained if name == "target" else None
                fingerprints[name], measures = self.tested.test(name, model, beside)
                self.references[name] = measures
                say(f"{self.forget} {decimals(measures.get(self.forget))}")
        self.fingerprint = fingerprints["target"]
        self.compared = self._compare_by()
        elsewhere = ("accelerator", "devices")  # a run is the same on another machine
        self.settings = {  # of all runs: changing any makes different runs
            **fingerprints,
            "format_version": FORMAT_VERSION,
            **rows_of(self.data, self.data.test_names()),
            "refusals": grid.digest(self.data.refusals),
            "batch_size": self.data.batch_size,
            "accumulate": self.accumulate,
            "length": self._length,
            "points": self.points,
            "generate": self.generate,
            "along": self._answers_of() or "all",
            "ends_at": {self.forget: self.compared.level} if self.until_level else None,
            "optimizer": grid.definition(self._optimizer.func, self._optimizer.keywords),
            "module": {**self._module, **self._tests},
            "trainer": {k: v for k, v in self._trainer_options.items() if k not in elsewhere},
            **attacks_of(self._attacks),
        }
        self.table = RunTable(self.folder, self.settings)
        if self.compared.nothing_to_unlearn:
            now, level = self.compared.target[self.forget], self.compared.level
            known = f"its {self.forget} is {now:.3f}, the level to reach {level:.3f}"
            why = f"the target does not know the forget set: {known}"
            log.warning("%s: there is nothing to unlearn", why)

    def _compare_by(self) -> Compared:
        """The measures and the level, checked."""
        target = self.references["target"]
        if self.utility is None:
            full = self.along == "all" and self.generate == "always" and "model_utility" in target
            self.utility = "model_utility" if full else "retain/probability"
        along = {name for name in target if not name.startswith(f"{PREFIX}/")}
        if self.along == "answers" or self.generate == "end":
            tables = Results.read(self.folder / "target").tables
            observed = Observations(as_before_the_end(tables, self._answers_of()))
            along &= set(defined_only(self.tested.suite.measures(observed)))
        for option, measure in (("--forget", self.forget), ("--utility", self.utility)):
            if measure not in along:
                asked = "--along all" if self.along == "answers" else "--generate always"
                why = f" (it needs {asked})" if measure in target else ""
                message = f"{option}: {measure!r} is not measured at every point{why}"
                raise WagleError(message, hint=f"there are: {', '.join(sorted(along))}")
        level = self.forget_level
        if level is None:
            level = self.references["retrained"].get(self.forget)
        if level is None:
            message = f"--forget: {self.forget} is undefined for the retrained model"
            raise WagleError(f"{message}: give --forget_level")
        signs = {"lower": -1, "higher": 1}
        rises = 1 if level > target[self.forget] else -1
        forget_sign = signs.get(self.tested.suite.info(self.forget).direction, rises)
        utility_sign = signs.get(self.tested.suite.info(self.utility).direction, 1)
        return Compared(self.forget, self.utility, target, level, forget_sign, utility_sign)

    def _answers_of(self) -> Optional[list[str]]:
        """The test sets of the two measures, if tests along the way measure only their answers."""
        if self.along == "all":
            return None
        measured = {measure.partition("/")[0] for measure in (self.forget, self.utility)}
        return [name for name in self.data.test_names() if name in measured]

    # -- masks -------------------------------------------------------------------------------------

    def _make_masks(self, todo: Sequence[grid.Run]) -> None:
        """Make the masks that the runs need and that are missing, in as few passes as possible."""
        for mask in self.grid.masks:
            if mask.kind == "file":
                where = f"masks: mask {mask.entry}"
                WeightMask.load(str(mask.entry)).check(
                    self.tested.shapes, self.fingerprint, where=where
                )
        missing = {}
        for run in todo:
            if run.mask.kind == "score" and not self._mask_file(run).is_file():
                missing[self._mask_file(run).stem] = run.mask.of_seed(run.seed)
        options = {"output": str(self.folder / "masks"), "overwrite": True}
        options["run_config"] = {"study": self.settings}
        attributed = attribute(self.target, missing, self._trainer, self.data, **options)
        for seconds, module in attributed:
            say(f"attribution, {count(len(module.specs), 'mask')}: {text.duration(seconds)}")

    def _mask_file(self, run: grid.Run) -> Optional[Path]:
        """The mask of a run; None where all weights move."""
        if run.mask.kind == "file":
            return Path(str(run.mask.entry))
        if run.mask.kind != "score":
            return None
        names = ("target", "forget_rows", "retain_rows", "template", "batch_size")
        shared = {name: self.settings[name] for name in names}
        name = run.mask.of_seed(run.seed).file_name(shared)
        return self.folder / "masks" / f"{name}{SUFFIX}"

    # -- a run -------------------------------------------------------------------------------------

    def _run(self, run: grid.Run) -> list[dict[str, Any]]:
        L.seed_everything(run.seed, verbose=False)
        data = copy.copy(self.data)
        data.seed = run.seed
        mask, rule = self._mask_file(run), run.objective.rule()
        output = self.folder / "models" / run.id if self.keep_models else self.folder / run.id
        module = (UnlearnModule if self.keep_models else UnkeptModule)(
            model=self.target,
            output=str(output),
            overwrite=True,
            objective=run.objective.make(),
            mask=None if mask is None else str(mask),
            adapter=run.mask.adapter(),
            **self._module | ({} if rule is None else {"step_rule": rule}),
        )
        module.make_optimizer = partial(run.objective.optimizer_maker or self._optimizer, lr=run.lr)
        module.run_config = {"study": self.settings, "run": run.name}
        generates = self.generate != "never"
        tests = Options(generate=generates, retrained=self._retrained, **self._tests)

        def is_enough(measures: Mapping[str, float]) -> bool:
            value, by = measures.get(self.forget), self.compared
            return self.until_level and value is not None and by.forget_sign * value >= by.end

        along = EvaluateAlong(tests, self.points, self.generate, self._answers_of(), is_enough)
        options = {"accumulate_grad_batches": self.accumulate, "callbacks": [along]}
        trainer = self._trainer(**options, **self._length)
        start, rows = time.monotonic(), along.tests
        with silence():
            try:
                trainer.fit(module, datamodule=data)
            except Diverged:  # a row without measures says that the run is over, and why
                step, seconds = module.global_step, round(time.monotonic() - start, 2)
                note = f"diverged at step {step}"
                rows.append({"step": step, "seconds": seconds, "note": note})
            if self._attacks and is_enough(rows[-1]):  # it ended there
                try:
                    rows[-1] |= self.tested.attack(trainer, module, along.evaluation, along.tables)
                except WagleError as error:  # of one run, as a loss that is not finite
                    rows[-1]["note"] = f"not attacked: {error}"
                rows[-1]["seconds"] = round(time.monotonic() - start, 2)
        if module.model_fingerprint != self.fingerprint:
            hint = "start a new study with another --output"
            raise WagleError(f"{self.target} has changed since the study began", hint=hint)
        labels = run.labels
        if labels["density"] is None and module.mask is not None:
            labels["density"] = module.mask.density
        axes = {"forget": self.forget, "utility": self.utility}
        return [{**labels, **t, **{axis: t.get(name) for axis, name in axes.items()}} for t in rows]

    # -- what was found ----------------------------------------------------------------------------

    def _write(self) -> dict[str, Any]:
        """Write the table, ``study.json`` and ``study.md``."""
        rows, by = self.table.rows, self.compared
        ends = at_the_level(rows, by, self.references["retrained"]) if self.until_level else []
        usual = [o.name for o in self.grid.objectives if not o.learning_rates]
        own_rates = {*product(usual, [m.name for m in self.grid.masks if m.learning_rates])}
        summary = {
            "format_version": FORMAT_VERSION,
            "forget": self.forget,
            "utility": self.utility,
            "forget_level": by.level,
            "level_of": "option" if self.forget_level is not None else "retrained",
            "forget_sign": by.forget_sign,
            "utility_sign": by.utility_sign,
            "nothing_to_unlearn": by.nothing_to_unlearn,
            **self.references,
            "runs": {
                "finished": len(self._finished()),
                "planned": len(self.planned),
                "in_table": len(self.table.finished()),
            },
            "headline": summarise(rows, by, own_rates) if rows else [],
            "ends": ends,
            "models": {"target": self.target, "retrained": self.retrained},
            "learning_rates": list(self.grid.rates),
            "seeds": list(self.seeds),
            "objectives": {choice.name: choice.definition for choice in self.grid.objectives},
            "masks": {choice.name: choice.definition for choice in self.grid.masks},
            "settings": self.settings,
        }
        self.table.write()
        write_json(self.folder / SUMMARY_FILE, json.loads(json.dumps(summary, default=str)))
        write_text(self.folder / "study.md", text.markdown(summary))
        return summary


def study(**options: Any) -> None:
    """Run the unfinished part of the grid, then print and write the comparison."""
    prepare_libraries()
    try:
        Study(**options).run()
    except KeyboardInterrupt:  # the study has said what is left to do
        raise SystemExit(EXIT_INTERRUPTED) from None
