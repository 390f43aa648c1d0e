"""The output of a run: one run at a time writes it, it is tried before the work, and at the end nothing is lost."""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Optional

from lightning.pytorch import Callback

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import refuse_existing

log = logging.getLogger(__name__)

GIB = 1 << 30


# -- one writer at a time ---------------------------------------------------------------------------------------------


class Lock:
    """A file that one process holds, through the operating system: it is free again when the process has ended.

    The file says who holds it (process, host, since when). What it still says when nobody holds it was left by a
    process that was killed.

    Args:
        path: the file; its folder is made.
        busy: what to say if another holds it.
        advice: what to do then.
        across_hosts: believe the operating system that a holder on another host has ended. (A job that is queued again
            may go on elsewhere; but there are shared disks whose locks hold on one host only.)

    Attributes:
        left: who was killed while holding it; None if nobody.

    Raises:
        WagleError: if another process holds it, or may do.
    """

    def __init__(self, path: Path, busy: str, advice: str, across_hosts: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file, sure = _opened(path)
        if self._file is None:
            raise WagleError(f"{busy} ({_holder(path)}): wait for it, or {advice}")
        left, host = _read(path), socket.gethostname()
        if left and not (sure and (across_hosts or left.get("host") == host)):
            holder = _holder(path)
            self._file.close()
            raise WagleError(f"{busy} ({holder}), or ended without a word: if so, delete {path}")
        self.left = _holder(path) if left else None
        self._write(
            json.dumps(
                {"pid": os.getpid(), "host": host, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            )
        )

    def release(self, remove: bool = True) -> None:
        """Let others have it; the file is removed, or stays behind empty."""
        if remove:
            self.path.unlink(missing_ok=True)
        else:
            self._write("")
        self._file.close()

    def _write(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()


def _opened(path: Path) -> tuple[Optional[IO[str]], bool]:
    """The file, with the operating system's lock on it, and whether there was one to be had; None if it is held."""
    import fcntl

    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None, True
        except OSError:  # a disk without locks: what the file says must do
            return file, False
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file, True
        file.close()  # another has ended, and removed the file, in the meantime


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8").strip()
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError:
        found = {}
    return found if isinstance(found, dict) else {}


def _holder(path: Path) -> str:
    found = _read(path)
    return f"process {found.get('pid', 'unknown')} on {found.get('host', 'unknown')}, since {found.get('since', '?')}"


#: Outputs that runs of this process write; a run that failed may be followed by another in the same process.
_claimed: dict[Path, Lock] = {}


def reserve(output: Path, overwrite: bool, kind: Literal["file", "folder", "files"]) -> None:
    """Refuse an output that may not be written (see :func:`refuse_existing`), and keep other runs from writing it until
    :func:`release`, or the end of this process; a meeting of all ranks.

    Raises:
        WagleError: if it may not be written, another run is about to, or nothing can be written where it is to be.
    """
    refuse_existing(output, overwrite, kind=kind)
    distributed.on_rank_zero(lambda: _claim(output))
    refuse_existing(output, overwrite, kind=kind)  # another run may have written it a moment ago


def _claim(output: Path) -> None:
    """The lock is a hidden file beside the output: this tries, too, whether anything can be written there."""
    release(output)
    path = output.with_name(f".{output.name}.lock")
    try:
        lock = Lock(
            path, f"another run writes {output}", "choose another --model.output", across_hosts=True
        )
    except OSError as error:
        raise WagleError(
            f"output {output} cannot be written ({error.strerror}): choose another"
        ) from None
    _claimed[output] = lock
    if lock.left:
        log.warning("output %s: took over the lock of a run that has ended (%s)", output, lock.left)


def release(output: Path) -> None:
    """Let others write an output, if this process had claimed it."""
    lock = _claimed.pop(output, None)
    if lock is not None:
        lock.release()


class ReleaseOnFailure(Callback):
    """Lets others write an output when the run fails: Lightning does not tear a module down then."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_exception(self, *_: Any) -> None:
        """Release the output."""
        release(self.output)


@atexit.register
def _release_all() -> None:
    for output in list(_claimed):
        release(output)


# -- room on the disk -------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A file, or folder, that a run is going to write: what it is, where, and its size in bytes."""

    what: str
    path: Path
    size: float


def check_space(files: Iterable[Planned]) -> None:
    """Refuse a run that writes more than its disks have room for.

    Raises:
        WagleError: naming the place, what is written there and what is free.
    """
    disks: dict[int, list[Planned]] = {}  # by device
    for file in files:
        disks.setdefault(_existing(file.path).stat().st_dev, []).append(file)
    for written in disks.values():
        free, needed = (
            shutil.disk_usage(_existing(written[0].path)).free,
            sum(file.size for file in written),
        )
        if needed > free:
            parts = ", ".join(f"{file.what} {_size(file.size)}" for file in written)
            raise WagleError(
                f"the disk of {written[0].path} has {_size(free)} left, and this run writes "
                f"{_size(needed)} there ({parts}): make room, or choose another place"
            )


def planned_checkpoint(trainer: Any, size: float) -> list[Planned]:
    """One checkpoint of a trainer's, if it writes any to a disk."""
    folders = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
    return [
        Planned("checkpoint", Path(folder), size)
        for folder in folders
        if folder and "://" not in str(folder)
    ][:1]


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 100 else f"{number / (1 << 20):.2f} MiB"


# -- the end ----------------------------------------------------------------------------------------------------------


def write_or_keep(
    write: Callable[[Path], Any], output: Path, checkpoint: Optional[str], again: bool = True
) -> None:
    """Write the result of a run; where that fails, say in one line where the result is.

    Args:
        write: writes it to a path, whole or not at all.
        output: where to.
        checkpoint: from which a resumed run comes to the same result, if there is one.
        again: whether ``write`` may be called a second time, for another place.

    Raises:
        WagleError: if it could not be written to ``output``.
    """
    from safetensors import SafetensorError

    try:
        write(output)
        return
    except (OSError, SafetensorError) as error:
        failed = f"output {output} cannot be written ({_reason(error)})"
    if checkpoint:
        raise WagleError(
            f"{failed}: make room, or choose another --model.output, and run the same command with "
            f"--ckpt_path {checkpoint}"
        )
    kept = _written_elsewhere(write, output.name) if again else None
    if kept is None:
        raise WagleError(f"{failed}: there is no checkpoint, and the result is lost")
    raise WagleError(f"{failed}: it is in {kept}, move it from there")


def _written_elsewhere(write: Callable[[Path], Any], name: str) -> Optional[Path]:
    """Write a result where temporary files go, often another disk; where it is, or None if that fails, too."""
    from safetensors import SafetensorError

    folder: Optional[Path] = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="wagle-"))
        write(folder / name)
    except (OSError, SafetensorError):
        if folder is not None:
            shutil.rmtree(folder)
        return None
    return folder / name


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def last_checkpoint(trainer: Any) -> Optional[str]:
    """The checkpoint that a trainer wrote last; None if there is none."""
    for saver in trainer.checkpoint_callbacks:
        for path in (getattr(saver, name, "") for name in ("last_model_path", "best_model_path")):
            if path and Path(path).exists():
                return str(path)
    return None
