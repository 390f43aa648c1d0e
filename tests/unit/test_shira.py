"""Masks and patches as SHiRA adapters, as ``peft`` itself loads them, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.lm import models
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning import adapters as shira
from wagle_pl.unlearning.patch import Patch, make_patch

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 15).view(1, -1)


def is_linear(name: str) -> bool:
    return "_proj" in name


def draw(shapes: dict[str, tuple[int, ...]], density: float, where: Any = is_linear) -> WeightMask:
    """More weights of some layers than of others, and none of one."""
    generator, bools = torch.Generator().manual_seed(0), {}
    for number, (name, shape) in enumerate(shapes.items()):
        share = density * (1 + number % 3) / 3 if where(name) and "0.mlp.up" not in name else 0.0
        bools[name] = torch.rand(shape, generator=generator) < share
    return WeightMask.from_bools(bools)


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def test_a_mask_is_what_the_adapter_trains(tmp_path: Path, tiny_model: str) -> None:
    """After a step of SGD in peft, those weights differ that the mask selects; and back."""
    lm = models.load_model(tiny_model)
    mask = draw(parameter_shapes(lm), 0.3)
    folder = shira.mask_to_shira(mask, tiny_model, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(load(tiny_model), folder, is_trainable=True)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("shira_weight" in name for name in trained)
    torch.testing.assert_close(adapted(IDS).logits, lm(IDS).logits)
    adapted(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(trained.values(), 1.0).step()
    moved = dict(adapted.merge_and_unload().named_parameters())
    for name, before in lm.named_parameters():
        assert torch.equal(moved[name] != before, mask[name] & (moved[name] != before))
        assert not mask[name].any() or (moved[name] != before)[mask[name]].float().mean() > 0.9
    back = shira.mask_from_shira(folder, mask.shapes, {"model_fingerprint": "f"})
    assert back == mask and back.origin == f"imported from {folder}"
    assert back.metadata["model_fingerprint"] == "f"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_is_what_the_adapter_adds(
    tmp_path: Path, tiny_model: str, dtype: torch.dtype
) -> None:
    base, patch = patched(tmp_path, tiny_model, dtype)
    folder = shira.patch_to_shira(base, patch.path, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] > 1
    adapted = peft.PeftModel.from_pretrained(load(base, dtype), folder)
    unlearned = load(tmp_path / "unlearned", dtype)
    with torch.no_grad():
        expected = unlearned(IDS).logits
        assert (load(base, dtype)(IDS).logits - expected).abs().max() > 1e-3
        torch.testing.assert_close(adapted(IDS).logits, expected)
    again = shira.patch_from_shira(base, folder, tmp_path / "again.patch")
    assert again.tensors.keys() == patch.tensors.keys()
    if dtype == torch.bfloat16:
        assert (again.base, again.unlearned) == (patch.base, patch.unlearned)
        found = adapted.merge_and_unload().state_dict()
        assert all(torch.equal(found[n], tensor) for n, tensor in unlearned.state_dict().items())


def patched(
    folder: Path, model: str, dtype: torch.dtype = torch.float32, where: Any = is_linear
) -> tuple[Path, Patch]:
    """A base in ``dtype``, and the patch to a model in which a mask's weights differ."""
    for name in ("base", "unlearned"):
        shutil.copytree(model, folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / name / "config.json").write_text(json.dumps(config))
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "base/model.safetensors").items()}
    mask = draw({name: tuple(t.shape) for name, t in tensors.items()}, 0.3, where)
    new = {n: torch.where(mask[n], t * 1.5 + 0.02, t) for n, t in tensors.items()}
    for name, weights in (("base", tensors), ("unlearned", new)):
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "base", make_patch(folder / "base", folder / "unlearned", folder / "p.patch")


def test_what_peft_cannot_hold_is_refused(tmp_path: Path, tiny_model: str) -> None:
    shapes, out = parameter_shapes(models.load_model(tiny_model)), tmp_path / "out"
    for where, density, message in (
        (lambda name: "embed" in name, 0.3, "of model.embed_tokens.weight, and peft's SHiRA takes"),
        (lambda name: "norm" in name, 0.9, "norm.weight, and peft's SHiRA takes"),
        (is_linear, 3.0, "has room for r"),
        (is_linear, 0.0, "there is nothing to adapt"),
    ):
        with pytest.raises(WagleError, match=message):
            shira.mask_to_shira(draw(shapes, density, where), tiny_model, out)
    base, patch = patched(tmp_path, tiny_model, where=lambda name: "norm" in name)
    with pytest.raises(WagleError, match=r"p\.patch has .* of model\..*norm\.weight"):
        shira.patch_to_shira(base, patch.path, out)
    with pytest.raises(WagleError, match="is of the model with digest"):
        shira.patch_to_shira(tmp_path / "unlearned", patch.path, out)
    with pytest.raises(WagleError, match="is no SHiRA adapter"):
        shira.mask_from_shira(tiny_model, shapes, {})
    folder = shira.mask_to_shira(draw(shapes, 0.3), tiny_model, tmp_path / "adapter")
    smaller = {name: shape for name, shape in shapes.items() if "up_proj" not in name}
    with pytest.raises(WagleError, match=r"has places in .*up_proj\.weight that the model lacks"):
        shira.mask_from_shira(folder, smaller, {})
    assert not out.exists()
