"""What a user types and gets wrong: options in any order, one line that says what to type, and no noise."""

import json
import os
import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from forked import command, start
from helpers import data_options, environment, fit_arguments
from lightning.pytorch.callbacks import Callback

from wagle_pl.cli import app as cli
from wagle_pl.core.errors import WagleError

MODULE = "fit --trainer.enable_checkpointing false --trainer.max_epochs 1 --model"
UNLEARN, ATTRIBUTE, FINETUNE, TEST = (
    f"{MODULE} {kind}Module" for kind in ("Unlearn", "Attribution", "Finetune", "Evaluation")
)


# -- options ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    UNLEARN: {
        "--model.densty 1": "model.densty: ",
        "--model.density 1": "model.density: ",
        "--model.max_epochs 1": "model.max_epochs: .* --trainer.max_epochs",
        "--data.batchsize 1": "data.batchsize: .* batch_size",
        "--data.path x": "data.path: ",
        "--optimizer.lrr 1": "optimizer.lrr: .* lr",
        "--model.objective.gamma 1": "model.objective.gamma: .* --model.objective CLASS",
        "--model.objective GradDiff --model.objective.gamma 1": "model.objective.gamma: ",
        "--optimizer adamw": "optimizer: .*AdamW",
        "--trainer.logger CSVLoger": "trainer.logger: .*CSVLogger",
        "--trainer.logger CometLogger": "comet-ml",
        "--model.objective NPOX": "objective: .*: did you mean NPO",
        "--model.objective npox": "objective: .*: did you mean NPO",
        "--data TOFU": "data: .*TOFUDataModule",
        "--data json.JSONDecoder": "data: ",
        "--data nowhere.Rows": "data: .*nowhere",
        "--model.modules 5": "model.modules: ",
        "--trainer.max_epochs x": "trainer.max_epochs: ",
        "--trainer.precision x": "trainer.precision: .*bf16-mixed",
        "--trainer.callbacks EarlyStopping": "trainer.callbacks.monitor",
        "--trainer.strategy.stage 2": "trainer.strategy.stage: .* --trainer.strategy",
        "--trainer.max_epoch 2": "--trainer.max_epoch: .* --trainer.max_epochs",
        "--confg x": "--confg: .* --config",
        "--trainer.accumulate_grad_batches 0": "trainer.accumulate_grad_batches: ",
        "--seed_everything -5": "seed_everything: ",
        "--model.lr 0": "model.lr: must be above 0, got 0",
        "--optimizer SGD --optimizer.momentum .nan": "optimizer.momentum: ",
        "--model.objective json.JSONDecoder": "objective: ",
        "--model.mask nowhere.safetensors": "mask file nowhere.safetensors",
        "--data.forget nowhere.jsonl": "nowhere.jsonl",
        "--data.batch_size 0": "data.batch_size: ",
        "--data.retain null": "--data.retain",
        "--data.val [forget,kept]": "data.val: .*'kept'",
        "--trainer.overfit_batches 2": "trainer.overfit_batches: ",
        "--trainer.limit_train_batches 1.5": "trainer: .*limit_train_batches",
        "--ckpt_path=": "ckpt_path: no checkpoint is the best",
        "--ckpt_path hpc": "ckpt_path: no job of a cluster has left a checkpoint",
        "--ckpt_path registry:x": "ckpt_path: a registry of models needs the package litmodels",
        "--lr_scheduler OneCycleLR --lr_scheduler.max_lr 1": "lr_scheduler: You must define",
        "--lr_scheduler StepLR --lr_scheduler.step_size 0": "lr_scheduler: StepLR fails at step 1: ",
        "--lr_scheduler ExponentialLR --lr_scheduler.gamma -1 --trainer.max_epochs 2": "becomes -1e-05",
        "--lr_scheduler ConstantLR --lr_scheduler.factor 0": "the learning rate is 0 in 1 steps",
        "--optimizer.lr 0": "optimizer.lr: must be above 0, or no weight would move, got 0",
        "--data.batch_size null": "data.batch_size: must be an integer, got None",
        "--data.max_length null": "data.max_length: must be an integer, got None",
        "--data.test_batch_size null": "data.test_batch_size: must be an integer, got None",
        "--data.seed -1": "data.seed: must be 0 or more, got -1",
        "--trainer.max_steps 1000000000000000000": "trainer.max_steps: must be at most 1,000,000,000",
        "--trainer.max_epochs 10000000000": "trainer.max_epochs: must be at most",
        "--trainer.num_nodes 99": "trainer.num_nodes: MASTER_ADDR names no first machine",
        "--trainer.val_check_interval 0": "trainer.val_check_interval: must be above 0",
        "--trainer.check_val_every_n_epoch 0": "trainer.check_val_every_n_epoch: must be above 0",
        "--trainer.devices 1000": "trainer.devices: must be at most",
        "--trainer.strategy ddp_spawn": "trainer.strategy: a command cannot be spawned",
        "--trainer.default_root_dir /proc/x": "trainer.default_root_dir .*cannot be written",
        f"--trainer.max_steps {'9' * 5000}": "max_steps",
    },
    ATTRIBUTE: {
        "--model.save_scores true": "model.save_scores: must be bf16, fp32 or null; got True",
        "--model.densty 1": "model.densty: .* density",
        "--model.pool [mean,max]": r"model.pool: must be .* norm; got \['mean', 'max'\]",
        "--model.masks [{'units':'head'}]": "model.masks.units: .* did you mean unit",
        "--model.lr 1": "model.lr: ",
        "--model.density 20%": "model.density: must be float; got 20%",
        "--model.density 1.5": "density: ",
        "--model.density 0": "density: ",
        "--model.gamma -1": "gamma: ",
        "--model.score wagel": "score: .*Wagle",
        "--trainer.strategy zero9": "trainer: .*zero9",
    },
    FINETUNE: {
        "--trainer.max_epochs 0.5": "trainer.max_epochs: ",
        "--trainer.max_epochs -1": "--trainer.max_epochs",
        "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor x": "trainer.callbacks.monitor: .*`x`",
    },
    "fit": {
        "--config nowhere.yaml": "config file nowhere.yaml",
        "--model.lr 1": "model.lr: .* --model CLASS",
        "--model UnlearnModul": "model: .*UnlearnModule",
    },
    TEST: {
        "--model.robustness relearnn": "model.robustness: .*Relearn",
    },
    "validate": {
        "--model EvaluationModule": "data.val",
    },
}


