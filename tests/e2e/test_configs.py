"""Every configuration of a benchmark parses, names real options only, and makes its objects, a tiny model in place."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_rows
from lightning import LightningDataModule, LightningModule

from wagle_pl.cli import app as cli
from wagle_pl.cli import lightning as lightning_cli
from wagle_pl.data import (
    CopyrightDataModule,
    DetoxDataModule,
    MUSEDataModule,
    TOFUDataModule,
    WMDPDataModule,
)

CONFIGS = Path(__file__).parents[2] / "configs"
SUITES = {
    "tofu": TOFUDataModule,
    "wmdp": WMDPDataModule,
    "copyright": CopyrightDataModule,
    "detox": DetoxDataModule,
}
SUITES |= {"muse": MUSEDataModule}
FILES = sorted(file for suite in SUITES for file in (CONFIGS / suite).rglob("*.yaml"))
LAYERS = ("base", "model", "unlearn", "books")  # what others build on, or add
MODELS = [file for file in FILES if file.parent.parent.name in SUITES and file.stem not in LAYERS]
TASKS = ("attribute", "unlearn_graddiff", "unlearn_npo", "unlearn_po", "test")


def ids(file):
    return str(file.relative_to(CONFIGS))


def build(monkeypatch, tiny_model, *files, options=()):
    """Module, data module and trainer of configurations put together, as ``wagle fit`` or ``wagle test`` makes them."""
    command = "test" if files[0].stem.startswith("test") else "fit"
    monkeypatch.setattr(lightning_cli.WagleCLI, "_run_subcommand", lambda self, subcommand: None)
    arguments = [part for file in files for part in ("--config", str(file))]
    quiet = ("--model.model", tiny_model, "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    return cli.run(
        cli.expand_bases([command, *arguments, *quiet, "--trainer.logger", "false", *options])
    )


def merged(file):
    """All layers of a configuration as one dict, later ones over earlier ones."""

    def over(below, above):
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        return {**below, **{key: over(below.get(key), value) for key, value in above.items()}}

    content = {}
    for layer in cli.layers(file):
        content = over(content, yaml.safe_load(layer.read_text()) or {})
    return content


@pytest.mark.parametrize("file", MODELS, ids=ids)
def test_it_makes_its_objects(monkeypatch, tiny_model, tmp_path, file):
    monkeypatch.chdir(tmp_path)
    built = build(monkeypatch, tiny_model, file)
    suite = file.parent.parent.name
    assert isinstance(built.model, LightningModule) and isinstance(
        built.datamodule, LightningDataModule
    )
    assert type(built.datamodule) is SUITES[suite]
    names = {"fit": "UnlearnModule", "attribute": "AttributionModule", "finetune": "FinetuneModule"}
    kind = names.get(
        file.stem, "EvaluationModule" if file.stem.startswith("test") else "UnlearnModule"
    )
    assert type(built.model).__name__ == kind
    given = merged(file)
    assert given["model"]["init_args"]["output"].startswith(f"runs/{suite}/{file.parent.name}/")
    if kind == "UnlearnModule":
        objective = {"graddiff": "GradDiff", "npo": "NPO", "po": "PO", "rmu": "RMU"}[
            file.stem.partition("_")[2]
        ]
        assert type(built.model.objective).__name__ == objective
        optimizer = built.model.make_optimizer([torch.nn.Parameter(torch.zeros(2))])
        assert optimizer.defaults["lr"] == given["optimizer"]["init_args"]["lr"]
    assert built.trainer.precision == "bf16-true"


@pytest.mark.parametrize("suite", list(SUITES))
def test_each_model_has_every_task(suite):
    folders = [folder for folder in (CONFIGS / suite).iterdir() if folder.is_dir()]
    assert len(folders) == 2 and any("llama2-7b" in f.name for f in folders)
    for folder in folders:
        assert {file.stem for file in folder.glob("*.yaml")} >= set(TASKS)
    assert (CONFIGS / suite / "README.md").is_file()


@pytest.mark.parametrize(
    "file", [file for file in MODELS if file.stem.startswith("unlearn_")], ids=ids
)
def test_the_mask_is_one_that_attribution_writes(monkeypatch, tiny_model, tmp_path, file):
    monkeypatch.chdir(tmp_path)
    mask = merged(file)["model"]["init_args"].get("mask")
    if file.stem == "unlearn_rmu":
        assert mask is None
        return
    attribute = file.with_name("attribute.yaml")
    made = build(monkeypatch, tiny_model, attribute).model
    folder = merged(attribute)["model"]["init_args"]["output"]
    assert mask in [f"{folder}/{name}.safetensors" for name in made.mask_names]
    starts = [merged(f)["model"]["init_args"]["model"] for f in (file, attribute)]
    assert starts[0] == starts[1]  # a mask is refused for another model


def test_the_published_numbers():
    """Spot checks against the public code of the papers, see the comments in the files."""

    def numbers(name):
        content = merged(CONFIGS / name)
        trainer = content["trainer"]
        rows = content["data"]["init_args"]["batch_size"] * trainer["accumulate_grad_batches"]
        return (
            content["optimizer"]["init_args"]["lr"],
            rows,
            trainer["max_epochs"],
            trainer.get("max_steps"),
        )

    assert numbers("tofu/llama2-7b-chat/unlearn_graddiff.yaml") == (7e-6, 4, 5, None)
    assert numbers("tofu/llama2-7b-chat/unlearn_npo.yaml") == (1e-5, 4, -1, 400)
    assert numbers("tofu/llama2-7b-chat/unlearn_po.yaml") == (2e-5, 4, 5, None)
    assert numbers("tofu/llama2-7b-chat/finetune.yaml") == (1e-5, 32, 5, None)
    assert numbers("wmdp/zephyr-7b-beta/unlearn_graddiff.yaml") == (5e-6, 4, -1, 500)
    assert numbers("wmdp/zephyr-7b-beta/unlearn_npo.yaml") == (1e-5, 4, -1, 500)
    assert numbers("wmdp/zephyr-7b-beta/unlearn_rmu.yaml") == (5e-5, 4, -1, 150)
    assert numbers("detox/llama2-7b/unlearn_po.yaml") == (1e-5, 4, 10, None)
    assert numbers("muse/llama2-7b/unlearn_npo.yaml") == (1e-5, 32, 10, None)


@pytest.mark.parametrize("file", [f for f in MODELS if f.stem.startswith("unlearn_")], ids=ids)
def test_clipping_is_that_of_the_papers_code(file):
    """It clips the norm of all gradients, then masks (src/unlearn/base.py, ``clip_grad_norm_`` before
    ``mask_gradient``); RMU's does not clip."""
    content = merged(file)
    clips = content["trainer"].get("gradient_clip_val") is not None
    assert clips is not file.stem.endswith("rmu")
    assert content["model"]["init_args"]["clip_scope"] == ("all" if clips else "selected")


