"""What a training step costs beside its mathematics."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from wagle_pl.core.weights import fingerprint
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning import FinetuneModule, UnlearnModule


def run(
    module: FinetuneModule, rows: dict[str, str], *callbacks: L.Callback, **options: Any
) -> dict[str, Tensor]:
    """Three steps of three rows each; the weights then."""
    data = ForgetRetainDataModule(forget=rows["forget"], retain=rows["retain"], batch_size=3)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    own = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "callbacks": list(callbacks)}
    trainer = L.Trainer(**{**own, **dict.fromkeys(quiet, False), **options})
    trainer.fit(module, datamodule=data)
    return dict(module.lm.state_dict())


@pytest.fixture
def mask(tiny_model: str, tmp_path: Path) -> str:
    """File of a mask that selects about a third of every tensor."""
    parameters = dict(load_model(tiny_model).named_parameters())
    bools = {name: torch.rand(p.shape) < 0.3 for name, p in parameters.items()}
    made_by = {"model": tiny_model, "model_fingerprint": fingerprint(parameters.items())}
    return str(WeightMask.from_bools(bools, made_by).save(tmp_path / "mask.safetensors"))


def test_compiled_blocks_take_the_same_steps(
    tiny_model: str,
    rows: dict[str, str],
    mask: str,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """With a mask and recomputed activations; all blocks share a program, which nothing breaks."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counters.clear()
    plain, compiled = (
        run(
            UnlearnModule(
                tiny_model,
                str(tmp_path / f"{compile}"),
                objective="GradDiff",
                mask=mask,
                gradient_checkpointing=True,
                compile=compile,
            ),
            rows,
            precision="bf16-mixed",
        )
        for compile in (False, True)
    )
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-6) for name in plain)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]
