"""Probing: what hidden layers know that the model does not say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Optional

import torch
from torch import Tensor

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import collate, token_batches
from wagle_pl.data.example import Example
from wagle_pl.evaluation.observe import Record, observe_set
from wagle_pl.evaluation.robustness.base import Attack
from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.robustness.linear import ordered, right_told, told_apart
from wagle_pl.evaluation.robustness.subject import Subject
from wagle_pl.evaluation.suites.catalogue import Info

LEAST = 4  # rows a side, or there is nothing to hold out

_SHARE = "share of pairs, 0 to 1 (0.5 is chance)"


class Probe(Attack):
    """A linear classifier on each hidden layer, at a text's last token (latent knowledge, arXiv 2402.16835, section 3).

    ``answers``: the right answer (the paraphrased one, where there is one) to a forget row's question against its
    perturbed answers. ``rows``: forget rows against ``holdout`` rows, or, without any, against retain rows. Both are
    the share of pairs that the classifier tells right on rows it was not fitted to (cross-validation over rows);
    *before* is the same share by the model's own likelihoods: what it says. ``accuracy`` is that of the best layer,
    which is above 0.5 by some chance: read it beside the retrained model's. Every layer has its own number too.

    Args:
        tell: ``answers``, ``rows``, or ``both``.
        rows: at most so many of each side, drawn at random.
        folds: of the cross-validation.
        strength: of the ridge penalty, see :func:`.linear.ridge`.
        seed: of the draw and the folds.
    """

    def __init__(
        self,
        tell: Literal["answers", "rows", "both"] = "both",
        rows: int = 100,
        folds: int = 5,
        strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.tell = tell
        self.rows = rows
        self.folds = folds
        self.strength = strength
        self.seed = seed

    def attack(self, subject: Subject) -> Iterator[Finding]:
        """See :class:`Probe`."""
        asked, forget, (others, kind) = (
            self._asked(subject),
            self._forget(subject),
            self._others(subject),
        )
        if asked:
            yield from self._answers(subject, asked)
        if len(forget) >= LEAST and len(others) >= LEAST:
            yield from self._told_rows(subject, forget, others, kind)

    def check(self, subject: Subject) -> None:
        """It needs forget rows with perturbed answers, or rows of another kind to tell the forget rows from."""
        super().check(subject)
        if self.rows < LEAST or self.folds < 2 or self.strength <= 0:
            raise WagleError(
                f"probe: rows must be at least {LEAST}, folds at least 2, strength above 0"
            )
        enough = len(self._forget(subject)) >= LEAST and len(self._others(subject)[0]) >= LEAST
        if not self._asked(subject) and not enough:
            what = {
                "answers": "rows to be forgotten with perturbed answers",
                "rows": "forget rows and as many holdout (--data.holdout) or retain rows",
                "both": "rows to be forgotten with perturbed answers, nor as many holdout or retain rows",
            }[self.tell]
            raise WagleError(f"probe has nothing to work on: there are no {LEAST} {what}")

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _draw(self, rows: Sequence[Example]) -> list[Example]:
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        return [rows[i] for i in sorted(order[: self.rows])]

    def _asked(self, subject: Subject) -> list[Example]:
        rows = [row for part in subject.rows.values() for row in part if row.perturbed_answers]
        return self._draw(rows) if self.tell != "rows" and len(rows) >= LEAST else []

    def _forget(self, subject: Subject) -> list[Example]:
        rows = subject.training("forget") or [row for part in subject.rows.values() for row in part]
        return self._draw(_whole(rows)) if self.tell != "answers" else []

    def _others(self, subject: Subject) -> tuple[list[Example], str]:
        """Rows to tell forget rows from, none of them a forget row, and what they are."""
        known = set().union(*(row.texts for row in subject.training("forget") or ()))
        for kind in ("holdout", "retain"):
            rows = [row for row in _whole(subject.training(kind) or []) if not row.texts & known]
            if rows:
                return self._draw(rows) if self.tell != "answers" else [], kind
        return [], ""

    # -- findings -----------------------------------------------------------------------------------------------------

    def _answers(self, subject: Subject, rows: Sequence[Example]) -> Iterator[Finding]:
        texts: list[list[str]] = [
            [row.paraphrased_answer or row.answer, *row.perturbed_answers] for row in rows
        ]
        flat = [(row, text) for row, answers in zip(rows, texts, strict=True) for text in answers]
        states = last_states(
            subject, [subject.template.encode(row, text)["input_ids"] for row, text in flat]
        )
        owners = [part.split([len(answers) for answers in texts]) for part in states.unbind(1)]
        values = [
            right_told(
                torch.stack([of_row[0] for of_row in layer]),
                [of_row[1:] for of_row in layer],
                self.strength,
                min(self.folds, len(rows)),
                self.seed,
            )
            for layer in owners
        ]
        before = None
        if subject.tables is not None:
            records = observe_set(subject.observer, rows, {"answer", "alternatives"})
            before = sum(map(_answer_told, records)) / len(records)
        yield from _by_layer(
            "answers", values, before, "right answers told from wrong ones to the same question"
        )

    def _told_rows(
        self, subject: Subject, forget: Sequence[Example], others: Sequence[Example], kind: str
    ) -> Iterator[Finding]:
        ids = [subject.template.encode(row)["input_ids"] for row in (*forget, *others)]
        states = last_states(subject, ids)
        count = min(self.folds, len(forget), len(others))
        values = [
            told_apart(layer[: len(forget)], layer[len(forget) :], self.strength, count, self.seed)
            for layer in states.unbind(1)
        ]
        before = None
        if subject.tables is not None:
            records = observe_set(subject.observer, [*forget, *others], {"answer"})
            nll = torch.tensor([record["nll"] for record in records], dtype=torch.float64)
            before = ordered(-nll[: len(forget)], -nll[len(forget) :])
        yield from _by_layer("rows", values, before, f"forget rows told from {kind} rows")


def _by_layer(
    option: str, values: Sequence[float], before: Optional[float], what: str
) -> Iterator[Finding]:
    best = max(range(len(values)), key=values.__getitem__)
    info = Info(
        _SHARE,
        "retrained",
        f"{what} by a linear classifier of the best hidden layer, held-out rows",
    )
    yield Finding("accuracy", values[best], info, option, before)
    for layer, value in enumerate(values):
        each = Info(
            _SHARE,
            "retrained",
            f"{what} by a linear classifier of hidden layer {layer} (0: embeddings)",
        )
        yield Finding(f"accuracy_layer_{layer}", value, each, option, before, detail=True)


def _answer_told(record: Record) -> float:
    """Share of a row's perturbed answers that are less likely than the right one."""
    right = torch.tensor([-record["paraphrased_nll"]], dtype=torch.float64)
    return ordered(right, -torch.tensor(record["perturbed_nll"], dtype=torch.float64))


