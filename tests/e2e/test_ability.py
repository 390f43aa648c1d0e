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
from wagle_pl.data.example import Example
from wagle_pl.evaluation import find_suite
from wagle_pl.evaluation.ability import Harness, read, wrap
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.observe import letters
from wagle_pl.lab.benchmarks import WMDPDataModule
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


@pytest.fixture
def args(tiny_model, rows):
    """Arguments of a test with some tasks."""
    options = (
        "test --model EvaluationModule --model.generate false --model.output out --model.model"
    )
    sets = json.dumps({"forget": rows["forget_test"]})
    own = (*options.split(), tiny_model, "--data.test", sets)
    return lambda tasks, *more: (*own, "--model.lm_eval", str(tasks), *more)


@pytest.fixture
def tiny(tiny_model):
    return load_model(tiny_model).eval(), load_tokenizer(tiny_model)


def accuracy(lm, tokenizer, rows: list[dict]) -> float:
    """By summed log-likelihood of the choices, one text at a time."""
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
def test_a_local_task_in_a_test(wagle, args, tiny, tasks, tmp_path, capsys):
    module = wagle(*args(tasks)).model
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    found = metrics["ability/wagle_quiz/acc"]
    assert 0 < found < 1 and found == pytest.approx(accuracy(*tiny, ROWS))
    assert module.evaluation.plan.general == {"wagle_quiz": found}
    info = json.loads((tmp_path / "out/metrics.info.json").read_text())["measures"]
    about = info["ability/wagle_quiz/acc"]
    assert (about["unit"], about["direction"]) == ("share, 0 to 1", "higher")
    assert "ability/wagle_quiz/acc" in capsys.readouterr().out
    few = wagle(*args(tasks, "--model.output", "few", "--model.lm_eval_limit", "2")).model.metrics
    assert few["ability/wagle_quiz/acc"] == pytest.approx(accuracy(*tiny, ROWS[:2]))


@needs_harness
def test_the_model_is_left_as_it_was(tiny, tasks):
    lm, tokenizer = tiny
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
def test_ranks_share_the_rows(tiny, monkeypatch):
    """Rank 1 of 2 takes its rows; the collectives are stubs."""
    stubs = {"world_size": lambda: 2, "rank": lambda: 1, "all_gather": lambda items: [*items] * 2}
    for name, stub in stubs.items():
        monkeypatch.setattr(f"wagle_pl.core.distributed.{name}", stub)
    wrapped = wrap(*tiny, 4, share=True)
    assert (wrapped.rank, wrapped.world_size) == (1, 2) and wrapped.model is tiny[0]
    assert wrapped.all_gather(torch.tensor(3)).tolist() == [3, 3]
    wrapped.barrier()
    alone = wrap(*tiny, 4, share=False)
    assert (alone.rank, alone.world_size) == (0, 1)


@needs_harness
def test_mistakes_are_said_before_any_work(fails, args, tasks, tmp_path):
    (tmp_path / "empty").mkdir()
    for options, message in [
        (("./nowhere",), "model.lm_eval: folder ./nowhere does not exist"),
        (("empty",), "model.lm_eval: folder empty has no task YAML"),
        ((tasks, "--model.lm_eval_limit", "0"), "model.lm_eval_limit: must be at least 1, got 0"),
    ]:
        assert message in fails(*args(*options))
    assert not (tmp_path / "out").exists()
    (tmp_path / "quiz.jsonl").unlink()
    message = "model.lm_eval: rows of wagle_quiz cannot be loaded: Unable to find"
    assert message in fails(*args(tasks))


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
    rows = [{**asked, "subject": subject} for subject in described]
    write_rows(tmp_path / "mmlu/all/test.jsonl", rows)
    data = WMDPDataModule(folder=str(tmp_path), tokenizer=tiny_model)
    header = find_suite("wmdp").sets["mmlu"].header
    examples = data.test_examples("mmlu")
    plain = Example.of(asked)  # of no subject
    for row, description in [*zip(examples, described.values(), strict=True), (plain, "")]:
        prompt = description + "Which is it?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
        expected = [data.tokenizer(f"{prompt} {letter}")["input_ids"] for letter in "ABCD"]
        assert [named.ids for named in letters(data.template, row, header)] == expected


@needs_harness
def test_an_unknown_task(tasks, monkeypatch):
    from lm_eval import tasks as theirs

    real = theirs.TaskManager  # its own 14,000 task files take seconds to read
    few = lambda include_path, include_defaults: real(  # noqa: E731
        include_path=include_path, include_defaults=False
    )
    monkeypatch.setattr(theirs, "TaskManager", few)
    for given, message in [
        (f"{tasks},wagle_quis", "has no task 'wagle_quis'; did you mean wagle_quiz?"),
        ("mmlu", "has no task 'mmlu'"),
    ]:
        with pytest.raises(WagleError, match=f"lm-evaluation-harness {message}".replace("?", ".")):
            Harness(given)


def test_without_the_harness(fails, args, monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    message = "model.lm_eval: it needs lm-evaluation-harness: pip install 'wagle-pl[ability]'"
    assert message in fails(*args("mmlu"))


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
    value = found.values["ability/mmlu/acc"]
    assert value == 0.25 and type(value) is float
    assert found.values["ability/gsm8k/exact_match_strict-match"] == 0.0
    assert isinstance(found.values["ability/gsm8k/exact_match_flexible-extract"], Undefined)
    assert found.infos["ability/wikitext/word_perplexity"].direction == "lower"
    what = found.infos["ability/mmlu/acc"].what
    assert what == "acc on mmlu, version 2, by lm-evaluation-harness"
    assert found.general == {"mmlu": 0.25}
    assert "ability/mmlu_law/acc" in found.values and "ability/mmlu_law/acc" not in found.shown()
