"""Attacks that try to bring knowledge back, and the test that runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import QUIET, data_options, write_rows

from wagle_pl import WagleError
from wagle_pl.core.weights import mismatch, weights_digest
from wagle_pl.data.batches import collate
from wagle_pl.data.example import raw_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import Template
from wagle_pl.evaluation.attacks import Attack, Relearn
from wagle_pl.evaluation.attacks.attack import find_attacks, texts_of, usable_attacks
from wagle_pl.evaluation.attacks.weights import finetune_
from wagle_pl.evaluation.results import model_of, results_of
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.quantised import quantise_
from wagle_pl.lm.saving import save_model

PROMPTED = ["paraphrase", "sample", "probe"]
ALL = ["relearn", "quantise", *PROMPTED]


# -- choosing attacks ------------------------------------------------------------------------------


def test_how_attacks_are_named():
    def names(value: Any) -> list[str]:
        return [attack.name for attack in find_attacks(value)[0]]

    for value in (True, "all", "true"):
        assert names(value) == ALL and find_attacks(value)[1]
    for value in (None, False, "none", []):
        assert find_attacks(value) == ([], False)
    two = ["paraphrase", "probe"]
    for value in ("Paraphrase, probe", "[paraphrase,Probe]", two):
        assert names(value) == two
    own = Relearn(steps=3)
    assert find_attacks([own])[0] == [own]
    with pytest.raises(WagleError, match=r"'relern'; choose one of Paraphrase, Probe"):
        find_attacks(["relern"])


def test_where_models_and_results_are(tiny_model, tmp_path):
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    (model / "test").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert model_of(model) == str(model) and results_of(model) is None
    (model / "test/metrics.json").write_text("{}")
    assert model_of(model / "test") == model_of(model / "test/metrics.json") == str(model)
    assert results_of(model) == model / "test" and results_of(model / "test") == model / "test"
    elsewhere.mkdir()
    assert model_of(elsewhere) is None and results_of(elsewhere / "x.json") == elsewhere / "x.json"
    (elsewhere / "metrics.info.json").write_text(json.dumps({"model": tiny_model}))
    assert model_of(elsewhere) == tiny_model
    (model / "published.json").write_text("{}")
    assert model_of(model / "published.json") is None


# -- the test that runs them -----------------------------------------------------------------------

TEST = ("test", "--model=EvaluationModule", "--model.max_new_tokens=6", "--data.test_batch_size=4")


class Shouted(Attack):
    """One's own attack: questions in capital letters, and a record of what it was given."""

    seen: tuple[Any, ...] = ()

    def attack(self, subject):
        type(self).seen = (*self.seen, subject)
        return subject.ask(lambda name, row: [row.asking(row.question.upper())], self.measures)


class Careless(Attack):
    """Leaves the weights changed."""

    def attack(self, subject):
        with torch.no_grad():
            next(subject.lm.parameters()).mul_(1.5)
        return []


def sets(**files: str) -> tuple[str, str]:
    return "--data.test", json.dumps(files)


def one(name: str, **options: Any) -> list[dict[str, Any]]:
    return [{"class_path": name, "init_args": options}]


def robustness(attacks: Any) -> tuple[str, str]:
    chosen = attacks if isinstance(attacks, str) else json.dumps(attacks)
    return "--model.robustness", chosen


@pytest.fixture
def attacked(wagle, tiny_model, rows, tmp_path):
    """Run a test with attacks on five forget rows; returns its module, metrics and records."""

    def run(attacks: Any, *options: Any, output: str = "out", forget: str = rows["forget_test"]):
        args = (f"--model.model={tiny_model}", f"--model.output={output}")
        args += (*sets(forget=forget), *robustness(attacks))
        module = wagle(*TEST, *args, *options).model
        files = (tmp_path / output / f"{name}.json" for name in ("metrics", "robustness"))
        return module, *(json.loads(file.read_text()) for file in files)

    return run


@pytest.fixture
def tested(wagle, tmp_path):
    """Metrics of a model without attacks on a file of forget rows."""

    def run(model: str, forget: str) -> dict[str, float]:
        wagle(*TEST, f"--model.model={model}", "--model.output=plain", *sets(forget=forget))
        return json.loads((tmp_path / "plain/metrics.json").read_text())

    return run


