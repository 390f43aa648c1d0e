"""Memory and work of a run, from a model's shapes alone: no weights are read and nothing is run.

``bin/benchmarks/plan.py`` compares the predictions with what real runs take.
"""

from wagle_pl.planning.architecture import Architecture, Size, architecture
from wagle_pl.planning.memory import (
    GIB,
    MOMENTS,
    USABLE,
    Part,
    at,
    device_parts,
    host_bytes,
    parts_of,
    peak,
)
from wagle_pl.planning.planned import STRATEGIES, PlannedRun, choices
from wagle_pl.planning.work import disk_bytes, step_flops, step_tokens

__all__ = [
    "GIB",
    "MOMENTS",
    "STRATEGIES",
    "USABLE",
    "Architecture",
    "Part",
    "PlannedRun",
    "Size",
    "architecture",
    "at",
    "choices",
    "device_parts",
    "disk_bytes",
    "host_bytes",
    "parts_of",
    "peak",
    "step_flops",
    "step_tokens",
]
