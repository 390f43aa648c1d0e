"""``wagle report``: one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from wagle_pl.cli import LazyModule
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing, write_text
from wagle_pl.core.html import element, note, page
from wagle_pl.core.text import count

models = LazyModule("wagle_pl.lab.study.report.models")
reported = LazyModule("wagle_pl.lab.study.report.sources")
studies = LazyModule("wagle_pl.lab.study.report.studies")
summary = LazyModule("wagle_pl.lab.study.summary")


def report(
    runs: list[str],
    *,
    output: str,
    target: Optional[str] = None,
    retrained: Optional[str] = None,
    forget_level: Optional[float] = None,
    examples: int = 6,
    title: Optional[str] = None,
    redact: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the results of runs or studies to one HTML file, without scripts or network access.

    Args:
        runs: folders of test results, of models that contain test results, or of studies.
        output: HTML file to write.
        target: results of the model before unlearning; by default those of the model that the runs
            started from.
        retrained: results of the model retrained without the forget set; by default those that the
            tests were compared with, or those of the folder fine-tuned on retain rows only.
        forget_level: value of the forget measure at which a study's arms are compared, instead of
            the study's own.
        examples: number of questions per set whose answers are shown.
        title: title of the page.
        redact: show digests of rows, and no text of them: no question, answer or generation, and
            no options of the runs.
    """
    path = Path(output)
    if path.suffix.lower() not in (".html", ".htm"):
        raise WagleError(f"must end in .html, got {output}", option="--output")
    if "" in runs:
        raise WagleError("a folder's name is empty", "runs")
    if examples < 0:
        raise WagleError(f"must be at least 0, got {examples}", option="--examples")
    refuse_existing(path, overwrite, "--overwrite")
    sources = reported.gather(runs, target, retrained)
    if forget_level is not None and not sources.studies:
        message = "it is for studies, and there is none among the folders given"
        raise WagleError(message, option="--forget_level")
    for study in sources.studies if forget_level is not None else ():
        try:
            study.summary = summary.compared_at(study.summary, study.rows, forget_level)
        except WagleError as error:
            raise WagleError(f"study {study.folder}: {error}") from None
    sources.redact = redact
    write_text(path, render(sources, title, examples))
    kinds = (sources.models, "run", None), (sources.studies, "study", "studies")
    shown = " and ".join(count(len(items), *words) for items, *words in kinds if items)
    print(f"report of {shown} written to {path}")


def render(sources: reported.Sources, title: Optional[str] = None, examples: int = 6) -> str:  # type: ignore[name-defined]
    """The page as text; equal sources give equal bytes."""
    sections: list[tuple[str, str, models.Blocks]] = [  # type: ignore[name-defined]
        (f"study-{i}", f"Study: {study.name}", studies.study_blocks(study))
        for i, study in enumerate(sources.studies)
    ]
    if sources.models:
        sources.examples = examples
        sections += [(name, heading, make(sources)) for name, heading, make in models.SECTIONS]
    names = [entry.name for entry in (*sources.studies, *sources.models)]
    links = (element("a", heading, href=f"#{name}-section") for name, heading, _ in sections)
    notes = [f"Left out: {folder}: {why}." for folder, why in sources.left_out]
    notes += [f"{text[:1].upper()}{text[1:]}." for text in sources.notes if sources.models]
    content = [
        element("section", element("h2", heading), *blocks, id=f"{name}-section")
        for name, heading, blocks in sections
    ]
    return page(
        title or f"Unlearning report: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}",
        [*map(note, notes), *content],
        [element("nav", *links, aria_label="sections")],
    )
