"""Suites over hand-made records: what each benchmark's numbers are made of, and what is said when there are none."""

import json
import math
import zlib
from itertools import product

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from wagle_pl import WagleError
from wagle_pl.data.batches import collate
from wagle_pl.data.example import parse_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.template import Template
from wagle_pl.evaluation import (
    Observations,
    Observer,
    Results,
    Suite,
    Undefined,
    find_suite,
    observe_set,
    tofu_forget_quality,
)
from wagle_pl.evaluation.attacks.weights import finetune_
from wagle_pl.evaluation.membership import MEMBERSHIP_NEEDS, SCORES
from wagle_pl.evaluation.records import MEASURES
from wagle_pl.evaluation.results import arrow, comparison, write_table
from wagle_pl.evaluation.tofu_result import RESULT_KEYS, from_result, to_result
from wagle_pl.lm.models import load_model, load_tokenizer

pytestmark = pytest.mark.xdist_group("suites")  # which share a model that is trained
random = np.random.default_rng(0)


def asked(count, **columns):
    """Records of questions with random numbers; ``columns`` are added, lists one value per row."""
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
        added = {name: v[row] if isinstance(v, list) else v for name, v in columns.items()}
        table.append(record | added)
    return table


def corpus(count):
    table = asked(count, question="", generation=None, paraphrased_nll=None, perturbed_nll=None)
    return [record | {"answer": "some words of text"} for record in table]


def measures(suite, tables, *others, **options):
    return find_suite(suite).measures(Observations(tables, *others, **options))


def area(attack, *arguments):
    return MEASURES[f"mia_{attack}"].compute(*arguments)


def as_results(tables, folder):
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        write_table(folder / f"{name}.parquet", table, {})
    (folder / "metrics.json").write_text("{}")
    return Results.read(folder)


def column(table, name):
    return np.array([record[name] for record in table])


def smallest(table, name):
    """The smallest number of each row, (N, 1)."""
    return np.sort(column(table, name))[:, :1]


def ratios(table, form="geometric"):
    p, q = np.exp(-column(table, "paraphrased_nll")), np.exp(-column(table, "perturbed_nll"))
    return (q.mean(1) if form == "arithmetic" else np.exp(np.log(q).mean(1))) / p


# -- TOFU -------------------------------------------------------------------------------------------------------------

TOFU_SETS = ("forget", "retain", "real_authors", "world_facts")


@pytest.fixture
def tofu_tables():
    return {name: asked(7) for name in (*TOFU_SETS, "holdout")}


def test_tofu_model_utility_and_wagle_averages(tofu_tables):
    found = measures("tofu", tofu_tables)
    nine, utility = [], []
    for name in TOFU_SETS[1:]:
        table = tofu_tables[name]
        right, wrong = np.exp(-column(table, "nll")), np.exp(-column(table, "perturbed_nll"))
        probability = right if name == "retain" else right / (right + wrong.sum(1))
        rouge = column(table, "rougeL_recall").mean()
        nine += [probability.mean(), rouge, np.maximum(0, 1 - ratios(table)).mean()]
        likeliest = column(table, "paraphrased_nll") <= column(table, "perturbed_nll").min(1)
        contained = [r["answer"] in r["generation"] for r in table]
        utility += [np.mean(likeliest if name == "retain" else contained), rouge]
    assert found["model_utility"] == pytest.approx(hmean(nine))
    assert found["ut_average"] == pytest.approx(np.mean(utility))
    forget, retain = tofu_tables["forget"], tofu_tables["retain"]
    quality = ks_2samp(ratios(forget, "arithmetic"), ratios(retain, "arithmetic")).pvalue
    # a forget row is less likely than a retain row
    attack = np.mean(smallest(forget, "text_logprobs") < smallest(retain, "text_logprobs").T)
    known = np.mean(column(forget, "paraphrased_nll") <= column(forget, "perturbed_nll").min(1))
    expected = np.mean([quality, attack, 1 - known, 1 - column(forget, "rougeL_recall").mean()])
    assert found["ue_average"] == pytest.approx(expected)
    score = np.minimum(ratios(forget), 1 / ratios(forget)).mean()
    assert found["forget/truth_ratio"] == pytest.approx(score)
    for name in ("forget_quality", "forget/privleak"):
        assert "--model.retrained" in str(found[name])


