"""Sections about runs: summary, forgetting against utility, truth ratios, masks, answers, robustness, all measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Optional

from wagle_pl.evaluation.comparison import BETTER, SAME, WORSE, arrow
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.sets import SetMeasures
from wagle_pl.masks import describe_origin
from wagle_pl.study.report import curves, figures
from wagle_pl.study.report.html import Content, Markup, element, markup, note, number, shown, table
from wagle_pl.study.report.sources import Run, Sources, mask_of
from wagle_pl.study.report.svg import figure_element, inline_svg, page_style

_WORDS = {BETTER: "better", WORSE: "worse", SAME: "same"}
_DIRECTIONS = {
    "higher": "higher is better",
    "lower": "lower is better",
    "retrained": "best at the retrained model's",
}
_TRUTH_RATIO = (
    "Truth ratio (TOFU): how likely wrong answers are against a paraphrase of the right one, in its geometric form. "
    "Small: the model prefers the truth; 1: it does not know. Forget quality compares the curves of this and of the "
    "retrained model on the forget set."
)
_UTILITIES = ("model_utility", "ut_average")


# -- summary ----------------------------------------------------------------------------------------------------------


def summary(sources: Sources) -> Content:
    """One row a model: target, retrained, then the runs, with the measures that say most."""
    columns = lead_measures(sources.runs)
    rows = [[_row_name(sources, run), *_cells(sources, run, columns)] for run in sources.everyone]
    header = ["model", *(_measure_head(sources, name) for name in columns)]
    parts: list[Content] = [table(header, rows, kind="numbers summary")]
    if sources.target is not None:
        arrows = f"{BETTER} better, {WORSE} worse than the target model, {SAME} the same. Every measure is in "
        parts.append(note(arrows, element("a", "All measures", href="#measures-section"), "."))
    else:
        parts.append(note("Without the target model's results no arrows say what is better."))
    return parts


def lead_measures(runs: Sequence[Run]) -> list[str]:
    """Measures for a summary: the first two of each set to be forgotten, the first of the first set to be kept, and
    those of the whole."""
    names = measure_names(runs)
    sets = {name.rpartition("/")[0] for name in names} - {""}
    tested = [name for name in _tested(runs) if name in sets]
    forgotten = [name for name in tested if runs[0].suite.forgets(name)]
    kept = [name for name in tested if name not in forgotten]
    columns = []
    for name in forgotten:
        columns += [measure for measure in names if measure.startswith(f"{name}/")][:2]
    for name in sorted(kept, key=lambda name: not name.startswith("retain"))[:1]:
        columns += [measure for measure in names if measure.startswith(f"{name}/")][:1]
    return columns + [measure for measure in names if "/" not in measure]


def measure_names(runs: Sequence[Run]) -> list[str]:
    """Every measure of the runs once, in their order."""
    return list(dict.fromkeys(name for run in runs for name in run.metrics))


def metric(run: Run, name: str) -> Markup:
    """A number of a run's ``metrics.json``."""
    return number(run.metrics.get(name), data_run=run.name, data_measure=name)


def mark(sign: str, than: str) -> Content:
    """An arrow, and what it means for those who do not see it."""
    if not sign:
        return None
    word = _WORDS[sign]
    kind = word if word != "same" else "even"
    return element(
        "span",
        sign,
        element("span", f" {word}", class_="unseen"),
        class_=kind,
        title=f"{word} than {than}" if word != "same" else f"same as {than}",
    )


def _cells(sources: Sources, run: Run, names: Sequence[str]) -> list[Content]:
    """A run's numbers with arrows."""
    cells: list[Content] = []
    for name in names:
        value = run.metrics.get(name)
        sign = ""
        if value is not None and run not in sources.references.values():
            found = {role: other.metrics.get(name) for role, other in sources.references.items()}
            sign = arrow(
                run.about(name).direction, value, found.get("target"), found.get("retrained")
            )
        cells.append([metric(run, name), " ", mark(sign, "the target model")])
    return cells


def _row_name(sources: Sources, run: Run) -> Content:
    if run in sources.references.values():
        return element("span", run.name, class_=f"role {run.name}")
    return [element("span", str(sources.runs.index(run) + 1), class_="role this"), " ", run.name]


def _measure_head(sources: Sources, name: str) -> Content:
    about = sources.runs[0].about(name)
    return element(
        "abbr", breakable(name), title=f"{about.what}; {about.unit}; {_DIRECTIONS[about.direction]}"
    )


def breakable(name: str) -> Markup:
    """A measure's name that may break after a slash or an underscore."""
    text = markup(name)
    return Markup(text.replace("/", "/<wbr>").replace("_", "_<wbr>"))


def _tested(runs: Sequence[Run]) -> list[str]:
    """Names of the test sets, in the order of the test."""
    return list(
        dict.fromkeys(name for run in runs for name in (run.info.get("rows") or run.tables))
    )


