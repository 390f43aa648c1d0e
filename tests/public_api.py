"""What a user writes, for the type checker: ``mypy`` reads this file, and pytest does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from wagle_pl import (
    AttributionModule,
    EvaluationModule,
    ForgetRetainDataModule,
    Objective,
    PeopleDataModule,
    Score,
    Suite,
    TOFUDataModule,
    UnlearnModule,
    WagleError,
    WeightMask,
    ZeRO,
)
from wagle_pl.attribution import Collected, Job, WeightStatistics, collect
from wagle_pl.evaluation import Evaluate
from wagle_pl.evaluation.attacks import Attack, Finding, Subject
from wagle_pl.objectives import Streams


class Flat(Objective):
    def forget_loss(self, at: Streams) -> Tensor:
        return (at["forget"].nll - 5.0) ** 2


class Product(Score):
    needs = ("g_f", "g_r")

    def __call__(self, w: WeightStatistics) -> Tensor:
        assert w.g_f is not None and w.g_r is not None
        return w.g_f * w.g_r


class Numbers(ForgetRetainDataModule):
    def train_rows(self, stream: str) -> list[dict[str, Any]]:
        return [{"question": f"{stream} {i}?", "answer": str(i)} for i in range(100)]


class Quiet(Attack):
    def attack(self, subject: Subject) -> Iterator[Finding]:
        yield from subject.ask(lambda name, row: [row.asking("?")], self.measures)


def use(lm: nn.Module, batches: list[dict[str, dict[str, Tensor]]]) -> WeightMask:
    data = TOFUDataModule(forget="forget05", batch_size=8)
    unlearn = UnlearnModule(model="m", output="o", objective=Flat(), lr=1e-5)
    trainer = L.Trainer(strategy=ZeRO(stage=2), callbacks=[Evaluate(suite="tofu")])
    trainer.fit(unlearn, data)
    trainer.test(EvaluationModule("o", retrained="results"), PeopleDataModule())
    trainer.fit(AttributionModule("m", output="mask", score=Product(), density=0.1), Numbers())
    sums = collect(lm, batches, [Job("forget", total="g_f")])
    made = Collected(lm, sums).mask("gradient", density=0.1)
    if made is None:
        raise WagleError("rank 0 has the mask")
    mask = made & ~WeightMask.load("mask")
    path: Path = mask.save("other")
    share: float = mask.density
    print(path, share, torch.equal(mask["name"], mask["name"]), Suite().sets)
    return mask
