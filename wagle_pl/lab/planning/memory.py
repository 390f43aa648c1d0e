"""A device's memory, part by part; what a run writes, and what it computes.

A run passes through *moments*, each of which needs its own parts (:class:`Part`); its peak is the
largest sum of a moment's parts. Formulas are in bytes, for one device, with

    N  weights                          R  ranks
    M  weights of the largest tensor    w  bytes per weight as the model computes with it
    S  weights that may move            c  bytes of a matrix product's inputs and outputs
    h  hidden size                      q  size of all heads together
    L  blocks                           I  inner size of the MLP
    V  vocabulary                       d  density of the mask; S = d N
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from wagle_pl.attribution.sums import BLOCK, runs_of
from wagle_pl.lab.planning.planned import Architecture, PlannedRun
from wagle_pl.lm.inference import CHUNK
from wagle_pl.unlearning.optim import STATE_BYTES

GIB = 1 << 30
FP32 = 4
#: Maximum number of values in one of DeepSpeed's buckets (Lightning's default).
BUCKET = 200_000_000
#: Maximum number of weights that ZeRO-3 keeps gathered (``stage3_max_live_parameters``).
LIVE = 1_000_000_000
BROADCAST = 250 << 20  # bytes in a bucket of DDP's broadcast of the parameters (torch's default)
#: Bytes of interpreter and libraries in a process on a CPU: measured, ``bin/benchmarks/plan.py``.
CPU_OVERHEAD = 600 << 20
GPU_OVERHEAD = 1 << 30  # of CUDA context, cuBLAS and NCCL on a GPU: assumed, not measured
USABLE = 0.92  # share of a GPU's memory that plans use; the rest is left to fragmentation

MOMENTS = LOAD, FORWARD, BACKWARD, STEP, END = "load", "forward", "backward", "step", "end"
RUNNING = MOMENTS[1:]


class Part(NamedTuple):
    """Memory of one kind: bytes and moments; ``host`` means a GPU's share of CPU memory."""

    name: str
    bytes: float
    moments: Sequence[str] = RUNNING
    where: str = "device"


# -- activations -----------------------------------------------------------------------------------


def block_bytes(model: Architecture, computing: int) -> int:
    """2 h (4 + 2 c) + 4 q c + 4 heads + (4 or 2) I c: bytes per token that a block keeps for its
    backward pass, with attention that keeps no T × T matrix.

    Two norms keep their input in fp32, the normalised input and their output; attention keeps
    queries, keys, values (repeated for every head) and its output, and one fp32 number per head; a
    gated MLP keeps gate, its activation, up and their product (one without a gate: two). Derived
    like Korthikanti et al. 2022 (arXiv 2205.05198), for the Llama block.
    """
    norms = 2 * model.hidden * (FP32 + 2 * computing)
    attention = 4 * model.attention * computing + FP32 * model.heads
    return norms + attention + (4 if model.gated else 2) * model.inner * computing


def activation_bytes(
    model: Architecture, tokens: int, computing: int, checkpointing: bool = False
) -> int:
    """L blocks and the last norm; with checkpointing, each block's input and one block."""
    kept = model.layers * block_bytes(model, computing)
    if checkpointing:
        kept = model.layers * model.hidden * computing + block_bytes(model, computing)
    return tokens * (kept + model.hidden * (FP32 + 2 * computing))


def logit_bytes(
    model: Architecture, tokens: int, computing: int, streams: int = 1, sharded: bool = False
) -> int:
    """Logits, their log-softmax and its gradient (these two in fp32) of each stream's tokens or, if
    they are more than a chunk, of one chunk. With sharded weights (ZeRO-3), logits of all tokens
    are computed at once, and kept with their gradient."""
    numbers = tokens * model.vocabulary
    chunk = CHUNK if numbers > CHUNK else streams * numbers
    whole = 2 * streams * numbers if sharded and numbers > CHUNK else 0
    return chunk * (computing + 2 * FP32) + whole * computing


# -- what each task keeps --------------------------------------------------------------------------


def lasting_sums(run: PlannedRun) -> int:
    """Bytes per weight of the fp32 sums g_f and g_r, and of the diagonal if one is kept."""
    return FP32 * (2 + run.diagonal)


