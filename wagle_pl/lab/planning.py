"""``wagle plan``: memory and disk of a run from a model's shapes alone; nothing is loaded or run.

A run passes through *moments*, each of which needs its own parts (:class:`Part`); its peak is the
largest sum of a moment's parts. Formulas are in bytes, for one device, with

    n  weights                          w  bytes per weight as the model computes with it
    m  weights of the largest tensor    c  bytes of a matrix product's inputs and outputs
    s  weights that may move            ranks  devices, over which ZeRO divides

``bin/benchmarks/plan.py`` compares the predictions with what real runs take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, NamedTuple, Optional

from wagle_pl.attribution import hessian as hessians
from wagle_pl.attribution.sums import Sums, runs_of
from wagle_pl.core.errors import WagleError, check_counts, check_density
from wagle_pl.core.schema import check_arguments
from wagle_pl.core.text import fields, table
from wagle_pl.lm.inference import CHUNK
from wagle_pl.masks.names import layer_of
from wagle_pl.unlearning.optim import STATE_BYTES

GIB, FP32 = 1 << 30, 4
BUCKET = 200_000_000  # most values in one of DeepSpeed's buckets (Lightning's default)
LIVE = 1_000_000_000  # most weights that ZeRO-3 keeps gathered (``stage3_max_live_parameters``)
CPU_OVERHEAD = 600 << 20  # of interpreter and libraries in a process: measured
KEPT = 96 << 20  # of freed memory that the C library does not give back, on a CPU: measured
GPU_OVERHEAD = 1 << 30  # of CUDA context, cuBLAS and NCCL on a GPU: assumed, not measured
USABLE = 0.92  # share of a GPU's memory that plans use; the rest is left to fragmentation
COUNTS = (1, 2, 4, 8)  # of devices for which plans are shown

MOMENTS = LOAD, FORWARD, BACKWARD, STEP, END = "load", "forward", "backward", "step", "end"
RUNNING = MOMENTS[1:]
#: Precision -> bytes of a weight in memory, bytes of a matrix product's inputs and outputs.
PRECISIONS = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}
PRECISIONS |= {"16-mixed": (4, 2), "16-true": (2, 2)}
#: ZeRO stage under the names of Lightning and of ``configs/strategy``; ``_offload`` ends some.
STAGES = {"auto": 0, "ddp": 0, "deepspeed_stage_2_offload": 2, "deepspeed_stage_3_offload": 3}
STAGES |= {f"{kind}{stage}": stage for kind in ("zero", "deepspeed_stage_") for stage in (1, 2, 3)}
STAGES["zero3_offload"] = 3


class Part(NamedTuple):
    """Memory of one kind: bytes and moments; ``host`` means a GPU's share of CPU memory."""

    name: str
    bytes: float
    moments: Sequence[str] = RUNNING
    where: str = "device"


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
        return [prod(shape) for shape in self.shapes.values()]

    @property
    def weights(self) -> int:
        return sum(self.sizes)


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
    layers = {parameter: layer_of(parameter) for parameter in shapes}
    matrices = [s for n, s in shapes.items() if layers[n] is not None and len(s) == 2]
    vocabulary, hidden = embedding.shape
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    return Architecture(
        shapes=shapes,
        hidden=hidden,
        layers=len({*layers.values()} - {None}),
        heads=heads,
        attention=heads * head,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
        inner=getattr(config, "intermediate_size", None) or max(map(max, matrices)),
        gated=any("gate" in parameter for parameter in shapes),
        vocabulary=vocabulary,
        tied=output is not None and output.weight is embedding,
        stored=(full.dtype if isinstance(full.dtype, torch.dtype) else torch.float32).itemsize,
    )


