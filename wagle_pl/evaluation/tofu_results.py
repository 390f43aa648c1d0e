"""TOFU result files: the form that its authors publish results in, and ours.

A *result* is ``{file key: {measure: {row: value}}}``; the file keys are TOFU's (:data:`RESULT_KEYS`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.sets import Table

Result = Mapping[str, Mapping[str, Mapping[str, Any]]]

#: Test set name -> its key in a TOFU result file.
RESULT_KEYS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
OPTION_SETS = ("real_authors", "world_facts")  # their probability is that among the options


def to_result(tables: Mapping[str, Table]) -> dict[str, dict[str, dict[str, Any]]]:
    """Tables of records (see :mod:`wagle_pl.evaluation.observe`) -> a TOFU result; other sets keep their name.

    Rows without a question and a scored answer are left out, and sets of no other rows.
    """
    asked = {
        name: [record for record in table if record["question"] and record.get("nll") is not None]
        for name, table in tables.items()
    }
    return {
        RESULT_KEYS.get(name, name): _to_log(table, name in OPTION_SETS)
        for name, table in asked.items()
        if table
    }


def _to_log(table: Table, options: bool) -> dict[str, dict[str, Any]]:
    columns: dict[str, dict[str, Any]] = {}

    def note(name: str, row: str, value: Any) -> None:
        columns.setdefault(name, {})[row] = value

    for record in table:
        row = str(record["row"])
        note("avg_gt_loss", row, record["nll"])
        note("gt_loss", row, record["nll"] * record["tokens"])
        note("num_token_gt", row, record["tokens"])
        note("generated_text", row, [record["question"], record["generation"], record["answer"]])
        for name in ("rouge1_recall", "rougeL_recall"):
            note(name, row, record.get(name))
        perturbed = record.get("perturbed_nll") or []
        note("average_perturb_loss", row, perturbed)
        if record.get("paraphrased_nll") is not None:
            note("avg_paraphrased_loss", row, record["paraphrased_nll"])
            note("paraphrased_loss", row, record["paraphrased_nll"] * record["paraphrased_tokens"])
            note("num_token_paraphrased", row, record["paraphrased_tokens"])
        if perturbed:
            counts = record["perturbed_tokens"]
            note(
                "perturb_loss", row, [n * count for n, count in zip(perturbed, counts, strict=True)]
            )
            note("num_token_perturb", row, counts)
            paraphrased, wrong = (
                torch.tensor([record["paraphrased_nll"]]),
                torch.tensor([perturbed]),
            )
            note("truth_ratio", row, F.truth_ratio(paraphrased.double(), wrong.double()).item())
            if options:
                right = F.option_probability(torch.tensor([record["nll"]]).double(), wrong.double())
                note("normalized_gt_loss", row, -math.log(max(right.item(), 1e-300)))
    return columns


def from_result(result: Result) -> dict[str, Table]:
    """A TOFU result -> tables of records, as far as the result goes; the inverse of :func:`to_result`.

    A published result has prompts where ours has questions: the question is taken out of TOFU's two prompt formats.
    """
    names = {key: name for name, key in RESULT_KEYS.items()}
    return {
        names.get(key, key): _from_log(log) for key, log in result.items() if "avg_gt_loss" in log
    }


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


#: TOFU's prompts: of Llama-2, and of its other models.
_PROMPT = re.compile(r"\[INST\] (.*) \[/INST\]|Question: (.*)\n", re.DOTALL)


def _question_in(prompt: str) -> str:
    """The question that a published prompt asks; any other text is itself.

    >>> _question_in("[INST] Who wrote it? [/INST]"), _question_in("Question: Who?\\n"), _question_in("Who?")
    ('Who wrote it?', 'Who?', 'Who?')
    """
    found = _PROMPT.fullmatch(prompt)
    return next(filter(None, found.groups()), "") if found else prompt


def _from_log(log: Mapping[str, Mapping[str, Any]]) -> Table:
    table = []
    for row in sorted(log["avg_gt_loss"], key=int):
        question, generation, answer = (log.get("generated_text") or {}).get(row, ("", None, ""))
        if generation is None and log.get("rougeL_recall", {}).get(row) is not None:
            generation = ""  # its scores were kept and its text was not
        texts = {
            "row": int(row),
            "question": _question_in(question),
            "answer": answer,
            "generation": generation,
        }
        table.append(texts | {name: log.get(key, {}).get(row) for name, key in _COLUMNS.items()})
    return table
