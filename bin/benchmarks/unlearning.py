"""``bin/bench unlearning``: masked steps, precisions, cached references, optimiser state, padding, a bare loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Optional

import lightning as L
import torch
from common import (
    BatchTimes,
    Result,
    Settings,
    alternate,
    autocast,
    count_tokens,
    fit,
    in_fresh_process,
    in_turns,
    main,
    memory,
    padded_rows,
    products_per_second,
    reset_peak,
    result,
    select,
    shapes_of,
    step_ratio,
)
from torch import Tensor, nn

from wagle_pl.attribution.units import Units
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.data.people import bundled
from wagle_pl.lm import models
from wagle_pl.lm.inference import forward_answers, sequence_logprobs
from wagle_pl.lm.tiny import create_tiny_llama
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import filled_bits, random_bits
from wagle_pl.masks.names import layer_of
from wagle_pl.unlearning import FinetuneModule, MaskedAdamW, Streams, UnlearnModule

LR, WEIGHT_DECAY = 3e-5, 0.01  # as in configs/tofu
EPOCHS = 5
VOCABULARY = 128_256  # Llama-3's
GLOBAL_BATCH = 4  # of the padded baseline: batch 1, accumulate 4

# -- runs -------------------------------------------------------------------------------------------------------------


class Unexported(UnlearnModule):
    """Unlearning that writes no model: the disk is not what is measured."""

    def export(self, record: dict[str, Any]) -> None:
        """Leave it."""


class Rounded(Unexported):
    """Without fp32 values: in ``bf16-true`` values and state are bf16, and small steps are rounded away."""

    def select_weights(self, **options: Any) -> None:
        """Values in the dtype of the model."""
        super().select_weights(masters=False, **options)


class SecondModel(Unexported):
    """What caching references saves: a second model computes them anew at every step."""

    def configure_model(self) -> None:
        """Load the model twice."""
        super().configure_model()
        self.second = [models.load_model(self.model_name).eval()]  # in a list: no submodule

    @torch.no_grad()
    def streams_of(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Streams:
        """Put the second model's log-probabilities in the place of the cached ones."""
        for stream in self.objective.references:
            predicted = forward_answers(self.second[0], batch[stream])
            sums, _ = sequence_logprobs(predicted, batch[stream]["labels"])
            self._references.sums[stream][batch[stream]["row"]] = sums
        return super().streams_of(batch)


class WholeLogits(Unexported):
    """GradDiff with logits of every position from the first answer token on, all at once, as a plain loop has them."""

    def losses(self, at: Streams) -> dict[str, Tensor]:
        """The same loss."""
        means = {}
        for stream in self.streams:
            batch = at.batch[stream]
            targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
            targets = targets[:, int((targets != -100).any(0).int().argmax()) :]
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = self.lm(**inputs, use_cache=False, logits_to_keep=targets.shape[1]).logits
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
            )
            rows = losses.view(targets.shape).sum(-1) / (targets != -100).sum(-1)
            means[stream] = at.mean(stream, rows)
        return {"loss": means["retain"] - means["forget"]}


#: Who runs -> (class, objective).
KINDS: dict[str, tuple[type[UnlearnModule], str]] = {
    "GradDiff": (Unexported, "GradDiff"),
    "NPO": (Unexported, "NPO"),
    "NPO_second_model": (SecondModel, "NPO"),
    "Rounded": (Rounded, "GradDiff"),
    "WholeLogits": (WholeLogits, "GradDiff"),
}
NPO_KINDS = ("GradDiff", "NPO", "NPO_second_model")


