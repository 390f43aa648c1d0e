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
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.seeds import stable_seed
from wagle_pl.data.template import IGNORE
from wagle_pl.lm.likelihood import forward_answers
from wagle_pl.objectives.forget import Answers, Streams

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


@dataclass
class Draws:
    """Seeds of what is drawn: for a row, whatever batch it is in; for a step, whatever part of it a rank sees.

    Attributes:
        seed: of the run.
        epoch, step: where the run is.
        job: the job's number.
    """

    seed: int
    epoch: int
    step: int
    job: int

    def of_row(self, row: int, occurrence: int) -> int:
        """Seed of one row's draws; each time that an epoch sees the row has its own, or a step's draws would add up."""
        return stable_seed("row", self.seed, self.epoch, self.job, row, occurrence)

    def of_step(self) -> int:
        """Seed of the step's draws."""
        return stable_seed("step", self.seed, self.epoch, self.job, self.step)


def collect(job: Job, batch: Batch, lm: Any, sums: GradientSums, draws: Draws) -> Optional[Tensor]:
    """Add one micro-batch to the sums; with several ranks a meeting of all.

    Args:
        job: what to collect.
        batch: stream -> tensors.
        lm: a Hugging Face causal language model.
        sums: where to.
        draws: seeds.

    Returns:
        The mean loss of the rows, None if no loss was computed.

    Raises:
        WagleError: if a loss is NaN or infinite.
    """
    total = torch.zeros(())
    for piece in split_rows(batch, job.stream) if job.per_example else [batch]:
        loss = _collect_piece(job, piece, lm, sums, draws)
        total = total if loss is None else total.to(loss.device) + loss
    return total / max(1, count_rows(batch[job.stream])) if job.needs_graph else None


def _collect_piece(
    job: Job, batch: Batch, lm: Any, sums: GradientSums, draws: Draws
) -> Optional[Tensor]:
    """Forward pass over some rows, and the backward passes that the job wants; returns the sum of losses."""
    tensors = batch[job.stream]
    idle = tensors["weight"] == 0

    def add_norms(weight: str, squares: Tensor) -> None:
        sums.add_vector("activation", weight, squares)

    def forward(watch: bool = False) -> tuple[Answers, Optional[Tensor]]:
        """The stream's answers and the sum of its rows' losses."""
        with (
            watch_inputs(lm, add_norms) if watch else nullcontext(lambda mask: None) as about_to_run
        ):

            def run(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
                about_to_run(tensors["attention_mask"] * (tensors["weight"] > 0).unsqueeze(1))
                # what enters the output layer counts at every token too: where answers begin is the batch's affair
                output, labels = forward_answers(lm, tensors, whole=watch)
                return output.logits, labels

            at = AtTheta0(batch, run, {})
            answers = at[job.stream]
            return answers, job.loss(at).masked_fill(idle, 0.0).sum() if job.needs_graph else None

    with (
        torch.set_grad_enabled(job.needs_graph),
        job.hessian.forward_context() if job.hessian else nullcontext(),
    ):
        answers, loss = forward(watch=job.activations)
        if loss is None:
            return None
        if distributed.all_reduce_max(int(not torch.isfinite(loss))):
            raise _not_finite(job.stream, tensors, loss)
        keeps = not sums.spread
        done: Optional[tuple[Tensor, Tensor]] = (answers.logits, loss)
        if job.total or job.squares:
            with sums.into(job.total, squares=job.squares):
                loss.backward(retain_graph=job.hessian is not None and keeps)
            done = done if keeps else None
        if job.hessian:

            def again() -> tuple[Tensor, Tensor]:
                answers, loss = forward()
                return answers.logits, loss

            labels = answers.labels.masked_fill(idle.unsqueeze(1), IGNORE)
            copies = zip(tensors["row"].tolist(), tensors["occurrence"].tolist(), strict=True)
            seeds = [draws.of_row(row, occurrence) for row, occurrence in copies]
            job.hessian.add(Piece(again, labels, seeds, draws.of_step(), done, keeps), sums)
    return loss.detach()


def _not_finite(stream: str, tensors: Mapping[str, Tensor], loss: Tensor) -> WagleError:
    found = [] if torch.isfinite(loss) else [f"rows {tensors['row'].tolist()}: {loss.item():g}"]
    return WagleError(
        f"{stream} loss is not finite in {distributed.all_gather(found)[0]}; is the model whole?"
    )


def split_rows(batch: Batch, *streams: str) -> Iterator[Batch]:
    """Batches of one row each, without padding; rows that only fill the batch are left out, unless another rank has
    more rows than this one."""
    weights = batch[streams[0]]["weight"]
    rows = (weights > 0).nonzero().view(-1).tolist()
    spares = distributed.all_reduce_max(len(rows)) - len(
        rows
    )  # agreed before the first row: its backward pass is a meeting
    for i in rows:
        yield {stream: _row(batch[stream], i) for stream in streams}
    for _ in range(spares):
        spare = {stream: _row(batch[stream], 0) for stream in streams}
        yield {
            stream: {**row, "weight": torch.zeros_like(row["weight"])}
            for stream, row in spare.items()
        }


def _row(tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    width = int(tensors["attention_mask"][i].sum())
    return {
        name: t[i : i + 1, :width] if t.dim() > 1 else t[i : i + 1] for name, t in tensors.items()
    }


def count_rows(tensors: Mapping[str, Tensor]) -> int:
    """Rows of a stream that count (padding has weight 0)."""
    return int((tensors["weight"] > 0).sum())
