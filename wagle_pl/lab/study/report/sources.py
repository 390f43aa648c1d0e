"""What a report shows, read from folders; what is missing is noted, never made up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.reading import read_json
from wagle_pl.core.records import Record
from wagle_pl.core.schema import filled
from wagle_pl.core.weights import mismatch
from wagle_pl.evaluation.attacks.attack import RECORD, ROBUSTNESS_FILE
from wagle_pl.evaluation.openunlearning import find_file
from wagle_pl.evaluation.records import Info
from wagle_pl.evaluation.results import (
    INFO_FILE,
    METRICS_FILE,
    Results,
    TestInfo,
    arrow,
    folder_of,
    load_tables,
    table_key,
)
from wagle_pl.evaluation.suites import Suite, find_suite
from wagle_pl.evaluation.tofu_result import Table
from wagle_pl.lab.study import SUMMARY_FILE, TABLE_FILE
from wagle_pl.lab.study.summary import SUMMARY, load_runs
from wagle_pl.lm.saving import RECORD_FILE
from wagle_pl.masks import WeightMask

log = logging.getLogger(__name__)

TEST_FOLDER = "test"  # of a model folder, with its test results


class ReportedModel(Results):
    """A model's test results, and the record of what made the model.

    Args:
        folder: a model folder with test results in it, a folder of test results, or a result file
            of TOFU or OpenUnlearning.
        option: the option that named it, for messages.
    """

    def __init__(self, folder: Path, option: str = "run") -> None:
        folder = folder_of(folder)
        tested = (folder / METRICS_FILE).is_file()
        results = Results.read(folder if tested else _tests_of(folder), option, tables=False)
        vars(self).update(vars(results))
        if self.path.is_dir():
            del vars(self)["tables"]  # they are read when they are needed
        resolved = self.path.resolve()
        self.name = resolved.parent.name if resolved.name == TEST_FOLDER else resolved.stem
        if self.benchmark is not None:  # in the model's folder, or in ``evals`` there
            above = resolved.parent
            self.name = (above.parent if above.name == "evals" else above).name
        self.role = "this"  # target, retrained, or this: one that is compared with them
        self.number = 0  # from 1 among the models that are compared
        self.notes: list[str] = []  # what is missing or cannot be read
        self.info: dict[str, Any] = {}  # metrics.info.json, if there is one
        self.record: dict[str, Any] = {}  # wagle.json of the model, likewise
        self.robustness: list[dict[str, Any]] = []  # robustness.json, likewise
        if not self.path.is_dir():
            return
        lost = "units, directions and undefined measures"
        self.info = _read_optional(self.path / INFO_FILE, TestInfo, {}, self.notes, lost)
        self.robustness = _read_optional(self.path / ROBUSTNESS_FILE, list[RECORD], [], self.notes)
        records = [place / RECORD_FILE for place in (folder, self.path.parent)]
        if record := next((file for file in records if file.is_file()), None):
            self.record = _read_optional(record, Record, {}, self.notes)
        if not self.lineage:
            self.notes.append(f"no {RECORD_FILE} next to the results says what made the model")

    @property
    def place(self) -> Path:
        return _tests_of(self.path.resolve())

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The runs that made the model, oldest first."""
        return self.record.get("lineage") or []

    @property
    def last(self) -> dict[str, Any]:
        """The run that made the model; empty if unknown."""
        return self.lineage[-1] if self.lineage else {}

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Test set -> records of its rows; empty if they cannot be read."""
        try:
            return load_tables(self.path)
        except WagleError as error:
            self.notes.append(str(error))
            return {}

    def generations(self, test_set: str) -> dict[str, dict[str, Any]]:
        """Question -> record of those that the model answered."""
        records = self.tables.get(test_set, [])
        return {row["question"]: row for row in records if row.get("generation") is not None}

    @property
    def sets(self) -> list[str]:
        return list(self.info.get("rows") or self.tables)

    @cached_property
    def fingerprint(self) -> Optional[str]:
        """Fingerprint of the model that was tested; None if its tables do not say."""
        files = sorted(self.path.glob("*.parquet"))
        try:
            return table_key(files[0]).get("model") if files else None
        except ValueError:
            return None  # errors in the file are reported where its rows are needed

    @cached_property
    def suite(self) -> Suite:
        """The suite that measured; a general one if that is unknown or a user's class."""
        try:
            return find_suite(self.info.get("suite") or (self.benchmark or "generic").lower())
        except WagleError:
            return Suite()

    def about(self, measure: str) -> Info:
        info = self.info.get("measures", {}).get(measure)
        return Info(**info) if info else self.suite.info(measure)

    @property
    def undefined(self) -> dict[str, str]:
        """Measures without a number -> why."""
        measures = self.info.get("undefined", {})
        return {name: about.get("why", "") for name, about in measures.items()}

    @cached_property
    def mask(self) -> Optional[WeightMask]:
        """The mask it was unlearned with; if that is gone or has changed, :attr:`notes` say so."""
        made = self.last.get("mask")
        if not made:
            return None
        if not made.get("file"):
            self.notes.append("its mask has no file (it was made from modules and layers)")
            return None
        try:
            mask = WeightMask.load(made["file"])
            ours, theirs = self.last.get("base_fingerprint"), mask.metadata.get("model_fingerprint")
            if mismatch(ours, theirs):
                raise WagleError(f"mask {made['file']} is now one for another model")
            # a mask restricted to modules has a lower density than its file
            if mask.density < made["density"]:
                raise WagleError(f"mask {made['file']} has changed since the run")
            mask.grid()  # reads all of it: a damaged file shows here
        except WagleError as error:
            self.notes.append(str(error))
            return None
        return mask


