"""Several ranks give the answer that one device gives: DDP and DeepSpeed ZeRO, on two processes over gloo."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers import (
    QUIET,
    close,
    data_options,
    difference,
    fit_arguments,
    moved,
    random_bools,
    same_bits,
    slow,
    wait_for,
    weights,
    words,
    write_rows,
)
from ranks import Ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from wagle_pl.attribution.stored import StoredScores
from wagle_pl.cli import app as cli
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm.models import load_model
from wagle_pl.lm.tiny import create_tiny_llama
from wagle_pl.masks import WeightMask

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.usefixtures("empty_folder")

STRATEGIES = ["ddp", "zero1", "zero2", "zero3"]
ZERO = STRATEGIES[1:]


def strategy(name: str, devices: int = 2) -> str:
    """Options of a strategy; ZeRO-3 so that no parameter of the tiny model stays whole."""
    if name == "one":
        return "--trainer.devices 1"
    options = f"--trainer.devices {devices} --trainer.strategy "
    if not name.startswith("zero"):
        return options + name
    threshold = "--trainer.strategy.param_persistence_threshold 0"
    return f"{options} ZeRO --trainer.strategy.stage {name[-1]} {threshold}"


@pytest.fixture
def command(tiny_model: str, rows: dict[str, str]) -> Callable[..., list[str]]:
    """Arguments of a fit of a module on the shared rows."""

    def make(module: str, *options: Any) -> list[str]:
        length = (
            "--trainer.max_steps 6 --trainer.max_epochs 20 --trainer.enable_checkpointing false"
        )
        return fit_arguments(module, tiny_model, rows, length, *options)

    return make


@pytest.fixture
def run(ranks: Ranks, wagle: Any, command: Any) -> Callable[..., Path]:
    """Fit with a strategy into the folder of its name: ``one`` in this process, others on the ranks."""

    def fit(name: str, module: str, *options: Any, output: str = "") -> Path:
        output = output or name
        arguments = command(module, "--model.output", output, strategy(name), *options)
        if name == "one":
            wagle(*arguments, data=False)
        else:
            ranks(*arguments)
        return Path(output)

    return fit


@pytest.fixture(scope="session")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One process that runs DeepSpeed alone."""
    running = Ranks(tmp_path_factory.mktemp("lone"), count=1)
    yield running
    running.stop()


@pytest.fixture
def mask(tiny_model: str) -> str:
    """A mask file with the tensors of every kind: whole, compact, nearly dense, empty, rows, columns.

    It selects an odd number of weights: DeepSpeed's buckets, no larger than what is trained, must hold an even one.
    """
    generator = torch.Generator().manual_seed(0)
    densities = [1.0, 0.3, 0.9, 0.0, 0.5, 0.4, 0.6]
    bools = {}
    for i, (name, p) in enumerate(load_model(tiny_model).named_parameters()):
        numbers = torch.rand(p.shape, generator=generator)
        if p.dim() > 1 and i % 7 > 4:
            numbers = numbers.select(i % 7 - 5, 0).unsqueeze(i % 7 - 5).expand(p.shape)
        bools[name] = numbers < densities[i % 7]
    if sum(int(selected.sum()) for selected in bools.values()) % 2 == 0:
        next(iter(bools.values())).view(-1)[0] = False  # the first is selected as a whole
    made = WeightMask.from_bools(bools)
    assert made.count() % 2
    return str(made.save("mask"))


def frozen_moved(folder: Path, tiny_model: str, mask: str) -> int:
    """How many frozen weights of an exported model are not the base's, bit for bit."""
    bits, changed = WeightMask.load(mask), moved(tiny_model, folder)
    return sum(int((changed[n] & ~bits[n]).sum()) for n in bits)


# -- training -----------------------------------------------------------------------------------------------------


UNLEARN = "--optimizer MaskedAdamW --optimizer.lr 1e-3 --model.objective "
#: Module, options, strategies without accumulation and with it.
CASES = {
    "finetune": ("FinetuneModule", UNLEARN.removesuffix("--model.objective "), "zero1", "ddp"),
    "npo": ("UnlearnModule", UNLEARN + "NPO", "ddp zero1 zero2 zero3", "zero3"),
    "npo accumulating": ("UnlearnModule", UNLEARN + "NPO", "", "ddp zero2"),
    "po": (
        "UnlearnModule",
        UNLEARN + "PO --trainer.gradient_clip_val 0.5 --optimizer.weight_decay 0.1",
        "zero3",
        "zero2",
    ),
    "checkpointing": (  # five steps of it: differences grow from step to step
        "UnlearnModule",
        UNLEARN + "GradDiff --model.gradient_checkpointing true --trainer.max_steps 5",
        "ddp",
        "zero3",
    ),
}