@pytest.mark.parametrize(
    ("command", "args"), [(command, args) for command, found in MISTAKES.items() for args in found]
)
def test_one_line_says_what_to_type(fails, tiny_model, tmp_path, command, args):
    model = f"--model.model {tiny_model} --model.output out" if command != "fit" else ""
    line = fails(f"{command} {args} {model}")
    assert re.search(MISTAKES[command][args], line) and len(line) < 450
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


IN_A_LIST = {
    "[{class_path: Quantise, init_args: {bit: 4}}]": "model.robustness.bit: .*bits",
    "[{class_path: Quantis}]": "model.robustness: .*Quantise",
}


@pytest.mark.parametrize(("attacks", "message"), IN_A_LIST.items())
def test_one_line_says_what_to_type_in_a_list(fails, tiny_model, attacks, message):
    line = fails(TEST, f"--model.model {tiny_model} --model.robustness", attacks)
    assert re.search(message, line)


FILES = {
    "": "c.yaml is empty",
    "# base: x\n": "c.yaml is empty",
    "trainer: {max_epoch: 3}": "trainer.max_epoch: .*--trainer.max_epochs",
    "modle: {class_path: UnlearnModule}": "modle.class_path: .*--model",
    "model: {class_path: UnlearnModule, init_arg: {}}": "model: .*init_args",
    "model: {class_path: UnlearnModule}": "--model.model",
    "trainer: {max_epochs: 1}": "--data and --model",
    "base: 5": "base .* got 5",
    "base: [5]": "base .* got \\[5\\]",
    "base: {a: b.yaml}": "base ",
    "model: Zoë": "c.yaml is not UTF-8 text",
}


@pytest.mark.parametrize(("content", "message"), FILES.items())
def test_what_is_wrong_in_a_file(fails, tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content, encoding="latin-1")
    assert re.search(message, fails(f"fit --config {tmp_path}/c.yaml", data=False))


OTHER_COMMANDS = {
    "mask inf": "there is no command 'inf'; did you mean info?",
    "mask random --dens 0.2": "--dens: ",
    "patch apply": "BASE and PATCH",
    "patch apply p.wagle model -o x": "patch file model is a folder",
}


@pytest.mark.parametrize(("args", "message"), OTHER_COMMANDS.items())
def test_what_is_wrong_in_another_command(fails, tmp_path, args, message):
    (tmp_path / "model").mkdir()
    assert message in fails(args)


def test_a_class_may_come_after_its_options(wagle, tiny_model, rows):
    done = wagle(
        "fit --data.batch_size 4",
        *data_options(rows),
        f"--model.objective.beta 0.3 --model.lr=1e-4 --model.model {tiny_model} --model.objective NPO",
        "--model.output out --trainer.fast_dev_run true --optimizer.lr 0.5 --model=UnlearnModule --optimizer SGD",
        data=False,
    )
    assert done.datamodule.batch_size == 4 and done.model.objective.beta == 0.3
    lr = done.trainer.optimizers[0].defaults["lr"]
    assert lr == 1e-4  # the module's goes before the optimiser's


