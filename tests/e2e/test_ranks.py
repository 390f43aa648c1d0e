"""Several ranks give the answer that one device gives: DDP and DeepSpeed ZeRO, on two processes over gloo."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import data_options, difference, weights, write_rows
from ranks import Ranks
from torch import Tensor

from wagle_pl.cli import app as cli
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("empty_folder")

STRATEGIES = ["ddp", "zero1", "zero2", "zero3"]
ZERO = STRATEGIES[1:]


def strategy(name: str, devices: int = 2) -> list[str]:
    """Options of a strategy; ZeRO-3 so that no parameter of the tiny model stays whole."""
    options = ["--trainer.accelerator", "cpu", "--trainer.devices", str(devices)]
    if name.startswith("zero"):
        options += ["--trainer.strategy", "ZeRO", "--trainer.strategy.stage", name[-1]]
        options += ["--trainer.strategy.param_persistence_threshold", "0"]
    elif name != "one":
        options += ["--trainer.strategy", name]
    return options


@pytest.fixture
def command(tiny_model: str, rows: dict[str, str]) -> Callable[..., list[str]]:
    """Arguments of a fit of a module on the shared rows."""

    def make(module: str, *options: Any, model: str = tiny_model, **named: Any) -> list[str]:
        quiet = [
            part
            for name in (
                "enable_progress_bar",
                "enable_model_summary",
                "logger",
                "enable_checkpointing",
            )
            for part in (f"--trainer.{name}", "false")
        ]
        named = {"trainer.max_steps": 10, "trainer.max_epochs": 20, **named}
        files = data_options(rows)
        given = [part for name, value in named.items() for part in (f"--{name}", str(value))]
        return [
            "fit",
            "--model",
            module,
            "--model.model",
            model,
            *files,
            *quiet,
            *map(str, options),
            *given,
        ]

    return make


@pytest.fixture
def run(ranks: Ranks, wagle: Any, command: Any) -> Callable[..., Any]:
    """Fit with a strategy into the folder of its name: ``one`` in this process, others on the ranks."""

    def fit(name: str, module: str, *options: Any, **named: Any) -> Path:
        output = named.pop("output", name)
        devices = 1 if name == "one" else 2
        arguments = command(
            module, "--model.output", output, *options, *strategy(name, devices), **named
        )
        if name == "one":
            wagle(*arguments, data=False)
        else:
            ranks(*arguments)
        return Path(output)

    return fit


def frozen_moved(folder: Path, tiny_model: str, mask: WeightMask) -> int:
    """How many frozen weights of an exported model are not the base's, bit for bit."""
    before, after = weights(Path(tiny_model)), weights(folder)
    return sum(int((before[n] != after[n])[~mask[n]].sum()) for n in mask)


@pytest.fixture
def mask(tiny_model: str) -> str:
    """A mask file with the tensors of every kind: whole, compact, nearly dense, empty."""
    model = load_model(tiny_model)
    generator = torch.Generator().manual_seed(0)
    densities = [1.0, 0.3, 0.9, 0.0, 0.5]
    bools = {
        name: torch.rand(p.shape, generator=generator) < densities[i % 5]
        for i, (name, p) in enumerate(model.named_parameters())
    }
    return str(WeightMask.from_bools(bools).save("mask"))


# -- training -----------------------------------------------------------------------------------------------------


