"""The gradient pass: what to collect from which stream of a batch, and the loop that collects it.

Rows go through the model together, or one at a time where squares of single rows' gradients are wanted::

    sums = collect(lm, batches, [Job("forget", total="g_f"), Job("retain", total="g_r")])
    g_f = sums.sums["g_f"]  # one fp32 tensor a parameter, in the order of lm.parameters()
    mask = Collected(lm, sums).mask("forget_retain_ratio", density=0.2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from wagle_pl.attribution.activations import watch_inputs
from wagle_pl.attribution.hessian import Hessian, Piece
from wagle_pl.attribution.sums import GradientSums
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.seeds import stable_seed
from wagle_pl.data.template import IGNORE
from wagle_pl.lm.likelihood import forward_answers
from wagle_pl.objectives.streams import Answers, Streams

Batch = Mapping[str, Mapping[str, Tensor]]


@dataclass
class Job:
    """What to collect from one stream.

    Attributes:
        stream: its name.
        loss: streams -> (B,) losses whose gradients are collected; a row's mean negative log-likelihood when None.
        total: name of the sum of gradients, if wanted.
        squares: name of the sum of squared gradients of single rows, if wanted.
        hessian: estimator to feed, if wanted.
        activations: collect norms of what enters linear layers.
    """

    stream: str
    loss: Optional[Callable[[Streams], Tensor]] = None
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

    def losses(self, at: Streams) -> Tensor:
        """(B,) losses."""
        return at[self.stream].nll if self.loss is None else self.loss(at)


class AtTheta0(Streams):
    """Streams whose reference is the model itself, as at the first step of unlearning."""

    def __getitem__(self, stream: str) -> Answers:
        answers = super().__getitem__(stream)
        if answers.reference is None:
            answers.reference = answers.logprob.detach()
        return answers


class Draws(NamedTuple):
    """Seeds of what is drawn: for a row, whatever batch it is in; for a step, whatever part of it a rank has.

    Attributes:
        seed: of the run.
        epoch, step: where the run is.
        job: the job's number.
    """

    seed: int = 0
    epoch: int = 0
    step: int = 0
    job: int = 0

    def of_row(self, row: int, occurrence: int) -> int:
        """Seed of one row's draws; each time that an epoch has the row gets its own, or draws would be repeated."""
        return stable_seed("row", self.seed, self.epoch, self.job, row, occurrence)

    def of_step(self) -> int:
        """Seed of the step's draws."""
        return stable_seed("step", self.seed, self.epoch, self.job, self.step)


def collect(
    lm: nn.Module, batches: Iterable[Batch], jobs: Sequence[Job], seed: int = 0
) -> GradientSums:
    """Sum over batches what jobs want of a model's gradients; no weight moves. Collective with several ranks.

    Args:
        lm: a Hugging Face causal language model.
        batches: stream -> (B, T) ``input_ids`` and ``labels`` (-100 where nothing is predicted); ``attention_mask``,
            if rows are padded; ``weight`` (B,), 0 for rows that only fill the batch; ``row`` (B,), a row's number,
            which seeds what is drawn for it. Each batch is a step of the Hessian estimate.
        jobs: what to collect.
        seed: of what is drawn.

    Returns:
        The sums by name, and ``counts["<stream>_rows"]``, the number of rows they are of.

    Raises:
        WagleError: if a loss is NaN or infinite.
    """
    sums, training = GradientSums.of(lm), lm.training
    lm.eval()
    for step, batch in enumerate(batches):
        whole = {stream: with_defaults(tensors, step) for stream, tensors in batch.items()}
        add_batch(lm, whole, jobs, sums, Draws(seed, step=step))
        end_step(jobs, sums)
    lm.train(training)
    return sums


def with_defaults(tensors: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """A batch with the columns that a user may leave out."""
    ids = tensors["input_ids"]
    count = torch.arange(len(ids), device=ids.device)
    given = {
        "attention_mask": torch.ones_like(ids),
        "weight": torch.ones_like(count, dtype=torch.float32),
        "row": count + step * len(ids),
        "occurrence": torch.zeros_like(count),
    }
    return given | dict(tensors)


def add_batch(
    lm: nn.Module, batch: Batch, jobs: Sequence[Job], sums: GradientSums, draws: Draws
) -> dict[str, Tensor]:
    """Add one micro-batch to the sums; collective.

    Returns:
        Stream -> mean loss of its rows, where one was computed.
    """
    for stream, tensors in batch.items():
        sums.count(f"{stream}_rows", count_rows(tensors))
    losses = {}
    for number, job in enumerate(jobs):
        rows = split_rows(batch, job.stream) if job.per_example else [batch]
        found = [_add_rows(lm, part, job, sums, draws._replace(job=number)) for part in rows]
        if job.needs_graph:
            losses[job.stream] = sum(found, torch.zeros(())) / max(1, count_rows(batch[job.stream]))
    return losses


def end_step(jobs: Sequence[Job], sums: GradientSums) -> None:
    """Let Hessian estimators take in a step all of whose micro-batches have been added."""
    for job in jobs:
        if job.hessian:
            job.hessian.end_step(sums)


def _add_rows(
    lm: nn.Module, batch: Batch, job: Job, sums: GradientSums, draws: Draws
) -> Optional[Tensor]:
    """Forward pass over some rows, and the backward passes that the job wants; returns the sum of losses."""
    tensors = batch[job.stream]
    idle = tensors["weight"] == 0

    def forward(watch: bool = False) -> tuple[Answers, Optional[Tensor]]:
        """The stream's answers and the sum of its rows' losses."""
        watched = watch_inputs(lm, partial(sums.add_vector, "activation"))
        with watched if watch else nullcontext(lambda mask: None) as about_to_run:

            def run(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
                about_to_run(tensors["attention_mask"] * (tensors["weight"] > 0).unsqueeze(1))
                # activations count at every token: where answers begin in a batch depends on its other rows
                output, labels = forward_answers(lm, tensors, whole=watch)
                return output.logits, labels

            at = AtTheta0(batch, run, {})
            answers = at[job.stream]
            if not job.needs_graph:
                return answers, None
            return answers, job.losses(at).masked_fill(idle, 0.0).sum()

    with (
        torch.set_grad_enabled(job.needs_graph),
        job.hessian.forward_context() if job.hessian else nullcontext(),
    ):
        answers, loss = forward(watch=job.activations)
        if loss is None:
            return None
        if distributed.all_reduce_max(int(not torch.isfinite(loss))):
            raise _not_finite(job.stream, tensors, loss)
        keeps = not sums.sharded
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


def split_rows(batch: Batch, stream: str) -> Iterator[Batch]:
    """Batches of one row each, without padding, as many on every rank: rows of weight 0 are left out, and given again
    where another rank has more rows than this one."""
    tensors = batch[stream]
    rows = (tensors["weight"] > 0).nonzero().view(-1).tolist()
    # agreed before the first row: its backward pass is collective
    missing = distributed.all_reduce_max(len(rows)) - len(rows)
    for i in rows:
        yield {stream: _row(tensors, i)}
    for _ in range(missing):
        yield {stream: {**_row(tensors, 0), "weight": torch.zeros_like(tensors["weight"][:1])}}


def _row(tensors: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    width = int(tensors["attention_mask"][i].sum())
    return {
        name: t[i : i + 1, :width] if t.dim() > 1 else t[i : i + 1] for name, t in tensors.items()
    }


def count_rows(tensors: Mapping[str, Tensor]) -> int:
    """Rows of a stream that count: those whose weight is not 0."""
    return int((tensors["weight"] > 0).sum())
