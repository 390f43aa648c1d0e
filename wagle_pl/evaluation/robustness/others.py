"""The target and the retrained model: where their files are, next to results of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import torch

from wagle_pl.core.errors import WagleError
from wagle_pl.evaluation.results import INFO_FILE, METRICS_FILE, read_json
from wagle_pl.lm import models

_MODEL_FILES = ("config.json", models.ADAPTER_FILE)


def model_of(path: Union[str, Path]) -> Optional[str]:
    """The model that a folder, or results in it, are of; None if nobody can say.

    It is the folder itself, if it holds a model; the one above, if it holds one (``wagle fit`` and ``wagle test`` write
    results into the model's folder); or the one that the results name, if it is a folder that still exists.

    Args:
        path: a model folder, a folder that ``wagle test`` wrote, or a file in one.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if Path(path).is_file() and Path(path).name != METRICS_FILE:
        return None  # a published result file, wherever it lies
    for place in (folder, folder.absolute().parent):
        if _holds_model(place):
            return str(place)
    named = read_json(folder / INFO_FILE).get("model") if (folder / INFO_FILE).is_file() else None
    return named if named is not None and _holds_model(Path(named)) else None


def results_of(path: Union[str, Path]) -> Optional[Path]:
    """Where the results of a path are: in a model's folder under ``test``; None for a model without any."""
    folder = Path(path)
    if not _holds_model(folder) or (folder / METRICS_FILE).is_file():
        return folder
    return folder / "test" if (folder / "test" / METRICS_FILE).is_file() else None


def load_other(name: str, like: Any, option: str) -> Any:
    """Load a model to compare with: in the dtype and on the device of ``like``, in evaluation mode.

    Raises:
        WagleError: if it cannot be had, or its vocabulary is another.
    """
    weight = like.get_input_embeddings().weight
    with torch.inference_mode(False):  # or nobody could fine-tune it
        other = models.load_model(name, dtype=weight.dtype).to(weight.device).eval()
    theirs = other.get_input_embeddings().weight
    if theirs.shape[0] != weight.shape[0]:
        raise WagleError(
            f"{option}: the model {name} has a vocabulary of {theirs.shape[0]} tokens, this one has "
            f"{weight.shape[0]}"
        )
    return other


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MODEL_FILES)
