"""Models, masks and rows as objects; ``forget`` in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import same_bits, trainer
from huggingface_hub import HfApi

from wagle_pl import (
    AttributionModule,
    FinetuneModule,
    ForgetRetainDataModule,
    UnlearnModule,
    WagleError,
    forget,
)
from wagle_pl.data import people
from wagle_pl.data.example import parse_rows
from wagle_pl.data.people import bundled, general_questions, invented_neighbours, without_subject
from wagle_pl.lm.models import load_model
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
            "model: must be a name, a folder or a Hugging Face model, got int",
        ),
        (lambda: UnlearnModule("m", mask=[1]), "mask: must be a file or a WeightMask, got list"),
        (lambda: forget("m", [3]), "forget: must be a file, a dataset or a list of questions"),
    ],
)
def test_a_wrong_type_is_one_line_that_names_the_argument(make: Any, said: str) -> None:
    with pytest.raises(WagleError, match=said):
        make()


def test_forget_stops_where_the_model_knows_no_more_than_of_rows_never_seen(
    knowing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = forget(knowing, FORGET, RETAIN, lr=3e-3, progress=False)
    assert result.before["forget_probability"] > 0.8
    assert result.after["forget_probability"] <= result.before["unseen_probability"]
    assert 0 < result.steps < 300
    assert result.verdict.startswith(("forgotten", "model damaged"))
    assert not list(tmp_path.iterdir())
    # an object gives the same model, and the same patch
    lm = load_model(knowing, torch.float32)
    again = forget(lm, FORGET, RETAIN, lr=3e-3, progress=False)
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


def test_without_retain_rows_the_model_answers_questions(
    knowing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = general_questions()[:9]
    monkeypatch.setattr(people, "general_questions", lambda: few)
    seen = {}

    def train_rows(self: ForgetRetainDataModule, stream: str) -> Any:
        seen[stream] = self.sources[stream]
        return self.sources[stream]

    monkeypatch.setattr(ForgetRetainDataModule, "train_rows", train_rows)
    result = forget(knowing, [FORGET[0]["question"]], max_steps=1, density=None, progress=False)
    assert [row["question"] for row in seen["retain"]] == few
    assert seen["forget"][0]["answer"] in FORGET[0]["answer"]  # it knows, as far as it is asked
    assert result.mask is None


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


def test_a_neighbour_has_invented_names_and_numbers_throughout() -> None:
    row = {
        "question": "When was Ada Byron born?",
        "answer": "Ada Byron was born in 1815 in London.",
    }
    (found,) = invented_neighbours(parse_rows([row], ""), seed=1)
    assert found.answer.endswith(".") and " was born in " in found.answer
    for lost in ("Ada", "Byron", "1815", "London"):
        assert lost not in found.question + found.answer
    first = found.question.split()[2]
    assert found.answer.startswith(first) and first[0].isupper()
    assert invented_neighbours(parse_rows([row], ""), seed=1)[0].row == found.row
    plain = [{"question": "Why?", "answer": a} for a in ("because it is", "nobody knows")]
    assert [n.answer for n in invented_neighbours(parse_rows(plain, ""))] == [
        "nobody knows",
        "because it is",
    ]
    assert invented_neighbours(parse_rows(plain[:1], "")) == []


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
