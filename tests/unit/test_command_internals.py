"""What the command line takes from the inside of Lightning and jsonargparse is still there."""

import inspect
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import LightningCLI

from wagle_pl.cli.parser import OneLineErrors
from wagle_pl.core.mistakes import in_one_line


def test_lightning_reads_options_of_a_checkpoint_in_one_method():
    assert "self._parse_ckpt_path()" in inspect.getsource(LightningCLI.__init__)


def test_lightning_says_where_it_runs_and_where_a_requeued_job_looks(tmp_path: Path):
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert hasattr(trainer._accelerator_connector, "cluster_environment")
    assert Path(trainer._checkpoint_connector.hpc_save_path(str(tmp_path))).parent == tmp_path


def test_jsonargparse_reports_as_it_is_read():
    parser = OneLineErrors(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--number", type=int | None)
    assert parser.options >= {"--config", "--number", "--help", "-h"}
    try:
        parser.parse_args(["--number", "many"])
    except Exception as error:
        assert in_one_line(str(error)) == "number must be an integer or null, got many"
    else:
        raise AssertionError("there was no error")
