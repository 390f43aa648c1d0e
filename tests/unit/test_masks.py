"""``WeightMask``: set laws against plain bool tensors, random and module masks, files that are whole or refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LLAMA, random_bools
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.masks import Restriction, WeightMask, bits, describe_origin, expected_jaccard
from wagle_pl.masks import mask as masks
from wagle_pl.masks.bits import count_bits, filled_bits, pack_bits, random_bits, unpack_bits
from wagle_pl.masks.names import in_module, layer_of, module_label, parse_layers

LAWS = settings(max_examples=80, deadline=None)


@st.composite
def bool_pairs(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two dicts of bool tensors of the same odd shapes, of any density, empty and full ones among them."""
    shapes = draw(
        st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=4)
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = st.sampled_from([0.0, 0.03, 0.3, 0.9, 1.0])
    return tuple(
        {
            f"t{i}": torch.rand(shape, generator=generator) < draw(density)
            for i, shape in enumerate(shapes)
        }
        for _ in range(2)
    )


def as_mask(bools: dict[str, Tensor], **metadata: Any) -> WeightMask:
    return WeightMask.from_bools(bools, metadata)


def same(mask: WeightMask, bools: dict[str, Tensor]) -> bool:
    """The mask holds just these bits, and 0 in the padding of every last byte."""
    exact = all(torch.equal(mask.packed(name), pack_bits(bits)) for name, bits in bools.items())
    return exact and list(mask) == list(bools)


# -- bits -------------------------------------------------------------------------------------------------------------


@LAWS
@given(bool_pairs())
def test_bits_come_back_and_are_counted(pair: tuple[dict[str, Tensor], ...]) -> None:
    for tensor in pair[0].values():
        packed = pack_bits(tensor)
        assert packed.numel() == -(-tensor.numel() // 8)
        assert torch.equal(unpack_bits(packed, tensor.shape), tensor)
        assert count_bits(packed) == tensor.sum()


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("value", [True, False])
def test_filled_bits_leave_the_padding_zero(size: int, value: bool) -> None:
    assert torch.equal(filled_bits(size, value), pack_bits(torch.full((size,), value)))


# -- set laws ---------------------------------------------------------------------------------------------------------


@LAWS
@given(bool_pairs())
def test_set_algebra_is_that_of_bool_tensors(pair: tuple[dict[str, Tensor], ...]) -> None:
    a, b = pair
    x, y = as_mask(a), as_mask(b)
    assert same(x & y, {n: a[n] & b[n] for n in a})
    assert same(x | y, {n: a[n] | b[n] for n in a})
    assert same(x - y, {n: a[n] & ~b[n] for n in a})
    assert same(~x, {n: ~a[n] for n in a})


@LAWS
@given(bool_pairs())
def test_jaccard_against_direct_computation(pair: tuple[dict[str, Tensor], ...]) -> None:
    a, b = (torch.cat([t.reshape(-1) for t in bools.values()]) for bools in pair)
    either = int((a | b).sum())
    expected = int((a & b).sum()) / either if either else 1.0
    x, y = (as_mask(bools) for bools in pair)
    assert x.jaccard(y) == y.jaccard(x) == expected
    assert x.jaccard(x) == 1.0


def test_expected_jaccard_is_that_of_independent_masks() -> None:
    drawn = [random_bools({"a": (300_001,)}, share, seed) for seed, share in ((1, 0.1), (2, 0.4))]
    p, q = map(as_mask, drawn)
    assert p.jaccard(q) == pytest.approx(expected_jaccard(p.density, q.density), rel=0.02)
    assert expected_jaccard(0, 0) == expected_jaccard(0, 0.3) == 0
    assert expected_jaccard(1, 1) == 1


def test_masks_of_different_models_do_not_mix() -> None:
    x = as_mask({"a": torch.ones(2, 3, dtype=torch.bool)}, model_fingerprint="1" * 64)
    for shapes in ({"b": (2, 3)}, {"a": (3, 2)}):
        other = as_mask(random_bools(shapes))
        for operation in ("__and__", "__or__", "__sub__", "jaccard"):
            with pytest.raises(WagleError, match="another model"):
                getattr(x, operation)(other)
    with pytest.raises(WagleError, match=r"fingerprint 111111111111.* has 222222222222"):
        x & as_mask({"a": torch.ones(2, 3, dtype=torch.bool)}, model_fingerprint="2" * 64)
    with pytest.raises(TypeError):
        x & {"a": 1}


def test_results_say_what_they_were_made_from() -> None:
    bools = random_bools({"a": (9,)})
    x = as_mask(bools, score="Wagle", density=0.1, model="m", model_fingerprint="f")
    y = as_mask(bools, score="Random", density=0.2)
    result = y - (x & ~y)
    assert (result.metadata["model"], result.metadata["model_fingerprint"]) == ("m", "f")
    of = result.metadata["of"]
    assert (of[0], of[1]["of"][0]) == (y.metadata, x.metadata)
    wagle, random = "Wagle, density 0.1", "Random, density 0.2"
    assert result.origin == f"({random}) minus (({wagle}) and (not ({random})))"
    assert x.random_like(5).origin == "random like (Wagle, density 0.1), seed 5"
    assert describe_origin({}) == "unknown"


# -- random masks -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.floats(0, 1), st.integers(0, 2**32))
def test_random_bits_are_exactly_as_many(sizes: list[int], share: float, seed: int) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    k = round(share * sum(sizes))
    drawn = random_bits(named, k, seed)
    assert sum(count_bits(packed) for packed in drawn.values()) == k
    for name, size in named.items():  # no padding bit is set
        assert torch.equal(pack_bits(unpack_bits(drawn[name], [size])), drawn[name])


def test_every_set_is_equally_likely() -> None:
    """χ² over the C(6, 2) = 15 sets of two of six weights in two tensors: below 36.1 (14 degrees of freedom, 0.1%)."""
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(6000):
        drawn = random_bits({"a": 4, "b": 2}, 2, seed)
        row = torch.cat([unpack_bits(drawn["a"], [4]), unpack_bits(drawn["b"], [2])])
        seen[tuple(row.nonzero().view(-1).tolist())] += 1
    assert set(seen) == set(combinations(range(6), 2))
    assert sum((n - 400) ** 2 / 400 for n in seen.values()) < 36.1


def test_random_like_spreads_over_all_tensors_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "CHUNK", 1 << 10)
    mask = as_mask(
        {"a": torch.ones(5001, dtype=torch.bool), "b": torch.zeros(30, 1000, dtype=torch.bool)}
    )
    drawn = mask.random_like(7)
    assert drawn.count() == mask.count() == 5001
    assert drawn == mask.random_like(7) != mask.random_like(8)
    for name, size in (("a", 5001), ("b", 30_000)):
        assert drawn.count(name) / size == pytest.approx(5001 / 35_001, rel=0.1)
    rows = drawn["b"].sum(1).double()
    assert rows.var() < 3 * 1000 * 0.143 * 0.857  # no row, so no chunk, is favoured
    assert abs(mask.jaccard(drawn) - expected_jaccard(mask.density, mask.density)) < 0.01
    with pytest.raises(WagleError, match="seed"):
        mask.random_like(-1)


