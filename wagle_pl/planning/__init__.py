"""Memory and work of a run, from a model's shapes alone: no weights are read and nothing is run.

``bin/benchmarks/plan.py`` compares the predictions with what real runs take.
"""

from wagle_pl.planning.memory import (
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
from wagle_pl.planning.planned import Architecture, PlannedRun, Sums, architecture, choices, runs_of

__all__ = [
    "MOMENTS",
    "USABLE",
    "Architecture",
    "PlannedRun",
    "Sums",
    "architecture",
    "at",
    "choices",
    "device_parts",
    "disk_bytes",
    "host_bytes",
    "peak",
    "runs_of",
    "step_flops",
    "step_tokens",
]
