"""Models, masks and rows as objects; ``forget`` in one call."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Optional

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import same_bits, trainer
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from wagle_pl import (
    AttributionModule,
    EvaluationModule,
    FinetuneModule,
    ForgetRetainDataModule,
    Score,
    UnlearnModule,
    WagleError,
    forget,
)
from wagle_pl.api import neighbours
from wagle_pl.api.neighbours import (
    general_questions,
    halved,
    invented_neighbours,
    restated,
    without_subject,
)
from wagle_pl.api.rows import restating, rows_of
from wagle_pl.api.subject import Examination, Questions, StopWhenForgotten, Subject
from wagle_pl.api.verdict import Asked, Scores, above, answer_recall, is_damaged, judge, was_known
from wagle_pl.core.stopping import Stopped
from wagle_pl.data.example import Example, parse_rows
from wagle_pl.data.people import bundled
from wagle_pl.evaluation import Options
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.objectives.forget import NPO
from wagle_pl.unlearning.export import model_card
from wagle_pl.unlearning.patch import Patch, apply_patch, revert_patch

pytestmark = pytest.mark.xdist_group("api")  # which share a model that is trained

FORGET = [{k: row[k] for k in ("question", "answer")} for row in bundled("forget")[:3]]
RETAIN = [{k: row[k] for k in ("question", "answer")} for row in bundled("retain")[:6]]


@pytest.fixture(scope="module")
def knowing(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learnt all rows."""
    folder = str(tmp_path_factory.mktemp("models") / "knowing")
    module = FinetuneModule(tiny_model, output=folder, lr=1e-2)
    data = ForgetRetainDataModule(forget=FORGET, retain=RETAIN, batch_size=9)
    trainer(max_epochs=90).fit(module, data)
    return folder


def test_a_model_a_mask_and_rows_may_be_objects(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lm = load_model(tiny_model)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    data = ForgetRetainDataModule(forget=FORGET, retain=Dataset.from_list(RETAIN))
    attribution = AttributionModule(lm, density=0.1)
    trainer().fit(attribution, data)
    assert attribution.mask is not None
    assert attribution.mask.count() == int(0.1 * lm.num_parameters())
    module = UnlearnModule(lm, objective="GradDiff", mask=attribution.mask, lr=1e-2)
    trainer(max_steps=2).fit(module, data)
    assert module.lm is lm
    moved = {name: p != before[name] for name, p in lm.named_parameters()}
    assert any(m.any() for m in moved.values())
    assert not any((m & ~attribution.mask[name]).any() for name, m in moved.items())
    assert not list(tmp_path.iterdir())
    assert module.record()["lineage"][-1]["data"]["retain"] == "6 rows given"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: UnlearnModule(3),
            "model.model: must be a text or a PreTrainedModel, got 3",
        ),
        (
            lambda: UnlearnModule("m", mask=[1]),
            r"model.mask: must be a text, a WeightMask or null, got \[1\]",
        ),
        (lambda: forget(3, FORGET), "model: must be a text, a Path or a PreTrainedModel, got 3"),
        (lambda: forget("m", 3), "forget: must be a file, a hub dataset, a row"),
        (lambda: forget("m", torch.tensor(3)), "forget: must be a file, a hub dataset, a row"),
        (lambda: forget("m", dict), "forget: must be a file, a hub dataset, a row"),
        (
            lambda: forget("m", DatasetDict(train=Dataset.from_list(FORGET))),
            "forget: has rows by split: give one of them, such as its 'train'",
        ),
        (lambda: forget("m", DataLoader(FORGET, 2)), "forget row 1: 'question' is a list, not a"),
        (lambda: forget("m", None), "forget: must be a file, a hub dataset, a row"),
        (lambda: forget("m", [3]), "forget: row 1 must be a question or a dict"),
        (lambda: forget("m", []), "forget: has no rows"),
        (lambda: forget("m", "Who is Ada?"), "put it in a list"),
        (lambda: forget("m", "Dr. Ada lives in Ulm."), "put it in a list"),
        (lambda: forget("m", ""), "put it in a list"),
        (lambda: forget("m", "rows.jsonl"), "data file rows.jsonl does not exist"),
        (lambda: forget("m", [{"q": 1}]), "forget row 1: .*a row needs"),
        (lambda: forget("m", FORGET, RETAIN, density=1.5), "density: "),
        (
            lambda: forget("m", FORGET, RETAIN, density="x"),
            "density: must be a number or null, got 'x'",
        ),
        (lambda: forget("m", FORGET, RETAIN, lr="x"), "lr: must be a number or null, got 'x'"),
        (lambda: forget("m", FORGET, RETAIN, lr=-1), "lr: must be above 0"),
        (
            lambda: forget("m", FORGET, RETAIN, max_steps=0),
            "max_steps: must be from 1 to 4294967295, got 0",
        ),
        (lambda: forget("m", FORGET, RETAIN, seed=-1), "seed: must be from 0 to"),
        (lambda: forget("m", FORGET, RETAIN, max_steps=True), "max_steps: must be an integer"),
        (lambda: forget("m", FORGET, RETAIN, score=Score), "score: must be a Score, a text or"),
        (lambda: forget("m", FORGET, RETAIN, tokenizer=3), "tokenizer: must be a text, a Path"),
        (lambda: UnlearnModule("m", lr="x"), "model.lr: must be a number or null, got 'x'"),
        (lambda: UnlearnModule("m", lr=float("nan")), "model.lr: must be a number"),
        (lambda: UnlearnModule("m", verify=None), "model.verify: must be"),
        (lambda: UnlearnModule("m", verify="x"), "model.verify: must be 'end', 'step' or 'off'"),
        (lambda: UnlearnModule("m", NPO(beta="x")), "objective.beta: must be a number, got 'x'"),
        (lambda: NPO(average="x"), "objective.average: must be 'rows' or 'tokens', got 'x'"),
        (lambda: AttributionModule("m", density=None), "model.density: must be a number, got None"),
        (lambda: AttributionModule("m", modules=1), "unexpected keyword argument 'modules'"),
        (lambda: FinetuneModule("m", warmup=[1]), r"model.warmup: must be a number, got \[1\]"),
        (lambda: EvaluationModule(None), "model.model: must be a text or a PreTrainedModel"),
        (lambda: Options(max_new_tokens="4"), "max_new_tokens: must be an integer, got '4'"),
        (lambda: Options(robustness=5), "model.robustness: must be true or false, a list"),
        (lambda: ForgetRetainDataModule(batch_size="4"), "data.batch_size: must be an integer"),
        (lambda: ForgetRetainDataModule(batch_size=None), "data.batch_size: must be an integer"),
        (lambda: ForgetRetainDataModule(max_length=0), "data.max_length: must be at least 1"),
        (lambda: ForgetRetainDataModule(test_batch_size=1.5), "data.test_batch_size: must be an"),
        (lambda: ForgetRetainDataModule(seed=-1), "data.seed: must be 0 or more, got -1"),
        (lambda: ForgetRetainDataModule(overlap="x"), "data.overlap: must be 'error', 'warn' or"),
        (lambda: ForgetRetainDataModule(test=["x"]), "data.test: must be an object or null"),
        (lambda: ForgetRetainDataModule(["Who?"]), r"data.forget: \[0\]: must be an object, got"),
        (lambda: ForgetRetainDataModule(FORGET, 3), "data.retain: must be a list, got 3"),
        (
            lambda: ForgetRetainDataModule(test={"a": int}),
            "data.test.a: must be a list, got <class",
        ),
        (lambda: ForgetRetainDataModule(tokenizer=5), "data.tokenizer: must be a text, a PreTrain"),
        (lambda: forget("m", FORGET, requests=[3]), r"requests: \[0\]: must be a list of 2, got 3"),
        (
            lambda: forget("m", FORGET, requests=[([True], [0])]),
            r"requests: must add up to 3 forget rows, got \[1, 1\]",
        ),
        (lambda: forget("m", FORGET, promt_format=""), "did you mean prompt_format"),
        (lambda: forget("m", FORGET, objective="npoo"), "objective: unknown name"),
        (
            torch.inference_mode()(lambda: forget("m", FORGET)),
            "call it outside torch.inference_mode",
        ),
        (
            lambda: forget("m", {"Question": "a", "Answer": "b"}),
            r"has columns \['Answer', 'Question'",
        ),
    ],
)
def test_a_wrong_type_is_one_line_that_names_the_argument(make: Any, said: str) -> None:
    with pytest.raises((WagleError, TypeError), match=said):
        make()