def sums_per_weight(run: PlannedRun) -> int:
    """The same, plus the sums of a Hessian draw, which exist for one step."""
    return lasting_sums(run) + FP32 * (run.estimator.step_sums if run.estimator else 0)


def state_bytes(optimizer: str, numbers: float) -> float:
    """Optimiser state: two moments of 4 bytes, or of 1 (AdamW8bit); one (SignSGD); none (SGD)."""
    return STATE_BYTES[optimizer] * numbers


def step_bytes(run: PlannedRun, numbers: float) -> float:
    """Temporaries of a step: one fp32 copy for torch's AdamW on a GPU; MaskedAdamW is fused."""
    return FP32 * numbers if run.optimizer == "AdamW" and run.accelerator == "gpu" else 0


def has_values(run: PlannedRun) -> bool:
    """Whether values are kept in addition to the weights: selected ones, or fp32 of narrow ones."""
    return run.masked or (not run.stage and run.width < FP32)


def weight_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """N w; under ZeRO-3 N w / R, tensors too small to be sharded, and those gathered for a pass."""
    w, n = run.width, model.weights
    if run.stage < 3:
        return [Part("weights", n * w, MOMENTS)]
    where = "host" if run.spread.offload_parameters else "device"
    small = sum(size for size in model.sizes if size < run.persistence)
    return [
        Part("weights", n * w / run.devices, MOMENTS, where),
        Part("small tensors kept whole", small * w, MOMENTS),
        Part("weights brought together", min(n, LIVE) * w, (FORWARD, BACKWARD)),
    ]


def attribution_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """Sums, and the scores of one tensor.

    Only one tensor has a gradient at a time (two gradients if it is embedding and output matrix),
    converted to fp32 if it is narrower; several ranks add it up in a copy. On one device an fp32
    gradient is added to its sum in place. Scoring a block takes five tensors of its size.

    ``host``: sums are in CPU memory, with two pinned buffers, and a narrower gradient is converted
    there. ``passes=K``: sums are of the largest group of parameters; finished ones are in files.
    """
    w, n, m, ranks = run.width, model.weights, model.largest, run.devices
    gpu = run.accelerator == "gpu"
    gradient = (2 if model.tied else 1) * w * m
    host, passes = run.in_sums
    if w < FP32 and (ranks > 1 or not host):
        gradient += FP32 * m
    if ranks > 1:
        gradient += FP32 * m + FP32 * m / ranks
    groups = runs_of(model.sizes, passes)
    share = max(sum(model.sizes[i] for i in group) for group in groups) / ranks
    when = (FORWARD, BACKWARD, STEP) if passes > 1 else RUNNING
    moved = (w if ranks == 1 else FP32 / ranks) * m if host and gpu else 0
    ddp = run.stage == 0 and ranks > 1 and gpu  # on a CPU, untouched memory takes no room
    temporaries = run.estimator.temporaries if run.estimator else 0
    return [
        Part("sums of gradients", sums_per_weight(run) * share, when, "host" if host else "device"),
        Part("gradient of one tensor", gradient, (BACKWARD,)),
        Part("scores of one tensor", FP32 * (m / ranks + 5 * min(BLOCK, m / ranks)), (END,)),
        Part("mask bits", n / 8, (END,), "host" if gpu else "device"),
        Part("buckets of DDP, unused", n * w if ddp else 0),
        Part("gradient on its way", moved, (BACKWARD,)),
        Part("pinned buffers", 2 * moved, RUNNING, "host"),
        Part("tensors of the Hessian estimate", temporaries * n * w, (BACKWARD,)),
    ]


def training_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """Values and their places, gradients, optimiser state, and what the step and the end need.

    Places of values are int32, complete on every rank, and joined for one tensor at a time; under
    ZeRO-3 they are bits. Only the selected entries of a tensor's dense gradient are kept.
    """
    s, m, w = model.weights * run.moving, model.largest, run.width
    bits = model.weights / 8 / run.devices if run.masked and run.stage == 3 else 0
    place = FP32 if run.masked and run.stage < 3 else 0
    copy = w if run.frozen_copy else 0
    return [
        Part("mask bits", bits, MOMENTS),
        Part("places of the values", place * s, MOMENTS),
        Part("places of one tensor", place * m * run.moving, (LOAD,)),
        Part("gradient of one tensor", w * m if has_values(run) else 0, (BACKWARD,)),
        Part("values at θ₀", copy * s, MOMENTS),
        Part("one tensor at θ₀", copy * m if run.masked else 0, (FORWARD,)),
        *(_zero_parts(model, run) if run.stage else _plain_parts(model, run)),
    ]


