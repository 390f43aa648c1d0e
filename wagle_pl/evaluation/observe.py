"""Observe test rows: run the model on each once, and note all that the measures need in one record
per row.

What can be *needed* of a row; measures are computed from the records afterwards, see
:mod:`wagle_pl.evaluation.measures`:

================= ==============================================================================
``answer``        ``nll`` (mean over the answer's tokens, the closing end-of-sequence token
                  included) and ``tokens``
``tokens``        of the answer (without that token) or text: ``logprobs`` and ``greedy``, one
                  per token
``vocabulary``    ``vocabulary_mean`` and ``vocabulary_std`` of the log-probabilities at each of
                  those tokens
``text``          ``text_logprobs``: of prompt and answer together
``lower``         ``lower_nll``: ``nll`` of the answer or text in lower case
``alternatives``  ``paraphrased_nll`` and ``perturbed_nll``, where the row has such answers
``choices``       ``choice_logprobs``: of the letters of a multiple choice
``choice_texts``  of each choice as the answer: ``choice_nll``, mean over its tokens, and
                  ``choice_text_logprobs``, their sum without an end-of-sequence token; and
                  ``right_choices``, indices, of rows with more than one right answer
``generation``    ``generation``: what the model says, greedily
``reference``     ``reference``: as much of the answer as a generation can match (MUSE)
``paraphrased``   ``alternatives`` and ``generation`` again, asked with the row's
                  ``paraphrased_question``
``gradient``      ``gradient_norm``: needs a backward pass per row
================= ==============================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any, NamedTuple, Optional

import torch

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import deal_batches, token_batches
from wagle_pl.data.example import IGNORE, Example
from wagle_pl.data.template import Template, check_ids
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.scoring import Candidate, Passes, TokenScores, score
from wagle_pl.lm.inference import first_tokens, generate, gradient_norm
from wagle_pl.lm.models import vocabulary_size

_OF_AN_ANSWER = frozenset({"answer", "tokens", "vocabulary", "text", "lower", "alternatives"})
_OF_A_CHOICE = frozenset({"choices", "choice_texts"})
#: Needs that take generated answers.
GENERATED = frozenset({"generation", "reference", "paraphrased"})
NEEDS = _OF_AN_ANSWER | _OF_A_CHOICE | GENERATED | {"gradient"}
#: Needs that a kind of row can answer; any other kind can answer all but choices.
POSSIBLE: Mapping[str, frozenset[str]] = {
    "text": frozenset({"answer", "tokens", "vocabulary", "lower", "gradient"}),
    "prompt": frozenset({"generation"}),
    "choices": _OF_A_CHOICE,
    "tokens": frozenset({"answer", "tokens", "vocabulary", "generation", "gradient"}),
}
_OF_THE_ROW = ("question", "answer", "nll", "tokens", "cut")  # columns of the row itself
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Record = dict[str, Any]


def possible(row: Example, needs: Collection[str]) -> frozenset[str]:
    """Those of ``needs`` that the row's kind can answer."""
    # with a label on the first token there is no prompt to continue
    unprompted = row.kind == "tokens" and row.labels[0] != IGNORE
    found = frozenset(needs) & POSSIBLE.get(row.kind, NEEDS - _OF_A_CHOICE)
    return found - {"generation"} if unprompted else found


# -- from a row to the token sequences that are scored for it ------------------------------------


class Scored(NamedTuple):
    """A token sequence of a row, to be scored."""

    kind: str  # answer, paraphrased_answer, perturbed_answer, letter or choice
    candidate: Candidate
    tokens: int  # how many of its last scored tokens are the answer's
    closed: bool = False  # the last of them is the end-of-sequence token that closes an answer

    def nll(self, found: TokenScores) -> Optional[float]:
        """Mean negative log-likelihood per token of the answer; None if it has no token."""
        answer = found.logprobs[len(found.logprobs) - self.tokens :]
        return -answer.double().mean().item() if self.tokens else None


#: kind -> (sequence, its scores), for all sequences of a row.
Found = dict[str, list[tuple[Scored, TokenScores]]]