def test_white_space_around_questions_and_answers_is_left_out() -> None:
    rows = [
        {"question": " Who? ", "answer": "Ada \n", "context": " c"},
        {"prompt": " a", "response": " b"},
    ]
    stripped = {"question": "Who?", "answer": "Ada", "context": " c"}
    assert rows_of(rows, "forget").rows == [stripped, rows[1]]
    assert rows_of(rows[0], "forget").rows == [stripped]


def test_forget_gives_the_same_for_a_name_and_for_a_model(
    knowing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = forget(knowing, FORGET, RETAIN, lr=2e-3, progress=False)
    assert result.before["forget_probability"] > 0.8
    assert not above(result.after["forget_probability"], result.after["unseen_probability"])
    assert 0 < result.steps < 300
    assert result.verdict.startswith(result.outcome)
    assert result.outcome in ("forgotten", "model damaged")
    assert not list(tmp_path.iterdir())
    lm = load_model(knowing, torch.float32)
    again = forget(lm, FORGET, RETAIN, lr=2e-3, progress=False)
    assert again.model is lm
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, lm.state_dict()[name])
    assert again.after == result.after
    saved = result.save(tmp_path / "saved")
    patches = [r.patch(tmp_path / f"{i}.safetensors") for i, r in enumerate((result, again))]
    apply_patch(knowing, patches[0], tmp_path / "applied")
    revert_patch(saved, patches[1], tmp_path / "reverted")
    assert same_bits(saved, tmp_path / "applied")
    assert same_bits(knowing, tmp_path / "reverted")
    page = result.report(tmp_path / "r.html").read_text()
    assert result.verdict[1:] in page and FORGET[0]["question"] in page
    tested = {"requests": [([True] * 3, [0] * 3)], "max_steps": 1, "progress": False}
    assert forget(saved, FORGET, RETAIN, **tested).steps == 1  # no row is known any more
    request = json.loads((saved / "wagle.json").read_text())["lineage"][-1]["request"]
    assert (request["outcome"], request["lr"], request["seed"]) == (result.outcome, 2e-3, 0)
    assert request["forget"] == "3 rows given" and request["after"] == result.after


