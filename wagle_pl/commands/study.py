"""Compare ways to unlearn one model: a grid of objectives, masks, learning rates and seeds, at equal forgetting."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from wagle_pl.study import Study

LAYERED = True  # its configurations may build on others
EXIT_INTERRUPTED = 130  # as shells have it: 128 + SIGINT


def study(base: Any = None, **options: Any) -> None:
    """Run what of the grid is not finished yet, then print and write what was found.

    Args:
        base: in a config file: config files it builds on.
        options: see :class:`Study`.
    """
    disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find this out
    try:
        Study(**options).run()
    except KeyboardInterrupt:  # it has said what is left to do
        raise SystemExit(EXIT_INTERRUPTED) from None


COMMANDS = study
