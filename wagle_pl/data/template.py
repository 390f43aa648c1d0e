"""From a row to tokens: prompt, answer, one end-of-sequence token, loss on the answer only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from wagle_pl.data.rows import Row, row_kind
from wagle_pl.utilities import WagleError

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
        max_length: longest sequence in tokens; longer ones are cut at the end (the caller counts them).

    Raises:
        WagleError: if a format lacks its field.
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
        self.prompt_format = prompt_format or DEFAULT_PROMPT
        self.answer_format = answer_format or DEFAULT_ANSWER
        for option, text, field in (
            ("prompt_format", self.prompt_format, "{question}"),
            ("answer_format", self.answer_format, "{answer}"),
        ):
            if field not in text:
                raise WagleError(f"{option} {text!r} must contain {field}")

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
            WagleError: if no answer token is left after cutting at ``max_length``.
        """
        kind = row_kind(row)
        if kind == ("input_ids", "labels"):
            ids, labels = list(row["input_ids"]), list(row["labels"])
        elif kind == ("text",):
            ids = self._with_eos(self.tokenizer(row["text"])["input_ids"])
            labels = list(ids)
        else:
            prompt, completion = self._texts(row, answer)
            special = not self.uses_chat_template  # a chat template writes its own special tokens
            prompt_ids = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
            ids = self.tokenizer(prompt + completion, add_special_tokens=special)["input_ids"]
            if ids[: len(prompt_ids)] != prompt_ids:  # the two texts merge at the seam: keep the prompt generation sees
                ids = prompt_ids + self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            answer_ids = self._with_eos(ids[len(prompt_ids) :])
            ids = prompt_ids + answer_ids
            labels = [IGNORE] * len(prompt_ids) + answer_ids
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORE for label in labels):
            raise WagleError(f"no answer token is left within max_length={self.max_length} tokens; raise it")
        return {"input_ids": ids, "labels": labels}

    def encode_prompt(self, row: Row) -> list[int]:
        """Token ids a model continues to answer the row."""
        kind = row_kind(row)
        if kind == ("input_ids", "labels"):
            return [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORE]
        if kind == ("text",):
            ids = self.tokenizer(row["text"])["input_ids"]
            return ids[: max(1, len(ids) // 2)]
        prompt, _ = self._texts(row, None)
        if self.uses_chat_template:
            return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return self.tokenizer(prompt + self.answer_format.partition("{answer}")[0].rstrip(" "))["input_ids"]

    def _texts(self, row: Row, answer: Optional[str]) -> tuple[str, str]:
        """Text up to the answer and text of the answer."""
        if "messages" in row and row["messages"] is not None:
            *context, last = row["messages"]
            context, answer = list(context), answer or last["content"]
            question = "\n".join(message["content"] for message in context)
        else:
            question = row["question"] if "question" in row else row["prompt"]
            answer = answer or (row["answer"] if "answer" in row else row["response"])
            context = [{"role": "user", "content": question}]
        if not self.uses_chat_template:
            return self.prompt_format.replace("{question}", question), self.answer_format.replace("{answer}", answer)
        prompt = self._chat(context, add_generation_prompt=True)
        full = self._chat([*context, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not full.startswith(prompt):
            raise WagleError("the chat template rewrites the prompt once there is an answer; give prompt_format")
        return prompt, full[len(prompt) :]

    def _chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _with_eos(self, ids: list[int]) -> list[int]:
        """``ids`` up to and with the first end-of-sequence token, which is added when there is none."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return ids
        return [*ids[: ids.index(eos)], eos] if eos in ids else [*ids, eos]
