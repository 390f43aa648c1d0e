"""The runs of a study: unlearning with tests along the way, and the table that keeps the results."""

from __future__ import annotations

import copy
import gc
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

import lightning as L
from lightning.pytorch.callbacks import Callback

from wagle_pl.attribution import AttributionModule
from wagle_pl.core.environment import silence
from wagle_pl.core.errors import WagleError
from wagle_pl.core.outputs import Planned, hold
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.evaluation import Evaluation, Options, Plan
from wagle_pl.evaluation.observe import GENERATED
from wagle_pl.evaluation.records import defined_only
from wagle_pl.evaluation.results import table_key, write_table
from wagle_pl.evaluation.tofu_result import Table
from wagle_pl.lab.study import TABLE_FILE
from wagle_pl.lab.study.grid import MaskChoice, passes
from wagle_pl.lab.study.summary import COLUMNS, load_runs
from wagle_pl.unlearning import UnlearnModule

log = logging.getLogger(__name__)
say = partial(print, flush=True)

Generate = Literal["end", "always", "never"]
Along = Literal["all", "answers"]

LOCK_FILE = "study.lock"
#: Columns of a record that tests of the answers' probability observe.
_OF_ANSWERS = frozenset({"row", "question", "answer", "nll", "tokens", "cut"})
#: Columns that only a generated answer has, in addition to those of paraphrased questions.
_OF_GENERATION = frozenset(
    {"rouge1_recall", "rougeL_recall", "reference", "toxicity", "nearest_answer"}
)


# -- a run -----------------------------------------------------------------------------------------


@contextmanager
def announced(work: str) -> Iterator[None]:
    """Print what is being done; the caller prints the outcome on the same line."""
    say(f"{work}: ", end="")
    try:
        yield
    except BaseException:
        say()
        raise


def make_trainer(folder: Path, options: Mapping[str, Any], **overrides: Any) -> L.Trainer:
    """A Trainer that prints and saves nothing; ``own`` options override those of the user."""
    gc.collect()  # the model of the previous trainer is in reference cycles
    with silence():
        return L.Trainer(
            **{**options, **overrides},
            default_root_dir=str(folder),
            limit_val_batches=0,  # a study has its own tests, whatever data.val says
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def attribute(
    model: str,
    masks: Mapping[str, MaskChoice],
    trainer: Callable[..., L.Trainer],
    data: ForgetRetainDataModule,
    **options: Any,
) -> Iterator[tuple[float, AttributionModule]]:
    """Attribute by masks of some names, in as few passes as possible: seconds and module of each."""
    names = {id(mask): name for name, mask in masks.items()}
    run_config = options.pop("run_config", {})
    for pass_options, choices in passes(list(masks.values())):
        start, specs = time.monotonic(), [mask.spec(names[id(mask)]) for mask in choices]
        with silence():
            module = AttributionModule(model=model, masks=specs, **options, **pass_options)
            module.run_config = run_config
            fitter = trainer(max_epochs=1, gradient_clip_val=None)
            fitter.fit(module, datamodule=copy.copy(data))
        yield time.monotonic() - start, module


@dataclass(eq=False)
class EvaluateAlong(Callback):
    """Tests a run at evenly spaced points."""

    options: Options  # what is observed and measured
    points: int  # how many tests, the last at the run's end
    generate: Generate  # which of them also generate answers
    #: Tests before the last one observe the probability of these sets' answers, and nothing else.
    answers_of: Optional[Collection[str]]
    enough: Callable[[Mapping[str, float]], bool]  # if true for a test's measures, it is the last
    #: One dict per test: ``step``, ``seconds`` since the run began, and the measures by name.
    tests: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)  # records of the last test

    def __post_init__(self) -> None:
        self._left: list[int] = []
        self._began = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: UnlearnModule) -> None:
        """Prepare the tests before any work is done."""
        pl_module.serve()
        plan = Plan(trainer.datamodule, self.options, trainer.datamodule.test_names())
        self.evaluation = Evaluation(plan, validates=True, sharded=pl_module.sharded)
        self.evaluation.step_context = trainer.precision_plugin.test_step_context
        self.evaluation.start(pl_module.lm)
        self.evaluation.load_readers()

    def on_train_start(self, trainer: L.Trainer, pl_module: UnlearnModule) -> None:
        self._left = steps_of_tests(int(trainer.estimated_stepping_batches), self.points)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: UnlearnModule, *_: Any) -> None:
        """Test if a test is due; end the run if its measures are enough."""
        if not self._left or trainer.global_step < self._left[0]:
            return
        del self._left[0]
        measures = self.test(trainer, pl_module, last=False) if self._left else {}
        if measures and self.enough(measures):
            self._left.clear()
            trainer.should_stop = True
        if not self._left:
            measures = self.test(trainer, pl_module, last=True)
        seconds = round(time.monotonic() - self._began, 2)
        self.tests.append({"step": trainer.global_step, "seconds": seconds, **measures})

    def test(self, trainer: L.Trainer, module: UnlearnModule, last: bool) -> dict[str, float]:
        """Measures of the model as it is now; those that are undefined are left out."""
        short = self.answers_of is not None and not last
        generates = self.generate == "always" or (last and self.generate == "end")
        self.tables, plan = {}, self.evaluation.plan
        tables, training = self.tables, module.lm.training
        module.lm.eval()
        self.evaluation.start(module.lm)
        with trainer.precision_plugin.forward_context():
            for name in self.answers_of if short else trainer.datamodule.test_names():
                needs = plan.needs_of(name) - (frozenset() if generates else GENERATED)
                needs = needs & {"answer"} if short else needs
                tables[name] = self.evaluation.observe_set(name, needs)
        module.lm.train(training)
        return defined_only(plan.measures(tables))


