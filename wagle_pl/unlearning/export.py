"""A checkpoint turned into a model folder, on one CPU, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing
from wagle_pl.lm import models
from wagle_pl.lm.layers import is_linear, is_transposed
from wagle_pl.lm.saving import Originals, Weight, read_record, save_model, save_weights
from wagle_pl.lm.weights import fingerprint, parameter_shapes
from wagle_pl.masks import Restriction
from wagle_pl.masks.selected import SUFFIX, place
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
    return _write(_with_names(stored), path, output, model, mask)


def _with_names(stored: Stored) -> Stored:
    """Without a mask, values under the names of the weights that they are."""
    if stored.mask is not None:
        return stored
    names = {name.removesuffix(SUFFIX): name for name in stored.shapes}
    shapes = {name: stored.shapes[own] for name, own in names.items()}
    dtypes = {name: stored.dtypes[own] for name, own in names.items()}
    return stored._replace(
        shapes=shapes, dtypes=dtypes, read=lambda name: _rounded(stored, names[name])
    )


def _rounded(stored: Stored, name: str) -> Tensor:
    """A tensor of a checkpoint; values in the dtype of the weights that the model computed with."""
    tensor = stored.read(name)
    return tensor.to(getattr(torch, stored.about["dtype"])) if name.endswith(SUFFIX) else tensor


def _convert(name: str, output: str | Path) -> Path:
    """Write a model of another format as a folder; it is loaded whole."""
    if name.endswith(".ckpt"):
        raise WagleError(f"checkpoint {name} does not exist")
    lm = models.load_model(name)
    lm.to(models.checkpoint_dtype(name))
    record = read_record(name) or {"format_version": 1, "lineage": []}
    card = (
        model_card(record)
        if record["lineage"]
        else f"# A copy\n\nOf `{name}`, in Hugging Face format.\n"
    )
    return save_model(lm, models.load_tokenizer(name), output, card, record)


def _of_shards(path: Path) -> Stored:
    checkpoint = ShardedCheckpoint(path)
    common = checkpoint.common
    buffers = common.get("buffers", {})
    shapes = {
        **checkpoint.shapes,
        **{name: tuple(buffer.shape) for name, buffer in buffers.items()},
    }
    if "model" not in common or not checkpoint.pieces.get("weight"):
        raise WagleError(f"checkpoint {path} holds no weights: attribution moves none")
    dtypes = {
        **dict.fromkeys(checkpoint.shapes, torch.float32),
        **{n: b.dtype for n, b in buffers.items()},
    }
    return Stored(
        shapes,
        dtypes,
        lambda n: buffers[n] if n in buffers else checkpoint.weight(n),
        common["model"],
        common.get("mask"),
    )


def _of_file(path: Path) -> Stored:
    checkpoint = load_plain(path)
    state = checkpoint.get("state_dict", {}) if isinstance(checkpoint, dict) else {}
    state = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(PREFIX)
    }
    if not state or "model" not in checkpoint:
        raise WagleError(
            f"checkpoint {path} holds no weights of a language model (attribution moves none)"
        )
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        first.setdefault(
            (tensor.data_ptr(), tuple(tensor.shape)), name
        )  # tied weights are written once
    state = {name: state[name] for name in first.values()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Stored(
        shapes,
        {n: t.dtype for n, t in state.items()},
        state.__getitem__,
        checkpoint["model"],
        checkpoint.get("mask"),
    )


def _write(
    stored: Stored, path: Path, output: str | Path, model: Optional[str], mask: Optional[str]
) -> Path:
    from transformers import AutoConfig, GenerationConfig

    base, record = model or stored.about["name"], stored.about["record"]
    try:
        source, options = models.locate(base)
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = models.load_tokenizer(base)
        originals = Originals(base)
    except (WagleError, OSError, ValueError) as error:
        raise WagleError(
            f"checkpoint {path}: its base model {base} cannot be read ({error}); "
            "say where it is: --model"
        ) from None
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:
        generation = None  # the model has none of its own
    if stored.mask is not None:
        stored = _with_frozen(stored, config, originals, mask)
    adapter = record["lineage"][-1].get("adapter")
    loaded_as = getattr(torch, stored.about.get("dtype", ""), None)
    transposed = _transposed(config) if adapter else set()

    def read(name: str, whole: str) -> Tensor:
        values = _with_adapter(stored, whole, adapter, name.removesuffix(".weight") in transposed)
        return originals.restore(name, values, loaded_as)

    weights = [
        Weight(
            name,
            originals.dtype(name) or stored.dtypes[whole],
            stored.shapes[whole],
            partial(read, name, whole),
        )
        for name, whole in _names(stored.shapes).items()
    ]
    if hasattr(config, "quantization_config"):  # of a GGUF base: these weights are plain
        del config.quantization_config
    return save_weights(
        weights,
        (config, generation),
        tokenizer,
        output,
        model_card(record),
        record,
        originals.default,
    )


def _with_frozen(stored: Stored, config: Any, originals: Originals, file: Optional[str]) -> Stored:
    """All weights of a model, from the values of the selected ones and the base model.

    Raises:
        WagleError: if the base or the mask is not the one that the run had.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    shapes = parameter_shapes(model)
    found = fingerprint((name, originals.read(name)) for name in shapes)
    made_on = stored.about["fingerprint"]
    if found != made_on:
        raise WagleError(
            f"the checkpoint is of a run on the model with fingerprint {made_on[:12]}, {originals.name} has "
            f"{found[:12]}: say where the run's model is: --model"
        )
    made_of = {key: value for key, value in stored.mask.items() if key != "digest"}
    restriction = Restriction(**made_of)
    mask = restriction._replace(file=file or restriction.file).mask(shapes, originals.name, found)
    if mask.digest() != stored.mask["digest"]:
        raise WagleError(
            f"mask {file or restriction.file} is not the one of the checkpoint's run: say where that is: --mask"
        )
    loaded_as = getattr(torch, stored.about["dtype"])

    def read(name: str) -> Tensor:
        if name in stored.shapes:
            return stored.read(name)
        dense, values = originals.read(name).to(loaded_as), f"{name}{SUFFIX}"
        return (
            place(dense, mask[name], _rounded(stored, values)) if values in stored.shapes else dense
        )

    shapes |= {name: shape for name, shape in stored.shapes.items() if not name.endswith(SUFFIX)}
    dtypes = {name: stored.dtypes.get(name, loaded_as) for name in shapes}
    return stored._replace(shapes=shapes, dtypes=dtypes, read=read)


def _names(shapes: Mapping[str, Any]) -> dict[str, str]:
    """Names in the model folder -> names in the checkpoint, without those of an adapter."""
    return {name.replace(".base_layer.", "."): name for name in shapes if ".lora_" not in name}


def _transposed(config: Any) -> set[str]:
    """Names of the linear layers that store their weights as (in, out)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name
        for name, module in model.named_modules()
        if is_linear(module) and is_transposed(module)
    }


def _with_adapter(
    stored: Stored, name: str, adapter: Optional[Mapping[str, Any]], transposed: bool
) -> Tensor:
    """A weight; an adapter's (alpha / r) B A is added to it, in the order of the layer's
    dimensions."""
    weight = stored.read(name)
    layer = name.removesuffix("base_layer.weight")
    if layer == name or f"{layer}lora_A.default.weight" not in stored.shapes:
        return weight
    a, b = (stored.read(f"{layer}lora_{part}.default.weight").float() for part in "AB")
    product = (b @ a) * (adapter["alpha"] / adapter["r"])
    return weight.float() + (product.T if transposed else product)