@dataclass
class StudyResults:
    """What a study has written."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]  # study.parquet: one for each test of each run
    summary: dict[str, Any]  # study.json; empty without one
    notes: list[str]  # what is missing or cannot be read

    @property
    def axes(self) -> tuple[str, str]:
        summary = self.summary
        return summary.get("forget", "forget measure"), summary.get("utility", "utility")

    @property
    def references(self) -> dict[str, tuple[float, float]]:
        return reference_points(self.summary, self.axes)


@dataclass
class Sources:
    """All that a report shows."""

    models: list[ReportedModel] = field(default_factory=list)  # without target and retrained
    studies: list[StudyResults] = field(default_factory=list)
    references: dict[str, ReportedModel] = field(default_factory=dict)  # target, retrained
    left_out: list[tuple[str, str]] = field(default_factory=list)  # folder, and why
    notes: list[str] = field(default_factory=list)  # about target and retrained
    examples: int = 6  # questions per test set whose answers are shown
    redact: bool = False  # show digests of rows in place of their text

    @property
    def everyone(self) -> list[ReportedModel]:
        return [*self.references.values(), *self.models]

    def sign(self, model: ReportedModel, measure: str) -> str:
        """Whether a model is better than the target, as an arrow."""
        value = model.metrics.get(measure)
        if value is None or model.role != "this":
            return ""
        values = {role: other.metrics.get(measure) for role, other in self.references.items()}
        direction = model.about(measure).direction
        return arrow(direction, value, values.get("target"), values.get("retrained"))


def reference_points(
    summary: Mapping[str, Any], axes: tuple[str, str]
) -> dict[str, tuple[float, float]]:
    """``target`` and ``retrained`` -> the two measures of ``axes``, where the study has both."""
    measures = {role: summary.get(role) or {} for role in ("target", "retrained")}
    return {r: (of[axes[0]], of[axes[1]]) for r, of in measures.items() if of.keys() >= {*axes}}


def gather(
    folders: Sequence[str], target: Optional[str] = None, retrained: Optional[str] = None
) -> Sources:
    """Read models and studies; arguments as for ``wagle report``."""
    sources = Sources()
    for folder in dict.fromkeys(folders):
        _read_folder(Path(folder), sources)
    for folder, why in sources.left_out:
        log.warning("%s is left out: %s", folder, why)
    if not sources.models and not sources.studies:
        folder, why = sources.left_out[0]
        raise WagleError(f"nothing to report: {folder} has no results ({why})")
    names = [model.name for model in sources.models]
    for model in sources.models:
        if names.count(model.name) > 1:
            model.name = str(model.path)
    for role, folder in (("target", target), ("retrained", retrained)):
        _find_reference(sources, role, folder)
    if not sources.models and not sources.studies:  # the references are all that was given
        sources.models, sources.references = sources.everyone, {}
    for number, model in enumerate(sources.models, 1):
        model.role, model.number = "this", number
    _check_target(sources)
    return sources


def _read_study(folder: Path) -> StudyResults:
    if not (folder / TABLE_FILE).is_file():
        raise WagleError(f"it has no {TABLE_FILE} yet")
    rows, notes = load_runs(folder / TABLE_FILE), list[str]()
    if not rows:
        raise WagleError(f"its {TABLE_FILE} has no rows yet")
    lost = "its comparison at equal forgetting"
    summary = _read_optional(folder / SUMMARY_FILE, SUMMARY, {}, notes, lost)
    summary = filled(summary, SUMMARY) if summary else {}
    return StudyResults(folder.resolve().name, folder, rows, summary, notes)


def _is_model(folder: Path) -> bool:
    return folder.is_dir() and bool(
        (_tests_of(folder) / METRICS_FILE).is_file() or find_file(folder)
    )


def _read_folder(folder: Path, sources: Sources) -> None:
    """Add the study, the model or the models of a folder, or why it is left out."""
    if not folder.exists():
        raise WagleError(f"run folder {folder} does not exist")
    if not folder.is_dir() and not find_file(folder):
        hint = "give a model folder with test results in it, a results folder or a study folder"
        raise WagleError(f"{folder} is no folder: {hint}")
    try:
        if (folder / TABLE_FILE).is_file() or (folder / SUMMARY_FILE).is_file():
            sources.studies.append(_read_study(folder))
        elif _is_model(folder) or find_file(folder):
            sources.models.append(ReportedModel(folder))
        elif models := [child for child in sorted(folder.iterdir()) if _is_model(child)]:
            sources.models += map(ReportedModel, models)
        else:
            raise WagleError(f"it has no {METRICS_FILE}", hint="run wagle test on that model first")
    except WagleError as error:
        sources.left_out.append((str(folder), str(error)))


def _read_optional(file: Path, kind: Any, empty: Any, notes: list[str], lost: str = "") -> Any:
    """Content of a JSON file by its schema; ``empty`` without one, or if damaged, which is noted."""
    if not file.is_file():
        notes += [f"it has no {file.name}: {lost} are left out"] if lost else []
        return empty
    try:
        return read_json(file, kind)
    except WagleError as error:
        notes.append(str(error))
        return empty


def _tests_of(folder: Path) -> Path:
    """The folder of test results within a model folder; any other folder is returned as it is."""
    folder = folder_of(folder)
    return folder / TEST_FOLDER if (folder / TEST_FOLDER).is_dir() else folder


def _find_reference(sources: Sources, role: str, folder: Optional[str]) -> None:
    """Set the target or retrained model, as given or as the models' tests and records say."""
    if folder is not None and not Path(folder).exists():
        raise WagleError(f"--{role}: {folder} does not exist")
    places = [folder] if folder is not None else _candidates(sources.models, role)
    if len({_tests_of(Path(place).resolve()) for place in places}) > 1:
        message = f"the runs have different {role} models ({', '.join(places)})"
        sources.notes.append(f"{message}: none is shown; choose with --{role}")
        return
    if not places:
        sources.notes.append(f"results of the {role} model were not found: give --{role}")
        return
    try:
        results = ReportedModel(Path(places[0]), f"--{role}")
    except WagleError as error:
        if folder is not None:
            raise
        sources.notes.append(f"the {role} model has no results: {error}")
        return
    sources.models = [model for model in sources.models if model.place != results.place]
    results.name = results.role = role
    sources.references[role] = results
    if not results.metrics:
        message = f"the {role} model's results, {results.path}, hold examples and no measures"
        sources.notes.append(message)


def _candidates(models: Sequence[ReportedModel], role: str) -> list[str]:
    """Where results of the target or retrained model may be."""
    compared = [model.info.get("compared", {}).get(role) for model in models]
    lasts = [(model, model.last) for model in models]
    if role == "target":
        others = [last.get("base") for _, last in lasts if last.get("objective")]
    else:
        made = {"module": "FinetuneModule", "streams": ["retain"]}
        others = [str(model.path) for model, last in lasts if made.items() <= last.items()]
    for places in (compared, others):  # the base of a model need not have been tested
        if known := [place for place in dict.fromkeys(places) if place and Path(place).exists()]:
            return known
    return []


def _check_target(sources: Sources) -> None:
    """Note models that were made from weights other than the target's, as by a second request."""
    target = sources.references.get("target")
    if target is None or target.fingerprint is None:
        return
    for model in sources.models:
        bases = [step.get("base_fingerprint") for step in model.lineage if step.get("objective")]
        if bases and all(mismatch(base, target.fingerprint) for base in bases):
            message = "it was made from another model than the target model that is shown"
            model.notes.append(message)
