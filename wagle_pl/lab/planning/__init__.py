"""Memory and work of a run, from a model's shapes alone: no weights are read and nothing is run.

``bin/benchmarks/plan.py`` compares the predictions with what real runs take.
"""

from wagle_pl.lab.planning.memory import (
    MOMENTS,
    USABLE,
    at,
    device_parts,
    disk_bytes,
    host_bytes,
    peak,
    step_flops,
    step_tokens,
)
from wagle_pl.lab.planning.planned import Architecture, PlannedRun, architecture, choices

__all__ = [
    "MOMENTS",
    "USABLE",
    "Architecture",
    "PlannedRun",
    "architecture",
    "at",
    "choices",
    "device_parts",
    "disk_bytes",
    "host_bytes",
    "peak",
    "step_flops",
    "step_tokens",
]
