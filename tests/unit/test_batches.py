"""Invariant 4's foundation: the global batch is fixed by (seed, epoch, step), however it is split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wagle_pl.data.batches import (
    GlobalBatchSampler,
    ResumableLoader,
    collate,
    deal,
    epoch_batches,
    token_batches,
)

counts = st.lists(st.integers(1, 90), min_size=1, max_size=70)


@given(counts, counts, st.integers(1, 20), st.integers(0, 3), st.integers(0, 4))
@settings(max_examples=60)
def test_an_epoch_sees_each_forget_row_once_and_as_many_retain_rows(
    forget, retain, size, seed, epoch
):
    steps = epoch_batches({"forget": forget, "retain": retain}, size, seed, epoch)
    rows = np.concatenate([step["forget"] for step in steps])
    assert sorted(rows) == list(range(len(forget)))
    assert [len(step["forget"]) for step in steps] == [len(step["retain"]) for step in steps]
    assert sum(len(step["forget"]) < size for step in steps) <= 1
    again = epoch_batches({"forget": forget, "retain": retain}, size, seed, epoch)
    assert all((a[s] == b[s]).all() for a, b in zip(steps, again, strict=True) for s in a)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=40)
def test_the_retain_stream_uses_every_row_equally_often(forget, retain, size):
    used = np.zeros(retain, dtype=int)
    for epoch in range(6):
        for step in epoch_batches({"forget": [1] * forget, "retain": [1] * retain}, size, 0, epoch):
            np.add.at(used, step["retain"], 1)
    assert used.sum() == 6 * forget
    assert used.max() - used.min() <= 1


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=60)
def test_copies_of_a_row_are_spread_over_batches(forget, retain, size, epoch):
    """However few retain rows there are, a batch repeats one only when it has to; an epoch numbers the copies."""
    lengths = {"forget": [1] * forget, "retain": list(range(1, retain + 1))}
    most = -(-size // retain) + 1  # a batch may end one lap and begin the next
    for step in epoch_batches(lengths, size, 0, epoch):
        assert np.bincount(step["retain"]).max() <= most
    sampler = GlobalBatchSampler(lengths, size)
    sampler.set_epoch(epoch)
    copies = sorted(
        (row, occurrence) for draw in sampler for row, _, occurrence in draw.cells["retain"]
    )
    assert len(set(copies)) == len(copies) == forget
    assert all((row, occurrence - 1) in copies for row, occurrence in copies if occurrence)


def test_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(5, 300, 512).tolist()
    steps = epoch_batches({"forget": lengths}, 8, 0, 0)
    padded = sum(8 * max(lengths[row] for row in step["forget"]) for step in steps)
    assert padded < 1.05 * sum(lengths)


@given(st.integers(1, 33), st.integers(1, 4), st.integers(1, 5))
def test_weights_give_the_global_mean_however_the_batch_is_split(n, world, accumulate):
    rows = np.arange(n)
    values = np.random.default_rng(n).normal(size=n)
    cells = deal(rows, world, accumulate)
    assert len(cells) == accumulate
    assert all(len(micro) == world and all(micro) for micro in cells)
    sums = [
        [sum(weight * values[row] for row, weight, _ in cell) for cell in micro] for micro in cells
    ]
    assert np.mean(sums) == pytest.approx(values.mean())
    most = -(-n // (world * accumulate))
    assert max(len(cell) for micro in cells for cell in micro) <= most


@given(st.integers(1, 50), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=40)
def test_all_ranks_together_see_the_one_device_batches(n, batch_size, world, accumulate):
    lengths = {"forget": list(range(1, n + 1)), "retain": list(range(1, 12))}

    def steps(batch_size, world, accumulate):
        samplers = [
            GlobalBatchSampler(lengths, batch_size, accumulate, world, rank, seed=3)
            for rank in range(world)
        ]
        draws = [list(sampler) for sampler in samplers]
        assert all(len(draw) == len(sampler) for draw, sampler in zip(draws, samplers, strict=True))
        merged = []
        for first in range(0, len(draws[0]), accumulate):
            group = [draw for rank in draws for draw in rank[first : first + accumulate]]
            merged.append(
                {
                    s: sorted((r, o) for d in group for r, w, o in d.cells[s] if w)
                    for s in ("forget", "retain")
                }
            )
        return merged

    assert steps(batch_size, world, accumulate) == steps(batch_size * world * accumulate, 1, 1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loader_resumes_in_the_middle_of_an_epoch(accumulate):
    def loader():
        return ResumableLoader(
            GlobalBatchSampler({"forget": [3, 1, 2] * 7}, 2, accumulate), lambda draw: draw
        )

    whole = loader()
    whole.sampler.set_epoch(2)
    expected = list(whole)
    for stop in range(len(expected)):
        broken = loader()
        broken.sampler.set_epoch(2)
        iterator = iter(broken)
        for _ in range(stop):
            next(iterator)
        resumed = loader()
        resumed.load_state_dict(broken.state_dict())
        assert list(resumed) == expected[stop:]
        resumed.sampler.set_epoch(3)
        assert len(list(resumed)) == len(expected)


def test_collate_pads_to_the_longest_row():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert collate(rows, 9, left=True)["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["input_ids"].dtype == torch.int64


@given(counts, st.integers(1, 9))
def test_token_batches_hold_each_row_once_within_bounds(lengths, rows):
    batches = token_batches(lengths, rows)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == rows for batch in batches[:-1]) and len(batches[-1]) <= rows
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
