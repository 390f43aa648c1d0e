"""Selection against a full stable sort; stored scores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wagle_pl.attribution import mask_from_scores, selection
from wagle_pl.attribution.selection import Ranking, order_keys, select_each
from wagle_pl.attribution.stored import write_scores
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.masks.bits import unpack_bits

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-39, 1.0, -1.0, 3.4e38, -3.4e38, 1.0000001]
RANKINGS = [Ranking(absolute, low) for absolute, low in product((True, False), (True, False))]


def select(scores: Any, density: float, *options: Any, **more: Any) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, packed bits) of one density."""
    for name, (bits,) in select_each(scores, [density], *options, **more):
        yield name, bits


def named(seed: int, shapes: list[tuple[int, ...]], kind: str) -> dict[str, Tensor]:
    """Scores of several parameters: normal, with many ties, or of the hardest floats."""
    rng = np.random.default_rng(seed)
    draw = {
        "normal": lambda n: rng.standard_normal(n),
        "ties": lambda n: rng.integers(-2, 3, n) / 4,
        "special": lambda n: rng.choice(SPECIAL, n),
        "bits": lambda n: rng.integers(-(2**31), 2**31, n).astype(np.int32).view(np.float32),
    }[kind]
    scores = {
        f"p{i}": np.asarray(draw(prod(shape)), dtype=np.float32) for i, shape in enumerate(shapes)
    }
    for values in scores.values():
        values[~np.isfinite(values)] = 0.5
    return {
        name: torch.from_numpy(v).view(shape)
        for (name, v), shape in zip(scores.items(), shapes, strict=True)
    }


def by_sort(values: np.ndarray, k: int, ranking: Ranking) -> np.ndarray:
    """The first k by a stable sort of all, in float64."""
    keys = values.astype(np.float64)
    keys = np.abs(keys) if ranking.absolute else keys
    order = np.argsort(keys if ranking.low else -keys, kind="stable")
    taken = np.zeros(len(values), dtype=bool)
    taken[order[:k]] = True
    return taken


def floor(density: float, total: int) -> int:
    """⌊density · total⌋ of the number as it is written."""
    return int(Decimal(repr(density)) * total)


