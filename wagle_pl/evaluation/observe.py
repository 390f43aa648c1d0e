"""Observe test rows: run the model on each once, and note all that the measures need in one record a row.

What can be *needed* of a row; measures are computed from the records afterwards, by :mod:`wagle_pl.evaluation.suites`:

==================== ================================================================================================
``answer``           ``nll`` (mean over the answer's tokens, the closing end-of-sequence token included) and ``tokens``
``tokens``           of the answer (without that token) or text: ``logprobs`` and ``greedy``, one a token
``vocabulary``       ``vocabulary_mean`` and ``vocabulary_std`` of the log-probabilities at each of those tokens
``text``             ``text_logprobs``: of prompt and answer together
``alternatives``     ``paraphrased_nll`` and ``perturbed_nll``, where the row has such answers
``choices``          ``choice_logprobs``: of the letters of a multiple choice
``choice_texts``     ``choice_nll``: mean over the tokens of each choice as the answer
``generation``       ``generation``: what the model says, greedily
``reference``        ``reference``: as much of the answer as a generation can match (MUSE)
``paraphrased``      ``alternatives`` and ``generation`` again, asked with the row's ``paraphrased_question``
``gradient``         ``gradient_norm``: needs a backward pass a row
==================== ================================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Optional

import torch

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import deal_batches, token_batches
from wagle_pl.data.example import Example
from wagle_pl.data.template import IGNORE, Template, check_ids
from wagle_pl.evaluation import candidates as C
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.scoring import Passes, Score, score
from wagle_pl.lm.generation import first_tokens, generate, gradient_norm
from wagle_pl.lm.weights import vocabulary_size

NEEDS = frozenset(
    {
        *("answer", "tokens", "vocabulary", "text", "alternatives", "choices", "choice_texts"),
        *("generation", "reference", "paraphrased", "gradient"),
    }
)
#: Of these, what needs generated answers.
GENERATED = frozenset({"generation", "reference", "paraphrased"})
Record = dict[str, Any]
Found = dict[str, list[tuple[C.Named, Score]]]

#: Needs that a kind of row can answer; a row that is ``answered`` can all but choices.
POSSIBLE: Mapping[str, frozenset[str]] = {
    "text": frozenset({"answer", "tokens", "vocabulary", "gradient"}),
    "prompt": frozenset({"generation"}),
    "choices": frozenset({"choices", "choice_texts"}),
    "tokens": frozenset({"answer", "tokens", "vocabulary", "generation", "gradient"}),
}


def possible(row: Example, needs: Collection[str]) -> frozenset[str]:
    """Those of ``needs`` that the row's kind can answer; tokens with a label on the first have no prompt to go on."""
    unprompted = row.kind == "tokens" and row.labels[0] != IGNORE
    found = frozenset(needs) & POSSIBLE.get(row.kind, NEEDS - {"choices", "choice_texts"})
    return found - {"generation"} if unprompted else found


