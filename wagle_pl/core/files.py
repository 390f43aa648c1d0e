"""Files that are written whole or not at all, and outputs that may not be replaced."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, Optional

from safetensors import SafetensorError

from wagle_pl.core.errors import DISK_ERRORS, WagleError, first_line
from wagle_pl.core.stopping import undone_at_sigterm

#: How files begin that are written by name: HTML, SVG, PNG, safetensors (a length, then JSON).
_FORMS = re.compile(rb"<!doctype html|<\?xml|\x89PNG|[\0-\xff]{8}\{", re.IGNORECASE)


class Unwritable(WagleError):
    """An output on a disk that is full or read-only; the cause is the writer's error."""


def refuse_existing(
    path: Path,
    overwrite: bool,
    option: str = "--model.overwrite true",
    kind: Literal["file", "folder", "files"] = "file",
) -> None:
    """Refuse an output that may not be written, before any work is done.

    Args:
        overwrite: whether it may be replaced: an empty file, or one of a form that this package
            writes; by a folder, one that this package wrote and that holds nothing else.
        option: option that would allow it, for the error message.
        kind: what will be written: a ``file``; a ``folder``, which replaces a whole one; or
            ``files`` into a folder, whose other files stay as they are.
    """
    check_writable(path, kind)
    if not path.exists():
        return
    if kind == "file" and path.is_dir():
        raise WagleError(f"output {path} is a folder: name a file in it")
    if not overwrite:
        raise WagleError(f"output {path} exists already", hint=f"choose another or pass {option}")
    if kind == "file":
        with path.open("rb") as file:
            begins = file.read(16)
        if begins and not _FORMS.match(begins):
            raise WagleError(
                f"output {path} is a file of another kind, which would be lost: choose another"
            )
    if kind != "file" and not path.is_dir():
        raise WagleError(f"output {path} is a file, and a folder is to be written: choose another")
    if kind == "folder" and (other := _others_entry(path)):
        raise WagleError(
            f"output {path} holds {other}, which this package did not write and which would be "
            "lost; choose another folder"
        )


def refuse_base(folder: Path, base: str | Path) -> None:
    """Refuse to write a model where the model before unlearning is."""
    if folder.resolve() == Path(base).resolve():
        raise WagleError(f"output {folder} is the model before unlearning; choose another")


def check_writable(path: Path, kind: str = "folder", what: str = "output") -> None:
    """Refuse a path that this disk or system cannot hold, or where nothing may be written."""
    shown = ascii(str(path))[1:-1][:200]
    try:
        str(path).encode()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
        target = Path(os.path.realpath(path))
        above = next(parent for parent in target.parents if parent.exists())
        named = next((parent for parent in path.parents if parent.exists()), above)
        if not above.is_dir():
            raise WagleError(f"{what} {path} cannot be written: {named} is a file; choose another")
        if str(path).startswith("~"):
            raise WagleError(f"{what} {path} begins with ~: write the whole path, or $HOME")
        _refuse_device(path)
        with tempfile.TemporaryDirectory(
            prefix=".wagle-", dir=target if kind == "files" and target.is_dir() else above
        ):
            pass
    except WagleError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise WagleError(f"{what} {shown} cannot be written ({reason}): choose another") from None


#: Files of a model folder, and of a test in it.
_MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template*", "adapter_config.json", "wagle.json", "README.md", "test/"),
    *("test/*.parquet", "test/metrics*.json", "test/tofu_result.json", "test/robustness.json"),
    *("test/*_EVAL.json", "test/*_SUMMARY.json", ".test.lock", "test/.wagle-*"),
)


def _others_entry(folder: Path) -> Optional[str]:
    """A file in a folder that this package did not write, since replacing the folder deletes it.

    None if the folder is empty, or a model of this package (with ``wagle.json``) and nothing else.
    """
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    if "wagle.json" not in names:
        return names[0] if names else None
    names += [f"test/{path.name}" for path in folder.glob("test/*")]  # one may have been killed
    return next((n for n in names if not any(fnmatch(n, p) for p in _MODEL_FILES)), None)


def plainly_local(name: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a name can only be a local path, so that the hub need not be asked.

    Hub ids are ``NAME`` or ``OWNER/NAME``. A name is a path if it is deeper, begins or ends like a
    path (with one of the ``suffixes``, in lower case), exists, or lies in an existing folder.
    """
    path = Path(name)
    return (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or name.lower().endswith(suffixes)
        or path.exists()
        or ("/" in name and path.parent.is_dir())
    )


def absent(what: str, name: str | Path, hub: bool = False) -> WagleError:
    """The error to raise if a file or folder (``what``, e.g. ``data file``) is missing, or if one
    is found in place of the other; ``hub`` if a hub id is accepted, too."""
    path = Path(name)
    if path.is_dir():
        return WagleError(f"{what} {name} is a folder: name a file in it")
    if path.is_file():
        return WagleError(f"{what} {name} is a file: name a folder")
    if path.exists():
        return WagleError(f"{what} {name} is a pipe or a device: give a regular file")
    if path.is_symlink():
        return WagleError(f"{what} {name} is a link to nothing, or to itself")
    like_an_id = len(path.parts) == 2 and not str(name).startswith((".", "/", "~"))
    why = ""
    if hub and like_an_id and path.parent.is_dir():
        why = f" (there is a folder {path.parent} here, so it is not taken for a hub id)"
    return WagleError(f"{what} {name} does not exist{why}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file or folder replaces ``path`` on success, else is removed.

    A folder that is replaced stays whole until the new one is complete.

    Raises:
        WagleError: if a file would replace a folder, or if ``path`` is a device.
        Unwritable: if the disk is full or read-only.
    """
    try:
        with undone_at_sigterm(), _atomic_path(Path(path)) as temporary:
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := _disk_says(error)) is None:
            raise
        raise Unwritable(
            f"output {path} cannot be written ({reason}): make room, or choose another"
        ) from error


def _disk_says(error: Exception) -> Optional[str]:
    """Why the disk takes no more, if an error of any writer says so."""
    number = error.errno if isinstance(error, OSError) else None
    if match := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        number = int(match[1])
    if "inline_container.cc" in str(error):  # torch.save says no more
        return "torch.save could not write all of it"
    return os.strerror(number) if number in DISK_ERRORS else None


@contextmanager
def _atomic_path(path: Path) -> Iterator[Path]:
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # the link stays, and what it names is replaced
    _refuse_device(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in a new folder that only this process uses: it is empty at first
    with tempfile.TemporaryDirectory(prefix=".wagle-", suffix=".tmp", dir=path.parent) as private:
        temporary = Path(private) / path.name
        retired = Path(private) / ("old" if path.name != "old" else "older")
        yield temporary
        if path.is_dir() and not temporary.is_dir():
            raise WagleError(f"output {path} is a folder: name a file in it")
        try:
            if path.exists() and temporary.is_dir():  # replacing a folder takes two renames
                os.replace(path, retired)
            os.replace(temporary, path)
        except BaseException:  # a signal, too
            if retired.exists() and not path.exists():
                os.replace(retired, path)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _refuse_device(path: Path) -> None:
    """Refuse a device: a rename to ``/dev/null`` would remove it for the whole machine."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WagleError(f"output {path} is neither a file nor a folder; choose another")
