"""Compare ways to unlearn one model: objectives, masks, learning rates, at equal forgetting."""

from __future__ import annotations

from typing import Any

from wagle_pl.core.environment import prepare_libraries
from wagle_pl.study import Study

EXIT_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def study(**options: Any) -> None:
    """Run what of the grid is not finished yet, then print and write what was found.

    Args:
        **options: passed to :class:`Study`.
    """
    prepare_libraries()
    try:
        Study(**options).run()
    except KeyboardInterrupt:  # it has said what is left to do
        raise SystemExit(EXIT_INTERRUPTED) from None


COMMANDS = study
