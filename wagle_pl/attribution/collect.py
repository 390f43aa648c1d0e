"""The gradient pass: what to collect from which stream of a batch, and the loop that collects it.

Rows are processed together, or one at a time if squared gradients of single rows are needed::

    sums = collect(lm, batches, [Job("forget", total="g_f"), Job("retain", total="g_r")])
    g_f = sums.sums["g_f"]  # one fp32 tensor per parameter, in the order of lm.parameters()
    mask = Collected(lm, sums).mask("forget_retain_ratio", density=0.2)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isfinite, prod
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from wagle_pl.attribution.hessian import DIAGONAL, Fisher, Hessian, MicroBatch
from wagle_pl.attribution.sums import PIECE, GradientSums, Sums
from wagle_pl.core import distributed
from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import evaluating, is_linear, parameter_shapes
from wagle_pl.lm.inference import IGNORE, Predictions, answer_places, forward_answers
from wagle_pl.lm.layers import expert_weights, is_transposed, linear_weights
from wagle_pl.objectives.objective import Objective
from wagle_pl.objectives.streams import Answers, Streams

log = logging.getLogger(__name__)

Batch = Mapping[str, Mapping[str, Any]]


@dataclass
class Job:
    """What to collect from one stream."""

    stream: str
    #: Streams -> (B,) losses whose gradients are collected; a row's mean negative log-likelihood
    #: when None.
    loss: Optional[Callable[[Streams], Tensor]] = None
    total: Optional[str] = None  # name of the sum of gradients, if needed
    squares: Optional[str] = None  # name of the sum of squared gradients of single rows
    hessian: Optional[Hessian] = None  # runs on the stream
    activations: bool = False  # collect norms of the inputs of linear layers

    @property
    def needs_graph(self) -> bool:
        """Whether the job runs a backward pass."""
        return bool(self.total or self.squares or self.hessian)

    @property
    def per_example(self) -> bool:
        """Whether rows are processed one at a time."""
        return bool(self.squares or (self.hessian and self.hessian.per_example))


def jobs_for(
    needs: Collection[str],
    forget: Objective,
    hessian: Optional[Hessian] = None,
    hessian_stream: str = "retain",
) -> tuple[list[Job], str]:
    """The jobs that collect what scores need (:data:`~wagle_pl.attribution.scores.COLLECTED`), with
    g_f of the forget objective; and the name of the sum that holds the Hessian diagonal."""
    # the empirical Fisher of the retain rows is fisher_r: it is collected once
    shared = type(hessian) is Fisher and hessian_stream == "retain"
    jobs = [
        Job(
            forget.forget_streams[0],
            loss=lambda at: -forget.forget_loss(at),  # forgetting decreases the forget loss: +g_f
            total="g_f" if "g_f" in needs else None,
            squares="fisher_f" if "fisher_f" in needs else None,
            activations="activation" in needs,
        ),
        Job(
            "retain",
            total="g_r" if "g_r" in needs else None,
            squares="fisher_r" if "fisher_r" in needs or shared else None,
            hessian=hessian if hessian_stream == "retain" and not shared else None,
        ),
    ]
    if hessian and hessian_stream != "retain":
        jobs.append(Job(hessian_stream, hessian=hessian))
    wanted = [job for job in jobs if job.needs_graph or job.activations]
    return wanted, "fisher_r" if shared else DIAGONAL


class AtTheta0(Streams):
    """Streams whose reference is the model itself, as at the first step of unlearning."""

    def __getitem__(self, stream: str) -> Answers:
        answers = super().__getitem__(stream)
        if answers.reference is None:
            answers.reference = answers.logprob.detach()
        return answers


class HostRows(NamedTuple):
    """What the host knows of the rows of one stream, so that it need not ask their device."""

    numbers: list[int]  # in their set
    occurrences: list[int]  # how often each has been seen in the epoch
    real: list[bool]  # False for rows that only fill the batch
    widths: list[int]  # number of tokens without padding
    lengths: list[int]  # number of labels


def known(tensors: Mapping[str, Tensor]) -> HostRows:
    """What is to be known of one stream's batch; waits if it is on a device."""
    lengths = (tensors["labels"][:, 1:] != IGNORE).sum(-1)
    widths, real = tensors["attention_mask"].sum(-1), tensors["weight"] > 0
    columns = (tensors["row"], tensors["occurrence"], real, widths, lengths)
    return HostRows(*(column.tolist() for column in columns))


