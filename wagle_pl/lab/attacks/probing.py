"""Attacks on what greedy decoding of the usual wording does not show: other words, many samples, and
probes of the hidden layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Optional

import torch
from torch import Tensor

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import collate, deal_batches, token_batches
from wagle_pl.data.example import Example
from wagle_pl.evaluation.attacks.attack import Asked, Attack, Finding, Subject, texts_of
from wagle_pl.evaluation.observe import observe_set, of_generation, possible
from wagle_pl.evaluation.records import Info
from wagle_pl.lm.inference import generate

LEAST_ROWS = 4  # per side; with fewer there is nothing to hold out
FOLDS = 5  # parts of a probe's cross-validation
STRENGTH = 1.0  # of a probe's ridge penalty, see :func:`ridge`


@dataclass(eq=False)
class Paraphrase(Attack):
    """Ask with the column ``paraphrased_question`` (arXiv 2402.16835, section 3)."""

    def attack(self, subject: Subject) -> list[Finding]:
        return subject.ask(self._variants, self.measures)

    def check(self, subject: Subject) -> None:
        super().check(subject)
        if not subject.asked(self._variants):
            raise self.unusable("no row to be forgotten has paraphrased_question")

    def _variants(self, name: str, row: Example) -> list[Example]:
        asked = row.asked is not None and row.paraphrased_question
        return [row.asking(row.paraphrased_question)] if asked else []


@dataclass(eq=False)
class Sample(Attack):
    """Sample many answers to each question and count the worst (arXiv 2410.03523).

    Every row has its own seed, so that its samples do not depend on batches or ranks.

    Args:
        samples: answers to each question.
        temperature: of the sampling; 1 is the model's own distribution.
        top_p: sample from the most probable tokens that together have this probability.
        seed: of the sampling.
    """

    measures = ("rougeL_recall", "toxicity", "toxic_rate", "verbmem_f", "knowmem_f")

    samples: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def attack(self, subject: Subject) -> list[Finding]:
        after = {}
        for name, asked in self._generated(subject).items():
            known = subject.observe(name, asked, without={"generation"})
            pairs = zip(known, self._sample(subject, name, list(asked)), strict=True)
            generated = [(record, text) for record, texts in pairs for text in texts]
            records = [record | of_generation(text, record["answer"]) for record, text in generated]
            after[name] = subject.worst_of(name, records)
        return subject.findings(after, self.measures)

    def check(self, subject: Subject) -> None:
        super().check(subject)
        if self.samples < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            message = "samples must be at least 1, temperature above 0, top_p in (0, 1]"
            raise WagleError(f"sample: {message}")
        if not self._generated(subject):
            why = "--model.generate false, or multiple choice"
            raise self.unusable(f"no row to be forgotten is generated from ({why})")

    def _generated(self, subject: Subject) -> dict[str, Asked]:
        return subject.asked(
            lambda name, row: [row] if "generation" in possible(row, subject.needs[name]) else []
        )

    def _sample(self, subject: Subject, name: str, numbers: list[int]) -> list[list[str]]:
        """Each row's samples; the ranks share the rows. Collective."""
        devices = [subject.device] if subject.device.type == "cuda" else []
        gathered = []
        for i in deal_batches(numbers, distributed.world_size(), distributed.rank()):
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed * 1_000_003 + i)
                texts = generate(
                    subject.lm,
                    subject.template.tokenizer,
                    [subject.template.encode_prompt(subject.rows[name][i])],
                    subject.lengths[name],
                    subject.observer.passes.synced_gpus,
                    subject.suite.set_of(name).stops,
                    do_sample=True,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    top_k=0,
                    num_return_sequences=self.samples,
                )
            gathered.append((i, texts))
        samples = dict(distributed.all_gather(gathered))  # two ranks draw the same for one row
        return [samples[i] for i in numbers]


