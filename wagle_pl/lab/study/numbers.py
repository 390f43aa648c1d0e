"""Numbers of studies as text."""

from __future__ import annotations

from typing import Optional


def decimals(value: Optional[float], digits: int = 3) -> str:
    """A number with ``digits`` decimals; an en dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def mean_std(mean: Optional[float], std: Optional[float], digits: int = 3) -> str:
    """A mean and, if it is of several numbers, their standard deviation.

    >>> mean_std(0.5, 0.01), mean_std(0.5, None), mean_std(None, None)
    ('0.500 ± 0.010', '0.500', '–')
    """
    return decimals(mean, digits) + ("" if std is None else f" ± {std:.{digits}f}")