@pytest.mark.parametrize(
    ("given", "config", "name", "lr"),
    [
        ("--optimizer.lr 0.25", None, "MaskedAdamW", 0.25),
        ("--optimizer.lr 0.25", "AdamW", "AdamW", 0.25),
        ("--model.lr 0.25", None, "MaskedAdamW", 0.25),
        ("--model.lr 0.25", "AdamW", "AdamW", 0.25),
        ("", "AdamW", "AdamW", 0.5),
        ("", None, "MaskedAdamW", 1e-5),
    ],
)
def test_the_learning_rate_alone(wagle, tiny_model, tmp_path, given, config, name, lr):
    content = {"trainer": {"fast_dev_run": True}}
    if config:
        content["optimizer"] = {"class_path": config, "init_args": {"lr": 0.5}}
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    model = f"--model.model {tiny_model} --model.output out --model.warmup 0"
    (optimizer,) = wagle(f"{UNLEARN} {model} --config c.yaml {given}").trainer.optimizers
    assert type(optimizer).__name__ == name and optimizer.defaults["lr"] == lr
    default = 0.01 if name == "AdamW" else 0  # the class's own
    assert optimizer.defaults["weight_decay"] == default


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_module(wagle, fails, tiny_model, tmp_path):
    model = f"--trainer.max_epochs 1 --model.model {tiny_model} --trainer.callbacks ModelCheckpoint"
    kinds = ("Unlearn", "Attribution", "Finetune")
    for kind in kinds:
        where = f"--model.output {kind} --trainer.default_root_dir {kind}-root"
        wagle(f"fit --model {kind}Module {model} {where}")
    files = {path.parts[-3][:-5]: path for path in tmp_path.glob("*-root/checkpoints/*.ckpt")}
    assert set(files) == set(kinds)
    for kind, other in permutations(kinds, 2):
        again = f"fit --model {kind}Module {model} --model.output again --ckpt_path"
        line = fails(again, files[other])
        assert f"is of a run of {other}Module, and this run is one of {kind}Module" in line
    test = f"test --model EvaluationModule --model.model {tiny_model} --model.output test"
    line = fails(test, f"--ckpt_path {files['Attribution']}")
    assert "does not hold the weights of this model" in line
    assert not (tmp_path / "again").exists() and not (tmp_path / "again.safetensors").exists()


# -- the user's own code ----------------------------------------------------------------------------------------------


class Fails(Callback):
    """A user's own, with a mistake in it."""

    def on_train_start(self, trainer, module):
        raise RuntimeError("of my own")


class Opens(Callback):
    """A user's own that reads a file."""

    def on_train_start(self, trainer, module):
        Path("mine.txt").read_text()


class Refuses(Callback):
    """A user's own that means to say it in one line."""

    def on_train_start(self, trainer, module):
        raise WagleError("of my own")


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        ("Fails", RuntimeError),
        ("Opens", FileNotFoundError),
    ],
)
def test_an_error_in_own_code_keeps_its_traceback(wagle, tiny_model, monkeypatch, callback, error):
    monkeypatch.setattr(cli, "run", lambda arguments, _: wagle(*arguments))
    own = f"--model.model {tiny_model} --model.output out --trainer.callbacks {__name__}.{callback}"
    with pytest.raises(error):
        cli.main(f"{UNLEARN} {own}".split())


def test_own_code_may_say_it_in_one_line(fails, tiny_model):
    own = f"--model.model {tiny_model} --model.output out --trainer.callbacks {__name__}.Refuses"
    assert fails(UNLEARN, own) == "wagle: error: of my own"


# -- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "unbuffered"), [("--help", ""), ("--help", "1"), ("bogus", ""), ("mask --help", "1")]
)
def test_a_reader_that_goes_away(args, unbuffered):
    """Its pipe is closed before anything is written."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as closed:
        ended = subprocess.run(
            [sys.executable, "-m", "wagle_pl", *args.split()],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=600,
            env={**environment(), "PYTHONUNBUFFERED": unbuffered},
        )
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
    # argparse lets its help go unread
    assert ended.returncode in ((2,) if args == "bogus" else (0, 141))


def unread(*args: str) -> None:
    """A command whose output nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    os.dup2(writes, 1)
    command(*args)


def test_a_reader_of_a_configuration_that_goes_away(tmp_path):
    ended = start(unread, "fit", "--print_config", output=tmp_path / "said")
    ended.join(timeout=600)
    assert ended.exitcode in (0, 141) and "Traceback" not in (tmp_path / "said").read_text()


