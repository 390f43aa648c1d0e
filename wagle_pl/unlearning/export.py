"""Model folders: their card, and how a checkpoint is turned into one, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.hub import card_of
from wagle_pl.core.schema import Json, check
from wagle_pl.core.tensorfiles import load_plain
from wagle_pl.core.text import markdown_table
from wagle_pl.core.weights import is_linear, mismatch, parameter_shapes, weights_digest
from wagle_pl.lm import models
from wagle_pl.lm.layers import is_transposed
from wagle_pl.lm.resume import Fields
from wagle_pl.lm.saving import Originals, Weight, read_record, save_model, save_weights
from wagle_pl.masks import Restriction, WeightMask, describe_origin
from wagle_pl.masks.bits import place
from wagle_pl.masks.selected import SUFFIX
from wagle_pl.strategies import ShardedCheckpoint

PREFIX = "lm."  # of the language model's weights in a LightningModule's state

Weights = dict[str, Weight]


def export(
    path: str | Path,
    output: str | Path,
    model: Optional[str] = None,
    mask: Optional[str] = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder from a checkpoint, or from a model in another format.

    Args:
        path: a checkpoint (a file, or a folder written under DeepSpeed); or a GGUF file, a folder
            with an adapter, or a hub id, which are loaded whole.
        model, mask: where the run's base model and mask file are, if they have moved.

    Raises:
        WagleError: if there is no such checkpoint, it has no language model, or its base is gone.
    """
    refuse_existing(Path(output), overwrite, "--overwrite true", kind="folder")
    path = Path(path)
    if path.is_dir() and (path / "index.json").is_file():
        weights, checkpoint = _of_shards(path)
    elif path.is_file() and path.suffix != ".gguf":
        weights, checkpoint = _of_file(path)
    else:
        return _convert(str(path), output)
    if not weights or not checkpoint.get("model"):
        none = "holds no weights of a language model (attribution moves none)"
        raise WagleError(f"checkpoint {path} {none}")
    about = checkpoint["model"]
    base, record = model or about["name"], about["record"]
    loaded_as = getattr(torch, about["dtype"])
    check(record, Json, f"checkpoint {path}", "model.record")
    if not record.get("lineage"):
        raise WagleError(f"checkpoint {path}: its record has no run")
    try:
        config, generation = models.load_config(base), None
        tokenizer, originals = models.load_tokenizer(base), Originals(base)
        with suppress(OSError):  # it has none
            generation = GenerationConfig.from_pretrained(models.locate(base)[0])
    except (OSError, ValueError) as error:
        unread = f"checkpoint {path}: its base model {base} cannot be read ({error})"
        raise WagleError(unread, hint="say where it is: --model") from None
    with torch.device("meta"):
        lm, selected = AutoModelForCausalLM.from_config(config), None
    lm.tie_weights()
    if checkpoint.get("mask"):
        selected = _mask_of(checkpoint, parameter_shapes(lm), originals, mask)
    weights = _with_values(weights, originals, selected, loaded_as)
    if adapter := record["lineage"][-1].get("adapter"):
        weights = _with_adapter(weights, adapter["alpha"] / max(1, adapter["r"]), lm)
    for name, shape in parameter_shapes(lm).items():
        if name not in weights or weights[name].shape != tuple(shape):
            raise WagleError(f"checkpoint {path} lacks {name} of {base}, or has another shape")
    card, configs = model_card(record), (config, generation)
    return save_weights(weights, configs, tokenizer, output, card, record, originals, loaded_as)


def _convert(name: str, output: str | Path) -> Path:
    """Write a model of another format as a folder; it is loaded whole."""
    if name.endswith(".ckpt"):
        raise WagleError(f"checkpoint {name} does not exist")
    lm = models.load_model(name)
    lm.to(models.checkpoint_dtype(name))
    record = read_record(name)
    copied = f"# A copy\n\nOf `{name}`, in Hugging Face format.\n"
    card = model_card(record) if record["lineage"] else copied
    return save_model(lm, models.load_tokenizer(name), output, card, record)


# -- what a checkpoint holds -----------------------------------------------------------------------


def _of_shards(path: Path) -> tuple[Weights, Mapping[str, Any]]:
    """Weights of a folder, not read yet, and what else it holds."""
    checkpoint = ShardedCheckpoint(path)
    check(checkpoint.common, Fields, f"checkpoint {path}")
    if not checkpoint.pieces.get("weight"):
        return {}, checkpoint.common
    weights = {
        name: Weight(torch.float32, shape, partial(checkpoint.weight, name))
        for name, shape in checkpoint.shapes.items()
    }
    return weights | _in_memory(checkpoint.common.get("buffers", {})), checkpoint.common


def _of_file(path: Path) -> tuple[Weights, Mapping[str, Any]]:
    """The same for a file."""
    checkpoint = load_plain(path, f"checkpoint {path}")
    check(checkpoint, Fields, f"checkpoint {path}")
    once: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in (checkpoint.get("state_dict") or {}).items():
        if name.startswith(PREFIX):  # tied weights are written once
            key = tensor.data_ptr(), tensor.shape
            once.setdefault(key, (name.removeprefix(PREFIX), tensor))
    return _in_memory(dict(once.values())), checkpoint


