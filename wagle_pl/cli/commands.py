"""Names and summaries of all commands; imports nothing, so that ``wagle --help`` is instant.

Those beside LightningCLI's are a module each. Its ``COMMANDS`` maps a verb to a function, whose
signature and docstring make the options and their help.
"""

from __future__ import annotations

import sys
from typing import NoReturn

EXIT_MISTAKE = 2

#: Command -> the module whose ``COMMANDS`` (verb -> function) it offers.
COMMANDS = {
    "export": "wagle_pl.cli.export",
    "mask": "wagle_pl.cli.mask",
    "patch": "wagle_pl.cli.patch",
    "plan": "wagle_pl.cli.plan",
    "report": "wagle_pl.cli.report",
    "study": "wagle_pl.cli.study",
}

#: Every command -> what it does, in the order in which people need them.
SUMMARIES = {
    "fit": "fine-tune, attribute or unlearn a model, as --model says",
    "test": "measure a model: what it has forgotten, what it has kept, what attacks bring back",
    "mask": "look at masks, compare, combine, convert, make and draw them",
    "study": "compare ways to unlearn one model, at equal forgetting",
    "report": "show what runs and studies found, in one HTML file",
    "plan": "estimate the memory, disk and work of a run, before you rent a machine",
    "patch": "ship what unlearning changed: make a patch of two models, apply it, revert it",
    "export": "turn a checkpoint, or a model in another format, into a model folder",
    "validate": "measure a model on some test sets, as fit does along the way",
    "predict": "LightningCLI's own, for modules of yours",
}


def overview() -> str:
    """The text of ``wagle --help``."""
    width = max(map(len, SUMMARIES))
    return "\n".join(
        [
            "usage: wagle COMMAND [OPTIONS]",
            "",
            "Make a language model forget chosen data while it keeps the rest.",
            "",
            *(f"  {name.ljust(width)}  {what}" for name, what in SUMMARIES.items()),
            "",
            "wagle COMMAND --help lists its options; wagle --version prints the version.",
        ]
    )


def fail(message: str, code: int = EXIT_MISTAKE) -> NoReturn:
    """Print one line and exit."""
    print(f"wagle: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
