"""Model folders: their card, and how a checkpoint is turned into one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.hub import card_of
from wagle_pl.core.schema import Json, check
from wagle_pl.core.tensorfiles import load_plain
from wagle_pl.core.text import markdown_table
from wagle_pl.core.weights import fingerprint, mismatch, parameter_shapes
from wagle_pl.lm import models
from wagle_pl.lm.resume import Fields
from wagle_pl.lm.saving import Originals, read_record, save_model
from wagle_pl.masks import Restriction, WeightMask, describe_origin
from wagle_pl.masks.selected import SUFFIX, load_values
from wagle_pl.strategies import ShardedCheckpoint
from wagle_pl.unlearning.adapters import LoRA

PREFIX = "lm."  # of the language model's weights in a LightningModule's state


def export(
    path: str | Path,
    output: str | Path,
    model: Optional[str] = None,
    mask: Optional[str] = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder from a checkpoint, or from a model in another format.

    The model is loaded, on the CPU, as the run held it.

    Args:
        path: a checkpoint (a file, or a folder written under DeepSpeed); or a GGUF file, a folder
            with an adapter, or a hub id.
        model, mask: where the run's base model and mask file are, if they have moved.

    Raises:
        WagleError: if there is no such checkpoint, it has no language model, or its base is gone.
    """
    refuse_existing(Path(output), overwrite, "--overwrite", kind="folder")
    path, where = Path(path), f"checkpoint {path}"
    read: Callable[[str], Tensor]
    if path.is_dir() and (path / "index.json").is_file():
        ranks = ShardedCheckpoint(path)
        checkpoint = check(ranks.common, Fields, where)
        names, read = [*ranks.shapes] if ranks.pieces.get("weight") else [], ranks.weight
    elif path.is_file() and path.suffix != ".gguf":
        checkpoint = check(load_plain(path, where), Fields, where)
        stored = (checkpoint.get("state_dict") or {}).items()
        state = {key.removeprefix(PREFIX): t for key, t in stored if key.startswith(PREFIX)}
        names, read = [*state], state.__getitem__
    elif model or mask:
        raise WagleError(f"{path} is no checkpoint of a run: leave --model and --mask out")
    else:
        return _convert(str(path), output)
    if not names or not checkpoint.get("model"):
        raise WagleError(f"{where} holds no weights of a language model (attribution moves none)")
    about = checkpoint["model"]
    if mask and not checkpoint.get("mask"):
        raise WagleError(f"{where}: its run had no mask: leave --mask out")
    base, record = model or about["name"], about["record"]
    check(record, Json, where, "model.record")
    if not record.get("lineage"):
        raise WagleError(f"{where}: its record has no run")
    try:
        lm = models.load_model(base, getattr(torch, about["dtype"]))
        tokenizer = models.load_tokenizer(base)
    except (OSError, ValueError, WagleError) as error:
        unread = f"{where}: its base model {base} cannot be read ({error})"
        raise WagleError(unread, hint="say where it is: --model") from None
    selected = _mask_of(checkpoint, lm, base, mask) if checkpoint.get("mask") else None
    adapter = None
    if options := record["lineage"][-1].get("adapter"):
        adapted = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
        adapter = LoRA(options["r"], options["alpha"], target_modules=sorted(adapted))
        adapter.add(lm, base)
    _load(lm, names, read, selected, where)
    lm.load_state_dict(checkpoint.get("buffers", {}), strict=False)
    if adapter is not None:
        adapter.fold()
    return save_model(lm, tokenizer, output, model_card(record), record, Originals(base))


def _convert(name: str, output: str | Path) -> Path:
    """Write a model of another format as a folder."""
    if name.endswith(".ckpt"):
        raise WagleError(f"checkpoint {name} does not exist")
    lm = models.load_model(name)
    lm.to(models.checkpoint_dtype(name))
    record = read_record(name)
    copied = f"# A copy\n\nOf `{name}`, in Hugging Face format.\n"
    card = model_card(record) if record["lineage"] else copied
    return save_model(lm, models.load_tokenizer(name), output, card, record)


def _load(
    lm: PreTrainedModel,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    mask: Optional[WeightMask],
    where: str,
) -> None:
    """Give a model the weights of a checkpoint, by their names there."""
    names = set(names)
    for name, _ in lm.named_parameters():
        moves = mask is None or mask.count(name)
        if moves and not {name, f"{name}{SUFFIX}"} & names:
            raise WagleError(f"{where} lacks {name} of its base model")
    plain = {name: read(name) for name in names if not name.endswith(SUFFIX)}
    try:
        lm.load_state_dict(plain, strict=False)
    except RuntimeError as error:
        raise WagleError(f"{where} is of another model: {error}") from None
    load_values(lm, names, read, mask)


def _mask_of(
    checkpoint: Mapping[str, Any], lm: PreTrainedModel, base: str, file: Optional[str]
) -> WeightMask:
    """The mask of a checkpoint's run, made again in the same way."""
    digest, made_on = fingerprint(lm), checkpoint["model"]["fingerprint"]
    if mismatch(digest, made_on):
        raise WagleError(
            f"the checkpoint is of a run on the model with fingerprint {made_on[:12]}, "
            f"{base} has {digest[:12]}",
            hint="say where the run's model is: --model",
        )
    restriction = Restriction.of_record(checkpoint["mask"], file)
    mask = restriction.mask(parameter_shapes(lm), base, digest)
    if mask is None or mask.digest() != checkpoint["mask"]["digest"]:
        other = f"mask {restriction.file} is not the one of the checkpoint's run"
        raise WagleError(other, hint="say where that is: --mask")
    return mask


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
    elif mask := _mask(run):
        facts |= {"Mask": mask, "Guarantee": run.get("verified") or "not checked"}
    return facts


def _mask(run: Mapping[str, Any]) -> str:
    if not run.get("objective") and not run.get("mask"):
        return ""
    if run.get("adapter"):
        return f"none ({run['adapter']['class']})"
    if not (mask := run.get("mask")):
        return "none (dense: every weight may move)"
    file = f"`{mask['file']}`, " if mask.get("file") else ""
    return f"{file}density {mask['density']:.4f}, made by {describe_origin(mask['made_by'])}"
