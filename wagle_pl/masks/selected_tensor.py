"""A tensor and the values of its selected weights, see :mod:`wagle_pl.masks.selected`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wagle_pl.core import distributed
from wagle_pl.core.weights import assign, gathered, in_shares, share_of
from wagle_pl.masks.bits import (
    Lines,
    Places,
    chunk_of,
    count_bits,
    iter_places,
    lines_of,
    pack_bits,
    put_,
    take_,
    unpack_bits,
    unpack_part,
)


class _Select(torch.autograd.Function):
    """The dense tensor as a function of the values."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, dense: Tensor, tensor: SelectedTensor, bits: Optional[Tensor]
    ) -> Tensor:
        ctx.tensor = tensor
        ctx.save_for_backward(bits)  # so that gradient checkpointing does not keep them
        return dense.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], None, None, None]:
        return ctx.tensor.take_gradient(gradient, *ctx.saved_tensors), None, None, None


class _Multiply(torch.autograd.Function):
    """A linear layer of which whole rows or columns are selected: only their gradient is computed."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, values: Tensor, dense: Tensor, bias: Any, tensor: SelectedTensor,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        ctx.tensor, ctx.transposed = tensor, transposed
        ctx.shape, ctx.dtype = inputs.shape, inputs.dtype
        flat = inputs.reshape(-1, inputs.shape[-1]).to(dense.dtype)
        ctx.save_for_backward(flat, dense.detach())
        weight = dense.T if transposed else dense
        with torch.autocast(flat.device.type, enabled=False):
            product = F.linear(flat, weight, None if bias is None else bias.to(dense.dtype))
        return product.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        inputs, dense = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_inputs = of_bias = None
        if ctx.needs_input_grad[0]:
            weight = dense.T if ctx.transposed else dense
            of_inputs = (flat @ weight).view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = flat.sum(0)
        sides = (inputs, flat) if ctx.transposed else (flat, inputs)
        return of_inputs, ctx.tensor.take_product(*sides), None, of_bias, None, None


class _LookUp(torch.autograd.Function):
    """An embedding of which whole rows or columns are selected: only their gradient is computed."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, values: Tensor, dense: Tensor, unused: Any, tensor: SelectedTensor
    ) -> Tensor:
        ctx.tensor, ctx.unused = tensor, unused
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, dense)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Optional[Tensor], ...]:
        (tokens,) = ctx.saved_tensors
        return None, ctx.tensor.take_rows(gradient, tokens, ctx.unused), None, None, None


