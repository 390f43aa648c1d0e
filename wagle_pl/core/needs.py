"""What a module needs of its data module: one value, given before any batch is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Optional


@dataclass(frozen=True)
class Needs:
    """What training batches contain, and what is known of the model."""

    streams: Sequence[str] = ("forget", "retain")  # of a batch; the first sets an epoch's length
    repeatable: Collection[str] = ()  # streams that draw the same refusals in every epoch
    #: Streams that get ``mean_tokens``, the mean number of answer tokens of the global batch's rows.
    counted: Collection[str] = ()
    period: Optional[int] = None  # epochs after which the batches repeat; None for never
    #: Gives how many token ids the model knows, once it is loaded: rows with others are refused.
    vocabulary: Callable[[], Optional[int]] = lambda: None
    #: Loads the model's tokenizer, used unless ``data.tokenizer`` names another.
    tokenizer: Optional[Callable[[], Any]] = None