def unlearn(
    settings: Settings,
    kind: str = "GradDiff",
    mask: Optional[str] = None,
    callbacks: Sequence[L.Callback] = (),
    batch_size: Optional[int] = None,
    lr: float = LR,
    name: str = "",
    **options: Any,
) -> BatchTimes:
    """One run with MaskedAdamW, in a folder of its name; returns the times of its steps."""
    cls, objective = KINDS[kind]
    output = str(Path(settings.scratch) / "run" / (name or kind))
    module = cls(
        model=settings.model,
        output=output,
        overwrite=True,
        objective=objective,
        mask=mask,
    )
    module.make_optimizer = partial(MaskedAdamW, lr=lr, weight_decay=WEIGHT_DECAY)
    times = BatchTimes()
    fit(module, settings, [*callbacks, times], batch_size, **options)
    return times


#: Masks of whole rows -> the part of the layers, from below, that has none.
ROWS_OF = {"row": 0.0, "row-upper": 2 / 3}


def write_mask(settings: Settings, density: float, by: str = "random") -> str:
    """A mask file for the model: weights at random, whole rows at random (of all layers, or of the upper third), or the
    largest weights (uneven over tensors, as real masks are)."""
    lm = models.load_model(settings.model)
    shapes = parameter_shapes(lm)
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    if by in ROWS_OF:
        first = int(ROWS_OF[by] * lm.config.num_hidden_layers)
        among = {n: s for n, s in shapes.items() if not first or (layer_of(n) or 0) >= first}
        units = Units("row", among)
        drawn = torch.rand(units.count, generator=torch.Generator().manual_seed(0)).double()
        chosen = units.choose(drawn, [density], low=False)
        packed = {name: filled_bits(size, False) for name, size in sizes.items()}
        packed |= {name: bits for name, (bits,) in units.select(chosen, {})}
    elif by == "random":
        packed = random_bits(sizes, int(density * sum(sizes.values())), seed=0)
    else:
        named = lm.named_parameters
        packed = dict(select(lambda: ((n, p.detach().float()) for n, p in named()), density))
    made_by = {"model": settings.model, "model_fingerprint": fingerprint(lm)}
    mask = WeightMask(packed, shapes, {**made_by, "score": by})
    return str(mask.save(Path(settings.scratch) / f"{by}-{density:g}.safetensors"))


def step_seconds(
    runs: Mapping[str, Sequence[BatchTimes]], epoch: Optional[int] = None
) -> dict[str, list[list[float]]]:
    """Seconds of each step, for the report: side -> repeat -> step."""
    return {
        name: [[round(s, 4) for s in times.steps(epoch)] for times in sides]
        for name, sides in runs.items()
    }


class Deadline(L.Callback):
    """Ends a run when the time for its row is over, but before its third step only when that for all rows is."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Look at the clock."""
        few = trainer.global_step < 3
        end = self.settings.end if few else self.settings.deadline
        trainer.should_stop |= time.monotonic() > end


# -- rows -------------------------------------------------------------------------------------------------------------


def measure_masked_step(settings: Settings) -> list[Result]:
    """Row 1: a step within a mask against a step of all weights, on the same batches: the median of their ratios."""
    masks = {f"{density:g}": write_mask(settings, density) for density in (0.2, 0.8)}
    bars = {"0.2": 1.0, "0.8": 1.05}
    return step_ratios(settings, "masked_step/density_", masks, bars)


def step_ratios(
    settings: Settings,
    row: str,
    masks: Mapping[str, str],
    bars: Mapping[str, float],
    **options: Any,
) -> list[Result]:
    """Steps within masks against steps of all weights, on the same batches: the median of their ratios."""

    def side(name: str) -> Callable[[L.Callback], BatchTimes]:
        length = {"max_epochs": 2 * settings.repeats, "name": name, **options}
        return lambda turn: unlearn(
            settings, mask=masks.get(name), callbacks=[turn, Deadline(settings)], **length
        )

    # a process's first step is slower, whatever it computes
    unlearn(settings, max_steps=1, **options)
    found = in_turns({name: side(name) for name in ("dense", *masks)})
    runs = {name: [times] for name, times in found.items()}
    raw = {"step_seconds": step_seconds(runs), "objective": "GradDiff", "mask": "random"}
    dense, results = runs["dense"][0].steps(), []
    for name, bar in bars.items():
        pairs = zip(runs[name][0].steps(), dense)  # noqa: B905  time may end between two turns
        ratio = median(masked / whole for masked, whole in pairs)
        results.append(result(row + name, ratio, bar, False, "x dense", raw))
    return results


