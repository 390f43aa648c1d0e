"""Measures against independent computations: brute force, scipy, nltk, torchmetrics."""

import math
import zlib

import numpy as np
import pytest
import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from scipy.stats import entropy, ks_2samp
from torchmetrics.functional.text import sacre_bleu_score

from wagle_pl.data.example import Example
from wagle_pl.evaluation import MEASURES, Records
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.classifiers import SentenceModel, toxic_labels
from wagle_pl.evaluation.measures import option_probability
from wagle_pl.evaluation.membership import SCORES
from wagle_pl.evaluation.scoring import token_statistics

generator = torch.Generator().manual_seed(0)


def uniform(*shape):
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def measured(name, rows, **options):
    return MEASURES[name].compute(Records(rows, **options))


def test_token_statistics_against_double_precision():
    logits = torch.randn(9, 17, generator=generator) * 4
    targets = torch.randint(0, 17, (9,), generator=generator)
    found = token_statistics(logits, targets, vocabulary=True)
    logprobs = logits.double().log_softmax(-1).numpy()
    p = np.exp(logprobs)
    mean = (p * logprobs).sum(-1)
    std = np.sqrt((p * (logprobs - mean[:, None]) ** 2).sum(-1))
    np.testing.assert_allclose(found.logprobs, logprobs[range(9), targets], atol=1e-5)
    np.testing.assert_array_equal(found.greedy, logprobs.argmax(-1) == targets.numpy())
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)
    np.testing.assert_allclose(found.std, std, atol=1e-4)
    certain = torch.full((1, 17), -100.0)
    certain[0, 3] = 100
    least = token_statistics(certain, torch.tensor([3]), True).std.item()
    assert least == pytest.approx(1e-3)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_memorisation_against_a_search_over_prefixes():
    for _ in range(200):
        n = int(torch.randint(1, 9, (), generator=generator))
        greedy = (torch.rand(n, generator=generator) < 0.7).tolist()
        assert F.exact_memorization(greedy) == pytest.approx(np.mean(greedy))
        # as OpenUnlearning's loop leaves k
        k = next((k for k in range(n) if all(greedy[k:])), n - 1)
        assert F.extraction_strength(greedy) == pytest.approx(1 - k / n)
    for measure in (F.exact_memorization, F.extraction_strength):
        with pytest.raises(F.Undefined, match="has no token but"):
            measure([])


def test_truth_ratios_against_the_equations():
    paraphrased, perturbed = uniform(6), uniform(6, 5)
    p, q = np.exp(-paraphrased.numpy()), np.exp(-perturbed.numpy())
    geometric = np.exp(np.log(q).mean(1)) / p
    found = F.truth_ratio(paraphrased, perturbed, "arithmetic")
    np.testing.assert_allclose(found, q.mean(1) / p, rtol=1e-12)
    np.testing.assert_allclose(F.truth_ratio(paraphrased, perturbed), geometric, rtol=1e-12)
    losses = zip(paraphrased.tolist(), perturbed.tolist(), strict=True)
    rows = [{"paraphrased_nll": a, "perturbed_nll": b} for a, b in losses]
    forgotten = np.minimum(geometric, 1 / geometric).mean()
    assert measured("truth_ratio", rows, forget=True) == pytest.approx(forgotten)
    assert measured("truth_ratio", rows) == pytest.approx(np.maximum(0, 1 - geometric).mean())
    assert measured("truth_probability", rows) == pytest.approx((1 / (1 + geometric)).mean())


def test_forget_quality_against_scipy():
    ratios = [uniform(50), uniform(50)]
    assert F.ks_test(*ratios) == pytest.approx(tuple(ks_2samp(*ratios)), rel=1e-9)


def test_options_and_choices_of_any_number():
    nll, other = uniform(50), uniform(50, 4)
    other[::3, 2:] = math.nan
    losses = list(zip(nll.tolist(), other.tolist(), strict=True))
    rows = [{"paraphrased_nll": right, "perturbed_nll": wrong} for right, wrong in losses]
    expected = np.mean([all(not wrong < right for wrong in row) for right, row in losses])
    assert measured("accuracy", rows) == expected
    logprobs, labels = -uniform(50, 4), torch.randint(0, 2, (50,), generator=generator)
    logprobs[::3, 2:] = math.nan
    expected = np.nanargmax(logprobs.numpy(), 1) == labels.numpy()
    assert F.choice_accuracy(logprobs, labels).tolist() == expected.tolist()
    rows = [{"nll": 0.5, "perturbed_nll": [1.0, 2.0]}, {"nll": 1.0, "perturbed_nll": [1.5]}]
    half, one = np.exp(-0.5), np.exp(-1)
    expected = [half / (half + one + np.exp(-2)), one / (one + np.exp(-1.5))]
    assert option_probability(Records(rows)) == pytest.approx(np.mean(expected))


def test_perplexity_weighs_tokens():
    losses = [[1.0, 2.0, 3.0], [0.5]]
    rows = [{"nll": np.mean(each), "tokens": len(each), "cut": False} for each in losses]
    expected = math.exp(np.mean([*losses[0], *losses[1]]))
    assert measured("perplexity", rows) == pytest.approx(expected)
    with pytest.raises(F.Undefined, match="no token to predict"):
        measured("word_perplexity", [row | {"answer": " "} for row in rows])


