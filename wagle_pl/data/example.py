"""The canonical row: each row of a file, of any kind, is parsed once into an :class:`Example`."""

from __future__ import annotations

import datetime
import json
import logging
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Optional

from wagle_pl.core.errors import WagleError

log = logging.getLogger(__name__)

Row = dict[str, Any]
Kind = Literal["answered", "choices", "text", "prompt", "tokens"]

IGNORE = -100  # the label transformers and torch.nn.functional.cross_entropy leave out

#: Columns of texts, and of lists of texts; any row may have the optional ones.
OPTIONAL_TEXTS = ("context", "prefill", "paraphrased_question", "paraphrased_answer", "alternate")
TEXTS = ("question", "answer", "prompt", "response", "text", *OPTIONAL_TEXTS)
OPTIONAL_LISTS = ("perturbed_answer", "answer_aliases")
LISTS = ("choices", *OPTIONAL_LISTS)


@dataclass(frozen=True)
class Example:
    """One row, ready for tokenisation. Texts that the row does not have are empty."""

    #: ``answered`` (a question, prompt or conversation with its answer), ``choices`` (multiple
    #: choice), ``text`` (loss on all of it), ``prompt`` (to generate from) or ``tokens``.
    kind: Kind
    question: str = ""  # or the prompt, or the messages before the answer, one per line
    answer: str = ""  # or the right choice, the last message, or the text
    #: The question, if attacks may reword it; in a conversation, the last message of the user.
    asked: Optional[str] = None
    #: Messages of a conversation before the answer: dicts with ``role`` and ``content``.
    messages: Optional[Sequence[Mapping[str, str]]] = None
    choices: Sequence[str] = ()
    label: Optional[int] = None  # index of the right choice
    input_ids: Sequence[int] = ()
    labels: Sequence[int] = ()  # same length, -100 where there is no loss
    context: str = ""  # text before the question, e.g. worked examples
    prefill: str = ""  # text that begins the answer, given to the model, without loss
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    alternate: str = ""  # an answer to prefer to the row's own (AltPO)
    perturbed_answers: Sequence[str] = ()  # wrong answers of the same form
    answer_aliases: Sequence[str] = ()  # other right answers
    subject: str = ""  # of the question, e.g. ``world_religions`` (MMLU)
    continuation: bool = False  # the answer continues the prompt, without a template
    partial: bool = False  # the text goes on after the row: no end-of-sequence token
    #: All columns as in the file, for digests and error messages.
    row: Row = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, row: Row) -> Example:
        """Parse a row of one of :data:`KINDS`; errors name the column.

        >>> Example.of({"question": "Which?", "choices": ["a stone", "a pear"], "answer": 1}).answer
        'a pear'
        """
        row = dict(row)
        if row.get("choices") is not None:  # the label may be in ``answer``, and may be a float
            source = "label" if row.get("label") is not None else "answer"
            label = row.get(source)
            if not isinstance(label, bool) and isinstance(label, numbers.Real) and label % 1 == 0:
                row["label"] = int(float(label))
                if source == "answer":
                    del row["answer"]
        columns = next((c for c in KINDS if all(row.get(name) is not None for name in c)), None)
        if columns is None:
            raise WagleError(_no_kind(row))
        for column in (*columns, *OPTIONAL_TEXTS, *OPTIONAL_LISTS):
            if row.get(column) is not None and column in (*TEXTS, *LISTS):
                row[column] = _text(column, row[column])
        if columns[-1] in TEXTS and not row[columns[-1]].strip():
            raise WagleError(f"{columns[-1]!r} is empty")
        optional: dict[str, Any] = {column: row.get(column) or "" for column in OPTIONAL_TEXTS}
        optional |= {
            "perturbed_answers": row.get("perturbed_answer") or (),
            "answer_aliases": row.get("answer_aliases") or (),
            "subject": str(row.get("subject") or ""),
            "continuation": bool(row.get("continuation")),
            "partial": bool(row.get("partial")),
        }
        return cls(**optional | KINDS[columns](row), row=row)

    @property
    def key(self) -> str:
        """Question and answer with white space collapsed; equal for rows with the same content."""
        texts = (" ".join(text.split()) for text in (self.question, self.answer))
        return json.dumps([*texts, *self.choices, self.label, *self.input_ids, *self.labels])

    @property
    def texts(self) -> frozenset[str]:
        """Question and answer with their paraphrases: rows of the same fact have a text in common.

        The right choice is left out, since other facts may have the same one.
        """
        asked = [m["content"] for m in self.messages or () if m["role"] != "system"]
        answer = "" if self.choices else self.answer
        others = {self.paraphrased_question, self.paraphrased_answer}
        return frozenset({*(asked or [self.question]), answer, *others} - {""})

    def asking(self, question: str) -> Example:
        """The example with another question; in a conversation, in the last message of the user."""
        asked = None if self.asked is None else question
        if not self.messages:
            return replace(self, question=question, asked=asked)
        if asked is None:  # nobody asks
            return self
        messages = list(self.messages)
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[last] = {**messages[last], "content": question}
        return replace(self, question=_joined(messages), asked=asked, messages=messages)


