"""What only a CUDA device has: its strategies, optimisers, loss scaler, streams, kernels and nccl.

All but whole runs have the same body on the CPU, with what it has in their place, so that they are known to work.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    SaveAt,
    difference,
    environment,
    fit_arguments,
    moved,
    random_bools,
    trainer,
    weights,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import AdamW
from transformers.utils import is_flash_attn_2_available

from wagle_pl import ForgetRetainDataModule, UnlearnModule
from wagle_pl.attribution.host import HostAdder
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning import MaskedAdamW

pytestmark = pytest.mark.usefixtures("empty_folder")


def on_gpus(*values: Any, count: int = 1) -> Any:
    """Parameters of a test that needs this many CUDA devices."""
    missing = torch.cuda.device_count() < count
    skipped = pytest.mark.skipif(missing, reason=f"needs {count} CUDA devices")
    return pytest.param(*values, marks=[pytest.mark.gpu, skipped])


ACCELERATOR = {"cpu": "cpu", "cuda": "gpu"}
STRATEGIES = ["auto", *(f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "3_offload"))]


# -- whole runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def fit(tiny_model: str, rows: dict[str, str]) -> Any:
    """Run a fit as it is typed: fit("FinetuneModule", "--option …")."""

    def run(module: str, *options: str) -> None:
        fit = fit_arguments(module, tiny_model, rows, *options)
        typed = [sys.executable, "-m", "wagle_pl", *fit]
        done = subprocess.run(typed, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    return run


@pytest.mark.parametrize(
    ("accelerator", "strategy", "devices"),
    [
        *(on_gpus("gpu", strategy, 1) for strategy in STRATEGIES),
        *(on_gpus("gpu", strategy, 2, count=2) for strategy in ("ddp", *STRATEGIES[1:4])),
    ],
)
def test_the_answer_is_that_of_one_cpu(
    fit: Any, tiny_model: str, accelerator: str, strategy: str, devices: int
):
    """Attribution, then unlearning of its mask: frozen weights keep their bits, the others go where the CPU's go. Two
    GPUs meet over nccl."""
    attribute = "--model.density 0.3 --trainer.max_epochs 1"
    unlearn = "--model.objective NPO --model.mask one-mask --trainer.max_steps 5"
    here = f"--trainer.accelerator {accelerator} --trainer.strategy {strategy}"
    cases = {"one": ("--trainer.accelerator cpu", 1), "other": (here, devices)}
    for name, (where, count) in cases.items():
        cut = f"--trainer.devices {count} --data.batch_size {4 // count}"
        fit("AttributionModule", attribute, f"--model.output {name}-mask", where, cut)
        fit("UnlearnModule", unlearn, f"--model.output {name}", where, cut)
    mask, other = WeightMask.load("one-mask"), WeightMask.load("other-mask")
    assert mask.count() == other.count() and (mask & other).count() > 0.999 * mask.count()
    changed = moved(tiny_model, "other")
    assert not any((changed[name] & ~mask[name]).any() for name in mask)
    assert difference(weights("one"), weights("other")) < 1e-4


# -- steps -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mask(tiny_model: str) -> WeightMask:
    return WeightMask.from_bools(random_bools(parameter_shapes(load_model(tiny_model))))


@pytest.fixture
def unlearn(tiny_model: str, rows: dict[str, str], mask: WeightMask) -> Callable[..., Any]:
    """Train selected weights on a device; the module, with ``before`` and ``after``, whose frozen weights are alike."""

    def run(
        device: str, make: Any = MaskedAdamW, ckpt_path: Any = None, steps: int = 4, **options: Any
    ) -> Any:
        of_trainer = {
            key: options.pop(key) for key in ("precision", "plugins", "callbacks") if key in options
        }
        module = UnlearnModule(tiny_model, objective="GradDiff", mask=mask, lr=1e-3, **options)
        module.make_optimizer = make
        module.before = _copied(load_model(tiny_model))
        data = ForgetRetainDataModule(forget=rows["forget"], retain=rows["retain"], batch_size=4)
        made = trainer(accelerator=ACCELERATOR[device], max_steps=steps, **of_trainer)
        made.fit(module, data, ckpt_path=ckpt_path)
        module.after = _copied(module.lm)
        for name, start in module.before.items():
            frozen = ~mask[name]
            assert torch.equal(module.after[name][frozen], start[frozen].to(module.after[name]))
        return module

    return run


def _copied(lm: Any) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in lm.named_parameters()}


@pytest.mark.parametrize(
    ("device", "make"),
    [
        ("cpu", partial(AdamW, fused=True)),
        ("cpu", partial(AdamW, foreach=True)),
        on_gpus("cuda", MaskedAdamW),
        on_gpus("cuda", partial(AdamW, fused=True)),
        on_gpus("cuda", partial(AdamW, capturable=True)),
        on_gpus("cuda", partial(AdamW, fused=True, capturable=True)),
    ],
)
def test_optimizers(unlearn: Any, device: str, make: Any) -> None:
    """Steps are plain AdamW's on the CPU, also when a checkpoint is resumed, whose step counts are on the device."""
    made = partial(make, weight_decay=0.1)
    plain = unlearn("cpu", partial(AdamW, weight_decay=0.1, foreach=False)).after
    whole = unlearn(device, made)
    assert difference(plain, whole.after) < 1e-4
    SaveAt.left = 2
    with pytest.raises(KeyboardInterrupt):
        unlearn(device, made, warmup=0, decay="constant", callbacks=[SaveAt()])
    resumed = unlearn(device, made, "middle.ckpt", warmup=0, decay="constant").after
    unbroken = unlearn(device, made, warmup=0, decay="constant").after
    assert difference(resumed, unbroken) < 1e-6


