"""One run of a study: unlearning that is tested at several points along its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Optional

from wagle_pl.core.outputs import Planned
from wagle_pl.evaluation import Evaluate
from wagle_pl.evaluation.observe import GENERATED
from wagle_pl.evaluation.sets import defined_only
from wagle_pl.unlearning import UnlearnModule

Generate = Literal["end", "always", "never"]
Along = Literal["all", "answers"]

_ANSWERS = frozenset({"answer"})


def test_points(steps: int, points: int) -> list[int]:
    """The steps after which a run is tested: evenly spaced, the last at its end.

    >>> test_points(10, 4), test_points(2, 4)
    ([2, 5, 8, 10], [1, 2])
    """
    return sorted({max(1, round(steps * k / points)) for k in range(1, points + 1)})


class StudyRun(UnlearnModule):
    """Unlearning with tests along the way; :attr:`tests` holds what they found.

    Args:
        points: how many tests, the last at the end.
        generate: whether tests also generate answers: ``always``, at the ``end`` only, or ``never``.
        answers_of: test sets; tests before the last one observe their answers' probability and nothing else. None:
            all sets, all that the suite measures.
        enough: ends the run where it is true of the measures of a test; that is then the last.
        keep: write the unlearned model to ``output``.
        evaluation: options of :class:`~wagle_pl.evaluation.Evaluate`.
        **kwargs: passed to :class:`UnlearnModule`.
    """

    def __init__(
        self,
        points: int = 4,
        generate: Generate = "end",
        answers_of: Optional[Collection[str]] = None,
        enough: Callable[[Mapping[str, float]], bool] = lambda measures: False,
        keep: bool = False,
        evaluation: Optional[Mapping[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.evaluate = Evaluate(generate=generate != "never", **(evaluation or {}))
        self.evaluate.options = "module"
        self.points = points
        self.generates = generate
        self.answers_of = answers_of
        self.enough = enough
        self.keep = keep
        #: One dict a test: ``step``, ``seconds`` since the run began, and the measures by name.
        self.tests: list[dict[str, Any]] = []
        self._marks: list[int] = []
        self._began = time.monotonic()

    def on_fit_start(self) -> None:
        """Make ready for tests before there is anything to lose."""
        super().on_fit_start()
        self.evaluate.prepare(self.trainer, self)

    def on_train_start(self) -> None:
        """Fix the points."""
        super().on_train_start()
        self._marks = test_points(int(self.trainer.estimated_stepping_batches), self.points)

    def on_train_batch_end(self, *args: Any) -> None:
        """Test, if this is a point; end the run, if that is enough."""
        super().on_train_batch_end(*args)
        if not self._marks or self.global_step < self._marks[0]:
            return
        self._marks.pop(0)
        measures = self.test_now(last=False) if self._marks else {}
        if measures and self.enough(measures):
            self._marks.clear()
            self.trainer.should_stop = True
        if not self._marks:
            measures = self.test_now(last=True)
        seconds = time.monotonic() - self._began
        self.tests.append({"step": self.global_step, "seconds": round(seconds, 2), **measures})

    def test_now(self, last: bool) -> dict[str, float]:
        """Measures of the model as it is now, by the suite of the data module; those that are undefined are left out.

        Args:
            last: this is the test at the run's end.
        """
        lean = None if last else self.answers_of
        generate = self.generates == "always" or (last and self.generates == "end")
        training = self.lm.training
        self.lm.eval()
        tables = {}
        with self.trainer.precision_plugin.forward_context():
            for name in self.trainer.datamodule.test_names() if lean is None else lean:
                needs = self.evaluate.needs_of(name) - (frozenset() if generate else GENERATED)
                needs = needs if lean is None else needs & _ANSWERS
                tables[name] = self.evaluate.observe_now(name, needs)
        self.lm.train(training)
        return defined_only(self.evaluate.measures(tables))

    def planned_files(self) -> list[Planned]:
        """What the run is going to write: the model if it is to be kept."""
        return super().planned_files() if self.keep else []

    def export(self, record: dict[str, Any]) -> None:
        """Write the model if it is to be kept."""
        if self.keep:
            super().export(record)


def ungenerated(tables: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Records as a test without generation would have made them.

    Args:
        tables: test set -> records.
    """
    found = ("rouge1_recall", "rougeL_recall", "reference", "toxicity", "nearest_answer")

    def strip(record: Mapping[str, Any]) -> dict[str, Any]:
        """One record without them."""
        kept = {
            k: v
            for k, v in record.items()
            if k not in found and not k.startswith("paraphrased_question_")
        }
        return {**kept, "generation": None}

    return {name: [strip(record) for record in table] for name, table in tables.items()}


def answers_only(
    tables: Mapping[str, list[dict[str, Any]]], sets: Collection[str]
) -> dict[str, list[dict[str, Any]]]:
    """Records as a test of the answers' probability would have made them.

    Args:
        tables: test set -> records.
        sets: those that are tested.
    """
    columns = ("row", "question", "answer", "nll", "tokens", "cut")

    def strip(record: Mapping[str, Any]) -> dict[str, Any]:
        """One record without the rest."""
        return {**{k: record[k] for k in columns if k in record}, "generation": None}

    return {
        name: [strip(record) for record in table] for name, table in tables.items() if name in sets
    }


def rows_of(
    tests: list[dict[str, Any]], labels: Mapping[str, Any], step: int, steps: int, seconds: float
) -> list[dict[str, Any]]:
    """A finished run's rows of the study's table.

    Args:
        tests: what the run's tests found.
        labels: the columns that say which run it is.
        step: where the run ended.
        steps: where it should have.
        seconds: how long it took.
    """
    rows = [{**labels, **test} for test in tests]
    if step < steps:  # a row without measures says that the run is over, and why
        rows.append(
            {
                **labels,
                "step": step,
                "seconds": round(seconds, 2),
                "note": f"diverged at step {step}",
            }
        )
    return rows


def output_of(folder: Path, run: str, keep: bool) -> str:
    """The ``output`` of a run's module: its model if kept; a sibling of the references that all runs share."""
    return str(folder / "models" / run) if keep else str(folder / run)
