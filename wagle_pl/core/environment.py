"""The current process: versions of libraries, memory, what libraries print."""

from __future__ import annotations

import logging
import os
import platform
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Optional

from wagle_pl import __version__
from wagle_pl.core.errors import WagleError, first_line


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Turn Lightning's errors about a Trainer or its launcher into a :class:`WagleError`."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except WagleError:
        raise
    except KeyError as error:
        hint = "start with srun or torchrun, or unset the others"
        raise WagleError(f"environment variable {error} is missing", hint=hint) from None
    except (MisconfigurationException, TypeError, ValueError, RuntimeError, ImportError) as error:
        raise WagleError(f"trainer: {first_line(error)}") from error


@contextmanager
def errors_only(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Inside the context, a logger logs only errors (or messages from another level on)."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def silence() -> Iterator[None]:
    """Inside the context: no output, no log below WARNING and no Python warnings."""
    with ExitStack() as stack:
        for name in ("lightning.pytorch", "lightning.fabric", "wagle_pl"):
            stack.enter_context(errors_only(name, logging.WARNING))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(redirect_stdout(None))
        warnings.simplefilter("ignore")
        yield


@cache
def versions() -> dict[str, str]:
    """Versions, by name, of this package, Python, and the libraries that results depend on."""
    by_name = {"wagle_pl": __version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "deepspeed", "peft"):
        with suppress(PackageNotFoundError):
            by_name[name] = version(name)
    return by_name


def peak_memory() -> int:
    """Peak bytes of this process: on the GPU if there is one, otherwise resident in memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else 1024 * kilobytes


@contextmanager
def bounded(seconds: float, size: int) -> Iterator[None]:
    """Inside the context, Python code that takes longer, or ``size`` more bytes of memory, fails.

    The time is bounded in the main thread alone, and the memory on Linux alone.

    Raises:
        TimeoutError: after ``seconds``.
        MemoryError: where the memory was asked for.
    """

    def stop(signum: int, frame: Optional[FrameType]) -> None:
        raise TimeoutError(f"stopped after {seconds:g} seconds")

    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, stop))
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again if code drops the error
        if (usage := Path("/proc/self/statm")).exists():
            limits = resource.getrlimit(resource.RLIMIT_AS)
            most = int(usage.read_text().split()[0]) * resource.getpagesize() + size
            if limits[0] == resource.RLIM_INFINITY or most < limits[0]:
                stack.callback(resource.setrlimit, resource.RLIMIT_AS, limits)
                resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        yield


def prepare_libraries() -> None:
    """Before a command runs models: silence transformers, and tell DeepSpeed if there is no GPU."""
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    if os.environ.get("TRANSFORMERS_VERBOSITY", "error") == "error":
        set_verbosity_error()  # it may have been imported before the variable was set
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns if it has to detect this


def half_precision_is_slow() -> bool:
    """Whether this machine's CPU multiplies bf16 and fp16 in plain loops: x86 without AVX-512.

    On an AMD Milan a training step of SmolLM2-135M took 35 times as long as in 32-true.
    """
    import torch

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "NO AVX", "DEFAULT")