# -- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "layers", "selected"),
    [
        (["mlp"], None, lambda n: ".mlp." in n),
        (["attn"], None, lambda n: ".self_attn." in n),
        (["self_attn"], "1", lambda n: ".layers.1.self_attn." in n),
        (["mlp.down_proj"], "1-2", lambda n: "down_proj" in n and n.split(".")[2] in "12"),
        (["q", "lm_head"], None, lambda n: ".q_proj." in n or n.startswith("lm_head")),
        (["norm"], "0,2-3", lambda n: "layernorm" in n and ".1." not in n),
        (["embed"], None, lambda n: "embed_tokens" in n),
        (None, "3", lambda n: ".layers.3." in n),
    ],
)
def test_modules(modules: list[str], layers: str, selected: Any) -> None:
    mask = Restriction(modules=modules, layers=layers).mask(LLAMA, "m", "f")
    assert same(mask, {name: torch.full(shape, selected(name)) for name, shape in LLAMA.items()})
    assert mask.metadata["model_fingerprint"] == "f"
    assert layers is None or layers in mask.origin


@pytest.mark.parametrize(
    ("modules", "layers", "message"),
    [
        (
            "experts",
            None,
            "'experts'; the model has model, embed_tokens, layers, self_attn, q_proj",
        ),
        ("down_proj.mlp", None, "no parameter lies in"),
        ("mlp", "2-4", "no layer 4, the model has layers 0-3"),
        ("lm_head", "2", "nothing is selected"),
        ("mlp", "3-1", "no range of layers"),
        ("mlp", "two", "no range of layers"),
    ],
)
def test_modules_that_do_not_exist(modules: str, layers: str, message: str) -> None:
    with pytest.raises(WagleError, match=message):
        Restriction(modules=[modules], layers=layers).mask(LLAMA)


