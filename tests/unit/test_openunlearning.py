"""OpenUnlearning's result files: its formulas written out, a round trip, and what reads them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TOFU_LOGS
from pages import numbers
from scipy.stats import hmean, ks_2samp

from wagle_pl.data.example import Example
from wagle_pl.evaluation import MEASURES, Observations, Results
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.observe import recalls
from wagle_pl.evaluation.openunlearning import (
    METRICS,
    benchmark_of,
    question_in,
    summary,
    to_metrics,
    to_tables,
)
from wagle_pl.evaluation.openunlearning import (
    to_logs as logs_of,
)
from wagle_pl.evaluation.records import defined_only, intervals
from wagle_pl.evaluation.results import write_json
from wagle_pl.evaluation.suites import TOFUSuite, more_of_openunlearning
from wagle_pl.evaluation.tofu_result import from_result
from wagle_pl.lab.benchmarks.suites import MUSESuite

PROMPT = "system\n\nCutting Knowledge Date: December 2023\n\nYou are a helpful assistant.user\n\n{}assistant\n\n"


def tofu_tables(shift: float = 0.0) -> dict[str, list[dict[str, Any]]]:
    """Records of two rows per set."""
    tables = {}
    for place, name in enumerate(("forget", "retain", "real_authors", "world_facts")):
        tables[name] = [
            {
                "row": row,
                "question": f"Who wrote {name} {row} ?",
                "answer": "Ada wrote it in Rome.",
                "generation": "Ada wrote it.",
                "nll": 0.3 + 0.2 * row + 0.1 * place + shift,
                "tokens": 5,
                "paraphrased_nll": 0.9 + 0.3 * row + 0.1 * place - shift,
                "perturbed_nll": [1.0 + row, 1.6, 2.0 + 0.1 * place],
                "rouge1_recall": 0.6,
                "rougeL_recall": 0.6 - 0.1 * row,
                "greedy": [True, False, True, True],
            }
            for row in range(2)
        ]
    for name in ("real_authors", "world_facts"):
        for record in tables[name]:
            record["paraphrased_nll"] = record["nll"]
    return tables


def to_logs(
    benchmark: str, tables: Any, values: dict[str, float], scores: Any = None
) -> dict[str, Any]:
    """The file that a test with ``format: openunlearning`` writes of these records."""
    seen = Observations(tables, truth_ratio_form="openunlearning")
    suite = TOFUSuite() if benchmark == "TOFU" else MUSESuite()
    more = more_of_openunlearning(suite, seen)
    return logs_of(
        benchmark, tables, defined_only(suite.measures(seen) | more) | values, scores or {}
    )


def test_their_formulas() -> None:
    """src/evals/metrics/memorization.py and privacy.py, in numpy."""
    tables = tofu_tables()
    logs = to_logs("TOFU", tables, {"forget/mia_min_k": 0.75}, {"min_k": ([1.0, 2.0], [1.5, 3.0])})
    parts = []
    for short, name in zip(("forget", "retain", "ra", "wf"), tables, strict=True):
        own = np.exp(-np.array([r["nll"] for r in tables[name]]))
        wrong = np.array([r["perturbed_nll"] for r in tables[name]])
        right = np.exp(-np.array([r["paraphrased_nll"] for r in tables[name]]))
        ratio = np.exp(-wrong.mean(1)) / (right + 1e-10)
        score = (
            np.minimum(ratio, 1 / (ratio + 1e-10)) if name == "forget" else np.maximum(0, 1 - ratio)
        )
        ratio_key = "forget_truth_ratio" if short == "forget" else f"{short}_Truth_Ratio"
        options = own / (own + np.exp(-wrong).sum(1) + 1e-10)
        assert logs[f"{short}_Q_A_Prob"]["agg_value"] == pytest.approx(own.mean())
        assert logs[ratio_key]["agg_value"] == pytest.approx(score.mean())
        assert logs[f"{short}_Q_A_PERT_Prob"]["agg_value"] == pytest.approx(
            np.exp(-wrong).mean(1).mean()
        )
        if short in ("ra", "wf"):
            assert logs[f"{short}_Q_A_Prob_normalised"]["agg_value"] == pytest.approx(
                options.mean()
            )
        if short != "forget":
            parts += [(own if short == "retain" else options).mean(), 0.55, score.mean()]
    assert logs["model_utility"]["agg_value"] == pytest.approx(hmean(parts))
    assert logs["extraction_strength"]["agg_value"] == 0.5
    assert logs["exact_memorization"]["agg_value"] == 0.75
    assert logs["mia_min_k"]["auc"] == logs["mia_min_k"]["agg_value"] == 0.75
    assert logs["mia_min_k"]["holdout"]["value_by_index"]["1"] == {"score": 3.0}
    assert set(logs) <= set(METRICS["TOFU"])


def test_round_trip_and_equality(tmp_path: Path) -> None:
    """Their file, read, has our measures' values; written again it is the same file."""
    tables = tofu_tables()
    logs = to_logs("TOFU", tables, {"forget_quality": 0.25, "forget/privleak": -50.0})
    write_json(tmp_path / "evals/TOFU_EVAL.json", logs)
    results = Results.read(tmp_path / "evals")
    ours = defined_only(TOFUSuite().measures(Observations(tables)))
    shared = results.metrics.keys() & ours.keys()
    assert len(shared) >= 15
    assert {name: results.metrics[name] for name in shared} == pytest.approx(
        {name: ours[name] for name in shared}, abs=1e-8
    )
    again = to_logs("TOFU", results.tables, results.metrics)
    for name in ("exact_memorization", "extraction_strength"):  # of tokens, which it does not hold
        del logs[name]["value_by_index"]
    assert again == logs
    write_json(tmp_path / "TOFU_SUMMARY.json", summary(logs))
    assert Results.read(tmp_path).metrics == results.metrics and Results.read(tmp_path).tables == {}


