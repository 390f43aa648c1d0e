"""``Objective``: what every forget term has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Optional, Union

from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import resolve
from wagle_pl.objectives.retain import NONE, RetainTerm
from wagle_pl.objectives.schedules import Schedule, as_schedule
from wagle_pl.objectives.streams import Streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Objective(ABC):
    """``forget_weight`` × forget term + ``retain_weight`` × retain term.

    Args:
        forget_weight: factor of the forget term: a number, or a schedule over the run such as
            ``linear:0->1``, ``cosine:1->0.1`` or ``step:1->0@0.5`` (from half of the steps on).
        retain_weight: factor of the retain term, likewise; 0 leaves it out (no retain rows are
            needed then).
        retain: the retain term: ``nll``, ``kl`` (to θ₀), ``hidden_mse`` (of a block, to θ₀),
            ``none``, or a class path to a :class:`~wagle_pl.objectives.RetainTerm`.

    Raises:
        WagleError: if an option has no meaning.
    """

    #: Streams the forget term reads: ``forget``, ``refusal`` (the same rows, answered by a
    #: refusal).
    forget_streams: tuple[str, ...] = ("forget",)
    #: Streams whose summed log-probabilities at θ₀ the forget term needs.
    references: tuple[str, ...] = ()
    #: Streams whose whole predictions (or hidden states) at θ₀ the forget term needs.
    logits_at_theta0: tuple[str, ...] = ()
    #: The block whose output the forget term reads, if any.
    layer: Optional[int] = None
    #: Regular expression that the names of parameters must match to be moved; None moves any.
    trainable: Optional[str] = None

    def __init__(
        self,
        forget_weight: Union[float, str, Schedule] = 1.0,
        retain_weight: Union[float, str, Schedule] = 1.0,
        retain: Union[RetainTerm, str] = "nll",
    ) -> None:
        self.retain = resolve(RetainTerm, retain, "objective.retain")
        self.forget_weight = forget_weight
        self.retain_weight = 0.0 if isinstance(self.retain, NONE) else retain_weight
        self._forget_schedule = as_schedule(forget_weight, "objective.forget_weight")
        self._retain_schedule = as_schedule(self.retain_weight, "objective.retain_weight")
        if not self.streams:
            raise WagleError(
                f"objective {type(self).__name__} has neither a forget nor a retain term left"
            )

    @property
    def retains(self) -> bool:
        """Whether there is a retain term: its weight is not the constant 0."""
        return isinstance(self.retain_weight, (str, Schedule)) or self.retain_weight != 0

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of a training batch; the first sets the epoch's length."""
        return self.forget_streams + (("retain",) if self.retains else ())

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Blocks whose outputs a term reads; known once :meth:`prepare` has seen the model."""
        own = () if self.layer is None else (self.layer,)
        return tuple(dict.fromkeys(own + (self.retain.hidden_layers if self.retains else ())))

    @property
    def theta0_streams(self) -> tuple[str, ...]:
        """Streams whose predictions at θ₀ a term needs."""
        retain = ("retain",) if self.retains and self.retain.logits_at_theta0 else ()
        return tuple(dict.fromkeys(self.logits_at_theta0 + retain))

    @property
    def whole_streams(self) -> tuple[str, ...]:
        """Streams of which a term needs logits of every position."""
        return ("retain",) if self.retains and self.retain.all_positions else ()

    @property
    def needs_hidden_at_theta0(self) -> bool:
        """Whether hidden states at θ₀ are needed, which only a copy of the model gives."""
        return self.retains and bool(self.retain.hidden_layers)

    def prepare(self, lm: PreTrainedModel) -> None:
        """Look at the model before the run.

        Raises:
            WagleError: if an option does not fit it.
        """
        if self.retains:
            self.retain.prepare(lm, self.layer)

    @abstractmethod
    def forget_loss(self, at: Streams) -> Tensor:
        """The forget term: (B,), one number for each row of the first forget stream."""

    def retain_loss(self, at: Streams) -> Tensor:
        """The retain term: (B,), one number for each retain row."""
        return self.retain(at)

    def penalty(self, at: Streams) -> Optional[Tensor]:
        """A scalar that belongs to no row, added to the loss as it is; None for none."""
        return None

    def __call__(self, at: Streams) -> dict[str, Tensor]:
        """``loss`` and its parts (``forget_loss``, ``retain_loss``, ``penalty``), scalars."""
        parts: dict[str, Tensor] = {}
        terms = []
        name = f"objective {type(self).__name__}"
        if self.forget_streams:
            parts["forget_loss"] = at.mean(
                self.forget_streams[0], self.forget_loss(at), f"{name}, forget term"
            )
            terms.append(self._forget_schedule(at.progress) * parts["forget_loss"])
        if self.retains:
            parts["retain_loss"] = at.mean("retain", self.retain_loss(at), f"{name}, retain term")
            terms.append(self._retain_schedule(at.progress) * parts["retain_loss"])
        penalty = self.penalty(at)
        if penalty is not None:
            parts["penalty"] = penalty
            terms.append(penalty)
        return {"loss": sum(terms[1:], start=terms[0]), **parts}
