"""What every room needs: an error meant for the user, a write that is whole or absent, a class by its name."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import platform
import resource
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Optional, TypeVar, Union

from wagle_pl import __version__

T = TypeVar("T")


class WagleError(Exception):
    """A mistake in what the user gave (file, option, data). The message is one line: what, where, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def refuse_existing(
    path: Path,
    overwrite: bool,
    option: str = "--model.overwrite true",
    kind: Literal["file", "folder", "files"] = "file",
) -> None:
    """Refuse an output that may not be written, before any work is done.

    What is replaced is gone, so ``overwrite`` is never taken to mean a folder of other things: it replaces a file by a
    file, and a folder that is :func:`replaceable` by a folder.

    Args:
        path: the output.
        overwrite: whether it may be replaced.
        option: what would allow it, for the message.
        kind: what will be written: a ``file``; a ``folder``, in place of the whole of one that is there; or ``files``
            into a folder, where others stay as they are.

    Raises:
        WagleError: if ``path`` exists and may not be replaced, is of the other kind, or would lie in a file.
    """
    above = next((parent for parent in path.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise WagleError(f"output {path} cannot be written: {above} is a file; choose another")
    if not path.exists():
        return
    _check_kind(path)
    if kind == "file" and path.is_dir():
        raise WagleError(f"output {path} is a folder: name a file in it")
    if not overwrite:
        raise WagleError(f"output {path} exists already; choose another or pass {option}")
    if kind != "file" and not path.is_dir():
        raise WagleError(f"output {path} is a file, and a folder is to be written: choose another")
    if kind == "folder" and not replaceable(path):
        raise WagleError(f"output {path} is a folder of other things, which would be lost: only one that is empty, or "
                         "is a model, scores or a checkpoint, is replaced; choose another")  # fmt: skip


def plainly_local(name: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a name can only be a path on this machine, so that the hub is not asked for it.

    Hub ids are ``NAME`` or ``OWNER/NAME``. Anything deeper is a path, and so is what begins or ends like one, exists,
    or lies in a folder that does.

    Args:
        name: what the user gave.
        suffixes: endings of files, in lower case, that are paths too.
    """
    path = Path(name)
    looks = path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1
    return looks or name.lower().endswith(suffixes) or path.exists() or ("/" in name and path.parent.is_dir())


def absent(what: str, name: str | Path, hub: bool = False) -> WagleError:
    """What to raise where a file or a folder is needed and is not there: says if one of the other kind is.

    Args:
        what: how to call it, e.g. ``data file``.
        name: its path.
        hub: whether a hub id would do too.
    """
    path = Path(name)
    if path.is_dir():
        return WagleError(f"{what} {name} is a folder: name a file in it")
    if path.exists():
        return WagleError(f"{what} {name} is a file: name a folder")
    near = hub and len(path.parts) == 2 and not str(name).startswith((".", "/", "~")) and path.parent.is_dir()
    why = f" (there is a folder {path.parent} here, so it is not taken for a hub id)" if near else ""
    return WagleError(f"{what} {name} does not exist{why}")


def replaceable(folder: Path) -> bool:
    """Whether a folder may be replaced as a whole: it is empty, or itself a model, scores or a checkpoint of ours.

    Told by the files at its top, whose names the rooms that write them know too: the record or the adapter's
    configuration of a model; a configuration beside weights; an index that says its format.
    """
    names = [path.name for path in folder.iterdir()]
    weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names)
    if not names or "wagle.json" in names or (weights and {"config.json", "adapter_config.json"} & set(names)):
        return True
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and str(index.get("format")).startswith("wagle_pl.")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there takes the place of ``path`` on success, and is
    removed on failure.

    Works for a file and for a folder. A folder that is replaced stays whole until the new one is complete; a file never
    replaces one, and neither replaces a device.

    Raises:
        WagleError: if a file would take the place of a folder, or anything that of a device.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()  # the link stays, and what it names is replaced
    _check_kind(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a folder made under a name that did not exist, of this process alone: nothing in it was there before
    with tempfile.TemporaryDirectory(prefix=".wagle-", suffix=".tmp", dir=path.parent) as private:
        temporary = Path(private) / path.name
        retired = Path(private) / ("old" if path.name != "old" else "older")
        yield temporary
        if path.is_dir() and not temporary.is_dir():
            raise WagleError(f"output {path} is a folder: name a file in it")
        if path.is_dir() or (path.exists() and temporary.is_dir()):
            os.replace(path, retired)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(retired, path)
                raise
        else:
            os.replace(temporary, path)


def _check_kind(path: Path) -> None:
    """Refuse devices, pipes and sockets: renaming a result to ``/dev/null`` would take it from the whole machine."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WagleError(f"output {path} is neither a file nor a folder; choose another")


def resolve(base: type[T], value: Union[T, str], option: str) -> T:
    """The instance that an option names: given as an instance, a short name of a known subclass, or a class path.

    Short names ignore case and underscores: ``npo``, ``NPO``; ``forget_retain_ratio``, ``ForgetRetainRatio``.

    Args:
        base: the class it must derive from.
        value: what the user gave.
        option: its name, for the message.

    Raises:
        WagleError: listing the valid names.
    """
    if isinstance(value, base):
        return value
    known = {_fold(cls.__name__): cls for cls in list(subclasses(base)) or [base]}
    cls = known.get(_fold(value))
    if cls is None and "." in value:
        module, _, name = value.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise WagleError(f"{option} {value!r} cannot be imported: {error}") from None
    if cls is None or not (isinstance(cls, type) and issubclass(cls, base)):
        names = ", ".join(sorted(c.__name__ for c in known.values() if c.__module__.startswith("wagle_pl")))
        near = nearest(value, names.split(", "))
        meant = f": did you mean {near}?" if near else ""
        raise WagleError(f"unknown {option} {value!r}; choose one of {names}, or a class path{meant}")
    try:
        return cls()
    except TypeError as error:
        raise WagleError(f"{option} {value!r} needs arguments: {error}") from None


def nearest(name: str, names: Collection[str]) -> Optional[str]:
    """The one of some names that was probably meant, if any: case does not count.

    >>> nearest("npoo", ["GradDiff", "NPO"])
    'NPO'
    """
    folded = {other.lower(): other for other in sorted(names)}
    return next((folded[found] for found in get_close_matches(name.lower(), folded, n=1)), None)


def first_line(error: BaseException) -> str:
    """The first line of what an error says that is not empty; its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "wagle_pl")]
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
    if "TRANSFORMERS_VERBOSITY" not in os.environ or os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        set_verbosity_error()  # it may have been imported before the variable was set
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find this out


def narrow_types_crawl() -> bool:
    """Whether torch multiplies matrices of bf16 and fp16 on this machine's CPU without instructions made for it.

    So it does on x86 CPUs without AVX-512, in plain loops: on one of them (AMD Milan) a training step of SmolLM2-135M
    in bf16-mixed took 35 times that in 32-true.
    """
    import torch

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "NO AVX", "DEFAULT")


def describe(value: Any) -> dict[str, Any]:
    """A configurable object as plain data: its class name and its public scalar attributes."""
    scalars = {k: v for k, v in vars(value).items() if not k.startswith("_") and isinstance(v, (str, int, float, bool))}
    return {"class": type(value).__name__, **scalars}


def stable_seed(*parts: Any) -> int:
    """A seed of 63 bits: the first eight bytes of the SHA-256 of the parts as text, separated by spaces, halved.

    The same in every version of Python, which ``hash`` is not.

    >>> stable_seed(0, "model.norm.weight")
    3568567045360393619
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _fold(name: str) -> str:
    return name.replace("_", "").lower()


def subclasses(base: type[T]) -> Iterator[type[T]]:
    """All classes that derive from one, as far as they are imported."""
    for cls in base.__subclasses__():
        yield cls
        yield from subclasses(cls)
