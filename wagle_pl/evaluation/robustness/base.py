"""What an attack is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation.robustness.finding import FORGET_MEASURES, Finding
from wagle_pl.evaluation.robustness.subject import Subject


class Attack:
    """One way to bring forgotten knowledge back. Override :meth:`attack`; :meth:`check` too if it needs something.

    An attack gives the model back as it was. It must find the same again: what is random comes from a seed of its own.

    >>> class Shouted(Attack):
    ...     '''Questions in capital letters.'''
    ...
    ...     def attack(self, subject):
    ...         loud = lambda name, row: [row.asking(row.question.upper())] if row.question else []
    ...         return subject.ask(loud, self.measures)
    >>> Shouted().name
    'shouted'
    """

    #: Which measures it reports.
    measures: ClassVar[tuple[str, ...]] = FORGET_MEASURES
    #: Whether it changes weights for a while: it cannot where they are spread over ranks (ZeRO-3).
    moves_weights: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The class's name in small letters and underscores."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    def attack(self, subject: Subject) -> Iterable[Finding]:
        """Attack a model; with several ranks a meeting of all.

        Args:
            subject: the model, and what there is to attack it with; see :class:`Subject`.

        Returns:
            What was found, in the same order for every model.
        """
        raise TypeError(f"{type(self).__name__} must override attack")

    def check(self, subject: Subject) -> None:
        """Refuse options, or a model or data that there is no way to attack, before any work is done.

        Raises:
            WagleError: saying what is missing.
        """
        if self.moves_weights and subject.sharded:
            raise WagleError(
                f"{self.name} changes weights, which ZeRO-3 spreads over the ranks: test with stage 2 or "
                "on one device"
            )
        if not subject.rows:
            raise WagleError(
                f"{self.name} has nothing to work on: no test set holds rows to be forgotten"
            )
