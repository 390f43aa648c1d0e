"""OpenUnlearning's result files (arXiv 2506.12618): written, and read to compare with.

``TOFU_EVAL.json`` and ``MUSE_EVAL.json`` are ``{metric: {"agg_value": number, "value_by_index":
{row: {…}}}}``, a ``…_SUMMARY.json`` is ``{metric: number}``. Names and formulas are those of its
``src/evals``.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch

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
TINY = 1e-10  # added to denominators, as in its code
STOPS = ("\n\n", "\nQuestion", "Question:")  # what ends an answer in MUSE's knowledge memorisation
#: Our measures in percent that are shares in its files.
PERCENT = {"knowmem_f", "verbmem_f", "knowmem_r"}


def truth_ratio_key(short: str) -> str:
    """Their key of a set's truth ratio; its configuration spells the forget set's in small letters.

    >>> truth_ratio_key("forget"), truth_ratio_key("ra")
    ('forget_truth_ratio', 'ra_Truth_Ratio')
    """
    return "forget_truth_ratio" if short == "forget" else f"{short}_Truth_Ratio"


def _names() -> Iterator[tuple[str, str, str]]:
    """(benchmark, their metric, our measure of the same)."""
    for benchmark, members, recited, gibberish in (
        ("TOFU", "forget", "forget", "forget_Q_A_gibberish"),
        ("MUSE", "members", "verbmem_forget", "forget_gibberish"),
    ):
        for name in ("exact_memorization", "extraction_strength"):
            yield benchmark, name, f"{recited}/{name}"
        for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference", "gradnorm"):
            yield benchmark, f"mia_{name}", f"{members}/mia_{name}"
        yield benchmark, "rel_diff", f"{members}/rel_diff"
        yield benchmark, gibberish, f"{recited}/not_gibberish"
    for short, name in TOFU_SETS.items():
        options = short in ("ra", "wf")
        yield "TOFU", f"{short}_Q_A_Prob{'_normalised' * options}", f"{name}/probability"
        yield "TOFU", f"{short}_Q_A_ROUGE", f"{name}/rougeL_recall"
        yield "TOFU", truth_ratio_key(short), f"{name}/truth_ratio"
        for form, ours in FORMS.items():
            yield "TOFU", f"{short}_Q_A_{form}_Prob", f"{name}/{ours}_probability"
            yield "TOFU", f"{short}_Q_A_{form}_ROUGE", f"{name}/{ours}_rougeL_recall"
    for name in ("forget_quality", "model_utility"):
        yield "TOFU", name, name
    yield "TOFU", "privleak", "forget/privleak"
    yield "MUSE", "privleak", "privleak"
    measures = ("knowmem_f", "verbmem_f", "knowmem_r")
    yield from (("MUSE", *pair) for pair in zip(MUSE_SETS, measures, strict=True))


#: Benchmark -> their metric -> our measure.
NAMES: dict[str, dict[str, str]] = {"TOFU": {}, "MUSE": {}}
for _benchmark, _theirs, _ours in _names():
    NAMES[_benchmark][_theirs] = _ours


def find_file(place: Path) -> Optional[Path]:
    """Their result file: the place, or a file in it (the summary only if alone); or None."""
    names = [f"{name}_{kind}.json" for kind in ("EVAL", "SUMMARY") for name in NAMES]
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
    known = {name for name in NAMES["TOFU"] if name != NAMES["TOFU"][name]}
    return "TOFU" if logs or content.keys() & known else None


# -- writing ---------------------------------------------------------------------------------------


def to_logs(
    benchmark: str,
    tables: Mapping[str, Sequence[Record]],
    values: Mapping[str, float],
    scores: Mapping[str, Scores],
) -> dict[str, Log]:
    """Content of ``…_EVAL.json``, from records, our measures, and the scores of attacks."""
    logs = _tofu_logs(tables) if benchmark == "TOFU" else _muse_logs(tables)
    gibberish = "forget_Q_A_gibberish" if benchmark == "TOFU" else "forget_gibberish"
    recited = tables.get("forget" if benchmark == "TOFU" else "verbmem_forget", [])
    for of_row in (F.exact_memorization, F.extraction_strength):
        logs[of_row.__name__] = _log(recited, "greedy", lambda r, c, f=of_row: {"score": f(r[c])})
    logs[gibberish] = _log(recited, "not_gibberish", _scored)
    for attack, sides in scores.items():
        area = F.membership_auc(*(torch.tensor(side) for side in sides))
        rows = ([{"row": i, "score": x} for i, x in enumerate(side)] for side in sides)
        parts = (_log(side, "score", lambda r, c: {c: r[c]}) for side in rows)
        named = dict(zip(("forget", "holdout"), parts, strict=True))
        logs[f"mia_{attack}"] = {**named, "auc": area, "agg_value": area}
    for name in ("forget_quality", "privleak", "rel_diff"):
        if NAMES[benchmark].get(name) in values:
            logs[name] = {"agg_value": values[NAMES[benchmark][name]]}
    return {name: log for name, log in sorted(logs.items()) if log}


def summary(logs: Mapping[str, Log]) -> dict[str, float]:
    """Content of ``…_SUMMARY.json``."""
    return {name: log["agg_value"] for name, log in logs.items()}


def _log(table: Sequence[Record], column: str, entry: Callable[[Record, str], Log]) -> Log:
    """A metric: mean of the entries' first values over the rows that have a column."""
    rows = {str(r["row"]): entry(r, column) for r in table if r.get(column) not in (None, [])}
    if not rows:
        return {}
    numbers = [next(iter(row.values())) for row in rows.values()]
    means = [statistics.fmean(n) if isinstance(n, list) else n for n in numbers]
    return {"agg_value": statistics.fmean(means), "value_by_index": rows}


