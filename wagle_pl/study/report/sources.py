"""What runs and studies wrote, read for the report; whatever is missing is noted, never made up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation.results import INFO_FILE, METRICS_FILE, Results, folder_of, read_json
from wagle_pl.evaluation.robustness import ROBUSTNESS_FILE
from wagle_pl.evaluation.sets import Table
from wagle_pl.evaluation.suites import Info, Suite, find_suite
from wagle_pl.evaluation.tables import load_table, table_key
from wagle_pl.lm.models import RECORD_FILE
from wagle_pl.masks import WeightMask

log = logging.getLogger(__name__)

STUDY_TABLE, STUDY_FILE = "study.parquet", "study.json"
TEST_FOLDER = "test"  # of a model folder, where its test results are


@dataclass
class Run:
    """One model's test results, and what made the model.

    Attributes:
        name: how the report calls it.
        results: what the test wrote.
        info: content of ``metrics.info.json``; empty without one.
        record: content of the model folder's ``wagle.json``; empty without one.
        robustness: rows of ``robustness.json``; empty without one.
        notes: what is missing or cannot be read, in words.
    """

    name: str
    results: Results
    info: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    robustness: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """Name -> number, as in ``metrics.json``."""
        return self.results.metrics

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The runs that made the model, oldest first."""
        return list(self.record.get("lineage", ()))

    @property
    def last(self) -> dict[str, Any]:
        """The run that made the model; empty if unknown."""
        return self.lineage[-1] if self.lineage else {}

    @property
    def unlearned(self) -> bool:
        """Whether an objective made the model forget."""
        return bool(self.last.get("objective"))

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Test set -> records of its rows; empty if they cannot be read."""
        try:
            return self.results.tables
        except WagleError as error:
            self.notes.append(str(error))
            return {}

    @cached_property
    def fingerprint(self) -> Optional[str]:
        """Of the model that was tested, from its tables; None if they do not say."""
        import pyarrow

        for file in (
            sorted(self.results.path.glob("*.parquet")) if self.results.path.is_dir() else ()
        ):
            try:
                return table_key(file).get("model")
            except (pyarrow.ArrowInvalid, OSError, ValueError):
                return None  # what is wrong with the file is said where its rows are needed
        return None

    @cached_property
    def suite(self) -> Suite:
        """The suite that measured; a general one where the sidecar does not say, or names a class of the user's."""
        try:
            return find_suite(self.info.get("suite", "generic"))
        except WagleError:
            return Suite()

    def about(self, measure: str) -> Info:
        """Unit, direction and meaning of a measure."""
        found = self.info.get("measures", {}).get(measure)
        return Info(**found) if found else self.suite.info(measure)

    @property
    def undefined(self) -> dict[str, str]:
        """Measures without a number -> why."""
        return {
            name: str(found.get("why", ""))
            for name, found in self.info.get("undefined", {}).items()
        }


