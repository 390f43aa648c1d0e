"""``wagle plan``: memory and disk of a run from a model's shapes alone; nothing is loaded or run.

A step has three *moments*, each of which needs its own parts (:class:`Part`); a run's peak is the
largest sum of a moment's parts. Formulas are in bytes, for one device, with

    n  weights                          w  bytes per weight as the model computes with it
    m  weights of the largest tensor    c  bytes of a matrix product's inputs and outputs
    s  weights that may move            ranks  devices, over which ZeRO divides

``tests/unit/test_plan_counted.py`` holds those for one device against the bytes that a counting
device holds; ``bin/benchmarks/plan.py`` compares all with the memory of processes on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from math import prod
from re import search
from typing import Any, Literal, NamedTuple, Optional

from wagle_pl.cli import LazyModule
from wagle_pl.core.errors import WagleError, check_counts, check_density
from wagle_pl.core.schema import check_arguments
from wagle_pl.core.text import fields, table

hessians, summing = map(LazyModule, ("wagle_pl.attribution.hessian", "wagle_pl.attribution.sums"))
inference, optim = map(LazyModule, ("wagle_pl.lm.inference", "wagle_pl.unlearning.optim"))
objectives, registry = map(LazyModule, ("wagle_pl.objectives", "wagle_pl.core.registry"))
names = LazyModule("wagle_pl.masks.names")

GIB, FP32 = 1 << 30, 4
BUCKET = 200_000_000  # most values in one of DeepSpeed's buckets (Lightning's default)
LIVE = 1_000_000_000  # most weights that ZeRO-3 keeps gathered (``stage3_max_live_parameters``)
CPU_OVERHEAD = 600 << 20  # of interpreter and libraries in a process: measured
GPU_OVERHEAD = 1 << 30  # of CUDA context, cuBLAS and NCCL on a GPU: assumed, not measured
USABLE = 0.92  # share of a GPU's memory that plans use; the rest is left to fragmentation
COUNTS = (1, 2, 4, 8)  # of devices for which plans are shown

MOMENTS = FORWARD, BACKWARD, STEP = "forward", "backward", "step"
GRAPH = (FORWARD, BACKWARD)  # the moments in which one exists
#: Precision -> bytes of a weight in memory, bytes of a matrix product's inputs and outputs.
PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}
PRECISIONS |= {"16-mixed": (4, 2), "16-true": (2, 2)}
OPTIMIZERS = ("MaskedAdamW", "AdamW", "AdamW8bit", "SignSGD", "SGD")
#: Names of strategies: of ``configs/strategy``, and Lightning's; a digit is ZeRO's stage.
STRATEGIES: tuple[str, ...] = ("auto", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
STRATEGIES += tuple(f"deepspeed_stage_{end}" for end in ("1", "2", "2_offload", "3", "3_offload"))


class Part(NamedTuple):
    """Memory of one kind: bytes and moments; ``host`` means a GPU's share of CPU memory."""

    name: str
    bytes: float
    moments: Sequence[str] = MOMENTS
    where: str = "device"


class Architecture(NamedTuple):
    """What the formulas need of a model."""

    shapes: dict[str, tuple[int, ...]]  # parameter name -> shape, tied weights once
    hidden: int
    layers: int
    keys: int  # size of all key heads together
    gated: bool  # whether the MLP has a gate, as in Llama; not in GPT-2
    vocabulary: int
    tied: bool  # one tensor is both embedding and output matrix
    stored: int  # bytes per weight on disk

    @property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes.values()]

    @property
    def weights(self) -> int:
        return sum(self.sizes)

    @property
    def sides(self) -> list[int]:
        """The longer side of each parameter that is a matrix of a block, else 0."""
        items = self.shapes.items()
        return [max(s) * (len(s) > 1 and names.layer_of(n) is not None) for n, s in items]

    @property
    def inner(self) -> int:  # of the MLP
        return max(self.sides)

    @property
    def products(self) -> int:
        """Numbers per token that a block keeps of its products of matrices."""
        return sum(self.sides) // self.layers + self.gated * self.inner

    def trained(self, objective: Any) -> tuple[float, float]:
        """Share of the weights that an objective lets move, and how many blocks, from the first of
        them on, a gradient passes."""
        pattern, sides = objective.trainable or "", self.sides
        moving = [bool(search(pattern, name)) for name in self.shapes]
        if not any(moving):
            raise WagleError(f"trains {pattern!r}, which this model lacks", option="objective")
        share = sum(compress(self.sizes, moving)) / self.weights
        return share, self.layers * sum(sides[moving.index(True) :]) / sum(sides)


