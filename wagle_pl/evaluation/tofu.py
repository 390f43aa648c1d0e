"""TOFU's measures over result files: ours and the ones published with the benchmark have the same keys.

A *result* is ``{file key: {measure: {row: value}}}``; the file keys are TOFU's (:data:`RESULT_KEYS`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from wagle_pl.evaluation import functional as F
from wagle_pl.utilities import WagleError

Result = Mapping[str, Mapping[str, Mapping[str, Any]]]

#: Test set name -> its key in a TOFU result file.
RESULT_KEYS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
UTILITY_SETS = ("retain", "real_authors", "world_facts")
OPTION_SETS = ("real_authors", "world_facts")  # their probability is that among the options


def to_result(tables: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Tables of examples (see ``wagle_pl.evaluation.module``) -> a TOFU result; other sets keep their name."""
    return {
        RESULT_KEYS.get(name, name): {
            "avg_gt_loss": {str(row["row"]): row["nll"] for row in table},
            "num_token_gt": {str(row["row"]): row["tokens"] for row in table},
            "avg_paraphrased_loss": {str(row["row"]): row["paraphrased_nll"] for row in table},
            "average_perturb_loss": {str(row["row"]): row["perturbed_nll"] for row in table},
            "generated_text": {
                str(row["row"]): [row["question"], row["generation"], row["answer"]] for row in table
            },
            "rouge1_recall": {str(row["row"]): row["rouge1_recall"] for row in table},
            "rougeL_recall": {str(row["row"]): row["rougeL_recall"] for row in table},
        }
        for name, table in tables.items()
    }  # fmt: skip


def load_result(path: str | Path) -> Result:
    """Read a TOFU result file, or the one in a folder that ``wagle test`` wrote.

    Raises:
        WagleError: if there is none.
    """
    path = Path(path)
    file = path / "tofu_result.json" if path.is_dir() else path
    if not file.is_file():
        raise WagleError(f"result file {file} does not exist (run wagle test on the retrained model first)")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise WagleError(f"{file} line {error.lineno}: malformed JSON: {error.msg}") from None


def tofu_measures(result: Result, name: str, form: F.TruthRatioForm = "geometric") -> dict[str, float]:
    """The means of one test set: ``probability``, ``rougeL_recall`` and ``truth_ratio`` (a score in [0, 1]).

    A measure the rows do not allow (no perturbed answers, no generations) is left out.
    """
    values = result[RESULT_KEYS.get(name, name)]
    nll = _column(values["avg_gt_loss"])
    perturbed = _perturbed(values)
    measures = {}
    if name not in OPTION_SETS:
        measures["probability"] = F.answer_probability(nll).mean().item()
    elif perturbed is not None:
        measures["probability"] = F.option_probability(nll, perturbed).mean().item()
    rouge = values.get("rougeL_recall") or {}
    if rouge and all(v is not None for v in rouge.values()):
        measures["rougeL_recall"] = _column(rouge).mean().item()
    ratios = truth_ratios(result, name, form)
    if ratios is not None:
        direction = "closer_to_1" if name == "forget" else "true_better"
        measures["truth_ratio"] = F.truth_ratio_score(ratios, direction).mean().item()
    return measures


def truth_ratios(result: Result, name: str = "forget", form: F.TruthRatioForm = "geometric") -> Optional[Tensor]:
    """Truth ratio of every row of a test set, float64 (N,), in row order; None without perturbed answers."""
    values = result[RESULT_KEYS.get(name, name)]
    perturbed = _perturbed(values)
    return None if perturbed is None else F.truth_ratio(_column(values["avg_paraphrased_loss"]), perturbed, form)


def tofu_model_utility(result: Result, form: F.TruthRatioForm = "geometric") -> float:
    """Model utility: harmonic mean of probability, ROUGE-L recall and truth ratio on retain, real authors and world
    facts (TOFU, section 2.2).

    Args:
        result: a TOFU result.
        form: of the truth ratio, see :func:`wagle_pl.evaluation.functional.truth_ratio`.

    Raises:
        WagleError: if one of the three sets or a measure is missing.
    """
    numbers = []
    for name in UTILITY_SETS:
        if RESULT_KEYS[name] not in result:
            raise WagleError(f"model utility needs the test set {name!r}; the result has {sorted(result)}")
        measures = tofu_measures(result, name, form)
        if len(measures) < 3:
            raise WagleError(f"model utility needs probability, rougeL_recall and truth_ratio; {name} has {measures}")
        numbers += measures.values()
    return F.harmonic_mean(torch.tensor(numbers, dtype=torch.float64)).item()


def tofu_forget_quality(result: Result, retrained: Result, form: F.TruthRatioForm = "geometric") -> float:
    """Forget quality: p-value of a Kolmogorov–Smirnov test between the forget rows' truth ratios of a model and of
    the retrained model (TOFU, section 2.2).

    Raises:
        WagleError: if a side has no truth ratios, or the two hold other rows (with the number that differ).
    """
    sides = []
    for side, label in ((result, "this"), (retrained, "the retrained")):
        ratios = truth_ratios(side, "forget", form) if RESULT_KEYS["forget"] in side else None
        if ratios is None:
            raise WagleError(f"forget quality needs perturbed answers on the forget set; {label} result has none")
        sides.append((set(side[RESULT_KEYS["forget"]]["avg_gt_loss"]), ratios))
    (rows, ratios), (retrained_rows, retrained_ratios) = sides
    if rows != retrained_rows:
        raise WagleError(f"the retrained model's result is on other forget rows: {len(rows ^ retrained_rows)} differ")
    return F.ks_test(ratios, retrained_ratios)[1]


def _column(values: Mapping[str, float]) -> Tensor:
    return torch.tensor([values[row] for row in sorted(values, key=int)], dtype=torch.float64)


def _perturbed(values: Mapping[str, Any]) -> Optional[Tensor]:
    """(N, K) perturbed losses, short rows filled with NaN; None if a row has none."""
    column = values.get("average_perturb_loss") or {}
    if not column or not all(column.values()):
        return None
    width = max(len(v) for v in column.values())
    rows = [[*column[row], *[math.nan] * (width - len(column[row]))] for row in sorted(column, key=int)]
    return torch.tensor(rows, dtype=torch.float64)
