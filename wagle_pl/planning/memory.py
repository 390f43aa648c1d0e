"""A device's memory, part by part.

A run passes through *moments*, each of which needs its own parts (:class:`Part`); its peak is the
largest sum of a moment's parts. Formulas are in bytes, for one device, with

    N  weights                          R  ranks
    M  weights of the largest tensor    w  bytes a weight as the model computes with it
    d  density of the mask; S = d N     q  size of all heads together
    h  hidden size                      I  inner size of the MLP
    L  blocks                           V  vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from wagle_pl.planning.architecture import Architecture
from wagle_pl.planning.planned import PlannedRun

GIB = 1 << 30
FP32 = 4
#: Numbers in a bucket of DeepSpeed's, if the model has as many (Lightning's default).
BUCKET = 200_000_000
#: Weights that ZeRO-3 keeps together on a rank at most, when it may (DeepSpeed's
#: ``stage3_max_live_parameters``).
LIVE = 1_000_000_000
#: Bytes in a bucket of DDP's broadcast of the parameters (torch's default).
BROADCAST = 250 << 20
#: What interpreter and libraries take of a process on a CPU: measured, see
#: ``bin/benchmarks/plan.py``.
CPU_OVERHEAD = 600 << 20
#: What CUDA context, cuBLAS and NCCL take of a GPU: assumed, not measured.
GPU_OVERHEAD = 1 << 30
#: Share of a GPU that is planned with; the rest is left to fragmentation.
USABLE = 0.92

MOMENTS = ("load", "forward", "backward", "step", "end")
RUNNING = MOMENTS[1:]


class Part(NamedTuple):
    """A part of a device's memory.

    Attributes:
        name: what it is.
        bytes: how much.
        moments: when it is there.
        where: ``device``, or ``host`` for a GPU's share of CPU memory.
    """

    name: str
    bytes: float
    moments: Sequence[str] = RUNNING
    where: str = "device"


# -- activations -----------------------------------------------------------------------------------


def block_bytes(model: Architecture, computing: int) -> int:
    """Bytes a token that a block keeps for its backward pass, with attention that keeps no T × T
    matrix.

        2 h (4 + 2c) + 4 q c + (4 or 2) I c + 4 heads

    Two norms keep their input in fp32, what they normalised and what they give; attention keeps
    queries, keys, values (repeated for every head) and its output, and one fp32 number a head; a
    gated MLP keeps gate, its activation, up and their product (one without a gate: two). c is the
    width of an activation. In the manner of Korthikanti et al. 2022 (arXiv 2205.05198), for the
    Llama block.
    """
    norms = 2 * model.hidden * (FP32 + 2 * computing)
    attention = 4 * model.attention * computing + FP32 * model.heads
    return norms + attention + (4 if model.gated else 2) * model.inner * computing


def activation_bytes(
    model: Architecture, tokens: int, computing: int, checkpointing: bool = False
) -> int:
    """Bytes of activations of ``tokens`` tokens: L blocks and the last norm; with checkpointing
    each block's input, and one block as it is recomputed: tokens · (L h c + block)."""
    block = block_bytes(model, computing)
    last = model.hidden * (FP32 + 2 * computing)
    kept = (
        model.layers * model.hidden * computing + block if checkpointing else model.layers * block
    )
    return tokens * (kept + last)


def logit_bytes(model: Architecture, tokens: int, computing: int, backward: bool = True) -> int:
    """tokens · V · (c + 4): the logits, and their fp32 log-softmax; 4 more for its gradient, in the
    backward pass."""
    return tokens * model.vocabulary * (computing + FP32 + (FP32 if backward else 0))


def cache_bytes(model: Architecture, rows: int, length: int, computing: int) -> int:
    """Keys and values of a generation: 2 L · keys · rows · tokens · c."""
    return 2 * model.layers * model.keys * rows * length * computing


# -- what each task keeps --------------------------------------------------------------------------


def sums_per_weight(run: PlannedRun) -> int:
    """Bytes of fp32 sums a weight: g_f, g_r; a draw's gradient while its step lasts; the diagonal,
    if one is kept."""
    return FP32 * (2 + run.diagonal) + in_step_per_weight(run)


