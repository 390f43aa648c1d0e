"""Scores on disk, and masks made from them in seconds, without another pass.

A safetensors file has the scores of every parameter, in its shape; its metadata say how they were
made, and for which model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor

from wagle_pl.attribution.scoring import MaskSpec, masks_of
from wagle_pl.attribution.sums import Shard
from wagle_pl.attribution.units import Geometry
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.records import MadeBy
from wagle_pl.core.tensorfiles import TensorFile, fill, lay_out, sealed
from wagle_pl.masks import WeightMask

FORMAT_VERSION = 3  # earlier ones were folders, with a file for each rank


class Header(TypedDict):
    """Metadata of a file of scores."""

    made_by: MadeBy


def write_scores(
    path: str | Path,
    scores: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    made_by: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a file of scores atomically, one tensor at a time; an existing one is replaced.
    Collective: each rank writes its rows.

    Args:
        path: on a disk that the ranks share.
        scores: (parameter name, scores of this rank's rows) of every parameter of ``shapes``.
        made_by: metadata for masks made from them, and ``absolute`` (ranked by absolute value).
        dtype: of the file. In bf16, weights whose scores differ by less than 1/256 may tie.
    """
    header = {"format": "wagle_pl.scores", "format_version": str(FORMAT_VERSION)}
    metadata = sealed({**header, "made_by": json.dumps(made_by)})
    tensors = [(name, dtype, shape) for name, shape in shapes.items()]
    create = partial(lay_out, tensors=tensors, metadata=metadata)
    parts = ((name, Shard(shapes[name]).first, values) for name, values in scores)
    with distributed.shared_output(Path(path), create) as temporary:
        try:
            fill(temporary, parts)
        except OSError:
            for _ in parts:  # other ranks may need this one for them
                pass
            raise
    return Path(path)


class StoredScores:
    """A file that :func:`write_scores` wrote, read one tensor at a time."""

    def __init__(self, path: str | Path) -> None:
        file = TensorFile(Path(path), "scores")
        self.path = file.path
        self.made_by = file.header("scores", FORMAT_VERSION, Header)["made_by"]
        self.shapes = {name: file.shape(name) for name in file.names}

    def stream(self, names: Optional[Iterable[str]] = None) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, float32 scores), of all parameters or of some, in order."""
        with safe_open(self.path, framework="pt") as stored:
            for name in self.shapes if names is None else names:
                yield name, stored.get_tensor(name).float()


def mask_from_scores(path: str | Path, density: float, **options: Any) -> WeightMask:
    """The mask from a file of scores; if they are in fp32, the same as from the pass.

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
