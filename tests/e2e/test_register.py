"""``wagle request`` on a model that has learnt people: five requests in sequence, and runs that are killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import command, start
from helpers import QUIET, same_bits, trainer, wait_for, words, write_rows
from test_killed import finish

from wagle_pl import FinetuneModule, ForgetRetainDataModule
from wagle_pl.api.verdict import KEPT, bound
from wagle_pl.cli import app as cli
from wagle_pl.data.people import bundled
from wagle_pl.lab.requests.register import Register
from wagle_pl.lm.tiny import create_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("requests")]  # which share a model

NAMES = ("1", "2", "3", "4", "5")
RUN = ["request", "run", "r", "--retain", "keep.jsonl"]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that knows two facts of each of five people, which are a file each, and eight of
    each of nine others, in ``keep.jsonl``."""
    folder = tmp_path_factory.mktemp("people")
    rows = [*bundled("forget"), *bundled("retain")][: 14 * 8]
    sets = {name: rows[8 * i : 8 * i + 2] for i, name in enumerate(NAMES)} | {"keep": rows[40:]}
    for name, of_set in sets.items():
        write_rows(folder / f"{name}.jsonl", of_set)
    known = [
        {key: row[f"{wording}{key}"] for key in ("question", "answer")}
        for of_set in sets.values()
        for row in of_set
        for wording in ("", "paraphrased_")
    ]
    texts = [text for row in known for text in row.values()]
    create_tiny_llama(folder / "base", texts, vocab_size=1024, hidden_size=64, layers=2)
    half = len(known) // 2
    teach(folder / "base", folder / "model", known[:half], known[half:], 5e-3, max_epochs=30)
    return folder


