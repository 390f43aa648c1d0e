"""Attribution and unlearning on models built otherwise than a Llama, from command to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import write_model

from wagle_pl import WeightMask
from wagle_pl.lm.models import load_model, load_tokenizer

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
ADAMW = "MaskedAdamW --optimizer.lr 1e-2 --optimizer.weight_decay 0.1"


@pytest.mark.parametrize("kind", SIZES)
def test_a_mask_and_unlearning_within_it(
    wagle: Any, kind: str, tmp_path: Path, tiny_model: str, heard: pytest.LogCaptureFixture
) -> None:
    model = write_model(kind, tmp_path / kind, load_tokenizer(tiny_model), **SIZES[kind])
    masks = ("--model.masks", f"[{WAGLE}, {WANDA}]", "--trainer.enable_checkpointing false")
    wagle(f"fit --model AttributionModule --model.model {model} --model.output masks", *masks)
    # Mamba's state matrices and convolutions are not watched; experts are
    assert ("wanda: " in heard.text) == (kind == "Mamba")
    wanda = WeightMask.load("masks/wanda")
    inside = [name for name in wanda.shapes if INSIDE[kind] in name and "bias" not in name]
    assert inside and all(abs(wanda[name].float().mean() - 0.2) < 0.02 for name in inside)

    options = f"--model.mask masks/wagle --model.objective NPO --optimizer {ADAMW}"
    unlearn = f"fit --model UnlearnModule --model.model {model} --model.output out"
    wagle(unlearn, options, "--trainer.max_steps 2")
    mask = WeightMask.load("masks/wagle")
    before, after = (dict(load_model(folder).named_parameters()) for folder in (model, "out"))
    changed = {name: before[name] != after[name] for name in before}
    assert not any((changed[name] & ~mask[name]).any() for name in mask)
    assert sum(int(bits.sum()) for bits in changed.values()) > 0.9 * mask.count()