def answers(template: Template, row: Example, needs: Collection[str]) -> list[Scored]:
    """The row's own answer; also in lower case, paraphrased and perturbed, as far as needed."""
    found = [_answer(template, "answer", row, None, needs)]
    if "lower" in needs:
        found.append(_answer(template, "lower", replace(row, answer=row.answer.lower()), None))
    if "alternatives" in needs:
        texts = [("perturbed_answer", text) for text in row.perturbed_answers]
        if row.paraphrased_answer:
            texts.insert(0, ("paraphrased_answer", row.paraphrased_answer))
        found += [_answer(template, kind, row, text) for kind, text in texts]
    return found


def _answer(
    template: Template, kind: str, row: Example, answer: Optional[str], needs: Collection[str] = ()
) -> Scored:
    encoded = template.encode(row, answer)
    ids, labels = encoded["input_ids"], list(encoded["labels"])
    closed = ids[-1] == template.tokenizer.eos_token_id
    if closed and row.kind == "text":  # a corpus is scored unchanged: nothing closes it
        labels[-1] = IGNORE
        closed = False
    tokens = sum(label != IGNORE for label in labels[1:])
    if "text" in needs:
        labels = list(ids)
    candidate = Candidate(ids, labels, greedy="tokens" in needs, vocabulary="vocabulary" in needs)
    return Scored(kind, candidate, tokens, closed)


def letters(template: Template, row: Example, header: str = "") -> list[Scored]:
    """The letters of a multiple choice, scored as by lm-evaluation-harness for MMLU and WMDP.

    The prompt is ``<question>\\nA. <choice>\\n…\\nAnswer:`` without a chat template, the harness's
    default, after the row's ``context`` or, without one, the ``header`` (see
    :attr:`wagle_pl.evaluation.suites.Suite.headers`); a prompt longer than the template's
    ``max_length`` loses its beginning. A row with a ``prefill``, which takes the place of
    ``Answer:``, is asked in the template, and a letter is one token (as in RWKU's code).
    """
    options = "".join(
        f"\n{letter}. {text}" for letter, text in zip(LETTERS, row.choices, strict=False)
    )
    if row.prefill:
        asked = replace(row, kind="prompt", question=row.question + options)
        ids = template.encode_prompt(asked)[1 - template.max_length :]
        tokens = [
            template.tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1]
            for letter in LETTERS[: len(row.choices)]
        ]
        labels = [IGNORE] * len(ids)
        return [Scored("letter", Candidate([*ids, i], [*labels, i]), 1) for i in tokens]
    before = row.context
    if not before and (row.subject or "{subject}" not in header):
        before = header.replace("{subject}", row.subject.replace("_", " "))
    prompt = f"{before}{row.question.strip()}{options}\nAnswer:"
    start = len(template.tokenizer(prompt)["input_ids"])
    found = []
    for letter in LETTERS[: len(row.choices)]:
        ids = template.tokenizer(f"{prompt} {letter}")["input_ids"]
        labels = ([IGNORE] * start + ids[start:])[-template.max_length :]
        tokens = sum(label != IGNORE for label in labels[1:])
        found.append(Scored("letter", Candidate(ids[-template.max_length :], labels), tokens))
    return found


# -- running the model ---------------------------------------------------------------------------