@dataclass(frozen=True)
class PlannedRun:
    """A run.

    Args:
        task: attribution, unlearning, finetuning or test.
        strategy: auto (one device, or DDP), ddp, zero1, zero2, zero3, zero3_offload, or Lightning's
            names for them.
        devices: number of devices, over all machines.
        precision: as trainer.precision: 32-true, bf16-mixed, bf16-true, 16-mixed or 16-true.
        accelerator: gpu, or cpu (a device is then a process).
        density: share of weights in the mask; 1 means no mask.
        estimator: a Hessian estimate; None where the Hessian is a scalar.
        diagonal: whether attribution keeps the diagonal, and not only its mean.
        sums: for attribution, as model.sums: device, host or passes=K.
        optimizer: MaskedAdamW, AdamW, AdamW8bit (two 8-bit moments) or SGD.
        batch_size: rows, or pairs of rows, per device and micro-batch.
        max_length: tokens per row, padding included.
        accumulate_grad_batches: micro-batches per step.
        gradient_checkpointing: recompute activations in the backward pass.
        frozen_copy: whether the objective keeps a copy of the model before unlearning (KL, UNDIAL,
            hidden states).
    """

    task: Literal["attribution", "unlearning", "finetuning", "test"] = "unlearning"
    strategy: Literal[tuple(STAGES)] = "auto"  # type: ignore[valid-type]
    devices: int = 1
    precision: Literal[tuple(PRECISIONS)] = "bf16-true"  # type: ignore[valid-type]
    accelerator: Literal["gpu", "cpu"] = "gpu"
    density: float = 0.2
    estimator: Optional[Any] = None
    diagonal: bool = False
    sums: str = "device"
    optimizer: Literal[tuple(STATE_BYTES)] = "MaskedAdamW"  # type: ignore[valid-type]
    batch_size: int = 1
    max_length: int = 512
    accumulate_grad_batches: int = 1
    gradient_checkpointing: bool = False
    frozen_copy: bool = False

    def __post_init__(self) -> None:
        check_arguments(PlannedRun.__init__, vars(self), "")
        counts = ("devices", "batch_size", "max_length", "accumulate_grad_batches")
        check_counts("", **{name: getattr(self, name) for name in counts})
        check_density(self.density)
        run = (self.precision, self.stage, self.devices, self.estimator, Sums.parse(self.sums))
        if self.task == "attribution":
            hessians.check_run(*run)
        if self.stage == 3 and self.frozen_copy:
            raise WagleError("does not work under ZeRO-3; choose another", option="frozen_copy")

    @property
    def stage(self) -> int:
        return STAGES[self.strategy]

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
    def moving(self) -> float:
        return self.density if self.masked else 1.0

    @property
    def streams(self) -> int:
        """Streams of a batch whose graphs exist together: one where the gradients of the
        objective's terms are computed one after the other."""
        by_term = self.strategy == "auto" and not self.precision.startswith("16")
        return 2 if self.task == "unlearning" and not by_term else 1


# -- formulas --------------------------------------------------------------------------------------


def block_bytes(model: Architecture, c: int) -> int:
    """2 h (4 + 2 c) + 4 q c + 4 heads + (4 or 2) i c: bytes per token that a block keeps.

    Two norms keep their input in fp32, the normalised input and their output; attention keeps
    queries, keys, values (repeated for every head) and its output, and one fp32 number per head; a
    gated MLP keeps gate, its activation, up and their product (one without a gate: two). Derived
    like Korthikanti et al. 2022 (arXiv 2205.05198), for the Llama block.
    """
    norms, attention = 2 * model.hidden * (FP32 + 2 * c), 4 * model.attention * c
    return norms + attention + FP32 * model.heads + (4 if model.gated else 2) * model.inner * c


def activation_bytes(model: Architecture, tokens: int, c: int, checkpointing: bool = False) -> int:
    """All blocks and the last norm; with checkpointing, each block's input and one block."""
    block = block_bytes(model, c)
    kept = model.layers * model.hidden * c + block if checkpointing else model.layers * block
    return tokens * (kept + model.hidden * (FP32 + 2 * c))