def measure_units(settings: Settings) -> list[Result]:
    """A step within a mask of whole rows against a step of all weights, as row 1, in ``bf16-true``."""
    bars = {"row_0.2": 0.8, "row_0.05": 0.72, "row-upper_0.2": 0.6}
    masks = {
        name: write_mask(settings, float(density), by)
        for name in bars
        for by, density in [name.split("_")]
    }
    return step_ratios(settings, "units/", masks, bars, precision="bf16-true")


def measure_units_memory(settings: Settings) -> list[Result]:
    """Memory beyond weights with a mask of whole rows against one of single weights: selected weights, their
    places, and what a step adds."""
    masks = {by: write_mask(settings, 0.2, by) for by in ("row", "random")}
    sides = {
        by: partial(in_fresh_process, settings, "bytes_beyond_weights", mask=mask)
        for by, mask in masks.items()
    }
    found = alternate(settings, sides)
    rows, single = (median(sum(run.values()) for run in found[by]) for by in masks)
    return [result("units/memory", rows / single, 0.6, False, "x single weights", found)]


def bytes_beyond_weights(settings: Settings, mask: str) -> dict[str, int]:
    """What a step holds beside the weights. For a process of its own."""
    kept, peak = StateBytes(), StepPeak()
    unlearn(settings, mask=mask, callbacks=[kept, peak], max_steps=1, precision="bf16-true")
    return {"values": kept.values, "step": peak.bytes}


class Update(L.Callback):
    """What the values of selected weights have become less what they were, when training ends."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.update = torch.empty(0)

    def on_train_start(self, trainer: L.Trainer, module: UnlearnModule) -> None:
        """Remember the values."""
        self.start = self._values(module)

    def on_train_end(self, trainer: L.Trainer, module: UnlearnModule) -> None:
        """Subtract them."""
        values = self._values(module)
        self.update = torch.cat(
            [(values[name] - start).view(-1) for name, start in self.start.items()]
        )
        self.start.clear()

    @staticmethod
    def _values(module: UnlearnModule) -> dict[str, Tensor]:
        tensors = module.selected.tensors.items()
        return {
            name: t.values.detach().float().clone() for name, t in tensors if t.values is not None
        }


#: Name -> who runs, and the precision.
PRECISIONS = {
    "32-true": ("GradDiff", "32-true"),
    "bf16-mixed": ("GradDiff", "bf16-mixed"),
    "bf16-true": ("GradDiff", "bf16-true"),
    "bf16-true rounded": ("Rounded", "bf16-true"),
}


def cosine(one: Tensor, other: Tensor) -> float:
    """Of vectors of a hundred million numbers, whose products torch would add up in fp32."""
    both, first, second = (
        (a * b).sum(dtype=torch.float64) for a, b in ((one, other), (one, one), (other, other))
    )
    return float(both / (first * second).sqrt())


def measure_precisions(settings: Settings) -> list[Result]:
    """Row 2: the update of the same run in other precisions: share of selected weights moved, cosine with fp32's."""
    table: dict[str, dict[str, Any]] = {}
    for density, rates in ((0.2, (1e-5, 1e-6, 1e-4)), (0.95, (1e-5,))):
        mask = write_mask(settings, density)
        for lr in rates:
            if table and time.monotonic() > settings.deadline:
                continue
            updates = {}
            for name, (kind, precision) in PRECISIONS.items():
                seen = Update()
                steps = settings.rows // 2
                own = {"precision": precision, "max_steps": steps}
                unlearn(settings, kind, mask, [seen], 2, lr, **own)
                updates[name] = seen.update
                exact = updates["32-true"]
                table[f"density {density:g}, lr {lr:g}, {name}"] = {
                    "moved": float((seen.update != 0).float().mean()),
                    "cosine": cosine(seen.update, exact),
                    "length": float(seen.update.norm() / exact.norm()),
                    "steps": steps,
                }
    worst = min(row["cosine"] for name, row in table.items() if not name.endswith("rounded"))
    return [
        result("precisions", worst, 0.98, True, "cosine with fp32, the least", {"table": table})
    ]


