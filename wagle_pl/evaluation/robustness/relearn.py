"""Relearning: a little fine-tuning, and what comes back with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal

import torch

from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import collate
from wagle_pl.data.example import Example
from wagle_pl.evaluation.robustness.base import Attack
from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.robustness.subject import Subject
from wagle_pl.evaluation.robustness.weights import finetune_, restored

log = logging.getLogger(__name__)


class Relearn(Attack):
    """Fine-tune a few steps on a few forget rows, or on retain rows only, and test again (arXiv 2406.13356).

    Tested are the forget rows that were *not* trained on, nor under another wording: what was never shown again and
    comes back was hidden. Each rank trains the same steps on the same rows. Memory: a copy of the weights in CPU
    memory, and 8 to 12 bytes a weight for AdamW.

    Args:
        on: ``forget`` rows, ``retain`` rows, or ``both``, one after the other, each from the model as it was.
        steps: optimiser steps.
        rows: forget rows to train on: so many, drawn at random, at most half of them. Of retain rows every batch
            takes new ones while there are any.
        batch_size: rows a step.
        learning_rate: of AdamW.
        seed: of the draw.
    """

    moves_weights = True

    def __init__(
        self,
        on: Literal["forget", "retain", "both"] = "both",
        steps: int = 20,
        rows: int = 8,
        batch_size: int = 8,
        learning_rate: float = 2e-5,
        seed: int = 0,
    ) -> None:
        self.on = on
        self.steps = steps
        self.rows = rows
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed

    def attack(self, subject: Subject) -> Iterator[Finding]:
        """See :class:`Relearn`."""
        for option in self._options(subject):
            rows = self.draw(subject, option)
            shown = set().union(*(row.texts for row in rows)) if option == "forget" else set()
            with restored(subject.lm.parameters()):
                losses = finetune_(subject.lm, self._batches(subject, rows), self.learning_rate)
                log.info(
                    "relearn %s: %d rows, loss %.3f to %.3f",
                    option,
                    len(rows),
                    losses[0],
                    losses[-1],
                )
                yield from subject.compare(subject.every_row(without=shown), self.measures, option)

    def check(self, subject: Subject) -> None:
        """It needs rows to train on, and forget rows left to test on."""
        super().check(subject)
        if min(self.steps, self.rows, self.batch_size) < 1 or self.learning_rate <= 0:
            raise WagleError(
                "relearn: steps, rows and batch_size must be at least 1, learning_rate above 0"
            )
        if not self._options(subject):
            raise WagleError(
                f"relearn has nothing to work on: there are no {self.on.replace('both', 'training')} rows"
            )
        if self.on == "both" and len(self._options(subject)) == 1:
            log.warning(
                "relearn: only on %s rows, there are no others to train on", *self._options(subject)
            )
        for option in self._options(subject):
            shown = set().union(*(row.texts for row in self.draw(subject, option)))
            if option == "forget" and not subject.every_row(without=shown):
                raise WagleError(
                    "relearn has nothing to work on: no forget row is left to test on once "
                    f"{min(self.rows, len(shown))} are trained on"
                )

    def draw(self, subject: Subject, option: str) -> list[Example]:
        """The rows to train on, in the order of their use."""
        rows = _trainable(subject, option)
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        count = (
            min(self.rows, max(1, len(rows) // 2))
            if option == "forget"
            else self.steps * self.batch_size
        )
        return [rows[i] for i in order[:count]]

    def _options(self, subject: Subject) -> list[str]:
        wanted = ["forget", "retain"] if self.on == "both" else [self.on]
        return [option for option in wanted if _trainable(subject, option)]

    def _batches(self, subject: Subject, rows: list[Example]) -> list[dict[str, torch.Tensor]]:
        pad = subject.template.tokenizer.pad_token_id or 0
        encoded = [subject.template.encode(row) for row in rows]
        found = []
        for step in range(self.steps):
            size = min(self.batch_size, len(rows))
            places = [(step * size + i) % len(rows) for i in range(size)]
            batch = collate([encoded[i] for i in places], pad)
            found.append({name: tensor.to(subject.device) for name, tensor in batch.items()})
        return found


def _trainable(subject: Subject, option: str) -> list[Example]:
    """Rows of a training stream that have an answer; without a forget stream those of the forget test sets."""
    rows = subject.training(option)
    if rows is None and option == "forget":
        rows = [row for part in subject.rows.values() for row in part]
    return [row for row in rows or [] if row.kind != "prompt"]
