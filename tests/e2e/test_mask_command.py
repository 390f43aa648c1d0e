"""``wagle mask``: every verb end to end, what it prints and what it refuses."""

from __future__ import annotations

import operator
import xml.etree.ElementTree as ElementTree
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LLAMA, random_bools

from wagle_pl.attribution.stored import write_scores
from wagle_pl.cli import app as cli
from wagle_pl.cli.mask import VERBS
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the masks ``a`` and ``b``."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        made_by = {"score": "Wagle", "density": 0.5, "model": "m", "model_fingerprint": "f" * 64}
        WeightMask.from_bools(random_bools(LLAMA, 0.5, seed), made_by).save(name)
    return tmp_path


@pytest.fixture
def mask(here: Path, capsys: pytest.CaptureFixture[str]):
    """Run ``wagle mask <args>``, the first of which are words, and return what it printed."""

    def run(*args: Any) -> str:
        capsys.readouterr()
        cli.main(["mask", *args[0].split(), *args[1:]])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refuses(here: Path, fails: Any):
    """Run ``wagle mask <args>`` that must end with exit code 2 and one line, which is returned."""
    return lambda args: fails(f"mask {args}")


def test_info(mask: Any) -> None:
    text = mask("info a.safetensors")
    found = WeightMask.load("a")
    assert f"selected     {found.count():,}" in text and f"density      {found.density:.6f}" in text
    assert "Wagle, density 0.5" in text and "ffffffffffff" in text
    row = next(line for line in text.splitlines() if line.startswith("up_proj"))
    selected = sum(found.count(n) for n in found if "up_proj" in n)
    assert row.split() == ["up_proj", "80", str(selected), f"{selected / 80:.6f}"]
    assert "model.layers.1.mlp.up_proj.weight" not in text
    assert "model.layers.1.mlp.up_proj.weight" in mask("info a --tensors")
    tables = [line for line in text.splitlines() if line[:2] in ("0 ", "1 ", "2 ")]
    assert len({len(line) for line in tables}) == 1  # aligned


def test_compare(mask: Any) -> None:
    mask("combine a minus b -o c")
    text = mask("compare a b c")
    a, b, c = (WeightMask.load(name) for name in "abc")
    pairs = {
        tuple(line.split()[:2]): line.split() for line in text.splitlines() if ", " in line[:4]
    }
    assert list(pairs) == [("a,", "b"), ("a,", "c"), ("b,", "c")]
    p, q = a.density, b.density
    assert pairs["a,", "b"][2:4] == [f"{a.jaccard(b):.6f}", f"{p * q / (p + q - p * q):.6f}"]
    assert pairs["b,", "c"][2] == "0.000000" and float(pairs["a,", "c"][2]) == pytest.approx(
        a.jaccard(c), abs=1e-6
    )
    assert "(Wagle, density 0.5) minus (Wagle, density 0.5)" in text


def test_compare_names_masks_of_one_stem_by_folder(mask: Any, here: Path, refuses: Any) -> None:
    (here / "other").mkdir()
    mask("invert a -o other/a")
    assert "a, other/a" in mask("compare a other/a")
    assert "given twice" in refuses("compare a a")
    assert "two masks" in refuses("compare a")


