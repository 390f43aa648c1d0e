"""Validation: the measures of a model while it is trained, by Lightning's validation loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wagle_pl import distributed
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.observe import Observer, Record, merge

#: What needs generated answers.
GENERATED = frozenset({"generation", "reference", "paraphrased"})


class Validation:
    """Observes the test sets that ``data.val`` names, and measures them as a test does.

    Args:
        module: the module that is validated, an :class:`~wagle_pl.evaluation.EvaluationModule`.
        observer: runs its model on rows.
        names: the test sets.
        generate: also generate answers.
    """

    def __init__(self, module: Any, observer: Observer, names: list[str], generate: bool) -> None:
        self.module = module
        self.observer = observer
        self.generate = generate
        self.records: dict[str, list[Record]] = {name: [] for name in names}
        # a gradient norm would be added to the gradients of a step that has begun
        left_out = frozenset({"gradient"}) if generate else GENERATED | {"gradient"}
        self.needs = {name: module.needs_of(name, names) - left_out for name in names}

    @torch.inference_mode(False)  # tensors made in inference mode and kept, by ZeRO-3 say, are of no use in training
    def observe(self, batch: Mapping[str, Any], loader: int) -> None:
        """Observe a batch of rows.

        Args:
            batch: of :class:`~wagle_pl.data.module.TestBatches`.
            loader: which of the test sets it is of.
        """
        name = list(self.records)[loader]
        self.records[name] += self.module.observe_batch(self.observer, name, batch, self.needs[name])

    def measures(self) -> dict[str, float]:
        """``val/<measure>`` -> value, of those that are defined; a meeting of all ranks."""
        tables = {name: merge(records) for name, records in self.records.items()}
        if self.generate:
            for name in tables:
                tables[name] = distributed.from_rank_zero(lambda name=name: self.module.annotated(name, tables[name]))
        values = self.module.measures(tables)
        return {f"val/{name}": float(value) for name, value in values.items() if not isinstance(value, Undefined)}
