"""What a test does beside its measures, if asked: general ability, and attacks that try to bring knowledge back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Union

import torch

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation.ability import Ability, Harness
from wagle_pl.evaluation.robustness import (
    EVERY,
    Attack,
    Attacks,
    Report,
    Subject,
    find_attacks,
    run_attacks,
    usable,
)


class After:
    """The options of a test that ask for more than the suite's measures, and what they lead to.

    Args:
        robustness: see :class:`~wagle_pl.evaluation.EvaluationModule`.
        lm_eval: likewise.
        lm_eval_shots: likewise.
        lm_eval_limit: likewise.

    Raises:
        WagleError: if an attack is unknown, or a number is out of its range.
    """

    def __init__(
        self,
        robustness: Attacks = None,
        lm_eval: Optional[Union[str, Sequence[str]]] = None,
        lm_eval_shots: Optional[int] = None,
        lm_eval_limit: Optional[int] = None,
    ) -> None:
        self.attacks, self.every = find_attacks(robustness, EVERY)
        for option, value, least in (("shots", lm_eval_shots, 0), ("limit", lm_eval_limit, 1)):
            if value is not None and value < least:
                raise WagleError(f"model.lm_eval_{option} must be at least {least}, got {value}")
        self.tasks = lm_eval
        self.shots = lm_eval_shots
        self.limit = lm_eval_limit
        self.harness: Optional[Harness] = None
        self._usable: list[Attack] = []
        self._skipped: dict[str, str] = {}

    def prepare(self, subject: Callable[[], Subject]) -> None:
        """Find the tasks, and see what each attack has to work on, before any work is done.

        Raises:
            WagleError: if the harness or a task is missing, or an attack that was asked for has nothing to work on.
        """
        if self.tasks is not None and self.harness is None:
            self.harness = Harness(self.tasks, self.shots, self.limit)
        if self.attacks:
            self._usable, self._skipped = usable(self.attacks, subject(), self.every)

    def ability(
        self, lm: Any, tokenizer: Any, batch_size: int, precision: Any, sharded: bool
    ) -> Ability:
        """General ability by the harness; nothing if it was not asked for. A meeting of all ranks."""
        if self.harness is None:
            return Ability()
        with _as_in_a_test(precision):
            return self.harness.measure(lm, tokenizer, batch_size, sharded)

    def attack(
        self,
        subject: Subject,
        others: Mapping[str, Callable[[], Subject]],
        results: Mapping[str, Mapping[str, float]],
        fingerprint: Callable[[], str],
        precision: Any,
    ) -> Report:
        """What the attacks found. A meeting of all ranks.

        Args:
            subject: the model, with the tables of its test.
            others: ``target`` or ``retrained`` -> loads it.
            results: ``target`` or ``retrained`` -> its metrics.
            fingerprint: names the weights of the model.
            precision: the trainer's precision plugin.

        Raises:
            RuntimeError: if an attack did not give the weights back as they were.
        """
        before = fingerprint()
        with _as_in_a_test(precision):
            report = run_attacks(self._usable, subject, others, results, self._skipped)
        if fingerprint() != before:
            names = ", ".join(type(attack).__name__ for attack in self._usable)
            raise RuntimeError(f"one of the attacks {names} left the model's weights changed")
        return report


@contextmanager
def _as_in_a_test(precision: Any) -> Iterator[None]:
    """Run the model in the precision of the test steps.

    Autocast keeps no copies of weights meanwhile: those of weights that an attack changes would be stale.
    """
    cached = torch.is_autocast_cache_enabled()
    with precision.test_step_context():
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
