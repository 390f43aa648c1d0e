"""``FinetuneModule``: makes target and retrained models; the base class of unlearning."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from wagle_pl.core import distributed, outputs
from wagle_pl.core.environment import peak_memory, versions
from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.core.schema import check_arguments
from wagle_pl.core.weights import parameter_shapes, share_of
from wagle_pl.lm import resume
from wagle_pl.lm.inference import Predictions, forward_answers, pack
from wagle_pl.lm.layers import blocks
from wagle_pl.lm.models import checkpoint_dtype
from wagle_pl.lm.saving import Originals, read_record, save_model
from wagle_pl.masks.selected import SUFFIX, load_values
from wagle_pl.objectives import Streams
from wagle_pl.strategies import is_zero
from wagle_pl.unlearning.checks import (
    FiniteSteps,
    StepLosses,
    check_packing,
    check_resumed,
    check_run,
    check_sharded,
    check_weights,
    moves_kept,
)
from wagle_pl.unlearning.export import model_card
from wagle_pl.unlearning.masked import MaskedModule
from wagle_pl.unlearning.optim import FP32, STATE_BYTES, MaskedAdamW, optimizer_and_schedule

log = logging.getLogger(__name__)

Batch = Mapping[str, Mapping[str, Tensor]]


class FinetuneModule(MaskedModule):
    """Supervised fine-tuning on answers: makes the target model, and the retrained model.

    The loss is the mean over examples of the mean negative log-likelihood per answer token.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the model to start from.
        output: folder to write the model to, in Hugging Face format. In Python it may be None: the
            result is ``lm``.
        train_on: ``all`` rows (the target model), ``retain`` (the retrained model) or ``forget``.
        warmup: linear warm-up, unless ``--lr_scheduler`` is given: a share (below 1) or a number of
            steps.
        warmup_from_zero: the first step of a warm-up has rate 0, as in Hugging Face's Trainer;
            False: 1/n of the rate, n the steps of the warm-up.
        decay: after warm-up, ``linear`` to zero or ``constant``.
        decay_norms_and_biases: whether an optimiser's weight decay moves tensors of one dimension,
            too; Hugging Face's Trainer leaves them out.
        lr_interval: a scheduler of ``--lr_scheduler`` is stepped every ``epoch`` or every ``step``.
        gradient_checkpointing: recompute activations: less memory, about a third more time.
        compile: compile each block with ``torch.compile``: the first steps take minutes, later ones
            are faster; not under ZeRO-3.
        packing: concatenate the rows of a batch instead of padding them; refused if the model's
            attention cannot keep rows apart.
        output_dtype: ``float32`` writes the trained fp32 values; null rounds them to the dtype of
            the base model.
        lr: learning rate, for any optimiser; that of ``--optimizer`` when None.
    """

    task = "finetuning"  # as ``wagle plan`` names it

    def __init__(
        self,
        model: Union[str, PreTrainedModel],
        output: Optional[str] = None,
        train_on: Literal["all", "retain", "forget"] = "all",
        warmup: float = 0.1,
        warmup_from_zero: bool = False,
        decay: Literal["linear", "constant"] = "linear",
        decay_norms_and_biases: bool = True,
        lr_interval: Literal["epoch", "step"] = "epoch",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        packing: bool = False,
        output_dtype: Optional[Literal["float32"]] = None,
        lr: Optional[float] = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(FinetuneModule.__init__, locals(), "model.")
        super().__init__(model=model, output=output, **kwargs)
        if not 0 <= warmup < float("inf"):
            raise WagleError(f"must be 0 or more, got {warmup:g}", option="model.warmup")
        if lr is not None:
            check_positive(lr, "model.lr")
        self.lr = lr
        self.streams = (train_on,)
        self.output_dtype = None if output_dtype is None else torch.float32
        self.warmup = warmup
        self.warmup_from_zero = warmup_from_zero
        self.decay = decay
        self.decay_norms_and_biases = decay_norms_and_biases
        self.lr_interval = lr_interval
        self.gradient_checkpointing = gradient_checkpointing
        self.compiles = compile
        self.packing = packing
        #: Parameters (and ``lr``, if that is given) -> optimiser, and optimiser -> scheduler, from
        #: ``--optimizer`` and ``--lr_scheduler``; without a scheduler ``warmup`` and ``decay`` apply.
        self.make_optimizer: Callable[..., Optimizer] = MaskedAdamW
        self.make_lr_scheduler: Optional[Callable[[Optimizer], Any]] = None
        #: Whether ``load_from_checkpoint`` made it, or it was trained: then it cannot be trained.
        self.from_checkpoint = self.fitted = False
        self._started = time.monotonic()
        self._step: list[StepLosses] = []
        self._finite, self._together = FiniteSteps(), False  # whether ranks write together
        self._step_start: Optional[resume.StepStart] = None
        self._random: Mapping[str, Tensor] = {}
        self._moves_kept: Optional[float] = None
        self._resumed: Optional[Mapping[str, Any]] = None  # the checkpoint, until it is checked

    # -- before the run ----------------------------------------------------------------------------

    @property
    def results_folder(self) -> Path:
        """Next to the model's files, once they exist."""
        written = self.output and Path(self.output).is_dir()
        return Path(self.output if written else self.trainer.default_root_dir) / "test"

    def setup(self, stage: str) -> None:
        """Refuse options that cannot work and an output that exists, before any work is done."""
        super().setup(stage)
        if stage == "fit":
            check_run(self)
            if self.output:
                outputs.reserve(self.place, self.overwrite, kind="folder")

    def planned_files(self) -> list[outputs.Planned]:
        dtype = checkpoint_dtype(self.model_name) or torch.float32
        weights = sum(map(prod, self._shapes.values()))
        moving = weights * (1.0 if self.mask is None else self.mask.density)
        checkpoint = (FP32 + self.state_bytes()) * moving
        return [
            outputs.Planned("model", Path(self.output), weights * dtype.itemsize),
            *outputs.planned_checkpoint(self.trainer, checkpoint),
        ]

    def state_bytes(self) -> int:
        """Bytes of the optimiser's state per trained number."""
        names = [type(optimizer).__name__ for optimizer in self.trainer.optimizers]
        return STATE_BYTES.get(names[0], 0) if names else 0

    def configure_callbacks(self) -> list[Callback]:
        copies = any(isinstance(c, StochasticWeightAveraging) for c in self.trainer.callbacks)
        if copies and not is_zero(self.trainer.strategy):  # which Lightning refuses together
            self.configure_model()  # the callback copies the module, which needs a model by then
        return super().configure_callbacks()

    def configure_model(self) -> None:
        """Load the model and, to train it, make its selected weights its parameters."""
        self.from_checkpoint |= not self.attached
        if self.fits and self.selected is None:  # a test may have loaded a checkpoint before
            self.lm, self._random, self._loader_state = None, {}, None
        if self.lm is not None:
            return
        super().configure_model()
        self._shapes = parameter_shapes(self.lm)
        self.restrict()
        if not self.fits:
            return
        check_sharded(self)
        self.lm.train()
        if self.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.select_weights()
        if self.compiles:
            self.selected.compile(blocks(self.lm))

    # -- steps -------------------------------------------------------------------------------------

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over trainable parameters, with warm-up and decay by step."""
        return optimizer_and_schedule(self)

    def on_fit_start(self) -> None:
        """Have the values written into the model after each step."""
        if self._resumed is not None:
            check_resumed(self, self._resumed)
            self._resumed = None
        strategy = self.trainer.strategy
        optimizers = [strategy.base_optimizer] if is_zero(strategy) else self.trainer.optimizers
        for optimizer in (getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers):
            optimizer.register_step_post_hook(lambda *_: self.selected.changed())
        if is_zero(strategy):  # the dtype that DeepSpeed computes with
            self.selected.cast(next(p.dtype for p in self.lm.parameters() if p.requires_grad))
        if self.packing:
            check_packing(self)
        self.fitted = True
        super().on_fit_start()

    def on_train_start(self) -> None:
        """Start the clock and restore the random state of a checkpoint."""
        self._started = time.monotonic()
        resume.set_random_state(self._random, self.device)
        self.selected.changed()  # a checkpoint may have brought other values
        super().on_train_start()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Drop the gradients of the last step, and remember where this one starts."""
        if batch_idx % self.trainer.accumulate_grad_batches:
            return
        for optimizer in self.trainer.optimizers if not is_zero(self.trainer.strategy) else ():
            optimizer.zero_grad()
        random = resume.random_state(self.device)
        self._step_start = resume.StepStart(self.current_epoch, batch_idx, self.global_step, random)

    def noted(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        noted = super().noted(tensors)
        return {**noted, **(pack(noted) if self.packing else {})}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.losses(self.streams_of(batch))
        noted = {name: value.detach() for name, value in losses.items()}
        rows = {stream: t["row"] for stream, t in batch.items() if t.get("row") is not None}
        self._step.append(StepLosses(batch_idx, rows, noted))
        # a value that is logged for the progress bar would make the device wait
        self.log_dict({f"train/{name}": value for name, value in noted.items()})
        return losses["loss"]

    @property
    def alone(self) -> bool:
        """Whether there is one device, where no hook counts backward passes."""
        return isinstance(self.trainer.strategy, SingleDeviceStrategy)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass; on one device, gradients are accumulated in place."""
        with self.selected.gradients_in_place() if self.alone else nullcontext():
            super().backward(loss, *args, **kwargs)

    def streams_of(self, batch: Batch) -> Streams:
        return Streams(batch, self.run_lm, {})

    def losses(self, at: Streams) -> dict[str, Tensor]:
        (stream,) = self.streams
        return {"loss": at.mean(stream, at[stream].nll)}

    def run_lm(self, tensors: Mapping[str, Any]) -> Predictions:
        """Predictions at the ``places`` of one stream's tensors, see :func:`forward_answers`."""
        return forward_answers(self.lm, tensors)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop before a step that is not finite or, on a GPU, before the step after it.

        The progress bar shows the losses that have been read for this check.
        """
        gradients = {} if self._scaler is not None else dict(self.selected.gradients())
        self._finite.check(list(self._step), gradients, self.global_step)
        losses = {f"train/{name}": value for name, value in self._finite.losses.items()}
        self.trainer.progress_bar_metrics.update(losses)
        accumulates = is_zero(self.trainer.strategy)  # DeepSpeed does, and calls this every time
        if accumulates and len(self._step) % self.trainer.accumulate_grad_batches:
            return
        step, self._step = self._step, []
        self.end_step([batch.losses for batch in step])

    def end_step(self, losses: Sequence[Mapping[str, Tensor]]) -> None:
        """Called on all ranks with the losses of a step: one dict per micro-batch of the rank."""

    def on_validation_epoch_start(self) -> None:
        """Write the values again: a callback may have replaced them with averages."""
        if self.selected is not None:
            self._finite.settle()
            self.selected.changed()

    on_validation_end = on_validation_epoch_start  # and back

    # -- checkpoints -------------------------------------------------------------------------------

    def check_weights(self) -> None:
        """Refuse to write weights if they, or their step, are not finite. Collective."""
        self._finite.settle()
        trained = {name: p for name, p in self.lm.named_parameters() if p.requires_grad}
        here = {name: share_of(p)[1] for name, p in trained.items()}
        check_weights(here, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the model is made from, and the random state, without an unfinished step."""
        super().on_save_checkpoint(checkpoint)
        self.check_weights()
        start = self._step_start
        begun = start is not None and start.step == self.global_step
        if start is not None:
            done = start.batch if begun else start.batch + self.trainer.accumulate_grad_batches
            resume.keep_position(checkpoint, self.trainer, start.epoch, done)
        checkpoint.update(start.random if begun else resume.random_state(self.device))
        held = [tensor.parameter for tensor in self.tensors.values()]
        dtype = next(iter([*held, *self.lm.parameters()])).dtype
        checkpoint["model"] = {
            "name": self.model_name,
            "fingerprint": self.model_fingerprint,
            "dtype": str(dtype).removeprefix("torch."),
            "record": self.record(),
        }
        options = checkpoint.setdefault(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        options.setdefault("model", self.model_name)  # for load_from_checkpoint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the random state; a model that is not being trained gets the values."""
        self.check_kind(checkpoint)
        self.check_mask(checkpoint)
        self._random = {key: checkpoint[key] for key in checkpoint if key.endswith("rng_state")}
        state = checkpoint.get("state_dict") or {}
        if self.fits and is_zero(self.trainer.strategy):  # it is loaded after on_fit_start
            check_resumed(self, checkpoint)
        elif self.fits:
            self._resumed = checkpoint
        if self.selected is None and any(name.endswith(SUFFIX) for name in state):
            values = {n.removeprefix("lm."): v for n, v in state.items() if n.startswith("lm.")}
            load_values(self.lm, values, values.__getitem__, self.mask)
            others = {name: value for name, value in state.items() if not name.endswith(SUFFIX)}
            checkpoint["state_dict"] = {**self.state_dict(), **others}
        super().on_load_checkpoint(checkpoint)

    # -- the result --------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Check the guarantee, then write the model folder."""
        self.check_frozen()
        self.check_weights()
        holds_all = self.trainer.is_global_zero and not is_zero(self.trainer.strategy)
        if holds_all and self.output and not self.output_dtype:
            self._moves_kept = moves_kept(self.tensors, Originals(self.model_name))
        self.release(self.output_dtype)
        if self.output_dtype and self._before is not None:
            self._before.dtypes.clear()  # the values are to stay in fp32
        super().on_train_end()
        if self.trainer.fast_dev_run or not self.output:
            return
        record, output, together = self.record(), Path(self.output), self.exports_together()

        def write(path: Path) -> None:
            self.output, self._together = str(path), together and path == output
            self.export(record)

        first, checkpoint = self.trainer.is_global_zero, outputs.last_checkpoint(self.trainer)
        if together or first:
            outputs.write_or_keep(write, output, checkpoint, again=first and not self.sharded)
        if first:
            log.info("model written to %s", self.output)

    def exports_together(self) -> bool:
        """Whether each rank writes its share of the model: not if weights have other names in their
        files (as those of adapters), or if the model's code is to be copied."""
        stored = Originals(self.model_name).names if distributed.is_distributed() else ()
        plain = parameter_shapes(self.lm).keys() <= set(stored) and self.lm._auto_class is None
        return self.sharded or plain

    def export(self, record: dict[str, Any]) -> None:
        """Write the model folder; unchanged values keep their bits. A collective if
        :meth:`exports_together`, else called on rank 0 alone."""
        originals = None if self.output_dtype else Originals(self.model_name)
        made = (self.tokenizer, self.output, model_card(record), record)
        save_model(self.lm, *made, originals, self._together)

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
            "moves_kept_by_rounding": self._moves_kept,
            "seconds": round(time.monotonic() - self._started, 1),
            "peak_memory_bytes": peak_memory(),
            "versions": versions(),
            "seed": self.run_config.get("seed_everything"),
            "config": self.run_config,
            **self.mask_record,
        }
        return {"format_version": 1, "lineage": [*read_record(self.model_name)["lineage"], step]}
