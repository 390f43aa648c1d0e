"""Files that are written whole or not at all, and outputs that may not be replaced."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from wagle_pl.core.errors import WagleError


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
        raise WagleError(f"output {path} exists already", hint=f"choose another or pass {option}")
    if kind != "file" and not path.is_dir():
        raise WagleError(f"output {path} is a file, and a folder is to be written: choose another")
    if kind == "folder" and not replaceable(path):
        raise WagleError(
            f"output {path} is a folder of other things, which would be lost: only one that is empty, or "
            "is a model, scores or a checkpoint, is replaced; choose another"
        )


def plainly_local(name: str, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a name can only be a path on this machine, so that the hub is not asked for it.

    Hub ids are ``NAME`` or ``OWNER/NAME``. Anything deeper is a path, and so is what begins or ends like one, exists,
    or lies in a folder that does.

    Args:
        name: what the user gave.
        suffixes: endings of files, in lower case, that are paths too.
    """
    path = Path(name)
    looks = (
        path.is_absolute()
        or name.startswith((".", "~"))
        or name.endswith("/")
        or name.count("/") > 1
    )
    return (
        looks
        or name.lower().endswith(suffixes)
        or path.exists()
        or ("/" in name and path.parent.is_dir())
    )


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
    near = (
        hub
        and len(path.parts) == 2
        and not str(name).startswith((".", "/", "~"))
        and path.parent.is_dir()
    )
    why = (
        f" (there is a folder {path.parent} here, so it is not taken for a hub id)" if near else ""
    )
    return WagleError(f"{what} {name} does not exist{why}")


def replaceable(folder: Path) -> bool:
    """Whether a folder may be replaced as a whole: it is empty, or itself a model, scores or a checkpoint of ours.

    Told by the files at its top, whose names the rooms that write them know too: the record or the adapter's
    configuration of a model; a configuration beside weights; an index that says its format.
    """
    names = [path.name for path in folder.iterdir()]
    weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names)
    if (
        not names
        or "wagle.json" in names
        or (weights and {"config.json", "adapter_config.json"} & set(names))
    ):
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
