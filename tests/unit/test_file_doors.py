"""Every kind of file has one reader, which returns a right value or refuses the file in one line."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, TypedDict, Union

import pytest
import torch
from helpers import LLAMA, RUN, changed, places
from safetensors.torch import save_file

from wagle_pl.attribution.stored import StoredScores, write_scores
from wagle_pl.cli.mask import info
from wagle_pl.core.errors import WagleError
from wagle_pl.core.hub import card_of
from wagle_pl.core.reading import parse_json, read_json
from wagle_pl.core.schema import Count, Digits, check
from wagle_pl.core.tensorfiles import TensorFile, TensorFiles, sealed
from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation.results import Results, write_json, write_table
from wagle_pl.lm.saving import read_record
from wagle_pl.masks import WeightMask
from wagle_pl.strategies import ShardedCheckpoint
from wagle_pl.strategies.checkpoint import Piece, save
from wagle_pl.unlearning.export import model_card
from wagle_pl.unlearning.patch import Patch, apply_patch, digest_of, make_patch

# -- schemas and JSON ------------------------------------------------------------------------------


class Leaf(TypedDict):
    steps: int
    name: Optional[str]


Tree = dict[str, list[Leaf]]


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ({"a": [{"steps": "x"}]}, Tree, "f: a[0].steps: must be an integer, got 'x'"),
        ({"a": [{"steps": True}]}, Tree, "f: a[0].steps: must be an integer, got True"),
        ({"a": [{}]}, Tree, "f: key 'a[0].steps' is missing"),
        ({"a": [{"steps": 1, "name": 2}]}, Tree, "f: a[0].name: must be a text or null, got 2"),
        ({"a": 3}, Tree, "f: a: must be a list, got 3"),
        ([], Tree, "f: must be an object, got []"),
        (-1, Count, "f: must be an integer of 0 or more, got -1"),
        (1 << 63, int, "f: must be an integer, got an integer of more than 64 bits"),
        (float("nan"), float, "f: must be a number, got nan"),
        (10**400, float, "f: must be a number, got an integer of more than 64 bits"),
        ("c", Literal["a", "b"], "f: must be 'a' or 'b', got 'c'"),
        (2, Optional[Literal[1]], "f: must be 1 or null, got 2"),
        (
            {"x": 1},
            dict[Digits, int],
            "f: key: must be an integer of 0 or more, as a text, got 'x'",
        ),
        ([1, 2], tuple[int, str], "f: [1]: must be a text, got 2"),
        ([1], tuple[int, str], "f: must be a list of 2, got [1]"),
        (None, Union[str, list[int]], "f: must be a text or a list, got None"),
    ],
)
def test_a_schema_names_the_key(value: Any, kind: Any, said: str) -> None:
    with pytest.raises(WagleError) as raised:
        check(value, kind, "f")
    assert str(raised.value) == said


def test_what_a_schema_accepts() -> None:
    tree = {"a": [{"steps": 1, "later": [None]}, {"steps": 0, "name": None}]}
    assert check(tree, Tree, "f") is tree
    assert check([1, 1.5, float("inf")], list[float], "f") and check(["a", 2], tuple[str, int], "f")
    assert check({"1": [2]}, dict[Digits, Union[str, list[int]]], "f") == {"1": [2]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "line 1: malformed JSON"),
        (b"[1,\n2,,3]", "line 2: malformed JSON"),
        (b"\xff\xfe", "is not UTF-8 text (it has the byte 0xff)"),
        (b'"\\ud800"', "a text has \\ud800, which is half of a character"),
        (b"[" * 10_000 + b"]" * 10_000, "nested more than 100 deep"),
        (b'{"a":' * 120 + b"1" + b"}" * 120, "nested more than 100 deep"),
        (b"1" * 5000, "malformed JSON: Exceeds the limit"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    """As a file and as a row."""
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(WagleError) as raised:
        read_json(tmp_path / "x.json")
    assert said in str(raised.value) and str(tmp_path / "x.json") in str(raised.value)
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": ' + content + b"}\n")
    with pytest.raises(WagleError) as raised:
        load_rows(str(tmp_path / "rows.jsonl"))
    assert "rows.jsonl" in str(raised.value)


def test_json_that_is_read() -> None:
    deep = "[" * 90 + "]" * 90
    assert parse_json(deep, "f") == json.loads(deep)
    assert parse_json('"\\ud83d\\ude00"', "f") == "😀"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A pipe would be waited for, a loop of links never ends."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for name, said in (
        ("pipe", "is a pipe or a device"),
        ("loop", "a link to nothing, or to itself"),
    ):
        for read in (read_json, TensorFile, load_rows):
            with pytest.raises(WagleError, match=said):
                read(tmp_path / f"{name}.json")
    with pytest.raises(WagleError, match="does not exist"):
        load_rows("a\0b.json")


# -- any key and any byte --------------------------------------------------------------------------


class Door(NamedTuple):
    """A kind of file, and its reader."""

    make: Callable[[Path], Path]  # writes a whole file in a folder, and returns its path
    read: Callable[[Path], Any]  # reads it, uses all of it, and returns what it means
    exact: bool = False  # whether any damage shows; else it may be in the payload, see below


def make_mask(folder: Path) -> Path:
    bits = {name: torch.rand(shape) < 0.3 for name, shape in list(LLAMA.items())[:4]}
    mask = WeightMask.from_bools(
        bits, {"score": "WAGLE", "density": 0.3, "passes": 1.5, "forget_rows": 3}
    )
    other = WeightMask.from_bools(
        bits, {"operation": "modules", "modules": ["mlp"], "layers": "0-1"}
    )
    both = mask & other
    both.metadata |= {"unit": "head", "units": {"0": [1, 2]}, "as_rows": ["a"], "passes": 1.5}
    return both.save(folder / "mask")


def read_mask(path: Path) -> Any:
    mask = WeightMask.load(path)
    mask.stats(), info(str(path))
    return (
        mask.shapes,
        mask.metadata,
        mask.origin,
        {name: mask.packed(name).tolist() for name in mask},
    )


def model_folder(folder: Path, step: float = 0.0) -> Path:
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(4, 3, generator=generator) for name in ("a", "b")}
    tensors["a"][1] += step
    save_file(tensors, folder / "model.safetensors")
    (folder / "README.md").write_bytes("---\nlicense: mit\n---\nÉ".encode("latin-1"))
    write_json(folder / "wagle.json", {"format_version": 1, "lineage": [RUN] if step else []})
    return folder


def make_a_patch(folder: Path) -> Path:
    base, unlearned = model_folder(folder / "base"), model_folder(folder / "unlearned", 0.1)
    return make_patch(base, unlearned, folder / "x.patch").path


def read_patch(path: Path) -> Any:
    patch, out = Patch(path), path.parent / "out"
    _ = patch.changed, patch.identity
    apply_patch(path.parent / "base", path, out, overwrite=True)
    assert digest_of(TensorFiles(out)) == digest_of(TensorFiles(path.parent / "unlearned"))
    return patch.made_by, patch.weights, (out / "wagle.json").read_text()


def make_record(folder: Path) -> Path:
    mask = {"file": "m.safetensors", "density": 0.1, "made_by": {"score": "WAGLE", "of": [{}]}}
    run = {
        **RUN,
        "objective": {"class": "NPO"},
        "mask": mask,
        "config": {"a": [1]},
        "prompts": {"prompt": "{question}"},
    }
    patched = {"base": "0" * 64, "patches": ["1"], "fingerprint": "2"}
    write_json(
        folder / "wagle.json", {"format_version": 1, "lineage": [RUN, run], "patched": patched}
    )
    return folder / "wagle.json"


def read_a_record(path: Path) -> Any:
    record = read_record(str(path.parent))
    return record, model_card(record) if record["lineage"] else ""


def make_scores(folder: Path) -> Path:
    shapes = {"a": (3, 2), "b": (4,)}
    scores = [(name, torch.rand(shape)) for name, shape in shapes.items()]
    made_by = {"score": "WAGLE", "absolute": True, "model_fingerprint": "0"}
    return write_scores(folder / "x.scores", scores, shapes, made_by)


def read_scores(path: Path) -> Any:
    return [(name, scores.shape) for name, scores in StoredScores(path).stream()]


def make_metrics(folder: Path) -> Path:
    make_info(folder)
    return folder / "metrics.json"


def make_info(folder: Path) -> Path:
    about = {"unit": "", "direction": "lower", "what": "the measure"}
    info = {
        "model": "m",
        "suite": "TOFUSuite",
        "prompts": {"prompt": "{question}"},
        "compared": {"target": None},
    }
    info |= {
        "measures": {"forget/rouge": about},
        "undefined": {"x": {**about, "why": "none"}},
        "rows": {"forget": 1},
    }
    write_json(folder / "metrics.info.json", info)
    write_json(folder / "metrics.json", {"forget/rouge": 0.5, "model_utility": 1})
    return folder / "metrics.info.json"


def make_table(folder: Path) -> Path:
    make_info(folder)
    row = {
        "row": 0,
        "question": "Who?",
        "answer": "I.",
        "generation": None,
        "nll": 1.5,
        "perturbed_nll": [1.0],
    }
    write_table(folder / "forget.parquet", [row, {**row, "row": 1}], {"model": "m"})
    return folder / "forget.parquet"


def make_tofu(folder: Path) -> Path:
    log = {
        "avg_gt_loss": {"0": 1.5},
        "generated_text": {"0": ["Who?", "I.", "I."]},
        "rougeL_recall": {"0": 1.0},
    }
    write_json(folder / "tofu.json", {"eval_log_forget.json": log})
    return folder / "tofu.json"


def make_open(folder: Path) -> Path:
    entry = {
        "rougeL_recall": 1.0,
        "rouge1_recall": 1.0,
        "input": "Who?",
        "ground_truth": "I.",
        "generation": "I.",
    }
    logs = {
        "forget_Q_A_ROUGE": {"agg_value": 1.0, "value_by_index": {"0": entry}},
        "forget_Q_A_Prob": {
            "agg_value": 1.0,
            "value_by_index": {"0": {"prob": 0.5, "avg_loss": 0.7}},
        },
    }
    write_json(folder / "TOFU_EVAL.json", logs)
    return folder / "TOFU_EVAL.json"


def read_results(path: Path) -> Any:
    results = Results.read(path.parent if path.name.startswith(("metrics", "forget")) else path)
    return results.metrics, results.prompts, results.tables, results.tofu


def make_checkpoint(folder: Path) -> Path:
    pieces = [Piece("weight", "a", 0, torch.rand(6))]
    save(folder / "x.ckpt", pieces, {"model": {"name": "base"}}, {"a": (3, 2)})
    return folder / "x.ckpt/index.json"


def read_checkpoint(path: Path) -> Any:
    checkpoint = ShardedCheckpoint(path.parent)
    return checkpoint.common, {name: checkpoint.weight(name).shape for name in checkpoint.shapes}


def make_weight_index(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "one.safetensors"}})
    return folder / "model.safetensors.index.json"


def make_card(folder: Path) -> Path:
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# A model\n")
    return folder / "README.md"


DOORS = {
    "mask": Door(make_mask, read_mask, exact=True),
    "patch": Door(make_a_patch, read_patch, exact=True),
    "record": Door(make_record, read_a_record),
    "scores": Door(make_scores, read_scores),
    "metrics": Door(make_metrics, read_results),
    "info": Door(make_info, read_results),
    "table": Door(make_table, read_results),
    "tofu": Door(make_tofu, read_results),
    "openunlearning": Door(make_open, read_results),
    "checkpoint": Door(make_checkpoint, read_checkpoint),
    "weight index": Door(make_weight_index, lambda path: TensorFiles(path.parent).names),
    "card": Door(make_card, lambda path: card_of(str(path.parent), "wagle_pl", "text")),
}
OTHERS = [
    None,
    True,
    -1,
    3,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    [1],
    ["x"],
    [[1]],
    {},
    {"a": 1},
    {"1": {}},
]


@pytest.fixture(scope="module", params=DOORS)
def door(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Door, Path, bytes]:
    """A kind of file, a file of it, and its bytes."""
    kind, folder = DOORS[request.param], tmp_path_factory.mktemp("door")
    path = kind.make(folder)
    return kind, path, path.read_bytes()


def outcome(kind: Door, path: Path, content: bytes) -> Any:
    """What a changed file means; None if it is refused."""
    path.write_bytes(content)
    try:
        return kind.read(path)
    except WagleError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error)
        return None


TEXTS = ("base", "unlearned", "format", "format_version")  # metadata that are no JSON


def contents(path: Path, content: bytes) -> Iterator[bytes]:
    """The file with each key dropped, or of another type: of JSON, or of a safetensors file's metadata, in which case
    with a digest that fits."""
    if path.suffix not in (".safetensors", ".patch", ".scores"):
        whole = json.loads(content)
        for at in places(whole):
            yield from (json.dumps(changed(whole, at, other)).encode() for other in (..., *OTHERS))
        return
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    texts = {key: text for key, text in header["__metadata__"].items() if key != "digest"}
    values = {key: text if key in TEXTS else json.loads(text) for key, text in texts.items()}
    for at in places(values):
        for other in (..., *OTHERS) if at else ():
            new = changed(values, at, other)
            texts = {
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in new.items()
            }
            entries = json.dumps({**header, "__metadata__": sealed(texts)}).encode()
            yield struct.pack("<Q", len(entries)) + entries + content[end:]


def test_every_key_dropped_and_retyped(door: tuple[Door, Path, bytes]) -> None:
    kind, path, content = door
    assert outcome(kind, path, content) is not None
    if path.suffix not in (".parquet", ".md"):
        for new in contents(path, content):
            outcome(kind, path, new)


@pytest.mark.parametrize("most", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_byte_flipped_or_cut(door: tuple[Door, Path, bytes], most: int) -> None:
    """The damage shows, or is harmless, or (``exact`` is false) in the payload itself: a text or number of JSON."""
    kind, path, content = door
    before, draw = outcome(kind, path, content), random.Random(0)
    for index in draw.sample(range(len(content)), min(most, len(content))):
        values = draw.sample(range(1, 256), max(1, most // len(content)))
        flipped = (bytes([content[index] ^ value]) + content[index + 1 :] for value in values)
        for rest in (b"", *flipped):
            after = outcome(kind, path, content[:index] + rest)
            assert not kind.exact or after in (None, before), (index, rest[:1])
