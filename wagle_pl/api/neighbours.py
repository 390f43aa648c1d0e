"""Rows that go with forget rows: general questions, rows of the same form about others, other words."""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Optional

from wagle_pl.data.example import Example, Row
from wagle_pl.data.people import FOLDER

log = logging.getLogger(__name__)

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")


#: Other words for a question without a paraphrase of its own.
WORDINGS = ("I have a question. {question}", "Could you tell me this? {question}")


def general_questions() -> list[str]:
    """Bundled questions on many subjects: science, history, language, daily life, code, ..."""
    return (FOLDER.parent / "questions.txt").read_text(encoding="utf-8").splitlines()


def without_subject(questions: Sequence[str], forget: Sequence[Example]) -> list[str]:
    """The questions that share no name and no rare word with the rows to forget.

    A word is rare if it has at least four letters and is in at most one in fifty of the questions.
    """
    counts = Counter(word for question in questions for word in set(words_of(question)))
    common = {word for word, count in counts.items() if 50 * count > len(questions)}
    texts = " ".join(text for example in forget for text in example.texts)
    subjects = {word for word in words_of(texts) if len(word) >= 4 or word.isdigit()} - common
    return [question for question in questions if subjects.isdisjoint(words_of(question))]


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


def invented_neighbours(forget: Sequence[Example], seed: int = 0) -> list[Optional[Example]]:
    """For each row a row of the same form about somebody and something else, which nobody has seen.

    Names (capitalised words that do not begin a sentence) and numbers are replaced by others, the
    same throughout a row. A row whose answer has neither gets another row's answer; if there is
    none, None takes its place.
    """
    draw, neighbours = random.Random(seed), []
    for example in forget:
        texts = [example.question, example.answer]
        texts = ["".join(texts)] if example.continuation else texts  # of a text in two halves
        names = {name for text in texts for name in names_of(text)}
        table: dict[str, str] = {}
        for name in sorted(names):
            table[name] = _invented(name, draw, {*names, *table.values()})
        question, answer = (_replaced(t, table) for t in (example.question, example.answer))
        paraphrase = _replaced(example.paraphrased_answer, table)
        if answer == example.answer:
            others = [other.answer for other in forget if other.answer not in ("", example.answer)]
            answer, paraphrase = draw.choice(others) if others else "", ""
        row = {"text": answer}
        if example.kind != "text":
            row = {"question": question, "answer": answer}
        neighbour = replace(
            example.asking(question),
            answer=answer,
            paraphrased_question=_replaced(example.paraphrased_question, table),
            paraphrased_answer=paraphrase,
            row=row,
        )
        neighbours.append(neighbour if answer else None)
    return neighbours


def _replaced(text: str, table: Mapping[str, str]) -> str:
    return _WORD.sub(lambda match: table.get(match[0], match[0]), text)


def worded(example: Example, number: int, reworded: bool, paraphrased: bool = False) -> Example:
    """A row as it is, or with its paraphrased question, or else a wording by its number; a row that
    asks nothing stays as it is. If ``paraphrased``, with its paraphrased answer if it has one."""
    if not reworded or example.kind not in ("answered", "choices"):
        return example
    if paraphrased and example.kind == "answered" and example.paraphrased_answer:
        example = replace(example, answer=example.paraphrased_answer)
    if example.paraphrased_question:
        return example.asking(example.paraphrased_question)
    if example.asked is None:
        return example
    return example.asking(WORDINGS[number % len(WORDINGS)].format_map({"question": example.asked}))


def halved(text: Example) -> Example:
    """A text as a prompt, its first half of words, and the other half to continue with."""
    words = list(re.finditer(r"\S+", text.answer))
    if len(words) < 2:
        return text
    start = words[len(words) // 2].start()
    prompt, rest = text.answer[:start].rstrip(), f" {text.answer[start:]}"
    example = replace(text, kind="answered", question=prompt, answer=rest, continuation=True)
    return replace(example, paraphrased_question="", paraphrased_answer="")


def restated(asked: Sequence[Example], forget: Sequence[Example]) -> list[Row]:
    """Further rows to forget, of those ``asked``: texts in halves, and the rows' own paraphrases."""
    rows, keys = [], {example.key for example in forget}
    for example in asked:
        question = example.paraphrased_question
        form = example.asking(question) if question else example
        form = replace(form, answer=example.paraphrased_answer or form.answer)
        if example.kind != "answered" or form.key in keys:
            continue
        texts: Row = {"question": form.question, "answer": form.answer}
        if form.messages is not None:
            last = {**example.row["messages"][-1], "content": form.answer}
            texts = {"messages": [*form.messages, last]}
        flags = {"continuation": form.continuation, "partial": form.partial}
        rows.append({**example.row, **texts, **flags})
    return rows


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without the ending 's."""
    return [re.sub("['’]s$", "", word.lower()) for word in _WORD.findall(text)]


def names_of(text: str) -> set[str]:
    """Words that are capitalised somewhere inside a sentence, and numbers; in capitals, these alone."""
    inside = {
        match[0]
        for match in _WORD.finditer(text)
        if match[0][0].isupper()
        and not text.isupper()
        and not re.search(r"(?:^|[.!?:]\s+|[\"“]\s*)$", text[: match.start()])
    }
    return {word for word in _WORD.findall(text) if word in inside or word.isdigit()}


def _invented(name: str, draw: random.Random, taken: Collection[str]) -> str:
    """Another name, another year at most 30 away, or another number of as many digits."""
    if name.isdigit() and len(name) == 4 and "1000" <= name <= "2100":
        return str(int(name) + draw.choice([*range(-30, 0), *range(1, 31)]))
    if name.isdigit():
        return "".join(draw.choice("123456789") for _ in name)
    names = _common_names()
    return draw.choice([other for other in names if other not in taken] or names)


@cache
def _common_names() -> list[str]:
    """Bundled names of people and places: a model finds made-up words less likely than any name."""
    return (FOLDER.parent / "names.txt").read_text(encoding="utf-8").splitlines()
