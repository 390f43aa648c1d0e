"""General ability by lm-evaluation-harness, on a local task and local rows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import write_rows

from wagle_pl import WagleError
from wagle_pl.data import WMDPDataModule
from wagle_pl.data.example import Example
from wagle_pl.evaluation import find_suite
from wagle_pl.evaluation.ability import Harness, read
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.observe import letters
from wagle_pl.lm.models import load_model, load_tokenizer

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra 'ability'"
)

TASK = """\
task: wagle_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""

PLACES = ("in a bakery in Sibiu", "in a loft", "at sea, behind the old town", "nowhere")
ROWS = [
    {
        "question": f"Where does club {i} meet?",
        "choices": [PLACES[(i + j) % 4] for j in range(3)],
        "label": i % 3,
    }
    for i in range(7)
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with one task; its rows are local, and what is cached of them too."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = write_rows(tmp_path / "quiz.jsonl", ROWS)
    (folder / "quiz.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    return folder


def accuracy(model: str, rows: list[dict]) -> float:
    """By summed log-likelihood of the choices, one text at a time."""
    lm, tokenizer = load_model(model).eval(), load_tokenizer(model)
    right = []
    for row in rows:
        prompt = f"Question: {row['question']}\nAnswer:"
        start = len(tokenizer(prompt)["input_ids"])
        sums = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{prompt} {choice}")["input_ids"]])
            with torch.no_grad():
                logprobs = lm(ids).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[p - 1, ids[0, p]].item() for p in range(start, ids.shape[1])))
        right.append(np.argmax(sums) == row["label"])
    return float(np.mean(right))


@needs_harness
def test_a_local_task_in_a_test(wagle, tiny_model, rows, tasks, tmp_path, capsys):
    args = (
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        tiny_model,
        "--model.generate",
        "false",
    )
    args += (
        "--data.test",
        json.dumps({"forget": rows["forget_test"]}),
        "--model.lm_eval",
        str(tasks),
    )
    module = wagle(*args, "--model.output", "out").model
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["ability/wagle_quiz/acc"] == pytest.approx(accuracy(tiny_model, ROWS))
    assert 0 < metrics["ability/wagle_quiz/acc"] < 1
    assert module.evaluation.general == {"wagle_quiz": metrics["ability/wagle_quiz/acc"]}
    info = json.loads((tmp_path / "out/metrics.info.json").read_text())["measures"]
    assert info["ability/wagle_quiz/acc"]["unit"] == "share, 0 to 1"
    assert info["ability/wagle_quiz/acc"]["direction"] == "higher"
    assert "ability/wagle_quiz/acc" in capsys.readouterr().out
    few = wagle(*args, "--model.output", "few", "--model.lm_eval_limit", "2").model.metrics
    assert few["ability/wagle_quiz/acc"] == pytest.approx(accuracy(tiny_model, ROWS[:2]))


@needs_harness
def test_the_model_is_left_as_it_was(tiny_model, tasks):
    lm, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    before = {name: weights.clone() for name, weights in lm.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = Harness([str(tasks)]).measure(lm, tokenizer, batch_size=3)
    assert torch.equal(torch.rand(1), expected)  # the harness seeds everything; we give it back
    assert list(found.values) == ["ability/wagle_quiz/acc"] and found.asked == ("wagle_quiz",)
    assert all(torch.equal(weights, before[name]) for name, weights in lm.state_dict().items())
    assert not lm.training


@needs_harness
def test_ranks_share_the_rows(tiny_model, tasks, monkeypatch):
    """Rank 1 of 2 takes its rows; the collectives are stubs."""
    from wagle_pl.core import distributed
    from wagle_pl.evaluation import ability

    lm, tokenizer = load_model(tiny_model).eval(), load_tokenizer(tiny_model)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "all_gather", lambda items: [*items, *items])
    wrapped = ability.wrap(lm, tokenizer, 4, share=True)
    assert (wrapped.rank, wrapped.world_size) == (1, 2) and wrapped.model is lm
    assert wrapped.all_gather(torch.tensor(3)).tolist() == [3, 3]
    wrapped.barrier()
    alone = ability.wrap(lm, tokenizer, 4, share=False)
    assert (alone.rank, alone.world_size) == (0, 1)


