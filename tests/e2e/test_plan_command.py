"""``wagle plan``: what it prints, its mistakes, and its sizes against those of runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import write_config

from wagle_pl.attribution.hessian import estimator_of
from wagle_pl.cli import app as cli
from wagle_pl.lab import planning
from wagle_pl.lab.planning import PlannedRun, architecture, disk_bytes


@pytest.mark.parametrize("hessian", ["scalar", "auto", "gauss_newton", "fisher", "hutchinson"])
def test_sums_are_what_attribution_keeps(wagle, tiny_model, hessian):
    option = "--model.gamma 1" if hessian == "scalar" else f"--model.hessian {hessian}"
    done = wagle(
        f"fit --model AttributionModule --model.model {tiny_model} --model.output mask {option}",
        "--trainer.max_epochs 1 --trainer.enable_checkpointing false",
    )
    sums = done.model.sums
    kept = sum(
        t.nbytes
        for where in (sums.sums, sums.step_sums)
        for tensors in where.values()
        for t in tensors
    )
    shape = architecture(tiny_model)
    diagonal = hessian not in ("scalar", "auto")
    run = PlannedRun("attribution", estimator=estimator_of(hessian), diagonal=diagonal)
    assert kept == planning.sums_per_weight(run) * shape.weights
    size = Path("mask.safetensors").stat().st_size
    assert size == pytest.approx(disk_bytes(shape, run)["mask"], abs=9000)  # header


def test_the_checkpoint_of_a_run_is_as_large_as_planned(wagle, tiny_model):
    done = wagle(
        f"fit --model FinetuneModule --model.model {tiny_model} --model.output out --trainer.max_steps 2",
        "--optimizer MaskedAdamW --trainer.callbacks ModelCheckpoint",
    )
    shape = architecture(tiny_model)
    sizes = disk_bytes(shape, PlannedRun("finetuning", precision="32-true"))
    file = Path(done.trainer.checkpoint_callback.best_model_path)
    assert file.stat().st_size == pytest.approx(sizes["checkpoint"], rel=0.15)
    assert Path("out/model.safetensors").stat().st_size == pytest.approx(sizes["model"], rel=0.05)


def test_the_command_prints_a_plan(tiny_model, capsys):
    cli.main(["plan", "--model", tiny_model, "--strategy", "zero3", "--devices", "2"])
    printed = capsys.readouterr().out
    for word in ("mask bits", "optimiser state", "a GPU of 1 GiB", "CPU memory"):
        assert word in printed
    total = re.search(r"^total +(.*)$", printed, re.MULTILINE)[1].split()
    assert max(map(float, total)) == float(re.search(r"^peak +(\S+) GiB", printed, re.MULTILINE)[1])


@pytest.mark.parametrize("task", ["attribution", "unlearning", "finetuning", "test"])
def test_every_task_has_a_plan(tiny_model, capsys, task):
    cpu = ["--accelerator", "cpu", "--precision", "32-true"]
    cli.main(["plan", "--model", tiny_model, "--task", task, *cpu])
    assert "interpreter and libraries" in capsys.readouterr().out


MISTAKES = {
    "--model ./nowhere": "model folder ./nowhere does not exist",
    "--strategy zero4": "strategy: must be auto, ddp, ",
    "--devices 0": "devices: must be at least 1, got 0",
    f"--devices 1{'0' * 40}": "devices: must be an integer, got an integer of more than 64 bits",
    "--batch_size -1": "batch_size: must be at least 1, got -1",
    "--max_length 0": "max_length: must be at least 1, got 0",
    "--sums nosuch": "sums: must be device, host or passes=K, got 'nosuch'",
    "--task learning": "task: must be attribution, unlearning, finetuning or test; got learning",
    "--density 1.5": "must be in (0, 1]",
    "--task attribution --precision 16-mixed": "not in fp16",
    "--task attribution --hessian hutchinson --strategy zero3": "needs whole parameters",
    "--task attribution --sums passes=999": "sums: 999 passes are more",
    "--task attribution --sums disk": "sums: must be device, host or passes=K",
    "--objective UNDIAL --strategy zero3": "objective: does not work under ZeRO-3",
    "--objective RMU": r"objective: trains '\\.(?:layers|h|blocks)\\.(?:5|6|7)\\.",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_are_told_in_one_line(fails, tiny_model, options):
    model = "" if "--model" in options else f"--model {tiny_model}"
    assert MISTAKES[options] in fails(f"plan {model} {options}")


def test_a_model_without_known_shapes(fails, tmp_path):
    other = write_config(tmp_path / "clip", {"model_type": "clip"})
    assert "no causal language model with known shapes" in fails("plan", "--model", other)
    unknown = write_config(tmp_path / "unknown", {"model_type": "nonesuch"})
    assert "cannot be loaded" in fails("plan", "--model", unknown)
