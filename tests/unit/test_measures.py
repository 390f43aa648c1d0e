"""Measures against independent computations: brute force, scipy, nltk, torchmetrics."""

import math
import zlib

import numpy as np
import pytest
import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scipy.stats import entropy
from torchmetrics.functional.text import sacre_bleu_score

from wagle_pl.evaluation import MEASURES, Records
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.classifiers import nearest_answer, toxic_labels
from wagle_pl.evaluation.scoring import token_statistics

generator = torch.Generator().manual_seed(0)


def test_token_statistics_against_double_precision():
    logits = torch.randn(9, 17, generator=generator) * 4
    targets = torch.randint(0, 17, (9,), generator=generator)
    found = token_statistics(logits, targets, greedy=True, vocabulary=True)
    logprobs = logits.double().log_softmax(-1).numpy()
    p = np.exp(logprobs)
    np.testing.assert_allclose(found.logprobs, logprobs[range(9), targets], atol=1e-5)
    np.testing.assert_array_equal(found.greedy, logprobs.argmax(-1) == targets.numpy())
    mean = (p * logprobs).sum(-1)
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)
    np.testing.assert_allclose(
        found.std, np.sqrt((p * (logprobs - mean[:, None]) ** 2).sum(-1)), atol=1e-4
    )
    certain = torch.full((1, 17), -100.0)
    certain[0, 3] = 100
    assert token_statistics(certain, torch.tensor([3]), True, True).std.item() == pytest.approx(
        1e-3
    )


def test_memorisation_against_a_search_over_prefixes():
    for _ in range(200):
        n = int(torch.randint(1, 9, (), generator=generator))
        greedy = (torch.rand(n, generator=generator) < 0.7).tolist()
        assert F.exact_memorization(greedy) == pytest.approx(np.mean(greedy))
        k = next(
            (k for k in range(n) if all(greedy[k:])), n - 1
        )  # as OpenUnlearning's loop leaves k
        assert F.extraction_strength(greedy) == pytest.approx(1 - k / n)
    for measure in (F.exact_memorization, F.extraction_strength):
        with pytest.raises(F.Undefined):
            measure([])


def test_truth_ratio_as_a_probability():
    paraphrased, perturbed = (
        torch.rand(5, generator=generator),
        torch.rand(5, 4, generator=generator),
    )
    p, q = np.exp(-paraphrased.numpy()), np.exp(-perturbed.numpy().mean(1))
    score = F.truth_ratio_score(F.truth_ratio(paraphrased, perturbed), "prob_mean")
    np.testing.assert_allclose(score, p / (p + q), rtol=1e-6)


def test_options_and_choices():
    nll, other = torch.rand(50, generator=generator), torch.rand(50, 4, generator=generator)
    other[::3, 2:] = math.nan
    right = [
        all(not o < n for o in row) for n, row in zip(nll.tolist(), other.tolist(), strict=True)
    ]
    assert F.nearest_option(nll, other).tolist() == right
    logprobs, labels = (
        -torch.rand(50, 4, generator=generator),
        torch.randint(0, 2, (50,), generator=generator),
    )
    logprobs[::3, 2:] = math.nan
    expected = [
        int(np.nanargmax(row)) == label
        for row, label in zip(logprobs.numpy(), labels.tolist(), strict=True)
    ]
    assert F.choice_accuracy(logprobs, labels).tolist() == expected


def test_perplexity_weighs_tokens():
    losses = [[1.0, 2.0, 3.0], [0.5]]
    sums, counts = torch.tensor([sum(x) for x in losses]), torch.tensor([len(x) for x in losses])
    expected = math.exp(np.mean([*losses[0], *losses[1]]))
    assert F.perplexity(sums, counts).item() == pytest.approx(expected)
    with pytest.raises(F.Undefined):
        F.perplexity(torch.zeros(1), torch.zeros(1))


