"""The register of requests: its logic with a model of 32 facts, its file, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import small_files, words
from safetensors.torch import load_file, save_file
from torch import Tensor

from wagle_pl import api
from wagle_pl.api.verdict import Asked, Scores, each_has_gone
from wagle_pl.cli import app as cli
from wagle_pl.lab.requests import register as registers
from wagle_pl.lab.requests import testing
from wagle_pl.lab.requests.register import Register


def facts_of(folder: str | Path) -> Tensor:
    return load_file(Path(folder) / "model.safetensors")["facts"]


def write_model(folder: Path, facts: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"facts": facts}, folder / "model.safetensors")
    for name in ("config.json", "wagle.json"):
        (folder / name).write_text("{}")
    return folder


class World:
    """A model is 32 numbers; it knows fact i if number i is above a half."""

    def __init__(self) -> None:
        self.damages, self.brings_back, self.keeps = False, set[int](), set[int]()
        self.calls: list[dict[str, Any]] = []

    def examine(
        self,
        facts: Tensor,
        _: Any,
        rows: Sequence[Any],
        known: Sequence[bool],
        draws: Sequence[int],
        seed: int,
    ) -> Any:
        asked = [0.9 if facts[row.row["fact"]] > 0.5 else 0.01 for row in rows]
        direct = Asked(asked, [0.01] * len(rows), [1.0] * len(rows))
        flags = [any(pair) for pair in zip(known or direct.known, direct.known, strict=True)]
        return testing.judged(
            Scores(direct, direct, 0.0), flags, draws or [0] * len(rows), any(known)
        )

    def forget(self, base: str, rows: Any, earlier: Any, requests: Any, **options: Any) -> Any:
        self.calls.append({"rows": rows, "earlier": earlier, "requests": requests, **options})
        facts, chosen = facts_of(base).clone(), {row["fact"] for row in rows}
        facts[[*chosen - self.keeps]] -= 0.75
        facts[[*self.brings_back - (chosen - self.keeps)]] += 0.75
        chosen_by = dict.fromkeys(testing.CHOSEN, "text")
        return SimpleNamespace(
            **{"model": facts, "tokenizer": None, "mask": None, "steps": 3},
            **{"before": {"retain_probability": 0.9}, "after": {"retain_probability": 0.8}},
            outcome="model damaged" if self.damages else "forgotten",
            record={"lineage": [{"request": chosen_by}]},
            save=lambda target, overwrite: write_model(Path(target), facts),
        )


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """A world of facts in an empty folder, with a ``model`` that knows the first 24."""
    monkeypatch.chdir(tmp_path)
    world = World()
    monkeypatch.setattr(api, "forget", world.forget)
    monkeypatch.setattr(testing, "examine", world.examine)
    monkeypatch.setattr(testing, "load", lambda name, bits=None: (facts_of(name), None))
    write_model(tmp_path / "model", torch.tensor([1.0] * 24 + [0.0] * 8))
    for name, numbers in {"a": (0, 1), "b": (4, 5, 6), "c": (8,), "unknown": (30, 31)}.items():
        rows = [{"question": f"Who is {i}?", "answer": f"Secret {i}", "fact": i} for i in numbers]
        Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return world


@pytest.fixture
def request_(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs ``wagle request``; returns the exit status and what was printed."""

    def run(command: str) -> tuple[int, str]:
        code: Any = 0
        try:
            cli.main(words("request", *command.split()))
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        assert code in (0, 3) or (code == 2 and len(printed.err.splitlines()) == 1), printed.err
        return code, printed.out + printed.err

    return run


Command = Callable[[str], tuple[int, str]]


def states() -> dict[str, str]:
    return {name: request.state for name, request in Register.read(Path("r")).requests.items()}


def begin(request_: Command, *names: str) -> None:
    for number, name in enumerate(names):
        model = "" if number else "--model model"
        assert (
            request_(f"add r {name}.jsonl --id {name} --date 2026-12-0{number + 1} {model}")[0] == 0
        )


