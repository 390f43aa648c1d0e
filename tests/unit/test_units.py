"""Units of weights: against loops over single weights, and against what a model computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wagle_pl.attribution import Random, mask_from_scores, units
from wagle_pl.attribution.selection import Ranking
from wagle_pl.attribution.stored import write_scores
from wagle_pl.attribution.sums import Shard
from wagle_pl.attribution.units import Geometry, Units, check_unit
from wagle_pl.core.errors import WagleError
from wagle_pl.lm.layers import capture
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import unpack_bits
from wagle_pl.masks.selected import SelectedWeights
from wagle_pl.masks.selected_tensor import SelectedTensor

POOLS = {
    "mean": np.mean,
    "sum": np.sum,
    "max": np.max,
    "norm": lambda values: np.sqrt(np.sum(np.square(values))),
}
SHAPES = st.lists(
    st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4
)
KINDS = ["row", "column", "tensor", "layer", "block:2x3", "block:1x1", "block:9x2"]


def key_of(kind: str, name: str, layer: Any, index: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """The unit of one weight, by the words of the documentation."""
    *rows, column = index if len(shape) > 1 else (*index, 0)
    row = int(np.ravel_multi_index(rows, shape[:-1] if len(shape) > 1 else shape))
    if kind.startswith("block"):
        height, width = map(int, kind[6:].split("x"))
        return name, row // height, column // width
    return {"row": (name, row), "column": (name, column), "tensor": name, "layer": layer or name}[
        kind
    ]


def by_loops(
    scores: dict[str, Tensor], kind: str, pool: str, ranking: Ranking, density: float
) -> dict[str, np.ndarray]:
    """Bits of the units that a loop over all weights and a sort of the units take."""
    members: dict[Any, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)
    for name, tensor in scores.items():
        layer = name.split(".")[1] if name.startswith("layers.") else None
        for index in np.ndindex(*tensor.shape):
            members[key_of(kind, name, layer, index, tuple(tensor.shape))].append((name, index))
    values = {}
    for key, of_unit in members.items():
        numbers = np.array([float(scores[name][index]) for name, index in of_unit])
        values[key] = POOLS[pool](np.abs(numbers) if ranking.absolute else numbers)
    order = sorted(members, key=lambda key: values[key] if ranking.low else -values[key])
    bits = {name: np.zeros(tuple(tensor.shape), bool) for name, tensor in scores.items()}
    left = int(np.floor(density * sum(map(len, members.values())) + 1e-9))
    for number, key in enumerate(order):
        left -= len(members[key])
        if left < 0 and number:
            break
        for name, index in members[key]:
            bits[name][index] = True
    return bits


@settings(max_examples=150)
@given(
    shapes=SHAPES,
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
    kind=st.sampled_from(KINDS),
    pool=st.sampled_from(sorted(POOLS)),
    ranking=st.sampled_from([Ranking(a, low) for a in (True, False) for low in (True, False)]),
    density=st.sampled_from([0.01, 0.2, 0.5, 0.75, 1.0]),
    ranks=st.integers(1, 3),
)
def test_equals_loops_over_single_weights(
    shapes, seed, ties, kind, pool, ranking, density, ranks
) -> None:
    rng = np.random.default_rng(seed)
    names = [f"layers.{i // 2}.w{i}" if i else "embed" for i in range(len(shapes))]
    draw = (lambda s: rng.integers(-2, 3, s)) if ties else rng.standard_normal
    scores = {n: torch.tensor(draw(s)).float() for n, s in zip(names, shapes, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "CHUNK", 16)
        made = Units(kind, {name: tensor.shape for name, tensor in scores.items()})
        parts, shards = [], []
        for rank in range(ranks):
            mine = {name: Shard(t.shape, rank, ranks) for name, t in scores.items()}
            own = {name: mine[name].of(tensor) for name, tensor in scores.items()}
            of_rank = "sum" if pool == "mean" else pool
            parts.append(made.pooled(own.items, ranking, of_rank, mine))
            shards.append(mine)
        stacked = torch.stack(parts)
        values = stacked.amax(0) if pool == "max" else stacked.sum(0)
        values = values / made.sizes if pool == "mean" else values
        (chosen,) = made.choose(values, [density], ranking.low)
        pieces = [dict(made.select([chosen], mine)) for mine in shards]
    expected = by_loops(scores, kind, pool, ranking, density)
    for name, tensor in scores.items():
        bits = [
            unpack_bits(piece[name][0], [prod(mine[name].part)])
            for piece, mine in zip(pieces, shards, strict=True)
        ]
        np.testing.assert_array_equal(torch.cat(bits).view(tensor.shape).numpy(), expected[name])
    total = sum(t.numel() for t in scores.values())
    assert made.sizes.sum() == total
    selected = sum(int(bits.sum()) for bits in expected.values())
    assert selected <= density * total or chosen.sum() == 1


# -- heads and neurons of real architectures ------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
INNER = {"intermediate_size": 24}
MODELS = {
    "Llama": {**SMALL, **INNER, "num_key_value_heads": 2},
    "Qwen2": {**SMALL, **INNER, "num_key_value_heads": 2},
    "Phi3": {**SMALL, **INNER, "num_key_value_heads": 2, "pad_token_id": 0},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32},
    "GPTNeoX": {**SMALL, **INNER},
    "OPT": {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "Mixtral": {**SMALL, **INNER, "num_key_value_heads": 2, "num_local_experts": 2},
}
OUTPUT = {
    "head": ("o_proj", "out_proj", "c_proj", "dense"),
    "neuron": ("down_proj", "c_proj", "dense_4h_to_h", "fc2"),
}


def architecture(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind])
    lm = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return lm


def weights_of(made: Units, unit: int) -> Iterator[tuple[str, Tensor]]:
    for name, (rows, columns) in made.places.items():
        chosen = (rows[:, None] + columns == unit).view(tuple(made.shapes[name]))
        if chosen.any():
            yield name, chosen


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("unit", ["head", "neuron"])
def test_a_unit_is_what_its_output_weights_let_through(kind: str, unit: str) -> None:
    """Once the output weights of a head or neuron are 0, its other weights have no effect, and
    those of the next unit still have one."""
    lm = architecture(kind)
    shapes = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    made = Units(unit, shapes, Geometry.of(lm))
    inputs = {"input_ids": torch.arange(8)[None]}
    parameters = dict(lm.named_parameters())

    def is_output(name: str) -> bool:
        module = name.removesuffix(".weight").rpartition(".")[2]
        return module in OUTPUT[unit]

    firsts = [
        int(rows[0] + columns[0])
        for name, (rows, columns) in made.places.items()
        if name not in made.as_rows
    ]
    assert len(set(firsts)) >= 2  # one module in each layer
    for first in {min(firsts), max(firsts)}:
        inside, others = dict(weights_of(made, first + 1)), dict(weights_of(made, first))
        assert any(map(is_output, inside)) and not all(map(is_output, inside))
        with torch.no_grad():
            kept = {name: p.clone() for name, p in parameters.items()}
            for name, chosen in inside.items():
                if is_output(name):
                    parameters[name][chosen] = 0
            silent = lm(**inputs).logits
            changed = {}
            for label, of_unit in (("same", inside), ("next", others)):
                for name, chosen in of_unit.items():
                    if not is_output(name):
                        parameters[name][chosen] += 1
                changed[label] = (lm(**inputs).logits - silent).abs().max()
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
        assert changed["same"] == 0
        assert changed["next"] > 1e-4


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("unit", ["row", "column", "neuron"])
def test_gradients_within_units_are_autograds(
    kind: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    take = SelectedTensor.take_gradient

    def spied(tensor: SelectedTensor, gradient: Tensor, *bits: Any) -> Any:
        seen.append(gradient.dim())
        return take(tensor, gradient, *bits)

    monkeypatch.setattr(SelectedTensor, "take_gradient", spied)
    lm = architecture(kind)
    shapes = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    made = Units(unit, shapes, Geometry.of(lm))
    (chosen,) = made.choose(torch.rand(made.count).double(), [0.4], low=False)
    mask = WeightMask({n: bits for n, (bits,) in made.select([chosen], {})}, shapes, {})
    tokens = torch.arange(8)[None]
    lm(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad[mask[name]] for name, p in lm.named_parameters()}
    lm.zero_grad()
    selected = SelectedWeights(lm, mask)
    assert any(tensor.lines is not None for tensor in selected.tensors.values())
    lm(tokens, labels=tokens).loss.backward()
    for name, gradient in selected.gradients():
        torch.testing.assert_close(gradient.view(-1), expected[name], rtol=1e-4, atol=1e-5)
    if unit != "neuron" and kind not in ("OPT", "Mixtral"):  # embeddings with an offset, experts
        assert set(seen) <= {1}  # no gradient of a whole matrix


def test_layers_below_the_lowest_selected_weight_get_no_backward_pass() -> None:
    lm = architecture("Llama")
    shapes = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    bools = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    bools["model.layers.1.mlp.up_proj.weight"][3] = True
    selected = SelectedWeights(lm, WeightMask.from_bools(bools))
    with capture(lm, [0, 1]) as hidden:
        loss = lm(torch.arange(8)[None]).logits.square().mean()
    assert not hidden[0].requires_grad and hidden[1].requires_grad
    loss.backward()
    assert [name for name, _ in selected.gradients()] == ["model.layers.1.mlp.up_proj.weight"]


def test_tensors_without_heads_have_rows() -> None:
    lm = architecture("Llama")
    shapes = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    made = Units("head", shapes, Geometry.of(lm))
    assert "model.embed_tokens.weight" in made.as_rows
    assert not any("q_proj" in name for name in made.as_rows)
    assert sum(made.sizes) == sum(map(prod, shapes.values()))


# -- doors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["rows", "block", "block:0x4", "block:4", "block:RxC", "", "Row"])
def test_an_unknown_unit_is_one_line_with_the_list(unit: str) -> None:
    with pytest.raises(WagleError, match=r"^unit: must be one of weight, row, .*, layer, got"):
        check_unit(unit)


@pytest.mark.parametrize(("density", "warned"), [(0.3, False), (0.2, True)])
def test_a_density_below_one_unit_selects_one(
    density: float, warned: bool, heard: pytest.LogCaptureFixture
) -> None:
    made = Units("row", {"w": (4, 10)})
    (chosen,) = made.choose(torch.tensor([1.0, 3.0, 2.0, 3.0]), [density], low=False)
    assert chosen.tolist() == [False, True, False, False]
    warning = f"density {density} is less than one row of 10 weights: one is selected"
    assert (warning in heard.text) == warned


def test_random_units_are_drawn_whole_and_evenly() -> None:
    """Means of many random numbers would be near one half, and vectors would always win."""
    shapes = {"wide": (100, 50), "bias": (100,)}
    shares = []
    for seed in range(20):
        made = Units("row", shapes)
        (chosen,) = made.choose(Random(seed).of_units(made.count).double(), [0.5], low=False)
        shares.append(chosen[100:].double().mean())
    assert abs(np.mean(shares) - 0.5) < 0.05


def test_stored_scores_give_the_same_units(tmp_path: Any) -> None:
    scores = {"layers.0.w": torch.arange(12.0).view(3, 4), "layers.0.b": torch.tensor([1.0, 20, 2])}
    shapes = {name: tuple(tensor.shape) for name, tensor in scores.items()}
    file = write_scores(tmp_path / "s.scores", iter(scores.items()), shapes, {"score": "Snip"})
    mask = mask_from_scores(file, 0.4, unit="row")
    assert mask["layers.0.b"].tolist() == [False, True, False]
    assert mask["layers.0.w"].sum(1).tolist() == [0, 0, 4]
    assert mask.metadata["units"] == {"0": [2, 6]}
    with pytest.raises(WagleError, match="unit: the scores do not say which weights are a head"):
        mask_from_scores(file, 0.4, unit="head")
    with pytest.raises(WagleError, match="scope: must be global with unit row, got tensor"):
        mask_from_scores(file, 0.4, unit="row", scope="tensor")


@pytest.mark.parametrize("broken", [{"heads": "4"}, {"neurons": 3}, {"kv_heads": None}])
def test_a_broken_geometry_is_refused_by_its_key(tmp_path: Any, broken: dict[str, Any]) -> None:
    geometry = Geometry(4, 2, 4, [24], False)._asdict() | broken
    shapes = {"layers.0.w": (3, 4)}
    scores = iter([("layers.0.w", torch.ones(3, 4))])
    file = write_scores(tmp_path / "s.scores", scores, shapes, {"geometry": geometry})
    with pytest.raises(WagleError, match=f"made_by.geometry.{next(iter(broken))}"):
        mask_from_scores(file, 0.4, unit="head")
