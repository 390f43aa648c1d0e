"""``bin/bench``: its rows run, on a tiny model; their numbers mean nothing here."""

from __future__ import annotations

import importlib
import math
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bin" / "benchmarks"))
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
    "attribution": ("gradient_pass", "whole", "mask_file"),
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
