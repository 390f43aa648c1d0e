"""A linear classifier of feature vectors, and how well it does on rows it was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ridge(features: Tensor, targets: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weights of a least-squares classifier: minimise ‖y − ȳ − (X − x̄) w‖² + λ‖w‖², λ = strength · tr(K) / N.

    Solved in its dual form, w = (X − x̄)ᵀ (K + λ I)⁻¹ (y − ȳ) with K = (X − x̄)(X − x̄)ᵀ, which costs N³, not D³.

    Args:
        features: (N, D), float64.
        targets: (N,), +1 and −1.
        strength: of the penalty, relative to the mean squared length of the centred features.

    Returns:
        ``(w, x̄)``, (D,) both; the score of x is (x − x̄) · w. Zero weights if all features are the same.
    """
    centre = features.mean(0)
    centred = features - centre
    kernel = centred @ centred.T
    penalty = strength * kernel.diagonal().mean()
    if penalty <= 0:
        return torch.zeros_like(centre), centre
    eye = torch.eye(len(kernel), dtype=kernel.dtype)
    return centred.T @ torch.linalg.solve(kernel + penalty * eye, targets - targets.mean()), centre


def folds(rows: int, count: int, seed: int) -> Tensor:
    """(rows,) number of each row's fold: ``count`` folds of about equal size, drawn at random."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    found = torch.empty(rows, dtype=torch.long)
    found[order] = torch.arange(rows) % count
    return found


def ordered(higher: Tensor, lower: Tensor) -> float:
    """Share of pairs in which the first is the larger one, ties half: the area under the ROC curve.

    Args:
        higher: (N,).
        lower: (M,).

    >>> ordered(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]))
    0.625
    """
    differences = higher[:, None] - lower[None]
    return ((differences > 0).double() + 0.5 * (differences == 0).double()).mean().item()


def told_apart(ours: Tensor, others: Tensor, strength: float, count: int, seed: int) -> float:
    """How well a linear classifier tells rows of two sets apart, by cross-validation; 0.5 is chance.

    Returns:
        Mean over folds of :func:`ordered` of the held-out rows' scores.

    Args:
        ours: (N, D) features.
        others: (M, D).
        strength: see :func:`ridge`.
        count: folds; at most N and M.
        seed: of the folds.
    """
    sides = [(side.double(), folds(len(side), count, seed)) for side in (ours, others)]
    values = []
    for fold in range(count):
        fitted = [side[part != fold] for side, part in sides]
        targets = torch.cat([torch.ones(len(fitted[0])), -torch.ones(len(fitted[1]))]).double()
        weights, centre = ridge(torch.cat(fitted), targets, strength)
        higher, lower = ((side[part == fold] - centre) @ weights for side, part in sides)
        values.append(ordered(higher, lower))
    return sum(values) / count


def right_told(
    right: Tensor, wrong: Sequence[Tensor], strength: float, count: int, seed: int
) -> float:
    """How well a linear classifier tells right answers from wrong ones to the same question; 0.5 is chance.

    It is fitted to differences, so that what a question's answers have in common is no clue.

    Args:
        right: (N, D) features of the right answers.
        wrong: of each row (K, D), of its wrong answers.
        strength, count, seed: see :func:`told_apart`; whole rows are held out.

    Returns:
        Share of the held-out rows' (right, wrong) pairs that are told right, ties half; each row once.
    """
    part = folds(len(right), count, seed)
    differences = [r.double() - w.double() for r, w in zip(right, wrong, strict=True)]
    total = 0.0
    for fold in range(count):
        fitted = torch.cat(
            [difference for difference, at in zip(differences, part, strict=True) if at != fold]
        )
        targets = torch.cat([torch.ones(len(fitted)), -torch.ones(len(fitted))]).double()
        weights, _ = ridge(torch.cat([fitted, -fitted]), targets, strength)
        for difference, at in zip(differences, part, strict=True):
            if at == fold:
                total += ordered(difference @ weights, torch.zeros(1, dtype=torch.float64))
    return total / len(right)
