"""Selected weights as the only parameters of a model: why a frozen weight cannot move.

:class:`SelectedWeights` changes how a model holds its weights while it is trained. Each tensor
becomes two things: the *dense* tensor, which is no parameter and no buffer, and a 1-D parameter,
the *values* of its selected weights, in fp32 whatever the dtype of the model.

* In the forward pass a layer reads ``weight`` and gets the dense tensor. If the values have
  changed, they are written into the dense tensor first, rounded to its dtype.
* In the backward pass the gradient of the dense tensor is computed as always; its selected entries
  become the gradient of the values, and the rest is freed.
* So an optimiser, weight decay, clipping, noise, an averaging callback or a communication hook sees
  values alone. A frozen weight is in no list that any of them goes through: it is never read, and
  nothing but the values is written.
* A NaN in the values or in their gradient reaches selected weights alone.
* The values and the optimiser's state are fp32 under ``bf16-true`` too, so that steps smaller than
  half a unit in the last place of bf16 add up. The model's weights are the rounded values.
* A checkpoint holds the values. The dense tensor comes from the base model's files.

Values take 4 bytes, their places 4, and so do their gradients. With ``split`` a bf16 weight is the
upper half of its value and only the 16 bits below are kept beside it; places are kept as one bit a
weight, and gradients in bf16: for masks that select nearly all of a model.

:meth:`SelectedWeights.release` writes the values once more and gives the model its ordinary
parameters back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import MethodType
from typing import Any, Optional

import torch
from torch import Tensor, nn

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import assign, gathered, in_shares, is_linear, share_of
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import (
    chunk_of,
    count_bits,
    iter_places,
    join_halves,
    pack_bits,
    place,
    put_,
    split_halves,
    take_,
    unpack_bits,
    unpack_part,
)

#: What the parameter of a tensor's selected weights is called: the tensor's name and this.
SUFFIX = "_selected"


class _Select(torch.autograd.Function):
    """The dense tensor as a function of the values."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, dense: Tensor, tensor: SelectedTensor, bits: Optional[Tensor]
    ) -> Tensor:
        ctx.tensor = tensor
        ctx.save_for_backward(bits)  # so that they are not kept where blocks are recomputed
        return dense.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], None, None, None]:
        return ctx.tensor.take_gradient(gradient, *ctx.saved_tensors), None, None, None