@pytest.mark.parametrize(
    ("how", "expected"),
    [("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("minus", lambda a, b: a & ~b)],
)
def test_combine(mask: Any, how: str, expected: Any) -> None:
    mask(f"combine a {how} b --output c")
    a, b = (random_bools(LLAMA, 0.5, seed) for seed in (0, 1))
    found = WeightMask.load("c")
    assert all(torch.equal(found[name], expected(a[name], b[name])) for name in LLAMA)
    assert found.metadata["model_fingerprint"] == "f" * 64


def test_invert_and_random(mask: Any) -> None:
    mask("invert a -o not_a")
    assert WeightMask.load("not_a") == ~WeightMask.load("a")
    assert "random" in mask("random a --seed 3 -o random") and Path("random.safetensors").is_file()
    assert WeightMask.load("random") == WeightMask.load("a").random_like(3)


def test_split(mask: Any, refuses: Any) -> None:
    """Parts are disjoint, their union is the mask, and of every tensor each has its share, exactly."""
    a = WeightMask.load("a")
    assert "part-8.safetensors" in mask("split a --parts 8 -o parts --seed 3")
    parts = [WeightMask.load(f"parts/part-{number}") for number in range(1, 9)]
    assert reduce(operator.or_, parts) == a
    assert sum(part.count() for part in parts) == a.count()
    for counts in [part.count() for part in parts], *([p.count(n) for p in parts] for n in a):
        assert max(counts) - min(counts) <= 1
    assert parts[0].origin == "part 1 of 8 of (Wagle, density 0.5)"
    assert parts[0].metadata["model_fingerprint"] == "f" * 64
    mask("split a --parts 8 -o again --seed 3")
    assert WeightMask.load("again/part-5") == parts[4]
    assert "parts: must be 2 to" in refuses("split a --parts 1 -o one")
    assert "parts exists already" in refuses("split a --parts 8 -o parts")


def test_split_keeps_rows_and_columns_whole(mask: Any) -> None:
    rows = {"rows": torch.zeros(7, 5, dtype=torch.bool), "bias": torch.ones(4, dtype=torch.bool)}
    rows |= {"columns": torch.zeros(6, 9, dtype=torch.bool), "all": torch.ones(3, 2) > 0}
    rows["rows"][[0, 2, 3, 6]] = rows["columns"][:, [1, 2, 8]] = True
    WeightMask.from_bools(rows).save("lines")
    mask("split lines --parts 2 -o parts")
    parts = [WeightMask.load(f"parts/part-{number}") for number in (1, 2)]
    assert parts[0] | parts[1] == WeightMask.from_bools(rows) and not (parts[0] & parts[1]).count()
    for part in parts:
        assert all(
            (part[name].sum(1) % width == 0).all() for name, width in (("rows", 5), ("all", 2))
        )
        assert (part["columns"].sum(0) % 6 == 0).all()
        assert part.count("rows") == 10 and part.count("bias") == 2
    assert abs(parts[0].count() - parts[1].count()) <= 6


def test_outputs_are_not_replaced_unasked(mask: Any, refuses: Any) -> None:
    before = Path("b.safetensors").read_bytes()
    for command in (
        "combine a and a -o b",
        "invert a -o b.safetensors",
        "random a -o b",
        "select no_scores --density 0.5 -o b",
        "convert b.pt -o b.safetensors",
    ):
        said = "b.safetensors exists already; choose another or pass --overwrite"
        assert said in refuses(command)
    assert Path("b.safetensors").read_bytes() == before
    mask("invert a -o b --overwrite")
    assert WeightMask.load("b") == ~WeightMask.load("a")
    mask("plot a -o x.png")
    assert "x.png exists already" in refuses("plot a -o x")


def test_an_output_in_a_file_is_refused(mask: Any, refuses: Any) -> None:
    Path("file").write_text("x")
    for command in ("invert a -o file/x", "plot a -o file/x/y.png"):
        assert "cannot be written: file is a file; choose another" in refuses(command)


def test_a_file_never_replaces_a_folder(mask: Any, refuses: Any) -> None:
    for name in ("b.pt", "x.png", "c.safetensors"):
        Path("kept", name).mkdir(parents=True)
        Path("kept", name, "precious").write_text("x")
    for command in (
        "convert a.safetensors -o kept/b.pt",
        "plot a -o kept/x.png",
        "invert a -o kept/c",
    ):
        assert "is a folder: name a file in it" in refuses(f"{command} --overwrite")
    assert len(list(Path("kept").glob("*/precious"))) == 3


def test_convert_there_and_back(mask: Any, tiny_model: str, refuses: Any) -> None:
    lm = load_model(tiny_model)
    bools = random_bools(parameter_shapes(lm), 0.3, 4)
    torch.save({name: bools[name] for name in reversed(list(bools))}, "published.pt")
    mask(f"convert published.pt -o ours.safetensors --model {tiny_model}")
    ours = WeightMask.load("ours")
    assert ours == WeightMask.from_bools(bools) and list(ours) == list(bools)
    ours.check(parameter_shapes(lm), fingerprint(lm))
    assert ours.metadata["model_fingerprint"] == fingerprint(lm)
    mask(f"convert ours.safetensors -o back.pth --model {tiny_model}")
    back = torch.load("back.pth", weights_only=True)
    assert all(torch.equal(back[name], bools[name]) for name in bools)
    mask("convert published.pt -o unchecked.safetensors")
    assert "not checked before use" in mask("info unchecked")
    other = WeightMask.from_bools(bools, {"model_fingerprint": "other", "score": "Snip"})
    mask(f"convert {other.save('theirs')} -o moved.safetensors --model {tiny_model}")
    moved = WeightMask.load("moved")
    assert moved == ours and moved.origin == "moved (Snip, density unknown)"
    moved.check(parameter_shapes(lm), fingerprint(lm))

    for output in ("a.pt", "x.safetensors"):
        said = refuses(f"convert a.safetensors -o {output} --model {tiny_model}")
        assert "it was made for another model" in said
    assert "nothing to convert; give --model" in refuses("convert a.safetensors -o c.safetensors")
    assert "suffix" in refuses("convert published.pt -o mask.npz")
    assert "does not exist" in refuses("convert none.pt -o c.safetensors")


def test_select(mask: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(shape, generator=generator) for name, shape in LLAMA.items()}
    write_scores("scores", scores.items(), LLAMA, {"score": "Wagle", "model_fingerprint": "f"})
    flat = torch.cat([tensor.abs().reshape(-1) for tensor in scores.values()])
    for select, order in (("high", flat.argsort(descending=True)), ("low", flat.argsort())):
        mask(f"select scores --density 0.25 --select {select} -o {select}")
        expected = torch.zeros(len(flat), dtype=torch.bool)
        expected[order[: len(flat) // 4]] = True
        found = WeightMask.load(select)
        assert torch.equal(torch.cat([found[name].reshape(-1) for name in found]), expected)
        assert found.metadata["model_fingerprint"] == "f"


def test_a_bare_flag_leaves_the_next_argument_alone(mask: Any) -> None:
    plain, listed = mask("info a"), mask("info a --tensors")
    assert "tensor" in listed.replace(plain.strip(), "") and len(listed) > len(plain)
    assert mask("info --tensors a") == listed and mask("info --no_tensors a") == plain
    before = Path("b.safetensors").read_bytes()
    mask("invert --overwrite a -o b")
    assert Path("b.safetensors").read_bytes() != before


def test_mistakes_are_one_line(refuses: Any) -> None:
    assert "does not exist" in refuses("info none")
    assert "output" in refuses("combine a and b")
    assert "nor" in refuses("combine a nor b -o c")
    assert "FILES must be given" in refuses("compare")
    WeightMask.from_bools(random_bools(LLAMA, 0.5, 1), {"model_fingerprint": "e" * 64}).save("e")
    assert "mask a.safetensors was made for the model with fingerprint ffff" in refuses(
        "compare a e"
    )
    assert "fingerprint" in refuses("combine a or e -o c")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--help", tuple(VERBS)),
        ("combine --help", ("{and,or,minus}", "-o", "selected in both", "--overwrite")),
        ("plot --help", ("files", ".png, .svg, or no suffix")),
    ],
)
def test_help_names_every_verb_and_option(args: str, words: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["mask", *args.split()])
    assert exit_.value.code == 0
    out = " ".join(capsys.readouterr().out.split())  # in a terminal of any width
    assert all(word in out for word in words)


# -- the picture ------------------------------------------------------------------------------------------------------


def test_plot_writes_what_the_suffix_says(mask: Any, refuses: Any) -> None:
    mask("plot a b -o both --title", "Two masks")
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")
    text = " ".join(ElementTree.parse("both.svg").getroot().itertext())
    density = WeightMask.load("a").density
    words = ("Two masks", "layer", "norms", "embed_tokens", "share selected")
    assert all(word in text for word in (*words, f"{density:.2%} selected"))
    before = Path("both.svg").read_bytes()
    mask("plot a b --overwrite -o both.svg --title", "Two masks")
    assert Path("both.svg").read_bytes() == before
    assert ".png or .svg" in refuses("plot a -o x.pdf")