def architecture(name: str) -> Architecture:
    """The architecture of a model: a hub id, folder in Hugging Face format, or GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    from wagle_pl.core.weights import parameter_shapes
    from wagle_pl.lm import models

    full = models.load_config(name)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(full)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:100]
        what = "its configuration is of no causal language model with known shapes"
        raise WagleError(f"{name!r}: {what}: {reason}", option="model") from None
    config, shapes = full.get_text_config(), parameter_shapes(lm)
    embedding, output = lm.get_input_embeddings().weight, lm.get_output_embeddings()
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or embedding.shape[1] // heads
    return Architecture(
        shapes,
        hidden=embedding.shape[1],
        layers=len({*map(names.layer_of, shapes)} - {None}),
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
        gated=any("gate" in n for n in shapes if names.layer_of(n) is not None),
        vocabulary=embedding.shape[0],
        tied=output is not None and output.weight is embedding,
        stored=(full.dtype if isinstance(full.dtype, torch.dtype) else torch.float32).itemsize,
    )


@dataclass(frozen=True)
class PlannedRun:
    """A run.

    Args:
        task: attribution, unlearning, finetuning or test.
        strategy: auto (one device, or DDP), ddp, zero1, ..., zero3_offload, or Lightning's names.
        devices: number of devices, over all machines.
        precision: as trainer.precision.
        accelerator: gpu, or cpu (a device is then a process).
        density: share of weights in the mask; 1 means no mask.
        estimator: a Hessian estimate; None where the Hessian is a scalar.
        diagonal: whether attribution keeps the diagonal, and not only its mean.
        sums: for attribution, as model.sums: device, host or passes=K.
        optimizer: MaskedAdamW, AdamW, AdamW8bit (two 8-bit moments) or SGD.
        batch_size: rows, or pairs of rows, per device and micro-batch.
        max_length: tokens per row, padding included.
        packing: run the rows of a batch as one.
        accumulate_grad_batches: micro-batches per step.
        gradient_checkpointing: recompute activations in the backward pass.
        objective: as model.objective; some read the model before unlearning, or train a part.
    """

    task: Literal["attribution", "unlearning", "finetuning", "test"] = "unlearning"
    strategy: Literal[STRATEGIES] = "auto"  # type: ignore[valid-type]
    devices: int = 1
    precision: Literal[tuple(PRECISIONS)] = "bf16-true"  # type: ignore[valid-type]
    accelerator: Literal["gpu", "cpu"] = "gpu"
    density: float = 0.2
    estimator: Optional[Any] = None
    diagonal: bool = False
    sums: str = "device"
    optimizer: Literal[OPTIMIZERS] = "MaskedAdamW"  # type: ignore[valid-type]
    batch_size: int = 1
    max_length: int = 512
    packing: bool = False
    accumulate_grad_batches: int = 1
    gradient_checkpointing: bool = False
    objective: Any = "NPO"

    def __post_init__(self) -> None:
        check_arguments(PlannedRun.__init__, vars(self), "")
        counts = ("devices", "batch_size", "max_length", "accumulate_grad_batches")
        check_counts("", **{name: getattr(self, name) for name in counts})
        check_density(self.density)
        sums = summing.Sums.parse(self.sums)
        if self.task == "attribution":
            hessians.check_run(self.precision, self.stage, self.devices, self.estimator, sums)
        kind = self.objective if self.task == "unlearning" else "NPO"  # which trains all
        resolved = registry.resolve(objectives.Objective, kind, "objective")
        object.__setattr__(self, "objective", resolved)
        if self.stage == 3 and self.reads_theta0:
            raise WagleError("does not work under ZeRO-3; choose another", option="objective")

    @property
    def stage(self) -> int:
        return next((int(letter) for letter in self.strategy if letter.isdigit()), 0)

    @property
    def offload(self) -> bool:
        """Whether CPU memory holds the optimiser's state and, under stage 3, the weights."""
        return self.strategy.endswith("_offload")

    @property
    def width(self) -> int:
        """Bytes w per weight; DeepSpeed's mixed precision holds the model in the narrow type."""
        return PRECISIONS[self.precision][bool(self.stage)]

    @property
    def masked(self) -> bool:
        return self.task == "unlearning" and self.density < 1

    @property
    def reads_hidden(self) -> bool:
        """Whether the terms read hidden states, and no predictions (RMU)."""
        return self.objective.layer is not None

    @property
    def reads_theta0(self) -> bool:
        return self.reads_hidden or self.objective.needs_theta0

    def moving(self, model: Architecture) -> float:
        """Number of weights that may move."""
        share, _ = model.trained(self.objective)
        return model.weights * share * (self.density if self.masked else 1.0)

    @property
    def streams(self) -> int:
        """Streams of a batch whose graphs exist together: one where the gradients of the
        objective's terms are computed one after the other."""
        by_term = self.strategy == "auto" and not self.precision.startswith("16")
        return 2 if self.task == "unlearning" and not by_term else 1


