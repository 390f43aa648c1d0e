"""The page: one self-contained HTML file, made from the templates in ``templates/``, and what its
sections show of models and of studies: measures, figures, answers."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import yaml
from jinja2 import Template
from markupsafe import Markup, escape

from wagle_pl.core.environment import versions
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing, write_text
from wagle_pl.core.html import templates
from wagle_pl.core.text import short_number
from wagle_pl.data.rows import spread
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.measures import Records
from wagle_pl.evaluation.results import BETTER, SAME, WORSE, arrow
from wagle_pl.lab.study import recovery
from wagle_pl.lab.study.report import curves
from wagle_pl.lab.study.report.figures import largest_share, mask_heatmap, svg
from wagle_pl.lab.study.report.sources import ReportedModel, Sources, StudyResults, reference_points
from wagle_pl.lab.study.text import about, by_objective, marked_name, progress, rates_of
from wagle_pl.masks import WeightMask, describe_origin
from wagle_pl.masks.grid import mask_text
from wagle_pl.unlearning.export import forgotten

#: Sections about models, each with a template of its name, and their headings.
SECTIONS = {
    "summary": "Summary",
    "tradeoff": "Forgetting against utility",
    "ratios": "Truth ratios",
    "masks": "Masks",
    "answers": "Answers",
    "robustness": "Robustness",
    "measures": "All measures",
    "making": "How the models were made",
}
DIRECTIONS = {
    "higher": "higher is better",
    "lower": "lower is better",
    "retrained": "best at the retrained model's",
}
_UTILITIES = ("model_utility", "ut_average")
#: Columns of a study's table of all runs.
_SHOWN = (
    *("objective", "mask", "density", "lr", "seed", "step", "forget", "utility", "seconds", "note"),
)
_DENSE = "dense"  # the mask that selects everything: what the others are compared with

Models = Sequence[ReportedModel]
Ratios = dict[tuple[str, str], float]  # (question, answer) -> truth ratio
Row = Mapping[str, Any]  # of a study's table


class Figure(NamedTuple):
    """A figure and its caption."""

    svg: Markup
    caption: str


def write_report(
    sources: Sources, output: str | Path, overwrite: bool = False, **options: Any
) -> Path:
    """Write the page that :func:`render` makes with ``options``, whole or not at all."""
    output = Path(output)
    refuse_existing(output, overwrite, "--overwrite")
    write_text(output, render(sources, **options))
    return output


def render(
    sources: Sources,
    title: Optional[str] = None,
    forget: Optional[str] = None,
    utility: Optional[str] = None,
    examples: int = 6,
) -> str:
    """The page as text, with the options of ``wagle report``; equal sources give equal bytes."""
    for axis, (option, measure) in enumerate((("forget", forget), ("utility", utility))):
        known, what = measure_names(sources.models), "these runs"
        if not sources.models:  # the page of a study has the axes of the study
            known, what = [each.axes[axis] for each in sources.studies], "what is reported"
        if measure is not None and measure not in known:
            choices = f"choose one of {', '.join(dict.fromkeys(known))}"
            raise WagleError(f"--{option} {measure!r} is no measure of {what}; {choices}")
    names = [each.name for each in (*sources.studies, *sources.models)]
    more = " …" if len(names) > 4 else ""
    shown: dict[str, Any] = {}
    if sources.models:
        masks = {model.name: model.mask for model in sources.models if model.mask is not None}
        shown = {
            "lead_measures": lead_measures(sources.models),
            "measures": measure_names(sources.everyone),
            "tradeoff": tradeoff(sources, forget, utility),
            "truth_ratios": truth_ratios(sources),
            "heatmaps": heatmaps(masks, "mask"),
            "answers": answers(sources, examples),
            "same_runs": same_runs(sources.everyone),
        }
    shown["studies"] = [
        shown_of_study(study, f"study-{i}") for i, study in enumerate(sources.studies)
    ]
    return template("page.html.j2").render(
        sources=sources,
        title=title or f"Unlearning report: {', '.join(names[:4])}{more}",
        sections=SECTIONS if sources.models else {},
        directions=DIRECTIONS,
        versions=versions(),
        **shown,
    )


def template(name: str) -> Template:
    """A template of the report, with the functions that templates call."""
    environment = templates("wagle_pl.lab.study.report")
    environment.globals |= {"BETTER": BETTER, "WORSE": WORSE, "SAME": SAME, "GIB": 2**30}
    environment.filters |= {
        "attack_sign": _attack_sign,
        "breakable": lambda name: Markup(re.sub("([/_])", r"\1<wbr>", str(escape(name)))),
        "forgotten": lambda model: forgotten(model.record) if model.lineage else [],
        "options": _options,
        "origin": describe_origin,
        "yaml": lambda config: yaml.safe_dump(config, sort_keys=False).rstrip(),
    }
    return environment.get_template(name)


def _attack_sign(row: Mapping[str, Any]) -> str:
    """Whether a line of ``robustness.json`` is better after the attack."""
    before, after, retrained = (
        value if isinstance(value := row.get(name), (int, float)) else None
        for name in ("before", "after", "retrained")
    )
    return "" if after is None else arrow(row.get("direction", "lower"), after, before, retrained)


def _options(value: Any) -> str:
    """Plain data in a line: the class first, then its options.

    >>> _options({"class": "NPO", "beta": 0.1, "retain": {"class": "NLL"}})
    'NPO, beta 0.1, retain (NLL)'
    """
    if not isinstance(value, Mapping):
        return "" if value is None else str(value)
    parts = [str(value["class"])] if "class" in value else []
    for key, option in value.items():
        nested = isinstance(option, Mapping)
        if key != "class":
            parts.append(f"{key} ({_options(option)})" if nested else f"{key} {option}")
    return ", ".join(parts)


# -- models ----------------------------------------------------------------------------------------


def measure_names(models: Models, sets: Optional[Collection[str]] = None) -> list[str]:
    """Every measure of the models once, in their order; those of some test sets if given."""
    names = dict.fromkeys(name for model in models for name in model.metrics)
    return [name for name in names if sets is None or name.rpartition("/")[0] in sets]


def test_sets(models: Models, forgotten: bool) -> list[str]:
    """Names of the test sets that are, or are not, to be forgotten; retain sets first."""
    names = dict.fromkeys(name for model in models for name in model.sets)
    found = [name for name in names if models[0].suite.forgets(name) == forgotten]
    return sorted(found, key=lambda name: not name.startswith("retain"))


def telling_sets(model: ReportedModel) -> list[str]:
    """The test sets that are to be forgotten, and the first one that is not."""
    return [*test_sets([model], True), *test_sets([model], False)[:1]]


def lead_measures(models: Models) -> list[str]:
    """Measures of a summary: two of each set to forget, one of sets to keep, all without a set."""
    forgotten = (measure_names(models, [name])[:2] for name in test_sets(models, True))
    kept = (measure_names(models, [name]) for name in test_sets(models, False))
    return [*chain(*forgotten), *[*chain(*kept)][:1], *measure_names(models, [""])]


def tradeoff_measures(models: Models) -> tuple[Optional[str], Optional[str]]:
    """The first measure of a set to be forgotten that is better when lower; and model utility, the
    UT average, or the first measure of a set to be kept, preferably better when higher."""

    def of_sets(forgotten: bool, direction: str) -> list[str]:
        names = measure_names(models, test_sets(models, forgotten))
        return [name for name in names if models[0].about(name).direction == direction]

    whole = [name for name in _UTILITIES if name in measure_names(models)]
    utilities = [*whole, *of_sets(False, "higher"), *of_sets(False, "lower")]
    return next(iter(of_sets(True, "lower")), None), next(iter(utilities), None)


def tradeoff(sources: Sources, forget: Optional[str], utility: Optional[str]) -> Union[Figure, str]:
    """Every model as a point, or why there is no such figure."""
    usual = tradeoff_measures(sources.models)
    forget, utility = forget or usual[0], utility or usual[1]
    if forget is None or utility is None:
        lacks = "forgetting" if forget is None else "utility"
        advice = "Choose one with --forget and --utility."
        return f"The runs have no measure of {lacks}: no curve. {advice}"
    points, lines = [], []
    for model in sources.everyone:
        x, y = (model.metrics.get(name, math.inf) for name in (forget, utility))
        if math.isfinite(x) and math.isfinite(y):
            label = str(model.number or model.name)
            points.append(curves.ModelPoint(x, y, model.role, label))
            name = f"{label} {model.name}" if model.number else label
            lines.append(f"{name}: {forget} {short_number(x)}, {utility} {short_number(y)}")
    if not any(point.role == "this" for point in points):
        return f"No run has a finite number for both {forget} and {utility}: no curve."
    about = sources.models[0].about
    labels = [f"{name} ({DIRECTIONS[about(name).direction]})" for name in (forget, utility)]
    title = "Forgetting against utility"
    drawn = svg("tradeoff", title, "; ".join(lines), curves.forget_utility, points, *labels)
    level = " The dotted line is the retrained model's forgetting."
    caption = "Numbers are the runs of the summary."
    return Figure(drawn, caption + level * ("retrained" in sources.references))


def truth_ratios(sources: Sources) -> list[tuple[ReportedModel, list[Union[Figure, str]]]]:
    """For each model, figures of the truth ratios of its :func:`telling_sets`."""
    found = []
    for model in sources.models:
        figures: list[Union[Figure, str]] = []
        for test_set in telling_sets(model):
            roles = {**sources.references, "this": model}
            ratios = {role: ratios_of(other, test_set) for role, other in roles.items()}
            if ratios["this"]:
                name = f"ratio-{model.number}-{len(figures)}"
                figures.append(_distribution(name, test_set, model.name, ratios))
                if model.suite.forgets(test_set):
                    figures.append(_shift(name, test_set, model.name, ratios))
        found.append((model, figures))
    return found


def ratios_of(model: ReportedModel, test_set: str) -> Ratios:
    """Truth ratios of the examples of a set that have one; empty if none has."""
    records = model.tables.get(test_set, [])
    try:
        ratios = Records(records).truth_ratios().tolist()
    except Undefined:
        return {}
    keys = ((record["question"], record["answer"]) for record in records)
    return {key: ratio for key, ratio in zip(keys, ratios, strict=True) if not math.isnan(ratio)}


def _distribution(name: str, test_set: str, model: str, ratios: Mapping[str, Ratios]) -> Figure:
    found = {role: list(values.values()) for role, values in ratios.items() if values}
    said = "{}: {} examples, half of them at or below {:.3g}, all from {:.3g} to {:.3g}".format
    description = "; ".join(
        said(role, len(values), statistics.median_low(values), min(values), max(values))
        for role, values in found.items()
    )
    title = f"Truth ratios on {test_set}, {model}"
    drawn = svg(name, title, description, curves.distribution, found)
    return Figure(drawn, f"{test_set}: share of examples up to each ratio")


def _shift(
    name: str, test_set: str, model: str, ratios: Mapping[str, Ratios]
) -> Union[Figure, str]:
    """Truth ratio of each example before and after, or why there is no such figure."""
    before = ratios.get("target", {})
    pairs: dict[str, list[tuple[float, float]]] = {}
    for role in ("this", "retrained"):
        shared = {key: after for key, after in ratios.get(role, {}).items() if key in before}
        if shared:
            pairs[role] = [(before[key], after) for key, after in shared.items()]
    if "this" not in pairs:
        return f"{test_set}: no shift, as the target's results hold none of these examples."
    larger = sum(after > ratio for ratio, after in pairs["this"])
    share = f"{larger} of {len(pairs['this'])} examples"
    description = f"{share} have a larger truth ratio than at the target model"
    title = f"Shift of each example's truth ratio on {test_set}, {model}"
    drawn = svg(f"{name}-shift", title, description, curves.shift, pairs)
    return Figure(drawn, f"{test_set}: {description}; those above the line")


def heatmaps(masks: Mapping[str, WeightMask], name: str) -> dict[str, Markup]:
    """Title -> heat map of each mask, all on one colour scale; their ids begin with ``name``."""
    grids = {title: mask.grid() for title, mask in masks.items()}
    largest = largest_share(grids.values())
    found = {}
    for i, (title, grid) in enumerate(grids.items()):
        what = f"Share of weights selected by layer and module: {title}"
        text = mask_text({title: grid})
        found[title] = svg(f"{name}-{i}", what, text, mask_heatmap, {"": grid}, "", largest)
    return found


def answers(sources: Sources, count: int) -> dict[str, dict[str, Any]]:
    """What all models say to the same questions: test set -> ``asked``, the number of questions;
    ``models``, (label, model) of each; ``chosen``, some questions -> label -> record."""
    target, retrained = (sources.references.get(role) for role in ("target", "retrained"))
    after = [(f"after: {model.name}", model) for model in sources.models]
    models = [("before: target", target), *after, ("retrained", retrained)]
    models = [(label, model) for label, model in models if model is not None]
    found = {}
    for test_set in dict.fromkeys(name for m in sources.models for name in telling_sets(m)):
        records = {label: model.generations(test_set) for label, model in models}
        asked = next((list(records[label]) for label, _ in after if records[label]), [])
        chosen = {
            question: {label: said[question] for label, said in records.items() if question in said}
            for question in spread(asked, count)
        }
        found[test_set] = {"asked": len(asked), "models": models, "chosen": chosen}
    return found


def same_runs(models: Models) -> dict[tuple[str, int], str]:
    """(name of a model, number of a run in its lineage) -> the same run of an earlier model."""
    known: list[tuple[dict[str, Any], str]] = []
    found = {}
    for model in models:
        for i, run in enumerate(model.lineage, 1):
            if earlier := next((name for other, name in known if other == run), None):
                found[model.name, i] = earlier
            known.append((run, f"{i}. {run.get('module', 'run')} of {model.name}"))
    return found


# -- studies ---------------------------------------------------------------------------------------


def shown_of_study(study: StudyResults, name: str) -> dict[str, Any]:
    """The variables of a study's template; its ids in the page begin with ``name``."""
    summary = study.summary
    runs: dict[str, list[Row]] = {row["run"]: [] for row in study.rows}  # in the table's order
    for row in sorted(study.rows, key=itemgetter("step")):
        runs[row["run"]].append(row)
    headline = {}
    for objective, arms in by_objective(summary).items() if summary.get("headline") else ():
        cells = [(marked_name(arm), compared(arm)) for arm in arms]
        used = [name for name in cells[0][1] if any(row[name] is not None for _, row in cells)]
        headline[objective] = (used, cells)
    masks, unread = {}, []
    for file in sorted((study.folder / "masks").glob("*.safetensors")):
        try:
            mask = WeightMask.load(file)
            mask.grid()  # reads all of it
            masks[file.stem] = mask
        except WagleError as error:
            unread.append(str(error))
    heat = heatmaps(masks, f"{name}-mask")
    ends = summary.get("ends") or []
    return {
        "study": study,
        "id": name,
        "runs": runs,
        "columns": [c for c in _SHOWN if any(row.get(c) is not None for row in study.rows)],
        "settings": settings(study),
        "progress": progress(summary),
        "headline": headline,
        "about": about(summary) if headline else [],
        "overview": _curves_svg(f"{name}-overview", "Mean curve of each arm", mean_curves(summary)),
        "ends": recovery.tables(ends),
        "about_ends": recovery.about(ends) if ends else [],
        "recovery": {
            attack: _curves_svg(f"{name}-recovery-{i}", f"Recovery by {attack}", drawing)
            for i, (attack, drawing) in enumerate(recovery_curves(summary).items())
        },
        "panels": arm_panels(study, runs, name),
        "masks": {title: (mask, heat[title]) for title, mask in masks.items()},
        "unread": unread,
    }


