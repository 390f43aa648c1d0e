"""What a model predicts, without the logits of a whole batch: with a vocabulary of 128k these would
be the largest activation of all.

A forward pass keeps the hidden states of the places that matter. The output head makes logits of
some of them at a time (:func:`in_chunks`), and again in the backward pass, exactly as if there were
one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Optional, Union
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Logits of a chunk at most: 128 MiB of them in fp32. What fits into one is not computed twice.
CHUNK = 1 << 25

#: Models that do more to logits than their head: soft caps (Gemma), a scale (Granite, Cohere).
_BEYOND_THE_HEAD: WeakSet[nn.Module] = WeakSet()


@dataclass(eq=False)
class Predictions:
    """Predictions of the next token at N places: hidden states, and the head that reads them.

    Attributes:
        states: (N, d) hidden states; (N, V) logits if there is no head.
        head: makes logits, in the dtype it computes with.
        context: gives a context in which the head must run.
    """

    states: Tensor
    head: Optional[nn.Module] = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    _logits: Optional[Tensor] = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.states.shape[-1] if self.head is None else self.head.out_features

    @property
    def at_once(self) -> int:
        """Number of places in a chunk."""
        return max(1, CHUNK // self.vocabulary)

    def at(self, places: Tensor) -> Predictions:
        """Those at some of the N places, by index."""
        found = replace(self, states=self.states.index_select(0, places))
        if self._logits is not None:
            found._logits = self._logits.index_select(0, places)
        return found

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> Predictions:
        """The same, with a head that must run in a context."""
        return replace(self, context=context)

    def logits_of(self, states: Tensor) -> Tensor:
        """(n, V) logits of some of the states, in the dtype of the model."""
        if self.head is None:
            return states
        with self.context():
            return self.head(states)

    def logits(self) -> Tensor:
        """(N, V) logits in fp32, all at once; those that fit into a chunk are made once a graph."""
        logits = self.logits_of(self.states) if self._logits is None else self._logits
        if torch.is_grad_enabled() and len(self) <= self.at_once:
            self._logits = logits
        return logits.float()


def in_chunks(function: Callable[..., Any], *arguments: Union[Predictions, Tensor]) -> Any:
    """``function`` of (N, V) logits, without these as a whole.

    Args:
        function: gets (n, V) logits in fp32 for every ``Predictions``, and (n, ...) rows of every
            tensor, n ≤ N; returns (n, ...), or a tuple of such.
        arguments: ``Predictions`` first; all of the same N places.

    Returns:
        (N, ...), or a tuple.
    """
    first = arguments[0]
    if len(first) <= first.at_once:
        return function(*(a.logits() if isinstance(a, Predictions) else a for a in arguments))

    def of_chunk(*rows: Tensor) -> Tensor:
        pairs = zip(arguments, rows, strict=True)
        return function(
            *(a.logits_of(r).float() if isinstance(a, Predictions) else r for a, r in pairs)
        )

    columns = [a.states if isinstance(a, Predictions) else a for a in arguments]
    chunks = zip(*(column.split(first.at_once) for column in columns), strict=True)
    run = partial(checkpoint, of_chunk, use_reentrant=False)
    found = [(run if torch.is_grad_enabled() else of_chunk)(*chunk) for chunk in chunks]
    if isinstance(found[0], tuple):
        return tuple(map(torch.cat, zip(*found, strict=True)))
    return torch.cat(found)


def predict(
    model: PreTrainedModel, places: Tensor, apart: bool = True, **inputs: Any
) -> tuple[Any, Predictions]:
    """Run a model, and find out what it predicts at some places.

    Where the head cannot run on its own it is run here, on these places alone: that of a model that
    does more to logits, or of one whose weights are spread over ranks (ZeRO-3), where each run of a
    layer is collective and ranks have different numbers of chunks.

    Args:
        model: a Hugging Face causal language model.
        places: (N,) indices into the (B, T) tokens, flattened.
        apart: False runs the head here in any case, which makes this one forward pass for certain.
        **inputs: of the model's forward.

    Returns:
        ``(output, predictions)``; the output's logits are not those of the tokens.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    apart = apart and model not in _BEYOND_THE_HEAD and _can_stand_apart(head)
    seen: dict[str, Tensor] = {}

    def shorten(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        seen["states"] = given[0].flatten(0, -2).index_select(0, places)
        return ((seen["states"][:1] if apart else seen["states"])[None], *given[1:])

    def keep(_module: nn.Module, _given: Any, logits: Tensor) -> None:
        seen["logits"] = logits

    hooks = []
    if isinstance(head, nn.Module):
        hooks = [head.register_forward_pre_hook(shorten), head.register_forward_hook(keep)]
    try:
        output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:  # nothing of its own makes the logits
        return output, Predictions(output.logits.flatten(0, -2).index_select(0, places))
    if not apart:
        return output, Predictions(output.logits[0])
    if len(places) and output.logits.data_ptr() != seen["logits"].data_ptr():
        _BEYOND_THE_HEAD.add(model)
        return predict(model, places, **inputs)
    return output, Predictions(seen["states"], head)


def _can_stand_apart(head: Optional[nn.Module]) -> bool:
    """Whether an output head is a layer that says how many logits it makes, and is whole here."""
    return hasattr(head, "out_features") and not any(
        hasattr(parameter, "ds_id") for parameter in head.parameters()
    )