class Observer:
    """Runs a model on rows.

    Args:
        lm: a Hugging Face causal language model, in evaluation mode.
        template: makes tokens of rows, and brings the tokenizer.
        max_rows: most sequences in one forward pass.
        max_new_tokens: longest generation.
        meets: whether other ranks run the model at the same time, and each pass is a meeting (ZeRO-3).
        share: compute what a row's answers have in common once.
    """

    def __init__(
        self,
        lm: Any,
        template: Template,
        max_rows: int = 16,
        max_new_tokens: int = 200,
        meets: bool = False,
        share: bool = True,
    ) -> None:
        self.passes = Passes(lm, meets)
        self.template = template
        self.vocabulary = vocabulary_size(lm)
        self.tokenizer = template.tokenizer
        self.max_rows = max_rows
        self.max_new_tokens = max_new_tokens
        self.share = share

    @torch.no_grad()
    def observe(
        self,
        rows: Sequence[Example],
        needs: Collection[str],
        max_new_tokens: Optional[int] = None,
        header: str = "",
        names: Sequence[str] = (),
    ) -> list[Record]:
        """One record a row, in their order. Under ZeRO-3 a meeting of all ranks.

        Args:
            rows: test rows of any kind.
            needs: what to observe, see the head of this module; what a row's kind cannot answer is left out.
            max_new_tokens: longest generation of these rows, where it differs from the observer's.
            header: text before each multiple choice without a ``context``.
            names: what to call each row in messages.

        Raises:
            WagleError: naming the row, if it cannot be made into tokens.
        """
        length = max_new_tokens or self.max_new_tokens
        wanted = [possible(row, needs) for row in rows]
        named = [
            self._tokens(*each, header)
            for each in zip(rows, wanted, names or _beginnings(rows), strict=True)
        ]
        records: list[Record] = [
            {"question": row.question, "answer": row.answer, "generation": None} for row in rows
        ]
        found = self._scores([candidates for candidates, _ in named])
        for row, want, record, scores in zip(rows, wanted, records, found, strict=True):
            record |= self._scored(row, want, scores)
        if "paraphrased" in needs:
            self._paraphrased(rows, wanted, records, length)
        asked = [i for i, want in enumerate(wanted) if "generation" in want]
        if "generation" in needs:
            self._generate(
                [rows[i] for i in asked],
                [named[i][1] for i in asked],
                [records[i] for i in asked],
                length,
            )
        for row, want, record in zip(rows, wanted, records, strict=True):
            if "reference" in want:
                record["reference"] = first_tokens(
                    self.tokenizer, record["answer"].lstrip(), length
                )
            if "gradient" in want:
                record["gradient_norm"] = self._gradient_norm(row)
        return records

    def _tokens(
        self, row: Example, want: frozenset[str], name: str, header: str
    ) -> tuple[list[C.Named], list[int]]:
        """All that is scored of a row, and the prompt to generate from."""
        try:
            prompt = self.template.encode_prompt(row) if "generation" in want else []
            candidates = self._candidates(row, want, header)
            for ids in (prompt, *(named.candidate.ids for named in candidates)):
                check_ids(ids, self.vocabulary)
            return candidates, prompt
        except WagleError as error:
            raise WagleError(f"{name}: {error}") from None

    def _candidates(self, row: Example, want: frozenset[str], header: str) -> list[C.Named]:
        """All that is scored of a row."""
        found = []
        if want & {"answer", "tokens", "vocabulary", "text", "alternatives"}:
            found += C.answers(self.template, row, want)
        if "choices" in want:
            found += C.letters(self.template, row, header)
        if "choice_texts" in want:
            found += C.choice_texts(self.template, row)
        return found

    def _scores(self, named: Sequence[Sequence[C.Named]]) -> list[Found]:
        """For each row, given its candidates: kind -> (candidate, what was found) of each."""
        flat = [each.candidate for row in named for each in row]
        scores = iter(
            score(self.passes, flat, self.tokenizer.pad_token_id or 0, self.max_rows, self.share)
        )
        self.passes.level()
        found: list[Found] = []
        for row in named:
            found.append({})
            for each in row:
                found[-1].setdefault(each.kind, []).append((each, next(scores)))
        return found

    def _scored(self, row: Example, want: frozenset[str], found: Found) -> Record:
        """Columns from what was scored of one row."""
        record: Record = {}
        if "answer" in found:
            ((own, values),) = found["answer"]
            record |= _of_answer(own, values, want)
            record["cut"] = len(own.candidate.ids) >= self.template.max_length
        if "alternatives" in want:
            record |= _of_alternatives(found)
        if "letter" in found or "choice" in found:
            record["label"] = row.label
        if "letter" in found:
            record["choice_logprobs"] = [
                values.logprobs.double().sum().item() for _, values in found["letter"]
            ]
        if "choice" in found:
            record["choice_nll"] = [_nll(named, values) for named, values in found["choice"]]
        return record

    def _paraphrased(
        self,
        rows: Sequence[Example],
        wanted: Sequence[frozenset[str]],
        records: Sequence[Record],
        length: int,
    ) -> None:
        """Ask with the paraphrased questions, as WAGLE's code does on TOFU."""
        asked = [
            i
            for i, want in enumerate(wanted)
            if "paraphrased" in want and rows[i].paraphrased_question
        ]
        needs = frozenset({"answer", "alternatives"})
        texts = [rows[i].paraphrased_question for i in asked]
        named = [
            C.answers(self.template, rows[i], needs, text)
            for i, text in zip(asked, texts, strict=True)
        ]
        again: list[Record] = [_of_alternatives(found) for found in self._scores(named)]
        changed = [rows[i].asking(text) for i, text in zip(asked, texts, strict=True)]
        self._generate(
            changed, [self.template.encode_prompt(row) for row in changed], again, length
        )
        for i, record in zip(asked, again, strict=True):
            records[i] |= {f"paraphrased_question_{name}": value for name, value in record.items()}

    def _generate(
        self,
        rows: Sequence[Example],
        prompts: Sequence[Sequence[int]],
        records: Sequence[Record],
        length: int,
    ) -> None:
        if not (distributed.all_reduce_max(len(rows)) if self.passes.meets else rows):
            return
        prompts = prompts or [
            [self.tokenizer.eos_token_id or 0]
        ]  # a rank without rows takes part in the meeting
        texts = generate(self.passes.lm, self.tokenizer, prompts, length, self.passes.meets)[
            : len(rows)
        ]
        for row, record, text in zip(rows, records, texts, strict=True):
            record |= of_generation(text, row.answer)

    def _gradient_norm(self, row: Example) -> float:
        ((_, candidate, _, closed),) = C.answers(self.template, row, frozenset())
        labels = [*candidate.labels[:-1], IGNORE] if closed else candidate.labels
        return gradient_norm(self.passes.lm, candidate.ids, labels)