@pytest.mark.parametrize(
    "readme", [CONFIGS / "README.md", CONFIGS.parent / "README.md"], ids=["configs", "top"]
)
def test_commands_under_zero_clip_as_zero_can(readme):
    """ZeRO keeps no whole gradients: the configurations' own clip_scope is refused there."""
    assert (
        "--model.clip_scope selected" in (CONFIGS / "tofu/llama2-7b-chat/unlearn.yaml").read_text()
    )
    text = readme.read_text().replace("\\\n", " ").replace("$U", "$S --model.clip_scope selected")
    clipped = [
        line
        for line in text.splitlines()
        if re.search(r"/unlearn_.*(strategy/zero3\.yaml|\$S)", line)
    ]
    assert clipped and all("--model.clip_scope selected" in line for line in clipped)


@pytest.fixture
def folder(tmp_path):
    """A few harmless rows in the places where WMDP and the book are looked for."""
    texts = [
        {"text": f"Line {n} of a plain text about the weather on a hill, and about a hut there. "}
        for n in range(8)
    ]
    files = {
        "bio-forget-corpus": texts[:4],
        "cyber-forget-corpus": texts[4:6],
        "bio-retain-corpus": texts[6:7],
        "cyber-retain-corpus": texts[7:],
        "wikitext-2-raw-v1/test": texts[2:],
        "book": texts[:6],
    }
    for name, rows in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / f"data/{name}.jsonl", rows)
    write_rows(tmp_path / "data/retain.jsonl", texts[6:])
    return tmp_path / "data"


