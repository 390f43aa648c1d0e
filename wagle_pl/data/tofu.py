"""TOFU, a task of fictitious unlearning (Maini et al. 2024, arXiv 2401.06121)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent, plainly_local
from wagle_pl.data.example import Row
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.data.rows import load_rows

#: Official forget splits -> the retain split that completes each to the full set.
RETAIN_OF = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


class TOFUDataModule(ForgetRetainDataModule):
    """TOFU's official splits, from a local folder or from the hub.

    Args:
        forget: ``forget01``, ``forget05`` or ``forget10``, or any file or dataset as in the base
            class.
        retain: an official split such as ``retain99``, or any file or dataset; None takes the split
            that goes with ``forget``.
        path: folder with ``<split>.json`` files, or the hub dataset.
        **kwargs: passed to :class:`ForgetRetainDataModule`. ``test`` replaces TOFU's four test
            sets.
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
        """Rows of an official split, or of any other source."""
        if "/" in source or "." in source:
            return super().load(source)
        folder = Path(self.path)
        if not folder.is_dir():
            if self.path.count("/") != 1 or plainly_local(self.path):
                raise absent("TOFU folder (data.path)", self.path, hub=True)
            return load_rows(f"{self.path}:{source}")
        files = [folder / f"{source}{suffix}" for suffix in (".json", ".jsonl")]
        file = next(filter(Path.is_file, files), None)
        if file is None:
            splits = ", ".join(sorted(f.stem for f in folder.glob("*.json*")))
            raise WagleError(f"TOFU split {source!r} is not in {self.path}; there are: {splits}")
        return load_rows(str(file))
