"""Attacks that try to bring knowledge back, and the test that runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_rows

from wagle_pl import WagleError
from wagle_pl.core.weights import fingerprint
from wagle_pl.data.batches import collate
from wagle_pl.data.example import raw_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import Template
from wagle_pl.evaluation.attacks import Attack, InContext, Relearn
from wagle_pl.evaluation.attacks.attack import texts_of
from wagle_pl.evaluation.attacks.report import (
    EVERY,
    find_attacks,
    model_of,
    results_of,
    usable_attacks,
)
from wagle_pl.evaluation.attacks.weights import finetune_, quantise_
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.saving import save_model

generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


# -- choosing attacks -------------------------------------------------------------------------------------------------


def test_how_attacks_are_named():
    names = [
        "relearn",
        "quantise",
        "paraphrase",
        "translated_style",
        "in_context",
        "sample",
        "probe",
    ]
    for value in (True, "all", "true"):
        attacks, every = find_attacks(value)
        assert [attack.name for attack in attacks] == names and every
    for value in (None, False, "none", []):
        assert find_attacks(value) == ([], False)
    for value in (
        "TranslatedStyle, in_context",
        "[translated_style,InContext]",
        ["translated_style", "in_context"],
    ):
        assert [attack.name for attack in find_attacks(value)[0]] == [
            "translated_style",
            "in_context",
        ]
    own = Relearn(steps=3)
    assert find_attacks([own])[0] == [own]
    with pytest.raises(WagleError, match=r"'relern'; choose one of InContext, .*TranslatedStyle"):
        find_attacks(["relern"])


def test_where_models_and_results_are(tiny_model, tmp_path):
    model = tmp_path / "model"
    (model / "test").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    assert model_of(model) == str(model) and results_of(model) is None
    (model / "test/metrics.json").write_text("{}")
    assert model_of(model / "test") == model_of(model / "test/metrics.json") == str(model)
    assert results_of(model) == model / "test" and results_of(model / "test") == model / "test"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert model_of(elsewhere) is None and results_of(elsewhere / "x.json") == elsewhere / "x.json"
    (elsewhere / "metrics.info.json").write_text(json.dumps({"model": tiny_model}))
    assert model_of(elsewhere) == tiny_model
    (model / "published.json").write_text("{}")
    assert model_of(model / "published.json") is None


# -- the test that runs them ------------------------------------------------------------------------------------------

TEST = (
    "test",
    "--model",
    "EvaluationModule",
    "--model.max_new_tokens",
    "6",
    "--data.test_batch_size",
    "4",
)


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


@pytest.fixture
def attacked(wagle, tiny_model, rows, tmp_path):
    """Run a test with attacks on five forget rows; returns its module, metrics and records."""

    def run(attacks: Any, *options: Any, output: str = "out", forget: str = rows["forget_test"]):
        args = ("--model.output", output, "--data.test", json.dumps({"forget": forget}))
        chosen = (
            "--model.robustness",
            attacks if isinstance(attacks, str) else json.dumps(attacks),
        )
        module = wagle(*TEST, "--model.model", tiny_model, *args, *chosen, *options).model
        read = [
            json.loads((tmp_path / output / f"{name}.json").read_text())
            for name in ("metrics", "robustness")
        ]
        return module, *read

    return run


def values(records: list[dict], column: str = "after") -> dict[str, Any]:
    return {f"{r['attack']} {r['option']} {r['measure']}": r[column] for r in records}


def test_every_attack(attacked, tiny_model, rows, tmp_path, capsys):
    module, metrics, records = attacked("all", "--data.holdout", rows["retain_test"])
    printed = capsys.readouterr().out
    weights = dict(load_model(tiny_model).named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in module.lm.named_parameters())
    assert module.fingerprint() == fingerprint(weights.items()) == module.model_fingerprint
    assert {r["attack"] for r in records} == {attack().name for attack in EVERY}
    ways = {(r["attack"], r["option"]) for r in records if r["option"]}
    assert ways == {
        ("relearn", "forget"),
        ("relearn", "retain"),
        ("quantise", "8bit"),
        ("quantise", "4bit"),
        ("probe", "answers"),
        ("probe", "rows"),
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
    layers = [
        r["after"]
        for r in records
        if r["option"] == "rows" and r["measure"].startswith("accuracy_layer")
    ]
    assert len(layers) == 3 and max(layers) == values(records)["probe rows accuracy"]
    assert "quantise 4bit" in printed and "accuracy_layer" not in printed
    whole = (tmp_path / "out/robustness.json").read_bytes()
    attacked("all", "--data.holdout", rows["retain_test"], "--model.overwrite", "true")
    assert (tmp_path / "out/robustness.json").read_bytes() == whole  # same seed, same file


def test_a_quantised_model_is_tested_as_if_it_were_another(
    attacked, wagle, tiny_model, rows, tmp_path
):
    _, _, records = attacked(
        [{"class_path": "Quantise", "init_args": {"bits": [3], "scheme": "symmetric"}}]
    )
    lm = load_model(tiny_model)
    quantise_(lm, 3, "symmetric")
    save_model(lm, load_tokenizer(tiny_model), tmp_path / "q", "card", {})
    wagle(
        *TEST,
        "--model.model",
        "q",
        "--model.output",
        "plain",
        "--data.test",
        json.dumps({"forget": rows["forget_test"]}),
    )
    expected = json.loads((tmp_path / "plain/metrics.json").read_text())
    for name, value in values(records).items():
        assert value == pytest.approx(expected[name.removeprefix("quantise 3bit ")], rel=1e-5), name
    assert values(records) != values(records, "before")


def test_reworded_rows_are_tested_as_if_they_were_the_rows(
    attacked, wagle, tiny_model, rows, tmp_path
):
    _, _, records = attacked([{"class_path": "Paraphrase", "init_args": {"rules": "never"}}])
    changed = [
        {**row, "question": row["paraphrased_question"]} for row in load_rows(rows["forget_test"])
    ]
    file = write_rows(tmp_path / "changed.jsonl", changed)
    wagle(
        *TEST,
        "--model.model",
        tiny_model,
        "--model.output",
        "plain",
        "--data.test",
        json.dumps({"forget": file}),
    )
    expected = json.loads((tmp_path / "plain/metrics.json").read_text())
    assert len(records) >= 4
    for name, value in values(records).items():
        assert value == pytest.approx(expected[name.removeprefix("paraphrase  ")], rel=1e-5), name


def test_ones_own_attack_and_what_it_may_use(attacked, rows):
    Shouted.seen = ()
    module, metrics, records = attacked(["test_robustness.Shouted", "in_context", "sample"])
    (subject,) = Shouted.seen
    assert (
        metrics["robustness/shouted/forget/probability"]
        == values(records)["shouted  forget/probability"]
    )
    asked = InContext().in_context(subject, "forget")
    assert sorted(asked) == list(range(5))
    for i, ((changed),) in asked.items():
        row = subject.rows["forget"][i]
        facts = [
            fact
            for fact in subject.rows["forget"]
            if f"{fact.question} {fact.answer}" in changed.context
        ]
        assert len(facts) == 4 and row not in facts and row.answer not in changed.context
        assert changed.context in module.tokenizer.decode(
            subject.template.encode(changed)["input_ids"]
        )
    shown = Relearn(rows=2).draw(subject, "forget")
    assert len(shown) == 2 and shown == Relearn(rows=2).draw(subject, "forget")
    left = subject.every_row(without=texts_of(shown))["forget"]
    assert not {row.question for (row,) in left.values()} & {row.question for row in shown}
    assert len(left) == 5 - sum(row in subject.rows["forget"] for row in shown)


def test_worst_of_samples_is_among_them_and_seeded(attacked, tiny_model):
    sample = {"class_path": "Sample", "init_args": {"samples": 12}}
    first = values(attacked([sample], output="a")[2])
    assert first == values(attacked([sample], "--data.test_batch_size", "1", output="b")[2])
    fewer = {"class_path": "Sample", "init_args": {"samples": 1}}
    name = "sample  forget/rougeL_recall"
    assert first[name] > values(attacked([fewer], output="c")[2])[name]
    cold = {"class_path": "Sample", "init_args": {"samples": 1, "temperature": 1e-4}}
    records = attacked([cold], output="d")[2]
    assert values(records)[name] == values(records, "before")[name]  # as greedy decoding


def test_relearning_is_tested_on_rows_that_were_not_shown(
    attacked, wagle, tiny_model, rows, tmp_path
):
    options = {"on": "forget", "steps": 10, "rows": 3, "batch_size": 3, "learning_rate": 3e-3}
    _, _, records = attacked(
        [{"class_path": "Relearn", "init_args": options}, "test_robustness.Shouted"]
    )
    shown = Relearn(**options).draw(Shouted.seen[-1], "forget")
    lm, template = load_model(tiny_model).eval(), Template(load_tokenizer(tiny_model))
    finetune_(lm, [collate([template.encode(row) for row in shown], 0)] * 10, 3e-3)
    save_model(lm, load_tokenizer(tiny_model), tmp_path / "relearnt", "card", {})
    left = write_rows(
        tmp_path / "left.jsonl",
        [row for row in load_rows(rows["forget_test"]) if row not in raw_rows(shown)],
    )
    wagle(
        *TEST,
        "--model.model",
        "relearnt",
        "--model.output",
        "plain",
        "--data.test",
        json.dumps({"forget": left}),
    )
    expected = json.loads((tmp_path / "plain/metrics.json").read_text())
    found = {name.removeprefix("relearn forget "): value for name, value in values(records).items()}
    for name in ("forget/probability", "forget/truth_ratio", "forget/accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)


def test_beside_target_and_retrained(attacked, tiny_model, tmp_path, capsys):
    lm = load_model(tiny_model)
    with torch.no_grad():
        lm.lm_head.weight.add_(0.05 * normal(*lm.lm_head.weight.shape))
    save_model(lm, load_tokenizer(tiny_model), tmp_path / "other", "card", {})
    _, metrics, _ = attacked("paraphrase", output="first")  # says of which model it is
    _, _, other = attacked("paraphrase", "--model.model", "other", output="second")
    _, _, records = attacked(
        "paraphrase", "--model.target", "other", "--model.retrained", "first/metrics.json"
    )
    assert (
        {r["target_attacked"] for r in records}
        == {r["retrained_attacked"] for r in records}
        == {True}
    )
    for name, value in values(records).items():
        if name in values(other):  # forget quality needs a retrained model
            assert values(records, "target")[name] == pytest.approx(values(other)[name], rel=1e-6)
            assert values(records, "retrained")[name] == pytest.approx(value, rel=1e-6)
    assert (
        values(records)["paraphrase  forget/probability"]
        != values(other)["paraphrase  forget/probability"]
    )
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/metrics.json").write_text(json.dumps(metrics))
    capsys.readouterr()
    _, _, records = attacked("paraphrase", "--model.target", "alone", output="third")
    assert {r["target_attacked"] for r in records} == {False}
    assert (
        values(records, "target")["paraphrase  forget/probability"] == metrics["forget/probability"]
    )
    assert (
        "* target: without the attack (results are given, and no model)" in capsys.readouterr().out
    )


def test_an_attack_that_leaves_weights_changed_is_no_attack(attacked):
    with pytest.raises(RuntimeError, match="Careless left the model's weights changed"):
        attacked(["test_robustness.Careless"])


def test_autocast_sees_the_changed_weights(attacked):
    quantise = [{"class_path": "Quantise", "init_args": {"bits": [2]}}]
    records = attacked(quantise, output="a")[2]
    plain, before = values(records), values(records, "before")
    mixed = values(attacked(quantise, "--trainer.precision", "bf16-mixed", output="b")[2])
    name = "quantise 2bit forget/probability"
    assert mixed[name] - before[name] == pytest.approx(plain[name] - before[name], rel=0.2)


@pytest.mark.parametrize(
    ("attacks", "options", "message"),
    [
        ("relern", (), "unknown attack of model.robustness 'relern'; choose one of InContext"),
        (
            "sample",
            ("--model.generate", "false"),
            "sample has nothing to work on: no row to be forgotten is generated",
        ),
        ("[quantise,quantise]", (), "model.robustness names quantise twice"),
        (
            '[{"class_path":"Quantise","init_args":{"bits":[1]}}]',
            (),
            "quantise: bits must be 2 to 16, got [1]",
        ),
        (
            '[{"class_path":"TranslatedStyle","init_args":{"languages":["xx"]}}]',
            (),
            "must be of es, fr, de; got ['xx']",
        ),
        (
            '[{"class_path":"Relearn","init_args":{"learning_rate":1e30}}]',
            (),
            "lower its learning_rate",
        ),
        (
            "relearn",
            ("--model.target", "nowhere"),
            "model.target: result file nowhere does not exist",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(fails, tiny_model, rows, attacks, options, message):
    forget = ("--data.test", json.dumps({"forget": rows["forget_test"]}))
    assert message in fails(
        *TEST, "--model.model", tiny_model, *forget, "--model.robustness", attacks, *options
    )


def test_rows_that_an_attack_cannot_use(fails, attacked, tiny_model, tmp_path):
    plain = [{key: row[key] for key in ("question", "answer")} for row in bundled("forget")[:3]]
    file = write_rows(tmp_path / "plain.jsonl", plain)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["answer"]} for row in plain])

    def said(forget: str, attacks: str) -> str:
        options = (
            "--data.test",
            json.dumps({"forget": forget}),
            "--data.forget",
            forget,
            "--data.retain",
            forget,
        )
        return fails(*TEST, "--model.model", tiny_model, *options, "--model.robustness", attacks)

    never = '[{"class_path":"Paraphrase","init_args":{"rules":"never"}}]'
    assert (
        "paraphrase has nothing to work on: no row to be forgotten has paraphrased_question"
        in said(file, never)
    )
    assert (
        "probe has nothing to work on: there are no 4 rows to be forgotten with perturbed"
        in said(file, "probe")
    )
    for attack in ("paraphrase", "translated_style", "in_context"):
        assert f"{attack} has nothing to work on" in said(texts, attack)
    (single,) = [write_rows(tmp_path / "one.jsonl", plain[:1])]
    assert "relearn has nothing to work on: no forget row is left" in said(single, "relearn")
    # all at once: what cannot be done is said, the rest is done
    module, _, records = attacked("all", "--data.forget", texts, forget=texts)
    assert {r["attack"] for r in records} == {"relearn", "quantise"}
    assert {r["measure"] for r in records} == {"forget/perplexity", "forget/extraction_strength"}
    skipped = {
        name for name in module.undefined if name.count("/") == 1 and name.startswith("robustness/")
    }
    assert skipped == {
        f"robustness/{name}"
        for name in ("paraphrase", "translated_style", "in_context", "sample", "probe")
    }
    assert "no row to be forgotten has questions" in module.undefined["robustness/paraphrase"]


def test_multiple_choice(attacked, tmp_path):
    places = ("in a bakery", "in a loft", "at sea", "nowhere")
    choices = [
        {"question": f"Where does the {name} club meet?", "choices": list(places), "label": i}
        for i, name in enumerate(("chess", "choir", "rowing", "sewing"))
    ]
    file = write_rows(tmp_path / "choices.jsonl", choices)
    suite = ("--model.suite", "wmdp")
    options = json.dumps({"wmdp_bio": file})
    module, metrics, records = attacked(
        "[quantise,paraphrase,translated_style,in_context]", *suite, "--data.test", options
    )
    assert {r["measure"] for r in records} == {"wmdp_bio/accuracy"} and len(records) == 5
    assert all(
        r["before"] == metrics["wmdp_bio/accuracy"] and r["direction"] == "lower" for r in records
    )
    (changed,) = InContext().in_context(module.evaluation.subject(), "wmdp_bio")[0]
    facts, header = changed.context.split("\n\n", 1)
    assert (
        len(facts.split("\n")) == 3
        and "choir club meet? in a loft" in facts
        and "chess" not in facts
    )
    assert header == module.evaluation.active_suite.headers["wmdp_bio"]


# -- ranks ------------------------------------------------------------------------------------------------------------


def test_weights_spread_over_ranks_are_left_alone(attacked):
    Shouted.seen = ()
    attacked(["test_robustness.Shouted"])
    spread = replace(Shouted.seen[0], sharded=True)
    for attack in find_attacks("relearn,quantise")[0]:
        with pytest.raises(
            WagleError, match=f"{attack.name} changes weights, which ZeRO-3 spreads over the ranks"
        ):
            attack.check(spread)
    found, skipped = usable_attacks(find_attacks(True)[0], spread, every=True)
    assert [attack.name for attack in found] == [
        "paraphrase",
        "translated_style",
        "in_context",
        "sample",
        "probe",
    ]
    assert set(skipped) == {"relearn", "quantise"}


@pytest.mark.slow
def test_two_ranks_find_what_one_does(ranks, attacked, tiny_model, rows, tmp_path):
    args = [
        "test",
        "--data",
        "ForgetRetainDataModule",
        *TEST[1:],
        "--data.forget",
        rows["forget"],
        "--data.retain",
        rows["retain"],
        "--data.test",
        json.dumps({"forget": rows["forget_test"]}),
        "--model.model",
        tiny_model,
        "--model.robustness",
        "all",
        "--model.output",
        "two",
        "--trainer.accelerator",
        "cpu",
    ]
    args += [
        part
        for name in ("enable_progress_bar", "logger")
        for part in (f"--trainer.{name}", "false")
    ]
    ranks(*args, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    two = json.loads(Path(tmp_path / "two/robustness.json").read_text())
    one = attacked("all")[2]
    assert values(two) == pytest.approx(values(one), rel=1e-3, abs=1e-6)
    assert values(two, "before") == pytest.approx(values(one, "before"), rel=1e-3, abs=1e-6)
