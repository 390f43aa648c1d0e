"""Tokenise a row: prompt, answer, one end-of-sequence token, loss on the answer only."""

from __future__ import annotations

import datetime
import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Optional

from wagle_pl.core.environment import bounded
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.data.example import IGNORE, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEFAULT_PROMPT = "### Question: {question}\n"
DEFAULT_ANSWER = "### Answer: {answer}"

#: The date that chat templates get instead of today's, as in OpenUnlearning's configurations.
DATE = "10 Apr 2025"

#: What one rendering of a chat template, which comes with a model, may take: it is a program.
RENDERING_SECONDS, RENDERING_BYTES = 5, 1 << 30


class Template:
    """Turns rows into token ids.

    The options are those of :class:`wagle_pl.data.ForgetRetainDataModule`; one that would have no
    effect is refused. Without a ``prompt_format`` and a chat template, the formats are
    :data:`DEFAULT_PROMPT` and :data:`DEFAULT_ANSWER`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: Optional[str] = None,
        answer_format: Optional[str] = None,
        max_length: int = 512,
        generation_prefix: Optional[str] = None,
        system_prompt: Optional[str] = None,
        chat_template_kwargs: Optional[Mapping[str, Any]] = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.uses_chat_template = prompt_format is None and tokenizer.chat_template is not None
        self.prompt_format = prompt_format or DEFAULT_PROMPT
        self.answer_format = answer_format or DEFAULT_ANSWER
        self.generation_prefix = generation_prefix
        if generation_prefix is None:
            self.generation_prefix = self._default_prefix
        self.system_prompt = system_prompt
        self.variables: dict[str, Any] = {}  # that the chat template reads
        unused: dict[str, Any] = {
            "answer_format": answer_format,
            "generation_prefix": generation_prefix,
        }
        place, fix = "the tokenizer's chat template", "give prompt_format too, or leave it out"
        if not self.uses_chat_template:
            unused = {"system_prompt": system_prompt, "chat_template_kwargs": chat_template_kwargs}
            place = "a tokenizer that has no chat template"
            if prompt_format is not None:
                place = "prompt_format, which takes its place"
            fix = "it is for a chat template; write it into prompt_format"
        for option, value in unused.items():
            if value is not None:
                raise WagleError(f"{value!r} has no effect with {place}: {fix}", option=option)
        if self.uses_chat_template:
            self._set_variables(chat_template_kwargs or {})
            asked = [{"role": "user", "content": "?"}]
            if system_prompt is not None and system_prompt.strip() not in self._chat(asked, True):
                raise WagleError(
                    "system_prompt: the chat template ignores system messages: leave "
                    "it out (null), or write it into prompt_format"
                )
        for option, field in (("prompt_format", "{question}"), ("answer_format", "{answer}")):
            value = getattr(self, option)
            if not isinstance(value, str) or field not in value:
                raise WagleError(
                    f"must be a text that contains {field}, got {value!r}", option=option
                )
        if tokenizer.eos_token_id is None:
            log.warning(
                "the tokenizer has no end-of-sequence token (eos_token): answers are trained "
                "without an end"
            )

    @property
    def _default_prefix(self) -> str:
        """The text before the answer, without the space that is part of the first word's token."""
        return self.answer_format.partition("{answer}")[0].rstrip(" ")

    def _set_variables(self, options: Mapping[str, Any]) -> None:
        """Set the chat template's variables and date; refuse variables that it does not read."""
        variables = {"date_string": DATE, **options}
        try:
            source = self.tokenizer.get_chat_template(tools=variables.get("tools"))
        except ValueError:
            raise WagleError(
                "the tokenizer has several chat templates, and none is its default: give prompt_format"
            ) from None
        read = {name for name in variables if re.search(rf"\b{re.escape(name)}\b", source)}
        reads_clock = "strftime_now" in source
        parameters = inspect.signature(self.tokenizer.apply_chat_template).parameters
        for name, value in options.items():
            fault = None
            try:
                json.dumps(value)
            except TypeError:
                kinds = "a text, a number, true, false, null or a list or dict of these"
                fault = f"{name} must be {kinds}, got {value!r}: quote it"
            if name in {"messages", "strftime_now", *parameters} - {"tools", "documents"}:
                fault = f"cannot set {name}: it is not a variable of the chat template"
            elif name not in read and not (name == "date_string" and reads_clock):
                fault = f"the chat template does not read {name!r}: check its spelling"
                fault += ", or leave it out"
            if fault:
                raise WagleError(f"chat_template_kwargs: {fault}")
        if reads_clock:
            try:
                now = datetime.datetime.strptime(variables["date_string"], "%d %b %Y")
            except (TypeError, ValueError):
                if "date_string" not in read:
                    raise WagleError(
                        f"chat_template_kwargs: date_string must be a day such as {DATE!r} for "
                        "this chat template, which reads the clock, got "
                        f"{variables['date_string']!r}"
                    ) from None
                now = datetime.datetime.strptime(DATE, "%d %b %Y")
            source = at_fixed_date(source, now)
        elif "date_string" not in read:
            del variables["date_string"]
        self._chat_template = source
        self.variables = variables

    def identity(self) -> str:
        """Everything that determines the tokens, as text, for digests."""
        fast = self.tokenizer.is_fast
        vocabulary = self.tokenizer.backend_tokenizer.to_str() if fast else repr(self.tokenizer)
        formats: Any = (self.prompt_format, self.answer_format)
        if self.uses_chat_template:
            formats = self.tokenizer.chat_template
            if self.system_prompt is not None or self.variables:
                formats = (formats, self.system_prompt, json.dumps(self.variables, sort_keys=True))
        elif self.generation_prefix != self._default_prefix:
            formats = (*formats, self.generation_prefix)
        return repr((vocabulary, formats, self.max_length, self.tokenizer.eos_token_id))

    @cached_property
    def prompts(self) -> dict[str, Any]:
        """The text around ``{question}`` and ``{answer}``, for records and comparisons.

        Texts are None if the chat template refuses such a row.
        """
        try:
            prompt, answer = self._texts(Example("answered", "{question}", "{answer}"), None)
        except WagleError:
            prompt = answer = None
        texts = {"prompt": prompt, "answer": answer}
        if not self.uses_chat_template:
            return {**texts, "generation_prefix": self.generation_prefix}
        variables = {"chat_template_kwargs": self.variables}
        return {**texts, "system_prompt": self.system_prompt, **variables}

    def encode(self, example: Example, answer: Optional[str] = None) -> dict[str, list[int]]:
        """``input_ids`` and ``labels`` of one row, of equal length; labels are -100 on the prompt.

        Args:
            answer: used instead of the row's own answer (a refusal, a perturbed answer).

        Raises:
            WagleError: if no predicted answer token is left within ``max_length``, the row has no
                answer, or the chat template refuses the row.
        """
        if example.kind == "tokens":
            ids, labels = list(example.input_ids), list(example.labels)
        elif example.kind == "text":
            ids = self._ids(example.answer)
            ids = ids if example.partial else self._with_eos(ids)
            labels = list(ids)
        else:
            prompt, completion = self._texts(example, answer)
            special = self._adds_special_tokens(example)
            prompt_ids = self._ids(prompt, special)
            ids = self._ids(prompt + completion, special)
            if ids[: len(prompt_ids)] != prompt_ids:
                # the two texts merge at the seam: keep the prompt that generation sees
                ids = prompt_ids + self._ids(completion, False)
            answer_ids = ids[len(prompt_ids) :]
            if answer is not None or not example.partial:
                answer_ids = self._with_eos(answer_ids)
            ids = prompt_ids + answer_ids
            labels = [IGNORE] * len(prompt_ids) + answer_ids
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORE for label in labels[1:]):
            if labels and labels[0] != IGNORE:
                raise WagleError(
                    "its only label is the first token, which nothing predicts: give a longer "
                    "text, or a prompt before the answer"
                )
            why = f"no answer token is left within max_length={self.max_length} tokens; increase it"
            raise WagleError(why)
        return {"input_ids": ids, "labels": labels}

    def encode_prompt(self, example: Example) -> list[int]:
        """Token ids to generate from; for a row of tokens, those before the first label; the
        first half of a text, or of tokens that all have a label."""
        if example.kind == "tokens":
            ids, labels = list(example.input_ids), example.labels
            first = next((i for i, label in enumerate(labels) if label != IGNORE), len(ids))
            return ids[: first or max(1, len(ids) // 2)]
        if example.kind == "text":
            ids = self._ids(example.answer)
            return ids[: max(1, len(ids) // 2)]
        prompt, _ = self._texts(example, "" if example.kind == "prompt" else None)
        if not (self.uses_chat_template or example.continuation or example.prefill):
            prompt += self.generation_prefix
        return self._ids(prompt, self._adds_special_tokens(example))

    def _adds_special_tokens(self, example: Example) -> bool:
        """Whether the tokenizer adds its special tokens: a chat template writes its own."""
        return not self.uses_chat_template or example.continuation

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def _texts(self, example: Example, answer: Optional[str]) -> tuple[str, str]:
        """Text up to the answer and text of the answer."""
        if example.kind == "prompt" and answer is None:
            null = "response" in example.row
            why = "'response' is null" if null else "there is a prompt and no answer"
            raise WagleError(f"{why}: such a row is for generation only, not for training")
        question = example.context + example.question
        if example.continuation:
            return question, example.answer if answer is None else following(question, answer)
        answer, prefill = example.answer if answer is None else answer, example.prefill
        if prefill:
            answer = prefill + following(prefill, answer)
        if not self.uses_chat_template:
            prompt = example.context + self.prompt_format.replace("{question}", example.question)
            text = self.answer_format.replace("{answer}", answer)
            prefill = prefill and self.answer_format.partition("{answer}")[0] + prefill
            return prompt + prefill, text.removeprefix(prefill)
        messages = example.messages
        if messages is None:
            messages = [{"role": "user", "content": question}]
        prompt = self._chat(messages, add_generation_prompt=True)
        full = self._chat(
            [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False
        )
        start = full.find(prefill, len(prompt))  # after what the template puts before an answer
        if not full.startswith(prompt) or start < 0:
            why = "the chat template changes the prompt when an answer follows; give prompt_format"
            raise WagleError(why)
        end = start + len(prefill)
        return full[:end], full[end:]

    def _chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """Render messages with the chat template."""
        from jinja2 import TemplateError  # which transformers needs only for chat templates

        if self.system_prompt is not None and [m["role"] for m in messages[:1]] != ["system"]:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        try:
            with bounded(RENDERING_SECONDS, RENDERING_BYTES):
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self._chat_template,
                    **self.variables,
                )
            text.encode()
            return text
        except (TimeoutError, MemoryError, RecursionError, OverflowError) as error:
            raise WagleError(
                f"the tokenizer's chat template does not end with a text ({first_line(error)}): "
                "give prompt_format, or another tokenizer"
            ) from None
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise WagleError(
                f"the chat template refuses messages with the roles {roles} ({error}); "
                "change the row, or give prompt_format for rows with questions"
            ) from None

    def _with_eos(self, ids: list[int]) -> list[int]:
        """``ids`` up to the first end-of-sequence token, which is appended if missing."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return ids
        return [*ids[: ids.index(eos)], eos] if eos in ids else [*ids, eos]


def at_fixed_date(chat_template: str, now: datetime.datetime) -> str:
    """A chat template whose clock, ``strftime_now``, shows ``now``.

    transformers passes no function to a template, but a macro overrides its global function.
    """
    codes = {f"%{letter}" for letter in "aAwdbBmyYHIpMSfzZjUWcxXGuV"}
    codes |= set(re.findall(r"%[-_0^#]?[A-Za-z]", chat_template))
    shown = "".join(
        f" | replace({json.dumps(code)}, {json.dumps(now.strftime(code))})"
        for code in sorted(codes)
    )
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{shown} }}}}{{% endmacro %}}"
    return f"{macro}\n{chat_template}"  # a line break after a block is not part of the text


def check_ids(ids: Sequence[int], known: int) -> None:
    """Refuse tokens for which a model that knows ``known`` tokens has no embedding."""
    if wrong := [token for token in ids if token >= known]:
        raise WagleError(
            f"token id {wrong[0]} is out of range: the model knows 0 to {known - 1}; take the "
            "model's own tokenizer"
        )


def differing_prompts(others: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """How two :attr:`Template.prompts` differ; empty if they do not, or if one is not known.

    >>> differing_prompts({"prompt": "Q: {question}"}, {"prompt": "{question}"})
    "prompt 'Q: {question}' there, '{question}' here"
    """
    if not others or not here:
        return ""
    names = [name for name in dict.fromkeys((*others, *here)) if others.get(name) != here.get(name)]
    options = [name for name in names if name not in ("prompt", "answer")]
    names = options or names  # the options say why those differ
    pairs = ((name, others.get(name), here.get(name)) for name in names)
    return "; ".join(f"{name} {other!r} there, {ours!r} here" for name, other, ours in pairs)


def following(prompt: str, answer: str) -> str:
    """An answer as it follows a plain text: with a space between words.

    >>> following("Down the", "rabbit-hole"), following("Down the ", "rabbit-hole")
    (' rabbit-hole', 'rabbit-hole')
    """
    return answer if not answer or prompt[-1:].isspace() or answer[0].isspace() else f" {answer}"
