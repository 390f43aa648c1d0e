"""Predictions at θ₀: what the top k keep of them, and hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from wagle_pl.lm.inference import Predictions
from wagle_pl.lm.layers import blocks, capture
from wagle_pl.lm.models import load_model
from wagle_pl.objectives.streams import TopK


@settings(max_examples=60)
@given(
    n=st.integers(1, 8),
    vocabulary=st.integers(3, 60),
    k=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_top_k_misses_what_the_chain_rule_says(n: int, vocabulary: int, k: int, seed: int) -> None:
    """KL over k + 1 buckets = KL − t₀ · KL within the rest: never above the truth."""
    generator = torch.Generator().manual_seed(seed)
    then, now = (4 * torch.randn(n, vocabulary, generator=generator).double() for _ in range(2))
    targets = torch.randint(vocabulary, (n,), generator=generator)
    kept = TopK.of(Predictions(then.float()), targets, k)
    found, current, label = kept.align(now.float())
    assert kept.ids.shape[1] == min(k, vocabulary - 1)
    for logprobs in (found, current):
        torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(n))
    of_labels = found.gather(1, label[:, None]).double()
    exact = then.log_softmax(-1).gather(1, targets[:, None])
    torch.testing.assert_close(of_labels, exact, rtol=1e-5, atol=1e-5)

    exact = F.kl_div(
        now.log_softmax(-1), then.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    coarse = F.kl_div(current, found, log_target=True, reduction="none").sum(-1).double()
    outside = torch.ones(n, vocabulary, dtype=torch.bool).scatter(1, kept.ids.long(), False)
    missed = torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        tails = [logits[i][outside[i]].log_softmax(-1) for logits in (then, now)]
        weight = then[i].softmax(-1)[outside[i]].sum()
        missed[i] = weight * F.kl_div(tails[1], tails[0], log_target=True, reduction="sum")
    torch.testing.assert_close(coarse, exact - missed, rtol=1e-4, atol=1e-5)
    assert (coarse <= exact + 1e-5).all()


def test_top_k_rows_are_the_rows_asked_for() -> None:
    logits, targets = torch.randn(6, 9), torch.randint(9, (6,))
    rows = TopK.of(Predictions(logits), targets, 3).split([2, 1, 3])
    part, tokens = TopK.cat([rows[2], rows[0]]), [3, 4, 5, 0, 1]
    expected = TopK.of(Predictions(logits[tokens]), targets[tokens], 3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(part, expected, strict=True))


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