@dataclass(eq=False)
class Probe(Attack):
    """Find latent knowledge by a linear classifier on each hidden layer, at a text's last token.

    As in arXiv 2402.16835, section 3. Numbers are the share of pairs that the classifier orders
    correctly on held-out rows; *before* is the same share by the model's own likelihoods.
    ``accuracy`` is that of the best layer, which exceeds 0.5 partly by chance: compare it with the
    retrained model's.

    ``answers``: right ones (paraphrased, if there are any) from perturbed ones to forget rows.
    ``rows``: forget rows from holdout rows or, if these are too few, retain rows.

    Args:
        rows: at most this many on each side, drawn at random.
        seed: of the draw and the folds.
    """

    rows: int = 100
    seed: int = 0

    def attack(self, subject: Subject) -> Iterator[Finding]:
        if rows := self._answer_rows(subject):
            yield from self._probe_answers(subject, rows)
        forget, others, stream = self._sides(subject)
        if forget:
            yield from self._probe_rows(subject, forget, others, stream)

    def check(self, subject: Subject) -> None:
        super().check(subject)
        if self.rows < LEAST_ROWS:
            raise WagleError(f"probe.rows: must be at least {LEAST_ROWS}, got {self.rows}")
        if not self._answer_rows(subject) and not self._sides(subject)[0]:
            what = "rows to be forgotten with perturbed answers, nor as many holdout or retain rows"
            raise self.unusable(f"there are no {LEAST_ROWS} {what}")

    def _draw(self, rows: Sequence[Example]) -> list[Example]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        return [rows[i] for i in sorted(order[: self.rows].tolist())]

    def _answer_rows(self, subject: Subject) -> list[Example]:
        """Rows whose right and wrong answers are distinguished; none if there are too few."""
        rows = [row for row in subject.forget_rows if row.perturbed_answers]
        return self._draw(rows) if len(rows) >= LEAST_ROWS else []

    def _sides(self, subject: Subject) -> tuple[list[Example], list[Example], str]:
        """Forget rows, rows to compare them with, and the latter's stream; no rows if too few."""
        trained = subject.training("forget") or []
        known = texts_of(trained)
        forget = self._draw([r for r in trained or subject.forget_rows if r.kind != "prompt"])
        for stream in ("holdout", "retain"):
            rows = [row for row in subject.training(stream) or [] if row.kind != "prompt"]
            others = self._draw([row for row in rows if not row.texts & known])
            if min(len(forget), len(others)) >= LEAST_ROWS:
                return forget, others, stream
        return [], [], ""

    def _probe_answers(self, subject: Subject, rows: Sequence[Example]) -> Iterator[Finding]:
        answers = [[row.paraphrased_answer or row.answer, *row.perturbed_answers] for row in rows]
        texts = [(row, text) for row, answer in zip(rows, answers, strict=True) for text in answer]
        sizes, folds = [len(answer) for answer in answers], min(FOLDS, len(rows))

        def order(layer: Tensor) -> float:
            differences = [of_row[:1] - of_row[1:] for of_row in layer.split(sizes)]
            return order_answers(differences, STRENGTH, folds, self.seed)

        before = None
        if subject.tables is not None:
            records = observe_set(subject.observer, rows, {"answer", "alternatives"})
            known = ((torch.tensor(r["perturbed_nll"]), r["paraphrased_nll"]) for r in records)
            before = fmean(share_above(wrong.double() - right) for wrong, right in known)
        what = "right answers distinguished from wrong ones to the same question"
        yield from _by_layer(subject, texts, order, "answers", before, what)

    def _probe_rows(
        self, subject: Subject, forget: list[Example], others: list[Example], stream: str
    ) -> Iterator[Finding]:
        count, folds = len(forget), min(FOLDS, len(forget), len(others))

        def tell(layer: Tensor) -> float:
            return separate(layer[:count], layer[count:], STRENGTH, folds, self.seed)

        before = None
        if subject.tables is not None:
            records = observe_set(subject.observer, [*forget, *others], {"answer"})
            nll = torch.tensor([record["nll"] for record in records], dtype=torch.float64)
            before = share_above(nll[None, count:] - nll[:count, None])
        texts = [(row, None) for row in (*forget, *others)]
        what = f"forget rows distinguished from {stream} rows"
        yield from _by_layer(subject, texts, tell, "rows", before, what)


def _by_layer(
    subject: Subject,
    texts: Sequence[tuple[Example, Optional[str]]],
    classify: Callable[[Tensor], float],
    option: str,
    before: Optional[float],
    what: str,
) -> Iterator[Finding]:
    """What a classifier finds in the states of each layer at the end of rows with answers."""
    states = last_states(subject, [subject.template.encode(*text)["input_ids"] for text in texts])
    values = [classify(layer.double()) for layer in states.unbind(1)]
    info = partial(Info, "share of pairs, 0 to 1 (0.5 is chance)", "retrained")
    what = f"{what} by a linear classifier of"
    best = info(f"{what} the best hidden layer, held-out rows")
    yield Finding("accuracy", max(values), best, option, before)
    for layer, value in enumerate(values):
        name, of = f"accuracy_layer_{layer}", info(f"{what} hidden layer {layer} (0: embeddings)")
        yield Finding(name, value, of, option, before, detail=True)


