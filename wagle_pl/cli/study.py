"""Compare ways to unlearn one model: a grid of objectives, masks, learning rates and seeds, at equal forgetting."""

from __future__ import annotations

from typing import Any

from wagle_pl.core.environment import ready_to_run
from wagle_pl.study import Study

LAYERED = True  # its configurations may build on others
EXIT_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def study(base: Any = None, **options: Any) -> None:
    """Run what of the grid is not finished yet, then print and write what was found.

    Args:
        base: in a config file: config files it builds on.
        options: see :class:`Study`.
    """
    ready_to_run()
    try:
        Study(**options).run()
    except KeyboardInterrupt:  # it has said what is left to do
        raise SystemExit(EXIT_INTERRUPTED) from None


COMMANDS = study
