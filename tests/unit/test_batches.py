"""Invariants 4 and 5: (seed, epoch, step) fix the global batch, however it is cut or resumed."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wagle_pl import WagleError
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
    """A batch repeats a retain row only when it has to; an epoch numbers the copies."""
    lengths = {"forget": [1] * forget, "retain": list(range(1, retain + 1))}
    most = -(-size // retain) + 1  # a batch may end one lap and begin the next
    for step in epoch_batches(lengths, size, 0, epoch):
        assert np.bincount(step["retain"]).max() <= most
    sampler = GlobalBatchSampler(lengths, size, epoch=epoch)
    copies = {(row, copy) for draw in sampler for row, _, copy in draw.cells["retain"]}
    assert len(copies) == forget
    assert all((row, copy - 1) in copies for row, copy in copies if copy)


def test_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(5, 300, 512).tolist()
    steps = epoch_batches({"forget": lengths}, 8, 0, 0)
    padded = sum(8 * max(lengths[row] for row in step["forget"]) for step in steps)
    assert padded < 1.05 * sum(lengths)


@given(st.integers(1, 33), st.integers(1, 4), st.integers(1, 5))
def test_weights_give_the_global_mean_however_the_batch_is_split(n, world, accumulate):
    values = np.random.default_rng(n).normal(size=n)
    cells = deal(np.arange(n), world, accumulate)
    assert [len(micro) for micro in cells] == [world] * accumulate
    sums = [
        [sum(weight * values[row] for row, weight, _ in cell) for cell in micro] for micro in cells
    ]
    assert np.mean(sums) == pytest.approx(values.mean())
    sizes = [len(cell) for micro in cells for cell in micro]
    assert min(sizes) > 0 and max(sizes) <= -(-n // (world * accumulate))


@given(st.integers(1, 50), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=40)
def test_all_ranks_together_see_the_one_device_batches(n, batch_size, world, accumulate):
    lengths = {"forget": list(range(1, n + 1)), "retain": list(range(1, 12))}

    def steps(*cut):
        draws = run(lengths, cut, epoch=0)[0]
        assert len({len(part) for part in draws}) == 1
        groups = range(0, len(draws[0]), cut[1])
        return [rows([part[i : i + cut[1]] for part in draws], copies=True) for i in groups]

    assert steps(batch_size, accumulate, world) == steps(batch_size * world * accumulate, 1, 1)


def loader(lengths, cut, rank=0, **options):
    batch_size, accumulate, world = cut
    sampler = GlobalBatchSampler(lengths, batch_size, accumulate, world, rank, **options)
    return ResumableLoader(sampler, lambda draw: draw)


def run(lengths, cut, epoch, state=None, count=None):
    """So many draws of each rank in an epoch, and the state after them."""
    loaders = [loader(lengths, cut, rank) for rank in range(cut[2])]
    for each in loaders:
        each.sampler.set_epoch(epoch)
        if state is not None:
            each.load_state_dict(state)
    draws = [list(islice(each, count)) for each in loaders]
    return draws, loaders[0].state_dict()


def rows(draws, copies=False):
    """How often each row of each stream was drawn."""
    return Counter(
        (stream, row, copy if copies else 0)
        for draw in (draw for part in draws for draw in part)
        for stream, cell in draw.cells.items()
        for row, weight, copy in cell
        if weight
    )


def filled(draws):
    """Those that hold a row: a step that is broken off does not repeat what is only padding."""
    return [draw for draw in draws if any(weight for _, weight, _ in draw.cells["forget"])]


CUTS = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)]
CUTS += [(4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 2, 4), (1, 1, 8)]


@given(
    st.integers(1, 40),
    st.sampled_from(CUTS),
    st.sampled_from(CUTS),
    st.integers(0, 50),
    st.integers(0, 2),
)
def test_any_cut_goes_on_at_the_same_row(n, first, second, stop, epoch):
    """Every row of an epoch is handed out once, with its weight, before the stop or after it."""
    lengths = {"forget": list(range(1, n + 1)), "retain": list(range(1, 12))}
    before, state = run(lengths, first, epoch, count=stop)
    over = state["epoch"] > epoch
    after = [[]] * second[2] if over else run(lengths, second, epoch, state)[0]
    assert len({len(part) for part in after}) == 1
    assert rows(before + after) == rows(run(lengths, (1, 1, 1), epoch)[0])
    if first == second:
        broken = [a + b for a, b in zip(before, after, strict=True)]
        assert list(map(filled, broken)) == list(map(filled, run(lengths, first, epoch)[0]))


def test_the_epoch_after_a_resumed_one_is_whole():
    resumed = loader({"forget": [3, 1, 2] * 7}, (2, 3, 1))
    resumed.load_state_dict(run({"forget": [3, 1, 2] * 7}, (2, 3, 1), 2, count=4)[1])
    assert len(list(resumed)) == len(resumed) - 4
    resumed.sampler.set_epoch(3)
    assert len(list(resumed)) == len(resumed)


@pytest.mark.parametrize(
    ("forget", "cut", "seed", "message"),
    [
        (11, (4, 1, 1), 0, r"global batch of 8 rows, this one has 4 \(1 devices x data.batch_size"),
        (11, (8, 1, 1), 3, "drew its rows with data.seed 0, this one with 3"),
        (10, (8, 1, 1), 0, "had 11 forget rows, this one has 10"),
        (11, (8, 1, 1), 0, "had other forget rows, or another order of them"),
    ],
)
def test_what_differs_is_named(forget, cut, seed, message):
    retain = [3] * 17
    state = loader({"forget": [3] * 11, "retain": retain}, (4, 2, 1)).state_dict()
    other = loader({"forget": [3] * forget, "retain": retain}, cut, seed=seed)
    other.digests = {"forget": "x"}
    with pytest.raises(WagleError, match=message):
        other.load_state_dict(state)
    with pytest.raises(WagleError, match="drew from forget and retain rows, this one draws from f"):
        loader({"forget": [3] * 11}, (8, 1, 1)).load_state_dict(state)
    with pytest.raises(WagleError, match="belongs to a run with another data module"):
        other.load_state_dict({"epoch": 0})


def test_collate_pads_to_the_longest_row():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@given(counts, st.integers(1, 9))
def test_token_batches_hold_each_row_once_within_bounds(lengths, most):
    batches = token_batches(lengths, most)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == most for batch in batches[:-1]) and len(batches[-1]) <= most
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
