"""Scores on disk, so that another density is a matter of seconds and not of another pass.

A folder of safetensors shards, one tensor a parameter, and ``index.json``, which says what made them, for which model,
and which shard holds which parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wagle_pl.attribution import selection
from wagle_pl.attribution.selection import Ranking, Scope
from wagle_pl.attribution.specs import taking_part
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.masks import WeightMask

FORMAT = "wagle_pl.scores"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARD_BYTES = 1 << 30


def write_scores(
    folder: str | Path,
    scores: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    made_by: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a folder of scores, a shard at a time; whole or not at all.

    Args:
        folder: where to; replaced if it exists (the caller has asked for it).
        scores: (parameter name, scores of its shape) of every parameter, in order.
        shapes: parameter name -> shape.
        made_by: JSON-serialisable; ``model_fingerprint`` and ``absolute`` (ranked by absolute value) are used again.
        dtype: of the file. In bf16 weights whose scores differ by less than 1/256 may tie.
        shard_bytes: a shard is closed when it holds this much.
    """
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    header |= {"shapes": json.dumps(shapes), "made_by": json.dumps(made_by)}
    with atomic_path(Path(folder)) as temporary:
        temporary.mkdir()
        places: dict[str, str] = {}
        shard: dict[str, Tensor] = {}
        size = 0

        def close() -> None:
            file = f"scores-{len(set(places.values())) + 1:05d}.safetensors"
            save_file(shard, temporary / file, metadata=header)
            places.update(dict.fromkeys(shard, file))
            shard.clear()

        for name, tensor in scores:
            shard[name] = tensor.to(dtype).cpu().contiguous()
            size += shard[name].numel() * shard[name].element_size()
            if size >= shard_bytes:
                close()
                size = 0
        if shard:
            close()
        index = {**header, "shapes": shapes, "made_by": made_by, "files": places}
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
                f"{folder} is no folder of scores (it has no {INDEX_FILE}): give what save_scores wrote"
            )
        try:
            index = json.loads(index_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WagleError(f"{index_file} is malformed: {error}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise WagleError(f"{index_file} is not of wagle_pl scores")
        if int(index["format_version"]) > FORMAT_VERSION:
            raise WagleError(
                f"{index_file} has format {index['format_version']}; this version reads {FORMAT_VERSION}"
            )
        self.shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        self.made_by: dict[str, Any] = index["made_by"]
        self._files: dict[str, str] = index["files"]

    def stream(self, names: Optional[Iterable[str]] = None) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, float32 scores), of all parameters or of some, in order.

        Raises:
            WagleError: if a shard is missing or cut short.
        """
        opened, handle = None, None
        for name in self.shapes if names is None else names:
            file = self._files[name]
            try:
                if file != opened:
                    opened, handle = file, safe_open(self.folder / file, framework="pt")
                yield name, handle.get_tensor(name).float()
            except (SafetensorError, OSError) as error:
                raise WagleError(f"{self.folder / file} is missing or not whole: {error}") from None


def mask_from_scores(
    path: str | Path,
    density: float,
    select: str = "high",
    scope: Scope = "global",
    include: Optional[str] = None,
    exclude: Optional[str] = None,
) -> WeightMask:
    """The mask of stored scores at another density: what the pass itself would have written, if they are in fp32.

    Args:
        path: folder of scores.
        density: share of the weights that take part, in (0, 1].
        select: the ``high`` or the ``low`` end of the ranking.
        scope: what competes, see :func:`wagle_pl.attribution.selection.select`.
        include: regular expression; only parameters whose name it finds take part.
        exclude: regular expression; parameters whose name it finds do not.

    Raises:
        WagleError: if there are no scores there, or an option has no meaning.
    """
    if select not in ("high", "low"):
        raise WagleError(f"select must be high or low, got {select!r}")
    stored = StoredScores(path)
    names = taking_part(stored.shapes, include, exclude)
    ranking = Ranking(stored.made_by.get("absolute", True), low=select == "low")
    selected = selection.select(lambda: stored.stream(names), density, ranking, scope)
    metadata = {
        **stored.made_by,
        "density": density,
        "select": select,
        "scope": scope,
        "include": include,
        "exclude": exclude,
    }
    metadata.pop("absolute", None)
    return whole_mask(dict(selected), stored.shapes, metadata)


def whole_mask(
    packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, Any]
) -> WeightMask:
    """A mask of all parameters, in their order: those that took no part are frozen."""
    bits = {
        name: packed[name]
        if name in packed
        else torch.zeros((prod(shape) + 7) // 8, dtype=torch.uint8)
        for name, shape in shapes.items()
    }
    return WeightMask(bits, shapes, metadata)
