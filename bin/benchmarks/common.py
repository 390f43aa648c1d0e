"""What the benchmarks share: options, rows of data, runs that alternate, peak memory of a fresh process, the report."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Optional

import lightning as L
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from wagle_pl.attribution.selection import select_each
from wagle_pl.cli import app as cli
from wagle_pl.cli.messages import fail
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.data.example import parse_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import Template
from wagle_pl.lm import models
from wagle_pl.lm.tiny import create_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
PRECISION = "bf16-mixed"
CHILD = "--child"
#: Has the C library give back blocks as soon as they are freed: else it keeps many for later.
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "32768",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_ARENA_MAX": "1",
}


@dataclass
class Settings:
    """What every measurement is given; plain values, so that a fresh process can be given them too."""

    model: str  # folder
    scratch: str  # folder for what is written; removed at the end
    source: str  # where the rows are from, for the report
    repeats: int  # how often each side of a ratio is measured
    rows: int = 40  # forget rows, and as many retain rows
    batch_size: int = 8  # rows, or pairs of rows
    padded: int = 512  # tokens that the baselines pad every row to
    baseline_rows: int = 8  # that a baseline's pass is timed on; the time is scaled to all rows
    baseline_densities: int = 1  # that a baseline writes; the time is scaled to all
    shape: str = "0.1b"  # of a Llama with random weights, where a row makes one
    deadline: float = float("inf")  # on the monotonic clock: no repeat begins that would end later
    end: float = float("inf")  # likewise: a row that has no result then is left out

    @property
    def forget(self) -> str:
        """File of forget rows."""
        return f"{self.scratch}/forget.jsonl"

    @property
    def retain(self) -> str:
        """File of retain rows."""
        return f"{self.scratch}/retain.jsonl"


Result = dict[str, Any]
Measure = Callable[..., Any]


def result(
    name: str, value: float, bar: float, at_least: bool, unit: str, raw: Mapping[str, Any]
) -> Result:
    """One line of the report: a value, and the bar that it must reach, or else not exceed; ``raw`` is what it is made
    of."""
    met = value >= bar if at_least else value <= bar
    wanted = {"bar": bar, "wanted": "at least" if at_least else "at most"}
    return {"name": name, "value": value, **wanted, "met": met, "unit": unit, "raw": dict(raw)}


class TimeOver(Exception):
    """The minutes are over."""


@contextmanager
def until(end: float) -> Iterator[None]:
    """Context that raises :class:`TimeOver` at this time of the monotonic clock; for the main thread."""

    def stop(*_: Any) -> None:
        raise TimeOver

    left = end - time.monotonic()
    if left <= 0:
        raise TimeOver
    if left == float("inf"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- measuring --------------------------------------------------------------------------------------------------------


def alternate(settings: Settings, sides: Mapping[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Run every side in turn, A B A B, so that what else the machine does falls on all of them; name -> results.

    Each runs as often as the settings say, or as there is time for, but once.
    """
    results: dict[str, list[Any]] = {name: [] for name in sides}
    started = time.monotonic()
    for repeat in range(settings.repeats):
        now = time.monotonic()
        if repeat and now + (now - started) / repeat > settings.deadline:
            break
        for name, run in sides.items():
            results[name].append(run())
            gc.collect()
    return results