def test_wagle_asks_with_the_paraphrased_questions_and_by_embeddings(tofu_tables):
    prefix = "paraphrased_question_"
    again = {f"{prefix}paraphrased_nll": 0.05, f"{prefix}perturbed_nll": [1.0, 2.0, 3.0]}
    tables = tofu_tables | {"forget": [record | again for record in tofu_tables["forget"]]}
    plain, found = measures("tofu", tofu_tables), measures("tofu", tables)
    assert found["wagle/forget_accuracy"] == 1 and plain["wagle/forget_accuracy"] < 1
    assert plain["forget/accuracy"] == found["forget/accuracy"]
    embedded = {
        name: [r | {"nearest_answer": 0.0} for r in table] for name, table in tofu_tables.items()
    }
    found = measures("tofu", embedded)
    assert found["wagle/forget_accuracy"] == found["forget/nearest_answer"] == 0


def test_a_result_of_ours_reads_like_a_published_one(tofu_tables):
    result = to_result(tofu_tables | {"holdout": tofu_tables["forget"]})
    assert set(result) == set(RESULT_KEYS.values())  # TOFU's script knows no others
    log = result["eval_real_author_wo_options.json"]
    assert set(log) == {
        *("avg_gt_loss", "gt_loss", "num_token_gt", "generated_text", "rouge1_recall"),
        *("rougeL_recall", "truth_ratio", "average_perturb_loss", "avg_paraphrased_loss"),
        *("paraphrased_loss", "perturb_loss", "normalized_gt_loss", "num_token_paraphrased"),
        "num_token_perturb",
    }
    p = np.exp(-tofu_tables["real_authors"][2]["nll"])
    total = p + np.exp(-column(tofu_tables["real_authors"], "perturbed_nll")[2]).sum()
    assert log["normalized_gt_loss"]["2"] == pytest.approx(-math.log(p / total))
    back = from_result(json.loads(json.dumps(result)))
    for name in TOFU_SETS:
        for record, read in zip(tofu_tables[name], back[name], strict=True):
            assert {key: record[key] for key in read} == read


def test_rows_of_other_kinds_are_not_in_a_result(tofu_tables):
    """What a test set of several kinds of rows is made of: a prompt without answer, a choice, a bare answer."""
    alternatives = ("paraphrased_nll", "paraphrased_tokens", "perturbed_nll", "perturbed_tokens")
    unscored = dict.fromkeys(("nll", "tokens", *alternatives))
    first, second, *others = tofu_tables["forget"]
    mixed = [first | unscored, second | dict.fromkeys(alternatives), *others]
    result = to_result({"forget": mixed, "prompts": [first | unscored]})
    (log,) = result.values()
    assert set(log["avg_gt_loss"]) == {str(i) for i in range(1, 7)}
    assert set(log["truth_ratio"]) == {str(i) for i in range(2, 7)}
    back = from_result(json.loads(json.dumps(result)))["forget"]
    assert back[0]["nll"] == second["nll"] and back[0]["paraphrased_nll"] is None


def test_retrained_results_from_folder_and_file(tofu_tables, tmp_path):
    other = {name: asked(7) for name in tofu_tables}
    retrained = as_results(other, tmp_path)
    (tmp_path / "published.json").write_text(json.dumps(to_result(other)))
    expected = ks_2samp(ratios(tofu_tables["forget"]), ratios(other["forget"])).pvalue
    for path in (tmp_path, tmp_path / "metrics.json", tmp_path / "published.json"):
        found = measures("tofu", tofu_tables, Results.read(path))
        assert found["forget_quality"] == pytest.approx(expected)
    here, there = (
        area("min_k", Observations(t), "forget", "holdout") for t in (tofu_tables, other)
    )
    found = measures("tofu", tofu_tables, retrained, retrained)
    assert found["forget/privleak"] == pytest.approx(100 * ((1 - here) / (1 - there) - 1))
    forget, holdout = (
        column(tofu_tables[name], "nll") - column(other[name], "nll")
        for name in ("forget", "holdout")
    )
    assert found["forget/mia_reference"] == pytest.approx(np.mean(forget[:, None] < holdout))
    assert "gradient_norm" in str(found["forget/mia_gradnorm"])


