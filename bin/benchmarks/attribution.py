"""``bin/bench attribution``: exact selection, the gradient pass, a whole attribution, memory, and the mask's file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Optional

import lightning as L
import torch
from common import (
    GIVE_BACK,
    BatchTimes,
    Result,
    Settings,
    alternate,
    autocast,
    count_tokens,
    fit,
    in_fresh_process,
    main,
    memory,
    padded_rows,
    random_llama,
    reset_peak,
    result,
    seconds,
    select,
    shapes_of,
)
from torch import Tensor

from wagle_pl.attribution import AttributionModule, MaskSpec
from wagle_pl.attribution.sums import runs_of
from wagle_pl.core.weights import fingerprint
from wagle_pl.lm import models
from wagle_pl.lm.inference import forward_answers, sequence_logprobs
from wagle_pl.lm.tiny import create_tiny_llama
from wagle_pl.masks import WeightMask

DENSITY = 0.2
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GAMMA = 1.0  # of the Hessian where the baseline estimates none


# -- selection --------------------------------------------------------------------------------------------------------


def random_scores(model: str) -> list[tuple[str, Tensor]]:
    """Scores for every weight of a model, heavy in the tails as products of weights and gradients are.

    Made in place: a measurement of memory must not find freed memory to live in.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(model)
    return [
        (name, torch.empty(shape).normal_(generator=generator).pow_(3))
        for name, shape in shapes.items()
    ]


def selection_extra(settings: Settings) -> dict[str, int]:
    """Bytes that selection needs beside the scores, its result included. For a process of its own."""
    list(select(lambda: [("a", torch.ones(1000))], DENSITY))  # what it imports and allocates once
    scores = random_scores(settings.model)
    before = reset_peak()
    selected = dict(select(lambda: scores, DENSITY))
    return {
        "extra_bytes": memory("VmHWM") - before,
        "result_bytes": sum(bits.numel() for bits in selected.values()),
        "scores": sum(tensor.numel() for _, tensor in scores),
    }


def measure_selection(settings: Settings) -> list[Result]:
    """Row 1: ``select`` against two sorts of all scores (the order, and from it every weight's rank)."""
    extra = in_fresh_process(settings, "selection_extra")
    scores = random_scores(settings.model)
    flat = torch.cat([tensor.view(-1) for _, tensor in scores])
    k = int(DENSITY * len(flat))
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = dict(select(lambda: scores, DENSITY))

    def sorts() -> None:
        found["sorts"] = flat.abs().argsort(descending=True).argsort() < k

    sides = {"ours": lambda: seconds(ours), "two_argsorts": lambda: seconds(sorts)}
    times = alternate(settings, sides)
    mask = WeightMask(found["ours"], {name: tensor.shape for name, tensor in scores})
    parts = found["sorts"].split([tensor.numel() for _, tensor in scores])
    pairs = zip(mask, parts, strict=True)
    differ = sum(int((mask[name].view(-1) != part).sum()) for name, part in pairs)
    raw = {"seconds": times, "scores": len(flat), "density": DENSITY}
    raw |= {"selected": mask.count(), "expected": k, "bits_that_differ": differ}
    raw["note"] = "argsort breaks ties at the threshold in any order: bits may differ in pairs"
    ratio = median(times["two_argsorts"]) / median(times["ours"])
    bytes_each = extra["extra_bytes"] / extra["scores"]
    return [
        result("selection/speed", ratio, 25, True, "x two argsorts", raw),
        result("selection/memory", bytes_each, 1, False, "bytes a score", extra),
    ]


# -- the gradient pass ------------------------------------------------------------------------------------------------


def attribution(settings: Settings, name: str, **options: Any) -> AttributionModule:
    """A module that writes to the scratch folder; by default WAGLE's score with a scalar γ, two gradients."""
    usual = {} if "hessian" in options else {"hessian": "scalar", "gamma": GAMMA}
    output = str(Path(settings.scratch) / name)
    return AttributionModule(
        model=settings.model, output=output, overwrite=True, **usual, **options
    )


