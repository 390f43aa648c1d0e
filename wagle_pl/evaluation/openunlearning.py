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
from types import MappingProxyType
from typing import Any, NamedTuple, Optional, TypedDict, Union

import torch
from torch import Tensor

from wagle_pl.core.schema import Digits
from wagle_pl.evaluation import functional as F

Log = dict[str, Any]
Record = dict[str, Any]
#: Key of a row's entry -> our column, or how the value is made of a record.
Entry = Mapping[str, Union[str, Callable[[Record], Any]]]
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


class Metric(NamedTuple):
    """One of its metrics: our measure of the same number, and its entry for a row."""

    ours: str  # our measure; its own name if we have none
    test_set: str = ""  # of its rows; empty for a metric without rows
    column: str = ""  # rows that lack this column of ours have no entry
    entry: Entry = MappingProxyType({})
    mean_of: str = ""  # the key of an entry that the metric is the mean of, where we have none

    @property
    def columns(self) -> dict[str, str]:
        """Key of an entry -> our column."""
        return {key: source for key, source in self.entry.items() if isinstance(source, str)}

    def entry_of(self, record: Record) -> Log:
        """The entry of a row."""
        values = {
            key: record.get(source) if isinstance(source, str) else source(record)
            for key, source in self.entry.items()
        }
        return {key: value for key, value in values.items() if value is not None}


def _loss(column: str) -> Entry:
    return {"prob": lambda record: (-_doubles(record[column])).exp().tolist(), "avg_loss": column}


def _score(measure: Callable[[Sequence[bool]], float]) -> Entry:
    return {"score": lambda record: measure(record["greedy"])}


def _truth_ratio(record: Record) -> float:
    losses = _doubles([record["paraphrased_nll"]]), _doubles([record["perturbed_nll"]])
    return F.truth_ratio(*losses, "openunlearning").item()


def _among_options(record: Record) -> float:
    losses = _doubles([record["nll"]]), _doubles([record["perturbed_nll"]])
    return F.option_probability(*losses, tiny=F.TINY).item()


def _doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


#: Entry of a row that was generated from.
_GENERATED: Entry = {
    "rougeL_f1": lambda r: F.rouge([r["generation"]], [r["answer"]])["rougeL_f1"].item(),
    **{name: name for name in ("rouge1_recall", "rougeL_recall", "generation")},
    **{"input": "question", "ground_truth": "answer"},
}


def _common(members: str, recited: str, gibberish: str) -> Iterator[tuple[str, Metric]]:
    """Metrics of both benchmarks by name."""
    for measure in (F.exact_memorization, F.extraction_strength):
        name = measure.__name__
        yield name, Metric(f"{recited}/{name}", recited, "greedy", _score(measure))
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradnorm"):
        yield f"mia_{name}", Metric(f"{members}/mia_{name}")
    yield "rel_diff", Metric(f"{members}/rel_diff")
    entry = {"score": "not_gibberish", "generation": "generation"}
    yield gibberish, Metric(f"{recited}/not_gibberish", recited, "not_gibberish", entry)


def _of_tofu(short: str, name: str) -> Iterator[tuple[str, Metric]]:
    """Metrics of one of TOFU's test sets by name."""
    options, theirs = short in ("ra", "wf"), f"{short}_Q_A"
    ours = f"{theirs}_Prob" if options else f"{name}/probability"
    yield f"{theirs}_Prob", Metric(ours, name, "nll", _loss("nll"), "prob" if options else "")
    if options:
        metric = Metric(f"{name}/probability", name, "perturbed_nll", {"prob": _among_options})
        yield f"{theirs}_Prob_normalised", metric
    yield f"{theirs}_ROUGE", Metric(f"{name}/rougeL_recall", name, "rougeL_recall", _GENERATED)
    # its configuration spells this metric of the forget set in small letters
    key = "forget_truth_ratio" if short == "forget" else f"{short}_Truth_Ratio"
    yield key, Metric(f"{name}/truth_ratio", name, "perturbed_nll", {"score": _truth_ratio})
    for form, ours in FORMS.items():
        if form == "PARA" and options:
            continue
        column = f"{ours}_nll"
        metric = Metric(f"{name}/{ours}_probability", name, column, _loss(column))
        yield f"{theirs}_{form}_Prob", metric
        column = f"{ours}_rougeL_recall"
        entry = {"rougeL_recall": column, "generation": "generation"}
        yield f"{theirs}_{form}_ROUGE", Metric(f"{name}/{column}", name, column, entry)


#: Benchmark -> its metrics by name.
METRICS: dict[str, dict[str, Metric]] = {
    "TOFU": {
        **dict(_common("forget", "forget", "forget_Q_A_gibberish")),
        **{theirs: m for item in TOFU_SETS.items() for theirs, m in _of_tofu(*item)},
        **{name: Metric(name) for name in ("forget_quality", "model_utility")},
        "privleak": Metric("forget/privleak"),
    },
    "MUSE": {
        **dict(_common("members", "verbmem_forget", "forget_gibberish")),
        "privleak": Metric("privleak"),
        **{
            theirs: Metric(ours, MUSE_SETS[theirs], "generation", _GENERATED, "rougeL_f1")
            for ours, theirs in PERCENT.items()
        },
    },
}


class RowLog(TypedDict):
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
    value_by_index: Optional[dict[Digits, RowLog]]


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
            str(record["row"]): metric.entry_of(record)
            for record in tables.get(metric.test_set, ())
            if record.get(metric.column) not in (None, [])
        }
        if rows and metric.mean_of:
            logs[name] = {"agg_value": fmean(row[metric.mean_of] for row in rows.values())}
        elif metric.ours in values and metric.ours not in PERCENT:
            logs[name] = {"agg_value": values[metric.ours]}
        if rows and name in logs:
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
            empty = {"row": int(row), "question": "", "answer": "", "generation": None}
            record = tables.setdefault(metric.test_set, {}).setdefault(int(row), empty)
            known = {ours: entry.get(key) for key, ours in metric.columns.items()}
            record |= {ours: value for ours, value in known.items() if value is not None}
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
        for text in (prompt.rstrip(), prompt):
            if match := re.fullmatch(around, text, re.DOTALL):
                return match[1].strip()
    return prompt
