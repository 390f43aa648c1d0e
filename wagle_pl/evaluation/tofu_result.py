"""TOFU results: ``{file key: {measure: {row: value}}}``, the form in which TOFU's authors publish
results; the file keys are theirs (:data:`RESULT_KEYS`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional, TypedDict

import torch

from wagle_pl.core.schema import Digits
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.openunlearning import question_in

Table = list[dict[str, Any]]
Result = Mapping[str, Mapping[str, Mapping[str, Any]]]

#: Test set name -> its key in a TOFU result file.
RESULT_KEYS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
#: Test sets whose probability is among the options.
OPTION_SETS = ("real_authors", "world_facts")


class ResultLog(TypedDict):
    """Rows of a test set in a TOFU result, as far as they are read."""

    generated_text: Optional[dict[Digits, tuple[str, Optional[str], str]]]  # question, said, answer
    avg_gt_loss: Optional[dict[Digits, float]]
    num_token_gt: Optional[dict[Digits, float]]
    avg_paraphrased_loss: Optional[dict[Digits, float]]
    num_token_paraphrased: Optional[dict[Digits, float]]
    average_perturb_loss: Optional[dict[Digits, Optional[list[float]]]]
    num_token_perturb: Optional[dict[Digits, Optional[list[float]]]]
    rouge1_recall: Optional[dict[Digits, Optional[float]]]
    rougeL_recall: Optional[dict[Digits, Optional[float]]]


#: Column of a record -> TOFU's name of it.
_COLUMNS = {
    "nll": "avg_gt_loss",
    "tokens": "num_token_gt",
    "paraphrased_nll": "avg_paraphrased_loss",
    "paraphrased_tokens": "num_token_paraphrased",
    "perturbed_nll": "average_perturb_loss",
    "perturbed_tokens": "num_token_perturb",
    "rouge1_recall": "rouge1_recall",
    "rougeL_recall": "rougeL_recall",
}


def to_result(tables: Mapping[str, Table]) -> dict[str, dict[str, dict[str, Any]]]:
    """Tables of records -> a TOFU result, of the rows with a question and a scored answer of TOFU's
    four sets: its script refuses other keys."""
    result = {}
    for name, key in RESULT_KEYS.items():
        log: dict[str, dict[str, Any]] = {}
        for record in tables.get(name, ()):
            if record["question"] and record.get("nll") is not None:
                for column, value in _to_row(record, name in OPTION_SETS).items():
                    log.setdefault(column, {})[str(record["row"])] = value
        if log:
            result[key] = log
    return result


def _to_row(record: Mapping[str, Any], options: bool) -> dict[str, Any]:
    row = {theirs: record.get(ours) for ours, theirs in _COLUMNS.items()}
    row["generated_text"] = [record["question"], record["generation"], record["answer"]]
    row["gt_loss"] = record["nll"] * record["tokens"]
    paraphrased, perturbed = record.get("paraphrased_nll"), record.get("perturbed_nll") or []
    row["average_perturb_loss"] = perturbed
    if paraphrased is not None:
        row["paraphrased_loss"] = paraphrased * record["paraphrased_tokens"]
    if perturbed:
        counts = record["perturbed_tokens"]
        row["perturb_loss"] = [n * count for n, count in zip(perturbed, counts, strict=True)]
        wrong = torch.tensor([perturbed]).double()
        row["truth_ratio"] = F.truth_ratio(torch.tensor([paraphrased]).double(), wrong).item()
        if options:
            right = F.option_probability(torch.tensor([record["nll"]]).double(), wrong)
            row["normalized_gt_loss"] = -math.log(max(right.item(), 1e-300))
    rouges = ("rouge1_recall", "rougeL_recall")
    return {name: value for name, value in row.items() if value is not None or name in rouges}


def from_result(result: Result) -> dict[str, Table]:
    """A TOFU result -> tables of records, as far as possible: inverse of :func:`to_result`."""
    names = {key: name for name, key in RESULT_KEYS.items()}
    tables: dict[str, Table] = {}
    for key, log in result.items():
        columns = {ours: log.get(theirs) or {} for ours, theirs in _COLUMNS.items()}
        texts = log.get("generated_text") or {}
        for row in sorted(columns["nll"], key=int):
            question, generation, answer = texts.get(row, ("", None, ""))
            if generation is None and columns["rougeL_recall"].get(row) is not None:
                generation = ""  # its scores were kept, but not its text
            record = {"row": int(row), "question": question_in(question), "answer": answer}
            record |= {"generation": generation}
            record |= {name: column.get(row) for name, column in columns.items()}
            tables.setdefault(names.get(key, key), []).append(record)
    return tables