# -- formulas --------------------------------------------------------------------------------------


def block_bytes(model: Architecture, w: int, c: int, trained: float = 1.0) -> float:
    """Bytes per token that a block keeps: of each matrix the larger of its input and its output (keys
    and values are repeated for all heads), of a gated MLP its activation, too; of two norms the
    input in fp32, its normalised form, and the output (under autocast, for each of five matrices).

    ``trained`` is the share of weights with a gradient, for which inputs of matrices are kept.
    """
    norms = 2 * FP32 + trained * (2 * w + (5 if w > c else 2) * c)
    return model.hidden * norms + (model.products - (1 - trained) * model.inner) * c


def sums_per_weight(run: PlannedRun) -> int:
    """Bytes of the fp32 sums g_f and g_r, of the diagonal if one is kept, and of a step's draw."""
    return FP32 * (2 + run.diagonal + (run.estimator.step_sums if run.estimator else 0))


def _attribution(model: Architecture, run: PlannedRun) -> Iterator[Part]:
    """Sums, with ``passes=K`` of the largest group of parameters; and copies of the gradient of one
    tensor: in fp32, for the sum over ranks, or on its way to the host."""
    n, m, w, ranks = model.weights, max(model.sizes), run.width, run.devices
    host, passes = summing.Sums.parse(run.sums)
    sizes = model.sizes
    share = max(sum(sizes[i] for i in group) for group in summing.runs_of(sizes, passes))
    where = "host" if host else "device"
    yield Part("sums of gradients", sums_per_weight(run) * share / ranks, MOMENTS, where)
    copies: float = w * host + FP32 * (w < FP32 and (ranks > 1 or not host))
    copies += FP32 * (1 + 1 / ranks) * (ranks > 1)
    output = w * model.vocabulary * model.hidden * model.tied  # waits for the embedding's
    yield Part("copies of a gradient", copies * m + output, (BACKWARD,))
    ddp = run.stage == 0 and ranks > 1 and run.accelerator == "gpu"  # a CPU does not touch them
    yield Part("buckets of DDP, unused", n * w * ddp)
    temporaries = run.estimator.temporaries if run.estimator else 0
    yield Part("tensors of the Hessian estimate", temporaries * n * w, (BACKWARD,))


def _training(model: Architecture, run: PlannedRun) -> Iterator[Part]:
    """Values, their places (under ZeRO-3 bits), gradients and optimiser state of the weights that
    move."""
    n, s, w, gpu = model.weights, run.moving(model), run.width, run.accelerator == "gpu"
    yield Part("mask bits", n / 8 / run.devices * (run.masked and run.stage == 3))
    yield Part("places of the values", FP32 * s * (run.masked and run.stage < 3))
    yield Part("values at θ₀", w * s * run.reads_theta0)
    written = model.stored != w and run.stage < 3  # in another type than it is computed with
    yield Part("export", n * model.stored * written, (STEP,), "host")
    if run.stage:
        yield from _zero(model, run)
        return
    values = run.masked or w < FP32  # apart from the weights
    several = run.accumulate_grad_batches > 1
    by_term = run.task == "unlearning" and run.streams == 1
    yield Part("values", FP32 * s * values)
    yield Part("gradients", FP32 * s, MOMENTS if values or several or by_term else (STEP,))
    yield Part("gradient of a term", FP32 * s * (by_term and several), (FORWARD,))
    yield Part("optimiser state", optim.STATE_BYTES[run.optimizer] * s)
    yield Part("step", FP32 * s * (run.optimizer == "AdamW" and gpu), (STEP,))  # torch's has a copy
    yield Part("buckets of DDP", FP32 * s * (run.devices > 1))


