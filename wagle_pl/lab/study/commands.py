"""``wagle study`` and ``plant``."""

from __future__ import annotations

from typing import Any

from wagle_pl.core.environment import prepare_libraries
from wagle_pl.lab.study.plants import Plants
from wagle_pl.lab.study.study import Study

EXIT_INTERRUPTED = 130  # as in shells: 128 + SIGINT


def study(**options: Any) -> None:
    """Run the unfinished part of the grid, then print and write the comparison."""
    prepare_libraries()
    try:
        Study(**options).run()
    except KeyboardInterrupt:  # the study has said what is left to do
        raise SystemExit(EXIT_INTERRUPTED) from None


def plant(**options: Any) -> None:
    """Plant the unfinished part, then write which scores find the planted weights."""
    prepare_libraries()
    Plants(**options).run()
