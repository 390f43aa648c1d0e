"""What a user types and gets wrong: options in any order, one line that says what to type, and no noise."""

import json
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from forked import command, start
from helpers import data_options, environment, fit_arguments
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping

from wagle_pl.cli import app as cli
from wagle_pl.core.errors import WagleError

MODULE = "fit --trainer.enable_checkpointing false --trainer.max_epochs 1 --model"
UNLEARN, ATTRIBUTE, FINETUNE, TEST = (
    f"{MODULE} {kind}Module" for kind in ("Unlearn", "Attribution", "Finetune", "Evaluation")
)


# -- options ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    UNLEARN: {
        "--model.densty 1": "UnlearnModule has no option 'densty' (option model.densty)",
        "--model.density 1": "(option model.density): AttributionModule has it",
        "--model.max_epochs 1": "(option model.max_epochs): did you mean --trainer.max_epochs?",
        "--data.batchsize 1": "(option data.batchsize): did you mean batch_size?",
        "--data.path x": "ForgetRetainDataModule has no option 'path' (option data.path): TOFUData",
        "--optimizer.lrr 1": "MaskedAdamW has no option 'lrr' (option optimizer.lrr): did you mean lr",
        "--model.objective.gamma 1": "there is no option model.objective.gamma yet: give --model.objective SimNPO",
        "--model.objective GradDiff --model.objective.gamma 1": "(option model.objective.gamma): SimNPO has it",
        "--optimizer adamw": "unknown class 'adamw' for optimizer: did you mean AdamW?",
        "--trainer.logger CSVLoger": "for trainer.logger: did you mean CSVLogger?",
        "--model.objective NPOX": "objective: unknown name 'NPOX'; choose one of AltPO, CEU, DPO",
        "--model.objective npox": "or a class path: did you mean NPO?",
        "--data TOFU": "unknown class 'TOFU' for data: choose one of CopyrightDataModule, ",
        "--data json.JSONDecoder": "json.JSONDecoder is no LightningDataModule (option data)",
        "--data nowhere.Rows": "class 'nowhere.Rows' of option data: No module named 'nowhere'",
        "--model.modules 5": "model.modules: must be a list or null, got 5",
        "--trainer.max_epochs x": "trainer.max_epochs: must be an integer or null, got x",
        "--trainer.precision x": "bf16-mixed, 32-true, 64-true, bf16 or null, got x",
        "--trainer.callbacks EarlyStopping": "EarlyStopping needs monitor: give --trainer.callb",
        "--trainer.strategy.stage 2": "trainer.strategy 'auto' is no class, so it has no option",
        "--trainer.max_epoch 2": "no option --trainer.max_epoch: did you mean --trainer.max_epochs?",
        "--confg x": "there is no option --confg: did you mean --config?",
        "--trainer.accumulate_grad_batches 0": "accumulate_grad_batches: must be at least 1, got 0",
        "--seed_everything -5": "seed_everything: must be in [0, 4294967295], got -5",
        "--model.lr -1": "model.lr: must be 0 or more, got -1",
        "--optimizer SGD --optimizer.momentum .nan": "optimizer.momentum: must be finite, got nan",
        "--model.objective json.JSONDecoder": "objective: unknown name 'json.JSONDecoder'",
        "--model.mask nowhere.safetensors": "mask file nowhere.safetensors does not exist",
        "--data.forget nowhere.jsonl": "nowhere.jsonl does not exist",
        "--data.batch_size 0": "data.batch_size",
        "--data.retain null": "this run needs retain rows: give --data.retain",
        "--data.val [forget,kept]": "data.val: there is no test set 'kept'; choose of forget, retain",
        "--trainer.overfit_batches 2": "give --data.limit_forget and --data.limit_retain",
        "--trainer.limit_train_batches 1.5": "trainer: You have passed invalid value 1.5 for limit_train",
    },
    ATTRIBUTE: {
        "--model.densty 1": "(option model.densty): did you mean density?",
        "--model.lr 1": "(option model.lr): FinetuneModule, UnlearnModule have it",
        "--model.density nan": "model.density: must be a number, got nan",
        "--model.densit 1": "AttributionModule has no option 'densit' (option model.densit): did",
        "--model.density 1.5": "density: the share of weights to select must be in (0, 1]",
        "--model.density 0": "must be in (0, 1], got 0",
        "--model.gamma -1": "gamma: must be above 0",
        "--model.score wagel": "score: unknown name 'wagel'; choose one of",
        "--trainer.strategy zero9": "trainer: You selected an invalid strategy name: `strategy='zero9'`",
    },
    FINETUNE: {
        "--trainer.max_epochs 0.5": "max_epochs",
        "--trainer.max_epochs -1": "the run's steps are not known beforehand",
        "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor x": "on metric `x` which is not available",
    },
    "fit": {
        "--config nowhere.yaml": "config file nowhere.yaml does not exist",
        "--model.lr 1": "no class is named for model, so there is no option model.lr yet: give --model ",
        "--model UnlearnModul": "unknown class 'UnlearnModul' for model: did you mean UnlearnModule?",
    },
    TEST: {
        "--model.robustness relearnn": "did you mean Relearn?",
    },
    "validate": {
        "--model EvaluationModule": "validate measures the test sets that data.val names",
    },
}


