"""The masks of a study: made in as few passes as their options allow, kept, and found again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wagle_pl.attribution import AttributionModule
from wagle_pl.core.errors import WagleError
from wagle_pl.masks import SUFFIX, WeightMask
from wagle_pl.study.configured import digest
from wagle_pl.study.grid import MaskChoice


def file_name(mask: MaskChoice, settings: Mapping[str, Any]) -> str:
    """Name of a mask's file, without suffix: readable, and unique for model, rows and options.

    Args:
        mask: by score, of one seed.
        settings: what attribution depends on besides the mask's own options.
    """
    readable = re.sub(r"[^A-Za-z0-9.=-]+", "-", mask.described)
    return f"{readable}-{digest([dict(settings), mask.definition])[:8]}"


def passes(masks: Sequence[MaskChoice]) -> list[tuple[dict[str, Any], list[MaskChoice]]]:
    """Masks that can be made in one pass, together with the options of that pass.

    An option on which a mask's score does not depend fits any pass.
    """
    found: list[tuple[dict[str, Any], list[MaskChoice]]] = []
    for mask in sorted(masks, key=lambda mask: -len(mask.relevant)):
        for options, others in found:
            if all(options.get(name, value) == value for name, value in mask.relevant.items()):
                options |= mask.relevant
                others.append(mask)
                break
        else:
            found.append((dict(mask.relevant), [mask]))
    return found


def make_masks(
    masks: Sequence[MaskChoice],
    names: Sequence[str],
    options: Mapping[str, Any],
    module: Mapping[str, Any],
    fit: Any,
) -> None:
    """One pass: write the files of masks.

    Args:
        masks: by score, of one seed each.
        names: their files, without suffix.
        options: of the pass.
        module: options of :class:`AttributionModule`, ``model`` and ``output`` (the folder) among them.
        fit: runs a module on the study's data for an epoch.
    """
    specs = [mask.spec(name) for mask, name in zip(masks, names, strict=True)]
    fit(AttributionModule(masks=specs, overwrite=True, **module, **options))


def check_mask(file: str, shapes: Mapping[str, Any], fingerprint: str) -> float:
    """Refuse a mask made for another model; its density.

    Raises:
        WagleError: if it is unreadable or for another model.
    """
    mask = WeightMask.load(file)
    try:
        mask.check(shapes, fingerprint, where=f"mask {file}")
    except WagleError as error:
        raise WagleError(f"masks: {error}") from None
    return mask.density


def mask_file(folder: Path, name: str) -> Path:
    """Where a mask is."""
    return folder / f"{name}{SUFFIX}"
