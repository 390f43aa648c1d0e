"""Tensors of more than 2³¹ weights, which no test can hold: fake shapes, files with holes, the meta device."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wagle_pl.attribution.selection import HIGHEST, Ranking, _descend, exact_count, select_each
from wagle_pl.attribution.sums import Shard
from wagle_pl.core.tensorfiles import write_header
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import count_bits
from wagle_pl.masks.selected import SelectedTensor

HUGE = 2**31 + 16


def test_a_part_of_a_mask_file(tmp_path: Path):
    """Of which no other byte is read: the file has a hole."""
    path, size = tmp_path / "mask.safetensors", HUGE // 8
    header = {"format": "wagle_pl.mask", "format_version": "1", "made_by": "{}"}
    header["shapes"] = json.dumps({"a": [HUGE]})
    with open(path, "wb") as stream:
        write_header(stream, {"a": ("U8", [size], size)}, header)
        stream.seek(size - 1, 1)
        stream.write(bytes([0b01000001]))
    mask = WeightMask.load(path)
    assert mask.total == HUGE
    assert mask.part("a", HUGE - 9, HUGE).tolist() == [False, True, *[False] * 5, True, False]
    assert mask.part("a", HUGE - 2, HUGE).tolist() == [True, False]


def test_numbers_of_a_mask():
    assert count_bits(torch.full((1,), 255, dtype=torch.uint8).expand(HUGE // 8)) == HUGE
    name = "model.layers.0.mlp.up_proj.weight"
    mask = WeightMask({name: torch.empty(0)}, {name: (2**20, 2**13)})
    mask._counts = {name: 2**32}  # half of them
    assert mask.total == 2**33 and mask.count() == 2**32 and mask.density == 0.5
    assert mask.tally(str) == {name: (2**32, 2**33)}
    assert mask.stats()["layer"] == {"0": 0.5}
    assert list(mask.grid()["0"].values()) == [0.5]


@pytest.mark.parametrize(("size", "dtype"), [(2**31, torch.int32), (HUGE, torch.int64)])
def test_places_of_values(size: int, dtype: torch.dtype):
    """The last of 2³¹ weights has the place 2³¹ − 1, for which 32 bits do."""
    parameter = nn.Parameter(torch.empty(size, dtype=torch.bfloat16, device="meta"))
    tensor = SelectedTensor(parameter, torch.tensor([5], dtype=torch.uint8))  # and zeros
    assert tensor._index.dtype == dtype and tensor.values.shape == (2,)


def test_places_of_a_sharded_tensor():
    tensor = object.__new__(SelectedTensor)
    tensor._index, tensor.is_partial = None, True
    fake = {"partition_numel": lambda: 2**31 - 3, "ds_numel": 2**32, "device": torch.device("cpu")}
    tensor.parameter = SimpleNamespace(**fake)
    bits = torch.tensor([[2], [1], [3]], dtype=torch.uint8)  # and zeros
    places = torch.cat(list(tensor.places(bits)))
    assert places.tolist() == [1, 2**31 - 3, 2**32 - 6, 2**32 - 5]


def test_rows_of_a_rank():
    shard = Shard((2**18, 2**17), rank=63, ranks=64)
    assert (shard.start, shard.stop, shard.total) == (63 * 2**12, 2**18, 2**35)
    assert shard.first == 63 * 2**29 and shard.part == (2**12, 2**17)


def test_the_threshold_of_many_weights():
    counts = torch.tensor([2**33, 2**32, 5, 2**40])
    for k, expected in ((2**40, (3, 0)), (2**40 + 6, (1, 2**40 + 5)), (2**42, (0, 0))):
        if k == 2**42:
            k = int(counts.sum())
            expected = (0, k - 2**33)
        assert _descend(counts, k) == expected


@pytest.mark.parametrize("ranking", [HIGHEST, Ranking(low=True)])
def test_rows_far_into_a_tensor(ranking: Ranking):
    """The last rank's eight rows of 2³⁰: each gets the difference of the floors of the running total."""
    width, shard = 5, Shard((2**30, 5), rank=2**27 - 1, ranks=2**27)
    assert shard.part == (8, width) and shard.first > 2**32
    scores = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    (_, (packed,)), *_ = select_each(lambda: [("a", scores)], [0.3], ranking, "row", {"a": shard})
    ends = [Fraction(3, 10) * (shard.first + width * row) // 1 for row in range(9)]
    assert count_bits(packed) == ends[-1] - ends[0]
    assert exact_count(0.3, 2**40 + 7) == (3 * (2**40 + 7)) // 10
