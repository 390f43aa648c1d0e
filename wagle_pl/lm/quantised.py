"""Weights as quantised models store them, in floating point: no special kernels, any device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from wagle_pl.core.errors import WagleError
from wagle_pl.lm.layers import linear_weights

NF4_BLOCK, GGUF_BLOCK = 64, 32
#: Levels of NF4 (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes holds them.
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)
# fmt: on
FORMS = ("nf4", "q8_0", "q4_0")


def check_form(form: Union[int, str], option: str) -> None:
    """Refuse what is neither a number of bits nor a form that can be made here."""
    if form not in FORMS and not (isinstance(form, int) and 2 <= form <= 16):
        raise WagleError(f"must be 2 to 16, or one of {', '.join(FORMS)}, got {form}", option)
    if str(form).startswith("q") and find_spec("gguf") is None:
        raise WagleError(f"{form} needs gguf: pip install 'wagle-pl[gguf]'", option)


@torch.no_grad()
def quantise_(lm: nn.Module, form: Union[int, str]) -> None:
    """Fake-quantise the blocks' linear maps in place, not the output head (nor tied embeddings)."""
    for weight, transposed in linear_weights(lm, head=False):
        for matrix in weight.data if weight.ndim == 3 else (weight.data,):
            rounded = rounded_to(matrix.T if transposed else matrix, form)
            matrix.copy_(rounded.T if transposed else rounded)


def rounded_to(weights: Tensor, form: Union[int, str]) -> Tensor:
    """(out, in) weights, rounded to a number of bits or to a form, in their dtype.

    Raises:
        WagleError: if a form of llama.cpp's does not divide the rows into blocks.
    """
    if isinstance(form, int):
        return fake_quantise(weights, form)
    return fake_nf4(weights) if form == "nf4" else fake_gguf(weights, form)


def fake_nf4(weights: Tensor) -> Tensor:
    """Weights in NF4: in blocks of 64 of the flattened tensor, the nearest level times max |w|.

    >>> fake_nf4(torch.tensor([[2.0, 0.2, -1.0]]))
    tensor([[ 2.0000,  0.1592, -1.0501]])
    """
    levels, bounds = nf4_levels(weights.device)
    blocks = blocks_of(weights.float(), NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = torch.bucketize(blocks * (1 / scale.clamp(min=1e-38)), bounds)
    values = (levels[nearest] * scale).view(-1)[: weights.numel()]
    return values.view(weights.shape).to(weights.dtype)


def nf4_levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """(16,) levels of NF4, and (15,) bounds half way between them."""
    levels = torch.tensor(NF4, device=device)
    return levels, (levels[1:] + levels[:-1]) / 2


def blocks_of(weights: Tensor, size: int) -> Tensor:
    """(blocks, size) weights of the flattened tensor, filled up with zeros."""
    flat = weights.reshape(-1)
    return pad(flat, (0, -len(flat) % size)).view(-1, size)


def fake_gguf(weights: Tensor, form: str) -> Tensor:
    """Weights in a form of llama.cpp's, by the quantisers of the package gguf."""
    from gguf import GGMLQuantizationType, quants

    if weights.shape[-1] % GGUF_BLOCK:
        raise WagleError(
            f"{form} has blocks of {GGUF_BLOCK} weights, which do not divide a row of "
            f"{weights.shape[-1]}: try another form"
        )
    kind = GGMLQuantizationType[form.upper()]
    stored = quants.quantize(np.ascontiguousarray(weights.float().cpu().numpy()), kind)
    return torch.from_numpy(quants.dequantize(stored, kind)).to(weights)


def fake_quantise(weights: Tensor, bits: int) -> Tensor:
    """Weights rounded to the nearest of 2^bits levels (RTN, arXiv 2410.16454), in floating point.

    s = (max w − min w) / (2^b − 1) over a range that includes 0, z = round(−min w / s),
    w' = s · (clamp(round(w / s) + z, 0, 2^b − 1) − z).

    ``weights`` are (out, in), one row per channel, which has a scale of its own.

    >>> fake_quantise(torch.tensor([[-1.0, 0.3, 0.9, 2.0]]), bits=2)
    tensor([[-1.,  0.,  1.,  2.]])
    """
    rows = weights.float()
    scale, zero = affine(rows, bits)
    rounded = torch.fake_quantize_per_channel_affine(rows, scale, zero.int(), 0, 0, 2**bits - 1)
    return rounded.to(weights.dtype)


def affine(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """s and z of each row, see :func:`fake_quantise`."""
    least, greatest = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
    scale = ((greatest - least) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, (-least / scale).round()