def logit_bytes(
    model: Architecture, tokens: int, c: int, streams: int = 1, sharded: bool = False
) -> int:
    """Logits, their log-softmax and its gradient (these two in fp32) of each stream's tokens or, if
    they are more than a chunk, of one chunk. With sharded weights (ZeRO-3), logits of all tokens
    are computed at once, and kept with their gradient."""
    numbers = tokens * model.vocabulary
    chunk = CHUNK if numbers > CHUNK else streams * numbers
    return chunk * (c + 2 * FP32) + 2 * streams * numbers * c * (sharded and numbers > CHUNK)


def sums_per_weight(run: PlannedRun) -> int:
    """Bytes of the fp32 sums g_f and g_r, of the diagonal if one is kept, and of a step's draw."""
    return FP32 * (2 + run.diagonal + (run.estimator.step_sums if run.estimator else 0))


def _attribution(model: Architecture, run: PlannedRun) -> Iterator[Part]:
    """Only one tensor has a gradient at a time (two gradients if it is embedding and output
    matrix), converted to fp32 if it is narrower; several ranks add it up in a copy. ``passes=K``:
    sums are of the largest group of parameters."""
    n, m, w, ranks, gpu = *_sizes(model, run), run.devices, run.accelerator == "gpu"
    host, passes = Sums.parse(run.sums)
    share = max(sum(model.sizes[i] for i in group) for group in runs_of(model.sizes, passes))
    where = "host" if host else "device"
    yield Part("sums of gradients", sums_per_weight(run) * share / ranks, RUNNING, where)
    gradient: float = (2 if model.tied else 1) * w * m
    gradient += FP32 * m * ((w < FP32 and (ranks > 1 or not host)) + (ranks > 1) * (1 + 1 / ranks))
    gradient += (w if ranks == 1 else FP32 / ranks) * m * (host and gpu)
    yield Part("gradient of one tensor", gradient, (BACKWARD,))
    ddp = run.stage == 0 and ranks > 1 and gpu  # on a CPU, untouched memory takes no room
    yield Part("buckets of DDP, unused", n * w * ddp)
    temporaries = run.estimator.temporaries if run.estimator else 0
    yield Part("tensors of the Hessian estimate", temporaries * n * w, (BACKWARD,))


def _training(model: Architecture, run: PlannedRun) -> Iterator[Part]:
    """Values, their places, gradients and optimiser state of the weights that move. Only the
    selected entries of a tensor's gradient are kept; under ZeRO-3 places are bits."""
    n, m, w = _sizes(model, run)
    s, copy = n * run.moving, w if run.frozen_copy else 0
    bits = n / 8 / run.devices if run.masked and run.stage == 3 else 0
    yield Part("mask bits", bits, MOMENTS)
    yield Part("places of the values", FP32 * s * (run.masked and run.stage < 3), MOMENTS)
    yield Part("values at θ₀", copy * s, MOMENTS)
    yield Part("one tensor at θ₀", copy * m * run.masked, (FORWARD,))
    written = model.stored != w and run.stage < 3  # in another type than it is computed with
    yield Part("export", n * model.stored * written, (END,))
    if run.stage:
        yield from _zero(model, run)
        return
    values = run.masked or w < FP32  # apart from the weights
    terms = run.task == "unlearning" and run.streams == 1 and run.accumulate_grad_batches > 1
    copied = run.optimizer == "AdamW" and run.accelerator == "gpu"  # torch's makes one fp32 copy
    yield Part("values", FP32 * s * values, MOMENTS)
    yield Part("gradients", FP32 * s)
    yield Part("gradient of one tensor", w * m * (values or model.tied), (BACKWARD,))
    yield Part("gradient of a term", FP32 * s * terms, (BACKWARD,))
    yield Part("optimiser state", STATE_BYTES[run.optimizer] * s)
    yield Part("step", FP32 * s * copied, (STEP,))
    yield Part("buckets of DDP", FP32 * s * (run.devices > 1))