def test_requests_are_forgotten_tested_again_reverted_and_purged(
    world: World, request_: Command
) -> None:
    begin(request_, "a", "b")
    assert request_("run r --lr 0.1")[0] == 0 and "no open request" in request_("run r")[1]
    assert states() == {"a": "forgotten", "b": "forgotten"}
    assert world.calls[0]["requests"] == [([True] * n, [0] * n) for n in (2, 3)]
    assert world.calls[0]["earlier"] is None
    assert request_("add r c.jsonl --id c")[0] == 0
    world.brings_back = {1}
    code, printed = request_("run r -o elsewhere")
    assert code == 0 and "request a came back" in printed and Path("elsewhere").is_dir()
    assert [row["fact"] for row in world.calls[1]["earlier"]] == [0, 1, 4, 5, 6]
    assert [row["fact"] for row in world.calls[2]["rows"]] == [8, 0, 1]
    entry = Register.read(Path("r")).entries[-1]
    assert (entry["reopened"], entry["retain"]) == (["a"], [0.9, 0.8])
    assert entry["requests"]["c"]["before"]["probability"] == 0.9
    assert entry["settings"]["density"] == 0.2 and entry["settings"]["objective"] == "text"
    assert request_("verify r")[0] == 0 and request_("verify r --model model")[0] == 3
    assert set(states().values()) == {"forgotten"}  # another model's test changes nothing
    assert "run 2 has changed the model since run 1" in request_("revert r a")[1]
    code, printed = request_("revert r c")
    assert {path.name for path in Path("r/patches").iterdir()} == {"1.patch"}
    assert code == 0 and torch.equal(facts_of("r/models/2-reverted"), facts_of("r/models/1"))
    assert states() == {"a": "forgotten", "b": "forgotten", "c": "withdrawn"}
    assert "forgotten and not verified" in request_("purge r a")[1]
    assert request_("verify r")[0] == 0
    assert request_("purge r a")[0] == 0 and Path("r/patches/1.patch").exists()
    assert "of the same run, are purged" in request_("revert r b")[1]
    assert request_("purge r b")[0] == 0 and not Path("r/patches/1.patch").exists()
    assert request_("purge r c")[0] == 0 and not [*Path("r/rows").iterdir()]
    assert "has no rows to test" in request_("verify r")[1]
    assert request_("add r c.jsonl --id c2")[0] == 0  # c is withdrawn
    told = request_("list r")[1] + request_("show r a")[1] + Path("r/register.jsonl").read_text()
    assert "Secret" not in told and "Who" not in told and "2026-12-02" in told


def test_a_run_that_fails_changes_nothing(world: World, request_: Command) -> None:
    begin(request_, "a", "unknown")
    world.damages = True
    code, printed = request_("run r")
    assert code == 3 and "no model was written: model damaged" in printed
    assert states() == {"a": "open", "unknown": "not known"} and not Path("r/models").exists()
    world.damages, world.keeps = False, {0}
    assert request_("run r")[0] == 3 and states()["a"] == "open"
    world.keeps = set()
    assert request_("run r")[0] == 0 and states()["a"] == "forgotten"
    assert request_("add r b.jsonl --id b")[0] == 0
    world.keeps, world.brings_back = {30}, {30}  # one that never goes
    assert request_("run r")[0] == 3 and states()["b"] == "open"


def test_a_partly_forgotten_run_leaves_the_rest_open(world: World, request_: Command) -> None:
    begin(request_, "a", "b")
    world.keeps = {5}
    assert request_("run r")[0] == 3 and states() == {"a": "forgotten", "b": "open"}
    world.keeps = set()
    assert request_("run r")[0] == 0 and states() == {"a": "forgotten", "b": "forgotten"}
    assert [row["fact"] for row in world.calls[1]["rows"]] == [4, 5, 6]
    assert request_("revert r b")[0] == 0
    assert states() == {"a": "forgotten", "b": "withdrawn"}
    save_file({"facts": torch.ones(32)}, "r/models/2-reverted/model.safetensors")
    assert request_("verify r")[0] == 3 and states()["a"] == "forgotten"  # that is another model
    request_("add r c.jsonl --id c")
    assert "the register's model has" in request_("run r")[1]
    assert request_("verify r --model r/models/2-reverted --adopt")[0] == 3
    assert states() == {"a": "open", "b": "withdrawn", "c": "open"}
    assert "took another model since run 1" in request_("revert r a")[1]
    assert request_("run r")[0] == 0 and states()["a"] == "forgotten"


