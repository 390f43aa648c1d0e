"""A checkpoint turned into a model folder, on one CPU, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.weights import fingerprint, is_linear, parameter_shapes
from wagle_pl.lm import models
from wagle_pl.lm.layers import is_transposed
from wagle_pl.lm.saving import Originals, Weight, read_record, save_model, save_weights
from wagle_pl.masks import Restriction
from wagle_pl.masks.selected import SUFFIX
from wagle_pl.masks.values import place
from wagle_pl.strategies import ShardedCheckpoint, load_plain
from wagle_pl.unlearning.card import model_card

PREFIX = "lm."  # of the language model's weights in a LightningModule's state


class Stored(NamedTuple):
    """A checkpoint's weights, not read yet.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> dtype.
        read: gives one of them.
        about: what the run said of itself: ``name`` of its base model, the ``dtype`` it was loaded
            in, and the ``record`` of a model folder.
        mask: what its mask was made of, if it had one: then the weights are values of selected
            weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]
    about: Mapping[str, Any]
    mask: Optional[Mapping[str, Any]] = None


def export(
    path: str | Path,
    output: str | Path,
    model: Optional[str] = None,
    mask: Optional[str] = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder from a checkpoint, or from a model in another format.

    Args:
        path: a checkpoint: a file, or a folder that ranks under DeepSpeed wrote; or a GGUF file, a
            folder of an adapter, a hub id: these are loaded whole.
        output: folder to write, in Hugging Face format.
        model: where the run's base model is now, if no longer where it was.
        mask: where the run's mask file is now, if no longer where it was.
        overwrite: replace an existing model folder.

    Raises:
        WagleError: if there is no such checkpoint, it holds no language model's weights, or its
            base is gone.
    """
    refuse_existing(Path(output), overwrite, "--overwrite true", kind="folder")
    path = Path(path)
    if path.is_dir() and (path / "index.json").is_file():
        stored = _of_shards(path)
    elif path.is_file() and path.suffix != ".gguf":
        stored = _of_file(path)
    else:
        return _convert(str(path), output)
    base, record = model or stored.about["name"], stored.about["record"]
    try:
        configs = _configs(base)
        tokenizer, originals = models.load_tokenizer(base), Originals(base)
    except (WagleError, OSError, ValueError) as error:
        raise WagleError(
            f"checkpoint {path}: its base model {base} cannot be read ({error}); say where it is: "
            "--model"
        ) from None
    with torch.device("meta"):
        lm = _skeleton(configs[0])
    stored = _as_weights(stored) if stored.mask is None else _all(stored, lm, originals, mask)
    if adapter := record["lineage"][-1].get("adapter"):
        stored = _with_adapter(stored, adapter["alpha"] / adapter["r"], lm)
    loaded_as = getattr(torch, stored.about.get("dtype", ""), None)

    def read(name: str) -> Tensor:
        return originals.restore(name, stored.read(name), loaded_as)

    weights = [
        Weight(name, originals.dtype(name) or stored.dtypes[name], shape, partial(read, name))
        for name, shape in stored.shapes.items()
    ]
    card = model_card(record)
    return save_weights(weights, configs, tokenizer, output, card, record, originals.default)


def _convert(name: str, output: str | Path) -> Path:
    """Write a model of another format as a folder; it is loaded whole."""
    if name.endswith(".ckpt"):
        raise WagleError(f"checkpoint {name} does not exist")
    lm = models.load_model(name)
    lm.to(models.checkpoint_dtype(name))
    record = read_record(name) or {"format_version": 1, "lineage": []}
    card = f"# A copy\n\nOf `{name}`, in Hugging Face format.\n"
    if record["lineage"]:
        card = model_card(record)
    return save_model(lm, models.load_tokenizer(name), output, card, record)


def _configs(base: str) -> tuple[Any, Any]:
    """A model's configuration and that of its generations, None if it has none."""
    from transformers import AutoConfig, GenerationConfig

    source, options = models.locate(base)
    config = AutoConfig.from_pretrained(source, **options)
    if hasattr(config, "quantization_config"):  # of a GGUF base: these weights are plain
        del config.quantization_config
    try:
        return config, GenerationConfig.from_pretrained(source)
    except OSError:
        return config, None


def _skeleton(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_config(config)
    lm.tie_weights()
    return lm


# -- what a checkpoint holds -----------------------------------------------------------------------


def _of_shards(path: Path) -> Stored:
    checkpoint = ShardedCheckpoint(path)
    common = checkpoint.common
    if "model" not in common or not checkpoint.pieces.get("weight"):
        raise WagleError(f"checkpoint {path} holds no weights: attribution moves none")
    buffers: dict[str, Tensor] = common.get("buffers", {})
    dtypes = dict.fromkeys(checkpoint.shapes, torch.float32)
    return Stored(
        checkpoint.shapes | {name: tuple(buffer.shape) for name, buffer in buffers.items()},
        dtypes | {name: buffer.dtype for name, buffer in buffers.items()},
        lambda name: buffers[name] if name in buffers else checkpoint.weight(name),
        common["model"],
        common.get("mask"),
    )


def _of_file(path: Path) -> Stored:
    checkpoint = load_plain(path)
    state = checkpoint.get("state_dict", {}) if isinstance(checkpoint, dict) else {}
    state = {n.removeprefix(PREFIX): t for n, t in state.items() if n.startswith(PREFIX)}
    if not state or "model" not in checkpoint:
        raise WagleError(
            f"checkpoint {path} holds no weights of a language model (attribution moves none)"
        )
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in state.items():  # tied weights are written once
        first.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
    state = {name: state[name] for name in first.values()}
    return Stored(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: tensor.dtype for name, tensor in state.items()},
        state.__getitem__,
        checkpoint["model"],
        checkpoint.get("mask"),
    )


# -- from values to weights ------------------------------------------------------------------------


def _rounded(stored: Stored, name: str) -> Tensor:
    """A tensor of a checkpoint; values in the dtype of the weights that the model computed with."""
    tensor = stored.read(name)
    return tensor.to(getattr(torch, stored.about["dtype"])) if name.endswith(SUFFIX) else tensor


def _as_weights(stored: Stored) -> Stored:
    """Without a mask: values under the names of the weights that they are."""
    names = {name.removesuffix(SUFFIX): name for name in stored.shapes}
    return stored._replace(
        shapes={name: stored.shapes[own] for name, own in names.items()},
        dtypes={name: stored.dtypes[own] for name, own in names.items()},
        read=lambda name: _rounded(stored, names[name]),
    )


def _all(stored: Stored, lm: nn.Module, originals: Originals, file: Optional[str]) -> Stored:
    """All weights of a model, from the values of the selected ones and the base model.

    Raises:
        WagleError: if the base or the mask is not the one that the run had.
    """
    shapes = parameter_shapes(lm)
    found, made_on = (
        fingerprint((name, originals.read(name)) for name in shapes),
        stored.about["fingerprint"],
    )
    if found != made_on:
        raise WagleError(
            f"the checkpoint is of a run on the model with fingerprint {made_on[:12]}, "
            f"{originals.name} has {found[:12]}: say where the run's model is: --model"
        )
    restriction = Restriction(**{k: v for k, v in stored.mask.items() if k != "digest"})
    restriction = restriction._replace(file=file or restriction.file)
    mask = restriction.mask(shapes, originals.name, found)
    if mask.digest() != stored.mask["digest"]:
        raise WagleError(
            f"mask {restriction.file} is not the one of the checkpoint's run: say where that is: "
            "--mask"
        )
    loaded_as = getattr(torch, stored.about["dtype"])

    def read(name: str) -> Tensor:
        if name in stored.shapes:
            return stored.read(name)
        dense, values = originals.read(name).to(loaded_as), f"{name}{SUFFIX}"
        if values not in stored.shapes:
            return dense
        return place(dense, mask[name], _rounded(stored, values))

    shapes |= {name: shape for name, shape in stored.shapes.items() if not name.endswith(SUFFIX)}
    dtypes = {name: stored.dtypes.get(name, loaded_as) for name in shapes}
    return stored._replace(shapes=shapes, dtypes=dtypes, read=read)


def _with_adapter(stored: Stored, scale: float, lm: nn.Module) -> Stored:
    """The weights with an adapter's ``scale`` B A added, and without the adapter."""
    names = {n.replace(".base_layer.", "."): n for n in stored.shapes if ".lora_" not in n}
    modules = dict(lm.named_modules())

    def read(name: str) -> Tensor:
        own = names[name]
        weight, layer = stored.read(own), own.removesuffix("base_layer.weight")
        if f"{layer}lora_A.default.weight" not in stored.shapes:
            return weight
        a, b = (stored.read(f"{layer}lora_{part}.default.weight").float() for part in "AB")
        module = modules[name.removesuffix(".weight")]
        transposed = is_linear(module) and is_transposed(module)
        product = (b @ a) * scale
        return weight.float() + (product.T if transposed else product)

    return stored._replace(
        shapes={name: stored.shapes[own] for name, own in names.items()},
        dtypes={name: stored.dtypes[own] for name, own in names.items()},
        read=read,
    )