def in_step_per_weight(run: PlannedRun) -> int:
    """Bytes a weight of those sums that stand only while a step lasts."""
    return FP32 * run.estimator.step_sums if run.estimator else 0


def state_bytes(optimizer: str, numbers: float) -> float:
    """Optimiser state of ``numbers`` values in fp32: two moments of 4 bytes, or of 1 (AdamW8bit);
    none (SGD)."""
    return {"SGD": 0, "AdamW8bit": 2}.get(optimizer, 2 * FP32) * numbers


def step_bytes(run: PlannedRun, numbers: float) -> float:
    """What a step takes for a while, beside ``numbers`` values, gradients and state: torch's AdamW
    on a GPU 4 bytes of all at once; the fused one (MaskedAdamW) nothing."""
    return FP32 * numbers if run.optimizer == "AdamW" and run.accelerator == "gpu" else 0


def moving(model: Architecture, run: PlannedRun) -> float:
    """S, the weights that may move: d N."""
    return model.weights * (run.density if run.masked else 1.0)


def has_values(run: PlannedRun) -> bool:
    """Whether what is trained stands beside the model's weights: selected ones, and fp32 values of
    narrower weights."""
    return run.masked or (not run.stage and run.width < FP32)


def weight_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """N w; N w / R under ZeRO-3, with the small tensors that stay whole and those a pass has
    brought together."""
    w, n = run.width, model.weights
    if run.stage < 3:
        return [Part("weights", n * w, MOMENTS)]
    where = "host" if run.spread.offload_parameters else "device"
    together = min(n, LIVE) * w
    return [
        Part("weights", n * w / run.devices, MOMENTS, where),
        Part("small tensors kept whole", model.small(run.persistence) * w, MOMENTS),
        Part("weights brought together", together, ("forward", "backward")),
    ]


def attribution_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """Sums, and the scores of one tensor.

    A gradient stands for one tensor at a time: w M (twice where it is embedding and output matrix),
        4 M in fp32 if it
    is narrower, and with several ranks 4 M to add it up in and 4 M / R of the sum. On one device an
    fp32 gradient is added to its sum in place. Scores of a tensor's rows need five fp32 tensors of
    them. A Gauss–Newton draw makes a second backward pass through the same graph, so its
    activations stay during the first (not under ZeRO-3).
    """
    w, n, m, ranks = run.width, model.weights, model.largest, run.devices
    whole = (2 if model.tied else 1) * w * m
    if w < FP32:
        whole += FP32 * m
    if ranks > 1:
        whole += FP32 * m + FP32 * m / ranks
    theta = 1 if w < FP32 or run.stage == 3 else 0
    parts = [
        Part("sums of gradients", sums_per_weight(run) * n / ranks),
        Part("gradient of one tensor", whole, ("backward",)),
        Part("scores of one tensor", (4 + theta) * FP32 * m / ranks, ("end",)),
        Part("mask bits", n / 8, ("end",), "host" if run.accelerator == "gpu" else "device"),
    ]
    if run.stage == 0 and ranks > 1 and run.accelerator == "gpu":
        parts.append(
            Part("buckets of DDP, unused", n * w)
        )  # on a CPU memory that is not touched is not there
    if run.estimator and run.estimator.temporaries:
        parts.append(
            Part(
                "tensors of the Hessian estimate", run.estimator.temporaries * n * w, ("backward",)
            )
        )
    return parts


def training_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """Values and their places, gradients, optimiser state, and what the step and the end need.

    With S = d N weights that move (N without a mask), as long as not all of fp32 weights move:
    places of S values, 4 S (int32), on every rank; the gradient of one dense tensor, w M, of which
    the selected entries are kept; at the end one tensor's mask, a byte a weight, and a copy of the
    tensor for its digest.
    """
    s, m, w = moving(model, run), model.largest, run.width
    parts = []
    if run.masked:
        if run.values != "split":
            parts.append(Part("places of the values", FP32 * s, MOMENTS))
        parts.append(Part("mask and digest of one tensor", (1 + w) * m, ("load", "end")))
    if has_values(run):
        parts.append(Part("gradient of one tensor", w * m, ("backward",)))
    if run.frozen_copy:
        parts.append(Part("values at θ₀", w * s, MOMENTS))
        parts.append(Part("one tensor at θ₀", w * m if run.masked else 0, ("forward",)))
    return parts + (_zero_parts(model, run) if run.stage else _plain_parts(model, run))


