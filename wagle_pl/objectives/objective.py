"""``Objective``: the base class of all forget terms, and schedules of the terms' weights."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import add
from typing import Any, ClassVar, Literal, Optional, Union, cast

from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.core.registry import resolve
from wagle_pl.core.schema import check_arguments
from wagle_pl.objectives.retain import NONE, RetainTerm
from wagle_pl.objectives.streams import Streams


class Schedule:
    """A number that changes during a run. On the command line: ``cosine:1->0.1@0.5``.

    Args:
        kind: ``linear`` and ``cosine`` go from ``start`` to ``end``; ``step`` jumps to ``end``.
        start: value at the first step.
        end: value from ``until`` on.
        until: share of the run, in (0, 1], at which ``end`` is reached.

    >>> ramp = Schedule("linear", 0.0, 2.0)
    >>> ramp(0.0), ramp(0.25), ramp(1.0)
    (0.0, 0.5, 2.0)
    """

    def __init__(
        self,
        kind: Literal["linear", "cosine", "step"],
        start: float,
        end: float,
        until: float = 1.0,
    ) -> None:
        if not 0 < until <= 1:
            raise WagleError(
                f"a schedule's end is a share of the run and must be in (0, 1], got {until}"
            )
        self.kind = kind
        self.start = start
        self.end = end
        self.until = until

    def __call__(self, progress: float) -> float:
        """The value at a share of the run in [0, 1]; override this for another shape."""
        done = min(1.0, progress / self.until)
        if done == 1.0:
            return self.end
        cosine = (1 - math.cos(math.pi * done)) / 2
        share = {"linear": done, "cosine": cosine, "step": 0.0}[self.kind]
        return self.start + share * (self.end - self.start)


Weight = Union[float, str, Schedule]

#: The terms whose weighted sum is the objective.
TERMS = ("forget_loss", "retain_loss", "penalty")


def as_schedule(value: Weight, option: str) -> Schedule:
    """The schedule of an option: a number, a text such as ``step:1->0@0.5``, or a schedule."""
    if isinstance(value, Schedule):
        return value
    text = str(value).replace(" ", "")
    match = re.fullmatch(r"(linear|cosine|step):([^>@]+)->([^>@]+)(?:@(.+))?", text)
    kind: Any  # linear, cosine or step
    kind, start, end, until = match.groups() if match else ("step", text, text, None)
    try:
        numbers = [float(start), float(end), float(until or 1)]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise WagleError(
            f"{option}: {value!r} is neither a number nor a schedule such as linear:0->1, "
            "cosine:1->0 or step:1->0@0.5"
        )
    return Schedule(kind, *numbers)


def positive(default: float) -> Any:
    """Default of an option that must be above 0: ``beta: float = positive(0.1)``."""
    return field(default=default, metadata={"positive": True})


@dataclass(kw_only=True)
class Objective(ABC):
    """``forget_weight`` × forget term + ``retain_weight`` × retain term.

    Args:
        forget_weight: factor of the forget term: a number, or a schedule over the run such as
            ``linear:0->1``, ``cosine:1->0.1`` or ``step:1->0@0.5`` (from half of the steps on).
        retain_weight: factor of the retain term, in the same forms; with 0 there is no retain term,
            and no retain rows are needed.
        retain: the retain term: ``nll``, ``kl`` (to θ₀), ``hidden_mse`` (of a block, to θ₀),
            ``none``, or a class path to a :class:`~wagle_pl.objectives.RetainTerm`.
        average: ``rows`` takes the mean over a row's tokens, then over rows; ``tokens`` the mean
            over all answer tokens of the global batch, as OpenUnlearning and the Hugging Face
            Trainer do. Terms of whole answers (NPO, SimNPO, DPO) and of hidden states are always
            means over rows.
    """

    #: Whether the forget term is a mean over answer tokens, for ``average: tokens``.
    by_token: ClassVar[bool] = False
    skip_first: ClassVar[int] = 0  # tokens at the start of an answer that it leaves out
    #: Streams that the forget term reads: ``forget``; or the same rows with another answer,
    #: ``refusal`` or ``alternate``.
    forget_streams: ClassVar[tuple[str, ...]] = ("forget",)
    #: Streams whose summed log-probabilities at θ₀ the forget term needs.
    references: ClassVar[tuple[str, ...]] = ()
    logits_at_theta0: ClassVar[bool] = False  # whether the forget term needs predictions at θ₀
    layer: ClassVar[Optional[int]] = None  # the block whose output it reads, if any
    #: Regular expression for the names of the parameters that may move; None lets all move.
    trainable: ClassVar[Optional[str]] = None

    forget_weight: Weight = 1.0
    retain_weight: Weight = 1.0
    retain: Union[RetainTerm, str] = "nll"
    average: Literal["rows", "tokens"] = "rows"

    def __post_init__(self) -> None:
        check_arguments(type(self).__init__, vars(self), "objective.")
        for option in fields(self):
            if option.metadata.get("positive"):
                check_positive(getattr(self, option.name), f"objective.{option.name}")
        self.retain = resolve(RetainTerm, self.retain, "objective.retain")
        if isinstance(self.retain, NONE):
            self.retain_weight = 0.0
        self._forget_schedule = as_schedule(self.forget_weight, "objective.forget_weight")
        self._retain_schedule = as_schedule(self.retain_weight, "objective.retain_weight")
        if not self.streams:
            raise WagleError(
                f"objective {type(self).__name__} has neither a forget nor a retain term left"
            )

    @property
    def retains(self) -> bool:
        """Whether there is a retain term, that is, its weight is not the constant 0."""
        return isinstance(self.retain_weight, (str, Schedule)) or self.retain_weight != 0

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of a training batch; the first sets the epoch's length."""
        return self.forget_streams + (("retain",) if self.retains else ())

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Blocks whose outputs a term reads; known once :meth:`prepare` has seen the model."""
        layers = () if self.layer is None else (self.layer,)
        return tuple(dict.fromkeys(layers + (self.retain.hidden_layers if self.retains else ())))

    @property
    def whole_streams(self) -> tuple[str, ...]:
        """Streams for which a term needs logits at every position."""
        return ("retain",) if self.retains and self.retain.all_positions else ()

    @property
    def needs_theta0(self) -> bool:
        """Whether a term needs whole predictions, or hidden states, at θ₀."""
        retain = self.retains and (self.retain.logits_at_theta0 or bool(self.retain.hidden_layers))
        return self.logits_at_theta0 or retain

    def prepare(self, lm: PreTrainedModel) -> None:
        """Look at the model before the run."""
        if self.retains:
            self.retain.prepare(lm, self.layer)

    @abstractmethod
    def forget_loss(self, at: Streams) -> Tensor:
        """The forget term: (B,), one number for each row of the first forget stream."""

    def retain_loss(self, at: Streams) -> Tensor:
        """The retain term: (B,), one number for each retain row."""
        return cast(RetainTerm, self.retain)(at)

    def penalty(self, at: Streams) -> Optional[Tensor]:
        """A scalar that belongs to no row, added to the loss as it is; None if there is none.

        Parameters of ``at.lm`` that require a gradient are the weights that may move: with a mask,
        1-D vectors of the selected ones.
        """
        return None

    def term(self, name: str, at: Streams) -> Optional[Tensor]:
        """A term of :data:`TERMS` without its weight, a scalar; None if there is none."""
        what, tokens = f"objective {type(self).__name__}", self.average == "tokens"
        if name == "forget_loss" and self.forget_streams:
            stream, values = self.forget_streams[0], self.forget_loss(at)
            by_token = tokens and self.by_token
            return at.mean(stream, values, f"{what}, forget term", by_token, self.skip_first)
        if name == "retain_loss" and self.retains:
            values, by_token = self.retain_loss(at), tokens and self.retain.by_token
            return at.mean("retain", values, f"{what}, retain term", by_token)
        return self.penalty(at) if name == "penalty" else None

    def weights(self, at: Streams) -> dict[str, float]:
        """The weight of each of :data:`TERMS` now."""
        forget, retain = self._forget_schedule(at.progress), self._retain_schedule(at.progress)
        return {"forget_loss": forget, "retain_loss": retain, "penalty": 1.0}

    def __call__(self, at: Streams) -> dict[str, Tensor]:
        """``loss`` and those of its terms that exist, as scalars."""
        computed = {}
        for name in ("retain_loss", "penalty", "forget_loss"):
            propagate = at.propagate.get(name)
            # a term that is propagated at once must not share a graph with the others
            term = self.term(name, at if propagate is None else replace(at))
            computed[name] = term if term is None or propagate is None else propagate(term)
        terms = {name: computed[name] for name in TERMS if computed[name] is not None}
        weights = self.weights(at)
        loss = reduce(add, (weights[name] * term for name, term in terms.items()))
        return {"loss": loss, **terms}

    # -- an objective that changes during a run ----------------------------------------------------

    def after_step(self, losses: Mapping[str, float], epoch: int) -> None:  # noqa: B027
        """Called after a step with its losses, means over the global batch, equal on all ranks."""

    def state_dict(self) -> dict[str, float]:
        """What :meth:`after_step` has changed, for checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:  # noqa: B027
        """Restore what :meth:`state_dict` returned."""
