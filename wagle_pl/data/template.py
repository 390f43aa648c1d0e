"""From a row to tokens: prompt, answer, one end-of-sequence token (if there is one), loss on the answer only.

A row with ``continuation`` is two pieces of one text: no template stands around them. A row with ``partial`` is text
that goes on after it: no end-of-sequence token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Optional

from wagle_pl.data.rows import Row, row_kind
from wagle_pl.utilities import WagleError

log = logging.getLogger(__name__)

IGNORE = -100  # the label transformers and torch.nn.functional.cross_entropy leave out

DEFAULT_PROMPT = "### Question: {question}\n"
DEFAULT_ANSWER = "### Answer: {answer}"


class Template:
    """Turns rows into token ids.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt_format: text of the prompt with ``{question}``; None takes the tokenizer's chat template, or, where the
            tokenizer has none, ``"### Question: {question}\\n"``.
        answer_format: text of the answer with ``{answer}``; what stands before ``{answer}`` is given when generating.
            None where a chat template makes the prompt: it writes the answer too.
        max_length: longest sequence in tokens; longer ones are cut at the end (the caller counts them).

    Raises:
        WagleError: if a format lacks its field, or would have no effect.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_format: Optional[str] = None,
        answer_format: Optional[str] = None,
        max_length: int = 512,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.uses_chat_template = prompt_format is None and tokenizer.chat_template is not None
        if self.uses_chat_template and answer_format is not None:
            raise WagleError(f"answer_format {answer_format!r} has no effect beside the tokenizer's chat template: "
                             "give prompt_format too, or leave both to the template (null)")  # fmt: skip
        self.prompt_format = prompt_format or DEFAULT_PROMPT
        self.answer_format = answer_format or DEFAULT_ANSWER
        for option, text, field in (
            ("prompt_format", self.prompt_format, "{question}"),
            ("answer_format", self.answer_format, "{answer}"),
        ):
            if field not in text:
                raise WagleError(f"{option} {text!r} must contain {field}")
        if tokenizer.eos_token_id is None:
            log.warning("the tokenizer has no end-of-sequence token (eos_token): answers are trained without an end")

    def identity(self) -> str:
        """Everything that decides the tokens, as text: part of the key under which tokenised rows are cached."""
        vocabulary = self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else repr(self.tokenizer)
        formats = self.tokenizer.chat_template if self.uses_chat_template else (self.prompt_format, self.answer_format)
        return repr((vocabulary, formats, self.max_length, self.tokenizer.eos_token_id))

    def encode(self, row: Row, answer: Optional[str] = None) -> dict[str, list[int]]:
        """Tokens of one row.

        Args:
            row: a row of any kind of :data:`wagle_pl.data.rows.COLUMNS`.
            answer: takes the place of the row's own answer (a refusal, a perturbed answer).

        Returns:
            ``input_ids`` and ``labels`` of equal length; labels are -100 on the prompt.

        Raises:
            WagleError: if no answer token that follows another is left after cutting at ``max_length``, the row has no
                answer, or the chat template refuses it.
        """
        kind = row_kind(row)
        ends = answer is not None or not row.get("partial")
        if kind == ("input_ids", "labels"):
            ids, labels = list(row["input_ids"]), list(row["labels"])
        elif kind == ("text",):
            ids = self.tokenizer(row["text"])["input_ids"]
            ids = ids if row.get("partial") else self._with_eos(ids)
            labels = list(ids)
        else:
            prompt, completion = self._texts(row, answer)
            special = self._adds_special_tokens(row)
            prompt_ids = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
            ids = self.tokenizer(prompt + completion, add_special_tokens=special)["input_ids"]
            if ids[: len(prompt_ids)] != prompt_ids:  # the two texts merge at the seam: keep the prompt generation sees
                ids = prompt_ids + self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            answer_ids = ids[len(prompt_ids) :]
            answer_ids = self._with_eos(answer_ids) if ends else answer_ids
            ids = prompt_ids + answer_ids
            labels = [IGNORE] * len(prompt_ids) + answer_ids
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORE for label in labels[1:]):
            if labels and labels[0] != IGNORE:
                raise WagleError("its only label is its first token, which no token before it predicts: give a longer "
                                 "text, or a prompt before the answer")  # fmt: skip
            raise WagleError(f"no answer token is left within max_length={self.max_length} tokens; raise it")
        return {"input_ids": ids, "labels": labels}

    def encode_prompt(self, row: Row) -> list[int]:
        """Token ids a model continues to answer the row: of a row of tokens, those before the first label."""
        kind = row_kind(row)
        if kind == ("input_ids", "labels"):
            ids, labels = list(row["input_ids"]), row["labels"]
            return ids[: next((i for i, label in enumerate(labels) if label != IGNORE), len(ids))]
        if kind == ("text",):
            ids = self.tokenizer(row["text"])["input_ids"]
            return ids[: max(1, len(ids) // 2)]
        prompt, _ = self._texts(row, "" if kind == ("prompt",) else None)
        if self.uses_chat_template or row.get("continuation"):
            return self.tokenizer(prompt, add_special_tokens=self._adds_special_tokens(row))["input_ids"]
        return self.tokenizer(prompt + self.answer_format.partition("{answer}")[0].rstrip(" "))["input_ids"]

    def _adds_special_tokens(self, row: Row) -> bool:
        """Whether the tokenizer adds its special tokens: a chat template writes its own."""
        return not self.uses_chat_template or bool(row.get("continuation"))

    def _texts(self, row: Row, answer: Optional[str]) -> tuple[str, str]:
        """Text up to the answer and text of the answer."""
        before = row.get("context") or ""
        if row.get("messages") is not None:
            *context, last = row["messages"]
            context, answer = list(context), last["content"] if answer is None else answer
            question = "\n".join(message["content"] for message in context)
        else:
            question = row["question"] if row.get("question") is not None else row["prompt"]
            if row.get("continuation"):
                return before + question, following(question, answer) if answer is not None else _own_answer(row)
            answer = _own_answer(row) if answer is None else answer
            context = [{"role": "user", "content": before + question}]
        if not self.uses_chat_template:
            prompt = before + self.prompt_format.replace("{question}", question)
            return prompt, self.answer_format.replace("{answer}", answer)
        prompt = self._chat(context, add_generation_prompt=True)
        full = self._chat([*context, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not full.startswith(prompt):
            raise WagleError("the chat template rewrites the prompt once there is an answer; give prompt_format")
        return prompt, full[len(prompt) :]

    def _chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError  # transformers needs it for chat templates, and for nothing else

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise WagleError(f"the chat template refuses messages of the roles {roles} ({error}); change the row, or "
                             "give prompt_format for rows with questions") from None  # fmt: skip

    def _with_eos(self, ids: list[int]) -> list[int]:
        """``ids`` up to and with the first end-of-sequence token, which is added when there is none."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return ids
        return [*ids[: ids.index(eos)], eos] if eos in ids else [*ids, eos]


def _own_answer(row: Row) -> str:
    """The answer a row brings; the right one of a multiple choice.

    Raises:
        WagleError: if it has none.
    """
    kind = row_kind(row)
    if kind == ("question", "choices", "label"):
        return row["choices"][row["label"]]
    if kind in (("prompt",), None):
        raise WagleError("there is a prompt and no answer: such rows can be generated from, not trained on or scored")
    return row[kind[-1]]


def following(prompt: str, answer: str) -> str:
    """An answer as it follows a prompt that is no more than text: with a space between words.

    >>> following("Down the", "rabbit-hole"), following("Down the ", "rabbit-hole")
    (' rabbit-hole', 'rabbit-hole')
    """
    return answer if not answer or prompt[-1:].isspace() or answer[0].isspace() else f" {answer}"
