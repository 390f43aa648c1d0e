"""Where knowledge is planted: weights of a model, drawn with a seed."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from wagle_pl.attribution.selection import exact_count
from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import random_bits, unpack_bits
from wagle_pl.masks.names import in_module, layer_of

Shapes = Mapping[str, tuple[int, ...]]
Bools = dict[str, Tensor]
Draw = np.random.Generator


def plant_mask(
    plant: str, amount: float, shapes: Shapes, config: PretrainedConfig, seed: int
) -> WeightMask:
    """``amount`` of one of :data:`KINDS`, drawn with a seed."""
    draw = np.random.default_rng(stable_seed("plant", plant, seed))
    try:
        bools = KINDS[plant](shapes, config, draw, amount)
    except ValueError:
        message = f"plant {plant}: the model has not {amount} of that kind"
        raise WagleError(message, "--plants") from None
    zeros = {n: torch.zeros(s, dtype=torch.bool) for n, s in shapes.items() if n not in bools}
    mask = WeightMask.from_bools({name: {**zeros, **bools}[name] for name in shapes})
    mask.metadata |= {"score": f"plant {plant}, seed {seed}", "density": round(mask.density, 6)}
    return mask


def _random(shapes: Shapes, config: PretrainedConfig, draw: Draw, amount: float) -> Bools:
    """A share of all weights."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    wanted = exact_count(amount, sum(sizes.values()))
    bits = random_bits(sizes, wanted, int(draw.integers(1 << 32)))
    return {name: unpack_bits(bits[name], shape) for name, shape in shapes.items()}


def _block(shapes: Shapes, config: PretrainedConfig, draw: Draw, amount: float) -> Bools:
    """The whole MLPs of a number of blocks."""
    inside = [name for name in shapes if in_module(name, "mlp") and layer_of(name) is not None]
    layers = sorted(set(map(layer_of, inside)))
    chosen = set(draw.choice(layers, int(amount), replace=False).tolist())
    return {n: torch.ones(shapes[n], dtype=torch.bool) for n in inside if layer_of(n) in chosen}


def _heads(shapes: Shapes, config: PretrainedConfig, draw: Draw, amount: float) -> Bools:
    """The output of a number of attention heads, of any blocks: their columns of ``o_proj``."""
    names = [n for n, s in shapes.items() if in_module(n, "o_proj") and len(s) == 2]
    heads = config.num_attention_heads
    bools = {name: torch.zeros(shapes[name], dtype=torch.bool) for name in names}
    for place in draw.choice(len(names) * heads, int(amount), replace=False):
        bools[names[place // heads]].unflatten(1, (heads, -1))[:, place % heads] = True
    return bools


def _spread(shapes: Shapes, config: PretrainedConfig, draw: Draw, amount: float) -> Bools:
    """A share of the neurons of every MLP: their input and output weights."""
    bools, chosen = {}, {}
    for name, shape in shapes.items():
        if not in_module(name, "mlp") or len(shape) != 2 or config.hidden_size not in shape:
            continue
        dim = int(shape[0] == config.hidden_size)  # along which neurons are
        key = layer_of(name), shape[dim]
        if key not in chosen:
            chosen[key] = draw.choice(key[1], exact_count(amount, key[1]), replace=False)
        bools[name] = torch.zeros(shape, dtype=torch.bool)
        bools[name].index_fill_(dim, torch.from_numpy(chosen[key]), True)
    if not chosen:
        raise ValueError
    return bools


#: Kind of plant -> function of (shapes, configuration, generator, amount) -> tensors with some.
KINDS = {"random": _random, "block": _block, "heads": _heads, "spread": _spread}
