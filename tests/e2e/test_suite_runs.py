"""Benchmarks from local folders: a step of training of each kind, and generation."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import torch
from helpers import QUIET

from wagle_pl.lm.models import load_tokenizer

ONE = f"{QUIET} --trainer.devices 1"
STEP = f"{ONE} --trainer.max_steps 1 --trainer.enable_checkpointing false --data.batch_size 2"

SUITES = {
    "muse": "MUSEDataModule --data.chunk_size 30 --data.prompt_size 10 --data.max_length 60",
    "wmdp": "WMDPDataModule --data.max_length 60 --data.prompt_size 10",
    "book": "CopyrightDataModule --data.chunk_size 40 --data.prompt_size 15",
    "detox": "DetoxDataModule",
    "knowundo": "KnowUnDoDataModule",
    "lume": "LUMEDataModule --data.limit_test 1",
    "rwku": "RWKUDataModule --data.targets null --data.limit_test 1",
}


def data_of(suite, folder):
    return ("--data", *SUITES[suite].split(), "--data.folder", folder)


@pytest.mark.parametrize("suite", ["muse", "wmdp", "book", "detox"])
def test_one_step_of_each_kind(wagle, tiny_model, tmp_path, request, suite):
    folder = request.getfixturevalue(suite)
    data = data_of(suite, folder)
    for objective in ("NPO", "PO"):
        fit = f"fit --model UnlearnModule --model.objective {objective} --model.output {objective}"
        module = wagle(fit, "--model.model", tiny_model, *data, STEP, data=False).model
        assert module.global_step == 1 and (tmp_path / objective / "model.safetensors").exists()
        assert torch.isfinite(module.trainer.callback_metrics["train/loss"])
    record = json.loads((tmp_path / "PO/wagle.json").read_text())
    assert str(folder) in record["lineage"][-1]["data"]["forget"]


@pytest.mark.parametrize(
    ("suite", "whole"),
    [
        ("knowundo", {"unlearn_success", "retention_success"}),
        ("lume", {"task_aggregate", "mia_score", "final_score"}),
        (
            "rwku",
            {"forget_level1/word_rouge", "mia_retain/member_min_k", "utility_truthfulness/mc2"},
        ),
    ],
)
def test_the_numbers_of_a_benchmark(wagle, tiny_model, tmp_path, request, suite, whole):
    test = f"test --model EvaluationModule --model.model {tiny_model} --model.output out".split()
    data = data_of(suite, request.getfixturevalue(suite))
    wagle(*test, *data, ONE, data=False)
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    undefined = json.loads((tmp_path / "out/metrics.info.json").read_text())["undefined"]
    # the tiny model may say too little to be fluent
    assert whole <= set(found) and set(undefined) <= {"utility_fluency/fluency"}


def test_a_book_is_recited_to_the_end(wagle, book, tiny_model, tmp_path):
    """Generations as long as the book's own continuations, whatever length is asked for; other sets keep to that."""
    test = "test --model EvaluationModule --model.max_new_tokens 6 --model.output out --model.model"
    module = wagle(*test.split(), tiny_model, *data_of("book", book), ONE, data=False).model
    tokenizer = load_tokenizer(tiny_model)
    answers = [row.answer for row in module.trainer.datamodule.test_examples("forget")]
    longest = max(len(tokenizer(answer)["input_ids"]) for answer in answers)
    lengths = [module.evaluation.plan.max_new_tokens_of(name) for name in ("forget", "forget_qa")]
    assert lengths == [longest, 6] and longest > 20
    said = pyarrow.parquet.read_table(tmp_path / "out/forget.parquet").to_pydict()["generation"]
    assert max(len(tokenizer(text)["input_ids"]) for text in said) > 12