CASES = {
    "finetune": ("FinetuneModule", {}),
    "npo": ("UnlearnModule", {"model.objective": "NPO"}),
    "po": (
        "UnlearnModule",
        {"model.objective": "PO", "trainer.gradient_clip_val": 0.5, "optimizer.weight_decay": 0.1},
    ),
    "checkpointing": (  # five steps of it: differences grow from step to step
        "UnlearnModule",
        {
            "model.objective": "GradDiff",
            "model.gradient_checkpointing": True,
            "trainer.max_steps": 5,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_split_of_a_batch_does_not_matter(run: Any, wagle: Any, case: str):
    """One device 1 x 8, accumulation 4 x 2, two devices 2 x 4, ZeRO with accumulation 2 x 2 x 2: the same weights.

    Every strategy is tried without accumulation on NPO; what is accumulated is cut across devices too.
    """
    module, named = CASES[case]
    options = ["--optimizer", "MaskedAdamW", "--optimizer.lr", "1e-3"]
    if "model.objective" in named:
        options = ["--model.objective", named["model.objective"], *options]
    named = {k: v for k, v in named.items() if k != "model.objective"}
    alone = weights(run("one", module, *options, **named, **{"data.batch_size": 8}))
    accumulated = run(
        "one",
        module,
        *options,
        output="accumulated",
        **named,
        **{"data.batch_size": 2, "trainer.accumulate_grad_batches": 4},
    )
    assert difference(alone, weights(accumulated)) < 1e-5
    for name in STRATEGIES if case == "npo" else ["zero1"]:
        folder = run(name, module, *options, **named, **{"data.batch_size": 4})
        assert difference(alone, weights(folder)) < 1e-5
    for name in ("ddp", "zero2", "zero3"):
        folder = run(
            name,
            module,
            *options,
            output=f"{name}-accumulated",
            **named,
            **{"data.batch_size": 2, "trainer.accumulate_grad_batches": 2},
        )
        assert difference(alone, weights(folder)) < 1e-5


OPTIMIZERS = [
    ["MaskedAdamW", "--optimizer.lr", "1e-3", "--optimizer.weight_decay", "0.1"],
    ["AdamW", "--optimizer.lr", "1e-3", "--optimizer.weight_decay", "0.1"],
    [
        "SGD",
        "--optimizer.lr",
        "1e-2",
        "--optimizer.momentum",
        "0.9",
        "--optimizer.weight_decay",
        "0.1",
    ],
    ["Sophia", "--optimizer.lr", "1e-4"],
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda options: options[0])
def test_frozen_means_frozen(run: Any, tiny_model: str, mask: str, optimizer: list[str]):
    """Not a bit of a frozen weight moves, whatever the strategy, and selected weights move as on one device."""
    options = ["--model.objective", "GradDiff", "--model.mask", mask, "--optimizer", *optimizer]
    named = {"trainer.gradient_clip_val": 1.0, "trainer.max_steps": 4}
    alone = weights(run("one", "UnlearnModule", *options, **named, **{"data.batch_size": 8}))
    for name in STRATEGIES:
        folder = run(name, "UnlearnModule", *options, **named, **{"data.batch_size": 4})
        assert frozen_moved(folder, tiny_model, WeightMask.load(mask)) == 0
        assert difference(alone, weights(folder)) < 1e-5
        record = json.loads((folder / "wagle.json").read_text())["lineage"][-1]
        assert "bit-identical" in record["verified"]


def test_frozen_means_frozen_with_a_communication_hook(run: Any, tiny_model: str, mask: str):
    """PowerSGD changes all entries of the gradients that it is given."""
    options = [
        "--model.objective",
        "GradDiff",
        "--model.mask",
        mask,
        "--optimizer",
        "AdamW",
        "--optimizer.lr",
        "1e-3",
        "--optimizer.weight_decay",
        "0.1",
    ]
    folder = run("power_sgd", "UnlearnModule", *options, output="power", **{"trainer.max_steps": 6})
    assert frozen_moved(folder, tiny_model, WeightMask.load(mask)) == 0
    assert difference(weights(Path(tiny_model)), weights(folder)) > 1e-3


def test_precisions_and_strategies_move_selected_weights_alike(
    run: Any, tiny_model: str, mask: str
):
    """Values and state are fp32 in every one of them; what is computed in bf16 is a little off."""
    options = ["--model.objective", "GradDiff", "--model.mask", mask, "--model.lr", "3e-4"]
    options += ["--model.output_dtype", "float32"]
    before, bits = weights(Path(tiny_model)), WeightMask.load(mask)

    def update(name: str, precision: str, own: list[str] = options) -> Tensor:
        named = {"trainer.precision": precision, "data.batch_size": 8 if name == "one" else 4}
        after = weights(run(name, "UnlearnModule", *own, output=f"{name}-{precision}", **named))
        return torch.cat([(after[n].double() - before[n].double())[bits[n]] for n in before])

    exact = update("one", "32-true")
    for name, precision in [("one", "bf16-true"), ("one", "bf16-mixed"), ("ddp", "bf16-true")]:
        assert (
            float(torch.nn.functional.cosine_similarity(update(name, precision), exact, dim=0))
            > 0.98
        ), (
            name,
            precision,
        )
    for name in ZERO:  # written in the dtype of the model
        moved = update(name, "bf16-true", options[:-2])
        assert float(torch.nn.functional.cosine_similarity(moved, exact, dim=0)) > 0.95, name


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_an_odd_number_of_selected_weights(run: Any, tiny_model: str, mask: str, name: str):
    """DeepSpeed's buckets, no larger than what is trained, must hold an even number."""
    bits = WeightMask.load(mask)
    bools = {parameter: bits[parameter] for parameter in bits}
    if bits.count() % 2 == 0:
        first = next(parameter for parameter in bits if bits.count(parameter))
        bools[first].view(-1)[int(bools[first].view(-1).int().argmax())] = False
    odd = WeightMask.from_bools(bools)
    assert odd.count() % 2
    options = ["--model.objective", "GradDiff", "--model.mask", str(odd.save("odd"))]
    folder = run(name, "UnlearnModule", *options, output="odd-out", **{"trainer.max_steps": 2})
    assert frozen_moved(folder, tiny_model, odd) == 0


@pytest.mark.parametrize("name", ZERO)
def test_frozen_means_frozen_in_bf16(run: Any, tiny_model: str, mask: str, name: str):
    """Loading rounds the model's fp32 weights; what was frozen is written as it was stored."""
    folder = run(
        name,
        "UnlearnModule",
        "--model.objective",
        "GradDiff",
        "--model.mask",
        mask,
        "--optimizer",
        "AdamW",
        "--optimizer.weight_decay",
        "0.1",
        **{"trainer.precision": "bf16-true", "data.batch_size": 4},
    )
    before, after, bits = weights(Path(tiny_model)), weights(folder), WeightMask.load(mask)
    assert all(torch.equal(before[n][~bits[n]], after[n][~bits[n]]) for n in bits)
    assert any((before[n].bfloat16() != after[n].bfloat16())[bits[n]].any() for n in bits)


OBJECTIVES = {
    "KL": [],
    "RMU": ["--model.objective.layer", "1"],
    "L1Sparse": ["--model.objective.alpha", "1e-3"],
    "RandomLabel": [],
    "DPO": ["--model.objective.retain_weight", "linear:2->0.5"],
    "LoRA": [],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_of_other_kinds(run: Any, ranks: Ranks, command: Any, objective: str):
    """Whole predictions, hidden states, penalties, draws, adapters: as on one device, or refused under ZeRO-3."""
    options = ["--model.objective", objective, *OBJECTIVES[objective]]
    if objective == "LoRA":
        pytest.importorskip("peft")
        options = ["--model.objective", "GradDiff", "--model.adapter", "LoRA"]
    options += ["--optimizer", "MaskedAdamW", "--optimizer.lr", "1e-3"]
    if (
        objective == "KL"
    ):  # on retain rows it has no gradient at θ₀: with a small ε its rounding would become steps
        options += ["--optimizer.eps", "1e-5"]
    named = {"trainer.max_steps": 4}
    alone = weights(run("one", "UnlearnModule", *options, **named, **{"data.batch_size": 8}))
    for name in ("ddp", "zero2"):
        assert (
            difference(
                alone,
                weights(run(name, "UnlearnModule", *options, **named, **{"data.batch_size": 4})),
            )
            < 1e-5
        )
    named |= {"model.output": "x", "data.batch_size": 4}
    if objective in ("KL", "RMU", "L1Sparse", "LoRA"):
        (said, _) = ranks(*command("UnlearnModule", *options, *strategy("zero3"), **named), code=2)
        assert "ZeRO-3" in said["error"]
    if objective == "KL":
        options = ["--model.objective", "KL", "--model.reference_logits", "top_k"]
        alone = weights(
            run("one", "UnlearnModule", *options, output="few", **{"data.batch_size": 8})
        )
        spread = run(
            "zero3", "UnlearnModule", *options, output="few-spread", **{"data.batch_size": 4}
        )
        assert difference(alone, weights(spread)) < 1e-5


def test_more_ranks_than_rows(ranks: Ranks, command: Any):
    answers = ranks(
        *command(
            "FinetuneModule",
            "--data.limit_forget",
            "1",
            "--model.train_on",
            "forget",
            "--model.output",
            "x",
            *strategy("ddp"),
        ),
        code=2,
    )
    assert "2 devices share 1 forget rows" in answers[0]["error"]


# -- attribution --------------------------------------------------------------------------------------------------


MASKS = json.dumps(
    [
        {"score": "wagle", "density": 0.2},
        {"score": "curvature", "density": 0.35},
        {"score": "wanda", "density": 0.1, "scope": "row"},
        {"score": "snip", "density": 0.25, "scope": "tensor"},
        {"score": "gradient", "density": 0.3, "select": "low", "exclude": "embed"},
        {"score": "random", "density": 0.5},
        {"score": "fisher_ratio", "density": 0.2},
        {"score": "Modules", "name": "mlp"},
    ]
).replace(
    '{"score": "Modules"', '{"score": {"class_path": "Modules", "init_args": {"modules": ["mlp"]}}'
)


def same_masks(left: Path, right: Path) -> bool:
    """Whether two folders hold the same masks, bit for bit."""
    names = sorted(path.name for path in left.glob("*.safetensors"))
    assert names == sorted(path.name for path in right.glob("*.safetensors")) and names
    masks = [(WeightMask.load(left / name), WeightMask.load(right / name)) for name in names]
    return all(torch.equal(a.packed(n), b.packed(n)) for a, b in masks for n in a)


@pytest.mark.parametrize("hessian", ["auto", "fisher", "hutchinson"])
def test_one_mask_for_any_number_of_ranks(run: Any, hessian: str):
    """The same global batch gives the same mask file, however it is cut; so do the scores on disk."""
    named = {
        "model.masks": MASKS,
        "model.hessian": hessian,
        "trainer.max_epochs": 1,
        "trainer.max_steps": -1,
    }
    alone = run("one", "AttributionModule", **named, **{"data.batch_size": 8})
    accumulated = run(
        "one",
        "AttributionModule",
        output="accumulated",
        **named,
        **{"data.batch_size": 2, "trainer.accumulate_grad_batches": 4},
    )
    assert same_masks(alone, accumulated)
    for name in STRATEGIES[: -1 if hessian == "hutchinson" else None]:
        assert same_masks(alone, run(name, "AttributionModule", **named, **{"data.batch_size": 4}))


OWN_SCORES = """
from wagle_pl.attribution import Score

class Coarse(Score):
    needs = ()
    by_row = True

    def __call__(self, w):
        return (w.theta * 30).round()

class Whole(Score):
    needs = ("g_f",)

    def __call__(self, w):
        return w.g_f / w.g_f.norm()
"""


def test_ties_and_whole_parameters(run: Any, monkeypatch: pytest.MonkeyPatch):
    """Ties are cut at the same weight wherever ranks part a tensor; a score may look at whole parameters."""
    Path("own_scores.py").write_text(OWN_SCORES)
    monkeypatch.syspath_prepend(os.getcwd())
    masks = [
        {"score": "own_scores.Coarse", "density": d, "scope": scope, "name": f"coarse-{scope}-{d}"}
        for d in (0.03, 0.21, 0.5, 0.77)
        for scope in ("global", "tensor", "row")
    ]
    named = {
        "model.masks": json.dumps([*masks, {"score": "own_scores.Whole", "density": 0.3}]),
        "trainer.max_epochs": 1,
        "trainer.max_steps": -1,
    }
    alone = run("one", "AttributionModule", **named, **{"data.batch_size": 8})
    for name in ("ddp", "zero3"):
        assert same_masks(alone, run(name, "AttributionModule", **named, **{"data.batch_size": 4}))


def test_scores_of_several_ranks(run: Any):
    from wagle_pl.attribution.stored import StoredScores

    named = {"model.save_scores": "fp32", "trainer.max_epochs": 1, "trainer.max_steps": -1}
    folders = [
        run(name, "AttributionModule", **named, **{"data.batch_size": size})
        for name, size in (("one", 8), ("zero2", 4), ("zero3", 4))
    ]
    alone, *others = (
        dict(StoredScores(folder.with_suffix(".scores")).stream()) for folder in folders
    )
    for other in others:
        assert difference(alone, other) < 1e-5


def test_hutchinson_needs_whole_parameters(ranks: Ranks, command: Any):
    answers = ranks(
        *command(
            "AttributionModule",
            "--model.hessian",
            "hutchinson",
            "--model.output",
            "x",
            *strategy("zero3"),
        ),
        code=2,
    )
    assert "ZeRO-3" in answers[0]["error"]


# -- checkpoints --------------------------------------------------------------------------------------------------


def checkpointing(every: int, folder: str) -> list[str]:
    """Options that keep every checkpoint in a folder."""
    callback = [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {
                "every_n_train_steps": every,
                "save_top_k": -1,
                "dirpath": folder,
                "filename": "{step}",
            },
        }
    ]
    return ["--trainer.enable_checkpointing", "true", "--trainer.callbacks", json.dumps(callback)]


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("optimizer", ["MaskedAdamW", "AdamW"])
def test_resume(run: Any, mask: str, name: str, optimizer: str):
    """Stopped and resumed under each stage: bit for bit the unbroken run's; with another number of ranks, to 1e-5."""
    options = [
        "--model.objective",
        "NPO",
        "--model.mask",
        mask,
        "--optimizer",
        optimizer,
        "--optimizer.lr",
        "1e-3",
    ]
    named = {"data.batch_size": 4, "trainer.max_steps": 6}
    whole = weights(
        run(name, "UnlearnModule", *options, *checkpointing(4, "kept"), output="whole", **named)
    )
    resumed = run(
        name,
        "UnlearnModule",
        *options,
        "--ckpt_path",
        "kept/step=4.ckpt",
        output="resumed",
        **named,
    )
    assert difference(whole, weights(resumed)) == 0
    if optimizer == "AdamW":  # its state is that of MaskedAdamW, under the same names
        return
    other = "zero1" if name == "zero3" else "zero3"
    crossed = run(
        other,
        "UnlearnModule",
        *options,
        "--ckpt_path",
        "kept/step=4.ckpt",
        output="crossed",
        **named,
    )
    assert difference(whole, weights(crossed)) < 1e-5


@pytest.fixture(scope="session")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One process that runs DeepSpeed alone."""
    running = Ranks(tmp_path_factory.mktemp("lone"), count=1)
    yield running
    running.stop()


@pytest.mark.parametrize("name", ZERO)
def test_another_number_of_ranks_resumes(
    ranks: Ranks, lone: Ranks, command: Any, mask: str, name: str
):
    """Two ranks' checkpoint goes on with one, one's with two, at the same global batch."""
    options = [
        "--model.objective",
        "GradDiff",
        "--model.mask",
        mask,
        "--optimizer",
        "MaskedAdamW",
        "--optimizer.lr",
        "1e-3",
    ]

    def fit(of: Ranks, output: str, *more: str) -> dict[str, Tensor]:
        count = len(of.processes)
        of(
            *command(
                "UnlearnModule",
                "--model.output",
                output,
                *options,
                *more,
                *strategy(name, count),
                **{"data.batch_size": 8 // count, "trainer.max_steps": 6},
            )
        )
        return weights(Path(output))

    two = fit(ranks, "two", *checkpointing(3, "kept-two"))
    one = fit(lone, "one", *checkpointing(3, "kept-one"))
    assert difference(one, two) < 1e-5
    assert difference(two, fit(lone, "two-one", "--ckpt_path", "kept-two/step=3.ckpt")) < 1e-5
    assert difference(one, fit(ranks, "one-two", "--ckpt_path", "kept-one/step=3.ckpt")) < 1e-5


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_attribution_resumes(ranks: Ranks, lone: Ranks, run: Any, command: Any, name: str):
    named = {
        "model.masks": MASKS,
        "trainer.max_epochs": 1,
        "trainer.max_steps": -1,
        "data.batch_size": 2,
    }
    whole = run(name, "AttributionModule", *checkpointing(2, "kept"), output="whole", **named)
    assert same_masks(
        whole,
        run(name, "AttributionModule", "--ckpt_path", "kept/step=2.ckpt", output="on", **named),
    )
    if name != "ddp":
        named |= {"data.batch_size": 4}
        lone(
            *command(
                "AttributionModule",
                "--model.output",
                "alone",
                "--ckpt_path",
                "kept/step=2.ckpt",
                *strategy(name, 1),
                **named,
            )
        )
        assert same_masks(whole, Path("alone"))


CUTS = {
    "one": (2, 4),
    "ddp": (4, 1),
    "zero2": (1, 4),
    "lone2": (4, 2),
}  # batch size and accumulation of 8 rows


@pytest.mark.parametrize(
    "first, second", [("ddp", "one"), ("one", "ddp"), ("zero2", "lone2"), ("lone2", "zero2")]
)
@pytest.mark.parametrize("module", ["UnlearnModule", "AttributionModule"])
def test_another_cut_goes_on(
    ranks: Ranks,
    lone: Ranks,
    wagle: Any,
    command: Any,
    mask: str,
    module: str,
    first: str,
    second: str,
):
    """Two ranks' run goes on with one, and the other way, with other micro-batches: within an epoch and at its end."""

    trains = module == "UnlearnModule"
    adamw = ["--optimizer", "MaskedAdamW", "--optimizer.lr", "1e-3"]
    kind = (
        ["--model.objective", "GradDiff", "--model.mask", mask, *adamw]
        if trains
        else ["--model.masks", MASKS]
    )

    def fit(name: str, output: str, *more: str) -> Path:
        size, accumulate = CUTS[name]
        named = {"data.batch_size": size, "trainer.accumulate_grad_batches": accumulate}
        named |= {"trainer.max_epochs": 3 if trains else 1, "trainer.max_steps": -1}
        kept = strategy(name.replace("lone", "zero"), 1 if name in ("one", "lone2") else 2)
        arguments = command(module, "--model.output", output, *kind, *more, *kept, **named)
        if name == "one":
            wagle(*arguments, data=False)
        else:
            (lone if name == "lone2" else ranks)(*arguments)
        return Path(output)

    whole = fit(first, "whole", *checkpointing(1, "kept"))
    for step in (3, 4) if trains else (1,):
        on = fit(second, f"on-{step}", "--ckpt_path", f"kept/step={step}.ckpt")
        assert difference(weights(whole), weights(on)) < 1e-5 if trains else same_masks(whole, on)


def test_a_checkpoint_without_a_shard(ranks: Ranks, run: Any, command: Any):
    run("zero3", "FinetuneModule", *checkpointing(2, "kept"), **{"trainer.max_steps": 2})
    os.remove("kept/step=2.ckpt/rank-00001-of-00002.safetensors")
    answers = ranks(
        *command(
            "FinetuneModule",
            "--model.output",
            "x",
            "--ckpt_path",
            "kept/step=2.ckpt",
            *strategy("zero3"),
        ),
        code=2,
    )
    assert "lacks the shard rank-00001-of-00002.safetensors" in answers[0]["error"]


@pytest.mark.parametrize("name", ["one", "ddp", "zero2", "zero3"])
def test_export(run: Any, mask: str, name: str, capsys: pytest.CaptureFixture[str]):
    """A checkpoint of the last step becomes the folder that the run itself wrote, bit for bit."""
    options = ["--model.objective", "GradDiff", "--model.mask", mask, *checkpointing(2, "kept")]
    folder = run(name, "UnlearnModule", *options, **{"trainer.max_steps": 4, "data.batch_size": 4})
    cli.main(["export", "kept/step=4.ckpt", "-o", "exported"])
    assert capsys.readouterr().out.splitlines()[-1] == "model written to exported"
    assert difference(weights(folder), weights(Path("exported"))) == 0
    assert {path.name for path in Path("exported").iterdir()} == {
        path.name for path in folder.iterdir()
    }
    assert (
        load_model("exported").generation_config.to_dict()
        == load_model(str(folder)).generation_config.to_dict()
    )


@pytest.mark.parametrize("module", ["UnlearnModule", "AttributionModule"])
@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_a_checkpoint_of_the_end_gives_the_result(run: Any, name: str, module: str):
    """With nothing left to train, a resumed run writes what the first wrote."""
    options = (
        ["--model.objective", "GradDiff"]
        if module == "UnlearnModule"
        else ["--model.hessian", "fisher"]
    )
    length = {
        "trainer.max_steps": -1,
        "trainer.max_epochs": 1,
        "data.batch_size": 2,
        "trainer.accumulate_grad_batches": 1,
    }
    folder = run(name, module, *options, *checkpointing(1, "kept"), **length)
    last = max(Path("kept").iterdir(), key=lambda path: int(path.stem.partition("=")[2]))
    again = run(name, module, *options, "--ckpt_path", last, output="again", **length)
    if module == "UnlearnModule":
        assert difference(weights(folder), weights(again)) == 0
    else:
        assert WeightMask.load(folder) == WeightMask.load(again)


def test_export_merges_an_adapter(run: Any):
    pytest.importorskip("peft")
    options = [
        "--model.objective",
        "GradDiff",
        "--model.adapter",
        "LoRA",
        *checkpointing(2, "kept"),
    ]
    folder = run("one", "UnlearnModule", *options, **{"trainer.max_steps": 2, "data.batch_size": 4})
    cli.main(["export", "kept/step=2.ckpt", "-o", "exported"])
    assert difference(weights(folder), weights(Path("exported"))) < 1e-6


def test_nothing_to_export(run: Any, tiny_model: str, capsys: pytest.CaptureFixture[str]):
    named = {"trainer.max_epochs": 1, "trainer.max_steps": -1, "data.batch_size": 4}
    for name, kept in (("one", "one-kept"), ("zero2", "two-kept")):
        run(name, "AttributionModule", *checkpointing(1, kept), **named)
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", f"{kept}/step=1.ckpt", "-o", "exported"])
        assert ended.value.code == 2 and "attribution moves none" in capsys.readouterr().err
    Path("torn.ckpt").write_bytes(b"PK")
    for argument, said in (
        ("torn.ckpt", "is damaged, or no checkpoint"),
        ("missing.ckpt", "does not exist"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["export", argument, "-o", "exported"])
        assert said in capsys.readouterr().err
    assert not Path("exported").exists()


def test_a_plain_checkpoint_under_deepspeed(ranks: Ranks, run: Any, command: Any):
    run("one", "FinetuneModule", *checkpointing(2, "kept"), **{"trainer.max_steps": 2})
    answers = ranks(
        *command(
            "FinetuneModule",
            "--model.output",
            "x",
            "--ckpt_path",
            "kept/step=2.ckpt",
            *strategy("zero2"),
        ),
        code=2,
    )
    assert "written without DeepSpeed" in answers[0]["error"]


def test_a_deepspeed_checkpoint_without_deepspeed(run: Any, command: Any, fails: Any):
    run("zero2", "FinetuneModule", *checkpointing(2, "kept"), **{"trainer.max_steps": 2})
    told = fails(
        *command(
            "FinetuneModule",
            "--model.output",
            "x",
            "--ckpt_path",
            "kept/step=2.ckpt",
            *strategy("one", 1),
        ),
        data=False,
    )
    assert "written under DeepSpeed: add --trainer.strategy" in told


# -- test ---------------------------------------------------------------------------------------------------------


def test_wagle_test_on_several_ranks(
    ranks: Ranks, wagle: Any, tiny_model: str, rows: dict[str, str]
):
    """The same numbers and generations for any number of ranks; sharded generation under ZeRO-3 included."""
    uneven = [json.loads(line) for line in Path(rows["forget_test"]).read_text().splitlines()]
    for row in uneven[
        1:
    ]:  # one row has more candidates than others: ranks run different numbers of passes
        del row["perturbed_answer"]
    write_rows(Path("uneven.jsonl"), uneven)
    asked = [{"question": row["question"], "answer": row["answer"]} for row in uneven[:3]]
    mixed = [
        {"text": "Nobody asks about such a text, and nobody says more of it. " * 9}
    ] * 3 + asked
    write_rows(Path("mixed.jsonl"), mixed)  # one rank generates alone
    sets = json.dumps(
        {
            "forget": rows["forget_test"],
            "retain": rows["retain_test"],
            "uneven": "uneven.jsonl",
            "mixed": "mixed.jsonl",
        }
    )
    common = [
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        tiny_model,
        "--model.max_new_tokens",
        "12",
        *data_options(rows),
        "--data.test",
        sets,
        "--data.test_batch_size",
        "1",
        "--trainer.logger",
        "false",
        "--trainer.enable_progress_bar",
        "false",
    ]
    wagle(*common, "--model.output", "one", *strategy("one", 1), data=False)
    expected = json.loads(Path("one/metrics.json").read_text())
    texts = pq.read_table("one/forget.parquet").to_pydict()
    assert expected and len(texts["generation"]) == 5
    for name in STRATEGIES:
        here, there = ranks(*common, "--model.output", name, *strategy(name))
        assert here["metrics"] == there["metrics"]
        found = json.loads((Path(name) / "metrics.json").read_text())
        assert found == pytest.approx(expected, rel=1e-4)
        records = pq.read_table(f"{name}/forget.parquet").to_pydict()
        assert records["row"] == list(range(5)) and records["generation"] == texts["generation"]
        for mine, reference in zip(records["perturbed_nll"], texts["perturbed_nll"], strict=True):
            assert mine == pytest.approx(reference, abs=1e-4)
        assert pq.read_table(f"{name}/mixed.parquet").to_pydict()["generation"].count(None) == 3


def test_validation_on_several_ranks(run: Any, ranks: Ranks, wagle: Any, command: Any):
    """A run that is validated makes the same model as one that is not, and its measures are those of one device."""
    options = [
        "FinetuneModule",
        "--data.test_batch_size",
        "2",
        "--trainer.num_sanity_val_steps",
        "0",
    ]
    named = {
        "trainer.max_steps": 3,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 1,
    }
    for name in ("one", "ddp", "zero3"):
        run(name, *options, output=f"{name}-alone", **named)
    watched = {
        **named,
        "data.val": "[retain, forget]",
        "trainer.callbacks": "Evaluate",
        "trainer.callbacks.val_generate": True,
        "trainer.callbacks.max_new_tokens": 8,
    }
    done = wagle(
        *command(*options, "--model.output", "one", *strategy("one", 1), **watched), data=False
    )
    expected = {
        k: float(v) for k, v in done.trainer.callback_metrics.items() if k.startswith("val/")
    }
    assert {"val/forget/probability", "val/forget/rougeL_recall", "val/retain/probability"} <= set(
        expected
    )
    for name in ("ddp", "zero3"):
        answers = ranks(*command(*options, "--model.output", name, *strategy(name), **watched))
        for answer in answers:
            assert {k: answer["logged"][k] for k in expected} == pytest.approx(expected, rel=5e-3)
    for name in ("one", "ddp", "zero3"):
        plain, found = weights(Path(f"{name}-alone")), weights(Path(name))
        assert all(torch.equal(plain[each], found[each]) for each in plain)