def _zero(model: Architecture, run: PlannedRun) -> Iterator[Part]:
    """ZeRO's flat partitions, in fp32 even if the values are, and its buckets.

    Stage 3 keeps the tensors into which values were written, with their bits, in the graph of each
    stream; with checkpointing, those of one block and of the output matrix. Under stages 1 and 2
    two buckets take turns. Over several micro-batches stage 1 keeps whole gradients, stage 2 a
    rank's share.
    """
    n, m, w = _sizes(model, run)
    s, sharded, gpu = n * run.moving, run.stage == 3, run.accelerator == "gpu"
    share, where = s / run.devices, "host" if run.offload else "device"
    bucket, turns = min(BUCKET, s), 1 if sharded or not (gpu or s > BUCKET) else 2
    temporary = FP32 * share if run.optimizer == "AdamW" and gpu else 0
    yield Part("fp32 values", FP32 * share, MOMENTS, where)
    yield Part("optimiser state", STATE_BYTES[run.optimizer] * share, RUNNING, where)
    yield Part("values", w * (share if sharded else s) * run.masked, MOMENTS)
    yield Part("buckets", w * bucket * turns, RUNNING if sharded else (BACKWARD,))
    yield Part("bucket being reduced", w * bucket * (1 + (sharded and not gpu)), (BACKWARD,))
    yield Part("gradients of the step", FP32 * share, (STEP,), where)
    yield Part("step", temporary if sharded else max(temporary, w * share), (STEP,), where)
    if sharded:
        at_once: float = run.streams * n
        if run.gradient_checkpointing:
            at_once = n / model.layers + run.streams * m
        yield Part("weights with values", (w + 1 / 8) * at_once * run.masked, (FORWARD, BACKWARD))
        yield Part("gradients", w * share, RUNNING, where)
        return
    kept = w * (s if run.stage == 1 else share) * (run.accumulate_grad_batches > 1)
    yield Part("gradients so far", kept, (FORWARD, BACKWARD))
    yield Part("gradients", w * (s - bucket) / run.devices, (BACKWARD,), where)


def _passes(model: Architecture, run: PlannedRun) -> Iterator[Part]:
    """Activations and logits of the graphs that exist together; in a test, those of one block, and
    the cache of a generation as long as the rows. A Gauss–Newton draw goes backward twice through
    the same graph (not under ZeRO-3), so its activations are kept during the first."""
    tokens, c, testing = run.batch_size * run.max_length, PRECISIONS[run.precision][1], False
    if run.task == "test":
        testing, activations = True, block_bytes(model, c) * tokens
    else:
        rows = (tokens * run.streams, c, run.gradient_checkpointing)
        activations = activation_bytes(model, *rows)
    again = run.estimator is not None and run.estimator.same_graph and run.stage < 3
    when = (FORWARD, BACKWARD) if again else (FORWARD,)
    sharded = run.stage == 3 and not testing
    yield Part("activations", activations, when)
    yield Part("logits", logit_bytes(model, tokens, c, run.streams, sharded), when)
    yield Part("cache of a generation", 2 * model.layers * model.keys * tokens * c * testing, when)
    yield Part("narrow copies", model.weights * c * (run.width > c and not testing), (FORWARD,))


def _sizes(model: Architecture, run: PlannedRun) -> tuple[int, int, int]:
    return model.weights, max(model.sizes), run.width


# -- the plan --------------------------------------------------------------------------------------