def parse_rows(rows: Iterable[Row], where: str) -> list[Example]:
    """Parse the rows of one set; errors name ``where`` and the row, counted from 1."""
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            examples.append(Example.of(row))
        except WagleError as error:
            raise WagleError(f"{where} row {number}: {error}") from None
    if not examples:
        raise WagleError(f"{where} has no rows")
    return examples


def raw_rows(examples: Optional[Iterable[Example]]) -> Optional[list[Row]]:
    """The rows that examples were parsed from, for digests."""
    return None if examples is None else [example.row for example in examples]


def warn_of_repeats(forget: Sequence[Example], source: str) -> None:
    """Warn of repeated rows, which are attributed and forgotten repeatedly."""
    first: dict[str, int] = {}
    numbered = enumerate(forget, 1)
    repeats = [str(n) for n, example in numbered if first.setdefault(example.key, n) != n]
    if repeats:
        log.warning(
            "%d of %d forget rows repeat earlier ones and weigh as much again: remove them, "
            "unless that is meant (%s, row %s)",
            *(len(repeats), len(forget), source),
            ", ".join(repeats[:5]) + (", ..." if len(repeats) > 5 else ""),
        )


def without_overlap(
    retain: list[Example], forget: Sequence[Example], overlap: Literal["error", "warn", "drop"]
) -> list[Example]:
    """Retain rows that are not forget rows; all of them, with a warning, for ``warn``."""
    keys = {example.key for example in forget}
    kept = [example for example in retain if example.key not in keys]
    if len(kept) == len(retain):
        return retain
    message = f"{len(retain) - len(kept)} of {len(retain)} retain rows are also forget rows"
    if overlap == "error":
        raise WagleError(f"{message}; remove them or pass --data.overlap drop")
    if overlap == "warn":
        log.warning(
            "%s: the objective pulls them both ways (--data.overlap drop removes them)", message
        )
        return retain
    log.info("%s: dropped from the retain set", message)
    if not kept:
        raise WagleError(f"{message}: nothing is left to retain")
    return kept


def _no_kind(row: Row) -> str:
    """Why a row is of none of :data:`KINDS`."""
    for columns in KINDS:
        if all(column in row for column in columns):
            nulls = " and ".join(repr(column) for column in columns if row[column] is None)
            verb = "are" if " and " in nulls else "is"
            return f"{nulls} {verb} null: give a value, or leave the row out"
    kinds = ", ".join("+".join(columns) for columns in KINDS)
    lower = {str(column).strip().lower() for column in row}
    hint = "; names are in lower case" if any(lower >= set(kind) for kind in KINDS) else ""
    return f"has columns {sorted(row)}; a row needs those of one of: {kinds}{hint}"


