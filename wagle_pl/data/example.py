"""The canonical row: whatever columns a file has, each of its rows is parsed once into an :class:`Example`."""

from __future__ import annotations

import datetime
import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Optional

from wagle_pl.core.errors import WagleError

Row = dict[str, Any]
Kind = Literal["answered", "choices", "text", "prompt", "tokens"]

IGNORE = -100  # the label transformers and torch.nn.functional.cross_entropy leave out

#: Columns that hold a text, and columns that hold a list of texts; the optional ones go with any kind of row.
TEXTS = ("question", "answer", "prompt", "response", "text")
OPTIONAL_TEXTS = ("context", "paraphrased_question", "paraphrased_answer")
LISTS = ("choices", "perturbed_answer")


@dataclass(frozen=True)
class Example:
    """One row, ready to be made into tokens. A text that the row does not have is empty.

    Attributes:
        kind: ``answered`` (question or prompt or conversation, and its answer), ``choices`` (multiple choice), ``text``
            (loss on all of it), ``prompt`` (without an answer: to generate from) or ``tokens``.
        question: what is asked, the prompt, or the messages before the answer, one a line.
        answer: what the model should say: the answer, the right choice, the last message, or the text.
        asked: the question in a narrow sense, which can be put into other words: of a conversation the last user's;
            None of a prompt, a text or tokens.
        messages: of a conversation, those before the answer: dicts with ``role`` and ``content``; else None.
        choices: of a multiple choice.
        label: index of its right choice.
        input_ids, labels: of a row of tokens, equally long; labels are -100 where there is no loss.
        context: text before the question, e.g. worked examples.
        paraphrased_question, paraphrased_answer: the same in other words.
        perturbed_answers: wrong answers of the same form.
        subject: of the question, e.g. ``world_religions`` (MMLU).
        continuation: the answer continues the prompt word by word: no template is put around them.
        partial: the text goes on after the row, which gets no end-of-sequence token.
        row: all columns as the file has them, for digests and error messages.
    """

    kind: Kind
    question: str = ""
    answer: str = ""
    asked: Optional[str] = None
    messages: Optional[Sequence[Mapping[str, str]]] = None
    choices: Sequence[str] = ()
    label: Optional[int] = None
    input_ids: Sequence[int] = ()
    labels: Sequence[int] = ()
    context: str = ""
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answers: Sequence[str] = ()
    subject: str = ""
    continuation: bool = False
    partial: bool = False
    row: Row = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, row: Row) -> Example:
        """Parse a row of any kind of :data:`KINDS`.

        Raises:
            WagleError: naming the column that is missing or wrong.

        >>> Example.of({"question": "Which?", "choices": ["a stone", "a pear"], "answer": 1}).answer
        'a pear'
        """
        row = _with_label(as_texts(row))
        for columns, parse in KINDS.items():
            if all(row.get(column) is not None for column in columns):
                _check_texts(row, columns)
                texts = {column: row.get(column) or "" for column in OPTIONAL_TEXTS}
                optional = {
                    **texts,
                    "perturbed_answers": row.get("perturbed_answer") or (),
                    "subject": str(row.get("subject") or ""),
                    "continuation": bool(row.get("continuation")),
                    "partial": bool(row.get("partial")),
                }
                return cls(**{**optional, **parse(row)}, row=row)
        if nulls := _nulls(row):
            raise WagleError(f"{nulls} null: give a value, or leave the row out")
        kinds = ", ".join("+".join(columns) for columns in KINDS)
        raise WagleError(f"there are columns {sorted(row)}; needed is one of: {kinds}")

    @property
    def key(self) -> str:
        """The same for two rows that teach the same: what is asked and answered, white space folded."""
        texts = (" ".join(text.split()) for text in (self.question, self.answer))
        return json.dumps([*texts, *self.choices, self.label, *self.input_ids, *self.labels])

    @property
    def texts(self) -> frozenset[str]:
        """Question and answer in every wording: rows of one fact share one.

        Without the right choice, which may be another fact's too.
        """
        own = [m["content"] for m in self.messages or () if m["role"] != "system"]
        answer = "" if self.choices else self.answer
        return frozenset(
            {*(own or [self.question]), answer, self.paraphrased_question, self.paraphrased_answer}
            - {""}
        )

    def asking(self, question: str) -> Example:
        """The example with another question; in a conversation, that of the last user."""
        asked = None if self.asked is None else question
        if not self.messages:
            return replace(self, question=question, asked=asked)
        if asked is None:  # nobody asks
            return self
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        messages = list(self.messages)
        messages[last] = {**messages[last], "content": question}
        return replace(self, question=_joined(messages), asked=asked, messages=messages)


# -- the kinds of rows ------------------------------------------------------------------------------------------------


def _tokens(row: Row) -> dict[str, Any]:
    for column, lowest in (("input_ids", 0), ("labels", IGNORE)):
        ids = row[column]
        if not hasattr(ids, "__len__") or not all(isinstance(i, numbers.Integral) for i in ids):
            raise WagleError(f"{column!r} is no list of tokens")
        if wrong := [i for i in ids if i < 0 and i != lowest]:
            raise WagleError(f"{column!r} has {wrong[0]}, which is no token id")
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
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise WagleError(
            "'messages' is no list of messages, each with the texts 'role' and 'content'"
        )
    if not messages or not messages[-1]["content"].strip():
        raise WagleError("'messages' is empty")
    *before, last = messages
    if last["role"] in ("system", "user"):
        raise WagleError(
            f"the last of 'messages' is of the {last['role']}, where the answer must be"
        )
    users = [message["content"] for message in before if message["role"] == "user"]
    return {
        "kind": "answered",
        "question": _joined(before),
        "answer": last["content"],
        "asked": users[-1] if users else None,
        "messages": before,
        "continuation": False,
    }


