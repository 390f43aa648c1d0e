"""Weights that are changed for a while: kept, quantised, fine-tuned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from wagle_pl.core.errors import WagleError
from wagle_pl.lm.layers import linear_weights
from wagle_pl.lm.likelihood import forward_answers, sequence_logprobs

Scheme = Literal["symmetric", "asymmetric"]


@contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Bring weights back, bit for bit, however the block ends. The copies wait in CPU memory."""
    kept = [(p, p.detach().to("cpu", copy=True), p.requires_grad, p.grad) for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weights, wanted, gradient in kept:
                parameter.data.copy_(weights)
                parameter.requires_grad_(wanted)
                parameter.grad = gradient


def fake_quantise(
    weights: Tensor, bits: int, scheme: Scheme = "asymmetric", group_size: Optional[int] = None
) -> Tensor:
    """Weights rounded to the nearest of 2^bits levels, per output channel, as numbers again.

    Symmetric: s = max|w| / (2^(b−1) − 1), w' = s · clamp(round(w / s), ±(2^(b−1) − 1)).
    Asymmetric: s = (max w − min w) / (2^b − 1) over a range that includes 0, z = round(−min w / s),
    w' = s · (clamp(round(w / s) + z, 0, 2^b − 1) − z). Round-to-nearest (RTN), as in arXiv 2410.16454.

    Args:
        weights: (out, in); a row is a channel.
        bits: 2 to 16.
        scheme: see above.
        group_size: of neighbouring inputs that have a scale of their own; a whole row when None.

    Returns:
        (out, in), of the dtype of ``weights``.

    >>> fake_quantise(torch.tensor([[-1.0, 0.2, 0.4, 1.0]]), bits=2, scheme="symmetric")
    tensor([[-1.,  0.,  0.,  1.]])
    """
    values = weights.float()
    rows, columns = values.shape
    size = group_size or columns
    if columns % size:
        values = nn.functional.pad(
            values, (0, size - columns % size)
        )  # zeros are within every range
    values = values.reshape(rows, -1, size)
    if scheme == "symmetric":
        top = 2 ** (bits - 1) - 1
        scale = (values.abs().amax(-1, keepdim=True) / top).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        found = (values / scale).round().clamp(-top, top) * scale
    else:
        top = 2**bits - 1
        low, high = (
            values.amin(-1, keepdim=True).clamp(max=0),
            values.amax(-1, keepdim=True).clamp(min=0),
        )
        scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round()
        found = (((values / scale).round() + zero).clamp(0, top) - zero) * scale
    return found.reshape(rows, -1)[:, :columns].to(weights.dtype)


@torch.no_grad()
def quantise_(lm: nn.Module, bits: int, scheme: Scheme, group_size: Optional[int] = None) -> None:
    """Fake-quantise the weights of all linear maps of the blocks in place, one matrix at a time.

    The output head is left out, as quantisers for language models leave it, and so are embeddings tied to it.
    """
    for weight, transposed in linear_weights(lm, head=False):
        for matrix in weight.data if weight.ndim == 3 else (weight.data,):
            channels = matrix.T if transposed else matrix
            rounded = fake_quantise(channels, bits, scheme, group_size)
            matrix.copy_(rounded.T if transposed else rounded)


def finetune_(
    lm: Any, batches: Sequence[Mapping[str, Tensor]], learning_rate: float
) -> list[float]:
    """Train all weights in place with AdamW, one step a batch; the loss is the mean over rows of the mean per token.

    The update is added in fp32 whatever the model's dtype: in bf16 small steps would round to nothing.

    Args:
        lm: a model whose weights are whole on this device.
        batches: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T), on its device.
        learning_rate: of AdamW, without decay.

    Returns:
        The loss before each step.

    Raises:
        WagleError: if a loss is not finite.
    """
    with torch.inference_mode(False), torch.enable_grad():
        weights = [p for p in lm.parameters() if p.is_floating_point()]
        masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in weights]
        for parameter in (*weights, *masters):
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(masters, lr=learning_rate, weight_decay=0.0)
        losses = []
        for step, batch in enumerate(batches):
            output, labels = forward_answers(lm, batch)
            sums, counts = sequence_logprobs(output.logits, labels)
            loss = -(sums / counts).mean()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise WagleError(
                    f"relearn: the loss is not finite at step {step + 1}; lower its learning_rate"
                )
            # not backward(): a data-parallel wrapper would take gradients to other ranks
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = None if gradient is None else gradient.to(master.dtype)
            optimizer.step()
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    if master is not weight:
                        weight.copy_(master)
        return losses