WRONG = {
    "add r a.jsonl --id a": "--model: r begins a register: name its model",
    "add new a.jsonl --id ../a --model model": "--id: must be at most 64 letters",
    "add new a.jsonl --id a --model model --date 3.12.2026": "--date: must be a date",
    "add new a.jsonl --id a --model model --date 2026-W49-4": "--date: must be a date",
    "add new empty.jsonl --id a --model model": "has no rows",
    "add new ask.jsonl --id a --model model": "ask.jsonl row 1: ",
    "add new a.jsonl --id a --model nowhere/at/all": "nowhere/at/all",
    "add known a.jsonl --id A": "has a request 'A' already",
    "add known a.jsonl --id b": "a.jsonl: 2 rows in request a already",
    "add known b.jsonl --id b --model model": "--model: known has a model already",
    "run r": "register r does not exist",
    "verify known --bits 1": "--bits: must be 2 to 16",
    "verify known --adopt": "--adopt: takes a --model",
    "revert known a": "no run has forgotten it",
    "revert known x": "register known has no request 'x'",
    "purge known a": "request a is open and not verified",
    "run known -o model": "output model exists already",
}


@pytest.mark.parametrize(("command", "said"), WRONG.items())
def test_what_is_refused(world: World, request_: Command, command: str, said: str) -> None:
    assert request_("add known a.jsonl --id a --model model")[0] == 0
    Path("empty.jsonl").write_text("")
    Path("ask.jsonl").write_text('{"question": "Who is Ada?"}')
    code, printed = request_(command)
    assert code == 2 and said in printed
    assert not Path("r").exists() and not Path("new/register.jsonl").exists()


def lines(change: Callable[[list[str]], list[str]]) -> None:
    path = Path("r/register.jsonl")
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda all_: [*all_[:-1], all_[-1].replace('"b"', '"d"')], "line 3: the entry was chan"),
        (lambda all_: [all_[0].replace("salt", "pepper"), *all_[1:]], "line 1: the entry was chan"),
        (lambda all_: [all_[0], all_[2]], "line 2: an entry before it was changed, added or rem"),
        (lambda all_: all_[1:], "line 1: an entry before it"),
        (lambda all_: [*all_, all_[0]], "line 4: an entry before it"),
        (lambda all_: [*all_[:-1], all_[-1][:40]], "line 3: malformed JSON"),
        (lambda all_: ["[]"], "line 1: must be an object"),
        (lambda all_: all_[:-1], "the end were cut off or changed: 2 of 3 entries are left"),
        (lambda all_: [], "its first entry is missing"),
    ],
)
def test_a_changed_entry_is_seen(world: World, request_: Command, change: Any, said: str) -> None:
    begin(request_, "a", "b")
    lines(change)
    for command in ("list r", "run r", "add r c.jsonl --id c"):
        code, printed = request_(command)
        assert code == 2 and said in printed