def values(records: list[dict], column: str = "after") -> dict[str, Any]:
    return {f"{r['attack']} {r['option']} {r['measure']}": r[column] for r in records}


def test_every_attack(attacked, ranks, tiny_model, rows, tmp_path, capsys):
    """What is written, the same again from the same seed, and by two ranks."""
    holdout = f"--data.holdout={rows['retain_test']}"
    module, metrics, records = attacked("all", holdout)
    printed = capsys.readouterr().out
    weights = dict(load_model(tiny_model).named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in module.lm.named_parameters())
    assert module.fingerprint() == module.model_fingerprint
    assert not mismatch(weights_digest(weights.items()), module.model_fingerprint)
    assert {r["attack"] for r in records} == set(ALL)
    ways = {f"{r['attack']} {r['option']}" for r in records if r["option"]}
    assert ways == {
        *("relearn forget", "relearn retain", "quantise 8bit", "quantise 4bit"),
        *("probe answers", "probe rows"),
    }
    for record in records:
        way = "_".join(part for part in (record["attack"], record["option"]) if part)
        assert metrics[f"robustness/{way}/{record['measure']}"] == record["after"]
        assert record["unit"] and record["direction"] in ("higher", "lower", "retrained")
        if record["attack"] not in ("probe", "relearn"):  # every row, as the test itself
            assert record["before"] == pytest.approx(metrics[record["measure"]])
    info = json.loads((tmp_path / "out/metrics.info.json").read_text())
    assert set(info["measures"]) == set(metrics)
    assert info["measures"]["robustness/paraphrase/forget/probability"]["direction"] == "lower"
    found = values(records)
    layers = [value for name, value in found.items() if name.startswith("probe rows accuracy_l")]
    assert len(layers) == 3 and max(layers) == found["probe rows accuracy"]
    assert "quantise 4bit" in printed and "accuracy_layer" not in printed
    whole = (tmp_path / "out/robustness.json").read_bytes()
    attacked("all", holdout, "--model.overwrite=true")
    assert (tmp_path / "out/robustness.json").read_bytes() == whole  # same seed, same file
    args = [*TEST, *data_options(rows), f"--model.model={tiny_model}", "--model.output=two"]
    args += [*sets(forget=rows["forget_test"]), holdout, *robustness("all"), *QUIET.split()]
    ranks(*args, "--trainer.devices=2", "--trainer.strategy=ddp")
    two = json.loads((tmp_path / "two/robustness.json").read_text())
    for column in ("after", "before"):
        assert values(two, column) == pytest.approx(values(records, column), rel=1e-3, abs=1e-6)


def test_a_quantised_model_is_tested_as_if_it_were_another(
    attacked, tested, tiny_model, rows, tmp_path
):
    _, _, records = attacked(one("Quantise", bits=[3]))
    lm = load_model(tiny_model)
    quantise_(lm, 3)
    save_model(lm, load_tokenizer(tiny_model), tmp_path / "q", "card", {})
    expected = tested("q", rows["forget_test"])
    for name, value in values(records).items():
        assert value == pytest.approx(expected[name.removeprefix("quantise 3bit ")], rel=1e-5), name
    assert values(records) != values(records, "before")


def test_reworded_rows_are_tested_as_if_they_were_the_rows(
    attacked, tested, tiny_model, rows, tmp_path
):
    _, _, records = attacked("paraphrase")
    asked = load_rows(rows["forget_test"])
    changed = [{**row, "question": row["paraphrased_question"]} for row in asked]
    expected = tested(tiny_model, write_rows(tmp_path / "changed.jsonl", changed))
    assert len(records) >= 4
    for name, value in values(records).items():
        assert value == pytest.approx(expected[name.removeprefix("paraphrase  ")], rel=1e-5), name


def test_ones_own_attack_and_what_it_may_use(attacked, rows):
    Shouted.seen = ()
    _, metrics, records = attacked(["test_robustness.Shouted", "sample"])
    (subject,) = Shouted.seen
    name = "forget/probability"
    assert metrics[f"robustness/shouted/{name}"] == values(records)[f"shouted  {name}"]
    own = subject.rows["forget"]
    shown = Relearn(rows=2).draw(subject, "forget")
    assert len(shown) == 2 and shown == Relearn(rows=2).draw(subject, "forget")
    left = subject.every_row(without=texts_of(shown))["forget"]
    assert not {row.question for (row,) in left.values()} & {row.question for row in shown}
    assert len(left) == 5 - sum(row in own for row in shown)