@pytest.mark.parametrize("device", ["cpu", on_gpus("cuda")])
def test_a_loss_scaler(unlearn: Any, device: str) -> None:
    """In fp16, steps with gradients that overflow are skipped, until the scale is low enough."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)
    plugin = MixedPrecision("16-mixed", device, scaler)
    module = unlearn(device, plugins=[plugin], steps=16, warmup=0, decay="constant")
    assert scaler.get_scale() < 2.0**24
    assert all(weight.isfinite().all() for weight in module.after.values())
    changed = sum(int((module.after[n] != start).sum()) for n, start in module.before.items())
    assert changed > 0.5 * module.mask.count()


@pytest.mark.parametrize(
    ("device", "attention"), [("cpu", "sdpa"), on_gpus("cuda", "flash_attention_2")]
)
def test_packed_rows(unlearn: Any, device: str, attention: str) -> None:
    """Rows one after the other, which the kernel keeps apart, against padded ones."""
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash_attn is not installed")
    options = {"precision": "bf16-true", "warmup": 0}
    padded = unlearn("cpu", attn_implementation="eager", **options).after
    packed = unlearn(device, attn_implementation=attention, packing=True, **options).after
    assert difference(padded, packed) < 1e-2


# -- copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", on_gpus("cuda")])
def test_sums_in_host_memory(device: str) -> None:
    """Of tensors whose memory is used again at once: on a GPU they go through pinned buffers, on a stream."""
    adder = HostAdder(torch.device(device))
    draw = torch.Generator().manual_seed(0)
    sizes = [7, 1 << 20, 3, (1 << 20) + 5, 1000]
    totals, expected = ([torch.zeros(size) for size in sizes] for _ in range(2))
    for _ in range(5):
        for total, wanted, dtype in zip(totals, expected, [torch.float32, torch.bfloat16] * 3):  # noqa: B905
            values = torch.randn(len(total), generator=draw).to(dtype)
            wanted += values.float()
            there = values.to(device)
            adder.add(total, there)
            del there
            torch.full((len(total),), float("nan"), dtype=dtype, device=device)
    adder.wait()
    for total, wanted in zip(totals, expected, strict=True):
        assert torch.equal(total, wanted)
    if device == "cuda":
        assert all(buffer.is_pinned() for buffer in adder._buffers.queue)
