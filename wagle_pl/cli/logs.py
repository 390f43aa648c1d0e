"""What the command line shows of logs and warnings: the package's own, and few of libraries."""

from __future__ import annotations

import logging
import os
import warnings

_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # Lightning's own progress bar does not use it
    "JSONARGPARSE_DEPRECATION_WARNINGS": "off",  # of Lightning's calls
}
_WARNINGS = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LightningCLI's args parameter.*",
    ".*treespec, LeafSpec.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*module\\(s\\) in eval mode at the start of training.*",  # as attribution wants it
    ".*DeepSpeed handles gradient clipping internally.*",
    ".*torch.distributed.*is deprecated.*",  # of DeepSpeed's calls
    ".*configure_optimizers.*returned .None.*",  # attribution trains nothing
    ".*sync_dist=True.*",  # what is logged is the same on all ranks
)
#: Lightning's loggers that say in every run what the user has asked for, and how they begin.
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.seed",
)
_REPETITIVE = (
    "GPU available",
    "TPU available",
    "LOCAL_RANK: ",
    "Seed set to",
    "💡 Tip",
    "Loading `train_dataloader`",
    "`Trainer.fit` stopped: `max_",
)


def quiet() -> None:
    """Set up logging for a user: ``wagle: MESSAGE``, and no progress or advice of libraries."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_news)
    package = logging.getLogger("wagle_pl")
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        handler.addFilter(_is_first_rank)
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False


def _is_news(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return record.levelno > logging.INFO or not any(words in said for words in _REPETITIVE)


def _is_first_rank(record: logging.LogRecord) -> bool:
    rank = int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)
    return rank == 0 or record.levelno >= logging.ERROR


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"wagle: {level}{record.getMessage()}"
