"""``AttributionModule``: a pass over forget and retain rows that scores weights for masks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional, Union

import lightning as L
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from wagle_pl.attribution.collect import (
    Draws,
    add_batch,
    end_step,
    jobs_for,
    known,
    warn_of_unwatched,
)
from wagle_pl.attribution.hessian import Hessian, check_run, choose_hessian
from wagle_pl.attribution.scores import Score, try_out
from wagle_pl.attribution.scoring import (
    DTYPES,
    Collected,
    MaskSpec,
    by_label,
    check_names,
    complete,
)
from wagle_pl.attribution.selection import Scope
from wagle_pl.attribution.stored import write_scores
from wagle_pl.attribution.sums import FP32, GradientSums, Sums
from wagle_pl.attribution.units import Pool
from wagle_pl.core import outputs
from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.registry import resolve
from wagle_pl.core.schema import check, check_arguments
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm.layers import recompute_blocks
from wagle_pl.lm.module import LanguageModule
from wagle_pl.lm.resume import WholeSums, keep_position
from wagle_pl.masks import SUFFIX, WeightMask, mask_path
from wagle_pl.objectives.forget import NPO, PO, GradDiff
from wagle_pl.strategies import ZeRO, is_zero, stage_of

log = logging.getLogger(__name__)

FORGET_LOSSES = {"ce": GradDiff, "npo": NPO, "po": PO}


class AttributionModule(LanguageModule):
    """Scores every weight for unlearning and writes the mask of the highest-scoring share.

    One pass (an epoch) covers every forget row once and as many retain rows; only what the scores
    need is computed. No weight changes: the run checks that at its end. One pass is made unless the
    Trainer is given a length (``max_epochs``, ``max_steps``, ``limit_train_batches``, ``max_time``;
    Lightning's default of 1000 epochs counts as none), which is logged and recorded.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the target model.
        output: path of the mask file; ``.safetensors`` is added when missing. With ``masks``, a
            folder. In Python it may be None: the result is then only in ``mask``.
        density: share of the eligible weights to select, in (0, 1].
        score: name of one in :mod:`wagle_pl.attribution.scores`, or a class path to a ``Score``.
        select: take the ``high`` or the ``low`` end of the ranking.
        scope: weights compete over the whole model (``global``), within each ``tensor``, or within
            each ``row``: an output of a layer, or an input where a model stores layers transposed
            (GPT-2).
        unit: select whole units: ``weight``, ``row``, ``column``, ``head`` (with the keys and values
            that heads share), ``neuron`` of an MLP, ``block:RxC``, ``tensor`` or ``layer``.
        pool: score of a unit: ``mean``, ``sum``, ``max`` or ``norm`` of its weights' scores.
        include: regular expression; parameters whose name does not match are frozen.
        exclude: regular expression; parameters whose name matches are frozen.
        masks: several masks from one pass: a list of options score, density, select, scope, unit,
            pool, include, exclude, name; missing ones are taken from the options above. Each mask is
            written to ``<output>/<name or score-density>``.
        save_scores: also write the scores, as ``bf16`` or ``fp32``, next to the mask as
            ``<mask or score>.scores``.
        hessian: estimate of the retain loss's Hessian diagonal: ``scalar`` (``gamma``), ``auto``
            (the mean of a Gauss-Newton estimate), or one value per weight: ``gauss_newton``
            (labels sampled from the model), ``fisher`` (squared gradients of single rows),
            ``hutchinson`` (random signs, double backward; the true Hessian), or another
            :class:`~wagle_pl.attribution.hessian.Hessian`, by name, class path or, in Python, as an
            object.
        gamma: the scalar Hessian γ; a number implies ``hessian: scalar``, ``auto`` estimates it.
        damping: a diagonal ĥ is used as max(ĥ, 0) + damping × its mean.
        hessian_samples: samples per step, for ``auto``, ``gauss_newton`` and ``hutchinson``; a
            Hessian object has its own.
        hessian_data: rows on which the Hessian is estimated.
        forget_loss: loss whose gradient is g_f: ``ce`` (negative log-likelihood), ``npo`` or ``po``
            (refusals).
        reduction: combine gradients of examples by ``mean``, or by ``sum`` as in the paper's code.
        sums: where gradients are summed: on the ``device``; in ``host`` memory, during the
            backward pass; or on the device in ``passes=K`` over the data, each for one K-th of the
            weights, with finished sums in files next to the output (one device only).
        gradient_checkpointing: recompute activations in backward: less memory, a third more time.
    """

    #: Tells strategies to create no optimiser state.
    moves_weights = False

    def __init__(
        self,
        model: Union[str, PreTrainedModel],
        output: Optional[str] = None,
        density: float = 0.2,
        score: Union[Score, str] = "wagle",
        select: Literal["high", "low"] = "high",
        scope: Scope = "global",
        unit: str = "weight",
        pool: Pool = "mean",
        include: Optional[str] = None,
        exclude: Optional[str] = None,
        masks: Optional[list[MaskSpec]] = None,
        save_scores: Optional[Literal["bf16", "fp32"]] = None,
        hessian: Union[str, Hessian] = "auto",
        gamma: Union[float, Literal["auto"]] = "auto",
        damping: float = 0.1,
        hessian_samples: int = 1,
        hessian_data: Literal["retain", "forget", "holdout"] = "retain",
        forget_loss: Literal["ce", "npo", "po"] = "ce",
        reduction: Literal["mean", "sum"] = "mean",
        sums: str = "device",
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        check_arguments(AttributionModule.__init__, {**locals(), "masks": None}, "model.")
        super().__init__(model=model, output=output, **kwargs)
        default = MaskSpec(score, density, select, scope, unit, pool, include, exclude)
        self.several = masks is not None
        self.specs = complete(masks if masks is not None else [default], default)
        check_names(self.specs)
        self.needs = {need for spec in self.specs for need in spec.score.needs}
        self.save_scores = save_scores
        #: Scores to write: label -> a spec that uses the score.
        self._scores = by_label(self.specs) if save_scores else {}
        self.gamma = gamma
        self.damping = check_positive(damping, "damping")
        self.hessian_samples = int(check_positive(hessian_samples, "hessian_samples"))
        self.hessian_data = hessian_data
        self.forget_loss = FORGET_LOSSES[forget_loss]()
        self.reduction = reduction
        self._on_host, self.passes = Sums.parse(sums)
        self.gradient_checkpointing = gradient_checkpointing
        chosen = choose_hessian(hessian, gamma, self.hessian_samples, self.needs)
        self.hessian, self.estimator = chosen
        #: Whether scores see one h for all weights.
        self.scalar = self.hessian == "auto" or not getattr(self.estimator, "diagonal", False)
        jobs = jobs_for(self.needs, self.forget_loss, self.estimator, hessian_data)
        self.jobs, self._diagonal = jobs
        streams = [self.forget_loss.forget_streams[0], *(job.stream for job in self.jobs)]
        self.streams = tuple(dict.fromkeys(streams))
        self.masks: dict[str, WeightMask] = {}  # by name, once the pass has ended
        self.collected: Optional[Collected] = None  # once the pass has ended
        self.strict_loading = False  # checkpoints leave the weights out: they do not change
        self._within_step = False
        self._seen = (0, 0)  # the epoch, and how many of its micro-batches are in the sums
        self._one_pass_planned = True
        self._stored_sums: Optional[dict[str, Any]] = None  # of the checkpoint that is resumed

    @property
    def mask(self) -> Optional[WeightMask]:
        """The mask, once the pass has ended; the first of several."""
        return next(iter(self.masks.values()), None)

    # -- before the pass ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse impossible options, and an output that exists, before any work is done."""
        trainer = self.trainer
        if stage != "fit":
            super().setup(stage)
            return
        if trainer.max_steps == -1 and trainer.max_epochs in (-1, 1000):  # Lightning's defaults
            trainer.fit_loop.max_epochs = 1
        if self.passes > 1 and not trainer.fast_dev_run:
            self._repeat()
        super().setup(stage)
        if not self.output and (self.run_config or self.save_scores):
            raise WagleError("attribution needs a path for the mask: give --model.output")
        if self.output:
            outputs.reserve(self.place, self.overwrite, "files" if self.several else "file")
        for label in self._scores:
            refuse_existing(self._scores_path(label), self.overwrite)
        strategy = trainer.strategy
        if is_zero(strategy) and not isinstance(strategy, ZeRO):
            ours = "wagle_pl.strategies.ZeRO, or a name such as deepspeed_stage_3"
            raise WagleError(f"attribution under DeepSpeed needs this package's strategy: {ours}")
        check_run(
            str(trainer.precision),
            stage_of(strategy),
            trainer.world_size,
            self.estimator,
            Sums(self._on_host, self.passes),
        )

    def _repeat(self) -> None:
        """Make the Trainer go through its epochs once for each group of parameters."""
        trainer = self.trainer
        if trainer.max_steps != -1 or trainer.max_epochs < 1:
            hint = "give trainer.max_epochs or limit_train_batches, and no max_steps"
            raise WagleError("steps cannot bound several passes", option="sums", hint=hint)
        self.period = trainer.max_epochs
        trainer.fit_loop.max_epochs = self.period * self.passes

    def teardown(self, stage: str) -> None:
        """Give the Trainer its length back."""
        if self.period is not None:
            self.trainer.fit_loop.max_epochs, self.period = self.period, None

    @property
    def place(self) -> Optional[Path]:
        """The mask's file, or the folder of several masks."""
        return mask_path(self.output) if self.output and not self.several else super().place

    def _scores_path(self, label: str) -> Path:
        return self.place / f"{label}.scores" if self.several else self.place.with_suffix(".scores")

    def planned_files(self) -> list[outputs.Planned]:
        weights = sum(map(math.prod, parameter_shapes(self.lm).values()))
        kept = FP32 * (2 if self.scalar else 3) * weights
        what = "masks" if self.several else "mask"
        sizes = {what: len(self.specs) * weights / 8}
        if self.passes > 1:
            sizes["sums"] = kept
        if self.save_scores:
            sizes["scores"] = len(self._scores) * weights * DTYPES[self.save_scores].itemsize
        planned = [outputs.Planned(what, self.place, size) for what, size in sizes.items()]
        return planned + outputs.planned_checkpoint(self.trainer, kept)

    def configure_model(self) -> None:
        """Load the model and allocate the sums."""
        super().configure_model()
        self.lm.requires_grad_(True)
        folder = Path(self.output or ".").parent
        self.sums = GradientSums(self.lm.named_parameters(), self._on_host, self.passes, folder)
        if self.gradient_checkpointing:
            recompute_blocks(self.lm)
        if "activation" in self.needs:
            warn_of_unwatched(self.lm)

    def configure_optimizers(self) -> None:
        """None: no weight moves."""

    def on_fit_start(self) -> None:
        """Fail before the pass if a mask names what the model lacks, or a score is wrong."""
        super().on_fit_start()
        device = self.trainer.strategy.root_device
        shapes = parameter_shapes(self.lm)
        for spec in self.specs:
            eligible = {name: shapes[name] for name in spec.eligible(shapes)}
            try_out(resolve(Score, spec.score, "score"), eligible, self.scalar, device)

    def on_train_start(self) -> None:
        """Switch off dropout, and DDP's averaging of gradients, which are summed here."""
        super().on_train_start()
        self._restore_sums()
        passes, options = planned_passes(self.trainer, self.passes)
        self._one_pass_planned = passes == 1
        if not self._one_pass_planned and not self.trainer.fast_dev_run:
            message = "attribution will take %.4g passes over the forget rows, not one (%s)"
            log.warning(message, passes, ", ".join(options))
        self.lm.eval()
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            self.trainer.strategy.model.require_backward_grad_sync = False

    def _restore_sums(self) -> None:
        """Load the sums of the checkpoint that is resumed, once the model is on its device."""
        if self._stored_sums is not None:
            self.sums.load_state_dict(self._stored_sums)
        self._stored_sums = None

    # -- the pass ----------------------------------------------------------------------------------

    def noted(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().noted(tensors), "known": known(tensors)}

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> Tensor:
        """Add one micro-batch to the sums."""
        epoch, step = self.current_epoch, self.global_step
        if self.period is not None:
            self.sums.turn(epoch // self.period)
            batches = int(self.trainer.num_training_batches)
            steps = -(-batches // self.trainer.accumulate_grad_batches)
            epoch, step = epoch % self.period, step % (self.period * steps)
        draws = Draws(self.trainer.datamodule.seed, epoch, step)
        losses = add_batch(self.lm, batch, self.jobs, self.sums, draws)
        self.log_dict({f"train/{s}_loss": loss for s, loss in losses.items()})
        self.trainer.progress_bar_metrics.update(self.sums.losses)
        inside = (batch_idx + 1) % self.trainer.accumulate_grad_batches != 0
        self._within_step = inside and not self.trainer.is_last_batch
        if not self._within_step:
            end_step(self.jobs, self.sums)
        if is_zero(self.trainer.strategy):
            self.trainer.strategy.release()
        self._seen = (self.current_epoch, batch_idx + 1)
        # Lightning runs backward on what a step returns: here on a constant
        return torch.zeros((), device=self.device, requires_grad=True)

    # -- the masks ---------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Turn the sums into scores, the scores into masks, and write them."""
        super().on_train_end()
        if self.trainer.fast_dev_run:
            return
        self._restore_sums()  # if the resumed run had nothing left to collect
        if self._within_step:  # max_time or a callback has ended the run
            end_step(self.jobs, self.sums)
        self.sums.turn(self.passes)
        if self.fingerprint() != self.model_fingerprint:
            why = "attribution moved a weight: the mask is not written; please report this"
            raise WagleError(why)
        h: Optional[Union[Hessian, float]] = self.estimator
        if h is None and self.needs & {"h", "h_diagonal"}:
            h = float(self.gamma)
        self.collected = Collected(
            self.lm,
            self.sums,
            forget=self.forget_loss.forget_streams[0],
            mean=self.reduction == "mean",
            hessian=h,
            hessian_stream=self.hessian_data,
            diagonal=self._diagonal,
            scalar=self.scalar,
            damping=self.damping,
            device=self.device,
        )
        metadata = self._metadata()
        if self._one_pass_planned and (passes := metadata["passes"]) != 1:
            message = (
                "the mask is of %.4g passes over the %d forget rows, not of one: it ended early"
            )
            log.warning(message, passes, metadata["forget_rows"])
        self._write_masks(metadata)

    def _metadata(self) -> dict[str, Any]:
        curvature = self.collected.hessian
        forget_rows = len(self.trainer.datamodule.examples("forget"))
        return {
            "model": self.model_name,
            "model_fingerprint": self.model_fingerprint,
            "hessian": self.hessian if curvature else None,
            "gamma": curvature.mean if curvature else None,
            "damping": self.damping,
            "hessian_samples": self.estimator.samples if self.estimator else self.hessian_samples,
            "hessian_data": self.hessian_data,
            "forget_loss": type(self.forget_loss).__name__,
            "reduction": self.reduction,
            "passes": self.collected.rows(self.streams[0]) / forget_rows,
            "forget_rows": forget_rows,
            "rows": {stream: int(self.collected.rows(stream)) for stream in self.streams},
            "data": self.described_data,
            "prompts": self.prompts,
            "config": self.run_config,
        }

    def _write_masks(self, metadata: dict[str, Any]) -> None:
        """Write the masks, and the scores if wanted. Collective."""
        checkpoint = outputs.last_checkpoint(self.trainer)
        failed: list[str] = []
        for spec, mask in self.collected.masks(self.specs, metadata):
            if mask is None:
                continue
            self._report(mask, spec.name)
            self.masks[spec.name] = mask
            if not self.output:
                continue
            path = self.place / f"{spec.name}{SUFFIX}" if self.several else self.place
            try:
                outputs.write_or_keep(mask.save, path, checkpoint)
            except WagleError as error:  # the next mask may be saved, too
                failed.append(str(error))
            else:
                log.info("mask written to %s (density %.4f)", path, mask.density)
        for label, spec in self._scores.items():
            options = {key: spec.options()[key] for key in ("score", "score_options")}
            made_by = {**metadata, **options, "absolute": not spec.score.signed}
            made_by["geometry"] = self.collected.geometry._asdict()
            scores, shapes = self.collected.scores(spec.score), self.collected.shapes
            path, dtype = self._scores_path(label), DTYPES[self.save_scores]
            write = partial(write_scores, scores=scores, shapes=shapes, made_by=made_by)
            write = partial(write, dtype=dtype)
            outputs.write_or_keep(write, path, checkpoint, again=False)
            if self.trainer.is_global_zero:
                log.info("scores written to %s", path)
        if failed:
            raise WagleError("; ".join(failed))

    def _report(self, mask: WeightMask, name: str) -> None:
        """Log the share selected by layer and by module type."""
        stats = mask.stats()
        prefix = f"mask/{name}" if self.several else "mask"
        shares = {f"{prefix}/density": mask.density}
        for group in ("layer", "module"):
            shares |= {f"{prefix}/{group}/{key}": share for key, share in stats[group].items()}
            if not self.several:
                parts = "  ".join(f"{key} {share:.3f}" for key, share in stats[group].items())
                log.info("share selected by %s: %s", group, parts)
        for logger in self.trainer.loggers:
            logger.log_metrics(shares, step=self.global_step)

    # -- checkpoints -------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the sums and which rows they include, but no weights: these have not moved."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {}
        if not is_zero(self.trainer.strategy):  # there each rank writes its own part
            checkpoint["sums"] = self.sums.state_dict()
        if self._seen[1]:
            keep_position(checkpoint, self.trainer, *self._seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the sums and the position in the pass."""
        super().on_load_checkpoint(checkpoint)
        if self.attached and self.trainer.training and not is_zero(self.trainer.strategy):
            # under ZeRO each rank has already read its part
            sums = checkpoint.get("sums")
            self._stored_sums = check(sums, WholeSums, self.checkpoint_label, "sums")


def planned_passes(trainer: L.Trainer, groups: int = 1) -> tuple[float, list[str]]:
    """How many passes over the forget rows a Trainer will make for each of the ``groups`` of
    parameters, and the options that make this more or fewer than one."""
    batch_count, per_epoch = len(trainer.train_dataloader), trainer.num_training_batches
    epochs = math.inf if trainer.max_epochs == -1 else trainer.max_epochs // groups
    limit = trainer.max_steps * trainer.accumulate_grad_batches
    steps = math.inf if trainer.max_steps == -1 else limit
    bounds = {
        "max_epochs": epochs not in (1, math.inf) and epochs * per_epoch <= steps,
        "max_steps": steps < epochs * per_epoch,
        "limit_train_batches": per_epoch < batch_count and per_epoch <= steps,
    }
    limits = {name: getattr(trainer, name) for name in bounds} | {"max_epochs": epochs}
    options = [f"trainer.{name} {limits[name]}" for name in bounds if bounds[name]]
    return min(epochs * per_epoch, steps) / batch_count, options