def test_worst_of_samples_is_among_them_and_seeded(attacked, tiny_model):
    name, many = "sample  forget/rougeL_recall", one("Sample", samples=12)
    first = values(attacked(many, output="a")[2])
    assert first == values(attacked(many, "--data.test_batch_size=1", output="b")[2])
    assert first[name] > values(attacked(one("Sample", samples=1), output="c")[2])[name]
    records = attacked(one("Sample", samples=1, temperature=1e-4), output="d")[2]
    assert values(records)[name] == values(records, "before")[name]  # as greedy decoding


def test_relearning_is_tested_on_rows_that_were_not_shown(
    attacked, tested, tiny_model, rows, tmp_path
):
    options = {"on": "forget", "steps": 10, "batch_size": 3, "learning_rate": 3e-3}
    several = one("Relearn", **options, rows=[1, 3], every=4)
    _, metrics, records = attacked([*several, "test_robustness.Shouted"])
    shown = Relearn(**options, rows=3).draw(Shouted.seen[-1], "forget")
    lm, template = load_model(tiny_model).eval(), Template(load_tokenizer(tiny_model))
    finetune_(lm, [collate([template.encode(row) for row in shown], 0)] * 10, 3e-3)
    save_model(lm, load_tokenizer(tiny_model), tmp_path / "relearnt", "card", {})
    left = [row for row in load_rows(rows["forget_test"]) if row not in raw_rows(shown)]
    expected = tested("relearnt", write_rows(tmp_path / "left.jsonl", left))
    for name in ("forget/probability", "forget/truth_ratio", "forget/accuracy"):
        found = values(records)[f"relearn forget_3 {name}"]
        assert found == pytest.approx(expected[name], rel=1e-3)
    name = "forget/probability"
    ends = values(records, "before")[f"relearn forget_3 {name}"], expected[name]
    attack = f"robustness/relearn_forget_3/{name}_step_"
    curve = {int(k.removeprefix(attack)): v for k, v in metrics.items() if k.startswith(attack)}
    assert list(curve) == [0, 4, 8, 10] and sorted(curve.values()) == list(curve.values())
    assert (curve[0], curve[10]) == pytest.approx(ends, rel=1e-3)


def test_beside_target_and_retrained(attacked, tiny_model, tmp_path, capsys):
    lm = load_model(tiny_model)
    with torch.no_grad():
        lm.lm_head.weight.add_(0.05 * torch.randn(lm.lm_head.weight.shape))
    save_model(lm, load_tokenizer(tiny_model), tmp_path / "other", "card", {})
    _, metrics, _ = attacked("paraphrase", output="first")  # says of which model it is
    _, _, other = attacked("paraphrase", "--model.model=other", output="second")
    beside = ("--model.target=other", "--model.retrained=first/metrics.json")
    _, _, records = attacked("paraphrase", *beside)
    assert all(r["target_attacked"] and r["retrained_attacked"] for r in records)
    for name, value in values(records).items():
        if name in values(other):  # forget quality needs a retrained model
            assert values(records, "target")[name] == pytest.approx(values(other)[name], rel=1e-6)
            assert values(records, "retrained")[name] == pytest.approx(value, rel=1e-6)
    name = "paraphrase  forget/probability"
    assert values(records)[name] != values(other)[name]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/metrics.json").write_text(json.dumps(metrics))
    capsys.readouterr()
    _, _, records = attacked("paraphrase", "--model.target=alone", output="third")
    assert not any(r["target_attacked"] for r in records)
    assert values(records, "target")[name] == metrics["forget/probability"]
    said = "* target: without the attack (results are given, and no model)"
    assert said in capsys.readouterr().out


def test_an_attack_that_leaves_weights_changed_is_no_attack(attacked):
    with pytest.raises(RuntimeError, match="Careless left the model's weights changed"):
        attacked(["test_robustness.Careless"])


def test_autocast_sees_the_changed_weights(attacked):
    name, quantise = "quantise 2bit forget/probability", one("Quantise", bits=[2])
    records = attacked(quantise, output="a")[2]
    plain, before = values(records)[name], values(records, "before")[name]
    mixed = values(attacked(quantise, "--trainer.precision=bf16-mixed", output="b")[2])[name]
    assert mixed - before == pytest.approx(plain - before, rel=0.2)