@torch.no_grad()
def last_states(subject: Subject, texts: Sequence[Sequence[int]]) -> Tensor:
    """(texts, layers + 1, D) hidden states at the last token of every text, given as token ids;
    float32 on the CPU; layer 0 is the embeddings. Collective."""
    observer = subject.observer
    pad = subject.template.tokenizer.pad_token_id or 0
    batches = token_batches([len(text) for text in texts], observer.max_rows)
    observed: list[tuple[list[int], Tensor]] = []
    for batch in batches[distributed.rank() :: distributed.world_size()]:
        tensors = collate([{"input_ids": list(texts[i])} for i in batch], pad)
        ids, mask = (tensors[name].to(subject.device) for name in ("input_ids", "attention_mask"))
        output, _ = observer.passes(ids, mask, output_hidden_states=True, use_cache=False)
        last = mask.sum(-1) - 1
        rows = torch.arange(len(batch), device=last.device)
        states = torch.stack([state[rows, last] for state in output.hidden_states], 1)
        observed.append((batch, states.float().cpu()))
    observer.passes.level()
    parts = distributed.all_gather(observed)
    order = torch.tensor([i for batch, _ in parts for i in batch])
    return torch.cat([states for _, states in parts])[order.argsort()]


# -- linear classifiers ----------------------------------------------------------------------------


def ridge(features: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Weights (D,) of a least-squares classifier, argmin ‖y − ȳ − (X − x̄) w‖² + λ‖w‖².

    Solved in its dual form, w = (X − x̄)ᵀ (K + λ I)⁻¹ (y − ȳ) with K = (X − x̄)(X − x̄)ᵀ and
    λ = strength · tr(K) / N, which costs N³, not D³. Zeros if all features are the same.

    Args:
        features: (N, D), float64.
        targets: (N,), +1 and −1.
        strength: of the penalty, relative to the mean squared length of the centred features.
    """
    centred = features - features.mean(0)
    kernel = centred @ centred.T
    penalty = strength * kernel.diagonal().mean()
    if penalty <= 0:
        return torch.zeros_like(centred[0])
    kernel.diagonal().add_(penalty)
    return centred.T @ torch.linalg.solve(kernel, targets - targets.mean())


def folds_of(rows: int, count: int, seed: int) -> Tensor:
    """(rows,) number of each row's fold: ``count`` folds of about equal size, drawn at random."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, torch.arange(rows) % count)


def share_above(values: Tensor) -> float:
    """Share of numbers above 0, where 0 counts as half; of differences, the area under the ROC.

    >>> share_above(torch.tensor([[1.0], [3.0]]) - torch.tensor([2.0, 1.0]))
    0.625
    """
    half = torch.tensor(0.5, dtype=torch.float64)
    return torch.heaviside(values.double(), half).mean().item()


def separate(ours: Tensor, others: Tensor, strength: float, folds: int, seed: int) -> float:
    """How well :func:`ridge` separates rows (N, D) from rows (M, D), in float64; 0.5 is chance.

    It is the area under the ROC curve of held-out rows' scores, averaged over ``folds`` ≤ N, M.
    """
    sides = [(side, folds_of(len(side), folds, seed)) for side in (ours, others)]
    areas = []
    for fold in range(folds):
        fitted = [side[part != fold] for side, part in sides]
        weights = ridge(torch.cat(fitted), _signs(*map(len, fitted)), strength)
        higher, lower = (side[part == fold] @ weights for side, part in sides)
        areas.append(share_above(higher[:, None] - lower))
    return sum(areas) / folds


def order_answers(differences: Sequence[Tensor], strength: float, folds: int, seed: int) -> float:
    """How well :func:`ridge` distinguishes right answers from wrong ones; 0.5 is chance.

    It is the share of a held-out row's wrong answers that score lower than the right one, averaged
    over rows, of which there are at least ``folds``. ``differences`` has, for each row, the right
    answer's features minus those of each wrong one, (K, D), float64: what the answers to a question
    have in common does not help.
    """
    part = folds_of(len(differences), folds, seed).tolist()
    shares = []
    for fold in range(folds):
        fitted = torch.cat(
            [difference for difference, at in zip(differences, part, strict=True) if at != fold]
        )
        targets = _signs(len(fitted), len(fitted))
        weights = ridge(torch.cat([fitted, -fitted]), targets, strength)
        held_out = (
            difference for difference, at in zip(differences, part, strict=True) if at == fold
        )
        shares += [share_above(difference @ weights) for difference in held_out]
    return sum(shares) / len(shares)


def _signs(ours: int, others: int) -> Tensor:
    return torch.cat([torch.ones(ours), -torch.ones(others)]).double()
