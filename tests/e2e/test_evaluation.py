"""The test loop: what it writes, what it compares with, what it refuses, and every kind of row."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import write_classifier, write_rows

from wagle_pl import WagleError
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation import (
    Evaluation,
    Options,
    Results,
    Suite,
    SuiteSet,
    evaluate,
    find_suite,
    tofu_model_utility,
)
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.attacks import Relearn
from wagle_pl.evaluation.classifiers import ToxicityClassifier
from wagle_pl.evaluation.observe import NEEDS
from wagle_pl.evaluation.records import attempt
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.module import warn_of_narrow_types
from wagle_pl.unlearning import UnlearnModule

TEST = "test --model EvaluationModule --model.max_new_tokens 12 --data.test_batch_size 3"
QUICK = ("--model.generate", "false")


@pytest.fixture
def args(tiny_model):
    """Arguments of a test of the tiny model; each option is text with its value, or a tuple."""

    def made(*options, output="out"):
        parts = [part if isinstance(part, tuple) else part.split() for part in options]
        flat = [word for part in parts for word in part]
        return [*TEST.split(), "--model.model", tiny_model, "--model.output", output, *flat]

    return made


def sets(**files):
    return ("--data.test", json.dumps(files))


@pytest.fixture
def four(rows):
    """TOFU's test sets, of five rows each."""
    forget, retain = rows["forget_test"], rows["retain_test"]
    return sets(forget=forget, retain=retain, real_authors=forget, world_facts=retain)


def table(path):
    return pq.read_table(path).to_pylist()


def read(path):
    return json.loads(path.read_text())


# -- what is written --------------------------------------------------------------------------------------------------