#: The keys of a TOFU_EVAL.json with all metrics: the package names in configs/eval/tofu_metrics.
THEIR_KEYS = """
exact_memorization extraction_strength forget_Q_A_PARA_Prob forget_Q_A_PARA_ROUGE forget_Q_A_PERT_Prob
forget_Q_A_PERT_ROUGE forget_Q_A_Prob forget_Q_A_ROUGE forget_Q_A_gibberish forget_quality forget_truth_ratio
mia_gradnorm mia_loss mia_min_k mia_min_k_plus_plus mia_reference mia_zlib model_utility privleak ra_Q_A_PERT_Prob
ra_Q_A_Prob ra_Q_A_Prob_normalised ra_Q_A_ROUGE ra_Truth_Ratio retain_Q_A_PARA_Prob retain_Q_A_PERT_Prob
retain_Q_A_Prob retain_Q_A_ROUGE retain_Truth_Ratio wf_Q_A_PERT_Prob wf_Q_A_Prob wf_Q_A_Prob_normalised wf_Q_A_ROUGE
wf_Truth_Ratio
"""


def their_file() -> dict[str, Any]:
    """A TOFU_EVAL.json as their evaluator writes it for a test by their default configuration."""

    def log(rows: Any, aggregate: float) -> dict[str, Any]:
        return {"agg_value": aggregate, "value_by_index": dict(zip("01", rows, strict=True))}

    right, wrong = [{"prob": 0.5, "avg_loss": 0.7}, {"prob": 0.25, "avg_loss": 1.4}], [1.0, 2.0]
    others = [{"prob": [0.37, 0.14], "avg_loss": wrong}, {"prob": [0.37, 0.14], "avg_loss": wrong}]
    ratios = [{"score": math.exp(-1.5) / (math.exp(-x) + 1e-10)} for x in (0.7, 1.4)]
    texts = {"input": "user\n\nWho?assistant\n\n", "ground_truth": "Ada.", "generation": "Ada."}
    rouges = {"rouge1_recall": 1.0, "rougeL_f1": 1.0, "rougeL_recall": 1.0}
    return {
        "extraction_strength": log([{"score": 0.5}, {"score": 0.1}], 0.3),
        "forget_Q_A_PARA_Prob": log(right, 0.375),
        "forget_Q_A_PERT_Prob": log(others, 0.255),
        "forget_Q_A_Prob": log(right, 0.375),
        "forget_Q_A_ROUGE": log([rouges | texts, rouges | texts], 1.0),
        "forget_quality": {"agg_value": 0.9},
        "forget_truth_ratio": log(ratios, 0.5),
        "model_utility": {"agg_value": 0.6},
    }


