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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Optional
from unittest.mock import patch

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
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
    "aten::bincount",
}
#: Operations that launch nothing: they reserve memory, or are views.
NOT_LAUNCHED = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty")}
NOT_LAUNCHED |= {"aten::_unsafe_view"}
COPIES = {"aten::copy_", "aten::_copy_from", "aten::_to_copy"}
HERE = Path(__file__)


#: What a tensor's memory is for, see :meth:`Counts.name`.
KINDS = ("weights", "values", "gradients", "state", "activations", "other")


class Counts:
    """What the device has counted since :meth:`reset`."""

    def __init__(self) -> None:
        self._live: dict[int, tuple[int, int]] = {}  # storage -> its number, its bytes
        self._users: Counter[int] = Counter()  # storage -> its tensors
        self._kinds: dict[int, str] = {}  # number of a storage -> kind
        self._numbers, self.bytes = count(), 0
        self.reset()

    def reset(self) -> None:
        self.waits: Counter[str] = Counter()  # by the line that caused them
        self.launches: Counter[str] = Counter()  # by operation
        self.to_device = self.to_host = 0  # bytes
        self.peak = self.bytes  # bytes that live tensors held at most
        self._history: list[tuple[int, int]] = [*self._live.values()]  # numbers, bytes (freed: < 0)
        kept = {number for number, _ in self._history}
        self._kinds = {number: kind for number, kind in self._kinds.items() if number in kept}

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
        if key not in self._live:
            number, size = next(self._numbers), storage.nbytes()
            self._live[key] = number, size
            self._kinds[number] = _kind_now()
            self._add(number, size)
        self._users[key] += 1
        # with raw, so that the key is not used again
        weakref.finalize(tensor, self._release, key, tensor.raw).atexit = False

    def _release(self, key: int, raw: Tensor) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            number, size = self._live.pop(key)
            self._add(number, -size)

    def _add(self, number: int, size: int) -> None:
        self._history.append((number, size))
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def name(self, kind: str, tensors: Iterable[Optional[Tensor]]) -> None:
        """Say what tensors are for: one of :data:`KINDS`. What nobody names is an activation if it was made with
        autograd on, a gradient if in a backward pass, else other."""
        for tensor in tensors:
            if isinstance(tensor, CountingTensor):
                number, _ = self._live[tensor.raw.untyped_storage()._cdata]
                self._kinds[number] = kind

    def at_peak(self) -> dict[str, int]:
        """Kind -> bytes when most were held."""
        held: Counter[str] = Counter()
        most: dict[str, int] = {}
        peak = total = 0
        for number, size in self._history:
            held[self._kinds[number]] += size
            total += size
            if total > peak:
                peak, most = total, dict(held)
        return {kind: most.get(kind, 0) for kind in KINDS}


def _kind_now() -> str:
    if torch.is_grad_enabled():  # in the backward pass too, where blocks are computed again
        return "activations"
    return "gradients" if torch._C._current_graph_task_id() >= 0 else "other"


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

    def __reduce_ex__(self, protocol: Any) -> Any:  # checkpoints are loaded on the CPU
        return self.raw.__reduce_ex__(protocol)

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def __repr__(self) -> str:
        return f"{self.raw!r}, on {DEVICE}"


