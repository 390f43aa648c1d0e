"""Results of a test as files, ours or published ones: read for comparison, shown next to others in
one table, and written whole or not at all.

A *table* has the records of a test set, one per row; on disk it is a Parquet file that says what it
depends on.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, TypedDict, Union

from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import atomic_path, write_text
from wagle_pl.core.hub import ADAPTER_FILE
from wagle_pl.core.reading import parse_json, read_json
from wagle_pl.core.schema import Count, check
from wagle_pl.core.text import table as text_table
from wagle_pl.data.template import differing_prompts
from wagle_pl.evaluation import openunlearning
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.tofu_result import Result, ResultLog, Table, from_result

if TYPE_CHECKING:
    from wagle_pl.evaluation.records import Direction, Info, Value

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
INFO_FILE = "metrics.info.json"
RESULT_FILE = "tofu_result.json"

Pair = tuple[str, str]

BETTER, WORSE, SAME = "▲", "▼", "="
NOTICED = 0.01  # relative difference up to which two numbers are called the same


# -- earlier tests -------------------------------------------------------------------------------


class MeasureInfo(TypedDict):
    """What :data:`INFO_FILE` says about a measure."""

    unit: str
    direction: Literal["higher", "lower", "retrained"]
    what: str
    why: Optional[str]  # it is undefined


class TestInfo(TypedDict):
    """Content of :data:`INFO_FILE`."""

    model: Optional[str]
    suite: Optional[str]
    prompts: Optional[dict[str, Any]]
    compared: Optional[dict[str, Optional[str]]]
    measures: Optional[dict[str, MeasureInfo]]
    undefined: Optional[dict[str, MeasureInfo]]
    rows: Optional[dict[str, Count]]
    absent_sets: Optional[list[str]]


class TestedRow(TypedDict):
    """What every record of a table has."""

    row: Count
    question: str
    answer: str
    generation: Optional[str]


#: File of a test folder -> its schema.
SCHEMAS: dict[str, Any] = {
    METRICS_FILE: dict[str, float],
    RESULT_FILE: dict[str, ResultLog],
    INFO_FILE: TestInfo,
}


@dataclass(eq=False)
class Results:
    """What a test found: returned by :func:`~wagle_pl.evaluation.evaluate`, or read from files."""

    metrics: dict[str, float] = field(default_factory=dict)  # empty if not known
    undefined: dict[str, str] = field(default_factory=dict)  # measure -> why it is undefined
    tables: Mapping[str, Table] = field(default_factory=dict)  # test set -> its records
    infos: Mapping[str, Info] = field(default_factory=dict)  # measure -> unit and direction
    prompts: dict[str, Any] = field(default_factory=dict)  # see Template.prompts
    tofu: Optional[Result] = None  # the TOFU result, if there is one
    benchmark: Optional[str] = None  # TOFU or MUSE if from a file of OpenUnlearning's
    path: Path = Path()
    option: str = ""  # that named the path, for messages
    files: dict[str, Any] = field(default_factory=dict)  # name -> JSON content; on rank 0
    text: str = ""  # for the console

    @classmethod
    def read(
        cls, path: str | Path, option: str = "model.retrained", tables: bool = True
    ) -> Results:
        """What an earlier test found.

        Args:
            path: a folder that ``wagle test`` wrote; its ``metrics.json``, which stands for the
                folder; a TOFU result file; or one of OpenUnlearning's, or the folder that it is in.
            option: the option that named it, for messages.
            tables: also read a folder's tables.
        """
        path, advice = folder_of(Path(path)), "(run wagle test on that model first)"
        if not (path / METRICS_FILE).is_file():
            path = openunlearning.find_file(path) or path
        results = cls(path=path, option=option)
        if path.is_dir():
            files = {path / name: kind for name, kind in SCHEMAS.items()}
            content = {f.name: read_json(f, kind) for f, kind in files.items() if f.is_file()}
            if METRICS_FILE not in content and RESULT_FILE not in content:
                raise WagleError(f"{option}: folder {path} has no {METRICS_FILE} {advice}")
            results.metrics = content.get(METRICS_FILE, {})
            results.tofu = content.get(RESULT_FILE)
            results.prompts = content.get(INFO_FILE, {}).get("prompts") or {}
            results.tables = load_tables(path) if tables else {}
            return results
        if not path.is_file():
            raise WagleError(f"{option}: result file {path} does not exist {advice}")
        results._read_file(read_json(path))
        return results

    def _read_file(self, content: Any) -> None:
        values = content.values() if isinstance(content, dict) else [None]
        if benchmark := openunlearning.benchmark_of(content):
            check(content, openunlearning.Content, str(self.path))
            self.benchmark = benchmark
            self.metrics = openunlearning.to_metrics(benchmark, content)
            self.tables = openunlearning.to_tables(benchmark, content)
        elif content and all(isinstance(value, dict) for value in values):
            self.tofu = check(content, dict[str, ResultLog], str(self.path))
            self.tables = from_result(self.tofu)
        elif all(isinstance(value, (int, float)) for value in values):
            self.metrics = check(content, dict[str, float], str(self.path))
        else:
            what = f"neither a {METRICS_FILE} nor a result file of TOFU or OpenUnlearning"
            raise WagleError(f"{self.option}: {self.path} is {what}")

    def write(self, folder: Path) -> None:
        """Write all files but the tables, which are written as soon as a test set is finished."""
        for name, content in self.files.items():
            write_json(folder / name, content)

    def table(self, name: str) -> Table:
        """The records of a test set; Undefined if there are none."""
        if name not in self.tables:
            raise Undefined(f"{self.path} has no records of the test set {name!r}")
        return self.tables[name]

    def beside(self, name: str, table: Table) -> Table:
        """The records of the rows of another table, in its order; Undefined if one is missing. Rows
        without texts, which OpenUnlearning's files may have, are assumed to be in that order."""
        here = self.table(name)
        if textless(here) and len(here) == len(table):
            return here
        by_pair = dict(zip(pairs_of(here), here, strict=True))
        pairs = pairs_of(table)
        if missing := sum(pair not in by_pair for pair in pairs):
            lacks = f"it lacks {missing} of {len(table)}"
            raise Undefined(f"{self.path} is on other {name} rows: {lacks}")
        return [by_pair[pair] for pair in pairs]


