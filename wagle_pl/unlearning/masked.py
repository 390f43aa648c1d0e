"""``MaskedModule``: a module that trains only the weights of a mask; they are its parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from wagle_pl.core.errors import WagleError
from wagle_pl.core.schema import check_arguments
from wagle_pl.core.weights import mismatch
from wagle_pl.data.template import differing_prompts
from wagle_pl.lm.module import LanguageModule
from wagle_pl.masks import Restriction, WeightMask
from wagle_pl.masks.bits import filled_bits
from wagle_pl.masks.mask import Shapes
from wagle_pl.masks.selected import SUFFIX, SelectedTensor, SelectedWeights, load_values
from wagle_pl.strategies import ShardedCheckpoint, is_zero
from wagle_pl.unlearning.checks import FrozenWeights

log = logging.getLogger(__name__)


class MaskedModule(LanguageModule):
    """Trains only the weights of a mask, and checks that all others keep their bits.

    Frozen weights stay bit-identical to the starting model with any optimiser; a run checks that at
    its end. Without a mask all weights are trained.

    Args:
        mask: mask file that attribution wrote for this model; null trains all weights (dense).
        modules: train only weights in these (and in the mask), e.g. ``[mlp, self_attn.q_proj]``.
        layers: train only weights in these layers (and in the mask), e.g. ``3-7`` or ``0,2,5-9``.
        clip_scope: ``trainer.gradient_clip_val`` bounds the gradient norm of the ``selected``
            weights, or of ``all``, as in WAGLE's code (keeps dense gradients; not under ZeRO).
        verify: when to check that frozen weights are bit-identical to θ₀: at the ``end``, after
            each ``step``, or never (``off``).
    """

    _shapes: Shapes  # of the model's parameters, once it is loaded

    def __init__(
        self,
        model: Union[str, PreTrainedModel],
        mask: Optional[Union[str, WeightMask]] = None,
        modules: Optional[list[str]] = None,
        layers: Optional[str] = None,
        clip_scope: Literal["selected", "all"] = "selected",
        verify: Literal["end", "step", "off"] = "end",
        **kwargs: Any,
    ) -> None:
        check_arguments(MaskedModule.__init__, locals(), "model.")
        super().__init__(model=model, **kwargs)
        self.mask_file = str(mask) if isinstance(mask, (str, Path)) else None
        #: What the mask is made of.
        self.restriction = Restriction(self.mask_file or mask, modules, layers)
        #: Selected weights of the model; None if all may move.
        self.mask: Optional[WeightMask] = None
        #: How the model holds its weights during training.
        self.selected: Optional[SelectedWeights] = None
        self.clip_scope = clip_scope
        self.verify = verify
        self._frozen: Optional[FrozenWeights] = None
        self._verified: Optional[str] = None

    # -- what may move -----------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model, unless the strategy lacks what this run needs."""
        if self.attached and self.clip_scope == "all" and is_zero(self.trainer.strategy):
            raise WagleError(
                "clip_scope: all needs every gradient whole at the step, which ZeRO does not keep: "
                "choose --model.clip_scope selected"
            )
        super().configure_model()

    def restrict(self) -> None:
        """Determine which weights may move, just after the model is loaded."""
        self.mask = self.restriction.mask(self._shapes, self.model_name, self.model_fingerprint)
        if self.mask is None:
            return
        if not any(p.requires_grad for p in self.lm.parameters()):
            raise WagleError(
                "no weight of the model requires a gradient: call requires_grad_(True)"
            )
        if not all(p.requires_grad for p in self.lm.parameters()):
            free = {
                n: filled_bits(p.numel(), p.requires_grad) for n, p in self.lm.named_parameters()
            }
            made_by = {"operation": "modules", "modules": ["those that require a gradient"]}
            self.mask &= WeightMask(free, self._shapes, made_by)
        for prompts in self.mask.prompts if self.mask_file is not None and self.fits else ():
            if other := differing_prompts(prompts, self.prompts):
                log.warning(
                    "mask %s was made with other prompts (%s): give both runs the same "
                    "data.system_prompt, data.chat_template_kwargs and formats",
                    self.mask_file,
                    other,
                )
        if not any(map(self.mask.count, self.mask)):
            file = "" if self.mask_file is None else f"{self.mask_file}, "
            raise WagleError(
                f"the mask ({file}{self.mask.origin}) selects nothing: there is no weight to move"
            )

    def select_weights(self, **options: Any) -> None:
        """Make the weights that may move the parameters of the model, see ``SelectedWeights``."""
        bounded = self.trainer.gradient_clip_val and self.trainer.gradient_clip_algorithm != "value"
        dense = self.clip_scope == "all" and self.mask is not None and bool(bounded)
        masters = not is_zero(self.trainer.strategy)
        options = {"masters": masters, "keep_dense_gradients": dense, **options}
        self.selected = SelectedWeights(self.lm, self.mask, **options)

    def release(self, dtype: Optional[torch.dtype] = None) -> None:
        """Write the values into the model's own parameters, in this dtype or their own."""
        if self.selected is not None:
            self.selected.release(dtype, {} if self._before is None else self._before.wide)
        self.selected = None

    def give_back(self) -> None:
        if not self.sharded:  # else the ranks would have to meet, and some may have failed
            self.release()
        super().give_back()

    @property
    def tensors(self) -> dict[str, SelectedTensor]:
        """Name of a tensor of the model -> what holds its selected weights, while it is trained."""
        return {} if self.selected is None else self.selected.tensors

    # -- the guarantee -----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Take digests of frozen weights."""
        super().on_fit_start()
        if self.mask is not None and self.verify != "off":
            self._frozen = FrozenWeights(self.mask, self.selected.weights())

    def on_train_batch_end(self, *_: Any) -> None:
        if self._frozen is not None and self.verify == "step":
            self._frozen.check(self.selected.weights(), self.global_step)

    def check_frozen(self) -> None:
        """Check the guarantee, before anything is written. Collective."""
        if self._frozen is not None:
            self._verified = self._frozen.check(self.selected.weights(), self.global_step)
            log.info("verified: %s", self._verified)

    @property
    def mask_record(self) -> dict[str, Any]:
        """The mask and the guarantee, for ``wagle.json`` and the model card."""
        mask = None
        if self.mask is not None:
            made_by = {"density": self.mask.density, "made_by": self.mask.metadata}
            mask = {"file": self.mask_file, **made_by}
        return {"mask": mask, "verified": self._verified}

    # -- steps -------------------------------------------------------------------------------------

    @property
    def _scaler(self) -> Optional[Any]:
        """fp16's loss scaler, which skips steps that are not finite."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: Optional[float] = None,
        gradient_clip_algorithm: Optional[str] = None,
    ) -> None:
        """Clip the gradients of selected weights by their norm or, if asked, by that of all."""
        bound, selected = gradient_clip_val, self.selected
        by_norm = gradient_clip_algorithm in (None, "norm")
        if bound and by_norm and selected.keeps_dense_gradients:
            selected.clip_by_dense_norm(bound, self._scaler.get_scale() if self._scaler else 1.0)
        else:
            super().configure_gradient_clipping(optimizer, bound, gradient_clip_algorithm)

    # -- checkpoints -------------------------------------------------------------------------------

    def stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of what a checkpoint holds: all but dense tensors of the base model."""
        left_out = {id(t.parameter) for t in self.tensors.values() if not t.is_plain}
        return ((name, p) for name, p in self.lm.named_parameters() if id(p) not in left_out)

    def load_stored(self, stored: ShardedCheckpoint) -> None:
        """Use the weights of a checkpoint that ranks wrote. Collective: all ranks must call it."""
        if any(name.endswith(SUFFIX) for name in stored.shapes):
            load_values(self.lm, stored.shapes, stored.weight, self.mask)
        else:
            stored.load_weights(self.stored_parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the mask is made of."""
        super().on_save_checkpoint(checkpoint)
        if self.mask is not None:
            made_of = self.restriction._replace(file=self.mask_file)._asdict()
            checkpoint["mask"] = {"digest": self.mask.digest(), **made_of}

    def check_mask(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another mask or, if there is one, of another model."""
        stored = checkpoint.get("mask") or {}
        digest = stored.get("digest")
        if digest and not self.attached:
            self.restriction = Restriction.of_record(stored, self.restriction.file)
            self.restrict()
        if digest != (None if self.mask is None else self.mask.digest()):
            advice = "resume with that mask, or start a new run"
            if not self.attached:
                advice = "give that mask to load_from_checkpoint, which keeps files' names alone"
            raise WagleError(f"the checkpoint belongs to a run with another mask: {advice}")
        model = checkpoint.get("model")
        if digest and not model:
            raise WagleError(f"{self.checkpoint_label} does not say which model its run began with")
        if digest and (differing := mismatch(model["fingerprint"], self.model_fingerprint)):
            raise WagleError(
                f"the checkpoint belongs to a run on a model with another {differing}: set "
                "--model.model to the model of that run"
            )
