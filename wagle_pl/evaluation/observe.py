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
``recalls``       ``paraphrased_rougeL_recall`` and, a list, ``perturbed_rougeL_recall``: of such
                  answers by the generation, where the row has some (OpenUnlearning)
``paraphrased``   ``alternatives`` and ``generation`` again, asked with the row's
                  ``paraphrased_question``
``gradient``      ``gradient_norm``: needs a backward pass per row
================= ==============================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Optional

import torch
from torch import Tensor

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
GENERATED = frozenset({"generation", "reference", "recalls", "paraphrased"})
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
    kept = frozenset(needs) & POSSIBLE.get(row.kind, NEEDS - _OF_A_CHOICE)
    # with a label on the first token there is no prompt to continue
    unprompted = row.kind == "tokens" and row.labels[0] != IGNORE
    return kept - {"generation"} if unprompted else kept


# -- from a row to the token sequences that are scored for it ------------------------------------


@dataclass
class Scored(Candidate):
    """A token sequence of a row, and its scores once it has been scored."""

    kind: str  # answer, lower, paraphrased_answer, perturbed_answer, letter or choice
    tokens: int  # how many of its last scored tokens are the answer's
    closed: bool = False  # the last of them is the end-of-sequence token that closes an answer
    scores: TokenScores = field(init=False)

    @property
    def nll(self) -> Optional[float]:
        """Mean negative log-likelihood per token of the answer; None if it has no token."""
        return -self.of_answer.double().mean().item() if self.tokens else None

    @property
    def of_answer(self) -> Tensor:
        """(tokens,) log-probabilities of the answer."""
        return self.scores.logprobs[len(self.scores.logprobs) - self.tokens :]


def answers(template: Template, row: Example, needs: Collection[str]) -> list[Scored]:
    """The row's own answer; also in lower case, paraphrased and perturbed, as far as needed."""
    sequences = [_answer(template, "answer", row, None, whole_text="text" in needs)]
    if "lower" in needs:
        sequences.append(_answer(template, "lower", replace(row, answer=row.answer.lower())))
    if "alternatives" in needs:
        texts = [("perturbed_answer", text) for text in row.perturbed_answers]
        if row.paraphrased_answer:
            texts.insert(0, ("paraphrased_answer", row.paraphrased_answer))
        sequences += [_answer(template, kind, row, text) for kind, text in texts]
    return sequences


def _answer(
    template: Template,
    kind: str,
    row: Example,
    answer: Optional[str] = None,
    whole_text: bool = False,
) -> Scored:
    encoded = template.encode(row, answer)
    ids, labels = encoded["input_ids"], list(encoded["labels"])
    closed = ids[-1] == template.tokenizer.eos_token_id
    if closed and row.kind == "text":  # a corpus is scored unchanged: nothing closes it
        labels[-1] = IGNORE
        closed = False
    tokens = sum(label != IGNORE for label in labels[1:])
    return Scored(ids, list(ids) if whole_text else labels, kind, tokens, closed)


