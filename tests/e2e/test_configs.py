"""Every configuration: what it is made of, the published numbers, and the objects that it makes for a tiny model."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from benchmark_folders import write_lines
from lightning import LightningModule

from wagle_pl.cli import app as cli
from wagle_pl.cli import lightning as lightning_cli
from wagle_pl.cli.parser import expand

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
BENCHMARKS = {name.lower(): name for name in ("TOFU", "WMDP", "Copyright", "Detox", "MUSE")}
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


def layers(*names):
    return [part for name in names for part in ("--config", name)]


def build(monkeypatch, tiny_model, names, options=()):
    """The CLI object of configurations put together, before it runs anything."""
    command = "test" if "task/test" in names else "fit"
    monkeypatch.setattr(lightning_cli.WagleCLI, "_run_subcommand", lambda self, subcommand: None)
    arguments = layers(*map(str, names))
    quiet = ("--model.model", tiny_model, "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    return cli.run([command, *arguments, *quiet, "--trainer.logger", "false", *options])


def merged(*names):
    """All layers of configurations as one dict, later ones over earlier ones."""

    def over(below, above):
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        return {**below, **{key: over(below.get(key), value) for key, value in above.items()}}

    content = {}
    args = expand(layers(*names))
    for layer in args[1::2]:
        content = over(content, yaml.safe_load(layer))
    return content


@pytest.mark.parametrize(("benchmark", "task", "names"), RUNS.values(), ids=RUNS)
def test_it_makes_its_objects(monkeypatch, tiny_model, tmp_path, benchmark, task, names):
    monkeypatch.chdir(tmp_path)
    built = build(monkeypatch, tiny_model, names)
    given = merged(*names)
    kinds = {"attribute": "Attribution", "finetune": "Finetune", "test": "Evaluation"}
    kind = f"{kinds.get(task, 'Unlearn')}Module"
    assert isinstance(built.model, LightningModule) and type(built.model).__name__ == kind
    assert type(built.datamodule).__name__ == f"{BENCHMARKS[benchmark]}DataModule"
    assert built.trainer.precision == "bf16-true"
    model = names[-1].partition("/")[2]
    assert given["model"]["init_args"]["output"].startswith(f"runs/{benchmark}/{model}/")
    if kind == "AttributionModule":  # which writes the masks of the methods, for the same model
        attributed = given["model"]["init_args"]
        masks = [spec.name for spec in built.model.specs]
        written = [f"{attributed['output']}/{mask}.safetensors" for mask in masks]
        for method in METHODS:
            unlearned = merged(*tasks(benchmark)[method], names[-1])["model"]["init_args"]
            assert unlearned["mask"] in written and unlearned["model"] == attributed["model"]
    if kind == "UnlearnModule":
        assert type(built.model.objective).__name__ == {**METHODS, "rmu": "RMU"}[task]
        optimizer = built.model.make_optimizer([torch.nn.Parameter(torch.zeros(2))])
        assert optimizer.defaults["lr"] == given["optimizer"]["init_args"]["lr"]
        # the papers' code clips the norm of all gradients, then masks (src/unlearn/base.py,
        # ``clip_grad_norm_`` before ``mask_gradient``); RMU's does not clip
        clips = given["trainer"].get("gradient_clip_val") is not None
        assert clips is (task != "rmu")
        assert given["model"]["init_args"]["clip_scope"] == ("all" if clips else "selected")


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
    tuned = merged("tofu/finetune_7b", llama)["model"]["init_args"]
    assert tuned["warmup"] == 1 / 5  # the first epoch
    assert numbers("copyright/finetune", "model/llama2-7b") == (1e-5, 16, 10, -1)
    decay = merged("copyright/finetune", "model/llama2-7b")["optimizer"]["init_args"]
    assert decay["weight_decay"] == 0.01
    assert unlearn("wmdp", zephyr, "graddiff") == (5e-6, 4, -1, 500)
    assert unlearn("wmdp", zephyr, "npo") == (1e-5, 4, -1, 500)
    assert numbers("wmdp/rmu", zephyr) == (5e-5, 4, -1, 150)
    assert unlearn("detox", "model/llama2-7b", "po") == (1e-5, 4, 10, -1)
    assert unlearn("muse", "model/llama2-7b", "npo") == (1e-5, 32, 10, -1)


@pytest.mark.parametrize(
    ("benchmark", "densities"),
    [("tofu", (0.95, 0.95, 0.8)), ("wmdp", (0.4, 0.6, 0.8)), ("copyright", (0.95, 0.95, 0.8))],
)
def test_the_published_densities(benchmark, densities):
    for method, density in zip(METHODS, densities, strict=True):
        mask = merged(*tasks(benchmark)[method], models(benchmark)[0])["model"]["init_args"]["mask"]
        assert mask.endswith(f"wagle-{density}.safetensors")


#: Method -> class and options in OpenUnlearning's configurations, its gamma of the forget term as ``forget_weight``
#: and its alpha as ``retain_weight``.
OPEN_UNLEARNING = {
    "altpo": ("AltPO", {"beta": 0.1, "forget_weight": 1, "retain_weight": 1}),
    "ceu": ("CEU", {"skip_first": 1, "retain_weight": 0}),
    "dpo": ("DPO", {"beta": 0.1, "forget_weight": 1, "retain_weight": 1}),
    "gradascent": ("GradAscent", {"retain_weight": 0}),
    "graddiff": ("GradDiff", {"forget_weight": 1, "retain_weight": 1}),
    "npo": ("NPO", {"beta": 0.1, "forget_weight": 1, "retain_weight": 1}),
    "pdu": ("PDU", {"epsilon": 0.3, "dual_step": 5, "dual_warmup": 5, "retain_weight": 100}),
    "rmu": ("RMU", {"layer": 7, "steering": 2, "forget_weight": 1, "retain_weight": 1}),
    "satimp": ("SatImp", {"beta1": 5, "beta2": 1, "forget_weight": 0.1, "retain_weight": 1}),
    "simnpo": ("SimNPO", {"beta": 4.5, "gamma": 0, "forget_weight": 0.125, "retain_weight": 1}),
    "undial": ("UNDIAL", {"beta": 10, "positions": "batch", "retain_weight": 0}),
    "wga": ("WGA", {"beta": 1, "forget_weight": 1, "retain_weight": 1}),
}


def test_the_defaults_of_open_unlearning(monkeypatch, tiny_model, tmp_path):
    """After a configuration whose objective has options of its own."""
    monkeypatch.chdir(tmp_path)
    names = ["people/unlearn", "method/open-unlearning"]
    for method, (name, options) in OPEN_UNLEARNING.items():
        built = build(monkeypatch, tiny_model, names, ("--run.method", method))
        objective = built.model.objective
        assert str(built.model.output).endswith(method)
        assert type(objective).__name__ == name
        assert options == {option: getattr(objective, option) for option in options}


def test_commands_under_zero_clip_as_zero_can():
    """ZeRO keeps no whole gradients: the configurations' own clip_scope is refused there."""
    text = (CONFIGS / "README.md").read_text().replace("\\\n", " ")
    text = text.replace("$U", "$S --model.clip_scope selected")
    sharded = re.compile(r"--config (?!people/)\w+/unlearn\w* .*(strategy/zero3 |\$S)")
    clipped = [line for line in text.splitlines() if sharded.search(line)]
    assert clipped and all("--model.clip_scope selected" in line for line in clipped)