def measure_npo_step(settings: Settings) -> list[Result]:
    """Row 3: a step of NPO, references cached, against one of GradDiff, in the second epoch."""
    sides = {kind: partial(unlearn, settings, kind, max_epochs=2) for kind in NPO_KINDS}
    unlearn(settings, max_steps=1)  # see measure_masked_step
    runs = alternate(settings, sides)
    second = step_ratio(runs["NPO_second_model"], runs["GradDiff"], epoch=1)
    raw = {"step_seconds": step_seconds(runs, epoch=1), "ratio_with_second_model": second}
    ratio = step_ratio(runs["NPO"], runs["GradDiff"], epoch=1)
    return [result("npo_step", ratio, 1.05, False, "x GradDiff", raw)]


def unlearning_peak(settings: Settings, kind: str) -> int:
    """Peak memory of a whole run. For a process of its own."""
    unlearn(settings, kind, max_epochs=1)
    return memory("VmHWM")


def measure_npo_memory(settings: Settings) -> list[Result]:
    """Row 4: peak memory of NPO runs against GradDiff runs, each in a process of its own."""

    def side(kind: str) -> Any:
        return lambda: in_fresh_process(settings, "unlearning_peak", kind=kind)

    peaks = alternate(settings, {kind: side(kind) for kind in NPO_KINDS})
    at = {kind: median(values) for kind, values in peaks.items()}
    raw = {"peak_bytes": peaks, "ratio_with_second_model": at["NPO_second_model"] / at["GradDiff"]}
    return [result("npo_memory", at["NPO"] / at["GradDiff"], 1.02, False, "x GradDiff", raw)]


class StepPeak(L.Callback):
    """How far memory grows in a micro-batch."""

    def __init__(self) -> None:
        self.start = self.bytes = 0

    def on_train_batch_start(self, *_: Any) -> None:
        """Forget the peak so far."""
        self.start = reset_peak()

    def on_train_batch_end(self, *_: Any) -> None:
        """Measure."""
        self.bytes = memory("VmHWM") - self.start


def step_peak(settings: Settings, kind: str, mask: str) -> int:
    """Memory that one step takes beyond what is there before. For a process of its own."""
    peak = StepPeak()
    unlearn(settings, kind, mask, [peak], max_steps=1)
    return peak.bytes


def measure_logits(settings: Settings) -> list[Result]:
    """Row 7: memory of a step with Llama-3's vocabulary, beside that with logits of whole batches."""
    texts = (row[column] for row in bundled("retain") for column in ("question", "answer"))
    model = create_tiny_llama(f"{settings.scratch}/wide", texts, hidden_size=128, layers=2)
    lm = models.load_model(str(model))
    lm.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    lm.save_pretrained(model)
    wide = replace(settings, model=str(model), batch_size=16)
    mask = write_mask(wide, 0.05)

    def side(kind: str) -> Any:
        return lambda: in_fresh_process(wide, "step_peak", kind=kind, mask=mask)

    sides = {"chunks": side("GradDiff"), "whole": side("WholeLogits")}
    peaks = alternate(settings, sides)
    at = {name: median(values) for name, values in peaks.items()}
    raw = {"step_bytes": peaks, "vocabulary": VOCABULARY, "batch_size": wide.batch_size}
    return [result("logits", at["chunks"] / at["whole"], 0.6, False, "x whole logits", raw)]


