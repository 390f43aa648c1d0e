"""A run's output: checked before the work, written by one run at a time, not lost at the end."""

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
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Optional, TypedDict, Union

from safetensors import SafetensorError

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import Unwritable, absent, refuse_existing
from wagle_pl.core.reading import parse_json, read_text

log = logging.getLogger(__name__)

GIB = 1 << 30


# -- one writer at a time ------------------------------------------------------------------------


class Holder(TypedDict):
    """The process that holds a lock."""

    pid: Union[int, str, None]
    host: Optional[str]
    since: Optional[str]


class Lock:
    """A file that one process holds through the operating system, until that process ends.

    Unlike ``filelock`` (whose releases for Python 3.10 empty the file at every attempt), the file
    says who holds it. Text in a file that nobody holds was left by a process that was killed.

    Args:
        path: the file; its folder is created.
        busy: start of the error message if another process holds it.
        advice: end of that message: what to do.
        across_hosts: trust the operating system when a holder on another host has ended. (A job
            that is queued again may run elsewhere; but some shared disks lock only on one host.)
    """

    def __init__(self, path: Path, busy: str, advice: str, across_hosts: bool = False) -> None:
        if path.exists() and not path.is_file():
            raise absent("lock", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file, sure = _locked(path)
        try:
            text = read_text(path, "lock")
            left = parse_json(text, f"lock {path}", Holder) if text.strip() else {}
        except WagleError:
            if self._file is not None:
                self._file.close()
            raise
        unknown = {"pid": "unknown", "host": "unknown", "since": "?"}
        holder = "process {pid} on {host}, since {since}".format(**{**unknown, **left})
        if self._file is None:
            raise WagleError(f"{busy} ({holder}): wait for it, or {advice}")
        host = socket.gethostname()
        if left and not (sure and (across_hosts or left.get("host") == host)):
            self._file.close()
            raise WagleError(f"{busy} ({holder}), or was killed: if so, delete {path}")
        self.left = holder if left else None  # who was killed while holding it
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._write(json.dumps({"pid": os.getpid(), "host": host, "since": since}))

    def release(self, remove: bool = True) -> None:
        """Release the lock; the file is removed, or emptied."""
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


def _locked(path: Path) -> tuple[Optional[IO[str]], bool]:
    """The locked file, None if another process holds it; and whether this disk has locks."""
    import fcntl

    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None, True
        except OSError:  # a disk without locks: only the file's content says who holds it
            return file, False
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file, True
        file.close()  # its last holder has removed it in the meantime


#: Locks on the outputs of this process's runs: one that failed may be followed by another.
_locks: dict[Path, Lock] = {}


def reserve(output: Path, overwrite: bool, kind: Literal["file", "folder", "files"]) -> None:
    """Keep other runs from writing an output until :func:`release`, or this process's end.

    Collective: all ranks must call it. See :func:`~wagle_pl.core.files.refuse_existing`.
    """

    def lock() -> None:
        release(output)
        path, busy = output.with_name(f".{output.name}.lock"), f"another run writes {output}"
        try:
            held = Lock(path, busy, "choose another --model.output", across_hosts=True)
        except OSError as error:
            raise WagleError(
                f"output {output} cannot be written ({error.strerror}): choose another"
            ) from None
        _locks[output] = held
        if held.left:
            message = "output %s: took over the lock of a run that has ended (%s)"
            log.warning(message, output, held.left)

    refuse_existing(output, overwrite, kind=kind)
    distributed.on_rank_zero(lock)
    refuse_existing(output, overwrite, kind=kind)  # another run may have written it a moment ago


def release(output: Path) -> None:
    """Let other runs write an output, if this process has reserved it."""
    if output in _locks:
        _locks.pop(output).release()


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
    except (OSError, SafetensorError, Unwritable) as error:
        cause = error.__cause__ if isinstance(error, Unwritable) else error
        reason = getattr(cause, "strerror", None) or first_line(cause)
    failed = f"output {output} cannot be written ({reason})"
    if checkpoint:
        raise WagleError(
            f"{failed}: make room, or choose another --model.output, and run the same command with "
            f"--ckpt_path {checkpoint}"
        )
    if again:
        with suppress(OSError, SafetensorError, Unwritable):
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
