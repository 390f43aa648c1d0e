"""Numbers that a device computes, read on the host without making the device wait."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in host memory, made while its device continues to work.

    :meth:`read` waits for the copy alone: a step later it has been made long ago.
    """

    def __init__(self, tensor: Tensor) -> None:
        on_host = tensor.device.type == "cpu"
        self._copy = tensor.detach().to("cpu", non_blocking=not on_host)
        self._made = None if on_host else torch.Event(tensor.device)
        if self._made is not None:
            self._made.record()

    def read(self) -> Tensor:
        if self._made is not None:
            self._made.synchronize()
        return self._copy
