"""Masks: which weights are selected, their bits on disk, and selected weights as a model's only
parameters."""

from wagle_pl.masks.mask import (
    SUFFIX,
    WeightMask,
    check_shapes,
    describe_origin,
    expected_jaccard,
    mask_path,
)
from wagle_pl.masks.restriction import Restriction

__all__ = [
    "SUFFIX",
    "Restriction",
    "WeightMask",
    "check_shapes",
    "describe_origin",
    "expected_jaccard",
    "mask_path",
]
