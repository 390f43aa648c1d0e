"""What a CUDA device does in a step: tokens a second, share of its peak, memory beside the plan, waits, launches.

    bin/bench device [--shapes 0.1b,1.2b,7b] [--cases NAME,NAME] [--steps N] [--minutes M] [--output FILE]

Each case trains a Llama with random weights in bf16 for a few steps: some that warm up, some that are timed, one in
which operations that wait for the device are counted (``torch.cuda.set_sync_debug_mode``), one whose launches are (by
the profiler). A case that ``wagle plan`` says does not fit is left out. Without a CUDA device the same runs on the
counting device of the tests, with small shapes: waits, launches and bytes, no times.
A Markdown table on stdout, a line for each case on stderr as it ends, JSON in a file.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any, Optional

import lightning as L
import torch
from common import ROOT, machine, random_llama
from torch.profiler import ProfilerActivity, profile

from wagle_pl import AttributionModule, ForgetRetainDataModule, UnlearnModule, WeightMask
from wagle_pl.cli import app as cli
from wagle_pl.core.environment import prepare_libraries, versions
from wagle_pl.core.files import atomic_path
from wagle_pl.core.text import markdown_table
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lab import planning
from wagle_pl.lm.tiny import create_tiny_llama
from wagle_pl.masks.bits import pack_bits

DENSITY = 0.2
WARM_UP, COUNTED = 3, 2  # steps; one in which waits are counted, one in which launches are
#: Shape -> rows of each stream in a batch, tokens of the longest row, gradient checkpointing.
BATCHES = {
    "tiny": (2, 32, False),
    "blocks": (2, 32, False),
    "0.1b": (16, 512, False),
    "1.2b": (8, 512, False),
    "7b": (2, 512, True),
}
CASES: dict[str, dict[str, Any]] = {
    "dense": {"density": 1.0},
    "mask": {},
    "packed": {"packing": True},
    "attribution": {"sums": "device"},
    "host": {"sums": "host"},
    "flash": {"packing": True, "attention": "flash_attention_2"},
    "compiled": {"packing": True, "compile": True},
}
#: Part of a card's name -> dense bf16 products, in 10¹² operations a second, by its data sheet.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
PEAKS |= {"A10G": 70, "A10": 125, "L4": 121, "RTX 3090": 71}


class Cuda:
    """The first CUDA device, and how it is measured."""

    counts, shapes = False, ("0.1b", "1.2b", "7b")
    size = 8192  # of the matrices whose product is timed

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.name, self.memory = torch.cuda.get_device_name(0), torch.cuda.mem_get_info(0)[1]
        known = (peak * 1e12 for card, peak in PEAKS.items() if card in self.name)
        self.peak_rate: Optional[float] = next(known, None)

    def running(self) -> AbstractContextManager[Any]:
        """What a case runs in."""
        return nullcontext()

    def trainer(self, **options: Any) -> L.Trainer:
        return L.Trainer(accelerator="gpu", devices=1, **options)

    def model(self, shape: str, attention: Optional[str]) -> Any:
        with self.device:
            return random_llama(shape, attention)

    def begin(self) -> None:
        """Forget the last case's peak."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def bytes(self) -> dict[str, int]:
        """Peaks since :meth:`begin`."""
        found = {"peak_bytes": torch.cuda.max_memory_allocated() - self.before}
        return found | {"reserved_bytes": torch.cuda.max_memory_reserved()}

    def clock(self) -> float:
        """Seconds, once all that is queued is done."""
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Line -> how often it waits for the device inside the context."""
        lines: Counter[str] = Counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield lines
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                lines[f"{Path(warning.filename).name}:{warning.lineno}"] += 1

    @contextmanager
    def launches(self) -> Iterator[Counter[str]]:
        """Kind -> launches inside the context."""
        kinds: Counter[str] = Counter()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            yield kinds
        for event in profiler.key_averages():
            if event.key.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")):
                kinds[event.key] += event.count

    def products(self) -> float:
        """Operations a second of large bf16 matrix products."""
        options = {"dtype": torch.bfloat16, "device": self.device}
        left, right = (torch.randn(self.size, self.size, **options) for _ in "ab")
        left @ right
        started = self.clock()
        for _ in range(10):
            left @ right
        return 10 * 2 * self.size**3 / (self.clock() - started)


class Counting:
    """The counting device of the tests: it counts what a GPU would do, and has no times."""

    counts, shapes = True, ("tiny", "blocks")
    name, memory, peak_rate = "counting device (no GPU: counts, no times)", float("inf"), None

    def __init__(self) -> None:
        sys.path.append(str(ROOT / "tests"))
        import device  # registers it

        self.of_tests, self.device = device, device.DEVICE

    def running(self) -> AbstractContextManager[Any]:
        return self.of_tests.counting()

    def trainer(self, **options: Any) -> L.Trainer:
        return self.of_tests.trainer(**options)

    def model(self, shape: str, attention: Optional[str]) -> Any:
        return self.of_tests.on_device(random_llama(shape, attention))

    def begin(self) -> None:
        gc.collect()
        self.of_tests.COUNTS.reset()
        self.before = self.of_tests.COUNTS.bytes

    def bytes(self) -> dict[str, int]:
        return {"peak_bytes": self.of_tests.COUNTS.peak - self.before}

    def clock(self) -> float:
        return float("nan")

    @contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        before, lines = self.of_tests.COUNTS.waits.copy(), Counter[str]()
        yield lines
        lines.update(self.of_tests.COUNTS.waits - before)

    @contextmanager
    def launches(self) -> Iterator[Counter[str]]:
        before, kinds = self.of_tests.COUNTS.launches.copy(), Counter[str]()
        yield kinds
        kinds.update(self.of_tests.COUNTS.launches - before)

    def products(self) -> float:
        return float("nan")


class Meter(L.Callback):
    """Measures a run: from the end of the last step that warms up to the end of the run."""

    def __init__(self, probe: Cuda | Counting, steps: int) -> None:
        self.probe, self.last, self.open = probe, WARM_UP + steps, ExitStack()
        self.timed: list[Any] = []  # batches, counted when nothing is timed any more

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        """Keep the batches that are timed."""
        if WARM_UP <= number < self.last:
            self.timed.append(batch)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Go on to the next phase."""
        done = trainer.fit_loop.total_batch_idx + 1
        if done == WARM_UP:
            self.started = self.probe.clock()
        if done >= self.last:
            self.open.close()
        if done == self.last:
            self.seconds = self.probe.clock() - self.started
            self.waits = self.open.enter_context(self.probe.waits())
        if done == self.last + 1:
            self.launches = self.open.enter_context(self.probe.launches())

    def count(self, column: str, what: Any) -> int:
        """Entries of a column of the timed batches of which something is true."""
        columns = (stream[column] for batch in self.timed for stream in batch.values())
        return sum(int(what(values).sum()) for values in columns)


