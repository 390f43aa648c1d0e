"""Results of a test, ours or published ones: read to compare with, and written whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.sets import Table
from wagle_pl.evaluation.tables import load_table
from wagle_pl.evaluation.tofu_results import Result, from_result

METRICS_FILE = "metrics.json"
INFO_FILE = "metrics.info.json"
RESULT_FILE = "tofu_result.json"


def differing(rows: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]]) -> int:
    """How many rows of two test sets are not the same, whatever their order; of the side that has more of them.

    Args:
        rows: (question, answer) of each row of one.
        others: of the other.

    >>> differing([("Who?", "Ada"), ("Where?", "Arad")], [("Where?", "Arad"), ("Who?", "Ada")])
    0
    """
    here, there = Counter(map(_key, rows)), Counter(map(_key, others))
    return max((here - there).total(), (there - here).total())


def raw_rows(table: Table) -> list[tuple[str, str]]:
    """(question, answer) of each record."""
    return [(record["question"], record["answer"]) for record in table]


def _key(row: tuple[str, str]) -> tuple[str, str]:
    """What tells whether two rows are the same; published files keep no space around texts."""
    question, answer = row
    return question.strip(), answer.strip()


def folder_of(place: Path) -> Path:
    """The folder of results that their ``metrics.json`` stands for; any other place is itself."""
    return place.parent if place.name == METRICS_FILE and place.is_file() else place


class Results:
    """What an earlier test found: a folder that ``wagle test`` wrote, its ``metrics.json``, or a TOFU result file.

    A ``metrics.json`` stands for the folder it lies in, whose tables hold what comparisons need.

    Args:
        path: folder or file.
        option: the option that named it, for messages.

    Raises:
        WagleError: if there is none, or it is no such file.
    """

    def __init__(self, path: str | Path, option: str = "model.retrained") -> None:
        self.path = folder_of(Path(path))
        self.option = option
        self.metrics: dict[str, float] = {}
        self.tofu: Optional[Result] = None
        #: Prompts of the test, see :attr:`wagle_pl.data.template.Template.prompts`; empty if they are not known.
        self.prompts: dict[str, Any] = {}
        if self.path.is_dir():
            self._read_folder()
        else:
            self._read_file()

    def _read_folder(self) -> None:
        files = {name: self.path / name for name in (METRICS_FILE, RESULT_FILE)}
        found = {name: read_json(file) for name, file in files.items() if file.is_file()}
        if not found:
            raise WagleError(
                f"{self.option}: folder {self.path} has no {METRICS_FILE} (run wagle test on that model "
                "first)"
            )
        self.metrics = found.get(METRICS_FILE, {})
        self.tofu = found.get(RESULT_FILE)
        info = self.path / INFO_FILE
        self.prompts = read_json(info).get("prompts", {}) if info.is_file() else {}

    def _read_file(self) -> None:
        if not self.path.is_file():
            raise WagleError(
                f"{self.option}: result file {self.path} does not exist (run wagle test on that model "
                "first)"
            )
        content = read_json(self.path)
        if (
            isinstance(content, dict)
            and content
            and all(isinstance(v, dict) for v in content.values())
        ):
            self.tofu = content
        elif isinstance(content, dict) and all(
            isinstance(v, (int, float)) for v in content.values()
        ):
            self.metrics = content
        else:
            raise WagleError(
                f"{self.option}: {self.path} is neither a {METRICS_FILE} nor a TOFU result file"
            )

    @cached_property
    def tables(self) -> dict[str, Table]:
        """Test set -> its records, from the folder's tables or from a TOFU result file."""
        if not self.path.is_dir():
            return from_result(self.tofu or {})
        return {file.stem: load_table(file) for file in sorted(self.path.glob("*.parquet"))}

    def table(self, name: str) -> Table:
        """The records of a test set.

        Raises:
            Undefined: if there are none.
        """
        if name not in self.tables:
            raise Undefined(f"{self.path} has no records of the test set {name!r}")
        return self.tables[name]

    def beside(self, name: str, table: Table) -> Table:
        """The records of the rows of another table of a test set, in its order.

        Raises:
            Undefined: if there is none for one of them.
        """
        here = self.table(name)
        found = dict(zip(map(_key, raw_rows(here)), here, strict=True))
        keys = [_key(row) for row in raw_rows(table)]
        missing = sum(key not in found for key in keys)
        if missing:
            raise Undefined(
                f"{self.path} is on other {name} rows: it lacks {missing} of {len(table)}"
            )
        return [found[key] for key in keys]

    def differing(self, name: str, rows: Sequence[tuple[str, str]]) -> int:
        """How many rows of a test set are not the same here, see :func:`differing`; 0 if it has no such set.

        Args:
            name: of the test set.
            rows: (question, answer) of each row.
        """
        return differing(rows, raw_rows(self.tables[name])) if name in self.tables else 0


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        WagleError: naming file and line if it is malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise WagleError(f"{path} line {error.lineno}: malformed JSON: {error.msg}") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
