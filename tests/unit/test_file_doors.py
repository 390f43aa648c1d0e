"""Every kind of file has one reader, which returns a right value or refuses the file in one line."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, TypedDict, Union

import pyarrow
import pytest
import torch
from helpers import LLAMA, RUN, changed, places, slow
from safetensors.torch import save_file

from wagle_pl.api.rows import row_digest, rows_of
from wagle_pl.attribution.stored import StoredScores, write_scores
from wagle_pl.cli.mask import info
from wagle_pl.core.errors import WagleError
from wagle_pl.core.hub import card_of
from wagle_pl.core.reading import parse_json, read_json
from wagle_pl.core.schema import Count, Digits, check
from wagle_pl.core.tensorfiles import TensorFile, TensorFiles, sealed
from wagle_pl.data.example import parse_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import Template
from wagle_pl.evaluation.results import Results, load_table, table_key, write_json, write_table
from wagle_pl.lab.requests import commands as requests
from wagle_pl.lab.requests import register as registers
from wagle_pl.lab.study import SUMMARY_FILE, TABLE_FILE
from wagle_pl.lab.study.recovery import at_the_level
from wagle_pl.lab.study.report.page import render
from wagle_pl.lab.study.report.sources import gather
from wagle_pl.lab.study.runs import RunTable, locked
from wagle_pl.lab.study.summary import Compared, compared_at, summarise
from wagle_pl.lm.inference import generate
from wagle_pl.lm.models import checkpoint_dtype, load_model, load_tokenizer
from wagle_pl.lm.saving import read_record
from wagle_pl.lm.tiny import create_tiny_llama
from wagle_pl.masks import WeightMask
from wagle_pl.masks.parts import split
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


@pytest.mark.parametrize("lock", [locked, registers.locked])
def test_a_lock_that_is_no_file(tmp_path: Path, lock: Callable[[Path], Any]) -> None:
    with lock(tmp_path):
        (file,) = tmp_path.iterdir()
    for make in (file.mkdir, lambda: file.symlink_to(file)):
        file.rmdir() if file.is_dir() else file.unlink()
        make()
        with (
            pytest.raises(WagleError, match=f"{file.name} cannot be locked .*: remove it"),
            lock(tmp_path),
        ):
            pass


# -- any key and any byte --------------------------------------------------------------------------


class Door(NamedTuple):
    """A kind of file, and its reader."""

    make: Callable[[Path], Path]  # writes a whole file in a folder, and returns its path
    read: Callable[[Path], Any]  # reads it, uses all of it, and returns what it means
    exact: bool = False  # whether any damage shows; else it may be in the payload, see below
    most: int = 10**6  # how many changes are tried, in a quick run


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


def make_part(folder: Path) -> Path:
    (*_, part) = split(WeightMask.load(make_mask(folder)), 2)
    return part.save(folder / "part")


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


@cache
def texts() -> list[str]:
    return [row[column] for row in bundled("forget")[:4] for column in ("question", "answer")]


def make_model(file: str) -> Callable[[Path], Path]:
    """Makes a model, and returns the path of one of its files."""

    def make(folder: Path) -> Path:
        sizes = {"vocab_size": 280, "hidden_size": 8, "layers": 1, "heads": 2}
        return create_tiny_llama(folder / "model", texts(), **sizes) / file

    return make


def read_model(path: Path) -> Any:
    name = str(path.parent)
    tokenizer, lm = load_tokenizer(name), load_model(name, checkpoint_dtype(name))
    template = Template(tokenizer)
    examples = parse_rows([{"question": "Who?", "answer": "I."}], "rows")
    ids = template.encode(examples[0])["input_ids"]
    with torch.no_grad():
        shape = lm(input_ids=torch.tensor([ids])).logits.shape
    return ids, shape, generate(lm, tokenizer, [template.encode_prompt(examples[0])], 2)


ROWS: list[dict[str, Any]] = [
    {"question": "Who?", "answer": "I.", "perturbed_answer": ["You."], "paraphrased_answer": "Me."},
    {"prompt": "Say it", "response": "It."},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
    {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]},
    {"text": "It meets in Sibiu."},
]


def make_rows(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return folder / "rows.jsonl"


def make_row_table(folder: Path) -> Path:
    write_table(folder / "rows.parquet", [ROWS[0], {**ROWS[0], "answer": "You."}], {})
    return folder / "rows.parquet"


def read_rows(path: Path) -> Any:
    examples = parse_rows(load_rows(str(path)), str(path))
    given = parse_rows(rows_of(path, "rows").rows, str(path))
    template = small_template()
    for example in examples:
        template.encode_prompt(example)
        if example.kind != "prompt":
            template.encode(example)
    return [row_digest(row, "salt") for row in given]


@cache
def small_template() -> Template:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER[0])
    return Template(tokenizer)


TOKENIZER: list[str] = []  # folder of the tokenizer of rows


@pytest.fixture(scope="module", autouse=True)
def tokenizer_of_rows(tiny_model: str) -> None:
    TOKENIZER.append(tiny_model)


SETTINGS: dict[str, Any] = {"target": "0" * 64, "steps": 2, "ends_at": None}
CURVE = [f"robustness/relearn/forget/probability_step_{step}" for step in (0, 1)]
TARGET = {"forget/probability": 0.9, "retain/probability": 0.6, CURVE[0]: 0.9, CURVE[1]: 0.9}
BY = Compared("forget/probability", "retain/probability", TARGET, 0.5)


def make_study(folder: Path) -> list[dict[str, Any]]:
    """A study of two masks, and the rows of its table."""
    rows = []
    for (mask, score, density), seed, step in product(
        (("dense", None, 1.0), ("wagle", "WAGLE", 0.2)), (0, 1), (2, 4)
    ):
        forget = 0.9 - 0.2 * step * density**0.5 - 0.01 * seed
        row = {"objective": "NPO", "mask": mask, "score": score, "density": density, "lr": 1e-3}
        row |= {"seed": seed, "step": step, "run": f"{mask} {seed}", "seconds": 1.5, "note": None}
        row |= {"objective_id": "ab", "mask_id": "cd", "forget": forget, "utility": forget / 2}
        row |= {BY.forget: forget, BY.utility: forget / 2, CURVE[0]: forget, CURVE[1]: 0.8}
        rows.append(row)
    summary: dict[str, Any] = {**BY._asdict(), "forget_level": BY.level, "retrained": TARGET}
    summary |= {"runs": {"finished": 4, "planned": 4}, "settings": SETTINGS}
    summary |= {"headline": summarise(rows, BY), "ends": at_the_level(rows, BY, TARGET)}
    write_json(folder / SUMMARY_FILE, json.loads(json.dumps(summary)))
    write_table(folder / TABLE_FILE, rows, SETTINGS)
    return rows


def make_study_table(folder: Path) -> Path:
    make_study(folder)
    return folder / TABLE_FILE


def read_study_table(path: Path) -> Any:
    table = RunTable(path.parent, SETTINGS)
    table.join([str(path.parent)])
    assert gather([str(path.parent)]).studies[0].rows == table.rows
    return summarise(table.rows, BY), at_the_level(table.rows, BY, TARGET)


def make_summary(folder: Path) -> Path:
    make_study(folder)
    return folder / SUMMARY_FILE


def read_summary(path: Path) -> Any:
    """The page of the study, at its level and at another."""
    sources = gather([str(path.parent)])
    (study,) = sources.studies
    page = render(sources)
    study.summary = compared_at(study.summary, study.rows, 0.55)
    return page, render(sources)


def make_register(folder: Path) -> Path:
    rows = [{"question": "Who?", "answer": "I."}]
    register = registers.Register(folder)
    (folder / "rows").mkdir()
    for name in "ab":
        (folder / f"rows/{name}.jsonl").write_text(json.dumps(rows[0]))
    register.begin("2026-01-01", "models/0", "0" * 64)
    digests = [row_digest(row, register.salt) for row in parse_rows(rows, "rows")]
    for name, date in (("a", "2026-01-02"), ("b", None)):
        register.append("added", date, id=name, rows=digests)
    means = {"probability": 0.5, "unseen": 0.01, "reworded": 0.4}
    tested = {"outcome": "forgotten", "known": [True], "draws": [0], "left": 0}
    tests = {"a": {**tested, "before": means, "after": means}}
    files = {name: {"file": f"patches/1.{name}", "sha256": "2" * 64} for name in ("mask", "patch")}
    about = {"base": "0" * 64, "model": "models/1", "digest": "1" * 64, "rejected": None}
    about |= {
        "reopened": [],
        "outcome": "forgotten",
        "retain": [0.9, 0.8],
        "settings": {"lr": 1e-3},
    }
    register.append("run", None, **about, **files, requests=tests)
    about = {"model": "models/1", "adopted": False, "digest": "1" * 64, "bits": None}
    register.append("verified", None, **about, requests=tests)
    register.append("reverted", None, id="a", reopened=[], model="models/2", digest="0" * 64)
    register.append("purged", None, id="a")
    return register.path


def read_register(path: Path) -> Any:
    register = registers.Register.read(path.parent)
    requests.list_requests(str(path.parent))
    for name in register.requests:
        requests.show(str(path.parent), name)
    register.sweep()
    return register.entries, [register.rows(request) for request in register.testable()]


def make_head(folder: Path) -> Path:
    make_register(folder)
    return folder / registers.HEAD_FILE


def chained(entries: Sequence[Any]) -> bytes:
    """A register of entries whose digests fit, where entries have any."""
    previous, lines = "", []
    for entry in entries:
        if isinstance(entry, dict) and "sha256" in entry:
            entry = {**entry, "previous": previous}
            entry["sha256"] = previous = registers._digest(entry)
        lines.append(f"{json.dumps(entry)}\n")
    return "".join(lines).encode()


DOORS = {
    "mask": Door(make_mask, read_mask, exact=True),
    "part of a mask": Door(make_part, read_mask, exact=True),
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
    "configuration": Door(make_model("config.json"), read_model, most=15),
    "generation": Door(make_model("generation_config.json"), read_model, most=10),
    "tokenizer configuration": Door(make_model("tokenizer_config.json"), read_model, most=15),
    "tokenizer": Door(make_model("tokenizer.json"), read_model, most=15),
    "rows": Door(make_rows, read_rows),
    "row table": Door(make_row_table, read_rows),
    "study table": Door(make_study_table, read_study_table, most=20),
    "study summary": Door(make_summary, read_summary, most=2),
    "register": Door(make_register, read_register, most=200),
    "head": Door(make_head, read_register),
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
    if path.suffix == ".parquet":
        yield from tables(path)
        return
    if path.suffix not in (".safetensors", ".patch", ".scores"):
        lines = path.suffix == ".jsonl"
        whole = [*map(json.loads, content.splitlines())] if lines else json.loads(content)
        for at, other in product(places(whole), (..., *OTHERS)):
            new = changed(whole, at, other)
            is_long = at[:1] == ("model",) and len(at) > 3  # one of the tokenizer's words
            if not is_long:
                yield chained(new) if lines and isinstance(new, list) else json.dumps(new).encode()
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


def tables(path: Path) -> Iterator[bytes]:
    """The table with each column dropped, or of another type in its first row or in all, where a column can hold
    that; and with another key."""
    rows, key, others = (
        load_table(path),
        table_key(path),
        (..., None, 3, float("nan"), "x", {"a": 1}),
    )
    news = [
        ([changed(row, (column,), other) if i < some else row for i, row in enumerate(rows)], key)
        for column, other, some in product(rows[0], others, (1, len(rows)))
    ]
    news += [(rows, changed(key, at, o)) for at in places(key) for o in others if at]
    for new, other_key in news:
        try:
            write_table(path, new, other_key)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            continue
        yield path.read_bytes()


@pytest.mark.parametrize("whole", [False, slow(True)])
def test_every_key_dropped_and_retyped(door: tuple[Door, Path, bytes], whole: bool) -> None:
    kind, path, content = door
    assert outcome(kind, path, content) is not None
    if path.suffix != ".md":
        path.write_bytes(content)
        news = [*contents(path, content)]
        for new in news if whole else random.Random(0).sample(news, min(kind.most, len(news))):
            outcome(kind, path, new)


@pytest.mark.parametrize("most", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_byte_flipped_or_cut(door: tuple[Door, Path, bytes], most: int) -> None:
    """The damage shows, or is harmless, or (``exact`` is false) in the payload itself: a text or number of JSON."""
    kind, path, content = door
    before, draw = outcome(kind, path, content), random.Random(0)
    most = min(most, len(content), kind.most * most // 40)
    for index in draw.sample(range(len(content)), most):
        values = draw.sample(range(1, 256), max(1, most // len(content)))
        flipped = (bytes([content[index] ^ value]) + content[index + 1 :] for value in values)
        for rest in (b"", *flipped):
            after = outcome(kind, path, content[:index] + rest)
            assert not kind.exact or after in (None, before), (index, rest[:1])
