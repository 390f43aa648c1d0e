"""What attacks are made of: quantisation, fine-tuning, linear classifiers and wordings, against others' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import collate
from wagle_pl.data.example import Example, parse_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.template import Template
from wagle_pl.evaluation.attacks.attack import worst
from wagle_pl.evaluation.attacks.weights import finetune_, restored
from wagle_pl.lab.attacks.probing import (
    folds_of,
    order_answers,
    ridge,
    separate,
    share_above,
)
from wagle_pl.lm.layers import linear_weights
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.quantised import NF4, fake_quantise, quantise_, rounded_to

normal = torch.randn


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_quantisation_against_the_formula(bits):
    weights = normal(7, 33) * torch.logspace(-3, 1, 7)[:, None] + 0.01
    top = 2**bits - 1
    low, high = weights.amin(1, keepdim=True).clamp(max=0), weights.amax(1, keepdim=True)
    scale = (high.clamp(min=0) - low) / top
    zero = (-low / scale).round()
    expected = (((weights / scale).round() + zero).clamp(0, top) - zero) * scale
    found = fake_quantise(weights, bits)
    # torch multiplies by the scale's inverse: a value half-way between levels may go either way
    assert ((found - expected).abs() <= scale * 1.001).all()
    assert ((found - expected).abs() <= scale * 1e-4).float().mean() > 0.99
    assert max(len(row.unique()) for row in found) <= 2**bits
    assert ((found - weights).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("form", [4, "nf4", "q8_0", "q4_0"])
def test_quantisation_keeps_the_dtype_and_zeros(form):
    assert rounded_to(normal(3, 32).bfloat16(), form).dtype == torch.bfloat16
    assert torch.equal(rounded_to(torch.zeros(2, 32), form), torch.zeros(2, 32))


def test_nf4_is_that_of_bitsandbytes():
    """The codes are those that bitsandbytes 0.50.2 gives on a CPU; itself, where it is installed."""
    codes = "0000011111111222223334444555666778889900011122223333444444455555"
    codes = [int(code) + 10 * (i > 37) for i, code in enumerate(codes)]
    line = torch.linspace(-1, 1, 64)
    assert torch.equal(rounded_to(3 * line[None], "nf4"), 3 * torch.tensor(NF4)[codes][None])
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in ((200, 640), (7 * 96,)):
        weights = normal(*shape)
        packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
        expected = functional.dequantize_4bit(packed, state).view(shape)
        assert torch.equal(rounded_to(weights, "nf4"), expected)


@pytest.mark.parametrize(("form", "top"), [("q8_0", 127), ("q4_0", -8)])
def test_the_forms_of_llama_cpp(form, top):
    """A block of 32 has one scale, a half: the entry of largest absolute value is at the end of the levels."""
    weights = normal(5, 96)
    found = rounded_to(weights, form).view(-1, 32)
    blocks = weights.view(-1, 32)
    furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = (furthest.abs() / top if top > 0 else furthest / top).half().float()
    levels = found / scale
    assert torch.equal(levels.round() * scale, found)
    assert levels.min() >= -abs(top) and levels.max() <= (top if top > 0 else 7)
    inside = (blocks / scale).round() <= (top if top > 0 else 7)
    assert ((found - blocks).abs() <= scale.abs() * 0.51)[inside].all()
    with pytest.raises(WagleError, match=f"{form} has blocks of 32 .* a row of 12"):
        rounded_to(normal(2, 12), form)


def test_what_is_quantised(tiny_model):
    lm = load_model(tiny_model)
    before = {name: weights.clone() for name, weights in lm.state_dict().items()}
    quantise_(lm, 4)
    for name, weights in lm.state_dict().items():
        assert torch.equal(weights, before[name]) == ("proj" not in name)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    conv = gpt.transformer.h[0].attn.c_attn.weight
    expected = fake_quantise(conv.detach().T, 4).T  # (in, out): its channels are columns
    assert len(linear_weights(gpt, head=False)) == 4
    quantise_(gpt, 4)
    assert torch.equal(conv, expected)


def test_experts_are_quantised():
    """Each expert's matrices by themselves, (out, in), as a loop over them does."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    lm = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    experts = lm.model.layers[0].mlp.experts
    before = {name: weight.detach().clone() for name, weight in experts.named_parameters()}
    quantise_(lm, 3)
    assert set(before) == {"gate_up_proj", "down_proj"}
    for name, weights in before.items():
        for expert in range(3):
            matrix, found = weights[expert], getattr(experts, name)[expert]
            torch.testing.assert_close(found, fake_quantise(matrix, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(tiny_model, dtype):
    lm = load_model(tiny_model, dtype=dtype)
    first = next(lm.parameters()).requires_grad_(False)
    before = {name: weights.clone() for name, weights in lm.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), restored(lm.parameters()):
        finetune_(lm, [batch_of(tiny_model)] * 2, 1e-3)
        assert not torch.equal(first, before["model.embed_tokens.weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(weights, before[name]) for name, weights in lm.state_dict().items())
    assert not first.requires_grad and all(p.grad is None for p in lm.parameters())


def batch_of(model: str, count: int = 4) -> dict[str, torch.Tensor]:
    """Right-padded tokens of some forget rows."""
    template, rows = Template(load_tokenizer(model)), parse_rows(bundled("forget")[:count], "")
    return collate([template.encode(row) for row in rows], 0)


def test_finetuning_against_a_plain_loop(tiny_model):
    batch = batch_of(tiny_model)
    lm, plain = load_model(tiny_model).eval(), load_model(tiny_model).eval()
    losses = finetune_(lm, [batch] * 3, 1e-3)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for expected in losses:
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        of_rows = zip(logits, batch["labels"], strict=True)
        losses_of_rows = [cross_entropy(row[:-1], labels[1:]) for row, labels in of_rows]
        loss = torch.stack(losses_of_rows).mean()
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    for ours, theirs in zip(lm.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_small_steps_are_not_lost_in_bfloat16(tiny_model):
    batch = batch_of(tiny_model)
    exact, half = load_model(tiny_model).eval(), load_model(tiny_model, dtype=torch.bfloat16).eval()
    for lm in (exact, half):
        finetune_(lm, [batch] * 30, 1e-4)
    start = load_model(tiny_model)
    for p, q, r in zip(exact.parameters(), half.parameters(), start.parameters(), strict=True):
        if p.ndim == 2:  # as far, on average, as in fp32; added in bf16 steps would be nothing
            assert 0.5 < (q.float() - r).abs().mean() / (p - r).abs().mean() < 2


# -- linear classifier ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 6), (12, 30)])
def test_ridge_against_the_normal_equations(shape):
    features = normal(*shape).double().numpy()
    targets = np.sign(normal(shape[0]).double().numpy())
    centred = features - features.mean(0)
    penalty = 0.3 * (centred**2).sum(1).mean()
    primal = centred.T @ centred + penalty * np.eye(shape[1])
    expected = np.linalg.solve(primal, centred.T @ (targets - targets.mean()))
    weights = ridge(torch.tensor(features), torch.tensor(targets).double(), 0.3)
    np.testing.assert_allclose(weights, expected, rtol=1e-8, atol=1e-10)


def test_the_share_of_ordered_pairs_against_scipy():
    a, b = normal(9).round(decimals=1), normal(13).round(decimals=1)
    assert share_above(a[:, None] - b) == pytest.approx(mannwhitneyu(a, b).statistic / (9 * 13))


def test_what_a_linear_classifier_can_tell():
    direction = normal(50)
    ours, others = normal(60, 50).double() + direction, normal(40, 50).double() - direction
    assert separate(ours, others, 1.0, 5, seed=0) == 1.0
    sides = [(normal(60, 50).double(), normal(40, 50).double()) for _ in range(40)]
    noise = [separate(*both, 1.0, 5, seed=s) for s, both in enumerate(sides)]
    assert np.mean(noise) == pytest.approx(0.5, abs=0.05)
    questions = 10 * normal(240, 1, 50).double()  # far apart: only differences tell
    wrong = questions + 0.5 * normal(240, 4, 50)
    unknown = questions + 0.5 * normal(240, 1, 50)
    right = unknown + direction
    assert order_answers(list(right - wrong), 1.0, 5, seed=0) > 0.95
    assert order_answers(list(unknown - wrong), 1.0, 5, seed=0) == pytest.approx(0.5, abs=0.12)
    same = torch.ones(5, 3).double()
    assert separate(same, same, 1.0, 5, seed=0) == 0.5  # nothing to see


def test_folds_are_even_and_seeded():
    part = folds_of(23, 5, seed=1)
    assert sorted(torch.bincount(part).tolist()) == [4, 4, 5, 5, 5]
    assert torch.equal(part, folds_of(23, 5, seed=1))
    assert not torch.equal(part, folds_of(23, 5, seed=2))


# -- wordings ---------------------------------------------------------------------------------------------------------


def test_rewording_changes_the_question_alone():
    said = zip(("user", "assistant") * 2, ("Hello", "Yes?", "Who?", "Ada."), strict=True)
    messages = [{"role": role, "content": text} for role, text in said]
    row = Example.of({"messages": messages})
    assert row.asked == "Who?" and row.answer == "Ada."
    changed = row.asking("Who then?")
    assert [m["content"] for m in changed.messages] == ["Hello", "Yes?", "Who then?"]
    assert changed.asked == "Who then?" and changed.answer == "Ada."
    assert messages[2]["content"] == "Who?"
    for unasked in ({"text": "A text."}, {"prompt": "Go", "response": "on"}):
        assert Example.of(unasked).asked is None
    plain = Example.of({"question": "Who?", "answer": "Ada"})
    assert plain.asking("Which one?") == Example.of({"question": "Which one?", "answer": "Ada"})


def test_the_worst_of_several_wordings_has_the_likeliest_choice():
    records = [{"label": 1, "choice_logprobs": each} for each in ([0.0, 1.0], [-9.0, -7.0])]
    assert worst(records) == records[1]