def settings(study: StudyResults) -> dict[str, str]:
    """What the runs have in common and what differs: name in the plural -> values."""
    names = {"density": "densities", "lr": "learning rates"}
    found = {}
    for column in ("objective", "mask", "density", "lr", "seed"):
        values = {row[column]: None for row in study.rows if row.get(column) is not None}
        numeric = all(isinstance(value, (int, float)) for value in values)
        texts = [f"{value:g}" for value in sorted(values)] if numeric else map(str, values)
        found[names.get(column, f"{column}s")] = ", ".join(texts)
    return found


def compared(arm: Mapping[str, Any]) -> dict[str, Any]:
    """An arm of ``study.json`` by columns of ``study.md``; None where there is nothing."""
    area, equal_steps = arm.get("area") or {}, arm.get("equal_steps") or {}
    return {
        "utility": arm if arm.get("mean") is not None else None,
        "seeds": f"{arm['n']}/{arm['seeds']}" if arm.get("seeds") is not None else None,
        "reach": arm if arm.get("reached") is not None else None,
        "against dense": arm.get("verdict") or None,
        "difference": arm.get("difference"),
        "p": arm["p"] if arm.get("p") is not None else arm.get("why") or None,
        "equal steps": equal_steps.get("difference"),
        "equal steps: p": equal_steps.get("p"),
        "area": area if area.get("mean") is not None else None,
        "area: difference": area.get("difference"),
        "area: p": area.get("p"),
        "lr": rates_of(arm) or None,
        "steps": arm.get("steps"),
        "MU": arm.get("model_utility"),
        "UE": arm.get("ue_average"),
        "UT": arm.get("ut_average"),
    }


