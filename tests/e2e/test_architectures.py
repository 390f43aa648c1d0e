"""Attribution and unlearning on models built otherwise than a Llama, from command to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from wagle_pl import WeightMask

WIDE = {"num_hidden_layers": 2, "hidden_size": 32}
SIZES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPT": {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4},
    "Mixtral": {
        **WIDE,
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "Mamba": {**WIDE, "state_size": 8},
}
#: Part of the names of weights that Wanda has to see the inputs of.
INSIDE = {"GPT2": "c_fc", "OPT": "fc1", "Mixtral": "experts.down_proj", "Mamba": "in_proj"}
WAGLE = "{score: wagle, density: 0.3, name: wagle}"
WANDA = "{score: wanda, density: 0.2, scope: row, name: wanda}"
ADAMW = ("MaskedAdamW", "--optimizer.lr", "1e-2", "--optimizer.weight_decay", "0.1")


def made(kind: str, folder: Path, tiny_model: str) -> str:
    """A model folder of one kind, with the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    names = [f"{name}_token_id" for name in ("pad", "bos", "eos")]
    special = {name: getattr(tokenizer, name) for name in names}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), **special, **SIZES[kind]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    return str(folder / kind)


@pytest.mark.parametrize("kind", SIZES)
def test_a_mask_and_unlearning_within_it(
    wagle: Any, kind: str, tmp_path: Path, tiny_model: str, heard: pytest.LogCaptureFixture
) -> None:
    model = made(kind, tmp_path, tiny_model)
    attribution = ("fit", "--model", "AttributionModule", "--model.model", model)
    options = ("--model.masks", f"[{WAGLE}, {WANDA}]", "--trainer.enable_checkpointing", "false")
    wagle(*attribution, "--model.output", "masks", *options)
    # Mamba's state matrices and convolutions are not watched; experts are
    assert ("wanda: " in heard.text) == (kind == "Mamba")
    wanda = WeightMask.load("masks/wanda")
    inside = [name for name in wanda.shapes if INSIDE[kind] in name and "bias" not in name]
    assert inside and all(abs(wanda[name].float().mean() - 0.2) < 0.02 for name in inside)

    unlearning = (
        "fit",
        "--model",
        "UnlearnModule",
        "--model.model",
        model,
        "--model.output",
        "out",
    )
    options = ("--model.mask", "masks/wagle", "--model.objective", "NPO", "--optimizer", *ADAMW)
    wagle(*unlearning, *options, "--trainer.max_steps", "2")
    mask = WeightMask.load("masks/wagle")
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (model, "out")
    )
    moved = {name: before[name] != after[name] for name in before}
    assert not any((moved[name] & ~mask[name]).any() for name in moved)
    selected = sum(mask[name].sum() for name in mask.shapes)
    assert torch.stack([bits.sum() for bits in moved.values()]).sum() > 0.9 * selected
