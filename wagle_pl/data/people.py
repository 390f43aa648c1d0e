"""Bundled invented people."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Optional

from wagle_pl.data.example import Row
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.rows import load_rows

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "samples"
TEST_SETS = ("forget", "retain", "real_authors", "world_facts")


def bundled(name: str) -> list[Row]:
    """Rows of one bundled file: ``holdout`` or one of :data:`TEST_SETS`."""
    return load_rows(f"{FOLDER}/{name}.jsonl")


class PeopleDataModule(ForgetRetainDataModule):
    """Forty-four invented people with eight facts each, and general knowledge, in TOFU's columns.

    Four people are to be forgotten, thirty-six kept, four never seen (``holdout``). Rows of general
    knowledge belong to the retain set too. A small model trained on nothing else must learn to
    distinguish a fact from its wording: every training set says each fact twice, as question and
    answer and as their paraphrases.

    Args:
        **kwargs: passed to :class:`ForgetRetainDataModule`; ``test`` may name bundled files, such as
            ``holdout.jsonl``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        named = self.test_sources or {name: f"{name}.jsonl" for name in TEST_SETS}
        here = {path.name: str(path) for path in FOLDER.iterdir()}
        self.test_sources = {n: here.get(str(source), source) for n, source in named.items()}

    def train_rows(self, stream: str) -> Optional[list[Row]]:
        """Both wordings of each bundled row, or the rows of a file given in their place."""
        if self.sources[stream] is not None:
            return super().train_rows(stream)
        files = ("retain", "real_authors", "world_facts") if stream == "retain" else (stream,)
        return [
            {"question": row[f"{wording}question"], "answer": row[f"{wording}answer"]}
            for file in files
            for row in bundled(file)
            for wording in ("", "paraphrased_")
        ]
