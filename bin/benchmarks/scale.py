"""Work of a rank by stage, on one and on two CPU processes under ZeRO-3: bytes handled, and seconds.

    bin/bench scale [--model FOLDER] [--minutes M] [--output FILE]

Rows a rank are the same (weak scaling), so a step's time may stay and the bytes of a rank are to halve; two ranks on
two busy cores take longer than one. JSON on stdout, a table on stderr; numbers are of the rank that had the most.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import lightning as L
from common import TimeOver, until
from handled import Handled
from plan import add_common, measure

from wagle_pl.cli import app as cli
from wagle_pl.cli.messages import fail
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.lab import planning
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import random_bits

TASKS = ("attribution", "unlearning")
RANKS = (1, 2)
DENSITY = 0.2


class Stages(L.Callback):
    """Writes what the rank with the most has handled to a JSON file when a fit ends."""

    def __init__(self, answer: str) -> None:
        self.answer, self.handled, self.steps = answer, Handled(), []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the seconds of a micro-batch."""
        self.steps.append(time.perf_counter() - self.started)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Write."""
        mine = {"bytes": self.handled.bytes, "seconds": self.handled.seconds}
        mine["seconds"]["step"] = sorted(self.steps)[len(self.steps) // 2]
        ranks = distributed.all_gather([mine])
        if trainer.is_global_zero:
            most = {
                what: {stage: max(r[what][stage] for r in ranks) for stage in mine[what]}
                for what in mine
            }
            Path(self.answer).write_text(json.dumps(most), encoding="utf-8")


def main() -> None:
    """Run the tasks and print the table."""
    parser = argparse.ArgumentParser(prog="bin/bench scale", description=__doc__)
    add_common(parser)
    options = parser.parse_args()
    cli.quiet()
    model = str(Path(options.model).resolve())
    shape = planning.architecture(model)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="wagle-scale-") as folder:
        scratch = Path(folder)
        sizes = {name: prod(of) for name, of in shape.shapes.items()}
        bits = random_bits(sizes, int(DENSITY * shape.weights), 0)
        WeightMask(bits, shape.shapes, {"model": model}).save(scratch / "mask.safetensors")
        end = time.monotonic() + 60 * options.minutes
        print(f"{'task':12} {'stage':14} ranks  MiB a rank   seconds", file=sys.stderr, flush=True)
        for task, ranks in product(TASKS, RANKS):
            case = (task, "zero3", "32-true")
            scores = ("--model.save_scores", "fp32") if task == "attribution" else ()
            try:
                with until(end):
                    found = measure(case, model, scratch, ranks, "scale.Stages", *scores)
            except TimeOver:
                said = f"{task} of {ranks} ranks: left out, no time left"
                print(said, file=sys.stderr, flush=True)
                continue
            for stage, seconds in found["seconds"].items():
                size = found["bytes"].get(stage)
                row = {"task": task, "ranks": ranks, "stage": stage, "seconds": seconds}
                results.append(row | {"bytes": size})
                shown = "" if size is None else f"{size / 2**20:,.1f}"
                line = f"{task:12} {stage:14} {ranks:5} {shown:>11} {seconds:9.2f}"
                print(line, file=sys.stderr, flush=True)
            report = json.dumps({"weights": shape.weights, "rows": results}, indent=1)
            if options.output:
                with atomic_path(Path(options.output)) as temporary:
                    temporary.write_text(report + "\n", encoding="utf-8")
    print(json.dumps({"weights": shape.weights, "rows": results}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except WagleError as error:
        fail(str(error))
