"""``ModelState``: what a run changes in a model besides its weights, and how it gives that back."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core.weights import persistent_buffers


class ModelState:
    """Flags, gradients, dtypes and hooks of a model, as they are now.

    Args:
        lm: a model with ordinary parameters, none of them sharded.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self.use_cache = getattr(lm.config, "use_cache", None)
        self.tensors = {**dict(lm.named_parameters()), **persistent_buffers(lm)}
        self.gradients = {n: (t.requires_grad, t.grad) for n, t in self.tensors.items()}
        # training, gradient_checkpointing, a forward pass of its own, ...
        self.attributes = [(vars(module), dict(vars(module))) for module in lm.modules()]
        items = (item for attributes, _ in self.attributes for item in attributes.items())
        hooks = [v for name, v in items if name.endswith("_hooks") and isinstance(v, dict)]
        self.attributes += [(registry, dict(registry)) for registry in hooks]
        #: Name of a tensor that :meth:`cast` has changed -> its dtype before; and its values, if
        #: they were rounded.
        self.dtypes: dict[str, torch.dtype] = {}
        self.wide: dict[str, Tensor] = {}

    def cast(self, dtype: torch.dtype) -> None:
        """Give the model another dtype, except where it has several, or transformers keeps fp32."""
        before, narrow = self.lm.dtype, dtype in (torch.float16, torch.bfloat16)
        kept = getattr(self.lm, "_keep_in_fp32_modules_strict", None) if narrow else None
        pattern = "|".join(rf"(?:^|\.){name}(?:\.|$)" for name in kept or ())
        for name, tensor in self.tensors.items():
            if tensor.dtype != before or (pattern and re.search(pattern, name)):
                continue
            self.dtypes[name] = before
            if torch.promote_types(before, dtype) != dtype:
                self.wide[name] = tensor.data
            tensor.data = tensor.data.to(dtype)

    @torch.no_grad()
    def restore(self) -> None:
        """Give everything back, after :meth:`~wagle_pl.masks.selected.SelectedWeights.release`."""
        for name, dtype in self.dtypes.items():
            tensor = self.tensors[name]
            if tensor.dtype != dtype:  # else its values are written already
                tensor.data = self.wide.get(name, tensor.data).to(tensor.device, dtype)
        for name, (requires_grad, gradient) in self.gradients.items():
            self.tensors[name].grad = gradient
            self.tensors[name].requires_grad_(requires_grad)
        for attributes, before in self.attributes:
            attributes.clear()
            attributes.update(before)
        if self.use_cache is not None:
            self.lm.config.use_cache = self.use_cache
