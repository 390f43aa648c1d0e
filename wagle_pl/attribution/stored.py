"""Scores on disk, so that a mask of another density takes seconds and not another pass.

A folder with a safetensors file, one tensor a parameter, and ``index.json``: what made them, for
which model, and which file holds which parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wagle_pl.attribution import selection
from wagle_pl.attribution.selection import Ranking, Scope, eligible_names
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.core.tensorfiles import write_tensors
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import filled_bits

FORMAT = "wagle_pl.scores"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
SCORES_FILE = "scores-00001.safetensors"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_scores(
    folder: str | Path,
    scores: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    made_by: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder of scores, a tensor at a time and atomically.

    Args:
        folder: replaced if it exists.
        scores: (parameter name, scores of its shape) of every parameter, in the order of shapes.
        shapes: parameter name -> shape.
        made_by: JSON-serialisable; :func:`mask_from_scores` reads ``model_fingerprint`` and
            ``absolute`` (ranked by absolute value).
        dtype: of the file. In bf16 weights whose scores differ by less than 1/256 may tie.
    """
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    metadata = header | {"shapes": json.dumps(shapes), "made_by": json.dumps(made_by)}
    remaining = iter(scores)
    tensors = [(name, dtype, shape, lambda: next(remaining)[1]) for name, shape in shapes.items()]
    with atomic_path(Path(folder)) as temporary:
        temporary.mkdir()
        write_tensors(temporary / SCORES_FILE, tensors, metadata)
        files = dict.fromkeys(shapes, SCORES_FILE)
        index = {**header, "shapes": shapes, "made_by": made_by, "files": files}
        (temporary / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


class StoredScores:
    """A folder of scores, read a tensor at a time.

    Args:
        folder: that :func:`write_scores` wrote, or a file in it.

    Raises:
        WagleError: if it is no such folder, or of a newer format.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.folder = folder.parent if folder.is_file() else folder
        index_file = self.folder / INDEX_FILE
        if not index_file.is_file():
            raise WagleError(
                f"{folder} is no folder of scores (it has no {INDEX_FILE})",
                hint="give what save_scores wrote",
            )
        try:
            index = json.loads(index_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WagleError(f"{index_file} is malformed: {error}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise WagleError(f"{index_file} is not of wagle_pl scores")
        if int(index["format_version"]) > FORMAT_VERSION:
            raise WagleError(
                f"{index_file} has format {index['format_version']}; this version reads "
                f"{FORMAT_VERSION}"
            )
        self.shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        self.made_by: dict[str, Any] = index["made_by"]
        self._files: dict[str, str] = index["files"]

    def stream(self, names: Optional[Iterable[str]] = None) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, float32 scores), of all parameters or of some, in order.

        Raises:
            WagleError: if a file is missing or truncated.
        """
        for name in self.shapes if names is None else names:
            path = self.folder / self._files[name]
            try:
                with safe_open(path, framework="pt") as file:
                    scores = file.get_tensor(name).float()
            except (SafetensorError, OSError) as error:
                raise WagleError(f"{path} is missing or not whole: {error}") from None
            yield name, scores


def mask_from_scores(
    path: str | Path,
    density: float,
    select: str = "high",
    scope: Scope = "global",
    include: Optional[str] = None,
    exclude: Optional[str] = None,
) -> WeightMask:
    """The mask of stored scores at another density: that of the pass itself if they are in fp32.

    Args:
        path: folder of scores.
        density: share of the eligible weights, in (0, 1].
        select: the ``high`` or the ``low`` end of the ranking.
        scope: what competes, see :func:`wagle_pl.attribution.selection.select`.
        include: regular expression; only parameters in whose name it is found are eligible.
        exclude: regular expression; parameters in whose name it is found are not.

    Raises:
        WagleError: if there are no scores there, or an option has no meaning.
    """
    if select not in ("high", "low"):
        raise WagleError(f"must be high or low, got {select!r}", option="select")
    stored = StoredScores(path)
    names = eligible_names(stored.shapes, include, exclude)
    ranking = Ranking(stored.made_by.get("absolute", True), low=select == "low")
    chosen = selection.select(lambda: stored.stream(names), density, ranking, scope)
    made_by = {key: value for key, value in stored.made_by.items() if key != "absolute"}
    options = {"density": density, "select": select, "scope": scope}
    options |= {"include": include, "exclude": exclude}
    return whole_mask(dict(chosen), stored.shapes, made_by | options)


def whole_mask(
    packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, Any]
) -> WeightMask:
    """A mask of all parameters, in their order: those that were not eligible are frozen."""
    frozen = {n: filled_bits(prod(shape), False) for n, shape in shapes.items() if n not in packed}
    return WeightMask({name: {**frozen, **packed}[name] for name in shapes}, shapes, metadata)