# -- membership inference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.01, 0.2, 0.4, 1.0])
def test_min_k_against_numpy(k):
    logprobs = -torch.rand(23, generator=generator) * 5
    mean, std = torch.rand(23, generator=generator) - 3, torch.rand(23, generator=generator) + 0.5
    count = max(1, int(23 * k))
    assert F.min_k(logprobs, k) == pytest.approx(
        -np.sort(logprobs.numpy())[:count].mean(), rel=1e-6, abs=1e-6
    )
    standard = (logprobs.numpy() - mean.numpy()) / std.numpy()
    expected = -np.sort(standard)[:count].mean()
    assert F.min_k_plus_plus(logprobs, mean, std, k) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_membership_auc_counts_pairs():
    members = torch.randint(0, 6, (15,), generator=generator).float()
    others = torch.randint(1, 8, (11,), generator=generator).float()
    pairs = [(m < o) + 0.5 * (m == o) for m in members.tolist() for o in others.tolist()]
    assert F.membership_auc(members, others) == pytest.approx(np.mean(pairs))
    with pytest.raises(F.Undefined, match="no non-members"):
        F.membership_auc(members, members[:0])


def test_privacy_leakage_is_that_of_muse():
    retrained = (
        0.4772  # MUSE's area of Min-40% on the retrained model, News, forget against holdout texts
    )
    for area in (0.001, 0.4772, 0.9):
        expected = (area - retrained) / retrained * 100
        assert F.privacy_leakage(1 - area, 1 - retrained) == pytest.approx(expected)


def test_zlib_ratio():
    assert F.zlib_ratio(2.0, "abc" * 50) == 2.0 / len(zlib.compress(b"abc" * 50))


# -- text -------------------------------------------------------------------------------------------------------------

PAIRS = [
    (
        "The quick brown fox jumps over the lazy dog.",
        "The quick brown fox jumped over the lazy dog, again.",
    ),
    ("It costs 3.50 dollars, or so they said to me.", "It costs 3.50 dollars, or so they told me."),
    (
        "He was born in Rauma, in a flat above a shop.",
        "He came into the world in Rauma, in a flat above a lace shop.",
    ),
]


def test_bleu_against_torchmetrics_where_no_count_is_zero():
    for prediction, target in PAIRS:
        expected = 100 * sacre_bleu_score([prediction], [[target]], tokenize="13a").item()
        assert expected > 0
        assert F.bleu([prediction], [target]).item() == pytest.approx(expected, rel=1e-5)


def test_bleu_smooths_like_nist():
    prediction, target = "the cat sat on a mat", "a dog lay on a mat"
    expected = sentence_bleu(
        [target.split()], prediction.split(), smoothing_function=SmoothingFunction().method3
    )
    assert F.bleu([prediction], [target]).item() == pytest.approx(100 * expected)
    assert F.bleu(["", "no word of it here", "on a mat"], [target] * 3).tolist() == [0, 0, 0]


def test_rouge_without_stemming():
    assert F.rouge(["running dogs"], ["run dog"])["rouge1_f1"].item() == 1
    assert F.rouge(["running dogs"], ["run dog"], stem=False)["rouge1_f1"].item() == 0


def test_fluency_against_scipy():
    words = torch.randint(0, 4, (60,), generator=generator).tolist()
    expected = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        counts = [grams.count(gram) for gram in set(grams)]
        expected += weight * entropy(counts, base=2) / 2
    assert F.ngram_entropy(" ".join(map(str, words))) == pytest.approx(expected)
    assert (
        F.degenerate("")
        and F.degenerate("so so so so so so so so so")
        and not F.degenerate("Under the Velebit.")
    )
    rows = Records([{"generation": "a b c d a b c d"}, {"generation": "too short"}])
    assert MEASURES["repetition"].compute(rows) == pytest.approx(1 - 4 / 5)


def test_which_labels_are_toxic():
    assert toxic_labels(["non-toxic", "toxic"]) == ["toxic"]
    every = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
    assert toxic_labels(every) == every


def test_nearest_answer_by_cosine():
    options = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert nearest_answer(torch.tensor([5.0, 1.0]), options) and not nearest_answer(
        torch.tensor([1.0, 5.0]), options
    )


def test_unlearning_efficacy():
    assert F.unlearning_efficacy([0.2, 0.4], [0.1, 0.3]) == pytest.approx(
        np.mean([0.2, 0.4, 0.9, 0.7])
    )
    with pytest.raises(F.Undefined):
        F.unlearning_efficacy([])
    with pytest.raises(F.Undefined, match="1 of 2"):
        F.mean(torch.tensor([1.0, math.nan]))