def cut(rows: int, accumulate: int) -> str:
    """Rows a device and micro-batches a step."""
    return f"--data.batch_size {rows} --trainer.accumulate_grad_batches {accumulate}"


@pytest.mark.parametrize("case", ["finetune", "npo", *map(slow, list(CASES)[2:])])
def test_the_split_of_a_batch_does_not_matter(run: Any, case: str):
    """One device 1 x 8, accumulation 4 x 2, two devices 2 x 4, ZeRO with accumulation 2 x 2 x 2: the same weights.

    Every strategy is tried on NPO; what is accumulated is cut across devices too.
    """
    module, options, plain, accumulating = CASES[case]
    alone = run("one", module, options, cut(8, 1))
    assert close(alone, run("one", module, options, cut(2, 4), output="accumulated"))
    for name in plain.split():
        assert close(alone, run(name, module, options, cut(4, 1)))
    for name in accumulating.split():
        assert close(alone, run(name, module, options, cut(2, 2), output=f"{name}-accumulated"))


DECAY = "--optimizer.weight_decay 0.1"
ADAMW = f"AdamW --optimizer.lr 1e-3 {DECAY}"
OPTIMIZERS = [
    (f"Masked{ADAMW}", ["zero1", "zero3"]),
    slow(f"Masked{ADAMW}", ["ddp", "zero2"]),
    (ADAMW, ["ddp", "zero2"]),
    slow(ADAMW, ["zero1", "zero3"]),
    (f"SGD --optimizer.lr 1e-2 --optimizer.momentum 0.9 {DECAY}", ["zero3"]),
    ("Sophia --optimizer.lr 1e-4", ["zero1"]),
    ("SignSGD --optimizer.lr 1e-4 --optimizer.momentum 0.9", ["ddp"]),
]


@pytest.mark.parametrize(
    ("optimizer", "strategies"),
    OPTIMIZERS,
    ids=lambda value: value.split()[0] if isinstance(value, str) else "+".join(value),
)
def test_frozen_means_frozen(
    run: Any, tiny_model: str, mask: str, optimizer: str, strategies: list[str]
):
    """Not a bit of a frozen weight moves, whatever the strategy, and selected weights move as on one device."""
    options = f"--model.objective GradDiff --model.mask {mask} --optimizer {optimizer}"
    options += " --trainer.gradient_clip_val 1.0 --trainer.max_steps 4"
    alone = run("one", "UnlearnModule", options, cut(8, 1))
    for name in strategies:
        folder = run(name, "UnlearnModule", options, cut(4, 1))
        assert frozen_moved(folder, tiny_model, mask) == 0 and close(alone, folder)
        record = json.loads((folder / "wagle.json").read_text())["lineage"][-1]
        assert "bit-identical" in record["verified"]


def test_frozen_means_frozen_with_a_communication_hook(run: Any, tiny_model: str, mask: str):
    """PowerSGD changes all entries of the gradients that it is given."""
    options = f"--model.objective GradDiff --model.mask {mask} --optimizer {ADAMW}"
    folder = run("power_sgd", "UnlearnModule", options, "--trainer.max_steps 6")
    assert frozen_moved(folder, tiny_model, mask) == 0
    assert difference(weights(tiny_model), weights(folder)) > 1e-3


def test_precisions_and_strategies_move_selected_weights_alike(
    run: Any, tiny_model: str, mask: str
):
    """Values and state are fp32 in every one of them; what is computed in bf16 is a little off.

    Loading rounds the model's fp32 weights; what was frozen is written as it was stored.
    """
    options = f"--model.objective GradDiff --model.mask {mask} --optimizer AdamW"
    options += " --optimizer.lr 3e-4 --optimizer.weight_decay 0.1 --trainer.max_steps 8"
    before, bits = weights(tiny_model), WeightMask.load(mask)

    def update(name: str, precision: str, *own: str) -> Tensor:
        size = cut(8 if name == "one" else 4, 1)
        own = (options, size, f"--trainer.precision {precision}", *own)
        folder = run(name, "UnlearnModule", *own, output=f"{name}-{precision}")
        after = weights(folder)
        return torch.cat([(after[n].double() - before[n].double())[bits[n]] for n in before])

    exact = update("one", "32-true")
    for name, precision in [("one", "bf16-true"), ("one", "bf16-mixed"), ("ddp", "bf16-true")]:
        moved = update(name, precision, "--model.output_dtype float32")
        assert float(cosine_similarity(moved, exact, dim=0)) > 0.98, name
    for name in ZERO:  # written in the dtype of the model
        moved = update(name, "bf16-true")
        assert float(cosine_similarity(moved, exact, dim=0)) > 0.95, name
        assert frozen_moved(Path(f"{name}-bf16-true"), tiny_model, mask) == 0, name