def letters(template: Template, row: Example, header: str = "") -> list[Scored]:
    """The letters of a multiple choice, scored as by lm-evaluation-harness for MMLU and WMDP.

    The prompt is ``<question>\\nA. <choice>\\n…\\nAnswer:`` without a chat template, the harness's
    default, after the row's ``context`` or, without one, the ``header`` (see
    :attr:`wagle_pl.evaluation.suites.Suite.headers`); a prompt longer than the template's
    ``max_length`` loses its beginning. A row with a ``prefill``, which takes the place of
    ``Answer:``, is asked in the template, and a letter is one token (as in RWKU's code).
    """
    names = LETTERS[: len(row.choices)]
    options = "".join(f"\n{name}. {text}" for name, text in zip(names, row.choices, strict=False))
    if row.prefill:
        asked = replace(row, kind="prompt", question=row.question + options)
        ids = template.encode_prompt(asked)[1 - template.max_length :]
        encoded = [template.tokenizer(f" {x}", add_special_tokens=False) for x in names]
        tokens = [letter["input_ids"][-1] for letter in encoded]
        return [Scored([*ids, i], [*[IGNORE] * len(ids), i], "letter", 1) for i in tokens]
    before = row.context
    if not before and (row.subject or "{subject}" not in header):
        before = header.replace("{subject}", row.subject.replace("_", " "))
    prompt = f"{before}{row.question.strip()}{options}\nAnswer:"
    start = len(template.tokenizer(prompt)["input_ids"])
    sequences = []
    for name in names:
        ids = template.tokenizer(f"{prompt} {name}")["input_ids"]
        labels = ([IGNORE] * start + ids[start:])[-template.max_length :]
        count = sum(label != IGNORE for label in labels[1:])
        sequences.append(Scored(ids[-template.max_length :], labels, "letter", count))
    return sequences


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
        encoded = [self._encode(*row, header) for row in zip(rows, wanted, names, strict=True)]
        self._score([sequence for sequences, _ in encoded for sequence in sequences], needs)
        records = [
            {"question": row.question, "answer": row.answer, "generation": None}
            | ({"answer_aliases": list(row.answer_aliases)} if row.answer_aliases else {})
            | self._columns(row, want, sequences)
            for row, want, (sequences, _) in zip(rows, wanted, encoded, strict=True)
        ]
        if "paraphrased" in needs:  # as WAGLE's code does on TOFU
            asked = [
                i
                for i, row in enumerate(rows)
                if "paraphrased" in wanted[i] and row.paraphrased_question
            ]
            others = [rows[i].asking(rows[i].paraphrased_question) for i in asked]
            needed, named = {"alternatives", "generation"}, [names[i] for i in asked]
            more = self.observe(others, needed, length, names=named, stops=stops)
            for i, other in zip(asked, more, strict=True):
                kept = {name: value for name, value in other.items() if name not in _OF_THE_ROW}
                records[i] |= {f"paraphrased_question_{name}": v for name, v in kept.items()}
        if "generation" in needs:
            prompted = [i for i, want in enumerate(wanted) if "generation" in want]
            texts = self._generate([encoded[i][1] for i in prompted], length, stops)
            for i, text in zip(prompted, texts, strict=True):
                records[i] |= of_generation(text, rows[i].answer)
                if "recalls" in wanted[i] and rows[i].perturbed_answers:
                    records[i] |= recalls(text, rows[i])
        for want, record in zip(wanted, records, strict=True):
            if "reference" in want:
                text = record["answer"].lstrip()
                record["reference"] = first_tokens(self.tokenizer, text, length)
        if differentiated := [i for i, want in enumerate(wanted) if "gradient" in want]:
            norms = torch.stack([self._gradient_norm(rows[i]) for i in differentiated]).tolist()
            for i, norm in zip(differentiated, norms, strict=True):
                records[i]["gradient_norm"] = norm
        return records

    def _encode(
        self, row: Example, want: frozenset[str], name: str, header: str
    ) -> tuple[list[Scored], list[int]]:
        """All that is scored of a row, and the prompt to generate from."""
        sequences: list[Scored] = []
        try:
            prompt = self.template.encode_prompt(row) if "generation" in want else []
            if want & _OF_AN_ANSWER:
                sequences += answers(self.template, row, want)
            if "choices" in want:
                sequences += letters(self.template, row, header)
            if "choice_texts" in want:
                sequences += [_answer(self.template, "choice", row, text) for text in row.choices]
            for ids in (prompt, *(sequence.ids for sequence in sequences)):
                check_ids(ids, self.vocabulary)
        except WagleError as error:
            raise WagleError(f"{name}: {error}") from None
        return sequences, prompt

    def _score(self, sequences: Sequence[Scored], needs: Collection[str]) -> None:
        """Fill in the scores of sequences."""
        wanted = {"vocabulary": "vocabulary" in needs, "greedy": "tokens" in needs}
        pad_id = self.tokenizer.pad_token_id or 0
        scores = score(self.passes, sequences, pad_id, self.max_rows, self.share, **wanted)
        self.passes.level()
        for sequence, values in zip(sequences, scores, strict=True):
            sequence.scores = values

    def _columns(self, row: Example, want: frozenset[str], sequences: Sequence[Scored]) -> Record:
        """What the scores of a row's sequences say, as columns."""
        kinds: dict[str, list[Scored]] = {}
        for sequence in sequences:
            kinds.setdefault(sequence.kind, []).append(sequence)
        record: Record = {}
        if "answer" in kinds:
            (answer,) = kinds["answer"]
            scores, count = answer.scores, len(answer.scores.logprobs)
            record |= {"nll": answer.nll, "tokens": answer.tokens}
            end = count - answer.closed
            span = slice(count - answer.tokens, end)
            if "tokens" in want:
                record["logprobs"] = scores.logprobs[span].tolist()
                record["greedy"] = scores.greedy[span].tolist()
            if "vocabulary" in want:
                record["vocabulary_mean"] = scores.mean[span].tolist()
                record["vocabulary_std"] = scores.std[span].tolist()
            if "text" in want:
                record["text_logprobs"] = scores.logprobs[:end].tolist()
            for lower in kinds.get("lower", []):
                record["lower_nll"] = lower.nll
            record["cut"] = len(answer.ids) >= self.template.max_length
        if "alternatives" in want:
            # without a paraphrase, the row's own answer is used
            (paraphrase,) = kinds.get("paraphrased_answer", kinds["answer"])
            perturbed = kinds.get("perturbed_answer", [])
            record["paraphrased_nll"] = paraphrase.nll
            record["paraphrased_tokens"] = paraphrase.tokens
            record["perturbed_nll"] = [answer.nll for answer in perturbed]
            record["perturbed_tokens"] = [answer.tokens for answer in perturbed]
        if {"letter", "choice"} & kinds.keys():
            record["label"] = row.label
        if letters := kinds.get("letter"):
            sums = [letter.scores.logprobs.double().sum().item() for letter in letters]
            record["choice_logprobs"] = sums
        if choices := kinds.get("choice"):
            if row.answer_aliases:
                right = {row.answer, *row.answer_aliases}
                record["right_choices"] = [i for i, text in enumerate(row.choices) if text in right]
            record["choice_nll"] = [choice.nll for choice in choices]
            record["choice_text_logprobs"] = [
                choice.of_answer[: choice.tokens - choice.closed].double().sum().item()
                for choice in choices
            ]
        return record

    def _gradient_norm(self, row: Example) -> Tensor:
        answer = _answer(self.template, "answer", row)
        labels = [*answer.labels[:-1], IGNORE] if answer.closed else answer.labels
        return gradient_norm(self.passes.lm, answer.ids, labels)

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


