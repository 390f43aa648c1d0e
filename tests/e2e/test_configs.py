"""Every configuration: what it is made of, the published numbers, and the objects that it makes for a tiny model."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from helpers import write_rows
from lightning import LightningDataModule, LightningModule

from wagle_pl.cli import app as cli
from wagle_pl.cli import lightning as lightning_cli
from wagle_pl.cli.configs import expand
from wagle_pl.data import (
    CopyrightDataModule,
    DetoxDataModule,
    MUSEDataModule,
    TOFUDataModule,
    WMDPDataModule,
)

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
BENCHMARKS = {
    "tofu": TOFUDataModule,
    "wmdp": WMDPDataModule,
    "copyright": CopyrightDataModule,
    "detox": DetoxDataModule,
    "muse": MUSEDataModule,
}
METHODS = {"graddiff": "GradDiff", "npo": "NPO", "po": "PO"}


def models(benchmark):
    """Configurations of the two models of 7 billion weights on which a benchmark runs."""
    llama = "llama2-7b-chat" if benchmark in ("tofu", "wmdp") else "llama2-7b"
    own = (CONFIGS / benchmark / f"{llama}.yaml").is_file()
    return [f"{benchmark if own else 'model'}/{llama}", "model/zephyr-7b-beta"]


def tasks(benchmark):
    """Task -> the configurations that make it, without the model."""
    scale = "_7b" if benchmark == "tofu" else ""
    found = {
        "attribute": [f"{benchmark}/data{scale}", "paper/attribute"],
        "test": [f"{benchmark}/data{scale}", "task/test"],
    }
    for method in METHODS:
        found[method] = [f"{benchmark}/unlearn{scale}", f"method/{method}"]
    if benchmark == "wmdp":
        found["rmu"] = ["wmdp/rmu"]
    if (CONFIGS / benchmark / f"finetune{scale}.yaml").is_file():
        found["finetune"] = [f"{benchmark}/finetune{scale}"]
    return found


RUNS = {
    f"{benchmark}-{model.partition('/')[2]}-{task}": (benchmark, task, [*names, model])
    for benchmark in BENCHMARKS
    for model in models(benchmark)
    for task, names in tasks(benchmark).items()
}
EACH = pytest.mark.parametrize(("benchmark", "task", "names"), RUNS.values(), ids=RUNS)


def build(monkeypatch, tiny_model, names, options=()):
    """The CLI object of configurations put together, before it runs anything."""
    command = "test" if "task/test" in names else "fit"
    monkeypatch.setattr(lightning_cli.WagleCLI, "_run_subcommand", lambda self, subcommand: None)
    arguments = [part for name in names for part in ("--config", str(name))]
    quiet = ("--model.model", tiny_model, "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    return cli.run([command, *arguments, *quiet, "--trainer.logger", "false", *options])


def merged(*names):
    """All layers of configurations as one dict, later ones over earlier ones."""

    def over(below, above):
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        return {**below, **{key: over(below.get(key), value) for key, value in above.items()}}

    content = {}
    args = expand([part for name in names for part in ("--config", str(name))])
    for layer in args[1::2]:
        content = over(content, yaml.safe_load(layer))
    return content


@EACH
def test_it_makes_its_objects(monkeypatch, tiny_model, tmp_path, benchmark, task, names):
    monkeypatch.chdir(tmp_path)
    built = build(monkeypatch, tiny_model, names)
    assert isinstance(built.model, LightningModule)
    assert isinstance(built.datamodule, LightningDataModule)
    assert type(built.datamodule) is BENCHMARKS[benchmark]
    kinds = {
        "attribute": "AttributionModule",
        "finetune": "FinetuneModule",
        "test": "EvaluationModule",
    }
    kind = kinds.get(task, "UnlearnModule")
    assert type(built.model).__name__ == kind
    given = merged(*names)
    model = names[-1].partition("/")[2]
    assert given["model"]["init_args"]["output"].startswith(f"runs/{benchmark}/{model}/")
    if kind == "UnlearnModule":
        assert type(built.model.objective).__name__ == {**METHODS, "rmu": "RMU"}[task]
        optimizer = built.model.make_optimizer([torch.nn.Parameter(torch.zeros(2))])
        assert optimizer.defaults["lr"] == given["optimizer"]["init_args"]["lr"]
    assert built.trainer.precision == "bf16-true"


@EACH
def test_the_mask_is_one_that_attribution_writes(
    monkeypatch, tiny_model, tmp_path, benchmark, task, names
):
    """And the model is the one that it was made for: another is refused."""
    if task not in METHODS:
        return
    monkeypatch.chdir(tmp_path)
    attribute = [*tasks(benchmark)["attribute"], names[-1]]
    made = build(monkeypatch, tiny_model, attribute).model
    unlearned, attributed = (merged(*n)["model"]["init_args"] for n in (names, attribute))
    folder = attributed["output"]
    assert unlearned["mask"] in [f"{folder}/{name}.safetensors" for name in made.mask_names]
    assert unlearned["model"] == attributed["model"]


def test_the_published_numbers():
    """Against the public code of the papers, see the comments in the files."""

    def numbers(*names):
        content = merged(*names)
        trainer = content["trainer"]
        rows = content["data"]["init_args"]["batch_size"] * trainer["accumulate_grad_batches"]
        lr = content["optimizer"]["init_args"]["lr"]
        return lr, rows, trainer["max_epochs"], trainer.get("max_steps", -1)

    def unlearn(benchmark, model, method):
        return numbers(*tasks(benchmark)[method], model)

    llama, zephyr = "tofu/llama2-7b-chat", "model/zephyr-7b-beta"
    assert unlearn("tofu", llama, "graddiff") == (7e-6, 4, 5, -1)
    assert unlearn("tofu", llama, "npo") == (1e-5, 4, -1, 400)
    assert unlearn("tofu", llama, "po") == (2e-5, 4, 5, -1)
    assert numbers("tofu/finetune_7b", llama) == (1e-5, 32, 5, -1)
    assert unlearn("wmdp", zephyr, "graddiff") == (5e-6, 4, -1, 500)
    assert unlearn("wmdp", zephyr, "npo") == (1e-5, 4, -1, 500)
    assert numbers("wmdp/rmu", zephyr) == (5e-5, 4, -1, 150)
    assert unlearn("detox", "detox/llama2-7b", "po") == (1e-5, 4, 10, -1)
    assert unlearn("muse", "model/llama2-7b", "npo") == (1e-5, 32, 10, -1)


@pytest.mark.parametrize(
    ("benchmark", "densities"),
    [("tofu", (0.95, 0.95, 0.8)), ("wmdp", (0.4, 0.6, 0.8)), ("copyright", (0.95, 0.95, 0.8))],
)
def test_the_published_densities(benchmark, densities):
    for method, density in zip(METHODS, densities, strict=True):
        mask = merged(*tasks(benchmark)[method], models(benchmark)[0])["model"]["init_args"]["mask"]
        assert mask.endswith(f"wagle-{density}.safetensors")


@EACH
def test_clipping_is_that_of_the_papers_code(benchmark, task, names):
    """It clips the norm of all gradients, then masks (src/unlearn/base.py, ``clip_grad_norm_`` before
    ``mask_gradient``); RMU's does not clip."""
    if task not in (*METHODS, "rmu"):
        return
    content = merged(*names)
    clips = content["trainer"].get("gradient_clip_val") is not None
    assert clips is (task != "rmu")
    assert content["model"]["init_args"]["clip_scope"] == ("all" if clips else "selected")


