"""``AttributionModule``: one pass over forget and retain rows, a score for every weight, a mask file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor

from wagle_pl import models
from wagle_pl.attribution.hessian import bartlett_loss, sample_labels
from wagle_pl.attribution.scores import Score, WeightStatistics
from wagle_pl.attribution.selection import check_density, select
from wagle_pl.attribution.sums import GradientSums
from wagle_pl.evaluation.likelihood import forward_answers
from wagle_pl.evaluation.module import EvaluationModule
from wagle_pl.masks import WeightMask, mask_path
from wagle_pl.unlearning.objectives import NPO, PO, Answers, GradDiff, Streams
from wagle_pl.utilities import WagleError, describe, refuse_existing, resolve

log = logging.getLogger(__name__)

FORGET_LOSSES = {"ce": GradDiff, "npo": NPO, "po": PO}


class AttributionModule(EvaluationModule):
    """Scores every weight for unlearning and writes the mask of the highest-scoring share.

    One epoch sees every forget row once and as many retain rows. Gradients are summed in fp32. No weight is moved: the
    run checks that at its end.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the target model.
        output: path of the mask file; ``.safetensors`` is added when missing.
        density: share of weights selected, in (0, 1].
        score: ``wagle``, or a class path to a ``Score``.
        hessian: what stands for the retain loss's Hessian diagonal: ``scalar`` (``gamma``) or ``auto`` (its mean, from
            a Gauss-Newton estimate).
        gamma: the scalar Hessian γ; a number implies ``hessian: scalar``, ``auto`` estimates it.
        forget_loss: whose gradient g_f is: ``ce`` (negative log-likelihood), ``npo`` or ``po`` (refusals).
        reduction: of the two gradients over examples: ``mean``, or ``sum`` as the paper's code has it.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        kwargs: see :class:`EvaluationModule`.

    Raises:
        WagleError: if an option has no meaning.
    """

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        density: float = 0.2,
        score: Union[Score, str] = "wagle",
        hessian: Literal["scalar", "auto"] = "auto",
        gamma: Union[float, Literal["auto"]] = "auto",
        forget_loss: Literal["ce", "npo", "po"] = "ce",
        reduction: Literal["mean", "sum"] = "mean",
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, output=output, **kwargs)
        check_density(density)
        if gamma != "auto" and not gamma > 0:
            raise WagleError(f"gamma must be above 0, got {gamma}")
        if hessian == "scalar" and gamma == "auto":
            raise WagleError("hessian scalar needs a number: give --model.gamma")
        self.density = density
        self.score = resolve(Score, score, "score")
        self.hessian = hessian if gamma == "auto" else "scalar"
        self.gamma = gamma
        self.forget_loss = FORGET_LOSSES[forget_loss]()
        self.reduction = reduction
        self.gradient_checkpointing = gradient_checkpointing
        self.streams = (*self.forget_loss.forget_streams, "retain")
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints leave the weights out: they do not change

    @property
    def results_folder(self) -> Path:
        """Test results never go where the mask is."""
        return Path(self.trainer.default_root_dir) / "test"

    def setup(self, stage: str) -> None:
        """Refuse an output that exists before any work is done."""
        super().setup(stage)
        if stage == "fit":
            if not self.output:
                raise WagleError("attribution needs a path for the mask: give --model.output")
            refuse_existing(mask_path(self.output), self.overwrite)
            if str(self.trainer.precision).startswith("16"):
                raise WagleError("attribution needs trainer.precision 32-true, bf16-mixed or bf16-true: the loss scaling "
                                 "of fp16 would scale the sums")  # fmt: skip

    def configure_model(self) -> None:
        """Load the model, with gradients for every parameter."""
        super().configure_model()
        if self.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def configure_optimizers(self) -> GradientSums:
        """The sums."""
        return GradientSums(self.lm.parameters())

    @property
    def sums(self) -> GradientSums:
        """Running sums of gradients."""
        return self.optimizers().optimizer

    def on_train_start(self) -> None:
        """Attribute the model as it is used: without dropout."""
        self.lm.eval()

    # -- the pass -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> None:
        """Add one micro-batch to the sums."""
        sums = self.sums
        at = _AtTheta0(batch, self._run, {})
        stream = self.forget_loss.forget_streams[0]
        with sums.into("g_f"):
            loss = -_total(batch[stream], self.forget_loss.forget_loss(at))
            self._backward(loss, "forget", batch_idx)
        sums.count("forget_rows", _rows(batch[stream]))
        self.log("train/forget_loss", loss.detach() / max(1, _rows(batch[stream])), prog_bar=True)
        del at, loss

        retain = batch["retain"]
        logits, labels = self._run(retain)
        answers = Answers(logits, labels)
        loss = _total(retain, answers.nll)
        with sums.into("g_r"):
            self._backward(loss, "retain", batch_idx, retain_graph=self.hessian == "auto")
        if self.hessian == "auto":
            epoch, seed = self.trainer.current_epoch, self.trainer.datamodule.seed
            drawn = sample_labels(logits, labels, [hash((seed, epoch, row)) for row in retain["row"].tolist()])
            drawn[retain["weight"] == 0] = -100
            with sums.into("draw"):
                self.manual_backward(bartlett_loss(logits, drawn))
        sums.count("retain_rows", _rows(retain))
        self.log("train/retain_loss", loss.detach() / max(1, _rows(retain)), prog_bar=True)
        self._end_of_batch()

    def _run(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        output, labels = forward_answers(self.lm, tensors)
        return output.logits, labels

    def _backward(self, loss: Tensor, which: str, batch_idx: int, **options: Any) -> None:
        if not torch.isfinite(loss):
            raise WagleError(f"{which} loss is not finite in batch {batch_idx}: {loss.item():g}; is the model whole?")
        self.manual_backward(loss, **options)

    def _end_of_batch(self) -> None:
        """Square the gradient of the drawn labels, now that it is whole, and let Lightning count a step."""
        if self.hessian == "auto":
            for draw in self.sums.buffers("draw"):
                self.sums.count("h_sum", torch.linalg.vector_norm(draw, dtype=torch.float64).square().item())
                draw.zero_()
        self.optimizers().step()

    # -- the mask -----------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Turn the sums into scores, the scores into a mask, and write it."""
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:
            return
        if models.fingerprint(self.lm.named_parameters()) != self.model_fingerprint:
            raise WagleError("attribution moved a weight: the mask is not written; please report this")
        h = self._scalar_hessian()
        named = list(self.lm.named_parameters())
        shapes = models.parameter_shapes(self.lm)

        def scores() -> Iterator[tuple[str, Tensor]]:
            for i, (name, _) in enumerate(named):
                yield name, self.score(self._statistics(i, h)).float()

        packed = dict(select(scores, self.density))
        mask = WeightMask(packed, shapes, self._made_by(h))
        path = mask.save(self.output)
        self._report(mask)
        log.info("mask written to %s", path)

    def _scale(self, rows: str) -> float:
        return 1.0 if self.reduction == "sum" else 1.0 / self.sums.counts[rows]

    def _scalar_hessian(self) -> Tensor:
        """γ, in fp32.

        Raises:
            WagleError: if its estimate is zero.
        """
        if self.gamma != "auto":
            return torch.tensor(float(self.gamma))
        weights = sum(p.numel() for p in self.lm.parameters())
        gamma = self.sums.counts["h_sum"] * self._scale("retain_rows") / weights
        if not gamma > 0:
            raise WagleError("the retain loss has no curvature here (gamma auto is 0); give --model.gamma a number")
        return torch.tensor(gamma)

    def _statistics(self, i: int, h: Tensor) -> WeightStatistics:
        """What the pass saw of the i-th parameter."""
        name, parameter = list(self.lm.named_parameters())[i]
        g_f = self.sums.buffers("g_f")[i] * self._scale("forget_rows")
        g_r = self.sums.buffers("g_r")[i] * self._scale("retain_rows")
        return WeightStatistics(name, parameter.detach().float(), g_f, g_r, h.to(g_r.device))

    def _made_by(self, h: Tensor) -> dict[str, Any]:
        data = self.trainer.datamodule
        return {
            "model": self.model_name,
            "model_fingerprint": self.model_fingerprint,
            "score": describe(self.score)["class"],
            "hessian": self.hessian,
            "gamma": h.item(),
            "density": self.density,
            "forget_loss": type(self.forget_loss).__name__,
            "reduction": self.reduction,
            "rows": {name: int(self.sums.counts[f"{name}_rows"]) for name in ("forget", "retain")},
            "data": {name: data.describe(name) for name in ("forget", "retain")},
            "config": self.run_config,
        }

    def _report(self, mask: WeightMask) -> None:
        """Log the share selected by layer and by module type."""
        stats = mask.stats()
        flat = {f"mask/{group}/{key}": share for group in ("layer", "module") for key, share in stats[group].items()}
        for logger in self.trainer.loggers:
            logger.log_metrics({"mask/density": mask.density, **flat}, step=self.global_step)
        for group in ("module", "layer"):
            shares = "  ".join(f"{key} {share:.3f}" for key, share in stats[group].items())
            log.info("share selected by %s: %s", group, shares)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the weights out: they are the model's own, unmoved."""
        checkpoint["state_dict"] = {}


class _AtTheta0(Streams):
    """Streams whose reference is the model itself, as at the first step of unlearning."""

    def __getitem__(self, stream: str) -> Answers:
        answers = super().__getitem__(stream)
        if answers.reference is None:
            answers.reference = answers.logprob.detach()
        return answers


def _rows(tensors: Mapping[str, Tensor]) -> int:
    """Rows of a stream that count (padding has weight 0)."""
    return int((tensors["weight"] > 0).sum())


def _total(tensors: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """Sum of (B,) values over rows that count."""
    return values.masked_fill(tensors["weight"] == 0, 0.0).sum()
