"""Sections of a report about models: measures, masks, answers, attacks, and what made them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Optional

import yaml
from markupsafe import Markup, escape

from wagle_pl.api.rows import row_digest
from wagle_pl.core.environment import versions
from wagle_pl.core.html import cell, element, exchange, facts, note, number, table
from wagle_pl.data.example import Example
from wagle_pl.data.rows import spread
from wagle_pl.evaluation.results import BETTER, SAME, WORSE, arrow
from wagle_pl.lab.study.report.figures import heatmaps
from wagle_pl.lab.study.report.sources import ReportedModel, Sources

DIRECTIONS = {
    "higher": "higher is better",
    "lower": "lower is better",
    "retrained": "best at the retrained model's",
}
_SIGNS = {
    BETTER: ("better", "better than"),
    WORSE: ("worse", "worse than"),
    SAME: ("even", "same as"),
}
Models = Sequence[ReportedModel]
Blocks = Iterator[Markup]  # of a section


# -- pieces ----------------------------------------------------------------------------------------


def breakable(name: str) -> Markup:
    """A name of a measure, which a browser may break after ``/`` and ``_``."""
    return Markup(re.sub("([/_])", r"\1<wbr>", str(escape(name))))


def sign(direction: str, than: str) -> Markup:
    """An arrow, and what it means for those who do not see it."""
    if not direction:
        return Markup()
    kind, words = _SIGNS[direction]
    unseen = element("span", f" {words.split()[0]}", class_="unseen")
    return Markup(" ") + element("span", direction, unseen, class_=kind, title=f"{words} {than}")


def name_of(model: ReportedModel) -> Markup:
    """Target, retrained, or number and name of a model that is compared with them."""
    if not model.number:
        return element("span", model.name, class_=f"role {model.role}")
    return element("span", str(model.number), class_="role this") + f" {model.name}"


def metric(sources: Sources, model: ReportedModel, measure: str) -> Markup:
    """A measure of a model, and whether it is better than at the target."""
    value = number(model.metrics.get(measure), data_run=model.name, data_measure=measure)
    return value + sign(sources.sign(model, measure), "the target model")


def options_text(value: Any) -> str:
    """Plain data in a line: the class first, then its options.

    >>> options_text({"class": "NPO", "beta": 0.1, "retain": {"class": "NLL"}})
    'NPO, beta 0.1, retain (NLL)'
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(map(options_text, value))
    if not isinstance(value, Mapping):
        return "" if value is None else str(value)
    parts = [str(value["class"])] if "class" in value else []
    for key, option in value.items():
        nested = isinstance(option, Mapping)
        if key != "class":
            parts.append(f"{key} ({options_text(option)})" if nested else f"{key} {option}")
    return ", ".join(parts)


# -- sections about models -------------------------------------------------------------------------


def summary(sources: Sources) -> Blocks:
    """One row per model, with the measures that say most."""
    lead = lead_measures(sources.models)
    infos = [sources.models[0].about(measure) for measure in lead]
    tips = [f"{info.what}; {info.unit}; {DIRECTIONS[info.direction]}" for info in infos]
    heads = [element("abbr", breakable(m), title=tip) for m, tip in zip(lead, tips, strict=True)]
    rows = [
        [name_of(model), *(metric(sources, model, measure) for measure in lead)]
        for model in sources.everyone
    ]
    yield table(["model", *heads], rows)
    if "target" in sources.references:
        link = element("a", "All measures", href="#measures-section")
        words = f"{BETTER} better, {WORSE} worse than the target model, {SAME} the same."
        yield note(Markup("{} Every measure is in {}.").format(words, link))
    else:
        yield note("Without the target model's results no arrows say what is better.")


def masks(sources: Sources) -> Blocks:
    """Where the weights that may move are."""
    known = {model.name: model.mask for model in sources.models if model.mask is not None}
    yield heatmaps(known)
    for model in sources.models:
        if model.mask is None:
            last = model.last
            dense = last.get("objective") and not last.get("mask") and not last.get("adapter")
            why = "every weight could move (dense)" if dense else "no mask is known"
            yield note(f"{model.name}: {why}.")


def answers(sources: Sources) -> Blocks:
    """What the models say to the same questions, side by side."""
    target, retrained = (sources.references.get(role) for role in ("target", "retrained"))
    after = [(f"after: {model.name}", model) for model in sources.models]
    models = [("before: target", target), *after, ("retrained", retrained)]
    models = [(label, model) for label, model in models if model is not None]
    sets = [(*test_sets([m], True), *test_sets([m], False)[:1]) for m in sources.models]
    for test_set in dict.fromkeys(chain(*sets)):
        records_of = {label: model.generations(test_set) for label, model in models}
        asked = next((list(records_of[label]) for label, _ in after if records_of[label]), [])
        chosen = spread(asked, sources.examples)
        if not chosen:
            yield note(f"No answers were generated on {test_set}.")
            continue
        yield element("h3", f"{test_set}: {len(chosen)} of {len(asked)}")
        for question in chosen:
            records = [(label, m.role, records_of[label].get(question)) for label, m in models]
            truths = (record.get("answer") for *_, record in records if record)
            truth = next(filter(None, truths), "")
            shown = [_answer(*entry) for entry in records]
            if sources.redact:  # the digest is that of the record of the run that forgot the row
                row = Example.of({"question": question, "answer": truth or "?"})
                digest = row_digest(row, sources.models[0].last.get("base_fingerprint", ""))
                yield exchange(digest, [(label, "–", role) for label, _, role in shown])
            else:
                yield exchange(question, [("true answer", truth, "truth")] * bool(truth) + shown)


