"""DeepSpeed ZeRO: on CPUs too, and with checkpoints that any number of ranks can read.

Importing this package makes Lightning's names ``deepspeed``, ``deepspeed_stage_1`` and so on mean
:class:`ZeRO`.
"""

from wagle_pl.strategies.checkpoint import ShardedCheckpoint, check_optimizer
from wagle_pl.strategies.zero import ZeRO, is_sharded, is_zero, stage_of

__all__ = ["ShardedCheckpoint", "ZeRO", "check_optimizer", "is_sharded", "is_zero", "stage_of"]