def _beginnings(rows: Sequence[Example]) -> list[str]:
    """What to call rows whose numbers nobody gave."""
    return [f"test row {(row.question or row.answer)[:40]!r}" for row in rows]


def _nll(named: C.Named, values: Score) -> Optional[float]:
    """Mean negative log-likelihood per token of an answer; None if it has no token."""
    answer = values.logprobs[len(values.logprobs) - named.tokens :]
    return -answer.double().mean().item() if named.tokens else None


def _of_answer(own: C.Named, values: Score, want: frozenset[str]) -> Record:
    """Columns of the row's own answer."""
    record: Record = {"nll": _nll(own, values), "tokens": own.tokens}
    end = len(values.logprobs) - own.closed
    here = slice(len(values.logprobs) - own.tokens, end)
    if "tokens" in want:
        record |= {
            "logprobs": values.logprobs[here].tolist(),
            "greedy": values.greedy[here].tolist(),
        }
    if "vocabulary" in want:
        record |= {
            "vocabulary_mean": values.mean[here].tolist(),
            "vocabulary_std": values.std[here].tolist(),
        }
    if "text" in want:
        record["text_logprobs"] = values.logprobs[:end].tolist()
    return record


def _of_alternatives(found: Found) -> Record:
    """Columns of paraphrased and perturbed answers; without a paraphrase the own answer stands for it."""
    (first, *_) = found.get("paraphrased_answer", found["answer"])
    perturbed = found.get("perturbed_answer", [])
    return {
        "paraphrased_nll": _nll(*first),
        "paraphrased_tokens": first[0].tokens,
        "perturbed_nll": [_nll(*each) for each in perturbed],
        "perturbed_tokens": [named.tokens for named, _ in perturbed],
    }


def of_generation(text: str, answer: str) -> Record:
    """Columns of a generation: its text, and its ROUGE recall where there is an answer."""
    record: Record = {"generation": text}
    if answer:
        values = F.rouge([text], [answer])
        record |= {name: values[name].item() for name in ("rouge1_recall", "rougeL_recall")}
    return record


def merge(records: Sequence[Record]) -> list[Record]:
    """The records of all ranks, each row once, in order, all with the same columns; a meeting of all ranks."""
    by_row = {record["row"]: record for record in distributed.all_gather(records)}
    columns = dict.fromkeys(name for record in by_row.values() for name in record)
    return [{name: by_row[row].get(name) for name in columns} for row in sorted(by_row)]


def observe_set(
    observer: Observer,
    rows: Sequence[Example],
    needs: Collection[str],
    max_new_tokens: Optional[int] = None,
    header: str = "",
) -> list[Record]:
    """Observe all rows of a set outside a test loop, shared among the ranks; a meeting of them.

    Returns:
        One record a row, in order, each with its number as ``row``; see :meth:`Observer.observe`.
    """
    batches = token_batches(
        [len(row.question) + len(row.answer) for row in rows], observer.max_rows
    )
    records: list[Record] = []
    for batch in deal_batches(
        batches, distributed.world_size(), distributed.rank()
    ):  # what is seen twice is merged
        found = observer.observe([rows[i] for i in batch], needs, max_new_tokens, header)
        records += [{"row": i, **record} for i, record in zip(batch, found, strict=True)]
    return merge(records)
