"""Where a parameter lies in a model, read from its name: layer, module type, module."""

from __future__ import annotations

import re
from typing import Optional

from wagle_pl.core.errors import WagleError

#: What users call a module -> what model families call it.
_ALIASES = {
    "attn": ("attn", "self_attn", "linear_attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc1", "fc2"),
    "embed": (
        *("embed_tokens", "embed_positions", "wte", "wpe", "embedding", "embeddings"),
        *("word_embeddings", "embed_in"),
    ),
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)(?:\.|$)")


def layer_of(name: str) -> Optional[int]:
    """Index of the transformer block a parameter belongs to, None outside the blocks.

    >>> layer_of("model.layers.7.mlp.up_proj.weight"), layer_of("lm_head.weight")
    (7, None)
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def module_type_of(name: str) -> str:
    """The last part of a parameter's name, not counting a final ``weight`` or ``bias``.

    >>> module_type_of("model.layers.7.mlp.up_proj.weight"), module_type_of("mlp.experts.down_proj")
    ('up_proj', 'down_proj')
    """
    *before, last = name.split(".")
    return before[-1] if before and last in ("weight", "bias") else last


def module_label(module_type: str) -> str:
    """The short name of a module type, for figures and tables.

    >>> [module_label(m) for m in ("q_proj", "input_layernorm", "ln_1", "c_attn")]
    ['q', 'norms', 'norms', 'c_attn']
    """
    is_norm = "norm" in module_type or module_type.startswith("ln_")
    return "norms" if is_norm else module_type.removesuffix("_proj")


def in_module(name: str, module: str) -> bool:
    """Whether a module's name occurs in a parameter's name, as one or more whole, adjacent parts.

    ``attn``, ``mlp``, ``norm`` and ``embed`` match whatever the model calls these; short names
    (:func:`module_label`) match, too.

    >>> name = "model.layers.7.mlp.down_proj.weight"
    >>> [in_module(name, m) for m in ("mlp", "down_proj", "mlp.down", "attn", "down_proj.mlp")]
    [True, True, True, False, False]
    """
    parts = name.split(".")
    wanted = ["norms" if part == "norm" else part for part in module.split(".")]
    return any(
        all(
            part in _ALIASES.get(want, (want,)) or module_label(part) == want
            for part, want in zip(parts[start:], wanted, strict=False)
        )
        for start in range(len(parts) - len(wanted) + 1)
    )


def parse_layers(layers: str) -> frozenset[int]:
    """Layer indices from a list of ranges, which include both ends.

    >>> sorted(parse_layers("0-2,8"))
    [0, 1, 2, 8]
    """
    pattern = r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?"
    parts = [re.fullmatch(pattern, part) for part in str(layers).split(",")]
    ranges = [range(int(m[1]), int(m[2] or m[1]) + 1) for m in parts if m]
    if len(ranges) < len(parts) or not all(ranges):
        raise WagleError(f"layers: {layers!r} is no range of layers; write e.g. 3-7, 5 or 0-3,8")
    return frozenset(layer for range_ in ranges for layer in range_)