@pytest.mark.parametrize(
    ("command", "args"), [(command, args) for command, found in MISTAKES.items() for args in found]
)
def test_one_line_says_what_to_type(fails, tiny_model, tmp_path, command, args):
    model = f"--model.model {tiny_model} --model.output out" if command != "fit" else ""
    line = fails(f"{command} {args} {model}")
    assert MISTAKES[command][args] in line and len(line) < 450
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


IN_A_LIST = {
    "[{class_path: Quantise, init_args: {bit: 4}}]": "Quantise has no option 'bit' (option model.robustness.bit): did",
    "[{class_path: Quantis}]": "'Quantis' for model.robustness: did you mean Q",
}


@pytest.mark.parametrize(("attacks", "message"), IN_A_LIST.items())
def test_one_line_says_what_to_type_in_a_list(fails, tiny_model, attacks, message):
    assert message in fails(TEST, f"--model.model {tiny_model} --model.robustness", attacks)


FILES = {
    "": "c.yaml is empty: add options, or leave it out",
    "# base: x\n": "c.yaml is empty",
    "trainer: {max_epoch: 3}": "there is no option trainer.max_epoch: did you mean --trainer.max_epochs?",
    "modle: {class_path: UnlearnModule}": "there is no option modle.class_path: did you mean --model?",
    "model: {class_path: UnlearnModule, init_arg: {}}": "model takes class_path and init_args, and nothing else",
    "model: {class_path: UnlearnModule}": "UnlearnModule needs model: give --model.model",
    "trainer: {max_epochs: 1}": "--data and --model must be given, on the command line or by a --config",
    "base: 5": "base must be a file, or a list of files, to extend; got 5",
    "base: [5]": "base must be a file, or a list of files, to extend; got [5]",
    "base: {a: b.yaml}": "base must be a file",
    "model: Zoë": "c.yaml is not in UTF-8 (byte 9)",
}


@pytest.mark.parametrize(("content", "message"), FILES.items())
def test_what_is_wrong_in_a_file(fails, tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content, encoding="latin-1")
    assert message in fails(f"fit --config {tmp_path}/c.yaml", data=False)


OTHER_COMMANDS = {
    "mask inf": "there is no command 'inf': did you mean info?",
    "mask random --dens 0.2": "there is no option --dens",
    "patch apply": "BASE and PATCH must be given",
    "patch apply p.wagle model -o x": "the model's folder comes first, then the patch file: wagle patch apply",
    "patch revert p.wagle model -o x": "wagle patch revert model p.wagle",
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


class Misconfigures(Callback):
    """A user's own that says it in Lightning's word."""

    def on_train_start(self, trainer, module):
        raise MisconfigurationException("of my own")


class Opens(Callback):
    """A user's own that reads a file."""

    def on_train_start(self, trainer, module):
        Path("mine.txt").read_text()


class Stops(EarlyStopping):
    """A user's own that asks of Lightning's what that cannot do."""

    def __init__(self):
        super().__init__("nothing")

    def on_train_start(self, trainer, module):
        self._validate_condition_metric({})


class Refuses(Callback):
    """A user's own that means to say it in one line."""

    def on_train_start(self, trainer, module):
        raise WagleError("of my own")


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        ("Fails", RuntimeError),
        ("Misconfigures", MisconfigurationException),
        ("Opens", FileNotFoundError),
        ("Stops", RuntimeError),
    ],
)
def test_an_error_in_own_code_keeps_its_traceback(wagle, tiny_model, monkeypatch, callback, error):
    monkeypatch.setattr(cli, "run", lambda arguments: wagle(*arguments))
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
    _, last, *lines = ended.stderr.splitlines()
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
    """Files that happen to be called like a library are not imported in its place; the user's own modules are found."""
    for name in ("yaml", "torch", "lightning", "datasets", "random", "jsonargparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    mine = "from wagle_pl import Objective\n\nclass Mine(Objective):\n    'One of my own.'\n"
    (tmp_path / "mine.py").write_text(mine)
    options = "--model UnlearnModule --model.objective mine.Mine --model.model x --data ForgetRetainDataModule"
    command = [sys.executable, "-m", "wagle_pl", "fit", *options.split(), "--print_config"]
    found = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert "shadowed" not in found.stderr + found.stdout
    assert found.returncode == 0 and "mine.Mine" in found.stdout, found.stderr