def test_a_file_of_theirs(tmp_path: Path) -> None:
    """Every number of a file that their code wrote has its place among our measures."""
    write_json(tmp_path / "TOFU_EVAL.json", their_file())
    assert Results.read(tmp_path).metrics == {
        "forget/extraction_strength": 0.3,
        "forget/paraphrased_probability": 0.375,
        "forget/perturbed_probability": 0.255,
        "forget/probability": 0.375,
        "forget/rougeL_recall": 1.0,
        "forget_quality": 0.9,
        "forget/truth_ratio": 0.5,
        "model_utility": 0.6,
    }
    logs = to_logs("TOFU", tofu_tables(), {})
    assert logs.keys() >= their_file().keys() - {"forget_quality"}
    assert set(THEIR_KEYS.split()) <= METRICS["TOFU"].keys()


def test_a_retrained_model_in_their_file(tmp_path: Path) -> None:
    """Forget quality against it is the test of their two lists of truth ratios, whatever the prompts look like."""
    tables, logs = tofu_tables(), to_logs("TOFU", tofu_tables(0.4), {})
    for row in logs["forget_Q_A_ROUGE"]["value_by_index"].values():
        row["input"] = PROMPT.format(row["input"].replace(" ?", "?"))  # as their decoding cleans up
    write_json(tmp_path / "TOFU_EVAL.json", logs)
    seen = Observations(tables, retrained=Results.read(tmp_path / "TOFU_EVAL.json"))
    scores = [
        [row["score"] for row in side["forget_truth_ratio"]["value_by_index"].values()]
        for side in (to_logs("TOFU", tables, {}), logs)
    ]
    found = TOFUSuite().measures(seen)
    assert found["forget_quality"] == pytest.approx(ks_2samp(*scores).pvalue)
    for name in ("forget_Q_A_ROUGE",):  # without texts rows are taken in their order
        del logs[name]
    write_json(tmp_path / "TOFU_EVAL.json", logs)
    seen.retrained = Results.read(tmp_path / "TOFU_EVAL.json")
    assert TOFUSuite().measures(seen)["forget_quality"] == found["forget_quality"]


def test_a_collapsed_model_in_their_form() -> None:
    """From 20 nats a token on, the 1e-10 in their denominators decides forget quality and scores."""
    draw = np.random.default_rng(0)

    def collapsed(nats: float) -> list[dict[str, Any]]:
        right, wrong = draw.normal(nats, 2, 40), draw.normal(nats, 2, (40, 5))
        losses = zip(right.tolist(), wrong.tolist(), strict=True)
        return [{"paraphrased_nll": x, "perturbed_nll": xs, "nll": x} for x, xs in losses]

    tables = [collapsed(30.0), collapsed(2.0)]
    ratios = []
    for table in tables:
        right = np.exp(-np.array([row["paraphrased_nll"] for row in table]))
        wrong = np.exp(-np.array([row["perturbed_nll"] for row in table]).mean(1))
        ratios.append(wrong / (right + 1e-10))
    retrained = Results.__new__(Results)
    retrained.tables, retrained.path = {"forget": tables[1]}, Path("theirs")
    for row, table in enumerate(tables):
        for number, record in enumerate(table):
            record |= {"row": number, "question": "", "answer": "", "set": row}
    found = {
        form: TOFUSuite().measures(
            Observations({"forget": tables[0]}, retrained=retrained, truth_ratio_form=form)
        )
        for form in ("openunlearning", "geometric")
    }
    theirs, ours = found["openunlearning"], found["geometric"]
    assert theirs["forget_quality"] == pytest.approx(ks_2samp(*ratios).pvalue)
    assert theirs["forget_quality"] < 1e-15 < 1e-3 < ours["forget_quality"]
    rows = Observations({"forget": tables[0]}, truth_ratio_form="openunlearning")
    score = MEASURES["truth_ratio"].compute(rows.records("forget", forget=True))
    assert score == pytest.approx(np.minimum(ratios[0], 1 / (ratios[0] + 1e-10)).mean())
    assert score < 1e-2
    right = np.exp(-np.array([row["paraphrased_nll"] for row in tables[0]]))
    wrong = np.exp(-np.array([row["perturbed_nll"] for row in tables[0]]).mean(1))
    share = MEASURES["truth_probability"].compute(rows.records("forget", forget=True))
    assert share == pytest.approx((right / (right + wrong + 1e-10)).mean())