#: Options, and a strategy on which they are tried.
OBJECTIVES = {
    # on retain rows KL has no gradient at θ₀: with a small ε its rounding would become steps
    "KL": ("--optimizer.eps 1e-5", "ddp"),
    "RMU": ("--model.objective.layer 1", "zero2"),
    "L1Sparse": ("--model.objective.alpha 1e-3", "zero2"),
    "RandomLabel": ("", "ddp"),
    "DPO": ("--model.objective.retain_weight linear:2->0.5", "zero2"),
    "LoRA": ("--model.adapter LoRA", "zero2"),
    "PDU": ("--model.objective.epsilon 5.5 --model.objective.dual_warmup 0", "ddp"),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_of_other_kinds(run: Any, ranks: Ranks, command: Any, objective: str):
    """Whole predictions, hidden states, penalties, draws, adapters: as on one device, or refused under ZeRO-3."""
    kind = objective
    if objective == "LoRA":
        pytest.importorskip("peft")
        kind = "GradDiff"
    own, name = OBJECTIVES[objective]
    options = words(f"{UNLEARN}{kind} {own} --trainer.max_steps 4")
    alone = run("one", "UnlearnModule", *options, cut(8, 1))
    rows = cut(4, 1) if objective != "PDU" else cut(2, 2)  # its dual weight steps once a step
    assert close(alone, run(name, "UnlearnModule", *options, rows))
    if objective in ("KL", "RMU", "L1Sparse", "LoRA"):
        (said, _) = ranks(*command("UnlearnModule", *options, strategy("zero3")), code=2)
        assert "ZeRO-3" in said["error"]


ONE_PASS = "--trainer.max_epochs 1 --trainer.max_steps -1"
SHARED_OUT = "several devices and ZeRO share sums out already"
SAM = "--model.step_rule SAM --model.step_rule.rho 0.1"


@pytest.mark.parametrize(
    ("module", "options", "name", "said"),
    [
        (
            "Finetune",
            "--data.limit_forget 1 --model.train_on forget",
            "ddp",
            "2 devices share 1 forget rows",
        ),
        (
            "Unlearn",
            SAM,
            "ddp",
            "step_rule: SAM makes gradients of its own passes: use it on one device",
        ),
        ("Attribution", "--model.hessian hutchinson", "zero3", "ZeRO-3"),
        ("Attribution", f"{ONE_PASS} --model.sums passes=2", "ddp", SHARED_OUT),
        ("Attribution", f"{ONE_PASS} --model.sums passes=2", "zero3", SHARED_OUT),
    ],
)
def test_what_several_ranks_cannot_do(
    ranks: Ranks, command: Any, module: str, options: str, name: str, said: str
):
    refused = command(f"{module}Module", options, strategy(name))
    assert said in ranks(*refused, code=2)[0]["error"]


def test_no_rank_holds_the_whole_model(ranks: Ranks, command: Any, rows: dict[str, str]):
    """Loaded under ZeRO-3, a rank's peak grows by its half of the weights and not much more."""
    texts = [Path(rows["forget"]).read_text()]
    folder = create_tiny_llama("model", texts, vocab_size=2000, hidden_size=512, layers=24, heads=8)
    whole = (folder / "model.safetensors").stat().st_size
    tensors = [t.numel() * 4 for t in load_file(folder / "model.safetensors").values()]
    assert whole > 200e6 and max(tensors) < 0.03 * whole
    peaks = {}
    for name in ("deepspeed_stage_3", "ddp"):
        for model in ([], ["--model.model", folder]):  # the first brings the libraries into memory
            none = "--trainer.max_epochs 0"  # no step: exit code 2
            answers = ranks(*command("AttributionModule", none, strategy(name), *model), code=2)
        peaks[name] = [answer["peak"] / whole for answer in answers]
    assert max(peaks["deepspeed_stage_3"]) < 0.7 and min(peaks["ddp"]) > 0.9, peaks


# -- attribution --------------------------------------------------------------------------------------------------


SPECS = [
    {"score": "wagle", "density": 0.2},
    {"score": "curvature", "density": 0.35},
    {"score": "wanda", "density": 0.1, "scope": "row"},
    {"score": "snip", "density": 0.25, "scope": "tensor"},
    {"score": "gradient", "density": 0.3, "select": "low", "exclude": "embed"},
    {"score": "random", "density": 0.5},
    {"score": "magnitude", "include": "mlp", "density": 1.0, "name": "mlp"},
    {"score": "curvature", "unit": "column", "pool": "max", "density": 0.2},
    {"score": "snip", "unit": "head", "density": 0.3},
    {"score": "random", "unit": "block:4x8", "density": 0.3, "name": "tiles"},
]
MASKS = json.dumps(SPECS)
#: The same, and a score that takes a pass for every row.
ROW_BY_ROW = json.dumps([*SPECS, {"score": "fisher_ratio", "density": 0.2}])


def same_masks(left: Path, right: Path) -> bool:
    """Whether two folders hold the same masks, bit for bit, for a model of one fingerprint."""
    names = sorted(path.name for path in left.glob("*.safetensors"))
    assert names == sorted(path.name for path in right.glob("*.safetensors")) and names
    masks = [(WeightMask.load(left / name), WeightMask.load(right / name)) for name in names]
    assert len({m.metadata["model_fingerprint"] for pair in masks for m in pair}) == 1
    return all(torch.equal(a.packed(n), b.packed(n)) for a, b in masks for n in a)


@pytest.mark.parametrize(
    ("hessian", "strategies"),
    [
        ("auto", ["ddp", "zero3"]),
        slow("auto", ["zero1"]),
        ("fisher", ["zero3"]),
        slow("fisher", ["ddp"]),
        slow("hutchinson", ["zero2"]),
    ],
)
def test_one_mask_for_any_number_of_ranks(run: Any, hessian: str, strategies: list[str]):
    """The same global batch gives the same mask file, however it is cut, and with sums in host memory too."""
    masks = ROW_BY_ROW if hessian == "fisher" else MASKS
    options = (ONE_PASS, f"--model.hessian {hessian} --model.masks", masks)
    alone = run("one", "AttributionModule", *options, cut(8, 1))
    accumulated = run("one", "AttributionModule", *options, cut(2, 4), output="accumulated")
    assert same_masks(alone, accumulated)
    for name in strategies:
        assert same_masks(alone, run(name, "AttributionModule", *options, cut(4, 1)))
        if hessian == "fisher":
            on_host = (*options, cut(4, 1), "--model.sums host")
            assert same_masks(
                alone, run(name, "AttributionModule", *on_host, output=f"{name}-host")
            )


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
    masks.append({"score": "own_scores.Whole", "density": 0.3})
    options = (ONE_PASS, "--model.masks", json.dumps(masks))
    alone = run("one", "AttributionModule", *options, cut(8, 1))
    for name in ("ddp", "zero3"):
        assert same_masks(alone, run(name, "AttributionModule", *options, cut(4, 1)))


UNFUSED = """
import torch
from torch import nn
from wagle_pl import AttributionModule, Score
from wagle_pl.lm.module import LanguageModule

class Squares(Score):  # not their ratio, which is noise where both are rounding
    needs = ("fisher_f", "fisher_r")
    by_row = True

    def __call__(self, w):
        return w.fisher_f + 2 * w.fisher_r

class Experts(nn.ModuleList):
    def __init__(self, fused):
        super().__init__()
        for up, down in zip(fused.gate_up_proj.detach(), fused.down_proj.detach()):
            expert = nn.ModuleDict({"up": nn.Linear(*up.T.shape, False), "down": nn.Linear(*down.T.shape, False)})
            expert["up"].weight.data, expert["down"].weight.data = up.clone(), down.clone()
            self.append(expert)

    def forward(self, states, chosen, weights):
        output = torch.zeros_like(states)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            gate, up = self[number]["up"](states[token]).chunk(2, -1)
            down = self[number]["down"](nn.functional.silu(gate) * up)
            output = output.index_add(0, token, down * weights[token, place, None])
        return output

class Unfused(AttributionModule):
    def configure_model(self):
        LanguageModule.configure_model(self)
        for block in self.lm.model.layers:
            block.mlp.experts = Experts(block.mlp.experts)
        self.model_fingerprint = self.fingerprint()
        super().configure_model()
"""


def test_experts_that_one_rank_alone_uses(
    run: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
):
    """Each rank has one row, of one token again and again, which goes to an expert of its own: the same sums as on one
    device, with experts in one tensor and (where a rank then has no gradient at all) each in modules of its own."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    Path("unfused.py").write_text(UNFUSED)
    monkeypatch.syspath_prepend(os.getcwd())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"num_local_experts": 6, "num_experts_per_tok": 1, "vocab_size": len(tokenizer)}
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **special))
    model.save_pretrained("experts", save_original_format=False)
    tokenizer.save_pretrained("experts")

    def experts(token: int) -> list[set[int]]:
        found = model(torch.full((1, 6), token), output_router_logits=True).router_logits
        return [set(layer.argmax(-1).tolist()) for layer in found]

    first, second = next(
        pair
        for pair in combinations(range(100, 140), 2)
        if all(not a & b for a, b in zip(*map(experts, pair), strict=True))
    )
    rows = [{"input_ids": [token] * 6, "labels": [token] * 6} for token in (first, second)]
    options = [ONE_PASS, "--model.model experts --model.save_scores fp32"]
    for name in ("forget", "retain"):
        options += [f"--data.{name}", write_rows(Path(f"{name}.jsonl"), rows)]
    scores = ("gradient", "curvature", "wanda", "unfused.Squares")
    options += ["--model.masks", json.dumps([{"score": score} for score in scores])]
    for module, hessian, *strategies in (
        ("AttributionModule", "auto", "ddp", "zero3"),
        ("unfused.Unfused", "auto", "ddp", "zero2"),
        ("unfused.Unfused", "hutchinson", "ddp"),
    ):
        given, output = (*options, "--model.hessian", hessian), f"{module}-{hessian}"
        alone = run("one", module, *given, cut(2, 1), output=f"{output}-one")
        for name in strategies:
            other = run(name, module, *given, cut(1, 1), output=f"{output}-{name}")
            for file in sorted(alone.glob("*.scores")):
                expected = dict(StoredScores(file).stream())
                for key, scores in StoredScores(other / file.name).stream():
                    torch.testing.assert_close(scores, expected[key], rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes."""
    running = Ranks(tmp_path_factory.mktemp("four"), count=4)
    yield running
    running.stop()


CHUNKED = """
from wagle_pl.attribution import Random

class Chunked(Random):  # as it is for tensors of many weights
    chunk = 32
"""


@pytest.fixture
def counted(
    ranks: Ranks, four: Ranks, command: Any, tiny_model: str
) -> Callable[..., list[dict[str, Any]]]:
    """Run a case on two and on four ranks; all ranks' bytes by stage, in bytes a weight × ranks."""

    def run(
        name: str, module: str, *options: Any, model: str = tiny_model
    ) -> list[dict[str, float]]:
        scaled, options = [], (*options, "--model.model", model)
        weight_count = sum(weight.numel() for weight in weights(model).values())
        for several in (ranks, four):
            count = len(several.processes)
            placed = (strategy(name, count), cut(8 // count, 1), f"--model.output {module}-{count}")
            for answer in several(*command(module, *options, *placed)):
                parts = answer["bytes"].items()
                scaled.append({stage: count * size / weight_count for stage, size in parts})
        return scaled

    return run


@pytest.mark.parametrize("name", [slow("ddp"), slow("zero2"), "zero3"])
def test_each_rank_does_its_part(counted: Any, tiny_model: str, mask: str, name: str):
    """What a rank digests, unpacks, draws, reads and writes is 1/2 of all with two ranks, 1/4 with four; random scores
    are the same for any number."""
    Path("chunked.py").write_text(CHUNKED)
    masks = ["--model.masks", json.dumps([{"score": "wagle"}, {"score": "chunked.Chunked"}])]
    unlearn = f"--model.objective GradDiff --model.mask {mask} --trainer.max_steps 1"
    sharded = name == "zero3"
    read = {"read": 4 if sharded else 0}  # else each rank has the whole model
    cases = {
        # the fingerprint in bf16, before and after the pass; scores are made three times, and for a file
        "AttributionModule": (
            (ONE_PASS, "--model.save_scores fp32", *masks),
            {"digested": 2 * 2, "unpacked": 0, "drawn": 4 * 4, "written": 8, **read},
        ),
        # the fingerprint, and frozen weights in fp32 before and after
        "UnlearnModule": (
            (unlearn,),
            {"digested": 2 + 2 * 4, "unpacked": 3 if sharded else 2, "written": 4, **read},
        ),
    }
    for module, (options, expected) in cases.items():
        for found in counted(name, module, *options):
            assert {stage: found[stage] for stage in expected} == pytest.approx(expected, rel=0.1)
    folders = (Path(f"AttributionModule-{count}") for count in (2, 4))
    two, other = (WeightMask.load(next(f.glob("chunked*.safetensors"))) for f in folders)
    assert two == other
    assert close("UnlearnModule-2", "UnlearnModule-4")


@pytest.mark.parametrize(("name", "times"), [slow("ddp", 2), slow("zero1", 3), ("zero2", 3)])
def test_what_a_rank_sends_and_writes(counted: Any, rows: Any, name: str, times: int):
    """In a step, gradients of selected weights (2 x), and under ZeRO their new values: times 1 - 1 / ranks, as any
    reduction; of the model's file, its share."""
    texts = [Path(rows["forget"]).read_text()]
    folder = str(create_tiny_llama("wide", texts, vocab_size=400, hidden_size=256, layers=2))
    bools = random_bools(parameter_shapes(load_model(folder)), 0.25)
    mask = WeightMask.from_bools(bools).save("mask")
    options = (f"--model.objective GradDiff --trainer.max_steps 1 --model.mask {mask}",)
    for rank, found in enumerate(counted(name, "UnlearnModule", *options, model=folder)):
        assert found["written"] == pytest.approx(4, rel=0.01)
        if rank in (1, 5):  # the last rank, which hands on nothing of what rank 0 broadcasts
            ranks = 2 if rank == 1 else 4
            assert found["sent"] / (ranks - 1) == pytest.approx(times * 4 * 0.25, rel=0.1)


# -- checkpoints --------------------------------------------------------------------------------------------------


def checkpointing(every: int, folder: str = "kept") -> list[str]:
    """Options that keep every checkpoint in a folder."""
    keep = {"every_n_train_steps": every, "save_top_k": -1, "dirpath": folder, "filename": "{step}"}
    callback = json.dumps([{"class_path": "ModelCheckpoint", "init_args": keep}])
    return ["--trainer.enable_checkpointing true --trainer.callbacks", callback]


def from_step(step: int, folder: str = "kept") -> str:
    """The option that goes on from one of these."""
    return f"--ckpt_path {folder}/step={step}.ckpt"


def test_a_rank_that_dies_ends_the_run(ranks: Ranks, command: Any):
    """Killed in mid-step: no hang, an exit code; the last checkpoint is whole and resumes."""
    fit = ("FinetuneModule", strategy("zero2"), "--trainer.max_epochs 100000 --trainer.max_steps")

    def kill() -> None:
        wait_for(Path("kept/step=20.ckpt").exists)
        ranks.processes[1].kill()

    endless = command(*fit, "-1", *checkpointing(10))
    ranks(*endless, code=[1, -9], meanwhile=kill)
    step = max(int(path.stem.split("=")[1]) for path in Path("kept").glob("step=*.ckpt"))
    ranks(*command(*fit, step + 1, from_step(step)))
    assert Path("out/model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        slow("zero1", "MaskedAdamW"),
        slow("zero2", "MaskedAdamW"),
        ("zero3", "MaskedAdamW"),
        slow("zero2", "AdamW"),
    ],
)
def test_resume(run: Any, mask: str, name: str, optimizer: str):
    """Stopped and resumed under each stage: bit for bit the unbroken run's; under another one, to 1e-5."""
    options = f"--model.objective NPO --model.mask {mask} --optimizer {optimizer}"
    options += f" --optimizer.lr 1e-3 --trainer.max_steps 6 {cut(4, 1)}"
    whole = run(name, "UnlearnModule", options, *checkpointing(4), output="whole")
    resumed = run(name, "UnlearnModule", options, from_step(4), output="resumed")
    assert same_bits(whole, resumed)
    if optimizer == "MaskedAdamW":
        other = {"zero1": "zero3", "zero2": "zero1", "zero3": "zero2"}[name]
        assert close(whole, run(other, "UnlearnModule", options, from_step(4)))


@pytest.mark.parametrize("name", [slow("ddp"), "zero3"])
def test_attribution_resumes(ranks: Ranks, lone: Ranks, run: Any, command: Any, name: str):
    """From the middle, and from the end, when nothing is left to see but to write."""
    options = (ONE_PASS, "--model.masks", ROW_BY_ROW if name == "ddp" else MASKS)
    whole = run(name, "AttributionModule", *options, cut(2, 1), *checkpointing(1), output="whole")
    last = max(int(path.stem.partition("=")[2]) for path in Path("kept").iterdir())
    for step in (2, last):
        on = run(name, "AttributionModule", *options, cut(2, 1), from_step(step), output="on")
        assert same_masks(whole, on)
        shutil.rmtree("on")
    if name == "zero3":
        alone = (cut(4, 1), from_step(2), strategy(name, 1), "--model.output alone")
        lone(*command("AttributionModule", *options, *alone))
        assert same_masks(whole, Path("alone"))


#: Batch size and accumulation of 8 rows; ``lone2`` is ZeRO-2 on one process.
CUTS = {"one": (2, 4), "ddp": (4, 1), "zero1": (2, 2), "zero2": (1, 4), "zero3": (4, 1)}
CUTS |= {"lone1": (8, 1), "lone2": (4, 2), "lone3": (2, 4)}
RECUT = [
    ("UnlearnModule", "ddp", "one"),
    slow("UnlearnModule", "lone1", "zero1"),
    slow("UnlearnModule", "zero2", "lone2"),
    slow("UnlearnModule", "lone3", "zero3"),
    slow("UnlearnModule", "zero3", "lone3"),
    slow("AttributionModule", "ddp", "one"),
    slow("AttributionModule", "one", "ddp"),
    ("AttributionModule", "zero2", "lone2"),
]


@pytest.mark.parametrize(("module", "first", "second"), RECUT)
def test_another_cut_goes_on(
    run: Any, lone: Ranks, command: Any, mask: str, module: str, first: str, second: str
):
    """Two ranks' run goes on with one, and the other way, with other micro-batches: within an epoch; and at its end."""
    trains = module == "UnlearnModule"
    kind = [f"{UNLEARN}GradDiff --model.mask", mask] if trains else ["--model.masks", MASKS]
    kind += [ONE_PASS, f"--trainer.max_epochs {3 if trains else 1}"]

    def fit(name: str, output: str, *more: str) -> Path:
        options = (*kind, cut(*CUTS[name]), *more)
        if not name.startswith("lone"):
            return run(name, module, *options, output=output)
        own = (strategy(f"zero{name[-1]}", 1), f"--model.output {output}")
        lone(*command(module, *options, *own))
        return Path(output)

    whole = fit(first, "whole", *checkpointing(1))
    for step in (1,) if not trains else (3, 4) if first == "ddp" else (3,):
        on = fit(second, f"on-{step}", from_step(step))
        assert close(whole, on) if trains else same_masks(whole, on)


def test_checkpoints_that_do_not_fit(run: Any, ranks: Ranks, command: Any, fails: Any):
    """Without its tensors, of a run without DeepSpeed, or of one with it."""
    steps = ("--trainer.max_steps 2", *checkpointing(2))
    on = ("FinetuneModule", from_step(2))
    run("zero3", "FinetuneModule", *steps)
    said = fails(*command(*on, strategy("one")), data=False)
    assert "written under DeepSpeed: add --trainer.strategy" in said
    os.remove("kept/step=2.ckpt/tensors.safetensors")
    (answer, _) = ranks(*command(*on, strategy("zero3")), code=2)
    assert "tensors.safetensors does not exist" in answer["error"]
    run("one", "FinetuneModule", "--trainer.max_steps 2", *checkpointing(2, "plain"))
    plain = ("FinetuneModule", from_step(2, "plain"), strategy("zero2"))
    assert "written without DeepSpeed" in ranks(*command(*plain), code=2)[0]["error"]


@pytest.mark.parametrize("name", ["one", "ddp", "zero2", "zero3"])
def test_export(run: Any, mask: str, name: str, capsys: pytest.CaptureFixture[str]):
    """A checkpoint of the last step becomes the folder that the run itself wrote, bit for bit."""
    options = (f"--model.objective GradDiff --model.mask {mask}", *checkpointing(2))
    folder = run(name, "UnlearnModule", *options, f"--trainer.max_steps 4 {cut(4, 1)}")
    cli.main(["export", "kept/step=4.ckpt", "-o", "exported"])
    assert capsys.readouterr().out.splitlines()[-1] == "model written to exported"
    assert same_bits(folder, "exported")
    assert sorted(os.listdir("exported")) == sorted(os.listdir(folder))
    settings = [load_model(str(f)).generation_config.to_dict() for f in (folder, "exported")]
    assert settings[0] == settings[1]
    if name in ZERO:  # with nothing left to train, a resumed run writes what the first wrote
        steps = (*options[:1], f"--trainer.max_steps 4 {cut(4, 1)}", from_step(4))
        assert same_bits(folder, run(name, "UnlearnModule", *steps, output="again"))


def test_nothing_to_export(run: Any, capsys: pytest.CaptureFixture[str]):
    for name in ("one", "zero2"):
        run(name, "AttributionModule", ONE_PASS, cut(4, 1), *checkpointing(1, f"kept-{name}"))
    Path("torn.ckpt").write_bytes(b"PK")
    for checkpoint, said in {
        "kept-one/step=1.ckpt": "attribution moves none",
        "kept-zero2/step=1.ckpt": "attribution moves none",
        "torn.ckpt": "is damaged, or no checkpoint",
        "missing.ckpt": "does not exist",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            cli.main(["export", checkpoint, "-o", "exported"])
        assert said in capsys.readouterr().err
    assert not Path("exported").exists()


# -- test ---------------------------------------------------------------------------------------------------------


def test_wagle_test_on_several_ranks(
    ranks: Ranks, wagle: Any, tiny_model: str, rows: dict[str, str]
):
    """The same numbers and generations for any number of ranks; sharded generation under ZeRO-3 included."""
    uneven = [json.loads(line) for line in Path(rows["forget_test"]).read_text().splitlines()]
    for row in uneven[1:]:  # one row has more candidates: ranks run different numbers of passes
        del row["perturbed_answer"]
    asked = [{"question": row["question"], "answer": row["answer"]} for row in uneven[:3]]
    text = {"text": "Nobody asks about such a text, and nobody says more of it. " * 9}
    sets = {
        "forget": rows["forget_test"],
        "retain": rows["retain_test"],
        "uneven": write_rows(Path("uneven.jsonl"), uneven),
        "mixed": write_rows(Path("mixed.jsonl"), [text] * 3 + asked),  # one rank generates alone
    }
    common = ["test", "--model EvaluationModule --model.max_new_tokens 6 --model.model"]
    common += [tiny_model, *data_options(rows), "--data.test", json.dumps(sets)]
    common = words(*common, f"--data.test_batch_size 1 {QUIET}")
    wagle(*common, strategy("one"), "--model.output one", data=False)
    expected = json.loads(Path("one/metrics.json").read_text())
    texts = pq.read_table("one/forget.parquet").to_pydict()
    assert expected and len(texts["generation"]) == 5
    for name in ("ddp", "zero3"):
        here, there = ranks(*common, *words(strategy(name), f"--model.output {name}"))
        assert here["metrics"] == there["metrics"]
        found = json.loads((Path(name) / "metrics.json").read_text())
        assert found == pytest.approx(expected, rel=1e-4)
        records = pq.read_table(f"{name}/forget.parquet").to_pydict()
        assert records["row"] == list(range(5)) and records["generation"] == texts["generation"]
        for mine, reference in zip(records["perturbed_nll"], texts["perturbed_nll"], strict=True):
            assert mine == pytest.approx(reference, abs=1e-4)
        assert pq.read_table(f"{name}/mixed.parquet").to_pydict()["generation"].count(None) == 3


@pytest.mark.parametrize("several", [slow("ddp"), "zero3"])
def test_validation_on_several_ranks(
    run: Any, ranks: Ranks, wagle: Any, command: Any, rows: dict[str, str], several: str
):
    """A run that is validated makes the same model as one that is not, and its measures are those of one device."""
    sets = json.dumps({name: rows[f"{name}_test"] for name in ("forget", "retain")})
    options = ("--trainer.max_steps 2 --data.test_batch_size 2 --data.test", sets)
    watched = (
        "--trainer.val_check_interval 1 --trainer.log_every_n_steps 1 "
        "--trainer.num_sanity_val_steps 0 --trainer.callbacks Evaluate "
        "--trainer.callbacks.val_generate true --trainer.callbacks.max_new_tokens 2 --data.val",
        "[retain, forget]",
    )
    expected: dict[str, float] = {}
    for name in ("one", several):
        own = (strategy(name), f"--model.output {name}")
        arguments = command("FinetuneModule", *options, *watched, *own)
        if name == "one":
            logged = wagle(*arguments, data=False).trainer.callback_metrics.items()
            expected = {k: float(value) for k, value in logged if k.startswith("val/")}
            assert {"val/forget/rougeL_recall", "val/retain/probability"} <= expected.keys()
        else:
            for answer in ranks(*arguments):
                found = {k: answer["logged"][k] for k in expected}
                assert found == pytest.approx(expected, rel=5e-3)
            plain = run(name, "FinetuneModule", *options, output=f"{name}-alone")
            assert same_bits(plain, name)
