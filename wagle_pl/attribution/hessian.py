"""Diagonal estimates of the retain loss's Hessian."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_labels(logits: Tensor, labels: Tensor, seeds: list[int]) -> Tensor:
    """Labels drawn from the model's own predictions, where there is a label.

    Args:
        logits: (B, T, V); position t predicts token t + 1.
        labels: (B, T), -100 where nothing is predicted.
        seeds: one a row: a row's draw does not depend on the batch it is in.

    Returns:
        (B, T) labels, drawn where ``labels`` has one and -100 elsewhere.
    """
    drawn = torch.full_like(labels, -100)
    for i, seed in enumerate(seeds):
        mask = labels[i, 1:] != -100
        probabilities = logits[i, :-1][mask].detach().float().softmax(-1)
        generator = torch.Generator(device=logits.device).manual_seed(seed)
        drawn[i, 1:][mask] = torch.multinomial(probabilities, 1, generator=generator).view(-1)
    return drawn


def bartlett_loss(logits: Tensor, drawn: Tensor) -> Tensor:
    """Scalar whose squared gradient estimates the Gauss–Newton diagonal without bias.

    With one label drawn for each predicted token, E[∇ log p ∇ log pᵀ] is that token's Gauss–Newton matrix (Bartlett's
    identity) and draws are independent, so cross terms vanish. The retain loss Σ_n (1/T_n) Σ_t ℓ_nt has the Gauss–Newton
    diagonal Σ_n Σ_t (1/T_n) E[(∇ ℓ̂_nt)²] = E[(∇ Σ_n Σ_t T_n^(−1/2) ℓ̂_nt)²].

    Args:
        logits: (B, T, V).
        drawn: (B, T) labels from :func:`sample_labels`.

    Returns:
        Σ_n T_n^(−1/2) Σ_t −log p(drawn_nt).
    """
    targets = drawn[:, 1:]
    mask = targets != -100
    losses = F.cross_entropy(logits[:, :-1][mask].float(), targets[mask], reduction="none")
    scale = mask.sum(-1, keepdim=True).clamp(min=1).rsqrt().expand_as(mask)[mask]
    return (losses * scale).sum()