def measure_gradient_pass(settings: Settings) -> list[Result]:
    """Row 2: the module's training loop under the Trainer against forward and backward in a bare loop.

    The bar is held against a loop that, like the module, projects answer positions alone onto the vocabulary; a loop
    that lets the model compute its loss over all positions is reported beside it.
    """
    lm = models.load_model(settings.model)
    name = fingerprint(lm)
    batches: list[Any] = []

    def trainer() -> float:
        module = attribution(settings, "pass")
        module.lm, module.model_fingerprint = lm, name
        times = BatchTimes(keep=True)
        fit(module, settings, [times], max_epochs=1)
        batches[:] = times.batches
        return sum(times.tokens[1:]) / (times.ends[-1] - times.starts[1])

    sides = {
        "trainer": trainer,
        "bare": lambda: bare_pass(lm, batches, same_logits=True),
        "bare_all_logits": lambda: bare_pass(lm, batches, same_logits=False),
    }
    speeds = alternate(settings, sides)
    at = {side: median(values) for side, values in speeds.items()}
    ratio, to_all_logits = (at["trainer"] / at[side] for side in ("bare", "bare_all_logits"))
    raw = {"tokens_per_second": speeds, "ratio_to_bare_all_logits": to_all_logits}
    raw["timed"] = "every batch but the first, with what lies between batches"
    return [result("gradient_pass", ratio, 0.9, True, "x a bare loop's tokens/s", raw)]


def bare_pass(lm: Any, batches: Sequence[Any], same_logits: bool) -> float:
    """Tokens a second of forward and backward over the batches; the first warms up."""
    lm.eval()
    lm.zero_grad()
    started = 0.0
    for number, batch in enumerate(batches):
        if number == 1:
            started = time.perf_counter()
        for tensors in batch.values():
            with autocast():
                loss = answer_loss(lm, tensors) if same_logits else model_loss(lm, tensors)
            loss.backward()
    elapsed = time.perf_counter() - started
    lm.zero_grad()
    return sum(count_tokens(batch) for batch in batches[1:]) / elapsed


