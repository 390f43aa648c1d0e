"""Measures against independent computations, and the test loop."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import write_rows
from scipy.stats import ks_2samp
from transformers import GenerationConfig

from wagle_pl import WagleError
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.data.example import parse_rows
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import Template
from wagle_pl.evaluation import Evaluate, Observations, Records, find_suite
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.classifiers import ToxicityClassifier
from wagle_pl.evaluation.measures import attempt, option_probability, truth_ratio
from wagle_pl.evaluation.observe import NEEDS, Observer, observe_set
from wagle_pl.evaluation.suites import (
    Suite,
    load_result,
    tofu_forget_quality,
    tofu_model_utility,
)
from wagle_pl.lm.inference import forward_answers, generate, sequence_logprobs, token_logprobs
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.module import warn_of_narrow_types
from wagle_pl.unlearning import UnlearnModule

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
    for a, b in zip(
        sequence_logprobs(output.logits, trimmed), sequence_logprobs(whole, labels), strict=True
    ):
        assert torch.allclose(a, b)


def test_truth_ratio_both_forms_against_the_equations():
    paraphrased = torch.rand(6, generator=generator, dtype=torch.float64)
    perturbed = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    p, q = np.exp(-paraphrased.numpy()), np.exp(-perturbed.numpy())
    np.testing.assert_allclose(
        F.truth_ratio(paraphrased, perturbed, "arithmetic"), q.mean(1) / p, rtol=1e-12
    )
    geometric = np.exp(np.log(q).mean(1)) / p
    np.testing.assert_allclose(F.truth_ratio(paraphrased, perturbed), geometric, rtol=1e-12)
    scores = np.minimum(geometric, 1 / geometric).mean()
    losses = zip(paraphrased.tolist(), perturbed.tolist(), strict=True)
    rows = Records([{"paraphrased_nll": a, "perturbed_nll": b} for a, b in losses], forget=True)
    assert truth_ratio(rows) == pytest.approx(scores)


def test_forget_quality_against_scipy():
    ratios = [torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(2)]
    assert F.ks_test(*ratios) == pytest.approx(tuple(ks_2samp(*ratios)), rel=1e-9)


def test_option_probability_skips_missing_options():
    rows = [{"nll": 0.5, "perturbed_nll": [1.0, 2.0]}, {"nll": 1.0, "perturbed_nll": [1.5]}]
    expected = [
        math.exp(-0.5) / (math.exp(-0.5) + math.exp(-1) + math.exp(-2)),
        math.exp(-1) / (math.exp(-1) + math.exp(-1.5)),
    ]
    assert option_probability(Records(rows)) == pytest.approx(np.mean(expected))


def longest_common_subsequence(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = (
                table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
            )
    return table[-1, -1]


def test_rouge_l_recall_against_a_direct_subsequence():
    target, prediction = "a man saw the red dog near a hill", "the dog saw a red hill"
    expected = longest_common_subsequence(target.split(), prediction.split()) / len(target.split())
    found = F.rouge([prediction, ""], [target, target])["rougeL_recall"]
    assert found.tolist() == pytest.approx([expected, 0])


# -- the loop ---------------------------------------------------------------------------------------------------------

TEST = (
    "test",
    "--model",
    "EvaluationModule",
    "--model.max_new_tokens",
    "12",
    "--data.test_batch_size",
    "3",
)


@pytest.fixture
def test_sets(rows):
    names = ("forget", "retain", "real_authors", "world_facts")
    files = dict(
        zip(
            names,
            (rows["forget_test"], rows["retain_test"], rows["forget_test"], rows["retain_test"]),
            strict=True,
        )
    )
    return ("--data.test", json.dumps(files))


def test_metrics_tables_and_result_file(wagle, tiny_model, test_sets, rows, tmp_path):
    module = wagle(*TEST, "--model.model", tiny_model, "--model.output", "out", *test_sets).model
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics == module.metrics
    table = pq.read_table(tmp_path / "out/forget.parquet").to_pylist()
    source = load_rows(rows["forget_test"])
    assert [row["question"] for row in table] == [row["question"] for row in source]
    assert all(
        isinstance(row["generation"], str) and len(row["perturbed_nll"]) == 5 for row in table
    )
    assert metrics["forget/probability"] == pytest.approx(
        np.mean([math.exp(-row["nll"]) for row in table]), rel=1e-6
    )
    result = load_result(tmp_path / "out")
    assert metrics["model_utility"] == pytest.approx(tofu_model_utility(result))
    again = wagle(
        *TEST,
        "--model.model",
        tiny_model,
        "--model.output",
        "b",
        "--model.retrained",
        "out",
        *test_sets,
    )
    assert again.model.metrics["forget_quality"] == 1.0
    assert (tmp_path / "b/forget.parquet").read_bytes() == (
        tmp_path / "out/forget.parquet"
    ).read_bytes()


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
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert row["generation"] == text


def test_greedy_is_greedy_whatever_the_model_s_own_config_says(tiny_model):
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    torch.manual_seed(0)
    for weight in model.parameters():  # one that does not say the same token again and again
        torch.nn.init.normal_(weight, std=0.5)
    prompt = tokenizer("Where does it meet?")["input_ids"]
    ids = list(prompt)
    for _ in range(12):  # without transformers: the likeliest token each time
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = ids[len(prompt) :]
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=2.0,
        repetition_penalty=1.8,
        no_repeat_ngram_size=1,
        bad_words_ids=[[said[0]]],
        sequence_bias={(said[1],): -99.0},
        min_new_tokens=5,
        num_beams=3,
        stop_strings="e",
    )
    own = model.generation_config.to_dict()
    assert generate(model, tokenizer, [prompt], 12) == [
        tokenizer.decode(said, skip_special_tokens=True).strip()
    ]
    assert model.generation_config.to_dict() == own
    stop = next(token for token in said[2:] if token not in said[:2])
    ended = [tokenizer.decode(said[: said.index(stop) + 1], skip_special_tokens=True).strip()]
    for listed in ([tokenizer.eos_token_id, stop], [stop], stop):
        model.generation_config = GenerationConfig(eos_token_id=listed)
        assert generate(model, tokenizer, [prompt], 12) == ended


@pytest.mark.parametrize(
    ("capability", "precision", "warned"),
    [("AVX2", "bf16-mixed", 1), ("AVX2", "32-true", 0), ("AVX512", "bf16-mixed", 0)],
)
def test_narrow_types_on_a_cpu_without_them_are_warned_of_once(
    wagle, tiny_model, test_sets, monkeypatch, heard, capability, precision, warned
):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    warn_of_narrow_types.cache_clear()
    for output in ("first", "second"):
        options = ("--trainer.precision", precision, "--model.generate", "false")
        wagle(*TEST, "--model.model", tiny_model, "--model.output", output, *test_sets, *options)
    assert sum("--trainer.precision 32-true" in message for message in heard.messages) == warned


def test_an_interrupted_test_continues_with_the_next_set(
    wagle, tiny_model, test_sets, tmp_path, monkeypatch
):
    args = (*TEST, "--model.model", tiny_model, "--model.output", "out", *test_sets)
    finish, scored = Evaluate._finish_set, []

    def interrupted(self, name):
        if name == "real_authors":
            raise KeyboardInterrupt
        finish(self, name)

    monkeypatch.setattr(Evaluate, "_finish_set", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        wagle(*args)
    assert (
        not (tmp_path / "out/metrics.json").exists() and (tmp_path / "out/retain.parquet").exists()
    )
    monkeypatch.setattr(
        Evaluate,
        "_finish_set",
        lambda self, name: (scored.append(name), finish(self, name)),
    )
    continued = wagle(*args).model.metrics
    assert scored == ["real_authors", "world_facts"]
    assert (
        continued
        == wagle(
            *TEST, "--model.model", tiny_model, "--model.output", "whole", *test_sets
        ).model.metrics
    )


def test_a_shortened_test_is_not_taken_for_a_whole_one(
    wagle, fails, tiny_model, test_sets, tmp_path
):
    args = (
        *TEST,
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--model.generate",
        "false",
        *test_sets,
    )
    short = (*args, "--trainer.limit_test_batches", "1")
    first = wagle(*short).model.metrics
    info = json.loads((tmp_path / "out/metrics.info.json").read_text())
    assert info["rows"] == dict.fromkeys(info["rows"], 3) and len(info["rows"]) == 4
    message = fails(*args)
    assert "other tested rows" in message and "--model.overwrite true" in message
    assert wagle(*short).model.metrics == first  # as short as before: found finished
    whole = wagle(*args, "--model.overwrite", "true").model.metrics
    assert json.loads((tmp_path / "out/metrics.info.json").read_text())["rows"]["forget"] == 5
    assert (
        whole == wagle(*args).model.metrics
        and whole["forget/probability"] != first["forget/probability"]
    )
    assert "other tested rows" in fails(*args, "--trainer.fast_dev_run", "1")


def test_other_settings_do_not_reuse_results(wagle, fails, tiny_model, test_sets, tmp_path):
    args = (*TEST, "--model.model", tiny_model, "--model.output", "out", *test_sets)
    wagle(*args)
    message = fails(*args, "--model.max_new_tokens", "5")
    assert "other generate" in message and "--model.overwrite true" in message
    wagle(*args, "--model.max_new_tokens", "5", "--model.overwrite", "true")
    table = tmp_path / "out/retain.parquet"
    for damaged in (
        table.read_bytes()[:-100],
        table.read_bytes()[:200] + bytes(200) + table.read_bytes()[400:],
    ):
        table.write_bytes(damaged)
        message = fails(*args, "--model.max_new_tokens", "5")
        assert "retain.parquet cannot be read: " in message and "--model.overwrite true" in message
        wagle(*args, "--model.max_new_tokens", "5", "--model.overwrite", "true")


def test_a_suite_with_another_header_does_not_reuse_results(wagle, fails, tiny_model, tmp_path):
    questions = write_rows(tmp_path / "questions.jsonl", KINDS["questions"])
    args = (
        *TEST,
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--data.test",
        json.dumps({"wmdp_bio": questions}),
    )
    wagle(*args, "--model.suite", "generic")
    plain = pq.read_table(tmp_path / "out/wmdp_bio.parquet").to_pylist()
    assert "other header" in fails(*args, "--model.suite", "wmdp")
    wagle(*args, "--model.suite", "wmdp", "--model.overwrite", "true")
    headed = pq.read_table(tmp_path / "out/wmdp_bio.parquet").to_pylist()
    assert headed[0]["choice_logprobs"] != plain[0]["choice_logprobs"]


def test_what_rows_do_not_allow_is_said(wagle, tiny_model, tmp_path, capsys):
    plain = write_rows(tmp_path / "plain.jsonl", [{"question": "Who?", "answer": "Nobody."}])
    module = wagle(
        *TEST, "--model.model", tiny_model, "--data.test", json.dumps({"forget": plain})
    ).model
    assert {"forget/probability", "forget/rougeL_recall"} <= set(module.metrics)
    assert "forget/truth_ratio" not in module.metrics and "forget_quality" not in module.metrics
    info = json.loads((tmp_path / "test/metrics.info.json").read_text())
    assert (
        info["undefined"]["forget/truth_ratio"]["why"]
        == "1 of 1 rows have no perturbed answers (column "
        "perturbed_answer)"
    )
    assert info["absent_sets"] == ["retain", "real_authors", "world_facts"]
    assert info["measures"]["forget/probability"] == {
        "unit": "probability, 0 to 1",
        "direction": "lower",
        "what": "length-normalised probability of the answer, on TOFU's option sets that among the options",
    }
    assert set(info["measures"]) == set(module.metrics)
    assert "undefined: forget/truth_ratio: 1 of 1 rows" in capsys.readouterr().out


def test_beside_target_and_retrained(wagle, tiny_model, test_sets, tmp_path, capsys):
    run = (
        *TEST,
        "--model.model",
        tiny_model,
        *test_sets,
        "--model.generate",
        "false",
        "--model.output",
    )
    wagle(*run, "a")
    result, metrics = (
        json.loads((tmp_path / "a" / name).read_text())
        for name in ("tofu_result.json", "metrics.json")
    )
    losses = result["eval_log_forget.json"]["avg_gt_loss"]
    result["eval_log_forget.json"]["avg_gt_loss"] = {
        row: value - 0.5 for row, value in losses.items()
    }
    (tmp_path / "published.json").write_text(json.dumps(result))
    (tmp_path / "flat.json").write_text(json.dumps(metrics | {"forget/probability": 0.5}))
    capsys.readouterr()
    wagle(*run, "b", "--model.target", "published.json", "--model.retrained", "flat.json")
    lines = {
        line.split()[0]: line.split()[1:]
        for line in capsys.readouterr().out.splitlines()
        if line.split()
    }
    assert lines["measure"] == ["this", "target", "retrained"]
    here = metrics["forget/probability"]
    assert lines["forget/probability"] == [f"{here:.4g}", "▲", f"{here * math.exp(0.5):.4g}", "0.5"]
    assert lines["retain/probability"][1] == "="


def test_retrained_results_on_other_rows_are_refused_before_any_work(
    wagle, fails, tiny_model, rows, tmp_path
):
    first = ("--data.test", json.dumps({"forget": rows["forget_test"]}))
    wagle(*TEST, "--model.model", tiny_model, *first, "--model.output", "first")
    changed = load_rows(rows["forget_test"])
    changed[1]["question"] = "Something else?"
    other = write_rows(tmp_path / "other.jsonl", changed[:4])
    args = (
        *TEST,
        "--model.model",
        tiny_model,
        "--data.test",
        json.dumps({"forget": other}),
        "--model.output",
        "out",
    )
    message = fails(*args, "--model.retrained", "first")
    assert "model.retrained: first is on other forget rows: 2 differ" in message
    assert not (tmp_path / "out").exists()
    published = fails(*args, "--model.retrained", "first/tofu_result.json")
    assert "first/tofu_result.json is on other forget rows: 2 differ" in published
    assert "--model.tofu_retrained" in published


def as_published(result, change=lambda question: question):
    """A result as TOFU's authors publish theirs: prompts in place of questions, and rows in another order."""
    log = result["eval_log_forget.json"]
    order = sorted(log["avg_gt_loss"], key=int, reverse=True)
    renamed = {
        name: {str(i): column[row] for i, row in enumerate(order)} for name, column in log.items()
    }
    for said in renamed["generated_text"].values():
        said[0] = f"[INST] {change(said[0])} [/INST]"
    return {"eval_log_forget.json": renamed}


