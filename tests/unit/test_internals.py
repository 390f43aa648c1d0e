"""What the package takes from the inside of DeepSpeed and Lightning is still there."""

import inspect

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy


def test_lightnings_strategy_makes_an_engine_without_optimizer():
    assert list(
        inspect.signature(DeepSpeedStrategy._initialize_deepspeed_inference).parameters
    ) == ["self", "model"]
    used = inspect.getsource(DeepSpeedStrategy.init_deepspeed)
    assert "self._initialize_deepspeed_inference(self.model)" in used
    # a size that is given keeps Lightning from looking for a loader
    formatted = inspect.getsource(DeepSpeedStrategy)
    assert 'if "train_micro_batch_size_per_gpu" not in self.config:' in formatted


def test_deepspeeds_optimizers_keep_what_they_kept_where_they_kept_it():
    pytest.importorskip("deepspeed")
    import deepspeed.ops
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import (
        parameter_offload,
        partition_parameters,
        stage3,
        stage_1_and_2,
    )
    from deepspeed.utils import mixed_precision_linkage
    from deepspeed.utils.tensor_fragment import tensor_fragment

    third = inspect.getsource(stage3)
    assert hasattr(stage3.DeepSpeedZeroOptimizer_Stage3, "get_param_id")
    assert callable(parameter_offload.DeepSpeedZeRoOffload.partition_all_parameters)
    assert "self.grad_position[" in third and "self.fp32_partitioned_groups_flat" in third
    assert "single_partition_of_fp32_groups" in inspect.getsource(stage_1_and_2)
    assert "fp32_groups_flat_partition" in inspect.getsource(bf16_optimizer)
    assert "_hp_mapping" in inspect.getsource(mixed_precision_linkage)
    fields = tensor_fragment.__dataclass_fields__
    assert {"lp_fragment_address", "hp_fragment_address", "param_group_index"} <= set(fields)
    sharded = inspect.getsource(partition_parameters)
    for attribute in ("ds_id", "ds_numel", "ds_tensor", "partition_numel"):
        assert f"param.{attribute} = " in sharded
    assert isinstance(deepspeed.ops.__compatible_ops__, dict)
    assert callable(CPU_Accelerator) and callable(AsyncIOBuilder.is_compatible)
