"""``ZeRO``: Lightning's DeepSpeed strategy, on CPUs too; checkpoints for any number of ranks."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.weights import parameter_shapes, persistent_buffers, shapes_of
from wagle_pl.strategies import checkpoint as files
from wagle_pl.strategies import internals


def is_zero(strategy: Strategy) -> bool:
    """Whether a strategy is DeepSpeed's, whatever the stage."""
    return isinstance(strategy, DeepSpeedStrategy)


def is_sharded(strategy: Strategy) -> bool:
    """Whether a strategy shards the parameters themselves over the ranks (stage 3)."""
    return is_zero(strategy) and strategy.zero_stage_3


def stage_of(strategy: Strategy) -> int:
    """The ZeRO stage of a strategy, 0 if it is not ZeRO."""
    return strategy.config.get("zero_optimization", {}).get("stage", 0) if is_zero(strategy) else 0


class ZeRO(DeepSpeedStrategy):
    """DeepSpeed ZeRO, stage 1, 2 or 3, on GPUs, and on CPUs (gloo) for tests and small runs.

    What it adds to Lightning's :class:`~lightning.pytorch.strategies.DeepSpeedStrategy`:

    * the CPU, with ``--trainer.accelerator cpu --trainer.devices 2``;
    * modules that move no weights (attribute ``moves_weights`` False): no optimiser is made;
    * checkpoints of safetensors shards, written whole or not at all, from which any number of ranks
      and any stage can resume (:mod:`wagle_pl.strategies.checkpoint`);
    * torch's optimisers with offload: nothing has to be compiled;
    * communication buffers no larger than the model.

    Args:
        param_persistence_threshold: smaller parameters stay whole on every rank (stage 3).
        logging_level: of DeepSpeed's own messages, as in Python's ``logging``.
        **options: of Lightning's strategy: ``stage`` (1 shards the optimiser's state, 2 gradients
            too, 3 parameters too), ``offload_optimizer``, ``offload_parameters``, ``config`` (a
            DeepSpeed configuration, or its path, in place of all other options), and more.
    """

    def __init__(
        self,
        param_persistence_threshold: int = 100_000,
        logging_level: int = logging.ERROR,
        **options: Any,
    ) -> None:
        try:
            super().__init__(logging_level=logging_level, **options)
        except (MisconfigurationException, ImportError) as error:
            hint = "it needs: pip install deepspeed" if "nstall" in str(error) else None
            raise WagleError(first_line(error), "strategy", hint) from None
        if (zero := self.config.get("zero_optimization")) and options.get("config") is None:
            zero.setdefault("stage3_param_persistence_threshold", param_persistence_threshold)
            # torch's own optimisers are vectorised on CPUs; DeepSpeed's has to be compiled
            self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    # -- environment -------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        """This rank's device; DeepSpeed wants an index, on the CPU too."""
        on_cpu = isinstance(self.accelerator, CPUAccelerator)
        return torch.device("cpu", 0) if on_cpu else super().root_device

    def setup_environment(self) -> None:
        """Set up ranks, on a CPU without the check for CUDA, and complete DeepSpeed's options.

        Raises:
            WagleError: if a ``train_batch_size`` in the configuration is not the run's.
        """
        if isinstance(self.accelerator, CPUAccelerator):
            internals.use_cpu()
            self.accelerator.setup_device(self.root_device)
            devices = range(len(self.parallel_devices))
            self.parallel_devices = [torch.device("cpu", i) for i in devices]
            self.setup_distributed()
        else:
            super().setup_environment()
        trainer = self.lightning_module.trainer
        steps = trainer.accumulate_grad_batches
        # without it Lightning would look for a loader, which is not made yet
        rows = getattr(trainer.datamodule, "batch_size", None) or 1
        rows = self.config.setdefault("train_micro_batch_size_per_gpu", rows)
        fixed, batch = self.config.get("train_batch_size"), rows * steps * self.world_size
        if fixed not in (None, batch):
            raise WagleError(
                f"DeepSpeed's configuration has train_batch_size {fixed}, but {self.world_size} "
                f"devices with data.batch_size {rows} and accumulate_grad_batches {steps} make "
                f"{batch}: leave train_batch_size out"
            )

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Parameters created inside are sharded over the ranks at once (stage 3)."""
        # its first import does not work inside: the context replaces torch's functions
        import torch._dynamo  # noqa: F401

        with super().model_sharded_context():
            yield

    # -- the engine --------------------------------------------------------------------------------

    @property
    def moves_weights(self) -> bool:
        """Whether the module trains: one that only looks at gradients needs no optimiser."""
        return getattr(self.lightning_module, "moves_weights", True)

    def init_deepspeed(self) -> None:
        fits = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if fits and not self.moves_weights:
            internals.make_engine_without_optimizer(self)
            # for a module without optimisers: Lightning's mock
            Strategy.setup_optimizers(self, self.lightning_module.trainer)
            return
        zero = self.config.get("zero_optimization", {})
        trained = [p for p in self.model.parameters() if p.requires_grad]
        weights = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        for option in ("reduce_bucket_size", "allgather_bucket_size") if fits else ():
            if isinstance(zero.get(option), int):  # DeepSpeed wants an even number
                zero[option] = min(zero[option], -(-weights // 1024) * 1024)
        try:
            super().init_deepspeed()
        except (RuntimeError, subprocess.CalledProcessError) as error:
            if any(word in str(error).lower() for word in ("jit load", "build", "compil", "ninja")):
                raise WagleError(
                    f"DeepSpeed has to build a part of itself and cannot ({first_line(error)})",
                    hint="install a compiler and ninja, then DS_BUILD_CPU_ADAM=1 (DS_BUILD_AIO=1 "
                    "and libaio for NVMe) pip install --no-cache-dir deepspeed; or use an optimizer "
                    "that needs no building, e.g. --optimizer MaskedAdamW",
                ) from error
            raise

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser that the module configured, inside DeepSpeed's."""
        return self.deepspeed_engine.basic_optimizer

    def fragments(self) -> list[internals.Fragment]:
        """The fragments of the language model's parameters that this rank's optimiser holds."""
        named = self.lightning_module.lm.named_parameters()
        return internals.fragments(self.deepspeed_engine.optimizer, named)

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's backward pass; none if the module moves no weights."""
        if not self.moves_weights:
            return closure_loss
        # Lightning has divided by the number of micro-batches already
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """DeepSpeed's step; the optimiser's own if the module moves no weights."""
        if not self.moves_weights:
            return optimizer.step(closure)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def release(self) -> None:
        """Shard parameters again that the module's own backward pass left gathered (stage 3)."""
        internals.shard_again(self)

    # -- checkpoints -------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: each rank writes its share of the weights itself."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: each rank writes its share of the state itself."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a folder: one safetensors file per rank, and what is common to all."""
        path = Path(self.broadcast(filepath))
        module: Any = self.lightning_module  # of the suite
        left_out = ("state_dict", "optimizer_states")
        common = {key: value for key, value in checkpoint.items() if key not in left_out}
        common["buffers"] = persistent_buffers(module.lm)
        if not self.moves_weights:
            common["sums"] = module.sums.small()
            files.save(path, module.sums.parts(), common, parameter_shapes(module.lm))
            return
        stored, optimizer = list(module.stored_parameters()), self.base_optimizer
        pieces, singles = files.of_optimizer(optimizer, self.fragments())
        common["single_states"] = dict(distributed.all_gather(singles.items()))
        common["param_groups"] = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        files.save(path, [*pieces, *files.of_frozen(stored)], common, shapes_of(stored))

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: Optional[bool] = None
    ) -> dict[str, Any]:
        """Read weights and, when fitting, the optimiser's state, from any number of ranks."""
        stored = files.ShardedCheckpoint(checkpoint_path)
        module: Any = self.lightning_module
        fits = module.trainer.state.fn == TrainerFn.FITTING
        if not self.moves_weights:
            if fits:
                module.sums.load(stored)
        elif fits:
            stored.load_weights(module.stored_parameters())
            stored.load_optimizer(self.base_optimizer, self.fragments())
        else:
            module.load_stored(stored)
        return stored.common


#: Lightning's names for DeepSpeed strategies mean :class:`ZeRO`.
for _name, _options in {
    "deepspeed": {},
    "deepspeed_stage_1": {"stage": 1},
    "deepspeed_stage_2": {"stage": 2},
    "deepspeed_stage_2_offload": {"stage": 2, "offload_optimizer": True},
    "deepspeed_stage_3": {"stage": 3},
    "deepspeed_stage_3_offload": {
        "stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}.items():
    StrategyRegistry.register(_name, ZeRO, "DeepSpeed ZeRO", override=True, **_options)