def _answer(label: str, role: str, record: Optional[Mapping[str, Any]]) -> tuple[str, str, str]:
    text = element("em", "not asked")
    if record:
        text = record["generation"].strip() or element("em", "empty")
    if record and record.get("rougeL_recall") is not None:
        score = number(record["rougeL_recall"])
        label = Markup("{} ").format(label) + element("small", "ROUGE-L ", score)
    return label, text, role


def robustness(sources: Sources) -> Blocks:
    """What attacks bring back."""
    rows = [row for model in sources.models for row in model.robustness]
    for model in sources.models:
        if not model.robustness:
            yield note(f"{model.name}: no attacks were run (wagle test --model.robustness all).")
            continue
        header = ["attack", "option", "measure", "before", "after", "target", "retrained"]
        lines = [_attacked(row) for row in model.robustness]
        yield table(header, lines, "numbers mixed", name_of(model))
    if rows:
        yield note(f"{WORSE}: the attack undid forgetting, {BETTER}: it did not.")
    if any(
        row.get(f"{name}_attacked") is False for row in rows for name in ("target", "retrained")
    ):
        yield note(
            "* without the attack: only results of that model were given to the test, and no model."
        )


def _attacked(row: Mapping[str, Any]) -> list[Any]:
    """A line of ``robustness.json``, and whether it is better after the attack."""
    shown = {}
    for name in ("before", "after", "target", "retrained"):
        starred = row.get(name) is not None and row.get(f"{name}_attacked") is False
        shown[name] = Markup("{}{}").format(cell(row.get(name)), "*" if starred else "")
    after, *others = (
        value if isinstance(value := row.get(name), (int, float)) else None
        for name in ("after", "before", "retrained")
    )
    if after is not None:
        better = arrow(row.get("direction", "lower"), after, *others)
        shown["after"] += sign(better, "before the attack")
    elif row.get("why"):
        shown["after"] += element("small", row["why"])
    measure = breakable(row.get("measure", "")) + element("small", row.get("unit", ""))
    return [str(row.get("attack", "")), str(row.get("option") or ""), measure, *shown.values()]


def all_measures(sources: Sources) -> Blocks:
    """Every number of every ``metrics.json``, what is undefined, and why."""
    rows = []
    for measure in measure_names(sources.everyone):
        info = sources.models[0].about(measure)
        told = element("small", f"{info.what}. {info.unit}, {DIRECTIONS[info.direction]}")
        numbers = (metric(sources, model, measure) for model in sources.everyone)
        rows.append([breakable(measure) + told, *numbers])
    yield table(["measure", *map(name_of, sources.everyone)], rows, "numbers all")
    lost = [
        (m.name, measure, why) for m in sources.everyone for measure, why in m.undefined.items()
    ]
    if lost:
        yield element("h3", "Undefined")
        yield table(["model", "measure", "why"], lost, "")
    for model in sources.everyone:
        if absent := model.info.get("absent_sets"):
            sets = ", ".join(absent)
            yield note(f"{model.name}: no test set {sets}, so none of its measures.")


def making(sources: Sources) -> Blocks:
    """For each model its record: the runs that made it, oldest first."""
    for model in sources.everyone:
        rows = model.info.get("rows", {})
        yield element("h3", model.name)
        yield facts(
            [
                ("results", element("code", str(model.path))),
                ("measured as", model.info.get("suite")),
                ("test rows", ", ".join(f"{name} {size}" for name, size in rows.items())),
            ]
        )
        for i, run in enumerate(model.lineage, 1):
            told = [
                (key.replace("_", " "), value if isinstance(value, float) else options_text(value))
                for key, value in run.items()
                if key not in ("module", "config", "prompts" if sources.redact else "")
            ]
            config = yaml.safe_dump(run.get("config"), sort_keys=False).rstrip()
            title = element("summary", f"{i}. {run.get('module', 'run')}")
            options = [] if sources.redact else [element("pre", config)]
            yield element("details", title, facts(told), *options)
        yield from (note(f"{model.name}: {text}.") for text in dict.fromkeys(model.notes))
    yield note(f"This report was made with {options_text(versions())}.")


#: Sections about models: name, heading, and what makes its blocks.
SECTIONS: tuple[tuple[str, str, Callable[[Sources], Blocks]], ...] = (
    ("summary", "Summary", summary),
    ("masks", "Masks", masks),
    ("answers", "Answers", answers),
    ("robustness", "Robustness", robustness),
    ("measures", "All measures", all_measures),
    ("making", "How the models were made", making),
)


# -- measures and test sets of models ----------------------------------------------------------------


def measure_names(models: Models, sets: Optional[Collection[str]] = None) -> list[str]:
    """Every measure of the models once, in their order; those of some test sets if given."""
    names = dict.fromkeys(name for model in models for name in model.metrics)
    return [name for name in names if sets is None or name.rpartition("/")[0] in sets]


def test_sets(models: Models, forgotten: bool) -> list[str]:
    """Names of the test sets that are, or are not, to be forgotten; retain sets first."""
    names = dict.fromkeys(name for model in models for name in model.sets)
    chosen = [name for name in names if models[0].suite.forgets(name) == forgotten]
    return sorted(chosen, key=lambda name: not name.startswith("retain"))


def lead_measures(models: Models) -> list[str]:
    """Measures of a summary: two of each set to forget, one of sets to keep, all without a set."""
    forgotten = (measure_names(models, [name])[:2] for name in test_sets(models, True))
    kept = (measure_names(models, [name]) for name in test_sets(models, False))
    return [*chain(*forgotten), *[*chain(*kept)][:1], *measure_names(models, [""])]
