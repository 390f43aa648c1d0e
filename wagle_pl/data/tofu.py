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

#: Test sets of the paper -> split; the forget set's own perturbed rows are added by the forget split chosen.
TEST_SPLITS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


class TOFUDataModule(ForgetRetainDataModule):
    """TOFU's official splits, from a local folder or from the hub.

    Args:
        forget: ``forget01``, ``forget05`` or ``forget10``, or any file or dataset as in the base class.
        retain: an official split such as ``retain99``, or any file or dataset; None takes the split that goes with
            ``forget``.
        path: folder with ``<split>.json`` files, or the hub dataset.
        kwargs: see :class:`ForgetRetainDataModule`. ``test`` replaces TOFU's four test sets.
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
            self.test_sources = {"forget": f"{forget}_perturbed", **TEST_SPLITS}
            if forget not in RETAIN_OF:
                self.test_sources["forget"] = forget

    def load_rows(self, name: str) -> Optional[list[Row]]:
        """Rows of an official split, or of any other source the base class knows."""
        source = self.test_sources.get(name[5:]) if name.startswith("test/") else self.sources[name]
        if source is None or "/" in source or "." in source:
            return super().load_rows(name)
        if not Path(self.path).is_dir():
            if self.path.count("/") != 1 or plainly_local(self.path):
                raise absent("TOFU folder (data.path)", self.path, hub=True)
            return load_rows(f"{self.path}:{source}")
        file = next(
            (f for s in (".json", ".jsonl") if (f := Path(self.path) / f"{source}{s}").is_file()),
            None,
        )
        if file is None:
            splits = sorted(f.stem for f in Path(self.path).glob("*.json*"))
            raise WagleError(
                f"TOFU split {source!r} is not in {self.path}; there are: {', '.join(splits)}"
            )
        return load_rows(str(file))
