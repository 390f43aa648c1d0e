"""One HTML file that shows what runs and studies found."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing

SUFFIXES = (".html", ".htm")


def report(
    runs: list[str],
    *,
    output: str,
    target: Optional[str] = None,
    retrained: Optional[str] = None,
    forget: Optional[str] = None,
    utility: Optional[str] = None,
    forget_level: Optional[float] = None,
    examples: int = 6,
    title: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Show runs, or a study, in one HTML file that needs no network and no script.

    Args:
        runs: folders: models with test results in them, test results, or studies.
        output: HTML file to write.
        target: results of the model before unlearning; those of the model that the runs were made
            from when not given.
        retrained: results of the model retrained without the forget set; what the tests compared
            with, or the one of the folders that was fine-tuned on retain rows only, when not given.
        forget: measure on the horizontal axis of the forget-utility figure, such as
            forget/probability.
        utility: measure on its vertical axis, such as model_utility.
        forget_level: value of the forget measure at which a study's arms are compared, in place of
            the study's own.
        examples: how many questions of each set to show answers to.
        title: of the page.
        overwrite: replace the output if it exists.
    """
    if Path(output).suffix.lower() not in SUFFIXES:
        raise WagleError(f"report {output} must end in .html")
    if examples < 0:
        raise WagleError(f"examples must be at least 0, got {examples}")
    refuse_existing(Path(output), overwrite, "--overwrite")
    from wagle_pl.core.text import count
    from wagle_pl.study.report.page import write_report
    from wagle_pl.study.report.sources import gather
    from wagle_pl.study.summary import compared_at

    sources = gather(runs, target, retrained)
    if forget_level is not None and not sources.studies:
        raise WagleError("--forget_level is for studies, and there is none among the folders given")
    for study in sources.studies if forget_level is not None else ():
        try:
            study.summary = compared_at(study.summary, study.rows, forget_level)
        except WagleError as error:
            raise WagleError(f"study {study.folder}: {error}") from None
    path = write_report(sources, output, title, forget, utility, examples, overwrite)
    shown = [count(len(sources.models), "run")] if sources.models else []
    if sources.studies:
        shown.append(count(len(sources.studies), "study", "studies"))
    print(f"report of {' and '.join(shown)} written to {path}")


COMMANDS = report
