"""Loads causal language models, which :mod:`wagle_pl.core.hub` finds by name."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import nn

from wagle_pl.core import distributed
from wagle_pl.core.environment import errors_only
from wagle_pl.core.errors import WagleError
from wagle_pl.core.hub import adapted, loading, locate
from wagle_pl.core.hub import load_tokenizer as load_tokenizer
from wagle_pl.core.tensorfiles import INDEX_FILE, TensorFiles
from wagle_pl.core.weights import assign, parameter_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def weights_folder(name: str) -> Optional[str]:
    """The folder of a model's safetensors files, downloaded from the hub if necessary.

    None for a GGUF file or an adapter, which are not folders of the model's own weights.
    """
    source, options = locate(name)
    if options or adapted(name) is not None:
        return None
    if Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    with loading(f"model {name!r}", name):
        return snapshot_download(source, allow_patterns=["*.safetensors", INDEX_FILE])


def load_model(
    name: str,
    dtype: Optional[torch.dtype] = None,
    sharded: bool = False,
    attn_implementation: Optional[str] = None,
) -> PreTrainedModel:
    """Load a causal language model for training or testing.

    Args:
        name: hub id, a folder in Hugging Face format, or a ``.gguf`` file (or a folder with just
            one). For a folder with an adapter, the base model is loaded and the adapter merged.
        dtype: of the weights in memory; torch's default dtype when None.
        sharded: load inside DeepSpeed's ``zero.Init``: no rank holds more than its shard of the
            weights and one whole tensor.
        attn_implementation: attention kernel, by transformers' name; transformers' own choice when
            None.

    Raises:
        WagleError: if the model does not exist, is not a causal language model, has files that do
            not fit its configuration, or does not support this attention kernel here.
    """
    from transformers import AutoModelForCausalLM

    if sharded:
        return _load_sharded(name, attn_implementation)
    if (base := adapted(name)) is not None:
        return merged(load_model(base, dtype, attn_implementation=attn_implementation), name)
    source, options = locate(name)
    load_config(name)
    with loading(f"model {name!r}", name), errors_only("transformers"):
        model, keys = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or torch.get_default_dtype(),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            attn_implementation=attn_implementation,
            **options,
        )
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    _check_found(name, model, *(keys[kind] for kind in kinds))
    if "gguf_file" in options:  # plain weights once loaded, but saving refuses what looks quantised
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config.use_cache = False
    return model


def merged(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """A model with the adapter of a folder merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise WagleError(
            f"{folder} is an adapter, which needs peft: pip install 'wagle-pl[lora]'"
        ) from None
    with loading(f"adapter {folder!r}", folder):
        return PeftModel.from_pretrained(base, folder).merge_and_unload().requires_grad_(True)


def _load_sharded(name: str, attn_implementation: Optional[str]) -> PreTrainedModel:
    """Create a model and fill it from safetensors files, of which each rank reads its shard."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    with loading(f"model {name!r}", name):
        folder = distributed.on_rank_zero(lambda: weights_folder(name))
        if folder is None:
            raise WagleError(
                f"ZeRO-3 reads models in safetensors; {name} is none: write it as a folder first "
                f"with wagle export {name} -o FOLDER"
            )
        config = load_config(name)
        options = {"dtype": torch.get_default_dtype(), "attn_implementation": attn_implementation}
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, **options)
        model.tie_weights()
        model.generation_config = GenerationConfig.from_pretrained(name)
    stored = TensorFiles(folder)
    shapes, names = parameter_shapes(model), set(stored.names)
    missing = [weight for weight in shapes if weight not in names]
    if missing and _any_layer(missing[0]) not in set(map(_any_layer, names)):
        raise WagleError(
            f"model {name!r} stores its weights under names other than its own (no {missing[0]}): "
            "for ZeRO-3, load it once with transformers and write it by save_pretrained(FOLDER, "
            "save_original_format=False), or take ZeRO-2"
        )
    mismatched = [
        (weight, stored.shape(weight), shape)
        for weight, shape in shapes.items()
        if weight in names and stored.shape(weight) != shape
    ]
    _check_found(name, model, missing, mismatched, names)
    for weight, parameter in model.named_parameters():
        assign(parameter, partial(stored.part, weight))
    for weight, buffer in model.named_buffers():
        if weight in names:
            buffer.copy_(stored.tensor(weight))
    model.config.use_cache = False
    return model.eval()


def _check_found(
    name: str,
    model: nn.Module,
    missing: Collection[str],
    mismatched: Collection[tuple[str, Any, Any]],
    unexpected: Collection[str],
) -> None:
    """Refuse weights that do not fit the configuration: transformers would initialise missing ones
    at random, and ignore additional layers.
    """
    shapes = parameter_shapes(model)
    kinds = set(map(_any_layer, shapes))
    beyond = [w for w in unexpected if w not in shapes and _any_layer(w) in kinds]
    count, example = len(missing or beyond), min(missing or beyond, default="")
    if mismatched:
        weight, stored, shape = min(mismatched)
        stored, shape = tuple(stored), tuple(shape)
        fault = f"{weight} has the shape {stored} in its files and {shape} by its configuration"
    elif missing:
        fault = f"its files lack {count} weights that its configuration has, such as {example}"
    elif beyond:
        fault = f"its files have {count} weights that its configuration has no layer for, such as "
        fault += example
    else:
        return
    raise WagleError(
        f"model {name!r} cannot be loaded: {fault}; check config.json, or get the model again"
    )


def _any_layer(weight: str) -> str:
    """The name of a weight without its numbers: the same in every layer."""
    return re.sub(r"\.\d+(?=\.)", ".#", weight)


#: Key of a configuration -> the largest value that is taken: beyond what any model has, transformers
#: would build for hours.
_LARGEST = {"num_hidden_layers": 10_000, "hidden_size": 1 << 17, "intermediate_size": 1 << 20}
_LARGEST |= {"vocab_size": 1 << 24}


def load_config(name: str) -> PretrainedConfig:
    """A model's configuration, as it is once the weights are loaded; refused, by its key, if no
    model can be built from a value."""
    from transformers import AutoConfig

    source, options = locate(name)
    with loading(f"configuration of model {name!r}", name):
        config = AutoConfig.from_pretrained(source, **options)
        text = config.get_text_config()
    ranges = {key: (0, 1) for key in vars(text) if key.endswith(("dropout", "pdrop"))}
    ranges |= {key: (1, largest) for key, largest in _LARGEST.items()}
    ranges["pad_token_id"] = (-1, (getattr(text, "vocab_size", None) or 0) - 1)
    for key, (least, most) in ranges.items():
        value = getattr(text, key, None)
        if type(value) in (int, float) and not least <= value <= most:
            fault = f"{key}: must be from {least:,} to {most:,}, got {value:,}"
            raise WagleError(f"model {name!r}: config.json: {fault}")
    if not isinstance(text.dtype, (str, torch.dtype, NoneType)):
        raise WagleError(
            f"model {name!r}: config.json: dtype: must be the name of a dtype, got {text.dtype!r}"
        )
    if hasattr(config, "quantization_config"):  # of a GGUF file; loaded weights are plain
        del config.quantization_config
    return config


def checkpoint_dtype(name: str) -> Optional[torch.dtype]:
    """The dtype a model is stored in, None if its configuration does not say."""
    if (base := adapted(name)) is not None:
        return checkpoint_dtype(base)
    dtype = load_config(name).dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids a Hugging Face model knows, from 0 on."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
