"""``EvaluationModule``: a model to be tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from lightning.pytorch.callbacks import Callback

from wagle_pl.evaluation.evaluate import Evaluate
from wagle_pl.lm.module import LanguageModule


class EvaluationModule(LanguageModule):
    """A model that is tested: brings its own :class:`~wagle_pl.evaluation.Evaluate`.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the model.
        output: folder for the results; ``<default_root_dir>/test`` when None.
        overwrite: replace an existing output.
        attn_implementation: see :class:`~wagle_pl.lm.module.LanguageModule`.
        **kwargs: passed to :class:`~wagle_pl.evaluation.Evaluate`.
    """

    def __init__(
        self,
        model: str,
        output: Optional[str] = None,
        overwrite: bool = False,
        attn_implementation: Optional[str] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, output, overwrite, attn_implementation)
        self.evaluation: Evaluate = Evaluate(**kwargs)
        self.evaluation.options = "model"

    def configure_callbacks(self) -> list[Callback]:
        """The evaluation."""
        return [self.evaluation]

    @property
    def results_folder(self) -> Path:
        """Where a test writes: ``output`` if there is one."""
        return Path(self.output) if self.output else super().results_folder

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the last test, as in ``metrics.json``."""
        return self.evaluation.metrics

    @property
    def undefined(self) -> dict[str, str]:
        """Measures of the last test that are undefined, and why."""
        return self.evaluation.undefined