class UnkeptModule(UnlearnModule):
    """Unlearning that writes no model: only its tests are kept."""

    def planned_files(self) -> list[Planned]:
        return []

    def export(self, record: dict[str, Any]) -> None:
        """Write nothing, and leave a model without adapters."""
        if self.adapter is not None:
            self.adapter.fold()


def steps_of_tests(steps: int, points: int) -> list[int]:
    """The steps after which a run is tested: evenly spaced, the last at its end.

    >>> steps_of_tests(10, 4), steps_of_tests(2, 4)
    ([2, 5, 8, 10], [1, 2])
    """
    return sorted({max(1, round(steps * k / points)) for k in range(1, points + 1)})


def as_before_the_end(
    tables: Mapping[str, Table], answers_of: Optional[Collection[str]]
) -> dict[str, Table]:
    """Records of a full test as a test before a run's end would have made them."""

    def observed(record: Mapping[str, Any]) -> dict[str, Any]:
        if answers_of is not None:
            kept = {k: v for k, v in record.items() if k in _OF_ANSWERS}
        else:
            asked = ("paraphrased_question_", *_OF_GENERATION)
            kept = {k: v for k, v in record.items() if not k.startswith(asked)}
        return {**kept, "generation": None}

    names = tables.keys() if answers_of is None else tables.keys() & answers_of
    return {name: list(map(observed, tables[name])) for name in tables if name in names}


# -- the study's folder ----------------------------------------------------------------------------


class RunTable:
    """One Parquet file in a study's folder: a row per run and test point.

    ``settings``, the plain data that all runs share, are stored in it: different ones are refused.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        file: str = TABLE_FILE,
        columns: Mapping[str, Any] = COLUMNS,
    ) -> None:
        self.path, self.columns = folder / file, columns
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            self.rows = self._read(self.path, "choose another --output")

    def finished(self) -> set[str]:
        return {row["run"] for row in self.rows}

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of one finished run, all or none."""
        self.rows += [dict(row) for row in rows]
        self.write()

    def join(self, folders: Sequence[str]) -> int:
        """Import finished runs from other folders of the same study; returns how many are new."""
        before = self.finished()
        for folder in folders:
            path, known = Path(folder) / TABLE_FILE, self.finished()
            if not path.is_file():
                raise WagleError(f"--join: there is no study in {folder} ({TABLE_FILE})")
            theirs = self._read(path, "it is another study")
            self.rows += [row for row in theirs if row["run"] not in known]
        return len(self.finished()) - len(before)

    def write(self) -> None:
        """Write the file, if there are runs, whole or not at all; every row has every column."""
        others = {name for row in self.rows for name in row} - set(self.columns)
        names = [*self.columns, *sorted(others)]
        rows = [{name: row.get(name) for name in names} for row in self.rows]
        if rows:
            write_table(self.path, rows, self.settings)

    def _read(self, path: Path, hint: str) -> list[dict[str, Any]]:
        ours, theirs = self.settings, table_key(path)
        if differing := sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)):
            message = f"{path} holds runs with other settings ({', '.join(differing)})"
            raise WagleError(f"{message}: {hint}")
        return load_runs(path, self.columns)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the context, keep other studies, on this host or another, out of a folder."""
    lock = hold(folder / LOCK_FILE, f"another study works in {folder}")
    try:
        yield
    finally:
        lock.release()
