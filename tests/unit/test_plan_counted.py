"""The formulas of ``wagle plan`` against the bytes that the counting device holds in the same runs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import device
import lightning as L
import pytest
import torch
from helpers import random_bools
from transformers import LlamaConfig, LlamaForCausalLM

from wagle_pl import AttributionModule, ForgetRetainDataModule, UnlearnModule, WeightMask
from wagle_pl.attribution import scoring, selection, sums
from wagle_pl.attribution.hessian import estimator_of
from wagle_pl.core.weights import _keys, parameter_shapes
from wagle_pl.lab import planning
from wagle_pl.lab.planning import PlannedRun, architecture
from wagle_pl.lm import inference
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.tiny import create_tiny_llama

pytestmark = pytest.mark.xdist_group("counted")  # one model is made for all

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
KL = {"class_path": "NPO", "init_args": {"retain": "KL"}}
RMU = {layer: {"class_path": "RMU", "init_args": {"layer": layer}} for layer in (1, 2, 3)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of 800,000 weights: a few rows take about as much memory as they do."""
    folder = tmp_path_factory.mktemp("counted") / "model"
    return str(create_tiny_llama(folder, [" ".join(WORDS)], 300, hidden_size=128, layers=4))


class _Kinds(L.Callback):
    """Says what the tensors of a run are for, and notes its longest row."""

    width = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, _: int) -> None:
        self.width = max(self.width, *(t["input_ids"].shape[1] for t in batch.values()))
        device.COUNTS.name("weights", [*module.lm.parameters(), *module.lm.buffers()])
        for tensor in getattr(module, "tensors", {}).values():
            device.COUNTS.name("weights", [tensor.parameter, tensor._narrow])
            device.COUNTS.name("values", [tensor._index, tensor.theta0])
            device.COUNTS.name("values", [] if tensor.is_plain else [tensor.values])

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        device.COUNTS.name("gradients", [p.grad for p in module.lm.parameters()])

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if sums := getattr(module, "sums", None):
            tensors = [*sums.sums.values(), *sums.step_sums.values()]
            device.COUNTS.name("gradients", [t for of_name in tensors for t in of_name])
        for optimizer in trainer.optimizers:
            state = optimizer.state.values()
            device.COUNTS.name("state", [v for of_tensor in state for v in of_tensor.values()])