class Draws(NamedTuple):
    """Random seeds at one point of a run, independent of how its batches are split."""

    seed: int = 0
    epoch: int = 0
    step: int = 0
    job: int = 0

    def of_row(self, row: int, occurrence: int) -> int:
        """Seed for one row; repetitions of a row in an epoch get independent seeds."""
        return stable_seed("row", self.seed, self.epoch, self.job, row, occurrence)

    def of_step(self) -> int:
        """Seed for the whole step."""
        return stable_seed("step", self.seed, self.epoch, self.job, self.step)


def collect(
    lm: nn.Module,
    batches: Iterable[Batch],
    jobs: Sequence[Job],
    seed: int = 0,
    sums: str = "device",
) -> GradientSums:
    """Run the jobs and sum their gradients over batches; no weight changes. Collective.

    Args:
        batches: stream -> (B, T) ``input_ids`` and ``labels`` (-100 where nothing is predicted);
            optionally ``attention_mask`` (B, T), 0 at padding, on either side of a row, where labels
            are ignored; ``weight`` (B,), 0 for rows that only fill the batch; and ``row`` (B,), from
            which the row's random seed is derived. Each batch is a step of the Hessian estimate.
        sums: ``device``, ``host`` or ``passes=K``, for which batches are iterated over K times; see
            :class:`~wagle_pl.attribution.AttributionModule`.

    Returns:
        The sums by name, and ``counts["<stream>_rows"]``, the number of rows in them.

    Raises:
        WagleError: if a loss is NaN or infinite.
    """
    where = Sums.parse(sums)
    gradient_sums = GradientSums(lm.named_parameters(), *where)
    with evaluating(lm):
        for group in range(where.passes):
            gradient_sums.turn(group)
            for step, batch in enumerate(batches):
                complete = {
                    stream: _completed(tensors, int(gradient_sums.counts.get(f"{stream}_rows", 0)))
                    for stream, tensors in batch.items()
                }
                add_batch(lm, complete, jobs, gradient_sums, Draws(seed, step=step))
                end_step(jobs, gradient_sums)
    gradient_sums.turn(where.passes)
    return gradient_sums


def _completed(tensors: Mapping[str, Tensor], first: int) -> dict[str, Any]:
    """A batch with the optional columns filled in, and with the padding of each row at its end.

    Args:
        first: number of the batch's first row, where rows have no numbers.
    """
    ids = tensors["input_ids"]
    count = torch.arange(len(ids), device=ids.device)
    optional = {
        "attention_mask": torch.ones_like(ids),
        "weight": torch.ones_like(count, dtype=torch.float32),
        "row": count + first,
        "occurrence": torch.zeros_like(count),
    }
    columns = optional | dict(tensors)
    real = columns["attention_mask"] > 0
    columns["labels"] = columns["labels"].masked_fill(~real, IGNORE)
    order = real.int().argsort(dim=1, descending=True, stable=True)
    columns = {
        name: tensor.gather(1, order) if tensor.shape == ids.shape else tensor
        for name, tensor in columns.items()
    }
    return {**columns, "places": answer_places(columns["labels"]), "known": known(columns)}


def add_batch(
    lm: nn.Module, batch: Batch, jobs: Sequence[Job], sums: GradientSums, draws: Draws
) -> dict[str, Tensor]:
    """Add one micro-batch to the sums; returns stream -> mean loss, where computed. Collective.

    Args:
        batch: stream -> tensors, their ``places`` and what is :func:`known` of them.
    """
    counts = {stream: sum(tensors["known"].real) for stream, tensors in batch.items()}
    for stream, count in counts.items():
        sums.count(f"{stream}_rows", count)
    losses = {}
    for number, job in enumerate(jobs):
        rows = split_rows(batch[job.stream]) if job.per_example else ()
        parts = [{job.stream: row} for row in rows] if job.per_example else [batch]
        values = [_add_rows(lm, part, job, sums, draws._replace(job=number)) for part in parts]
        if job.needs_graph:
            losses[job.stream] = sum(values, torch.zeros(())) / max(1, counts[job.stream])
    if losses:
        _check_finite(losses, {stream: t["known"].numbers for stream, t in batch.items()}, sums)
    return losses


