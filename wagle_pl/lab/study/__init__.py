"""Studies: ways to unlearn one model, compared at equal forgetting."""

from typing import Any

from wagle_pl.lab.study.summary import envelope, mean_utility, paired, utility_at

__all__ = ["Plants", "Study", "envelope", "mean_utility", "paired", "utility_at"]

TABLE_FILE = "study.parquet"
SUMMARY_FILE = "study.json"


def __getattr__(name: str) -> Any:
    """Import ``Study`` or ``Plants`` when first used: reports need no Lightning."""
    if name in ("Plants", "Study"):
        from wagle_pl.lab.study import plants, study

        return {"Plants": plants.Plants, "Study": study.Study}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
