"""Private parts of DeepSpeed, and of Lightning's strategy around it, that this package uses.

Neither makes them public, so all uses are collected here, each with its reason;
``tests/unit/test_internals.py`` fails first when a new version changes one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from wagle_pl.core.weights import share_of


class Fragment(NamedTuple):
    """Numbers ``start`` to ``start + numel`` of a flattened parameter, at ``at`` in ``flat``.

    Under ZeRO an optimiser sees *flat* fp32 partitions: this rank's share of all parameters, end to
    end and without names.
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
    """The fragments of (name, parameter) pairs that this rank's ZeRO optimiser holds.

    ``deepspeed.utils.safe_get_full_fp32_param`` and similar functions gather whole parameters on
    every rank; a checkpoint of shards needs each rank's own part.
    """
    held = []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            # stage 3: every parameter is cut into equal parts, the last may be all padding
            group, at, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start, here = share_of(parameter)
            if len(here):
                flat = optimizer.fp32_partitioned_groups_flat[group]
                held.append(Fragment(name, start, len(here), flat, at))
        elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            # stages 1 and 2: parameters are joined and cut; a rank holds at most two partly
            flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
            flats = flats or optimizer.fp32_groups_flat_partition  # of BF16_Optimizer
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = flats[mapping.param_group_index]
            held.append(Fragment(name, low.start, low.numel, flat, high.start))
    return held


def use_cpu() -> None:
    """Make DeepSpeed run on the CPU, which it otherwise decides from the machine at import."""
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    # its own all-reduce would have to be compiled; gloo is enough
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if get_accelerator().device_name() != "cpu":
        set_accelerator(CPU_Accelerator())


def make_engine_without_optimizer(strategy: DeepSpeedStrategy) -> None:
    """Set up a fit as Lightning sets up a test: enough for a module that moves no weights."""
    strategy._initialize_deepspeed_inference(strategy.model)


def shard_again(strategy: DeepSpeedStrategy) -> None:
    """Release parameters that a backward pass outside the engine left gathered (stage 3)."""
    if strategy.zero_stage_3:
        strategy.deepspeed_engine.optimizer.partition_all_parameters()