def test_commands_under_zero_clip_as_zero_can():
    """ZeRO keeps no whole gradients: the configurations' own clip_scope is refused there."""
    text = (
        (CONFIGS / "README.md")
        .read_text()
        .replace("\\\n", " ")
        .replace("$U", "$S --model.clip_scope selected")
    )
    clipped = [
        line
        for line in text.splitlines()
        if re.search(r"--config \w+/unlearn\w* .*(strategy/zero3 |\$S)", line)
        and "people/" not in line
    ]
    assert clipped and all("--model.clip_scope selected" in line for line in clipped)


def test_the_small_tasks_combine_with_every_method(monkeypatch, tiny_model, tmp_path):
    monkeypatch.chdir(tmp_path)
    for data, (method, objective) in product(("tofu", "own"), METHODS.items()):
        built = build(monkeypatch, tiny_model, [f"{data}/data", "task/unlearn", f"method/{method}"])
        assert type(built.model.objective).__name__ == objective
        assert str(built.model.output) == f"runs/{data}/{method}"
    built = build(monkeypatch, tiny_model, ["people/unlearn", "method/graddiff"])
    assert type(built.model.objective).__name__ == "GradDiff"


def test_ranks_of_a_cpu_are_a_layer_over_zero():
    trainer = merged("strategy/zero3", "strategy/cpu")["trainer"]
    assert trainer["strategy"]["init_args"] == {"stage": 3, "param_persistence_threshold": 0}
    assert (trainer["accelerator"], trainer["devices"]) == ("cpu", 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wmdp/unlearn"], "run.name has no value; add --config model/"),
        (["wmdp/unlearn", "model/zephyr-7b-beta"], "run.method has no value; add --config method/"),
        (["wmdp/unlern"], "config file wmdp/unlern does not exist; did you mean wmdp/unlearn?"),
    ],
)
def test_a_layer_that_is_missing_is_named(fails, names, message):
    args = [part for name in names for part in ("--config", name)]
    assert message in fails("fit", *args, data=False)