def test_names_of_other_families() -> None:
    for name, module in (
        ("transformer.h.3.attn.c_attn.weight", "attn"),
        ("gpt_neox.layers.0.attention.dense.weight", "attn"),
        ("model.decoder.layers.0.fc2.bias", "mlp"),
        ("model.decoder.embed_positions.weight", "embed"),
        ("model.layers.0.linear_attn.A_log", "attn"),
        ("model.layers.0.mlp.experts.up_proj", "up"),
    ):
        assert in_module(name, module)
    assert not in_module("model.layers.0.post_attention_layernorm.weight", "attn")
    assert layer_of("transformer.h.3.ln_1.weight") == 3
    assert module_label("q_norm") == module_label("ln_f") == "norms"
    assert parse_layers(" 0-1, 7 ") == {0, 1, 7}


# -- statistics -------------------------------------------------------------------------------------------------------


def test_densities_against_direct_counting() -> None:
    bools = random_bools(LLAMA)
    mask = as_mask(bools)

    def share(inside: Any) -> float:
        part = [bools[name] for name in bools if inside(name)]
        return sum(int(t.sum()) for t in part) / sum(t.numel() for t in part)

    stats, grid = mask.stats(), mask.grid()
    assert stats["tensor"] == {name: share(name.__eq__) for name in LLAMA}
    assert stats["layer"] == {
        str(i): share(lambda n, i=i: f"layers.{i}." in n) for i in range(4)
    } | {"other": share(lambda n: "layers" not in n)}
    assert stats["module"]["up_proj"] == share(lambda n: "up_proj" in n)
    assert grid["2"]["norms"] == share(lambda n: "layers.2." in n and "norm" in n)
    assert list(grid["0"]) == ["q", "k", "up", "down", "norms"]
    assert set(grid["other"]) == {"embed_tokens", "norm", "lm_head"}
    assert mask.density == share(lambda n: True)


# -- files ------------------------------------------------------------------------------------------------------------


def test_file_round_trip_is_lazy(tmp_path: Path) -> None:
    mask = as_mask(random_bools(LLAMA), score="Wagle", density=0.3)
    path = mask.save(tmp_path / "mask")
    assert path.name == "mask.safetensors"
    loaded = WeightMask.load(tmp_path / "mask")
    assert loaded == mask and list(loaded) == list(mask) and loaded.metadata == mask.metadata
    assert loaded.save(tmp_path / "again") and WeightMask.load(tmp_path / "again") == mask
    (loaded & mask).save(path)  # over the very file that is open
    assert WeightMask.load(path) == mask == loaded


def test_loading_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_mask(random_bools(LLAMA)).save(tmp_path / "mask")
    read: list[str] = []

    class Recording:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = safe_open(*args, **options)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(masks, "safe_open", Recording)
    mask = WeightMask.load(path)
    mask.check(LLAMA)
    assert read == []
    mask.count("lm_head.weight")
    assert read == ["lm_head.weight"]


def test_a_file_is_small_and_holds_nothing_but_bytes(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (250, 400) for i in range(10)}
    path = as_mask(random_bools(shapes), score="Wagle", density=0.3).save(tmp_path / "mask")
    assert path.stat().st_size <= 0.13 * 1_000_000
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.uint8}


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, keep: float) -> None:
    path = as_mask(random_bools(LLAMA)).save(tmp_path / "mask")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(WagleError, match="not a whole safetensors file"):
        WeightMask.load(path)