@dataclass
class Observer:
    """Runs a Hugging Face causal language model, in evaluation mode, on rows."""

    lm: InitVar[Any]
    template: Template  # encodes rows, and has the tokenizer
    max_rows: int = 16  # most sequences in one forward pass
    max_new_tokens: int = 200  # longest generation
    synced_gpus: InitVar[bool] = False  # each forward pass is collective (ZeRO-3)
    share: bool = True  # compute what sequences have in common only once

    def __post_init__(self, lm: Any, synced_gpus: bool) -> None:
        self.passes = Passes(lm, synced_gpus)
        self.vocabulary = vocabulary_size(lm)
        self.tokenizer = self.template.tokenizer

    @torch.no_grad()
    def observe(
        self,
        rows: Sequence[Example],
        needs: Collection[str],
        max_new_tokens: Optional[int] = None,
        header: str = "",
        names: Sequence[str] = (),
        stops: Sequence[str] = (),
    ) -> list[Record]:
        """One record per row, in their order. Collective under ZeRO-3.

        Args:
            rows: test rows of any kind.
            needs: what to observe, if a row's kind can answer it; see the top of this module.
            max_new_tokens: longest generation of these rows, if it differs from the observer's.
            header: text before each multiple choice without a ``context``.
            names: what to call each row in a message.
            stops: texts, at each of which a generation is cut.
        """
        length = max_new_tokens or self.max_new_tokens
        wanted = [possible(row, needs) for row in rows]
        names = names or [f"test row {(row.question or row.answer)[:40]!r}" for row in rows]
        made = [self._tokens(*each, header) for each in zip(rows, wanted, names, strict=True)]
        found = self._scores([sequences for sequences, _ in made])
        records = [
            {"question": row.question, "answer": row.answer, "generation": None}
            | ({"answer_aliases": list(row.answer_aliases)} if row.answer_aliases else {})
            | self._columns(row, want, scores)
            for row, want, scores in zip(rows, wanted, found, strict=True)
        ]
        if "paraphrased" in needs:  # as WAGLE's code does on TOFU
            asked = [
                i
                for i, row in enumerate(rows)
                if "paraphrased" in wanted[i] and row.paraphrased_question
            ]
            others = self.observe(
                [rows[i].asking(rows[i].paraphrased_question) for i in asked],
                {"alternatives", "generation"},
                length,
                names=[names[i] for i in asked],
                stops=stops,
            )
            for i, other in zip(asked, others, strict=True):
                records[i] |= {
                    f"paraphrased_question_{name}": value
                    for name, value in other.items()
                    if name not in _OF_THE_ROW
                }
        if "generation" in needs:
            speaking = [i for i, want in enumerate(wanted) if "generation" in want]
            texts = self._generate([made[i][1] for i in speaking], length, stops)
            for i, text in zip(speaking, texts, strict=True):
                records[i] |= of_generation(text, rows[i].answer)
        for row, want, record in zip(rows, wanted, records, strict=True):
            if "reference" in want:
                text = record["answer"].lstrip()
                record["reference"] = first_tokens(self.tokenizer, text, length)
            if "gradient" in want:
                own = _answer(self.template, "answer", row, None)
                ids, labels = own.candidate.ids, list(own.candidate.labels)
                labels = [*labels[:-1], IGNORE] if own.closed else labels
                record["gradient_norm"] = gradient_norm(self.passes.lm, ids, labels)
        return records

    def _tokens(
        self, row: Example, want: frozenset[str], name: str, header: str
    ) -> tuple[list[Scored], list[int]]:
        """All that is scored of a row, and the prompt to generate from."""
        found: list[Scored] = []
        try:
            prompt = self.template.encode_prompt(row) if "generation" in want else []
            if want & _OF_AN_ANSWER:
                found += answers(self.template, row, want)
            if "choices" in want:
                found += letters(self.template, row, header)
            if "choice_texts" in want:
                found += [_answer(self.template, "choice", row, text) for text in row.choices]
            for ids in (prompt, *(each.candidate.ids for each in found)):
                check_ids(ids, self.vocabulary)
        except WagleError as error:
            raise WagleError(f"{name}: {error}") from None
        return found, prompt

    def _scores(self, rows: Sequence[Sequence[Scored]]) -> list[Found]:
        """The scores of the sequences of each row."""
        flat = [each.candidate for row in rows for each in row]
        pad_id = self.tokenizer.pad_token_id or 0
        scores = iter(score(self.passes, flat, pad_id, self.max_rows, self.share))
        self.passes.level()
        found: list[Found] = []
        for row in rows:
            found.append({})
            for each in row:
                found[-1].setdefault(each.kind, []).append((each, next(scores)))
        return found

    def _columns(self, row: Example, want: frozenset[str], found: Found) -> Record:
        record: Record = {}
        if "answer" in found:
            ((own, values),) = found["answer"]
            record |= {"nll": own.nll(values), "tokens": own.tokens}
            end = len(values.logprobs) - own.closed
            here = slice(len(values.logprobs) - own.tokens, end)
            if "tokens" in want:
                record["logprobs"] = values.logprobs[here].tolist()
                record["greedy"] = values.greedy[here].tolist()
            if "vocabulary" in want:
                record["vocabulary_mean"] = values.mean[here].tolist()
                record["vocabulary_std"] = values.std[here].tolist()
            if "text" in want:
                record["text_logprobs"] = values.logprobs[:end].tolist()
            for lower, values in found.get("lower", []):
                record["lower_nll"] = lower.nll(values)
            record["cut"] = len(own.candidate.ids) >= self.template.max_length
        if "alternatives" in want:
            # without a paraphrase, the row's own answer is used
            ((paraphrase, values),) = found.get("paraphrased_answer", found["answer"])
            perturbed = found.get("perturbed_answer", [])
            record["paraphrased_nll"] = paraphrase.nll(values)
            record["paraphrased_tokens"] = paraphrase.tokens
            record["perturbed_nll"] = [each.nll(values) for each, values in perturbed]
            record["perturbed_tokens"] = [each.tokens for each, _ in perturbed]
        if "letter" in found or "choice" in found:
            record["label"] = row.label
        if "letter" in found:
            sums = [values.logprobs.double().sum().item() for _, values in found["letter"]]
            record["choice_logprobs"] = sums
        if "choice" in found:
            if row.answer_aliases:
                right = {row.answer, *row.answer_aliases}
                record["right_choices"] = [i for i, text in enumerate(row.choices) if text in right]
            record["choice_nll"] = [each.nll(values) for each, values in found["choice"]]
            record["choice_text_logprobs"] = [
                values.logprobs[-each.tokens :][: each.tokens - each.closed].double().sum().item()
                for each, values in found["choice"]
            ]
        return record

    def _generate(
        self, prompts: Sequence[Sequence[int]], length: int, stops: Sequence[str]
    ) -> list[str]:
        synced = self.passes.synced_gpus
        if not (distributed.all_reduce_max(len(prompts)) if synced else prompts):
            return []
        # a rank without rows takes part in the collective passes
        asked = prompts or [[self.tokenizer.eos_token_id or 0]]
        texts = generate(self.passes.lm, self.tokenizer, asked, length, synced, stops)
        return texts[: len(prompts)]