def _plain_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """One device, or DDP. If all weights move and are fp32, they are the values."""
    w, n, s, m = run.width, model.weights, model.weights * run.moving, model.largest
    values, ddp = has_values(run), run.devices > 1
    apart = run.task == "unlearning" and run.by_term and run.accumulate_grad_batches > 1
    return [
        Part("gradients", FP32 * s),
        Part("gradient of a term", FP32 * s if apart else 0, (BACKWARD,)),
        Part("optimiser state", state_bytes(run.optimizer, s)),
        Part("step", step_bytes(run, s), (STEP,)),
        Part("export", n * model.stored if model.stored != w else 0, (END,)),
        Part("values", FP32 * s if values else 0, MOMENTS),
        Part("buckets of DDP", FP32 * s if ddp else 0),
        Part("broadcast of the values", min(BROADCAST, FP32 * s) if ddp else 0, (LOAD,)),
        Part("gradient of one tensor", m * w if model.tied and not values else 0, (BACKWARD,)),
    ]


def _zero_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """ZeRO's flat partitions, in fp32 even if the values are, and its buckets.

    Under stage 3 a graph keeps the tensors into which values have been written, and the bits that
    say where: for each stream; with checkpointing, those of one block and of each stream's output
    matrix.

    Under stages 1 and 2 two buckets take turns (on a CPU the second takes no memory while one is
    enough); another is being reduced, and gloo copies it under stage 3. During the last reduction
    the other gradients exist (under stage 3 always all), and the one that did not fit into the
    bucket. Over several micro-batches stage 1 keeps whole gradients, stage 2 a rank's share. The
    step needs fp32 gradients in addition to these, or to what the optimiser needs.
    """
    w, n, s = run.width, model.weights, model.weights * run.moving
    share, sharded, gpu = s / run.devices, run.stage == 3, run.accelerator == "gpu"
    where = "host" if run.spread.offload_optimizer else "device"
    bucket, full = min(BUCKET, s), s > BUCKET
    buffers = 1 if sharded or not (gpu or full) else 2
    reduced = 1 if gpu or not sharded else 2
    overflow = model.largest * w if full and not run.masked else 0
    temporary = step_bytes(run, share)
    at_once = run.streams * n
    if run.gradient_checkpointing:
        at_once = n / model.layers + run.streams * model.largest
    parts = [
        Part("fp32 values", FP32 * share, MOMENTS, where),
        Part("optimiser state", state_bytes(run.optimizer, share), RUNNING, where),
        Part("buckets", w * bucket * buffers, RUNNING if sharded else (BACKWARD,)),
        Part("bucket being reduced", w * bucket * reduced, (BACKWARD,)),
        Part("gradient of one tensor", overflow, (BACKWARD,)),
        Part("gradients of the step", FP32 * share, (STEP,), where),
        Part("step", temporary if sharded else max(temporary, w * share), (STEP,), where),
        Part("values", w * (share if sharded else s) if run.masked else 0, MOMENTS),
    ]
    if sharded:
        written = (w + 1 / 8) * at_once if run.masked else 0
        return [
            *parts,
            Part("weights with values", written, (FORWARD, BACKWARD)),
            Part("gradients", w * share, RUNNING, where),
            Part("values of one tensor", w * model.largest * run.moving, (END,)),
        ]
    so_far = w * (s if run.stage == 1 else share) if run.accumulate_grad_batches > 1 else 0
    return [
        *parts,
        Part("gradients so far", so_far, (FORWARD, BACKWARD)),
        Part("gradients", w * (s - bucket) / run.devices, (BACKWARD,), where),
        Part("flattening of the values", s * w, (LOAD,)),
        Part("export", n * model.stored if model.stored != w else 0, (END,)),
    ]


