"""Validation: the measures of a model while it is trained, by Lightning's validation loop."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wagle_pl.core import distributed
from wagle_pl.evaluation.observe import GENERATED, Record, merge
from wagle_pl.evaluation.sets import defined_only


class Validation:
    """Observes the test sets that ``data.val`` names, and measures them as a test does.

    Args:
        module: the module that is validated, an :class:`~wagle_pl.evaluation.EvaluationModule`.
        names: the test sets.
    """

    def __init__(self, module: Any, names: list[str]) -> None:
        self.module = module
        self.observer = module.make_observer()
        self.records: dict[str, list[Record]] = {name: [] for name in names}
        # a gradient norm would be added to the gradients of a step that has begun
        left_out = frozenset({"gradient"}) if module.val_generate else GENERATED | {"gradient"}
        self.needs = {name: module.needs_of(name, names) - left_out for name in names}

    @torch.inference_mode(
        False
    )  # tensors made in inference mode and kept, by ZeRO-3 say, are of no use in training
    def observe(self, batch: Mapping[str, Any], loader: int) -> None:
        """Observe a batch of rows.

        Args:
            batch: of :class:`~wagle_pl.data.module.TestBatches`.
            loader: which of the test sets it is of.
        """
        name = list(self.records)[loader]
        self.records[name] += self.module.observe_batch(
            self.observer, name, batch, self.needs[name]
        )

    def measures(self) -> dict[str, float]:
        """``val/<measure>`` -> value, of those that are defined; a meeting of all ranks."""
        module = self.module
        tables = {name: merge(records) for name, records in self.records.items()}
        if module.val_generate:
            read = {name: partial(module.annotated, name, table) for name, table in tables.items()}
            tables = {name: distributed.on_rank_zero(annotate) for name, annotate in read.items()}
        return {
            f"val/{name}": value for name, value in defined_only(module.measures(tables)).items()
        }