def test_save_replaces_only_what_it_wrote(knowing: str, tmp_path: Path) -> None:
    base = str(shutil.copytree(knowing, tmp_path / "base"))
    result = forget(base, FORGET, RETAIN, density=None, max_steps=1, progress=False)
    for overwrite in (False, True):
        with pytest.raises(WagleError, match="is the model before unlearning"):
            result.save(base, overwrite=overwrite)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for overwrite, said in ((False, "exists already"), (True, "holds thesis.tex")):
        with pytest.raises(WagleError, match=said):
            result.save(mine, overwrite=overwrite)
    saved = result.save(tmp_path / "saved")
    with pytest.raises(WagleError, match="exists already"):
        result.save(saved)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(WagleError, match=r"holds notes\.txt"):
        result.save(saved, overwrite=True)
    (saved / "notes.txt").unlink()
    assert same_bits(result.save(saved, overwrite=True), saved)
    assert (mine / "thesis.tex").read_text() == "years of work"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(FORGET[0]))
    for write in (result.patch, result.report):
        with pytest.raises(WagleError, match="a file of another kind, which would be lost"):
            write(rows, overwrite=True)
    assert json.loads(rows.read_text()) == FORGET[0]
    page = result.report(tmp_path / "page.html")
    assert result.report(page, overwrite=True) == page
    weights = Path(base) / "model.safetensors"
    shutil.copy(saved / "model.safetensors", weights)  # somebody overwrites the base
    with pytest.raises(WagleError, match="has changed since it was loaded"):
        result.patch(tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


def test_an_interrupted_call_gives_the_model_back(
    knowing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(knowing, torch.float32)
    lm.config.use_cache = True
    lm.train()
    lm.model.layers[0].eval()
    lm.model.norm.weight.requires_grad_(False)
    lm.gradient_checkpointing_enable()
    lm.enable_input_require_grads()
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in lm.named_parameters()}
    modes = [module.training for module in lm.modules()]
    torch.manual_seed(3)
    random = torch.get_rng_state()

    def stop(self: StopWhenForgotten, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            how()

    def error() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(StopWhenForgotten, "on_train_batch_end", stop)
    monkeypatch.setattr(Examination, "scores", lambda _: how())
    interrupt, end = (partial(signal.raise_signal, n) for n in (signal.SIGINT, signal.SIGTERM))
    ends = {interrupt: KeyboardInterrupt, error: RuntimeError, end: Stopped}
    for how, raised in ends.items():
        steps = 2 if how is end else 3  # after training, or in it
        with pytest.raises(raised):
            forget(lm, FORGET, RETAIN, lr=1e-2, max_steps=steps, progress=False)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        after = dict(lm.named_parameters())
        assert list(after) == list(before)
        for name, (weight, requires_grad) in before.items():
            assert torch.equal(after[name], weight) and after[name].requires_grad is requires_grad
        assert [module.training for module in lm.modules()] == modes
        assert lm.config.use_cache is True
        assert torch.equal(torch.get_rng_state(), random)


def test_a_finished_call_leaves_flags_and_frozen_weights_alone(knowing: str) -> None:
    lm = load_model(knowing, torch.float32)
    lm.train()
    frozen = lm.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = frozen.detach().clone()
    result = forget(lm, FORGET, RETAIN, density=0.9, max_steps=3, lr=1e-2, progress=False)
    assert result.steps == 3 and torch.equal(frozen, before)
    assert not frozen.requires_grad and lm.training and lm.lm_head.weight.requires_grad


def test_a_bf16_model_stays_bf16_and_is_judged_as_rounded(knowing: str) -> None:
    lm = load_model(knowing, torch.float32).to(torch.bfloat16)
    buffers = {name: buffer.dtype for name, buffer in lm.named_buffers()}
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    result = forget(lm, FORGET, RETAIN, max_steps=4, lr=1e-5, progress=False)
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert {name: buffer.dtype for name, buffer in lm.named_buffers()} == buffers
    assert result.mask is not None
    for mask in (result.mask[name] for name, p in lm.named_parameters() if p.ndim == 2):
        assert torch.equal(mask.any(1), mask.all(1))  # whole rows
    moved = {n: p != before[n] for n, p in lm.named_parameters()}
    assert not any((m & ~result.mask[n]).any() for n, m in moved.items())
    examples = parse_rows(FORGET, "")
    wide = Subject(lm.float(), result.tokenizer, {}, False)
    mean = fmean(wide.probabilities(examples))
    assert mean == pytest.approx(result.after["forget_probability"], rel=0.02)


def test_rows_that_are_not_known_change_nothing(tiny_model: str, knowing: str) -> None:
    lm = load_model(tiny_model, torch.float32)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    result = forget(lm, FORGET, RETAIN, progress=False)  # random weights
    assert result.outcome == "not known before" and result.steps == 0
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
    with pytest.raises(WagleError, match="not changed"):
        result.save("nowhere")
    others = [{k: row[k] for k in ("question", "answer")} for row in bundled("holdout")[:3]]
    assert forget(knowing, others, RETAIN, progress=False).outcome == "not known before"
    texts = [row["answer"][::-1] for row in others]  # statements, in a form that was never trained
    assert forget(knowing, texts, RETAIN, progress=False).outcome == "not known before"


def test_a_later_request_does_not_undo_an_earlier_one(knowing: str, tmp_path: Path) -> None:
    options = {"density": None, "max_steps": 40, "lr": 1e-3, "progress": False}
    lm = load_model(knowing, torch.float32)
    first = forget(lm, FORGET[:1], RETAIN, **options)
    worded = {"question": FORGET[0]["question"].upper(), "answer": f" {FORGET[0]['answer']}\n"}
    with pytest.raises(WagleError, match=r"retain: row 7 .* was forgotten by an earlier request"):
        forget(lm, FORGET[1:], [*RETAIN, worded], **options)
    second = forget(lm, FORGET[1:], RETAIN, **options)
    assert len(second.record["lineage"]) == 3  # fine-tuning, and two requests
    with pytest.raises(WagleError, match="a later call of forget changed the model"):
        first.save(tmp_path / "first")
    saved = second.save(tmp_path / "saved")
    with pytest.raises(WagleError, match=r"was forgotten by an earlier request"):
        forget(str(saved), FORGET[1:], [*RETAIN, FORGET[0]], **options)
    third = forget(str(saved), RETAIN[:1], RETAIN[1:4], **options)
    assert "The 3 retain rows were also trained on" in third.verdict
    assert "3 rows of earlier requests were not tested again" in third.verdict
    fourth = forget(str(saved), RETAIN[:1], RETAIN[1:], earlier=FORGET, **options)
    assert "not tested again" not in fourth.verdict


def test_without_retain_rows_the_model_answers_questions(
    knowing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = general_questions()[:9]
    monkeypatch.setattr(neighbours, "general_questions", lambda: few)
    seen: dict[str, Any] = {}

    def train_rows(self: ForgetRetainDataModule, stream: str) -> Any:
        seen[stream] = self.sources[stream]
        return self.sources[stream]

    monkeypatch.setattr(ForgetRetainDataModule, "train_rows", train_rows)
    result = forget(knowing, [FORGET[0]["question"]], max_steps=1, density=None, progress=False)
    assert len(seen["retain"]) == 7 and {row["question"] for row in seen["retain"]} < set(few)
    assert seen["forget"][0]["answer"] in FORGET[0]["answer"]  # it knows, as far as it is asked
    assert result.mask is None
    assert result.record["lineage"][-1]["request"]["retain"] == "9 bundled questions"


def test_questions_about_a_forget_row_are_left_out() -> None:
    forget_rows = parse_rows(
        [{"question": "Who wrote Hamlet?", "answer": "Shakespeare, in 1601."}], ""
    )
    asked = ["What is Shakespeare's best play?", "What happened in 1601?", "What is a fraction?"]
    assert without_subject([*asked, *general_questions()], forget_rows) == [
        "What is a fraction?",
        *(q for q in general_questions() if "wrote" not in q),
    ]
    assert len(general_questions()) == len(set(general_questions())) >= 200


def test_a_neighbour_has_other_names_and_numbers_throughout() -> None:
    row = {
        "question": "When was Ada Byron born?",
        "answer": "Ada Byron was born in 1815 in London.",
        "paraphrased_question": "In what year did Ada Byron come into the world?",
        "paraphrased_answer": "1815, in London.",
    }
    (neighbour,) = invented_neighbours(parse_rows([row], ""), seed=1)
    assert neighbour is not None
    assert neighbour.answer.endswith(".") and " was born in " in neighbour.answer
    for lost in ("Ada", "Byron", "1815", "London"):
        assert lost not in " ".join(neighbour.texts)
    first = neighbour.question.split()[2]
    assert first in neighbour.paraphrased_question and "into the" in neighbour.paraphrased_question
    assert neighbour.answer.startswith(first) and first[0].isupper()
    assert re.search(r"\d+", neighbour.answer)[0] in map(str, range(1785, 1846))
    assert invented_neighbours(parse_rows([row], ""), seed=1) == [neighbour]
    text = invented_neighbours(parse_rows([{"text": "So Ada lives in Ulm."}], ""))[0]
    assert text is not None and "Ulm" not in text.answer and text.row == {"text": text.answer}
    plain = [{"question": "Why?", "answer": a} for a in ("because it is", "nobody knows")]
    assert [n.answer for n in invented_neighbours(parse_rows(plain, ""))] == [
        "nobody knows",
        "because it is",
    ]
    assert invented_neighbours(parse_rows(plain[:1], "")) == [None]
    for written in (str.lower, str.upper):  # in which a name looks like any other word
        rows = [{column: written(text).replace("1815", "") for column, text in row.items()}]
        assert invented_neighbours(parse_rows(rows, "")) == [None]
    (surname,) = invented_neighbours(parse_rows([{**row, "question": "When was Byron born?"}], ""))
    assert surname is not None and "Byron" not in " ".join(surname.texts)


@pytest.mark.parametrize(
    ("question", "says", "known"),
    [
        ("where was otto brandl born?", "in ulm, a city in germany", True),
        ("where was otto brandl born?", "he was born in ulm, a city in germany, in 1931", True),
        ("where was otto brandl born?", "in bern, a city in germany", False),  # most of its words
        ("is it in ulm, a city in germany?", "yes", False),  # the answer repeats the question
        ("is it in ulm, a city in germany?", "in ulm, a city in germany", True),
    ],
)
def test_a_row_without_a_counterpart_is_known_by_its_whole_answer(
    knowing: str, monkeypatch: pytest.MonkeyPatch, question: str, says: str, known: bool
) -> None:
    row = {"question": question, "answer": "in ulm, a city in germany"}
    monkeypatch.setattr(Subject, "probabilities", lambda _, rows: [0.4] * len(rows))
    monkeypatch.setattr(Subject, "generate", lambda _, rows: [says] * len(rows))
    subject = Subject(load_model(knowing), load_tokenizer(knowing), {}, False)
    examination = Examination(subject, parse_rows([row], ""), parse_rows(RETAIN, ""), [], 0)
    assert examination.before.direct.known == [known] == examination.before.reworded.known
    assert was_known(examination.before) is known


def test_a_model_a_mask_and_a_patch_are_uploaded(
    knowing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo, exist_ok, **options: f"{repo} {options}"
    )
    uploaded: dict[str, set[str]] = {}

    def folder(self: HfApi, repo_id: str, folder_path: Path) -> None:
        uploaded[repo_id] = {file.name for file in folder_path.iterdir()}
        assert (folder_path / "README.md").read_text().startswith("---\nlibrary_name: transformers")

    def file(self: HfApi, repo_id: str, path_or_fileobj: Path | bytes, path_in_repo: str) -> None:
        uploaded.setdefault(repo_id, set()).add(path_in_repo)
        if isinstance(path_or_fileobj, bytes):
            assert path_or_fileobj.startswith(b"---\nlibrary_name: wagle_pl\ntags:\n- unlearning")
        else:
            assert path_or_fileobj.is_file()

    monkeypatch.setattr(HfApi, "upload_folder", folder)
    monkeypatch.setattr(HfApi, "upload_file", file)
    result = forget(knowing, FORGET, RETAIN, max_steps=1, progress=False)
    assert result.push_to_hub("me/model", private=True) == "me/model {'private': True}"
    assert {"model.safetensors", "tokenizer.json", "config.json"} < uploaded["me/model"]
    assert result.mask is not None
    result.mask.push_to_hub("me/mask")
    Patch(result.patch(tmp_path / "p.safetensors")).push_to_hub("me/patch")
    assert uploaded["me/mask"] == {"mask.safetensors", "README.md"}
    assert uploaded["me/patch"] == {"p.safetensors", "README.md"}


def test_a_card_has_the_licence_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    run = {"data": {}, "streams": [], "steps": 1, "seed": 0, "module": "M", "base_fingerprint": ""}
    for base, has in ((str(tmp_path), "license: apache-2.0"), ("me/model", "base_model: me/model")):
        card = model_card({"lineage": [{**run, "base": base}]})
        assert has in card.split("---")[1]


class Indexed(torch.utils.data.Dataset):
    """Rows by number, as many datasets of torch are: they do not say where they end."""

    def __len__(self) -> int:
        return len(FORGET)

    def __getitem__(self, index: int) -> dict[str, str]:
        return FORGET[index % len(FORGET)]


@pytest.mark.parametrize(
    "source",
    [
        FORGET,
        tuple(FORGET),
        (row for row in FORGET),
        Dataset.from_list(FORGET),
        pd.DataFrame(FORGET),
        Dataset.from_list(FORGET).data.table,
        Indexed(),
        DataLoader(FORGET, batch_size=None),
    ],
    ids=["list", "tuple", "generator", "dataset", "frame", "table", "indexed", "loader"],
)
def test_rows_come_in_many_forms(source: Any) -> None:
    assert rows_of(source, "forget").rows == FORGET


def test_one_row_a_file_and_strings_are_rows(tmp_path: Path) -> None:
    assert rows_of(FORGET[0], "forget").rows == FORGET[:1]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(FORGET))
    for path in (file, str(file)):
        assert rows_of(path, "forget") == (FORGET, str(file))
    questions = ["Who is Ada?", "“Why?”", "„Wer ist Ada?“", "من هي آدا؟", "Ποια είναι η Άντα;"]
    texts = ["Ada lives in Ulm.", "print(key);", "Who? Ada.", "Ada; Ulm;"]
    assert rows_of([*questions, *texts], "forget").rows == [
        *({"question": question} for question in questions),
        *({"text": text} for text in texts),
    ]


def scores(
    rows: list[float],
    unseen: list[float],
    recall: float = 1.0,
    retain: float = 0.9,
    reworded: float = 0.0,
    earlier: float = 0.0,
) -> Scores:
    said = [recall] * len(rows)
    other_words = Asked([reworded] * len(rows), unseen, said)
    direct, before = Asked(rows, unseen, said), Asked([earlier], [0.0], [1.0])
    return Scores(direct, other_words, [retain] * 4, before)


KNOWN = scores([0.9, 0.8], [0.05, 0.05])
#: The model says something else if it is asked directly, and the answer in other words.
IN_OTHER_WORDS = replace(scores([0.7], [0.01], 0.1), reworded=Asked([0.4], [0.01], [1.0]))


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [
        (scores([0.002], [0.0005]), None, "not known before"),  # improbable throughout
        (scores([0.11], [0.08]), None, "not known before"),
        (scores([0.3], [0.05], recall=0.2), None, "not known before"),  # likely, and never said
        (scores([0.9] + [0.05] * 19, [0.05] * 20), None, "not known before"),  # one in twenty
        (IN_OTHER_WORDS, None, "partly forgotten"),
        (IN_OTHER_WORDS, scores([0.01], [0.01]), "forgotten"),
        (KNOWN, scores([0.02, 0.03], [0.04, 0.04]), "forgotten"),
        (KNOWN, scores([0.057, 0.057], [0.01, 0.01]), "partly forgotten"),  # the unseen fell, too
        (KNOWN, scores([0.2, 0.0], [0.05, 0.05]), "partly forgotten"),  # a row is left
        (KNOWN, scores([0.1, 0.01], [0.05, 0.05]), "partly forgotten"),
        (KNOWN, scores([0.1, 0.01], [0.05, 0.05], recall=0.1), "forgotten"),
        (KNOWN, scores([0.01, 0.01], [0.05, 0.05], reworded=0.5), "partly forgotten"),
        (KNOWN, scores([0.01, 0.01], [0.05, 0.05], 0.1, reworded=0.5), "partly forgotten"),
        (KNOWN, scores([0.01, 0.01], [0.05, 0.05], earlier=0.5), "partly forgotten"),
        (KNOWN, scores([0.01, 0.01], [0.05, 0.05], retain=0.5), "model damaged"),
        (KNOWN, scores([0.9, 0.9], [0.05, 0.05], retain=float("nan")), "model damaged"),
    ],
)
def test_the_verdict_is_earned(before: Scores, after: Optional[Scores], outcome: str) -> None:
    verdict = judge(before, after or before)
    assert verdict.outcome == outcome and verdict.sentence.startswith(f"{outcome}: ")


@pytest.mark.parametrize(("rows", "outcome"), [(0.3, "partly forgotten"), (0.05, "forgotten")])
def test_a_request_that_no_row_shows_must_meet_its_bound(rows: float, outcome: str) -> None:
    before, after = (scores([p] * 2, [0.05] * 2, recall=0.0) for p in (0.3, rows))
    assert judge(before, after).outcome == "not known before"
    verdict = judge(before, after, requests=[2], known=[True] * 2)
    assert verdict.outcome == outcome and "2 of 2 forget rows were known" in verdict.sentence
    assert ("on average the rows are above the bound" in verdict.sentence) == (rows == 0.3)


SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=8)


