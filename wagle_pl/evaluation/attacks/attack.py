"""What an attack is."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation.attacks.subject import Finding, Subject

#: Measures of forget sets, and of the whole, that an attack reports where the suite has them.
FORGET_MEASURES = (
    *("probability", "rougeL_recall", "truth_ratio", "accuracy", "extraction_strength"),
    *("perplexity", "toxicity", "forget_quality", "verbmem_f", "knowmem_f"),
)


class Attack(ABC):
    """One way to bring forgotten knowledge back: override :meth:`attack`.

    Override :meth:`check` too if the attack needs something of the data, or has options.

    An attack leaves the weights as they were, and draws random numbers from a seed of its own, so
    that it finds the same again.

    >>> class Shouted(Attack):
    ...     '''Questions in capital letters.'''
    ...
    ...     def attack(self, subject):
    ...         def loud(name, row):
    ...             return [row.asking(row.asked.upper())] if row.asked else []
    ...
    ...         return subject.ask(loud, self.measures)
    >>> Shouted().name
    'shouted'
    """

    #: Which measures it reports.
    measures: ClassVar[tuple[str, ...]] = FORGET_MEASURES
    #: Whether it changes weights for a while, which is impossible where they are sharded (ZeRO-3).
    moves_weights: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The class's name in small letters and underscores."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def attack(self, subject: Subject) -> Iterable[Finding]:
        """Attack a model. Collective: all ranks must call it, and iterate over what it returns.

        Returns:
            The findings, in the same order for every model.
        """

    def check(self, subject: Subject) -> None:
        """Refuse wrong options, and a model or data that cannot be attacked, before any work.

        Raises:
            WagleError: saying what is missing.
        """
        if self.moves_weights and subject.sharded:
            raise WagleError(
                f"{self.name} changes weights, which ZeRO-3 spreads over the ranks: test with "
                "stage 2 or on one device"
            )
        if not subject.forget_rows:
            raise self.unusable("no test set holds rows to be forgotten")

    def unusable(self, why: str) -> WagleError:
        """The error that the attack has nothing to work on."""
        return WagleError(f"{self.name} has nothing to work on: {why}")