def _whole(rows: Sequence[Example]) -> list[Example]:
    """Rows with an answer or a text."""
    return [row for row in rows if row.kind != "prompt"]


@torch.no_grad()
def last_states(subject: Subject, texts: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states at the last token of every text, (N, layers + 1, D) float32 on the CPU; a meeting of all ranks.

    Args:
        subject: the model.
        texts: token ids.
    """
    observer = subject.observer
    pad = subject.template.tokenizer.pad_token_id or 0
    batches = token_batches([len(text) for text in texts], observer.max_rows)
    found: list[tuple[list[int], Tensor]] = []
    for batch in batches[distributed.rank() :: distributed.world_size()]:
        tensors = collate([{"input_ids": list(texts[i])} for i in batch], pad)
        ids, mask = (tensors[name].to(subject.device) for name in ("input_ids", "attention_mask"))
        output = observer.passes(ids, mask, 1, output_hidden_states=True, use_cache=False)
        last = mask.sum(-1) - 1
        rows = torch.arange(len(batch), device=last.device)
        found.append(
            (
                batch,
                torch.stack([state[rows, last] for state in output.hidden_states], 1).float().cpu(),
            )
        )
    observer.passes.level()
    parts = distributed.all_gather(found)
    order = torch.tensor([i for batch, _ in parts for i in batch])
    return torch.cat([states for _, states in parts])[order.argsort()]
