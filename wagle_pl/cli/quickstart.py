"""``wagle quickstart``: every task once, on the bundled people; needs nothing but the package."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from wagle_pl.cli import LazyModule, app
from wagle_pl.cli.messages import fail, mistake, quiet
from wagle_pl.core.environment import prepare_libraries, silence
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.reading import read_json
from wagle_pl.core.text import markdown_table

people = LazyModule("wagle_pl.data.people")
tiny = LazyModule("wagle_pl.lm.tiny")
torch = LazyModule("torch")
RUNS = Path("runs/people")
SECONDS_TO_END = 10.0  # in which a command that is ended removes its temporary files

#: Row of the table -> model.
MODELS = {"target": "target", "retrained": "retrained", "dense NPO": "dense_npo"}
MODELS |= {"random mask NPO": "random_npo", "WAGLE NPO": "wagle_npo"}
COLUMNS = {
    "forget prob.": "forget/probability",
    "forget ROUGE-L": "forget/rougeL_recall",
    "forget quality": "forget_quality",
    "retain prob.": "retain/probability",
    "utility": "model_utility",
}
#: Options that shorten fit and test to just enough to see them work.
TRIAL = {"fit": "--trainer.max_steps 2", "test": "--data.limit_test 4 --model.max_new_tokens 4"}


def quickstart(*, verbose: bool = False, trial: bool = False) -> None:
    """Train, attribute, unlearn and test on the bundled people, and print the results in one table.

    Each printed line is a command that you can type. Commands that do not need each other run
    side by side, one thread each. They write to the folder runs/people.

    Args:
        verbose: show what each command prints.
        trial: only two steps, a few rows and WAGLE's mask, to check that everything works here.
    """
    started = time.monotonic()
    commands = _commands(trial)
    refuse_existing(RUNS / "base", overwrite=True, kind="folder")
    print(f"a tiny Llama with random weights in {RUNS}/base, and then:", flush=True)
    _run_all(commands, verbose)
    cells = []
    for row in (row for row, name in MODELS.items() if name in commands):
        values = read_json(RUNS / MODELS[row] / "test/metrics.json", dict[str, float])
        cells.append([row, *(f"{values[k]:.3g}" if k in values else "" for k in COLUMNS.values())])
    print(f"\n{markdown_table(['model', *COLUMNS], cells)}\n")
    print("forget quality is the p-value against the retrained model's answers;", end=" ")
    print(f"{time.monotonic() - started:.0f} s in all")
    print(f"models, masks, metrics.json and all generations (*.parquet) are in {RUNS}/")


def _commands(trial: bool) -> dict[str, tuple[str, set[str]]]:
    """Name -> command, and the names of those that come before it."""
    train, masks, data = "fit --config people/finetune", f"{RUNS}/masks", "--config people/data"
    attribute, unlearn = f"fit {data} --config task/attribute", "fit --config people/unlearn"
    random = f"{attribute} --model.score random --model.output {masks}/random"
    commands = {
        "target": (train, {"base"}),
        "retrained": (f"{train} --model.train_on retain --model.output {RUNS}/retrained", {"base"}),
        "wagle": (attribute, {"target"}),
        "random": (random, {"target"}),
    }
    for name, mask in ("dense", None), ("random", "random"), ("wagle", "wagle"):
        selected = f"{masks}/{mask}.safetensors" if mask else "null"
        options = f"--model.output {RUNS}/{name}_npo --model.mask {selected}"
        commands[f"{name}_npo"] = (f"{unlearn} {options}", {mask or "target"})
    for name in sorted(MODELS.values(), key="retrained".__ne__):
        against = f" --model.retrained {RUNS}/retrained/test" if name != "retrained" else ""
        folders = f"--model.model {RUNS}/{name} --model.output {RUNS}/{name}/test{against}"
        test = f"test {data} --config task/test --model.max_new_tokens 40 {folders}"
        commands[f"{name}/test"] = (test, {name, *(["retrained/test"] if against else [])})
    if trial:
        return {
            name: (f"{command} {TRIAL[command.split()[0]]}", before)
            for name, (command, before) in commands.items()
            if not name.startswith(("dense", "random"))
        }
    return commands


def _run_all(commands: dict[str, tuple[str, set[str]]], verbose: bool) -> None:
    """Make the base, then run commands side by side, each once those before it are done. A command
    that fails ends the others, and this process with its status."""
    # One process imports the libraries, and each command's process is forked from that one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wagle_pl.cli.lightning"])
    slots = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    waiting, done = {"base": ("", set[str]()), **commands}, set[str]()
    running: dict[Any, tuple[str, BaseProcess, float]] = {}  # by what wait() takes
    try:
        while waiting or running:
            ready = [name for name, (_, before) in waiting.items() if before <= done]
            for name in ready[: slots - len(running)]:
                command, _ = waiting.pop(name)
                process: BaseProcess = context.Process(target=_run, args=(command, verbose))
                process.start()
                running[process.sentinel] = name, process, time.monotonic()
                print(f"  wagle {command}\n" if command else "", end="", flush=True)
            for handle in wait(list(running)):
                name, process, since = running.pop(handle)
                process.join()
                if (status := process.exitcode or 0) < 0:
                    fail(f"quickstart: {name} was ended by signal {-status}")
                if status:
                    raise SystemExit(status)
                done.add(name)
                print(f"    [{time.monotonic() - since:.0f} s] {name}", flush=True)
    finally:
        processes = [process for _, process, _ in running.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(SECONDS_TO_END)
            process.kill()
            process.join()


def _run(command: str, verbose: bool) -> None:
    """Run a command, or make the base, in this process, which ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parent = [multiprocessing.parent_process().sentinel]
    threading.Thread(target=lambda: wait(parent) and os._exit(1), daemon=True).start()
    quiet()
    prepare_libraries()
    torch.set_num_threads(1)  # sums, and so the table's digits, depend on the number
    try:
        with contextlib.nullcontext() if verbose else silence():
            if command:
                app.run([*shlex.split(command), "--model.overwrite", "true"])
                return
            sets = ("forget", "retain", "holdout", "real_authors", "world_facts")
            rows = [row for name in sets for row in people.bundled(name)]
            texts = [row[column] for row in rows for column in ("question", "answer")]
            tiny.create_tiny_llama(RUNS / "base", texts, hidden_size=192, layers=2, heads=6)
    except Exception as error:
        if (line := mistake(error)) is None:
            raise
        fail(f"{line} (in: wagle {command})")