class SelectedTensor:
    """A tensor of a model and the values of its selected weights.

    Args:
        parameter: the model's own parameter: the dense tensor. Sharded over ranks under ZeRO-3.
        packed: its packed bits, see :mod:`wagle_pl.masks.bits`; None where all are selected.
        masters: keep values in fp32 where the dense tensor is narrower. False for DeepSpeed, whose
            optimisers do so.
        split: keep values of a bf16 tensor as halves, and their gradients in this dtype.

    Attributes:
        values: the parameter that is trained: (selected,), or of the tensor's shape where all are
            selected; None where none is. It is ``parameter`` itself if that needs no other dtype
            (:attr:`is_plain`), and empty but inside :meth:`whole_values` if :attr:`is_split`.
        gradient: that of the values, if :attr:`is_split`.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        packed: Optional[Tensor],
        masters: bool = True,
        split: Optional[torch.dtype] = None,
    ) -> None:
        self.parameter = parameter
        self.masters = masters
        self.values: Optional[nn.Parameter] = None
        self.theta0: Optional[Tensor] = None
        self.gradient: Optional[Tensor] = None
        self.dense_gradient: Optional[Tensor] = None
        self.in_place = self.at_theta0 = self.keeps_dense_gradient = False
        self._split = split
        self._index: Optional[Tensor] = None
        self._packed: Optional[Tensor] = None  # of this rank's share, if the tensor is sharded
        self._own = slice(0)  # the values of that
        self._kept: Optional[Tensor] = None
        self._lower: Optional[Tensor] = None
        self._buffer: Optional[Tensor] = None
        self._narrow: Optional[Tensor] = None
        self._written: dict[torch.dtype, Any] = {}
        size = getattr(parameter, "ds_numel", parameter.numel())
        self.is_sharded = hasattr(parameter, "ds_id")  # ZeRO-3
        if packed is None:
            self.count = size
        else:
            self.count = self._keep_share(packed) if self.is_sharded else count_bits(packed)
        self.is_partial = 0 < self.count < size
        narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        self.is_plain = self.count == size and not (masters and narrow)
        self.is_split = split is not None and self.count > 0 and not self.is_plain
        parameter.requires_grad_(self.is_plain)
        if self.is_plain:
            self.values = parameter
        if self.is_plain or not self.count:
            return
        dtype = torch.promote_types(parameter.dtype, torch.float32 if masters else parameter.dtype)
        if self.is_sharded and self.is_partial:
            values = self._taken_by_all().to(dtype)
        else:
            if self.is_partial and self.is_split:
                self._packed = packed.to(parameter.device, copy=True)
            elif self.is_partial:
                places = iter_places(packed, size, chunk_of(parameter))
                index = torch.cat([p if size > 2**31 else p.int() for p in places])
                self._index = index.to(parameter.device)
            with gathered(parameter) as dense:
                values = self.taken(dense.detach(), dtype)
        if self.is_split:
            self._lower = torch.zeros_like(values, dtype=torch.int16)
            values = values.new_empty(0)
        self.values = nn.Parameter(values)
        if self.is_sharded:  # now, rather than with all others when DeepSpeed's engine is made
            parameter.convert_to_zero_parameters([self.values])
        self._written = {parameter.dtype: self._version()}

    def _keep_share(self, packed: Tensor) -> int:
        """Keep the bits of this rank's share, which alone are read; the number of all. Collective."""
        start, share = share_of(self.parameter)
        own = pack_bits(unpack_part(packed, start, start + len(share)))
        each = (self.parameter.partition_numel() + 7) // 8
        self._packed = torch.cat([own, own.new_zeros(each - len(own))]).to(self.parameter.device)
        counts, rank = distributed.all_gather([count_bits(own)]), distributed.rank()
        self._own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return sum(counts)

    def _taken_by_all(self) -> Tensor:
        """The selected entries, of which each rank takes those of its share. Collective."""
        _, share = share_of(self.parameter)
        own = unpack_bits(self._packed, share.shape).to(share.device)
        return distributed.all_gather_uneven(share[own].to(self.parameter.device))

    def bits(self) -> Optional[Tensor]:
        """The ranks' packed bits, a row each, if the tensor is sharded and partial. Collective."""
        if not (self.is_sharded and self.is_partial):
            return None
        if self._kept is None:
            bits = distributed.all_gather_tensor(self._packed).view(-1, len(self._packed))
            if not self.parameter.ds_persist:
                return bits
            self._kept = bits  # a small tensor, which stays whole on every rank
        return self._kept

    def places(self, bits: Optional[Tensor] = None) -> Iterable[Tensor]:
        """Places of the values in the flattened tensor, piece by piece, if it is partial; given the
        ranks' :meth:`bits` if it is sharded."""
        chunk = chunk_of(self.parameter)
        if self._index is not None:
            yield from self._index.split(chunk)
        elif bits is None:
            yield from iter_places(self._packed, self.parameter.numel(), chunk)
        else:
            each, size = self.parameter.partition_numel(), self.parameter.ds_numel
            for first, row in zip(range(0, size, each), bits, strict=False):
                for places in iter_places(row, min(each, size - first), chunk):
                    yield places + first

    def taken(self, dense: Tensor, dtype: torch.dtype, bits: Optional[Tensor] = None) -> Tensor:
        """A new tensor of the selected entries of a dense one, in a dtype."""
        if not self.is_partial:
            return dense.to(dtype, copy=True)
        return take_(dense.new_empty(self.count, dtype=dtype), dense, self.places(bits))

    def placed(self, values: Tensor) -> Tensor:
        """A new dense tensor of the values, 0 where nothing is selected; not sharded."""
        if not self.is_partial:
            return values.view(self.parameter.shape).clone()
        dense = values.new_zeros(self.parameter.shape)
        put_(dense, self.places(), values)
        return dense

    def _take_(self, out: Tensor, dense: Tensor, add: bool = False) -> Tensor:
        if self.is_partial:
            return take_(out, dense, self.places(), add)
        return out.add_(dense) if add else out.copy_(dense)

    # -- values ------------------------------------------------------------------------------------

    def value(self) -> Tensor:
        """The values, whole."""
        if not self.is_split:
            return self.values.detach()
        upper = self.taken(self.parameter.detach(), torch.bfloat16)
        values = torch.empty_like(upper, dtype=torch.float32)
        for part, high, low in self._pieces(values, upper):
            part.copy_(join_halves(high, low))
        return values

    @torch.no_grad()
    def store(self, values: Tensor) -> None:
        """Set split values."""
        values = values.to(self.parameter.device).view(self._lower.shape)
        upper = torch.empty_like(values, dtype=torch.bfloat16)
        for part, high, low in self._pieces(values, upper):
            for half, new in zip((high, low), split_halves(part), strict=True):
                half.copy_(new)
        self._put(self.parameter, upper)

    def _pieces(self, values: Tensor, upper: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Values and their halves, piece by piece."""
        chunk = chunk_of(values)
        return zip(*(t.view(-1).split(chunk) for t in (values, upper, self._lower)), strict=True)

    @contextmanager
    def whole_values(self) -> Iterator[None]:
        """Split values and their gradient in fp32, while inside, for an optimiser's step."""
        self.values.data = self.value()
        self.values.grad = None if self.gradient is None else self.gradient.float()
        self.gradient = None
        yield
        self.store(self.values.data)
        self.values.grad = None
        self.values.data = self.values.data.new_empty(0)

    def _put(self, dense: Tensor, values: Tensor) -> None:
        if self.is_partial:
            put_(dense, self.places(), values)
        else:
            dense.copy_(values)

    def _version(self) -> tuple[int, int]:
        return self.values._version, self.values.data_ptr()

    def changed(self) -> None:
        """Have the values written anew: they may have changed unseen by torch (``.data``)."""
        self._written.clear()

    @torch.no_grad()
    def write(self, narrow: Optional[Tensor] = None) -> Tensor:
        """The dense tensor, or a narrow copy, with the values in it, if they have changed."""
        dense = self.parameter if narrow is None else narrow
        if self.values is not None and not self.is_plain and not self.is_split:
            version = self._version()
            if self._written.get(dense.dtype) != version:
                self._put(dense, self.values)
                self._written[dense.dtype] = version
        return dense

    def _for_autocast(self) -> Optional[Tensor]:
        """The tensor in autocast's dtype, else made anew in each forward pass; None without one."""
        device = self.parameter.device.type
        dtype = torch.get_autocast_dtype(device)
        if not torch.is_autocast_enabled(device) or self.parameter.dtype != torch.float32:
            return None
        if self._narrow is None or self._narrow.dtype != dtype:
            self._narrow = self.write().detach().to(dtype)
        return self.write(self._narrow)

    # -- the forward and the backward pass ---------------------------------------------------------

    def weight(self, multiplies: bool = False) -> Tensor:
        """What a layer computes with; in autocast's dtype if it only multiplies matrices."""
        if self.at_theta0 and self.theta0 is not None:
            return self._with(self.theta0)
        if self.is_plain:
            return self.parameter
        if self.is_sharded:
            if self.values is None:
                return self.parameter
            if self.parameter.numel() < self.parameter.ds_numel:
                return self.parameter  # not gathered: somebody wants to know its dtype or device
            bits = self.bits()
            return _Select.apply(self.values, self._with(self.values.detach(), bits), self, bits)
        narrow = self._for_autocast() if multiplies else None
        dense = self.write() if narrow is None else narrow
        if not torch.is_grad_enabled() or (self.values is None and not self.keeps_dense_gradient):
            return dense
        # a frozen tensor whose gradient is asked for needs something that requires one
        values = torch.zeros((), requires_grad=True) if self.values is None else self.values
        return _Select.apply(values, dense, self, None)

    def _with(self, values: Tensor, bits: Optional[Tensor] = None) -> Tensor:
        """A new tensor with these values at the selected places."""
        if not self.is_partial:
            return values.to(self.parameter.dtype).view(self.parameter.shape)
        dense = self.parameter.detach().clone()
        put_(dense, self.places(bits), values)
        return dense

    def take_gradient(self, gradient: Tensor, bits: Optional[Tensor] = None) -> Optional[Tensor]:
        """The gradient of the values, from that of the dense tensor."""
        if self.keeps_dense_gradient:
            if self.dense_gradient is None:
                self.dense_gradient = torch.zeros_like(gradient, dtype=torch.float32)
            self.dense_gradient += gradient
        if self.values is None:
            return None
        if self.is_split and self.gradient is None:
            self.gradient = self.taken(gradient, self._split)
        elif self.is_split:
            self._take_(self.gradient, gradient, add=True)
        elif not self.in_place:
            return self.taken(gradient, self.values.dtype, bits)
        elif self.values.grad is None:
            self._buffer = torch.empty_like(self.values) if self._buffer is None else self._buffer
            self.values.grad = self._take_(self._buffer, gradient)
        else:
            self._take_(self.values.grad, gradient, add=True)
        return None

    # -- θ₀, devices and dtypes, the end -----------------------------------------------------------

    def apply_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What ``nn.Module.to`` and its like do to a parameter, for all but the values."""
        if not self.is_plain and not self.is_sharded:
            self.parameter.data = fn(self.parameter.data)
        device = self.parameter.device
        self._narrow = self._buffer = None
        for name in ("_index", "_packed", "_lower"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(device))
        if self.theta0 is not None:
            self.theta0 = self.theta0.to(device, self.parameter.dtype)
        self.changed()

    @torch.no_grad()
    def merge(self, dtype: Optional[torch.dtype] = None) -> None:
        """Leave the values in the dense tensor, of this dtype; a collective if it is sharded."""
        self.at_theta0 = self.keeps_dense_gradient = False
        self._narrow = self._buffer = None
        if self.is_sharded:
            self._merge_share()
            return
        if dtype is not None:
            values = None if self.values is None or self.is_plain else self.value()
            self.parameter.data = self.parameter.data.to(dtype)
            if values is not None:
                self._put(self.parameter, values)
        self.changed()
        self.write()

    def _merge_share(self) -> None:
        """Leave the values of a sharded tensor in each rank's share of it. Collective."""
        if not self.is_partial:
            return
        if not in_shares(self.parameter):
            bits = self.bits()
            with gathered(self.values) as values:
                whole = self._with(values, bits).view(-1)
            assign(self.parameter, lambda start, stop: whole[start:stop])
            return
        _, share = share_of(self.parameter)
        own = unpack_bits(self._packed, share.shape).to(share.device)
        with gathered(self.values) as values:
            merged = share.masked_scatter(own, values[self._own].to(share.device))
        assign(self.parameter, lambda start, stop: merged)


class SelectedWeights:
    """A model whose selected weights are its only parameters, until :meth:`release`.

    Args:
        lm: the model, changed in place: its parameters are replaced by values, named after them.
        mask: which weights are selected; None selects all that require a gradient, and leaves the
            others as they are.
        masters, split: see :class:`SelectedTensor`; only bf16 weights are split.
        keep_theta0: keep the values as they are now, for :meth:`at_theta0`.
        keep_dense_gradients: add up the gradients of whole tensors too, for
            :meth:`clip_by_dense_norm`.
    """

    def __init__(
        self,
        lm: nn.Module,
        mask: Optional[WeightMask] = None,
        masters: bool = True,
        split: Optional[torch.dtype] = None,
        keep_theta0: bool = False,
        keep_dense_gradients: bool = False,
    ) -> None:
        self.lm = lm
        self.keeps_dense_gradients = keep_dense_gradients
        self.tensors: dict[str, SelectedTensor] = {}
        by_parameter: dict[nn.Parameter, SelectedTensor] = {}
        for name, parameter in list(lm.named_parameters()):
            if mask is None and not parameter.requires_grad:
                continue
            packed = None if mask is None else mask.packed(name)
            halves = split if parameter.dtype == torch.bfloat16 else None
            tensor = SelectedTensor(parameter, packed, masters, halves)
            tensor.keeps_dense_gradient = keep_dense_gradients
            if keep_theta0 and tensor.values is not None:
                tensor.theta0 = tensor.value().to(parameter.dtype, copy=True)
            self.tensors[name] = by_parameter[parameter] = tensor
        self._restore: list[Callable[[], None]] = []
        for module in lm.modules():
            own = module._parameters.items()
            held = {leaf: by_parameter[p] for leaf, p in own if p in by_parameter}
            if not (keep_theta0 or keep_dense_gradients):
                held = {leaf: tensor for leaf, tensor in held.items() if not tensor.is_plain}
            if held:
                self._restore.append(_hold(module, held))

    def compile(self, blocks: Iterable[nn.Module]) -> None:
        """Have ``torch.compile`` make one program of each block, until :meth:`release`."""
        self._restore += map(_compile, blocks)

    def changed(self) -> None:
        """Have all values written anew, see :meth:`SelectedTensor.changed`."""
        for tensor in self.tensors.values():
            tensor.changed()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, dense tensor), the values written into it unless it is sharded."""
        for name, tensor in self.tensors.items():
            yield name, tensor.parameter if tensor.is_sharded else tensor.write()

    @contextmanager
    def at_theta0(self) -> Iterator[nn.Module]:
        """The model with its first values, in evaluation mode and without gradients, while inside."""
        training = self.lm.training
        self.lm.eval()
        try:
            with self._switched_on("at_theta0"), torch.no_grad():
                yield self.lm
        finally:
            self.lm.train(training)

    def gradients_in_place(self) -> AbstractContextManager[None]:
        """While inside, gradients are added up in buffers that last, past autograd: faster, where no
        hook (DDP's, DeepSpeed's) waits for them."""
        return self._switched_on("in_place")

    @contextmanager
    def _switched_on(self, switch: str) -> Iterator[None]:
        for tensor in self.tensors.values():
            setattr(tensor, switch, True)
        try:
            yield
        finally:
            for tensor in self.tensors.values():
                setattr(tensor, switch, False)

    def cast(self, dtype: torch.dtype) -> None:
        """Give dense tensors the dtype that DeepSpeed has given the values."""
        for tensor in self.tensors.values():
            if not tensor.is_sharded and not tensor.is_plain:
                tensor.parameter.data = tensor.parameter.data.to(dtype)
                tensor.changed()

    def step_by_tensor(self, optimizer: torch.optim.Optimizer) -> None:
        """Make a step join the halves of one tensor's values at a time, if it does not already.

        The optimiser must skip parameters without gradient, as torch's do, and have no state yet.
        """
        step = optimizer.step
        if hasattr(step, "by_tensor"):
            return
        if optimizer.state:
            raise WagleError(
                f"optimizer {type(optimizer).__name__} makes its state before the first step, "
                "which model.values split does not allow: choose --model.values fp32 or another "
                "optimizer"
            )

        def by_tensor(_: torch.optim.Optimizer, closure: Optional[Callable[[], Any]] = None) -> Any:
            loss = None if closure is None else closure()
            for tensor in self.tensors.values():
                if tensor.is_split:
                    with tensor.whole_values():
                        step()
            return loss

        by_tensor.by_tensor = True
        optimizer.step = MethodType(by_tensor, optimizer)  # learning-rate schedulers expect one

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, gradient) of values that have one."""
        for name, tensor in self.tensors.items():
            gradient = tensor.gradient if tensor.is_split else getattr(tensor.values, "grad", None)
            if gradient is not None:
                yield name, gradient

    @torch.no_grad()
    def clip_by_dense_norm(self, bound: float, scale: float = 1.0) -> None:
        """Clip by the norm of the dense gradients, which are dropped; with fp16's loss scale."""
        dense = []
        for tensor in self.tensors.values():
            if tensor.is_plain and tensor.parameter.grad is not None:
                dense.append(tensor.parameter.grad)
            elif tensor.dense_gradient is not None:
                # DDP averages the gradients of parameters alone
                total = distributed.all_reduce_sum(tensor.dense_gradient)
                dense.append(total.div_(distributed.world_size() * scale))
            tensor.dense_gradient = None
        self.clip(bound, dense)

    @torch.no_grad()
    def clip(self, bound: float, counted: Optional[list[Tensor]] = None) -> None:
        """Scale the values' gradients so that the norm of ``counted``, else their own, is bounded."""
        gradients = [gradient for _, gradient in self.gradients()]
        counted = gradients if counted is None else counted
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in counted]
        factor = (bound / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)

    def release(self, dtype: Optional[torch.dtype] = None) -> None:
        """Give the model its parameters back, see :meth:`SelectedTensor.merge`."""
        for tensor in self.tensors.values():
            tensor.merge(dtype)
        for restore in reversed(self._restore):
            restore()
        for tensor in self.tensors.values():
            tensor.parameter.requires_grad_(True)
        self._restore.clear()


