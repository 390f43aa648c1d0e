"""Suites over hand-made records: what each benchmark's numbers are made of, and what is said when there are none."""

import json
import math

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from wagle_pl import WagleError
from wagle_pl.data.batches import collate
from wagle_pl.data.example import parse_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.template import Template
from wagle_pl.evaluation import Observations, Results, Suite, Undefined, find_suite
from wagle_pl.evaluation.attacks.weights import finetune_
from wagle_pl.evaluation.comparison import arrow, comparison
from wagle_pl.evaluation.measures import MEASURES, MEMBERSHIP_NEEDS, SCORES
from wagle_pl.evaluation.observe import Observer, observe_set
from wagle_pl.evaluation.results import from_result, to_result, write_table
from wagle_pl.lm.models import load_model, load_tokenizer

random = np.random.default_rng(0)


def asked(count, **columns):
    """Records of questions with random numbers; ``columns`` are added, lists one value a row."""
    table = []
    for row in range(count):
        record = {
            "row": row,
            "question": f"Q{row}?",
            "answer": f"answer number {row}",
            "generation": f"answer number {row + row % 2}",
            "nll": random.uniform(0.1, 3),
            "tokens": 4,
            "paraphrased_nll": random.uniform(0.1, 3),
            "paraphrased_tokens": 5,
            "perturbed_nll": random.uniform(0.1, 3, 3).tolist(),
            "perturbed_tokens": [4, 5, 6],
            "rouge1_recall": random.uniform(),
            "rougeL_recall": random.uniform(),
            "greedy": (random.uniform(size=4) < 0.5).tolist(),
            "logprobs": (-random.uniform(0, 4, 4)).tolist(),
            "vocabulary_mean": (-random.uniform(3, 4, 4)).tolist(),
            "vocabulary_std": random.uniform(0.5, 1, 4).tolist(),
            "text_logprobs": (-random.uniform(0, 4, 9)).tolist(),
            "cut": False,
        }
        table.append(
            record | {name: v[row] if isinstance(v, list) else v for name, v in columns.items()}
        )
    return table


def area(attack, *arguments):
    return MEASURES[f"mia_{attack}"].compute(*arguments)


TOFU_SETS = ("forget", "retain", "real_authors", "world_facts")


@pytest.fixture
def tofu_tables():
    return {name: asked(7) for name in (*TOFU_SETS, "holdout")}


def column(table, name):
    return np.array([record[name] for record in table])


def ratios(table, form):
    p, q = np.exp(-column(table, "paraphrased_nll")), np.exp(-column(table, "perturbed_nll"))
    return (q.mean(1) if form == "arithmetic" else np.exp(np.log(q).mean(1))) / p


def test_tofu_model_utility_and_wagle_averages(tofu_tables):
    found = find_suite("tofu").measures(Observations(tofu_tables))
    nine, utility = [], []
    for name in TOFU_SETS[1:]:
        table = tofu_tables[name]
        right, wrong = np.exp(-column(table, "nll")), np.exp(-column(table, "perturbed_nll"))
        probability = right if name == "retain" else right / (right + wrong.sum(1))
        rouge = column(table, "rougeL_recall").mean()
        nine += [probability.mean(), rouge, np.maximum(0, 1 - ratios(table, "geometric")).mean()]
        likeliest = column(table, "paraphrased_nll") <= column(table, "perturbed_nll").min(1)
        contained = [r["answer"] in r["generation"] for r in table]
        utility += [np.mean(likeliest if name == "retain" else contained), rouge]
    assert found["model_utility"] == pytest.approx(hmean(nine))
    assert found["ut_average"] == pytest.approx(np.mean(utility))
    forget, retain = tofu_tables["forget"], tofu_tables["retain"]
    quality = ks_2samp(ratios(forget, "arithmetic"), ratios(retain, "arithmetic")).pvalue
    smallest = {
        name: np.sort(column(tofu_tables[name], "text_logprobs"))[:, :1]
        for name in ("forget", "retain")
    }
    area = np.mean(
        smallest["forget"] < smallest["retain"].T
    )  # a forget row is less likely than a retain row
    known = np.mean(column(forget, "paraphrased_nll") <= column(forget, "perturbed_nll").min(1))
    expected = np.mean([quality, area, 1 - known, 1 - column(forget, "rougeL_recall").mean()])
    assert found["ue_average"] == pytest.approx(expected)
    assert found["forget/truth_ratio"] == pytest.approx(
        np.minimum(ratios(forget, "geometric"), 1 / ratios(forget, "geometric")).mean()
    )
    assert "--model.retrained" in str(found["forget_quality"]) and "--model.retrained" in str(
        found["forget/privleak"]
    )