def _in_memory(tensors: Mapping[str, Tensor]) -> Weights:
    return {
        name: Weight(tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }


# -- from what it holds to weights -----------------------------------------------------------------


def _mask_of(
    checkpoint: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    originals: Originals,
    file: Optional[str],
) -> WeightMask:
    """The mask of a checkpoint's run, made again in the same way."""
    digest = weights_digest((name, originals.read(name)) for name in shapes)
    made_on = checkpoint["model"]["fingerprint"]
    if mismatch(digest, made_on):
        raise WagleError(
            f"the checkpoint is of a run on the model with fingerprint {made_on[:12]}, "
            f"{originals.name} has {digest[:12]}",
            hint="say where the run's model is: --model",
        )
    restriction = Restriction.of_record(checkpoint["mask"], file)
    mask = restriction.mask(shapes, originals.name, digest)
    if mask is None or mask.digest() != checkpoint["mask"]["digest"]:
        other = f"mask {restriction.file} is not the one of the checkpoint's run"
        raise WagleError(other, hint="say where that is: --mask")
    return mask


def _with_values(
    stored: Weights, originals: Originals, mask: Optional[WeightMask], loaded_as: torch.dtype
) -> Weights:
    """Weights made from the values, rounded to the dtype in which the model computed."""

    def read(name: str) -> Tensor:
        values = stored.get(f"{name}{SUFFIX}")
        selected = None if values is None else values.read().to(loaded_as)
        if mask is None:
            return selected
        dense = originals.read(name).to(loaded_as)
        return dense if selected is None else place(dense, mask[name], selected)

    values = {name.removesuffix(SUFFIX) for name in stored if name.endswith(SUFFIX)}
    selected = values if mask is None else {name for name in mask if mask.count(name)}
    for name in (values - selected) | (selected - values - stored.keys()):
        raise WagleError(f"the checkpoint has values of {name} and a mask without, or conversely")
    shapes = {name.removesuffix(SUFFIX): weight.shape for name, weight in stored.items()}
    shapes |= {} if mask is None else mask.shapes
    return {
        name: stored.get(name) or Weight(loaded_as, shape, partial(read, name))
        for name, shape in shapes.items()
    }


def _with_adapter(weights: Weights, scale: float, lm: nn.Module) -> Weights:
    """Weights with an adapter's ``scale`` B A added, and without the adapter."""
    modules, merged = dict(lm.named_modules()), {}

    def read(name: str, weight: Weight, factors: list[Weight]) -> Tensor:
        b, a = (factor.read().float() for factor in factors)
        module, product = modules[name.removesuffix(".weight")], (b @ a) * scale
        transposed = is_linear(module) and is_transposed(module)
        return weight.read().float() + (product.T if transposed else product)

    for key, weight in weights.items():
        name, layer = key.replace(".base_layer.", "."), key.removesuffix("base_layer.weight")
        factors = [weights.get(f"{layer}lora_{part}.default.weight") for part in "BA"]
        if all(factors):
            weight = weight._replace(read=partial(read, name, weight, factors))
        if ".lora_" not in key:
            merged[name] = weight
    return merged


# -- the card --------------------------------------------------------------------------------------


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown model card from a record (``wagle.json``), whose ``lineage`` lists the runs."""
    *earlier, last = record["lineage"]
    parts = [
        "# Unlearned model" if last.get("objective") else "# Fine-tuned model",
        f"Made by `wagle_pl` ({last['module']}) from `{last['base']}`.",
        markdown_table(["", ""], [[key, str(v)] for key, v in _facts(last).items() if v], (0, 1)),
    ]
    if earlier:
        header = ["run", "made from", "forget set", "retain set", "mask"]
        rows = [
            [f"{number}. {run['module']}", f"`{run['base']}`"]
            + [f"`{run['data'][s]}`" if run["data"].get(s) else "" for s in ("forget", "retain")]
            + [_mask(run)]
            for number, run in enumerate(record["lineage"], 1)
        ]
        parts += ["## Lineage", markdown_table(header, rows, range(len(header)))]
    if len(forgotten(record)) > 1:
        sets = ", ".join(f"`{name}`" for name in forgotten(record))
        parts.append(f"Forgotten so far: {sets}. Test all of them: a later run can bring one back.")
    for heading, key in (("Prompts", "prompts"), ("Configuration", "config")):
        if last.get(key):
            text = yaml.safe_dump(last[key], sort_keys=False, allow_unicode=True, width=1000)
            parts += [f"## {heading}", f"```yaml\n{text.rstrip()}\n```"]
    return card_of(last["base"], "transformers", "\n\n".join(parts))


def forgotten(record: Mapping[str, Any]) -> list[str]:
    """The forget sets of every unlearning run in a record, oldest first, each once."""
    sets = [run["data"].get("forget") for run in record["lineage"] if run.get("objective")]
    return list(dict.fromkeys(name for name in sets if name))


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    facts = {
        "Base model": f"`{run['base']}` (fingerprint {run['base_fingerprint'][:12]})",
        "Forget set": run["data"].get("forget"),
        "Retain set": run["data"].get("retain"),
        "Trained on": ", ".join(run["streams"]),
        "Objective": run.get("objective"),
        "Steps": run["steps"],
        "Seed": None if run.get("seed") is None else str(run["seed"]),
    }
    if run.get("adapter"):
        facts["Adapter"] = run["adapter"]
    elif run.get("objective"):
        facts |= {"Mask": _mask(run), "Guarantee": run.get("verified") or "not checked"}
    return facts


def _mask(run: Mapping[str, Any]) -> str:
    if not run.get("objective"):
        return ""
    if run.get("adapter"):
        return f"none ({run['adapter']['class']})"
    if not (mask := run.get("mask")):
        return "none (dense: every weight may move)"
    file = f"`{mask['file']}`, " if mask.get("file") else ""
    return f"{file}density {mask['density']:.4f}, made by {describe_origin(mask['made_by'])}"
