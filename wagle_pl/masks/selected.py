"""Selected weights as the only parameters of a model: why a frozen weight cannot move.

:class:`SelectedWeights` splits each weight tensor of a model, during training, into the *dense*
tensor, which is neither a parameter nor a buffer, and a 1-D parameter, the *values* of its selected
weights, in fp32 for any dtype of the model.

* In the forward pass a layer reads ``weight`` and gets the dense tensor. If the values have
  changed, they are written into the dense tensor first, rounded to its dtype.
* In the backward pass the gradient of the dense tensor is computed as always; its selected entries
  become the gradient of the values, and the rest is freed.
* If whole rows or columns of a linear layer or an embedding are selected, only their gradient is
  computed, from those columns of the output's gradient or of the inputs.
* So optimiser, weight decay, clipping, noise, averaging callbacks and communication hooks see only
  the values: they can neither read nor write frozen weights. A NaN reaches only selected ones.
* Values and optimiser state are fp32 under ``bf16-true`` too, so that steps smaller than half a
  unit in the last place of bf16 add up.
* A checkpoint holds the values. The dense tensor comes from the base model's files.

:meth:`SelectedWeights.release` writes the values one last time and restores the model's ordinary
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Optional

import torch
from torch import Tensor, nn

from wagle_pl.core import distributed
from wagle_pl.core.weights import assign, evaluating, gathered, is_linear
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import place
from wagle_pl.masks.selected_tensor import SelectedTensor

#: Suffix of the name of a tensor's selected values, after the tensor's own name.
SUFFIX = "_selected"
#: Name of a tensor -> gradient of its values, and of the dense tensor if that is kept.
Gradients = dict[str, tuple[Optional[Tensor], Optional[Tensor]]]


class SelectedWeights:
    """A model whose selected weights are its only parameters, until :meth:`release`.

    Args:
        lm: the model, changed in place: its parameters are replaced by values, named after them.
        mask: which weights are selected; None selects all that require a gradient, and leaves the
            others as they are.
        masters: see :class:`SelectedTensor`.
        keep_theta0: keep the values as they are now, for :meth:`at_theta0`.
        keep_dense_gradients: also accumulate the gradients of whole tensors, for
            :meth:`clip_by_dense_norm`.
    """

    def __init__(
        self,
        lm: nn.Module,
        mask: Optional[WeightMask] = None,
        masters: bool = True,
        keep_theta0: bool = False,
        keep_dense_gradients: bool = False,
    ) -> None:
        self.lm = lm
        self.keeps_dense_gradients = keep_dense_gradients
        self.tensors: dict[str, SelectedTensor] = {}
        self._restore: list[Callable[[], None]] = []
        try:
            self._select(mask, masters, keep_theta0)
        except BaseException:
            self.release()
            raise

    def _select(self, mask: Optional[WeightMask], masters: bool, keep_theta0: bool) -> None:
        by_parameter: dict[nn.Parameter, SelectedTensor] = {}
        for name, parameter in list(self.lm.named_parameters()):
            if mask is None and not parameter.requires_grad:
                continue
            packed = None if mask is None else mask.packed(name)
            tensor = SelectedTensor(parameter, packed, masters)
            tensor.keeps_dense_gradient = self.keeps_dense_gradients
            if keep_theta0 and tensor.values is not None:
                tensor.theta0 = tensor.values.detach().to(parameter.dtype, copy=True)
            self.tensors[name] = by_parameter[parameter] = tensor
        for module in self.lm.modules():
            held = {
                leaf: by_parameter[parameter]
                for leaf, parameter in module._parameters.items()
                if parameter in by_parameter
                and (
                    keep_theta0
                    or self.keeps_dense_gradients
                    or not by_parameter[parameter].is_plain
                )
            }
            if held:
                self._restore.append(_hold(module, held))

    def compile(self, blocks: Iterable[nn.Module]) -> None:
        """Compile each block with ``torch.compile``, until :meth:`release`."""
        self._restore += map(_compile, blocks)

    def changed(self) -> None:
        """Have all values written again, see :meth:`SelectedTensor.changed`."""
        for tensor in self.tensors.values():
            tensor.changed()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, dense tensor) pairs; the values are written into those that are not sharded."""
        for name, tensor in self.tensors.items():
            yield name, tensor.parameter if tensor.is_sharded else tensor.write()

    @contextmanager
    def at_theta0(self) -> Iterator[nn.Module]:
        """Context with the model at its initial values, in evaluation mode, without gradients."""
        with evaluating(self.lm), self._switched_on("at_theta0"), torch.no_grad():
            yield self.lm

    def gradients_in_place(self) -> AbstractContextManager[None]:
        """Context in which gradients are accumulated in persistent buffers, bypassing autograd:
        faster where no hook (of DDP or DeepSpeed) waits for them."""
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

    def take_gradients(self) -> Gradients:
        """All gradients; there are none afterwards, so that the next pass makes others."""
        return {name: tensor.take_gradients() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def add_gradients(self, gradients: Gradients, factor: Optional[Tensor] = None) -> None:
        """Add gradients that :meth:`take_gradients` returned, times a factor; changes them."""
        for name, taken in gradients.items():
            if factor is not None:
                for gradient in filter(torch.is_tensor, taken):
                    gradient.mul_(factor)
            self.tensors[name].add_gradients(*taken)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, gradient) of values that have one."""
        for name, tensor in self.tensors.items():
            if tensor.values is not None and tensor.values.grad is not None:
                yield name, tensor.values.grad

    @torch.no_grad()
    def clip_by_dense_norm(self, bound: float, scale: float = 1.0) -> None:
        """Clip by the norm of the dense gradients, then drop these; ``scale`` is the loss scale."""
        dense = []
        for tensor in self.tensors.values():
            if tensor.is_plain and tensor.parameter.grad is not None:
                dense.append(tensor.parameter.grad)
            elif tensor.dense_gradient is not None:
                # DDP averages the gradients of parameters alone
                total = distributed.all_reduce_sum(tensor.dense_gradient)
                dense.append(total.div_(distributed.world_size() * scale))
            tensor.dense_gradient = None
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in dense]
        factor = (bound / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        for _, gradient in self.gradients():
            gradient.mul_(factor)

    def release(
        self, dtype: Optional[torch.dtype] = None, wide: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        """Give the model its parameters back, see :meth:`SelectedTensor.merge`.

        Args:
            wide: dense tensors by name, to be written into in place of the model's rounded ones.
        """
        for name, tensor in self.tensors.items():
            tensor.merge(dtype, wide.get(name))
        for restore in reversed(self._restore):
            restore()
        for tensor in self.tensors.values():
            tensor.parameter.requires_grad_(True)
        self._restore.clear()


def load_values(
    lm: nn.Module, names: Container[str], read: Callable[[str], Tensor], mask: Optional[WeightMask]
) -> None:
    """Write a checkpoint's values into a model with ordinary parameters.

    Collective if these are sharded. Without a mask, all weights of a tensor are selected.
    """
    for name, parameter in lm.named_parameters():
        if f"{name}{SUFFIX}" in names:
            selected = None if mask is None else mask[name]
            with gathered(parameter) as dense:
                merged = place(dense, selected, read(f"{name}{SUFFIX}"))
            assign(parameter, partial(_numbers, merged.view(-1)))


def _numbers(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat[start:stop]


class _Reading(nn.Module):
    """Put before a module's class: some of its parameters are read through a SelectedTensor."""

    _selected: dict[str, SelectedTensor]  # by the parameter's name in the module
    _ready: Optional[dict[str, Tensor]]  # what is read instead while a compiled block runs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = self._selected.values()
        values = [tensor.values for tensor in tensors if tensor.masters and not tensor.is_plain]
        masters = {id(t) for value in values if value is not None for t in (value, value.grad)}

        def fn_for(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            if id(tensor) not in masters or made.dtype == tensor.dtype:
                return made
            return tensor.to(made.device, torch.promote_types(tensor.dtype, made.dtype))

        super()._apply(fn_for, recurse)
        for tensor in tensors:
            tensor.apply_(fn)
        return self

    def _read(self, leaf: str) -> Tensor:
        if self._ready is not None:
            return self._ready[leaf]
        return self._selected[leaf].weight(leaf == "weight" and is_linear(self))


def _linear(self: Any, inputs: Tensor) -> Tensor:
    """A linear layer's output, without the gradient of rows or columns that are frozen."""
    output = None
    if self._ready is None:
        transposed = not isinstance(self, nn.Linear)  # a Conv1D
        output = self._selected["weight"].multiply(inputs, self.bias, transposed)
    return super(_Reading, self).forward(inputs) if output is None else output


def _embedding(self: Any, tokens: Tensor) -> Tensor:
    """An embedding's output, likewise."""
    output = None
    if self._ready is None and self.max_norm is None and not self.scale_grad_by_freq:
        output = self._selected["weight"].look_up(tokens, self.padding_idx)
    return super(_Reading, self).forward(tokens) if output is None else output


def _forward_of(base: type) -> Optional[Callable[..., Tensor]]:
    """The forward pass of a class of layers that computes the gradient of some lines alone."""
    from transformers.pytorch_utils import Conv1D

    known: dict[Any, Callable[..., Tensor]] = {nn.Linear.forward: _linear, Conv1D.forward: _linear}
    known[nn.Embedding.forward] = _embedding
    return known.get(base.forward)  # type: ignore[attr-defined]


@cache  # compiled code is shared by modules of one class
def _reading(base: type, leaves: tuple[str, ...], forward: Optional[Callable[..., Any]]) -> type:
    """A subclass with properties that read these parameters."""
    members: dict[str, Any] = {}
    for leaf in leaves:
        members[leaf] = property(lambda self, leaf=leaf: self._read(leaf))  # type: ignore[misc]
    if forward is not None:
        members["forward"] = forward
    return type(base.__name__, (_Reading, base), {"__module__": base.__module__, **members})


def _hold(module: Any, selected: dict[str, SelectedTensor]) -> Callable[[], None]:
    """Make a module read some of its parameters through :class:`SelectedTensor`.

    The module gets a class of :func:`_reading`, and the values are registered in the parameters'
    place. A sharded dense tensor stays a parameter, which DeepSpeed gathers when the module runs.
    Returns a function that undoes the change.
    """
    base: Any = type(module)
    names = list(module._parameters)
    module._selected, module._ready = selected, None
    forward = None
    if "weight" in selected and selected["weight"].lines is not None:
        forward = _forward_of(base)
    module.__class__ = _reading(base, tuple(selected), forward)
    for leaf, tensor in selected.items():
        if tensor.is_plain:
            continue
        if not tensor.is_sharded:
            del module._parameters[leaf]
        if tensor.values is not None:
            module.register_parameter(f"{leaf}{SUFFIX}", tensor.values)

    def restore() -> None:
        del module._selected, module._ready
        module.__class__ = base
        for leaf, tensor in selected.items():
            module._parameters.pop(f"{leaf}{SUFFIX}", None)
            module._parameters[leaf] = tensor.parameter
        for name in names:
            module._parameters[name] = module._parameters.pop(name)

    return restore


def _compile(block: nn.Module) -> Callable[[], None]:
    """Compile a block's forward pass in training; its weights are prepared outside of the compiled
    code. Returns a function that undoes the change."""
    plain = block.forward
    compiled = torch.compile(plain, dynamic=True)  # one program for batches of all sizes

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):  # other passes are few
            return plain(*args, **kwargs)
        modules = [module for module in block.modules() if isinstance(module, _Reading)]
        for module in modules:
            module._ready = {leaf: getattr(module, leaf) for leaf in module._selected}
        try:
            return compiled(*args, **kwargs)
        finally:
            for module in modules:
                module._ready = None

    block.forward = forward
    return partial(delattr, block, "forward")