def _zero(model: Architecture, run: PlannedRun) -> Iterator[Part]:
    """ZeRO's flat partitions, in fp32 even if the values are, and its buckets.

    Stage 3 keeps the tensors into which values were written, with their bits, in the graph of each
    stream; with checkpointing, those of one block and of the output matrix. Over several
    micro-batches stage 1 keeps whole gradients, stage 2 a rank's share.
    """
    n, m, w, ranks = model.weights, max(model.sizes), run.width, run.devices
    s, sharded = run.moving(model), run.stage == 3
    share, bucket, where = s / ranks, min(BUCKET, s), "host" if run.offload else "device"
    yield Part("fp32 values", FP32 * share, MOMENTS, where)
    yield Part("optimiser state", optim.STATE_BYTES[run.optimizer] * share, MOMENTS, where)
    yield Part("values", w * (share if sharded else s) * run.masked)
    yield Part("buckets", w * bucket * (2 if sharded else 3), (BACKWARD,))
    yield Part("gradients of the step", FP32 * share, (STEP,), where)
    yield Part("step", w * share * (not sharded), (STEP,), where)
    if sharded:
        block = n / model.layers + run.streams * m
        written = block if run.gradient_checkpointing else run.streams * n
        yield Part("weights with values", (w + 1 / 8) * written * run.masked, GRAPH)
        yield Part("gradients", w * share, MOMENTS, where)
        return
    kept = w * (s if run.stage == 1 else share) * (run.accumulate_grad_batches > 1)
    yield Part("gradients so far", kept, GRAPH)
    yield Part("gradients", w * (s - bucket) / ranks, (BACKWARD,), where)


def _passes(model: Architecture, run: PlannedRun) -> Iterator[Part]:
    """What graphs that exist together keep of all blocks or, with checkpointing, of their inputs;
    and, in the backward pass, one block, and the gradient of a tensor or two of an MLP's size.

    A block keeps a row of the attention mask per token. Logits of a chunk have a log-softmax and two
    gradients in fp32, or with a copy of the model nine such tensors. With sharded weights (ZeRO-3),
    logits of all tokens are computed at once, and kept with their gradient. A test keeps one block,
    and the cache of a generation as long as the rows.
    """
    w, c, tokens = run.width, PRECISIONS[run.precision][1], run.batch_size * run.max_length
    testing, joined = run.task == "test", tokens if run.packing else run.max_length
    again = run.gradient_checkpointing and not testing
    passes = summing.Sums.parse(run.sums).passes if run.task == "attribution" else 1
    share, depth = model.trained(run.objective)
    seen = c * joined * (run.packing or run.batch_size > 1)
    block = tokens * (block_bytes(model, w, c, share / passes) + seen)
    kept = tokens * model.hidden * w if again else block
    ends = tokens * model.hidden * (FP32 + share * (w + c))  # of the last norm
    blocks = 1 if testing else run.streams * depth
    yield Part("activations", blocks * kept + run.streams * ends, GRAPH)
    gradients = max(w * max(model.sizes), 2 * c * tokens * model.inner) * (not testing)
    yield Part("backward pass of a block", block * again + gradients, (BACKWARD,))
    products = tokens * c * (4 * model.inner + 2.5 * model.hidden) * run.reads_hidden
    yield Part("block of a pass at θ₀", products, (FORWARD,))
    numbers = run.streams * tokens * model.vocabulary * (not run.reads_hidden)
    copies = (9 if run.reads_theta0 else 3) * FP32 + c * (c < FP32)
    logits = min(numbers, inference.CHUNK) * copies
    whole = 2 * numbers * c * (run.stage == 3 and not testing and numbers > inference.CHUNK)
    yield Part("logits", logits + whole, (FORWARD,))
    yield Part("cache of a generation", 2 * model.layers * model.keys * tokens * c * testing)
    narrow = MOMENTS if run.masked else (FORWARD,) if again else GRAPH
    yield Part("narrow copies", model.weights * c * (w > c and not testing), narrow)


# -- the plan --------------------------------------------------------------------------------------


def device_parts(model: Architecture, run: PlannedRun, where: str = "device") -> list[Part]:
    """The parts in a device's memory, or in the host's; a CPU has all parts."""
    n, w, sharded, on_gpu = model.weights, run.width, run.stage == 3, run.accelerator == "gpu"
    weights = "host" if run.offload and sharded else "device"
    cuda = Part("CUDA, cuBLAS, NCCL", GPU_OVERHEAD)
    parts = [cuda if on_gpu else Part("interpreter and libraries", CPU_OVERHEAD)]
    parts.append(Part("weights", n * w / (run.devices if sharded else 1), MOMENTS, weights))
    parts.append(Part("weights brought together", min(n, LIVE) * w * sharded, GRAPH))
    if run.task != "test":
        parts += (_attribution if run.task == "attribution" else _training)(model, run)
    parts += _passes(model, run)
    return [part for part in parts if part.bytes and (part.where == where or not on_gpu)]