def telling_sets(run: Run) -> list[str]:
    """The sets to be forgotten, then the first set to be kept, preferably a retain set."""
    tested = _tested([run])
    forgotten = [name for name in tested if run.suite.forgets(name)]
    kept = sorted(
        (name for name in tested if name not in forgotten),
        key=lambda name: not name.startswith("retain"),
    )
    return forgotten + kept[:1]


# -- all measures -----------------------------------------------------------------------------------------------------


def measures(sources: Sources) -> Content:
    """Every number of every ``metrics.json``, and what is undefined and why."""
    models = sources.everyone
    rows = []
    for name in measure_names(models):
        about = sources.runs[0].about(name)
        said = [
            breakable(name),
            element("small", f"{about.what}. {about.unit}, {_DIRECTIONS[about.direction]}"),
        ]
        rows.append([said, *(_cells(sources, run, [name])[0] for run in models)])
    parts: list[Content] = [
        table(["measure", *(_row_name(sources, run) for run in models)], rows, kind="numbers all")
    ]
    undefined = {run.name: run.undefined for run in models if run.undefined}
    if undefined:
        lines = [
            [run, name, why] for run, found in undefined.items() for name, why in found.items()
        ]
        parts += [element("h3", "Undefined"), table(["model", "measure", "why"], lines)]
    absent = {run.name: run.info["absent_sets"] for run in models if run.info.get("absent_sets")}
    parts += [
        note(f"{run}: no test set {', '.join(sets)}, so none of its measures.")
        for run, sets in absent.items()
    ]
    return parts


# -- forgetting against utility ---------------------------------------------------------------------------------------


def tradeoff(sources: Sources, forget: Optional[str], utility: Optional[str]) -> Content:
    """Every model as a point: how much it forgot, and what it still can do."""
    forget, utility = (
        forget or forget_measure(sources.runs),
        utility or utility_measure(sources.runs),
    )
    if forget is None or utility is None:
        lacks = "measure of forgetting" if forget is None else "measure of utility"
        return note(f"The runs have no {lacks}: no curve. Choose one with --forget and --utility.")
    points, told = [], []
    for run in sources.everyone:
        x, y = (run.metrics.get(name, math.inf) for name in (forget, utility))
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        reference = run in sources.references.values()
        label = run.name if reference else str(sources.runs.index(run) + 1)
        points.append(curves.Marked(x, y, run.name if reference else "this", label))
        name = run.name if reference else f"{label} {run.name}"
        told.append(f"{name}: {forget} {shown(x)}, {utility} {shown(y)}")
    if not any(point.role == "this" for point in points):
        return note(f"No run has a finite number for both {forget} and {utility}: no curve.")
    with page_style():
        figure = curves.forget_utility(
            points, axis_label(sources.runs[0], forget), axis_label(sources.runs[0], utility)
        )
        svg = inline_svg(figure, "tradeoff", "Forgetting against utility", "; ".join(told))
    key = "Numbers are the runs of the summary. "
    level = (
        "The dotted line is the retrained model's forgetting."
        if sources.retrained is not None
        else ""
    )
    return figure_element(svg, f"{key}{level}")


def forget_measure(runs: Sequence[Run]) -> Optional[str]:
    """The first measure of a set to be forgotten that is better when lower; None if there is none."""
    return next(iter(_of_sets(runs, forgotten=True, direction="lower")), None)


def _of_sets(runs: Sequence[Run], forgotten: bool, direction: str) -> list[str]:
    """Measures of test sets that are, or are not, to be forgotten, and of which more, or less, is better."""
    sets = [name for name in _tested(runs) if runs[0].suite.forgets(name) == forgotten]
    names = [name for name in measure_names(runs) if name.rpartition("/")[0] in sets]
    return [name for name in names if runs[0].about(name).direction == direction]


def utility_measure(runs: Sequence[Run]) -> Optional[str]:
    """Model utility, the UT average, or the first measure of a set to be kept, preferably one better when higher."""
    names = measure_names(runs)
    kept = [
        name
        for way in ("higher", "lower")
        for name in _of_sets(runs, forgotten=False, direction=way)
    ]
    return next((name for name in (*_UTILITIES, *kept) if name in names), None)


def axis_label(run: Run, measure: str) -> str:
    """A measure's name and what is better."""
    return f"{measure} ({_DIRECTIONS[run.about(measure).direction]})"


# -- truth ratios -----------------------------------------------------------------------------------------------------


