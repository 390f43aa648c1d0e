"""``UnlearnModule``: makes a model forget."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import describe, resolve
from wagle_pl.core.schema import check_arguments
from wagle_pl.core.weights import evaluating
from wagle_pl.lm.models import checkpoint_dtype
from wagle_pl.lm.quantised import check_form
from wagle_pl.lm.resume import random_state, set_random_state
from wagle_pl.objectives import Objective, Streams
from wagle_pl.objectives.objective import TERMS
from wagle_pl.objectives.streams import References
from wagle_pl.unlearning.adapters import LoRA
from wagle_pl.unlearning.export import model_card
from wagle_pl.unlearning.finetune import Batch, FinetuneModule
from wagle_pl.unlearning.floor import StepFloor
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
        step_rule: ``SAM``, ``MUDMAN``, ``RepSelect``, another class of
            :mod:`wagle_pl.unlearning.step_rules` or a class path: changes the gradient of
            the objective, with more passes per step or with parts of it; one device only.
        adapter: ``LoRA`` trains low-rank adapters instead of the weights; not with mask, modules or
            layers.
        floor: number of bits or quantised form, see ``Quantise``: after training, each selected
            weight of the blocks' linear layers is in another bin of it or returns to θ₀, so that
            rounding undoes no step (:func:`wagle_pl.unlearning.floor.floored`); one device only.
    """

    task = "unlearning"

    def __init__(
        self,
        model: Union[str, PreTrainedModel],
        output: Optional[str] = None,
        # not "NPO": a parser passes the options of a default class to other classes
        objective: Union[Objective, str] = "npo",
        step_rule: Optional[Union[StepRule, str]] = None,
        adapter: Optional[Union[LoRA, str]] = None,
        floor: Optional[Union[int, Literal["nf4", "q8_0", "q4_0"]]] = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(UnlearnModule.__init__, locals(), "model.")
        super().__init__(model=model, output=output, **kwargs)
        self.objective = resolve(Objective, objective, "objective")
        self.streams = self.objective.streams
        self.step_rule = None if step_rule is None else resolve(StepRule, step_rule, "step_rule")
        if self.step_rule is not None:
            self.step_rule.check(self.objective)
        self.adapter = None if adapter is None else resolve(LoRA, adapter, "adapter")
        if self.adapter is not None and any(self.restriction):
            raise WagleError(
                "an adapter leaves every weight of the model alone, so no mask, modules or layers "
                "apply: give --model.adapter or those, not both"
            )
        self.floor = floor
        if floor is not None:
            check_form(floor, "model.floor")
        if self.adapter is None:
            self.restriction = self.restriction._replace(matching=self.objective.trainable)
        self._batches: list[Batch] = []
        self._terms: Optional[TermGradients] = None  # while the weights are selected
        self._references = References()
        self._floor: Optional[StepFloor] = None  # while the weights are selected
        self._floored: dict[str, int] = {}

    # -- what may move -----------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the model, unless the strategy lacks what this run needs."""
        if self.fits and self.step_rule is not None:
            fp16 = str(self.trainer.precision).startswith("16")
            if not self.alone or fp16 or self.clip_scope == "all":
                raise WagleError(
                    f"step_rule: {type(self.step_rule).__name__} makes gradients of its own passes: "
                    "use it on one device, with precision 32-true, bf16-mixed or bf16-true, and "
                    "--model.clip_scope selected"
                )
        if self.fits and self.floor is not None and (not self.alone or self.adapter is not None):
            raise WagleError("works on one device, without an adapter", option="model.floor")
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
        super().restrict()

    def select_weights(self, **options: Any) -> None:
        """Make the selected weights the parameters, and keep θ₀ if a term needs it."""
        if self.objective.needs_theta0 and self.sharded:
            raise WagleError("a frozen copy of θ₀ does not work under ZeRO-3; use another stage")
        if self.floor is not None:
            self._floor = StepFloor(self.lm, self.floor)
        keep = self.objective.needs_theta0 or self.floor is not None
        super().select_weights(keep_theta0=keep, **options)
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
        """Try the objective, and compute the references at θ₀."""
        super().on_fit_start()
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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the references, and the state of the objective."""
        super().on_load_checkpoint(checkpoint)
        self._references.load_state_dict(checkpoint.get("references") or {})
        self.objective.load_state_dict(checkpoint.get("objective") or {})
        if self.step_rule is not None:
            self.step_rule.load_state_dict(checkpoint.get("step_rule") or {})

    # -- the result --------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Apply the step floor; then check the guarantee and write the model folder."""
        if self.floor is not None and not self.trainer.fast_dev_run:
            dtype = self.output_dtype or checkpoint_dtype(self.model_name) or torch.float32
            self._floored = self._floor.apply(self.selected, self._gradient(), dtype)
        super().on_train_end()

    def _gradient(self) -> Gradients:
        """The gradient of the objective over an epoch's batches, in evaluation mode."""
        self.selected.take_gradients()
        with evaluating(self.lm), torch.enable_grad():
            for batch in self.trainer.train_dataloader:
                batch = self._on_before_batch_transfer(batch)
                batch = self.trainer.strategy.batch_to_device(batch)
                self._terms.begin()
                with self.trainer.precision_plugin.forward_context():
                    loss = self.losses(self.streams_of(batch))["loss"]
                self.backward(loss)
        return dict(self.selected.gradients())

    def export(self, record: dict[str, Any]) -> None:
        """Write the model folder, or that of the adapter."""
        if self.adapter is not None and not self.adapter.merge:
            self.adapter.save(self.tokenizer, self.output, model_card(record), record)
            return
        super().export(record)

    def record(self) -> dict[str, Any]:
        """What made this model; adds objective and adapter."""
        record = super().record()
        record["lineage"][-1] |= {
            "objective": {**describe(self.objective), "retain": describe(self.objective.retain)},
            "adapter": None if self.adapter is None else describe(self.adapter),
        }
        if self.step_rule is not None:
            record["lineage"][-1]["step_rule"] = describe(self.step_rule)
        if self.floor is not None:
            record["lineage"][-1]["floor"] = {"form": self.floor, **self._floored}
        return record
