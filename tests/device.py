"""A counting device: an accelerator that is not there, for tests on machines without one.

Tensors on ``sim:0`` keep their data in CPU memory, but torch takes them for tensors of another device: an
operation that mixes them with CPU tensors raises, as it would on a GPU. Counted are what makes a GPU wait for the host
(with the line that caused it), the bytes that are copied between host and device, the operations launched, and the
bytes that live tensors hold. Numbers are exact, and times mean nothing.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

_setup_privateuseone_for_python_backend("sim")
DEVICE = torch.device("sim", 0)
torch.get_device_module("sim").get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]

#: Operations whose result the host must see: a GPU's queue runs empty.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
}
#: Operations that reserve memory, and launch nothing.
ALLOCATING = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty")}
COPIES = {"aten::copy_", "aten::_copy_from", "aten::_to_copy"}
HERE = Path(__file__)


class Counts:
    """What the device has counted since :meth:`reset`."""

    def __init__(self) -> None:
        self.live: Counter[int] = Counter()  # bytes by storage
        self._users: Counter[int] = Counter()  # tensors by storage
        self.reset()

    def reset(self) -> None:
        self.waits: Counter[str] = Counter()  # by the line that caused them
        self.launches: Counter[str] = Counter()  # by operation
        self.to_device = self.to_host = 0  # bytes
        self.peak = self.bytes

    @property
    def bytes(self) -> int:
        """Bytes that live tensors of the device hold."""
        return self.live.total()

    def wait(self, operation: str) -> None:
        frames = [
            frame
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and frame.filename != str(HERE)
        ]
        place = frames[-1]
        self.waits[f"{Path(place.filename).name}:{place.lineno} {operation}"] += 1

    def hold(self, tensor: CountingTensor) -> None:
        """Count a tensor's storage until its last tensor is freed."""
        storage = tensor.raw.untyped_storage()
        key = storage._cdata
        self.live[key] = storage.nbytes()
        self._users[key] += 1
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(tensor, self._release, key, tensor.raw)

    def _release(
        self, key: int, raw: Tensor
    ) -> None:  # with raw, so that the key is not used again
        self._users[key] -= 1
        if not self._users[key]:
            del self.live[key], self._users[key]


COUNTS = Counts()


class CountingTensor(torch.Tensor):
    """A tensor of the counting device; ``raw`` holds its data in CPU memory."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> CountingTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        tensor.raw = raw
        COUNTS.hold(tensor)
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})

    def tolist(self) -> Any:
        COUNTS.wait("tolist")
        return self.raw.tolist()

    def __repr__(self) -> str:
        return f"{self.raw!r}, on {DEVICE}"


def run(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the data of its tensors, and count it."""
    name = operation.overloadpacket._qualified_op_name
    flat, _ = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, CountingTensor)]
    others = [x for x in tensors if not isinstance(x, CountingTensor) and x.dim()]
    target = next((x for x in flat if isinstance(x, torch.device)), None)
    if ours and others and name not in COPIES:
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(f"{name} mixes the device with CPU tensors of shapes {shapes}")
    copies_back = _count_copy(name, args, target, kwargs)
    if ours and name in WAITING:
        COUNTS.wait(name)
    elif not _is_view(operation) and name not in ALLOCATING:
        COUNTS.launches[name] += 1
    out = operation(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    if copies_back or not (ours or _is_ours(target)):
        return out
    ours_by_id = {id(tensor.raw): tensor for tensor in ours}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = ours_by_id.get(id(value))
        return CountingTensor(value) if known is None else known

    return tree_map(wrap, out)


def _count_copy(name: str, args: Any, target: Optional[torch.device], kwargs: Any) -> bool:
    """Count a copy between host and device; whether its result is on the host."""
    if name in ("aten::copy_", "aten::_copy_from"):
        to, source = (args[0], args[1]) if name == "aten::copy_" else (args[1], args[0])
    elif name == "aten::_to_copy":
        to, source = None, args[0]
    else:
        return _is_host(target)
    from_us = isinstance(source, CountingTensor)
    to_us = (
        isinstance(to, CountingTensor)
        if to is not None
        else _is_ours(target) or (from_us and target is None)
    )
    size = source.numel() * source.element_size()
    if from_us and not to_us:
        COUNTS.to_host += size
        if not (kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:3] == (True,))):
            COUNTS.wait("copy to the host")
    elif to_us and not from_us:
        COUNTS.to_device += size
    return not to_us


def _is_ours(device: Optional[torch.device]) -> bool:
    return device is not None and device.type == DEVICE.type


def _is_host(device: Optional[torch.device]) -> bool:
    return device is not None and device.type == "cpu"


def _raw(value: Any) -> Any:
    if isinstance(value, torch.device) and _is_ours(value):
        return torch.device("cpu")
    return value.raw if isinstance(value, CountingTensor) else value


def _is_view(operation: Any) -> bool:
    """Whether an operation launches nothing."""
    returns = operation._schema.returns
    aliases = [r.alias_info for r in returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(lambda operation, *args, **kwargs: run(operation, args, kwargs), "PrivateUse1")
_tensor, _Generator = torch.tensor, torch.Generator


def _make_tensor(data: Any, **options: Any) -> Tensor:
    """``torch.tensor``, which has no kernel for a device in Python."""
    device = options.pop("device", None)
    device = torch.device(device) if device is not None else torch.empty(0).device
    if not _is_ours(device):
        return _tensor(data, device=device, **options)
    requires_grad = options.pop("requires_grad", False)
    return _tensor(data, device="cpu", **options).to(device).requires_grad_(requires_grad)


class _MadeGenerator(torch.Generator):
    """A generator of the device draws what one of the CPU draws."""

    def __new__(cls, device: Any = "cpu") -> Any:
        device = torch.device(device)
        return _Generator("cpu" if _is_ours(device) else device)


class _Event:
    """An event of the device, which has no queue: whatever comes before it is done."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


class CountingAccelerator(Accelerator):
    """The counting device as a Trainer's accelerator."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return DEVICE.type


@contextmanager
def counting() -> Iterator[Counts]:
    """The device's counts, from 0; only within may its tensors be made."""
    with (
        patch("torch.tensor", _make_tensor),
        patch("torch.Generator", _MadeGenerator),
        patch("torch.Event", _Event),
    ):
        COUNTS.reset()
        yield COUNTS


def on_device(lm: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights on the device, tied as before; :meth:`Module.to` unties them."""
    lm.to(DEVICE)
    lm.tie_weights()
    return lm


def trainer(**options: Any) -> L.Trainer:
    """A Trainer on the counting device that writes and prints nothing; options go before that."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    strategy = SingleDeviceStrategy(DEVICE, accelerator=CountingAccelerator())
    options = {"strategy": strategy, "inference_mode": False, **options}
    return L.Trainer(**{**dict.fromkeys(off, False), **options})
