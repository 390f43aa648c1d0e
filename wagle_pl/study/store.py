"""What a study keeps in its folder: its files, the table of runs, a lock against a second study."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.outputs import Lock
from wagle_pl.evaluation.results import load_table, table_key, write_table

TABLE_FILE = "study.parquet"
SUMMARY_FILE = "study.json"
TEXT_FILE = "study.md"
FIGURE_FILE = "study.svg"
LOCK_FILE = "study.lock"

#: First columns of the table; measures follow.
COLUMNS = (
    *("objective", "mask", "score", "density", "lr", "seed", "step", "run", "forget", "utility"),
    *("seconds", "note", "objective_id", "mask_id"),
)


class RunTable:
    """One Parquet file: a row a run and test point. It is there once there is a run.

    Args:
        folder: of the study.
        settings: what all its runs share, as plain data.

    Raises:
        WagleError: if the folder holds runs with other settings, naming those that differ.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / TABLE_FILE
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            self.rows = self._read(self.path, "choose another --output")

    def finished(self) -> set[str]:
        """Ids of the runs in the table."""
        return {row["run"] for row in self.rows}

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of one finished run, all or none."""
        self.rows += [dict(row) for row in rows]
        self.write()

    def join(self, folders: Sequence[str]) -> int:
        """Take over the finished runs of other folders of the same study; how many are new here.

        Raises:
            WagleError: if a folder has no table, or its runs have other settings.
        """
        before = self.finished()
        for folder in folders:
            path, known = Path(folder) / TABLE_FILE, self.finished()
            if not path.is_file():
                raise WagleError(f"--join: there is no study in {folder} ({TABLE_FILE})")
            theirs = self._read(path, "it is another study")
            self.rows += [row for row in theirs if row["run"] not in known]
        return len(self.finished()) - len(before)

    def _read(self, path: Path, hint: str) -> list[dict[str, Any]]:
        rows, ours, theirs = load_table(path), self.settings, table_key(path)
        differing = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        if rows and differing:  # without runs nothing depends on the settings
            raise WagleError(
                f"{path} holds runs with other settings ({', '.join(differing)}): {hint}"
            )
        return rows

    def write(self) -> None:
        """Write the file, if there are runs, whole or not at all; every row has every column."""
        names = [*COLUMNS, *sorted({name for row in self.rows for name in row} - set(COLUMNS))]
        rows = [{name: row.get(name) for name in names} for row in self.rows]
        if rows:
            write_table(self.path, rows, self.settings)


def has_runs(folder: Path) -> bool:
    """Whether a study's folder holds finished runs.

    Raises:
        WagleError: if its table cannot be read.
    """
    path = folder / TABLE_FILE
    return path.is_file() and bool(load_table(path))


@contextmanager
def locked(folder: Path) -> Iterator[Optional[str]]:
    """Keep other studies out of a folder while inside.

    The lock is held by the operating system and ends with the process. The file says who holds it
    (process, host); it stays behind, empty, after a study that ended well.

    Yields:
        What to say of a lock that a killed study has left behind; None without one.

    Raises:
        WagleError: if a study works in the folder, on this host or on another.
    """
    lock = Lock(folder / LOCK_FILE, f"another study works in {folder}", "choose another --output")
    try:
        yield lock.left and f"took over the lock of a study that has ended ({lock.left})"
    finally:
        lock.release(remove=False)