def test_results_are_matched_by_question(tofu_tables, tmp_path):
    """Whatever their order, or if there are more of them; forget quality and the reference attack alike."""
    other = {name: asked(9) for name in tofu_tables}

    def beside(part):
        results = as_results({name: table[part] for name, table in other.items()}, tmp_path)
        return measures("tofu", tofu_tables, results, results)

    aligned, shuffled, few = (beside(slice(*part)) for part in ((7,), (None, None, -1), (1, 6)))
    for name in ("forget_quality", "forget/mia_reference"):
        assert aligned[name] == shuffled[name], name
        assert "is on other forget rows: it lacks 2 of 7" in str(few[name])


def test_forget_quality_of_tofu_s_script_is_marked_and_only_on_request(tofu_tables, tmp_path):
    other = as_results({"forget": asked(9, question="Something else?")}, tmp_path)
    assert "tofu/forget_quality" not in measures("tofu", tofu_tables, other)
    found = measures("tofu", tofu_tables, other, tofu_retrained=other)
    expected = ks_2samp(ratios(tofu_tables["forget"]), ratios(other.table("forget"))).pvalue
    assert found["tofu/forget_quality"] == pytest.approx(expected)
    assert "it lacks 7 of 7" in str(found["forget_quality"])
    what = find_suite("tofu").info("tofu/forget_quality").what
    assert "no questions are compared (TOFU's script)" in what


def test_forget_quality_needs_questions(tofu_tables):
    """If rows are compared at all."""
    ours = to_result(tofu_tables)
    log = ours["eval_log_forget.json"].items()
    unnamed = {"eval_log_forget.json": {name: c for name, c in log if name != "generated_text"}}
    for other, message in (
        (unnamed, "a result does not hold its questions"),
        ({}, "perturbed answers on both models' forget sets: the test set has no rows"),
    ):
        with pytest.raises(WagleError, match=message):
            tofu_forget_quality(ours, other)
    assert tofu_forget_quality(ours, unnamed, compare_rows=False) == 1