@pytest.mark.skipif(not TOFU_LOGS.is_dir(), reason="published result files are not here")
def test_the_published_numbers_survive_their_form(published: dict[str, Any]) -> None:
    tables = from_result(published["full"])
    logs = json.loads(json.dumps(to_logs("TOFU", tables, {})))
    # TOFU's script ran the real authors' answers twice, in bf16; these files have one of the two numbers
    assert logs["model_utility"]["agg_value"] == pytest.approx(0.6226773637427151, abs=1e-4)
    again = TOFUSuite().measures(Observations(to_tables("TOFU", logs)))
    assert again["model_utility"] == pytest.approx(logs["model_utility"]["agg_value"], abs=1e-4)
    assert {r["question"] for r in to_tables("TOFU", logs)["forget"]} == {
        r["question"] for r in tables["forget"]
    }


def test_muse(tmp_path: Path) -> None:
    row = {"row": 0, "question": "Q?", "answer": "the cat sat", "greedy": [True, True]}
    row |= {"generation": "the cats sat down", "reference": "the cat sat"}
    tables = {"knowmem_forget": [row], "knowmem_retain": [row], "verbmem_forget": [row]}
    logs = to_logs("MUSE", tables, {"privleak": -99.8})
    for name in ("forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "retain_knowmem_ROUGE"):
        # stemmed, while MUSE's own measure is not: 3 of 3 and of 4 words
        assert logs[name]["agg_value"] == pytest.approx(6 / 7)
    assert MUSESuite().measures(Observations(tables))["knowmem_f"] == pytest.approx(400 / 7)
    write_json(tmp_path / "MUSE_EVAL.json", logs)
    found = Results.read(tmp_path)
    assert (
        found.metrics["knowmem_f"] == pytest.approx(600 / 7) and found.metrics["privleak"] == -99.8
    )
    assert found.metrics["verbmem_forget/extraction_strength"] == 1
    assert found.tables["knowmem_retain"][0]["answer"] == "the cat sat"
    assert to_metrics("MUSE", summary(logs)) == found.metrics


@pytest.mark.parametrize(
    ("content", "benchmark"),
    [
        ({"forget_Q_A_Prob": 0.5, "model_utility": 0.6}, "TOFU"),
        ({"forget_knowmem_ROUGE": 0.5}, "MUSE"),
        ({"forget_quality": {"agg_value": 0.5}}, "TOFU"),
        ({"forget_quality": 0.5, "forget/probability": 0.5}, None),
        ({"knowmem_f": 50.0, "privleak": 1.0}, None),
        ({"eval_log.json": {"avg_gt_loss": {"0": 1.0}}}, None),
        ([1.0], None),
    ],
)
def test_which_file_it_is(content: Any, benchmark: str | None) -> None:
    assert benchmark_of(content) == benchmark


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT.format("Who?"),
        "system\nYou are a helpful assistant.\nuser\nWho?\nassistant\n",
        "user\nWho?\nmodel\n",
        "You are a helpful assistant.\nWho?\n",
        "[INST] Who? [/INST]",
        "Question: Where?\nAnswer: There.\n\nQuestion: Who?\nAnswer: ",
        "Who?",
    ],
)
def test_the_question_in_a_decoded_prompt(prompt: str) -> None:
    assert question_in(prompt) == "Who?"