def test_unlearning_efficacy():
    expected = np.mean([0.2, 0.4, 0.9, 0.7])
    assert F.unlearning_efficacy([0.2, 0.4], [0.1, 0.3]) == pytest.approx(expected)
    with pytest.raises(F.Undefined):
        F.unlearning_efficacy([])
    with pytest.raises(F.Undefined, match="1 of 2"):
        F.mean(torch.tensor([1.0, math.nan]))


# -- membership inference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.01, 0.2, 0.4, 1.0])
def test_min_k_against_numpy(k):
    logprobs = -uniform(23) * 5
    expected = -np.sort(logprobs.numpy())[: max(1, int(23 * k))].mean()
    assert F.min_k(logprobs, k) == pytest.approx(expected)


def test_min_k_plus_plus_against_numpy():
    logprobs, mean, std = -uniform(23) * 5, uniform(23) - 3, uniform(23) + 0.5
    columns = {"logprobs": logprobs, "vocabulary_mean": mean, "vocabulary_std": std}
    row = {name: column.tolist() for name, column in columns.items()}
    expected = -np.sort((logprobs - mean) / std)[: int(23 * 0.4)].mean()
    assert SCORES["min_k_plus_plus"](Records([row])).item() == pytest.approx(expected)


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


def test_loss_over_compressed_length():
    score = SCORES["zlib"](Records([{"nll": 2.0, "answer": "abc" * 50}]))
    assert score.tolist() == [2.0 / len(zlib.compress(b"abc" * 50))]


# -- text -------------------------------------------------------------------------------------------------------------


def longest_common_subsequence(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            either = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else either
    return table[-1, -1]


def test_rouge_l_recall_against_a_direct_subsequence():
    target, prediction = "a man saw the red dog near a hill", "the dog saw a red hill"
    expected = longest_common_subsequence(target.split(), prediction.split()) / len(target.split())
    found = F.rouge([prediction, ""], [target, target])["rougeL_recall"]
    assert found.tolist() == pytest.approx([expected, 0])
    assert F.rouge(["running dogs"], ["run dog"])["rouge1_f1"].item() == 1
    assert F.rouge(["running dogs"], ["run dog"], stem=False)["rouge1_f1"].item() == 0


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        (
            "The quick fox jumps over the lazy dog.",
            "The quick fox jumped over the lazy dog, again.",
        ),
        (
            "It costs 3.50 dollars, or so they said to me.",
            "It costs 3.50 dollars, or so they told me.",
        ),
    ],
)
def test_bleu_against_torchmetrics_where_no_count_is_zero(prediction, target):
    expected = 100 * sacre_bleu_score([prediction], [[target]], tokenize="13a").item()
    assert F.bleu([prediction], [target]).item() == pytest.approx(expected, rel=1e-5) != 0


def test_bleu_smooths_like_nist():
    prediction, target = "the cat sat on a mat", "a dog lay on a mat"
    smooth = SmoothingFunction().method3
    expected = sentence_bleu([target.split()], prediction.split(), smoothing_function=smooth)
    assert F.bleu([prediction], [target]).item() == pytest.approx(100 * expected)
    assert F.bleu(["", "no word of it here", "on a mat"], [target] * 3).tolist() == [0, 0, 0]


def test_fluency_against_scipy():
    words = torch.randint(0, 4, (60,), generator=generator).tolist()
    expected = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        counts = [grams.count(gram) for gram in set(grams)]
        expected += weight * entropy(counts, base=2) / 2
    assert F.ngram_entropy(" ".join(map(str, words))) == pytest.approx(expected)
    texts = ["", "so so so so so so so so so", "!!!", "Under the Velebit."]
    assert [F.degenerate(text) for text in texts] == [True, True, True, False]
    rows = [{"generation": "a b c d a b c d"}, {"generation": "too short"}]
    assert measured("repetition", rows) == pytest.approx(1 - 4 / 5)
    rows = [{"generation": "It is PARIS.", "answer": "Paris"}, {"generation": "no", "answer": "a"}]
    assert measured("contains_answer", rows) == 0.5


def test_which_labels_are_toxic():
    assert toxic_labels(["non-toxic", "toxic"]) == ["toxic"]
    every = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
    assert toxic_labels(every) == every


class Embedded(SentenceModel):
    """A text as its two numbers."""

    def __init__(self):
        pass

    def __call__(self, texts):
        return torch.tensor([list(map(float, text.split())) for text in texts])


def test_nearest_answer_by_cosine():
    row = Example("answered", paraphrased_answer="1 0", perturbed_answers=["0 1", "-1 0"])
    said = {"generation": "5 1", "paraphrased_question_generation": "1 5"}
    table = [{"row": 1, "answer": "9 9", **said}, {"row": 0, "answer": "1 1", **said}]
    Embedded().annotate(table, [Example("answered"), row])
    assert (table[0]["nearest_answer"], table[0]["paraphrased_question_nearest_answer"]) == (1, 0)
    assert "nearest_answer" not in table[1]