def recalls(text: str, row: Example) -> Record:
    """ROUGE-L recall of a row's paraphrased and of its perturbed answers by a generation."""
    answers = [row.paraphrased_answer or row.answer, *row.perturbed_answers]
    values = F.rouge([text] * len(answers), answers)["rougeL_recall"].tolist()
    return {"paraphrased_rougeL_recall": values[0], "perturbed_rougeL_recall": values[1:]}


def merge(records: Sequence[Record]) -> list[Record]:
    """The records of all ranks, each row once, in order, with the same columns. Collective."""
    by_row = {record["row"]: record for record in distributed.all_gather(records)}
    columns = dict.fromkeys(name for record in by_row.values() for name in record)
    return [{name: by_row[row].get(name) for name in columns} for row in sorted(by_row)]


def observe_set(
    observer: Observer,
    rows: Sequence[Example],
    needs: Collection[str],
    **asked: Any,
) -> list[Record]:
    """Records of all rows of a set with their numbers; the ranks share them. Collective.

    ``asked`` are other arguments of :meth:`Observer.observe`.
    """
    lengths = [len(row.question) + len(row.answer) for row in rows]
    batches = token_batches(lengths, observer.max_rows)
    records: list[Record] = []
    # ranks may see some rows twice, so that all have the same number of batches
    for batch in deal_batches(batches, distributed.world_size(), distributed.rank()):
        observed = observer.observe([rows[i] for i in batch], needs, **asked)
        records += [{"row": i, **record} for i, record in zip(batch, observed, strict=True)]
    return merge(records)
