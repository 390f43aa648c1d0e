"""``FinetuneModule`` makes target and retrained models; ``UnlearnModule`` makes a model forget."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from wagle_pl.core import distributed, outputs
from wagle_pl.core.environment import peak_memory, versions
from wagle_pl.core.errors import Diverged, WagleError, first_line
from wagle_pl.core.registry import describe, resolve
from wagle_pl.data.template import differing_prompts
from wagle_pl.lm import models
from wagle_pl.lm.layers import expert_weights
from wagle_pl.lm.likelihood import forward_answers
from wagle_pl.lm.module import LanguageModule
from wagle_pl.lm.resume import (
    StepStart,
    begin,
    keep_position,
    random_state,
    recount,
    set_random_state,
)
from wagle_pl.lm.saving import Originals, read_record, save_model
from wagle_pl.lm.weights import parameter_shapes
from wagle_pl.masks import Restriction, WeightMask
from wagle_pl.masks.selected import SUFFIX, SelectedWeights, load_values
from wagle_pl.objectives.forget import Objective, Streams
from wagle_pl.objectives.references import References, predictions_of
from wagle_pl.planning import Run, Size, disk_bytes
from wagle_pl.strategies import is_zero, stage_of
from wagle_pl.unlearning.adapters import LoRA
from wagle_pl.unlearning.card import model_card
from wagle_pl.unlearning.frozen import FrozenWeights
from wagle_pl.unlearning.optim import MaskedAdamW

log = logging.getLogger(__name__)

Losses = dict[str, Tensor]


class FinetuneModule(LanguageModule):
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
        values: how the weights that move are kept under ``bf16-true``: ``fp32`` beside the model's own, 16 to 20 bytes
            a weight with AdamW; or ``split``: only the 16 bits that bf16 lacks, and gradients in bf16, 12 bytes, or 6
            with an optimiser of 8 bits, at the price of some speed, on one device.
        output_dtype: ``float32`` writes the model's folder with values as they are trained; null rounds them to the
            dtype of the base model.
        lr: learning rate of the optimiser, whichever it is; that of ``--optimizer`` when None.
        **kwargs: passed to :class:`~wagle_pl.lm.module.LanguageModule`.
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
        values: Literal["fp32", "split"] = "fp32",
        output_dtype: Optional[Literal["float32"]] = None,
        lr: Optional[float] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, output=output, **kwargs)
        if lr is not None and not lr >= 0:
            raise WagleError(f"model.lr must not be below 0, got {lr}")
        self.lr = lr
        if not 0 <= warmup < float("inf"):
            raise WagleError(f"model.warmup must be 0 or more, got {warmup:g}")
        self.streams = (train_on,)
        self.values = values
        self.output_dtype = None if output_dtype is None else torch.float32
        self.warmup = warmup
        self.decay = decay
        self.lr_interval = lr_interval
        self.gradient_checkpointing = gradient_checkpointing
        #: Parameters (and ``lr``, if that is given) -> optimiser, and optimiser -> scheduler; the command line sets
        #: them from ``--optimizer`` and ``--lr_scheduler``. Without a scheduler, ``warmup`` and ``decay`` apply.
        self.make_optimizer: Callable[..., torch.optim.Optimizer] = MaskedAdamW
        self.make_lr_scheduler: Optional[Callable[[torch.optim.Optimizer], Any]] = None
        #: While it is trained: the model's weights as values and dense tensors.
        self.selected: Optional[SelectedWeights] = None
        #: Selected weights of the model; None where all may move.
        self.mask: Optional[WeightMask] = None
        self._alone = False
        self._losses: list[tuple[int, dict[str, Any], Losses]] = []
        self._fitted = False
        self._started = time.monotonic()
        self._step_start: Optional[StepStart] = None
        self._random: Mapping[str, Tensor] = {}

    @property
    def results_folder(self) -> Path:
        """Test results go beside the model's files, once there are any."""
        written = self.output and Path(self.output).is_dir()
        return Path(self.output if written else self.trainer.default_root_dir) / "test"

    def setup(self, stage: str) -> None:
        """Refuse an output that exists before any work is done."""
        super().setup(stage)
        if stage == "fit":
            if self._alone:
                raise WagleError(
                    "load_from_checkpoint gives a module to use and to test: to train on, make a new one "
                    "and give trainer.fit the checkpoint as ckpt_path"
                )
            if self._fitted:
                raise WagleError(
                    f"this module was trained already, and its weights are no longer those of "
                    f"{self.model_name}: to train again, make a new one"
                )
            clip = self.trainer.gradient_clip_val
            if clip is not None and not clip >= 0:
                raise WagleError(f"trainer.gradient_clip_val must be 0 or more, got {clip:g}")
            if not self.output:
                raise WagleError("fit needs a folder for the model: give --model.output")
            if Path(self.output).resolve() == Path(self.model_name).resolve():
                raise WagleError(
                    f"output {self.output} is the model that this run starts from: choose another folder"
                )
            self._refuse_what_would_be_lost()
            self._check_values_option()
            outputs.reserve(Path(self.output), self.overwrite, kind="folder")

    def _check_values_option(self) -> None:
        """Refuse values in halves where there are none."""
        precision, alone = str(self.trainer.precision), self.trainer.world_size == 1
        if self.values == "split" and (
            precision != "bf16-true" or not alone or is_zero(self.trainer.strategy)
        ):
            raise WagleError(
                f"model.values split is for trainer.precision bf16-true on one device without DeepSpeed; this run has "
                f"{precision} on {self.trainer.world_size}: leave it at fp32"
            )
        if self.output_dtype and is_zero(self.trainer.strategy):
            raise WagleError(
                "model.output_dtype does not work under DeepSpeed, whose optimisers hold the fp32 values: leave it out"
            )

    def teardown(self, stage: str) -> None:
        """Let others write the output."""
        if stage == "fit" and self.output:
            outputs.release(Path(self.output))

    def planned_files(self) -> list[outputs.Planned]:
        """What the run is going to write, at least."""
        dtype = models.checkpoint_dtype(self.model_name) or torch.float32
        size = Size(self._weights, dtype.itemsize)
        optimizer = next(
            (type(optimizer).__name__ for optimizer in self.trainer.optimizers), "none"
        )
        files = disk_bytes(size, self.planned_run(optimizer))
        return [
            outputs.Planned("model", Path(self.output), files["model"]),
            *outputs.planned_checkpoint(self.trainer, files["checkpoint"]),
        ]

    def planned_run(self, optimizer: str) -> Run:
        """The run, as ``wagle plan`` knows it."""
        stage = stage_of(self.trainer.strategy)
        return Run.about_to("finetuning", str(self.trainer.precision), stage, optimizer=optimizer)

    def _refuse_what_would_be_lost(self) -> None:
        """Refuse checkpoints and logs within the output, which the model's folder replaces at the end."""
        output = Path(self.output).resolve()
        written = [("trainer.default_root_dir", self.trainer.default_root_dir)]
        savers = self.trainer.checkpoint_callbacks
        written += [("dirpath of checkpoints", getattr(saver, "dirpath", None)) for saver in savers]
        for what, folder in written:
            if folder and output in (Path(folder).resolve(), *Path(folder).resolve().parents):
                raise WagleError(
                    f"{what}: {folder} lies in the output {self.output}, which the model's folder will "
                    "replace: name another"
                )

    def configure_callbacks(self) -> list[Callback]:
        """What lets others write the output when the run fails. A callback that copies the module gets one with its
        model."""
        copies = any(
            isinstance(callback, StochasticWeightAveraging) for callback in self.trainer.callbacks
        )
        if copies and not is_zero(self.trainer.strategy):  # which Lightning refuses together
            self.configure_model()
        return [outputs.ReleaseOnFailure(Path(self.output))] if self.output else []

    def configure_model(self) -> None:
        """Load the model and, to train it, make its selected weights its parameters. A fit loads it anew: what a test
        before it has loaded may be a checkpoint, and in another precision.

        Raises:
            WagleError: if the strategy cannot train a model of this kind.
        """
        self._alone |= not self.attached
        if self.fits and self.selected is None:
            self.lm, self._random = None, {}
        super().configure_model()
        if not self.fits or self.selected is not None:
            return
        self._weights = sum(map(prod, parameter_shapes(self.lm).values()))
        several = len(self.streams) > 1 and self.sharded
        if several and any(expert_weights(module) for module in self.lm.modules()):
            # an assertion of DeepSpeed's, in the middle of a backward pass over several forward passes (its issue 5321)
            raise WagleError(
                f"ZeRO-3 cannot train experts on {' and '.join(self.streams)} rows in one step: choose "
                "another stage (--trainer.strategy deepspeed_stage_2)"
            )
        self.lm.train()
        if self.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.select_weights()

    def select_weights(self) -> None:
        """Make the weights that may move the parameters of the model; see :mod:`wagle_pl.masks.selected`."""
        self.selected = self.as_values(self.lm)

    def as_values(self, lm: nn.Module, **options: Any) -> SelectedWeights:
        """The model as selected weights, kept as the options and the strategy want them."""
        split = None
        if self.values == "split":  # gradients of several micro-batches are added up in fp32
            split = torch.bfloat16 if self.trainer.accumulate_grad_batches == 1 else torch.float32
        return SelectedWeights(
            lm, masters=not is_zero(self.trainer.strategy), split=split, **options
        )

    def stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of what a checkpoint holds: all but the dense tensors, which are the base model's."""
        dense = () if self.selected is None else self.selected.tensors.values()
        left_out = {id(tensor.parameter) for tensor in dense if not tensor.is_plain}
        return ((name, p) for name, p in self.lm.named_parameters() if id(p) not in left_out)

    # -- optimisation -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The optimiser over trainable parameters, with warm-up and decay by step."""
        try:
            options = {} if self.lr is None else {"lr": self.lr}
            optimizer = self.make_optimizer(
                [p for p in self.lm.parameters() if p.requires_grad], **options
            )
        except ValueError as error:
            vectors = (
                " (with a mask, parameters are vectors of selected weights)"
                if self.mask is not None
                else ""
            )
            raise WagleError(f"optimizer: {first_line(error)}{vectors}") from error
        if isinstance(optimizer, torch.optim.LBFGS):
            raise WagleError(
                "optimizer LBFGS evaluates the loss several times a step, on micro-batches that are gone "
                "by then; choose another, e.g. --optimizer MaskedAdamW"
            )
        if self.values == "split":
            self.selected.step_by_tensor(optimizer)
        if self.make_lr_scheduler is not None:
            scheduler = self.make_lr_scheduler(optimizer)
            how = {
                "scheduler": scheduler,
                "monitor": _monitor(scheduler),
                "interval": self.lr_interval,
            }
            return {"optimizer": optimizer, "lr_scheduler": how}
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf") and (self.decay != "constant" or 0 < self.warmup < 1):
            raise WagleError(
                "the run's steps are not known beforehand, and warm-up and decay are shares of them: give "
                "--trainer.max_steps or --trainer.max_epochs (max_time may end it earlier), or "
                "--model.decay constant with a --model.warmup of 0 or in steps"
            )
        factor = lr_factor(self.warmup, self.decay, steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Refuse a run that the disk has no room for. Have the values written into the model after each step; under
        ZeRO, take the dtype that DeepSpeed computes with."""
        strategy = self.trainer.strategy
        optimizers = [strategy.base_optimizer] if is_zero(strategy) else self.trainer.optimizers
        for optimizer in (getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers):
            optimizer.register_step_post_hook(lambda *_: self.selected.changed())
            if self.values == "split":
                self.selected.step_by_tensor(optimizer)
        if is_zero(strategy):
            self.selected.cast(next(p.dtype for p in self.lm.parameters() if p.requires_grad))
        self._fitted = True
        if not self.trainer.fast_dev_run:
            distributed.on_rank_zero(lambda: outputs.check_space(self.planned_files()))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Optional[float] = None,
        gradient_clip_algorithm: Optional[str] = None,
    ) -> None:
        """Clip the gradients of the weights that move by their own norm or, if asked, by that of all weights."""
        if (
            self.selected.keeps_dense_gradients
            and gradient_clip_val
            and gradient_clip_algorithm in (None, "norm")
        ):
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            self.selected.clip_by_dense_norm(
                gradient_clip_val, 1.0 if scaler is None else scaler.get_scale()
            )
        elif self.values != "split":
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            for _, gradient in self.selected.gradients():
                gradient.clamp_(-gradient_clip_val, gradient_clip_val)
        elif gradient_clip_val:
            self.selected.clip(gradient_clip_val)

    def on_validation_epoch_start(self) -> None:
        """Write the values anew: a callback may have put averages in their place."""
        if self.selected is not None:
            self.selected.changed()

    def on_validation_end(self) -> None:
        """Write the values anew: a callback may have put them back."""
        if self.selected is not None:
            self.selected.changed()

    def run_lm(self, tensors: Mapping[str, Tensor], whole: bool = False) -> tuple[Tensor, Tensor]:
        """The model on one stream: (logits, labels), from the first answer token on, or of all positions."""
        output, labels = forward_answers(self.lm, tensors, whole=whole)
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
        rows = {stream: tensors.get("row") for stream, tensors in batch.items()}
        self._losses.append(
            (batch_idx, rows, {name: value.detach() for name, value in losses.items()})
        )
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, prog_bar=True)
        return losses["loss"]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass; on one device the streams' gradients are added up in place."""
        alone = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        with self.selected.gradients_in_place() if alone else nullcontext():
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a step that would spoil the weights."""
        self._check_finite()

    def _check_finite(self) -> None:
        """Stop all ranks when the loss or the gradient of the step to come is NaN or infinite on one of them."""
        seen, self._losses = self._losses, []
        numbers = [each["loss"].float() for _, _, each in seen]
        if (
            getattr(self.trainer.precision_plugin, "scaler", None) is None
        ):  # fp16's scaler skips such a step itself
            numbers += [_largest(gradient).float() for _, gradient in self.selected.gradients()]
        finite = bool(torch.stack(numbers).isfinite().all()) if numbers else True
        if not distributed.all_reduce_max(int(not finite)):
            return
        step = f"at step {self.global_step}"
        advice = "lower the learning rate. Checkpoints written so far are kept"
        found = []
        for batch, rows, each in seen:
            if not torch.isfinite(each["loss"]):
                numbers = ", ".join(f"{name} {value.item():g}" for name, value in each.items())
                of = {stream: row.tolist() for stream, row in rows.items() if row is not None}
                found.append(
                    f"loss is not finite {step} (batch {batch}, rows {of}): {numbers}; {advice}"
                )
        if not finite and not found:
            names = [
                name
                for name, gradient in self.selected.gradients()
                if not gradient.isfinite().all()
            ]
            found.append(
                f"the gradient of {names[0]} is not finite {step}, though the loss is; {advice}"
            )
        raise Diverged(distributed.all_gather(found)[0])

    def _check_values(self) -> None:
        """Refuse to write weights that are NaN or infinite.

        Raises:
            WagleError: naming a tensor.
        """
        trained = [(name, p) for name, p in self.lm.named_parameters() if p.requires_grad]
        trained += [(name, t.parameter) for name, t in self.selected.tensors.items() if t.is_split]
        largest = [_largest(getattr(p, "ds_tensor", p).detach()).float() for _, p in trained]
        finite = torch.stack(largest).isfinite().tolist()
        found = [
            name for (name, _), is_finite in zip(trained, finite, strict=True) if not is_finite
        ]
        found = distributed.all_gather(found)
        if found:
            raise WagleError(
                f"weights of {found[0]} are not finite at step {self.global_step}: they are not written. Resume from "
                "an earlier checkpoint with a lower learning rate"
            )

    # -- resume -------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Remember where a step starts."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_start = StepStart(
                self.current_epoch, batch_idx, self.global_step, random_state(self.device)
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state, which dropout draws from, so that a resumed run equals an unbroken one; and what the
        model is made from, for ``wagle export`` and ``load_from_checkpoint``. In the middle of a step, go back to its
        start."""
        super().on_save_checkpoint(checkpoint)
        start = self._step_start
        begun = start is not None and start.step == self.global_step
        self._check_values()
        if start is not None:
            done = start.batch if begun else start.batch + self.trainer.accumulate_grad_batches
            keep_position(checkpoint, self.trainer, start.epoch, done)
        checkpoint.update(start.random if begun else random_state(self.device))
        tensors = () if self.selected is None else self.selected.tensors.values()
        dtype = next(
            (tensor.parameter.dtype for tensor in tensors), next(self.lm.parameters()).dtype
        )
        halves = {} if self.selected is None else self.selected.tensors
        for name in (name for name, tensor in halves.items() if tensor.is_split):
            checkpoint["state_dict"][f"lm.{name}{SUFFIX}"] = halves[name].value().cpu()
        checkpoint["model"] = {
            "name": self.model_name,
            "fingerprint": self.model_fingerprint,
            "dtype": str(dtype).removeprefix("torch."),
            "record": self.record(),
        }
        checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {}).setdefault(
            "model", self.model_name
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Find the place where the run goes on; take the random state back, when training starts. A model that is not
        trained takes the values at once."""
        self.check_kind(checkpoint)
        if self.attached and self.trainer.training:
            recount(checkpoint, self.trainer)
        self._random = {
            key: checkpoint[key] for key in ("rng_state", "cuda_rng_state") if key in checkpoint
        }
        state = checkpoint.get("state_dict", {})
        for name, tensor in ({} if self.selected is None else self.selected.tensors).items():
            if tensor.is_split:
                tensor.store(state[f"lm.{name}{SUFFIX}"])
                state[f"lm.{name}{SUFFIX}"] = tensor.values.data
        if self.selected is None and any(name.endswith(SUFFIX) for name in state):
            values = {
                name.removeprefix("lm."): value
                for name, value in state.items()
                if name.startswith("lm.")
            }
            load_values(self.lm, values, values.__getitem__, self.mask)
            others = {name: value for name, value in state.items() if not name.endswith(SUFFIX)}
            checkpoint["state_dict"] = {**self.state_dict(), **others}
        super().on_load_checkpoint(checkpoint)

    def on_train_start(self) -> None:
        """Start the clock and restore the random state of a checkpoint."""
        self._started = time.monotonic()
        set_random_state(self._random, self.device)
        self.selected.changed()  # a checkpoint may have brought others
        begin(self.trainer)

    # -- export -------------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Write the model folder."""
        self._check_values()
        self.selected.release(self.output_dtype)
        self.selected = None
        super().on_train_end()
        if self.trainer.fast_dev_run:
            return
        record = self.record()

        def write(path: Path) -> None:
            self.output = str(path)
            self.export(record)

        if self.sharded or self.trainer.is_global_zero:
            checkpoint = outputs.last_checkpoint(self.trainer)
            outputs.write_or_keep(write, Path(self.output), checkpoint, again=not self.sharded)
        if self.trainer.is_global_zero:
            log.info("model written to %s", self.output)

    def export(self, record: dict[str, Any]) -> None:
        """Write the model folder, in the dtypes of the model it was made from, what has not moved with its bits; under
        ZeRO-3 a meeting of all ranks."""
        originals = None if self.output_dtype else Originals(self.model_name)
        save_model(self.lm, self.tokenizer, self.output, model_card(record), record, originals)

    def record(self) -> dict[str, Any]:
        """What made this model, for ``wagle.json`` and the model card."""
        step = {
            "module": type(self).__name__,
            "base": self.model_name,
            "base_fingerprint": self.model_fingerprint,
            "data": self.described_data,
            "prompts": self.prompts,
            "streams": list(self.streams),
            "steps": self.global_step,
            "seconds": round(time.monotonic() - self._started, 1),
            "peak_memory_bytes": peak_memory(),
            "versions": versions(),
            "seed": self.run_config.get("seed_everything"),
            "config": self.run_config,
        }
        return {
            "format_version": 1,
            "lineage": [*read_record(self.model_name).get("lineage", []), step],
        }


class UnlearnModule(FinetuneModule):
    """Unlearning: minimise an objective while only the selected weights may move.

    Frozen weights stay bit-identical to the starting model whatever the optimiser; the run checks that at its end.
    Log-probabilities at θ₀ that an objective needs are computed once, kept in ``.references`` beside the output, and
    reused by later runs on the same model and data.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the target model.
        output: folder to write the unlearned model to, in Hugging Face format.
        objective: ``NPO``, ``GradDiff``, ``PO``, any other class of ``wagle_pl.objectives.forget``, or a class path
            to an ``Objective``. Options given to one class carry over to another that replaces it and has them too.
        mask: mask file that attribution wrote for this model; null is dense unlearning.
        modules: only weights in these modules may move, e.g. ``[mlp]`` or ``[self_attn.q_proj]``; with a mask, those
            that both select.
        layers: only weights in these layers may move, e.g. ``3-7`` or ``0,2,5-9``; with a mask, those that both select.
        adapter: ``LoRA`` trains low-rank adapters in place of the weights; not together with a mask, modules or layers.
        clip_scope: whose gradient norm ``trainer.gradient_clip_val`` bounds: of the ``selected`` weights, or of ``all``
            (dense gradients, kept until they are clipped and then masked, as in WAGLE's code; not under ZeRO).
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
        objective: Union[
            Objective, str
        ] = "npo",  # not "NPO": a parser hands the options of a default class to others
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
            raise WagleError(
                "an adapter leaves every weight of the model alone, so no mask, modules or layers apply: "
                "give --model.adapter or those, not both"
            )
        self.clip_scope = clip_scope
        self.verify = verify
        self._frozen: Optional[FrozenWeights] = None
        if top_k < 1:
            raise WagleError(f"model.top_k must be at least 1, got {top_k}")
        if reference_logits == "top_k" and self.objective.whole_streams:
            raise WagleError(
                "reference_logits top_k keeps predictions of answer tokens only, and the retain term needs "
                "those of every position: choose --model.reference_logits frozen_copy"
            )
        self.reference_logits = reference_logits
        self.top_k = top_k
        self._references = References()
        self._restricted = False
        self._verified: Optional[str] = None

    def configure_model(self) -> None:
        """Load the model and, to train it, freeze what the mask leaves out; to test it, find the mask that a
        checkpoint's values need."""
        if self.lm is None or (self.fits and self.selected is None):
            self._check_strategy()
            self._references, self._restricted = References(), False
        super().configure_model()
        if self.selected is None and not self._restricted:
            self._restrict()

    def _check_strategy(self) -> None:
        """Refuse what needs parameters whole where ZeRO-3 spreads them over ranks."""
        if self.attached and self.clip_scope == "all" and is_zero(self.trainer.strategy):
            raise WagleError(
                "clip_scope all needs every gradient whole at the step, which ZeRO does not keep: choose "
                "--model.clip_scope selected"
            )
        if not self.sharded:
            return
        if self.adapter is not None:
            raise WagleError("an adapter does not work under ZeRO-3; use another stage")
        if type(self.objective).penalty is not Objective.penalty:
            raise WagleError(
                f"objective {type(self.objective).__name__} has a penalty on the weights, which ZeRO-3 "
                "spreads over ranks; use another stage"
            )

    def _restrict(self) -> None:
        """Add the adapter, or find the mask.

        Raises:
            WagleError: if nothing is left to move.
        """
        self._restricted = True
        if self.adapter is not None:
            self.adapter.add(self.lm, self.model_name, self.objective.trainable)
        self.mask = self._find_mask()
        if self.mask is not None and not self.mask.count():
            made_by = (
                self.mask.origin
                if self.mask_file is None
                else f"{self.mask_file}, {self.mask.origin}"
            )
            raise WagleError(f"the mask ({made_by}) selects nothing: there is no weight to move")

    def select_weights(self) -> None:
        """Make the selected weights the parameters of the model, and keep them as they are at θ₀ if a term needs it."""
        self.objective.prepare(self.lm)
        if self._needs_theta0 and self.sharded:
            raise WagleError(
                "a frozen copy of the model does not work under ZeRO-3; use another stage, or "
                "--model.reference_logits top_k if no hidden states are needed"
            )
        if not self._restricted:
            self._restrict()
        self.selected = self.as_values(
            self.lm,
            mask=self.mask,
            keep_theta0=self._needs_theta0,
            keep_dense_gradients=self.clip_scope == "all" and self.mask is not None,
        )

    @property
    def restriction(self) -> Restriction:
        """What the mask is made of."""
        pattern = None if self.adapter is not None else self.objective.trainable
        return Restriction(self.mask_file, self.mask_modules, self.mask_layers, pattern)

    def _find_mask(self) -> Optional[WeightMask]:
        """What the mask file, the modules and layers, and the objective select together; None if there are none."""
        mask = self.restriction.mask(
            parameter_shapes(self.lm), self.model_name, self.model_fingerprint
        )
        if self.mask_file is not None:
            self._compare_prompts(mask)
        return mask

    def _compare_prompts(self, mask: WeightMask) -> None:
        """Warn of a mask that was made with other prompts than the rows of this run have."""
        if not self.attached or self.trainer.state.fn != "fit":
            return
        for prompts in mask.prompts:
            if other := differing_prompts(prompts, self.prompts):
                log.warning(
                    "mask %s was made with other prompts (%s): give both runs the same data.system_prompt, "
                    "data.chat_template_kwargs and formats",
                    self.mask_file,
                    other,
                )

    # -- θ₀ -----------------------------------------------------------------------------------------------------------

    @property
    def reference_streams(self) -> tuple[str, ...]:
        """Streams of which one number a row is known at θ₀: the data module gives them the same rows in every epoch."""
        return self.objective.references

    @property
    def _needs_theta0(self) -> bool:
        """Whether a term needs whole predictions, or hidden states, at θ₀."""
        exact = bool(self.objective.theta0_streams) and self.reference_logits == "frozen_copy"
        return exact or self.objective.needs_hidden_at_theta0

    def _run_at_theta0(
        self, tensors: Mapping[str, Tensor], whole: bool = False
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Logits at θ₀, their labels, and the outputs of the blocks that a term reads, of one stream's tensors."""
        with self.selected.at_theta0() as lm:
            return predictions_of(lm, tensors, self.objective.hidden_layers, whole)

    def on_fit_start(self) -> None:
        """Take the digests of frozen weights; compute, or find, what θ₀ says of the rows, as far as the objective needs
        it."""
        super().on_fit_start()
        if self.mask is not None and self.verify != "off":
            self._frozen = FrozenWeights(self.mask, self.selected.weights())
        self._try_objective()
        self._prepare_references()

    def _prepare_references(self) -> None:
        top_k = self.objective.theta0_streams if self.reference_logits == "top_k" else ()
        folder = Path(self.output).parent / ".references"
        self._references.prepare(
            self, self.trainer.datamodule, folder, self.objective.references, top_k, self.top_k
        )

    def _try_objective(self) -> None:
        """Compute the objective on two rows, before the passes at θ₀ that it may need; nothing else changes.

        Raises:
            WagleError: if the loss, or one of its terms, has another shape than it must have.
        """
        data = self.trainer.datamodule
        if not hasattr(data, "stream_loader"):
            return
        batches = {
            stream: next(iter(data.stream_loader(stream, batch_size=2)))[stream]
            for stream in self.streams
        }
        batch = {
            s: {k: v.to(self.device) for k, v in tensors.items()} for s, tensors in batches.items()
        }
        at = Streams(
            batch,
            self.run_lm,
            {
                stream: torch.zeros(int(tensors["row"].max()) + 1)
                for stream, tensors in batch.items()
            },
            lm=self.lm,
            layers=self.objective.hidden_layers,
            theta0=partial(predictions_of, self.lm, layers=self.objective.hidden_layers),
            whole=self.objective.whole_streams,
        )
        random, training = random_state(self.device), self.lm.training
        self.lm.eval()
        with (
            torch.set_grad_enabled(not self.sharded),
            self.trainer.precision_plugin.forward_context(),
        ):
            loss = self.objective(at)["loss"]
        self.lm.train(training)
        set_random_state(random, self.device)
        if loss.shape:
            raise WagleError(
                f"objective {type(self.objective).__name__}: loss must be a scalar, got shape "
                f"{tuple(loss.shape)}"
            )

    def planned_run(self, optimizer: str) -> Run:
        """The run, as ``wagle plan`` knows it; an adapter's state is next to nothing."""
        stage = stage_of(self.trainer.strategy)
        density = 1.0 if self.mask is None else self.mask.density
        optimizer = optimizer if self.adapter is None else "SGD"
        return Run.about_to(
            "unlearning", str(self.trainer.precision), stage, optimizer=optimizer, density=density
        )

    def streams_of(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Streams:
        """What the objective sees of one batch."""
        last = self.trainer.estimated_stepping_batches - 1
        return Streams(
            batch,
            self.run_lm,
            self._references.sums,
            lm=self.lm,
            layers=self.objective.hidden_layers,
            theta0=self._run_at_theta0 if self._needs_theta0 else None,
            top_k=self._references.top_k,
            progress=min(1.0, self.global_step / last) if last > 0 else 0.0,
            epoch=self.current_epoch,
            whole=self.objective.whole_streams,
        )

    def losses(self, at: Streams) -> Losses:
        """The objective's losses."""
        return self.objective(at)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the references: a resumed run no longer has θ₀ to compute them from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["references"] = self._references.state_dict()
        if self.mask is not None:
            checkpoint["mask"] = {"digest": self.mask.digest(), **self.restriction._asdict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the references back.

        Raises:
            WagleError: if the checkpoint is of a run with another mask, or on another model.
        """
        self.check_kind(checkpoint)
        if self.attached:
            ours = None if self.mask is None else self.mask.digest()
            if (checkpoint.get("mask") or {}).get("digest") != ours:
                raise WagleError(
                    "the checkpoint is of a run with another mask: resume with that one, or start a new "
                    "run"
                )
            base = checkpoint["model"]["fingerprint"]
            if ours and base != self.model_fingerprint:
                raise WagleError(
                    f"the checkpoint is of a run on the model with fingerprint {base[:12]}, this one has "
                    f"{self.model_fingerprint[:12]}: give --model.model the model it began with"
                )
        elif checkpoint.get("mask"):
            stored = {key: value for key, value in checkpoint["mask"].items() if key != "digest"}
            shapes = parameter_shapes(self.lm)
            self.mask = Restriction(**stored).mask(shapes, self.model_name, self.model_fingerprint)
        super().on_load_checkpoint(checkpoint)
        self._references.load_state_dict(checkpoint.get("references", {}))

    # -- the guarantee ------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, *_: Any) -> None:
        """Check the guarantee after each step, if asked."""
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
        if self.adapter is not None:
            self.adapter.fold()
        super().export(record)

    def record(self) -> dict[str, Any]:
        """What made this model; adds objective, mask and the guarantee."""
        record = super().record()
        objective = {**describe(self.objective), "retain": describe(self.objective.retain)}
        mask = None
        if self.mask is not None:
            mask = {
                "file": self.mask_file,
                "density": self.mask.density,
                "made_by": self.mask.metadata,
            }
        record["lineage"][-1] |= {"objective": objective, "mask": mask, "verified": self._verified}
        record["lineage"][-1]["adapter"] = None if self.adapter is None else describe(self.adapter)
        return record


def lr_factor(warmup: float, decay: str, steps: float) -> Callable[[int], float]:
    """Learning-rate factor by step: linear warm-up, then linear decay to zero, or constant.

    >>> factor = lr_factor(2, "linear", 6)
    >>> [factor(step) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warm = round(warmup * steps) if 0 < warmup < 1 else round(warmup)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 1.0 if decay == "constant" else max(0.0, (steps - step) / max(1, steps - warm))

    return factor


def _largest(tensor: Tensor) -> Tensor:
    """The largest absolute value, NaN if there is one; 0 of no values."""
    if not tensor.numel():
        return tensor.new_zeros(())
    low, high = torch.aminmax(tensor)  # many times as fast as a norm
    return torch.maximum(high, -low)


def _monitor(scheduler: Any) -> str:
    return getattr(scheduler, "monitor", "train/loss")