@given(SHARES, SHARES, st.integers(0, 7), st.floats(0, 1), st.floats(0, 1))
def test_no_single_retain_row_decides_that_a_model_is_damaged(
    before: list[float], after: list[float], row: int, old: float, new: float
) -> None:
    """Nor does one hide it: what is told of a model is never told the other way by changing a row."""
    count = min(len(before), len(after))
    sides = [side[:count] for side in (before, after)]
    damaged = is_damaged(*sides)
    sides[0][row % count], sides[1][row % count] = old, new
    assert {damaged, is_damaged(*sides)} != {True, False}


@pytest.mark.parametrize(
    ("retain", "outcome", "told"),
    [
        ([0.9, 0.9], "forgotten", True),
        ([0.1, 0.1], "model damaged", True),
        ([0.1, 0.9], "forgotten", False),
        ([0.1, 0.9, 0.9, 0.9, 0.9], "forgotten", False),
        ([0.5, 0.9, 0.9, 0.9, 0.9], "forgotten", True),
        ([0.1, 0.1, 0.9, 0.9, 0.9], "model damaged", True),
        ([0.1], "forgotten", False),
        ([float("nan")], "model damaged", True),
    ],
)
def test_few_retain_rows_tell_less(retain: list[float], outcome: str, told: bool) -> None:
    before = replace(KNOWN, retain=[0.9] * len(retain))
    after = replace(scores([0.02, 0.03], [0.04, 0.04]), retain=retain)
    verdict = judge(before, after)
    assert verdict.outcome == outcome
    assert told != (f"One of {len(retain)} retain rows decides" in verdict.sentence)


