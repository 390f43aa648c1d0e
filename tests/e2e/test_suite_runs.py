"""Benchmarks from local folders: a step of training of each kind, and generation."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import torch

from wagle_pl.lm.models import load_tokenizer

STEP = (
    "--trainer.max_steps",
    "1",
    "--trainer.enable_checkpointing",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "1",
    "--trainer.logger",
    "false",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
    "--data.batch_size",
    "2",
)


SUITES = {
    "muse": (
        "MUSEDataModule",
        "--data.chunk_size",
        "30",
        "--data.prompt_size",
        "10",
        "--data.max_length",
        "60",
    ),
    "wmdp": ("WMDPDataModule", "--data.max_length", "60", "--data.prompt_size", "10"),
    "book": ("CopyrightDataModule", "--data.chunk_size", "40", "--data.prompt_size", "15"),
    "detox": ("DetoxDataModule",),
}


@pytest.mark.parametrize("suite", list(SUITES))
def test_one_step_of_each_kind(wagle, tiny_model, tmp_path, request, suite):
    folder = request.getfixturevalue(suite)
    data = ("--data", *SUITES[suite][:1], "--data.folder", folder, *SUITES[suite][1:])
    model = ("--model.model", tiny_model, "--model.output")
    fine = wagle(
        "fit", "--model", "FinetuneModule", *model, "target", *data, *STEP, data=False
    ).model
    assert fine.global_step == 1 and (tmp_path / "target/model.safetensors").exists()
    for objective in ("NPO", "PO"):
        arguments = (
            "fit",
            "--model",
            "UnlearnModule",
            *model,
            objective,
            "--model.objective",
            objective,
        )
        module = wagle(*arguments, *data, *STEP, data=False).model
        assert module.global_step == 1 and torch.isfinite(
            module.trainer.callback_metrics["train/loss"]
        )
    record = json.loads((tmp_path / "PO/wagle.json").read_text())
    assert str(folder) in record["lineage"][-1]["data"]["forget"]


def test_a_book_is_recited_to_the_end(wagle, book, tiny_model, tmp_path):
    """Generations as long as the book's own continuations, whatever length is asked for; other sets keep to that."""
    data = ("--data", "CopyrightDataModule", "--data.folder", book, *SUITES["book"][1:])
    model = (
        "--model",
        "EvaluationModule",
        "--model.model",
        tiny_model,
        "--model.max_new_tokens",
        "6",
    )
    module = wagle("test", *model, "--model.output", "out", *data, *STEP[2:-2], data=False).model
    tokenizer = load_tokenizer(tiny_model)
    counts = [
        len(tokenizer(row.answer)["input_ids"])
        for row in module.trainer.datamodule.test_examples("forget")
    ]
    assert (
        module.evaluation.max_new_tokens_of("forget") == max(counts) > 20
        and module.evaluation.max_new_tokens_of("forget_qa") == 6
    )
    said = pyarrow.parquet.read_table(tmp_path / "out/forget.parquet").to_pydict()["generation"]
    assert max(len(tokenizer(text)["input_ids"]) for text in said) > 12


def test_one_line_on_the_command_line(fails, tiny_model, tmp_path):
    args = ("fit", "--model", "UnlearnModule", "--model.model", tiny_model, "--model.output", "out")
    line = fails(*args, "--data", "WMDPDataModule", "--data.folder", tmp_path, *STEP, data=False)
    assert (
        "has no cais/wmdp-bio-forget-corpus train: expected wmdp-bio-forget-corpus/train.json"
        in line
    )
    assert not (tmp_path / "out").exists()
