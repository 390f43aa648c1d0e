"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.study.report.html import Content, Markup, element, note
from wagle_pl.study.report.making import making
from wagle_pl.study.report.sections import (
    answers,
    masks,
    measures,
    robustness,
    summary,
    tradeoff,
    truth_ratios,
)
from wagle_pl.study.report.sources import Sources
from wagle_pl.study.report.study import study_section

#: What comes before every page: nothing may be loaded, whatever a name or an answer in it says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(
    sources: Sources,
    output: str | Path,
    title: Optional[str] = None,
    forget: Optional[str] = None,
    utility: Optional[str] = None,
    examples: int = 6,
    overwrite: bool = False,
) -> Path:
    """Write the report, whole or not at all; the same sources make the same bytes.

    Args:
        sources: what to show, see :func:`wagle_pl.study.report.sources.gather`.
        output: file to write.
        title: of the page; made of the names of runs and studies when None.
        forget: measure on the horizontal axis of the forget–utility figure; chosen by what the runs have when None.
        utility: measure on its vertical axis, likewise.
        examples: how many questions of each set to show answers to.
        overwrite: replace the output if it exists.

    Raises:
        WagleError: if the output exists and may not be replaced, or a measure is in no run; without runs, if it is not
            the study's.
    """
    output = Path(output)
    refuse_existing(output, overwrite, "--overwrite")
    for option, name in (("forget", forget), ("utility", utility)):
        _check_measure(sources, option, name)
    page = render(sources, title, forget, utility, examples)
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
    """The page as text, see :func:`write_report`."""
    sections: list[tuple[str, str, Content]] = []
    for i, study in enumerate(sources.studies):
        sections.append((f"study-{i}", f"Study: {study.name}", study_section(study, i)))
    if sources.runs:
        sections += [
            ("summary", "Summary", summary(sources)),
            ("tradeoff", "Forgetting against utility", tradeoff(sources, forget, utility)),
            ("ratios", "Truth ratios", truth_ratios(sources)),
            ("masks", "Masks", masks(sources)),
            ("answers", "Answers", answers(sources, examples)),
            ("robustness", "Robustness", robustness(sources)),
            ("measures", "All measures", measures(sources)),
            ("making", "How the models were made", making(sources)),
        ]
    names = [study.name for study in sources.studies] + [run.name for run in sources.runs]
    title = title or f"Unlearning report: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
    links = [element("a", heading, href=f"#{name}-section") for name, heading, _ in sections]
    body = [
        element("header", element("h1", title), element("nav", *links, aria_label="sections")),
        element("main", *_left_out(sources), *(_section(*section) for section in sections)),
    ]
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element(
            "style",
            Markup(
                resources.files("wagle_pl.study.report")
                .joinpath("style.css")
                .read_text(encoding="utf-8")
            ),
        ),
    ]
    page = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _section(name: str, heading: str, content: Content) -> Markup:
    return element("section", element("h2", heading), content, id=f"{name}-section")


def _left_out(sources: Sources) -> list[Markup]:
    """What was given or looked for, and is not shown."""
    said = [note(f"Left out: {folder}: {why}.") for folder, why in sources.left_out]
    return said + [note(f"{text[:1].upper()}{text[1:]}.") for text in sources.notes if sources.runs]


def _check_measure(sources: Sources, option: str, name: Optional[str]) -> None:
    if name is None:
        return
    known = dict.fromkeys(measure for run in sources.runs for measure in run.metrics)
    if not sources.runs:  # a study's page has the study's own axes
        known = dict.fromkeys(getattr(study, option) for study in sources.studies)
    if name not in known:
        what = "these runs" if sources.runs else "what is reported"
        raise WagleError(
            f"--{option} {name!r} is no measure of {what}; choose one of {', '.join(known)}"
        )