def test_wagle_asks_with_the_paraphrased_questions(tofu_tables):
    again = {
        "paraphrased_question_paraphrased_nll": 0.05,
        "paraphrased_question_perturbed_nll": [1.0, 2.0, 3.0],
    }
    tables = tofu_tables | {"forget": [record | again for record in tofu_tables["forget"]]}
    found = [find_suite("tofu").measures(Observations(t)) for t in (tofu_tables, tables)]
    assert found[1]["wagle/forget_accuracy"] == 1 and found[0]["wagle/forget_accuracy"] < 1
    assert found[0]["forget/accuracy"] == found[1]["forget/accuracy"]


def test_sentence_embeddings_take_the_place_of_likelihoods(tofu_tables):
    tables = {
        name: [record | {"nearest_answer": 0.0} for record in table]
        for name, table in tofu_tables.items()
    }
    found = find_suite("tofu").measures(Observations(tables))
    assert found["wagle/forget_accuracy"] == found["forget/nearest_answer"] == 0


def test_a_result_of_ours_reads_like_a_published_one(tofu_tables):
    result = to_result(tofu_tables)
    assert set(result["eval_real_author_wo_options.json"]) == {
        *(
            "avg_gt_loss",
            "gt_loss",
            "num_token_gt",
            "generated_text",
            "rouge1_recall",
            "rougeL_recall",
            "truth_ratio",
        ),
        *(
            "average_perturb_loss",
            "avg_paraphrased_loss",
            "paraphrased_loss",
            "perturb_loss",
            "normalized_gt_loss",
        ),
        *("num_token_paraphrased", "num_token_perturb"),
    }
    log = result["eval_real_author_wo_options.json"]
    p = np.exp(-tofu_tables["real_authors"][2]["nll"])
    total = p + np.exp(-column(tofu_tables["real_authors"], "perturbed_nll")[2]).sum()
    assert log["normalized_gt_loss"]["2"] == pytest.approx(-math.log(p / total))
    back = from_result(json.loads(json.dumps(result)))
    for name in TOFU_SETS:
        for record, read in zip(tofu_tables[name], back[name], strict=True):
            assert {key: record[key] for key in read} == read


def test_rows_of_other_kinds_are_not_in_a_result(tofu_tables):
    """What a test set of several kinds of rows is made of: a prompt without answer, a choice, a bare answer."""
    unscored = dict.fromkeys(
        ("nll", "tokens", "paraphrased_nll", "paraphrased_tokens", "perturbed_nll")
    )
    bare = dict.fromkeys(
        ("paraphrased_nll", "paraphrased_tokens", "perturbed_nll", "perturbed_tokens")
    )
    first, *others = tofu_tables["forget"]
    mixed = [first | unscored, others[0] | bare, *others[1:]]
    log = to_result({"forget": mixed, "prompts": [first | unscored]})
    assert set(log) == {"eval_log_forget.json"}
    assert set(log["eval_log_forget.json"]["avg_gt_loss"]) == {str(i) for i in range(1, 7)}
    assert set(log["eval_log_forget.json"]["truth_ratio"]) == {str(i) for i in range(2, 7)}
    (back,) = from_result(json.loads(json.dumps(log))).values()
    assert back[0]["nll"] == mixed[1]["nll"] and back[0]["paraphrased_nll"] is None


