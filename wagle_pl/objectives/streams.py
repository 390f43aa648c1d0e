"""An objective's view of a batch: the :class:`Answers` of each of its :class:`Streams`.

Objectives that compare with θ₀ get its predictions in one of two ways, the cheaper first:

* *sums* (NPO, DPO): one log-probability per row, computed once before the first step, so that no
  second model is kept;
* *a frozen copy* (whole predictions, and hidden states): one more forward pass per step, see
  :meth:`wagle_pl.masks.selected.SelectedWeights.at_theta0`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import evaluating
from wagle_pl.lm.inference import (
    IGNORE,
    Predictions,
    answer_places,
    forward_answers,
    in_chunks,
    logprobs_of,
)
from wagle_pl.lm.layers import capture

if TYPE_CHECKING:
    from wagle_pl.lm.module import LanguageModule


@dataclass(eq=False)
class Answers:
    """A model's predictions for the answers of one stream's batch, computed on demand.

    B is the number of rows, T their length in tokens, V the vocabulary, and N the number of answer
    tokens of the whole batch, row after row.
    """

    #: At the N positions that predict an answer token; for streams in the objective's
    #: ``whole_streams`` at all (B · T,), and then what is by answer token is not available.
    predicted: Predictions
    labels: Tensor  # (B, T), -100 where nothing is predicted
    places: Tensor  # (N,) positions of these predictions in the flattened (B, T)
    #: (B,) summed log-probability at θ₀; only for streams in the objective's ``references``.
    reference: Optional[Tensor] = None
    rows: Optional[Tensor] = None  # (B,) index of each row in its set, if known
    #: Block -> (B, T, d), its output; only for the objective's ``hidden_layers``.
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    #: Computes the same answers at θ₀, see :attr:`theta0`.
    run_theta0: Optional[Callable[[], Answers]] = None

    @cached_property
    def token_logprobs(self) -> Tensor:
        """(B, T − 1) log-probability of each answer token in fp32, 0 elsewhere."""
        return self._on_grid(in_chunks(logprobs_of, self.predicted, self.targets))

    @cached_property
    def mask(self) -> Tensor:
        """(B, T − 1) bool: where an answer token is predicted."""
        return self.labels[:, 1:] != IGNORE

    @cached_property
    def length(self) -> Tensor:
        """(B,) number of answer tokens."""
        return self.mask.sum(-1)

    @cached_property
    def logprob(self) -> Tensor:
        """(B,) summed log-probability of the answer, log π(y|x)."""
        return self.token_logprobs.sum(-1)

    @cached_property
    def nll(self) -> Tensor:
        """(B,) mean negative log-likelihood per answer token."""
        return -self.logprob / self.length

    @cached_property
    def targets(self) -> Tensor:
        """(N,) the answer tokens."""
        return self.labels.flatten().index_select(0, self.places + 1)

    def _on_grid(self, values: Tensor) -> Tensor:
        """(N,) numbers, one per answer token -> (B, T − 1), 0 elsewhere."""
        grid = values.new_zeros(self.labels.numel()).index_copy(0, self.places, values)
        return grid.view(self.labels.shape)[:, :-1]

    def mean_tokens(self, values: Tensor) -> Tensor:
        """(N,) numbers, one per answer token -> (B,) their mean over each row."""
        return self._on_grid(values).sum(-1) / self.length

    @cached_property
    def theta0(self) -> Answers:
        """The same answers at θ₀, from the frozen copy, without gradients."""
        if self.run_theta0 is None:
            raise TypeError("there is no copy of θ₀ here: set the objective's logits_at_theta0")
        return self.run_theta0()

    def beside_theta0(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """(N,) values of ``function``, called on chunks of n tokens: their (n, V) log-probabilities
        at θ₀, (n, V) now, and the (n,) answer tokens."""
        return in_chunks(
            lambda now, then, y: function(then.log_softmax(-1), now.log_softmax(-1), y),
            self.predicted,
            self.theta0.predicted,
            self.targets,
        )

    def hidden_difference(self, layer: int, target: Tensor) -> Tensor:
        """(B,) (1/|y|) Σ_t (1/d) ‖h_t − target_t‖², t over the answer tokens.

        Args:
            target: a tensor that broadcasts to (B, T, d).
        """
        distance = (self.hidden[layer].float() - target.float()).square().mean(-1)
        mask = self.labels != IGNORE
        return distance.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


@dataclass(eq=False)
class Streams(Mapping[str, Answers]):
    """Streams of one batch; the model runs on a stream when an objective first asks for it."""

    #: Stream -> tensors, as the data module makes them.
    batch: Mapping[str, Mapping[str, Tensor]]
    #: Tensors of one stream -> predictions at their ``places``.
    run: Callable[[Mapping[str, Any]], Predictions]
    #: Stream -> (rows of the set,) summed log-probabilities at θ₀.
    references: Mapping[str, Tensor]
    #: The model that ``run`` runs; needed for ``layers`` and by objectives that read weights.
    lm: Optional[PreTrainedModel] = None
    layers: Collection[int] = ()  # blocks whose output is kept
    #: Gives a context in which ``run`` runs the model at θ₀.
    theta0: Optional[Callable[[], AbstractContextManager[Any]]] = None
    progress: float = 0.0  # share of the run's steps that is done, 0 at the first, 1 at the last
    epoch: int = 0  # counted from 0
    logits_of: Collection[str] = ()  # streams for which a term needs logits at every position
    #: Term of the objective -> computes its gradient at once, and returns what stands for the term
    #: in the loss; other terms are propagated with the loss.
    propagate: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    _answers: dict[str, Answers] = field(default_factory=dict, init=False)

    def __getitem__(self, stream: str) -> Answers:
        if stream in self._answers:
            return self._answers[stream]
        tensors = dict(self.batch[stream])
        labels = tensors["labels"]
        if stream in self.logits_of:
            tensors["places"] = torch.arange(labels.numel(), device=labels.device)
            tensors.pop("packed_ids", None)
        elif "places" not in tensors:
            tensors["places"] = answer_places(labels)
        run, lm, layers = self.run, self.lm, self.layers  # a cycle with self would keep the graph

        def ask(context: Callable[[], AbstractContextManager[Any]]) -> Answers:
            with context(), capture(lm, layers) as hidden:
                predicted = replace(run(tensors), context=context)
            return Answers(predicted, labels, tensors["places"], hidden=hidden)

        answers = self._answers[stream] = ask(nullcontext)
        answers.rows = tensors.get("row")
        if stream in self.references:
            answers.reference = self.references[stream].to(labels.device)[answers.rows]
        if self.theta0 is not None:
            answers.run_theta0 = partial(ask, self.theta0)
        return answers

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)

    def mean(
        self,
        stream: str,
        values: Tensor,
        what: str = "values",
        by_token: bool = False,
        skipped: int = 0,
    ) -> Tensor:
        """Weighted sum of (B,) values, one for each row of a stream.

        Averaged over ranks and micro-batches, it is the mean over the rows of the global batch. If
        ``by_token``, values are means over a row's answer tokens except the first ``skipped``, and
        the result is the mean over all those tokens.

        Raises:
            WagleError: naming ``what``, if the values have another shape.
        """
        weight = self.batch[stream]["weight"]
        wanted = f"one number for each of {len(weight)} rows, shape {tuple(weight.shape)}"
        if not isinstance(values, Tensor):
            raise WagleError(f"{what}: must be a tensor, {wanted}, got {type(values).__name__}")
        if values.shape != weight.shape:
            raise WagleError(f"{what}: must be {wanted}, got shape {tuple(values.shape)}")
        weight = weight.to(values.dtype)
        if by_token:
            labels = self.batch[stream]["labels"]
            length = (labels[:, 1:] != IGNORE).sum(-1).to(values.dtype)
            mean = self.batch[stream].get("mean_tokens", length.mean())
            weight = weight * (length - skipped).clamp(min=0) / (mean - skipped).clamp(min=1e-6)
        return (weight * values.masked_fill(weight == 0, 0.0)).sum()


# -- what θ₀ says ----------------------------------------------------------------------------------


class References:
    """Sums of a run at θ₀, computed before its first step and kept in checkpoints."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # stream -> (rows,) summed log-probabilities at θ₀
        self._stored: dict[str, dict[str, Any]] = {}  # stream -> ``key`` and ``logprobs``
        self._resumed = False

    def prepare(self, module: LanguageModule, streams: Collection[str]) -> None:
        """Take the sums of some streams from the checkpoint, or compute them. Collective.

        Raises:
            WagleError: if a checkpoint has those of other data, or none although θ₀ is gone.
        """
        for stream in streams:
            key = _digest(module, stream)
            if stream not in self._stored:
                if self._resumed:
                    raise WagleError(
                        f"the checkpoint has no reference log-probabilities of the {stream} rows, "
                        "and the model has moved since: start the run anew"
                    )
                self._stored[stream] = {"key": key, "logprobs": _sums(module, stream)}
            elif self._stored[stream]["key"] != key:
                raise WagleError(
                    f"the checkpoint's reference probabilities of the {stream} rows are of other "
                    "data, another model or precision: resume with what the run began with"
                )
            self.sums[stream] = self._stored[stream]["logprobs"].to(module.device)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What was used, by stream, so that a resumed run does not need θ₀."""
        return self._stored

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Restore a checkpoint's; nothing is computed from then on: the weights have moved."""
        self._stored = dict(state)
        self._resumed = True


