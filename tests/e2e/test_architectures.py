"""Attribution and unlearning on models built otherwise than a Llama, from the command line to the saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from wagle_pl import WeightMask

BLOCKS, HEADS = {"num_hidden_layers": 2}, {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPT": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "num_attention_heads": 4,
        **BLOCKS,
    },
    "Mixtral": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_local_experts": 4,
        **BLOCKS,
        **HEADS,
    },
    "Mamba": {"hidden_size": 32, "state_size": 8, **BLOCKS},
}
#: Part of the names of weights that Wanda has to see the inputs of.
INSIDE = {"GPT2": "c_fc", "OPT": "fc1", "Mixtral": "experts.down_proj", "Mamba": "in_proj"}


@pytest.fixture
def made(tmp_path: Path, tiny_model: str) -> Any:
    """A model folder of one kind, with the tiny model's tokenizer: made(kind) -> its path."""

    def make(kind: str) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        special = {
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
            for name in ("pad", "bos", "eos")
        }
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=len(tokenizer), **special, **SIZES[kind]
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return make


@pytest.mark.parametrize("kind", SIZES)
def test_a_mask_and_unlearning_within_it(
    wagle: Any, made: Any, kind: str, heard: pytest.LogCaptureFixture
) -> None:
    model = made(kind)
    masks = "[{score: wagle, density: 0.3, name: wagle}, {score: wanda, density: 0.2, scope: row, name: wanda}]"
    wagle(
        "fit",
        "--model",
        "AttributionModule",
        "--model.model",
        model,
        "--model.output",
        "masks",
        "--model.masks",
        masks,
        "--trainer.enable_checkpointing",
        "false",
    )
    assert ("wanda: " in heard.text) == (
        kind == "Mamba"
    )  # its state matrices and convolutions; experts are known
    wanda = WeightMask.load("masks/wanda")
    taken = {
        name: wanda[name].float()
        for name in wanda.shapes
        if INSIDE[kind] in name and "bias" not in name
    }
    assert taken and all(abs(bits.mean() - 0.2) < 0.02 for bits in taken.values())
    wagle(
        "fit",
        "--model",
        "UnlearnModule",
        "--model.model",
        model,
        "--model.mask",
        "masks/wagle",
        "--model.output",
        "out",
        "--model.objective",
        "NPO",
        "--optimizer",
        "MaskedAdamW",
        "--optimizer.lr",
        "1e-2",
        "--optimizer.weight_decay",
        "0.1",
        "--trainer.max_steps",
        "2",
    )
    mask = WeightMask.load("masks/wagle")
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (model, "out")
    )
    moved = {name: before[name] != after[name] for name in before}
    assert not any((moved[name] & ~mask[name]).any() for name in moved)
    assert sum(bits.sum() for bits in moved.values()) > 0.9 * sum(
        mask[name].sum() for name in mask.shapes
    )