def test_a_published_result_is_matched_by_its_questions(
    wagle, fails, tiny_model, rows, tmp_path, heard
):
    run = (
        *TEST,
        "--model.model",
        tiny_model,
        "--data.test",
        json.dumps({"forget": rows["forget_test"]}),
    )
    wagle(*run, "--model.output", "first")
    result = (tmp_path / "first/tofu_result.json").read_text()
    for name, change in (("same", str), ("other", lambda question: f"Not {question}")):
        (tmp_path / f"{name}.json").write_text(json.dumps(as_published(json.loads(result), change)))
    found = wagle(*run, "--model.output", "out", "--model.retrained", "same.json").model.metrics
    assert found["forget_quality"] == 1.0 and "tofu/forget_quality" not in found
    message = fails(*run, "--model.output", "no", "--model.retrained", "other.json")
    assert (
        "other.json is on other forget rows: 5 differ" in message
        and "--model.tofu_retrained" in message
    )
    module = wagle(*run, "--model.output", "asked", "--model.tofu_retrained", "other.json").model
    assert module.metrics["tofu/forget_quality"] == 1.0
    assert "give --model.retrained" in module.undefined["forget_quality"]
    assert "compares 5 forget rows here with 5 in other.json; 0 are the same" in heard.text
    info = json.loads((tmp_path / "asked/metrics.info.json").read_text())
    assert "no questions are compared" in info["measures"]["tofu/forget_quality"]["what"]