@pytest.mark.parametrize(
    ("attacks", "options", "message"),
    [
        (
            "relern",
            (),
            "attack of model.robustness: unknown name 'relern'; choose one of Paraphrase",
        ),
        (
            "sample",
            ("--model.generate=false",),
            "sample has nothing to work on: no row to be forgotten is generated",
        ),
        ("[quantise,quantise]", (), "model.robustness: quantise is named twice"),
        (
            one("Quantise", bits=[1]),
            (),
            "quantise.bits: must be 2 to 16, or one of nf4, q8_0, q4_0, got 1",
        ),
        (one("Relearn", learning_rate=1e30), (), "lower its learning_rate"),
        ("relearn", ("--model.target=nowhere",), "model.target: result file nowhere does not exi"),
    ],
)
def test_mistakes_are_said_in_one_line(fails, tiny_model, rows, attacks, options, message):
    args = (f"--model.model={tiny_model}", *sets(forget=rows["forget_test"]), *options)
    assert message in fails(*TEST, *args, *robustness(attacks))


def test_rows_that_an_attack_cannot_use(fails, attacked, tiny_model, tmp_path):
    plain = [{key: row[key] for key in ("question", "answer")} for row in bundled("forget")[:3]]
    file = write_rows(tmp_path / "plain.jsonl", plain)
    single = write_rows(tmp_path / "one.jsonl", plain[:1])
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["answer"]} for row in plain])

    def said(rows: str, attacks: Any) -> str:
        data = (*sets(forget=rows), f"--data.forget={rows}", f"--data.retain={rows}")
        return fails(*TEST, f"--model.model={tiny_model}", *data, *robustness(attacks))

    nothing, never = "has nothing to work on", "paraphrase"
    assert f"{nothing}: no row to be forgotten has paraphrased_question" in said(file, never)
    assert f"{nothing}: there are no 4 rows to be forgotten with perturbed" in said(file, "probe")
    assert f"paraphrase {nothing}" in said(texts, never)
    assert f"relearn {nothing}: no forget row is left" in said(single, "relearn")
    # all at once: what cannot be done is said, the rest is done
    module, _, records = attacked("all", f"--data.forget={texts}", forget=texts)
    assert {r["attack"] for r in records} == {"relearn", "quantise"}
    assert {r["measure"] for r in records} == {"forget/perplexity", "forget/extraction_strength"}
    skipped = {name for name in module.undefined if name.startswith("robustness/")}
    assert {name for name in skipped if name.count("/") == 1} == {
        f"robustness/{name}" for name in PROMPTED
    }
    assert (
        "no row to be forgotten has paraphrased_question"
        in module.undefined["robustness/paraphrase"]
    )


def test_multiple_choice(attacked, tmp_path):
    places = ["in a bakery", "in a loft", "at sea", "nowhere"]
    choices = [
        {"question": f"Where does the {name} club meet?", "choices": places, "label": i}
        | {"paraphrased_question": f"Which place has the {name} club?"}
        for i, name in enumerate(("chess", "choir", "rowing", "sewing"))
    ]
    test = sets(wmdp_bio=write_rows(tmp_path / "choices.jsonl", choices))
    _, metrics, records = attacked("[quantise,paraphrase]", "--model.suite=wmdp", *test)
    assert {r["measure"] for r in records} == {"wmdp_bio/accuracy"} and len(records) == 3
    assert {r["before"] for r in records} == {metrics["wmdp_bio/accuracy"]}
    assert {r["direction"] for r in records} == {"lower"}


# -- ranks -----------------------------------------------------------------------------------------


def test_weights_spread_over_ranks_are_left_alone(attacked):
    attacked(["test_robustness.Shouted"])
    spread = replace(Shouted.seen[-1], sharded=True)
    for attack in find_attacks("relearn,quantise")[0]:
        said = f"{attack.name} changes weights, which ZeRO-3 spreads over the ranks"
        with pytest.raises(WagleError, match=said):
            attack.check(spread)
    found, skipped = usable_attacks(find_attacks(True)[0], spread, every=True)
    assert [attack.name for attack in found] == PROMPTED
    assert set(skipped) == {"relearn", "quantise"}
