"""What is planned: a model, known by its configuration only, and a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple, Optional

from wagle_pl.attribution.hessian import check_run
from wagle_pl.attribution.sums import Sums
from wagle_pl.core.errors import WagleError, check_density
from wagle_pl.masks.names import layer_of
from wagle_pl.unlearning.optim import STATE_BYTES

TASKS = ("attribution", "unlearning", "finetuning", "test")
OPTIMIZERS = tuple(STATE_BYTES)
#: Precision -> bytes of a weight in memory, bytes of a matrix product's inputs and outputs.
PRECISIONS = {
    "32-true": (4, 4),
    "bf16-mixed": (4, 2),
    "bf16-true": (2, 2),
    "16-mixed": (4, 2),
    "16-true": (2, 2),
}


class Strategy(NamedTuple):
    """ZeRO stage, 0 for a whole copy on every device, and what is offloaded to CPU memory."""

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


class Architecture(NamedTuple):
    """What the formulas need of a model."""

    shapes: dict[str, tuple[int, ...]]  # parameter name -> shape, tied weights once
    hidden: int
    layers: int
    heads: int
    attention: int  # size of all query heads together
    keys: int  # the same for key heads
    inner: int  # of the MLP
    gated: bool  # as in Llama, or not, as in GPT-2
    vocabulary: int
    tied: bool  # one tensor is both embedding and output matrix
    stored: int  # bytes per weight on disk

    @property
    def sizes(self) -> list[int]:
        """Number of weights of each parameter."""
        return [prod(shape) for shape in self.shapes.values()]

    @property
    def weights(self) -> int:
        """Number N of weights."""
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """Number M of weights in the largest tensor."""
        return max(self.sizes)


def architecture(name: str) -> Architecture:
    """The architecture of a model: a hub id, folder in Hugging Face format, or GGUF file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from wagle_pl.core.weights import parameter_shapes
    from wagle_pl.lm import models

    source, options = models.locate(name)
    with models.loading(f"model {name!r}", name, "planned for"):
        whole = AutoConfig.from_pretrained(source, **options)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(whole)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:100]
        raise WagleError(
            f"the configuration of model {name!r} is of no causal language model with known "
            f"shapes: {reason}"
        ) from None
    config, shapes = whole.get_text_config(), parameter_shapes(lm)

    def number(*attributes: str) -> Optional[int]:
        found = (getattr(config, attribute, None) for attribute in attributes)
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    hidden, layers = number("hidden_size"), number("num_hidden_layers")
    heads, vocabulary = number("num_attention_heads"), number("vocab_size")
    if not (hidden and layers and heads and vocabulary):
        raise WagleError(
            f"the configuration of model {name!r} does not say hidden size, layers, heads and "
            "vocabulary"
        )
    head = number("head_dim") or hidden // heads
    in_blocks = [shape for parameter, shape in shapes.items() if layer_of(parameter) is not None]
    widest = max((max(shape) for shape in in_blocks if len(shape) == 2), default=4 * hidden)
    output = lm.get_output_embeddings()
    return Architecture(
        shapes=shapes,
        hidden=hidden,
        layers=layers,
        heads=heads,
        attention=heads * head,
        keys=(number("num_key_value_heads") or heads) * head,
        inner=number("intermediate_size", "n_inner", "ffn_dim") or widest,
        gated=any("gate" in parameter for parameter in shapes),
        vocabulary=vocabulary,
        tied=output is not None and output.weight is lm.get_input_embeddings().weight,
        stored=(whole.dtype if isinstance(whole.dtype, torch.dtype) else torch.float32).itemsize,
    )


@dataclass(frozen=True)
class PlannedRun:
    """A run; options without a comment are those of ``wagle plan``, which documents them."""

    task: str = "unlearning"
    strategy: str = "auto"
    devices: int = 1
    precision: str = "bf16-true"
    accelerator: str = "gpu"
    density: float = 0.2
    #: A class of :mod:`wagle_pl.attribution.hessian`; None where the Hessian is a given scalar.
    estimator: Optional[Any] = None
    diagonal: bool = False  # attribution keeps the diagonal, and not only its mean
    sums: str = "device"
    optimizer: str = "MaskedAdamW"
    batch_size: int = 1
    max_length: int = 512
    accumulate_grad_batches: int = 1
    gradient_checkpointing: bool = False
    frozen_copy: bool = False
    persistence: int = 100_000  # ``param_persistence_threshold`` of ZeRO-3

    def __post_init__(self) -> None:
        known = {
            "task": TASKS,
            "strategy": STRATEGIES,
            "precision": PRECISIONS,
            "optimizer": OPTIMIZERS,
            "accelerator": ("gpu", "cpu"),
        }
        for option, names in known.items():
            if getattr(self, option) not in names:
                raise WagleError(
                    f"{option}: unknown name {getattr(self, option)!r}; choose one of {', '.join(names)}"
                )
        for option in ("devices", "batch_size", "max_length", "accumulate_grad_batches"):
            if getattr(self, option) < 1:
                raise WagleError(f"{option}: must be at least 1, got {getattr(self, option)}")
        check_density(self.density)
        if self.task == "attribution":
            check_run(self.precision, self.stage, self.devices, self.estimator, self.in_sums)
        if self.stage == 3 and self.frozen_copy:
            raise WagleError(
                "a frozen copy of the model does not work under ZeRO-3; choose another stage"
            )

    @property
    def in_sums(self) -> Sums:
        return Sums.parse(self.sums) if self.task == "attribution" else Sums()

    @property
    def spread(self) -> Strategy:
        return STRATEGIES[self.strategy]

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 for none."""
        return self.spread.stage

    @property
    def width(self) -> int:
        """Bytes w per weight; DeepSpeed's mixed precision holds the model in the narrow type."""
        in_memory, computing = PRECISIONS[self.precision]
        return computing if self.stage else in_memory

    @property
    def computing(self) -> int:
        """Bytes c of each input and output of a matrix product."""
        return PRECISIONS[self.precision][1]

    @property
    def masked(self) -> bool:
        return self.task == "unlearning" and self.density < 1

    @property
    def moving(self) -> float:
        return self.density if self.masked else 1.0

    @property
    def streams(self) -> int:
        """Streams of a batch whose graphs exist together: forget and retain rows in unlearning,
        except on one device."""
        return 2 if self.task == "unlearning" and not self.by_term else 1

    @property
    def by_term(self) -> bool:
        """Whether the gradients of the objective's terms are computed one after the other."""
        return self.strategy == "auto" and not self.precision.startswith("16")


def choices(
    run: PlannedRun, devices: Sequence[int] = (1, 2, 4, 8)
) -> Iterable[tuple[str, list[PlannedRun]]]:
    """(strategy, the run under it on each number of devices) for every strategy that works."""
    sharded = ["zero3", "zero3_offload"] if run.accelerator == "gpu" else ["zero3"]
    if run.frozen_copy or (run.estimator is not None and not run.estimator.shardable):
        sharded = []
    sums = "device" if run.in_sums.passes > 1 else run.sums
    for name in ["ddp", "zero1", "zero2", *sharded]:
        other = replace(run, strategy="auto", devices=1, sums=sums)
        yield name, [replace(other, strategy=name, devices=count) for count in devices]
