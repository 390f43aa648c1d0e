"""OpenUnlearning's result files (arXiv 2506.12618): written, and read to compare with.

``TOFU_EVAL.json`` and ``MUSE_EVAL.json`` are ``{metric: {"agg_value": number, "value_by_index":
{row: {…}}}}``, a ``…_SUMMARY.json`` is ``{metric: number}``. Names and formulas are those of its
``src/evals``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Optional, TypedDict, Union

import torch

from wagle_pl.core.schema import Digits
from wagle_pl.evaluation import functional as F

Log = dict[str, Any]
Record = dict[str, Any]
#: The score of each of the members' rows, then of each of the others'.
Scores = tuple[Sequence[float], Sequence[float]]

TOFU_SETS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
MUSE_SETS = {
    "forget_knowmem_ROUGE": "knowmem_forget",
    "forget_verbmem_ROUGE": "verbmem_forget",
    "retain_knowmem_ROUGE": "knowmem_retain",
}
FORMS = {"PARA": "paraphrased", "PERT": "perturbed"}
#: Our measures in percent that are shares in its files, and stemmed ROUGE there.
PERCENT = dict(zip(("knowmem_f", "verbmem_f", "knowmem_r"), MUSE_SETS, strict=True))
TEXTS = {"input": "question", "ground_truth": "answer", "generation": "generation"}
ROUGES = {name: name for name in ("rouge1_recall", "rougeL_recall")}


class Metric(NamedTuple):
    """One of its metrics: our measure of the same number, and its entry for a row."""

    ours: str  # our measure; its own name if we have none
    test_set: str = ""  # of its rows; empty for a metric without rows
    column: str = ""  # rows that lack this column of ours have no entry
    mean_of: str = ""  # the key of an entry that the metric is the mean of, where we have none
    columns: Mapping[str, str] = {}  # key of an entry -> our column
    computed: Callable[[Record], Log] = lambda record: {}  # the other keys of an entry


def _probability(column: str) -> Callable[[Record], Log]:
    def entry(record: Record) -> Log:
        return {"prob": torch.exp(-torch.tensor(record[column], dtype=torch.float64)).tolist()}

    return entry


def _score(measure: Callable[[Sequence[bool]], float]) -> Callable[[Record], Log]:
    return lambda record: {"score": measure(record["greedy"])}


def _losses(record: Record, right: str) -> tuple[torch.Tensor, torch.Tensor]:
    pair = ([record[right]], [record["perturbed_nll"]])
    return tuple(torch.tensor(losses, dtype=torch.float64) for losses in pair)


def _truth_ratio(record: Record) -> Log:
    ratio = F.truth_ratio(*_losses(record, "paraphrased_nll"), "openunlearning")
    return {"score": ratio.item()}


def _among_options(record: Record) -> Log:
    return {"prob": F.option_probability(*_losses(record, "nll"), tiny=F.TINY).item()}


def _rouge(record: Record) -> Log:
    values = F.rouge([record["generation"]], [record["answer"]])
    return {name: values[name].item() for name in ("rougeL_f1", *ROUGES)}


def _metrics() -> Iterator[tuple[str, str, Metric]]:
    """(benchmark, its metric, what that is)."""
    for benchmark, members, recited, gibberish in (
        ("TOFU", "forget", "forget", "forget_Q_A_gibberish"),
        ("MUSE", "members", "verbmem_forget", "forget_gibberish"),
    ):
        for measure in (F.exact_memorization, F.extraction_strength):
            name = measure.__name__
            metric = Metric(f"{recited}/{name}", recited, "greedy", "score", {}, _score(measure))
            yield benchmark, name, metric
        for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradnorm"):
            yield benchmark, f"mia_{name}", Metric(f"{members}/mia_{name}")
        yield benchmark, "rel_diff", Metric(f"{members}/rel_diff")
        column = "not_gibberish"
        columns = {"score": column, "generation": "generation"}
        metric = Metric(f"{recited}/{column}", recited, column, "score", columns)
        yield benchmark, gibberish, metric
    for short, name in TOFU_SETS.items():
        options, keys = short in ("ra", "wf"), {"avg_loss": "nll"}
        ours = f"{short}_Q_A_Prob" if options else f"{name}/probability"
        metric = Metric(ours, name, "nll", "prob", keys, _probability("nll"))
        yield "TOFU", f"{short}_Q_A_Prob", metric
        if options:
            ours = f"{name}/probability"
            metric = Metric(ours, name, "perturbed_nll", "prob", {}, _among_options)
            yield "TOFU", f"{short}_Q_A_Prob_normalised", metric
        ours, columns = f"{name}/rougeL_recall", {**ROUGES, **TEXTS}
        metric = Metric(ours, name, "rougeL_recall", "rougeL_recall", columns, _rouge)
        yield "TOFU", f"{short}_Q_A_ROUGE", metric
        # its configuration spells this metric of the forget set in small letters
        theirs = "forget_truth_ratio" if short == "forget" else f"{short}_Truth_Ratio"
        metric = Metric(f"{name}/truth_ratio", name, "perturbed_nll", "score", {}, _truth_ratio)
        yield "TOFU", theirs, metric
        for form, ours in FORMS.items() if not options else [("PERT", "perturbed")]:
            column, keys = f"{ours}_nll", {"avg_loss": f"{ours}_nll"}
            ours_named = f"{name}/{ours}_probability"
            metric = Metric(ours_named, name, column, "prob", keys, _probability(column))
            yield "TOFU", f"{short}_Q_A_{form}_Prob", metric
            column = f"{ours}_rougeL_recall"
            columns = {"rougeL_recall": column, "generation": "generation"}
            metric = Metric(f"{name}/{column}", name, column, "rougeL_recall", columns)
            yield "TOFU", f"{short}_Q_A_{form}_ROUGE", metric
    for name in ("forget_quality", "model_utility"):
        yield "TOFU", name, Metric(name)
    yield "TOFU", "privleak", Metric("forget/privleak")
    yield "MUSE", "privleak", Metric("privleak")
    for ours, theirs in PERCENT.items():
        name, columns = MUSE_SETS[theirs], {**ROUGES, **TEXTS}
        yield "MUSE", theirs, Metric(ours, name, "generation", "rougeL_f1", columns, _rouge)


#: Benchmark -> its metrics by name.
METRICS: dict[str, dict[str, Metric]] = {"TOFU": {}, "MUSE": {}}
for _benchmark, _name, _metric in _metrics():
    METRICS[_benchmark][_name] = _metric


class Entry(TypedDict):
    """A row of a metric, as far as it is read."""

    avg_loss: Union[float, list[float], None]
    input: Optional[str]
    ground_truth: Optional[str]
    generation: Optional[str]
    rouge1_recall: Union[float, list[float], None]
    rougeL_recall: Union[float, list[float], None]
    score: Union[float, list[float], None]


class MetricLog(TypedDict):
    """A metric of ``…_EVAL.json``."""

    agg_value: Optional[float]
    value_by_index: Optional[dict[Digits, Entry]]


#: Content of one of their files.
Content = dict[str, Union[MetricLog, float, None]]


def find_file(place: Path) -> Optional[Path]:
    """Their result file: the place, or a file in it (the summary only if alone); or None."""
    names = [f"{name}_{kind}.json" for kind in ("EVAL", "SUMMARY") for name in METRICS]
    if place.is_file():
        return place if place.name in names else None
    return next((place / name for name in names if (place / name).is_file()), None)


def benchmark_of(content: Any) -> Optional[str]:
    """The benchmark of the content of one of their files; None for any other content."""
    if not isinstance(content, dict) or not content:
        return None
    logs = [value for value in content.values() if isinstance(value, dict)]
    if not all("agg_value" in log for log in logs):
        return None
    if any("knowmem" in name or "verbmem" in name for name in content):
        return "MUSE" if content.keys() & MUSE_SETS.keys() else None
    known = {name for name, metric in METRICS["TOFU"].items() if name != metric.ours}
    return "TOFU" if logs or content.keys() & known else None


# -- writing ---------------------------------------------------------------------------------------


def to_logs(
    benchmark: str,
    tables: Mapping[str, Sequence[Record]],
    values: Mapping[str, float],
    scores: Mapping[str, Scores],
) -> dict[str, Log]:
    """Content of ``…_EVAL.json``, from records, the suite's measures of them with the truth ratio's
    form ``openunlearning``, and the scores of attacks."""
    logs: dict[str, Log] = {}
    for name, metric in METRICS[benchmark].items():
        rows = {
            str(record["row"]): metric.computed(record)
            | {k: record[c] for k, c in metric.columns.items() if record.get(c) is not None}
            for record in tables.get(metric.test_set, ())
            if record.get(metric.column) not in (None, [])
        }
        if metric.ours in values and metric.ours not in PERCENT:
            logs[name] = {"agg_value": values[metric.ours]}
        elif rows:
            logs[name] = {"agg_value": fmean(row[metric.mean_of] for row in rows.values())}
        if rows:
            logs[name]["value_by_index"] = rows
    for attack, sides in scores.items():
        area = values[METRICS[benchmark][f"mia_{attack}"].ours]
        logs[f"mia_{attack}"] = {"auc": area, "agg_value": area}
        for side, numbers in zip(("forget", "holdout"), sides, strict=True):
            rows = {str(row): {"score": number} for row, number in enumerate(numbers)}
            log = {"agg_value": fmean(numbers), "value_by_index": rows}
            logs[f"mia_{attack}"][side] = log
    return dict(sorted(logs.items()))


def summary(logs: Mapping[str, Log]) -> dict[str, float]:
    """Content of ``…_SUMMARY.json``."""
    return {name: log["agg_value"] for name, log in logs.items()}


# -- reading ---------------------------------------------------------------------------------------


def to_metrics(benchmark: str, content: Mapping[str, Any]) -> dict[str, float]:
    """Our measures from one of their files; others keep their names. (MUSE's ROUGE is stemmed.)"""
    metrics = {}
    for name, value in content.items():
        number = value.get("agg_value") if isinstance(value, Mapping) else value
        if number is not None:
            ours = METRICS[benchmark].get(name, Metric(name)).ours
            metrics[ours] = float(number) * (100 if ours in PERCENT else 1)
    return metrics


def to_tables(benchmark: str, content: Mapping[str, Any]) -> dict[str, list[Record]]:
    """Test set -> records of an ``…_EVAL.json``, as far as possible; empty for a summary."""
    tables: dict[str, dict[int, Record]] = {}
    for name, metric in METRICS[benchmark].items():
        log = content.get(name)
        rows = log.get("value_by_index") or {} if isinstance(log, Mapping) else {}
        for row, entry in rows.items() if metric.columns else ():
            usual = {"row": int(row), "question": "", "answer": "", "generation": None}
            record = tables.setdefault(metric.test_set, {}).setdefault(int(row), usual)
            record |= {
                ours: entry[key]
                for key, ours in metric.columns.items()
                if entry.get(key) is not None
            }
    for name, records in tables.items():
        for record in records.values():
            record["question"] = question_in(record["question"])
            if name in ("real_authors", "world_facts") and "nll" in record:
                record["paraphrased_nll"] = record["nll"]
    return {name: [rows[row] for row in sorted(rows)] for name, rows in tables.items()}


#: The text around the last question of a decoded prompt, whose special tokens are left out.
_AROUND = (
    r"\[INST\] (.*) \[/INST\]",
    r"(?:.*\n\n)?Question: (.*)\n(?:Answer:)?",
    r"(?:.*?\W)??user\n+(.*?)\n?(?:assistant|model)",
    r"\W*You are a helpful assistant\.(.*)",
)


def question_in(prompt: str) -> str:
    """The question in a prompt, since published results hold whole prompts; any other text is
    returned unchanged.

    >>> question_in("[INST] Who wrote it? [/INST]"), question_in("Question: Who?\\n")
    ('Who wrote it?', 'Who?')
    >>> question_in("system\\n\\nYou are a helpful assistant.user\\n\\nWho?assistant\\n\\n")
    'Who?'
    """
    for around in _AROUND:
        if match := re.fullmatch(around, prompt.rstrip(), re.DOTALL) or re.fullmatch(
            around, prompt, re.DOTALL
        ):
            return match[1].strip()
    return prompt