@dataclass
class Study:
    """A grid of runs over one target model.

    Attributes:
        name: how the report calls it.
        folder: of the study.
        rows: of ``study.parquet``, one a run and test point.
        summary: content of ``study.json``; empty without one.
        notes: what is missing or cannot be read, in words.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def forget(self) -> str:
        """Name of the forget measure."""
        return str(self.summary.get("forget", "forget measure"))

    @property
    def utility(self) -> str:
        """Name of the utility measure."""
        return str(self.summary.get("utility", "utility"))

    def reference(self, name: str) -> dict[str, float]:
        """Measures of ``target`` or ``retrained``; the forget and the utility measure also as such."""
        found = dict(self.summary.get(name) or {})
        for column, measure in (("forget", self.forget), ("utility", self.utility)):
            if measure in found:
                found.setdefault(column, found[measure])
        return found


@dataclass
class Sources:
    """All that a report shows.

    Attributes:
        runs: in the order given, target and retrained left out.
        studies: in the order given.
        target, retrained: what the runs are compared with.
        left_out: (folder, why) of what was given and is not shown.
        notes: about target and retrained, in words.
    """

    runs: list[Run] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    target: Optional[Run] = None
    retrained: Optional[Run] = None
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def references(self) -> dict[str, Run]:
        """``target`` and ``retrained``, as far as there are such."""
        pairs = {"target": self.target, "retrained": self.retrained}
        return {name: run for name, run in pairs.items() if run is not None}

    @property
    def everyone(self) -> list[Run]:
        """Target, retrained, then the runs."""
        return [*self.references.values(), *self.runs]


def gather(
    folders: Sequence[str],
    target: Optional[str] = None,
    retrained: Optional[str] = None,
    tell: bool = True,
) -> Sources:
    """Read runs and studies.

    Args:
        folders: of models with test results in them, of test results, or of studies.
        target: results of the target model; when None, those of the model that the runs were made from.
        retrained: results of the retrained model; when None, what the runs' tests compared with, or the one of the
            folders whose model was fine-tuned on retain rows only.
        tell: warn of what is left out.

    Raises:
        WagleError: if a folder does not exist, or nothing is left to report.
    """
    sources = Sources()
    for folder in dict.fromkeys(folders):
        _read_one(Path(folder), sources)
    if tell:
        for folder, why in sources.left_out:
            log.warning("%s is left out: %s", folder, why)
    if not sources.runs and not sources.studies:
        folder, why = sources.left_out[0]
        raise WagleError(f"nothing to report: {folder} has no results ({why})")
    _name_apart(sources.runs)
    sources.target = _reference(sources, "target", target)
    sources.retrained = _reference(sources, "retrained", retrained)
    if (
        not sources.runs and not sources.studies
    ):  # all that was given is compared with: show it as it is
        sources.runs = list(sources.references.values())
        sources.target = sources.retrained = None
    _check_target(sources)
    return sources


def read_run(folder: Path, option: str = "run") -> Run:
    """One run: a model folder with test results in it, or a folder of test results or its ``metrics.json``, or a result
    file.

    Raises:
        WagleError: if it has no results.
    """
    folder = folder_of(folder)
    inside = folder / TEST_FOLDER
    results = inside if not (folder / METRICS_FILE).is_file() and inside.is_dir() else folder
    run = Run(_name_of(results), Results(results, option))
    if not results.is_dir():
        return run
    run.info = _optional(run, results / INFO_FILE, dict, "units, directions and undefined measures")
    run.robustness = _optional(run, results / ROBUSTNESS_FILE, list)
    model = next(
        (each for each in (folder, results.parent) if (each / RECORD_FILE).is_file()), None
    )
    if model is not None:
        run.record = _optional(run, model / RECORD_FILE, dict)
    if not run.lineage:
        run.notes.append(f"no {RECORD_FILE} beside the results says what made the model")
    return run


def read_study(folder: Path) -> Study:
    """One study.

    Raises:
        WagleError: if it has no table of runs.
    """
    if not (folder / STUDY_TABLE).is_file():
        raise WagleError(f"it has no {STUDY_TABLE} yet")
    study = Study(folder.resolve().name, folder, load_table(folder / STUDY_TABLE))
    study.summary = _optional(
        study, folder / STUDY_FILE, dict, "its comparison at equal forgetting"
    )
    if not study.rows:
        raise WagleError(f"its {STUDY_TABLE} has no rows yet")
    return study


def mask_of(run: Run) -> Optional[WeightMask]:
    """The mask a run unlearned within, as far as its file is still there and unchanged.

    Returns:
        None if there is none; :attr:`Run.notes` then say why.
    """
    made = run.last.get("mask")
    if not made:
        return None
    if not made.get("file"):
        run.notes.append("its mask has no file (it was made from modules and layers)")
        return None
    try:
        mask = WeightMask.load(made["file"])
        expected, found = run.last.get("base_fingerprint"), mask.metadata.get("model_fingerprint")
        if expected and found and expected != found:
            raise WagleError(f"mask {made['file']} is now one for another model")
        # a mask restricted to modules has a lower density than its file
        if mask.density < made["density"]:
            raise WagleError(f"mask {made['file']} has changed since the run")
        mask.grid()  # read it all: a damaged file shows here
    except WagleError as error:
        run.notes.append(str(error))
        return None
    return mask


def _read_one(folder: Path, sources: Sources) -> None:
    if not folder.exists():
        raise WagleError(f"run folder {folder} does not exist")
    if not folder.is_dir():
        raise WagleError(
            f"{folder} is no folder: give a model folder with test results in it, a results folder or a "
            "study folder"
        )
    try:
        if (folder / STUDY_TABLE).is_file() or (folder / STUDY_FILE).is_file():
            sources.studies.append(read_study(folder))
            return
        run = read_run(folder)
        if not run.metrics:
            raise WagleError(f"it has no {METRICS_FILE} with numbers")
        sources.runs.append(run)
    except WagleError as error:
        why = str(error).removeprefix(f"run: folder {folder} has no")
        sources.left_out.append((str(folder), why if why == str(error) else f"no{why}"))


def _optional(owner: Run | Study, file: Path, kind: type, lost: str = "") -> Any:
    """Content of a JSON file that may be missing; what is lost without it is noted."""
    try:
        content = read_json(file) if file.is_file() else None
    except WagleError as error:
        owner.notes.append(str(error))
        return kind()
    if content is None and lost:
        owner.notes.append(f"it has no {file.name}: {lost} are left out")
    elif content is not None and not isinstance(content, kind):
        owner.notes.append(
            f"{file} is no JSON {'object' if kind is dict else 'list'}: it is left out"
        )
    return content if isinstance(content, kind) else kind()


def _name_of(results: Path) -> str:
    results = results.resolve()
    return results.parent.name if results.name == TEST_FOLDER else results.stem


def _name_apart(runs: list[Run]) -> None:
    """Runs of one name are called by their folders."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.results.path)


