"""The commands as a user types them: the whole pipeline, layered configurations, and one clear line for a mistake."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from helpers import QUIET, data_options, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import wagle_pl
from wagle_pl import WeightMask
from wagle_pl.cli import app as cli
from wagle_pl.cli.app import COMMANDS, SUMMARIES
from wagle_pl.cli.lightning import WagleCLI
from wagle_pl.cli.parser import expand
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing

QUICK = "--trainer.enable_checkpointing false --trainer.max_epochs"
UNLEARN = f"fit --model UnlearnModule {QUICK} 2"
FINETUNE = f"fit --model FinetuneModule {QUICK} 2"
ATTRIBUTE = f"fit --model AttributionModule {QUICK} 1"
TEST = "test --model EvaluationModule"


# -- the main job -----------------------------------------------------------------------------------------------------


class Tagged(WagleCLI):
    """A command line with an option of its own."""

    def add_arguments_to_parser(self, parser):
        super().add_arguments_to_parser(parser)
        parser.add_argument("--tag", type=str, default="none")

    def before_fit(self):
        super().before_fit()
        Path("tag").write_text(self.config["fit"]["tag"])


def test_a_command_line_of_ones_own(empty_folder, tiny_model, rows, capsys):
    run = f"{FINETUNE} --model.model {tiny_model} --model.output out {QUIET}".split()
    cli.main([*run, *data_options(rows), "--tag", "mine"], cli=Tagged)
    assert Path("tag").read_text() == "mine" and Path("out/model.safetensors").is_file()
    assert json.loads(Path("out/wagle.json").read_text())["lineage"][-1]["config"]["tag"] == "mine"
    with pytest.raises(SystemExit) as ended:
        cli.main([*run, *data_options(rows), "--tags", "mine"], cli=Tagged)
    assert ended.value.code == 2 and "--tags" in capsys.readouterr().err
    done = Tagged(
        [*run, *data_options(rows), "--model.overwrite", "true"], trainer_defaults={"max_steps": 1}
    )
    assert done.trainer.global_step == 1


def test_finetune_attribute_unlearn_test(wagle, tiny_model, rows, tmp_path):
    adamw = "--optimizer MaskedAdamW --optimizer.weight_decay 0.1 --optimizer.lr"
    wagle(FINETUNE, f"--model.model {tiny_model} --model.output target", f"{adamw} 3e-3")
    wagle(ATTRIBUTE, "--model.model target --model.output mask --model.density 0.3")
    mask = WeightMask.load("mask")
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained("target").parameters())
    assert mask.total == total and mask.count() == int(0.3 * total)
    masked = "--model.model target --model.output unlearned --model.mask mask.safetensors"
    wagle(UNLEARN, masked, "--model.objective NPO", f"{adamw} 1e-3")
    before = dict(AutoModelForCausalLM.from_pretrained("target").named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained("unlearned").named_parameters())
    for name in before:
        frozen = ~mask[name]
        same = before[name].detach().view(torch.int32) == after[name].detach().view(torch.int32)
        assert same[frozen].all(), name
    assert any((before[name] != after[name]).any() for name in before)
    assert AutoTokenizer.from_pretrained("unlearned").chat_template
    card = (tmp_path / "unlearned/README.md").read_text()
    assert all(word in card for word in ("bit-identical", "NPO", "`target`", "class_path:"))
    record = json.loads((tmp_path / "unlearned/wagle.json").read_text())
    assert [step["module"] for step in record["lineage"]] == ["FinetuneModule", "UnlearnModule"]
    test = (
        TEST,
        "--model.max_new_tokens 8 --data.test",
        json.dumps({"forget": rows["forget_test"]}),
    )
    target, unlearned = (
        wagle(*test, f"--model.model {m} --model.output {m}/test").model.metrics
        for m in ("target", "unlearned")
    )
    assert unlearned["forget/probability"] < target["forget/probability"]


def test_dense_unlearning_moves_every_tensor(wagle, tiny_model):
    adamw = "--optimizer AdamW --optimizer.lr 1e-3"
    wagle(UNLEARN, f"--model.model {tiny_model} --model.output out", adamw)
    before, after = load_file(f"{tiny_model}/model.safetensors"), load_file("out/model.safetensors")
    assert all((before[name] != after[name]).any() for name in before)


def test_training_on_the_retain_rows_only(wagle, tiny_model):
    options = f"--model.model {tiny_model} --model.output out --model.train_on retain"
    module = wagle(FINETUNE, options).model
    assert module.streams == ("retain",)
    assert module.global_step == 2 * 3  # 17 rows in batches of 8


# -- configurations ---------------------------------------------------------------------------------------------------


def test_layers_override_from_base_to_top(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("x: 1\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nx: 2\n")
    (tmp_path / "sub/c.yaml").write_text("base: [../b.yaml, ../a.yaml]\nx: 3\n")
    args = expand(["fit", "--a", f"--config={tmp_path}/sub/c.yaml", "--x", "2"])
    config = [part for n in (1, 2, 3) for part in ("--config", f"x: {n}\n")]
    assert args == ["fit", "--a", *config, "--x", "2"]


def test_what_two_layers_build_on_undoes_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bases = {"a": "[]", "b1": "a.yaml", "b2": "a.yaml", "c": "[b1.yaml, b2.yaml]"}
    for name, base in bases.items():
        Path(f"{name}.yaml").write_text(f"base: {base}\nx: {name}")

    def read(*files):
        """What is read, in order, for ``--config`` of each file."""
        args = [part for file in files for part in ("--config", f"{file}.yaml")]
        return [yaml.safe_load(layer)["x"] for layer in expand(args)[1::2]]

    assert read("c") == ["a", "b1", "b2", "c"]
    assert read("b1", "b2") == ["a", "b1", "b2"]
    assert read("b1", "a") == ["a", "b1", "a"]  # as asked for
    Path("a.yaml").write_text("base: c.yaml")
    with pytest.raises(WagleError, match=r"c\.yaml extends itself"):
        read("c")


def test_a_printed_configuration_runs_from_anywhere(tmp_path, capsys):
    """What ``base`` named is in it, and is not looked for again."""
    printed = []
    for file in ("people/unlearn", tmp_path / "printed.yaml"):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["fit", "--config", str(file), "--print_config"])
        assert exit_.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1] and "base:" not in printed[0]


@pytest.mark.parametrize(
    "name", ["UnlearnModule", "AttributionModule", "FinetuneModule", "EvaluationModule"]
)
def test_help_documents_every_option(capsys, name):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["fit", f"--model.help={name}"])
    assert exit_.value.code == 0
    _, *options = capsys.readouterr().out.split("\n  --model.")
    assert len(options) >= 7
    for option in options:
        text = " ".join(option.split())
        assert not re.match(r"\S+( \S+)? \((required|type)", text), text


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--version"], [], ["bogus"], ["studdy"]])
def test_what_there_is_is_told_without_libraries(args):
    """Every command with a line on what it does; a mistake is named last, with exit code 2."""
    code = "import sys; sys.modules.update(dict.fromkeys(['torch', 'lightning', 'jsonargparse'])); "
    code += f"from wagle_pl.cli.app import main; main({args})"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600
    )
    if args == ["--version"]:
        assert ended.stdout == f"wagle {wagle_pl.__version__}\n" and ended.returncode == 0
        return
    help_ = bool(args) and args[0].startswith("-")
    assert ended.returncode == (0 if help_ else 2)
    told = {
        line.split()[0]: line
        for line in (ended.stdout or ended.stderr).splitlines()
        if line.startswith("  ")
    }
    assert set(told) == {"fit", "test", "validate", "predict", *COMMANDS}
    assert all(len(line.split()) > 4 for line in told.values())
    said = {
        "": "no command is given; choose one of quickstart, forget, fit",
        "bogus": "there is no command 'bogus'; choose one of quickstart",
        "studdy": "there is no command 'studdy'; did you mean study?",
    }
    last = (ended.stderr or "\n").splitlines()[-1]
    assert help_ or last.startswith(f"wagle: error: {said[''.join(args)]}")


def test_help_imports_neither_torch_nor_lightning():
    """Of any command, in one process that reports what it has imported in the end."""
    asked = [
        "--help",
        "mask select --help",
        "patch make --help",
        *(f"{c} --help" for c in SUMMARIES),
    ]
    asked.remove("predict --help")
    code = f"""
