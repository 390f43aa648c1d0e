"""``Study``: runs a grid of unlearning runs over one target model, and compares them at equal forgetting."""

from __future__ import annotations

import copy
import gc
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import lightning as L

from wagle_pl.core.environment import silence
from wagle_pl.core.errors import Diverged, WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.core.text import count, decimals
from wagle_pl.data.example import raw_rows
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.evaluation import EvaluationModule, Observations, Results, find_suite
from wagle_pl.evaluation.results import write_json
from wagle_pl.evaluation.sets import defined_only
from wagle_pl.lm import models
from wagle_pl.study import attribute, grid, options, text
from wagle_pl.study.configured import Entry, digest, make
from wagle_pl.study.report.figures import save_figure
from wagle_pl.study.report.study import overview
from wagle_pl.study.run import (
    Along,
    StudyRun,
    answers_only,
    output_of,
    rows_of,
    ungenerated,
)
from wagle_pl.study.store import FIGURE_FILE, SUMMARY_FILE, TEXT_FILE, RunTable, has_runs, locked
from wagle_pl.study.summary import Compared, summarise
from wagle_pl.unlearning.adapters import LoRA

log = logging.getLogger(__name__)

FORMAT_VERSION = 1


class Study:
    """A grid of objectives, masks, learning rates and seeds over one target model; every run is tested along its way,
    and arms (an objective with a mask) are compared at equal forgetting.

    The output folder holds ``study.parquet`` (a row a run and test point), what was found as ``study.json``,
    ``study.md`` and ``study.svg``, the masks, and the results of target and retrained model. A study that was stopped
    goes on where it was when it is started again; a grid that has grown runs only what is new.

    The target model is loaded anew for each run: that takes seconds where a run takes minutes, needs no second copy of
    the weights in memory, and leaves nothing of the run before.

    Args:
        target: hub id, folder or GGUF file of the model that is to forget.
        output: folder of the study.
        data: the data module: class_path and init_args, or --data CLASS --data.option VALUE.
        retrained: the model trained without the forget rows; its forget measure is the level at which utilities are
            compared. Needed unless forget_level is given.
        objectives: names (NPO, GradDiff, PO, ...), or class_path and init_args, with a name where one class is there
            twice.
        masks: dense, lora, a score (wagle, random, magnitude, ...), or options: score, density (a list makes a mask of
            each), select, scope, include, exclude, hessian, gamma, damping, hessian_samples, hessian_data, forget_loss,
            reduction as attribution has them; or adapter (class_path and init_args of a LoRA); or file, a mask file;
            and name, and learning_rates in place of the study's. A random mask is drawn anew for every seed.
        learning_rates: the same for every mask.
        seeds: of the order of rows, of refusals, and of dropout.
        steps: optimiser steps of a run.
        epochs: passes over the forget rows, in place of steps; 5 if neither is given.
        batch_size: pairs a micro-batch; the data module's own when not given.
        accumulate: micro-batches a step.
        optimizer: name, or class_path and init_args; its lr comes from learning_rates.
        points: how many times a run is tested along its way, the last time at its end.
        along: what tests before the last one measure: all the suite has, or only the probability of the answers of the
            test sets that forget and utility name, which takes a small part of the time.
        until_level: a run ends at the first test that finds the level of forgetting reached. What comes after is in
            neither of the two comparisons; curves then end there.
        forget: forget measure, as <test set>/<measure>.
        utility: utility measure. When not given: model_utility if every test generates and the suite has it, else
            retain/probability.
        forget_level: value of the forget measure at which utilities are compared, in place of the retrained model's.
        generate: whether tests also generate answers: always, at the end of a run only, or never.
        limit_test: rows of each test set.
        module: options of UnlearnModule and of its tests, such as warmup, decay, suite, max_new_tokens,
            gradient_checkpointing, clip_scope.
        trainer: options of Lightning's Trainer, such as precision, accelerator, gradient_clip_val.
        only: run only these objectives or masks (by the names that tables give them) in this sitting, e.g. NPO or
            '[NPO, dense, wagle 0.2]'; the tables show all that is finished.
        hours: start no new run after so many hours of this sitting; 0 only writes what the runs that are there tell.
        keep_models: keep every unlearned model, under models/<run>.
        join: folders of the same study whose finished runs are taken over, e.g. '[runs/one, runs/two]': pieces (only)
            that ran on other machines.

    Raises:
        WagleError: if an option has no meaning.
    """

    def __init__(
        self,
        *,
        target: str,
        output: str,
        data: ForgetRetainDataModule,
        retrained: Optional[str] = None,
        objectives: Sequence[Union[str, dict[str, Any]]] = ("GradDiff", "NPO", "PO"),
        masks: Sequence[Union[str, dict[str, Any]]] = ("dense", "random", "magnitude", "wagle"),
        learning_rates: Sequence[float] = (1e-5, 3e-5, 1e-4),
        seeds: Sequence[int] = (0, 1, 2),
        steps: Optional[int] = None,
        epochs: Optional[int] = None,
        batch_size: Optional[int] = None,
        accumulate: int = 1,
        optimizer: Union[str, dict[str, Any]] = "MaskedAdamW",
        points: int = 4,
        along: Along = "all",
        until_level: bool = False,
        forget: str = "forget/probability",
        utility: Optional[str] = None,
        forget_level: Optional[float] = None,
        generate: Literal["end", "always", "never"] = "end",
        limit_test: Optional[int] = None,
        module: Optional[dict[str, Any]] = None,
        trainer: Optional[dict[str, Any]] = None,
        only: Optional[Union[list[str], str]] = None,
        hours: Optional[float] = None,
        keep_models: bool = False,
        join: Optional[Union[list[str], str]] = None,
    ) -> None:
        self.target, self.retrained, self.folder = target, retrained, Path(output)
        refuse_existing(self.folder, overwrite=True, kind="files")  # a study goes on in its folder
        if retrained is None and forget_level is None:
            raise WagleError(
                "a study compares at a level of forgetting: give --retrained, the model trained without "
                "the forget rows, or --forget_level"
            )
        self.objectives = grid.read_objectives(objectives)
        self.masks = grid.read_masks(masks)
        self.rates = grid.check_rates(learning_rates)
        self.seeds = options.check_seeds(seeds)
        self.length = options.check_length(steps, epochs)
        options.check_positive(
            points=points, accumulate=accumulate, limit_test=limit_test, batch_size=batch_size
        )
        self.accumulate, self.points, self.generate = accumulate, points, generate
        self.along, self.until_level = along, until_level
        if along == "answers" and generate == "always":
            raise WagleError(
                "--along answers generates nothing before a run's end: leave --generate always out"
            )
        self.optimizer = options.Optimizer(optimizer)
        self.forget, self.utility, self.forget_level = forget, utility, forget_level
        self.module = options.check_module(module or {})
        self.trainer_options = options.check_trainer(trainer or {})
        self.only = options.check_only(_several(only), self.objectives, self.masks)
        self.hours, self.keep_models = hours, keep_models
        self.join = _several(join)
        self.data = copy.copy(data)
        self.data.batch_size = batch_size or data.batch_size
        self.data.limit_test = limit_test or data.limit_test

    # -- the whole ----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run what is not finished, and return what was found (the content of ``study.json``)."""
        models.locate(self.target)
        if self.retrained is not None:
            models.locate(self.retrained)
        with locked(self.folder) as said:
            if said:
                log.warning(said)
            self._prepare()
            runs = list(
                grid.runs(self.objectives, self.masks, self.rates, self.seeds, self.settings)
            )
            self.planned = {run.id: run for run in runs}
            if self.join:
                print(
                    f"{count(self.table.join(self.join), 'run')} taken over from {', '.join(self.join)}"
                )
            self._adopt()
            wanted = [run for run in runs if self._selected(run)]
            todo = [run for run in wanted if run.id not in self.table.finished()]
            left = text.time_left(self._measured(), len(todo))
            print(
                f"{self.folder}: {count(len(runs), 'run')}, {len(runs) - self._missing()} of them finished; "
                f"{len(todo)} to do{f', {left}' if left else ''}",
                flush=True,
            )
            if self.hours != 0:
                self._make_masks(todo)
            try:
                self._work(todo)
            except (KeyboardInterrupt, SystemExit):
                print(
                    f"\nstopped; the same command goes on ({self._missing()} of {len(runs)} runs are missing)",
                    flush=True,
                )
                raise
            except Exception:
                print(flush=True)  # the line of the run that failed
                raise
            found = self._write()
            if (figure := overview(found)) is not None:
                save_figure(figure, [self.folder / FIGURE_FILE])
        if found["headline"]:
            print(
                f"\n{text.console(found)}\n\n{self.folder / TEXT_FILE} has it as Markdown",
                flush=True,
            )
        return found

    def _selected(self, run: grid.Run) -> bool:
        names = {"objective": run.objective.name, "mask": run.mask.name}
        return all(names[kind] in chosen for kind, chosen in self.only.items())

    def _missing(self) -> int:
        return len(set(self.planned) - self.table.finished())

    def _measured(self) -> list[float]:
        """Seconds that each finished run took."""
        return list({row["run"]: row["seconds"] for row in self.table.rows}.values())

    def _work(self, todo: Sequence[grid.Run]) -> None:
        """The runs, one after the other."""
        began = time.monotonic()
        measured = self._measured()
        for number, run in enumerate(todo, 1):
            if self.hours is not None and time.monotonic() - began > 3600 * self.hours:
                left = count(len(todo) - number + 1, "run")
                print(
                    f"{self.hours:g} h are over; the same command goes on with the {left} left",
                    flush=True,
                )
                return
            print(f"[{number}/{len(todo)}] {run.name}: ", end="", flush=True)
            start = time.monotonic()
            rows = self._run(run)
            measured.append(time.monotonic() - start)
            self.table.append(rows)
            left = text.time_left(measured, len(todo) - number)
            print(
                ", ".join(
                    part for part in (_outcome(rows), text.duration(measured[-1]), left) if part
                ),
                flush=True,
            )
            self._write()

    # -- before the runs ----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Everything that all runs share; what is wrong with the input shows here."""
        data = self.data
        if data.tokenizer_name is None:
            data.tokenizer = models.load_tokenizer(self.target)
        if data.rows("forget") is None:
            raise WagleError("a study needs forget rows: give --data.forget")
        self.suite = find_suite(
            self.module.get("suite") or getattr(data, "suite", "tofu") or "generic"
        )
        retrained: dict[str, float] = {}
        fingerprints: dict[str, Optional[str]] = {"retrained": None}
        if self.retrained is not None:
            fingerprints["retrained"], retrained = self._evaluate("retrained", self.retrained)
        fingerprints["target"], target = self._evaluate("target", self.target)
        self.references = {"target": target, "retrained": retrained}
        self.fingerprint = fingerprints["target"]
        self.compared = self._compare_by()
        self.settings = {**fingerprints, **self._settings()}
        self.table = RunTable(self.folder, self.settings)
        if self.compared.nothing_to_unlearn:
            log.warning(
                "the target does not know the forget set: its %s is %.3f, the level to reach %.3f: there is "
                "nothing to unlearn",
                self.forget,
                target[self.forget],
                self.compared.level,
            )

    def _settings(self) -> dict[str, Any]:
        """What all runs share, as plain data; a change of any makes other runs."""
        data = self.data
        tests = {name: digest(raw_rows(data.rows(f"test/{name}"))) for name in data.test_names()}
        return {
            "forget_rows": digest(raw_rows(data.rows("forget"))),
            "retain_rows": digest(raw_rows(data.rows("retain"))),
            "template": digest(data.template.identity()),
            "refusals": digest(data.refusals),
            "test_rows": tests,
            "batch_size": data.batch_size,
            "accumulate": self.accumulate,
            "length": self.length,
            "points": self.points,
            "generate": self.generate,
            "along": self._answers_of() or "all",
            "ends_at": {self.forget: self.compared.level} if self.until_level else None,
            "optimizer": self.optimizer.definition,
            "module": self.module,
            "trainer": {
                k: v for k, v in self.trainer_options.items() if k not in ("accelerator", "devices")
            },
        }

    def _evaluate(self, name: str, model: str) -> tuple[str, dict[str, float]]:
        """Fingerprint and measures of target or retrained model; tested once, then found in the study's folder."""
        fresh = not has_runs(self.folder)  # later, other results are a sign of another study
        print(f"{name} model {model}: ", end="", flush=True)
        own = {k: v for k, v in self.module.items() if k in options.SHARED_OPTIONS}
        own["retrained"] = (
            str(self.folder / "retrained") if name == "target" and self.retrained else None
        )
        generate = self.generate != "never"
        module = EvaluationModule(
            model=model, output=str(self.folder / name), overwrite=fresh, generate=generate, **own
        )
        try:
            with silence():
                self._trainer().test(module, datamodule=copy.copy(self.data), verbose=False)
        except WagleError as error:
            print(flush=True)
            raise WagleError(
                str(error).replace("--model.output or pass --model.overwrite true", "--output")
            ) from None
        fingerprint, metrics = module.model_fingerprint, dict(module.metrics)
        if name == "target":
            self.shapes = models.parameter_shapes(module.lm)
        del module
        gc.collect()
        print(f"{self.forget} {decimals(metrics.get(self.forget))}", flush=True)
        return fingerprint, metrics

    def _compare_by(self) -> Compared:
        """The measures and the level, checked."""
        target = self.references["target"]
        along = set(target)
        if self.utility is None:
            full = self.along == "all" and self.generate == "always" and "model_utility" in along
            self.utility = "model_utility" if full else "retain/probability"
        if self.along == "answers" or self.generate == "end":  # what can be measured at every point
            tables = Results(self.folder / "target").tables
            lean = (
                ungenerated(tables)
                if self.along == "all"
                else answers_only(tables, self._answers_of())
            )
            along &= set(defined_only(self.suite.measures(Observations(lean))))
        for option in ("forget", "utility"):
            measure = getattr(self, option)
            if measure not in along:
                asked = "--along all" if self.along == "answers" else "--generate always"
                why = f" (it needs {asked})" if measure in target else ""
                raise WagleError(
                    f"--{option}: {measure!r} is not measured at every point{why}; there are: "
                    f"{', '.join(sorted(along))}"
                )
        level = (
            self.forget_level
            if self.forget_level is not None
            else self.references["retrained"].get(self.forget)
        )
        if level is None:
            raise WagleError(
                f"--forget: {self.forget} is undefined for the retrained model: give --forget_level"
            )
        ways = {"lower": -1, "higher": 1}
        rising = 1 if level > target[self.forget] else -1
        sign = ways.get(self.suite.info(self.forget).direction, rising)
        better = ways.get(self.suite.info(self.utility).direction, 1)
        return Compared(self.forget, self.utility, target, level, sign, better)

    def _answers_of(self) -> Optional[list[str]]:
        """The test sets of the two measures, if tests along the way are of their answers alone."""
        if self.along == "all":
            return None
        measured = {measure.partition("/")[0] for measure in (self.forget, self.utility)}
        return [name for name in self.data.test_names() if name in measured]

    def _enough(self, measures: Mapping[str, float]) -> bool:
        """Whether a run has reached the level of forgetting, and ends there."""
        found, by = measures.get(self.forget), self.compared
        return (
            self.until_level
            and found is not None
            and by.forget_sign * found >= by.forget_sign * by.level
        )

    def _adopt(self) -> None:
        """Give rows of earlier sittings the names and measures of this one."""
        for row in self.table.rows:
            row["objective"] = grid.present_name(
                row["objective"], row["objective_id"], self.objectives
            )
            row["mask"] = grid.present_name(row["mask"], row["mask_id"], self.masks)
            row |= {"forget": row.get(self.forget), "utility": row.get(self.utility)}

    def _make_masks(self, todo: Sequence[grid.Run]) -> None:
        """The masks that the runs need and that are not there yet, in as few passes as can be."""
        for mask in self.masks:
            if mask.kind == "file":
                attribute.check_mask(mask.file, self.shapes, self.fingerprint)
        wanted = {
            self._mask_file(run): run.mask.of_seed(run.seed)
            for run in todo
            if run.mask.kind == "score"
        }
        missing = {file: mask for file, mask in wanted.items() if not file.is_file()}
        names = {id(mask): file.stem for file, mask in missing.items()}
        for pass_options, masks in attribute.passes(list(missing.values())):
            print(
                f"attribution, {len(masks)} {'mask' if len(masks) == 1 else 'masks'}: ",
                end="",
                flush=True,
            )
            start = time.monotonic()
            module = {"model": self.target, "output": str(self.folder / "masks")}
            with silence():
                attribute.make_masks(
                    masks,
                    [names[id(mask)] for mask in masks],
                    pass_options,
                    module,
                    self._attribute,
                )
            print(text.duration(time.monotonic() - start), flush=True)

    def _mask_file(self, run: grid.Run) -> Path:
        shared = {
            k: self.settings[k]
            for k in ("target", "forget_rows", "retain_rows", "template", "batch_size")
        }
        return attribute.mask_file(
            self.folder / "masks", attribute.file_name(run.mask.of_seed(run.seed), shared)
        )

    def _attribute(self, module: Any) -> None:
        module.run_config = {"study": self.settings}
        plain = {k: v for k, v in self.trainer_options.items() if not k.startswith("gradient_clip")}
        self._trainer(plain, max_epochs=1).fit(module, datamodule=copy.copy(self.data))

    # -- a run --------------------------------------------------------------------------------------------------------

    def _run(self, run: grid.Run) -> list[dict[str, Any]]:
        """Unlearn and test; the run's rows."""
        L.seed_everything(run.seed, verbose=False)
        data = copy.copy(self.data)
        data.seed = run.seed
        mask = {"score": self._mask_file, "file": lambda run: run.mask.file}.get(
            run.mask.kind, lambda run: None
        )(run)
        module = StudyRun(
            model=self.target,
            output=output_of(self.folder, run.id, self.keep_models),
            overwrite=True,
            objective=run.objective.make(),
            mask=None if mask is None else str(mask),
            adapter=make(LoRA, run.mask.adapter, "adapter") if run.mask.kind == "lora" else None,
            points=self.points,
            generate=self.generate,
            answers_of=self._answers_of(),
            enough=self._enough,
            keep=self.keep_models,
            evaluation={
                **options.split_module(self.module)[1],
                "retrained": str(self.folder / "retrained") if self.retrained else None,
            },
            **options.split_module(self.module)[0],
        )
        module.make_optimizer = self.optimizer.at(run.lr)
        module.run_config = {"study": self.settings, "run": run.name}
        trainer = self._trainer(accumulate_grad_batches=self.accumulate, **self.length)
        start = time.monotonic()
        ended = False
        with silence():
            try:
                trainer.fit(module, datamodule=data)
            except Diverged:
                ended = True
        if module.model_fingerprint != self.fingerprint:
            raise WagleError(
                f"{self.target} has changed since the study began: start a new study with another --output"
            )
        density = (
            run.mask.density if module.mask is None or run.mask.density else module.mask.density
        )
        labels = {
            "objective": run.objective.name,
            "mask": run.mask.name,
            "score": run.mask.score_name,
            "density": density,
            "lr": run.lr,
            "seed": run.seed,
            "run": run.id,
            "objective_id": run.objective.id,
            "mask_id": run.mask.id,
        }
        step = module.global_step
        rows = rows_of(module.tests, labels, step, step + ended, time.monotonic() - start)
        for row in rows:
            row |= {"forget": row.get(self.forget), "utility": row.get(self.utility)}
        del module, trainer
        gc.collect()
        return rows

    def _trainer(self, given: Optional[Mapping[str, Any]] = None, **own: Any) -> L.Trainer:
        with silence():
            return L.Trainer(
                # a study has tests of its own, whatever data.val says
                **{
                    **(self.trainer_options if given is None else given),
                    **own,
                    "limit_val_batches": 0,
                },
                default_root_dir=str(self.folder),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

    # -- what was found -----------------------------------------------------------------------------------------------

    def _write(self) -> dict[str, Any]:
        """Write ``study.json`` and ``study.md``."""
        own = {mask.name for mask in self.masks if mask.learning_rates}
        arms = summarise(self.table.rows, self.compared, own) if self.table.rows else []
        found = {
            "format_version": FORMAT_VERSION,
            "forget": self.forget,
            "utility": self.utility,
            "forget_level": self.compared.level,
            "level_of": "option" if self.forget_level is not None else "retrained",
            "forget_sign": self.compared.forget_sign,
            "utility_sign": self.compared.utility_sign,
            "nothing_to_unlearn": self.compared.nothing_to_unlearn,
            **self.references,
            "runs": {
                "finished": len(self.planned) - self._missing(),
                "planned": len(self.planned),
                "in_table": len(self.table.finished()),
            },
            "headline": arms,
            "models": {"target": self.target, "retrained": self.retrained},
            "learning_rates": list(self.rates),
            "seeds": list(self.seeds),
            "objectives": {choice.name: choice.definition for choice in self.objectives},
            "masks": {choice.name: choice.definition for choice in self.masks},
            "settings": self.settings,
        }
        self.table.write()
        write_json(self.folder / SUMMARY_FILE, json.loads(json.dumps(found, default=str)))
        with atomic_path(self.folder / TEXT_FILE) as temporary:
            temporary.write_text(text.markdown(found), encoding="utf-8")
        return found


def _several(given: Optional[Union[list[str], str]]) -> list[str]:
    """A list of names; one name is a list of one."""
    return [given] if isinstance(given, str) else list(given or [])


def _outcome(rows: Sequence[Mapping[str, Any]]) -> str:
    """A finished run in a few words: what its last test found."""
    last = rows[-1]
    if last.get("note"):
        return str(last["note"])
    return f"forget {decimals(last.get('forget'))}, utility {decimals(last.get('utility'))}"


__all__ = ["Entry", "Study"]
