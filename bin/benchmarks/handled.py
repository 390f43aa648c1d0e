"""Bytes that this process digests, unpacks, draws, reads and writes of a model, and the seconds it takes to."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from wagle_pl.core import tensorfiles, weights
from wagle_pl.masks import bits


class Handled:
    """Counts in ``bytes`` and ``seconds`` by stage, from when it is made: functions of the package are replaced by ones
    that count.

    Stages: ``digested`` weights; ``unpacked`` bits of a mask, but those of a forward or backward pass; ``drawn`` random
    numbers; ``read`` weights of a model's files under ZeRO-3; ``written`` weights, scores and checkpoints.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._watch(weights, "digest", "digested", lambda _, values, start: values.nbytes)
        self._watch(bits, "unpack_part", "unpacked", lambda part, *_: part.numel())
        self._watch(torch, "rand", "drawn", _drawn)
        self._watch(tensorfiles, "fill", "written", lambda size, *_: size)
        self._watch(tensorfiles.TensorFiles, "part", "read", lambda part, *_: part.nbytes)

    def clear(self) -> None:
        """Begin anew."""
        for stage in self.bytes:
            self.bytes[stage], self.seconds[stage] = 0, 0.0

    def _watch(self, owner: Any, name: str, stage: str, size: Callable[..., int]) -> None:
        original = getattr(owner, name)
        self.bytes[stage], self.seconds[stage] = 0, 0.0

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = original(*args, **kwargs)
            self.seconds[stage] += time.perf_counter() - started
            self.bytes[stage] += size(result, *args, **kwargs)
            return result

        setattr(owner, name, watched)
        for module in list(sys.modules.values()):  # those that have imported it by name
            ours = getattr(module, "__name__", "").startswith("wagle_pl")
            if ours and vars(module).get(name) is original:
                setattr(module, name, watched)


def _drawn(numbers: torch.Tensor, *_: Any, dtype: Any = None, **__: Any) -> int:
    return 0 if dtype else numbers.nbytes  # those that scores are tried out on have one