import sys
from wagle_pl.cli.app import main
for args in {asked}:
    try:
        main(args.split())
    except SystemExit as ended:
        assert ended.code == 0, args
print({{"torch", "lightning", "numpy"}} & set(sys.modules), file=sys.stderr)
"""
    run = [sys.executable, "-c", code]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert ended.stderr == "set()\n" and ended.returncode == 0
    assert ended.stdout.count("usage: ") == len(asked)


def test_the_screens_name_options_that_there_are(capsys):
    def help_of(*args):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*args])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    models = [f"--model.help={kind}Module" for kind in ("Unlearn", "Attribution", "Finetune")]
    data = "--data.help=ForgetRetainDataModule"
    known = {
        "fit": "".join(help_of("fit", part) for part in (*models, data)),
        "test": help_of("test", "--model.help=EvaluationModule") + help_of("test", data),
        "study": "",
    }
    for command, found in known.items():
        found += help_of(command, "--help", "all")
        said = help_of(command, "--help")
        assert len(said.splitlines()) <= 50
        named = set(re.findall(r"--[a-z][\w.]*\w", said)) - {"--robustness", "--format"}
        named = {option for option in named if not option.endswith(".OPTION")}
        assert len(named) > 20 and all(re.search(f"{option}[ ,]", found) for option in named)


def test_the_commands_of_lightning_are_told_of():
    from lightning.pytorch.cli import LightningCLI

    assert set(SUMMARIES) == {*COMMANDS, *LightningCLI.subcommands()}


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_logger_whose_library_is_not_there(fails, tiny_model, monkeypatch):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    logger = "--trainer.logger TensorBoardLogger --trainer.logger.save_dir logs"
    message = fails(FINETUNE, f"--model.model {tiny_model} --model.output out", logger)
    assert "Neither `tensorboard` nor `tensorboardX` is available" in message


def test_a_model_that_is_neither_a_folder_nor_on_the_hub(fails):
    message = fails(FINETUNE, "--model.model models/nowhere --model.output out")
    said = "model 'models/nowhere' cannot be loaded: there is no such folder here, and asked of the hub: "
    assert said in message


def test_paths_that_cannot_be(fails, tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    args = (FINETUNE, f"--model.model {tiny_model} --model.output")
    assert "output file/x cannot be written: file is a file" in fails(*args, "file/x")
    assert "checkpoint no.ckpt does not exist" in fails(*args, "out", "--ckpt_path no.ckpt")
    damaged = fails(*args, "out", "--ckpt_path file")
    assert "checkpoint file is damaged, or no checkpoint" in damaged
    line = fails(TEST, f"--model.model {tiny_model} --model.output file/x --model.max_new_tokens 2")
    assert "output file/x cannot be written: file is a file" in line
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no file by that name"),
        FileNotFoundError(2, "No such file or directory", f"{sys.prefix}/lib/gone.json"),
        BrokenPipeError(32, "Broken pipe", "pipe"),
    ],
)
def test_an_error_of_the_suites_own_keeps_its_traceback(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(OSError):
        cli.main(["fit"])
    monkeypatch.setattr(cli, "run", lambda *_: subprocess.run(["no program of that name"]))
    with pytest.raises(FileNotFoundError):
        cli.main(["fit"])


@pytest.mark.parametrize("labels", [[5, -100], [5]], ids=["first", "one"])
@pytest.mark.parametrize("module", [FINETUNE, ATTRIBUTE])
def test_a_row_whose_only_label_is_its_first_token(fails, tiny_model, tmp_path, labels, module):
    """Nothing comes before the first token: the mean over no token would be NaN, and stop the run in its middle."""
    row = {"input_ids": [5, 6][: len(labels)], "labels": labels}
    bad = write_rows(tmp_path / "bad.jsonl", [{"input_ids": [5, 6], "labels": [-100, 6]}, row])
    line = fails(module, f"--model.model {tiny_model} --model.output out --data.forget", bad)
    assert " row 2: its only label is the first token" in line


def test_an_existing_output_is_kept(wagle, fails, tiny_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    args = (FINETUNE, f"--model.model {tiny_model} --model.output out")
    overwrite = (*args, "--model.overwrite true")
    assert "output out exists already" in fails(*args)
    assert "output out holds precious" in fails(*overwrite)
    assert (out / "precious").read_text() == "x"
    (out / "precious").unlink()
    wagle(*overwrite)
    (out / "model-00002-of-00002.safetensors").write_text("of the old model")
    wagle(*overwrite)
    assert (out / "model.safetensors").exists() and len(list(out.glob("*.safetensors"))) == 1
    (out / "notes").write_text("x")
    assert "output out holds notes" in fails(*overwrite)


def test_what_may_be_replaced(tmp_path):
    files = {
        "empty": {},
        "model": {"config.json": "{}", "model.safetensors": ""},
        "ours": {"wagle.json": "{}", "config.json": "{}", "model.safetensors": ""},
        "adapter": {"wagle.json": "{}", "adapter_config.json": "{}", "README.md": ""},
        "tested": {"wagle.json": "{}", "test/metrics.json": "{}"},
        "thesis": {"wagle.json": "{}", "thesis.txt": ""},
        "test of": {"wagle.json": "{}", "test/thesis.txt": ""},
        "test and": {"wagle.json": "{}", "test/metrics.json": "{}", "test/thesis.txt": ""},
        "file": {"wagle.json": "{}", "test": "mine"},
        "killed": {"wagle.json": "{}", ".test.lock": "", "test/forget.parquet": ""},
        "ranks": {"index.json": '{"format": "wagle_pl.checkpoint"}'},
        "site": {"index.json": '{"pages": []}', "config.json": "{}"},
        "list": {"index.json": "[1]"},
        "damaged": {"index.json": "{"},
        "runs": {"target/wagle.json": "{}"},
        "masks": {"wagle.safetensors": ""},
    }
    for name, content in files.items():
        (tmp_path / name).mkdir()
        for file, text in content.items():
            (tmp_path / name / file).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name / file).write_text(text)
    replaced = set()
    for name in files:
        with suppress(WagleError):
            refuse_existing(tmp_path / name, True, kind="folder")
            replaced.add(name)
    assert replaced == {"empty", "ours", "adapter", "tested", "killed"}
    refuse_existing(tmp_path / "masks", True, kind="files")  # others stay as they are
    with pytest.raises(WagleError, match=r"is a file, and a folder is to be written"):
        refuse_existing(tmp_path / "runs/target/wagle.json", True, kind="folder")
    with (
        pytest.raises(WagleError, match=r"runs is a folder: name a file in it"),
        atomic_path(tmp_path / "runs") as new,
    ):
        new.write_text("x")
    assert (tmp_path / "runs/target/wagle.json").exists() and not list(tmp_path.glob(".runs*"))


@pytest.mark.parametrize("kind", ["file", "folder", "files"])
def test_a_device_is_never_replaced(tmp_path, kind):
    """A pipe stands for what the kernel makes: there are no devices to lose here."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WagleError, match="pipe is neither a file nor a folder"):
        refuse_existing(tmp_path / "pipe", True, kind=kind)
    with (
        pytest.raises(WagleError, match="pipe is neither a file nor a folder"),
        atomic_path(tmp_path / "pipe") as new,
    ):
        new.write_text("x")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_a_mask_of_another_model_is_refused(wagle, fails, tiny_model):
    wagle(ATTRIBUTE, f"--model.model {tiny_model} --model.output mask")
    wagle(FINETUNE, f"--model.model {tiny_model} --model.output other")
    line = fails(UNLEARN, "--model.model other --model.output out --model.mask mask.safetensors")
    assert "mask mask.safetensors was made for the model with fingerprint" in line