def _plain_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """One device, or DDP: values 4 S, gradients 4 S, which stand until the next backward pass,
    state, DDP's buckets.

    fp32 weights that all move are values themselves. Values in halves are 2 S, N / 8 of mask bits,
    and gradients of one micro-batch w S; a step joins those of one tensor: values and gradient 8 d
    M, and the upper halves, 2 d M.
    """
    w, n, s, m = run.width, model.weights, moving(model, run), model.largest
    halves = run.values == "split"
    parts = [
        Part("gradients", (w if halves and run.accumulate_grad_batches == 1 else FP32) * s),
        Part("optimiser state", state_bytes(run.optimizer, s)),
        Part("step", step_bytes(run, m * s / n if halves else s), ("step",)),
        Part("export", n * model.stored if model.stored != w else 0, ("end",)),
    ]
    if halves:
        parts += [
            Part("lower halves of the values", 2 * s, MOMENTS),
            Part("mask bits", n / 8 if run.masked else 0, MOMENTS),
            Part("values of one tensor", (2 * FP32 + 2) * m * s / n, ("step",)),
        ]
    elif has_values(run):
        parts.append(Part("values", FP32 * s, MOMENTS))
    if run.devices > 1:
        parts.append(Part("buckets of DDP", FP32 * s))
        parts.append(Part("broadcast of the values", min(BROADCAST, FP32 * s), ("load",)))
    if model.tied and not has_values(run):
        parts.append(Part("gradient of one tensor", m * w, ("backward",)))
    return parts


def _zero_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """ZeRO's flat partitions of S / R numbers, and its buckets of B = min(2e8, S) numbers.

    Beside the weights, with a mask: values w S (stage 3: w S / R), and under stage 3 the tensors
        that
    the values have been written into, which a graph keeps: w N a stream, or with checkpointing
        those
    of a block and of the output matrix of each stream. fp32 values 4 S / R, also beside values that
    are fp32. Buckets w B: under stages 1 and 2 two in turn (on a CPU the second is untouched while
    one holds all), under stage 3 one; one more is what is reduced, and under stage 3 gloo takes a
    copy of that. What earlier buckets left of the gradients, w (S - B) / R, stands while the last
    is reduced (under stage 3 room for all of it, always), and so does the gradient that found the
    bucket full. Over several micro-batches stage 1 keeps gradients whole, w S, stage 2 its part, w
    S / R. The step needs gradients in fp32, 4 S / R, beside those, w S / R, or beside what the
    optimiser needs.
    """
    w, n, s, ranks, gpu = (
        run.width,
        model.weights,
        moving(model, run),
        run.devices,
        run.accelerator == "gpu",
    )
    share, spread = s / ranks, run.stage == 3
    offloaded = "host" if run.spread.offload_optimizer else "device"
    bucket, full = min(BUCKET, s), s > BUCKET
    buffers = 1 if spread or not (gpu or full) else 2
    temporary = step_bytes(run, share)
    parts = [
        Part("fp32 values", FP32 * share, MOMENTS, offloaded),
        Part("optimiser state", state_bytes(run.optimizer, share), RUNNING, offloaded),
        Part("buckets", w * bucket * buffers, RUNNING if spread else ("backward",)),
        Part("bucket being reduced", w * bucket * (1 if gpu or not spread else 2), ("backward",)),
        Part(
            "gradient of one tensor",
            model.largest * w if full and not run.masked else 0,
            ("backward",),
        ),
        Part("gradients of the step", FP32 * share, ("step",), offloaded),
        Part("step", temporary if spread else max(temporary, w * share), ("step",), offloaded),
    ]
    if run.masked:
        parts.append(Part("values", w * (share if spread else s), MOMENTS))
    if spread and run.masked:
        heads = run.streams * model.largest
        at_once = n / model.layers + heads if run.gradient_checkpointing else run.streams * n
        parts.append(Part("weights with values", w * at_once, ("forward", "backward")))
    if spread:
        parts.append(Part("gradients", w * share, RUNNING, offloaded))
        parts.append(Part("one tensor, whole", 2 * model.largest * w, ("end",)))
    else:
        if run.accumulate_grad_batches > 1:
            parts.append(
                Part(
                    "gradients so far",
                    w * (s if run.stage == 1 else share),
                    ("forward", "backward"),
                )
            )
        parts.append(Part("gradients", w * (s - bucket) / ranks, ("backward",), offloaded))
        parts.append(Part("flattening of the values", s * w, ("load",)))
        parts.append(Part("export", n * model.stored if model.stored != w else 0, ("end",)))
    return parts


