"""Where a benchmark's rows are: parts of hub repositories, or the same files in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Row
from wagle_pl.data.rows import READERS, load_rows, read_hub


class HubSet(NamedTuple):
    """One split of one configuration of a hub dataset.

    Attributes:
        repo: ``owner/name``.
        config: configuration; None for a dataset with just one.
        split: of the dataset.
        files: path of one file in the repository, to be read in place of the whole split.
        aliases: other names, with wildcards, under which a folder may have it.
    """

    repo: str
    config: Optional[str] = None
    split: str = "train"
    files: Optional[str] = None
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.repo}{f':{self.config}' if self.config else ''} {self.files or self.split}"

    @property
    def short_name(self) -> str:
        """The repository without its owner: the name of its local copy."""
        return self.repo.rpartition("/")[2]

    @property
    def patterns(self) -> list[str]:
        """Where the rows may be in a copy of the repository, the likeliest first."""
        if self.files is not None:
            return [self.files, *self.aliases]
        names = [f"{self.split}{suffix}" for suffix in READERS] + [f"{self.split}-*-of-*.parquet"]
        if self.config is None:
            return [
                f"{place}{name}" for place in ("", "data/", "data/*/") for name in names
            ] + list(self.aliases)
        names = [f"{self.config}/{name}" for name in names]
        return [*names, *(f"{self.config}{suffix}" for suffix in READERS), *self.aliases]


def local_files(hub_set: HubSet, folder: Path) -> list[Path]:
    """The files of a set in ``folder``, which holds copies of repositories by their short names, or is one itself."""
    for root in (folder / hub_set.short_name, folder):
        for pattern in hub_set.patterns:
            if files := sorted(root.glob(pattern)):
                return files
    return []


def read_set(
    hub_set: HubSet, folder: Optional[str], limit: Optional[int] = None
) -> Optional[list[Row]]:
    """Rows of a set: from ``folder`` if one is given, else from the hub.

    Args:
        hub_set: what to read.
        folder: local copy; nothing touches the network then.
        limit: read only the first so many rows.

    Returns:
        None if the folder does not have the set.

    Raises:
        WagleError: if a file is malformed or empty, or the hub cannot give the set.
    """
    if folder is None:
        source = hub_set.repo if hub_set.config is None else f"{hub_set.repo}:{hub_set.config}"
        return read_hub(source, hub_set.split, hub_set.files, limit)
    files = local_files(hub_set, Path(folder))
    return (
        [row for file in files for row in load_rows(str(file), limit=limit)][:limit]
        if files
        else None
    )


def missing(hub_set: HubSet, folder: str) -> WagleError:
    """What to raise where a folder lacks a set."""
    first = f"{hub_set.short_name}/{hub_set.patterns[0]}"
    kinds = "" if hub_set.files else " (.jsonl, .csv and .parquet will do)"
    return WagleError(f"data.folder {folder} has no {hub_set}: expected {first}{kinds}")


def need_columns(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Check that every row has some columns, other than None.

    Raises:
        WagleError: naming ``where``, the row (counted from 1) and what it has.
    """
    for number, row in enumerate(rows, 1):
        absent = [column for column in columns if row.get(column) is None]
        if absent:
            raise WagleError(
                f"{where} row {number} has no column {absent[0]!r}; it has {sorted(row)}"
            )