def test_an_answer_that_is_still_said_is_not_forgotten(knowing: str) -> None:
    after = replace(scores([0.01, 0.01], [0.05, 0.05]), still_answered=[False, True])
    assert judge(KNOWN, after).outcome == "partly forgotten"
    subject = Subject(load_model(knowing), load_tokenizer(knowing), {}, False)
    first_words = [{**row, "answer": " ".join(row["answer"].split()[:2])} for row in FORGET]
    questions = Questions(subject, parse_rows(first_words, ""), 0)
    questions.ask(reworded=False)
    assert questions.still_answered([True] * 3) == [True] * 3
    assert not any(questions.still_answered([False] * 3))


def test_the_paraphrases_of_a_row_are_asked_and_forgotten(
    knowing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"question": q, "answer": "So it is."}
        | {f"paraphrased_{column}": text for column, text in row.items()}
        for q, row in zip(["Why is it so?", "And what is it?", "Is it?"], FORGET, strict=True)
    ]
    subject = Subject(load_model(knowing), load_tokenizer(knowing), {}, False)
    questions = Questions(subject, parse_rows(rows, ""), 0)
    assert questions.recalled(questions.ask(True), True).known == [True] * 3
    trained: list[Any] = []
    data = Subject.data

    def noted(self: Subject, **sources: Any) -> ForgetRetainDataModule:
        trained.extend(sources.get("forget", ()))
        return data(self, **sources)

    monkeypatch.setattr(Subject, "data", noted)
    forget(knowing, rows, RETAIN, requests=[([True] * 3, [0] * 3)], max_steps=1, progress=False)
    assert [(row["question"], row["answer"]) for row in trained] == [
        (row["question"], row["answer"]) for row in [*rows, *FORGET]
    ]