def truth_ratios(sources: Sources) -> Content:
    """How every example's truth ratio moved, figures a run and set."""
    parts: list[Content] = []
    drawn = False
    for i, run in enumerate(sources.runs):
        shown_figures: list[Content] = []
        for name in telling_sets(run):
            roles = {**sources.references, "this": run}
            found = {
                role: ratios for role, other in roles.items() if (ratios := ratios_of(other, name))
            }
            if "this" in found:
                shown_figures += _ratio_figures(f"ratio-{i}-{len(shown_figures)}", name, found, run)
        if shown_figures:
            drawn = True
            title = element("h3", _row_name(sources, run)) if len(sources.runs) > 1 else None
            parts.append([title, element("div", *shown_figures, class_="grid")])
        else:
            parts.append(
                note(f"{run.name}: no truth ratios (they need paraphrased and perturbed answers).")
            )
    return [*parts, note(_TRUTH_RATIO)] if drawn else parts


def ratios_of(run: Run, name: str) -> dict[tuple[str, str], float]:
    """(question, answer) -> truth ratio of a set's examples that have one; empty where none can be had."""
    records = run.tables.get(name, [])
    try:
        ratios = SetMeasures(records).ratios().tolist()
    except Undefined:
        return {}
    pairs = zip(records, ratios, strict=True)
    return {
        (record["question"], record["answer"]): ratio
        for record, ratio in pairs
        if not math.isnan(ratio)
    }


def _ratio_figures(
    name: str, test_set: str, found: dict[str, dict[Any, float]], run: Run
) -> list[Content]:
    """Distribution of a set's truth ratios; where the set is to be forgotten, also the shift of each example."""
    order = {
        role: list(found[role].values())
        for role in ("target", "retrained", "this")
        if role in found
    }
    spans = "; ".join(
        f"{role}: {len(ratios)} examples, half of them at or below {sorted(ratios)[(len(ratios) - 1) // 2]:.3g}, all "
        f"from {min(ratios):.3g} to {max(ratios):.3g}"
        for role, ratios in order.items()
    )
    with page_style():
        figure = curves.distribution(order, "truth ratio")
        svg = inline_svg(figure, name, f"Truth ratios on {test_set}, {run.name}", spans)
    parts: list[Content] = [figure_element(svg, f"{test_set}: share of examples up to each ratio")]
    return (
        [*parts, _shift(f"{name}-shift", test_set, found, run)]
        if run.suite.forgets(test_set)
        else parts
    )


def _shift(name: str, test_set: str, found: dict[str, dict[Any, float]], run: Run) -> Markup:
    """Every example's truth ratio before and after."""
    before = found.get("target", {})
    pairs = {
        role: [(before[key], ratio) for key, ratio in found[role].items() if key in before]
        for role in ("this", "retrained")
        if role in found
    }
    pairs = {role: points for role, points in pairs.items() if points}
    if "this" not in pairs:
        return note(f"{test_set}: no shift, as the target's results hold none of these examples.")
    higher = sum(after > ratio for ratio, after in pairs["this"])
    said = f"{higher} of {len(pairs['this'])} examples have a larger truth ratio than at the target model"
    with page_style():
        figure = curves.shift(pairs, "truth ratio, target", "truth ratio after")
        svg = inline_svg(
            figure, name, f"Shift of each example's truth ratio on {test_set}, {run.name}", said
        )
    return figure_element(svg, f"{test_set}: {said}; those above the line")


# -- masks ------------------------------------------------------------------------------------------------------------


def masks(sources: Sources) -> Content:
    """Where the weights that may move lie, a heat map a run with a mask."""
    parts, without = [], []
    found = [mask_of(run) for run in sources.runs]
    largest = largest_share(mask.grid() for mask in found if mask is not None)
    for i, (run, mask) in enumerate(zip(sources.runs, found, strict=True)):
        if mask is None:
            dense = run.unlearned and not run.last.get("mask") and not run.last.get("adapter")
            why = "every weight could move (dense)" if dense else "no mask is known"
            without.append(note(f"{run.name}: {why}."))
            continue
        caption = [
            _row_name(sources, run),
            ": ",
            number(mask.density, f"{mask.density:.2%}"),
            f" of {mask.total:,} weights selected by {describe_origin(mask.metadata)}",
        ]
        parts.append(mask_figure(f"mask-{i}", run.name, mask.grid(), caption, largest))
    return [element("div", *parts, class_="grid") if parts else None, *without]


def largest_share(grids: Iterable[figures.Grid]) -> float:
    """The largest share of any cell: the end of one colour scale for all; 1 without cells."""
    return (
        max((share for grid in grids for row in grid.values() for share in row.values()), default=0)
        or 1.0
    )


def mask_figure(
    name: str, title: str, grid: figures.Grid, caption: Content, largest: float
) -> Markup:
    """Heat map of one mask by layer × module; ``largest`` is the share at the end of its colour scale."""
    with page_style():
        figure = figures.mask_heatmap({"": grid}, title=" ", scale_to=largest)
        svg = inline_svg(
            figure,
            name,
            f"Share of weights selected by layer and module: {title}",
            figures.mask_text({title: grid}),
        )
    return figure_element(svg, caption)