def in_turns(sides: Mapping[str, Callable[[L.Callback], Any]]) -> dict[str, Any]:
    """Run all sides at once, in threads that take turns of one training batch; name -> result.

    A shared machine's speed drifts by more than a few per cent between runs: batches that follow each other at once can
    be compared. Each side is given the callback that waits for its turn.
    """
    order, changed = deque(sides), threading.Condition()

    class Turn(L.Callback):
        """Lets the others go on before each batch."""

        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_batch_start(self, *_: Any) -> None:
            """Wait until all others have done theirs."""
            with changed:
                order.rotate(-1)
                changed.notify_all()
                changed.wait_for(lambda: order[0] == self.name)

    def take_part(name: str) -> Any:
        with changed:
            changed.wait_for(lambda: order[0] == name)
        try:
            return sides[name](Turn(name))
        finally:
            with changed:
                order.popleft()
                changed.notify_all()

    with ThreadPoolExecutor(len(sides)) as threads:
        return dict(zip(sides, threads.map(take_part, sides), strict=True))


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def memory(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise WagleError(
            "memory is read from /proc/self/status, which this system does not have"
        ) from None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> int:
    """Let ``VmHWM`` begin anew at ``VmRSS``, which is returned."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return memory("VmRSS")


def in_fresh_process(settings: Settings, function: str, **arguments: Any) -> Any:
    """Call a function of the running benchmark's ``CHILDREN`` in a process of its own, which has a peak of its own."""
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        answer = Path(folder) / "answer.json"
        task = {"function": function, "settings": asdict(settings), "arguments": arguments}
        task["answer"] = str(answer)
        command = [sys.executable, sys.argv[0], CHILD, json.dumps(task)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return json.loads(answer.read_text(encoding="utf-8"))


# -- runs -------------------------------------------------------------------------------------------------------------


class BatchTimes(L.Callback):
    """When each micro-batch of a run started and ended, its tokens without padding, and if asked for the batch."""

    def __init__(self, keep: bool = False) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.epochs: list[int] = []
        self.tokens: list[int] = []
        self.batches: list[Any] = []
        self.keep = keep

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a batch."""
        self.tokens.append(count_tokens(batch))
        self.epochs.append(trainer.current_epoch)
        if self.keep:
            self.batches.append(batch)
        self.starts.append(time.perf_counter())

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.ends.append(time.perf_counter())

    def steps(self, epoch: Optional[int] = None) -> list[float]:
        """Seconds of every batch (of one epoch) but the run's first, which warms up."""
        spans = zip(self.starts, self.ends, self.epochs, strict=True)
        return [end - start for start, end, e in list(spans)[1:] if epoch in (None, e)]


def count_tokens(batch: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Tokens of a batch, without padding."""
    return sum(int(tensors["attention_mask"].sum()) for tensors in batch.values())


def fit(
    module: L.LightningModule,
    settings: Settings,
    callbacks: Sequence[L.Callback] = (),
    batch_size: Optional[int] = None,
    **options: Any,
) -> None:
    """Fit as a user does, without logger and checkpoints; options are the Trainer's."""
    data = ForgetRetainDataModule(
        forget=settings.forget, retain=settings.retain, batch_size=batch_size or settings.batch_size
    )
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    own = {"accelerator": "cpu", "devices": 1, "default_root_dir": settings.scratch}
    own |= {"precision": PRECISION, "callbacks": list(callbacks), **dict.fromkeys(quiet, False)}
    trainer = L.Trainer(**{**own, **options})
    trainer.fit(module, datamodule=data)


def step_ratio(
    runs: Sequence[BatchTimes], base: Sequence[BatchTimes], epoch: Optional[int] = None
) -> float:
    """Time of a run's steps over the time of another's on the same batches: of each step the median over repeats."""

    def total(timings: Sequence[BatchTimes]) -> float:
        return sum(
            median(times)
            for times in zip(*(timing.steps(epoch) for timing in timings), strict=True)
        )

    return total(runs) / total(base)


def padded_rows(settings: Settings, rows: str, count: int) -> list[dict[str, Tensor]]:
    """What a plain script makes of the first rows of a file: each alone, padded to a fixed length."""
    tokenizer = models.load_tokenizer(settings.model)
    template = Template(tokenizer, None, None, settings.padded)
    batches = []
    for row in parse_rows(load_rows(rows)[:count], rows):
        encoded = template.encode(row)
        gap = settings.padded - len(encoded["input_ids"])
        filled = {
            "input_ids": [*encoded["input_ids"], *[tokenizer.pad_token_id or 0] * gap],
            "attention_mask": [*[1] * len(encoded["input_ids"]), *[0] * gap],
            "labels": [*encoded["labels"], *[-100] * gap],
        }
        batches.append({name: torch.tensor([values]) for name, values in filled.items()})
    return batches


def autocast() -> torch.autocast:
    """The precision of :data:`PRECISION`, for a plain loop."""
    return torch.autocast("cpu", torch.bfloat16)


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, without reading a weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return parameter_shapes(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)))


#: Llamas: hidden size, inner size of the MLP, layers, heads, heads of keys, vocabulary. 1.2b is Llama-3.2-1B, 7b is
#: Llama-2-7B; blocks makes as many launches as 1.2b.
SHAPES = {
    "tiny": (64, 192, 4, 4, 2, 4096),
    "blocks": (64, 256, 16, 4, 2, 4096),
    "0.1b": (768, 3072, 8, 12, 4, 4096),
    "0.25b": (1024, 4096, 12, 16, 4, 65536),
    "1.2b": (2048, 8192, 16, 32, 8, 128256),
    "7b": (4096, 11008, 32, 32, 32, 32000),
}


def random_llama(shape: str, attention: Optional[str] = None) -> Any:
    """A Llama of one of the :data:`SHAPES` with random weights in bf16, on torch's default device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, inner, layers, heads, keys, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=vocabulary,
        tie_word_embeddings=shape != "7b",
    )
    options = {"dtype": torch.bfloat16, "attn_implementation": attention}
    return AutoModelForCausalLM.from_config(config, **options)


def products_per_second(
    model: str, tokens: int, dtype: torch.dtype = torch.bfloat16, backward: bool = True
) -> float:
    """Floating-point operations a second of the blocks' matrix products alone."""
    block = [s for n, s in shapes_of(model).items() if len(s) == 2 and ".0." in n]
    pairs = [
        tuple(torch.randn(shape).to(dtype) for shape in ((tokens, n), (m, n), (tokens, m)))
        for m, n in block
    ]

    def run() -> None:
        for _ in range(5):
            for x, weight, gradient in pairs:
                x @ weight.T
                if backward:
                    gradient @ weight, gradient.T @ x

    run()
    return 5 * (6 if backward else 2) * tokens * sum(map(prod, block)) / seconds(run)


# -- the program ------------------------------------------------------------------------------------------------------


def main(benchmark: str, rows: Mapping[str, Measure], children: Mapping[str, Measure]) -> None:
    """Measure the rows asked for, by functions of the settings that return :func:`result` dicts, and report.

    ``children`` are functions for :func:`in_fresh_process`, by name; their first argument is the settings.
    """
    cli.quiet()
    disable_progress_bar()
    for library in ("lightning.pytorch", "lightning.fabric", "wagle_pl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if sys.argv[1:2] == [CHILD]:
        task = json.loads(sys.argv[2])
        answer = children[task["function"]](Settings(**task["settings"]), **task["arguments"])
        Path(task["answer"]).write_text(json.dumps(answer), encoding="utf-8")
        return
    options = _options(benchmark, rows)
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr: stdout holds the report and nothing else
    with tempfile.TemporaryDirectory(prefix="wagle-bench-") as scratch:
        try:
            settings = prepare(options, scratch)
        except WagleError as error:
            fail(str(error))
        report = _describe(benchmark, options, settings)
        settings.end = time.monotonic() + 60 * options.minutes
        end = settings.end - 10 * options.minutes  # which are left for a round that takes longer
        print(f"{'row':34} {'value':>9}   bar", file=sys.stderr, flush=True)
        for number, name in enumerate(options.rows):
            now = time.monotonic()
            settings.deadline = now + max(0.0, end - now) / (len(options.rows) - number)
            report["rows"] += run_row(name, rows[name], settings)
            report["machine"]["load_average_after"] = os.getloadavg()
            if options.output:  # after every row: what is measured stays when the run is stopped
                with atomic_path(Path(options.output)) as temporary:
                    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1), file=stdout, flush=True)