def test_a_loss_that_is_not_finite_stops_the_run(fails, tiny_model, tmp_path, monkeypatch):
    from wagle_pl.unlearning import FinetuneModule

    losses = FinetuneModule.losses

    def diverge(self, at):
        found = losses(self, at)
        return {k: v * float("nan") for k, v in found.items()} if self.global_step == 4 else found

    monkeypatch.setattr(FinetuneModule, "losses", diverge)
    message = fails(
        "fit --model FinetuneModule --trainer.max_epochs 3",
        f"--model.model {tiny_model} --model.output out",
        "--trainer.callbacks ModelCheckpoint --trainer.callbacks.dirpath ckpt",
        "--trainer.callbacks.every_n_train_steps 2 --trainer.callbacks.save_last true",
    )
    assert "loss is not finite at step 4 (batch 0, rows" in message
    assert torch.load(tmp_path / "ckpt/last.ckpt", weights_only=True)["global_step"] == 4
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_pad_token_is_handled(wagle, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = None
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "padless")
    tokenizer.save_pretrained(tmp_path / "padless")
    wagle(UNLEARN, "--model.model padless --model.output out")
    wagle(TEST, "--model.model out --model.output t --model.max_new_tokens 4")


def test_a_token_that_the_model_does_not_know(fails, tiny_model, tmp_path):
    tokens = [{"input_ids": [5, 6, last], "labels": [-100, 6, 7]} for last in (7, 9999)]
    rows = write_rows(tmp_path / "tokens.jsonl", tokens)
    model = f"--model.model {tiny_model} --model.output out"
    for line in (
        fails(f"fit --model UnlearnModule --data.forget {rows} --trainer.max_steps 1", model),
        fails(TEST, model, "--data.test", json.dumps({"mine": rows})),
    ):
        assert "tokens.jsonl) row 2: token id 9999 is out of range: the model knows 0 to " in line
