"""What an objective sees of a batch: the :class:`Answers` of each of its :class:`Streams`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Optional

from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core.errors import WagleError
from wagle_pl.lm.inference import IGNORE, Predictions, answer_places, in_chunks, logprobs_of
from wagle_pl.lm.layers import capture

if TYPE_CHECKING:
    from wagle_pl.objectives.references import TopK


@dataclass(eq=False)
class Answers:
    """What a model says about the answers of one stream's batch, computed when asked for.

    B is the number of rows, T their length in tokens, V the vocabulary, and N the number of answer
    tokens of the whole batch, row after row.
    """

    predicted: Predictions  # at the N places that predict an answer token
    labels: Tensor  # (B, T), -100 where nothing is to be predicted
    places: Tensor  # (N,) these places, in (B, T) flattened
    #: (B,) summed log-probability at θ₀; of streams that the objective lists in ``references``.
    reference: Optional[Tensor] = None
    rows: Optional[Tensor] = None  # (B,) index of each row in its set, where it is known
    #: Block -> (B, T, d), its output; of those that the objective names in ``hidden_layers``.
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    #: Gives the same answers at θ₀, see :attr:`theta0`.
    run_theta0: Optional[Callable[[], Answers]] = None
    #: Predictions at θ₀ in its place, see :meth:`beside_theta0`.
    top_k: Optional[TopK] = None
    #: At all (B · T,) places, and (B, T), 0 where a row is padded; of streams that the objective
    #: names in ``whole_streams``.
    everywhere: Optional[Predictions] = None
    attention: Optional[Tensor] = None

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

    @property
    def predictions(self) -> Tensor:
        """(N, V) logits that predict the answer tokens, in fp32, whole: prefer
        :func:`~wagle_pl.lm.inference.in_chunks` of ``predicted``."""
        return self.predicted.logits()

    @cached_property
    def targets(self) -> Tensor:
        """(N,) the answer tokens."""
        return self.labels.flatten().index_select(0, self.places + 1)

    def _on_grid(self, values: Tensor) -> Tensor:
        """(N,) numbers, one an answer token -> (B, T − 1), 0 elsewhere."""
        grid = values.new_zeros(self.labels.numel()).index_copy(0, self.places, values)
        return grid.view(self.labels.shape)[:, :-1]

    def mean_tokens(self, values: Tensor) -> Tensor:
        """(N,) numbers, one an answer token -> (B,) their mean over each row."""
        return self._on_grid(values).sum(-1) / self.length

    @cached_property
    def theta0(self) -> Answers:
        """The same answers at θ₀, from the frozen copy, without gradients."""
        if self.run_theta0 is None:
            raise TypeError(
                "there is no copy of θ₀ here: name the stream in the objective's logits_at_theta0"
            )
        return self.run_theta0()

    def beside_theta0(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """(N,) ``function`` of (n, K) log-probabilities at θ₀, (n, K) now, and the (n,) place of the
        answer tokens, in chunks of n.

        K is the vocabulary, or with top k each token kept and all others together.
        """
        if self.top_k is not None:
            *kept, offsets = self.top_k
            make = type(self.top_k)
            return in_chunks(
                lambda now, *kept: function(*make(*kept, offsets).align(now)), self.predicted, *kept
            )
        return in_chunks(
            lambda now, then, y: function(then.log_softmax(-1), now.log_softmax(-1), y),
            self.predicted,
            self.theta0.predicted,
            self.targets,
        )

    def hidden_difference(self, layer: int, target: Tensor) -> Tensor:
        """(B,) (1/|y|) Σ_t (1/d) ‖h_t − target_t‖², t over the answer tokens.

        Args:
            target: what broadcasts to (B, T, d).
        """
        distance = (self.hidden[layer].float() - target.float()).square().mean(-1)
        mask = self.labels != IGNORE
        return distance.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


@dataclass(eq=False)
class Streams(Mapping[str, Answers]):
    """Streams of one batch; the model runs on a stream when an objective first asks for it."""

    #: Stream -> tensors, as the data module makes them.
    batch: Mapping[str, Mapping[str, Tensor]]
    #: Tensors of one stream -> predictions at ``places`` of its tokens, answers'; with the keyword
    #: ``whole`` at all.
    run: Callable[..., Predictions]
    #: Stream -> (rows of the set,) summed log-probabilities at θ₀.
    references: Mapping[str, Tensor]
    #: The model that ``run`` runs; needed for ``layers`` and by objectives that read weights.
    lm: Optional[PreTrainedModel] = None
    layers: Collection[int] = ()  # blocks whose output is kept
    #: Gives a context in which ``run`` runs the model at θ₀.
    theta0: Optional[Callable[[], AbstractContextManager[Any]]] = None
    #: Stream -> predictions at θ₀, in place of the copy's.
    top_k: Mapping[str, TopK] = field(default_factory=dict)
    progress: float = 0.0  # share of the run's steps that is done, 0 at the first, 1 at the last
    epoch: int = 0  # counted from 0
    whole: Collection[str] = ()  # streams of which a term needs logits of every position
    #: Terms of the objective that are computed already, without their weights.
    known: Mapping[str, Tensor] = field(default_factory=dict)
    _answers: dict[str, Answers] = field(default_factory=dict, init=False)

    def __getitem__(self, stream: str) -> Answers:
        if stream in self._answers:
            return self._answers[stream]
        tensors = dict(self.batch[stream])
        if "places" not in tensors:
            tensors["places"] = answer_places(tensors["labels"])
        options = {"whole": True} if stream in self.whole else {}
        run, lm, layers = self.run, self.lm, self.layers  # self in a cycle would keep the graph

        def ask(context: Callable[[], AbstractContextManager[Any]]) -> Answers:
            with context(), capture(lm, layers) as hidden:
                found = run(tensors, **options).within(context)
            places = tensors["places"]
            answers = Answers(found, tensors["labels"], places, hidden=hidden)
            if options:
                answers.predicted, answers.everywhere = found.at(places), found
                answers.attention = tensors.get("attention_mask")
            return answers

        answers = self._answers[stream] = ask(nullcontext)
        answers.rows = tensors.get("row")
        if stream in self.references:
            known = self.references[stream].to(answers.labels.device)
            answers.reference = known[answers.rows]
        if stream in self.top_k:
            answers.top_k = self.top_k[stream].rows(answers.rows).to(answers.labels.device)
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

        Once ranks and micro-batches are averaged it is the mean over the global batch: over its
        rows; or, of values that are means over answer tokens but the first ``skipped``, over all
        those tokens.

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