def _options(benchmark: str, rows: Mapping[str, Measure]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"bin/bench {benchmark}")
    add = parser.add_argument
    add("--model", default=str(ROOT / "models/smollm2"), help="folder of the model")
    add("--tofu", help="folder with TOFU's forget01.json and retain99.json; default: the people")
    add("--rows", help=f"which to measure, of {','.join(rows)}; default: all")
    add("--repeats", type=int, help="how often each side is measured (default 3; 1 with --quick)")
    add("--minutes", type=float, default=10.0, help="after which rows are left out; default 10")
    add("--shape", default="0.1b", help="of the row sums: a Llama of 0.1b, 0.25b or 1.2b weights")
    add("--quick", action="store_true", help="a tiny model, few rows: shows only that it runs")
    add("--full", action="store_true", help="run the padded baselines whole, without scaling")
    add("--output", help="JSON file to write as well")
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.quick else 3)
    options.rows = options.rows.split(",") if options.rows else list(rows)
    if unknown := [name for name in options.rows if name not in rows]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(rows)}")
    if options.repeats < 1:
        parser.error("--repeats must be above 0")
    return options


def prepare(options: argparse.Namespace, scratch: str) -> Settings:
    """Write the rows (and the tiny model) that the measurements read."""
    if options.tofu:
        source, files = "TOFU forget01 and retain99", ("forget01.json", "retain99.json")
        forget, retain = (load_rows(str(Path(options.tofu) / file)) for file in files)
    else:
        source = "bundled people"
        forget, retain = [*bundled("forget"), *bundled("holdout")], bundled("retain")
    settings = Settings(options.model, scratch, source, options.repeats, shape=options.shape)
    if options.quick:
        texts = [row[column] for row in forget for column in ("question", "answer")]
        settings.model = str(create_tiny_llama(f"{scratch}/model", texts, 400, 32, layers=2))
        settings.rows, settings.batch_size, settings.padded, settings.baseline_rows = 8, 4, 192, 4
        settings.shape = "tiny"
    elif not Path(options.model).is_dir():
        raise WagleError(
            f"there is no model in {options.model}: run bin/get-smollm2, or give --model or --quick"
        )
    if options.full:
        settings.baseline_rows, settings.baseline_densities = settings.rows, 10
    for path, rows in ((settings.forget, forget), (settings.retain, retain)):
        lines = (json.dumps(row) + "\n" for row in rows[: settings.rows])
        Path(path).write_text("".join(lines), encoding="utf-8")
    return settings