def _probability(record: Record, column: str) -> Log:
    nll = record[column]  # of one answer, or of several
    several = isinstance(nll, list)
    return {"prob": [math.exp(-x) for x in nll] if several else math.exp(-nll), "avg_loss": nll}


def _scored(record: Record, column: str, name: str = "score") -> Log:
    return {name: record[column], "generation": record["generation"]}


def _rouge(record: Record, column: str) -> Log:
    found = {name: record[name] for name in ("rougeL_recall", "rouge1_recall")}
    f1 = F.rouge([record["generation"]], [record["answer"]])["rougeL_f1"].item()
    return {**found, "rougeL_f1": f1, **_texts(record, record["generation"])}


def _among_options(record: Record, column: str) -> Log:
    right, wrong = math.exp(-record["nll"]), sum(math.exp(-x) for x in record[column])
    return {"prob": right / (right + wrong + TINY)}


def _tofu_logs(tables: Mapping[str, Sequence[Record]]) -> dict[str, Log]:
    logs: dict[str, Log] = {}
    for short, name in TOFU_SETS.items():
        options = short in ("ra", "wf")
        right = "nll" if options else "paraphrased_nll"

        def truth_ratio(record: Record, column: str, right: str = right) -> Log:
            # geometric, as in TOFU's script: of the mean losses
            wrong = math.exp(-statistics.fmean(record[column]))
            return {"score": wrong / (math.exp(-record[right]) + TINY)}

        metrics = {"Prob": ("nll", _probability), "ROUGE": ("rougeL_recall", _rouge)}
        for form, ours in FORMS.items() if not options else [("PERT", "perturbed")]:
            metrics[f"{form}_Prob"] = (f"{ours}_nll", _probability)
            recall = partial(_scored, name="rougeL_recall")
            metrics[f"{form}_ROUGE"] = (f"{ours}_rougeL_recall", recall)
        if options:
            metrics["Prob_normalised"] = ("perturbed_nll", _among_options)
        table = tables.get(name, [])
        logs |= {f"{short}_Q_A_{metric}": _log(table, *how) for metric, how in metrics.items()}
        if ratios := _log(table, "perturbed_nll", truth_ratio):
            found = [row["score"] for row in ratios["value_by_index"].values()]
            forgets = short == "forget"
            scores = [min(r, 1 / (r + TINY)) if forgets else max(0.0, 1 - r) for r in found]
            logs[truth_ratio_key(short)] = {**ratios, "agg_value": statistics.fmean(scores)}
    of_set = ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
    names = ["retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"]
    names += [f"{short}_{name}" for short in ("ra", "wf") for name in of_set]
    if all(logs.get(name) for name in names):
        utility = statistics.harmonic_mean([logs[name]["agg_value"] for name in names])
        logs["model_utility"] = {"agg_value": utility}
    return logs


