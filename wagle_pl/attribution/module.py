"""``AttributionModule``: one pass over forget and retain rows, a score for every weight, a mask file or several."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wagle_pl.attribution.collect import Draws, Job, add_batch, end_step
from wagle_pl.attribution.hessian import DIAGONAL, Fisher, Hessian, estimator_of
from wagle_pl.attribution.scores import Score, try_out
from wagle_pl.attribution.scoring import Collected
from wagle_pl.attribution.specs import MaskSpec, check_labels, complete, name_masks
from wagle_pl.attribution.stored import DTYPES, write_scores
from wagle_pl.attribution.sums import GradientSums
from wagle_pl.core import distributed, outputs
from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm.layers import linear_weights, recompute_blocks
from wagle_pl.lm.module import LanguageModule
from wagle_pl.lm.resume import begin, keep_position, recount
from wagle_pl.masks import SUFFIX, WeightMask, mask_path
from wagle_pl.objectives.forget import NPO, PO, GradDiff
from wagle_pl.planning import PlannedRun, Size, disk_bytes
from wagle_pl.strategies import ZeRO, is_sharded, is_zero, stage_of

log = logging.getLogger(__name__)

#: ``Trainer.max_epochs`` where nobody gave it.
LIGHTNINGS_EPOCHS = 1000

FORGET_LOSSES = {"ce": GradDiff, "npo": NPO, "po": PO}


class AttributionModule(LanguageModule):
    """Scores every weight for unlearning and writes the mask of the highest-scoring share.

    One pass, an epoch, sees every forget row once and as many retain rows; only what the scores need is computed. Sums
    are in fp32. No weight is moved: the run checks that at its end.

    One pass is made unless the Trainer is given a number of epochs or steps (its own default of 1000 epochs counts as
    none given). A mask of several passes, or of part of one (``max_epochs``, ``max_steps``, ``limit_train_batches``,
    ``max_time``), is warned of, and its metadata say so: ``passes``, and the ``rows`` seen of each stream.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the target model.
        output: path of the mask file; ``.safetensors`` is added when missing. With ``masks``, a folder.
        density: share of weights selected, in (0, 1], of those that take part.
        score: ``wagle``, ``snip``, ``gradient``, ``forget_retain_ratio``, ``fisher_ratio``, ``curvature``, ``signed``,
            ``magnitude``, ``wanda``, ``random``, ``Modules`` (with arguments), or a class path to a ``Score``.
        select: the ``high`` or the ``low`` end of the ranking.
        scope: weights compete over the whole model (``global``), within each ``tensor``, or within each ``row``: an
            output of a layer, or an input where a model stores layers transposed (GPT-2).
        include: regular expression; only parameters whose name it finds take part, the others are frozen.
        exclude: regular expression; parameters whose name it finds do not take part.
        masks: several masks from the same pass: a list of score, density, select, scope, include, exclude, name; what
            one leaves out is taken from the options above. Each is written to ``<output>/<name or score-density>``.
        save_scores: keep the scores too, as ``bf16`` or ``fp32``, beside the mask in ``<mask or score>.scores``.
        hessian: what stands for the retain loss's Hessian diagonal: ``scalar`` (``gamma``), ``auto`` (the mean of a
            Gauss-Newton estimate), or one number a weight: ``gauss_newton`` (labels drawn from the model), ``fisher``
            (squared gradients of single rows), ``hutchinson`` (random signs, double backward; the true Hessian), or
            another :class:`~wagle_pl.attribution.hessian.Hessian`, by name or class path.
        gamma: the scalar Hessian γ; a number implies ``hessian: scalar``, ``auto`` estimates it.
        damping: a diagonal ĥ is used as max(ĥ, 0) + damping × its mean.
        hessian_samples: draws for each step, for ``auto``, ``gauss_newton`` and ``hutchinson``.
        hessian_data: rows on which the Hessian is estimated.
        forget_loss: whose gradient g_f is: ``ce`` (negative log-likelihood), ``npo`` or ``po`` (refusals).
        reduction: of the two gradients over examples: ``mean``, or ``sum`` as the paper's code has it.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        **kwargs: passed to :class:`~wagle_pl.lm.module.LanguageModule`.

    Raises:
        WagleError: if an option has no meaning.
    """

    #: Strategies need make no optimiser state for it.
    moves_weights = False

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        density: float = 0.2,
        score: Union[Score, str] = "wagle",
        select: Literal["high", "low"] = "high",
        scope: Literal["global", "tensor", "row"] = "global",
        include: Optional[str] = None,
        exclude: Optional[str] = None,
        masks: Optional[list[MaskSpec]] = None,
        save_scores: Optional[Literal["bf16", "fp32"]] = None,
        hessian: str = "auto",
        gamma: Union[float, Literal["auto"]] = "auto",
        damping: float = 0.1,
        hessian_samples: int = 1,
        hessian_data: Literal["retain", "forget", "holdout"] = "retain",
        forget_loss: Literal["ce", "npo", "po"] = "ce",
        reduction: Literal["mean", "sum"] = "mean",
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, output=output, **kwargs)
        default = MaskSpec(score, density, select, scope, include, exclude)
        made: dict[Any, Score] = {}
        self.several = masks is not None
        self.specs = [
            complete(spec, default, made) for spec in (masks if masks is not None else [default])
        ]
        if not self.specs:
            raise WagleError("masks is an empty list: leave it out, or name a mask")
        self.mask_names = name_masks(self.specs)
        if save_scores:
            check_labels(self.specs)
        self.needs = {need for spec in self.specs for need in spec.score.needs}
        self.save_scores = save_scores
        self.hessian = _hessian_kind(hessian, gamma, self.needs)
        self._estimator: Optional[Hessian] = None
        self.gamma = gamma
        self.damping = check_positive(damping, "damping")
        self.hessian_samples = int(check_positive(hessian_samples, "hessian_samples"))
        self.hessian_data = hessian_data
        self.forget_loss = FORGET_LOSSES[forget_loss]()
        self.reduction = reduction
        self.gradient_checkpointing = gradient_checkpointing
        self.jobs = self._plan()
        self._within_step = False
        self._loader_state: Optional[dict[str, Any]] = None
        self._seen = (0, 0)  # the epoch, and how many of its micro-batches are in the sums
        self._one_pass_planned = True
        self.collected: Optional[Collected] = None  # once the pass has ended
        self._stored_sums: Optional[dict[str, Any]] = None  # of the checkpoint that is resumed
        self.streams = tuple(
            dict.fromkeys((self.forget_loss.forget_streams[0], *(job.stream for job in self.jobs)))
        )
        self.strict_loading = False  # checkpoints leave the weights out: they do not change

    def _plan(self) -> list[Job]:
        """What to collect from each stream."""
        needs, on = self.needs, self.hessian_data
        kind = estimator_of(self.hessian)
        if kind is not None and needs & {"h", "h_diagonal"}:
            diagonal = self.hessian != "auto" or "h_diagonal" in needs
            self._estimator = kind(samples=self.hessian_samples, diagonal=diagonal)
        estimator = self._estimator
        shared = (
            type(estimator) is Fisher and on == "retain"
        )  # then F_r is the Hessian, collected once
        self._diagonal = "fisher_r" if shared else DIAGONAL
        forget = Job(
            stream=self.forget_loss.forget_streams[0],
            loss=lambda at: (
                -self.forget_loss.forget_loss(at)
            ),  # forgetting lowers the forget loss: +g_f
            total="g_f" if "g_f" in needs else None,
            squares="fisher_f" if "fisher_f" in needs else None,
            activations="activation" in needs,
        )
        retain = Job(
            stream="retain",
            loss=lambda at: at["retain"].nll,
            total="g_r" if "g_r" in needs else None,
            squares="fisher_r" if "fisher_r" in needs or shared else None,
            hessian=estimator if on == "retain" and not shared else None,
        )
        jobs = [forget, retain]
        if estimator and on != "retain":
            jobs.append(Job(stream=on, loss=lambda at: at[on].nll, hessian=estimator))
        return [job for job in jobs if job.needs_graph or job.activations]

    def setup(self, stage: str) -> None:
        """Refuse an output that exists before any work is done."""
        super().setup(stage)
        if stage == "fit":
            if not self.output:
                raise WagleError("attribution needs a path for the mask: give --model.output")
            outputs.reserve(self._place, self.overwrite, "files" if self.several else "file")
            for spec in self.specs if self.save_scores else ():
                refuse_existing(self._scores_path(spec.score), self.overwrite, kind="folder")
            if str(self.trainer.precision).startswith("16"):
                raise WagleError(
                    "attribution needs trainer.precision 32-true, bf16-mixed or bf16-true: "
                    "the loss scaling of fp16 would scale the sums"
                )
            self._check_strategy()
            self._set_length()

    def _set_length(self) -> None:
        """One pass is what it takes, unless the Trainer has been told otherwise."""
        trainer = self.trainer
        if trainer.max_steps == -1 and trainer.max_epochs in (-1, LIGHTNINGS_EPOCHS):
            trainer.fit_loop.max_epochs = 1

    def configure_callbacks(self) -> list[Callback]:
        """What lets others write the output when the run fails."""
        return [outputs.ReleaseOnFailure(self._place)] if self.output else []

    def teardown(self, stage: str) -> None:
        """Let others write the output."""
        if stage == "fit" and self.output:
            outputs.release(self._place)

    @property
    def _place(self) -> Path:
        """The mask's file, or the masks' folder."""
        return Path(self.output) if self.several else mask_path(self.output)

    def planned_files(self) -> list[outputs.Planned]:
        """What the run is going to write, at least."""
        weights = sum(map(prod, parameter_shapes(self.lm).values()))
        run = PlannedRun.about_to(
            "attribution",
            str(self.trainer.precision),
            stage_of(self.trainer.strategy),
            estimator=estimator_of(self.hessian),
            diagonal=self.hessian not in ("auto", "scalar"),
        )
        files = disk_bytes(Size(weights, 0), run)
        planned = [
            outputs.Planned(
                "masks" if self.several else "mask", self._place, len(self.specs) * files["mask"]
            )
        ]
        if self.save_scores:
            scores = (
                len({id(spec.score) for spec in self.specs})
                * weights
                * DTYPES[self.save_scores].itemsize
            )
            planned.append(outputs.Planned("scores", self._place, scores))
        return planned + outputs.planned_checkpoint(self.trainer, files["checkpoint"])

    def _check_strategy(self) -> None:
        """Refuse what cannot work with several ranks."""
        strategy = self.trainer.strategy
        if is_zero(strategy) and not isinstance(strategy, ZeRO):
            raise WagleError(
                "attribution under DeepSpeed needs this package's strategy: wagle_pl.strategies.ZeRO, or "
                "a name such as deepspeed_stage_3"
            )
        if is_sharded(strategy) and any(
            job.hessian and not job.hessian.spreads for job in self.jobs
        ):
            raise WagleError(
                f"hessian {self.hessian} needs whole parameters, which ZeRO-3 spreads over ranks: choose "
                "--model.hessian gauss_newton or another stage"
            )

    def configure_model(self) -> None:
        """Load the model, with gradients for every parameter, and check the masks' names against it."""
        super().configure_model()
        self.sums = GradientSums.of(self.lm)
        if self.gradient_checkpointing:
            recompute_blocks(self.lm)
        shapes = parameter_shapes(self.lm)
        if "activation" in self.needs:
            self._say_what_is_unseen(shapes)
        for spec in self.specs:
            spec.score.share({name: shapes[name] for name in spec.taking_part(shapes)})

    def _input_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Weight of a linear map -> shape of the activation norms that the pass will find for it."""
        transposed = {id(weight): lies for weight, lies in linear_weights(self.lm)}
        found = {}
        for name, parameter in self.lm.named_parameters():
            if id(parameter) in transposed:
                *before, rows, columns = shapes[name]
                along = (*before, rows, 1) if transposed[id(parameter)] else (*before, 1, columns)
                found[name] = along if before or transposed[id(parameter)] else (columns,)
        return found

    def _say_what_is_unseen(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Warn of matrices whose inputs are not watched, if they are a large part of the model."""
        seen = {id(weight) for weight, _ in linear_weights(self.lm)}
        seen |= {
            id(module.weight) for module in self.lm.modules() if isinstance(module, nn.Embedding)
        }
        unseen = [
            name
            for name, p in self.lm.named_parameters()
            if len(shapes[name]) > 1 and id(p) not in seen
        ]
        share = sum(math.prod(shapes[name]) for name in unseen) / sum(
            map(math.prod, shapes.values())
        )
        if share > 0.01:
            log.warning(
                "wanda: %.0f %% of the weights are in layers of unknown kinds (%s, ...): they score 0 and are "
                "selected last",
                100 * share,
                ", ".join(unseen[:3]),
            )

    def configure_optimizers(self) -> None:
        """No weight moves: there is nothing to optimise."""

    def on_fit_start(self) -> None:
        """Refuse a run that the disk has no room for, and try the scores on random numbers, before a pass is spent on
        one that is wrong."""
        if not self.trainer.fast_dev_run:
            distributed.on_rank_zero(lambda: outputs.check_space(self.planned_files()))
        shapes = parameter_shapes(self.lm)
        inputs, scalar = self._input_shapes(shapes), self.hessian in ("scalar", "auto")
        for spec in self.specs:
            part = {name: shapes[name] for name in spec.taking_part(shapes)}
            try_out(spec.score, part, scalar, inputs, self.trainer.strategy.root_device)

    def on_train_start(self) -> None:
        """Attribute the model as it is used, without dropout; DDP need not average gradients that are summed here."""
        begin(self.trainer, self._loader_state)
        self._restore_sums()
        self._say_if_not_one_pass()
        self.lm.eval()
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            self.trainer.strategy.model.require_backward_grad_sync = False

    def _restore_sums(self) -> None:
        """Take the sums of the checkpoint that is resumed, once the model is on its device."""
        if self._stored_sums is not None:
            self.sums.load_state_dict(self._stored_sums)
        self._stored_sums = None

    def _say_if_not_one_pass(self) -> None:
        """Warn, before the work, of options that make it several passes, or part of one."""
        trainer = self.trainer
        whole, each = len(trainer.train_dataloader), trainer.num_training_batches
        epochs = math.inf if trainer.max_epochs == -1 else trainer.max_epochs
        steps = (
            math.inf
            if trainer.max_steps == -1
            else trainer.max_steps * trainer.accumulate_grad_batches
        )
        self._one_pass_planned = min(epochs * each, steps) == whole
        if self._one_pass_planned or trainer.fast_dev_run:
            return
        bounds = {
            "max_epochs": epochs not in (1, math.inf) and epochs * each <= steps,
            "max_steps": steps < epochs * each,
            "limit_train_batches": each < whole and each <= steps,
        }
        options = ", ".join(
            f"trainer.{name} {getattr(trainer, name)}" for name, bound in bounds.items() if bound
        )
        passes = min(epochs * each, steps) / whole
        log.warning(
            "attribution will take %.4g passes over the forget rows, not one (%s)", passes, options
        )

    # -- the pass -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> Tensor:
        """Add one micro-batch to the sums."""
        draws = Draws(self.trainer.datamodule.seed, self.current_epoch, self.global_step)
        losses = add_batch(self.lm, batch, self.jobs, self.sums, draws)
        self.log_dict({f"train/{s}_loss": loss for s, loss in losses.items()}, prog_bar=True)
        self._within_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches != 0
        if not self._within_step or self.trainer.is_last_batch:
            self._end_step()
        if is_zero(self.trainer.strategy):
            self.trainer.strategy.release()
        self._seen = (self.current_epoch, batch_idx + 1)
        # Lightning takes the gradient of what a step returns: here of nothing but the number itself
        return torch.zeros((), device=self.device, requires_grad=True)

    def _end_step(self) -> None:
        self._within_step = False
        end_step(self.jobs, self.sums)

    # -- the masks ----------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Turn the sums into scores, the scores into masks, and write them."""
        super().on_train_end()
        if self.trainer.fast_dev_run:
            return
        self._restore_sums()  # of a run that had nothing left to collect
        if self._within_step:  # time has ended the run
            self._end_step()
        if self.fingerprint() != self.model_fingerprint:
            raise WagleError(
                "attribution moved a weight: the mask is not written; please report this"
            )
        self.collected = self._collected()
        passes = self.collected.rows(self.streams[0]) / self._forget_rows()
        if self._one_pass_planned and passes != 1:
            log.warning(
                "the mask is of %.4g passes over the %d forget rows, not of one: the run ended early",
                passes,
                self._forget_rows(),
            )
        metadata = self._metadata(passes)
        checkpoint = outputs.last_checkpoint(self.trainer)
        failed: list[str] = []
        same_passes: dict[Any, list[tuple[str, MaskSpec]]] = {}
        for name, spec in zip(self.mask_names, self.specs, strict=True):
            same_passes.setdefault(spec.passes, []).append((name, spec))
        for group in same_passes.values():
            masks = self.collected.masks([spec for _, spec in group], metadata)
            for (name, _), mask in zip(group, masks, strict=True):
                if mask is None:
                    continue
                path = Path(self.output) / f"{name}{SUFFIX}" if self.several else self._place
                self._report(mask, name)
                try:
                    outputs.write_or_keep(mask.save, path, checkpoint)
                except WagleError as error:  # the next mask may be kept, too
                    failed.append(str(error))
                else:
                    log.info("mask written to %s (density %.4f)", path, mask.density)
        if self.save_scores:
            for spec in {id(spec.score): spec for spec in self.specs}.values():
                self._write_scores(spec, metadata)
        if failed:
            raise WagleError("; ".join(failed))

    def _collected(self) -> Collected:
        h: Optional[Union[Hessian, float]] = None
        if self.needs & {"h", "h_diagonal"}:
            h = float(self.gamma) if self._estimator is None else self._estimator
        return Collected(
            self.lm,
            self.sums,
            forget=self.forget_loss.forget_streams[0],
            mean=self.reduction == "mean",
            hessian=h,
            hessian_stream=self.hessian_data,
            diagonal=self._diagonal,
            scalar=self.hessian in ("scalar", "auto"),
            damping=self.damping,
            device=self.device,
        )

    def _scores_path(self, score: Score) -> Path:
        if self.several:
            return Path(self.output) / f"{score.label}.scores"
        return self._place.with_suffix(".scores")

    def _forget_rows(self) -> int:
        return len(self.trainer.datamodule.examples("forget"))

    def _write_scores(self, spec: MaskSpec, metadata: dict[str, Any]) -> None:
        options = {key: spec.options()[key] for key in ("score", "score_options")}
        made_by = {**metadata, **options, "absolute": not spec.score.signed}
        whole = self.collected.whole_scores(spec.score)
        if not self.trainer.is_global_zero:
            for _ in whole:
                pass
            return
        path, dtype = self._scores_path(spec.score), DTYPES[self.save_scores]
        outputs.write_or_keep(
            lambda place: write_scores(place, whole, self.collected.shapes, made_by, dtype),
            path,
            outputs.last_checkpoint(self.trainer),
            again=False,
        )
        log.info("scores written to %s", path)

    def _metadata(self, passes: float) -> dict[str, Any]:
        """What made the mask, for its file."""
        curvature = self.collected.hessian
        return {
            "model": self.model_name,
            "model_fingerprint": self.model_fingerprint,
            "hessian": self.hessian if curvature else None,
            "gamma": curvature.mean if curvature else None,
            "damping": self.damping,
            "hessian_samples": self.hessian_samples,
            "hessian_data": self.hessian_data,
            "forget_loss": type(self.forget_loss).__name__,
            "reduction": self.reduction,
            "passes": passes,
            "forget_rows": self._forget_rows(),
            "rows": {stream: int(self.collected.rows(stream)) for stream in self.streams},
            "data": self.described_data,
            "prompts": self.prompts,
            "config": self.run_config,
        }

    def _report(self, mask: WeightMask, name: str) -> None:
        """Log the share selected by layer and by module type."""
        stats = mask.stats()
        prefix = f"mask/{name}" if self.several else "mask"
        shares = {f"{prefix}/density": mask.density}
        for group in ("layer", "module"):
            shares |= {f"{prefix}/{group}/{key}": v for key, v in stats[group].items()}
            if not self.several:
                parts = "  ".join(f"{key} {share:.3f}" for key, share in stats[group].items())
                log.info("share selected by %s: %s", group, parts)
        for logger in self.trainer.loggers:
            logger.log_metrics(shares, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the weights out: they are the model's own, unmoved. Say which rows are in the sums."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {}
        if not is_zero(self.trainer.strategy):  # there each rank writes its own part
            checkpoint["sums"] = self.sums.state_dict()
        if self._seen[1]:
            keep_position(checkpoint, self.trainer, *self._seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the sums back, and find the place where the pass goes on."""
        super().on_load_checkpoint(checkpoint)
        if self.attached and self.trainer.training:
            self._loader_state = recount(checkpoint, self.data)
            if not is_zero(self.trainer.strategy):  # which has read each rank's part by now
                self._stored_sums = checkpoint["sums"]


def _hessian_kind(hessian: str, gamma: Union[float, str], needs: set[str]) -> str:
    """The Hessian asked for, of an option and a γ.

    Raises:
        WagleError: if they contradict each other, or the scores.
    """
    if gamma != "auto":
        check_positive(gamma, "gamma")
        if hessian not in ("scalar", "auto"):
            raise WagleError(
                f"gamma {gamma} is for hessian scalar, not for {hessian}: leave one of them out"
            )
        hessian = "scalar"
    elif hessian == "scalar":
        raise WagleError("hessian scalar needs a number: give --model.gamma")
    if hessian == "scalar" and "h_diagonal" in needs:
        raise WagleError(
            "a score here needs a Hessian diagonal, not a scalar: give --model.hessian gauss_newton"
        )
    return hessian