class StateBytes(L.Callback):
    """Counts what the optimiser keeps after its first step."""

    def __init__(self) -> None:
        self.bytes = self.values = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: UnlearnModule, *_: Any) -> None:
        """Count state and places of the values; not the values and their gradients."""
        (optimizer,) = trainer.optimizers
        kept = {id(tensor): tensor for tensor in tensors_in(dict(optimizer.state))}
        self.bytes = sum(t.nbytes for t in kept.values() if not isinstance(t, nn.Parameter))
        partial = [t for t in module.selected.tensors.values() if t.is_partial]
        # rows and columns need none
        places = sum(4 * tensor.count for tensor in partial if tensor.lines is None)  # int32
        self.bytes += places
        values = (t.values for t in module.selected.tensors.values() if t.values is not None)
        self.values = places + sum(value.nbytes for value in values)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts' values, lists and tuples."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def measure_optimizer_state(settings: Settings) -> list[Result]:
    """Row 5: bytes of MaskedAdamW's state at density 0.1 against dense."""
    masks = {"dense": None, **{by: write_mask(settings, 0.1, by) for by in ("random", "magnitude")}}
    kept = {}
    for name, mask in masks.items():
        count = StateBytes()
        unlearn(settings, mask=mask, callbacks=[count], max_steps=1)
        kept[name] = count.bytes
    raw = {
        "state_bytes": kept,
        "ratio_magnitude_mask": kept["magnitude"] / kept["dense"],
        "counts": "state and places of the values",
    }
    return [result("optimizer_state", kept["random"] / kept["dense"], 0.25, False, "x dense", raw)]


def measure_padded(settings: Settings) -> list[Result]:
    """Row 6: epochs over rows padded to their batch against rows padded to a fixed length, one at a time."""

    def ours() -> float:
        times = unlearn(settings, batch_size=GLOBAL_BATCH, max_epochs=EPOCHS)
        return times.ends[-1] - times.starts[0]

    runs = alternate(settings, {"ours": ours, "padded": lambda: padded_epochs(settings)})
    pairs, whole = settings.baseline_rows, settings.baseline_rows >= settings.rows
    scaled = f"the padded loop was timed on {pairs} of {EPOCHS * settings.rows} pairs of rows and scaled linearly"
    raw = {
        "seconds": runs,
        "scaled": f"the padded loop ran one of {EPOCHS} epochs" if whole else scaled,
        "epochs": EPOCHS,
        "objective": "GradDiff, dense",
        "global_batch": GLOBAL_BATCH,
    }
    ratio = median(run["total"] for run in runs["padded"]) / median(runs["ours"])
    return [result("padded_epochs", ratio, 4, True, "x faster than padded", raw)]


def padded_epochs(settings: Settings) -> dict[str, float]:
    """The baseline: GradDiff in a plain loop, rows padded, batch 1, accumulated; the first pair warms up.

    Returns:
        Seconds as ``measured``, and their ``total`` when scaled to all pairs of all epochs.
    """
    lm = models.load_model(settings.model).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    files = (settings.forget, settings.retain)
    sets = (padded_rows(settings, file, settings.baseline_rows) for file in files)
    pairs = list(zip(*sets, strict=True))
    started = 0.0
    for number, pair in enumerate([pairs[0], *pairs]):
        with autocast():
            forget, retain = (lm(**row, use_cache=False).loss for row in pair)
        ((retain - forget) / GLOBAL_BATCH).backward()
        if number % GLOBAL_BATCH == 0:
            optimizer.step()
            optimizer.zero_grad()
        if number == 0:
            started = time.perf_counter()
    measured = time.perf_counter() - started
    return {"measured": measured, "total": measured * EPOCHS * settings.rows / len(pairs)}


# -- training against a bare loop --------------------------------------------------------------------------------------


class Trained(FinetuneModule):
    """Fine-tuning that writes no model."""

    def export(self, record: dict[str, Any]) -> None:
        """Leave it."""


def train(settings: Settings, **options: Any) -> BatchTimes:
    """Fine-tuning on all rows once; the times of its steps, and its batches."""
    output = str(Path(settings.scratch) / "run" / "trained")
    module = Trained(model=settings.model, output=output, overwrite=True, lr=LR, **options)
    times = BatchTimes(keep=True)
    fit(module, settings, [times], max_epochs=1)
    return times