class SelectedTensor:
    """A tensor of a model and the values of its selected weights.

    Args:
        parameter: the model's own parameter: the dense tensor. Sharded over ranks under ZeRO-3.
        packed: its packed bits, see :mod:`wagle_pl.masks.bits`; None if all are selected.
        masters: keep values in fp32 if the dense tensor is narrower. False for DeepSpeed, whose
            optimisers do so.
    """

    lines: Optional[Lines] = None  # whole rows or columns, if these are what is selected

    def __init__(
        self, parameter: nn.Parameter, packed: Optional[Tensor], masters: bool = True
    ) -> None:
        self.parameter = parameter
        self.masters = masters
        #: What is trained: (selected,), or a matrix if all, or whole rows or columns, are selected;
        #: None if none is. It is ``parameter`` itself if that needs no other dtype (``is_plain``).
        self.values: Optional[nn.Parameter] = None
        self.theta0: Optional[Tensor] = None
        self.dense_gradient: Optional[Tensor] = None
        self.in_place = self.at_theta0 = self.keeps_dense_gradient = False
        self._index: Optional[Tensor] = None
        self._packed: Optional[Tensor] = None  # of this rank's share, if the tensor is sharded
        self._rank_slice = slice(0)  # the values of this rank's share
        self._kept: Optional[Tensor] = None
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
        parameter.requires_grad_(self.is_plain)
        if self.is_plain:
            self.values = parameter
        if self.is_plain or not self.count:
            return
        dtype = torch.promote_types(parameter.dtype, torch.float32 if masters else parameter.dtype)
        if self.is_sharded and self.is_partial:  # each rank takes the values of its share
            share, selected = self._share()
            values = distributed.all_gather_uneven(share[selected].to(parameter.device)).to(dtype)
        else:
            if self.is_partial:
                self.lines = lines_of(packed, getattr(parameter, "ds_shape", parameter.shape))
            if self.lines is not None:
                self.lines = self.lines._replace(indices=self.lines.indices.to(parameter.device))
            elif self.is_partial:
                places = iter_places(packed, size, chunk_of(parameter))
                index = torch.cat([p if size > 2**31 else p.int() for p in places])
                self._index = index.to(parameter.device)
            with gathered(parameter) as dense:
                values = self.taken(dense.detach(), dtype)
        self.values = nn.Parameter(values)
        if self.is_sharded:  # now, not with all others when DeepSpeed's engine is made
            parameter.convert_to_zero_parameters([self.values])
        self._written = {parameter.dtype: self._version()}

    def _keep_share(self, packed: Tensor) -> int:
        """Read and keep this rank's bits; return the number selected on all ranks. Collective."""
        start, share = share_of(self.parameter)
        bits = pack_bits(unpack_part(packed, start, start + len(share)))
        spare = (self.parameter.partition_numel() + 7) // 8 - len(bits)
        self._packed = torch.cat([bits, bits.new_zeros(spare)]).to(self.parameter.device)
        counts, rank = distributed.all_gather([count_bits(bits)]), distributed.rank()
        self._rank_slice = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return sum(counts)

    def _share(self) -> tuple[Tensor, Tensor]:
        """This rank's share of a sharded tensor, and which of it is selected."""
        _, share = share_of(self.parameter)
        return share, unpack_bits(self._packed, share.shape).to(share.device)

    def bits(self) -> Optional[Tensor]:
        """The packed bits, one row per rank, if the tensor is sharded and partial. Collective."""
        if not (self.is_sharded and self.is_partial):
            return None
        if self._kept is None:
            bits = distributed.all_gather_tensor(self._packed).view(-1, len(self._packed))
            if not self.parameter.ds_persist:
                return bits
            self._kept = bits  # a small tensor, which stays whole on every rank
        return self._kept

    def places(self, bits: Optional[Tensor] = None) -> Places:
        """Where the values are in the tensor. For a sharded tensor, give its :meth:`bits`."""
        chunk = chunk_of(self.parameter)
        if not self.is_partial:
            return None
        if self.lines is not None:
            return self.lines
        if self._index is not None:
            return self._index.split(chunk)
        width, size = self.parameter.partition_numel(), self.parameter.ds_numel
        return (
            places + first
            for first, row in zip(range(0, size, width), bits, strict=False)
            for places in iter_places(row, min(width, size - first), chunk)
        )

    def taken(self, dense: Tensor, dtype: torch.dtype, bits: Optional[Tensor] = None) -> Tensor:
        """The selected entries of a dense tensor, as a new tensor of this dtype."""
        if not self.is_partial:
            return dense.to(dtype, copy=True)
        if self.lines is not None:
            return dense.index_select(*self.lines).to(dtype)
        return take_(dense.new_empty(self.count, dtype=dtype), dense, self.places(bits))

    def placed(self, values: Tensor) -> Tensor:
        """A new dense tensor with these values, 0 elsewhere; for tensors that are not sharded."""
        dense = values.new_zeros(self.parameter.shape)
        put_(dense, self.places(), values)
        return dense

    # -- values ------------------------------------------------------------------------------------

    def _version(self) -> tuple[int, int]:
        return self.values._version, self.values.data_ptr()

    def changed(self) -> None:
        """Have the values written again: they may have changed unnoticed by torch (``.data``)."""
        self._written.clear()

    @torch.no_grad()
    def write(self, narrow: Optional[Tensor] = None) -> Tensor:
        """Write changed values into the dense tensor, or a narrow copy, and return that."""
        dense = self.parameter if narrow is None else narrow
        if self.values is not None and not self.is_plain:
            version = self._version()
            if self._written.get(dense.dtype) != version:
                put_(dense, self.places(), self.values)
                self._written[dense.dtype] = version
        return dense

    def _for_autocast(self) -> Optional[Tensor]:
        """A cached copy in autocast's dtype, to save a cast per pass; None if none is needed."""
        device = self.parameter.device.type
        dtype = torch.get_autocast_dtype(device)
        if not torch.is_autocast_enabled(device) or self.parameter.dtype != torch.float32:
            return None
        if self._narrow is None or self._narrow.dtype != dtype:
            self._narrow = self.write().detach().to(dtype)
        return self.write(self._narrow)

    # -- the forward and the backward pass ---------------------------------------------------------

    def weight(self, multiplies: bool = False) -> Tensor:
        """The weight for a layer, in autocast's dtype if the layer only multiplies matrices."""
        if self.at_theta0 and self.theta0 is not None:
            return self._with(self.theta0)
        if self.is_plain:
            return self.parameter
        if self.is_sharded:
            if self.values is None:
                return self.parameter
            if self.parameter.numel() < self.parameter.ds_numel:
                return self.parameter  # not gathered: read only for its dtype or device
            bits = self.bits()
            return _Select.apply(self.values, self._with(self.values.detach(), bits), self, bits)
        narrow = self._for_autocast() if multiplies else None
        dense = self.write() if narrow is None else narrow
        if not torch.is_grad_enabled() or (self.values is None and not self.keeps_dense_gradient):
            return dense
        # autograd computes the gradient of a frozen tensor only if an input requires one
        values = torch.zeros((), requires_grad=True) if self.values is None else self.values
        return _Select.apply(values, dense, self, None)

    def _by_lines(self) -> bool:
        """Whether a layer may compute the gradient of whole rows or columns alone."""
        needs_all = self.lines is None or self.keeps_dense_gradient
        return not needs_all and not self.at_theta0 and torch.is_grad_enabled()

    def multiply(
        self, inputs: Tensor, bias: Optional[Tensor], transposed: bool
    ) -> Optional[Tensor]:
        """The output of a linear layer, if whole rows or columns are selected; else None.

        Args:
            transposed: the matrix is (in, out).
        """
        if not self._by_lines():
            return None
        narrow = self._for_autocast()
        dense = self.write() if narrow is None else narrow
        return _Multiply.apply(inputs, self.values, dense, bias, self, transposed)

    def look_up(self, tokens: Tensor, unused: Optional[int]) -> Optional[Tensor]:
        """The output of an embedding, likewise; the row ``unused`` gets no gradient."""
        if not self._by_lines():
            return None
        return _LookUp.apply(tokens, self.values, self.write(), unused, self)

    def take_product(self, left: Tensor, right: Tensor) -> Optional[Tensor]:
        """The gradient of the values in leftᵀ · right, from (N, rows) and (N, columns)."""
        sides = [left.T, right.T]
        axis, indices = self.lines
        sides[axis] = sides[axis].index_select(0, indices)  # twice as fast as along dimension 1
        return self._taken(sides[0] @ sides[1].T)

    def take_rows(
        self, gradient: Tensor, tokens: Tensor, unused: Optional[int]
    ) -> Optional[Tensor]:
        """The gradient of the values of an embedding, from that of its output."""
        axis, indices = self.lines
        rows, unused = self.parameter.shape[0], -1 if unused is None else unused
        if axis == 1:
            gradient = gradient.index_select(-1, indices)
        else:  # number the selected rows, and let one more stand for all others
            number = torch.full((rows,), len(indices), device=tokens.device)
            number[indices] = torch.arange(len(indices), device=tokens.device)
            if unused >= 0:
                number[unused] = len(indices)
            tokens, rows, unused = number[tokens], len(indices) + 1, len(indices)
        taken = torch.ops.aten.embedding_dense_backward(gradient, tokens, rows, unused, False)
        return self._taken(taken[: self.values.shape[0]])

    def _taken(self, entries: Tensor) -> Optional[Tensor]:
        """The gradient of the values, unless it goes into their buffer."""
        if not self.in_place:
            return entries.to(self.values.dtype)
        self._accumulate(entries, None)
        return None

    def _accumulate(self, entries: Tensor, places: Places) -> None:
        """Write entries of a tensor into the buffer of the gradient, or add them to what it holds."""
        is_first = self.values.grad is None
        if is_first:
            self._buffer = torch.empty_like(self.values) if self._buffer is None else self._buffer
            self.values.grad = self._buffer
        take_(self.values.grad, entries, places, add=not is_first)

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
        if not self.in_place:
            return self.taken(gradient, self.values.dtype, bits)
        self._accumulate(gradient, self.places())
        return None

    def take_gradients(self) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """The gradient of the values and, if it is kept, of the dense tensor; both are None then."""
        gradient, dense = None, self.dense_gradient
        if self.values is not None and self.values.grad is not None:
            gradient, self.values.grad, self._buffer = self.values.grad, None, None
        self.dense_gradient = None
        return gradient, dense

    def add_gradients(self, gradient: Optional[Tensor], dense: Optional[Tensor]) -> None:
        """Add gradients that :meth:`take_gradients` returned, and which may be changed in place."""
        if gradient is not None and self.values.grad is not None:
            self.values.grad.add_(gradient)
        elif gradient is not None:
            self.values.grad = gradient
            self._buffer = None if self.is_plain else gradient
        if dense is not None and self.dense_gradient is not None:
            self.dense_gradient.add_(dense)
        elif dense is not None:
            self.dense_gradient = dense

    # -- devices, dtypes, the end ------------------------------------------------------------------

    def apply_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Do what ``nn.Module.to`` and similar methods do, to all tensors but the values."""
        if not self.is_plain and not self.is_sharded:
            self.parameter.data = fn(self.parameter.data)
        device = self.parameter.device
        self._narrow = self._buffer = None
        if self._index is not None:
            self._index = self._index.to(device)
        if self.lines is not None:
            self.lines = self.lines._replace(indices=self.lines.indices.to(device))
        if self._packed is not None:
            self._packed = self._packed.to(device)
        if self.theta0 is not None:
            self.theta0 = self.theta0.to(device, self.parameter.dtype)
        self.changed()

    @torch.no_grad()
    def merge(self, dtype: Optional[torch.dtype] = None, wide: Optional[Tensor] = None) -> None:
        """Write the values into the dense tensor, in this dtype; collective if it is sharded.

        ``wide`` is the dense tensor before it was rounded, and is used in its place.
        """
        self.at_theta0 = self.keeps_dense_gradient = False
        self._narrow = self._buffer = None
        if self.is_sharded:
            self._merge_share()
            return
        if wide is not None and not self.is_plain:
            self.parameter.data = wide.to(self.parameter.device)
        if dtype is not None:
            self.parameter.data = self.parameter.data.to(dtype)
        self.changed()
        self.write()

    def _merge_share(self) -> None:
        """Write the values of a sharded tensor into each rank's share of it. Collective."""
        if not self.is_partial:
            return
        if not in_shares(self.parameter):
            bits = self.bits()
            with gathered(self.values) as values:
                dense = self._with(values, bits).view(-1)
            assign(self.parameter, lambda start, stop: dense[start:stop])
            return
        share, selected = self._share()
        with gathered(self.values) as values:
            merged = share.masked_scatter(selected, values[self._rank_slice].to(share.device))
        assign(self.parameter, lambda start, stop: merged)
