"""What the package takes from the inside of DeepSpeed, Lightning and jsonargparse is still there."""

import inspect
from pathlib import Path

import pytest
from helpers import trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy

from wagle_pl.cli.parser import OneLineErrors
from wagle_pl.core.mistakes import in_one_line


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
    assert callable(CPU_Accelerator)


def test_lightning_reads_options_of_a_checkpoint_in_one_method():
    assert "self._parse_ckpt_path()" in inspect.getsource(LightningCLI.__init__)


def test_lightning_says_where_it_runs_and_where_a_requeued_job_looks(tmp_path: Path):
    made = trainer()
    assert hasattr(made._accelerator_connector, "cluster_environment")
    assert Path(made._checkpoint_connector.hpc_save_path(str(tmp_path))).parent == tmp_path
    assert callable(made._signal_connector._slurm_sigusr_handler_fn)


def test_jsonargparse_reports_as_it_is_read():
    parser = OneLineErrors(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--number", type=int | None)
    assert parser.options >= {"--config", "--number", "--help", "-h"}
    try:
        parser.parse_args(["--number", "many"])
    except Exception as error:
        assert in_one_line(str(error)) == "number: must be int, null; got many"
    else:
        raise AssertionError("there was no error")


def test_lightning_keeps_the_progress_of_a_fit_where_it_kept_it() -> None:
    """As ``lm.resume`` reads it."""
    loop = trainer().fit_loop
    state = loop.state_dict()
    counters = {"ready", "started", "processed", "completed"}
    assert state["epoch_loop.batch_progress"].keys() == {"total", "current", "is_last_batch"}
    assert state["epoch_loop.batch_progress"]["current"].keys() == counters
    assert state["epoch_progress"].keys() == {"total", "current"}
    assert state["epoch_progress"]["current"].keys() == counters
    assert state["epoch_loop.state_dict"].keys() == {"_batches_that_stepped"}
    assert 'state_dict["combined_loader"]' in inspect.getsource(type(loop))
    assert isinstance(loop.epoch_loop.restarting, bool)