def mean_curves(summary: Mapping[str, Any]) -> Optional[tuple[Any, ...]]:
    """Arguments of :func:`curves.study_overview` for the mean curve of each arm; None if no arm has
    one yet. The arms with the best utility at equal forgetting have the plainest lines."""
    arms: dict[str, dict[str, Any]] = {}
    for objective, ranking in by_objective(summary).items() if summary.get("headline") else ():
        curved = {arm["mask"]: arm["curve"] for arm in ranking if arm.get("curve")}
        arms |= {objective: curved} if curved else {}
    if not arms:
        return None
    axes = (summary["forget"], summary["utility"])
    references = reference_points(summary, axes)
    return arms, _DENSE, references, summary.get("forget_level"), axes


def recovery_curves(summary: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Attack -> arguments of :func:`curves.study_overview` for the arms' mean curves of recovery."""
    arms: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in summary.get("ends") or ():
        if entry.get("curve"):
            panel = arms.setdefault(entry["what"], {}).setdefault(entry["objective"], {})
            panel[entry["mask"]] = entry["curve"]
            panel |= {"retrained": entry["retrained_curve"]} if entry["retrained_curve"] else {}
    labels = ("steps of relearning", "forget/probability")
    return {attack: (panels, _DENSE, {}, None, labels) for attack, panels in arms.items()}


def _curves_svg(name: str, title: str, drawing: Optional[tuple[Any, ...]]) -> Optional[Markup]:
    if drawing is None:
        return None
    description = ". ".join(
        f"{objective}, {mask}: from {_pair(points[0])} to {_pair(points[-1])}"
        for objective, panel in drawing[0].items()
        for mask, points in panel.items()
    )
    return svg(name, title, description, curves.study_overview, *drawing)


def arm_panels(
    study: StudyResults, runs: Mapping[str, Sequence[Row]], name: str
) -> dict[str, dict[str, Markup]]:
    """Objective -> mask -> figure of its runs; all of one objective have the same axes."""
    rates = sorted({row["lr"] for row in study.rows})
    arms: dict[str, dict[str, list[curves.Line]]] = {}
    for run in runs.values():
        rate, by_mask = run[0]["lr"], arms.setdefault(run[0]["objective"], {})
        pairs = [(test.get("forget"), test.get("utility")) for test in run]
        if points := [pair for pair in pairs if None not in pair and all(map(math.isfinite, pair))]:
            line = curves.Line(points, f"lr {rate:g}", rates.index(rate))
            by_mask.setdefault(run[0]["mask"], []).append(line)
    references = study.references
    level = study.summary.get("forget_level", references.get("retrained", (None,))[0])
    found: dict[str, dict[str, Markup]] = {}
    for i, (objective, by_mask) in enumerate(arms.items()):
        points = [point for lines in by_mask.values() for line in lines for point in line.points]
        bounds = curves.bounds_of([*points, *references.values()])
        found[objective] = {}
        for j, (mask, lines) in enumerate(by_mask.items()):
            lines = sorted(lines, key=attrgetter("group"))
            title = f"Forgetting against utility, {objective}, {mask}"
            description = ". ".join(
                f"{line.label}: {', '.join(map(_pair, line.points))}" for line in lines
            )
            dense = [line.points for line in by_mask.get(_DENSE, ()) if mask != _DENSE]
            drawing = (lines, dense, references, level, bounds, study.axes)
            figure = svg(f"{name}-{i}-{j}", title, description, curves.study_panel, *drawing)
            found[objective][mask] = figure
    return found


def _pair(point: Sequence[float]) -> str:
    return f"({short_number(point[0])}, {short_number(point[1])})"
