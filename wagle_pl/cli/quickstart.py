"""``wagle quickstart``: every task once, on the bundled people; needs nothing but the package."""

from __future__ import annotations

import contextlib
import shlex
import time
from pathlib import Path

from wagle_pl.cli import LazyModule, app
from wagle_pl.core.environment import prepare_libraries, silence
from wagle_pl.core.reading import read_json
from wagle_pl.core.text import markdown_table

people = LazyModule("wagle_pl.data.people")
tiny = LazyModule("wagle_pl.lm.tiny")
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
#: Options that shorten fit and test to just enough to see them work.
TRIAL = {"fit": "--trainer.max_steps 2", "test": "--data.limit_test 4 --model.max_new_tokens 4"}


def quickstart(*, verbose: bool = False, trial: bool = False) -> None:
    """Train, attribute, unlearn and test on the bundled people, and print the results in one table.

    Each printed line is a command that you can type; here all of them run in one process. They
    write to the folder runs/people.

    Args:
        verbose: show what each command prints.
        trial: only two steps, a few rows and WAGLE's mask, to check that everything works here.
    """
    prepare_libraries()
    started = time.monotonic()
    sets = ("forget", "retain", "holdout", "real_authors", "world_facts")
    rows_to_know = [row for name in sets for row in people.bundled(name)]
    texts = [row[column] for row in rows_to_know for column in ("question", "answer")]
    tiny.create_tiny_llama(RUNS / "base", texts, hidden_size=192, layers=2, heads=6)
    print(f"a tiny Llama with random weights is in {RUNS}/base; now:", flush=True)

    def wagle(command: str) -> None:
        step = time.monotonic()
        print(f"  wagle {command}", end="", flush=True)
        with contextlib.nullcontext() if verbose else silence():
            options = TRIAL[command.split()[0]] if trial else ""
            app.run(shlex.split(f"{command} --model.overwrite true {options}"))
        print(f"   [{time.monotonic() - step:.0f} s]", flush=True)

    arms = {row: arm for row, arm in UNLEARNED.items() if not trial or row.startswith("WAGLE")}
    models = ["target", "retrained"]
    rows = dict(zip(models, models, strict=True)) | {row: arm for row, (arm, _) in arms.items()}
    attribute = "fit --config people/data --config task/attribute"
    wagle("fit --config people/finetune")
    wagle(f"fit --config people/finetune --model.train_on retain --model.output {RUNS}/retrained")
    wagle(attribute)
    if not trial:
        wagle(f"{attribute} --model.score random --model.output {RUNS}/masks/random")
    for name, options in arms.values():
        wagle(f"fit --config people/unlearn --model.output {RUNS}/{name} {options}")
    for name in ("retrained", *(name for name in rows.values() if name != "retrained")):
        against = "" if name == "retrained" else f" --model.retrained {RUNS}/retrained/test"
        folders = f"--model.model {RUNS}/{name} --model.output {RUNS}/{name}/test"
        test = "test --config people/data --config task/test --model.max_new_tokens 40"
        wagle(f"{test} {folders}{against}")
    files = {row: RUNS / name / "test/metrics.json" for row, name in rows.items()}
    metrics = {row: read_json(file, dict[str, float]) for row, file in files.items()}
    cells = [
        [row, *(f"{measured[key]:.3g}" if key in measured else "" for key in COLUMNS.values())]
        for row, measured in metrics.items()
    ]
    print(f"\n{markdown_table(['model', *COLUMNS], cells)}\n")
    what = "forget quality is the p-value against the retrained model's answers"
    print(f"{what}; {time.monotonic() - started:.0f} s in all")
    where = "(metrics.json and *.parquet in each <model>/test)"
    print(f"models, masks and every generation are in {RUNS}/ {where}")
