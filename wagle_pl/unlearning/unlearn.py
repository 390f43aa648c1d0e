"""``UnlearnModule``: makes a model forget."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import describe, resolve
from wagle_pl.core.schema import check_arguments
from wagle_pl.core.weights import evaluating, mismatch
from wagle_pl.data.template import differing_prompts
from wagle_pl.lm.resume import random_state, set_random_state
from wagle_pl.masks import Restriction, WeightMask
from wagle_pl.masks.bits import filled_bits
from wagle_pl.objectives import Objective, Streams
from wagle_pl.objectives.objective import TERMS
from wagle_pl.objectives.streams import References
from wagle_pl.strategies import is_zero
from wagle_pl.unlearning.adapters import LoRA
from wagle_pl.unlearning.checks import FrozenWeights
from wagle_pl.unlearning.export import model_card
from wagle_pl.unlearning.finetune import Batch, FinetuneModule
from wagle_pl.unlearning.step_rules import Gradients, Loss, Step, StepRule
from wagle_pl.unlearning.terms import TermGradients, add

log = logging.getLogger(__name__)


class UnlearnModule(FinetuneModule):
    """Unlearning: minimise an objective by updating only the selected weights.

    Frozen weights stay bit-identical to the starting model with any optimiser; the run checks that
    at its end. Log-probabilities at θ₀ that an objective needs are computed once, before the first
    step.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the target model.
        output: folder to write the unlearned model to, in Hugging Face format.
        objective: ``NPO``, ``GradDiff``, ``PO``, another class of :mod:`wagle_pl.objectives.forget`
            or a class path; a class that replaces it keeps the options that both have.
        mask: mask file that attribution wrote for this model; null trains all weights (dense).
        modules: train only weights in these (and in the mask), e.g. ``[mlp, self_attn.q_proj]``.
        layers: train only weights in these layers (and in the mask), e.g. ``3-7`` or ``0,2,5-9``.
        step_rule: ``SAM``, ``MUDMAN``, ``RepSelect``, another class of
            :mod:`wagle_pl.unlearning.step_rules` or a class path: changes the gradient of
            the objective, with more passes per step or with parts of it; one device only.
        adapter: ``LoRA`` trains low-rank adapters instead of the weights; not with mask, modules or
            layers.
        clip_scope: ``trainer.gradient_clip_val`` bounds the gradient norm of the ``selected``
            weights, or of ``all``, as in WAGLE's code (keeps dense gradients; not under ZeRO).
        verify: when to check that frozen weights are bit-identical to θ₀: at the ``end``, after
            each ``step``, or never (``off``).
    """

    task = "unlearning"

    def __init__(
        self,
        model: Union[str, PreTrainedModel],
        output: Optional[str] = None,
        # not "NPO": a parser passes the options of a default class to other classes
        objective: Union[Objective, str] = "npo",
        mask: Optional[Union[str, WeightMask]] = None,
        modules: Optional[list[str]] = None,
        layers: Optional[str] = None,
        step_rule: Optional[Union[StepRule, str]] = None,
        adapter: Optional[Union[LoRA, str]] = None,
        clip_scope: Literal["selected", "all"] = "selected",
        verify: Literal["end", "step", "off"] = "end",
        **kwargs: Any,
    ) -> None:
        check_arguments(UnlearnModule.__init__, locals(), "model.")
        super().__init__(model=model, output=output, **kwargs)
        self.objective = resolve(Objective, objective, "objective")
        self.streams = self.objective.streams
        self.mask_file = str(mask) if isinstance(mask, (str, Path)) else None
        self.step_rule = None if step_rule is None else resolve(StepRule, step_rule, "step_rule")
        if self.step_rule is not None:
            self.step_rule.check(self.objective)
        self.adapter = None if adapter is None else resolve(LoRA, adapter, "adapter")
        pattern = None if self.adapter is not None else self.objective.trainable
        #: What the mask is made of.
        self.restriction = Restriction(self.mask_file or mask, modules, layers, pattern)
        if self.adapter is not None and (mask or modules or layers):
            raise WagleError(
                "an adapter leaves every weight of the model alone, so no mask, modules or layers "
                "apply: give --model.adapter or those, not both"
            )
        self.clip_scope = clip_scope
        self.verify = verify
        self._batches: list[Batch] = []
        self._terms: Optional[TermGradients] = None  # while the weights are selected
        self._references = References()
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
        if self.fits and self.step_rule is not None:
            fp16 = str(self.trainer.precision).startswith("16")
            if not self.alone or fp16 or self.clip_scope == "all":
                raise WagleError(
                    f"step_rule: {type(self.step_rule).__name__} makes gradients of its own passes: "
                    "use it on one device, with precision 32-true, bf16-mixed or bf16-true, and "
                    "--model.clip_scope selected"
                )
        penalized = type(self.objective).penalty is not Objective.penalty
        for needs, what in (
            (self.adapter is not None, "an adapter"),
            (penalized, f"objective {type(self.objective).__name__}, a penalty on the weights,"),
        ):
            if self.sharded and needs:
                raise WagleError(f"{what} does not work under ZeRO-3; use another stage")
        super().configure_model()

    def restrict(self) -> None:
        self._references = References()
        if self.fits:
            self.objective.prepare(self.lm)
        if self.packing and self.objective.hidden_layers:
            raise WagleError(
                f"objective {type(self.objective).__name__} or its retain term reads hidden states of "
                "padded rows: leave --model.packing out",
                option="model.packing",
            )
        if self.adapter is not None:
            self.adapter.add(self.lm, self.model_name, self.objective.trainable)
        self.mask = self.restriction.mask(self._shapes, self.model_name, self.model_fingerprint)
        if self.mask is None:
            return
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
        """Make the selected weights the parameters, and keep θ₀ if a term needs it."""
        if self.objective.needs_theta0 and self.sharded:
            raise WagleError("a frozen copy of θ₀ does not work under ZeRO-3; use another stage")
        bounded = self.trainer.gradient_clip_val and self.trainer.gradient_clip_algorithm != "value"
        dense = self.clip_scope == "all" and self.mask is not None and bool(bounded)
        options = {
            "keep_theta0": self.objective.needs_theta0,
            "keep_dense_gradients": dense,
            **options,
        }
        super().select_weights(**options)
        self._terms = TermGradients(self.selected, apart=self.step_rule is not None)

    def release(self, dtype: Optional[torch.dtype] = None) -> None:
        """The same; an adapter that is to be merged becomes part of the weights."""
        super().release(dtype)
        self._terms = None
        if self.adapter is not None and self.adapter.merge:
            self.adapter.fold()

    def state_bytes(self) -> int:
        """The same; an adapter's optimiser state is negligible."""
        return super().state_bytes() if self.adapter is None else 0

    # -- the objective, and θ₀ ---------------------------------------------------------------------

    @property
    def reference_streams(self) -> tuple[str, ...]:
        return self.objective.references

    @property
    def counted_streams(self) -> tuple[str, ...]:
        return self.streams if self.objective.average == "tokens" else ()

    def on_fit_start(self) -> None:
        """Take digests of frozen weights, try the objective, and compute the references at θ₀."""
        super().on_fit_start()
        if self.mask is not None and self.verify != "off":
            self._frozen = FrozenWeights(self.mask, self.selected.weights())
        self._try_objective()
        self._references.prepare(self, self.objective.references)

    def _try_objective(self) -> None:
        """Compute the objective on two rows, to see its shape before computing the references."""
        if self.data is None:
            return
        batch, sums = {}, {}
        for stream in self.streams:
            tensors = next(iter(self.data.stream_loader(stream, batch_size=2)))[stream]
            batch[stream] = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            sums[stream] = torch.zeros(int(tensors["row"].max()) + 1)
        random, context = random_state(self.device), self.trainer.precision_plugin.forward_context()
        at = partial(self._streams, batch, sums, torch.no_grad)
        with evaluating(self.lm), context, torch.no_grad():
            try:  # without a graph, which would take more memory than those of a step
                loss = self.objective(at())["loss"]
            except RuntimeError:  # if the objective differentiates
                with torch.set_grad_enabled(not self.sharded):
                    loss = self.objective(at())["loss"]
        set_random_state(random, self.device)
        if loss.shape:
            raise WagleError(
                f"objective {type(self.objective).__name__}: loss must be a scalar, got shape "
                f"{tuple(loss.shape)}"
            )

    def streams_of(self, batch: Batch) -> Streams:
        last = self.trainer.estimated_stepping_batches - 1
        return self._streams(
            batch,
            self._references.sums,
            self.selected.at_theta0 if self.objective.needs_theta0 else None,
            progress=min(1.0, self.global_step / last) if last > 0 else 0.0,
            epoch=self.current_epoch,
            propagate={name: partial(self._terms.propagate, name) for name in self._by_term},
        )

    def _streams(
        self, batch: Batch, sums: Mapping[str, Tensor], theta0: Any, **now: Any
    ) -> Streams:
        now |= {"layers": self.objective.hidden_layers, "logits_of": self.objective.whole_streams}
        return Streams(batch, self.run_lm, sums, self.lm, theta0=theta0, **now)

    def losses(self, at: Streams) -> dict[str, Tensor]:
        return self.objective(at)

    # -- the gradient, a term at a time ------------------------------------------------------------

    @property
    def _by_term(self) -> tuple[str, ...]:
        """Terms whose gradients are computed as soon as the terms are: a graph at a time.

        On one device, without fp16's loss scaler, the retain term; with a step rule, all terms.
        """
        if not self.alone or self._scaler is not None:
            return ()
        return ("retain_loss",) if self.step_rule is None else TERMS

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Forget the terms of the last step; keep the batch if a step rule may see it again."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._terms.begin()
            self._batches = []
        if self.step_rule is not None:
            self._batches.append(batch)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add up the terms' gradients; the backward pass of what is left of the loss."""
        self._terms.add_up(loss)
        super().backward(loss, *args, **kwargs)
        self._terms.add_rest()

    # -- a step rule -------------------------------------------------------------------------------

    def _again(self, *losses: Loss) -> list[Gradients]:
        """See :attr:`Step.again`."""
        totals: list[Gradients] = [{} for _ in losses]
        for batch in self._batches:
            with torch.enable_grad():
                with self.trainer.precision_plugin.forward_context():
                    at = self.streams_of(batch)
                    weights = self.objective.weights(at)
                    values = [
                        weights[loss] * self.objective.term(loss, at)
                        if isinstance(loss, str)
                        else loss(at)
                        for loss in losses
                    ]
                for total, value in zip(totals, values, strict=True):
                    scaled = value / self.trainer.accumulate_grad_batches
                    add(total, self._terms.of(scaled, again=value is not values[-1]))
        return totals

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let the step rule compute the gradient."""
        if self.step_rule is not None:
            tensors = self.selected.tensors
            step = Step(
                self.global_step,
                self._terms.values,
                self._terms.totals,
                self._again,
                dense=lambda name, values: tensors[name].placed(values),
                selected=lambda name, dense: tensors[name].taken(dense, dense.dtype),
            )
            with torch.no_grad():
                gradients = self.step_rule.gradient(step)
            for name, values in step.values.items():
                values.grad = gradients[name]
        super().on_before_optimizer_step(optimizer)

    def end_step(self, losses: Sequence[Mapping[str, Tensor]]) -> None:
        """Pass the losses over the global batch to the objective, if it uses them. Collective."""
        if type(self.objective).after_step is Objective.after_step:
            return
        values = torch.stack([torch.stack([*part.values()]) for part in losses])
        means = (distributed.all_reduce_sum(values.mean(0)) / distributed.world_size()).tolist()
        self.objective.after_step(dict(zip(losses[0], means, strict=True)), self.current_epoch)

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the references, which need θ₀, and the state of the objective."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["references"] = self._references.state_dict()
        checkpoint["objective"] = self.objective.state_dict()
        if self.step_rule is not None:
            checkpoint["step_rule"] = self.step_rule.state_dict()
        if self.mask is not None:
            made_of = self.restriction._replace(file=self.mask_file)._asdict()
            checkpoint["mask"] = {"digest": self.mask.digest(), **made_of}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the references; refuse a checkpoint of another mask, or of another model."""
        self.check_kind(checkpoint)
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
        super().on_load_checkpoint(checkpoint)
        self._references.load_state_dict(checkpoint.get("references") or {})
        self.objective.load_state_dict(checkpoint.get("objective") or {})
        if self.step_rule is not None:
            self.step_rule.load_state_dict(checkpoint.get("step_rule") or {})

    # -- the guarantee, and the result -------------------------------------------------------------

    def on_train_batch_end(self, *_: Any) -> None:
        if self._frozen is not None and self.verify == "step":
            self._frozen.check(self.selected.weights(), self.global_step)

    def on_train_end(self) -> None:
        """Check the guarantee, then write the model folder."""
        if self._frozen is not None:
            self._verified = self._frozen.check(self.selected.weights(), self.global_step)
            log.info("verified: %s", self._verified)
        super().on_train_end()

    def export(self, record: dict[str, Any]) -> None:
        """Write the model folder, or that of the adapter."""
        if self.adapter is not None and not self.adapter.merge:
            self.adapter.save(self.tokenizer, self.output, model_card(record), record)
            return
        super().export(record)

    def record(self) -> dict[str, Any]:
        """What made this model; adds objective, mask, adapter and the guarantee."""
        record = super().record()
        mask = None
        if self.mask is not None:
            made_by = {"density": self.mask.density, "made_by": self.mask.metadata}
            mask = {"file": self.mask_file, **made_by}
        record["lineage"][-1] |= {
            "objective": {**describe(self.objective), "retain": describe(self.objective.retain)},
            "mask": mask,
            "verified": self._verified,
            "adapter": None if self.adapter is None else describe(self.adapter),
        }
        if self.step_rule is not None:
            record["lineage"][-1]["step_rule"] = describe(self.step_rule)
        return record
