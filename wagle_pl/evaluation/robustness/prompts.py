"""Attacks by other prompts: re-worded questions, and facts that stand near in the prompt."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.rows import Row, row_kind
from wagle_pl.evaluation.candidates import CHOICES, answer_of, question_of
from wagle_pl.evaluation.robustness.base import Attack
from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.robustness.subject import Subject, texts_of
from wagle_pl.evaluation.robustness.wording import LANGUAGES, paraphrases, translated

ASKED = (CHOICES, ("question", "answer"), ("messages",))


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

    def _variants(self, name: str, row: Row) -> list[Row]:
        question = asked_of(row)
        if question is None:
            return []
        own = [row["paraphrased_question"]] if row.get("paraphrased_question") else []
        ruled = (
            paraphrases(question)
            if self.rules == "always" or (self.rules == "without" and not own)
            else []
        )
        return [reworded(row, text) for text in (*own, *ruled)]


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

        def variants(name: str, row: Row) -> list[Row]:
            question = asked_of(row)
            texts = (
                []
                if question is None
                else [translated(question, language) for language in self.languages]
            )
            return [reworded(row, text) for text in texts]

        return subject.ask(variants, self.measures)

    def check(self, subject: Subject) -> None:
        """It needs questions."""
        super().check(subject)
        if not self.languages or not set(self.languages) <= set(LANGUAGES):
            known = ", ".join(LANGUAGES)
            raise WagleError(
                f"translated_style: languages must be of {known}; got {list(self.languages)}"
            )
        if not any(asked_of(row) is not None for rows in subject.rows.values() for row in rows):
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
            if asked_of(row)
        ):
            raise WagleError(
                "in_context has nothing to work on: no question to be forgotten has another fact beside it"
            )

    def _in_context(self, subject: Subject, name: str, rows: Sequence[Row]) -> dict[int, list[Row]]:
        vectors = word_vectors([f"{question_of(row)} {answer_of(row)}" for row in rows])
        header = subject.suite.headers.get(name, "")
        found = {}
        for i, row in enumerate(rows):
            if asked_of(row) is None or row.get("messages") is not None:
                continue
            near = sorted(_others(rows, i), key=lambda j: (-_overlap(vectors[i], vectors[j]), j))[
                : self.neighbours
            ]
            own = row.get("context") or (header if row_kind(row) == CHOICES else "")
            while near:
                facts = "".join(
                    f"{asked_of(rows[j])} {answer_of(rows[j])}\n" for j in reversed(near)
                )
                changed = {**row, "context": f"{facts}\n{own}"}
                if _fits(subject, changed):
                    found[i] = [changed]
                    break
                near = near[:-1]
        return found


def _fits(subject: Subject, row: Row) -> bool:
    """Whether prompt and every answer are within the longest sequence."""
    answers = [None, row.get("paraphrased_answer"), *(row.get("perturbed_answer") or [])]
    longest = max((answer for answer in answers if answer), key=len, default=None)
    try:
        lengths = [
            len(subject.template.encode(row, answer)["input_ids"]) for answer in (None, longest)
        ]
    except WagleError:
        return False
    return max(lengths) < subject.template.max_length


def _others(rows: Sequence[Row], i: int) -> list[int]:
    """Rows with a question that are of another fact than row i."""
    own = texts_of(rows[i]) | {answer_of(rows[i])}
    return [
        j
        for j, row in enumerate(rows)
        if j != i and asked_of(row) is not None and not (texts_of(row) | {answer_of(row)}) & own
    ]


def asked_of(row: Row) -> Optional[str]:
    """The row's question, that of the last user if it is a conversation; None if it asks nothing."""
    kind = row_kind(row)
    if kind == ("messages",):
        return next(
            (m["content"] for m in reversed(row["messages"][:-1]) if m["role"] == "user"), None
        )
    return row["question"] if kind in ASKED else None


def reworded(row: Row, question: str) -> Row:
    """The row with another question."""
    if row.get("messages") is None:
        return {**row, "question": question}
    messages = list(row["messages"])
    place = max(i for i, message in enumerate(messages[:-1]) if message["role"] == "user")
    return {
        **row,
        "messages": [
            *messages[:place],
            {**messages[place], "content": question},
            *messages[place + 1 :],
        ],
    }


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
