"""What is planned: a task, how it is spread, and its options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional, Protocol

from wagle_pl.core.errors import WagleError

TASKS = ("attribution", "unlearning", "finetuning", "test")
OPTIMIZERS = ("MaskedAdamW", "AdamW", "AdamW8bit", "SGD")
VALUES = ("fp32", "split")
#: Precision -> bytes of a weight in memory, bytes of what matrix products take and give.
PRECISIONS = {
    "32-true": (4, 4),
    "bf16-mixed": (4, 2),
    "bf16-true": (2, 2),
    "16-mixed": (4, 2),
    "16-true": (2, 2),
}


class Strategy(NamedTuple):
    """How a run is spread.

    Attributes:
        stage: ZeRO stage; 0 is a whole copy on every device.
        offload_optimizer: optimiser state and fp32 weights in CPU memory.
        offload_parameters: weights in CPU memory.
    """

    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False


#: Names of Lightning, and of the files in ``configs/strategy``.
STRATEGIES = {
    "auto": Strategy(0),
    "ddp": Strategy(0),
    **{f"deepspeed_stage_{stage}": Strategy(stage) for stage in (1, 2, 3)},
    **{f"zero{stage}": Strategy(stage) for stage in (1, 2, 3)},
    "deepspeed_stage_2_offload": Strategy(2, True),
    "deepspeed_stage_3_offload": Strategy(3, True, True),
    "zero3_offload": Strategy(3, True, True),
}


class HessianCost(Protocol):
    """What the formulas ask of an estimator of the Hessian diagonal; a class of
    :mod:`wagle_pl.attribution.hessian` answers it.

    Attributes:
        shardable: whether it works with sharded parameters (ZeRO-3).
        backward_passes: beside those of the two losses.
        same_graph: whether one of them goes through the graph of the retain loss.
        step_sums: fp32 sums of the model's size that stand while a step lasts.
        temporaries: tensors of the model's size and dtype that stand during a backward pass.
    """

    shardable: bool
    backward_passes: int
    same_graph: bool
    step_sums: int
    temporaries: int


@dataclass(frozen=True)
class PlannedRun:
    """What is planned.

    Attributes:
        task: one of :data:`TASKS`.
        strategy: a name in :data:`STRATEGIES`.
        devices: R.
        precision: as ``trainer.precision``.
        accelerator: ``gpu`` or ``cpu``.
        density: d; 1 is unlearning without a mask.
        estimator: of the Hessian diagonal, in attribution; None where it is a given scalar.
        diagonal: whether attribution keeps the diagonal, and not only its mean.
        optimizer: one of :data:`OPTIMIZERS`.
        values: as ``model.values``: how the weights that move are kept.
        batch_size: rows (or pairs of rows) a device and micro-batch.
        max_length: tokens a row.
        accumulate_grad_batches: micro-batches a step.
        gradient_checkpointing: recompute activations in the backward pass.
        frozen_copy: keep θ₀ beside the model (``reference_logits: frozen_copy`` with a term that
            needs it).
        persistence: ``param_persistence_threshold`` of ZeRO-3.

    Raises:
        WagleError: if a value has no meaning.
    """

    task: str = "unlearning"
    strategy: str = "auto"
    devices: int = 1
    precision: str = "bf16-true"
    accelerator: str = "gpu"
    density: float = 0.2
    estimator: Optional[HessianCost] = None
    diagonal: bool = False
    optimizer: str = "MaskedAdamW"
    values: str = "fp32"
    batch_size: int = 1
    max_length: int = 512
    accumulate_grad_batches: int = 1
    gradient_checkpointing: bool = False
    frozen_copy: bool = False
    persistence: int = 100_000

    def __post_init__(self) -> None:
        known = {
            "task": TASKS,
            "strategy": STRATEGIES,
            "precision": PRECISIONS,
            "optimizer": OPTIMIZERS,
            "values": VALUES,
            "accelerator": ("gpu", "cpu"),
        }
        for option, names in known.items():
            if getattr(self, option) not in names:
                raise WagleError(
                    f"unknown {option} {getattr(self, option)!r}; choose one of {', '.join(names)}"
                )
        for option in ("devices", "batch_size", "max_length", "accumulate_grad_batches"):
            if getattr(self, option) < 1:
                raise WagleError(f"{option} must be at least 1, got {getattr(self, option)}")
        if not 0 < self.density <= 1:
            raise WagleError(
                "density is the share of weights selected and must be in (0, 1], got "
                f"{self.density:g}"
            )
        alone = self.precision == "bf16-true" and self.devices == 1 and not self.stage
        if self.values == "split" and not alone:
            raise WagleError(
                "values split is for precision bf16-true on one device without ZeRO: leave it at "
                "fp32"
            )
        if self.task == "attribution" and self.precision.startswith("16"):
            raise WagleError("attribution runs in 32-true, bf16-mixed or bf16-true, not in fp16")
        if self.needs_whole_parameters and self.stage == 3:
            raise WagleError(
                "this Hessian estimate needs whole parameters, which ZeRO-3 shards: choose another "
                "stage"
            )
        if self.frozen_copy and self.stage == 3:
            raise WagleError(
                "a frozen copy of the model does not work under ZeRO-3; choose another stage"
            )

    @classmethod
    def about_to(cls, task: str, precision: str, stage: int, **options: Any) -> PlannedRun:
        """The plan of a run that is about to begin; what the plan does not know is taken for the
        least that it does."""
        if options.get("optimizer", "SGD") not in OPTIMIZERS:
            options["optimizer"] = "SGD"
        known = precision if precision in PRECISIONS else "16-true"
        return cls(task, f"deepspeed_stage_{stage}" if stage else "ddp", precision=known, **options)

    @property
    def needs_whole_parameters(self) -> bool:
        """Whether ZeRO-3, which spreads them over ranks, is out of the question for the
        estimator."""
        return self.estimator is not None and not self.estimator.shardable

    @property
    def spread(self) -> Strategy:
        """The strategy's options."""
        return STRATEGIES[self.strategy]

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 for none."""
        return self.spread.stage

    @property
    def width(self) -> int:
        """w. DeepSpeed holds the model itself in the narrow type in mixed precision too."""
        in_memory, computing = PRECISIONS[self.precision]
        return computing if self.stage else in_memory

    @property
    def computing(self) -> int:
        """Bytes of an activation that a matrix product takes or gives."""
        return PRECISIONS[self.precision][1]

    @property
    def masked(self) -> bool:
        """Whether there are frozen weights."""
        return self.task == "unlearning" and self.density < 1

    @property
    def streams(self) -> int:
        """Streams of a batch whose graphs are alive together: unlearning's forget and retain
        rows."""
        return 2 if self.task == "unlearning" else 1


def choices(
    run: PlannedRun, devices: Sequence[int] = (1, 2, 4, 8)
) -> Iterable[tuple[str, list[PlannedRun]]]:
    """(strategy, the run under it on each number of devices) for every strategy that works."""
    offload = ["zero3_offload"] if run.accelerator == "gpu" else []
    whole = run.frozen_copy or run.needs_whole_parameters
    for name in ["ddp", "zero1", "zero2", *(() if whole else ("zero3", *offload))]:
        yield name, [replace(run, strategy=name, devices=count, values="fp32") for count in devices]