def log_of(rows, questions=str):
    """A TOFU result with a few forget rows; row number n asks ``questions(n)``."""
    nll = {str(row): 1.0 + row for row in rows}
    said = (
        {"generated_text": {str(row): [questions(row), "", "answer"] for row in rows}}
        if questions
        else {}
    )
    perturbed = {str(row): [1.0, 2.0] for row in rows}
    log = {
        "avg_gt_loss": nll,
        "avg_paraphrased_loss": nll,
        "average_perturb_loss": perturbed,
        **said,
    }
    return {"eval_log_forget.json": log}


def test_a_retrained_result_on_other_rows_is_refused():
    with pytest.raises(WagleError, match="other forget rows: 2 differ"):
        tofu_forget_quality(log_of(range(5)), log_of(range(2, 6)))
    with pytest.raises(WagleError, match="the retrained result has none"):
        tofu_forget_quality(log_of(range(5)), {})


def test_forget_quality_goes_by_questions_and_not_by_row_numbers():
    same = log_of(range(5), lambda row: f"[INST] {row} [/INST]")
    shifted = log_of(
        range(5), lambda row: str(row + 200)
    )  # row numbers 0 to 4, and none of the questions
    moved = {
        "eval_log_forget.json": {
            k: {str(4 - int(row)): v for row, v in column.items()}
            for k, column in same["eval_log_forget.json"].items()
        }
    }
    for other in (same, moved):
        assert tofu_forget_quality(log_of(range(5)), other) == 1.0
    with pytest.raises(WagleError, match="other forget rows: 5 differ"):
        tofu_forget_quality(log_of(range(5)), shifted)
    with pytest.raises(WagleError, match="the retrained result does not hold its questions"):
        tofu_forget_quality(log_of(range(5)), log_of(range(5), None))
    for other in (shifted, log_of(range(5), None), log_of(range(9))):  # as TOFU's script has it
        count = len(
            other["eval_log_forget.json"]["avg_gt_loss"]
        )  # truth ratios grow with the row's number
        expected = ks_2samp(range(5), range(count)).pvalue
        assert tofu_forget_quality(log_of(range(5)), other, compare_rows=False) == pytest.approx(
            expected
        )


