"""Schemas of what made a mask or a model; several kinds of file hold them."""

from __future__ import annotations

from typing import Any, Literal, Optional, TypedDict

from wagle_pl.core.schema import Count


class Sizes(TypedDict):
    """Sizes of a model's heads and neurons, see ``attribution.units.Geometry``."""

    heads: Count
    kv_heads: Count
    head_size: Count
    neurons: list[Count]
    transposed: bool


class MadeBy(TypedDict):
    """How a mask or scores were made."""

    model: Optional[str]
    model_fingerprint: Optional[str]
    operation: Optional[str]  # on masks; None for an attribution
    of: Optional[list[MadeBy]]  # operands
    modules: Optional[list[str]]
    layers: Optional[str]
    file: Optional[str]
    seed: Optional[int]
    score: Optional[str]
    absolute: Optional[bool]  # whether scores are ranked by absolute value
    density: Optional[float]
    unit: Optional[str]
    units: Optional[dict[str, tuple[Count, Count]]]  # layer -> units selected, units
    as_rows: Optional[list[str]]  # tensors whose rows took the place of heads or neurons
    geometry: Optional[Sizes]  # of the model, in scores
    passes: Optional[float]
    forget_rows: Optional[Count]
    prompts: Optional[dict[str, Any]]


class MaskUsed(TypedDict):
    """The mask of a run."""

    file: Optional[str]
    density: float
    made_by: MadeBy


AdapterUsed = TypedDict("AdapterUsed", {"class": str, "alpha": float, "r": Count})


class Run(TypedDict):
    """A run that trained a model."""

    module: str
    base: str
    base_fingerprint: str
    data: dict[str, Optional[str]]  # stream -> where its rows come from
    streams: list[str]
    steps: Count
    seed: Any
    objective: Optional[dict[str, Any]]
    mask: Optional[MaskUsed]
    adapter: Optional[AdapterUsed]
    prompts: Optional[dict[str, Any]]
    config: Optional[dict[str, Any]]


class Patched(TypedDict):
    """Patches in a model."""

    base: str
    patches: list[str]
    fingerprint: str


class Record(TypedDict, total=False):
    """``wagle.json`` of a model folder: the runs that made it, oldest first."""

    format_version: Optional[Literal[1]]
    lineage: Optional[list[Run]]
    patched: Optional[Patched]