def load_values(
    lm: nn.Module, names: Container[str], read: Callable[[str], Tensor], mask: Optional[WeightMask]
) -> None:
    """Put values of a checkpoint into a model that holds its weights as usual.

    Collective where they are sharded. Without a mask all weights of a tensor are selected.
    """
    for name, parameter in lm.named_parameters():
        if f"{name}{SUFFIX}" in names:
            selected = None if mask is None else mask[name]
            with gathered(parameter) as dense:
                merged = place(dense, selected, read(f"{name}{SUFFIX}")).view(-1)
            assign(parameter, lambda start, stop, merged=merged: merged[start:stop])


def _hold(module: nn.Module, held: dict[str, SelectedTensor]) -> Callable[[], None]:
    """Make a module read some of its parameters through :class:`SelectedTensor`.

    Parameters become properties of a class that reads so, and values take their places. A dense
    tensor that is sharded stays a parameter, which DeepSpeed gathers when the module runs. Returns
    what undoes it.
    """
    own_class, names = type(module), list(module._parameters)
    module._selected, module._ready = held, None
    module.__class__ = _reading(own_class, tuple(held))
    for leaf, tensor in held.items():
        if tensor.is_plain:
            continue
        if not tensor.is_sharded:
            del module._parameters[leaf]
        if tensor.values is not None:
            module.register_parameter(f"{leaf}{SUFFIX}", tensor.values)

    def restore() -> None:
        del module._selected, module._ready
        module.__class__ = own_class
        for leaf, tensor in held.items():
            module._parameters.pop(f"{leaf}{SUFFIX}", None)
            module._parameters[leaf] = tensor.parameter
        for name in names:
            module._parameters[name] = module._parameters.pop(name)

    return restore


