"""``FinetuneModule`` makes target and retrained models; ``UnlearnModule`` makes a model forget."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
import yaml
from torch import Tensor, nn

from wagle_pl import models
from wagle_pl.evaluation.likelihood import forward_answers
from wagle_pl.evaluation.module import EvaluationModule
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning.objectives import Objective, Streams
from wagle_pl.unlearning.optim import MaskedAdamW, ParameterMasks, guard, mask_gradients, parameter_masks
from wagle_pl.unlearning.reference import compute_reference, load_reference, reference_key, save_reference
from wagle_pl.utilities import WagleError, describe, refuse_existing, resolve

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
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        kwargs: see :class:`EvaluationModule`.
    """

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        train_on: Literal["all", "retain", "forget"] = "all",
        warmup: float = 0.1,
        decay: Literal["linear", "constant"] = "linear",
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, output=output, **kwargs)
        self.streams = (train_on,)
        self.warmup = warmup
        self.decay = decay
        self.gradient_checkpointing = gradient_checkpointing
        #: Parameters -> optimiser, and optimiser -> scheduler; the command line sets them from ``--optimizer`` and
        #: ``--lr_scheduler``. Without a scheduler, ``warmup`` and ``decay`` apply.
        self.make_optimizer: Callable[[Any], torch.optim.Optimizer] = MaskedAdamW
        self.make_lr_scheduler: Optional[Callable[[torch.optim.Optimizer], Any]] = None
        self._started = 0.0

    @property
    def results_folder(self) -> Path:
        """Test results go beside the model's files."""
        return Path(self.output) / "test" if self.output else super().results_folder

    def setup(self, stage: str) -> None:
        """Refuse an output that exists before any work is done."""
        super().setup(stage)
        if stage == "fit":
            if not self.output:
                raise WagleError("fit needs a folder for the model: give --model.output")
            refuse_existing(Path(self.output), self.overwrite)

    def configure_model(self) -> None:
        """Load the model, and switch gradient checkpointing on if asked."""
        super().configure_model()
        self.lm.train()
        if self.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # -- optimisation -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """The optimiser over trainable parameters, with warm-up and decay by step."""
        optimizer = self.make_optimizer([p for p in self.lm.parameters() if p.requires_grad])
        if self.make_lr_scheduler is not None:
            scheduler = self.make_lr_scheduler(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": _monitor(scheduler)}}
        steps = int(self.trainer.estimated_stepping_batches)
        factor = schedule(self.warmup, self.decay, steps)
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

    def references(self) -> dict[str, Tensor]:
        """Stream -> log-probabilities at θ₀."""
        return {}

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> Tensor:
        """One micro-batch."""
        losses = self.losses(Streams(batch, self.run_lm, self.references()))
        if not torch.isfinite(losses["loss"]):
            rows = {stream: tensors["row"].tolist() for stream, tensors in batch.items()}
            numbers = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
            raise WagleError(
                f"loss is not finite at step {self.global_step} (batch {batch_idx}, rows {rows}): {numbers}; "
                "lower the learning rate. Checkpoints written so far are kept"
            )
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, prog_bar=True)
        return losses["loss"]

    # -- resume -------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep torch's random state, which dropout draws from, so that a resumed run equals an unbroken one."""
        checkpoint["rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the random state back, when training starts."""
        self._rng_state = checkpoint.get("rng_state")

    def on_train_start(self) -> None:
        """Start the clock and restore the random state of a checkpoint."""
        self._started = time.monotonic()
        if getattr(self, "_rng_state", None) is not None:
            torch.set_rng_state(self._rng_state.cpu())

    # -- export -------------------------------------------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Write the model folder."""
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:
            return
        record = self.record()
        dtype = models.checkpoint_dtype(self.model_name)
        models.save_model(self.lm, self.tokenizer, self.output, model_card(record), record, dtype)
        log.info("model written to %s", self.output)

    def record(self) -> dict[str, Any]:
        """What made this model, for ``wagle.json`` and the model card."""
        data = self.trainer.datamodule
        step = {
            "module": type(self).__name__,
            "base": self.model_name,
            "base_fingerprint": self.model_fingerprint,
            "data": {name: data.describe(name) for name in ("forget", "retain")} if data is not None else {},
            "streams": list(self.streams),
            "steps": self.global_step,
            "seconds": round(time.monotonic() - self._started, 1),
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
        objective: ``NPO``, ``GradDiff``, ``PO``, or a class path to an ``Objective``.
        mask: mask file that attribution wrote for this model; null is dense unlearning.
        verify: when to check that frozen weights are bit-identical to θ₀: at the ``end``, after each ``step`` or ``off``.
        kwargs: see :class:`FinetuneModule`.
    """

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        objective: Union[Objective, str] = "NPO",
        mask: Optional[str] = None,
        verify: Literal["end", "step", "off"] = "end",
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, output=output, **kwargs)
        self.objective = resolve(Objective, objective, "objective")
        self.streams = self.objective.streams
        self.mask_file = mask
        self.verify = verify
        self.mask: Optional[WeightMask] = None
        self._masks: ParameterMasks = {}
        self._frozen: dict[str, str] = {}
        self._references: dict[str, Tensor] = {}
        self._verified: Optional[str] = None

    def configure_model(self) -> None:
        """Load the model and the mask, check that they belong together, and freeze what the mask leaves out."""
        if self.lm is not None:
            return
        super().configure_model()
        if self.mask_file is None:
            return
        self.mask = WeightMask.load(self.mask_file)
        self.mask.check(models.parameter_shapes(self.lm), self.model_fingerprint, where=f"mask {self.mask_file}")
        for name, parameter in self.lm.named_parameters():
            parameter.requires_grad_(self.mask.count(name) > 0)
        if not any(parameter.requires_grad for parameter in self.lm.parameters()):
            raise WagleError(f"mask {self.mask_file} selects nothing: there is no weight to move")
        if self.verify != "off":
            self._frozen = {name: self._frozen_digest(name, p) for name, p in self.lm.named_parameters()}

    def configure_optimizers(self) -> Any:
        """The optimiser, made safe for frozen weights."""
        configured = super().configure_optimizers()
        if self.mask is not None:
            trainable = [(name, p) for name, p in self.lm.named_parameters() if p.requires_grad]
            self._masks = parameter_masks(trainable, self.mask)
            mask_gradients(self._masks)
            if guard(configured["optimizer"], self._masks):
                name = type(configured["optimizer"]).__name__
                log.info("%s could move frozen weights: they are put back after each step", name)
        return configured

    # -- references ---------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Compute, or find, the log-probabilities at θ₀ that the objective needs."""
        for stream in self.objective.references:
            if stream not in self._references:
                self._references[stream] = self._reference(stream)

    def _reference(self, stream: str) -> Tensor:
        data = self.trainer.datamodule
        key = reference_key(self.model_fingerprint, data.tokens(stream), stream, str(self.trainer.precision))
        path = Path(self.output).parent / ".references" / f"{key}.safetensors"
        logprobs = load_reference(path, key, len(data.rows(stream)))
        if logprobs is None:
            if self.global_step:
                raise WagleError(f"the checkpoint has no reference log-probabilities for {stream}: start the run anew")
            logprobs = compute_reference(self, stream)
            if self.trainer.is_global_zero:
                save_reference(path, key, logprobs)
        return logprobs

    def references(self) -> dict[str, Tensor]:
        """Stream -> (rows,) summed log-probabilities at θ₀."""
        return self._references

    def losses(self, at: Streams) -> Losses:
        """The objective's losses."""
        return self.objective(at)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the references: a resumed run no longer has θ₀ to compute them from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["references"] = self._references

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the references back."""
        super().on_load_checkpoint(checkpoint)
        self._references = checkpoint.get("references", {})

    # -- the guarantee ------------------------------------------------------------------------------------------------

    def on_train_batch_end(self, *_: Any) -> None:
        """Check the guarantee after each step, if asked."""
        if self.verify == "step":
            self._check_frozen()

    def on_train_end(self) -> None:
        """Check the guarantee, then write the model folder."""
        if self.verify != "off" and self.mask is not None:
            self._check_frozen()
            frozen = self.mask.total - self.mask.count()
            self._verified = f"{frozen:,} frozen weights are bit-identical to the base model's"
            log.info("verified: %s", self._verified)
        super().on_train_end()

    def _check_frozen(self) -> None:
        """Raise if a frozen weight has moved.

        Raises:
            WagleError: naming the first parameter concerned.
        """
        for name, parameter in self.lm.named_parameters():
            if name in self._frozen and self._frozen_digest(name, parameter) != self._frozen[name]:
                raise WagleError(
                    f"frozen weights of {name} moved by step {self.global_step}: the result is not written"
                )

    def _frozen_digest(self, name: str, parameter: nn.Parameter) -> str:
        """SHA-256 of a parameter's bits with the selected weights set to zero."""
        selected = self.mask[name].to(parameter.device)
        frozen = parameter.detach().masked_fill(selected, 0).contiguous().cpu()
        return hashlib.sha256(memoryview(frozen.view(torch.uint8).numpy()).cast("B")).hexdigest()

    def record(self) -> dict[str, Any]:
        """What made this model; adds objective, mask and the guarantee."""
        record = super().record()
        mask = None
        if self.mask is not None:
            mask = {"file": self.mask_file, "density": self.mask.density, "made_by": self.mask.metadata}
        record["lineage"][-1] |= {"objective": describe(self.objective), "mask": mask, "verified": self._verified}
        return record


def schedule(warmup: float, decay: str, steps: int) -> Callable[[int], float]:
    """Learning-rate factor by step: linear warm-up, then linear decay to zero at ``steps``, or constant.

    >>> factor = schedule(2, "linear", 6)
    >>> [factor(step) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warm = round(warmup * steps) if warmup < 1 else round(warmup)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 1.0 if decay == "constant" else max(0.0, (steps - step) / max(1, steps - warm))

    return factor


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown model card from a record."""
    *earlier, last = record["lineage"]
    lines = ["---", "library_name: transformers", "tags: [unlearning, wagle]", "---", ""]
    title = "Unlearned model" if last.get("objective") else "Fine-tuned model"
    lines += [f"# {title}", "", f"Made by `wagle_pl` ({last['module']}) from `{last['base']}`.", ""]
    facts = {
        "Base model": f"`{last['base']}` (fingerprint {last['base_fingerprint'][:12]})",
        "Forget set": last["data"].get("forget"),
        "Retain set": last["data"].get("retain"),
        "Trained on": ", ".join(last["streams"]),
        "Objective": last.get("objective"),
        "Steps": last["steps"],
        "Seed": last["seed"],
    }
    if last.get("objective"):
        mask = last.get("mask")
        facts["Mask"] = (
            f"`{mask['file']}`, density {mask['density']:.4f}, made by {mask['made_by'].get('score', 'an import')}"
            if mask
            else "none (dense: every weight may move)"
        )
        facts["Guarantee"] = last.get("verified") or "not checked"
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in facts.items() if value is not None)]
    if earlier:
        lines += ["", "## Lineage", ""]
        lines += [f"{i}. {s['module']} from `{s['base']}`, data {s['data']}" for i, s in enumerate(earlier, 1)]
    if last["config"]:
        lines += [
            "",
            "## Configuration",
            "",
            "```yaml",
            yaml.safe_dump(last["config"], sort_keys=False).rstrip(),
            "```",
        ]
    return "\n".join(lines) + "\n"


def _monitor(scheduler: Any) -> str:
    return getattr(scheduler, "monitor", "train/loss")
