"""Task arithmetic: what fine-tuning on the forget rows added is taken away, with no training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from wagle_pl.core.errors import WagleError, check_positive
from wagle_pl.core.files import refuse_existing
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.lm import models
from wagle_pl.lm.saving import Originals, read_record, save_model
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning.export import model_card


@torch.no_grad()
def subtract(
    base: str,
    finetuned: str,
    output: str | Path,
    *,
    origin: Optional[str] = None,
    importance: Optional[Callable[[str], Tensor]] = None,
    mask: Optional[str] = None,
    strength: float = 1.0,
    about: Optional[dict[str, Any]] = None,
    overwrite: bool = False,
) -> Path:
    """Write the model θ − λ w ⊙ (θ_ft − θ₁), computed in fp32, in the dtypes of θ's files.

    With w = 1 it is task arithmetic (arXiv 2212.04089), with a w of each weight's own PerTA (arXiv
    2601.22030); a mask is ours.

    Args:
        base: model that is to forget, θ.
        finetuned: model fine-tuned on the forget rows, θ_ft.
        output: folder to write.
        origin: model that ``finetuned`` was fine-tuned from, θ₁; ``base`` when None.
        importance: name of a parameter -> w, of its shape; 1 when None.
        mask: mask file; w is 0 outside, and those weights keep their bits.
        strength: λ.
        about: what made w, for the record; its ``model_fingerprint`` must be that of ``base``.
        overwrite: replace an existing model folder.

    Raises:
        WagleError: if the models, the mask or w do not fit each other.
    """
    refuse_existing(Path(output), overwrite, "--overwrite", kind="folder")
    check_positive(strength, "strength")
    lm, originals = models.load_model(base, models.checkpoint_dtype(base)), Originals(base)
    shapes, made_on = parameter_shapes(lm), fingerprint(lm.named_parameters())
    chosen = None if mask is None else WeightMask.load(mask)
    if chosen is not None:
        chosen.check(shapes, made_on)
    about = dict(about or {})
    if (other := about.get("model_fingerprint", made_on)) != made_on:
        raise WagleError(
            f"the scores are of the model with fingerprint {other[:12]}, {base} has {made_on[:12]}"
        )
    ends = [Originals(finetuned), originals if origin is None else Originals(origin)]
    for name, parameter in lm.named_parameters():
        after, before = (_read(end, name, parameter) for end in ends)
        step = strength * (after - before)
        if importance is not None:
            step *= importance(name)
        if chosen is not None:
            step = torch.where(chosen[name], step, 0.0)
        parameter.copy_(parameter.float() - step)
    made_by = None
    if chosen is not None:
        made_by = {"file": mask, "density": chosen.density, "made_by": chosen.metadata}
    run = {
        "module": "wagle patch subtract",
        "base": base,
        "base_fingerprint": made_on,
        "data": {},
        "streams": [],
        "objective": {"class": "PerTA", "strength": strength, "finetuned": finetuned},
        "importance": about or None,
        "mask": made_by,
        "steps": 0,
        "seed": None,
    }
    record = {"format_version": 1, "lineage": [*read_record(base).get("lineage", []), run]}
    card = model_card(record)
    return save_model(lm, models.load_tokenizer(base), output, card, record, originals)


def _read(model: Originals, name: str, like: Tensor) -> Tensor:
    """A weight of another model, in fp32."""
    found = model.read(name)
    if found is None or found.shape != like.shape:
        has = "no such tensor" if found is None else f"shape {tuple(found.shape)}"
        raise WagleError(
            f"{name} is of shape {tuple(like.shape)} in the base, and {model.name} has {has}: "
            "they are different models"
        )
    return found.float()
