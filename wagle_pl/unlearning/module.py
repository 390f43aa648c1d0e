"""``FinetuneModule`` makes target and retrained models; ``UnlearnModule`` makes a model forget."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor

from wagle_pl import distributed, models
from wagle_pl.evaluation.likelihood import forward_answers
from wagle_pl.evaluation.module import EvaluationModule
from wagle_pl.layers import expert_weights
from wagle_pl.masks import WeightMask
from wagle_pl.strategies import flat_masks, is_zero
from wagle_pl.unlearning.adapters import LoRA
from wagle_pl.unlearning.base import freeze_others, mask_matching
from wagle_pl.unlearning.card import model_card
from wagle_pl.unlearning.frozen import FrozenWeights
from wagle_pl.unlearning.objectives import Objective, Streams
from wagle_pl.unlearning.optim import (
    MaskedAdamW,
    ParameterMask,
    ParameterMasks,
    guard,
    mask_gradients,
    mask_whole_gradients,
    parameter_masks,
)
from wagle_pl.unlearning.reference import FrozenCopy, References
from wagle_pl.unlearning.resume import StepStart, random_state, rewind, set_random_state
from wagle_pl.unlearning.schedules import lr_factor
from wagle_pl.utilities import WagleError, describe, peak_memory, refuse_existing, resolve, versions

log = logging.getLogger(__name__)

Losses = dict[str, Tensor]


class FinetuneModule(EvaluationModule):
    """Supervised fine-tuning on answers: makes the target model, and the retrained model it is compared with.

    The loss is the mean over examples of the mean negative log-likelihood per answer token.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the model to start from.
        output: folder to write the model to, in Hugging Face format.
        train_on: ``all`` (forget and retain rows: the target model), ``retain`` (the retrained model) or ``forget``.
        warmup: linear warm-up: a share of all steps (below 1) or a number of steps. ``--lr_scheduler`` replaces it.
        decay: after warm-up, ``linear`` to zero or ``constant``.
        lr_interval: when a scheduler given by ``--lr_scheduler`` steps: each ``epoch``, as in LightningCLI, or each
            optimiser ``step``.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        lr: learning rate of the optimiser, whichever it is; that of ``--optimizer`` when None.
        kwargs: see :class:`EvaluationModule`.
    """

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        train_on: Literal["all", "retain", "forget"] = "all",
        warmup: float = 0.1,
        decay: Literal["linear", "constant"] = "linear",
        lr_interval: Literal["epoch", "step"] = "epoch",
        gradient_checkpointing: bool = False,
        lr: Optional[float] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, output=output, **kwargs)
        if lr is not None and not lr >= 0:
            raise WagleError(f"model.lr must not be below 0, got {lr}")
        self.lr = lr
        self.streams = (train_on,)
        self.warmup = warmup
        self.decay = decay
        self.lr_interval = lr_interval
        self.gradient_checkpointing = gradient_checkpointing
        #: Parameters (and ``lr``, if that is given) -> optimiser, and optimiser -> scheduler; the command line sets
        #: them from ``--optimizer`` and ``--lr_scheduler``. Without a scheduler, ``warmup`` and ``decay`` apply.
        self.make_optimizer: Callable[..., torch.optim.Optimizer] = MaskedAdamW
        self.make_lr_scheduler: Optional[Callable[[torch.optim.Optimizer], Any]] = None
        self._alone = False
        self._started = 0.0
        self._step_start: Optional[StepStart] = None
        self._random: Mapping[str, Tensor] = {}

    @property
    def results_folder(self) -> Path:
        """Test results go beside the model's files."""
        return Path(self.output) / "test" if self.output else super().results_folder

    def setup(self, stage: str) -> None:
        """Refuse an output that exists before any work is done."""
        super().setup(stage)
        if stage == "fit":
            if self._alone:
                raise WagleError("load_from_checkpoint gives a module to use and to test: to train on, make a new one "
                                 "and give trainer.fit the checkpoint as ckpt_path")  # fmt: skip
            if not self.output:
                raise WagleError("fit needs a folder for the model: give --model.output")
            if Path(self.output).resolve() == Path(self.model_name).resolve():
                raise WagleError(f"output {self.output} is the model that this run starts from: choose another folder")
            self._refuse_what_would_be_lost()
            refuse_existing(Path(self.output), self.overwrite, kind="folder")

    def _refuse_what_would_be_lost(self) -> None:
        """Refuse checkpoints and logs within the output, which the model's folder replaces at the end."""
        output = Path(self.output).resolve()
        written = [("trainer.default_root_dir", self.trainer.default_root_dir)]
        savers = self.trainer.checkpoint_callbacks
        written += [("dirpath of checkpoints", getattr(saver, "dirpath", None)) for saver in savers]
        for what, folder in written:
            if folder and output in (Path(folder).resolve(), *Path(folder).resolve().parents):
                raise WagleError(f"{what}: {folder} lies in the output {self.output}, which the model's folder will "
                                 "replace: name another")  # fmt: skip

    def configure_model(self) -> None:
        """Load the model, and switch gradient checkpointing on if asked; without a trainer, load it for use.

        Raises:
            WagleError: if the strategy cannot train a model of this kind.
        """
        self._alone |= not self.attached
        super().configure_model()
        if not self.attached:
            return
        several = self.trainer.training and len(self.streams) > 1 and self.sharded
        if several and any(expert_weights(module) for module in self.lm.modules()):
            # an assertion of DeepSpeed's, in the middle of a backward pass over several forward passes (its issue 5321)
            raise WagleError(f"ZeRO-3 cannot train experts on {' and '.join(self.streams)} rows in one step: choose "
                             "another stage (--trainer.strategy deepspeed_stage_2)")  # fmt: skip
        self.lm.train()
        if self.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # -- optimisation -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The optimiser over trainable parameters, with warm-up and decay by step."""
        options = {} if self.lr is None else {"lr": self.lr}
        optimizer = self.make_optimizer([p for p in self.lm.parameters() if p.requires_grad], **options)
        if self.make_lr_scheduler is not None:
            scheduler = self.make_lr_scheduler(optimizer)
            how = {"scheduler": scheduler, "monitor": _monitor(scheduler), "interval": self.lr_interval}
            return {"optimizer": optimizer, "lr_scheduler": how}
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") and (self.decay != "constant" or 0 < self.warmup < 1):
            raise WagleError("the run's steps are not known beforehand, and warm-up and decay are shares of them: give "
                             "--trainer.max_steps or --trainer.max_epochs (max_time may end it earlier), or "
                             "--model.decay constant with a --model.warmup of 0 or in steps")  # fmt: skip
        factor = lr_factor(self.warmup, self.decay, steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def run_lm(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The model on one stream: (logits, labels), from the first answer token on."""
        output, labels = forward_answers(self.lm, tensors)
        return output.logits, labels

    def losses(self, at: Streams) -> Losses:
        """Losses of one batch; ``loss`` is minimised."""
        (stream,) = self.streams
        return {"loss": at.mean(stream, at[stream].nll)}

    def streams_of(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Streams:
        """What the losses see of one batch."""
        return Streams(batch, self.run_lm, {})

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> Tensor:
        """One micro-batch."""
        losses = self.losses(self.streams_of(batch))
        self._check_finite(losses, batch, batch_idx)
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, prog_bar=True)
        return losses["loss"]

    def _check_finite(self, losses: Losses, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> None:
        """Stop all ranks when the loss of one is NaN or infinite."""
        finite = bool(torch.isfinite(losses["loss"]))
        if not distributed.most(int(not finite)):
            return
        rows = {stream: tensors["row"].tolist() for stream, tensors in batch.items()}
        numbers = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
        found = distributed.gather([] if finite else [f"rows {rows}): {numbers}"])
        raise WagleError(f"loss is not finite at step {self.global_step} (batch {batch_idx}, {found[0]}; lower the "
                         "learning rate. Checkpoints written so far are kept")  # fmt: skip

    # -- resume -------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember where a step starts."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_start = StepStart(batch_idx, self.global_step, random_state(self.device))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state, which dropout draws from, so that a resumed run equals an unbroken one; and what the
        model is made from, for ``wagle export`` and ``load_from_checkpoint``. In the middle of a step, go back to its
        start."""
        super().on_save_checkpoint(checkpoint)
        start = self._step_start
        begun = start is not None and start.step == self.global_step
        if begun:
            rewind(checkpoint["loops"], start.batch)
        checkpoint.update(start.random if begun else random_state(self.device))
        dtype = str(next(self.lm.parameters()).dtype).removeprefix("torch.")
        checkpoint["model"] = {"name": self.model_name, "dtype": dtype, "record": self.record()}
        checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).setdefault("model", self.model_name)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the random state back, when training starts."""
        super().on_load_checkpoint(checkpoint)
        self._random = {key: checkpoint[key] for key in ("rng_state", "cuda_rng_state") if key in checkpoint}

    def on_train_start(self) -> None:
        """Start the clock and restore the random state of a checkpoint."""
        self._started = time.monotonic()
        set_random_state(self._random, self.device)
        # counting the steps made the loader before Lightning read the checkpoint: tell it only now where to go on
        self.trainer.fit_loop._load_combined_loader_states()

    # -- export -------------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Write the model folder."""
        super().on_train_end()
        if self.trainer.fast_dev_run:
            return
        record = self.record()
        if self.sharded or self.trainer.is_global_zero:
            self.export(record)
        if self.trainer.is_global_zero:
            log.info("model written to %s", self.output)

    def export(self, record: dict[str, Any]) -> None:
        """Write the model folder, in the dtypes of the model it was made from, what has not moved with its bits; under
        ZeRO-3 a meeting of all ranks."""
        originals = models.Originals(self.model_name)
        models.save_model(self.lm, self.tokenizer, self.output, model_card(record), record, originals)

    def record(self) -> dict[str, Any]:
        """What made this model, for ``wagle.json`` and the model card."""
        step = {
            "module": type(self).__name__,
            "base": self.model_name,
            "base_fingerprint": self.model_fingerprint,
            "data": self.described_data,
            "streams": list(self.streams),
            "steps": self.global_step,
            "seconds": round(time.monotonic() - self._started, 1),
            "peak_memory_bytes": peak_memory(),
            "versions": versions(),
            "seed": self.run_config.get("seed_everything"),
            "config": self.run_config,
        }
        return {"format_version": 1, "lineage": [*models.read_record(self.model_name).get("lineage", []), step]}


class UnlearnModule(FinetuneModule):
    """Unlearning: minimise an objective while only the selected weights may move.

    Frozen weights stay bit-identical to the starting model whatever the optimiser; the run checks that at its end.
    Log-probabilities at θ₀ that an objective needs are computed once, kept in ``.references`` beside the output, and
    reused by later runs on the same model and data.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the target model.
        output: folder to write the unlearned model to, in Hugging Face format.
        objective: ``NPO``, ``GradDiff``, ``PO``, any other class of ``wagle_pl.unlearning.objectives``, or a class path
            to an ``Objective``. Options given to one class carry over to another that replaces it and has them too.
        mask: mask file that attribution wrote for this model; null is dense unlearning.
        modules: only weights in these modules may move, e.g. ``[mlp]`` or ``[self_attn.q_proj]``; with a mask, those
            that both select.
        layers: only weights in these layers may move, e.g. ``3-7`` or ``0,2,5-9``; with a mask, those that both select.
        adapter: ``LoRA`` trains low-rank adapters in place of the weights; not together with a mask, modules or layers.
        clip_scope: whose gradient norm ``trainer.gradient_clip_val`` bounds: of the ``selected`` weights, or of ``all``
            (dense gradients, kept until they are clipped).
        verify: when to check that frozen weights are bit-identical to θ₀: at the ``end``, after each ``step``, or never
            (``off``).
        reference_logits: where predictions at θ₀ come from when a term needs them (``KL``, ``UNDIAL``, retain term
            ``kl``): ``frozen_copy`` is exact, at the price of a forward pass a step and of memory for the parameters
            that move; ``top_k`` computes them once and keeps the most probable tokens and the rest as one bucket.
        top_k: how many tokens ``reference_logits: top_k`` keeps.
        kwargs: see :class:`FinetuneModule`.
    """

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        objective: Union[Objective, str] = "npo",  # not "NPO": a parser hands the options of a default class to others
        mask: Optional[str] = None,
        modules: Optional[list[str]] = None,
        layers: Optional[str] = None,
        adapter: Optional[Union[LoRA, str]] = None,
        clip_scope: Literal["selected", "all"] = "selected",
        verify: Literal["end", "step", "off"] = "end",
        reference_logits: Literal["frozen_copy", "top_k"] = "frozen_copy",
        top_k: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, output=output, **kwargs)
        self.objective = resolve(Objective, objective, "objective")
        self.streams = self.objective.streams
        self.mask_file = None if mask is None else str(mask)
        self.mask_modules = modules
        self.mask_layers = layers
        self.adapter = None if adapter is None else resolve(LoRA, adapter, "adapter")
        if self.adapter is not None and (mask or modules or layers):
            raise WagleError("an adapter leaves every weight of the model alone, so no mask, modules or layers apply: "
                             "give --model.adapter or those, not both")  # fmt: skip
        self.clip_scope = clip_scope
        self.verify = verify
        self.mask: Optional[WeightMask] = None
        self._masks: ParameterMasks = {}
        self._frozen: Optional[FrozenWeights] = None
        if top_k < 1:
            raise WagleError(f"model.top_k must be at least 1, got {top_k}")
        self.reference_logits = reference_logits
        self.top_k = top_k
        self._references = References()
        self._theta0: Optional[FrozenCopy] = None
        self._verified: Optional[str] = None

    def configure_model(self) -> None:
        """Load the model and the mask, check that they belong together, and freeze what the mask leaves out."""
        if self.lm is not None:
            return
        self._check_strategy()
        super().configure_model()
        fits = self.attached and self.trainer.state.fn == "fit"
        if fits:
            self.objective.prepare(self.lm)
        self._restrict()
        if fits:
            self._copy_theta0()

    def _check_strategy(self) -> None:
        """Refuse what needs parameters whole where ZeRO-3 spreads them over ranks."""
        if not self.sharded:
            return
        if self.adapter is not None:
            raise WagleError("an adapter does not work under ZeRO-3; use another stage")
        if type(self.objective).penalty is not Objective.penalty:
            raise WagleError(f"objective {type(self.objective).__name__} has a penalty on the weights, which ZeRO-3 "
                             "spreads over ranks; use another stage")  # fmt: skip

    def _restrict(self) -> None:
        """Add the adapter, or freeze what the mask leaves out."""
        if self.adapter is not None:
            self.adapter.add(self.lm, self.model_name)
            freeze_others(self.lm, self.objective.trainable)
        self.mask = self._find_mask()
        if self.mask is None:
            return
        if not self.mask.count():
            made_by = self.mask.origin if self.mask_file is None else f"{self.mask_file}, {self.mask.origin}"
            raise WagleError(f"the mask ({made_by}) selects nothing: there is no weight to move")
        if self.clip_scope == "selected":
            for name, parameter in self.lm.named_parameters():
                parameter.requires_grad_(self.mask.count(name) > 0)
        if self.attached and not is_zero(self.trainer.strategy):
            self._remember_frozen()

    def _remember_frozen(self) -> None:
        """Take the digests of frozen weights, once they have the dtype they keep."""
        if self.verify != "off":
            self._frozen = FrozenWeights(self.mask, models.whole(self.lm.named_parameters()))

    def _find_mask(self) -> Optional[WeightMask]:
        """The mask of the file, of the modules and layers, or what both select; None for dense unlearning."""
        shapes, mask = models.parameter_shapes(self.lm), None
        if self.mask_file is not None:
            mask = WeightMask.load(self.mask_file)
            mask.check(shapes, self.model_fingerprint, where=f"mask {self.mask_file}")
        if self.mask_modules or self.mask_layers:
            made_for = {"model": self.model_name, "model_fingerprint": self.model_fingerprint}
            restriction = WeightMask.from_modules(shapes, self.mask_modules, self.mask_layers, made_for)
            mask = restriction if mask is None else mask & restriction
        if self.objective.trainable is not None and self.adapter is None:
            own = mask_matching(shapes, self.objective.trainable, {"model_fingerprint": self.model_fingerprint})
            mask = own if mask is None else mask & own
        return mask

    def configure_optimizers(self) -> Any:
        """The optimiser, made safe for frozen weights."""
        configured = super().configure_optimizers()
        if self.mask is not None:
            self._protect([configured["optimizer"]])
        return configured

    def _protect(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Keep gradients and optimisers from moving frozen weights.

        Raises:
            WagleError: if an option cannot work under ZeRO.
        """
        zero = is_zero(self.trainer.strategy)
        if self.clip_scope == "all" and zero:
            raise WagleError("clip_scope all needs every gradient whole at the step, which ZeRO does not keep: choose "
                             "--model.clip_scope selected")  # fmt: skip
        trainable = [(name, p) for name, p in self.lm.named_parameters() if p.requires_grad]
        self._masks = parameter_masks(trainable, self.mask)
        if self.clip_scope == "selected":
            alone = self.trainer.world_size == 1 and not zero
            mask_gradients(self._masks, accumulated=alone)  # DDP and ZeRO reduce gradients as they come
        for optimizer in () if zero else optimizers:
            self._guard(optimizer, self._masks)

    def _guard(self, optimizer: torch.optim.Optimizer, masks: ParameterMasks) -> None:
        if guard(optimizer, masks):
            name = type(optimizer).__name__
            log.info("%s could move frozen weights: they are put back after each step", name)

    def _guard_partitions(self) -> None:
        """The optimiser made safe under ZeRO, where it holds flat partitions in place of parameters."""
        self._remember_frozen()
        strategy = self.trainer.strategy
        flats = flat_masks(strategy.fragments(), self.mask)
        masks = {flat: ParameterMask(packed, flat) for flat, packed in flats.items()}
        self._guard(strategy.base_optimizer, masks)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip; gradients that were kept whole until now are masked here, just before the step."""
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        if self.clip_scope == "all":
            mask_whole_gradients(self._masks)

    # -- θ₀ -----------------------------------------------------------------------------------------------------------

    @property
    def reference_streams(self) -> tuple[str, ...]:
        """Streams of which one number a row is known at θ₀: the data module gives them the same rows in every epoch."""
        return self.objective.references

    def _copy_theta0(self) -> None:
        """Copy the model, while it still is θ₀ and once it is known what moves, if a term needs it whole."""
        exact = bool(self.objective.theta0_streams) and self.reference_logits == "frozen_copy"
        if exact or self.objective.needs_hidden_at_theta0:
            self._theta0 = FrozenCopy(self.lm)

    def on_fit_start(self) -> None:
        """Protect frozen weights from an optimiser that a subclass configures; compute, or find, what θ₀ says of the
        rows, as far as the objective needs it."""
        if self.mask is not None and not self._masks:
            self._protect(getattr(optimizer, "optimizer", optimizer) for optimizer in self.trainer.optimizers)
        if self.mask is not None and is_zero(self.trainer.strategy):
            self._guard_partitions()
        if self._theta0 is not None:
            self._theta0.match(self.lm)
        top_k = self.objective.theta0_streams if self.reference_logits == "top_k" else ()
        folder = Path(self.output).parent / ".references"
        self._references.prepare(self, folder, self.objective.references, top_k, self.top_k)

    def streams_of(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Streams:
        """What the objective sees of one batch."""
        last = self.trainer.estimated_stepping_batches - 1
        return Streams(
            batch,
            self.run_lm,
            self._references.sums,
            lm=self.lm,
            layers=self.objective.hidden_layers,
            theta0=self._theta0,
            top_k=self._references.top_k,
            progress=min(1.0, self.global_step / last) if last > 0 else 0.0,
            epoch=self.current_epoch,
        )

    def losses(self, at: Streams) -> Losses:
        """The objective's losses."""
        return self.objective(at)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the references: a resumed run no longer has θ₀ to compute them from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["references"] = self._references.state_dict()
        checkpoint["mask"] = self._mask_digest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the references back."""
        super().on_load_checkpoint(checkpoint)
        if self.attached and checkpoint.get("mask") != self._mask_digest():
            raise WagleError("the checkpoint is of a run with another mask: resume with that one, or start a new run")
        self._references.load_state_dict(checkpoint.get("references", {}))

    # -- the guarantee ------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, *_: Any) -> None:
        """Check the guarantee after each step, if asked."""
        if self._frozen is not None and self.verify == "step":
            self._frozen.check(models.whole(self.lm.named_parameters()), self.global_step)

    def on_train_end(self) -> None:
        """Check the guarantee, then write the model folder."""
        if self._frozen is not None:
            self._verified = self._frozen.check(models.whole(self.lm.named_parameters()), self.global_step)
            log.info("verified: %s", self._verified)
        super().on_train_end()

    def _mask_digest(self) -> Optional[str]:
        """The mask as one name; None without a mask."""
        return None if self.mask is None else models.fingerprint((n, self.mask.packed(n)) for n in self.mask)

    def export(self, record: dict[str, Any]) -> None:
        """Write the model folder, or that of the adapter."""
        if self.adapter is not None and not self.adapter.merge:
            self.adapter.save(self.tokenizer, self.output, model_card(record), record)
            return
        if self.adapter is not None:
            self.adapter.fold()
        super().export(record)

    def record(self) -> dict[str, Any]:
        """What made this model; adds objective, mask and the guarantee."""
        record = super().record()
        objective = {**describe(self.objective), "retain": describe(self.objective.retain)}
        mask = None
        if self.mask is not None:
            mask = {"file": self.mask_file, "density": self.mask.density, "made_by": self.mask.metadata}
        record["lineage"][-1] |= {"objective": objective, "mask": mask, "verified": self._verified}
        record["lineage"][-1]["adapter"] = None if self.adapter is None else describe(self.adapter)
        return record


def _monitor(scheduler: Any) -> str:
    return getattr(scheduler, "monitor", "train/loss")