@needs_harness
def test_mistakes_are_said_before_any_work(fails, tiny_model, tasks, rows, tmp_path):
    args = (
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
    )
    args += ("--data.test", json.dumps({"forget": rows["forget_test"]}), "--model.lm_eval")
    assert "model.lm_eval: folder ./nowhere does not exist" in fails(*args, "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "model.lm_eval: folder empty has no task YAML" in fails(*args, "empty")
    assert "model.lm_eval_limit must be at least 1, got 0" in fails(
        *args, str(tasks), "--model.lm_eval_limit", "0"
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "quiz.jsonl").unlink()
    assert "model.lm_eval: rows of wagle_quiz cannot be loaded: Unable to find" in fails(
        *args, str(tasks)
    )


@needs_harness
def test_mmlu_is_asked_as_the_harness_asks(tmp_path, tiny_model):
    from lm_eval import tasks as theirs

    described = {}
    for file in (Path(theirs.__file__).parent / "mmlu/default").glob("mmlu_*.yaml"):
        task = yaml.safe_load(file.read_text())
        described[task["dataset_name"]] = task["description"]
    assert len(described) == 57
    asked = {"question": " Which is it? ", "choices": ["one", "two", "three", "four"], "answer": 1}
    (tmp_path / "mmlu/all").mkdir(parents=True)
    write_rows(
        tmp_path / "mmlu/all/test.jsonl", [{**asked, "subject": subject} for subject in described]
    )
    data = WMDPDataModule(folder=str(tmp_path), tokenizer=tiny_model)
    header = find_suite("wmdp").headers["mmlu"]
    for row, description in zip(data.test_examples("mmlu"), described.values(), strict=True):
        prompt = description + "Which is it?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
        expected = [data.tokenizer(f"{prompt} {letter}")["input_ids"] for letter in "ABCD"]
        assert [named.candidate.ids for named in letters(data.template, row, header)] == expected
    plain = letters(data.template, Example.of(asked), header)[0].candidate.ids
    assert (
        plain
        == data.tokenizer("Which is it?\nA. one\nB. two\nC. three\nD. four\nAnswer: A")["input_ids"]
    )


@needs_harness
def test_an_unknown_task(fails, tiny_model, tasks, monkeypatch):
    from lm_eval import tasks as theirs

    real = theirs.TaskManager  # its own 14,000 task files take seconds to read
    monkeypatch.setattr(
        theirs,
        "TaskManager",
        lambda include_path, include_defaults: real(
            include_path=include_path, include_defaults=False
        ),
    )
    args = ("test", "--model", "EvaluationModule", "--model.model", tiny_model, "--model.lm_eval")
    message = fails(*args, f"{tasks},wagle_quis")
    assert "lm-evaluation-harness has no task 'wagle_quis'; did you mean wagle_quiz?" in message
    assert "has no task 'mmlu'" in fails(*args, "mmlu")


def test_without_the_harness(fails, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    message = fails(
        "test",
        "--model",
        "EvaluationModule",
        "--model.model",
        tiny_model,
        "--model.lm_eval",
        "mmlu",
    )
    assert "model.lm_eval needs lm-evaluation-harness: pip install 'wagle-pl[ability]'" in message
    with pytest.raises(WagleError, match=r"wagle-pl\[ability\]"):
        Harness("mmlu")


def test_reading_what_the_harness_returns():
    results = {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": np.float64(0.25), "acc_stderr,none": "N/A"},
            "mmlu_law": {"alias": " - law", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "gsm8k": {
                "exact_match,strict-match": 0.0,
                "exact_match,flexible-extract": float("nan"),
            },
            "wikitext": {"word_perplexity,none": 31.5},
        },
        "higher_is_better": {
            "wikitext": {"word_perplexity": False},
            "gsm8k": {"exact_match": True},
        },
        "versions": {"mmlu": 2},
    }
    found = read(results, ["mmlu", "gsm8k", "wikitext"])
    assert (
        found.values["ability/mmlu/acc"] == 0.25 and type(found.values["ability/mmlu/acc"]) is float
    )
    assert found.values["ability/gsm8k/exact_match_strict-match"] == 0.0
    assert isinstance(found.values["ability/gsm8k/exact_match_flexible-extract"], Undefined)
    assert found.infos["ability/wikitext/word_perplexity"].direction == "lower"
    assert (
        found.infos["ability/mmlu/acc"].what == "acc on mmlu, version 2, by lm-evaluation-harness"
    )
    assert found.general == {"mmlu": 0.25}
    assert "ability/mmlu_law/acc" in found.values and "ability/mmlu_law/acc" not in found.shown()
