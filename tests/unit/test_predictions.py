"""Predictions without the logits of a whole batch: exact, and never more of them than a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from wagle_pl.lm import inference
from wagle_pl.lm.inference import (
    answer_places,
    forward_answers,
    in_chunks,
    logprobs_of,
    predict,
    sequence_logprobs,
)
from wagle_pl.lm.layers import blocks, capture
from wagle_pl.lm.models import load_model

VOCABULARY = 101
CHUNK = 7 * VOCABULARY
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "intermediate_size": 24, "head_dim": 8, "pad_token_id": 0}
#: Architecture -> what its logits are made with.
BEYOND = {
    "Gemma2": {"final_logit_softcapping": 2.0, "num_key_value_heads": 2},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.3},
}
ALONE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "GPT2": {},
    "GPTNeoX": {},
    "Gemma3": {"num_key_value_heads": 2},
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(**SIZES, **{**BEYOND, **ALONE}[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Rows of which the last is padded; 29 tokens are predicted."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 15), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2, 11:] = -100
    attention = torch.ones_like(ids)
    attention[2, 11:] = 0
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def plain_sums(lm: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B,) summed log-probabilities, from logits of every token."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logprobs = lm(**inputs).logits.float().log_softmax(-1)[:, :-1]
    wanted = batch["labels"][:, 1:]
    found = logprobs.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return (found * (wanted != -100)).sum(-1)


class LargestLogits(TorchDispatchMode):
    """Notes the most logits in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == VOCABULARY:
                weight = tensor.shape in ((VOCABULARY, VOCABULARY), (16, VOCABULARY))
                self.rows = max(self.rows, 0 if weight else tensor.numel() // VOCABULARY)
        return out


@contextmanager
def chunks_of(numbers: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "CHUNK", numbers)
        yield


@pytest.mark.parametrize("kind", [*ALONE, *BEYOND])
def test_likelihoods_are_those_of_the_model_s_own_logits(kind: str, batch: Any) -> None:
    """And their gradients; a head that is not all that makes logits runs in the model."""
    lm = build(kind)
    assert (
        answer_places(batch["labels"])
        == torch.tensor([*range(3, 14), *range(18, 29), *range(33, 40)])
    ).all()
    with chunks_of(CHUNK):
        for _ in range(2):  # at first it is not known what the model does to logits
            predicted = forward_answers(lm, batch)
            assert (predicted.head is None) == (kind in BEYOND)
            sums, counts = sequence_logprobs(predicted, batch["labels"])
            assert counts.tolist() == [11, 11, 7]
            exact = plain_sums(lm, batch)
            torch.testing.assert_close(sums, exact)
            gradients = [torch.autograd.grad(s.sum(), list(lm.parameters())) for s in (sums, exact)]
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_no_more_logits_at_once_than_a_chunk(batch: Any) -> None:
    """Forward and backward, also where two models are compared."""
    lm, other = build("Llama"), build("Llama")

    def divergence(now: Tensor, then: Tensor) -> Tensor:
        return (then.softmax(-1) * (then.log_softmax(-1) - now.log_softmax(-1))).sum(-1)

    rows = {}
    for chunk in (CHUNK, 1 << 25):
        with chunks_of(chunk), LargestLogits() as largest:
            found = forward_answers(lm, batch)
            with torch.no_grad():
                then = forward_answers(other, batch)
            loss = sequence_logprobs(found, batch["labels"])[0].sum()
            (loss + in_chunks(divergence, found, then).sum()).backward()
            rows[chunk] = largest.rows
    assert rows == {CHUNK: 7, 1 << 25: 29}


def test_second_derivatives_go_through_chunks(batch: Any) -> None:
    """What Hutchinson's estimate of the Hessian takes."""
    lm = build("Llama").double()
    parameters = list(lm.parameters())
    probes = [torch.randn_like(parameter) for parameter in parameters]
    products = []
    with sdpa_kernel(SDPBackend.MATH):
        for chunk in (CHUNK, 1 << 25):
            with chunks_of(chunk):
                loss = sequence_logprobs(forward_answers(lm, batch), batch["labels"])[0].sum()
                gradients = torch.autograd.grad(loss, parameters, create_graph=True)
                products.append(torch.autograd.grad(gradients, parameters, probes))
    for chunked, whole in zip(*products, strict=True):
        torch.testing.assert_close(chunked, whole)
        assert whole.abs().sum() > 0


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_mask_that_need_not_be_read_changes_no_bit(kind: str, padded: bool, batch: Any) -> None:
    """Attention over all tokens and in a window; transformers is left as it was."""
    lm, asks = build(kind), masking_utils.fast_all
    if not padded:
        batch = {name: tensor[:2] for name, tensor in batch.items()}
    with torch.no_grad():
        states, told = (
            forward_answers(lm, {**batch, **known}).states for known in ({}, {"padded": padded})
        )
        assert torch.equal(states, told)
        wrong = forward_answers(lm, {**batch, "padded": not padded}).states
    assert masking_utils.fast_all is asks
    assert padded or torch.allclose(states, wrong)


def test_places_are_all_that_is_projected(batch: Any) -> None:
    """One of each row's positions in any order, and twice; the output's logits are not the batch's."""
    lm = build("Llama")
    places = torch.tensor([31, 2, 2])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), LargestLogits() as largest:
        output, predicted = predict(lm, places, **inputs)
        found = in_chunks(logprobs_of, predicted, torch.tensor([5, 6, 7]))
    assert largest.rows == 3 and output.logits.shape == (1, 1, VOCABULARY)
    exact = lm(**inputs).logits.log_softmax(-1)
    torch.testing.assert_close(found, exact[[2, 0, 0], [1, 2, 2], [5, 6, 7]])


def test_hidden_states_are_those_of_the_block(tiny_model: str) -> None:
    lm = load_model(tiny_model)
    assert len(blocks(lm)) == 2
    ids = torch.arange(8).view(2, 4)
    lm(input_ids=ids, output_hidden_states=True)  # transformers leaves hooks of its own
    before = len(blocks(lm)[0]._forward_hooks)
    with capture(lm, (0, 1)) as hidden:
        output = lm(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(hidden[0], output.hidden_states[1])
    torch.testing.assert_close(lm.model.norm(hidden[1]), output.hidden_states[2])
    assert len(blocks(lm)[0]._forward_hooks) == before