def _reference(sources: Sources, name: str, given: Optional[str]) -> Optional[Run]:
    """Target or retrained model: as given, or as the runs say; taken out of the runs if it is among them."""
    if given is not None:
        if not Path(given).exists():
            raise WagleError(f"--{name}: {given} does not exist")
        places = [given]
    else:
        compared = [run.info.get("compared", {}).get(name) for run in sources.runs]
        bases = (
            [run.last.get("base") for run in sources.runs if run.unlearned]
            if name == "target"
            else []
        )
        found = [
            [place for place in places if place and Path(place).exists()]
            for places in (compared, bases)
        ]
        places = list(
            dict.fromkeys(found[0] or found[1])
        )  # the base of a run need not have been tested
        if not places and name == "retrained":
            places = [str(run.results.path) for run in sources.runs if _is_retrained(run)]
    if len(places) > 1 and len({_where(place) for place in places}) > 1:
        sources.notes.append(
            f"the runs have different {name} models ({', '.join(places)}): none is shown; choose with "
            f"--{name}"
        )
        return None
    if not places:
        sources.notes.append(f"results of the {name} model were not found: give --{name}")
        return None
    try:
        found = read_run(Path(places[0]), f"--{name}")
    except WagleError as error:
        if given is not None:
            raise
        sources.notes.append(f"the {name} model has no results: {error}")
        return None
    sources.runs = [
        run for run in sources.runs if _where(run.results.path) != _where(found.results.path)
    ]
    found.name = name
    if not found.metrics:
        sources.notes.append(
            f"the {name} model's results, {found.results.path}, hold examples and no measures"
        )
    return found


def _where(place: str | Path) -> Path:
    """A model folder, the folder of its test results, and their ``metrics.json`` are one place."""
    path = folder_of(Path(place).resolve())
    return path / TEST_FOLDER if (path / TEST_FOLDER).is_dir() else path


def _is_retrained(run: Run) -> bool:
    return run.last.get("module") == "FinetuneModule" and run.last.get("streams") == ["retain"]


def _check_target(sources: Sources) -> None:
    """Say so if the target's results are of other weights than the runs were made from.

    A model that was unlearned in several requests may be shown beside the model before any of them.
    """
    if sources.target is None or sources.target.fingerprint is None:
        return
    for run in sources.runs:
        bases = [step.get("base_fingerprint") for step in run.lineage if step.get("objective")]
        if bases and not {None, sources.target.fingerprint} & set(bases):
            run.notes.append(
                "it was made from a model with other weights than the target model that is shown"
            )
