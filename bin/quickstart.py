"""The main job on the bundled data: target, retrained and three unlearned models in one table.

Every line it prints is a command that can be typed; here they run in one process, to import once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import time
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from wagle_pl.cli import app as cli
from wagle_pl.core.environment import silence
from wagle_pl.core.errors import WagleError
from wagle_pl.core.text import markdown_table
from wagle_pl.data.people import bundled
from wagle_pl.lm.tiny import create_tiny_llama

RUNS = Path("runs/people")

#: Row of the table -> options that make it differ from the configuration.
UNLEARNED = {
    "dense NPO": ("dense_npo", "--model.mask null"),
    "random mask NPO": ("random_npo", f"--model.mask {RUNS}/masks/random.safetensors"),
    "WAGLE NPO": ("wagle_npo", f"--model.mask {RUNS}/masks/wagle.safetensors"),
}
COLUMNS = {
    "forget prob.": "forget/probability",
    "forget ROUGE-L": "forget/rougeL_recall",
    "forget quality": "forget_quality",
    "retain prob.": "retain/probability",
    "utility": "model_utility",
}


def main() -> None:
    """Run all steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="show what each command prints")
    verbose = parser.parse_args().verbose
    cli.quiet()
    disable_progress_bar()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    started = time.monotonic()
    sets = ("forget", "retain", "holdout", "real_authors", "world_facts")
    texts = [
        row[column] for name in sets for row in bundled(name) for column in ("question", "answer")
    ]
    create_tiny_llama(RUNS / "base", texts, hidden_size=192, layers=2, heads=6)
    print(f"a tiny Llama with random weights is in {RUNS}/base; now:", flush=True)

    def wagle(command: str) -> None:
        step = time.monotonic()
        print(f"  wagle {command}", end="", flush=True)
        with contextlib.nullcontext() if verbose else silence():
            cli.run(shlex.split(command + " --model.overwrite true"))
        print(f"   [{time.monotonic() - step:.0f} s]", flush=True)

    rows = {
        "target": "target",
        "retrained": "retrained",
        **{row: name for row, (name, _) in UNLEARNED.items()},
    }
    attribute = "fit --config people/data --config task/attribute"
    wagle("fit --config people/finetune")
    wagle(f"fit --config people/finetune --model.train_on retain --model.output {RUNS}/retrained")
    wagle(attribute)
    wagle(f"{attribute} --model.score random --model.output {RUNS}/masks/random")
    for name, options in UNLEARNED.values():
        wagle(f"fit --config people/unlearn --model.output {RUNS}/{name} {options}")
    for name in ("retrained", *(name for name in rows.values() if name != "retrained")):
        against = "" if name == "retrained" else f" --model.retrained {RUNS}/retrained/test"
        folders = f"--model.model {RUNS}/{name} --model.output {RUNS}/{name}/test"
        test = "test --config people/data --config task/test --model.max_new_tokens 40"
        wagle(f"{test} {folders}{against}")
    results = {
        row: json.loads((RUNS / name / "test/metrics.json").read_text())
        for row, name in rows.items()
    }
    print(f"\n{table(results)}\n")
    seconds = time.monotonic() - started
    print(
        "forget quality is the p-value against the retrained model's answers; "
        f"{seconds:.0f} s in all"
    )
    print(
        f"models, masks and every generation are in {RUNS}/ (metrics.json and *.parquet in each "
        "<model>/test)"
    )


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table."""
    rows = [
        [name, *(f"{found[key]:.3g}" if key in found else "" for key in COLUMNS.values())]
        for name, found in results.items()
    ]
    return markdown_table(["model", *COLUMNS], rows)


if __name__ == "__main__":
    try:
        main()
    except WagleError as error:
        cli.fail(str(error))
