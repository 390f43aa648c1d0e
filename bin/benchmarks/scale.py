"""Work of a rank by stage, on one and on two CPU processes under ZeRO-3: bytes handled, and seconds.

    bin/bench scale [--model FOLDER] [--output FILE]

Rows a rank are the same (weak scaling), so a step's time may stay and the bytes of a rank are to halve; two ranks on
two busy cores take longer than one. JSON on stdout, a table on stderr; numbers are of the rank that had the most.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import lightning as L
from handled import Handled
from plan import ROOT, measure

from wagle_pl.cli import app as cli
from wagle_pl.cli.messages import fail
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.core.text import table
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
    parser.add_argument("--model", default=str(ROOT / "models/smollm2"), help="folder of the model")
    parser.add_argument("--output", help="JSON file to write as well")
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
        for task in TASKS:
            for ranks in RANKS:
                case = (task, "zero3", "32-true")
                scores = ("--model.save_scores", "fp32") if task == "attribution" else ()
                found = measure(case, model, scratch, ranks, "scale.Stages", *scores)
                for stage, seconds in found["seconds"].items():
                    row = {"task": task, "ranks": ranks, "stage": stage, "seconds": seconds}
                    results.append(row | {"bytes": found["bytes"].get(stage)})
    report = json.dumps({"weights": shape.weights, "rows": results}, indent=1)
    if options.output:
        with atomic_path(Path(options.output)) as temporary:
            temporary.write_text(report + "\n", encoding="utf-8")
    print(report)
    rows = [
        [
            *(row["task"], row["stage"], str(row["ranks"])),
            "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.1f}",
            f"{row['seconds']:.2f}",
        ]
        for row in sorted(results, key=lambda row: (row["task"], row["stage"], row["ranks"]))
    ]
    header = ["task", "stage", "ranks", "MiB a rank", "seconds"]
    print(table(header, rows, left=(0, 1)), file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except WagleError as error:
        fail(str(error))
