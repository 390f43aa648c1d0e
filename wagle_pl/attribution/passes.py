"""The gradient pass: what to collect from which stream of a batch, and one batch's worth of collecting.

Rows go through the model together, or one at a time where squares of single rows' gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from wagle_pl.attribution.activations import watch_inputs
from wagle_pl.attribution.hessian import Hessian, Piece
from wagle_pl.attribution.sums import GradientSums
from wagle_pl.evaluation.likelihood import IGNORE, forward_answers
from wagle_pl.unlearning.objectives import Answers, Streams
from wagle_pl.utilities import WagleError

Batch = Mapping[str, Mapping[str, Tensor]]


@dataclass
class Job:
    """What to collect from one stream.

    Attributes:
        stream: its name; a row's loss is read from it.
        loss: streams -> (B,) losses whose gradients are collected.
        total: name of the sum of gradients, if wanted.
        squares: name of the sum of squared gradients of single rows, if wanted.
        hessian: estimator to feed, if wanted.
        activations: collect norms of what enters linear layers.
    """

    stream: str
    loss: Callable[[Streams], Tensor]
    total: Optional[str] = None
    squares: Optional[str] = None
    hessian: Optional[Hessian] = None
    activations: bool = False

    @property
    def needs_graph(self) -> bool:
        """Whether a backward pass will follow."""
        return bool(self.total or self.squares or self.hessian)

    @property
    def per_example(self) -> bool:
        """Whether rows go one at a time."""
        return bool(self.squares or (self.hessian and self.hessian.per_example))


class AtTheta0(Streams):
    """Streams whose reference is the model itself, as at the first step of unlearning."""

    def __getitem__(self, stream: str) -> Answers:
        answers = super().__getitem__(stream)
        if answers.reference is None:
            answers.reference = answers.logprob.detach()
        return answers


def collect(
    job: Job,
    batch: Batch,
    lm: Any,
    sums: GradientSums,
    backward: Callable[..., None],
    seeds: Callable[[int], int],
) -> Optional[Tensor]:
    """Add one micro-batch to the sums.

    Args:
        job: what to collect.
        batch: stream -> tensors.
        lm: a Hugging Face causal language model.
        sums: where to.
        backward: ``backward(loss, retain_graph=...)``.
        seeds: row -> seed of what is drawn for it.

    Returns:
        The mean loss of the rows, None if no loss was computed.

    Raises:
        WagleError: if a loss is NaN or infinite.
    """
    total = torch.zeros(())
    for piece in split_rows(batch, job.stream) if job.per_example else [batch]:
        loss = _collect_piece(job, piece, lm, sums, backward, seeds)
        total = total if loss is None else total.to(loss.device) + loss
    return total / max(1, count_rows(batch[job.stream])) if job.needs_graph else None


def _collect_piece(
    job: Job,
    batch: Batch,
    lm: Any,
    sums: GradientSums,
    backward: Callable[..., None],
    seeds: Callable[[int], int],
) -> Optional[Tensor]:
    """Forward pass over some rows, and the backward passes that the job wants; returns the sum of losses."""

    def add_norms(weight: str, squares: Tensor) -> None:
        sums.add_vector("activation", weight, squares)

    watching = watch_inputs(lm, add_norms) if job.activations else nullcontext(lambda mask: None)
    with torch.set_grad_enabled(job.needs_graph), job.hessian.forward_context() if job.hessian else nullcontext():
        with watching as about_to_run:

            def run(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
                about_to_run(tensors["attention_mask"] * (tensors["weight"] > 0).unsqueeze(1))
                output, labels = forward_answers(lm, tensors)
                return output.logits, labels

            at = AtTheta0(batch, run, {})
            answers = at[job.stream]
            if not job.needs_graph:
                return None
            tensors = batch[job.stream]
            idle = tensors["weight"] == 0
            loss = job.loss(at).masked_fill(idle, 0.0).sum()
        if not torch.isfinite(loss):
            rows = tensors["row"].tolist()
            raise WagleError(f"{job.stream} loss is not finite in rows {rows}: {loss.item():g}; is the model whole?")
        if job.total or job.squares:
            with sums.into(job.total, squares=job.squares):
                backward(loss, retain_graph=job.hessian is not None)
        if job.hessian:
            labels = answers.labels.masked_fill(idle.unsqueeze(1), IGNORE)
            drawn_by = [seeds(row) for row in tensors["row"].tolist()]
            job.hessian.add(Piece(answers.logits, labels, loss, drawn_by, backward), sums)
    return loss.detach()


def split_rows(batch: Batch, *streams: str) -> Iterator[Batch]:
    """Batches of one row each, without padding; rows that only fill the batch are left out."""
    tensors = batch[streams[0]]
    for i in range(len(tensors["weight"])):
        if tensors["weight"][i] > 0:
            yield {stream: _row(batch[stream], i) for stream in streams}


def _row(tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    width = int(tensors["attention_mask"][i].sum())
    return {name: t[i : i + 1, :width] if t.dim() > 1 else t[i : i + 1] for name, t in tensors.items()}


def count_rows(tensors: Mapping[str, Tensor]) -> int:
    """Rows of a stream that count (padding has weight 0)."""
    return int((tensors["weight"] > 0).sum())