def of_generation(text: str, answer: str) -> Record:
    """Columns of a generation: its text, and its ROUGE recall where there is an answer."""
    record: Record = {"generation": text}
    if answer:
        values = F.rouge([text], [answer])
        record |= {name: values[name].item() for name in ("rouge1_recall", "rougeL_recall")}
    return record


def merge(records: Sequence[Record]) -> list[Record]:
    """The records of all ranks, each row once, in order, with the same columns. Collective."""
    by_row = {record["row"]: record for record in distributed.all_gather(records)}
    columns = dict.fromkeys(name for record in by_row.values() for name in record)
    return [{name: by_row[row].get(name) for name in columns} for row in sorted(by_row)]


def observe_set(
    observer: Observer,
    rows: Sequence[Example],
    needs: Collection[str],
    max_new_tokens: Optional[int] = None,
    header: str = "",
    stops: Sequence[str] = (),
) -> list[Record]:
    """Records of all rows of a set with their numbers; the ranks share them. Collective."""
    lengths = [len(row.question) + len(row.answer) for row in rows]
    batches = token_batches(lengths, observer.max_rows)
    records: list[Record] = []
    # ranks may see some rows twice, so that all have the same number of batches
    for batch in deal_batches(batches, distributed.world_size(), distributed.rank()):
        part = [rows[i] for i in batch]
        found = observer.observe(part, needs, max_new_tokens, header, stops=stops)
        records += [{"row": i, **record} for i, record in zip(batch, found, strict=True)]
    return merge(records)