def test_the_small_tasks_combine_with_every_method(monkeypatch, tiny_model, tmp_path):
    monkeypatch.chdir(tmp_path)
    for data, (method, objective) in product(("tofu", "own"), METHODS.items()):
        built = build(monkeypatch, tiny_model, [f"{data}/data", "task/unlearn", f"method/{method}"])
        assert type(built.model.objective).__name__ == objective
        assert str(built.model.output) == f"runs/{data}/{method}"
    built = build(monkeypatch, tiny_model, ["people/unlearn", "method/graddiff"])
    assert type(built.model.objective).__name__ == "GradDiff"


@pytest.mark.parametrize("name", ["KnowUnDo", "LUME", "RWKU"])
def test_a_benchmark_without_files_takes_the_base(monkeypatch, tiny_model, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    options = ("--data", f"{name}DataModule", "--run.folder", "runs/own", "--run.target", "MODEL")
    for task, kind in (
        ("attribute", "Attribution"),
        ("unlearn", "Unlearn"),
        ("test", "Evaluation"),
    ):
        names = ["base", f"task/{task}", *(["method/npo"] if task == "unlearn" else [])]
        built = build(monkeypatch, tiny_model, names, options)
        assert type(built.model).__name__ == f"{kind}Module"
        assert type(built.datamodule).__name__ == f"{name}DataModule"
        assert str(built.model.output).startswith("runs/own/")


def test_ranks_of_a_cpu_are_a_layer_over_zero():
    trainer = merged("strategy/zero3", "strategy/cpu")["trainer"]
    assert trainer["strategy"]["init_args"] == {"stage": 3, "param_persistence_threshold": 0}
    assert (trainer["accelerator"], trainer["devices"]) == ("cpu", 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wmdp/unlearn"], "run.name has no value; add a --config of a model (model/"),
        (
            ["wmdp/unlearn", "model/zephyr-7b-beta"],
            "has no value; add a --config of a model (model/zephyr-7b-beta) or of a method (method/",
        ),
        (["wmdp/unlern"], "config file wmdp/unlern does not exist; did you mean wmdp/unlearn?"),
    ],
)
def test_a_layer_that_is_missing_is_named(fails, names, message):
    assert message in fails("fit", *layers(*names), data=False)


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
def own(tmp_path):
    """Options for a few harmless rows in the places where WMDP and the book are looked for."""
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
        "retain": texts[6:],
    }
    for name, rows in files.items():
        write_lines(tmp_path / f"data/{name}.jsonl", rows)
    options = {"accelerator": "cpu", "devices": "1", "logger": "false", "callbacks": "null"}
    options |= {"enable_progress_bar": "false"}
    trainer = [part for name, value in options.items() for part in (f"--trainer.{name}", value)]
    return ("--data.folder", tmp_path / "data", *trainer)