def answer_loss(lm: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """Sum of the rows' mean losses, with logits of answer positions alone."""
    sums, counts = sequence_logprobs(forward_answers(lm, tensors), tensors["labels"])
    return -(sums / counts).sum()


def model_loss(lm: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """The loss that the model computes itself."""
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask", "labels")}
    return lm(**inputs, use_cache=False).loss


# -- a whole attribution ----------------------------------------------------------------------------------------------


def measure_whole(settings: Settings) -> list[Result]:
    """Row 3: from the model's folder to ten masks on disk, against a plain script."""
    masks = [MaskSpec(density=density) for density in DENSITIES]

    def ours(**options: Any) -> float:
        module = attribution(settings, "masks", masks=masks, **options)
        return seconds(lambda: fit(module, settings, max_epochs=1))

    sides = {"ours": ours, "plain_script": lambda: plain_script(settings)}
    runs = alternate(settings, sides)
    raw = {
        "seconds": runs,
        "seconds_with_hessian_auto": ours(hessian="auto"),
        "densities": DENSITIES,
        "hessian": f"scalar, gamma {GAMMA}, on both sides: two gradient passes and no estimate",
        "scaled": _scaling(settings),
        "timed": "all from loading the model to the last file; imports left out on both sides",
    }
    ratio = median(run["total"] for run in runs["plain_script"]) / median(runs["ours"])
    return [result("whole_attribution", ratio, 10, True, "x a plain script", raw)]


def _scaling(settings: Settings) -> Optional[str]:
    if settings.baseline_rows >= settings.rows and settings.baseline_densities >= len(DENSITIES):
        return None
    return (
        f"the plain script's passes were timed on {settings.baseline_rows} of {settings.rows} rows each, its sorts and "
        f"files on {settings.baseline_densities} of {len(DENSITIES)} densities, and scaled linearly to all"
    )


def plain_script(settings: Settings) -> dict[str, float]:
    """The baseline: rows padded and one at a time, two passes, and a density at a time two sorts and a file of bools.

    Returns:
        Seconds by stage as measured, and ``total``, in which passes and densities are scaled to all of them.
    """
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    lm = models.load_model(settings.model).eval()
    files = (settings.forget, settings.retain)
    sets = [padded_rows(settings, file, settings.baseline_rows) for file in files]
    times = {"load": lap()}
    gradients = []
    for rows in sets:
        for row in rows:
            with autocast():
                loss = model_loss(lm, row)
            loss.backward()
        gradients.append([parameter.grad / len(rows) for parameter in lm.parameters()])
        lm.zero_grad()
    times["passes"] = lap()
    with torch.no_grad():
        weights = zip(lm.parameters(), *gradients, strict=True)
        scores = torch.cat([((w - g_r / GAMMA) * g_f).abs().view(-1) for w, g_f, g_r in weights])
    times["scores"] = lap()
    shapes = {name: parameter.shape for name, parameter in lm.named_parameters()}
    for density in DENSITIES[: settings.baseline_densities]:
        chosen = scores.argsort(descending=True).argsort() < int(density * len(scores))
        parts = chosen.split([shape.numel() for shape in shapes.values()])
        bools = {
            name: part.view(shape).clone()
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        torch.save(bools, Path(settings.scratch) / f"plain-{density:g}.pt")
    times["densities"] = lap()
    passes = times["passes"] * settings.rows / settings.baseline_rows
    densities = times["densities"] * len(DENSITIES) / settings.baseline_densities
    return {**times, "total": times["load"] + passes + times["scores"] + densities}


def measure_units(settings: Settings) -> list[Result]:
    """A whole attribution of rows against one of single weights."""

    def side(unit: str) -> float:
        module = attribution(settings, unit, density=DENSITY, unit=unit)
        return seconds(lambda: fit(module, settings, max_epochs=1))

    runs = alternate(settings, {unit: partial(side, unit) for unit in ("weight", "row")})
    ratio = median(runs["row"]) / median(runs["weight"])
    return [result("units", ratio, 1.03, False, "x single weights", {"seconds": runs})]


# -- memory -----------------------------------------------------------------------------------------------------------


#: What is kept -> options of the module.
KEPT: dict[str, dict[str, Any]] = {
    "no_hessian": {"hessian": "scalar", "gamma": GAMMA},
    "auto": {"hessian": "auto"},
    "diagonal": {"hessian": "gauss_newton"},
}
BARS = {"no_hessian": 16, "auto": 16, "diagonal": 20}


class Floor(AttributionModule):
    """Weights and activations only: the same forward passes, their graphs alive, and no gradient."""

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> Tensor:
        """Run every stream forward; the graph goes with the loss."""
        for tensors in batch.values():
            answer_loss(self.lm, tensors)
        return torch.zeros((), requires_grad=True)  # Lightning takes its gradient

    def on_train_end(self) -> None:
        """Write nothing."""
        super(AttributionModule, self).on_train_end()


class PeakFromStart(L.Callback):
    """Forgets the peak that loading the model had."""

    def on_train_start(self, *_: Any) -> None:
        """The model is in memory, nothing else yet."""
        reset_peak()


def attribution_peak(settings: Settings, kept: str) -> int:
    """Peak memory of an attribution, mask written. For a process of its own."""
    if kept == "floor":
        output = str(Path(settings.scratch) / kept)
        module = Floor(model=settings.model, output=output, **KEPT["no_hessian"])
    else:
        module = attribution(settings, f"memory-{kept}", **KEPT[kept])
    fit(module, settings, [PeakFromStart()], max_epochs=1)
    return memory("VmHWM")


def measure_memory(settings: Settings) -> list[Result]:
    """Row 4: the peak beyond that of forward passes alone, each in processes of their own."""

    def side(kept: str) -> Any:
        return lambda: in_fresh_process(settings, "attribution_peak", kept=kept)

    peaks = alternate(settings, {kept: side(kept) for kept in ("floor", *KEPT)})
    weights = sum(prod(shape) for shape in shapes_of(settings.model).values())
    floor = "forward passes over the same batches, their graphs alive: weights and activations"
    common = {"floor": floor, "floor_bytes": peaks["floor"], "weights": weights}
    results = []
    for kept in KEPT:
        each = (median(peaks[kept]) - median(peaks["floor"])) / weights
        raw = {**common, "peak_bytes": peaks[kept]}
        results.append(result(f"memory/{kept}", each, BARS[kept], False, "bytes a weight", raw))
    return results


# -- where sums are ---------------------------------------------------------------------------------------------------


PASSES = 4
PLACES = ("floor", "device", "host", f"passes={PASSES}")


def llama_folder(settings: Settings) -> str:
    """Folder of a model of the settings' shape, in bf16, made once, with a tokenizer of the rows' own."""
    folder = Path(settings.scratch) / settings.shape
    if not folder.exists():
        text = [
            Path(file).read_text(encoding="utf-8") for file in (settings.forget, settings.retain)
        ]
        create_tiny_llama(folder, text, vocab_size=2048)
        torch.manual_seed(0)
        random_llama(settings.shape).save_pretrained(folder)
    return str(folder)


class OwnMemory(L.Callback):
    """Weights, and the peak of the pass beyond what the process holds when its first micro-batch has ended: libraries
    and, already, all sums. And the seconds of the pass. Making the masks is not part of it."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Take the weights out of their file, whose pages are in memory as far as they have been read."""
        parameters = list(module.lm.parameters())
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        self.weights, self.before = sum(p.nbytes for p in parameters), 0
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Begin to look."""
        self.before = self.before or reset_peak()

    def on_train_end(self, *_: Any) -> None:
        """The masks are still to be made."""
        self.seconds = time.perf_counter() - self.started
        self.bytes = memory("VmHWM") - self.before + self.weights


def sums_peak(settings: Settings, place: str) -> dict[str, float]:
    """What :class:`OwnMemory` finds of an attribution in bf16. For a process of its own."""
    settings.model, found = llama_folder(settings), OwnMemory()
    if place == "floor":
        output = str(Path(settings.scratch) / place)
        module = Floor(model=settings.model, output=output, **KEPT["no_hessian"])
    else:
        module = attribution(settings, place, sums=place)
    short = {"batch_size": 4, "limit_train_batches": 3}
    fit(module, settings, [found], max_epochs=1, precision="bf16-true", **short)
    return {"bytes": found.bytes, "seconds": found.seconds}


def measure_sums(settings: Settings) -> list[Result]:
    """Row 6: sums in host memory and in several passes, each in a process of its own, on a Llama with random weights.

    On a CPU the sums themselves are left out: what is left is what a GPU would hold. Its bar is forward passes alone.
    """
    os.environ |= {
        **GIVE_BACK,
        "OMP_NUM_THREADS": "1",
    }  # threads that spin would take hours beside other work
    model = llama_folder(settings)
    sides = {p: lambda p=p: in_fresh_process(settings, "sums_peak", place=p) for p in PLACES}
    runs = alternate(settings, sides)
    sizes = [prod(shape) for shape in shapes_of(model).values()]
    at = {place: median(run["bytes"] for run in runs[place]) for place in PLACES}
    times = {place: median(run["seconds"] for run in runs[place]) for place in PLACES}
    masks = [WeightMask.load(Path(settings.scratch) / place) for place in PLACES[1:]]
    raw = {"shape": settings.shape, "weights": sum(sizes), "precision": "bf16-true", "runs": runs}
    raw["same_masks"] = all(mask == masks[0] for mask in masks)
    raw["subtracted"] = "interpreter, libraries and sums"
    groups = [sum(sizes[i] for i in run) for run in runs_of(sizes, PASSES)]
    more = 8 * (max(groups) - groups[0])  # than the sums of the first pass
    on_device = {"host": at["host"], PLACES[-1]: at[PLACES[-1]] - more}
    limits = {"host": 1.5, PLACES[-1]: PASSES}
    results = []
    for place, size in on_device.items():
        memory_of = size / at["floor"]
        results.append(result(f"sums/{place}/memory", memory_of, 1.1, False, "x forward", raw))
        ratio = times[place] / times["device"]
        results.append(result(f"sums/{place}/time", ratio, limits[place], False, "x device", raw))
    return results


def measure_mask_file(settings: Settings) -> list[Result]:
    """Row 5: the file of one mask."""
    scores = random_scores(settings.model)
    mask = WeightMask(
        dict(select(lambda: scores, DENSITY)), {name: tensor.shape for name, tensor in scores}
    )
    size = mask.save(Path(settings.scratch) / "one.safetensors").stat().st_size
    raw = {"file_bytes": size, "weights": mask.total}
    return [result("mask_file", size / mask.total, 0.13, False, "bytes a weight", raw)]


ROWS = {
    "selection": measure_selection,
    "gradient_pass": measure_gradient_pass,
    "whole": measure_whole,
    "units": measure_units,
    "memory": measure_memory,
    "sums": measure_sums,
    "mask_file": measure_mask_file,
}
CHILDREN = {
    "selection_extra": selection_extra,
    "attribution_peak": attribution_peak,
    "sums_peak": sums_peak,
}

if __name__ == "__main__":
    main("attribution", ROWS, CHILDREN)
