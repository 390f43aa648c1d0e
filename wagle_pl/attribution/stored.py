"""Scores on disk, and masks made from them in seconds, without another pass.

A folder has one safetensors file per rank, which holds its rows of every parameter, and
``index.json``: how the scores were made, for which model, and which files hold which parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, Optional, TypedDict, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wagle_pl.attribution.scoring import MaskSpec, masks_of
from wagle_pl.attribution.sums import Shard
from wagle_pl.attribution.units import Geometry
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.reading import read_json
from wagle_pl.core.records import MadeBy
from wagle_pl.core.schema import Count
from wagle_pl.core.tensorfiles import check_version, write_tensors
from wagle_pl.masks import WeightMask

FORMAT = "wagle_pl.scores"
FORMAT_VERSION = 2
INDEX_FILE = "index.json"
SCORES_FILE = "scores-{:05d}.safetensors"  # of a rank, from 1


def write_scores(
    folder: str | Path,
    scores: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    made_by: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder of scores atomically, one tensor at a time; an existing one is replaced.
    Collective: each rank writes a file with its rows.

    Args:
        folder: on a disk that the ranks share.
        scores: (parameter name, scores of this rank's rows) of every parameter of ``shapes``.
        made_by: metadata for masks made from them, and ``absolute`` (ranked by absolute value).
        dtype: of the file. In bf16, weights whose scores differ by less than 1/256 may tie.
    """
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    metadata = header | {"shapes": json.dumps(shapes), "made_by": json.dumps(made_by)}
    ranks = range(distributed.world_size())
    files = {
        name: [SCORES_FILE.format(r + 1) for r in ranks if prod(Shard(shape, r, len(ranks)).part)]
        for name, shape in shapes.items()
    }
    remaining = iter(scores)
    tensors = [
        (name, dtype, Shard(shape).part, lambda: next(remaining)[1])
        for name, shape in shapes.items()
    ]
    with distributed.shared_folder(Path(folder)) as temporary:
        try:
            write_tensors(temporary / SCORES_FILE.format(distributed.rank() + 1), tensors, metadata)
        except OSError:
            for _ in remaining:  # other ranks may need this one for them
                pass
            raise
        if distributed.rank() == 0:
            index = {**header, "shapes": shapes, "made_by": made_by, "files": files}
            text = json.dumps(index, indent=1) + "\n"
            (temporary / INDEX_FILE).write_text(text, encoding="utf-8")
    return Path(folder)


class Index(TypedDict):
    """``index.json`` of a folder of scores."""

    format: Literal["wagle_pl.scores"]
    format_version: Union[str, int]
    shapes: dict[str, list[Count]]
    made_by: MadeBy
    files: dict[str, list[str]]


class StoredScores:
    """A folder that :func:`write_scores` wrote, or a file in it; read one tensor at a time."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.folder = folder.parent if folder.is_file() else folder
        try:
            index = read_json(self.folder / INDEX_FILE, Index, "index")
        except WagleError as error:
            raise WagleError(
                f"{folder} is no folder of scores ({error})", hint="give what save_scores wrote"
            ) from None
        check_version(index["format_version"], FORMAT_VERSION, f"{folder} has")
        self.shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        self.made_by = index["made_by"]
        self._files = index["files"]
        for name in self.shapes.keys() ^ self._files.keys():
            raise WagleError(f"scores {folder} are damaged: {name} has no shape or no file")

    def stream(self, names: Optional[Iterable[str]] = None) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, float32 scores), of all parameters or of some, in order."""
        for name in self.shapes if names is None else names:
            rows = []
            for file in self._files[name]:
                path = self.folder / file
                try:
                    with safe_open(path, framework="pt") as stored:
                        rows.append(stored.get_tensor(name).float())
                except (SafetensorError, OSError) as error:
                    raise WagleError(f"{path} is missing or not whole: {error}") from None
            columns = {row.shape[1:] for row in rows}
            if len(columns) > 1 or sum(row.numel() for row in rows) != prod(self.shapes[name]):
                raise WagleError(f"scores {self.folder} are damaged: {name} is of another shape")
            scores = rows[0] if len(rows) == 1 else torch.cat(rows or [torch.empty(0)])
            yield name, scores.view(self.shapes[name])


def mask_from_scores(path: str | Path, density: float, **options: Any) -> WeightMask:
    """The mask from a folder of scores; if they are in fp32, the same as from the pass.

    Args:
        **options: ``select``, ``scope``, ``unit``, ``pool``, ``include`` and ``exclude`` of
            :class:`~wagle_pl.attribution.AttributionModule`.
    """
    defaults = {"select": "high", "scope": "global", "unit": "weight", "pool": "mean"}
    spec = MaskSpec(**{**defaults, **options, "density": density})
    spec.check()
    stored = StoredScores(path)
    made_by = dict(stored.made_by)
    if spec.unit != "weight" and made_by.get("score") == "Random":
        hint = "run attribution with this unit"
        raise WagleError("random scores are not drawn for units", option="unit", hint=hint)
    sizes, absolute = made_by.pop("geometry", None), made_by.pop("absolute", True)
    geometry = Geometry(*(sizes[name] for name in Geometry._fields)) if sizes else None
    made = masks_of([spec], stored.stream, stored.shapes, made_by, absolute, geometry)
    return next(mask for _, mask in made)
