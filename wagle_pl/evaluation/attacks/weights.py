"""Attacks that change weights for a while: quantisation and a little fine-tuning."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor, nn

from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import collate
from wagle_pl.data.example import Example
from wagle_pl.evaluation.attacks.attack import Attack, Finding, Subject, texts_of
from wagle_pl.lm.inference import forward_answers, sequence_logprobs
from wagle_pl.lm.layers import linear_weights
from wagle_pl.lm.quantised import check_form, quantise_

log = logging.getLogger(__name__)

STEP = "_step_"  # in the names of a curve's points


@contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Restore weights bit for bit, however the block ends. The copies are kept in CPU memory."""
    kept = [(p, p.detach().to("cpu", copy=True), p.requires_grad, p.grad) for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weights, requires_grad, gradient in kept:
                parameter.data.copy_(weights)
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


# -- quantisation ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Quantise(Attack):
    """Round the linear layers' weights to few bits, which may undo small updates, and test again.

    Weights only, of the blocks' linear layers, and back to floating point: no special kernels, any
    device (arXiv 2410.16454).

    Args:
        bits: what is tried, one after the other: a number of bits rounds to the nearest level of
            each output channel; ``nf4`` rounds as bitsandbytes does, in blocks of 64; ``q8_0`` and
            ``q4_0`` as llama.cpp does, in blocks of 32 (with the package gguf).
    """

    moves_weights = True

    bits: Sequence[Union[int, Literal["nf4", "q8_0", "q4_0"]]] = (8, 4)

    def attack(self, subject: Subject) -> Iterator[Finding]:
        for form in self.bits:
            option = f"{form}bit" if isinstance(form, int) else form
            with restored(weight for weight, _ in linear_weights(subject.lm, head=False)):
                quantise_(subject.lm, form)
                yield from subject.compare(subject.every_row(), self.measures, option)

    def check(self, subject: Subject) -> None:
        super().check(subject)
        if not self.bits:
            raise WagleError("quantise.bits: name a number of bits or a form")
        for form in self.bits:
            check_form(form, "quantise.bits")


# -- fine-tuning -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Relearn(Attack):
    """Fine-tune a few steps on forget rows, or on retain rows only, and test (arXiv 2406.13356).

    Only forget rows that were *not* trained on, in any wording, are tested: what comes back without
    being shown again was only hidden. It needs a copy of the weights in CPU memory, and 8 to 12
    bytes per weight for AdamW, on each rank.

    Args:
        on: ``forget`` rows, ``retain`` rows, or ``both``, each from the model as it was.
        steps: optimiser steps.
        rows: forget rows to train on, at most half of them, or a list of such numbers, each tried;
            retain rows are taken as they come.
        batch_size: rows per step.
        learning_rate: of AdamW.
        seed: of the draw.
        every: also test the answers' probability before the first step, every this many steps and
            after the last: the curve of recovery, ``<set>/probability_step_<number>``.
    """

    moves_weights = True

    on: Literal["forget", "retain", "both"] = "both"
    steps: int = 20
    rows: Union[int, Sequence[int]] = 8
    batch_size: int = 8
    learning_rate: float = 2e-5
    seed: int = 0
    every: Optional[int] = None

    def attack(self, subject: Subject) -> Iterator[Finding]:
        for option in self._options(subject):
            with restored(subject.lm.parameters()):
                yield from self._relearn(subject, option)

    def _relearn(self, subject: Subject, option: str) -> list[Finding]:
        rows = self.draw(subject, option)
        asked = subject.every_row(without=() if option == "retain" else texts_of(rows))
        curve: list[Finding] = []

        def look(step: int) -> None:
            if self.every and (step % self.every == 0 or step == self.steps):
                rest = {name: subject.needs[name] - {"answer"} for name in asked}
                tables = {n: subject.observe(n, rows, rest[n]) for n, rows in asked.items()}
                for finding in subject.findings(tables, {"probability"}, option):
                    measure = f"{finding.measure}{STEP}{step}"
                    curve.append(replace(finding, measure=measure, before=None, detail=True))

        look(0)
        losses = finetune_(subject.lm, self._batches(subject, rows), self.learning_rate, look)
        loss = f"{losses[0]:.3f} to {losses[-1]:.3f}"
        log.info("relearn %s: %d rows, loss %s", option, len(rows), loss)
        return [*subject.compare(asked, self.measures, option), *curve]

    def check(self, subject: Subject) -> None:
        super().check(subject)
        counts = (self.steps, self.batch_size, self.every or 1, *self._counts)
        if min(counts) < 1 or self.learning_rate <= 0:
            what = "steps, rows and batch_size must be at least 1, learning_rate above 0"
            raise WagleError(f"relearn: {what}")
        options = self._options(subject)
        if not options:
            raise self.unusable(f"there are no {self.on.replace('both', 'training')} rows")
        if self.on == "both" and len(options) == 1:
            log.warning("relearn: only on %s rows, there are no others to train on", *options)
        for option in options:
            trained = self.draw(subject, option)
            if option != "retain" and not subject.every_row(without=texts_of(trained)):
                why = f"no forget row is left to test on once {len(trained)} are trained on"
                raise self.unusable(why)

    def draw(self, subject: Subject, option: str) -> list[Example]:
        """The rows to train on, in the order of their use."""
        stream, _, count = option.partition("_")
        rows = _trainable(subject, stream)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        few = min(int(count or self._counts[0]), max(1, len(rows) // 2))
        drawn = order[: few if stream == "forget" else self.steps * self.batch_size]
        return [rows[i] for i in drawn.tolist()]

    @property
    def _counts(self) -> Sequence[int]:
        return [self.rows] if isinstance(self.rows, int) else self.rows

    def _options(self, subject: Subject) -> list[str]:
        """``forget`` (with a list of numbers of rows ``forget_<number>`` for each), ``retain``."""
        one = isinstance(self.rows, int)
        forget = ["forget"] if one else [f"forget_{count}" for count in self._counts]
        wanted = {"forget": forget, "retain": ["retain"], "both": [*forget, "retain"]}[self.on]
        return [option for option in wanted if _trainable(subject, option.partition("_")[0])]

    def _batches(self, subject: Subject, rows: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
        encoded = cycle([subject.template.encode(row) for row in rows])
        for _ in range(self.steps):
            batch = list(islice(encoded, min(self.batch_size, len(rows))))
            tensors = collate(batch, subject.template.tokenizer.pad_token_id or 0)
            yield {name: tensor.to(subject.device) for name, tensor in tensors.items()}


def _trainable(subject: Subject, option: str) -> list[Example]:
    """Rows with an answer of a training stream; without a forget stream, the tests'."""
    rows = subject.training(option)
    if rows is None and option == "forget":
        rows = subject.forget_rows
    return [row for row in rows or [] if row.kind != "prompt"]


def finetune_(
    lm: Any,
    batches: Iterable[Mapping[str, Tensor]],
    learning_rate: float,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train all weights in place with AdamW, without decay; return the loss before each step.

    The loss is the mean over rows of the mean over a row's tokens, and must stay finite. A batch
    has ``input_ids``, ``attention_mask`` and ``labels``, each (B, T), on the model's device.
    """
    losses = []
    with torch.inference_mode(False), torch.enable_grad():
        weights = [p.requires_grad_() for p in lm.parameters() if p.is_floating_point()]
        # The optimiser updates copies in fp32: in bf16, small steps would be rounded away.
        masters = [p if p.dtype == torch.float32 else p.detach().float() for p in weights]
        optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
        for step, batch in enumerate(batches, 1):
            sums, counts = sequence_logprobs(forward_answers(lm, batch), batch["labels"])
            loss = -(sums / counts).mean()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                message = f"relearn: the loss is not finite at step {step}"
                raise WagleError(message, hint="lower its learning_rate")
            # Not backward(): a data-parallel wrapper would all-reduce the gradients.
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.to(master.dtype)
            optimizer.step()
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
                after_step(step)
    return losses
