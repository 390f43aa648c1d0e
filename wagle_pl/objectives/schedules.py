"""Weights of loss terms that change while a run goes on."""

from __future__ import annotations

import math
import re
from typing import Literal, Union

from wagle_pl.core.errors import WagleError

_TEXT = re.compile(r"(linear|cosine|step):([^>@]+)->([^>@]+)(?:@(.+))?$")


class Schedule:
    """A number that depends on how far the run is. On the command line: ``cosine:1->0.1@0.5``.

    Args:
        kind: ``linear`` and ``cosine`` go from ``start`` to ``end``; ``step`` jumps.
        start: value at the first step.
        end: value from ``until`` on.
        until: share of the run after which ``end`` is reached, in (0, 1]. In the short form it
            follows an ``@``.

    Raises:
        WagleError: if ``until`` is outside (0, 1].

    >>> ramp = Schedule("linear", 0.0, 2.0)
    >>> ramp(0.0), ramp(0.25), ramp(1.0)
    (0.0, 0.5, 2.0)
    """

    def __init__(
        self,
        kind: Literal["linear", "cosine", "step"],
        start: float,
        end: float,
        until: float = 1.0,
    ) -> None:
        if not 0 < until <= 1:
            raise WagleError(
                f"a schedule's end is a share of the run and must be in (0, 1], got {until}"
            )
        self.kind = kind
        self.start = start
        self.end = end
        self.until = until

    def __call__(self, progress: float) -> float:
        """The value at a share of the run in [0, 1]; override this for another shape."""
        done = min(1.0, progress / self.until)
        if done == 1.0:
            return self.end
        cosine = (1 - math.cos(math.pi * done)) / 2
        share = {"linear": done, "cosine": cosine, "step": 0.0}[self.kind]
        return self.start + share * (self.end - self.start)

    def __str__(self) -> str:
        until = "" if self.until == 1 else f"@{self.until:g}"
        return f"{self.kind}:{self.start:g}->{self.end:g}{until}"


Weight = Union[float, str, Schedule]


def as_schedule(value: Weight, option: str) -> Schedule:
    """The schedule of an option: a number, a text such as ``step:1->0@0.5``, or a schedule.

    Raises:
        WagleError: naming the option and the forms it takes.

    >>> str(as_schedule("cosine:1->0.5@0.25", "objective.retain_weight"))
    'cosine:1->0.5@0.25'
    """
    if isinstance(value, Schedule):
        return value
    match = _TEXT.match(value.replace(" ", "")) if isinstance(value, str) else None
    kind, start, end, until = match.groups() if match else ("step", value, value, None)
    try:
        numbers = float(start), float(end), float(until or 1)
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise WagleError(
            f"{option} {value!r} is neither a number nor a schedule such as linear:0->1, "
            "cosine:1->0 or step:1->0@0.5"
        )
    return Schedule(kind, *numbers)
