"""What the formulas need of a model, from its configuration alone."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.masks.names import layer_of


class Size(NamedTuple):
    """All that the sizes of files need of a model: N, and bytes a weight on disk."""

    weights: int
    stored: int


class Architecture(NamedTuple):
    """What the formulas need of a model.

    Attributes:
        name: of the model.
        shapes: parameter name -> shape, tied weights once.
        hidden, layers, heads: h, L and the number of heads.
        attention: q, size of all query heads together.
        keys: size of all key heads together.
        inner: I.
        gated: whether the MLP has a gate (Llama) or not (GPT-2).
        vocabulary: V.
        tied: whether one tensor is both embedding and output matrix.
        stored: bytes a weight on disk.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    hidden: int
    layers: int
    heads: int
    attention: int
    keys: int
    inner: int
    gated: bool
    vocabulary: int
    tied: bool
    stored: int

    @property
    def weights(self) -> int:
        """N."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def largest(self) -> int:
        """M."""
        return max(prod(shape) for shape in self.shapes.values())

    def small(self, threshold: int) -> int:
        """Weights in tensors of fewer than ``threshold`` weights."""
        return sum(prod(shape) for shape in self.shapes.values() if prod(shape) < threshold)


def architecture(name: str) -> Architecture:
    """What the formulas need of a model, from its configuration alone.

    Args:
        name: hub id, folder in Hugging Face format, or GGUF file.

    Raises:
        WagleError: if there is no such model, or its configuration does not say its shapes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from wagle_pl.core.weights import parameter_shapes
    from wagle_pl.lm import models

    source, options = models.locate(name)
    with models.loading(f"model {name!r}", name, "planned for"):
        config = AutoConfig.from_pretrained(source, **options)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:100]
        raise WagleError(
            f"the configuration of model {name!r} is of no causal language model with known "
            f"shapes: {reason}"
        ) from None
    return _described(name, config.get_text_config(), parameter_shapes(lm), config.dtype, lm)


def _described(
    name: str, config: Any, shapes: dict[str, tuple[int, ...]], dtype: Any, lm: Any
) -> Architecture:
    import torch

    def number(*attributes: str) -> Optional[int]:
        found = (getattr(config, attribute, None) for attribute in attributes)
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    hidden, layers = number("hidden_size"), number("num_hidden_layers")
    heads, vocabulary = number("num_attention_heads"), number("vocab_size")
    if not (hidden and layers and heads and vocabulary):
        raise WagleError(
            f"the configuration of model {name!r} does not say hidden size, layers, heads and "
            "vocabulary"
        )
    head = number("head_dim") or hidden // heads
    in_blocks = [shape for parameter, shape in shapes.items() if layer_of(parameter) is not None]
    widest = max((max(shape) for shape in in_blocks if len(shape) == 2), default=4 * hidden)
    return Architecture(
        name=name,
        shapes=shapes,
        hidden=hidden,
        layers=layers,
        heads=heads,
        attention=heads * head,
        keys=(number("num_key_value_heads") or heads) * head,
        inner=number("intermediate_size", "n_inner", "ffn_dim") or widest,
        gated=any("gate" in parameter for parameter in shapes),
        vocabulary=vocabulary,
        tied=bool(
            lm.get_output_embeddings() is not None
            and lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
        ),
        stored=(dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize,
    )
