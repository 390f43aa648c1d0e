"""Numbers that a device computes, read on the host without making the device wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor


class LateReading:
    """Reads numbers once the device has copied them: on a CPU at once, elsewhere at the next reading.

    Whatever must not happen before they are read calls :meth:`settle` first.
    """

    def __init__(self) -> None:
        self._read: Optional[Callable[[], None]] = None

    def start(self, numbers: Tensor, then: Callable[[Any], None]) -> None:
        """Finish the last reading, and start another, after which ``then`` gets the numbers."""
        self.settle()
        device = numbers.device
        on_host = device.type == "cpu"
        copy = numbers.detach().to("cpu", non_blocking=not on_host)
        copied = None if on_host else torch.Event(device)
        if copied is not None:
            copied.record()

        def read() -> None:
            if copied is not None:
                copied.synchronize()
            then(copy.tolist())

        self._read = read
        if self.waits(device):
            self.settle()

    @staticmethod
    def waits(device: torch.device) -> bool:
        """Whether numbers are read at once: only where that costs nothing."""
        return device.type == "cpu"

    def settle(self) -> None:
        """Finish the reading that is outstanding."""
        read, self._read = self._read, None
        if read is not None:
            read()
