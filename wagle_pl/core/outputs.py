"""A run's output: checked before the work, written by one run at a time, not lost at the end."""

from __future__ import annotations

import atexit
import errno
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import Unwritable, refuse_existing

log = logging.getLogger(__name__)

GIB = 1 << 30


# -- one writer at a time ------------------------------------------------------------------------


def hold(path: Path, busy: str) -> FileLock:
    """Lock a file until it is released, or until this process ends, however it ends.

    Args:
        path: the file; its folder is created.
        busy: start of the error message if another process holds it.
    """
    lock = FileLock(path, timeout=0.2, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise WagleError(f"{busy}: wait for it, or choose another output") from None
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK):
            why = f"{path} cannot be locked ({error.strerror}): remove it, or choose another output"
            raise WagleError(why) from None
        log.warning("this disk has no locks (%s): start no second run", path)
    return lock


#: Locks on the outputs of this process's runs: one that failed may be followed by another.
_locks: dict[Path, FileLock] = {}


def reserve(output: Path, overwrite: bool, kind: Literal["file", "folder", "files"]) -> None:
    """Keep other runs from writing an output until :func:`release`, or this process's end.

    Collective: all ranks must call it. See :func:`~wagle_pl.core.files.refuse_existing`.
    """

    def lock() -> None:
        release(output)
        path, busy = output.with_name(f".{output.name}.lock"), f"another run writes {output}"
        _locks[output] = hold(path, busy)

    refuse_existing(output, overwrite, kind=kind)
    distributed.on_rank_zero(lock)
    refuse_existing(output, overwrite, kind=kind)  # another run may have written it a moment ago


def release(output: Path) -> None:
    """Let other runs write an output, if this process has reserved it."""
    if output in _locks:
        lock = _locks.pop(output)
        Path(lock.lock_file).unlink(missing_ok=True)  # before others can hold it
        lock.release()


@atexit.register
def _release_all() -> None:
    for output in list(_locks):
        release(output)


# -- room on the disk ----------------------------------------------------------------------------


class Planned(NamedTuple):
    """A file or folder that a run is going to write, and its size in bytes."""

    what: str
    path: Path
    size: float


def check_space(files: Iterable[Planned]) -> None:
    """Refuse a run that writes more than fits on its disks."""
    disks: dict[int, list[Planned]] = {}  # by device
    for file in files:
        disks.setdefault(_existing(file.path).stat().st_dev, []).append(file)
    for written in disks.values():
        free = shutil.disk_usage(_existing(written[0].path)).free
        needed = sum(file.size for file in written)
        if needed > free:
            parts = ", ".join(f"{file.what} {_size(file.size)}" for file in written)
            raise WagleError(
                f"the disk of {written[0].path} has {_size(free)} left, and this run writes "
                f"{_size(needed)} there ({parts}): make room, or choose another place"
            )


def planned_checkpoint(trainer: Any, size: float) -> list[Planned]:
    """The checkpoint of ``size`` bytes that a Trainer keeps, if it keeps any on a disk."""
    folders = (getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks)
    local = [Path(folder) for folder in folders if folder and "://" not in str(folder)]
    return [Planned("checkpoint", folder, size) for folder in local[:1]]


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 100 else f"{number / (1 << 20):.2f} MiB"


# -- the end -------------------------------------------------------------------------------------


def write_or_keep(
    write: Callable[[Path], Any], output: Path, checkpoint: Optional[str], again: bool = True
) -> None:
    """Write the result of a run; if that fails, say in one line where the result is.

    Args:
        checkpoint: a checkpoint from which a resumed run gets the same result, or None.
        again: whether ``write`` may be called again, to write to the folder of temporary files.
    """
    try:
        write(output)
        return
    except Unwritable as error:
        failed = str(error).partition(":")[0]
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        failed = f"output {output} cannot be written ({reason})"
    if checkpoint:
        raise WagleError(
            f"{failed}: make room, or choose another --model.output, and run the same command with "
            f"--ckpt_path {checkpoint}"
        )
    with suppress(OSError, SafetensorError, Unwritable):
        if again:
            kept = Path(tempfile.mkdtemp(prefix="wagle-")) / output.name
            try:
                write(kept)
            except BaseException:
                shutil.rmtree(kept.parent)
                raise
            raise WagleError(f"{failed}: it is in {kept}, move it from there")
    raise WagleError(f"{failed}: there is no checkpoint, and the result is lost")


def last_checkpoint(trainer: Any) -> Optional[str]:
    """The checkpoint that a Trainer wrote last, or None."""
    for saver in trainer.checkpoint_callbacks:
        for path in (getattr(saver, name, "") for name in ("last_model_path", "best_model_path")):
            if path and Path(path).exists():
                return str(path)
    return None