# -- answers ----------------------------------------------------------------------------------------------------------


def answers(sources: Sources, count: int) -> Content:
    """What the models say to the same questions, side by side."""
    asked = {
        "before: target": sources.target,
        **{f"after: {run.name}": run for run in sources.runs},
    }
    asked["retrained"] = sources.retrained
    models = {label: run for label, run in asked.items() if run is not None}
    parts: list[Content] = []
    for name in dict.fromkeys(name for run in sources.runs for name in telling_sets(run)):
        said = {label: _generations(run, name) for label, run in models.items()}
        questions = next(
            (list(found) for label, found in said.items() if found and label.startswith("after")),
            [],
        )
        if not questions:
            parts.append(note(f"No answers were generated on {name}."))
            continue
        chosen = [questions[i] for i in spaced(len(questions), count)]
        parts.append(element("h3", f"{name}: {len(chosen)} of {len(questions)}"))
        parts += [
            _exchange(question, {label: found.get(question) for label, found in said.items()})
            for question in chosen
        ]
    return parts


def spaced(length: int, count: int) -> list[int]:
    """``count`` indices spread evenly over ``length``, all if there are fewer.

    >>> spaced(10, 3), spaced(2, 3)
    ([0, 3, 6], [0, 1])
    """
    count = min(length, count)
    return [i * length // count for i in range(count)]


def _generations(run: Run, name: str) -> dict[str, dict[str, Any]]:
    records = run.tables.get(name, [])
    return {
        record["question"]: record for record in records if record.get("generation") is not None
    }


def _exchange(question: str, said: dict[str, Optional[dict[str, Any]]]) -> Markup:
    """A question and what each model says to it."""
    truth = next(
        (record["answer"] for record in said.values() if record and record["answer"]), None
    )
    boxes: list[tuple[str, Content, Content]] = [("true answer", truth, None)] if truth else []
    for label, record in said.items():
        if record is None:
            boxes.append((label, element("em", "not asked"), None))
            continue
        recall = record.get("rougeL_recall")
        score = None if recall is None else element("small", "ROUGE-L ", number(recall))
        boxes.append((label, record["generation"].strip() or element("em", "empty"), score))
    cells = [
        element(
            "div",
            element("dt", label, " ", score),
            element("dd", text, dir="auto"),
            class_=_kind(label),
        )
        for label, text, score in boxes
    ]
    return element(
        "article", element("h4", question, dir="auto"), element("dl", *cells), class_="exchange"
    )


def _kind(label: str) -> str:
    return {"true": "truth", "before:": "target", "after:": "this", "retrained": "retrained"}[
        label.split(" ")[0]
    ]


# -- robustness -------------------------------------------------------------------------------------------------------


def robustness(sources: Sources) -> Content:
    """What attacks bring back."""
    parts: list[Content] = []
    for run in sources.runs:
        if not run.robustness:
            parts.append(
                note(f"{run.name}: no attacks were run (wagle test --model.robustness all).")
            )
            continue
        rows = [_attack(row) for row in run.robustness]
        header = ["attack", "option", "measure", "before", "after", "target", "retrained"]
        parts.append(table(header, rows, caption=_row_name(sources, run), kind="numbers mixed"))
    lines = [row for run in sources.runs for row in run.robustness]
    if lines:
        parts.append(note(f"{WORSE}: the attack undid forgetting, {BETTER}: it did not."))
    if any(
        row.get(f"{name}_attacked") is False for row in lines for name in ("target", "retrained")
    ):
        parts.append(
            note(
                "* without the attack: only results of that model were given to the test, and no model."
            )
        )
    return parts


def _attack(row: dict[str, Any]) -> list[Content]:
    """The cells of one line of ``robustness.json``."""

    def value(name: str) -> Content:
        found = row.get(name)
        text = number(found) if found is None or isinstance(found, (int, float)) else str(found)
        return [text, "*" if found is not None and row.get(f"{name}_attacked") is False else None]

    before, after, retrained = (row.get(name) for name in ("before", "after", "retrained"))
    numeric = all(isinstance(each, (int, float)) for each in (before, after))
    kept = retrained if isinstance(retrained, (int, float)) else None
    sign = arrow(row.get("direction", "lower"), after, before, kept) if numeric else ""
    why = element("small", str(row["why"])) if after is None and row.get("why") else None
    return [
        str(row.get("attack", "")),
        str(row.get("option") or ""),
        [breakable(str(row.get("measure", ""))), element("small", str(row.get("unit", "")))],
        value("before"),
        [value("after"), " ", mark(sign, "before the attack"), why],
        value("target"),
        value("retrained"),
    ]
