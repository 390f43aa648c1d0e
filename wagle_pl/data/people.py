"""Bundled invented people and questions on many subjects; neighbours of rows to forget."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from wagle_pl.data.example import Example, Row
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
        self.test_sources = {name: here.get(source, source) for name, source in named.items()}

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


# -- rows that go with forget rows -----------------------------------------------------------------

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")
_SYLLABLES = ("ba", "do", "fe", "gu", "ka", "lo", "mi", "na", "pe", "ra", "si", "tu", "ve", "zo")


def general_questions() -> list[str]:
    """Bundled questions on many subjects: science, history, language, daily life, code, ..."""
    return (FOLDER.parent / "questions.txt").read_text(encoding="utf-8").splitlines()


def without_subject(questions: Sequence[str], forget: Sequence[Example]) -> list[str]:
    """The questions that share no name and no rare word with the rows to forget.

    A word is rare if it has at least four letters and is in at most one in fifty of the questions.
    """
    counts = Counter(word for question in questions for word in set(_words(question)))
    common = {word for word, count in counts.items() if 50 * count > len(questions)}
    texts = " ".join(text for example in forget for text in example.texts)
    subjects = {word for word in _words(texts) if len(word) >= 4 or word.isdigit()} - common
    return [question for question in questions if subjects.isdisjoint(_words(question))]


def retain_questions(forget: Sequence[Example]) -> list[Row]:
    """Rows with only a question, see :func:`without_subject`; logs how many are left out."""
    questions = general_questions()
    kept = without_subject(questions, forget)
    log.info(
        "retain rows: the model's own answers to %d of %d bundled questions; the others share a "
        "name or a rare word with a forget row",
        len(kept),
        len(questions),
    )
    return [{"question": question} for question in kept]


def invented_neighbours(forget: Sequence[Example], seed: int = 0) -> list[Example]:
    """Rows of the same form about somebody and something that does not exist.

    Names (capitalised words that do not begin a sentence) and numbers are replaced by invented
    ones, the same throughout a row. A row whose answer has neither gets another row's answer; if
    there is none, the row is left out.
    """
    draw, neighbours = random.Random(seed), []
    for example in forget:
        names = {n for t in (example.question, example.answer) for n in _names(t)}
        table = {name: _invented(name, draw) for name in sorted(names)}
        question, answer = (_replaced(t, table) for t in (example.question, example.answer))
        if answer == example.answer:
            others = [other.answer for other in forget if other.answer != example.answer]
            answer = draw.choice(others) if others else ""
        if answer:
            row = {"question": question, "answer": answer}
            neighbours.append(replace(example, question=question, answer=answer, row=row))
    return neighbours


def _replaced(text: str, table: Mapping[str, str]) -> str:
    return _WORD.sub(lambda match: table.get(match[0], match[0]), text)


def _words(text: str) -> list[str]:
    return [re.sub("['’]s$", "", word.lower()) for word in _WORD.findall(text)]


def _names(text: str) -> set[str]:
    """Words that are capitalised somewhere inside a sentence, and numbers."""
    inside = {
        match[0]
        for match in _WORD.finditer(text)
        if match[0][0].isupper()
        and not re.search(r"(?:^|[.!?:]\s+|[\"“]\s*)$", text[: match.start()])
    }
    return {word for word in _WORD.findall(text) if word in inside or word.isdigit()}


def _invented(name: str, draw: random.Random) -> str:
    """Another name of about the same length, or another number of as many digits."""
    if name.isdigit():
        return "".join(draw.choice("123456789") for _ in name)
    return "".join(draw.choice(_SYLLABLES) for _ in range(max(2, len(name) // 2))).capitalize()
