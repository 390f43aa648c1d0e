"""The page of ``wagle report``: one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing, write_text
from wagle_pl.core.html import element, note, page
from wagle_pl.lab.study.report.models import SECTIONS, Blocks, Options, measure_names
from wagle_pl.lab.study.report.sources import Sources
from wagle_pl.lab.study.report.studies import study_blocks


def write_report(
    sources: Sources, output: str | Path, overwrite: bool = False, **options: Any
) -> Path:
    """Write the page that :func:`render` makes with ``options``, whole or not at all."""
    output = Path(output)
    refuse_existing(output, overwrite, "--overwrite")
    write_text(output, render(sources, **options))
    return output


def render(sources: Sources, title: Optional[str] = None, **options: Any) -> str:
    """The page as text, with the fields of :class:`Options`; equal sources give equal bytes."""
    chosen = Options(**options)
    for axis, name in enumerate(("forget", "utility")):
        measure, known = getattr(chosen, name), measure_names(sources.models)
        what = "these runs"
        if not sources.models:  # the page of a study has the axes of the study
            known, what = [study.axes[axis] for study in sources.studies], "what is reported"
        if measure is not None and measure not in known:
            choices = f"choose one of {', '.join(dict.fromkeys(known))}"
            raise WagleError(f"--{name}: {measure!r} is no measure of {what}; {choices}")
    sections: list[tuple[str, str, Blocks]] = [
        (f"study-{i}", f"Study: {study.name}", study_blocks(study))
        for i, study in enumerate(sources.studies)
    ]
    if sources.models:
        sections += [(name, title, make(sources, chosen)) for name, title, make in SECTIONS]
    names = [entry.name for entry in (*sources.studies, *sources.models)]
    links = (element("a", heading, href=f"#{name}-section") for name, heading, _ in sections)
    left_out = [f"Left out: {folder}: {why}." for folder, why in sources.left_out]
    told = [f"{text[:1].upper()}{text[1:]}." for text in sources.notes if sources.models]
    return page(
        title or f"Unlearning report: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}",
        [
            *map(note, [*left_out, *told]),
            *(
                element("section", element("h2", heading), *blocks, id=f"{name}-section")
                for name, heading, blocks in sections
            ),
        ],
        [element("nav", *links, aria_label="sections")],
    )