def _sums(module: LanguageModule, stream: str) -> Tensor:
    """(rows,) float32, summed log-probability of each answer of a stream at the current weights,
    without dropout; ranks share the rows. Collective."""
    sums: dict[int, float] = {}
    context = module.trainer.precision_plugin.forward_context()
    with evaluating(module.lm), torch.no_grad(), context:
        for batch in module.data.stream_loader(stream, shared=True):
            tensors = {name: tensor.to(module.device) for name, tensor in batch[stream].items()}
            at = Streams({stream: tensors}, partial(forward_answers, module.lm), {})
            rows, values = tensors["row"].tolist(), at[stream].logprob.tolist()
            sums.update(zip(rows, values, strict=True))
    sums = dict(distributed.all_gather(sums.items()))
    return torch.tensor([sums[row] for row in range(len(sums))])


def _digest(module: LanguageModule, stream: str) -> str:
    """A hash of what a stream's predictions depend on: model, precision, and the rows' tokens."""
    tokens: dict[int, str] = {}
    for batch in module.data.stream_loader(stream):
        columns = (batch[stream][c] for c in ("row", "input_ids", "labels", "attention_mask"))
        for row, ids, labels, mask in zip(*columns, strict=True):
            tokens[int(row)] = json.dumps([ids[mask > 0].tolist(), labels[mask > 0].tolist()])
    text = f"{module.model_fingerprint} {stream} {module.trainer.precision}"
    text += "".join(tokens[row] for row in range(len(tokens)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
