"""The embedded default: invented people, bundled with the package."""

from __future__ import annotations

import os
from importlib import resources
from typing import Any, Optional

from wagle_pl.data.example import Row
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.rows import load_rows


class PeopleDataModule(ForgetRetainDataModule):
    """Forty-four invented people with eight facts each, and general knowledge, in TOFU's columns.

    Four people are to be forgotten, thirty-six kept, four never seen (``holdout``). Rows of general knowledge belong to
    the retain set too. A small model trained on nothing else must learn to tell a fact from its wording: every training
    set says each fact twice, as question and answer and as their paraphrases.

    Args:
        kwargs: see :class:`ForgetRetainDataModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        names = ("forget", "retain", "real_authors", "world_facts")
        self.test_sources = self.test_sources or {name: f"{name}.jsonl" for name in names}

    def load_rows(self, name: str) -> Optional[list[Row]]:
        """Rows of one bundled file, or of a file given in its place."""
        source = self.test_sources.get(name[5:]) if name.startswith("test/") else self.sources[name]
        if source is not None and not (name.startswith("test/") and source in BUNDLED):
            return super().load_rows(name)
        if name.startswith("test/"):
            return bundled(source.removesuffix(".jsonl"))
        files = ("retain", "real_authors", "world_facts") if name == "retain" else (name,)
        return [
            wording for file in files for row in bundled(file) for wording in both_wordings(row)
        ]


BUNDLED = (
    "forget.jsonl",
    "retain.jsonl",
    "holdout.jsonl",
    "real_authors.jsonl",
    "world_facts.jsonl",
)


def both_wordings(row: Row) -> list[Row]:
    """The fact of a row as its question and answer, and as their paraphrases."""
    return [
        {"question": row["question"], "answer": row["answer"]},
        {"question": row["paraphrased_question"], "answer": row["paraphrased_answer"]},
    ]


def bundled(name: str) -> list[Row]:
    """Rows of one bundled file: ``forget``, ``retain``, ``holdout``, ``real_authors`` or ``world_facts``."""
    with resources.as_file(resources.files("wagle_pl.data") / "samples" / f"{name}.jsonl") as path:
        return load_rows(os.fspath(path))