def forge(change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the entries of a register, and write their chain and its head anew."""
    path, previous = Path("r/register.jsonl"), ""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    change(entries)
    for entry in entries:
        entry["previous"] = previous
        previous = entry["sha256"] = registers._digest(entry)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    Path("r/head.json").write_text(json.dumps({"entries": len(entries), "sha256": previous}))


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.insert(2, dict(entries[1])),
        lambda entries: entries[1].update(id="../a"),
        lambda entries: entries[3]["requests"].update(x=entries[3]["requests"]["a"]),
        lambda entries: entries[3]["requests"]["a"].update(known=[]),
        lambda entries: entries[3]["requests"]["a"].update(draws=[0]),
    ],
)
def test_a_chain_that_was_written_anew_must_make_sense(
    world: World, request_: Command, change: Any
) -> None:
    begin(request_, "a", "b")
    assert request_("run r")[0] == 0
    forge(lambda _: None)
    assert request_("list r")[0] == 0
    forge(change)
    code, printed = request_("verify r")
    assert code == 2 and "r/register.jsonl line " in printed


def test_what_becomes_of_a_registers_files(world: World, request_: Command) -> None:
    """No last line end, a line separator within a name, no head, no model."""
    name = "mo\u2028del"
    write_model(Path(name), torch.ones(32))
    cli.main(["request", "add", "r", "a.jsonl", "--id", "a", "--model", name])
    path, head = Path("r/register.jsonl"), Path("r/head.json")
    path.write_bytes(path.read_bytes()[:-1])
    assert request_("add r b.jsonl --id b")[0] == 0 and request_("run r")[0] == 0
    kept = head.read_text()
    head.unlink()
    said = request_("list r")[1]
    assert "head.json is missing" in said and said.strip().endswith(f"write {kept}")
    head.write_text(kept)
    Path("r/models/1").rename("elsewhere")
    for command in ("verify r", "revert r a"):
        assert "the register's model r/models/1 is missing; give --model" in request_(command)[1]
    assert request_("revert r a --model elsewhere")[0] == 0
    Path("r/rows").rename("rows")
    Path("r/rows").write_text("mine")
    assert "r/rows: file exists; choose another" in request_("add r c.jsonl --id c")[1]


def test_changed_rows_are_seen(world: World, request_: Command) -> None:
    begin(request_, "a")
    path = Path("r/rows/a.jsonl")
    path.write_text(path.read_text().replace("Secret 1", "Secret 2"))
    assert "the rows are not those that were added as a" in request_("run r")[1]
    path.unlink()
    assert "data file r/rows/a.jsonl does not exist" in request_("verify r")[1]


def test_two_at_once_a_full_disk_and_a_kill_lose_nothing(
    world: World, request_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(request_, "a")
    before = Path("r/register.jsonl").read_bytes()
    for what, command in (("entries", "add r b.jsonl --id b"), ("model", "run r")):
        with registers.locked(Path("r"), what):  # type: ignore[arg-type]
            assert "another command works on register r" in request_(command)[1]
    with small_files(len(before) + 100):  # which the rows do not reach
        said = request_("add r b.jsonl --id b")[1]
    assert "register.jsonl cannot be written (File too large" in said
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == "register.jsonl":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["request", "run", "r"])
    assert Path("r/register.jsonl").read_bytes() == before and Path("r/models/1").is_dir()
    monkeypatch.setattr(os, "replace", replace)
    assert request_("add r b.jsonl --id b")[0] == 0
    assert request_("run r")[0] == 0 and set(states().values()) == {"forgotten"}
    assert request_("add r c.jsonl --id c")[0] == 0
    Path("r/models/1").rename("r/models/2")
    taken = "run r --model r/models/2 -o r/models/2"
    assert "models/2 exists already" in request_(taken)[1]


def test_each_request_meets_the_bound() -> None:
    asked = Asked([0.01] * 6 + [0.06], [0.01] * 7, [1.0] * 7)
    known = [True] * 6 + [False]
    assert each_has_gone(asked, known) and not each_has_gone(asked, known, [6, 1])
    assert not each_has_gone(asked, [True] * 7, [6, 1]) and each_has_gone(asked, [True] * 7)


def test_a_request_that_is_answered_in_other_words_is_known() -> None:
    reworded = Asked([0.4] * 2, [0.01] * 2, [1.0] * 2)
    scores = Scores(Asked([0.7] * 2, [0.01] * 2, [0.1] * 2), reworded, ())
    tested = testing.judged(scores, scores.known, [0, 0], False)
    assert (tested["outcome"], tested["left"]) == ("known", 2)