def test_wmdp_from_attribution_to_unlearning(wagle, tiny_model, tmp_path, folder):
    own = ("--data.folder", folder, "--data.max_length", "40", "--model.model", tiny_model)
    own += ("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false")
    own += ("--trainer.enable_progress_bar", "false", "--trainer.callbacks", "null")
    suite = CONFIGS / "wmdp/zephyr-7b-beta"
    wagle("fit", "--config", suite / "attribute.yaml", *own, data=False)
    for name, options in (
        ("npo", ()),
        ("po", ("--data.prompt_size", "5")),
        ("rmu", ("--model.objective.layer", "1")),
    ):
        arguments = (
            "fit",
            "--config",
            suite / f"unlearn_{name}.yaml",
            *own,
            *options,
            "--trainer.max_steps",
            "2",
        )
        module = wagle(*arguments, "--trainer.enable_checkpointing", "false", data=False).model
        assert module.global_step == 2 and module.mask is not None
        assert module.mask.density == pytest.approx(
            {"npo": 0.6, "po": 0.8}.get(name, module.mask.density), abs=1e-3
        )
        assert (tmp_path / f"runs/wmdp/zephyr-7b-beta/{name}/model.safetensors").exists()


def test_a_book_from_target_to_unlearning(wagle, tmp_path, tiny_model, folder):
    own = (
        "--data.folder",
        folder,
        "--data.chunk_size",
        "30",
        "--data.retain",
        folder / "retain.jsonl",
    )
    own += ("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.logger", "false")
    own += (
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.callbacks",
        "null",
        "--trainer.max_epochs",
        "1",
    )
    suite = CONFIGS / "copyright/llama2-7b"
    for task, options in (
        ("finetune", ("--model.model", tiny_model)),
        ("attribute", ("--data.prompt_size", "10")),
        ("unlearn_graddiff", ("--data.prompt_size", "10")),
    ):
        wagle("fit", "--config", suite / f"{task}.yaml", *own, *options, data=False)
    assert (tmp_path / "runs/copyright/llama2-7b/graddiff/model.safetensors").exists()


def test_muse_books_is_a_layer_over_any(monkeypatch, tiny_model, tmp_path):
    monkeypatch.chdir(tmp_path)
    built = build(
        monkeypatch,
        tiny_model,
        CONFIGS / "muse/llama2-7b/unlearn_npo.yaml",
        CONFIGS / "muse/books.yaml",
    )
    assert built.datamodule.corpus == "books" and built.datamodule.batch_size == 4


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_files_are_short_and_say_what_they_are(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 40


@pytest.mark.parametrize(
    "readme", sorted(p for s in SUITES for p in (CONFIGS / s).rglob("README.md")), ids=ids
)
def test_the_commands_of_a_readme_name_files_that_exist(readme):
    text = readme.read_text()
    shorthand = re.search(r"^C=(\S+)", text, re.MULTILINE)
    named = [name.strip("`") for name in re.findall(r"--config (\S+)", text)]
    assert named
    for name in named:
        name = name.replace("$C", shorthand[1]) if "$C" in name else name
        assert (CONFIGS.parent / name).is_file(), name


def test_an_unknown_option_is_refused(monkeypatch, tiny_model, tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text(
        f"base: {CONFIGS}/wmdp/zephyr-7b-beta/unlearn_npo.yaml\ndata:\n  init_args:\n    chunk: 5\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        build(monkeypatch, tiny_model, own)
    assert "chunk" in capsys.readouterr().err
