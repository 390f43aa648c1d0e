"""Killed at any moment, a command leaves no torn file, and a second start ends as the unbroken run.

The environment variable ``WAGLE_KILLS`` sets how many commands are killed; by default one of the quick ones is.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from forked import command, start
from helpers import QUIET, data_options, fit_arguments, trainer, wait_for, words
from test_stopping import prepared

from wagle_pl import FinetuneModule, ForgetRetainDataModule
from wagle_pl.core.tensorfiles import TensorFile, load_plain
from wagle_pl.evaluation.results import load_table
from wagle_pl.unlearning.patch import make_patch

KILLS = range(*map(int, os.environ.get("WAGLE_KILLS", "1-2").split("-")))  # how many, or FIRST-END
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
#: Command -> the option that lets it replace its output; None if it goes on in its folder.
OVERWRITE = {"attribution": "--model.overwrite true", "unlearning": "--model.overwrite true"}
OVERWRITE |= {"forget": "--overwrite", "patch apply": "--overwrite"}
OVERWRITE |= dict.fromkeys(("test", "study", "quickstart"))


class Unbroken(NamedTuple):
    """A command, how long it takes, and what it ends with if nothing stops it."""

    arguments: list[str]
    seconds: float
    code: int
    results: dict[str, Any]


@pytest.fixture(scope="module")
def known(tiny_model: str, rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that knows the rows, and its patch."""
    folder = tmp_path_factory.mktemp("killed")
    data = ForgetRetainDataModule(rows["forget"], rows["retain"], batch_size=28)
    trainer(max_epochs=120).fit(FinetuneModule(tiny_model, output=folder / "known", lr=1e-2), data)
    make_patch(tiny_model, folder / "known", folder / "x.patch")
    return folder


@pytest.fixture(scope="module")
def commands(known: Path, tiny_model: str, rows: dict[str, str]) -> dict[str, list[str]]:
    """Name -> arguments of a command that writes into the current folder."""
    init = {name: rows[name] for name in ("forget", "retain")} | {"batch_size": 4}
    study = {"target": str(known / "known"), "retrained": tiny_model, "output": "out"}
    study |= {"data": {"class_path": "ForgetRetainDataModule", "init_args": init}}
    study |= {"masks": ["dense", {"score": "wagle", "density": 0.3}], "objectives": ["GradDiff"]}
    study |= {"learning_rates": [1e-3], "seeds": [0], "steps": 2, "points": 1}
    study |= {"trainer": {"accelerator": "cpu"}, "module": {"max_new_tokens": 4}}
    (known / "study.yaml").write_text(yaml.safe_dump(study))
    unlearn = "--model.objective GradDiff --trainer.max_epochs 6 --data.batch_size 2"
    test = ("--model.model", str(known / "known"), "--model.output out", *data_options(rows), QUIET)
    keep = ("--retain", rows["retain"], "--max_steps 3")
    return {
        "attribution": fit_arguments("AttributionModule", tiny_model, rows, "--data.batch_size 1"),
        "unlearning": fit_arguments("UnlearnModule", tiny_model, rows, unlearn),
        "test": ["test", *words("--model EvaluationModule --model.max_new_tokens 8", *test)],
        "study": ["study", "--config", str(known / "study.yaml")],
        "forget": ["forget", str(known / "known"), rows["forget"], "-o", "out", *words(*keep)],
        "patch apply": ["patch", "apply", tiny_model, str(known / "x.patch"), "-o", "out"],
        "quickstart": ["quickstart", "--trial"],
    }


def finish(arguments: list[str], seconds: float = 0, signum: int = 0) -> tuple[int, str, float]:
    """Run a command, if a signal is given with that signal so many seconds after its handlers are
    set: (exit status, what it printed, seconds since its handlers were set)."""
    ready, running = prepared(), start(command, *arguments, output="printed")
    try:
        wait_for(lambda: not running.is_alive() or ready(running.pid))
        since = time.monotonic()
        if signum:
            running.join(timeout=seconds)
            with suppress(ProcessLookupError):
                os.kill(running.pid, signum)
        running.join(timeout=300)
        assert running.exitcode is not None, "it did not end"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    printed = Path("printed").read_text()
    assert "Traceback" not in printed and "Exception ignored" not in printed, printed
    return running.exitcode, printed, time.monotonic() - since


def results(folder: Path) -> dict[str, Any]:
    """Weights, masks and measures in a folder, by file; each of its files must be whole."""
    content: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or ".tmp/" in name:
            continue
        if path.suffix == ".safetensors":
            file = TensorFile(path)
            content[name] = {tensor: file.words(tensor).tobytes() for tensor in file.names}
        elif path.suffix == ".json":
            values = json.loads(path.read_text())
            content |= {name: values} if path.name == "metrics.json" else {}
        elif path.suffix == ".parquet":
            load_table(path)
        elif path.suffix == ".ckpt":
            load_plain(path, f"checkpoint {path}")
    return content


@pytest.fixture(scope="module")
def unbroken(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory):
    """Run a command to its end, once."""
    runs: dict[str, Unbroken] = {}

    def run(name: str) -> Unbroken:
        if name not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("unbroken"))
                code, printed, seconds = finish(commands[name])
                assert code in (0, 3), printed
                runs[name] = Unbroken(commands[name], seconds, code, results(Path()))
                assert runs[name].results, printed
        return runs[name]

    return run


@pytest.mark.parametrize("seed", KILLS)
def test_a_killed_command_goes_on(
    empty_folder: None, unbroken: Any, known: Path, seed: int
) -> None:
    """Command, signal, moment, and whether an earlier model stands in its way are drawn at random."""
    draw = random.Random(seed)
    name, signum = draw.choice(list(OVERWRITE)), draw.choice(SIGNALS)
    whole: Unbroken = unbroken(name)
    seconds = draw.uniform(0, whole.seconds)
    arguments, earlier = [*whole.arguments], {}
    if OVERWRITE[name] and draw.random() < 0.5:
        arguments += words(OVERWRITE[name])
        if name == "attribution":
            Path("out.safetensors").write_bytes((known / "x.patch").read_bytes())
        else:
            shutil.copytree(known / "known", "out")
        earlier = results(Path())
    Path("mine.txt").write_text("mine")
    code, printed, _ = finish(arguments, seconds, signum)
    print(
        f"{name}{' over' * bool(earlier)}: {signal.Signals(signum).name} after {seconds:.2f} s: {code}"
    )
    stopped = -signum if signum == signal.SIGKILL else 128 + signum
    assert code in (stopped, whole.code), printed
    left = results(Path())
    if signum != signal.SIGKILL:
        assert not list(Path().rglob(".wagle-*.tmp")), printed
    if code == whole.code:
        assert left == whole.results, printed
    if name != "quickstart":  # its models are trained again, and replace those with the same names
        finished = {key: whole.results[key] for key in left if key in whole.results}
        assert earlier == left or finished == left, printed
    resume = [] if name == "quickstart" else re.findall(r"--ckpt_path (\S+)", printed)
    again, printed, _ = finish([*arguments, *(["--ckpt_path", resume[-1]] if resume else [])])
    refused = left == whole.results and again == 2 and "exists already" in printed
    assert refused or again == whole.code, printed
    for path in Path().rglob(".wagle-*.tmp"):  # of the process that was killed
        shutil.rmtree(path)
    assert results(Path()) == whole.results
    assert Path("mine.txt").read_text() == "mine"
