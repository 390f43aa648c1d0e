"""A strategy that the ranks' tests name on the command line."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook


class PowerSGD(DDPStrategy):
    """DDP that compresses gradients to a low rank on their way: every entry of a gradient changes, zeros too."""

    def __init__(self, **kwargs: Any) -> None:
        state = PowerSGDState(
            None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=0.1
        )
        super().__init__(ddp_comm_state=state, ddp_comm_hook=powerSGD_hook, **kwargs)


StrategyRegistry.register("power_sgd", PowerSGD, description="DDP with PowerSGD", override=True)
