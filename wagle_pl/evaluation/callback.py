"""``Evaluate``: :class:`~wagle_pl.evaluation.Evaluation` in the loops of a Trainer;
``EvaluationModule``: a model to be tested."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any, Optional

import lightning as L
from lightning.pytorch.callbacks import Callback

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation.evaluation import Evaluation
from wagle_pl.evaluation.options import Options, Plan
from wagle_pl.evaluation.results import Results
from wagle_pl.lm.module import LanguageModule

log = logging.getLogger(__name__)


class Evaluate(Callback):
    """Tests a :class:`~wagle_pl.lm.module.LanguageModule` in the loops of a Trainer.

    ``trainer.test`` runs the model once on every row of every test set of the data module. It
    writes, into the module's ``results_folder``, one Parquet table per test set (every row with its
    values and generation), ``metrics.json`` (flat, one number per key), ``metrics.info.json`` (unit
    and direction of each, and why others are undefined) and ``tofu_result.json`` (the same keys as
    the files published with TOFU), and prints the measures next to those of ``target`` and
    ``retrained``. An interrupted test continues with the first test set that is not finished.

    ``trainer.validate`` and ``trainer.fit`` measure the test sets that ``data.val`` names and log
    them as ``val/<measure>``, for callbacks such as ``EarlyStopping``.

    Args:
        **kwargs: passed to :class:`~wagle_pl.evaluation.Options`.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.options = Options(**kwargs)
        self.prefix = "trainer.callbacks."  # of the options' names in messages
        self.results: Optional[Results] = None  # of the last test

    def setup(self, trainer: L.Trainer, pl_module: LanguageModule, stage: str) -> None:
        """Check what a test needs and compares with before any work is done."""
        pl_module.serve()  # the module's own setup comes after this one
        data, validates = trainer.datamodule, stage != "test"
        names: list[str] = getattr(data, "val_names" if validates else "test_names", list)()
        if stage == "validate" and not names:
            why = "validate measures the test sets that data.val names"
            raise WagleError(f"{why}: give --data.val '[forget, retain]'")
        pl_module.evaluation = None
        if names or not validates:
            plan = Plan(data, self.options, names, self.prefix)
            log.info("measures are those of %s", type(plan.suite).__name__)
            pl_module.evaluation = Evaluation(
                plan,
                pl_module.results_folder,
                pl_module.overwrite,
                validates,
                pl_module.model_name,
                pl_module.sharded,
                str(trainer.precision),
                trainer.precision_plugin.test_step_context,
            )

    def on_test_start(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        trainer.test_loop.verbose = False  # its table would repeat ours
        loops = zip(trainer.test_dataloaders, trainer.num_test_batches, strict=True)
        batches = [list(islice(loader.sampler, int(count))) for loader, count in loops]
        pl_module.evaluation.start(pl_module.lm, batches)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Compute the measures, write and print them."""
        self.results = pl_module.evaluation.results()
        self.log_dict(self.results.metrics, rank_zero_only=True)
        if trainer.is_global_zero:
            self.results.write(pl_module.results_folder)
            print(self.results.text, flush=True)
            log.info("test results are in %s", pl_module.results_folder)

    def on_validation_start(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        if pl_module.evaluation is not None:
            pl_module.evaluation.start(pl_module.lm)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: LanguageModule) -> None:
        """Log the measures, unless this is Lightning's sanity check."""
        if pl_module.evaluation is not None and not trainer.sanity_checking:
            values = pl_module.evaluation.values()
            self.log_dict({f"val/{name}": v for name, v in values.items()}, sync_dist=True)


class EvaluationModule(LanguageModule):
    """A model to be tested, with its own :class:`Evaluate`.

    Args:
        model: hub id, folder in Hugging Face format or GGUF file of the model.
        output: folder for the results; ``<default_root_dir>/test`` when None.
        overwrite: replace an existing output.
        attn_implementation: see :class:`~wagle_pl.lm.module.LanguageModule`.
        **kwargs: passed to :class:`~wagle_pl.evaluation.Options`.
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
        self.evaluate = Evaluate(**kwargs)
        self.evaluate.prefix = "model."

    def configure_callbacks(self) -> list[Callback]:
        return [self.evaluate]

    @property
    def results_folder(self) -> Path:
        return Path(self.output) if self.output else super().results_folder

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers of the last test, as in ``metrics.json``."""
        return {} if self.evaluate.results is None else self.evaluate.results.metrics

    @property
    def undefined(self) -> dict[str, str]:
        """Measures of the last test that are undefined, and why."""
        return {} if self.evaluate.results is None else self.evaluate.results.undefined