def pairs_of(table: Table) -> list[Pair]:
    """(question, answer) of each record, without white space, which published files have lost."""
    return [(bare(record["question"]), bare(record["answer"])) for record in table]


def textless(table: Table) -> bool:
    """Whether no record says what was asked and answered."""
    return not any(record["question"] or record["answer"] for record in table)


def bare(text: str) -> str:
    return "".join(text.split())


def differing(pairs: Sequence[Pair], others: Sequence[Pair]) -> int:
    """How many rows of two test sets differ, in any order; counted on the side with more."""
    counts, other_counts = Counter(pairs), Counter(others)
    return max((counts - other_counts).total(), (other_counts - counts).total())


def folder_of(place: Path) -> Path:
    """The folder of a ``metrics.json``; any other place is returned unchanged."""
    return place.parent if place.name == METRICS_FILE and place.is_file() else place


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def model_of(path: Union[str, Path]) -> Optional[str]:
    """The model of some results: their folder or the one above, if that holds a model, or the one
    that they name, if it still exists. None for a published result file, wherever that is."""
    path = Path(path)
    if path.is_file() and path.name != METRICS_FILE:
        return None
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.absolute().parent):
        if _holds_model(place):
            return str(place)
    info = folder / INFO_FILE
    named = read_json(info, TestInfo).get("model") if info.is_file() else None
    return named if named is not None and _holds_model(Path(named)) else None


def results_of(path: Union[str, Path]) -> Optional[Path]:
    """Where the results of a path are: ``test`` in a model's folder; None if it has none."""
    folder = Path(path)
    if not _holds_model(folder) or (folder / METRICS_FILE).is_file():
        return folder
    return folder / "test" if (folder / "test" / METRICS_FILE).is_file() else None


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_FILE))


# -- comparison with other models -----------------------------------------------------------------


def check_prompts(results: Mapping[str, Results], prompts: Mapping[str, Any]) -> None:
    """Refuse results (``retrained``, ``target``, …) for other prompts; warn for the target's."""
    for option, earlier in results.items():
        other = differing_prompts(earlier.prompts, prompts)
        if other and option != "target":
            why = f"{earlier.path} was tested with other prompts ({other})"
            what = "test that model with these, or give this run those"
            raise WagleError(f"{earlier.option}: {why}: {what}")
        if other:
            log.warning("the target's results are of other prompts: %s", other)


def check_rows(
    results: Mapping[str, Results], name: str, pairs: Sequence[Pair], instead: str
) -> None:
    """Refuse results on other rows of a test set (order does not matter); warn for the target's.
    ``instead`` is the option that takes a retrained model's results on other rows."""
    pairs = [(bare(question), bare(answer)) for question, answer in pairs]
    for option, earlier in results.items():
        others = pairs_of(earlier.tables.get(name, []))
        count = differing(pairs, others) if name in earlier.tables else 0
        if earlier.benchmark and count and textless(earlier.tables[name]):
            log.warning("%s has no texts: its %s rows may be others", earlier.path, name)
            count = abs(len(pairs) - len(others))
        if option == "tofu_retrained" and name == "forget":
            message = (
                "tofu/forget_quality compares %d forget rows here with %d in %s; %d are the same"
            )
            same = max(len(pairs), len(others)) - count
            log.warning(message, len(pairs), len(others), earlier.path, same)
        elif count and option == "target":
            log.warning("the target's results are on other %s rows: %d differ", name, count)
        elif count and option != "tofu_retrained":
            hint = f"TOFU's own forget quality, which compares no rows, takes it as --{instead}"
            raise WagleError(
                f"{earlier.option}: {earlier.path} is on other {name} rows: {count} differ",
                hint=hint if (option, name) == ("retrained", "forget") else None,
            )


