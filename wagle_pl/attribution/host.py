"""Sums of gradients where a device has no room for them: in host memory, and in files."""

from __future__ import annotations

import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Optional

import torch
from torch import Tensor

CHUNK = 1 << 20  # numbers widened to fp32 at a time


class HostAdder:
    """Adds tensors to fp32 sums in host memory, in order, in a thread during the backward pass.

    A tensor on a CUDA device is copied through one of two pinned buffers, on a separate stream; one
    on another device waits for its copy. At most two (without CUDA, one) are pending: :meth:`add`
    waits for a buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: Queue[Tensor] = Queue()
        for _ in range(2 if self._stream else 1):
            self._buffers.put(torch.empty(0, dtype=torch.uint8))
        self._pending: list[Future[None]] = []

    def add(self, total: Tensor, values: Tensor) -> None:
        """Add ``values``, which must not change any more, to ``total`` of the same shape."""
        buffer, copied = self._buffers.get(), None
        if self._stream is not None and values.is_cuda:
            size = values.numel() * values.itemsize
            if len(buffer) < size:
                buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            here = buffer[:size].view(values.dtype).view(values.shape)
            self._stream.wait_stream(torch.cuda.current_stream(values.device))
            with torch.cuda.stream(self._stream):
                here.copy_(values, non_blocking=True)
                copied = self._stream.record_event()
            values.record_stream(self._stream)
            values = here
        else:
            values = values.to(total.device)
        self._pending.append(self._thread.submit(self._add, total, values, buffer, copied))

    @torch.no_grad()
    def _add(
        self, total: Tensor, values: Tensor, buffer: Tensor, copied: Optional[torch.cuda.Event]
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            parts = (tensor.reshape(-1).split(CHUNK) for tensor in (total, values))
            for into, part in zip(*parts, strict=True):
                into.add_(part.float())
        finally:
            self._buffers.put(buffer)

    def wait(self) -> None:
        """Wait until all has been added; raises the error of an addition that failed."""
        pending, self._pending = self._pending, []
        for addition in pending:
            addition.result()


def on_disk(values: Tensor, folder: Optional[Path] = None) -> Tensor:
    """An fp32 tensor moved into a file and read from there when it is used.

    The file has no name, so it disappears with the tensor or the process.
    """
    if not values.numel():
        return values
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".sums-") as file:
        file.write(values.detach().cpu().contiguous().reshape(-1).numpy().data.cast("B"))
        file.flush()
        mapped = torch.from_file(file.name, size=values.numel(), dtype=torch.float32)
    return mapped.view(values.shape)