def test_metrics_tables_and_result_file(wagle, args, four, rows, tmp_path):
    module = wagle(*args(four)).model
    metrics = read(tmp_path / "out/metrics.json")
    assert metrics == module.metrics
    records = table(tmp_path / "out/forget.parquet")
    source = load_rows(rows["forget_test"])
    assert [record["question"] for record in records] == [row["question"] for row in source]
    assert all(isinstance(record["generation"], str) for record in records)
    assert all(len(record["perturbed_nll"]) == 5 for record in records)
    expected = np.mean([math.exp(-record["nll"]) for record in records])
    assert metrics["forget/probability"] == pytest.approx(expected, rel=1e-6)
    utility = tofu_model_utility(Results.read(tmp_path / "out").tofu)
    assert metrics["model_utility"] == pytest.approx(utility)
    again = wagle(*args(four, "--model.retrained out", output="b"))
    assert again.model.metrics["forget_quality"] == 1.0
    files = [tmp_path / name / "forget.parquet" for name in ("out", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_evaluate_gives_the_results_of_the_command(wagle, args, four, rows, tiny_model, tmp_path):
    relearn = ("--model.robustness", '[{"class_path": "Relearn", "init_args": {"steps": 2}}]')
    commanded = wagle(*args(four, relearn, "--model.bootstrap 3")).model.metrics
    forget, retain = rows["forget_test"], rows["retain_test"]
    files = {"forget": forget, "retain": retain, "real_authors": forget, "world_facts": retain}
    lm = load_model(tiny_model).train()
    gradient = lm.model.norm.weight.grad = torch.ones(32)
    before, numbers = {n: t.clone() for n, t in lm.state_dict().items()}, torch.get_rng_state()
    attack = Relearn(steps=2)
    options = Options(max_new_tokens=12, bootstrap=3, robustness=[attack])
    data = ForgetRetainDataModule(rows["forget"], rows["retain"], test=files, test_batch_size=3)
    found = evaluate(lm, data, "tofu", options, output=tmp_path / "mine")
    assert lm.training and lm.model.norm.weight.grad is gradient
    assert all(parameter.requires_grad for parameter in lm.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())
    assert torch.equal(numbers, torch.get_rng_state())
    assert found.metrics == commanded
    for file in (tmp_path / "mine").iterdir():
        written = (tmp_path / "out" / file.name).read_bytes()
        same = file.suffix == ".parquet" or file.stem in ("tofu_result", "robustness", "metrics")
        assert not same or file.read_bytes() == written, file.name
        assert len(file.read_bytes()) == pytest.approx(len(written), rel=0.05)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        p.name for p in (tmp_path / "mine").iterdir()
    }
    assert evaluate(tiny_model, data, "tofu", Options(generate=False)).text.startswith("measure")


def test_what_rows_do_not_allow_is_said(wagle, args, tmp_path, capsys):
    plain = write_rows(tmp_path / "plain.jsonl", [{"question": "Who?", "answer": "Nobody."}])
    module = wagle(*args(sets(forget=plain))).model
    assert {"forget/probability", "forget/rougeL_recall"} <= set(module.metrics)
    assert not {"forget/truth_ratio", "forget_quality"} & set(module.metrics)
    info = read(tmp_path / "out/metrics.info.json")
    why = "1 of 1 rows have no perturbed answers (column perturbed_answer)"
    assert info["undefined"]["forget/truth_ratio"]["why"] == why
    assert info["absent_sets"] == ["retain", "real_authors", "world_facts"]
    assert info["measures"]["forget/probability"] == {
        "unit": "probability, 0 to 1",
        "direction": "lower",
        "what": "length-normalised probability of the answer; on TOFU's option sets, among the options",
    }
    assert set(info["measures"]) == set(module.metrics)
    assert f"undefined: forget/truth_ratio: {why}" in capsys.readouterr().out


def test_beside_target_and_retrained(wagle, args, four, tmp_path, capsys):
    wagle(*args(four, QUICK))
    result, metrics = (read(tmp_path / "out" / f"{n}.json") for n in ("tofu_result", "metrics"))
    log = result["eval_log_forget.json"]
    log["avg_gt_loss"] = {row: value - 0.5 for row, value in log["avg_gt_loss"].items()}
    (tmp_path / "published.json").write_text(json.dumps(result))
    (tmp_path / "flat.json").write_text(json.dumps(metrics | {"forget/probability": 0.5}))
    capsys.readouterr()
    beside = "--model.target published.json --model.retrained flat.json"
    wagle(*args(four, QUICK, beside, output="b"))
    said = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    lines = {words[0]: words[1:] for words in said}
    assert lines["measure"] == ["this", "target", "retrained"]
    here = metrics["forget/probability"]
    assert lines["forget/probability"] == [f"{here:.4g}", "▲", f"{here * math.exp(0.5):.4g}", "0.5"]
    assert lines["retain/probability"][1] == "="


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", 1), ("AVX512", 0)])
def test_narrow_types_on_a_cpu_without_them_are_warned_of_once(
    wagle, args, four, monkeypatch, heard, capability, warned
):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    warn_of_narrow_types.cache_clear()
    for precision in ("32-true", "bf16-mixed", "bf16-mixed"):
        narrow = f"--trainer.precision {precision} --data.limit_test 1"
        wagle(*args(four, QUICK, narrow, output=f"out{len(heard.messages)}"))
    assert sum("--trainer.precision 32-true" in message for message in heard.messages) == warned


# -- a test that goes on, and tables that are not its own -------------------------------------------------------------


def test_an_interrupted_test_continues_with_the_next_set(wagle, args, four, tmp_path, monkeypatch):
    finish, scored = Evaluation._finish_set, []

    def interrupted(self, name):
        if name == "real_authors":
            raise KeyboardInterrupt
        finish(self, name)

    monkeypatch.setattr(Evaluation, "_finish_set", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        wagle(*args(four))
    assert (tmp_path / "out/retain.parquet").exists()
    assert not (tmp_path / "out/metrics.json").exists()
    continues = lambda self, name: (scored.append(name), finish(self, name))  # noqa: E731
    monkeypatch.setattr(Evaluation, "_finish_set", continues)
    continued = wagle(*args(four)).model.metrics
    assert scored == ["real_authors", "world_facts"]
    assert continued == wagle(*args(four, output="whole")).model.metrics


def test_a_shortened_test_is_not_taken_for_a_whole_one(wagle, fails, args, four, tmp_path):
    short = args(QUICK, four, "--trainer.limit_test_batches 1")
    first = wagle(*short).model.metrics
    info = read(tmp_path / "out/metrics.info.json")
    assert info["rows"] == dict.fromkeys(info["rows"], 3) and len(info["rows"]) == 4
    message = fails(*args(QUICK, four))
    assert "other tested rows" in message and "--model.overwrite true" in message
    assert wagle(*short).model.metrics == first  # as short as before: found finished
    whole = wagle(*args(QUICK, four, "--model.overwrite true")).model.metrics
    assert read(tmp_path / "out/metrics.info.json")["rows"]["forget"] == 5
    assert whole["forget/probability"] != first["forget/probability"]
    assert "other tested rows" in fails(*args(QUICK, four, "--trainer.fast_dev_run 1"))


def test_other_settings_do_not_reuse_results(wagle, fails, args, rows, tmp_path):
    one = sets(retain=rows["retain_test"])
    wagle(*args(one))
    other = args(one, "--model.max_new_tokens 5")
    message = fails(*other)
    assert "other generate" in message and "--model.overwrite true" in message
    wagle(*other, "--model.overwrite", "true")
    file = tmp_path / "out/retain.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    message = fails(*other)
    assert "retain.parquet cannot be read: " in message and "--model.overwrite true" in message
    wagle(*other, "--model.overwrite", "true")


def test_a_suite_with_another_header_does_not_reuse_results(wagle, fails, args, tmp_path):
    questions = sets(wmdp_bio=write_rows(tmp_path / "questions.jsonl", KINDS["questions"]))
    wagle(*args(questions, "--model.suite generic"))
    plain = table(tmp_path / "out/wmdp_bio.parquet")
    assert "other header" in fails(*args(questions, "--model.suite wmdp"))
    wagle(*args(questions, "--model.suite wmdp --model.overwrite true"))
    headed = table(tmp_path / "out/wmdp_bio.parquet")
    assert headed[0]["choice_logprobs"] != plain[0]["choice_logprobs"]


# -- results to compare with ------------------------------------------------------------------------------------------


def as_published(result, change=str):
    """A result as TOFU's authors publish theirs: prompts in place of questions, rows in another order."""
    log = result["eval_log_forget.json"]
    order = sorted(log["avg_gt_loss"], key=int, reverse=True)
    renamed = {
        name: {str(i): column[row] for i, row in enumerate(order)} for name, column in log.items()
    }
    for said in renamed["generated_text"].values():
        said[0] = f"[INST] {change(said[0])} [/INST]"
    return {"eval_log_forget.json": renamed}


def test_retrained_results_on_other_rows_are_refused_before_any_work(
    wagle, fails, args, rows, tmp_path, heard
):
    forget = sets(forget=rows["forget_test"])
    wagle(*args(forget, QUICK, output="first"))
    changed = load_rows(rows["forget_test"])
    changed[1]["question"] = "Something else?"
    other = sets(forget=write_rows(tmp_path / "other.jsonl", changed[:4]))
    message = fails(*args(other, "--model.retrained first"))
    assert "model.retrained: first is on other forget rows: 2 differ" in message
    message = fails(*args(other, "--model.retrained first/tofu_result.json"))
    assert "first/tofu_result.json is on other forget rows: 2 differ" in message
    assert "--model.tofu_retrained" in message and not (tmp_path / "out").exists()
    # a published result is matched by its questions
    result = read(tmp_path / "first/tofu_result.json")
    for name, change in (("same", str), ("changed", lambda question: f"Not {question}")):
        copied = json.loads(json.dumps(result))
        (tmp_path / f"{name}.json").write_text(json.dumps(as_published(copied, change)))
    found = wagle(*args(forget, QUICK, "--model.retrained same.json")).model.metrics
    assert found["forget_quality"] == 1.0 and "tofu/forget_quality" not in found
    message = fails(*args(forget, QUICK, "--model.retrained changed.json", output="no"))
    assert "changed.json is on other forget rows: 5 differ" in message
    asked = args(forget, QUICK, "--model.tofu_retrained changed.json", output="asked")
    module = wagle(*asked).model
    assert module.metrics["tofu/forget_quality"] == 1.0
    assert "give --model.retrained" in module.undefined["forget_quality"]
    assert "compares 5 forget rows here with 5 in changed.json; 0 are the same" in heard.text
    info = read(tmp_path / "asked/metrics.info.json")
    assert "no questions are compared" in info["measures"]["tofu/forget_quality"]["what"]


# -- mistakes, before any work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "--model.suite tofoo": "model.suite: unknown name 'tofoo'",
        "--model.target nowhere": "model.target: result file nowhere does not exist",
        "--model.toxicity_classifier ./nowhere": "model.toxicity_classifier: folder ./nowhere does not exist",
        "--model.sentence_model /no/where": "model.sentence_model: folder /no/where does not exist",
        "--model.max_new_tokens 0": "max_new_tokens: must be at least 1, got 0",
    }.items(),
)
def test_bad_options_are_said_before_any_work(fails, args, tmp_path, options, message):
    assert message in fails(*args(options))
    assert not (tmp_path / "out").exists()