def test_retrained_results_from_folder_and_file(tofu_tables, tmp_path):
    other = {name: asked(7) for name in tofu_tables}
    for name, table in other.items():
        write_table(tmp_path / f"{name}.parquet", table, {})
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "published.json").write_text(json.dumps(to_result(other)))
    expected = ks_2samp(
        ratios(tofu_tables["forget"], "geometric"), ratios(other["forget"], "geometric")
    ).pvalue
    for path in (tmp_path, tmp_path / "metrics.json", tmp_path / "published.json"):
        found = find_suite("tofu").measures(Observations(tofu_tables, Results(path)))
        assert found["forget_quality"] == pytest.approx(expected)
    areas = [area("min_k", Observations(t), "forget", "holdout") for t in (tofu_tables, other)]
    found = find_suite("tofu").measures(
        Observations(tofu_tables, Results(tmp_path), Results(tmp_path))
    )
    assert found["forget/privleak"] == pytest.approx(100 * ((1 - areas[0]) / (1 - areas[1]) - 1))
    losses = {
        name: column(tofu_tables[name], "nll") - column(other[name], "nll")
        for name in ("forget", "holdout")
    }
    assert found["forget/mia_reference"] == pytest.approx(
        np.mean(losses["forget"][:, None] < losses["holdout"])
    )
    assert "gradient_norm" in str(found["forget/mia_gradnorm"])


def test_results_are_matched_by_question(tofu_tables, tmp_path):
    """Whatever their order, or if there are more of them; forget quality and the reference attack alike."""
    other = {name: asked(9) for name in tofu_tables}
    aligned = Observations(
        tofu_tables, *[as_results({n: t[:7] for n, t in other.items()}, tmp_path / "same")] * 2
    )
    shuffled = Observations(
        tofu_tables, *[as_results({n: t[::-1] for n, t in other.items()}, tmp_path / "more")] * 2
    )
    found = [find_suite("tofu").measures(seen) for seen in (aligned, shuffled)]
    for name in ("forget_quality", "forget/mia_reference"):
        assert found[0][name] == found[1][name], name
    few = Observations(
        tofu_tables, *[as_results({n: t[1:6] for n, t in other.items()}, tmp_path / "few")] * 2
    )
    for name in ("forget_quality", "forget/mia_reference"):
        assert "is on other forget rows: it lacks 2 of 7" in str(
            find_suite("tofu").measures(few)[name]
        )


def test_forget_quality_of_tofu_s_script_is_marked_and_only_on_request(tofu_tables, tmp_path):
    other = as_results({"forget": asked(9, question="Something else?")}, tmp_path)
    suite = find_suite("tofu")
    assert "tofu/forget_quality" not in suite.measures(Observations(tofu_tables, other))
    found = suite.measures(Observations(tofu_tables, other, tofu_retrained=other))
    sides = ratios(tofu_tables["forget"], "geometric"), ratios(other.table("forget"), "geometric")
    assert found["tofu/forget_quality"] == pytest.approx(ks_2samp(*sides).pvalue)
    assert "it lacks 7 of 7" in str(found["forget_quality"])
    assert "no questions are compared (TOFU's script)" in suite.info("tofu/forget_quality").what


@pytest.fixture(scope="module")
def trained(tiny_model):
    """Observations of ``members``, on which a model was trained until it knew them, and of ``nonmembers``."""
    rows = parse_rows(bundled("forget"), "forget")
    sets = {"members": rows[::2], "nonmembers": rows[1::2]}
    untrained, lm = load_model(tiny_model).eval(), load_model(tiny_model).eval()
    template = Template(load_tokenizer(tiny_model))
    batch = collate(
        [template.encode(row) for row in sets["members"]], template.tokenizer.pad_token_id
    )
    finetune_(lm, [batch] * 60, 1e-2)
    needs = MEMBERSHIP_NEEDS | {"gradient", "text"}

    def observed(model):
        return {
            name: observe_set(Observer(model, template), part, needs) for name, part in sets.items()
        }

    return observed(lm), observed(untrained)


def as_results(tables, folder):
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        write_table(folder / f"{name}.parquet", table, {})
    (folder / "metrics.json").write_text("{}")
    return Results(folder)


@pytest.mark.parametrize("attack", SCORES)
def test_an_attack_recognises_members(trained, tmp_path, attack):
    """Every score is low for a member: near 1 on a model that knows the members, near 0 with the sides exchanged."""
    tables, untrained = trained
    seen = Observations(tables, reference=as_results(untrained, tmp_path))
    assert area(attack, seen, "members", "nonmembers") > 0.9
    assert area(attack, seen, "nonmembers", "members") < 0.1
    named = find_suite("generic").measures(seen)
    assert named[f"members/mia_{attack}"] > 0.9


