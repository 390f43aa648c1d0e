"""What an attack finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from wagle_pl.evaluation.suites.catalogue import Info

#: Measures of forget sets, and of the whole, that an attack reports where the suite has them.
FORGET_MEASURES = (
    *(
        "probability",
        "rougeL_recall",
        "truth_ratio",
        "accuracy",
        "extraction_strength",
        "perplexity",
        "toxicity",
    ),
    *("forget_quality", "verbmem_f", "knowmem_f"),
)


@dataclass(frozen=True)
class Finding:
    """One number of one model under one attack.

    Attributes:
        measure: its name, as in ``metrics.json``.
        after: under the attack; None if it is undefined.
        info: unit, direction and meaning.
        option: which of an attack's ways it was, e.g. ``4bit``; empty if there is only one.
        before: without the attack, on the same rows; None if nobody measured it.
        detail: too fine for the console's table.
        why: why ``after`` is undefined.
    """

    measure: str
    after: Optional[float]
    info: Info
    option: str = ""
    before: Optional[float] = None
    detail: bool = False
    why: str = ""
