"""A mask split into disjoint masks: the parts of a model that are trained, and deleted, apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from wagle_pl.core.errors import WagleError
from wagle_pl.masks.bits import CHUNK, lines_of, pack_bits, unpack_bits
from wagle_pl.masks.mask import WeightMask


def split(mask: WeightMask, parts: int, seed: int = 0) -> Iterator[WeightMask]:
    """Disjoint masks whose union is the mask, drawn at random: of every tensor an equal share each.

    One part has at most one weight more than another. A mask of whole rows or columns alone (or of
    vectors, whose weights are rows) is split into whole rows or columns: then a part has at most
    the longest of these more.

    Raises:
        WagleError: if there are fewer than two parts, or fewer weights than parts.
    """
    if not 2 <= parts <= mask.count():
        raise WagleError(
            f"must be 2 to {mask.count():,}, the weights of the mask, got {parts}", option="parts"
        )
    lines = {name: lines_of(mask.packed(name), shape) for name, shape in mask.shapes.items()}
    is_structured = all(
        lines[name] is not None or len(shape) < 2 for name, shape in mask.shapes.items()
    )
    for part in range(parts):  # drawn again for each, so that only one is in memory
        generator, packed = np.random.default_rng(seed), {}
        sizes: np.ndarray = np.zeros(parts, np.int64)
        for name, shape in mask.shapes.items():
            bits = unpack_bits(mask.packed(name), shape)
            along = lines[name] if is_structured else None
            if along is None:
                flat = bits.view(-1).numpy()
                for start in range(0, len(flat), CHUNK):
                    chunk = flat[start : start + CHUNK]  # a view
                    chunk[chunk] = _deal(int(chunk.sum()), 1, sizes, generator) == part
            else:
                length = shape[1 - along.axis]
                dealt = _deal(len(along.indices), length, sizes, generator) != part
                bits.index_fill_(along.axis, along.indices[torch.from_numpy(dealt)], False)
            packed[name] = pack_bits(bits)
        made_by = mask._made_from(f"part {part + 1} of {parts} of", mask) | {"seed": seed}
        yield WeightMask(packed, mask.shapes, made_by)


def _deal(count: int, size: int, sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(count,) the part that each of ``count`` things of one size is dealt to, in random order.

    All parts get as many; those with the least so far, by ``sizes``, one more. ``sizes`` grow.
    """
    shares = np.full(len(sizes), count // len(sizes))
    shares[np.argsort(sizes, kind="stable")[: count % len(sizes)]] += 1
    sizes += size * shares
    return generator.permutation(np.repeat(np.arange(len(sizes)), shares))