def test_a_report_reads_them(tmp_path: Path, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logs = to_logs("TOFU", tofu_tables(), {})
    for name in ("mine/evals", "other/evals"):
        (tmp_path / name).mkdir(parents=True)
        write_json(tmp_path / name / "TOFU_EVAL.json", logs)
    root, _ = report(
        tmp_path / "mine/evals", retrained=str(tmp_path / "other/evals/TOFU_EVAL.json")
    )
    found = numbers(root)
    for name in ("mine", "retrained"):
        assert found[name, "forget/probability"] == pytest.approx(
            (math.exp(-0.3) + math.exp(-0.5)) / 2
        )


# -- their measures that ours lack otherwise ----------------------------------------------------------------------


def text_rows(seed: int, count: int = 6) -> list[dict[str, Any]]:
    """Records of texts with 20 log-probabilities each."""
    draw = np.random.default_rng(seed)
    made = [(draw.normal(-2, 1, 20), draw.uniform(2, 4)) for _ in range(count)]
    return [
        {
            "row": row,
            "question": "",
            "answer": f"text {seed} {row}",
            "generation": None,
            "nll": -float(logprobs.mean()),
            "lower_nll": float(lower),
            "logprobs": logprobs.tolist(),
        }
        for row, (logprobs, lower) in enumerate(made)
    ]


def auc(members: list[float], nonmembers: list[float]) -> float:
    pairs = [(a, b) for a in members for b in nonmembers]
    return sum((a < b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


def test_more_membership() -> None:
    """Min-K shares and PPL/lower as in MUSE's get_ppl_utils.py; rel_diff as in OpenUnlearning's privacy.py."""
    tables = {"members": text_rows(0), "nonmembers": text_rows(1)}
    seen = Observations(tables)
    found = more_of_openunlearning(MUSESuite(), seen)
    for percent in (5, 10, 20, 30, 50, 60):
        sides = [
            [-np.mean(np.sort(r["logprobs"])[: int(20 * percent / 100)]) for r in tables[name]]
            for name in ("members", "nonmembers")
        ]
        assert found[f"members/mia_min_k_{percent}"] == pytest.approx(auc(*sides))
    sides = [[r["nll"] / r["lower_nll"] for r in tables[name]] for name in tables]
    assert found["members/mia_lower"] == pytest.approx(auc(*sides))
    assert isinstance(found["members/rel_diff"], Undefined)
    here = MEASURES["mia_min_k"].compute(seen, "members", "nonmembers")
    seen.retrained = Results.__new__(Results)
    seen.retrained.metrics = {"members/mia_min_k": 0.4}
    again = more_of_openunlearning(MUSESuite(), seen)
    assert again["members/rel_diff"] == pytest.approx((here - 0.4) / 0.4 * 100)


@pytest.mark.parametrize(("corpus", "area"), [("news", 0.4772), ("books", 0.5393)])
def test_privleak_by_the_constants_of_muse(corpus: str, area: float) -> None:
    seen = Observations({"members": text_rows(0), "nonmembers": text_rows(1)}, corpus=corpus)
    theirs = 1 - MEASURES["mia_min_k"].compute(seen, "members", "nonmembers")
    assert MUSESuite().measures(seen)["privleak"] == pytest.approx((theirs - area) / area * 100)


def test_answers_in_other_words() -> None:
    tables = tofu_tables()
    rows = [Example("answered", r["question"], r["answer"]) for r in tables["forget"]]
    rows = [
        replace(
            row, paraphrased_answer="Ada has written it.", perturbed_answers=["Bo did it.", "No"]
        )
        for row in rows
    ]
    for record, row in zip(tables["forget"], rows, strict=True):
        record |= recalls(record["generation"], row)
    found = more_of_openunlearning(TOFUSuite(), Observations(tables))
    wrong = np.array([r["perturbed_nll"] for r in tables["forget"]])
    right = np.array([r["paraphrased_nll"] for r in tables["forget"]])
    assert found["forget/paraphrased_probability"] == pytest.approx(np.exp(-right).mean())
    assert found["forget/perturbed_probability"] == pytest.approx(np.exp(-wrong).mean())
    assert found["forget/paraphrased_rougeL_recall"] == pytest.approx(
        2 / 4
    )  # "wrote" is not "written"
    assert found["forget/perturbed_rougeL_recall"] == pytest.approx((1 / 3 + 0) / 2)
    assert "world_facts/paraphrased_probability" not in found
    logs = to_logs("TOFU", tables, {})
    for theirs in ("PARA_Prob", "PERT_Prob", "PARA_ROUGE", "PERT_ROUGE"):
        name = f"forget_Q_A_{theirs}"
        assert logs[name]["agg_value"] == pytest.approx(found[METRICS["TOFU"][name].ours])


def test_bootstrap_intervals() -> None:
    """Of a mean of many rows: ±1.96 standard errors."""
    nlls = np.random.default_rng(0).uniform(0.5, 2, 400)
    rows = [{"row": i, "nll": float(nll)} for i, nll in enumerate(nlls)]

    def measures(tables: Any) -> dict[str, float]:
        values = [math.exp(-row["nll"]) for row in tables["forget"]]
        return {"mean": sum(values) / len(values)}

    low, high = intervals(measures, {"forget": rows}, 1000)["mean"]
    values = np.exp(-nlls)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx(
        (values.mean() - error, values.mean() + error), abs=error / 6
    )