@pytest.fixture
def people(learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a copy of that folder."""
    shutil.copytree(learnt, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def teach(
    base: Path | str, output: Path | str, forget: Any, retain: Any, lr: float, **length: int
) -> None:
    """Train a model on rows."""
    module = FinetuneModule(str(base), output=output, lr=lr)
    trainer(**length).fit(module, ForgetRetainDataModule(forget, retain, batch_size=16))


def request_(*arguments: str) -> int:
    """Run ``wagle request``; returns the exit status."""
    try:
        cli.main(["request", *arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def noted() -> Register:
    return Register.read(Path("r"))


def states() -> dict[str, str]:
    return {name: request.state for name, request in noted().requests.items()}


def probabilities(model: str, names: Sequence[str]) -> dict[str, float]:
    """Of the rows of requests, as ``wagle test`` measures them."""
    sets = ("--data.test", json.dumps({name: f"{name}.jsonl" for name in names}))
    options = f"--model EvaluationModule --model.generate false --model.model {model} {QUIET}"
    kind = "--data ForgetRetainDataModule --model.output tested --model.overwrite true"
    cli.run(words("test", options, kind, *sets))
    metrics = json.loads(Path("tested/metrics.json").read_text())
    return {name: metrics[f"{name}/probability"] for name in names}


def check_a_run(before: Register, code: int) -> None:
    """Every earlier request was tested again, and a model that was kept has forgotten and is not damaged."""
    after, entry = noted(), noted().entries[-1]
    done = [name for name, request in before.requests.items() if request.state == "forgotten"]
    tests = entry["requests"] if entry["model"] else entry["rejected"]
    assert [*tests] == [request.id for request in before.testable()] and len(done) < len(tests)
    opened = [name for name in tests if name not in done]
    assert code == (0 if all(states()[name] == "forgotten" for name in opened) else 3)
    if entry["model"] is None:
        assert entry["outcome"] == "model damaged" and after.digest == before.digest
        assert {states()[name] for name in opened} == {"open"}
        return
    assert entry["retain"][1] >= KEPT * entry["retain"][0] and entry["base"] == before.digest
    for name in done:  # no matter whether it had to be forgotten again
        means = tests[name]["after"]
        assert tests[name]["outcome"] == "forgotten" and tests[name]["left"] == 0
        assert means["probability"] <= bound(means["unseen"]), name
    measured = probabilities(after.located(after.model), [*tests])
    for name, tested in tests.items():
        assert measured[name] == pytest.approx(tested["after"]["probability"], rel=1e-3, abs=1e-5)


def test_five_requests_in_sequence(people: None) -> None:
    for name in NAMES:
        begins = ["--model", "model"] if name == "1" else []
        assert request_("add", "r", f"{name}.jsonl", "--id", name, *begins) == 0
        before = noted()
        check_a_run(before, request_(*RUN[1:], "--unit", "weight"))
    found = states()
    assert len(found) == 5 and [*found.values()].count("forgotten") >= 4
    # -- one is reverted, bit for bit
    register = noted()
    folders = {entry.get("digest"): entry.get("model") for entry in register.entries}
    number, last = [*register.runs.items()][-1]
    mates = [request.id for request in register.of_run(number)]
    reverted = f"r/models/{number}-reverted"
    assert request_("revert", "r", mates[0]) == 0
    assert noted().digest == last["base"]
    assert same_bits(register.located(folders[last["base"]]), reverted)
    left = {name: state for name, state in states().items() if name not in mates}
    assert states()[mates[0]] == "withdrawn" and "forgotten" in left.values()
    assert left == {name: found[name] for name in left}
    # -- one comes back, since somebody trains the model further, and is forgotten again
    teach(reverted, "taught", "1.jsonl", "keep.jsonl", 2e-3, max_steps=60)
    assert request_("verify", "r", "--model", "taught", "--adopt") == 3
    assert states()["1"] == "open" and probabilities("taught", ["1"])["1"] > 0.5
    before = noted()
    check_a_run(before, request_(*RUN[1:], "--unit", "weight"))
    assert states()["1"] == "forgotten" and noted().request("1").run == before.run_count + 1


def test_a_request_that_a_run_brings_back_is_forgotten_again(
    people: None, heard: pytest.LogCaptureFixture
) -> None:
    """Rows to keep say the first request's with the surname alone, which no check of names finds."""
    rows = [json.loads(line) for line in Path("1.jsonl").read_text().splitlines()]
    again = [
        {"question": row[column].replace(name, name.split()[-1]), "answer": row["answer"]}
        for row in rows
        for name in [row["person"]]
        for column in ("question", "paraphrased_question")
    ]
    keep = [json.loads(line) for line in Path("keep.jsonl").read_text().splitlines()[:24]]
    write_rows(Path("again.jsonl"), keep + 8 * again)
    assert request_("add", "r", "1.jsonl", "--id", "1", "--model", "model") == 0
    assert request_(*RUN[1:]) == 0
    assert request_("add", "r", "2.jsonl", "--id", "2") == 0
    code = request_("run", "r", "--retain", "again.jsonl")
    entry = noted().entries[-1]
    assert code == 0 and entry["reopened"] == ["1"], entry
    assert "known again, to be forgotten with the others: 1" in heard.text
    assert states() == {"1": "forgotten", "2": "forgotten"}
    measured = probabilities("r/models/2", NAMES[:2])
    assert all(probability < 0.1 for probability in measured.values())


@pytest.fixture(scope="module")
def unbroken(learnt: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder where a request was added and its run was not stopped, and the run's seconds."""
    folder = Path(shutil.copytree(learnt, tmp_path_factory.mktemp("unbroken") / "people"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert request_("add", "r", "1.jsonl", "--id", "1", "--model", "model") == 0
        shutil.copytree("r", "before")
        code, printed, seconds = finish(RUN)
        assert code == 0, printed
    return folder, seconds


#: How long before its end a run is killed, as a share of its time or, below 0, in seconds.
MOMENTS = [(seed, share) for seed in range(5) for share in (1.0, -0.5)]


@pytest.mark.parametrize(("seed", "share"), MOMENTS)
def test_a_killed_run_loses_nothing_and_can_be_repeated(
    people: None, unbroken: tuple[Path, float], seed: int, share: float
) -> None:
    """At a moment drawn from the whole run, or from its last half second, in which it writes."""
    whole, seconds = unbroken
    shutil.copytree(whole / "before", "r")
    before = {path: path.read_bytes() for path in Path("r").rglob("*.jsonl")}
    length = share * seconds if share > 0 else -share
    moment = seconds - random.Random(seed).uniform(0, length)
    code, printed, _ = finish(RUN, moment, signal.SIGKILL)
    print(f"killed after {moment:.2f} of {seconds:.2f} s: status {code}")
    assert code in (-signal.SIGKILL, 0), printed
    register, text = noted(), Path("r/register.jsonl").read_bytes()
    kinds = [entry["kind"] for entry in register.entries]
    assert kinds in (["created", "added"], ["created", "added", "run"])
    assert text.startswith(before[Path("r/register.jsonl")])
    assert all(path.read_bytes() == rows for path, rows in before.items() if "rows" in path.parts)
    assert same_bits("model", whole / "model")
    again, printed, _ = finish(RUN)
    done = len(kinds) == 3
    assert (again, "has no open request" in printed) == ((2, True) if done else (0, False)), printed
    assert states() == {"1": "forgotten"} and request_("verify", "r") == 0
    assert same_bits("r/models/1", whole / "r/models/1")
    entry = noted().entries[2]
    assert entry["patch"] == noted().stored(Path("r") / entry["patch"]["file"])
    assert request_("revert", "r", "1") == 0 and same_bits("r/models/1-reverted", "model")
    Path("r/register.jsonl").write_bytes(text.replace(b'"date"', b'"data"', 1))
    code, printed, _ = finish(["request", "list", "r"])
    assert code == 2 and "line 1: the entry was changed after it was written" in printed


def test_of_two_runs_at_once_the_second_is_refused(
    people: None, unbroken: tuple[Path, float]
) -> None:
    whole, _ = unbroken
    shutil.copytree(whole / "before", "r")
    first = start(command, *RUN, output="first")
    wait_for(lambda: "unlearning" in Path("first").read_text() if Path("first").exists() else False)
    for second in (RUN, ["request", "revert", "r", "1"], ["request", "purge", "r", "1"]):
        code, printed, _ = finish(second)
        assert code == 2 and len(printed.splitlines()) == 1
        assert printed.startswith("wagle: error: another command works on register r: ")
    assert first.is_alive()
    assert finish(["request", "add", "r", "2.jsonl", "--id", "2"])[0] == 0  # it is not lost
    first.join(300)
    assert first.exitcode == 0 and states() == {"1": "forgotten", "2": "open"}
