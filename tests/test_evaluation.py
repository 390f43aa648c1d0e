"""Measures against independent computations, and the test loop."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_rows
from scipy.stats import hmean, ks_2samp

from wagle_pl import WagleError
from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation import AnswerProbability, ForgetQuality, Rouge, TruthRatio
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.likelihood import forward_answers, sequence_logprobs, token_logprobs
from wagle_pl.evaluation.tofu import load_result, tofu_forget_quality, tofu_model_utility
from wagle_pl.models import load_model, load_tokenizer

generator = torch.Generator().manual_seed(0)


def random_logits(rows=3, length=7, vocabulary=11):
    logits = torch.randn(rows, length, vocabulary, generator=generator) * 3
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    labels[:, -1] = 1
    return logits, labels


def test_token_logprobs_against_a_direct_sum():
    for _ in range(20):
        logits, labels = random_logits()
        logprobs, mask = token_logprobs(logits, labels)
        direct = logits.double().log_softmax(-1)
        for b in range(len(labels)):
            for t in range(labels.shape[1] - 1):
                target = int(labels[b, t + 1])
                expected = 0.0 if target == -100 else direct[b, t, target].item()
                assert logprobs[b, t].item() == pytest.approx(expected, abs=1e-5)
                assert mask[b, t].item() == (target != -100)


def test_trimmed_logits_give_the_same_likelihoods(tiny_model):
    model = load_model(tiny_model).eval()
    ids = torch.randint(5, 300, (4, 20), generator=generator)
    labels = ids.clone()
    labels[:, :9] = -100
    labels[2, :14] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    output, trimmed = forward_answers(model, batch)
    assert output.logits.shape[1] == trimmed.shape[1] == 12
    whole = model(input_ids=ids).logits
    for a, b in zip(sequence_logprobs(output.logits, trimmed), sequence_logprobs(whole, labels), strict=True):
        assert torch.allclose(a, b)


def test_truth_ratio_both_forms_against_the_equations():
    paraphrased = torch.rand(6, generator=generator, dtype=torch.float64)
    perturbed = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    p, q = np.exp(-paraphrased.numpy()), np.exp(-perturbed.numpy())
    np.testing.assert_allclose(F.truth_ratio(paraphrased, perturbed, "arithmetic"), q.mean(1) / p, rtol=1e-12)
    geometric = np.exp(np.log(q).mean(1)) / p
    np.testing.assert_allclose(F.truth_ratio(paraphrased, perturbed), geometric, rtol=1e-12)
    scores = np.minimum(geometric, 1 / geometric).mean()
    metric = TruthRatio("closer_to_1")
    metric.update(paraphrased[:2], perturbed[:2])
    metric.update(paraphrased[2:], perturbed[2:])
    assert metric.compute().item() == pytest.approx(scores, rel=1e-6)


def test_forget_quality_against_scipy():
    ratios = [torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2)]
    metric = ForgetQuality(ratios[1])
    metric.update(torch.log(ratios[0]), torch.zeros(50, 3))
    assert metric.compute().item() == pytest.approx(ks_2samp(ratios[0], ratios[1]).pvalue, rel=1e-9)


def test_option_probability_skips_missing_options():
    nll, other = torch.tensor([0.5, 1.0]), torch.tensor([[1.0, 2.0], [1.5, math.nan]])
    expected = [
        math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1) + math.exp(-2)),
        math.exp(-1) / (math.exp(-1) + math.exp(-1.5)),
    ]
    metric = AnswerProbability()
    metric.update(nll, other)
    assert metric.compute().item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_harmonic_mean_against_scipy():
    values = torch.rand(9, generator=generator, dtype=torch.float64)
    assert F.harmonic_mean(values).item() == pytest.approx(hmean(values.numpy()))
    assert F.harmonic_mean(torch.tensor([0.5, 0.0])).item() == 0


def longest_common_subsequence(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_rouge_l_recall_against_a_direct_subsequence():
    target, prediction = "a man saw the red dog near a hill", "the dog saw a red hill"
    expected = longest_common_subsequence(target.split(), prediction.split()) / len(target.split())
    metric = Rouge()
    metric.update([prediction, ""], [target, target])
    assert metric.compute().item() == pytest.approx(expected / 2)


# -- the loop ---------------------------------------------------------------------------------------------------------

TEST = ("test", "--model", "EvaluationModule", "--model.max_new_tokens", "12", "--data.test_batch_size", "3")


@pytest.fixture
def test_sets(rows):
    names = ("forget", "retain", "real_authors", "world_facts")
    files = dict(
        zip(names, (rows["forget_test"], rows["retain_test"], rows["forget_test"], rows["retain_test"]), strict=True)
    )
    return ("--data.test", json.dumps(files))


def test_metrics_tables_and_result_file(wagle, tiny_model, test_sets, rows, tmp_path):
    module = wagle(*TEST, "--model.model", tiny_model, "--model.output", "out", *test_sets).model
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics == module.metrics
    table = pq.read_table(tmp_path / "out/forget.parquet").to_pylist()
    source = load_rows(rows["forget_test"])
    assert [row["question"] for row in table] == [row["question"] for row in source]
    assert all(isinstance(row["generation"], str) and len(row["perturbed_nll"]) == 5 for row in table)
    assert metrics["forget/probability"] == pytest.approx(np.mean([math.exp(-row["nll"]) for row in table]), rel=1e-6)
    result = load_result(tmp_path / "out")
    assert metrics["model_utility"] == pytest.approx(tofu_model_utility(result))
    again = wagle(*TEST, "--model.model", tiny_model, "--model.output", "b", "--model.retrained", "out", *test_sets)
    assert again.model.metrics["forget_quality"] == 1.0
    assert (tmp_path / "b/forget.parquet").read_bytes() == (tmp_path / "out/forget.parquet").read_bytes()


def test_batched_equals_one_at_a_time(wagle, tiny_model, test_sets, tmp_path):
    tables = []
    for size in (1, 4):
        wagle(
            *TEST[:-2],
            "--data.test_batch_size",
            size,
            "--model.model",
            tiny_model,
            "--model.output",
            f"o{size}",
            *test_sets,
        )
        tables.append(pq.read_table(tmp_path / f"o{size}/forget.parquet").to_pylist())
    for one, batched in zip(*tables, strict=True):
        assert one["generation"] == batched["generation"]
        assert one["nll"] == pytest.approx(batched["nll"], abs=1e-4)
        assert one["perturbed_nll"] == pytest.approx(batched["perturbed_nll"], abs=1e-4)


def test_generation_equals_transformers_own(wagle, tiny_model, test_sets, tmp_path):
    wagle(*TEST, "--model.model", tiny_model, "--model.output", "out", *test_sets)
    row = pq.read_table(tmp_path / "out/forget.parquet").to_pylist()[0]
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    chat = [{"role": "user", "content": row["question"]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert row["generation"] == text


def test_an_interrupted_test_continues_with_the_next_set(wagle, tiny_model, test_sets, tmp_path, monkeypatch):
    from wagle_pl.evaluation import EvaluationModule

    args = (*TEST, "--model.model", tiny_model, "--model.output", "out", *test_sets)
    finish, scored = EvaluationModule._finish_set, []

    def interrupted(self, name):
        if name == "real_authors":
            raise KeyboardInterrupt
        finish(self, name)

    monkeypatch.setattr(EvaluationModule, "_finish_set", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        wagle(*args)
    assert not (tmp_path / "out/metrics.json").exists() and (tmp_path / "out/retain.parquet").exists()
    monkeypatch.setattr(EvaluationModule, "_finish_set", lambda self, name: (scored.append(name), finish(self, name)))
    continued = wagle(*args).model.metrics
    assert scored == ["real_authors", "world_facts"]
    assert continued == wagle(*TEST, "--model.model", tiny_model, "--model.output", "whole", *test_sets).model.metrics


def test_other_settings_do_not_reuse_results(wagle, fails, tiny_model, test_sets):
    args = (*TEST, "--model.model", tiny_model, "--model.output", "out", *test_sets)
    wagle(*args)
    message = fails(*args, "--model.max_new_tokens", "5")
    assert "other generate" in message and "--model.overwrite true" in message
    wagle(*args, "--model.max_new_tokens", "5", "--model.overwrite", "true")


def test_without_perturbed_answers_measures_are_left_out(wagle, tiny_model, tmp_path):
    plain = write_rows(tmp_path / "plain.jsonl", [{"question": "Who?", "answer": "Nobody."}])
    module = wagle(*TEST, "--model.model", tiny_model, "--data.test", json.dumps({"forget": plain})).model
    assert set(module.metrics) == {"forget/probability", "forget/rougeL_recall"}


def test_a_retrained_result_on_other_rows_is_refused():
    def result(rows):
        nll = {str(row): 1.0 for row in rows}
        perturbed = {str(row): [1.0, 2.0] for row in rows}
        return {
            "eval_log_forget.json": {"avg_gt_loss": nll, "avg_paraphrased_loss": nll, "average_perturb_loss": perturbed}
        }

    with pytest.raises(WagleError, match="other forget rows: 3 differ"):
        tofu_forget_quality(result(range(5)), result(range(2, 6)))
    with pytest.raises(WagleError, match="the retrained result has none"):
        tofu_forget_quality(result(range(5)), {})


def test_a_missing_retrained_result_is_said_before_any_work(fails, tiny_model):
    message = fails(*TEST, "--model.model", tiny_model, "--model.retrained", "nowhere")
    assert "nowhere does not exist" in message