def evaluation_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """One block's activations, logits, and the cache of a generation as long as the rows."""
    tokens = run.batch_size * run.max_length
    block = block_bytes(model, run.computing) * tokens
    return [
        Part("activations", block, ("forward",)),
        Part("logits", logit_bytes(model, tokens, run.computing), ("forward",)),
        Part(
            "cache of a generation",
            cache_bytes(model, run.batch_size, run.max_length, run.computing),
            ("forward",),
        ),
    ]


def pass_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """Activations and logits of the graphs that are alive together."""
    tokens = run.batch_size * run.max_length * run.streams
    activations = activation_bytes(model, tokens, run.computing, run.gradient_checkpointing)
    again = run.estimator is not None and run.estimator.same_graph and run.stage < 3
    parts = [
        Part("activations", activations, ("forward", "backward") if again else ("forward",)),
        Part(
            "logits",
            logit_bytes(model, tokens, run.computing),
            ("forward", "backward") if again else ("forward",),
        ),
    ]
    if run.width > run.computing:
        parts.append(
            Part("narrow copies of the weights", model.weights * run.computing, ("forward",))
        )
    return parts


# -- the plan --------------------------------------------------------------------------------------


def parts_of(model: Architecture, run: PlannedRun) -> list[Part]:
    """All parts of a run's memory, on the device and beside it."""
    gpu = run.accelerator == "gpu"
    parts = [
        Part("CUDA, cuBLAS, NCCL" if gpu else "interpreter and libraries", overhead(run), MOMENTS)
    ]
    parts += weight_parts(model, run)
    if run.task == "test":
        return parts + evaluation_parts(model, run)
    parts += (
        attribution_parts(model, run) if run.task == "attribution" else training_parts(model, run)
    )
    return [part for part in parts + pass_parts(model, run) if part.bytes]


def overhead(run: PlannedRun) -> int:
    """Bytes that any run takes."""
    return GPU_OVERHEAD if run.accelerator == "gpu" else CPU_OVERHEAD


def device_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """The parts in a device's memory; on a CPU all, as there is no other place."""
    return [
        part for part in parts_of(model, run) if part.where == "device" or run.accelerator == "cpu"
    ]


def at(parts: Iterable[Part], moment: str) -> float:
    """Bytes of those parts that are there at a moment."""
    return sum(part.bytes for part in parts if moment in part.moments)


def peak(model: Architecture, run: PlannedRun) -> tuple[str, float]:
    """The moment at which a device needs the most memory, and how much."""
    parts = device_parts(model, run)
    return max(((moment, at(parts, moment)) for moment in MOMENTS), key=lambda pair: pair[1])


def host_bytes(model: Architecture, run: PlannedRun) -> float:
    """CPU memory of one rank of a run on GPUs: libraries, what is offloaded, the mask, and while
    loading the model as it is stored (under ZeRO-3 one tensor of it)."""
    parts = [part for part in parts_of(model, run) if part.where == "host"]
    loading = model.stored * (model.largest if run.stage == 3 else model.weights)
    return CPU_OVERHEAD + max(loading, *(at(parts, moment) for moment in MOMENTS))
