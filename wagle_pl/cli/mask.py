"""``wagle mask``: inspect, compare, combine, convert, make, split and plot masks."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Optional

from wagle_pl.cli import LazyModule
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.text import fields, table

# its classes are no types to mypy: under TYPE_CHECKING, the parser of the options would import them
masks = LazyModule("wagle_pl.masks")
figures = LazyModule("wagle_pl.lab.study.report.figures")

TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def info(file: str, *, tensors: bool = False) -> None:
    """Show how many weights a mask selects, in which modules, and how it was made.

    Args:
        file: mask file.
        tensors: also list every parameter tensor.
    """
    from wagle_pl.masks.grid import mask_text
    from wagle_pl.masks.names import module_type_of

    mask = masks.WeightMask.load(file)
    size, made = mask.source.stat().st_size, mask.metadata
    about = [
        ("file", f"{mask.source} ({size:,} bytes, {size / mask.total:.4f} per weight)"),
        ("made by", mask.origin),
        ("model", made.get("model") or "unknown"),
        ("fingerprint", (made.get("model_fingerprint") or "none: not checked before use")[:28]),
        *(("prompts", json.dumps(prompts, ensure_ascii=False)) for prompts in mask.prompts),
    ]
    passes, rows = made.get("passes"), made.get("forget_rows")
    if passes is not None and rows is not None:
        seen = f"{passes:.4g} ({passes * rows:,.0f} rows seen, {rows:,} forget rows)"
        about.append(("passes", seen))
    about += [
        ("weights", f"{mask.total:,} in {len(mask)} tensors"),
        ("selected", f"{mask.count():,}"),
        ("density", f"{mask.density:.6f}"),
    ]
    parts = [fields(about), _shares("module", mask.tally(module_type_of))]
    unit = made.get("unit") or "unknown"
    if units := made.get("units"):
        rows = [[layer, f"{n:,}", f"{chosen:,}"] for layer, (chosen, n) in units.items()]
        parts.append(table(["layer", f"{unit} units", "selected"], rows))
    if modules := dict.fromkeys(map(module_type_of, made.get("as_rows") or ())):
        parts.append(f"rows take the place of a {unit} in {', '.join(modules)}")
    parts.append(mask_text({"share selected by layer and module type": mask.grid()}))
    if tensors:
        parts.append(_shares("tensor", mask.tally(str)))
    print("\n\n".join(parts))


def compare(files: list[str]) -> None:
    """Compare densities and overlaps of masks of one model; also shows the overlap by chance.

    Args:
        files: two or more mask files.
    """
    named = _load_all(files)
    if len(named) < 2:
        raise WagleError("compare needs two masks or more")
    rows = [[name, f"{m.count():,}", f"{m.density:.6f}", m.origin] for name, m in named.items()]
    pairs = []
    for left, right in combinations(named, 2):
        jaccard = named[left].jaccard(named[right])
        expected = masks.expected_jaccard(named[left].density, named[right].density)
        times = f"{jaccard / expected:.2f}" if expected else "–"
        pairs.append([f"{left}, {right}", f"{jaccard:.6f}", f"{expected:.6f}", times])
    print(table(["mask", "selected", "density", "made by"], rows, left=(0, 3)))
    print()
    print(table(["pair", "Jaccard", "if independent", "ratio"], pairs))


def combine(
    left: str,
    how: Literal["and", "or", "minus"],
    right: str,
    *,
    output: str,
    overwrite: bool = False,
) -> None:
    """Combine two masks of one model, e.g. ``combine a and b -o both``.

    Args:
        left: mask file.
        how: and: selected in both; or: in one or both; minus: in left and not in right.
        right: mask file.
        output: mask file to write.
    """
    operation = {"and": operator.and_, "or": operator.or_, "minus": operator.sub}[how]
    load = masks.WeightMask.load
    _write(lambda: operation(load(left), load(right)), output, overwrite)


def invert(file: str, *, output: str, overwrite: bool = False) -> None:
    """Swap selected and frozen weights of a mask.

    Args:
        file: mask file.
        output: mask file to write.
    """
    _write(lambda: ~masks.WeightMask.load(file), output, overwrite)


def convert(
    file: str, *, output: str, model: Optional[str] = None, overwrite: bool = False
) -> None:
    """Convert a mask to or from a torch file, or to another model.

    Args:
        file: mask to convert. The suffix gives the format: .safetensors is a mask of this package;
            .pt, .pth or .bin a dict {parameter name: bool tensor} written by torch.save.
        output: file to write, likewise.
        model: model the mask is for; names and shapes of its tensors are checked. A mask made from
            a torch file gets its parameter order and fingerprint; without a fingerprint the mask is
            accepted for any model. From .safetensors to .safetensors, the mask is written for this
            model.
    """
    from_torch, to_torch = map(_is_torch, (file, output))
    if from_torch == to_torch and (from_torch or model is None):
        hint = None if from_torch else "give --model to write the mask for another model"
        message = f"{file} and {output} are of the same format: nothing to convert"
        raise WagleError(message, hint=hint)
    if to_torch:
        refuse_existing(Path(output), overwrite, "--overwrite")
        mask = masks.WeightMask.load(file)
        if model is not None:
            shapes, made_for = _model(model)
            mask.check(shapes, made_for["model_fingerprint"])
        _report(mask, mask.to_torch(output))
        return

    def converted() -> masks.WeightMask:  # type: ignore[name-defined]
        shapes, made_for = _model(model) if model else (None, {})
        if from_torch:
            return masks.WeightMask.from_torch(file, shapes, made_for)
        return masks.WeightMask.load(file).moved(shapes, made_for)

    _write(converted, output, overwrite)


def _is_torch(path: str) -> bool:
    """Whether a file is in torch's format, and not in this package's."""
    suffix = Path(path).suffix
    if suffix not in (masks.SUFFIX, *TORCH_SUFFIXES):
        formats = f"{masks.SUFFIX} or {', '.join(TORCH_SUFFIXES)}"
        raise WagleError(f"{path}: no mask format has this suffix; use {formats}")
    return suffix != masks.SUFFIX


def random(like: str, *, output: str, seed: int = 0, overwrite: bool = False) -> None:
    """Write a random mask with as many selected weights as another mask, as a control.

    Args:
        like: mask file.
        output: mask file to write.
        seed: random seed.
    """
    _write(lambda: masks.WeightMask.load(like).random_like(seed), output, overwrite)


def split(file: str, *, output: str, parts: int, seed: int = 0, overwrite: bool = False) -> None:
    """Split a mask into disjoint masks of equal size, drawn at random from every tensor.

    A mask of whole rows or columns is split into whole rows or columns. Parts that are trained
    apart, each from the base within its mask, can be stacked and deleted as patches.

    Args:
        file: mask file.
        output: folder to write part-1.safetensors, part-2.safetensors, ... to.
        parts: number of masks.
        seed: random seed.
    """
    from wagle_pl.masks.parts import split

    refuse_existing(Path(output), overwrite, "--overwrite", kind="files")
    for number, mask in enumerate(split(masks.WeightMask.load(file), parts, seed), 1):
        _report(mask, mask.save(Path(output) / f"part-{number}"))


def select(
    scores: str,
    *,
    density: float,
    select: Literal["high", "low"] = "high",
    scope: Literal["global", "tensor", "row"] = "global",
    unit: str = "weight",
    pool: Literal["mean", "sum", "max", "norm"] = "mean",
    include: Optional[str] = None,
    exclude: Optional[str] = None,
    output: str,
    overwrite: bool = False,
) -> None:
    """Make a mask from saved scores, e.g. of another density, without a new attribution.

    Args:
        scores: file of scores that attribution saved.
        density: share of weights to select, in (0, 1].
        select: take the highest or the lowest scores.
        scope: density of all weights together, of each tensor, or of each row of a tensor.
        unit: select whole units: weight, row, column, head, neuron, block:RxC, tensor or layer.
        pool: score of a unit, from those of its weights.
        include: regular expression; only parameters whose name matches may be selected.
        exclude: regular expression; parameters whose name matches are not selected.
        output: mask file to write.
    """
    from wagle_pl.attribution import mask_from_scores

    options = {"select": select, "scope": scope, "unit": unit, "pool": pool}
    options |= {"include": include, "exclude": exclude}
    _write(lambda: mask_from_scores(scores, density, **options), output, overwrite)


def plot(
    files: list[str], *, output: str, title: Optional[str] = None, overwrite: bool = False
) -> None:
    """Plot the share of selected weights by layer and module type, several masks side by side.

    Args:
        files: mask files.
        output: figure to write: .png, .svg, or no suffix for both.
        title: title of the figure.
    """
    paths = figures.figure_paths(output, overwrite)
    named = _load_all(files)
    grids = {f"{name}\n{mask.density:.2%} selected": mask.grid() for name, mask in named.items()}
    figures.save_figure(figures.mask_heatmap(grids, title), paths)
    print(f"figure written to {' and '.join(str(path) for path in paths)}")


VERBS = {
    verb.__name__: verb
    for verb in (info, compare, combine, invert, convert, random, split, select, plot)
}


def _load_all(files: list[str]) -> dict[str, masks.WeightMask]:  # type: ignore[name-defined]
    """Masks by name: the file's stem if all stems differ, else its path."""
    loaded = [masks.WeightMask.load(file) for file in files]
    stems = [mask.source.stem for mask in loaded]
    if len(set(stems)) < len(stems):
        stems = [str(mask.source.with_suffix("")) for mask in loaded]
    named = dict(zip(stems, loaded, strict=True))
    if len(named) < len(loaded):
        raise WagleError("the same mask file is given twice")
    return named


def _model(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of a model's parameters, and the metadata of a mask for it."""
    import torch

    from wagle_pl.core.weights import fingerprint, parameter_shapes
    from wagle_pl.lm.models import load_model

    model = load_model(name, torch.bfloat16)
    made_for = {"model": name, "model_fingerprint": fingerprint(model)}
    return parameter_shapes(model), made_for


def _shares(group: str, tally: dict[str, tuple[int, int]]) -> str:
    rows = [
        [name, f"{size:,}", f"{selected:,}", f"{selected / max(1, size):.6f}"]
        for name, (selected, size) in tally.items()
    ]
    return table([group, "weights", "selected", "density"], rows)


def _write(make: Callable[[], masks.WeightMask], output: str, overwrite: bool) -> None:  # type: ignore[name-defined]
    """Write a mask that is made once its file may be written."""
    refuse_existing(masks.mask_path(output), overwrite, "--overwrite")
    mask = make()
    _report(mask, mask.save(output))


def _report(mask: masks.WeightMask, path: Path) -> None:  # type: ignore[name-defined]
    print(f"mask of {mask.count():,} weights (density {mask.density:.6f}) written to {path}")