def arrow(
    direction: Direction, here: float, target: Optional[float], retrained: Optional[float] = None
) -> str:
    """``▲`` if a model is better than the target, ``▼`` if worse, ``=`` if within 1 %, empty if that
    is not known.

    >>> arrow("lower", 0.2, 0.9), arrow("retrained", 0.6, 0.9, 0.5), arrow("retrained", 0.6, 0.9)
    ('▲', '▲', '')
    """
    if target is None or (direction == "retrained" and retrained is None):
        return ""
    if abs(here - target) <= NOTICED * max(abs(here), abs(target)):
        return SAME
    if direction == "retrained":
        return BETTER if abs(here - retrained) < abs(target - retrained) else WORSE
    return BETTER if (here > target) == (direction == "higher") else WORSE


def comparison(
    values: Mapping[str, Value],
    info: Callable[[str], Info],
    target: Optional[Mapping[str, float]] = None,
    retrained: Optional[Mapping[str, float]] = None,
) -> str:
    """A table with columns measure, this, target, retrained; undefined measures below it."""
    beside = {"target": target, "retrained": retrained}
    others = {name: numbers for name, numbers in beside.items() if numbers is not None}
    rows, undefined = [], []
    for name, value in values.items():
        if isinstance(value, Undefined):
            undefined.append(f"undefined: {name}: {value}")
            continue
        numbers = {other: known.get(name) for other, known in others.items()}
        mark = arrow(info(name).direction, value, numbers.get("target"), numbers.get("retrained"))
        cell = f"{value:.4g} {mark}".rstrip() if mark or target is None else f"{value:.4g}  "
        rows.append([name, cell, *("" if n is None else f"{n:.4g}" for n in numbers.values())])
    text = [text_table(["measure", "this", *others], rows)]
    if target is not None:
        legend = f"{BETTER} better, {WORSE} worse than the target model, {SAME} within 1 % of it"
        text += ["", legend]
        here, before = values.get("forget/probability"), target.get("forget/probability")
        if isinstance(here, float) and before and here > (1 - NOTICED) * before:
            text.append(
                "The forget rows are as probable as under the target model: nothing was forgotten. "
                "Train longer (--trainer.max_epochs) or with a higher rate (--model.lr)."
            )
    return "\n".join([*text, *undefined])


# -- tables --------------------------------------------------------------------------------------

_KEY = b"wagle_pl.key"


def write_table(path: Path, rows: Table, key: Mapping[str, Any]) -> None:
    """Write records as Parquet, with ``key`` (what they depend on) in the file's metadata."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({_KEY: json.dumps(key, sort_keys=True)})
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, write_page_checksum=True)


def read_table(
    path: Path, key: Mapping[str, Any], overwrite: bool = False, kind: Any = TestedRow
) -> Optional[Table]:
    """Records of a table written with the same ``key``; None if there is none. A damaged table, or
    one with another key, is an error that says what differs; with ``overwrite`` it is None."""
    if not path.is_file():
        return None
    try:
        written = table_key(path)
        if written == key:
            return load_table(path, kind)
        differ = sorted(name for name in {*written, *key} if written.get(name) != key.get(name))
        mistake = f"{path} holds results of another test (other {', '.join(differ)})"
    except WagleError as error:
        mistake = str(error)
    if overwrite:
        return None
    raise WagleError(mistake, hint="choose another --model.output or pass --model.overwrite true")


def table_key(path: Path) -> dict[str, Any]:
    """What a table's records depend on; empty if the file does not say."""
    with _parquet(path) as parquet:
        key = (parquet.read_schema(path).metadata or {}).get(_KEY, b"{}").decode()
    return parse_json(key, f"{path}: its metadata", dict[str, Any])


def load_table(path: Path, kind: Any = Any) -> Table:
    """Records of a table, each of the schema ``kind``."""
    with _parquet(path) as parquet:
        rows = parquet.read_table(path, page_checksum_verification=True).to_pylist()
    return check(rows, list[kind], str(path))


def load_tables(folder: Path) -> dict[str, Table]:
    """Test set -> its records, of a folder that a test wrote."""
    files = sorted(folder.glob("*.parquet"))
    return {file.stem: load_table(file, TestedRow) for file in files}


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Refuse a file that is damaged or not a Parquet file."""
    import pyarrow.parquet

    try:
        yield pyarrow.parquet
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise WagleError(f"{path} cannot be read: {first_line(error)}") from None