class Misspelt(Suite):
    sets = {"forget": SuiteSet(needs={"answer", "generations"})}  # noqa: RUF012


@pytest.mark.parametrize("command", ["test", "fit"])
def test_a_suite_that_needs_what_there_is_not(fails, tiny_model, tmp_path, monkeypatch, command):
    monkeypatch.setattr(Evaluation, "observe", lambda *_: pytest.fail("rows were observed"))
    monkeypatch.setattr(UnlearnModule, "training_step", lambda *_: pytest.fail("it was trained"))
    options = {
        "test": f"--model EvaluationModule --model.suite {__name__}.Misspelt",
        "fit": "--model UnlearnModule --trainer.callbacks+=Evaluate "
        f"--trainer.callbacks.suite={__name__}.Misspelt",
    }[command]
    model = ("--model.model", tiny_model, "--model.output", "out", "--data.val", "[forget]")
    message = fails(command, *options.split(), *model)
    needs = "suite Misspelt needs 'generations' of the test set forget, which nothing observes"
    assert f"{needs}; choose of alternatives, answer, " in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["copyright", "detox", "generic", "muse", "tofu", "wmdp"])
def test_suites_need_what_is_observed(name):
    suite = find_suite(name)
    for test_set in {*suite.sets, "forget", "holdout", "members", "nonmembers"}:
        assert suite.needs_of(test_set, suite.sets) <= NEEDS