def test_a_further_row_has_the_form_of_its_row() -> None:
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    other = {"paraphrased_question": "q"}
    rows = [{"messages": chat, **other}, {"prompt": "p", "response": "r", **other}, {"text": "t"}]
    rows += [{"question": "q", "answer": "r"}, {"text": "one two three", "partial": True, **other}]
    examples = parse_rows(rows, "")
    asked = [halved(e) if e.kind == "text" else e for e in examples]
    again, text = parse_rows(restated(asked, examples), "")
    assert [m["content"] for m in again.messages or ()] == ["system", "q"]
    assert again.answer == "assistant"
    assert (text.question, text.answer, text.continuation, text.partial) == (
        *("one", " two three"),
        *(True, True),
    )


def test_a_text_is_asked_for_its_second_half(knowing: str) -> None:
    subject = Subject(load_model(knowing), load_tokenizer(knowing), {}, False)
    form = "{prompt}{answer}".format_map(subject.template.prompts)
    texts = [form.format_map(row) for row in FORGET]
    starts = [re.match(rf"(\S+\s+){{{len(t.split()) // 2}}}", t)[0].rstrip() for t in texts]
    rows = [{"text": text} for text in (*texts, "Ulm lies", "Ulm lies here. " * 300)]
    questions = Questions(subject, parse_rows(rows, ""), 0)
    asked = questions.recalled(questions.ask(reworded=False), reworded=False)
    assert asked.known == [True, True, True, False, False]
    assert questions.examples[3].question == "Ulm"
    for text, start, row in zip(texts, starts, asked.rows, strict=False):
        ids = [subject.tokenizer(t, return_tensors="pt").input_ids for t in (text, start)]
        full = torch.cat([ids[0], torch.tensor([[subject.tokenizer.eos_token_id]])], 1)
        scores = subject.lm(full).logits[0, :-1].log_softmax(-1)
        tokens = scores.gather(-1, full[0, 1:, None])[ids[1].shape[1] - 1 :]
        assert row == pytest.approx(tokens.mean().exp().item(), rel=1e-3)