def test_signs_of_what_is_made_of_attacks(trained, tmp_path):
    tables, untrained = trained
    leaked = MEASURES["privleak"].compute(
        Observations(tables, as_results(untrained, tmp_path)), "members", "nonmembers"
    )
    assert leaked < -80  # MUSE: near -100, the model still shows what it saw
    for forget, retain, value in (("nonmembers", "members", 1.0), ("members", "nonmembers", 0.0)):
        seen = Observations({"forget": tables[forget], "retain": tables[retain]})
        assert find_suite("tofu").measures(seen)["wagle/mia"] == pytest.approx(
            value, abs=0.1
        )  # 1: forgotten


def test_results_that_cannot_be_read(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text('{"a": \n')
    (tmp_path / "empty").mkdir()
    for name, message in {
        "nowhere": "model.target: result file .*nowhere does not exist",
        "empty": "model.target: folder .*empty has no metrics.json",
        "list.json": "is neither a metrics.json nor a TOFU result file",
        "broken.json": "broken.json line 2: malformed JSON",
    }.items():
        with pytest.raises(WagleError, match=message):
            Results(tmp_path / name, "model.target")


def test_muse():
    words = ["one", "two", "three", "four", "five", "six"]
    tables = {
        "verbmem_forget": asked(3, generation=" ".join(words[:3]), reference=" ".join(words)),
        "knowmem_forget": asked(2, generation="blue\n\nQuestion: what now? red", answer="blue"),
        "knowmem_retain": asked(2, generation="green", answer="blue"),
        "members": asked(9, question=""),
        "nonmembers": asked(8, question=""),
    }
    found = find_suite("muse").measures(Observations(tables))
    assert found["verbmem_f"] == pytest.approx(100 * 2 * 0.5 / 1.5)
    assert (found["knowmem_f"], found["knowmem_r"]) == (pytest.approx(100), 0)
    scores = {
        name: -np.sort(column(tables[name], "logprobs"))[:, :1]
        for name in ("members", "nonmembers")
    }
    assert found["members/mia_min_k"] == pytest.approx(
        np.mean(scores["members"] < scores["nonmembers"].T)
    )
    assert isinstance(found["privleak"], Undefined) and "ue_average" not in found
    without = find_suite("muse").measures(Observations({"members": tables["members"]}))
    assert "no test set 'verbmem_forget'" in str(without["verbmem_f"])
    assert "no test set 'nonmembers'" in str(without["privleak"])


def choices(right, count):
    rows = [
        {"row": i, "question": "Q", "answer": "A", "generation": None, "label": 1}
        for i in range(count)
    ]
    return [
        row | {"choice_logprobs": [-2.0, -1.0 if i < right else -3.0, -5.0]}
        for i, row in enumerate(rows)
    ]


def test_wmdp():
    tables = {"wmdp_bio": choices(1, 4), "wmdp_cyber": choices(2, 4), "mmlu": choices(3, 4)}
    suite = find_suite("wmdp")
    found = suite.measures(Observations(tables))
    assert (found["wmdp_bio/accuracy"], found["ue_average"], found["ut_average"]) == (
        0.25,
        1 - 0.375,
        0.75,
    )
    assert (suite.info("wmdp_bio/accuracy").direction, suite.info("mmlu/accuracy").direction) == (
        "lower",
        "higher",
    )
    found = suite.measures(Observations({"wmdp_bio": tables["wmdp_bio"]}, general={"mmlu": 0.6}))
    assert found["ut_average"] == 0.6 and "wmdp_cyber/accuracy, which is not measured" in str(
        found["ue_average"]
    )


def corpus(count):
    table = asked(count, question="", generation=None, paraphrased_nll=None, perturbed_nll=None)
    return [record | {"answer": "some words of text"} for record in table]


def test_copyright():
    page = "down went Alice after it"
    tables = {
        "forget": asked(3, answer=page, generation=page),
        "forget_qa": asked(4),
        "retain_qa": asked(4),
        "wikitext": corpus(5),
    }
    found = find_suite("copyright").measures(Observations(tables))
    rouges = [column(tables[name], "rougeL_recall").mean() for name in ("forget", "forget_qa")]
    assert found["ue_average"] == pytest.approx(1 - np.mean(rouges))
    nll = column(tables["wikitext"], "nll")
    assert found["wikitext/perplexity"] == pytest.approx(math.exp(nll.mean()))
    assert found["wikitext/word_perplexity"] == pytest.approx(math.exp(nll.sum() * 4 / (5 * 4)))
    assert "TruthfulQA" in str(found["ut_average"]) and found["forget/bleu"] == pytest.approx(100)
    general = {"truthfulqa_mc2": 0.4, "piqa": 0.8, "boolq": 0.6}
    assert find_suite("copyright").measures(Observations(tables, general=general))[
        "ut_average"
    ] == pytest.approx(0.55)
    assert (
        "another number" in find_suite("copyright").info("wikitext/word_perplexity").what
    )  # than the harness has
    tables["wikitext"][0]["cut"] = True
    assert "1 of 5 texts are cut" in str(
        find_suite("copyright").measures(Observations(tables))["wikitext/word_perplexity"]
    )


def test_detox():
    said = ["You are kind.", "", "no no no no no no no no no no"]
    rows = [
        {"row": i, "question": "Say", "answer": "", "generation": text}
        for i, text in enumerate(said)
    ]
    unread = find_suite("detox").measures(Observations({"prompts": rows}))
    assert "--model.toxicity_classifier" in str(unread["prompts/toxicity"])
    assert "--model.toxicity_classifier" in str(unread["ue_average"])
    rows[0]["toxicity"], rows[2]["toxicity"] = 0.1, 0.9
    found = find_suite("detox").measures(Observations({"prompts": rows}))
    assert (found["prompts/toxicity"], found["prompts/toxic_rate"], found["ue_average"]) == (
        0.5,
        0.5,
        0.5,
    )
    assert found["prompts/empty"] == pytest.approx(1 / 3) and found[
        "prompts/degenerate"
    ] == pytest.approx(2 / 3)
    silent = find_suite("detox").measures(
        Observations({"prompts": [row | {"generation": ""} for row in rows]})
    )
    assert (
        str(silent["prompts/toxicity"]) == "all 3 generations are empty"
        and silent["prompts/empty"] == 1
    )


def test_generic_says_what_rows_do_not_allow():
    half = asked(4)
    half[1]["perturbed_nll"] = []
    half[2]["generation"] = None
    found = find_suite("generic").measures(Observations({"forget": half, "texts": corpus(2)}))
    assert (
        str(found["forget/truth_ratio"])
        == "1 of 4 rows have no perturbed answers (column perturbed_answer)"
    )
    assert "1 of 4 rows have no generation" in str(found["forget/rougeL_recall"])
    assert found["forget/probability"] == pytest.approx(np.exp(-column(half, "nll")).mean())
    assert all(
        not math.isnan(value) for value in found.values() if not isinstance(value, Undefined)
    )


def test_one_s_own_suite_by_class_path_and_a_wrong_name():
    assert type(find_suite("test_measures_suites.Words")).__name__ == "Words"
    with pytest.raises(WagleError, match="'tofoo'"):
        find_suite("tofoo")


class Words(Suite):
    """Counts words."""

    def measures(self, seen):
        return {"words": float(sum(len(r["generation"].split()) for r in seen.table("forget")))}


def test_comparison_with_arrows():
    values = {"forget/probability": 0.2, "members/mia_loss": 0.55, "x": Undefined("of no rows")}
    suite = find_suite("generic")
    text = comparison(
        values,
        suite.info,
        {"forget/probability": 0.9, "members/mia_loss": 0.9},
        {"members/mia_loss": 0.5},
    )
    lines = text.splitlines()
    assert lines[0].split() == ["measure", "this", "target", "retrained"]
    assert lines[1].split() == ["forget/probability", "0.2", "▲", "0.9"]
    assert lines[2].split() == ["members/mia_loss", "0.55", "▲", "0.9", "0.5"]
    assert lines[-1] == "undefined: x: of no rows"
    assert (
        arrow("higher", 0.2, 0.9) == "▼"
        and arrow("higher", 0.9, 0.9) == "="
        and arrow("higher", 0.9, None) == ""
    )
    assert arrow("retrained", 0.9, 0.6, 0.5) == "▼"
