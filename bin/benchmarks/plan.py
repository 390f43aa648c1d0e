"""Peak memory of a rank, as ``wagle plan`` predicts it and as it is: one or two CPU processes, case after case.

    bin/bench plan [--model FOLDER] [--cases NAME,NAME] [--minutes M] [--output FILE]

The peak is ``VmHWM`` of the rank that took more, nothing subtracted. The C library is told to give back every block of
32 KB or more as soon as it is freed (``MALLOC_MMAP_THRESHOLD_``): else it keeps freed blocks for later, which the plan
leaves out.
Markdown on stdout, progress on stderr; exit code 0 whether a prediction is good or not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import lightning as L
from common import GIVE_BACK, TimeOver, memory, until

from wagle_pl.attribution.hessian import estimator_of
from wagle_pl.cli import app as cli
from wagle_pl.cli.messages import fail
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.core.text import markdown_table
from wagle_pl.lab import planning
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import random_bits

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("attribution", "unlearning")
STRATEGIES = ("one", "ddp", "zero1", "zero2", "zero3")
PRECISIONS = ("32-true", "bf16-true")
CASES = {
    f"{task}-{name}-{precision}": (task, name, precision)
    for precision, task, name in product(PRECISIONS, TASKS, STRATEGIES)
}
ENVIRONMENT = {**GIVE_BACK, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
DENSITY = 0.2
RANKS = 2
ROWS = 2  # of each stream, a rank and step
BAR = 0.10


class Peak(L.Callback):
    """Writes the ranks' greater peak, and the size of the largest batch, to a JSON file when a fit ends."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.width = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Remember the longest row."""
        self.width = max(self.width, *(tensors["input_ids"].shape[1] for tensors in batch.values()))

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Write."""
        found = {
            "peak": distributed.all_reduce_max(memory("VmHWM")),
            "max_length": distributed.all_reduce_max(self.width),
        }
        if trainer.is_global_zero:
            Path(self.answer).write_text(json.dumps(found), encoding="utf-8")


def ranks_of(strategy: str) -> int:
    """Processes of a case."""
    return 1 if strategy == "one" else RANKS


def command(
    case: tuple[str, str, str], model: str, scratch: Path, ranks: int, callback: str, *more: str
) -> list[str]:
    """Arguments of ``wagle fit`` for a case: a few short rows, three steps."""
    task, strategy, precision = case
    module = {
        "attribution": "AttributionModule",
        "unlearning": "UnlearnModule --model.objective NPO --optimizer MaskedAdamW",
    }[task]
    named = {"one": "auto", "ddp": "ddp"}.get(
        strategy, f"ZeRO --trainer.strategy.stage {strategy[-1]}"
    )
    text = (
        f"fit --model {module} --model.overwrite true --data PeopleDataModule "
        f"--data.batch_size {ROWS} --data.limit_forget {3 * ROWS * ranks} "
        f"--data.limit_retain {3 * ROWS * ranks} --trainer.accelerator cpu "
        f"--trainer.devices {ranks} --trainer.precision {precision} --trainer.max_epochs 1 "
        f"--trainer.strategy {named} --trainer.logger false "
        "--trainer.enable_checkpointing false --trainer.enable_progress_bar false "
        f"--trainer.enable_model_summary false --trainer.callbacks+ {callback}"
    )
    paths = {
        "--trainer.callbacks.answer": scratch / "answer.json",
        "--model.model": model,
        "--model.output": scratch / task,
    }
    if task == "unlearning":
        paths["--model.mask"] = scratch / "mask.safetensors"
    return [*text.split(), *more, *(str(part) for pair in paths.items() for part in pair)]


def measure(
    case: tuple[str, str, str],
    model: str,
    scratch: Path,
    ranks: int,
    callback: str = "plan.Peak",
    *more: str,
) -> dict[str, Any]:
    """Run a case on fresh processes; returns what a callback has written, such as :class:`Peak`.

    Raises:
        WagleError: if the run fails.
    """
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    folders = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    script = scratch / "run.py"  # Lightning starts the other rank with the same script
    script.write_text("from wagle_pl.cli.app import main\n\nmain()\n", encoding="utf-8")
    arguments = [
        sys.executable,
        str(script),
        *command(case, model, scratch, ranks, callback, *more),
    ]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(arguments, cwd=scratch, stdout=sys.stderr, env=environment)
    if done.returncode or not answer.is_file():
        raise WagleError(f"{'-'.join(case)} failed with exit code {done.returncode}, see above")
    return json.loads(answer.read_text(encoding="utf-8"))


def compare(
    case: tuple[str, str, str], shape: planning.Architecture, model: str, scratch: Path
) -> dict[str, Any]:
    """Measured and predicted peak of a case, in bytes."""
    task, strategy, precision = case
    found = measure(case, model, scratch, ranks_of(strategy))
    planned = "auto" if strategy == "one" else strategy
    run = planning.PlannedRun(
        task,
        planned,
        ranks_of(strategy),
        precision,
        "cpu",
        DENSITY,
        batch_size=ROWS,
        max_length=found["max_length"],
        estimator=estimator_of("auto") if task == "attribution" else None,
    )
    moment, predicted = planning.peak(shape, run)
    return {
        "task": task,
        "strategy": strategy,
        "precision": precision,
        "measured": found["peak"],
        "predicted": predicted,
        "moment": moment,
        "ratio": predicted / found["peak"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    case = ("task", "strategy", "precision")
    rows = [
        [
            *(row[key] for key in case),
            *(f"{row[key] / 2**20:,.0f}" for key in ("predicted", "measured")),
            f"{row['ratio']:.3f}",
        ]
        for row in results
    ]
    header = [*case, "predicted, MiB", "measured, MiB", "predicted / measured"]
    return markdown_table(header, rows, left=range(3))


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark and of ``scale``."""
    add = parser.add_argument
    add("--model", default=str(ROOT / "models/smollm2"), help="folder of the model")
    add("--minutes", type=float, default=10.0, help="after which cases are left out; default 10")
    add("--output", help="JSON file to write as well")


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(prog="bin/bench plan", description=__doc__)
    parser.add_argument("--cases", help=f"which, of {', '.join(CASES)}; all when not given")
    add_common(parser)
    options = parser.parse_args()
    cli.quiet()
    names = options.cases.split(",") if options.cases else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    model, results = str(Path(options.model).resolve()), []
    shape = planning.architecture(model)
    with tempfile.TemporaryDirectory(prefix="wagle-plan-") as folder:
        scratch = Path(folder)
        sizes = {parameter: prod(of) for parameter, of in shape.shapes.items()}
        bits = random_bits(sizes, int(DENSITY * shape.weights), 0)
        made_by = {"model": model, "score": "random", "density": DENSITY}
        WeightMask(bits, shape.shapes, made_by).save(scratch / "mask.safetensors")
        end = time.monotonic() + 60 * options.minutes
        for name in names:
            try:
                with until(end):
                    results.append(compare(CASES[name], shape, model, scratch))
            except TimeOver:
                print(f"{name}: left out, no time left", file=sys.stderr, flush=True)
                continue
            said = f"{name}: predicted / measured {results[-1]['ratio']:.3f}"
            print(said, file=sys.stderr, flush=True)
            if options.output:
                with atomic_path(Path(options.output)) as temporary:
                    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    worst = max((abs(row["ratio"] - 1) for row in results), default=0.0)
    print(f"\nfurthest off: {worst:.1%}; within {BAR:.0%}: {'yes' if worst <= BAR else 'NO'}")


if __name__ == "__main__":
    try:
        main()
    except WagleError as error:
        fail(str(error))