def pass_parts(model: Architecture, run: PlannedRun) -> list[Part]:
    """Activations and logits of the graphs that exist together; in a test, those of one block, and
    the cache of a generation as long as the rows.

    A Gauss–Newton draw makes a second backward pass through the same graph, so its activations are
    kept during the first (not under ZeRO-3).
    """
    tokens, width = run.batch_size * run.max_length, run.computing
    if run.task == "test":
        cache = 2 * model.layers * model.keys * tokens * width  # keys and values
        return [
            Part("activations", block_bytes(model, width) * tokens, (FORWARD,)),
            Part("logits", logit_bytes(model, tokens, width), (FORWARD,)),
            Part("cache of a generation", cache, (FORWARD,)),
        ]
    logits = logit_bytes(model, tokens, width, run.streams, run.stage == 3)
    tokens *= run.streams
    again = run.estimator is not None and run.estimator.same_graph and run.stage < 3
    when = (FORWARD, BACKWARD) if again else (FORWARD,)
    narrow = model.weights * width if run.width > width else 0
    activations = activation_bytes(model, tokens, width, run.gradient_checkpointing)
    return [
        Part("activations", activations, when),
        Part("logits", logits, when),
        Part("narrow copies of the weights", narrow, (FORWARD,)),
    ]


# -- the plan --------------------------------------------------------------------------------------


def parts_of(model: Architecture, run: PlannedRun) -> list[Part]:
    """All parts of a run's memory, on the device and on the host."""
    overhead = Part("interpreter and libraries", CPU_OVERHEAD, MOMENTS)
    if run.accelerator == "gpu":
        overhead = Part("CUDA, cuBLAS, NCCL", GPU_OVERHEAD, MOMENTS)
    parts = [overhead, *weight_parts(model, run)]
    if run.task == "attribution":
        parts += attribution_parts(model, run)
    elif run.task != "test":
        parts += training_parts(model, run)
    return [part for part in parts + pass_parts(model, run) if part.bytes]


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
    """CPU memory of one rank of a run on GPUs: libraries, what is offloaded, the mask and, while it
    is being loaded, the model as it is stored (under ZeRO-3 one of its tensors)."""
    parts = [part for part in parts_of(model, run) if part.where == "host"]
    loading = model.stored * (model.largest if run.stage == 3 else model.weights)
    return CPU_OVERHEAD + max(loading, *(at(parts, moment) for moment in MOMENTS))


def disk_bytes(run: PlannedRun, weights: int, stored: int = 0) -> dict[str, float]:
    """File -> size: a mask N / 8, a checkpoint, a model.

    Args:
        stored: bytes per weight of the model that training writes.
    """
    if run.task == "test":
        return {}
    if run.task == "attribution":
        files = {"mask": weights / 8, "checkpoint": lasting_sums(run) * weights}
        return files | ({"sums": files["checkpoint"]} if run.in_sums.passes > 1 else {})
    moving = weights * run.moving
    checkpoint = FP32 * moving + state_bytes(run.optimizer, moving)
    return {"checkpoint": checkpoint, "model": weights * stored}


def step_tokens(run: PlannedRun) -> int:
    """Tokens of a micro-batch on all devices, with the same number of rows from each stream."""
    streams = 2 if run.task in ("attribution", "unlearning") else 1
    return run.batch_size * run.max_length * run.devices * streams


def step_flops(model: Architecture, run: PlannedRun) -> float:
    """Floating-point operations of a micro-batch on all devices, without those of attention between
    tokens.

    2 N' per token forward and 4 N' backward (Kaplan et al. 2020, arXiv 2001.08361): 6 N' in
    training. N' is N without the embedding, unless it is also the output matrix. Checkpointing adds
    a forward pass. Attribution estimates a Hessian on the retain rows, half of its tokens, which
    adds the estimator's backward passes and, under ZeRO-3, a forward pass.
    """
    n = model.weights - (0 if model.tied else model.vocabulary * model.hidden)
    if run.task == "test":
        return 2.0 * n * step_tokens(run)
    forward = backward = 1.0
    if run.estimator is not None:
        backward += 0.5 * run.estimator.backward_passes
        forward += 0.5 if run.stage == 3 else 0
    if run.gradient_checkpointing:
        forward += backward
    forward, backward = (run.in_sums.passes * passes for passes in (forward, backward))
    return (2 * forward + 4 * backward) * n * step_tokens(run)