def parts_of(model: Architecture, run: PlannedRun) -> list[Part]:
    """All parts of a run's memory, on the device and on the host."""
    n, _, w = _sizes(model, run)
    parts = [Part("CUDA, cuBLAS, NCCL", GPU_OVERHEAD, MOMENTS)]
    if run.accelerator == "cpu":
        libraries = Part("interpreter and libraries", CPU_OVERHEAD, MOMENTS)
        parts = [libraries, Part("freed memory that is kept", KEPT)]
    ranks, where = run.devices if run.stage == 3 else 1, "host" if run.offload else "device"
    parts.append(Part("weights", n * w / ranks, MOMENTS, where if run.stage == 3 else "device"))
    together = min(n, LIVE) * w * (run.stage == 3)
    parts.append(Part("weights brought together", together, (FORWARD, BACKWARD)))
    if run.task != "test":
        parts += (_attribution if run.task == "attribution" else _training)(model, run)
    return [part for part in (*parts, *_passes(model, run)) if part.bytes]


def device_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """The parts in a device's memory; on a CPU, all parts."""
    parts = parts_of(model, run)
    return [part for part in parts if part.where == "device" or run.accelerator == "cpu"]


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
    parts = [part for part in parts_of(model, run) if part.where == "host"]
    loading = model.stored * (max(model.sizes) if run.stage == 3 else model.weights)
    return CPU_OVERHEAD + max(loading, *(at(parts, moment) for moment in MOMENTS))


def disk_bytes(run: PlannedRun, weights: int, stored: int = 0) -> dict[str, float]:
    """File -> size; ``stored`` is the bytes per weight of the model that training writes."""
    if run.task == "test":
        return {}
    if run.task == "attribution":
        files = {"mask": weights / 8, "checkpoint": FP32 * (2 + run.diagonal) * weights}
        passes = Sums.parse(run.sums).passes
        return files | ({"sums": files["checkpoint"]} if passes > 1 else {})
    kept = (FP32 + STATE_BYTES[run.optimizer]) * weights * run.moving
    return {"checkpoint": kept, "model": weights * stored}


def choices(
    run: PlannedRun, devices: Sequence[int] = COUNTS
) -> Iterator[tuple[str, list[PlannedRun]]]:
    """(strategy, the run under it on each number of devices) for every strategy that works."""
    sharded = ["zero3", "zero3_offload"] if run.accelerator == "gpu" else ["zero3"]
    if run.frozen_copy or (run.estimator is not None and not run.estimator.shardable):
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
    attributes = options.get("task") == "attribution"
    estimator = hessians.estimator_of(hessian) if attributes else None
    diagonal = estimator is not None and hessian != "auto"
    run = PlannedRun(estimator=estimator, diagonal=diagonal, **options)
    shape = architecture(model)
    moment, size = peak(shape, run)
    about = {
        "model": f"{model}: {shape.weights:,} weights, {max(shape.sizes):,} in the largest tensor",
        "run": f"{run.task}, {run.strategy} on {run.devices} x {run.accelerator}, {run.precision}, "
        f"{run.batch_size} x {run.max_length} tokens per stream",
        "peak": f"{_gib(size)} GiB, moment: {moment}",
    }
    if run.accelerator == "gpu":
        about["fits"] = f"a GPU of {size / USABLE / GIB:.0f} GiB, with room for fragments"
        about["CPU memory"] = f"{_gib(host_bytes(shape, run))} GiB per rank"
    files = disk_bytes(run, shape.weights, shape.stored).items()
    about["disk"] = ", ".join(f"{name} {_gib(size)} GiB" for name, size in files) or "tables only"
    unit = f"GiB per {'GPU' if run.accelerator == 'gpu' else 'process'}"
    parts = device_parts(shape, run)
    rows = [[p.name, *(_gib(p.bytes) if m in p.moments else "" for m in MOMENTS)] for p in parts]
    rows.append(["total", *(_gib(at(parts, moment)) for moment in MOMENTS)])
    others = [
        [name, *(_gib(peak(shape, other)[1]) for other in runs)] for name, runs in choices(run)
    ]
    tables = table([unit, *MOMENTS], rows), table([f"peak, {unit}, on", *map(str, COUNTS)], others)
    print(fields([*about.items()]), *tables, sep="\n\n")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