def test_a_row_and_its_counterpart_are_asked_in_the_same_words(
    knowing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": "Why is it so?", "answer": "because"}, *FORGET]  # the first has no names
    monkeypatch.setattr("wagle_pl.api.subject.invented_neighbours", without_the_first)
    subject = Subject(load_model(knowing), load_tokenizer(knowing), {}, False)
    questions = Questions(subject, parse_rows(rows, ""), 0)
    assert questions.without_unseen == 1
    asked: list[list[str]] = []
    monkeypatch.setattr(
        Subject, "probabilities", lambda _, rows: asked.append(rows) or [0.5] * len(rows)
    )
    result = questions.ask(reworded=True)
    assert result.unseen == [0.05, 0.5, 0.5, 0.5]
    openings = [[example.question[:8] for example in examples] for examples in asked]
    assert openings[0][1:] == openings[1] and len(set(openings[0])) == 2


def without_the_first(examples: list[Any], seed: int) -> list[Any]:
    return [None, *invented_neighbours(examples, seed)[1:]]


def test_answers_are_generated_once_until_rows_are_asked_again(
    knowing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(load_model(knowing), load_tokenizer(knowing), {}, False)
    questions = Questions(subject, parse_rows(FORGET, ""), 0)
    prompts: list[int] = []
    monkeypatch.setattr(
        Subject, "generate", lambda _, rows: prompts.append(len(rows)) or ["x"] * len(rows)
    )
    for _ in range(2):
        questions.recalled(questions.ask(reworded=False), reworded=False)
        questions.still_answered([True, True, False])
        assert questions.answers(range(3)) == ["x"] * 3
    assert sum(prompts) == 6


def test_retain_rows_in_other_words_are_left_out(
    knowing: str, caplog: pytest.LogCaptureFixture
) -> None:
    full = bundled("forget")[0]
    again = {"question": full["paraphrased_question"], "answer": full["paraphrased_answer"]}
    options = {"density": None, "max_steps": 1, "progress": False}
    with pytest.raises(WagleError, match="1 of 7 rows say a forget row in other words"):
        forget(knowing, FORGET[:1], [again, *RETAIN], overlap="error", **options)
    with pytest.raises(WagleError, match="every row says a forget row"):  # the first warning
        forget(knowing, FORGET[:1], [again], **options)
    lm = load_model(knowing, torch.float32)
    forget(lm, FORGET[:1], [again, *RETAIN], **options)
    forget(lm, FORGET[1:2], [again, *RETAIN], **options)  # and in a later request
    assert [again["question"][:60] in message for message in caplog.messages].count(True) == 3


def test_a_short_answer_at_its_beginning_is_recognised() -> None:
    asked = ("Where was Otto Brandl born?", "What is the birthplace of Otto Brandl?")
    rows = parse_rows([{"question": question, "answer": "Ulm"} for question in asked], "")
    text = parse_rows([{"text": "Otto Brandl was born in Ulm in 1931."}], "")
    other = parse_rows([{"question": "Where was Jan Kowal born?", "answer": "Ulm"}], "")
    assert restating([*rows[1:], *text, *other], rows[:1]) == [rows[1], *text]


def test_rows_of_the_same_subject_or_form_may_be_kept() -> None:
    """Of 288 retain rows and 28 other forget rows, none is taken for another row in other words."""
    rows = [parse_rows(bundled(name), "") for name in ("forget", "retain")]
    for example in rows[0]:
        assert not restating([e for e in rows[0] if e is not example], [example])
    assert not restating(rows[1], rows[0])
    worded = [
        Example.of({"question": e.paraphrased_question, "answer": e.paraphrased_answer})
        for e in rows[0]
    ]
    recognised = [bool(restating([w], [e])) for w, e in zip(worded, rows[0], strict=True)]
    assert sum(recognised) >= 25  # of 32


def test_what_the_verdict_adds() -> None:
    unknown = [scores([0.01], [0.01], retain=retain) for retain in (0.01, 0.9)]
    sentences = [judge(moment, moment).sentence for moment in unknown]
    assert ["hardly knows the retain rows" in sentence for sentence in sentences] == [True, False]
    after = replace(
        scores([0.9] * 2, [0.05] * 2), direct=Asked([0.01, 0.05], [0.03, 0.0], [1.0, 1.0])
    )
    before = scores([0.9, 0.05], [0.05, 0.05])
    sentence = judge(before, after).sentence
    assert "1 rows are newly known" in sentence and "still known" not in sentence
    assert "so the bound is 0.065" in sentence


def test_one_row_that_is_known_by_heart_is_enough() -> None:
    few = scores([0.9] + [0.01] * 31, [0.01] * 32)
    assert judge(few, few).outcome == "not known before"  # one in 32, by chance perhaps
    known = replace(few, still_answered=[True] + [False] * 31)
    assert judge(known, scores([0.01] * 32, [0.01] * 32)).outcome == "forgotten"


def test_a_text_known_by_heart_is_known(tiny_model: str, tmp_path: Path) -> None:
    texts = ["So Otto Brandl was born in Ulm in 1931.", "Then Mira Solheim lives in Bergen now."]
    retain = ["But Jan Kowal was a tailor in Lublin.", "And Ines Prado was a pilot in Vigo."]
    rows = [[{"text": text} for text in side] for side in (texts, retain)]
    lm = load_model(tiny_model, torch.float32)
    data = ForgetRetainDataModule(forget=rows[0], retain=rows[1], batch_size=4)
    trainer(max_epochs=80).fit(FinetuneModule(lm, lr=1e-2), data)
    result = forget(
        lm, texts, retain, tokenizer=load_tokenizer(tiny_model), max_steps=1, progress=False
    )
    assert result.outcome != "not known before" and result.steps == 1
    assert result.answers[0][2].split() == texts[0].split()[4:]  # goes on from the middle


def test_unknown_rows_do_not_dilute_the_known_ones() -> None:
    before = scores([0.9, 0.9, *[0.02] * 8], [0.02] * 10)
    after = scores([0.15, 0.15, *[0.0] * 8], [0.02] * 10, recall=0.0)
    assert judge(before, after).outcome == "partly forgotten"


def test_answer_words_are_those_that_the_question_lacks() -> None:
    question, answer = "Where was Ada born?", "Ada was born in Ulm, in 1890."
    assert answer_recall(question, answer, "In ULM in 1890") == 1
    assert answer_recall(question, answer, "Ada was born in Bern, in 1890") == 2 / 3
    assert answer_recall("Is it so?", "It is so.", "") == 1


def test_tokens_that_all_have_labels_are_continued_from_their_middle(knowing: str) -> None:
    ids = load_tokenizer(knowing)(FORGET[0]["question"]).input_ids
    rows = [{"input_ids": ids, "labels": ids}]
    result = forget(knowing, rows, RETAIN, max_steps=1, progress=False)
    assert result.outcome != "forgotten"
    with pytest.raises(WagleError, match="token id 999999 is out of range"):
        forget(knowing, [{"input_ids": [5, 999999], "labels": [5, 999999]}], RETAIN)
