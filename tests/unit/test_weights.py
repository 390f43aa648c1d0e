"""Digests of weights: the same whoever reads which part of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from wagle_pl.core import distributed, weights
from wagle_pl.core.weights import (
    CHUNK,
    chunks_of,
    digest,
    fingerprint,
    mismatch,
    share_of,
    weights_digest,
)


def split_mix(number: int) -> int:
    """SplitMix64 of Steele, Lea and Flood, in Python's integers, made odd."""
    word = number * 0x9E3779B97F4A7C15 % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return (word ^ word >> 31) | 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_digest_is_the_sum_of_those_of_parts(dtype: torch.dtype):
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).to(dtype)
    start = 3 * CHUNK + 5
    whole, width = digest(values, start), dtype.itemsize // 2
    words = values.view(torch.int16).tolist()
    expected = sum(split_mix(1 + 5 * width + i) * word for i, word in enumerate(words))
    assert int(whole) % 2**64 == expected % 2**64
    assert digest(values[:13], start) + digest(values[13:], start + 13) == whole


def test_a_digest_of_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch):
    """Each rank reads its share, to a weight; tensors of less than a chunk, of more, and of none."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (3, CHUNK + 7), "b": (5,), "c": (0,), "d": ()}
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in sizes.items()}
    alone = weights_digest(tensors.items())
    assert weights_digest((n, t.bfloat16()) for n, t in tensors.items()) == alone
    for ranks in (2, 3, 64):
        found, total = [], torch.zeros(6, dtype=torch.int64)
        monkeypatch.setattr(distributed, "world_size", lambda ranks=ranks: ranks)
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "all_reduce_sum", total.add_)
            read = sum(len(share_of(tensor)[1]) for tensor in tensors.values())
            found.append(weights_digest(tensors.items()))
            assert read <= 3 * (CHUNK + 7) / ranks + 6
        assert found[-1] == alone and alone not in found[:-1]
        monkeypatch.undo()


def test_whatever_changes_a_model_changes_its_weights_digest():
    tensors = {"a": torch.randn(8, 8), "b": torch.randn(4)}
    digests = {weights_digest(tensors.items()), hashlib.sha256().hexdigest()}
    digests.add(weights_digest([("c", tensors["a"]), ("b", tensors["b"])]))
    digests.add(weights_digest([("a", tensors["a"].view(4, 16)), ("b", tensors["b"])]))
    digests.add(weights_digest([("b", tensors["b"]), ("a", tensors["a"])]))
    swapped = tensors["a"].flatten()[[1, 0, *range(2, 64)]].view(8, 8)
    digests.add(weights_digest([("a", swapped), ("b", tensors["b"])]))
    tensors["a"][0, 0] = -tensors["a"][0, 0]
    digests.add(weights_digest(tensors.items()))
    assert len(digests) == 7


CONFIGS = {
    "same": {},
    "epsilon": {"rms_norm_eps": 1e-3},
    "activation": {"hidden_act": "gelu"},
    "RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "scaled RoPE": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
}


def test_a_fingerprint_tells_what_changes_logits(tiny_model: str):
    """The same weights: the fingerprint changes exactly when the log-probabilities do."""
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids, found, logits = torch.arange(40).view(2, 20), {}, {}
    for name, options in CONFIGS.items():
        model = type(loaded)(type(loaded.config)(**loaded.config.to_dict() | options)).eval()
        model.load_state_dict(loaded.state_dict())
        found[name] = fingerprint(model)
        logits[name] = model(ids).logits
        assert weights_digest(model.named_parameters()) == found[name].partition("-")[0]
    assert found.pop("same") == fingerprint(loaded) and torch.equal(
        logits["same"], loaded(ids).logits
    )
    assert len({fingerprint(loaded), *found.values()}) == len(CONFIGS)
    for name, other in found.items():
        assert not torch.allclose(logits[name], logits["same"], atol=1e-4)
        assert mismatch(other, fingerprint(loaded)) == "configuration"
        assert mismatch(other, fingerprint(loaded).partition("-")[0]) is None


def test_names_and_ways_to_run_change_no_fingerprint(tiny_model: str, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = fingerprint(model)
    model.save_pretrained(tmp_path / "copy")
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "copy", dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert fingerprint(other) == before  # its weights are rounded for it
    options = {
        "use_cache": False,
        "pad_token_id": 3,
        "architectures": ["X"],
        "attention_dropout": 0.1,
    }
    for key, value in {**options, "initializer_range": 1.0, "key_of_tomorrow": None}.items():
        setattr(other.config, key, value)
    assert fingerprint(other) == before
    other.config.key_of_tomorrow = 2.0
    assert mismatch(fingerprint(other), before) == "configuration"


def test_chunks_beyond_32_bits():
    start = 2**33 - 3
    assert list(chunks_of(start, CHUNK)) == [(0, 3), (3, CHUNK)]
    assert digest(torch.ones(3), start) != digest(torch.ones(3), start - 1)
    assert weights.CHUNK % 8 == 0  # bits of a mask are read by the byte
