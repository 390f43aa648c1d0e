"""From a test row to the token sequences that are scored for it."""

from __future__ import annotations

from typing import NamedTuple, Optional

from wagle_pl.data.example import Example
from wagle_pl.data.template import IGNORE, Template
from wagle_pl.evaluation.scoring import Candidate

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Named(NamedTuple):
    """A candidate and what it is of its row.

    Attributes:
        kind: ``answer``, ``paraphrased_answer``, ``perturbed_answer``, ``letter`` or ``choice``.
        candidate: what is scored.
        tokens: how many of its scored tokens, the last ones, are the answer's.
        closed: whether the last of them is the end-of-sequence token that closes an answer.
    """

    kind: str
    candidate: Candidate
    tokens: int
    closed: bool


def answers(
    template: Template, row: Example, needs: frozenset[str], question: Optional[str] = None
) -> list[Named]:
    """The row's own answer, and its paraphrased and perturbed answers if ``alternatives`` are needed.

    Args:
        template: makes tokens of rows.
        row: of any kind that has an answer.
        needs: what to observe, see :mod:`wagle_pl.evaluation.observe`.
        question: asked in the place of the row's own.
    """
    if question is not None:
        row = row.asking(question)
    own = _named(template, "answer", row, None, needs & {"tokens", "vocabulary", "text"})
    found = [own]
    if "alternatives" in needs:
        paraphrased = [row.paraphrased_answer] if row.paraphrased_answer else []
        found += [_named(template, "paraphrased_answer", row, text) for text in paraphrased]
        found += [_named(template, "perturbed_answer", row, text) for text in row.perturbed_answers]
    return found


def _named(
    template: Template,
    kind: str,
    row: Example,
    answer: Optional[str],
    needs: frozenset[str] = frozenset(),
) -> Named:
    encoded = template.encode(row, answer)
    ids, labels = encoded["input_ids"], list(encoded["labels"])
    closed = ids[-1] == template.tokenizer.eos_token_id
    if closed and row.kind == "text":  # a corpus is scored as it stands: nothing closes it
        labels[-1] = IGNORE
        closed = False
    tokens = sum(label != IGNORE for label in labels[1:])
    if "text" in needs:
        labels = list(ids)
    candidate = Candidate(ids, labels, greedy="tokens" in needs, vocabulary="vocabulary" in needs)
    return Named(kind, candidate, tokens, closed)


def letters(template: Template, row: Example, header: str = "") -> list[Named]:
    """A multiple choice as lm-evaluation-harness puts it for MMLU and WMDP: the options by letter, the letters scored.

    The prompt is ``<question>\\nA. <choice>\\n…\\nAnswer:`` without a chat template, as the harness has it by default;
    a prompt longer than the template's ``max_length`` loses its beginning.

    Args:
        template: brings the tokenizer and the longest sequence.
        row: with ``question`` and ``choices``; its ``context`` stands before the question.
        header: text that stands before, if the row has no ``context``; see
            :attr:`wagle_pl.evaluation.suites.Suite.headers`.
    """
    header = headed(header, row)
    options = "".join(
        f"\n{letter}. {text}" for letter, text in zip(LETTERS, row.choices, strict=False)
    )
    prompt = f"{row.context or header}{row.question.strip()}{options}\nAnswer:"
    tokenizer = template.tokenizer
    context = tokenizer(prompt)["input_ids"]
    found = []
    for letter, _ in zip(LETTERS, row.choices, strict=False):
        ids = tokenizer(f"{prompt} {letter}")["input_ids"]
        labels = [IGNORE] * len(context) + ids[len(context) :]
        ids, labels = ids[-template.max_length :], labels[-template.max_length :]
        found.append(
            Named(
                "letter",
                Candidate(ids, labels),
                sum(label != IGNORE for label in labels[1:]),
                False,
            )
        )
    return found


def headed(header: str, row: Example) -> str:
    """A header with the row's ``subject`` in it; empty where the header has a place for one and the row has none.

    >>> asked = Example("choices", subject="world_religions")
    >>> headed("About {subject}.", asked), headed("About {subject}.", Example("choices"))
    ('About world religions.', '')
    """
    if "{subject}" not in header:
        return header
    return header.replace("{subject}", row.subject.replace("_", " ")) if row.subject else ""


def choice_texts(template: Template, row: Example) -> list[Named]:
    """A multiple choice with each option's text as the answer to the question."""
    return [_named(template, "choice", row, text) for text in row.choices]