def test_names_are_filled_in(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "run:\n  folder: runs/${run.name}\n  lr: {x: 1.0e-3, y: 2}\n  none: null\n"
        "p: ${run.folder}/m\nlr: ${run.lr}\nlist:\n- ${run.none}\n- ${other.name}\n"
    )
    args = ["fit", "--config", f"{tmp_path}/a.yaml", "--run.name", "z", "--run.method=x"]
    command, _, content = expand(args)
    assert command == "fit" and yaml.safe_load(content) == {
        "p": "runs/z/m",
        "lr": 1e-3,
        "list": [None, "${other.name}"],
    }


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
    model = ("--config", "model/zephyr-7b-beta")
    attribute = ("--config", "wmdp/data", "--config", "paper/attribute")
    wagle("fit", *attribute, *model, *own, data=False)
    for name, options in (
        ("npo", ()),
        ("po", ("--data.prompt_size", "5")),
        ("rmu", ("--model.objective.layer", "1")),
    ):
        arguments = (
            "fit",
            *(part for layer in tasks("wmdp")[name] for part in ("--config", layer)),
            *model,
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
    for task, options in (
        ("finetune", ("--model.model", tiny_model)),
        ("attribute", ("--data.prompt_size", "10")),
        ("graddiff", ("--data.prompt_size", "10")),
    ):
        names = [*tasks("copyright")[task], "model/llama2-7b"]
        layers = [part for name in names for part in ("--config", name)]
        wagle("fit", *layers, *own, *options, data=False)
    assert (tmp_path / "runs/copyright/llama2-7b/graddiff/model.safetensors").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_files_are_few_and_short_and_say_what_they_are(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 40
    assert len(FILES) <= 50


@pytest.mark.parametrize(
    "readme", sorted(CONFIGS.rglob("*.md")), ids=lambda file: str(file.relative_to(CONFIGS))
)
def test_the_commands_of_a_readme_name_files_that_exist(readme):
    named = re.findall(r"--config ([\w/.-]+)", readme.read_text())
    assert named
    for name in named:
        assert (CONFIGS / f"{name}.yaml").is_file(), name


def test_an_unknown_option_is_refused(monkeypatch, tiny_model, tmp_path, capsys):
    """In a file that builds on one of ours by name."""
    own = tmp_path / "own.yaml"
    own.write_text("base: [wmdp/unlearn, method/npo]\ndata:\n  init_args:\n    chunk: 5\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        build(monkeypatch, tiny_model, [own, "model/zephyr-7b-beta"])
    assert "chunk" in capsys.readouterr().err
