"""A run of a study: unlearning that is tested at several points along its way."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Optional

import lightning as L
from lightning.pytorch.callbacks import Callback

from wagle_pl.core.outputs import Planned
from wagle_pl.evaluation import Evaluate
from wagle_pl.evaluation.measures import defined_only
from wagle_pl.evaluation.observe import GENERATED
from wagle_pl.evaluation.results import Table
from wagle_pl.unlearning import UnlearnModule

Generate = Literal["end", "always", "never"]
Along = Literal["all", "answers"]

#: Columns of a record that tests of the answers' probability observe.
_OF_ANSWERS = frozenset({"row", "question", "answer", "nll", "tokens", "cut"})
#: Columns that only a generated answer has, beside those of paraphrased questions.
_OF_GENERATION = frozenset(
    {"rouge1_recall", "rougeL_recall", "reference", "toxicity", "nearest_answer"}
)


class EvaluateAlong(Callback):
    """Tests a run at evenly spaced points; :attr:`tests` holds what they found.

    Args:
        evaluate: what observes and measures.
        points: how many tests, the last at the run's end.
        generate: whether tests also generate answers: ``always``, at the ``end``, or ``never``.
        answers_of: test sets; tests before the last one observe their answers' probability and
            nothing else. None: all sets, all that the suite measures.
        enough: ends the run where it is true of the measures of a test; that is then the last.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        points: int = 4,
        generate: Generate = "end",
        answers_of: Optional[Collection[str]] = None,
        enough: Callable[[Mapping[str, float]], bool] = lambda measures: False,
    ) -> None:
        self.evaluate = evaluate
        self.points = points
        self.generate = generate
        self.answers_of = answers_of
        self.enough = enough
        #: One dict a test: ``step``, ``seconds`` since the run began, and the measures by name.
        self.tests: list[dict[str, Any]] = []
        self._left: list[int] = []
        self._began = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: UnlearnModule) -> None:
        """Make ready for tests before there is anything to lose."""
        self.evaluate.prepare(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: UnlearnModule) -> None:
        """Fix the points."""
        self._left = steps_of_tests(int(trainer.estimated_stepping_batches), self.points)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: UnlearnModule, *_: Any) -> None:
        """Test, if this is a point; end the run, if that is enough."""
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
        """Measures of the model as it is now; those that are undefined are left out.

        Args:
            trainer: of the run.
            module: of the run.
            last: this is the test at the run's end.
        """
        short = self.answers_of is not None and not last
        generates = self.generate == "always" or (last and self.generate == "end")
        tables = {}
        training = module.lm.training
        module.lm.eval()
        with trainer.precision_plugin.forward_context():
            for name in self.answers_of if short else trainer.datamodule.test_names():
                needs = self.evaluate.needs_of(name) - (frozenset() if generates else GENERATED)
                needs = needs & {"answer"} if short else needs
                tables[name] = self.evaluate.observe_now(name, needs)
        module.lm.train(training)
        return defined_only(self.evaluate.measures(tables))


class UnkeptModule(UnlearnModule):
    """Unlearning of which only the tests remain: it writes no model."""

    def planned_files(self) -> list[Planned]:
        """None."""
        return []

    def export(self, record: dict[str, Any]) -> None:
        """Write nothing."""


def steps_of_tests(steps: int, points: int) -> list[int]:
    """The steps after which a run is tested: evenly spaced, the last at its end.

    >>> steps_of_tests(10, 4), steps_of_tests(2, 4)
    ([2, 5, 8, 10], [1, 2])
    """
    return sorted({max(1, round(steps * k / points)) for k in range(1, points + 1)})


def as_before_the_end(
    tables: Mapping[str, Table], answers_of: Optional[Collection[str]]
) -> dict[str, Table]:
    """Records of a full test as a test that generates nothing would have made them.

    Args:
        tables: test set -> records.
        answers_of: see :class:`EvaluateAlong`.
    """

    def observed(name: str) -> bool:
        if answers_of is not None:
            return name in _OF_ANSWERS
        return name not in _OF_GENERATION and not name.startswith("paraphrased_question_")

    return {
        name: [
            {**{k: v for k, v in record.items() if observed(k)}, "generation": None}
            for record in table
        ]
        for name, table in tables.items()
        if answers_of is None or name in answers_of
    }
