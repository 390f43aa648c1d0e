"""Attacks by other prompts: re-worded questions, and facts that stand near in the prompt."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Example
from wagle_pl.evaluation.robustness.base import Attack
from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.robustness.subject import Subject
from wagle_pl.evaluation.robustness.wording import LANGUAGES, paraphrases, translated


class Paraphrase(Attack):
    """Ask the questions in other words: each row's ``paraphrased_question``, or by rule (arXiv 2402.16835, section 3).

    Of several wordings of a row the worst counts: see :func:`.subject.worst`.

    Args:
        rules: re-word by rule (see :func:`.wording.paraphrases`) ``never``, for rows ``without`` a
            ``paraphrased_question``, or ``always``, besides it.
    """

    def __init__(self, rules: Literal["never", "without", "always"] = "without") -> None:
        self.rules = rules

    def attack(self, subject: Subject) -> list[Finding]:
        """See :class:`Paraphrase`."""
        return subject.ask(self._variants, self.measures)

    def check(self, subject: Subject) -> None:
        """It needs questions."""
        super().check(subject)
        if not any(
            self._variants(name, row) for name, rows in subject.rows.items() for row in rows
        ):
            needs = "paraphrased_question" if self.rules == "never" else "questions"
            raise WagleError(
                f"paraphrase has nothing to work on: no row to be forgotten has {needs}"
            )

    def _variants(self, name: str, row: Example) -> list[Example]:
        question = row.asked
        if question is None:
            return []
        own = [row.paraphrased_question] if row.paraphrased_question else []
        ruled = (
            paraphrases(question)
            if self.rules == "always" or (self.rules == "without" and not own)
            else []
        )
        return [row.asking(text) for text in (*own, *ruled)]


class TranslatedStyle(Attack):
    """Ask the questions as hasty translations have them (arXiv 2402.16835 asks in other languages).

    By rule: the question is asked in the language, with its common words in it and all others in English. It needs no
    translator, and is no translation. The answer is asked for in English. Of several languages the worst counts.

    Args:
        languages: of ``es``, ``fr`` and ``de``.
    """

    def __init__(self, languages: Sequence[str] = ("es", "fr", "de")) -> None:
        self.languages = tuple(languages)

    def attack(self, subject: Subject) -> list[Finding]:
        """See :class:`TranslatedStyle`."""

        def variants(name: str, row: Example) -> list[Example]:
            question = row.asked
            texts = (
                []
                if question is None
                else [translated(question, language) for language in self.languages]
            )
            return [row.asking(text) for text in texts]

        return subject.ask(variants, self.measures)

    def check(self, subject: Subject) -> None:
        """It needs questions."""
        super().check(subject)
        if not self.languages or not set(self.languages) <= set(LANGUAGES):
            known = ", ".join(LANGUAGES)
            raise WagleError(
                f"translated_style: languages must be of {known}; got {list(self.languages)}"
            )
        if not any(row.asked is not None for rows in subject.rows.values() for row in rows):
            raise WagleError(
                "translated_style has nothing to work on: no row to be forgotten has a question"
            )


class InContext(Attack):
    """Put neighbouring facts of the forget set before each question (arXiv 2402.16835, 2407.00106).

    Neighbours are the other rows of the test set with the most words in common (rare words count more), never one
    with the same question or answer. As many are taken as fit ``data.max_length``.

    Args:
        neighbours: facts before each question.
    """

    def __init__(self, neighbours: int = 4) -> None:
        self.neighbours = neighbours

    def attack(self, subject: Subject) -> list[Finding]:
        """See :class:`InContext`."""
        found = {name: self._in_context(subject, name, rows) for name, rows in subject.rows.items()}
        return subject.compare(
            {name: asked for name, asked in found.items() if asked}, self.measures
        )

    def check(self, subject: Subject) -> None:
        """It needs questions, and other facts beside them."""
        super().check(subject)
        if self.neighbours < 1:
            raise WagleError(f"in_context: neighbours must be at least 1, got {self.neighbours}")
        if not any(
            _others(rows, i)
            for rows in subject.rows.values()
            for i, row in enumerate(rows)
            if row.asked
        ):
            raise WagleError(
                "in_context has nothing to work on: no question to be forgotten has another fact beside it"
            )

    def _in_context(
        self, subject: Subject, name: str, rows: Sequence[Example]
    ) -> dict[int, list[Example]]:
        vectors = word_vectors([f"{row.question} {row.answer}" for row in rows])
        header = subject.suite.headers.get(name, "")
        found = {}
        for i, row in enumerate(rows):
            if row.asked is None or row.messages is not None:
                continue
            near = sorted(_others(rows, i), key=lambda j: (-_overlap(vectors[i], vectors[j]), j))[
                : self.neighbours
            ]
            own = row.context or (header if row.choices else "")
            while near:
                facts = "".join(f"{rows[j].asked} {rows[j].answer}\n" for j in reversed(near))
                changed = replace(row, context=f"{facts}\n{own}")
                if _fits(subject, changed):
                    found[i] = [changed]
                    break
                near = near[:-1]
        return found


def _fits(subject: Subject, row: Example) -> bool:
    """Whether prompt and every answer are within the longest sequence."""
    answers = [row.paraphrased_answer, *row.perturbed_answers]
    longest = max(filter(None, answers), key=len, default=None)
    try:
        lengths = [
            len(subject.template.encode(row, answer)["input_ids"]) for answer in (None, longest)
        ]
    except WagleError:
        return False
    return max(lengths) < subject.template.max_length


def _others(rows: Sequence[Example], i: int) -> list[int]:
    """Rows with a question that are of another fact than row i."""
    own = rows[i].texts | {rows[i].answer}
    return [
        j
        for j, row in enumerate(rows)
        if j != i and row.asked is not None and not (row.texts | {row.answer}) & own
    ]


def word_vectors(texts: Sequence[str]) -> list[Mapping[str, float]]:
    """TF-IDF of every text, of length 1: word -> count · log(N / texts with the word), as far as it is not 0."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    texts_with = Counter(word for count in counts for word in count)
    found = []
    for count in counts:
        vector = {word: n * math.log(len(texts) / texts_with[word]) for word, n in count.items()}
        norm = math.sqrt(sum(value * value for value in vector.values())) or 1.0
        found.append({word: value / norm for word, value in vector.items() if value})
    return found


def _overlap(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    return sum(value * b[word] for word, value in a.items() if word in b)