def _check_finite(
    losses: Mapping[str, Tensor], rows: Mapping[str, list[int]], sums: GradientSums
) -> None:
    """Refuse the sums if a stream's loss is NaN or infinite: on a CPU at once, elsewhere at the next
    micro-batch, or before they are used. Collective."""
    values = torch.stack([*losses.values()]).float()
    failed = distributed.all_reduce_sum((~values.isfinite()).float())

    def read(numbers: list[list[float]]) -> None:
        sums.losses = dict(zip(losses, numbers[0], strict=True))
        for stream, loss, wrong in zip(losses, *numbers, strict=True):
            if wrong:
                here = [] if isfinite(loss) else [f"rows {rows[stream]}: {loss:g}"]
                where = distributed.all_gather(here)[0]
                raise WagleError(f"{stream} loss is not finite in {where}; is the model damaged?")

    sums.reading.start(torch.stack([values, failed]), read)


def end_step(jobs: Sequence[Job], sums: GradientSums) -> None:
    """Let Hessian estimators finish a step, once all its micro-batches have been added."""
    for job in jobs:
        if job.hessian:
            job.hessian.end_step(sums)


def _add_rows(
    lm: nn.Module, batch: Batch, job: Job, sums: GradientSums, draws: Draws
) -> Optional[Tensor]:
    """Forward pass over some rows and the job's backward passes; returns the sum of losses."""
    tensors, hessian = batch[job.stream], job.hessian
    rows: HostRows = tensors["known"]
    idle = tensors["weight"] == 0
    real = tensors["attention_mask"] * ~idle.unsqueeze(1)

    def forward(watch: bool = False) -> tuple[Answers, Optional[Tensor]]:
        """The stream's answers and the sum of its rows' losses."""
        # watched inputs must come from exactly one forward pass
        at = AtTheta0(batch, partial(forward_answers, lm, apart=not watch), {})
        add = partial(sums.add_vector, "activation")
        with watch_inputs(lm, real, add) if watch else nullcontext():
            answers = at[job.stream]
        if not job.needs_graph:
            return answers, None
        losses = answers.nll if job.loss is None else job.loss(at)
        return answers, losses.masked_fill(idle, 0.0).sum()

    def of_real_rows(answers: Answers) -> Predictions:
        if all(rows.real):
            return answers.predicted
        kept = ~idle[answers.places // answers.labels.shape[1]]
        return answers.predicted.at(kept.nonzero().view(-1))

    def again() -> tuple[Predictions, Tensor]:
        answers, loss = forward()
        return of_real_rows(answers), loss

    with (
        torch.set_grad_enabled(job.needs_graph),
        hessian.forward_context() if hessian else nullcontext(),
    ):
        answers, loss = forward(watch=job.activations and not sums.group)
        if loss is None:
            return None
        reusable = not sums.sharded
        done: Optional[tuple[Predictions, Tensor]] = (of_real_rows(answers), loss)
        if job.total or job.squares:
            with sums.into(job.total, squares=job.squares):
                if loss.requires_grad:  # False if the loss uses no parameter of this pass
                    loss.backward(retain_graph=hessian is not None and reusable)
            done = done if reusable else None
        if hessian:
            labels = answers.labels.masked_fill(idle.unsqueeze(1), IGNORE)
            lengths = [n * real for n, real in zip(rows.lengths, rows.real, strict=True)]
            seeds = list(map(draws.of_row, rows.numbers, rows.occurrences))
            micro_batch = MicroBatch(again, labels, lengths, seeds, draws.of_step(), done, reusable)
            hessian.add(micro_batch, sums)
    return loss.detach()


def split_rows(tensors: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Batches of one row each, without padding or rows of weight 0. Every rank gets equally many,
    since backward passes are collective: a rank with fewer rows repeats one with weight 0."""
    rows: HostRows = tensors["known"]
    numbers = [number for number, real in enumerate(rows.real) if real]
    missing = distributed.all_reduce_max(len(numbers)) - len(numbers)
    places, start = tensors["places"].split(rows.lengths), tensors["labels"].shape[1]
    for i, idle in [*((i, False) for i in numbers), *[(0, True)] * missing]:
        row: dict[str, Any] = {
            name: t[i : i + 1, : rows.widths[i]] if t.dim() > 1 else t[i : i + 1]
            for name, t in tensors.items()
            if isinstance(t, Tensor)
        }
        row |= {"places": places[i] - i * start, "padded": False}
        row["known"] = HostRows._make(column[i : i + 1] for column in rows)
        if idle:
            row["weight"] = torch.zeros_like(row["weight"])
            row["known"] = row["known"]._replace(real=[False])
        yield row


# -- norms of the inputs of linear layers ----------------------------------------------------------


@contextmanager
def watch_inputs(
    model: nn.Module, mask: Tensor, add: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Report Σ x² over real tokens of every input x of linear layers and experts, in one forward
    pass. Leave the context before the backward pass, where gradient checkpointing repeats it.

    Args:
        mask: (B, T), 0 at tokens that do not count. For a layer that runs on the last positions
            only, the last columns apply; an input of another shape counts as a whole.
        add: called with (name of a weight, fp64 sum of squares) at each call of its layer; the sum
            broadcasts with the weight: (in,), (in, 1) where that is stored transposed,
            (experts, 1, in) or (experts, in, 1).
    """
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}

    def of_layer(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares = _squares(_real(inputs[0].detach(), mask))
        add(names[layer.weight], squares[:, None] if is_transposed(layer) else squares)

    def of_experts(experts: nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        # tokens, and the experts that each is dispatched to, as positional or keyword arguments
        tokens, chosen, *_ = (*inputs, *options.values())
        tokens, chosen = (_real(x.detach().flatten(0, -2), mask) for x in (tokens, chosen))
        inputs = _expert_inputs(experts, tokens, chosen)
        for weight, squares in zip(expert_weights(experts), inputs, strict=True):
            add(names[weight], squares[:, :, None] if is_transposed(experts) else squares[:, None])

    with ExitStack() as hooks:
        for module in model.modules():
            if is_linear(module):
                hooks.enter_context(module.register_forward_pre_hook(of_layer))
            elif expert_weights(module):
                hook = module.register_forward_pre_hook(of_experts, with_kwargs=True)
                hooks.enter_context(hook)
        yield


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """(N, d) tokens of ``x``, (B, T', d) or (B · T, d), that ``mask``, (B, T), keeps; all tokens if
    ``x`` has another shape."""
    if x.dim() == 3 and x.shape[0] == mask.shape[0] and x.shape[1] <= mask.shape[1]:
        x = x[mask[:, mask.shape[1] - x.shape[1] :].bool()]
    elif x.dim() == 2 and x.shape[0] == mask.numel():
        x = x[mask.reshape(-1).bool()]
    return x.reshape(-1, x.shape[-1])


def _squares(x: Tensor) -> Tensor:
    """(d,) Σ x² over the (N, d) tokens in fp64, to which only some are converted at a time."""
    rows = x.split(max(1, PIECE // x.shape[-1]))
    return sum(part.double().square().sum(0) for part in rows)


@torch.no_grad()
def _expert_inputs(experts: Any, tokens: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(experts, in) sums of squares of the inputs of each expert's two maps, ``up`` and ``down``;
    the input of the second is recomputed as in transformers.

    Args:
        tokens: (N, d) input of the module.
        chosen: (N, k) experts of each token.
    """
    up, _ = expert_weights(experts)
    before, between = [], []
    for expert in range(len(up)):
        x = tokens[(chosen == expert).any(-1)]
        hidden = x @ (up[expert] if is_transposed(experts) else up[expert].T)
        if experts.has_bias:
            bias = "gate_up_proj_bias" if experts.has_gate else "up_proj_bias"
            hidden = hidden + getattr(experts, bias)[expert]
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        before.append(_squares(x))
        between.append(_squares(hidden))
    return torch.stack(before), torch.stack(between)


def warn_of_unwatched(lm: nn.Module) -> None:
    """Warn of matrices whose inputs are not watched, if they are more than 1 % of the weights."""
    watched = {id(weight) for weight, _ in linear_weights(lm)}
    watched |= {id(module.weight) for module in lm.modules() if isinstance(module, nn.Embedding)}
    shapes = parameter_shapes(lm)
    parameters = dict(lm.named_parameters())
    unwatched = [n for n, s in shapes.items() if len(s) > 1 and id(parameters[n]) not in watched]
    share = sum(prod(shapes[name]) for name in unwatched) / sum(map(prod, shapes.values()))
    if share > 0.01:
        log.warning(
            "wanda: %.0f %% of the weights are in layers of unknown kinds (%s, ...): they score 0 "
            "and are selected last",
            100 * share,
            ", ".join(unwatched[:3]),
        )