def _choices(row: Row) -> dict[str, Any]:
    choices, label = row["choices"], row["label"]
    if not isinstance(label, numbers.Integral) or label not in range(len(choices)):
        raise WagleError(f"label {label!r} is no index of its choices")
    question = row["question"]
    return {
        "kind": "choices",
        "question": question,
        "answer": choices[label],
        "asked": question,
        "choices": choices,
        "label": int(label),
    }


def _question(row: Row) -> dict[str, Any]:
    question, answer = row["question"], _filled(row, "answer")
    return {"kind": "answered", "question": question, "answer": answer, "asked": question}


def _response(row: Row) -> dict[str, Any]:
    return {"kind": "answered", "question": row["prompt"], "answer": _filled(row, "response")}


def _text(row: Row) -> dict[str, Any]:
    return {"kind": "text", "answer": _filled(row, "text")}


def _prompt(row: Row) -> dict[str, Any]:
    return {"kind": "prompt", "question": _filled(row, "prompt")}


#: The accepted rows: the columns that must be there (a null counts as absent), in the order they are tried, and what
#: makes an example's fields of them. ``label`` is the index of the right one of ``choices``; a whole number in
#: ``answer`` will do. A number, a truth value or a date where a text belongs is taken as its text. Any row may add
#: ``context``, ``subject``, ``continuation``, ``partial``, ``paraphrased_question``, ``paraphrased_answer`` and
#: ``perturbed_answer`` (a list), see :class:`Example`.
KINDS: dict[tuple[str, ...], Callable[[Row], dict[str, Any]]] = {
    ("input_ids", "labels"): _tokens,
    ("messages",): _conversation,
    ("question", "choices", "label"): _choices,
    ("question", "answer"): _question,
    ("prompt", "response"): _response,
    ("text",): _text,
    ("prompt",): _prompt,
}


# -- many rows --------------------------------------------------------------------------------------------------------


def parse_rows(rows: Iterable[Row], where: str) -> list[Example]:
    """Parse the rows of one set.

    Raises:
        WagleError: naming ``where`` and the row (counted from 1), if one is of no kind or there are none.
    """
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
    """The rows that examples were parsed from: what digests are taken of."""
    return None if examples is None else [example.row for example in examples]


# -- columns ----------------------------------------------------------------------------------------------------------


def as_texts(row: Row) -> Row:
    """A row with the text of numbers, truth values and dates in columns of texts: a year is an answer too.

    The ``answer`` of a multiple choice stays a number.

    >>> as_texts({"question": "When?", "answer": 1980})
    {'question': 'When?', 'answer': '1980'}
    """
    chosen = row.get("choices") is not None
    texts = {
        column: _as_text(row[column])
        for column in (*TEXTS, *OPTIONAL_TEXTS)
        if _has_text(row.get(column)) and not (chosen and column == "answer")
    }
    lists = {
        column: [_as_text(item) if _has_text(item) else item for item in row[column]]
        for column in LISTS
        if isinstance(row.get(column), (list, tuple)) and any(map(_has_text, row[column]))
    }
    return {**row, **texts, **lists} if texts or lists else row


def _with_label(row: Row) -> Row:
    """A multiple choice with the whole number in ``answer``, or in ``label``, as its ``label``."""
    if row.get("choices") is None:
        return row
    source = "label" if row.get("label") is not None else "answer"
    value = row.get(source)
    if type(value) is float and value.is_integer():  # of a column with gaps
        value = int(value)
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value is row.get("label"):
        return row
    return {**{name: each for name, each in row.items() if name != source}, "label": int(value)}


def _check_texts(row: Row, columns: Sequence[str]) -> None:
    """Refuse what is no text, or no list of texts, in the columns that an example is made of."""
    for column in (*columns, *OPTIONAL_TEXTS, "perturbed_answer"):
        value = row.get(column)
        if value is None or column not in (*TEXTS, *OPTIONAL_TEXTS, *LISTS):
            continue
        if any(map(_is_nan, value if isinstance(value, list) else [value])):
            raise WagleError(
                f"{column!r} is {value}, not a text: give it a value, or leave the row out"
            )
        if column in LISTS:
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                raise WagleError(f"{column!r} is no list of texts")
        elif not isinstance(value, str):
            raise WagleError(f"{column!r} is a {type(value).__name__}, not a text")


def _nulls(row: Row) -> str:
    """Which columns, with their verb, would make the row one of a kind if they were not None; empty if none would."""
    for columns in KINDS:
        if all(column in row for column in columns):
            nulls = [repr(column) for column in columns if row[column] is None]
            return f"{' and '.join(nulls)} {'is' if len(nulls) == 1 else 'are'}"
    return ""


def _filled(row: Row, column: str) -> str:
    if not row[column].strip():
        raise WagleError(f"{column!r} is empty")
    return row[column]


def _joined(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)


def _has_text(value: Any) -> bool:
    return isinstance(value, (numbers.Number, datetime.date, datetime.time)) and not _is_nan(value)


def _is_nan(value: Any) -> bool:
    """Whether a value is what JSON writes as NaN or Infinity."""
    return isinstance(value, numbers.Real) and not math.isfinite(value)


def _as_text(value: Any) -> str:
    """Truth values as JSON and most CSV files have them."""
    return str(value).lower() if isinstance(value, bool) else str(value)
