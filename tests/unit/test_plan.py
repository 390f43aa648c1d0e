"""``wagle plan``: each formula against what the code or another library does; the page of its tables."""

import inspect
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from helpers import write_config

from wagle_pl.attribution.hessian import GaussNewton, estimator_of
from wagle_pl.lab import planning
from wagle_pl.lab.planning import (
    PlannedRun,
    architecture,
    choices,
    device_parts,
    disk_bytes,
    host_bytes,
    peak,
)
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask
from wagle_pl.masks.selected import SelectedWeights
from wagle_pl.unlearning import optim

PAGE = Path(__file__).parents[2] / "configs/scale.md"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "dtype": "float16",
}
ZEPHYR = {
    **LLAMA,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "dtype": "bfloat16",
}
MODELS = {"Llama-2-7B": LLAMA, "Zephyr-7B-beta": ZEPHYR}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """Name -> architecture of the two models of 7 billion weights."""
    folder = tmp_path_factory.mktemp("seven")
    return {
        name: architecture(write_config(folder / name, config)) for name, config in MODELS.items()
    }


# -- shapes ---------------------------------------------------------------------------------------------------------


def test_the_numbers_of_weights_are_the_published_ones(seven):
    assert seven["Llama-2-7B"].weights == 6_738_415_616
    assert seven["Zephyr-7B-beta"].weights == 7_241_732_096
    assert seven["Zephyr-7B-beta"].keys == 1024 and seven["Llama-2-7B"].keys == 4096


def test_the_shapes_are_those_of_the_model(tiny_model):
    shape, model = architecture(tiny_model), load_model(tiny_model)
    assert shape.shapes == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shape.tied and shape.stored == 4
    assert (shape.hidden, shape.layers, shape.inner, shape.keys) == (32, 2, 96, 16)
    assert shape.products == 4 * 32 + 4 * 96


