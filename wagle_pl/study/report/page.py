"""The page: one HTML file that needs nothing else, made of the templates in ``templates/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from wagle_pl.core.environment import versions
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.core.text import count, short_number
from wagle_pl.evaluation.comparison import BETTER, SAME, WORSE, arrow
from wagle_pl.masks import describe_origin
from wagle_pl.study.report import sections
from wagle_pl.study.report.sources import Sources
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


def write_report(
    sources: Sources, output: str | Path, overwrite: bool = False, **options: Any
) -> Path:
    """Write the page that :func:`render` makes with ``options``, whole or not at all.

    Raises:
        WagleError: if the output exists and may not be replaced, or as :func:`render` does.
    """
    output = Path(output)
    refuse_existing(output, overwrite, "--overwrite")
    page = render(sources, **options)
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return output


def render(
    sources: Sources,
    title: Optional[str] = None,
    forget: Optional[str] = None,
    utility: Optional[str] = None,
    examples: int = 6,
) -> str:
    """The page as text; the same sources make the same bytes.

    Args:
        sources: what to show, see :func:`wagle_pl.study.report.sources.gather`.
        title: of the page; made of the names of models and studies when None.
        forget: measure on the horizontal axis of the forget–utility figure; see
            :func:`wagle_pl.study.report.sections.tradeoff_measures` when None.
        utility: measure on its vertical axis, likewise.
        examples: how many questions of each set to show answers to.

    Raises:
        WagleError: if no model has a measure; without models, if it is not the study's.
    """
    for axis, (option, measure) in enumerate((("forget", forget), ("utility", utility))):
        known, what = sections.measure_names(sources.models), "these runs"
        if not sources.models:  # the page of a study has the axes of the study
            known, what = [each.axes[axis] for each in sources.studies], "what is reported"
        if measure is not None and measure not in known:
            choices = ", ".join(dict.fromkeys(known))
            raise WagleError(
                f"--{option} {measure!r} is no measure of {what}; choose one of {choices}"
            )
    names = [each.name for each in (*sources.studies, *sources.models)]
    more = " …" if len(names) > 4 else ""
    shown: dict[str, Any] = {}
    if sources.models:
        shown = sections.shown_of_models(sources, forget, utility, examples)
    shown["studies"] = [
        sections.shown_of_study(study, f"study-{i}") for i, study in enumerate(sources.studies)
    ]
    return template("page.html.j2").render(
        sources=sources,
        title=title or f"Unlearning report: {', '.join(names[:4])}{more}",
        sections=SECTIONS if sources.models else {},
        directions=sections.DIRECTIONS,
        versions=versions(),
        **shown,
    )


def template(name: str) -> Template:
    """A template of the report, with the functions that templates call."""
    environment = Environment(
        loader=PackageLoader("wagle_pl.study.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"BETTER": BETTER, "WORSE": WORSE, "SAME": SAME, "GIB": 2**30}
    environment.filters |= {
        "attack_sign": _attack_sign,
        "breakable": _breakable,
        "count": count,
        "digits": repr,
        "forgotten": lambda model: forgotten(model.record) if model.lineage else [],
        "options": _options,
        "origin": describe_origin,
        "short_number": short_number,
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


def _breakable(name: str) -> Markup:
    """A measure's name that may break after a slash or an underscore."""
    return Markup(str(escape(name)).replace("/", "/<wbr>").replace("_", "_<wbr>"))


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