def test_wmdp_from_attribution_to_unlearning(wagle, tiny_model, tmp_path, own):
    own += ("--data.max_length", "40", "--model.model", tiny_model)
    model = "model/zephyr-7b-beta"
    wagle("fit", *layers("wmdp/data", "paper/attribute", model), *own, data=False)
    own += ("--trainer.max_steps", "2", "--trainer.enable_checkpointing", "false")
    for name, options, density in (
        ("npo", (), 0.6),
        ("po", ("--data.prompt_size", "5"), 0.8),
        ("rmu", ("--model.objective.layer", "1"), None),
    ):
        arguments = (*layers(*tasks("wmdp")[name], model), *own, *options)
        module = wagle("fit", *arguments, data=False).model
        assert module.global_step == 2 and module.mask is not None
        assert density is None or module.mask.density == pytest.approx(density, abs=1e-3)
        assert (tmp_path / f"runs/wmdp/zephyr-7b-beta/{name}/model.safetensors").exists()


def test_a_book_from_target_to_unlearning(wagle, tmp_path, tiny_model, own):
    own += ("--data.chunk_size", "30", "--data.retain", tmp_path / "data/retain.jsonl")
    own += ("--trainer.max_epochs", "1")
    for task, options in (
        ("finetune", ("--model.model", tiny_model)),
        ("attribute", ("--data.prompt_size", "10")),
        ("graddiff", ("--data.prompt_size", "10")),
    ):
        names = layers(*tasks("copyright")[task], "model/llama2-7b")
        wagle("fit", *names, *own, *options, data=False)
    assert (tmp_path / "runs/copyright/llama2-7b/graddiff/model.safetensors").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_files_are_few_and_short_and_say_what_they_are(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 40
    assert len(FILES) <= 52


@pytest.mark.parametrize(
    "readme", sorted(CONFIGS.rglob("*.md")), ids=lambda file: str(file.relative_to(CONFIGS))
)
def test_the_commands_of_a_readme_name_files_that_exist(readme):
    for name in re.findall(r"--config ([\w/.-]+)", readme.read_text()):
        assert (CONFIGS / f"{name}.yaml").is_file(), name


def test_an_unknown_option_is_refused(monkeypatch, tiny_model, tmp_path, capsys):
    """In a file that builds on one of ours by name."""
    own = tmp_path / "own.yaml"
    own.write_text("base: [wmdp/unlearn, method/npo]\ndata:\n  init_args:\n    chunk: 5\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        build(monkeypatch, tiny_model, [own, "model/zephyr-7b-beta"])
    assert "chunk" in capsys.readouterr().err