def counted(
    model: str,
    task: str,
    density: float = 0.2,
    batch_size: int = 2,
    rows: int = 4,
    words: int = 60,
    accumulate: int = 1,
    precision: str = "32-true",
    **options: Any,
) -> tuple[int, dict[str, int], int]:
    """The most bytes that a run holds, what for, and its longest row; every second row is shorter."""
    lm = load_model(model, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    lm.config.use_cache = False
    texts = [" ".join((WORDS * words)[: words - number % 2]) for number in range(rows)]
    same = [{"question": "a", "answer": text} for text in texts]
    data = ForgetRetainDataModule(forget=same, retain=same, batch_size=batch_size)
    kinds = _Kinds()
    run = {"precision": precision, "accumulate_grad_batches": accumulate, "callbacks": [kinds]}
    gc.collect()
    with device.counting() as counts:
        _keys(device.DEVICE)  # of digests: 4 MiB for all models
        counts.reset()
        before, kept = counts.bytes, counts.at_peak()
        device.on_device(lm)
        if task == "attribution":
            module: Any = AttributionModule(lm, density=density, **options)
        else:
            bools = random_bools(parameter_shapes(lm), density, lines=False)
            mask = WeightMask.from_bools(bools) if density < 1 else None
            module = UnlearnModule(lm, mask=mask, lr=1e-3, **options)
            run["max_steps"] = 2
        device.trainer(**run).fit(module, data)
        peak = counts.peak - before
        parts = {kind: size - kept[kind] for kind, size in counts.at_peak().items()}
    return peak, parts, kinds.width


def planned(
    shape: planning.Architecture,
    task: str,
    max_length: int,
    batch_size: int = 2,
    accumulate: int = 1,
    precision: str = "32-true",
    hessian: str = "auto",
    gamma: Any = None,
    objective: Any = "NPO",
    **options: Any,
) -> float:
    """What ``wagle plan`` says of such a run, without the CUDA context."""
    estimator = estimator_of(hessian) if task == "attribution" and gamma is None else None
    options |= {"estimator": estimator, "diagonal": bool(estimator) and hessian != "auto"}
    options |= {"objective": objective, "precision": precision}
    options |= {"batch_size": batch_size, "accumulate_grad_batches": accumulate}
    run = PlannedRun(task, max_length=max_length, **options)
    return planning.peak(shape, run)[1] - planning.GPU_OVERHEAD


def _unlearning(objective: Any, precision: str, **options: Any) -> dict[str, Any]:
    return {"task": "unlearning", "objective": objective, "precision": precision, **options}


def _attribution(precision: str, **options: Any) -> dict[str, Any]:
    return {"task": "attribution", "precision": precision, **options}


FAST = [
    _unlearning("NPO", "32-true"),
    _unlearning("GradDiff", "bf16-mixed", density=0.05),
    _unlearning("UNDIAL", "bf16-true", density=0.8),
    _unlearning("NPO", "bf16-true", packing=True),
    _unlearning("NPO", "bf16-true", batch_size=1, gradient_checkpointing=True),
    _unlearning(RMU[1], "bf16-true"),
    _attribution("32-true"),
    _attribution("bf16-true", sums="host"),
    _attribution("bf16-mixed", gamma=1.0, sums="passes=2"),
]
SLOW = [
    _unlearning("NPO", "32-true", density=0.05),
    _unlearning("NPO", "32-true", density=1.0),
    _unlearning("GradDiff", "32-true", gradient_checkpointing=True),
    _unlearning("NPO", "32-true", packing=True),
    _unlearning("NPO", "32-true", accumulate=2),
    _unlearning(KL, "32-true"),
    _unlearning("NPO", "bf16-mixed", density=1.0),
    _unlearning("GradDiff", "bf16-mixed", gradient_checkpointing=True),
    _unlearning(KL, "bf16-mixed", packing=True),
    _unlearning("NPO", "bf16-true", density=1.0),
    _unlearning("SimNPO", "bf16-true", accumulate=2),
    _unlearning(RMU[1], "32-true"),
    _unlearning(RMU[2], "32-true", accumulate=2),
    _unlearning(RMU[3], "bf16-mixed"),
    _unlearning(RMU[3], "bf16-true", gradient_checkpointing=True),
    _attribution("32-true", hessian="fisher"),
    _attribution("32-true", gamma=1.0, gradient_checkpointing=True),
    _attribution("bf16-mixed", sums="host"),
    _attribution("bf16-true", gamma=1.0, sums="passes=2"),
    _attribution("bf16-true", gamma=1.0, gradient_checkpointing=True),
]


@pytest.mark.parametrize(
    "run", [*FAST, *(pytest.param(run, marks=pytest.mark.slow) for run in SLOW)], ids=str
)
def test_the_plan_is_what_the_device_counts(model: str, run: dict[str, Any]) -> None:
    """For 29 runs, within 5 %."""
    peak, parts, width = counted(model, **run)
    plan = planned(architecture(model), max_length=width, **run)
    print(f"{plan / peak:.3f}", *(f"{kind} {size / 2**20:.2f}" for kind, size in parts.items()))
    assert plan == pytest.approx(peak, rel=0.05)
    assert sum(parts.values()) == peak


def test_what_memory_of_a_step_is_for(model: str) -> None:
    """Weights, values and state are exactly the plan's; so are gradients but for those of a pass."""
    _, parts, _ = counted(model, **FAST[0])
    n = architecture(model).weights
    assert parts["weights"] == pytest.approx(4 * n, rel=0.001)
    assert parts["values"] == pytest.approx(8 * 0.2 * n, rel=0.001)
    assert parts["state"] == pytest.approx(8 * 0.2 * n, rel=0.001)
    assert parts["gradients"] >= 4 * 0.2 * n and parts["other"] < 0.01 * sum(parts.values())


#: What Llama-2-7B has twice as much of as a model with half its hidden size.
SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
WHOLE = {"CHUNK": inference.CHUNK, "BLOCK": selection.BLOCK}
ON_24_GB = {
    "attribution": _attribution("bf16-true", sums="host", gamma=1.0),
    "attribution, auto": _attribution("bf16-true", sums="host"),
    "unlearning": _unlearning("NPO", "bf16-true", density=0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ON_24_GB)
def test_seven_billion_weights_on_24_gb(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The plan of models with a 16th, an 8th and a 4th of everything that Llama-2-7B has, tokens
    included: what is between it and the count shrinks, and so is less than 5 % of the whole model."""
    run = ON_24_GB[stage] | {"gradient_checkpointing": True, "batch_size": 1}
    ratios = []
    for part in (16, 8, 4):
        config = LlamaConfig(
            **{name: size // part for name, size in SEVEN.items()}, bos_token_id=None
        )
        folder = tmp_path / str(part)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)
        for module, constant in (
            (inference, "CHUNK"),
            *((module, "BLOCK") for module in (scoring, selection, sums)),
        ):
            monkeypatch.setattr(module, constant, WHOLE[constant] // part**2)
        peak, _, width = counted(str(folder), **run, rows=1, words=512 // part)
        ratios.append(planned(architecture(str(folder)), max_length=width, **run) / peak)
    print(*(f"{ratio:.4f}" for ratio in ratios))
    whole = ratios[-1] + (ratios[-1] - ratios[-2])  # if each doubling halves the difference
    assert all(0.95 < ratio < 1.05 for ratio in [*ratios, whole])