def run(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the data of its tensors, and count it."""
    name = operation.overloadpacket._qualified_op_name
    flat = [*_leaves(args), *_leaves(tuple(kwargs.values()))]
    tensors = [x for x in flat if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, CountingTensor)]
    others = [x for x in tensors if not isinstance(x, CountingTensor) and x.dim()]
    target = next((x for x in flat if isinstance(x, torch.device)), None)
    if ours and others and name not in COPIES:
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(f"{name} mixes the device with CPU tensors of shapes {shapes}")
    copies_back = _count_copy(name, args, target, kwargs)
    if ours and (name in WAITING or _counts_ones(name, args, kwargs)):
        COUNTS.wait(name)
    elif not _is_view(operation) and name not in NOT_LAUNCHED:
        COUNTS.launches[name] += 1
    raw = {name: _map(_raw, value) for name, value in kwargs.items()}
    out = operation(*_map(_raw, args), **raw)
    if copies_back or not (ours or _is_ours(target)):
        return out
    ours_by_id = {id(tensor.raw): tensor for tensor in ours}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = ours_by_id.get(id(value))
        return CountingTensor(value) if known is None else known

    return _map(wrap, out)


def _leaves(values: Any) -> Iterator[Any]:
    """What lists and tuples hold; operations take and return nothing deeper, and torch's pytree is slow."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _map(function: Callable[[Any], Any], values: Any) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(_map(function, value) for value in values)
    return function(values)


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


def _counts_ones(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation's result is as large as its tensors say: an index that is a mask."""
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    masks = args[1] if name in ("aten::index", "aten::index_put_") else ()
    return any(mask is not None and mask.dtype == torch.bool for mask in masks)


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
# torch computes it in parts where a device has no kernel, as every GPU does
_KERNELS = torch.library.Library("aten", "IMPL")
for _name in ("silu_backward",):
    _operation = getattr(torch.ops.aten, _name).default
    _KERNELS.impl(_name, lambda *args, _of=_operation: run(_of, args, {}), "PrivateUse1")
# autocast, whose kernels are each device's own: products of matrices take its dtype, the rest the dtypes they get
_AUTOCAST = torch.library.Library("_", "IMPL")
_AUTOCAST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_NARROW: dict[int, Tensor] = {}  # of weights, until the outermost autocast ends


def _narrow(value: Any) -> Any:
    """A tensor in autocast's dtype, a weight once for all its uses."""
    if not (isinstance(value, CountingTensor) and value.dtype == torch.float32):
        return value
    dtype = torch.get_autocast_dtype(DEVICE.type)
    if not (value.is_leaf and value.requires_grad and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    if id(value) not in _NARROW:
        _NARROW[id(value)] = value.to(dtype)
    return _NARROW[id(value)]


def _narrow_product(operation: Any, *args: Any) -> Any:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(key):
        return operation(*_map(_narrow, args))


for _name in ("linear", "matmul", "mm", "bmm", "addmm"):
    _operation = getattr(torch.ops.aten, _name).default
    _KERNELS.impl(_name, partial(_narrow_product, _operation), "AutocastPrivateUse1")


def _end_autocast() -> None:
    _NARROW.clear()
    _clear_autocast_cache()


_clear_autocast_cache = torch.clear_autocast_cache
_tensor, _Generator, _attention = torch.tensor, torch.Generator, F.scaled_dot_product_attention


def _make_tensor(data: Any, **options: Any) -> Tensor:
    """``torch.tensor``, which has no kernel for a device in Python."""
    device = options.pop("device", None)
    device = torch.device(device) if device is not None else torch.empty(0).device
    if not _is_ours(device):
        return _tensor(data, device=device, **options)
    requires_grad = options.pop("requires_grad", False)
    return _tensor(data, device="cpu", **options).to(device).requires_grad_(requires_grad)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in one fused operation, as on a GPU, unless its second derivative is asked for."""
    if not isinstance(query, CountingTensor) or not torch.backends.cuda.flash_sdp_enabled():
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if torch.is_autocast_enabled(DEVICE.type):
        query, key, value = map(_narrow, (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.masked_fill_(attn_mask.logical_not(), -torch.inf)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


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
        patch("torch.clear_autocast_cache", _end_autocast),
        patch("torch.nn.functional.scaled_dot_product_attention", _attend),
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
    if (precision := options.get("precision", "")).endswith(
        "-mixed"
    ):  # Lightning takes CUDA's autocast
        del options["precision"]
        options["plugins"] = MixedPrecision(precision, DEVICE.type)
    options = {"strategy": strategy, "inference_mode": False, **options}
    return L.Trainer(**{**dict.fromkeys(off, False), **options})