def _text(column: str, value: Any) -> Any:
    """A column's text or list of texts. Numbers (an answer may be a year), booleans and dates are
    converted; NaN and infinity are not, because they mean that there is no value."""
    is_list = column in LISTS
    if is_list and not isinstance(value, (list, tuple)):
        raise WagleError(f"{column!r} must be a list of texts")
    texts = []
    for text in value if is_list else (value,):
        if isinstance(text, bool):
            text = str(text).lower()
        elif isinstance(text, (datetime.date, datetime.time)):
            text = str(text)
        elif isinstance(text, numbers.Number):
            if text != text or text in (math.inf, -math.inf):
                why = f"{column!r} is {value}, not a text: give it a value, or leave the row out"
                raise WagleError(why)
            text = str(text)
        if not isinstance(text, str):
            fault = "must be a list of texts"
            why = f"{column!r} {fault if is_list else f'is a {type(text).__name__}, not a text'}"
            raise WagleError(why)
        if half := re.search("[\ud800-\udfff]", text):
            raise WagleError(f"a text has \\u{ord(half[0]):x}, which is half of a character")
        texts.append(text)
    return texts if is_list else texts[0]


def _tokens(row: Row) -> dict[str, Any]:
    for column, lowest in (("input_ids", 0), ("labels", IGNORE)):
        ids = row[column]
        if not hasattr(ids, "__len__") or not all(isinstance(i, numbers.Integral) for i in ids):
            raise WagleError(f"{column!r} must be a list of tokens")
        if wrong := [i for i in ids if i < 0 and i != lowest]:
            raise WagleError(f"{column!r} has {wrong[0]}, which is not a token id")
        if not len(ids):
            raise WagleError(f"{column!r} is empty")
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if len(ids) != len(labels):
        raise WagleError(f"there are {len(ids)} 'input_ids' and {len(labels)} 'labels'")
    return {"kind": "tokens", "input_ids": ids, "labels": labels}


def _conversation(row: Row) -> dict[str, Any]:
    messages = row["messages"]
    if not isinstance(messages, (list, tuple)) or not all(
        isinstance(message, dict)
        and all(isinstance(message.get(part), str) for part in ("role", "content"))
        for message in messages
    ):
        why = "'messages' must be a list of messages, each with the texts 'role' and 'content'"
        raise WagleError(why)
    if not messages or not _text("answer", messages[-1]["content"]).strip():
        raise WagleError("'messages' is empty")
    *before, last = messages
    if last["role"] in ("system", "user"):
        why = f"the last of 'messages' has the role {last['role']}; it must be the answer"
        raise WagleError(why)
    users = [message["content"] for message in before if message["role"] == "user"]
    return {
        "kind": "answered",
        "question": _text("question", _joined(before)),
        "answer": last["content"],
        "asked": users[-1] if users else None,
        "messages": before,
        "continuation": False,
    }


def _choices(row: Row) -> dict[str, Any]:
    question, choices, label = row["question"], row["choices"], row["label"]
    if not isinstance(label, numbers.Integral) or label not in range(len(choices)):
        raise WagleError(f"label {label!r} is not an index of its choices")
    answer = {"answer": choices[label], "choices": choices, "label": int(label)}
    return {"kind": "choices", "question": question, "asked": question, **answer}


def _joined(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)


#: The accepted kinds of row: required columns (a null counts as absent), in the order they are
#: tried -> parser of the other fields. ``label`` is the index of the right one of ``choices``; an
#: integer in ``answer`` works too. Numbers, booleans and dates in text columns are converted to
#: text. Any row may add ``context``, ``prefill``, ``subject``,
#: ``continuation``, ``partial``, ``paraphrased_question``, ``paraphrased_answer``, ``alternate``,
#: and the lists ``perturbed_answer`` and ``answer_aliases``.
KINDS: dict[tuple[str, ...], Callable[[Row], dict[str, Any]]] = {
    ("input_ids", "labels"): _tokens,
    ("messages",): _conversation,
    ("question", "choices", "label"): _choices,
    ("question", "answer"): lambda row: {
        "kind": "answered",
        "question": row["question"],
        "answer": row["answer"],
        "asked": row["question"],
    },
    ("prompt", "response"): lambda row: {
        "kind": "answered",
        "question": row["prompt"],
        "answer": row["response"],
    },
    ("text",): lambda row: {"kind": "text", "answer": row["text"]},
    ("prompt",): lambda row: {"kind": "prompt", "question": row["prompt"]},
}
