"""``bin/bench``: its rows run, on a tiny model; their numbers mean nothing here."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import device as counting  # noqa: F401  registered before the first backward pass of this process
import lightning as L
import pytest
import torch

from wagle_pl.cli import app as cli

sys.path.append(str(Path(__file__).parents[2] / "bin" / "benchmarks"))
import accelerator
import common

#: Benchmark -> the rows that start no processes of their own.
ROWS = {
    "unlearning": (
        "masked_step",
        "precisions",
        "npo_step",
        "optimizer_state",
        "padded",
        "training",
    ),
    "attribution": ("gradient_pass", "whole", "units", "mask_file"),
    "evaluation": ("likelihoods", "equal"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> common.Settings:
    """What ``bin/bench --quick`` gives its rows, when their time is over."""
    options = Namespace(tofu=None, model="", repeats=3, shape="tiny", quick=True, full=False)
    made = common.prepare(options, str(tmp_path_factory.mktemp("bench")))
    made.deadline = time.monotonic()
    return made


@pytest.mark.parametrize(
    ("benchmark", "row"), [(name, row) for name, rows in ROWS.items() for row in rows]
)
def test_a_row(
    bench: common.Settings, benchmark: str, row: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])  # a row reads an option of its own
    measure = importlib.import_module(benchmark).ROWS[row]
    results = common.run_row(row, measure, bench)
    assert results and all(math.isfinite(line["value"]) for line in results), capsys.readouterr()
    said = capsys.readouterr().err
    assert all(line["name"] in said for line in results) and "not sharded" not in said


def test_sides_are_repeated_while_there_is_time(bench: common.Settings) -> None:
    assert len(common.alternate(bench, {"a": lambda: 1, "b": lambda: 2})["b"]) == 1
    bench.deadline = time.monotonic() + 60
    assert len(common.alternate(bench, {"a": lambda: 1})["a"]) == 3


def test_a_row_without_a_result_in_time_is_left_out(bench: common.Settings, capsys: Any) -> None:
    def endless(settings: common.Settings) -> list[Any]:
        while True:
            time.sleep(0.01)

    for name, left in (("slow", 0.1), ("late", 0.0)):
        bench.end = time.monotonic() + left
        (row,) = common.run_row(name, endless, bench)
        assert row["left_out"] and f"{name:34} left out" in capsys.readouterr().err
    bench.end = math.inf


# -- bin/bench device ------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark silences loggers for the rest of its process."""
    cli.quiet()
    for library in ("lightning.pytorch", "lightning.fabric", "wagle_pl"):
        monkeypatch.setattr(logging.getLogger(library), "setLevel", lambda level: None)


@pytest.fixture
def device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``bin/bench device``; returns its rows by case, and the table."""

    def run(*arguments: str, probe: Any = None) -> tuple[dict[str, Any], str]:
        file = tmp_path / "bench.json"
        accelerator.main(["--shapes", "tiny", "--output", str(file), *arguments], probe)
        rows = json.loads(file.read_text())["rows"]
        return {row["case"]: row for row in rows}, capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.xdist_group("device")
def test_counted(device: Any) -> None:
    """Without a GPU: waits, launches and bytes, no times."""
    rows, table = device("--steps", "1")
    for case in ("dense", "mask", "packed", "attribution", "host"):
        assert "left_out" not in rows[case], rows[case]
        assert 1000 < rows[case]["launches"] < 4000 and rows[case]["peak_bytes"] > 1e6, rows[case]
        waits = sum(rows[case]["waits"].values())
        assert waits <= {"packed": 2, "host": 80}.get(
            case, 0
        )  # on a GPU, copies to the host overlap
    assert rows["dense"]["launches"] < rows["mask"]["launches"]
    assert rows["host"]["peak_bytes"] < rows["attribution"]["peak_bytes"]
    for case in ("flash", "compiled"):
        assert rows[case]["left_out"] == "needs a CUDA device"
    assert "no GPU: counts, no times" in table and table.count("| tiny |") == len(accelerator.CASES)


class Pretended(accelerator.Cuda):
    """Takes the CPU for a card."""

    size = 64

    def __init__(self) -> None:
        self.device, self.name, self.memory = torch.device("cpu"), "a card", 1 << 40
        self.peak_rate = 1e12

    def trainer(self, **options: Any) -> L.Trainer:
        return L.Trainer(accelerator="cpu", devices=1, **options)


def test_measured(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU: what is measured is put together, whatever the numbers are."""

    def debug(mode: str) -> None:
        if mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: len(name) << 20)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", debug)
    rows, table = device("--cases", "packed", probe=Pretended())
    row = rows["packed"]
    assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(row["tokens_per_step"])
    assert row["peak_bytes"] == 4 << 20 and list(row["waits"].values()) == [1]
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")]
    assert float(cells[3].replace(",", "")) > 0 and float(cells[4]) <= float(cells[5]) < 1.5
    rows, _ = device("--cases", "mask,dense", "--minutes", "0", probe=Pretended())
    assert {row["left_out"] for row in rows.values()} == {"no time left"}


def test_a_case_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    folder, probe = str(tmp_path / "7b"), Pretended()
    accelerator.write_folder(folder, "7b")
    probe.memory = 24 << 30
    assert accelerator.unavailable(probe, "7b", {"density": 1.0}, folder).endswith("GiB of 24")
    assert not accelerator.unavailable(probe, "7b", {"sums": "host"}, folder)
