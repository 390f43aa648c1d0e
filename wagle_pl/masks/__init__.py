"""Which weights of a model are selected, and how they become its only parameters."""

from wagle_pl.masks.mask import SUFFIX, WeightMask, describe_origin, expected_jaccard, mask_path
from wagle_pl.masks.restriction import Restriction

__all__ = [
    "SUFFIX",
    "Restriction",
    "WeightMask",
    "describe_origin",
    "expected_jaccard",
    "mask_path",
]
