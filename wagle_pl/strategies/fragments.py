"""From a parameter to the part of it that this rank's optimiser holds, and back.

Under ZeRO the optimiser sees *flat* fp32 partitions: this rank's share of all parameters, end to end and without names.
A fragment says which numbers of which parameter lie where in which of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Fragment(NamedTuple):
    """Numbers ``start`` to ``start + numel`` of a flattened parameter, which lie at ``at`` in ``flat``.

    Attributes:
        name: of the parameter.
        start: first number of the flattened parameter.
        numel: how many.
        flat: the optimiser's fp32 tensor.
        at: where in ``flat`` they begin.
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    at: int

    def of(self, flat: Tensor) -> Tensor:
        """The fragment in ``flat``, or in another tensor laid out like it: a view."""
        return flat.narrow(0, self.at, self.numel)


def fragments(optimizer: Any, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Fragment]:
    """The fragments that this rank's ZeRO optimiser holds.

    Args:
        optimizer: what ``deepspeed.initialize`` returns, of ZeRO 1, 2 or 3.
        parameters: (name, parameter) pairs; those that are not trained have no fragment.
    """
    found = []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            fragment = _stage_3(optimizer, name, parameter)
        else:
            fragment = _stage_1_2(optimizer, name, parameter)
        if fragment is not None:
            found.append(fragment)
    return found


def _stage_3(optimizer: Any, name: str, parameter: nn.Parameter) -> Fragment | None:
    """Every parameter is cut into equal parts, one a rank; the last may be padded, or padding alone."""
    group, at, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = torch.distributed.get_rank() * parameter.partition_numel()
    numel = min(numel, parameter.ds_numel - start)
    return (
        Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], at)
        if numel > 0
        else None
    )


def _stage_1_2(optimizer: Any, name: str, parameter: nn.Parameter) -> Fragment | None:
    """All parameters end to end are cut into equal parts: a rank holds some whole, and at most two cut."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    flats = (
        getattr(optimizer, "single_partition_of_fp32_groups", None)
        or optimizer.fp32_groups_flat_partition
    )
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, here.start, here.numel, flats[mapping.param_group_index], there.start)