def test_results_that_cannot_be_read(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text('{"a": \n')
    (tmp_path / "empty").mkdir()
    for name, message in {
        "nowhere": "model.target: result file .*nowhere does not exist",
        "empty": "model.target: folder .*empty has no metrics.json",
        "list.json": "is neither a metrics.json nor a result file",
        "broken.json": "broken.json line 2: malformed JSON",
    }.items():
        with pytest.raises(WagleError, match=message):
            Results.read(tmp_path / name, "model.target")


# -- membership inference ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_model):
    """Observations of ``members``, on which a model was trained until it knew them, and of ``nonmembers``."""
    rows = parse_rows(bundled("forget"), "forget")
    sets = {"members": rows[::2], "nonmembers": rows[1::2]}
    untrained, lm = load_model(tiny_model).eval(), load_model(tiny_model).eval()
    template = Template(load_tokenizer(tiny_model))
    encoded = [template.encode(row) for row in sets["members"]]
    finetune_(lm, [collate(encoded, template.tokenizer.pad_token_id)] * 60, 1e-2)
    needs = MEMBERSHIP_NEEDS | {"gradient", "text"}
    return [
        {name: observe_set(Observer(model, template), part, needs) for name, part in sets.items()}
        for model in (lm, untrained)
    ]


@pytest.mark.parametrize("attack", SCORES)
def test_an_attack_recognises_members(trained, tmp_path, attack):
    """Every score is low for a member: near 1 on a model that knows the members, near 0 with the sides exchanged."""
    tables, untrained = trained
    seen = Observations(tables, reference=as_results(untrained, tmp_path))
    assert area(attack, seen, "members", "nonmembers") > 0.9
    assert area(attack, seen, "nonmembers", "members") < 0.1
    assert find_suite("generic").measures(seen)[f"members/mia_{attack}"] > 0.9


def test_signs_of_what_is_made_of_attacks(trained, tmp_path):
    tables, untrained = trained
    seen = Observations(tables, as_results(untrained, tmp_path))
    # MUSE: near -100, the model still shows what it saw
    assert MEASURES["privleak"].compute(seen, "members", "nonmembers") < -80
    for forget, retain, value in (("nonmembers", "members", 1.0), ("members", "nonmembers", 0.0)):
        found = measures("tofu", {"forget": tables[forget], "retain": tables[retain]})
        assert found["wagle/mia"] == pytest.approx(value, abs=0.1)  # 1: forgotten


# -- other benchmarks -------------------------------------------------------------------------------------------------


def test_muse():
    words = ["one", "two", "three", "four", "five", "six"]
    tables = {
        "verbmem_forget": asked(3, generation=" ".join(words[:3]), reference=" ".join(words)),
        "knowmem_forget": asked(2, generation="blue", answer="blue"),
        "knowmem_retain": asked(2, generation="green", answer="blue"),
        "members": asked(9, question=""),
        "nonmembers": asked(8, question=""),
    }
    found = measures("muse", tables)
    assert found["verbmem_f"] == pytest.approx(100 * 2 * 0.5 / 1.5)
    assert (found["knowmem_f"], found["knowmem_r"]) == (pytest.approx(100), 0)
    members, others = (-smallest(tables[name], "logprobs") for name in ("members", "nonmembers"))
    assert found["members/mia_min_k"] == pytest.approx(np.mean(members < others.T))
    assert isinstance(found["privleak"], Undefined) and "ue_average" not in found
    without = measures("muse", {"members": tables["members"]})
    assert "no test set 'verbmem_forget'" in str(without["verbmem_f"])
    assert "no test set 'nonmembers'" in str(without["privleak"])


def choices(right, count):
    row = {"question": "Q", "answer": "A", "generation": None, "label": 1}
    logprobs = [[-2.0, -1.0 if i < right else -3.0, -5.0] for i in range(count)]
    return [row | {"row": i, "choice_logprobs": each} for i, each in enumerate(logprobs)]


def test_wmdp():
    tables = {"wmdp_bio": choices(1, 4), "wmdp_cyber": choices(2, 4), "mmlu": choices(3, 4)}
    found = measures("wmdp", tables)
    values = (found["wmdp_bio/accuracy"], found["ue_average"], found["ut_average"])
    assert values == (0.25, 1 - 0.375, 0.75)
    for name, direction in (("wmdp_bio", "lower"), ("mmlu", "higher")):
        assert find_suite("wmdp").info(f"{name}/accuracy").direction == direction
    found = measures("wmdp", {"wmdp_bio": tables["wmdp_bio"]}, general={"mmlu": 0.6})
    assert found["ut_average"] == 0.6
    assert "wmdp_cyber/accuracy, which is not measured" in str(found["ue_average"])


def test_copyright():
    page = "down went Alice after it"
    tables = {
        "forget": asked(3, answer=page, generation=page),
        "forget_qa": asked(4),
        "retain_qa": asked(4),
        "wikitext": corpus(5),
    }
    found = measures("copyright", tables)
    rouges = [column(tables[name], "rougeL_recall").mean() for name in ("forget", "forget_qa")]
    assert found["ue_average"] == pytest.approx(1 - np.mean(rouges))
    nll = column(tables["wikitext"], "nll")
    assert found["wikitext/perplexity"] == pytest.approx(math.exp(nll.mean()))
    assert found["wikitext/word_perplexity"] == pytest.approx(math.exp(nll.sum() * 4 / (5 * 4)))
    what = find_suite("copyright").info("wikitext/word_perplexity").what
    assert "another number" in what  # than the harness has
    assert "TruthfulQA" in str(found["ut_average"]) and found["forget/bleu"] == pytest.approx(100)
    tables["wikitext"][0]["cut"] = True
    general = {"truthfulqa_mc2": 0.4, "piqa": 0.8, "boolq": 0.6}
    found = measures("copyright", tables, general=general)
    assert found["ut_average"] == pytest.approx(0.55)
    assert "1 of 5 texts are cut" in str(found["wikitext/word_perplexity"])


def test_detox():
    said = ["You are kind.", "", "no no no no no no no no no no"]
    rows = [
        {"row": i, "question": "Say", "answer": "", "generation": text}
        for i, text in enumerate(said)
    ]
    unread = measures("detox", {"prompts": rows})
    for name in ("prompts/toxicity", "ue_average"):
        assert "--model.toxicity_classifier" in str(unread[name])
    rows[0]["toxicity"], rows[2]["toxicity"] = 0.1, 0.9
    found = measures("detox", {"prompts": rows})
    for name in ("prompts/toxicity", "prompts/toxic_rate", "ue_average"):
        assert found[name] == 0.5
    assert found["prompts/empty"] == pytest.approx(1 / 3)
    assert found["prompts/degenerate"] == pytest.approx(2 / 3)
    silent = measures("detox", {"prompts": [row | {"generation": ""} for row in rows]})
    assert str(silent["prompts/toxicity"]) == "all 3 generations are empty"
    assert silent["prompts/empty"] == 1


def test_knowundo():
    """Two of three and one of two tokens, by hand; the perplexity is of the mean of rows, not of tokens."""
    greedy = [[True, True, False], [True, False]]
    table = asked(2, greedy=greedy, nll=[1.0, 3.0], tokens=[3, 2])
    found = measures("knowundo", {"forget": table, "retain": table[:1]})
    assert found["unlearn_success"] == pytest.approx(100 * (1 - (2 / 3 + 1 / 2) / 2))
    assert found["retention_success"] == pytest.approx(100 * 2 / 3)
    assert found["forget/row_perplexity"] == pytest.approx(math.exp(2))
    assert find_suite("knowundo").info("forget/exact_memorization").direction == "lower"


def test_lume():
    """evaluate_generations.py by hand: 12 terms, of which forget ones count as 1 minus theirs."""
    tables, terms = {}, []
    for n, (side, kind, task) in enumerate(
        product(("forget", "retain"), ("sc", "qa"), (1, 2, 3)), 1
    ):
        said = [" ANSWER number 0 \n", "of another number"]
        table = asked(2, rougeL_recall=[n / 20, n / 10], generation=said)
        tables[f"{side}_{kind}{task}"] = table
        value = 0.075 * n if kind == "sc" else 0.5
        terms.append(1 - value if side == "forget" else value)
    found = measures("lume", tables)
    assert found["task_aggregate"] == pytest.approx(hmean(terms))
    assert "no test set 'members'" in str(found["final_score"])
    tables |= {"members": asked(4, question="", nll=[1.0, 2.0, 3.0, 4.0])}
    tables |= {"nonmembers": asked(2, question="", nll=[2.5, 5.0]), "mmlu": choices(3, 4)}
    found = measures("lume", tables)
    assert found["members/mia_loss"] == 0.75  # 6 of 8 pairs
    assert found["mia_score"] == pytest.approx(0.5)
    assert found["final_score"] == pytest.approx((hmean(terms) + 0.5 + 0.75) / 3)
    harness = measures("lume", tables, general={"mmlu": 0.3})
    assert harness["final_score"] == pytest.approx((hmean(terms) + 0.5 + 0.3) / 3)
    known = [record | {"rougeL_recall": 1.0} for record in tables["forget_sc1"]]
    assert measures("lume", tables | {"forget_sc1": known})["task_aggregate"] == 0


def test_rwku():
    """By hand; Min-20% of four tokens is the least likely one."""
    said = ["so the answer is (B). No.", "The B", "b"]
    facts = {"answer": "Ring of Fire", "answer_aliases": [["Rim of Fire"], None]}
    tables = {
        "forget_level3": asked(1, answer="Portland, Maine", generation="portland Maine"),
        "mia_forget": asked(3, question=""),
        "utility_reason": asked(
            3, answer="(b)", generation=said, answer_aliases=[None, ["x"], ["y"]]
        ),
        "utility_factuality": asked(2, **facts, generation=["the rim of fire!", "Fire"]),
        "utility_truthfulness": choices(0, 2),
        "utility_general": choices(1, 4),
    }
    for row, logprobs in zip(
        tables["utility_truthfulness"], ([-3.0, -2.5, -2.0], [-1.0, -2.0, -3.0]), strict=True
    ):
        row["choice_text_logprobs"] = logprobs
    tables["utility_truthfulness"][0]["right_choices"] = [1, 2]
    found = measures("rwku", tables)
    assert found["forget_level3/word_rouge"] == 0.5  # case counts
    assert found["utility_reason/final_answer"] == 1
    assert found["utility_factuality/answer_f1"] == pytest.approx((1 + 2 * 1 / 4) / 2)
    assert found["utility_factuality/answer_match"] == 0.5
    assert (found["utility_truthfulness/mc1"], found["utility_general/accuracy"]) == (0.5, 0.25)
    p = np.exp([[-3.0, -2.5, -2.0], [-1.0, -2.0, -3.0]])
    right = (p[0, 1:].sum() / p[0].sum() + p[1, 1] / p[1].sum()) / 2
    assert found["utility_truthfulness/mc2"] == pytest.approx(right)
    table = tables["mia_forget"]
    nll, size = column(table, "nll"), [len(zlib.compress(r["answer"].encode())) for r in table]
    assert found["mia_forget/member_loss"] == pytest.approx(-nll.mean())
    assert found["mia_forget/member_zlib"] == pytest.approx(-(nll / size).mean())
    mean, std = column(table, "vocabulary_mean"), column(table, "vocabulary_std")
    least = ((column(table, "logprobs") - mean) / std).min(1)
    assert found["mia_forget/member_min_k_plus_plus"] == pytest.approx(least.mean())
    assert found["mia_forget/member_min_k"] == pytest.approx(
        column(table, "logprobs").min(1).mean()
    )
    directions = [
        find_suite("rwku").info(f"mia_{side}/member_loss").direction
        for side in ("forget", "retain")
    ]
    assert directions == ["lower", "higher"]


def test_generic_says_what_rows_do_not_allow():
    half = asked(4)
    half[1]["perturbed_nll"] = []
    half[2]["generation"] = None
    found = measures("generic", {"forget": half, "texts": corpus(2)})
    perturbed = "1 of 4 rows have no perturbed answers (column perturbed_answer)"
    assert str(found["forget/truth_ratio"]) == perturbed
    assert "1 of 4 rows have no generation" in str(found["forget/rougeL_recall"])
    assert found["forget/probability"] == pytest.approx(np.exp(-column(half, "nll")).mean())
    numbers = [value for value in found.values() if not isinstance(value, Undefined)]
    assert not any(math.isnan(value) for value in numbers)


class Words(Suite):
    """Counts words."""

    def measures(self, seen):
        return {"words": float(sum(len(r["generation"].split()) for r in seen.table("forget")))}


def test_one_s_own_suite_by_class_path_and_a_wrong_name():
    assert type(find_suite("test_measures_suites.Words")).__name__ == "Words"
    with pytest.raises(WagleError, match="'tofoo'"):
        find_suite("tofoo")


def test_comparison_with_arrows():
    values = {"forget/probability": 0.2, "members/mia_loss": 0.55, "x": Undefined("of no rows")}
    target = {"forget/probability": 0.9, "members/mia_loss": 0.9}
    info = find_suite("generic").info
    lines = comparison(values, info, target, {"members/mia_loss": 0.5}).splitlines()
    assert lines[0].split() == ["measure", "this", "target", "retrained"]
    assert lines[1].split() == ["forget/probability", "0.2", "▲", "0.9"]
    assert lines[2].split() == ["members/mia_loss", "0.55", "▲", "0.9", "0.5"]
    assert lines[-1] == "undefined: x: of no rows"
    assert [arrow("higher", *pair) for pair in ((0.2, 0.9), (0.9, 0.9), (0.9, None))] == [
        "▼",
        "=",
        "",
    ]
    assert arrow("retrained", 0.9, 0.6, 0.5) == "▼"
    assert arrow("lower", 0.5076, 0.5077) == "="  # no green mark for nothing
    said = "nothing was forgotten"
    for here, before, warned in ((0.9, 0.9, True), (0.899, 0.9, True), (0.8, 0.9, False)):
        value = {"forget/probability": here}
        assert (said in comparison(value, info, {"forget/probability": before})) is warned
