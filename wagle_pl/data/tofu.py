"""TOFU's official splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent, plainly_local
from wagle_pl.data.example import Row
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.rows import load_rows

#: TOFU's official forget splits -> the retain split that completes each to the full set.
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


class TOFUDataModule(ForgetRetainDataModule):
    """TOFU, a task of fictitious unlearning (arXiv 2401.06121): its official splits.

    Args:
        forget: ``forget01``, ``forget05`` or ``forget10``, or any file or dataset.
        retain: likewise, a split such as ``retain99``; None takes the complement of ``forget``.
        path: folder with ``<split>.json`` files, or the hub dataset.
        **kwargs: passed to :class:`ForgetRetainDataModule`; ``test`` replaces TOFU's test sets.
    """

    def __init__(
        self,
        forget: str = "forget10",
        retain: Optional[str] = None,
        path: str = "locuslab/TOFU",
        **kwargs: Any,
    ) -> None:
        super().__init__(forget=forget, retain=retain or RETAIN_OF.get(forget), **kwargs)
        self.path = path
        if self.test_sources is None:
            self.test_sources = {
                "forget": f"{forget}_perturbed" if forget in RETAIN_OF else forget,
                "retain": "retain_perturbed",
                "real_authors": "real_authors_perturbed",
                "world_facts": "world_facts_perturbed",
            }

    def load(self, source: str) -> list[Row]:
        if "/" in source or "." in source:
            return super().load(source)
        folder = Path(self.path)
        if not folder.is_dir():
            if self.path.count("/") != 1 or plainly_local(self.path):
                raise absent("TOFU folder (data.path)", self.path, hub=True)
            return load_rows(f"{self.path}:{source}")
        for file in (folder / f"{source}.json", folder / f"{source}.jsonl"):
            if file.is_file():
                return load_rows(str(file))
        splits = ", ".join(sorted(f.stem for f in folder.glob("*.json*")))
        raise WagleError(f"TOFU split {source!r} is not in {self.path}; there are: {splits}")
