"""``average: tokens``: each objective that OpenUnlearning has too, against its formula (src/trainer) on rows of
unequal lengths, and the same number however a batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from wagle_pl import WagleError
from wagle_pl import objectives as o
from wagle_pl.core.needs import Needs
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.data.batches import GlobalBatchSampler
from wagle_pl.lm.inference import Predictions
from wagle_pl.objectives.forget import Streams

ROWS, WIDTH, VOCABULARY = 4, 12, 17
LENGTHS = {"forget": (10, 2, 5, 3), "retain": (1, 9, 4, 7), "refusal": (3, 3, 8, 2)}
Batch = dict[str, dict[str, Tensor]]


@pytest.fixture
def batch() -> Batch:
    """Random logits and labels; the answers are of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for stream, lengths in LENGTHS.items():
        labels = torch.randint(VOCABULARY, (ROWS, WIDTH), generator=generator)
        for row, length in enumerate(lengths):
            labels[row, : WIDTH - length] = -100
        made[stream] = {
            "labels": labels,
            "logits": 2 * torch.randn(ROWS, WIDTH, VOCABULARY, generator=generator),
            "reference": -8 * torch.rand(ROWS, generator=generator),
            "weight": torch.full((ROWS,), 1 / ROWS),
            "row": torch.arange(ROWS),
        }
    return made


def run(tensors: dict[str, Tensor]) -> Predictions:
    return Predictions(tensors["logits"].flatten(0, 1)).at(tensors["places"])