@settings(max_examples=150)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_a_damaged_header_is_an_error_of_ours_or_harmless(
    position: float, value: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    mask = as_mask(random_bools(LLAMA))
    mask.save(path)
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[int(position * (8 + header))] ^= value
    path.write_bytes(content)
    try:
        loaded = WeightMask.load(path)
        loaded.check(LLAMA)
        loaded.count()
    except WagleError:
        pass


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(WagleError, match="does not exist"):
        WeightMask.load(tmp_path / "none")
    path = as_mask({"a": torch.ones(9, dtype=torch.bool)}).save(tmp_path / "mask")
    with safe_open(path, framework="pt") as file:
        header = file.metadata()

    def rewrite(tensors: Any = None, **changes: str) -> Path:
        tensors = tensors or {"a": torch.tensor([255, 1], dtype=torch.uint8)}
        changed = {k: v for k, v in {**header, **changes}.items() if v != ""}
        save_file(tensors, tmp_path / "changed.safetensors", metadata=changed)
        return tmp_path / "changed.safetensors"

    assert WeightMask.load(rewrite()).count() == 9
    for changes, message in (
        ({"format": "something.else"}, "not a wagle_pl mask"),
        ({"format": ""}, "not a wagle_pl mask"),
        ({"format_version": "2"}, "has mask format 2; this version reads 1"),
        ({"format_version": "new"}, "has mask format new; this version reads 1"),
        ({"density": "1"}, "its metadata do not match their digest"),
        ({"shapes": "", "digest": ""}, "metadata: key 'shapes' is missing"),
        ({"shapes": "[1", "digest": ""}, "metadata key 'shapes' line 1: malformed JSON"),
        ({"shapes": json.dumps({"a": [17]}), "digest": ""}, "do not fit its shape"),
        ({"shapes": json.dumps({"a": [9], "b": [1]}), "digest": ""}, "bits of b"),
        ({"tensors": {"a": torch.zeros(2)}}, "do not fit its shape"),
    ):
        with pytest.raises(WagleError, match=message):
            WeightMask.load(rewrite(**changes))
    with pytest.raises(WagleError, match="beyond the last weight"):
        WeightMask.load(rewrite({"a": torch.tensor([255, 3], dtype=torch.uint8)})).count()
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(WagleError, match="not a wagle_pl mask"):
        WeightMask.load(tmp_path / "weights")


def test_an_error_while_saving_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = as_mask(random_bools(LLAMA, seed=1))
    path = old.save(tmp_path / "mask")

    def half(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(masks, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        as_mask(random_bools(LLAMA, seed=2)).save(path)
    assert WeightMask.load(path) == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_check_names_the_first_difference() -> None:
    mask = as_mask({"a": torch.ones(2, 3, dtype=torch.bool)}, model_fingerprint="1" * 64)
    mask.check({"a": (2, 3)})
    mask.check({"a": (2, 3)}, "1" * 64)
    for shapes, fingerprint, message in (
        ({"a": (2, 3), "b": (1,)}, None, "no tensor for parameter b"),
        ({}, None, "a tensor a that the model lacks"),
        ({"a": (3, 2)}, None, r"another shape of a than the model: \(2, 3\) and \(3, 2\)"),
        ({"a": (2, 3)}, "2" * 64, "same shapes, other weights"),
    ):
        with pytest.raises(WagleError, match=message):
            mask.check(shapes, fingerprint)


# -- torch files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    bools = random_bools(LLAMA)
    shuffled = {name: bools[name].to(dtype) for name in reversed(list(bools))}
    torch.save(shuffled, tmp_path / "mask.pt", _use_new_zipfile_serialization=zipped)
    mask = WeightMask.from_torch(tmp_path / "mask.pt", LLAMA, {"model_fingerprint": "f"})
    assert same(mask, bools)  # in the model's order
    assert mask.metadata["model_fingerprint"] == "f" and mask.origin == "imported from mask.pt"
    assert list(WeightMask.from_torch(tmp_path / "mask.pt")) == list(shuffled)
    back = torch.load(mask.to_torch(tmp_path / "back.pt"), weights_only=True)
    assert {tensor.dtype for tensor in back.values()} == {torch.bool}
    assert list(back) == list(bools) and all(torch.equal(back[n], b) for n, b in bools.items())


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("code of the file ran",))


def test_torch_files_that_are_no_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(content: Any) -> Path:
        torch.save(content, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    one = torch.ones(2, dtype=torch.bool)
    for content, shapes, message in (
        ([one], None, "holds no"),
        ({"a": {"b": one}}, None, "holds no"),
        ({"a": torch.tensor([0.0, 0.5])}, None, "a has values other than 0 and 1"),
        ({"a": one}, {"a": (3,)}, "another shape of a"),
        ({"a": one}, {"a": (2,), "b": (2,)}, "no tensor for parameter b"),
        ({"a": one, "b": one}, {"a": (2,)}, "that the model lacks"),
        ({"a": _Code()}, None, r"holds .*: only tensors and plain data are read"),
    ):
        with pytest.raises(WagleError, match=message):
            WeightMask.from_torch(write(content), shapes)
    assert "ran" not in capsys.readouterr().out
    for damaged in (b"", b"not a pickle", write({"a": one}).read_bytes()[:300]):
        (tmp_path / "y.pt").write_bytes(damaged)
        with pytest.raises(WagleError, match=r"mask file .* is damaged, or no mask file"):
            WeightMask.from_torch(tmp_path / "y.pt")
    with pytest.raises(WagleError, match="does not exist"):
        WeightMask.from_torch(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightMask.from_bools({"a": torch.rand(3)}), "bools: a must be a bool tensor"),
        (lambda: WeightMask.from_bools({"a": [True]}), "bools: a: must be a Tensor"),
        (lambda: WeightMask.from_bools({1: torch.ones(1).bool()}), "bools: key: must be a text"),
        (lambda: WeightMask.from_bools(None), "bools: must be an object, got None"),
        (lambda: WeightMask.load(None), "path: must be a text or a Path, got None"),
        (lambda: WeightMask({}, {}).save(5), "path: must be a text or a Path, got 5"),
        (lambda: WeightMask({}, {}).random_like("x"), "seed: must be an integer of 0 or more"),
    ],
)
def test_what_is_no_mask_in_python(make: Any, message: str) -> None:
    with pytest.raises(WagleError, match=message):
        make()