def test_a_row_that_makes_no_tokens_is_named(fails, args, tmp_path):
    questions = ("Who?", "Who is it then? " * 20)
    rows = [{"question": question, "answer": "Nobody."} for question in questions]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = fails(*args(sets(mine=path), "--data.max_length 40"))
    assert f"test set mine ({path}) row 2: no answer token is left within max_length=40" in message


# -- every kind of row ------------------------------------------------------------------------------------------------

CHOICES = ["In a bakery", "In a loft", "At sea"]
KINDS = {
    "questions": [{"question": "Where does it meet?", "choices": CHOICES, "label": 0}] * 3,
    "members": [
        {"text": "Under the Velebit he was the first to enter the hall."},
        {"text": "Among sacks of flour."},
    ],
    "nonmembers": [
        {"text": text} for text in ("A cavern of some length.", "A town by the coast.", "A flat.")
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
    """Run a test of the generic suite on every kind of row; returns the module and the tables."""

    def run(*options):
        arguments = (
            f"test --data {__name__}.Kinds --model EvaluationModule --model.max_new_tokens 8 "
            "--model.suite generic --model.output out --trainer.enable_progress_bar false "
            "--trainer.logger false --trainer.accelerator cpu"
        ).split()
        module = wagle(*arguments, "--model.model", tiny_model, *options, data=False).model
        return module, {name: table(tmp_path / f"out/{name}.parquet") for name in KINDS}

    return run


def logprobs(model, tokenizer, text):
    """Log-probabilities of all tokens of a text but the first."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        every = model(ids).logits.log_softmax(-1)
    return every[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].double()


def test_every_kind_of_row(kinds, tiny_model):
    module, tables = kinds()
    both = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    prompt = "Where does it meet?\nA. In a bakery\nB. In a loft\nC. At sea\nAnswer:"
    alone = logprobs(*both, prompt).sum()
    letters = [(logprobs(*both, f"{prompt} {letter}").sum() - alone).item() for letter in "ABC"]
    assert tables["questions"][0]["choice_logprobs"] == pytest.approx(letters, abs=1e-4)
    assert module.metrics["questions/accuracy"] == float(np.argmax(letters) == 0)
    texts = [logprobs(*both, row["text"]) for row in KINDS["members"]]
    for record, expected in zip(tables["members"], texts, strict=True):
        assert record["logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    perplexity = math.exp(-torch.cat(texts).mean().item())
    assert module.metrics["members/perplexity"] == pytest.approx(perplexity, rel=1e-4)
    lowest = {}
    for name in ("members", "nonmembers"):
        columns = ("logprobs", "vocabulary_mean", "vocabulary_std")
        seen = [[np.array(record[column]) for column in columns] for record in tables[name]]
        scores = [np.sort((logprob - mean) / std) for logprob, mean, std in seen]
        lowest[name] = [-score[: int(0.4 * len(score))].mean() for score in scores]
    area = np.mean([[a < b for b in lowest["nonmembers"]] for a in lowest["members"]])
    assert module.metrics["members/mia_min_k_plus_plus"] == pytest.approx(area)
    said = [record["generation"] for record in tables["prompts"]]
    assert None not in said
    entropies = [attempt(F.ngram_entropy, text) for text in said if text]
    fluent = [value for value in entropies if not isinstance(value, F.Undefined)]
    expected = pytest.approx(np.mean(fluent)) if fluent else None
    assert module.metrics.get("prompts/fluency") == expected
    assert "gradient_norm" in module.undefined["members/mia_gradnorm"]


def test_attention_and_gradient_norms(kinds, tiny_model):
    module, tables = kinds(
        *("--model.attn_implementation", "eager", "--model.gradient_norm", "true")
    )
    fused, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    assert module.lm.config._attn_implementation == "eager" != fused.config._attn_implementation
    for record, row in zip(tables["members"], KINDS["members"], strict=True):
        expected = logprobs(fused, tokenizer, row["text"]).tolist()
        assert record["logprobs"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(WagleError, match="nonesuch"):
        load_model(tiny_model, attn_implementation="nonesuch")
    for record, row in zip(tables["nonmembers"], KINDS["nonmembers"], strict=True):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        fused.zero_grad()
        fused(ids, labels=ids).loss.backward()
        norms = torch.stack([parameter.grad.norm() for parameter in fused.parameters()])
        assert record["gradient_norm"] == pytest.approx(norms.mean().item(), rel=1e-4)
    assert "members/mia_gradnorm" in module.metrics


def test_toxicity_by_a_local_classifier(kinds, tiny_model, tmp_path):
    tokenizer, folder = load_tokenizer(tiny_model), str(tmp_path / "classifier")
    classifier = write_classifier(folder, tokenizer, "neutral", "toxic")
    module, tables = kinds("--model.toxicity_classifier", folder)
    texts = [record["generation"] for record in tables["prompts"]]

    def expected(link):
        cut = {"return_tensors": "pt", "truncation": True, "max_length": 64}
        with torch.no_grad():
            logits = [classifier(**tokenizer(text, **cut)).logits for text in texts]
        return pytest.approx([link(each)[0, 1].item() for each in logits], abs=1e-5)

    softmax = expected(lambda logits: logits.softmax(-1))
    assert [record["toxicity"] for record in tables["prompts"]] == softmax
    mean = np.mean([record["toxicity"] for record in tables["prompts"]])
    assert module.metrics["prompts/toxicity"] == pytest.approx(mean, abs=1e-5)
    classifier.config.problem_type = "multi_label_classification"  # any number of labels at once
    classifier.save_pretrained(folder)
    assert ToxicityClassifier(folder)(texts) == expected(torch.sigmoid)