def token_losses(tensors: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each position, 0 where there is no label."""
    labels, logits = tensors["labels"][:, 1:], tensors["logits"][:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")


def mean_loss(tensors: dict[str, Tensor]) -> Tensor:
    """``outputs.loss`` of a causal language model of transformers."""
    return token_losses(tensors).sum() / (tensors["labels"][:, 1:] != -100).sum()


def weighted(batch: Batch, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """compute_wga_loss and compute_satimp_loss, ``weight`` of each token's probability."""
    losses = token_losses(batch["forget"])
    chosen = batch["forget"]["labels"][:, 1:] != -100
    return -(weight((-losses).exp()) * losses)[chosen].mean()


def preferred(batch: Batch, beta: float, win: str | None = None) -> Tensor:
    """compute_dpo_loss."""

    def ratio(stream: str) -> Tensor:
        return -token_losses(batch[stream]).sum(-1) - batch[stream]["reference"]

    won = ratio(win) if win else 0.0
    return -2 / beta * F.logsigmoid(beta * (won - ratio("forget"))).mean()


def simnpo(batch: Batch, beta: float, delta: float) -> Tensor:
    losses = (
        token_losses(batch["forget"]).sum(-1) / (batch["forget"]["labels"] != -100).sum(-1) - delta
    )
    return -F.logsigmoid(beta * losses).mean() * 2 / beta


def ceu(batch: Batch, ignored: int) -> Tensor:
    labels = batch["forget"]["labels"].clone()
    labels[((labels != -100).cumsum(-1) <= ignored) & (labels != -100)] = -100
    chosen = labels[:, 1:] != -100
    logits = batch["forget"]["logits"][:, :-1][chosen]
    target = logits.scatter(1, labels[:, 1:][chosen][:, None], -torch.inf).softmax(-1)
    return F.cross_entropy(logits, target)


CASES: dict[str, tuple[Callable[..., Any], Callable[[Batch], Tensor]]] = {
    "GradAscent": (lambda **k: o.GradAscent(**k), lambda b: -mean_loss(b["forget"])),
    "GradDiff": (
        lambda **k: o.GradDiff(**k),
        lambda b: mean_loss(b["retain"]) - mean_loss(b["forget"]),
    ),
    "WGA": (
        lambda **k: o.WGA(beta=0.7, **k),
        lambda b: mean_loss(b["retain"]) + weighted(b, lambda p: p**0.7),
    ),
    "SatImp": (
        lambda **k: o.SatImp(beta1=5, beta2=1, forget_weight=0.1, **k),
        lambda b: mean_loss(b["retain"]) + 0.1 * weighted(b, lambda p: p**5 * (1 - p)),
    ),
    "NPO": (lambda **k: o.NPO(beta=0.1, **k), lambda b: mean_loss(b["retain"]) + preferred(b, 0.1)),
    "DPO": (
        lambda **k: o.DPO(beta=0.1, **k),
        lambda b: mean_loss(b["retain"]) + preferred(b, 0.1, "refusal"),
    ),
    "SimNPO": (
        lambda **k: o.SimNPO(beta=4.5, gamma=4.5 * 0.2, forget_weight=0.125, **k),
        lambda b: mean_loss(b["retain"]) + 0.125 * simnpo(b, 4.5, 0.2),
    ),
    "PO": (
        lambda **k: o.PO(**k),
        lambda b: mean_loss(b["retain"]) + mean_loss(b["refusal"]),
    ),
    "CEU": (lambda **k: o.CEU(skip_first=1, retain="none", **k), lambda b: ceu(b, 1)),
    "FineTune": (lambda **k: o.FineTune(**k), lambda b: mean_loss(b["retain"])),
}


def loss_of(objective: Any, batch: Batch) -> Tensor:
    sums = {name: batch[name]["reference"] for name in objective.references}
    return objective(Streams(batch, run, sums))["loss"]


@pytest.mark.parametrize("name", CASES)
def test_it_equals_theirs(batch: Batch, name: str) -> None:
    make, theirs = CASES[name]
    assert loss_of(make(average="tokens"), batch) == pytest.approx(theirs(batch).item(), rel=1e-5)
    assert loss_of(make(), batch) != pytest.approx(
        theirs(batch).item(), rel=1e-3
    )  # means over rows


@pytest.mark.parametrize("name", CASES)
def test_it_does_not_depend_on_the_cut(batch: Batch, name: str) -> None:
    """A mean over micro-batches of 1 and 3 rows, weighted as they are dealt."""
    objective = CASES[name][0](average="tokens")
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {}
        for stream, tensors in batch.items():
            mean = float((tensors["labels"] != -100).sum(-1).float().mean())
            cut = {key: value[rows] for key, value in tensors.items()}
            part[stream] = cut | {
                "weight": 2 * cut["weight"],
                "mean_tokens": torch.full_like(cut["weight"], mean),
                "reference": tensors["reference"],
            }
        parts.append(loss_of(objective, part))
    assert sum(parts) / 2 == pytest.approx(loss_of(objective, batch).item(), rel=1e-5)


def test_the_data_counts_tokens_of_the_global_batch(rows: dict[str, str], tiny_model: str) -> None:
    data = ForgetRetainDataModule(forget=rows["forget"], retain=rows["retain"])
    streams = ("forget", "retain", "refusal")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    data.needs = Needs(streams, counted=streams, tokenizer=lambda: tokenizer)
    lengths = {
        name: [len(row["input_ids"]) for row in data.tokens(name)] for name in ("forget", "retain")
    }
    for world, accumulate, size in ((1, 1, 8), (2, 2, 2)):
        shares = dict.fromkeys(streams, 0.0)
        for rank in range(world):
            sampler = GlobalBatchSampler(lengths, size, accumulate, world, rank)
            for _, draw in zip(range(accumulate), sampler, strict=False):
                for stream, tensors in data.build(streams, draw).items():
                    count = (tensors["labels"][:, 1:] != -100).sum(-1)
                    share = tensors["weight"] * count / tensors["mean_tokens"]
                    shares[stream] += share.sum().item() / (world * accumulate)
        assert shares == pytest.approx(dict.fromkeys(streams, 1.0))


def test_another_average_is_refused() -> None:
    with pytest.raises(WagleError, match="must be 'rows' or 'tokens'"):
        o.NPO(average="batch")