def _texts(record: Record, generation: str) -> Log:
    texts = {"input": record["question"], "ground_truth": record["answer"]}
    return {**texts, "generation": generation}


def _muse_logs(tables: Mapping[str, Sequence[Record]]) -> dict[str, Log]:
    def entry(record: Record, column: str, stops: Sequence[str]) -> Log:
        said = record[column]
        for stop in stops:
            said = said.partition(stop)[0]
        said = said.strip()
        found = F.rouge([said], [record["answer"]])
        kinds = ("rougeL_f1", "rouge1_recall", "rougeL_recall")
        return {**{kind: found[kind].item() for kind in kinds}, **_texts(record, said)}

    return {
        metric: _log(
            tables.get(name, []),
            "generation",
            partial(entry, stops=STOPS if "knowmem" in metric else ()),
        )
        for metric, name in MUSE_SETS.items()
    }


# -- reading ---------------------------------------------------------------------------------------


def to_metrics(benchmark: str, content: Mapping[str, Any]) -> dict[str, float]:
    """Our measures from one of their files; others keep their names. (MUSE's ROUGE is stemmed.)"""
    found = {}
    for name, value in content.items():
        number = value.get("agg_value") if isinstance(value, Mapping) else value
        if number is not None:
            ours = NAMES[benchmark].get(name, name)
            found[ours] = float(number) * (100 if ours in PERCENT else 1)
    return found


def to_tables(benchmark: str, content: Mapping[str, Any]) -> dict[str, list[Record]]:
    """Test set -> records of an ``…_EVAL.json``, as far as possible; empty for a summary."""
    found: dict[str, dict[int, Record]] = {}

    def note(name: str, metric: str, columns: Mapping[str, str]) -> None:
        log = content.get(metric)
        rows = log.get("value_by_index") or {} if isinstance(log, Mapping) else {}
        for row, entry in rows.items():
            usual = {"row": int(row), "question": "", "answer": "", "generation": None}
            record = found.setdefault(name, {}).setdefault(int(row), usual)
            record |= {ours: entry[theirs] for theirs, ours in columns.items() if theirs in entry}

    texts = {"input": "question", "ground_truth": "answer", "generation": "generation"}
    rouges = {name: name for name in ("rouge1_recall", "rougeL_recall")}
    if benchmark == "MUSE":
        for metric, name in MUSE_SETS.items():
            note(name, metric, texts)
    else:
        for short, name in TOFU_SETS.items():
            note(name, f"{short}_Q_A_Prob", {"avg_loss": "nll"})
            note(name, f"{short}_Q_A_ROUGE", texts | rouges)
            for form, ours in FORMS.items():
                note(name, f"{short}_Q_A_{form}_Prob", {"avg_loss": f"{ours}_nll"})
                recall = {"rougeL_recall": f"{ours}_rougeL_recall"}
                note(name, f"{short}_Q_A_{form}_ROUGE", recall)
        note("forget", "forget_Q_A_gibberish", {"score": "not_gibberish"})
    for name, records in found.items():
        for record in records.values():
            record["question"] = question_in(record["question"])
            if name in ("real_authors", "world_facts") and "nll" in record:
                record["paraphrased_nll"] = record["nll"]
    return {name: [rows[row] for row in sorted(rows)] for name, rows in found.items()}


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
        if found := re.fullmatch(around, prompt.rstrip(), re.DOTALL) or re.fullmatch(
            around, prompt, re.DOTALL
        ):
            return found[1].strip()
    return prompt
