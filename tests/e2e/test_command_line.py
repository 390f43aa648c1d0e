"""What a user types and gets wrong: options in any order, one line that says what to type, and no noise."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import data_options, environment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping

from wagle_pl.cli import app as cli
from wagle_pl.core.errors import WagleError

MODULE = ("fit", "--trainer.enable_checkpointing", "false", "--trainer.max_epochs", "1", "--model")
UNLEARN, ATTRIBUTE = (*MODULE, "UnlearnModule"), (*MODULE, "AttributionModule")
TEST = (*MODULE, "EvaluationModule")


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (*UNLEARN, "--model.densty", "1"),
            "UnlearnModule has no option 'densty' (option model.densty)",
        ),
        ((*ATTRIBUTE, "--model.densty", "1"), "(option model.densty): did you mean density?"),
        ((*UNLEARN, "--model.density", "1"), "(option model.density): AttributionModule has it"),
        (
            (*ATTRIBUTE, "--model.lr", "1"),
            "(option model.lr): FinetuneModule, UnlearnModule have it",
        ),
        (
            (*UNLEARN, "--model.max_epochs", "1"),
            "(option model.max_epochs): did you mean --trainer.max_epochs?",
        ),
        ((*UNLEARN, "--data.batchsize", "1"), "(option data.batchsize): did you mean batch_size?"),
        (
            (*UNLEARN, "--data.path", "x"),
            "ForgetRetainDataModule has no option 'path' (option data.path): TOFUData",
        ),
        (
            (*UNLEARN, "--optimizer.lrr", "1"),
            "MaskedAdamW has no option 'lrr' (option optimizer.lrr): did you mean lr",
        ),
        (
            (*UNLEARN, "--model.objective.gamma", "1"),
            "no class is named for model.objective, so there is no option "
            "model.objective.gamma yet: give --model.objective SimNPO",
        ),
        (
            (*UNLEARN, "--model.objective", "GradDiff", "--model.objective.gamma", "1"),
            "GradDiff has no option 'gamma' (option model.objective.gamma): SimNPO has it",
        ),
        (
            ("fit", "--model.lr", "1"),
            "no class is named for model, so there is no option model.lr yet: give --model ",
        ),
        (
            (*TEST, "--model.robustness", "[{class_path: Quantise, init_args: {bit: 4}}]"),
            "Quantise has no option 'bit' (option model.robustness.bit): did you mean bits?",
        ),
        (
            (*TEST, "--model.robustness", "[{class_path: Quantis}]"),
            "'Quantis' for model.robustness: did you mean Q",
        ),
        (
            ("fit", "--model", "UnlearnModul"),
            "unknown class 'UnlearnModul' for model: did you mean UnlearnModule?",
        ),
        (
            (*UNLEARN, "--optimizer", "adamw"),
            "unknown class 'adamw' for optimizer: did you mean AdamW?",
        ),
        ((*UNLEARN, "--trainer.logger", "CSVLoger"), "for trainer.logger: did you mean CSVLogger?"),
        (
            (*UNLEARN, "--model.objective", "NPOX"),
            "unknown objective 'NPOX'; choose one of CEU, DPO",
        ),
        ((*UNLEARN, "--model.objective", "NPOX"), "or a class path: did you mean NPO?"),
        ((*TEST, "--model.robustness", "relearnn"), "did you mean Relearn?"),
        (
            (*UNLEARN, "--data", "TOFU"),
            "unknown class 'TOFU' for data: choose one of CopyrightDataModule, ",
        ),
        (
            (*UNLEARN, "--data", "json.JSONDecoder"),
            "json.JSONDecoder is no LightningDataModule (option data)",
        ),
        (
            (*UNLEARN, "--data", "nowhere.Rows"),
            "class 'nowhere.Rows' of option data: No module named 'nowhere'",
        ),
        ((*UNLEARN, "--model.modules", "5"), "model.modules must be a list or null, got 5"),
        ((*ATTRIBUTE, "--model.density", "nan"), "model.density must be a number, got nan"),
        (
            (*UNLEARN, "--trainer.max_epochs", "x"),
            "trainer.max_epochs must be an integer or null, got x",
        ),
        (
            (*UNLEARN, "--trainer.precision", "x"),
            "bf16-mixed, 32-true, 64-true, bf16 or null, got x",
        ),
        (
            (*UNLEARN, "--trainer.callbacks", "EarlyStopping"),
            "EarlyStopping needs monitor: give --trainer.callb",
        ),
        (
            (*UNLEARN, "--trainer.strategy.stage", "2"),
            "trainer.strategy 'auto' is no class, so it has no option",
        ),
        (
            (*UNLEARN, "--trainer.max_epoch", "2"),
            "no option --trainer.max_epoch: did you mean --trainer.max_epochs?",
        ),
        (
            (*ATTRIBUTE, "--model.densit", "1"),
            "AttributionModule has no option 'densit' (option model.densit): did",
        ),
        ((*UNLEARN, "--confg", "x"), "there is no option --confg: did you mean --config?"),
        (
            (*UNLEARN, "--trainer.accumulate_grad_batches", "0"),
            "accumulate_grad_batches must be at least 1, got 0",
        ),
        (
            (*UNLEARN, "--seed_everything", "-5"),
            "seed_everything must be in [0, 4294967295], got -5",
        ),
        ((*UNLEARN, "--model.lr", "-1"), "model.lr must be 0 or more, got -1"),
    ],
)
def test_one_line_says_what_to_type(fails, tiny_model, args, message):
    model = (
        ("--model.model", tiny_model, "--model.output", "out") if args[-1] != "UnlearnModul" else ()
    )
    line = fails(*args, *(model if "--model" in args else ()))
    assert message in line and len(line) < 450


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "c.yaml holds no options: write some, or leave it out"),
        ("# base: x\n", "c.yaml holds no options"),
        (
            "trainer: {max_epoch: 3}",
            "there is no option trainer.max_epoch: did you mean --trainer.max_epochs?",
        ),
        (
            "modle: {class_path: UnlearnModule}",
            "there is no option modle.class_path: did you mean --model?",
        ),
        (
            "model: {class_path: UnlearnModule, init_arg: {}}",
            "model takes class_path and init_args, and nothing else",
        ),
        ("model: {class_path: UnlearnModule}", "UnlearnModule needs model: give --model.model"),
        (
            "trainer: {max_epochs: 1}",
            "--data and --model must be given, on the command line or by a --config",
        ),
    ],
)
def test_what_is_wrong_in_a_file(fails, tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    assert message in fails("fit", "--config", tmp_path / "c.yaml", data=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("mask inf", "there is no command 'inf': did you mean info?"),
        ("mask random --dens 0.2", "there is no option --dens"),
        ("patch apply", "BASE and PATCH must be given"),
        (
            "patch apply p.wagle model -o x",
            "the model's folder comes first, then the patch file: wagle patch apply",
        ),
        ("patch revert p.wagle model -o x", "wagle patch revert model p.wagle"),
    ],
)
def test_what_is_wrong_in_another_command(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    with pytest.raises(SystemExit) as exit_:
        cli.main(args.split())
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_class_may_come_after_its_options(wagle, tiny_model, rows):
    done = wagle(
        "fit",
        "--data.batch_size",
        "4",
        *data_options(rows),
        "--model.objective.beta",
        "0.3",
        "--model.lr=1e-4",
        "--model.model",
        tiny_model,
        "--model.objective",
        "NPO",
        "--model.output",
        "out",
        "--trainer.fast_dev_run",
        "true",
        "--optimizer.lr",
        "0.5",
        "--model=UnlearnModule",
        "--optimizer",
        "SGD",
        data=False,
    )
    assert done.datamodule.batch_size == 4 and done.model.objective.beta == 0.3
    assert (
        done.trainer.optimizers[0].defaults["lr"] == 1e-4
    )  # the module's goes before the optimiser's


@pytest.mark.parametrize(
    ("given", "config", "name", "lr"),
    [
        (("--optimizer.lr", "0.25"), None, "MaskedAdamW", 0.25),
        (("--optimizer.lr", "0.25"), "AdamW", "AdamW", 0.25),
        (("--model.lr", "0.25"), None, "MaskedAdamW", 0.25),
        (("--model.lr", "0.25"), "AdamW", "AdamW", 0.25),
        ((), "AdamW", "AdamW", 0.5),
        ((), None, "MaskedAdamW", 1e-5),
    ],
)
def test_the_learning_rate_alone(wagle, tiny_model, tmp_path, given, config, name, lr):
    content = {"trainer": {"fast_dev_run": True}}
    if config:
        content["optimizer"] = {"class_path": config, "init_args": {"lr": 0.5}}
    (tmp_path / "c.yaml").write_text(json.dumps(content))
    model = ("--model.model", tiny_model, "--model.output", "out", "--model.warmup", "0")
    optimizer = wagle(*UNLEARN, *model, "--config", tmp_path / "c.yaml", *given).trainer.optimizers[
        0
    ]
    assert type(optimizer).__name__ == name and optimizer.defaults["lr"] == lr
    assert optimizer.defaults["weight_decay"] == (
        0.01 if name == "AdamW" else 0
    )  # the class's own default


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_module(wagle, fails, tiny_model, tmp_path):
    model = (
        "--trainer.max_epochs",
        "1",
        "--model.model",
        tiny_model,
        "--trainer.callbacks",
        "ModelCheckpoint",
    )
    model += ("--model.output",)
    for kind in ("Unlearn", "Attribution", "Finetune"):
        wagle(
            "fit",
            "--model",
            f"{kind}Module",
            *model,
            kind,
            "--trainer.default_root_dir",
            f"{kind}-root",
        )
    files = {path.parts[-3][:-5]: path for path in tmp_path.glob("*-root/checkpoints/*.ckpt")}
    for kind in files:
        for other in files.keys() - {kind}:
            line = fails(
                "fit", "--model", f"{kind}Module", *model, "again", "--ckpt_path", files[other]
            )
            assert f"is of a run of {other}Module, and this run is one of {kind}Module" in line
    test = (
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        tiny_model,
        "--model.output",
        "test",
    )
    assert "does not hold the weights of this model" in fails(
        *test, "--ckpt_path", files["Attribution"]
    )
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
    own = ("--trainer.callbacks", f"{__name__}.{callback}")
    with pytest.raises(error):
        cli.main([*UNLEARN, "--model.model", tiny_model, "--model.output", "out", *own])


def test_own_code_may_say_it_in_one_line(fails, tiny_model):
    own = ("--trainer.callbacks", f"{__name__}.Refuses")
    assert (
        fails(*UNLEARN, "--model.model", tiny_model, "--model.output", "out", *own)
        == "wagle: error: of my own"
    )


# -- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["--help"], ["bogus"], ["mask", "random", "--help"], ["fit", "--print_config"]]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away(args, unbuffered):
    """Its pipe is closed before anything is written."""
    reads, writes = os.pipe()
    os.close(reads)
    environ = {**environment(), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "wagle_pl", *args]
    with os.fdopen(writes, "w") as closed:
        ended = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=600, env=environ
        )
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
    assert ended.returncode in (
        (2,) if args == ["bogus"] else (0, 141)
    )  # argparse lets its help go unread


def test_nothing_of_lightnings_before_ours(tiny_model, rows, tmp_path):
    """A process of its own: Lightning writes to the standard error that it finds when it is imported."""
    (tmp_path / "c.yaml").write_text(
        textwrap.dedent(f"""\
        model: {{class_path: AttributionModule, init_args: {{model: {tiny_model}, output: mask}}}}
        data: {{class_path: ForgetRetainDataModule, init_args: {{forget: {rows["forget"]}, retain: {rows["retain"]}}}}}
        trainer: {{accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false,
                  enable_model_summary: false}}
        """)
    )
    command = [
        sys.executable,
        "-m",
        "wagle_pl",
        "fit",
        "--config",
        "c.yaml",
        "--trainer.fast_dev_run",
    ]
    for trial in ("true", "false"):
        ended = subprocess.run(
            [*command, trial],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=tmp_path,
            env=environment(),
        )
        assert ended.returncode == 0 and not ended.stdout
        lines = ended.stderr.splitlines()
        if trial == "false":
            assert all(line.startswith("wagle: ") for line in lines) and lines[-1].startswith(
                "wagle: mask written to"
            )
        else:
            assert (
                lines[-1] == "wagle: fast_dev_run: this was a trial, and nothing is written"
                and len(lines) == 2
            )


def test_early_stopping_says_why(wagle, heard, tiny_model):
    stop = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "train/loss")
    stop += ("--trainer.callbacks.patience", "0", "--trainer.callbacks.mode", "max")
    wagle(
        *UNLEARN,
        "--trainer.max_epochs",
        "9",
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        *stop,
    )
    assert any(
        "stopped early, after step 4: Monitored metric train/loss did not improve" in m
        for m in heard.messages
    )


@pytest.mark.parametrize(
    "args", [(*UNLEARN, "--trainer.max_steps"), (*ATTRIBUTE, "--trainer.limit_train_batches")]
)
def test_nothing_to_do_is_said(fails, tiny_model, args):
    line = fails(*args, "0", "--model.model", tiny_model, "--model.output", "out")
    assert "nothing was trained, so nothing is written" in line and not Path("out").exists()


def test_own_rows_have_a_configuration_that_leaves_nothing_undefined(
    wagle, tiny_model, rows, tmp_path, capsys
):
    own = ("--config", "own/data", "--config")
    given = (
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--data.forget",
        rows["forget"],
    )
    given += ("--data.retain", rows["retain"], "--trainer.callbacks", "null")
    model = ("--model.model", tiny_model)
    wagle("fit", *own, "task/attribute", *given, *model, data=False)
    wagle(
        "fit",
        *own,
        "task/unlearn",
        "--config",
        "method/npo",
        *given,
        *model,
        "--trainer.max_epochs",
        "1",
        data=False,
    )
    capsys.readouterr()
    done = wagle("test", *own, "task/test", *given, "--model.max_new_tokens", "8", data=False)
    assert "forget/probability" in done.model.metrics
    undefined = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("undefined")
    ]
    assert all(
        line.endswith("generations are empty") for line in undefined
    )  # the model of this test says nothing


@pytest.mark.parametrize("how", ["module", "script"])
def test_files_of_the_current_folder_shadow_no_library(tmp_path: Path, how: str) -> None:
    """Files that happen to be called like a library are not imported in its place; the user's own modules are found."""
    here, script = tmp_path / "here", tmp_path / "wagle"
    here.mkdir()
    script.write_text("from wagle_pl.cli.app import main\nmain()\n")  # as pip writes it
    for name in ("yaml", "torch", "lightning", "datasets", "random", "jsonargparse"):
        (here / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    (here / "mine.py").write_text(
        "from wagle_pl import Objective\n\nclass Mine(Objective):\n    'One of my own.'\n"
    )
    found = subprocess.run(
        [
            sys.executable,
            *(["-m", "wagle_pl"] if how == "module" else [str(script)]),
            "fit",
            "--model",
            "UnlearnModule",
            "--model.objective",
            "mine.Mine",
            "--model.model",
            "x",
            "--data",
            "ForgetRetainDataModule",
            "--print_config",
        ],
        cwd=here,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "shadowed" not in found.stderr + found.stdout
    assert found.returncode == 0 and "mine.Mine" in found.stdout, found.stderr