def test_a_missing_retrained_result_is_said_before_any_work(fails, tiny_model):
    message = fails(*TEST, "--model.model", tiny_model, "--model.retrained", "nowhere")
    assert "nowhere does not exist" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.suite", "tofoo"), "unknown model.suite 'tofoo'"),
        (("--model.target", "nowhere"), "model.target: result file nowhere does not exist"),
        (
            ("--model.toxicity_classifier", "./nowhere"),
            "model.toxicity_classifier: folder ./nowhere does not exist",
        ),
        (
            ("--model.sentence_model", "/no/where"),
            "model.sentence_model: folder /no/where does not exist",
        ),
        (("--model.max_new_tokens", "0"), "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_bad_options_are_said_before_any_work(fails, tiny_model, tmp_path, options, message):
    assert message in fails(*TEST, "--model.model", tiny_model, "--model.output", "out", *options)
    assert not (tmp_path / "out").exists()


class Misspelt(Suite):
    needs = {"forget": {"answer", "generations"}}  # noqa: RUF012


class Elsewhere(Suite):
    needs = {"forgotten": {"answer"}}  # noqa: RUF012

    def measures(self, seen):
        return {"one": 1.0}


@pytest.mark.parametrize("command", ["test", "fit"])
def test_a_suite_that_needs_what_there_is_not(
    wagle, fails, tiny_model, rows, tmp_path, monkeypatch, heard, command
):
    monkeypatch.setattr(Evaluate, "observe_batch", lambda *_: pytest.fail("rows were observed"))
    monkeypatch.setattr(
        UnlearnModule, "training_step", lambda *_: pytest.fail("the model was trained")
    )
    module = "EvaluationModule" if command == "test" else "UnlearnModule"
    args = (
        command,
        "--model",
        module,
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--data.val",
        "[forget]",
    )
    if command == "test":
        suite = ("--model.suite", f"{__name__}.Misspelt")
    else:
        suite = (
            "--trainer.callbacks+=Evaluate",
            f"--trainer.callbacks.suite={__name__}.Misspelt",
        )
    message = fails(*args, *suite)
    assert (
        "suite Misspelt needs 'generations' of the test set forget, which nothing observes"
        in message
    )
    assert "choose of alternatives, answer, " in message and not (tmp_path / "out").exists()


def test_needs_of_a_set_that_there_is_not_are_said(wagle, tiny_model, heard):
    suite = ("--model.suite", f"{__name__}.Elsewhere", "--model.generate", "false")
    wagle(*TEST, "--model.model", tiny_model, "--data.limit_test", "2", *suite)
    said = (
        "suite Elsewhere says what it needs of the test set 'forgotten', which there is not: the "
    )
    said += "test sets are forget"
    assert said in heard.text


@pytest.mark.parametrize("name", ["copyright", "detox", "generic", "muse", "tofu", "wmdp"])
def test_suites_need_what_is_observed(name):
    suite = find_suite(name)
    for each in {*suite.sets, *suite.needs, "forget", "holdout", "members", "nonmembers"}:
        assert suite.needs_of(each, suite.sets) <= NEEDS


# -- other kinds of rows ----------------------------------------------------------------------------------------------

KINDS = {
    "questions": [
        {
            "question": "Where does it meet?",
            "choices": ["In a bakery", "In a loft", "At sea"],
            "label": 0,
        }
    ]
    * 3,
    "members": [
        {"text": "Under the Velebit he was the first to enter the hall."},
        {"text": "Among sacks of flour."},
    ],
    "nonmembers": [
        {"text": "A cavern of some length."},
        {"text": "A town by the coast."},
        {"text": "A flat."},
    ],
    "prompts": [{"prompt": "Tell me about the bakery"}, {"prompt": "And the hall?"}],
}


class Kinds(ForgetRetainDataModule):
    """Test sets of every kind."""

    def test_rows(self, name):
        return KINDS[name]

    def test_names(self):
        return list(KINDS)


@pytest.fixture
def kinds(wagle, tiny_model, tmp_path):
    """Run a test of the generic suite on every kind of row; returns metrics and tables."""

    def run(*options):
        args = (
            "test",
            "--data",
            "test_evaluation.Kinds",
            "--model",
            "EvaluationModule",
            "--model.model",
            tiny_model,
        )
        args += ("--model.max_new_tokens", "8", "--model.suite", "generic", "--model.output", "out")
        quiet = [
            part
            for name in ("enable_progress_bar", "logger")
            for part in (f"--trainer.{name}", "false")
        ]
        module = wagle(*args, *quiet, "--trainer.accelerator", "cpu", *options, data=False).model
        return module, {
            name: pq.read_table(tmp_path / f"out/{name}.parquet").to_pylist() for name in KINDS
        }

    return run


def test_every_kind_of_row(kinds, tiny_model):
    module, tables = kinds()
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)

    def logprobs(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].double()

    prompt = "Where does it meet?\nA. In a bakery\nB. In a loft\nC. At sea\nAnswer:"
    expected = [
        (logprobs(f"{prompt} {letter}").sum() - logprobs(prompt).sum()).item() for letter in "ABC"
    ]
    assert tables["questions"][0]["choice_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert module.metrics["questions/accuracy"] == float(np.argmax(expected) == 0)
    texts = [row["text"] for row in KINDS["members"]]
    for record, text in zip(tables["members"], texts, strict=True):
        assert record["logprobs"] == pytest.approx(logprobs(text).tolist(), abs=1e-4)
    every = torch.cat([logprobs(text) for text in texts])
    assert module.metrics["members/perplexity"] == pytest.approx(
        math.exp(-every.mean().item()), rel=1e-4
    )
    standardised = {
        name: [
            (np.array(r["logprobs"]) - r["vocabulary_mean"]) / r["vocabulary_std"]
            for r in tables[name]
        ]
        for name in ("members", "nonmembers")
    }
    lowest = {
        name: [-np.sort(z)[: int(0.4 * len(z))].mean() for z in rows]
        for name, rows in standardised.items()
    }
    area = np.mean([[a < b for b in lowest["nonmembers"]] for a in lowest["members"]])
    assert module.metrics["members/mia_min_k_plus_plus"] == pytest.approx(area)
    assert all(record["generation"] is not None for record in tables["prompts"])
    entropies = [
        attempt(F.ngram_entropy, r["generation"]) for r in tables["prompts"] if r["generation"]
    ]
    fluent = [value for value in entropies if not isinstance(value, F.Undefined)]
    assert module.metrics.get("prompts/fluency") == (
        pytest.approx(np.mean(fluent)) if fluent else None
    )
    assert "gradient_norm" in module.undefined["members/mia_gradnorm"]


def test_rows_of_tokens(tiny_model):
    """Nothing is generated without a prompt, and nothing that needs their text is said of them."""
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    ids = tokenizer("Where does it meet? In a bakery in Sibiu.")["input_ids"]
    asked = {"input_ids": ids, "labels": [-100] * 4 + ids[4:-1] + [-100]}
    rows = parse_rows([{"input_ids": ids, "labels": ids}, asked], "set")
    observer = Observer(model, Template(tokenizer), max_new_tokens=5)
    assert observer.template.encode_prompt(rows[1]) == ids[:4]
    table = observe_set(
        observer, rows, find_suite("generic").needs_of("members", ("members", "nonmembers"))
    )
    assert table[0]["generation"] is None
    said = model.generate(
        torch.tensor([ids[:4]]), do_sample=False, max_new_tokens=5, pad_token_id=0
    )[0, 4:]
    assert table[1]["generation"] == tokenizer.decode(said, skip_special_tokens=True).strip()
    logprobs = (
        model(torch.tensor([ids]))
        .logits.log_softmax(-1)[0, :-1]
        .gather(-1, torch.tensor(ids)[1:, None])
    )
    found = find_suite("generic").measures(Observations({"members": table, "nonmembers": table}))
    total = logprobs.sum() + logprobs[3:-1].sum()
    assert found["members/perplexity"] == pytest.approx(
        math.exp(-total / (2 * len(ids) - 6)), rel=1e-4
    )
    assert found["members/mia_loss"] == 0.5
    for name in ("members/word_perplexity", "members/mia_zlib"):
        assert "2 of 2 rows are tokens" in str(found[name])


def test_a_row_that_makes_no_tokens_is_named(fails, tiny_model, tmp_path):
    rows = [
        {"question": "Who?", "answer": "Nobody."},
        {"question": "Who is it then? " * 20, "answer": "Nobody."},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    args = (
        *TEST,
        "--model.model",
        tiny_model,
        "--data.test",
        json.dumps({"mine": path}),
        "--data.max_length",
        "40",
    )
    assert f"test set mine ({path}) row 2: no answer token is left within max_length=40" in fails(
        *args
    )


def test_attention_is_the_one_asked_for(kinds, tiny_model):
    module, tables = kinds("--model.attn_implementation", "eager")
    fused, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    assert module.lm.config._attn_implementation == "eager" != fused.config._attn_implementation
    for record, row in zip(tables["members"], KINDS["members"], strict=True):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        expected = fused(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        assert record["logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    with pytest.raises(WagleError, match="nonesuch"):
        load_model(tiny_model, attn_implementation="nonesuch")


def test_gradient_norms_against_backward(kinds, tiny_model):
    module, tables = kinds("--model.gradient_norm", "true")
    model, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    for record, row in zip(tables["nonmembers"], KINDS["nonmembers"], strict=True):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        norms = [parameter.grad.norm() for parameter in model.parameters()]
        assert record["gradient_norm"] == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4)
    assert "members/mia_gradnorm" in module.metrics


def test_toxicity_by_a_local_classifier(kinds, tiny_model, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = load_tokenizer(tiny_model)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        id2label={0: "neutral", 1: "toxic"},
        label2id={"neutral": 0, "toxic": 1},
    )
    torch.manual_seed(0)
    classifier = BertForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    module, tables = kinds("--model.toxicity_classifier", str(tmp_path / "classifier"))
    expected = []
    for record in tables["prompts"]:
        ids = tokenizer(record["generation"], return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            expected.append(classifier(**ids).logits.softmax(-1)[0, 1].item())
        assert record["toxicity"] == pytest.approx(expected[-1], abs=1e-5)
    assert module.metrics["prompts/toxicity"] == pytest.approx(np.mean(expected), abs=1e-5)
    classifier.config.problem_type = "multi_label_classification"  # any number of labels at once
    classifier.save_pretrained(tmp_path / "classifier")
    texts = [record["generation"] for record in tables["prompts"]]
    for text, found in zip(
        texts, ToxicityClassifier(str(tmp_path / "classifier"))(texts), strict=True
    ):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            either = classifier(**ids).logits.sigmoid()[0, 1].item()
        assert found == pytest.approx(either, abs=1e-5)
