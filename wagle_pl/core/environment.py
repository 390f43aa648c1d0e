"""The process: versions of libraries, its memory, warnings."""

from __future__ import annotations

import logging
import os
import platform
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version

from wagle_pl import __version__
from wagle_pl.core.errors import WagleError, first_line


@contextmanager
def trainer_in_the_making() -> Iterator[None]:
    """Around the making of a Trainer: what Lightning says of its options becomes a :class:`WagleError`."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise WagleError(f"trainer: {first_line(error)}") from error


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """A library's logger, by name, says errors alone while inside."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def silence() -> Iterator[None]:
    """No reports, tables and library warnings while inside; the package's own warnings and all errors still show."""
    loggers = [
        logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "wagle_pl")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings(), redirect_stdout(None):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


#: What results may depend on, beside this package.
_LIBRARIES = ("torch", "lightning", "transformers", "deepspeed", "peft")


def versions() -> dict[str, str]:
    """Name -> version of this package, Python and the libraries that results may depend on, as far as installed."""
    found = {"wagle_pl": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def peak_memory() -> int:
    """Bytes this process has held at most: on the GPU where there is one, otherwise resident in memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


def ready_to_run() -> None:
    """What a command that runs models sets first: no progress bars of transformers', and DeepSpeed told of a CPU."""
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    if (
        "TRANSFORMERS_VERBOSITY" not in os.environ
        or os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    ):
        set_verbosity_error()  # it may have been imported before the variable was set
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed warns when it has to find this out


def narrow_types_crawl() -> bool:
    """Whether torch multiplies matrices of bf16 and fp16 on this machine's CPU without instructions made for it.

    So it does on x86 CPUs without AVX-512, in plain loops: on one of them (AMD Milan) a training step of SmolLM2-135M
    in bf16-mixed took 35 times that in 32-true.
    """
    import torch

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "NO AVX", "DEFAULT")
