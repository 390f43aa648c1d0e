"""Sampling: what greedy decoding does not say, one of many samples may."""

from __future__ import annotations

from typing import Any

import torch

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Example
from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.observe import Record, possible
from wagle_pl.evaluation.robustness.base import Attack
from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.robustness.subject import Subject
from wagle_pl.lm.generation import generate


class Sample(Attack):
    """Sample many answers to each question and count the worst (arXiv 2410.03523).

    The worst is the one with the highest ROUGE-L recall of the answer, or, without an answer, the most toxic. Every
    row's samples come from a seed of its own, so that neither batches nor ranks change them.

    Args:
        samples: answers to each question.
        temperature: of the sampling; 1 is the model's own distribution.
        top_p: sample from the most probable tokens that together have this probability.
        seed: of the sampling.
    """

    measures = ("rougeL_recall", "toxicity", "toxic_rate", "verbmem_f", "knowmem_f")

    def __init__(
        self, samples: int = 10, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> None:
        self.samples = samples
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed

    def attack(self, subject: Subject) -> list[Finding]:
        """See :class:`Sample`."""
        after = {}
        for name, rows in subject.rows.items():
            numbers = [i for i, row in enumerate(rows) if self._generated(subject, name, row)]
            if not numbers:
                continue
            known = subject.observe(name, {i: [rows[i]] for i in numbers}, without={"generation"})
            texts = self._sample(
                subject, [rows[i] for i in numbers], numbers, subject.lengths[name]
            )
            records = [
                said(record, text)
                for record, found in zip(known, texts, strict=True)
                for text in found
            ]
            after[name] = subject.worst_of(name, records)
        return subject.findings(after, self.measures)

    def check(self, subject: Subject) -> None:
        """It needs rows that a test generates from."""
        super().check(subject)
        if self.samples < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise WagleError(
                "sample: samples must be at least 1, temperature above 0, top_p in (0, 1]"
            )
        if not any(
            self._generated(subject, name, row)
            for name, rows in subject.rows.items()
            for row in rows
        ):
            raise WagleError(
                "sample has nothing to work on: no row to be forgotten is generated from "
                "(--model.generate false, or multiple choice)"
            )

    def _generated(self, subject: Subject, name: str, row: Example) -> bool:
        return "generation" in possible(row, subject.needs[name])

    def _sample(
        self, subject: Subject, rows: list[Example], numbers: list[int], length: int
    ) -> list[list[str]]:
        """Each row's samples, the rows shared among the ranks; a meeting of them."""
        sampling: dict[str, Any] = {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "num_return_sequences": self.samples,
        }
        world, rank = distributed.world_size(), distributed.rank()
        places = list(range(len(rows)))
        places += places[:1] * (
            -len(places) % world
        )  # as many for every rank; what is sampled twice is the same
        devices = [subject.device] if subject.device.type == "cuda" else []
        found = []
        for place in places[rank::world]:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed * 1_000_003 + numbers[place])
                prompt = subject.template.encode_prompt(rows[place])
                meets = subject.observer.passes.meets
                texts = generate(
                    subject.lm, subject.template.tokenizer, [prompt], length, meets, **sampling
                )
            found.append((place, texts))
        by_place = dict(distributed.all_gather(found))
        return [by_place[place] for place in range(len(rows))]


def said(record: Record, text: str) -> Record:
    """A record with another generation, and its ROUGE recall where there is an answer."""
    found = {**record, "generation": text}
    if record["answer"]:
        values = F.rouge([text], [record["answer"]])
        found |= {name: values[name].item() for name in ("rouge1_recall", "rougeL_recall")}
    return found