def rows_of(count: int, longest: int, stream: str) -> list[dict[str, str]]:
    """Rows of which the shortest have a quarter of the longest's tokens; a word is about a token."""
    draw = random.Random(stream)
    most = max(4, longest - 12)  # beside the chat template
    rows = []
    for number in range(count):
        words = [f"word{draw.randrange(200)}" for _ in range(draw.randint(most // 4, most) - 3)]
        rows.append({"question": f"{stream} {number} ?", "answer": " ".join(words)})
    return rows


def tiled_mask(shapes: Mapping[str, Sequence[int]]) -> WeightMask:
    """A mask of about :data:`DENSITY`, whose bits repeat: those of 7 billion weights are there at once."""
    bits = pack_bits(torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) < DENSITY)
    packed = {}
    for name, shape in shapes.items():
        size = prod(shape)
        packed[name] = bits.repeat(-(-size // (8 * len(bits))))[: (size + 7) // 8].clone()
        if size % 8:
            packed[name][-1] &= (1 << size % 8) - 1
    return WeightMask(packed, shapes)


def planned(shape: str, case: Mapping[str, Any], folder: str) -> float:
    """Bytes that ``wagle plan`` predicts, without what a CUDA context takes."""
    batch_size, longest, checkpointing = BATCHES[shape]
    run = planning.PlannedRun(
        "attribution" if "sums" in case else "unlearning",
        density=case.get("density", DENSITY),
        sums=case.get("sums", "device"),
        batch_size=batch_size,
        max_length=longest,
        gradient_checkpointing=checkpointing,
    )
    return planning.peak(planning.architecture(folder), run)[1] - planning.GPU_OVERHEAD


def run_case(
    probe: Cuda | Counting, shape: str, case: Mapping[str, Any], folder: str, steps: int
) -> dict[str, Any]:
    """Run a case; the row of the report."""
    probe.begin()
    batch_size, longest, checkpointing = BATCHES[shape]
    lm = probe.model(shape, case.get("attention"))
    lm.config.name_or_path = folder
    shapes = parameter_shapes(lm)
    count = WARM_UP + steps + COUNTED
    forget, retain = (rows_of(batch_size * count, longest, name) for name in ("forget", "retain"))
    data = ForgetRetainDataModule(forget, retain, batch_size=batch_size, max_length=longest)
    if "sums" in case:
        module: Any = AttributionModule(
            lm, density=DENSITY, gamma=1.0, sums=case["sums"],
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
    else:
        module = UnlearnModule(
            lm,
            objective="GradDiff",
            mask=None if case.get("density") == 1.0 else tiled_mask(shapes),
            packing=case.get("packing", False),
            compile=case.get("compile", False),
            gradient_checkpointing=checkpointing,
            lr=1e-5,
        )
    meter = Meter(probe, steps)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = {"precision": "bf16-true", "callbacks": [meter], **dict.fromkeys(off, False)}
    probe.trainer(max_epochs=1, **options).fit(module, data)
    tokens, answers = (
        meter.count("attention_mask", lambda values: values),
        meter.count("labels", lambda labels: labels != -100),
    )
    head = shapes.get("lm_head.weight", shapes["model.embed_tokens.weight"])
    of_blocks = sum(prod(s) for name, s in shapes.items() if len(s) == 2 and "layers" in name)
    return {
        "weights": sum(map(prod, shapes.values())),
        "tokens_per_step": tokens / steps,
        "step_seconds": meter.seconds / steps,
        "tokens_per_second": tokens / meter.seconds,
        "operations_per_second": 6 * (of_blocks * tokens + prod(head) * answers) / meter.seconds,
        "waits": dict(meter.waits),
        "launches": meter.launches.total(),
        "planned_bytes": planned(shape, case, folder),
        **probe.bytes(),
    }


def unavailable(probe: Cuda | Counting, shape: str, case: Mapping[str, Any], folder: str) -> str:
    """Why a case cannot run here; empty if it can."""
    if probe.counts and ("compile" in case or "attention" in case):
        return "needs a CUDA device"
    if "attention" in case:
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            return "flash_attn is not installed"
    size = planned(shape, case, folder) + planning.GPU_OVERHEAD
    if size > planning.USABLE * probe.memory:
        return f"planned {size / 2**30:.0f} GiB of {probe.memory / 2**30:.0f}"
    return ""


def table(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    rows = []
    for row in report["rows"]:
        names = [row["shape"], row["case"]]
        if "left_out" in row:
            rows.append([*names, row["left_out"], *[""] * 6])
            continue
        numbers = [""] * 3
        if not report["counted"]:
            rate = row["operations_per_second"]
            shares = (
                rate / peak if peak else None for peak in (report["peak"], report["products"])
            )
            numbers = [f"{row['tokens_per_second']:,.0f}"]
            numbers += ["" if share is None else f"{share:.2f}" for share in shares]
        numbers += [f"{row['peak_bytes'] / 2**20:,.1f}"]
        numbers += [f"{row['planned_bytes'] / row['peak_bytes']:.3f}"]
        rows.append([*names, *numbers, str(sum(row["waits"].values())), f"{row['launches']:,}"])
    header = ["shape", "case", "tokens/s", "of the peak", "of products", "MiB", "plan / MiB"]
    return markdown_table([*header, "waits a step", "launches a step"], rows, left=(0, 1))


def main(
    arguments: Optional[Sequence[str]] = None, probe: Optional[Cuda | Counting] = None
) -> None:
    """Run the cases and print the table."""
    probe = probe or (Cuda() if torch.cuda.is_available() else Counting())
    parser = argparse.ArgumentParser(prog="bin/bench device", description=__doc__)
    add = parser.add_argument
    add("--shapes", default=",".join(probe.shapes), help=f"of {', '.join(BATCHES)}")
    add("--cases", default=",".join(CASES), help="default: all")
    add("--steps", type=int, default=2 if probe.counts else 10, help="that are timed")
    add("--minutes", type=float, default=10.0, help="after which no more cases begin")
    add("--output", default="bench-device.json", help="JSON file to write")
    options = parser.parse_args(arguments)
    shapes, cases = options.shapes.split(","), options.cases.split(",")
    for name, known in [*((s, BATCHES) for s in shapes), *((c, CASES) for c in cases)]:
        if name not in known:
            parser.error(f"no {name!r}; there are {', '.join(known)}")
    cli.quiet()
    prepare_libraries()
    for library in ("lightning.pytorch", "lightning.fabric", "wagle_pl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    end = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {
        "device": probe.name,
        "counted": probe.counts,
        "precision": "bf16-true",
    }
    report |= {"peak": probe.peak_rate, "products": probe.products(), "density": DENSITY}
    report |= {"versions": versions(), "machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory(prefix="wagle-device-") as scratch:
        for case in cases:
            for shape in shapes:
                row = {"shape": shape, "case": case}
                folder = f"{scratch}/{shape}"
                write_folder(folder, shape)
                if time.monotonic() > end:
                    row["left_out"] = "no time left"
                elif reason := unavailable(probe, shape, CASES[case], folder):
                    row["left_out"] = reason
                else:
                    row |= attempt(probe, shape, CASES[case], folder, options.steps)
                report["rows"].append(row)
                print(
                    table({**report, "rows": [row]}).splitlines()[-1], file=sys.stderr, flush=True
                )
                with atomic_path(Path(options.output)) as temporary:
                    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{probe.name}; torch {torch.__version__}, bf16-true, density {DENSITY:g}\n")
    print(table(report))


def write_folder(folder: str, shape: str) -> None:
    """A shape's configuration and a tokenizer, of which each word of the rows is a token."""
    if Path(folder).exists():
        return
    texts = [row["answer"] for row in rows_of(200, 64, "forget")]
    create_tiny_llama(folder, texts, vocab_size=2048)
    with torch.device("meta"):
        random_llama(shape).config.save_pretrained(folder)


def attempt(*case: Any) -> dict[str, Any]:
    """A case's row; if it fails, why: the others are still wanted."""
    try:
        with case[0].running():
            return run_case(*case)
    except Exception as error:
        return {"left_out": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}


if __name__ == "__main__":
    main()