def run_row(name: str, measure: Measure, settings: Settings) -> list[Result]:
    """A row's results, printed as soon as they are there."""
    started = time.monotonic()
    try:
        with until(settings.end):
            results = measure(settings)
    except TimeOver:
        results = [{"name": name, "left_out": "no time left: measure it alone, by --rows"}]
    except Exception as error:  # whatever went wrong with one row, the others are still wanted
        traceback.print_exc()
        results = [{"name": name, "error": f"{type(error).__name__}: {error}"}]
    lines = "\n".join(map(_line, results))
    print(f"{lines}   ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    return results


def _describe(benchmark: str, options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The report without its rows: what was measured on what."""
    template = Template(models.load_tokenizer(settings.model), None, None, settings.padded)
    data: dict[str, Any] = {
        "source": settings.source,
        "batch_size": settings.batch_size,
        "baseline_padded_to": settings.padded,
    }
    for name, file in (("forget", settings.forget), ("retain", settings.retain)):
        counts = [len(template.encode(r)["input_ids"]) for r in parse_rows(load_rows(file), file)]
        data[name] = {"rows": len(counts), "mean_tokens": round(sum(counts) / len(counts), 1)}
    weights = sum(prod(shape) for shape in shapes_of(settings.model).values())
    name = "tiny llama" if options.quick else os.path.relpath(settings.model, ROOT)
    packages = ("wagle-pl", "torch", "lightning", "transformers", "numpy")
    return {
        "benchmark": benchmark,
        "quick": options.quick,
        "model": {"name": name, "weights": weights},
        "precision": PRECISION,
        "repeats": settings.repeats,
        "data": data,
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "rows": [],
    }


def machine() -> dict[str, Any]:
    def first(path: str, start: str) -> Optional[str]:
        lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
        found = (line.partition(":")[2].strip() for line in lines if line.startswith(start))
        return next(found, None)

    total = first("/proc/meminfo", "MemTotal")
    environment = {n: v for n, v in os.environ.items() if n.startswith(("OMP_", "MALLOC_"))}
    return {
        "system": platform.platform(),
        "cpu": first("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "environment": environment,
        "memory_bytes": int(total.split()[0]) * 1024 if total else None,
        "load_average_before": os.getloadavg(),
    }


def _line(row: Result) -> str:
    if "error" in row:
        return f"{row['name']:34} failed: {row['error']}"
    if "left_out" in row:
        return f"{row['name']:34} left out: {row['left_out']}"
    bar = f"{row['wanted']} {row['bar']:g} {row['unit']}: {'met' if row['met'] else 'MISSED'}"
    return f"{row['name']:34} {row['value']:9.3f}   {bar}"


def select(
    scores: Callable[[], Iterable[tuple[str, Tensor]]], density: float
) -> Iterator[tuple[str, Tensor]]:
    """The bits of each parameter's weights with the largest |scores|, packed."""
    for name, (bits,) in select_each(scores, [density]):
        yield name, bits