def at(parts: Iterable[Part], moment: str) -> float:
    """Bytes of the parts that exist at a moment."""
    return sum(part.bytes for part in parts if moment in part.moments)


def peak(model: Architecture, run: PlannedRun) -> tuple[str, float]:
    """The moment at which a device needs the most memory, and how much."""
    parts = device_parts(model, run)
    return max(((moment, at(parts, moment)) for moment in MOMENTS), key=lambda pair: pair[1])


def host_bytes(model: Architecture, run: PlannedRun) -> float:
    """CPU memory of one rank of a run on GPUs: libraries, what is offloaded and, while it is being
    loaded, the model as it is stored (under ZeRO-3 one of its tensors)."""
    parts = device_parts(model, run, "host")
    loading = model.stored * (max(model.sizes) if run.stage == 3 else model.weights)
    return CPU_OVERHEAD + max(loading, *(at(parts, moment) for moment in MOMENTS))


def disk_bytes(model: Architecture, run: PlannedRun) -> dict[str, float]:
    """File -> size."""
    if run.task == "test":
        return {}
    if run.task == "attribution":
        sums = FP32 * (2 + run.diagonal) * model.weights
        files = {"mask": model.weights / 8, "checkpoint": sums}
        return files | ({"sums": sums} if run.sums.startswith("passes") else {})
    kept = (FP32 + optim.STATE_BYTES[run.optimizer]) * run.moving(model)
    return {"checkpoint": kept, "model": model.weights * model.stored}


def choices(
    run: PlannedRun, devices: Sequence[int] = COUNTS
) -> Iterator[tuple[str, list[PlannedRun]]]:
    """(strategy, the run under it on each number of devices) for every strategy that works."""
    sharded = ["zero3", "zero3_offload"] if run.accelerator == "gpu" else ["zero3"]
    if run.reads_theta0 or (run.estimator is not None and not run.estimator.shardable):
        sharded = []
    other = replace(run, sums="device" if run.sums.startswith("passes") else run.sums)
    for name in ["ddp", "zero1", "zero2", *sharded]:
        yield name, [replace(other, strategy=name, devices=count) for count in devices]


def plan(*, model: str, hessian: str = "auto", **options: Any) -> None:
    """Estimate the memory and disk space of a run from the model's configuration alone.

    Args:
        model: hub id, folder in Hugging Face format, or GGUF file.
        hessian: for attribution, as model.hessian: scalar, auto, gauss_newton, fisher, hutchinson,
            or a class path.
        **options: the run, see :class:`PlannedRun`.
    """
    estimator = hessians.estimator_of(hessian) if options.get("task") == "attribution" else None
    diagonal = estimator is not None and hessian != "auto"
    run = PlannedRun(estimator=estimator, diagonal=diagonal, **options)
    shape = architecture(model)
    moment, size = peak(shape, run)
    unit = f"GiB per {'GPU' if run.accelerator == 'gpu' else 'process'}"
    files = disk_bytes(shape, run).items()
    weights = f"{shape.weights:,} weights, {max(shape.sizes):,} in the largest tensor"
    about = {
        "model": f"{model}: {weights}",
        "run": f"{run.task}, {run.strategy} on {run.devices} x {run.accelerator}, {run.precision}",
        "peak": f"{_gib(size)} GiB, moment: {moment}",
        "disk": ", ".join(f"{name} {_gib(size)} GiB" for name, size in files) or "tables only",
    }
    if run.accelerator == "gpu":
        about["fits"] = f"a GPU of {size / USABLE / GIB:.0f} GiB, with room for fragments"
        about["CPU memory"] = f"{_gib(host_bytes(shape, run))} GiB per rank"
    parts = device_parts(shape, run)
    rows = [[p.name, *(_gib(p.bytes) if m in p.moments else "" for m in MOMENTS)] for p in parts]
    rows.append(["total", *(_gib(at(parts, moment)) for moment in MOMENTS)])
    peaks = [[name, *(_gib(peak(shape, r)[1]) for r in runs)] for name, runs in choices(run)]
    tables = table([unit, *MOMENTS], rows), table([f"peak, {unit}, on", *map(str, COUNTS)], peaks)
    print(fields([*about.items()]), *tables, sep="\n\n")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