@cache  # compiled code is shared by modules of one class
def _reading(own_class: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """The class whose instances read these parameters from ``_selected``, or as they are ready."""

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = self._selected.values()
        values = [tensor.values for tensor in tensors if tensor.masters and not tensor.is_plain]
        masters = {id(t) for value in values if value is not None for t in (value, value.grad)}

        def fn_for(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            if id(tensor) not in masters or made.dtype == tensor.dtype:
                return made
            return tensor.to(made.device, torch.promote_types(tensor.dtype, made.dtype))

        own_class._apply(self, fn_for, recurse)
        for tensor in tensors:
            tensor.apply_(fn)
        return self

    def reader(leaf: str) -> property:
        def read(self: nn.Module) -> Tensor:
            if self._ready is not None:
                return self._ready[leaf]
            return self._selected[leaf].weight(leaf == "weight" and is_linear(self))

        return property(read)

    members = {"_apply": apply, **{leaf: reader(leaf) for leaf in leaves}}
    return type(own_class.__name__, (own_class,), {"__module__": own_class.__module__, **members})


def _compile(block: nn.Module) -> Callable[[], None]:
    """Compile what a block computes; its weights are made ready before, out of the compiler's sight.

    Returns what undoes it.
    """

    def get_ready(*_: Any) -> None:
        for module in block.modules():
            if "_selected" in module.__dict__:
                module._ready = {leaf: getattr(module, leaf) for leaf in module._selected}

    def let_go(*_: Any) -> None:
        for module in block.modules():
            if "_selected" in module.__dict__:
                module._ready = None

    plain = block.forward  # without the hooks
    compiled = torch.compile(plain, dynamic=True)  # one program for batches of all sizes

    def forward(*args: Any, **kwargs: Any) -> Any:
        trains = block.training and torch.is_grad_enabled()  # passes that do not are few
        return (compiled if trains else plain)(*args, **kwargs)

    block.forward = forward
    hooks = (
        block.register_forward_pre_hook(get_ready),
        block.register_forward_hook(let_go, always_call=True),
    )

    def restore() -> None:
        del block.forward
        for hook in hooks:
            hook.remove()

    return restore
