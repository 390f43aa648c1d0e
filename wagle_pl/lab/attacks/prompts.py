"""Attacks that change the prompt: reworded questions, and neighbouring facts in the context."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Example
from wagle_pl.evaluation.attacks.attack import Asked, Attack, Finding, Subject


@dataclass(eq=False)
class Paraphrase(Attack):
    """Ask with the column ``paraphrased_question`` (arXiv 2402.16835, section 3)."""

    def attack(self, subject: Subject) -> list[Finding]:
        return subject.ask(self._variants, self.measures)

    def check(self, subject: Subject) -> None:
        super().check(subject)
        if not subject.asked(self._variants):
            raise self.unusable("no row to be forgotten has paraphrased_question")

    def _variants(self, name: str, row: Example) -> list[Example]:
        asked = row.asked is not None and row.paraphrased_question
        return [row.asking(row.paraphrased_question)] if asked else []


@dataclass(eq=False)
class InContext(Attack):
    """Put neighbouring facts of the forget set before each question (arXiv 2402.16835, 2407.00106).

    Neighbours are the other rows of the test set with the most words in common (rare words count
    more), never one with the same question or answer. As many are taken as fit ``data.max_length``.

    Args:
        neighbours: facts before each question.
    """

    neighbours: int = 4

    def attack(self, subject: Subject) -> list[Finding]:
        asked = {name: self.in_context(subject, name) for name in subject.rows}
        return subject.compare({name: rows for name, rows in asked.items() if rows}, self.measures)

    def check(self, subject: Subject) -> None:
        super().check(subject)
        if self.neighbours < 1:
            raise WagleError(f"in_context.neighbours: must be at least 1, got {self.neighbours}")
        sets = subject.rows.values()
        if not any(row.asked and _others(rows, i) for rows in sets for i, row in enumerate(rows)):
            raise self.unusable("no question to be forgotten has another fact beside it")

    def in_context(self, subject: Subject, name: str) -> Asked:
        """Rows with facts in their ``context``, the nearest last; conversations are left out."""
        rows = subject.rows[name]
        vectors = word_vectors([f"{row.question} {row.answer}" for row in rows])
        prompts: dict[int, list[Example]] = {}
        for i, row in enumerate(rows):
            if row.asked is None or row.messages is not None:
                continue
            overlap = {
                j: sum(value * vectors[j].get(word, 0.0) for word, value in vectors[i].items())
                for j in _others(rows, i)
            }
            near = sorted(overlap, key=lambda j: (-overlap[j], j))[: self.neighbours]
            context = row.context or (subject.suite.set_of(name).header if row.choices else "")
            for count in range(len(near), 0, -1):
                facts = [f"{rows[j].asked} {rows[j].answer}\n" for j in reversed(near[:count])]
                changed = replace(row, context="".join(facts) + f"\n{context}")
                if _fits(subject, changed):
                    prompts[i] = [changed]
                    break
        return prompts


def _fits(subject: Subject, row: Example) -> bool:
    """Whether the prompt with any of its answers fits into the longest sequence."""
    longest = max((row.paraphrased_answer, *row.perturbed_answers), key=len) or None
    try:
        encoded = [subject.template.encode(row, answer) for answer in (None, longest)]
    except WagleError:
        return False
    return max(len(text["input_ids"]) for text in encoded) < subject.template.max_length


def _others(rows: Sequence[Example], i: int) -> list[int]:
    """Rows with a question that state another fact than row i."""
    texts, asked = rows[i].texts | {rows[i].answer}, [(j, r) for j, r in enumerate(rows) if r.asked]
    return [j for j, row in asked if j != i and not (row.texts | {row.answer}) & texts]


def word_vectors(texts: Sequence[str]) -> list[dict[str, float]]:
    """TF-IDF of every text, normalised: word -> count · log(N / texts with the word), if not 0."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    texts_with = Counter(word for count in counts for word in count)
    vectors = []
    for count in counts:
        vector = {word: n * math.log(len(texts) / texts_with[word]) for word, n in count.items()}
        norm = math.sqrt(sum(value * value for value in vector.values())) or 1.0
        vectors.append({word: value / norm for word, value in vector.items() if value})
    return vectors
