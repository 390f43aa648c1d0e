"""Patches: exact, reversible, refused where they do not belong, in little memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import RUN
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import Unwritable
from wagle_pl.core.tensorfiles import TensorFiles
from wagle_pl.lm.models import load_model
from wagle_pl.lm.saving import read_record
from wagle_pl.unlearning import patch as patches
from wagle_pl.unlearning.patch import Patch, apply_patch, digest_of, make_patch, revert_patch
from wagle_pl.unlearning.serving import write_sparse

Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    """A model folder with weights in one file or in several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"weights of long ago")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, where = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return folder


def weights(folder: Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def in_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """(n, bytes of a number)."""
    return tensor.reshape(-1).view(torch.uint8).view(-1, tensor.element_size())


def same_bits(a: Tensors, b: Tensors) -> bool:
    def layout(tensors: Tensors) -> dict[str, Any]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}

    return layout(a) == layout(b) and all(torch.equal(in_bytes(a[n]), in_bytes(b[n])) for n in a)


def base_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (50, 8), "layers.0.up": (8, 24), "layers.0.norm": (8,)}
    shapes |= {"scalar": (), "empty": (0, 3)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def base_and_unlearned(folder: Path) -> tuple[Path, Path]:
    old = base_tensors()
    return write(folder / "base", old), write(folder / "unlearned", moved(old, 0.3, 1))


def moved(tensors: Tensors, density: float, seed: int, avoid: Tensors | None = None) -> Tensors:
    """Some weights changed a little, one to −0 and one to NaN; none where ``avoid`` differs from ``tensors``."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in tensors.items():
        mask = torch.rand(tensor.shape, generator=generator) < density
        if avoid is not None:
            mask &= tensor == avoid[name]
        noise = 1 + 0.05 * torch.randn(tensor.shape, generator=generator)
        changed[name] = torch.where(mask, (tensor * noise).to(tensor.dtype), tensor)
    if avoid is None:
        changed["embed"][0, 0], changed["embed"][0, 1] = -0.0, torch.nan
    return changed


@settings(max_examples=25)
@given(
    dtype=st.sampled_from(
        [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.int8]
    ),
    density=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    shards=st.sampled_from([1, 3]),
    frame=st.sampled_from([7, 64, 1 << 20]),
    seed=st.integers(0, 9),
)
def test_apply_and_revert_bit_for_bit(
    tmp_path_factory, dtype, density, shards, frame, seed
) -> None:
    folder = tmp_path_factory.mktemp("patch")
    old = base_tensors(dtype, seed)
    if dtype == torch.int8:
        new = {name: tensor ^ (torch.rand(tensor.shape) < density) for name, tensor in old.items()}
    else:
        new = moved(old, density, seed)
    base, unlearned = write(folder / "base", old, shards), write(folder / "unlearned", new)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patches, "FRAME", frame)
        patch = make_patch(base, unlearned, folder / "forget.patch")
        apply_patch(base, folder / "forget.patch", folder / "applied")
        revert_patch(folder / "applied", folder / "forget.patch", folder / "back")
        revert_patch(unlearned, folder / "forget.patch", folder / "back too")
    differ = [in_bytes(old[name]) != in_bytes(new[name]) for name in old if old[name].numel()]
    assert patch.changed == sum(int(bits.any(-1).sum()) for bits in differ)
    assert patch.weights == sum(tensor.numel() for tensor in old.values())
    for made, expected in (("applied", new), ("back", old), ("back too", old)):
        assert same_bits(weights(folder / made), expected)
    digests = {digest_of(TensorFiles(made)) for made in (folder / "applied", unlearned)}
    assert digests == {patch.unlearned}
    sizes = {path.name: path.stat().st_size for path in (folder / "applied").iterdir()}
    for path in base.iterdir():
        assert sizes.get(path.name) == (None if path.suffix == ".bin" else path.stat().st_size)


@pytest.mark.parametrize(
    ("lines", "most"), [((1000, 1000), 1.1), ((1000, 1), 0.75), ((1, 1000), 0.75)]
)
def test_a_patch_is_a_safetensors_file_and_small(
    tmp_path: Path, lines: tuple[int, int], most: float
) -> None:
    """Of a tenth of the weights, of whole rows, and of whole columns."""
    generator = torch.Generator().manual_seed(0)
    old = {"w": torch.randn(1000, 1000, generator=generator).bfloat16()}
    selected = torch.rand(lines, generator=generator) < 0.1
    step = 0.01 * torch.randn(1000, 1000, generator=generator)
    new = {"w": torch.where(selected, (old["w"] * (1 + step)).bfloat16(), old["w"])}
    make_patch(write(tmp_path / "a", old), write(tmp_path / "b", new), tmp_path / "p.patch")
    with safe_open(tmp_path / "p.patch", framework="np") as file:
        assert list(file.keys()) == ["w"] and file.get_tensor("w").dtype == np.uint8
        assert file.metadata()["format"] == "wagle_pl.patch"
    size, changed = (tmp_path / "p.patch").stat().st_size, Patch(tmp_path / "p.patch").changed
    assert size < most * changed  # a bf16 word and its place cost 6 bytes when written out


def test_words_that_do_not_compress(tmp_path: Path) -> None:
    """Differences without any pattern grow a little when they are compressed."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(-(2**31), 2**31, (2, 1 << 21), dtype=np.int32)
    old, new = ({"w": torch.from_numpy(words)} for words in drawn)
    base, unlearned = write(tmp_path / "a", old), write(tmp_path / "b", new)
    make_patch(base, unlearned, tmp_path / "p.patch")
    apply_patch(base, tmp_path / "p.patch", tmp_path / "applied")
    assert same_bits(weights(tmp_path / "applied"), new)


def test_disjoint_patches_in_either_order(tmp_path: Path) -> None:
    old = base_tensors()
    first = moved(old, 0.3, seed=1)
    second = moved(old, 0.3, seed=2, avoid=first)
    base = write(tmp_path / "base", old, shards=2)
    for name, tensors in (("a", first), ("b", second)):
        make_patch(base, write(tmp_path / name, tensors), tmp_path / f"{name}.patch")
    results = []
    for order in ("ab", "ba"):
        one = tmp_path / order[0] / "applied"
        apply_patch(base, tmp_path / f"{order[0]}.patch", one)
        apply_patch(one, tmp_path / f"{order[1]}.patch", tmp_path / order)
        results.append(tmp_path / order)
    expected = {
        n: torch.where(first[n].view(torch.int16) != old[n].view(torch.int16), first[n], second[n])
        for n in old
    }
    assert all(same_bits(weights(folder), expected) for folder in results)
    assert read_record(str(results[0])) == read_record(str(results[1]))
    # the first one, from under the second
    revert_patch(results[0], tmp_path / "a.patch", tmp_path / "only b")
    assert same_bits(weights(tmp_path / "only b"), second)
    revert_patch(tmp_path / "only b", tmp_path / "b.patch", tmp_path / "neither")
    assert same_bits(weights(tmp_path / "neither"), old)
    assert not (tmp_path / "neither" / "wagle.json").exists()
    with pytest.raises(WagleError, match=r"has been applied to .* already"):
        apply_patch(results[0], tmp_path / "a.patch", tmp_path / "x")
    with pytest.raises(WagleError, match="has not been applied"):
        revert_patch(tmp_path / "only b", tmp_path / "a.patch", tmp_path / "x")


def test_overlapping_patches_say_so(tmp_path: Path) -> None:
    old = base_tensors()
    base = write(tmp_path / "base", old)
    for name, seed in (("1", 1), ("2", 2)):
        unlearned = write(tmp_path / name, moved(old, 0.5, seed))
        make_patch(base, unlearned, tmp_path / f"{name}.patch")
    apply_patch(base, tmp_path / "1.patch", tmp_path / "one")
    with pytest.raises(WagleError, match=r"overlaps the patch applied .* both change embed"):
        apply_patch(tmp_path / "one", tmp_path / "2.patch", tmp_path / "both")
    assert not (tmp_path / "both").exists() and not list(tmp_path.glob(".*"))


def test_anything_else_is_refused(tmp_path: Path) -> None:
    (base, unlearned), old = base_and_unlearned(tmp_path), base_tensors()
    file = tmp_path / "p.patch"
    make_patch(base, unlearned, file)
    other = {name: tensor.clone() for name, tensor in old.items()}
    other["scalar"].view(torch.int16).bitwise_xor_(1)  # which the patch need not touch
    write(tmp_path / "other", other)
    (tmp_path / "text.patch").write_text("no patch")
    save_file({"w": torch.zeros(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "cut.patch").write_bytes(file.read_bytes()[:-20])
    write(tmp_path / "shape", {**old, "embed": old["embed"][:-1]})
    write(tmp_path / "names", {**old, "more": old["embed"].clone()})
    (tmp_path / "bare").mkdir()
    cases = [
        (apply_patch, tmp_path / "other", file, "applies to the model with digest"),
        (apply_patch, unlearned, file, "applies to the model with digest"),
        (revert_patch, base, file, "reverts the model with digest"),
        (apply_patch, base, tmp_path / "text.patch", "is not a whole safetensors file"),
        (apply_patch, base, tmp_path / "cut.patch", "is not a whole safetensors file"),
        (apply_patch, base, tmp_path / "plain.safetensors", "is not a wagle_pl patch"),
        (apply_patch, base, tmp_path / "none.patch", "does not exist"),
        (apply_patch, tmp_path / "none", file, "does not exist"),
        (make_patch, base, tmp_path / "shape", "embed is BF16"),
        (make_patch, base, tmp_path / "names", "has a tensor more that"),
        (make_patch, base, tmp_path / "bare", "has no model.safetensors"),
    ]
    for function, first, second, message in cases:
        with pytest.raises(WagleError, match=message):
            function(first, second, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_damage_is_noticed(tmp_path: Path) -> None:
    base, unlearned = base_and_unlearned(tmp_path)
    make_patch(base, unlearned, tmp_path / "p.patch")
    whole = (tmp_path / "p.patch").read_bytes()
    noticed = 0
    for position in range(1, 200, 9):
        damaged = bytearray(whole)
        damaged[-position] ^= 4
        patch = tmp_path / "damaged.patch"
        patch.write_bytes(damaged)
        try:
            written = apply_patch(base, patch, tmp_path / "out", overwrite=True)
            assert written == Patch(tmp_path / "p.patch").unlearned  # a padding bit: harmless
        except WagleError as error:
            noticed += "damaged at tensor" in str(error)
    assert noticed > 15


def test_a_full_disk_leaves_the_old_result_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, unlearned = base_and_unlearned(tmp_path)
    make_patch(base, unlearned, tmp_path / "p.patch")
    apply_patch(base, tmp_path / "p.patch", tmp_path / "out")
    written = (tmp_path / "p.patch", *(tmp_path / "out").iterdir())
    before = {path: path.read_bytes() for path in written}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(patches, "_copy_other_files", full)
    monkeypatch.setattr(patches, "_write_difference", full)
    with pytest.raises(Unwritable, match="No space left on device"):
        apply_patch(base, tmp_path / "p.patch", tmp_path / "out", overwrite=True)
    with pytest.raises(Unwritable, match="No space left on device"):
        make_patch(base, unlearned, tmp_path / "p.patch", overwrite=True)
    assert before == {path: path.read_bytes() for path in before}
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    base, unlearned = base_and_unlearned(tmp_path)
    make_patch(base, unlearned, tmp_path / "patches/p.patch")
    with pytest.raises(WagleError, match="patches is a folder: name a file in it"):
        make_patch(base, unlearned, tmp_path / "patches", overwrite=True)
    with pytest.raises(WagleError, match=r"patches holds p\.patch"):
        apply_patch(base, tmp_path / "patches/p.patch", tmp_path / "patches", overwrite=True)
    assert (tmp_path / "patches/p.patch").is_file()


def test_peak_memory_is_that_of_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"big": torch.randn(2_000_000), "small": torch.randn(10)}
    new = {name: torch.where(torch.rand_like(t) < 0.2, t * 1.01, t) for name, t in old.items()}
    base, unlearned = write(tmp_path / "base", old), write(tmp_path / "unlearned", new)
    monkeypatch.setattr(patches, "FRAME", 1 << 15)
    tracemalloc.start()
    make_patch(base, unlearned, tmp_path / "p.patch")
    apply_patch(base, tmp_path / "p.patch", tmp_path / "applied")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same_bits(weights(tmp_path / "applied"), new)
    assert peak < 2_000_000  # bytes; the tensor has 8,000,000


@pytest.mark.parametrize("files", [(), ("README.md",), ("wagle.json", "README.md")])
def test_revert_gives_back_the_records_of_the_base(tmp_path: Path, files: tuple[str, ...]) -> None:
    """What it says of itself, and no more, though the model to revert was written by a run."""
    base, new = write(tmp_path / "base", base_tensors()), moved(base_tensors(), 0.1, 1)
    for name in files:
        (base / name).write_text(json.dumps({"kind": "mine", "is": name}))
    unlearned = write(tmp_path / "unlearned", new)
    (unlearned / "wagle.json").write_text(json.dumps({"format_version": 1, "lineage": [RUN]}))
    (unlearned / "README.md").write_text("# Unlearned model\n")
    make_patch(base, unlearned, tmp_path / "p.patch")
    revert_patch(unlearned, tmp_path / "p.patch", tmp_path / "back")
    for name in ("wagle.json", "README.md"):
        before, after = base / name, tmp_path / "back" / name
        if name in files:
            assert after.read_text() == before.read_text()
        else:
            assert not after.exists()


# -- loaded models and sparse updates ----------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Patches of one base: ``a`` and ``b`` change other weights, ``c`` those of ``a``; ``d`` follows ``a``."""
    monkeypatch.setattr(patches, "FRAME", 1 << 10)
    old = weights(Path(tiny_model))
    new = {"a": moved(old, 0.3, 1, avoid=old)}
    new |= {"b": moved(old, 0.3, 2, avoid=new["a"]), "c": moved(old, 0.3, 1, avoid=old)}
    new |= {"d": moved(new["a"], 0.3, 3, avoid=new["a"])}
    new["c"]["model.norm.weight"][0] += 1
    folders = {name: write(tmp_path / name, tensors) for name, tensors in new.items()}
    for name, folder in folders.items():
        base = folders["a"] if name == "d" else Path(tiny_model)
        make_patch(base, folder, tmp_path / f"{name}.patch")
    return {name: tmp_path / f"{name}.patch" for name in new}


def held(lm: torch.nn.Module) -> Tensors:
    return {name: p.detach().clone() for name, p in lm.named_parameters()}


def test_a_loaded_model_switches_in_place_and_back(
    served: dict[str, Path], tiny_model: str
) -> None:
    lm = load_model(tiny_model)
    pointers, old = [p.data_ptr() for p in lm.parameters()], held(lm)
    of = {name: weights(path.with_suffix("")) for name, path in served.items()}
    with Patch(served["a"]).attach(lm):
        assert same_bits(held(lm), of["a"])
        with Patch(served["d"]).attach(lm):
            assert same_bits(held(lm), of["d"])
        with Patch(served["b"]).attach(lm):  # beside a, not on it
            both = {n: torch.where(of["a"][n] != old[n], of["a"][n], of["b"][n]) for n in old}
            assert same_bits(held(lm), both)
        assert same_bits(held(lm), of["a"])
    assert same_bits(held(lm), old)
    a, b = (Patch(served[name]).attach(lm) for name in "ab")
    a.detach()  # the one below, as b is beside it
    assert same_bits(held(lm), of["b"])
    a.attach(lm)
    for patch in (b, a):
        patch.detach()
    assert same_bits(held(lm), old)
    assert pointers == [p.data_ptr() for p in lm.parameters()]  # no second copy


def test_what_cannot_be_attached_or_detached_leaves_the_model_as_it_is(
    served: dict[str, Path], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(tiny_model)
    a, b, c = (Patch(served[name]) for name in "abc")

    def refuse(do: Any, message: str, model: torch.nn.Module = lm) -> None:
        before = held(model)
        with pytest.raises(WagleError, match=message):
            do()
        assert same_bits(held(model), before)

    other = load_model(tiny_model)
    other.model.norm.weight.data[0] += 1  # which patch a does not touch
    refuse(lambda: a.attach(other), "applies to the model with digest .* the loaded model", other)
    other.bfloat16()
    refuse(lambda: a.attach(other), "in another shape or dtype", other)
    other.to("meta")
    refuse(lambda: a.attach(other), "does not hold .* in memory")
    refuse(a.detach, "not attached to a model")
    a.attach(lm)
    refuse(lambda: a.attach(lm), "attached already")
    refuse(lambda: Patch(a.path).attach(lm), "attached to this model already")
    refuse(lambda: c.attach(lm), "overlaps one that is attached: both change")
    d = Patch(served["d"]).attach(lm)
    refuse(a.detach, r"d\.patch was attached after .*a\.patch: detach it first")
    d.detach()
    b.attach(lm)
    start = held(lm)
    lm.bfloat16()
    refuse(b.detach, "in another shape or dtype")
    lm.float()
    refuse(b.detach, "has changed since .*b.patch was attached")  # rounded
    lm.load_state_dict(start, strict=False)  # without the tied head

    moves, calls = Patch.moves, []

    def interrupted(patch: Patch, name: str, *rest: Any) -> Any:
        calls.append(name)
        for number, frame in enumerate(moves(patch, name, *rest)):
            if len(calls) == 1 + len(b.tensors) and number == 3:  # all are checked, some written
                monkeypatch.setattr(Patch, "moves", moves)
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(Patch, "moves", interrupted)
    with pytest.raises(KeyboardInterrupt):
        b.detach()
    assert same_bits(held(lm), start)
    b.detach()
    a.detach()
    assert same_bits(held(lm), weights(Path(tiny_model)))


class CheckpointWeightPatch(NamedTuple):
    """By vLLM's documentation: values at flat indices into the full checkpoint tensor of this shape."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor


def loaded(tensors: Tensors, update: Path) -> Tensors:
    """What a server makes of a sparse update, checked as its documentation says."""
    result = {name: tensor.clone() for name, tensor in tensors.items()}
    with safe_open(update, "pt") as file:
        for name, shape in json.loads(file.metadata()["shapes"]).items():
            values, indices = (file.get_tensor(f"{name}.{part}") for part in ("values", "indices"))
            patch = CheckpointWeightPatch(name, tuple(shape), values.dtype, values, indices)
            assert patch.dtype == tensors[name].dtype and patch.shape == tensors[name].shape
            assert patch.indices.dtype in (torch.int32, torch.int64) and patch.indices.dim() == 1
            assert len(patch.indices) == len(patch.values) and not patch.values.isnan().any()
            assert (patch.indices.diff() > 0).all()
            masked = torch.full(patch.shape, torch.nan, dtype=patch.dtype)
            masked.view(-1).index_copy_(0, patch.indices.long(), patch.values)
            result[name] = torch.where(masked.isnan(), result[name], masked)
    return result


def test_a_sparse_update_and_its_inverse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "FRAME", 100)
    old = base_tensors()
    new = moved(old, 0.3, 1, avoid=old)
    new["embed"][0, 1] = -0.0
    base, unlearned = write(tmp_path / "base", old), write(tmp_path / "unlearned", new)
    patch = make_patch(base, unlearned, tmp_path / "p.patch")
    update, inverse = tmp_path / "update.safetensors", tmp_path / "back.safetensors"
    write_sparse(base, patch.path, update, inverse)
    assert same_bits(loaded(old, update), new) and same_bits(loaded(new, inverse), old)
    new["embed"][0, 2] = torch.nan
    for name, tensors, message in (
        ("nan", new, "has no word for NaN, and embed holds one"),
        ("whole", {**old, "layers.0.norm": old["layers.0.norm"] + 1}, "with digest"),
    ):
        made = make_patch(base, write(tmp_path / name, tensors), tmp_path / f"{name}.patch")
        folder = base if name == "nan" else unlearned
        with pytest.raises(WagleError, match=message):
            write_sparse(folder, made.path, tmp_path / "x", tmp_path / "y")
    with pytest.raises(WagleError, match="exists already"):
        write_sparse(base, patch.path, tmp_path / "x", inverse)
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()