def tokens_per_second(times: BatchTimes) -> float:
    """Of every batch but the first, with what lies between batches."""
    return sum(times.tokens[1:]) / (times.ends[-1] - times.starts[1])


def bare_training(settings: Settings, batches: Sequence[Any]) -> float:
    """Tokens a second of a plain loop over packed rows, with logits of answers alone; the first batch warms up."""
    lm = models.load_model(settings.model).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LR, fused=True)
    started = 0.0
    for number, batch in enumerate(batches):
        if number == 1:
            started = time.perf_counter()
        (rows,) = batch.values()
        mask = rows["labels"][:, 1:] != -100
        with autocast():
            logits = lm(
                input_ids=rows["packed_ids"],
                position_ids=rows["packed_positions"],
                logits_to_keep=rows["packed_places"],
                use_cache=False,
            ).logits[0]
        losses = nn.functional.cross_entropy(
            logits.float(), rows["labels"][:, 1:][mask], reduction="none"
        )
        by_row = torch.zeros(mask.shape).masked_scatter(mask, losses).sum(-1) / mask.sum(-1)
        by_row.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    elapsed = time.perf_counter() - started
    return sum(count_tokens(batch) for batch in batches[1:]) / elapsed


def measure_training(settings: Settings) -> list[Result]:
    """Row 7: fine-tuning in bf16 against a bare loop over the same packed rows, and against matrix products alone."""
    batches: list[Any] = []

    def packed() -> float:
        times = train(settings, packing=True)
        batches[:] = times.batches
        return tokens_per_second(times)

    def width() -> list[int]:
        return [next(iter(batch.values()))["packed_ids"].numel() for batch in batches[1:]]

    sides: dict[str, Any] = {
        "packed": packed,
        "padded": lambda: tokens_per_second(train(settings)),
        "eager": lambda: tokens_per_second(train(settings, attn_implementation="eager")),
        "bare": lambda: bare_training(settings, batches),
        "products": lambda: products_per_second(settings.model, int(median(width()))),
    }
    found = alternate(settings, sides)
    at = {name: median(values) for name, values in found.items()}
    shapes = shapes_of(settings.model)
    of_blocks = sum(prod(s) for n, s in shapes.items() if len(s) == 2 and "layers" in n)
    head = prod(shapes["model.embed_tokens.weight"])
    places = (next(iter(batch.values()))["packed_places"] for batch in batches[1:])
    share = sum(of_batch.numel() for of_batch in places) / sum(width())
    per_token = 6 * (of_blocks + share * head)
    raw = {
        "tokens_per_second": {n: v for n, v in found.items() if n != "products"},
        "products_per_second": found["products"],
        "operations_per_token": per_token,
        "share_of_products": {
            n: at[n] * per_token / at["products"] for n in ("packed", "padded", "eager", "bare")
        },
        "counts": "products with weights, forward and backward; not attention, norms and the optimiser",
    }
    best = max(at["packed"], at["padded"], at["eager"])
    return [
        result("training/speed", best / at["bare"], 1.0, True, "x a bare loop's tokens/s", raw),
        result(
            "training/products",
            best * per_token / at["products"],
            0.7,
            True,
            "of matrix products",
            {},
        ),
    ]


ROWS = {
    "masked_step": measure_masked_step,
    "units": measure_units,
    "units_memory": measure_units_memory,
    "precisions": measure_precisions,
    "npo_step": measure_npo_step,
    "npo_memory": measure_npo_memory,
    "optimizer_state": measure_optimizer_state,
    "padded": measure_padded,
    "training": measure_training,
    "logits": measure_logits,
}
CHILDREN = {
    "unlearning_peak": unlearning_peak,
    "step_peak": step_peak,
    "bytes_beyond_weights": bytes_beyond_weights,
}

if __name__ == "__main__":
    main("unlearning", ROWS, CHILDREN)