def test_nothing_of_lightnings_before_ours(tiny_model, rows, tmp_path):
    """A process of its own, without DeepSpeed: Lightning writes to the standard error that it finds when it is
    imported. A trial run, and then a real one."""
    args = [*fit_arguments("AttributionModule", tiny_model, rows), "--trainer.devices", "1"]
    code = f"""
import sys
sys.modules["deepspeed"] = None
from wagle_pl.cli.app import main
for trial in ("true", "false"):
    main([*{args}, "--trainer.fast_dev_run", trial])
"""
    run, where = [sys.executable, "-c", code], {"cwd": tmp_path, "env": environment()}
    ended = subprocess.run(run, capture_output=True, text=True, timeout=600, **where)
    assert ended.returncode == 0 and not ended.stdout
    last, *lines = ended.stderr.splitlines()
    assert last == "wagle: fast_dev_run: this was a trial, and nothing is written"
    assert all(line.startswith("wagle: ") for line in lines)
    assert lines[-1].startswith("wagle: mask written to")


def test_early_stopping_says_why(wagle, heard, tiny_model):
    wagle(
        f"{UNLEARN} --trainer.max_epochs 9 --model.model {tiny_model} --model.output out",
        "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor train/loss",
        "--trainer.callbacks.patience 0 --trainer.callbacks.mode max",
    )
    said = "stopped early, after step 4: Monitored metric train/loss did not improve"
    assert any(said in message for message in heard.messages)


@pytest.mark.parametrize(
    "args", [f"{UNLEARN} --trainer.max_steps 0", f"{ATTRIBUTE} --trainer.limit_train_batches 0"]
)
def test_nothing_to_do_is_said(fails, tiny_model, args):
    line = fails(args, f"--model.model {tiny_model} --model.output out")
    assert "nothing was trained, so nothing is written" in line and not Path("out").exists()


def test_own_rows_have_a_configuration_that_leaves_nothing_undefined(
    wagle, tiny_model, rows, capsys
):
    data = f"--data.forget {rows['forget']} --data.retain {rows['retain']} --trainer.callbacks null"
    given = f"{data} --trainer.accelerator cpu --trainer.enable_progress_bar false"
    options = f"--model.model {tiny_model} {given}"
    wagle("fit --config own/data --config task/attribute", options, data=False)
    unlearn = "fit --config own/data --config task/unlearn --config method/npo"
    wagle(unlearn, options, "--trainer.max_epochs 1", data=False)
    capsys.readouterr()
    test = f"test --config own/data --config task/test {given} --model.max_new_tokens 8"
    assert "forget/probability" in wagle(test, data=False).model.metrics
    lines = capsys.readouterr().out.splitlines()
    undefined = [line for line in lines if line.startswith("undefined")]
    assert all(
        line.endswith("generations are empty") for line in undefined
    )  # this model says nothing


def test_files_of_the_current_folder_shadow_no_library(tmp_path: Path) -> None:
    """Files that happen to be called like a library, installed or not, are not imported in its place; the user's own
    modules are found, and what these import."""
    libraries = ("yaml", "torch", "lightning", "datasets", "random", "jsonargparse")
    for name in (*libraries, "torch_xla", "torchvision", "wandb"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "triton").mkdir()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/base.py").write_text("from wagle_pl import Objective\n")
    mine = "from parts.base import Objective\n\nclass Mine(Objective):\n    'One of my own.'\n"
    (tmp_path / "mine.py").write_text(mine)
    options = "--model UnlearnModule --model.objective mine.Mine --model.model x --data ForgetRetainDataModule"
    command = [sys.executable, "-m", "wagle_pl", "fit", *options.split(), "--print_config"]
    found = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert "shadowed" not in found.stderr + found.stdout
    assert found.returncode == 0 and "mine.Mine" in found.stdout, found.stderr


HALF_SET = {
    "RANK": "abc",
    "LOCAL_RANK": "abc",
    "TORCHELASTIC_RUN_ID": "x",
    "SLURM_NTASKS": "1",
}


@pytest.mark.parametrize("name", HALF_SET)
def test_half_of_what_a_launcher_sets(fails, tiny_model, monkeypatch, name):
    monkeypatch.setenv(name, HALF_SET[name])
    monkeypatch.setenv("SLURM_JOB_NAME", "x")
    line = fails(f"{UNLEARN} --model.model {tiny_model} --model.output out --trainer.strategy ddp")
    assert "environment variable" in line and "unset" in line


@pytest.mark.parametrize("content", ["", "null", "hello"])
def test_what_is_in_a_mask_file_is_no_value_of_the_option(fails, tiny_model, content):
    Path("m.safetensors").write_text(content)
    line = fails(
        f"{UNLEARN} --model.model {tiny_model} --model.output out --model.mask m.safetensors"
    )
    assert "mask file m.safetensors is not a whole safetensors file" in line