def expected(scores: dict[str, Tensor], density: float, ranking: Ranking, scope: str) -> np.ndarray:
    """All bits in parameter order, each competing group sorted in full."""
    flat = np.concatenate([tensor.numpy().reshape(-1) for tensor in scores.values()])
    sizes = []
    for tensor in scores.values():
        rows = tensor.numel() // tensor.shape[-1] if scope == "row" and tensor.dim() > 1 else 1
        sizes += [tensor.numel() // rows] * rows
    if scope == "global":
        sizes = [len(flat)]
    taken, start = [], 0
    for size in sizes:
        k = floor(density, start + size) - floor(density, start)
        taken.append(by_sort(flat[start : start + size], k, ranking))
        start += size
    return np.concatenate(taken)


def bits(scores: dict[str, Tensor], packed: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate(
        [unpack_bits(packed[n], t.shape).reshape(-1).numpy() for n, t in scores.items()]
    )


shapes_strategy = st.lists(
    st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4
)  # vectors, matrices and more


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=shapes_strategy,
    kind=st.sampled_from(["normal", "ties", "special", "bits"]),
    ranking=st.sampled_from(RANKINGS),
    scope=st.sampled_from(["global", "tensor", "row"]),
    density=st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.1, 0.25, 0.5, 1.0])),
    chunk=st.sampled_from([64, 200, 1 << 20]),
)
def test_equals_a_full_stable_sort(seed, shapes, kind, ranking, scope, density, chunk):
    scores = named(seed, shapes, kind)
    total = sum(tensor.numel() for tensor in scores.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CHUNK", chunk)
        if floor(density, total) == 0:
            with pytest.raises(WagleError, match="selects none"):
                dict(select(scores.items, density, ranking, scope))
            return
        taken = bits(scores, dict(select(scores.items, density, ranking, scope)))
    assert taken.sum() == floor(density, total)
    np.testing.assert_array_equal(taken, expected(scores, density, ranking, scope))


@pytest.mark.parametrize("density", [0.29, 0.57, 0.58, 0.07, 1e-2])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_a_density_is_the_number_that_is_written(density: float, scope: Any):
    """In binary 0.29 · 100 is a little below 29."""
    scores = named(0, [(10, 10)], "normal")
    assert bits(scores, dict(select(scores.items, density, scope=scope))).sum() == round(
        100 * density
    )


def test_scores_that_differ_from_pass_to_pass_are_refused():
    passes = iter(range(9))

    def scores() -> Any:
        yield "w", torch.arange(1000.0) + 1000 * next(passes)

    with pytest.raises(WagleError, match="differs from pass to pass"):
        dict(select(scores, 0.3))


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("ranking", RANKINGS)
def test_large_tensors_in_many_chunks(kind: str, ranking: Ranking, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "CHUNK", 4096)
    scores = named(1, [(70_001,), (300, 200), (3, 7, 11)], kind)
    for scope in ("global", "tensor", "row"):
        taken = bits(scores, dict(select(scores.items, 0.3, ranking, scope)))
        np.testing.assert_array_equal(taken, expected(scores, 0.3, ranking, scope))


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_several_densities_share_their_passes(scope: str):
    scores = named(2, [(40, 30), (50,)], "ties")
    passes = []

    def stream():
        passes.append(1)
        return scores.items()

    densities = [0.05, 0.5, 0.51, 1.0]
    each = list(select_each(stream, densities, scope=scope))
    assert len(passes) == (3 if scope == "global" else 1)
    for i, density in enumerate(densities):
        alone = dict(select(scores.items, density, scope=scope))
        assert all(torch.equal(packed[i], alone[name]) for name, packed in each)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_names_its_parameter(bad: float, ranking: Ranking, scope: str):
    scores = named(3, [(5, 5), (5, 5), (5,)], "normal")
    scores["p1"][2, 3] = bad
    with pytest.raises(WagleError, match="scores of p1 are not finite"):
        dict(select(scores.items, 0.5, ranking, scope))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_density_outside_its_range(density: float):
    with pytest.raises(WagleError, match=r"must be in \(0, 1\]"):
        dict(select({"a": torch.ones(4)}.items, density))


def test_keys_order_like_floats():
    values = torch.tensor(sorted(set(SPECIAL)), dtype=torch.float32)
    assert (order_keys(values, Ranking(absolute=False)).diff() > 0).all()
    assert (order_keys(values, Ranking(absolute=False, low=True)).diff() < 0).all()
    zeros = torch.tensor([0.0, -0.0])
    assert all(order_keys(zeros, ranking).unique().numel() == 1 for ranking in RANKINGS)


def test_chunks_are_larger_on_a_gpu():
    sizes = [len(keys) for keys in selection._keys(torch.empty(1 << 23, device="meta"), Ranking())]
    assert sizes == [1 << 22] * 2


def test_counts_of_shards_add_up(monkeypatch: pytest.MonkeyPatch):
    scores = named(4, [(64, 8), (256,)], "normal")
    whole = selection.find_thresholds(scores.items, lambda n: [n // 5, n // 2])
    barrier, board = threading.Barrier(2), {}

    def all_reduce(counts: Tensor) -> Tensor:
        board[threading.get_ident()] = counts
        barrier.wait()
        total = sum(board.values())
        barrier.wait()
        return total

    def rank(me: int) -> list[selection.Threshold]:
        own = {f"p{me}": scores[f"p{me}"]}
        return selection.find_thresholds(own.items, lambda n: [n // 5, n // 2])

    monkeypatch.setattr(distributed, "all_reduce_sum", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, (0, 1))) == [whole, whole]


# -- stored scores ----------------------------------------------------------------------------------------------------


def write(path: Any, scores: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    made_by = {"score": "Test", "model_fingerprint": "f" * 64, "absolute": True}
    shapes = {name: tuple(tensor.shape) for name, tensor in scores.items()}
    return write_scores(path, iter(scores.items()), shapes, made_by, dtype)


def test_mask_from_stored_scores(tmp_path):
    scores = named(5, [(20, 30), (7,), (5, 4)], "normal")
    file = write(tmp_path / "s.scores", scores)
    for density, end, scope in product((0.1, 0.4), ("high", "low"), ("global", "tensor", "row")):
        mask = mask_from_scores(file, density, select=end, scope=scope)
        taken = dict(select(scores.items, density, Ranking(low=end == "low"), scope))
        assert list(mask) == list(scores) and all(
            torch.equal(mask.packed(n), taken[n]) for n in scores
        )
        assert (
            mask.metadata["model_fingerprint"] == "f" * 64 and mask.metadata["density"] == density
        )
    left_out = mask_from_scores(file, 0.5, exclude="^p0$")
    assert left_out.count("p0") == 0 and left_out.count() == 13
    assert not list(tmp_path.glob(".*"))


def test_stored_in_bf16(tmp_path):
    scores = named(6, [(30, 30)], "normal")
    mask = mask_from_scores(write(tmp_path / "s", scores, torch.bfloat16), 0.3)
    rounded = {name: tensor.bfloat16().float() for name, tensor in scores.items()}
    assert torch.equal(mask.packed("p0"), dict(select(rounded.items, 0.3))["p0"])


def test_stored_scores_that_cannot_be_read(tmp_path):
    file = write(tmp_path / "s", named(7, [(4, 4)], "normal"))
    with pytest.raises(WagleError, match=r"scores .*other does not exist"):
        mask_from_scores(tmp_path / "other", 0.5)
    with pytest.raises(WagleError, match="select: must be"):
        mask_from_scores(file, 0.5, select="middle")
    with pytest.raises(WagleError, match="leave no parameter"):
        mask_from_scores(file, 0.5, include="nothing")
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"format_version": "3"', b'"format_version": "4"'))
    with pytest.raises(WagleError, match="this version reads 3"):
        mask_from_scores(file, 0.5)
    file.write_bytes(content[:-8])
    with pytest.raises(WagleError, match="is not a whole safetensors file"):
        mask_from_scores(file, 0.5)


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield "p0", torch.ones(3)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_scores(tmp_path / "s", broken(), {"p0": (3,), "p1": (3,)}, {})
    assert not list(tmp_path.iterdir())