def test_another_family(tmp_path):
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500}
    shape = architecture(write_config(tmp_path / "gpt2", {**config, "tie_word_embeddings": True}))
    assert (shape.hidden, shape.layers, shape.inner) == (64, 3, 256)
    assert shape.tied and shape.products == (3 + 1 + 4 + 4) * 64


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for add, value in (
        ("block_count", 2),
        ("context_length", 64),
        ("embedding_length", 32),
        ("head_count", 4),
        ("head_count_kv", 2),
        ("feed_forward_length", 96),
        ("vocab_size", 400),
        ("layer_norm_rms_eps", 1e-6),
    ):
        getattr(writer, f"add_{add}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shape = architecture(str(tmp_path / "tiny.gguf"))
    assert (shape.hidden, shape.layers, shape.inner, shape.vocabulary) == (32, 2, 96, 400)


# -- activations ----------------------------------------------------------------------------------------------------


def saved_bytes(model, tokens):
    """Bytes that autograd keeps of a forward pass over random tokens, parameters and what has no gradient apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # held, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(input_ids=tokens, use_cache=False)
    del output
    return sum(size for size, _ in kept.values())


def parts_of(shape, run):
    """Name of a part -> its bytes."""
    return {part.name: part.bytes for part in device_parts(shape, run)}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(tiny_model, precision, dtype, checkpointing):
    """The slope over tokens, so that what does not grow with them falls out."""
    model, shape = load_model(tiny_model, dtype).train(), architecture(tiny_model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = torch.randint(0, 400, (2, 96))
    found = (saved_bytes(model, rows) - saved_bytes(model, rows[:, :32])) / 128
    options = {"precision": precision, "gradient_checkpointing": checkpointing}
    run = PlannedRun("finetuning", max_length=1, **options)
    expected = parts_of(shape, run)["activations"]
    assert found == pytest.approx(expected, rel=0.1 if not checkpointing else 0.3)


def test_logits_are_planned_in_chunks(seven):
    """Few tokens: all of them, of both streams; more: one chunk. Sharded weights make them whole, in bf16."""
    model, fp32 = seven["Llama-2-7B"], 4 + 4 + 4
    options = {"strategy": "ddp", "devices": 2}

    def logits(tokens, **other):
        return parts_of(model, PlannedRun(max_length=tokens, **{**options, **other}))["logits"]

    assert logits(100) == 2 * 100 * model.vocabulary * (2 + fp32)
    assert logits(2000) == logits(9000) == planning.inference.CHUNK * (2 + fp32)
    whole = logits(9000, strategy="zero3")
    assert whole == logits(9000) + 2 * 2 * 9000 * model.vocabulary * 2


def test_the_cache_is_what_a_generation_keeps(tiny_model):
    cache = load_model(tiny_model)(torch.randint(0, 400, (3, 20)), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    run = PlannedRun("test", precision="32-true", batch_size=3, max_length=20)
    assert parts_of(architecture(tiny_model), run)["cache of a generation"] == kept


# -- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("density", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("name", ["MaskedAdamW", "SGD"])
def test_values_gradients_and_state_are_what_is_kept(tiny_model, name, density, precision):
    """Of tensors of which a share is selected; the densities of 1 have no mask."""
    lm = load_model(tiny_model, torch.float32 if precision == "32-true" else torch.bfloat16)
    run = PlannedRun(density=density, precision=precision, optimizer=name, objective="UNDIAL")
    parts = {part.name: part.bytes for part in device_parts(architecture(tiny_model), run)}
    bools = {}
    for n, p in lm.named_parameters():  # no whole rows or columns
        places = torch.arange(p.numel())
        bools[n] = ((places + places // 16) % 4 < 4 * density).view(p.shape)
    mask = WeightMask.from_bools(bools) if run.masked else None
    selected = SelectedWeights(lm, mask, keep_theta0=True)
    made = {"MaskedAdamW": optim.MaskedAdamW, "SGD": torch.optim.SGD}[name]
    optimizer = made([p for p in lm.parameters() if p.requires_grad], lr=0.1)
    lm(torch.arange(8)[None]).logits.float().square().mean().backward()
    kept = list(selected.tensors.values())

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    assert size(gradient for _, gradient in selected.gradients()) == parts["gradients"]
    assert size(t._index for t in kept) == parts.get("places of the values", 0)
    assert size(t._packed for t in kept) == pytest.approx(parts.get("mask bits", 0), rel=1e-3)
    assert size(t.theta0 for t in kept) == parts["values at θ₀"]
    assert size(t.values for t in kept if not t.is_plain) == parts.get("values", 0)
    optimizer.step()
    state = [
        v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()
    ]
    assert size(state) == parts.get("optimiser state", 0)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"task": "attribution", "sums": "host", "estimator": GaussNewton, "max_length": 2048}, 24),
        ({"task": "attribution", "sums": "passes=8", "max_length": 2048}, 24),
        ({"task": "attribution", "sums": "passes=16", "estimator": GaussNewton}, 24),
        ({"density": 0.05}, 24),
        ({"density": 0.1, "optimizer": "AdamW8bit"}, 40),
        ({"density": 0.8, "optimizer": "SGD"}, 96),
    ],
)
def test_llama_2_7b_on_one_gpu(seven, options, most):
    run = PlannedRun(gradient_checkpointing=True, **options)
    _, bytes_ = peak(seven["Llama-2-7B"], run)
    assert bytes_ <= planning.USABLE * most * planning.GIB


def test_constants_are_those_of_the_libraries():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from lightning.pytorch.strategies import DeepSpeedStrategy

    def defaults(cls, *names):
        return [inspect.signature(cls).parameters[name].default for name in names]

    buckets = defaults(DeepSpeedStrategy, "reduce_bucket_size", "allgather_bucket_size")
    assert buckets == [planning.BUCKET] * 2
    assert all(defaults(DeepSpeedStrategy, "overlap_comm", "contiguous_gradients"))  # two in turn
    assert DeepSpeedZeroConfig().max_live_parameters == planning.LIVE


# -- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["attribution", "unlearning", "finetuning"])
@pytest.mark.parametrize("name", MODELS)
def test_more_devices_and_higher_stages_take_less(seven, name, task):
    kind = estimator_of("auto") if task == "attribution" else None
    run = PlannedRun(
        task, density=0.95, estimator=kind, max_length=1024, gradient_checkpointing=True
    )
    table = {
        strategy: [peak(seven[name], r)[1] for r in runs]
        for strategy, runs in choices(run, (2, 4, 8, 64))
    }
    assert tuple(table) == STRATEGIES
    for strategy in STRATEGIES[1:]:
        assert table[strategy] == sorted(table[strategy], reverse=True)
    for upper, lower in pairwise(STRATEGIES[1:]):
        assert all(high >= low for high, low in zip(table[upper], table[lower], strict=True))


def test_what_a_part_is_made_of(seven):
    """Llama-2-7B on 4 GPUs under ZeRO-3, bf16: what can be said without the code."""
    run = PlannedRun("unlearning", "zero3", 4, density=0.2, max_length=1024)
    parts = {part.name: part.bytes for part in device_parts(seven["Llama-2-7B"], run)}
    n = 6_738_415_616
    assert parts["weights"] == 2 * n / 4 and parts["fp32 values"] == pytest.approx(4 * 0.2 * n / 4)
    assert parts["optimiser state"] == pytest.approx(8 * 0.2 * n / 4)
    assert parts["mask bits"] == n / 8 / 4
    run = replace(run, task="attribution", estimator=estimator_of("auto"))
    parts = {part.name: part.bytes for part in device_parts(seven["Llama-2-7B"], run)}
    assert parts["sums of gradients"] == 12 * n / 4  # g_f, g_r, the gradient of a step's draw


def test_gradients_of_several_micro_batches(seven):
    """Stage 1 reduces them at the step, stage 2 as they come (DeepSpeed); without ZeRO they stand in any case."""
    shape = seven["Llama-2-7B"]

    def more(strategy):
        one = PlannedRun(strategy=strategy, devices=4)
        at = [
            planning.at(device_parts(shape, r), "forward")
            for r in (one, replace(one, accumulate_grad_batches=4))
        ]
        return (at[1] - at[0]) / shape.weights

    assert [more(strategy) for strategy in STRATEGIES] == pytest.approx([0, 0.4, 0.1, 0, 0])


def test_offload_moves_memory_to_the_host(seven):
    run = PlannedRun(strategy="zero3", devices=2)
    moved = replace(run, strategy="zero3_offload")
    shape = seven["Zephyr-7B-beta"]
    gained = peak(shape, run)[1] - peak(shape, moved)[1]
    assert gained > 0 and host_bytes(shape, moved) - host_bytes(shape, run) > 0.9 * gained


def test_on_a_cpu_nothing_is_elsewhere(seven):
    run, shape = (
        PlannedRun(strategy="zero3_offload", devices=2, accelerator="cpu"),
        seven["Llama-2-7B"],
    )
    assert {part.where for part in device_parts(shape, run)} == {"device", "host"}
    assert peak(shape, run)[1] > peak(shape, replace(run, accelerator="gpu"))[1]


# -- configs/scale.md -----------------------------------------------------------------------------------------------


DENSITIES = (0.05, 0.1, 0.2, 0.8, 0.95)


def test_the_tables_of_the_readme_are_those_of_the_plan(seven):
    text = PAGE.read_text()
    for name, shape in seven.items():
        for task in ("attribution", "unlearning"):
            run = PlannedRun(task, density=0.2, max_length=1024, gradient_checkpointing=True)
            for strategy, runs in choices(run):
                row = " | ".join(f"{peak(shape, r)[1] / 2**30:.1f}" for r in runs)
                assert f"| {name} | {task} | {strategy} | {row} |" in text
        for sums in ("device", "host", "passes=8", "passes=16"):
            scalar, auto = (
                PlannedRun(
                    "attribution",
                    max_length=1024,
                    gradient_checkpointing=True,
                    sums=sums,
                    estimator=of,
                )
                for of in (None, GaussNewton)
            )
            on_gpu = " | ".join(f"{peak(shape, run)[1] / 2**30:.1f}" for run in (scalar, auto))
            beside = (host_bytes(shape, auto), disk_bytes(shape, auto).get("sums", 0))
            row = " | ".join([on_gpu, *(f"{size / 2**30:.0f}" for size in beside)])
            assert f"| {name} | `{sums}` | {row} |" in text
    for optimizer in ("MaskedAdamW", "AdamW8bit", "SGD"):
        options = {"optimizer": optimizer, "gradient_checkpointing": True}
        runs = [PlannedRun(density=density, **options) for density in DENSITIES]
        row = " | ".join(f"{peak(seven['Llama-2-7B'], run)[1] / 2**30:.1f}" for run in runs)
        assert f"| {optimizer} | {row} |" in text


LARGER = {
    "Llama-2-7B": LLAMA,
    "Llama-2-13B": LLAMA
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "intermediate_size": 13824,
    },
    "Llama-2-70B": LLAMA
    | {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
}
WEIGHTS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
}


@pytest.mark.parametrize("name", LARGER)
def test_the_table_of_many_gpus_is_that_of_the_plan(name, tmp_path):
    shape = architecture(write_config(tmp_path / name, LARGER[name]))
    assert shape.weights == WEIGHTS[name]
    for task in ("finetuning", "attribution", "unlearning", "test"):
        row = []
        for devices in (1, 2, 4, 8, 16, 32, 64):
            options = {"density": 0.2, "max_length": 1024, "gradient_checkpointing": True}
            run = PlannedRun(task, "zero3", devices, **options)
            row.append(f"{peak(shape, run)[1] / 2**30:.1f}")
        assert f"| {name} | {task} | {' | '.join(row)} |" in PAGE.read_text()


ON_FOUR = [  # rows and longest row of a micro-batch, density; and the row of the table
    ("Llama-2-7B", "finetuning", 8, 256, 1.0, "finetune, 4,000 rows × 5 | 1.2 M"),
    ("Llama-2-7B", "attribution", 1, 256, 1.0, "attribute, 400 + 400 rows | 0.05 M"),
    ("Llama-2-7B", "unlearning", 1, 256, 0.95, "unlearn, 400 steps × (4 + 4) rows | 0.2 M"),
    ("Zephyr-7B-beta", "attribution", 1, 1024, 1.0, "attribute, 25,000 + 25,000 rows | 52 M"),
    ("Zephyr-7B-beta", "unlearning", 1, 1024, 0.6, "unlearn, 500 steps × (4 + 4) rows | 4.1 M"),
    ("Llama-2-7B", "finetuning", 4, 2048, 1.0, "finetune, 1,200 chunks × 5 | 12 M"),
    ("Llama-2-7B", "attribution", 1, 2048, 1.0, "attribute, 400 + 400 chunks | 1.6 M"),
    ("Llama-2-7B", "unlearning", 4, 2048, 0.95, "unlearn, 10 × (400 + 400) chunks | 16 M"),
    ("Llama-2-7B", "finetuning", 4, 1024, 1.0, "finetune, 1.6 M tokens × 10 | 16 M"),
    ("Llama-2-7B", "attribution", 1, 1024, 1.0, "attribute, 3,200 + 3,200 rows | 3.2 M"),
    ("Llama-2-7B", "unlearning", 1, 1024, 0.95, "unlearn, 5 × (3,200 + 3,200) rows | 16 M"),
    ("Llama-2-7B", "attribution", 1, 512, 1.0, "attribute, 200 + 200 rows | 0.13 M"),
    ("Llama-2-7B", "unlearning", 1, 512, 0.8, "unlearn, 10 × (200 + 200) rows | 1.3 M"),
]


@pytest.mark.parametrize(("name", "task", "rows", "length", "density", "row"), ON_FOUR)
def test_the_table_of_benchmarks_is_that_of_the_plan(seven, name, task, rows, length, density, row):
    options = {"density": density, "batch_size": rows, "max_length": length}
    run = PlannedRun(task, "zero3", 4, gradient_checkpointing=True, **options)
    assert f"| {row} | {peak(seven[name], run)[1] / 2**30:.1f} |" in PAGE.read_text()


FILES = sorted((PAGE.parent / "strategy").glob("[!c]*.yaml"))  # cpu.yaml is a layer over them


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_strategy_file_is_what_the_plan_takes_it_for(file):
    pytest.importorskip("deepspeed")
    from wagle_pl.strategies import ZeRO

    lines = file.read_text()
    trainer = yaml.safe_load(lines)["trainer"]
    assert lines.startswith("# ") and trainer["accelerator"] == ("gpu")
    assert trainer["strategy"]["class_path"] == "ZeRO"
    zero = ZeRO(**trainer["strategy"]["init_args"]).config["zero_optimization"]
    found = zero["stage"], "offload_optimizer" in zero, "offload_param" in zero
    run = PlannedRun(strategy=file.stem)
    assert found == (run.stage, run.offload, run.offload and run.stage == 3)


def test_the_strategies_of_the_readme_exist():
    files = {path.stem for path in FILES}
    assert set(re.findall(r"strategy/(\w+)\.yaml` \|", PAGE.read_text())) <= files
    assert files == {"zero2", "zero3", "zero3_offload"}
