"""What the sections about models show: which measures, figures and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional, Union

from markupsafe import Markup

from wagle_pl.core.text import short_number
from wagle_pl.data.rows import spread
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.sets import SetMeasures
from wagle_pl.study.report import curves
from wagle_pl.study.report.figures import largest_share, mask_heatmap, mask_text
from wagle_pl.study.report.sources import ReportedModel, Sources
from wagle_pl.study.report.svg import svg
from wagle_pl.unlearning.card import forgotten

DIRECTIONS = {
    "higher": "higher is better",
    "lower": "lower is better",
    "retrained": "best at the retrained model's",
}
_UTILITIES = ("model_utility", "ut_average")


class Figure(NamedTuple):
    """A figure and its caption."""

    svg: Markup
    caption: str


def shown_of_models(
    sources: Sources, forget: Optional[str], utility: Optional[str], examples: int
) -> dict[str, Any]:
    """What the templates of the sections about models are given, see the functions of these names."""
    return {
        "lead_measures": lead_measures(sources.models),
        "measures": measure_names(sources.everyone),
        "tradeoff": tradeoff(sources, forget, utility),
        "truth_ratios": truth_ratios(sources),
        "masks": masks(sources),
        "answers": answers(sources, examples),
        "lineages": lineages(sources),
    }


def measure_names(models: Sequence[ReportedModel]) -> list[str]:
    """Every measure of the models once, in their order."""
    return list(dict.fromkeys(name for model in models for name in model.metrics))


def lead_measures(models: Sequence[ReportedModel]) -> list[str]:
    """Measures for a summary: two of each set to be forgotten, one of the first set to be kept, and those that belong
    to no set."""
    names = measure_names(models)

    def of_set(test_set: str) -> list[str]:
        return [name for name in names if name.rpartition("/")[0] == test_set]

    forgotten, kept = _forgotten_and_kept(models)
    kept = [name for name in kept if of_set(name)]
    leading = [name for test_set in forgotten for name in of_set(test_set)[:2]]
    leading += [name for test_set in kept[:1] for name in of_set(test_set)[:1]]
    return leading + [name for name in names if "/" not in name]


def tradeoff(sources: Sources, forget: Optional[str], utility: Optional[str]) -> Union[Figure, str]:
    """Every model as a point of forget measure and utility, or why there is no such figure.

    Args:
        sources: of the report.
        forget: measure on the horizontal axis; when None, the first of a set to be forgotten that is better when lower.
        utility: measure on the vertical axis; when None, model utility, the UT average, or the first measure of a set
            to be kept, preferably one that is better when higher.
    """
    models = sources.models
    forget = forget or next(iter(_measures_of_sets(models, True, "lower")), None)
    kept = [*_measures_of_sets(models, False, "higher"), *_measures_of_sets(models, False, "lower")]
    whole = [name for name in _UTILITIES if name in measure_names(models)]
    utility = utility or next(iter([*whole, *kept]), None)
    if forget is None or utility is None:
        lacks = "forgetting" if forget is None else "utility"
        return f"The runs have no measure of {lacks}: no curve. Choose one with --forget and --utility."
    points, told = [], []
    for model in sources.everyone:
        x, y = (model.metrics.get(name, math.inf) for name in (forget, utility))
        if math.isfinite(x) and math.isfinite(y):
            label = str(model.number or model.name)
            points.append(curves.Model(x, y, model.role, label))
            name = f"{label} {model.name}" if model.number else label
            told.append(f"{name}: {forget} {short_number(x)}, {utility} {short_number(y)}")
    if not any(point.role == "this" for point in points):
        return f"No run has a finite number for both {forget} and {utility}: no curve."
    labels = [f"{m} ({DIRECTIONS[models[0].about(m).direction]})" for m in (forget, utility)]
    title = "Forgetting against utility"
    drawn = svg("tradeoff", title, "; ".join(told), curves.forget_utility, points, *labels)
    level = "The dotted line is the retrained model's forgetting."
    dotted = level if "retrained" in sources.references else ""
    return Figure(drawn, f"Numbers are the runs of the summary. {dotted}")


def truth_ratios(sources: Sources) -> list[tuple[ReportedModel, list[Union[Figure, str]]]]:
    """For each model, the truth ratios of its sets to be forgotten and of one to be kept."""
    found = []
    for model in sources.models:
        figures: list[Union[Figure, str]] = []
        for test_set in _telling_sets(model):
            roles = {**sources.references, "this": model}
            ratios = {role: ratios_of(other, test_set) for role, other in roles.items()}
            if ratios["this"]:
                name = f"ratio-{model.number}-{len(figures)}"
                figures += _ratio_figures(name, model, test_set, ratios)
        found.append((model, figures))
    return found


def ratios_of(model: ReportedModel, test_set: str) -> dict[tuple[str, str], float]:
    """(question, answer) -> truth ratio of the examples of a set that have one; empty if none has."""
    records = model.tables.get(test_set, [])
    try:
        ratios = SetMeasures(records).ratios().tolist()
    except Undefined:
        return {}
    return {
        (record["question"], record["answer"]): ratio
        for record, ratio in zip(records, ratios, strict=True)
        if not math.isnan(ratio)
    }


def masks(sources: Sources) -> list[tuple[ReportedModel, Optional[Markup]]]:
    """For each model, the heat map of its mask; None without one."""
    found = heatmaps({m.name: m.mask for m in sources.models if m.mask is not None}, "mask")
    return [(model, found.get(model.name)) for model in sources.models]


def heatmaps(masks: dict[str, Any], name: str) -> dict[str, Markup]:
    """Heat maps of masks, on one colour scale.

    Args:
        masks: title -> :class:`~wagle_pl.masks.WeightMask`.
        name: prefix of the names of the figures.
    """
    grids = {title: mask.grid() for title, mask in masks.items()}
    largest = largest_share(grids.values())
    found = {}
    for i, (title, grid) in enumerate(grids.items()):
        what = f"Share of weights selected by layer and module: {title}"
        text = mask_text({title: grid})
        found[title] = svg(f"{name}-{i}", what, text, mask_heatmap, {"": grid}, "", largest)
    return found


class Said(NamedTuple):
    """What one model says to a question.

    Attributes:
        label: names the model.
        role: of the model.
        record: of the question; None if the model was not asked.
    """

    label: str
    role: str
    record: Optional[dict[str, Any]]


class AnswersOfSet(NamedTuple):
    """Answers of all models to questions of a test set.

    Attributes:
        test_set: its name.
        count: how many questions were asked.
        chosen: some of them, with the true answer if it is known, and what each model says.
    """

    test_set: str
    count: int
    chosen: list[tuple[str, Optional[str], list[Said]]]


def answers(sources: Sources, count: int) -> list[AnswersOfSet]:
    """What the models say to the same ``count`` questions of each set."""
    target, retrained = (sources.references.get(role) for role in ("target", "retrained"))
    asked = [("before: target", target), *((f"after: {m.name}", m) for m in sources.models)]
    asked = [(label, m) for label, m in (*asked, ("retrained", retrained)) if m is not None]
    sets = dict.fromkeys(name for model in sources.models for name in _telling_sets(model))
    found = []
    for test_set in sets:
        records = {label: _generations(model, test_set) for label, model in asked}
        questions = next(
            (list(records[label]) for label, m in asked if m.number and records[label]), []
        )
        chosen = []
        for question in spread(questions, count):
            said = [Said(label, m.role, records[label].get(question)) for label, m in asked]
            answers = (each.record["answer"] for each in said if each.record)
            chosen.append((question, next(filter(None, answers), None), said))
        found.append(AnswersOfSet(test_set, len(questions), chosen))
    return found


class Lineage(NamedTuple):
    """How a model was made.

    Attributes:
        model: the model.
        runs: that made it, oldest first: name, record, and which run of an earlier model it is, if any.
        forgotten: names of all forget sets.
    """

    model: ReportedModel
    runs: list[tuple[str, dict[str, Any], Optional[str]]]
    forgotten: list[str]


def lineages(sources: Sources) -> list[Lineage]:
    """How each model was made."""
    known: list[tuple[dict[str, Any], str]] = []
    found = []
    for model in sources.everyone:
        steps = []
        for i, record in enumerate(model.lineage, 1):
            name = f"{i}. {record.get('module', 'run')}"
            earlier = next((owner for other, owner in known if other == record), None)
            known.append((record, f"{name} of {model.name}"))
            steps.append((name, record, earlier))
        found.append(Lineage(model, steps, forgotten(model.record) if steps else []))
    return found


def _forgotten_and_kept(models: Sequence[ReportedModel]) -> tuple[list[str], list[str]]:
    """Names of the test sets to be forgotten, and of those to be kept, a retain set first."""
    sets = list(dict.fromkeys(name for model in models for name in model.sets))
    forgotten = [name for name in sets if models[0].suite.forgets(name)]
    kept = [name for name in sets if name not in forgotten]
    return forgotten, sorted(kept, key=lambda name: not name.startswith("retain"))


def _telling_sets(model: ReportedModel) -> list[str]:
    forgotten, kept = _forgotten_and_kept([model])
    return forgotten + kept[:1]


def _measures_of_sets(
    models: Sequence[ReportedModel], forgotten: bool, direction: str
) -> list[str]:
    """Measures of test sets that are, or are not, to be forgotten, and that are better when lower or higher."""
    sets = [s for model in models for s in model.sets if models[0].suite.forgets(s) == forgotten]
    names = (name for name in measure_names(models) if name.rpartition("/")[0] in sets)
    return [name for name in names if models[0].about(name).direction == direction]


def _ratio_figures(
    name: str, model: ReportedModel, test_set: str, ratios: dict[str, dict[Any, float]]
) -> list[Union[Figure, str]]:
    """Distribution of the truth ratios of a set; if it is to be forgotten, also the shift of each example."""
    found = {role: list(values.values()) for role, values in ratios.items() if values}
    told = "; ".join(
        f"{role}: {len(values)} examples, half of them at or below "
        f"{sorted(values)[(len(values) - 1) // 2]:.3g}, all from {min(values):.3g} to {max(values):.3g}"
        for role, values in found.items()
    )
    title = f"Truth ratios on {test_set}, {model.name}"
    drawn = svg(name, title, told, curves.distribution, found)
    figures: list[Union[Figure, str]] = [
        Figure(drawn, f"{test_set}: share of examples up to each ratio")
    ]
    if not model.suite.forgets(test_set):
        return figures
    before = ratios.get("target", {})
    pairs = {
        role: [(before[key], after) for key, after in ratios.get(role, {}).items() if key in before]
        for role in ("this", "retrained")
    }
    pairs = {role: points for role, points in pairs.items() if points}
    if "this" not in pairs:
        lacks = "no shift, as the target's results hold none of these examples."
        return [*figures, f"{test_set}: {lacks}"]
    larger = sum(after > at_target for at_target, after in pairs["this"])
    told = f"{larger} of {len(pairs['this'])} examples have a larger truth ratio than at the target model"
    title = f"Shift of each example's truth ratio on {test_set}, {model.name}"
    drawn = svg(f"{name}-shift", title, told, curves.shift, pairs)
    return [*figures, Figure(drawn, f"{test_set}: {told}; those above the line")]


def _generations(model: ReportedModel, test_set: str) -> dict[str, dict[str, Any]]:
    """Question -> record of those that the model answered."""
    records = model.tables.get(test_set, [])
    return {r["question"]: r for r in records if r.get("generation") is not None}
