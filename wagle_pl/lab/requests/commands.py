"""``wagle request``: note requests to forget rows, forget them, and test them again and again."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional

from wagle_pl.cli import LazyModule
from wagle_pl.cli.tools import EXIT_NOT_FORGOTTEN
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing, write_text
from wagle_pl.core.text import count, fields, short_number, table
from wagle_pl.lab.requests.register import (
    ID,
    REGISTER_FILE,
    Register,
    Tested,
    locked,
    with_model,
)

parsing = LazyModule("wagle_pl.data.example")
patches = LazyModule("wagle_pl.unlearning.patch")
rows_of_api = LazyModule("wagle_pl.api.rows")
testing = LazyModule("wagle_pl.lab.requests.testing")


def add(
    register: str, rows: str, *, id: str, model: Optional[str] = None, date: Optional[str] = None
) -> None:
    """Note a request to forget rows; ``wagle request run`` forgets them.

    Args:
        register: folder of the register; the first request begins it.
        rows: file or hub dataset of the rows to forget, with their answers; they are copied.
        id: name of the request, of letters, digits, dots, hyphens and underscores.
        model: folder or hub id of the model that knows the rows; only to begin a register.
        date: date to note, as YYYY-MM-DD.
    """
    folder = _folder(register, date)
    if not ID.fullmatch(id):
        why = "must be at most 64 letters, digits, dots, hyphens or underscores"
        raise WagleError(f"{why}, and begin with a letter or digit, got {id!r}", option="--id")
    examples = parsing.parse_rows(rows_of_api.rows_of(rows, "rows").rows, rows)
    for number, row in enumerate(examples, 1):
        if row.kind == "prompt":
            raise WagleError(f"{rows}: row {number} has no answer to forget")
    new = not (folder / REGISTER_FILE).exists()
    if new != (model is not None):
        why = "begins a register: name its model" if new else "has a model already: leave it out"
        raise WagleError(f"{folder} {why}", option="--model")
    digest = None if model is None else testing.model_digest(model)
    if model is not None and digest is None:
        raise WagleError(f"must have safetensors files, got {model}", option="--model")
    with locked(folder):
        noted = Register(folder) if new else Register.read(folder)
        if new and noted.path.exists():
            raise WagleError(f"another command has begun register {folder}")
        if model is not None:
            noted.begin(date, noted.place(model), digest)
        if id.casefold() in map(str.casefold, noted.requests):
            raise WagleError(f"{folder} has a request {id!r} already", option="--id")
        by_digest = {rows_of_api.row_digest(row, noted.salt): row for row in examples}
        for request in noted.requests.values():
            again = len(by_digest.keys() & request.digests)
            if again and request.state != "withdrawn":
                raise WagleError(f"{rows}: {count(again, 'row')} in request {request.id} already")
        text = "".join(f"{json.dumps(r.row, ensure_ascii=False)}\n" for r in by_digest.values())
        write_text(noted.rows_file(id), text)
        noted.append("added", date, id=id, rows=list(by_digest))
    print(f"request {id}: {count(len(by_digest), 'row')} to forget")


def run(
    register: str,
    *,
    output: Optional[str] = None,
    model: Optional[str] = None,
    retain: Optional[str] = None,
    density: Optional[float] = 0.2,
    objective: Optional[str] = None,
    score: Optional[str] = None,
    unit: str = "row",
    lr: Optional[float] = None,
    max_steps: int = 300,
    seed: int = 0,
    date: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Make the register's model forget all open requests, and test every earlier one again.

    An earlier request that comes back is forgotten with the open ones. A damaged model is not
    written. The exit status is 0 only if all open requests are forgotten, and 3 otherwise.

    Args:
        register: folder of the register.
        output: folder to write; by default models/N in the register.
        model: folder of the register's model, if it has moved.
        retain: file or hub dataset of rows to keep, see ``wagle forget``; likewise the following.
        density: share of the weights to train; null for all.
        objective: objective to minimise.
        score: score that selects the weights.
        unit: select whole units.
        lr: learning rate of AdamW.
        max_steps: maximum number of training steps.
        seed: random seed.
        date: date to note, as YYYY-MM-DD.
    """
    folder = _folder(register, date)
    options = {"retain": retain, "density": density, "objective": objective, "score": score}
    options |= {"unit": unit, "lr": lr, "max_steps": max_steps, "seed": seed}
    with with_model(folder) as noted:
        opened = [request.id for request in noted.testable() if request.state == "open"]
        if not opened:
            raise WagleError(f"register {folder} has no open request")
        target = Path(output or folder / "models" / str(noted.run_count + 1))
        if output is None:  # a command that was killed may have left a model here
            models = {entry.get("model") for entry in noted.entries}
            overwrite = overwrite or noted.place(str(target)) not in models
        refuse_existing(target, overwrite, "--overwrite", kind="folder")
        entry = testing.forget_open(noted, _model(noted, model), target, options, overwrite)
        _append(folder, "run", date, **entry)
    tests = entry["requests"]
    _print_tests(tests if entry["rejected"] is None else entry["rejected"])
    if entry["retain"] is not None:
        before, after = map(short_number, entry["retain"])
        print(f"probability of retain rows: {before} to {after}")
    why = "" if entry["outcome"] is None else f": {entry['outcome']}"
    print(f"model written to {target}" if entry["model"] else f"no model was written{why}")
    for name in entry["reopened"]:
        print(f"request {name} came back, and was forgotten with the others")
    if not all(tests[name]["outcome"] == "forgotten" for name in opened):
        raise SystemExit(EXIT_NOT_FORGOTTEN)


def verify(
    register: str,
    *,
    model: Optional[str] = None,
    bits: Optional[int] = None,
    adopt: bool = False,
    seed: int = 0,
    date: Optional[str] = None,
) -> None:
    """Test the rows of every request on a model.

    A request that the register's own model knows is open again. The exit status is 0 if the model
    knows no request, and 3 otherwise.

    Args:
        register: folder of the register.
        model: hub id, folder or GGUF file of the model that is served; by default the register's.
        bits: round the weights of linear layers to so many bits first, which may undo forgetting.
        adopt: make the model the register's, such as one that was trained further: requests that it
            knows are open again, and earlier runs cannot be reverted.
        seed: random seed.
        date: date to note, as YYYY-MM-DD.
    """
    if bits is not None and not 2 <= bits <= 16:
        raise WagleError(f"must be 2 to 16, got {bits}", option="--bits")
    folder = _folder(register, date)
    noted = Register.read(folder)
    requests = [(request, noted.rows(request)) for request in noted.testable()]
    if not requests:
        raise WagleError(f"register {folder} has no rows to test")
    name = _found(noted, model)
    digest = testing.model_digest(name)
    if adopt and (model is None or digest is None or bits is not None):
        why = "takes a --model with safetensors files, and no --bits"
        raise WagleError(f"{why}, got {name}", option="--adopt")
    with with_model(folder) if adopt else nullcontext():
        lm, tokenizer = testing.load(name, bits)
        tests = {
            request.id: testing.examine(lm, tokenizer, rows, request.known, request.draws, seed)
            for request, rows in requests
        }
        about = {"model": noted.place(name), "digest": digest, "bits": bits, "adopted": adopt}
        _append(folder, "verified", date, **about, requests=tests)
    _print_tests(tests)
    if any(tested["outcome"] == "known" for tested in tests.values()):
        raise SystemExit(EXIT_NOT_FORGOTTEN)


def revert(
    register: str,
    id: str,
    *,
    output: Optional[str] = None,
    model: Optional[str] = None,
    date: Optional[str] = None,
    overwrite: bool = False,
) -> None:
    """Undo the last run, bit for bit, and withdraw a request of it; its others are open again.

    The patch of the run is deleted: with the model that the run wrote, it leads to the one before.

    Args:
        register: folder of the register.
        id: the request.
        output: folder to write; by default models/N-reverted in the register.
        model: folder of the register's model, if it has moved.
        date: date to note, as YYYY-MM-DD.
    """
    folder = _folder(register, date)
    with with_model(folder) as noted:
        number = noted.request(id).run
        if number is None:
            raise WagleError(f"request {id}: no run has forgotten it, so there is none to revert")
        mates = noted.of_run(number)
        if number not in noted.runs:
            why = f"request {id}: the register took another model since run {number} forgot it"
            raise WagleError(why)
        if number != (last := [*noted.runs][-1]):
            others = ", ".join(request.id for request in noted.of_run(last))
            why = f"request {id}: run {last} has changed the model since run {number} forgot it"
            raise WagleError(why, hint=f"revert {others} first")
        if purged := [request.id for request in mates if request.purged]:
            raise WagleError(f"request {id}: the rows of {purged[0]}, of the same run, are purged")
        if (patch := noted.runs[number]["patch"]) is None:
            raise WagleError(f"request {id}: its run has written no patch")
        path = folder / patch["file"]
        if not path.is_file() or noted.stored(path) != patch:
            raise WagleError(f"{path} is missing, or not the patch that run {number} wrote")
        target = Path(output or folder / "models" / f"{number}-reverted")
        digest = patches.revert_patch(_model(noted, model), path, target, overwrite)
        reopened = [request.id for request in mates if request.id != id]
        about = {"model": noted.place(str(target)), "digest": digest}
        _append(folder, "reverted", date, id=id, reopened=reopened, **about).sweep()
    print(f"{target}: digest {digest}, as before run {number}")
    for request in mates:
        print(f"request {request.id} is {'withdrawn' if request.id == id else 'open again'}")


def purge(register: str, id: str, *, date: Optional[str] = None) -> None:
    """Delete the text of a request, once the register's model is verified or the request withdrawn.

    With the last request of a run its patch goes, too: it leads back to a model that knows the rows.

    Args:
        register: folder of the register.
        id: the request.
        date: date to note, as YYYY-MM-DD.
    """
    folder = _folder(register, date)
    with with_model(folder) as noted:
        request = noted.request(id)
        noted.sweep()
        if request.purged:
            raise WagleError(f"request {id} is purged already")
        is_verified = request.state != "open" and request.verified == noted.digest
        if not is_verified and request.state != "withdrawn":
            hint = f"run wagle request verify {folder} first"
            raise WagleError(f"request {id} is {request.state} and not verified", hint=hint)
        noted.rows_file(id).unlink(missing_ok=True)  # then noted: the command may be repeated
        _append(folder, "purged", date, id=id).sweep()
    print(f"the rows of request {id} are deleted here; models from before it still know them")


def list_requests(register: str) -> None:
    """List the requests of a register, and check that no entry was changed.

    Args:
        register: folder of the register.
    """
    noted = Register.read(Path(register))
    rows = []
    for request in noted.requests.values():
        means: Mapping[str, Any] = {} if request.last is None else request.last["after"]
        numbers = [_number(means.get(key)) for key in ("probability", "unseen", "reworded")]
        state = f"{request.state}{', purged' * request.purged}"
        size, number = str(len(request.digests)), str(request.run or "–")
        rows.append([request.id, request.date or "–", state, size, number, *numbers])
    header = ["request", "date", "state", "rows", "run", "probability", "never seen", "reworded"]
    print(table(header, rows, left=(0, 1, 2)))
    last = f"entry {len(noted.entries)}, digest {noted.head}"
    model = f"{noted.located(noted.model)}, digest {noted.digest}"
    print(f"\n{fields([('model', model), ('last', last)])}")


def show(register: str, id: str) -> None:
    """Show every entry about a request as JSON, without the text of its rows.

    Args:
        register: folder of the register.
        id: the request.
    """
    noted = Register.read(Path(register))
    noted.request(id)
    for number, entry in enumerate(noted.entries, 1):
        tests = entry.get("requests", {})
        if id in (entry.get("id"), *tests, *entry.get("reopened", ())):
            shown = entry | {key: {id: tests[id]} for key in ("requests",) if id in tests}
            print(json.dumps({"entry": number, **shown}, indent=2, ensure_ascii=False))


VERBS: dict[str, Callable[..., None]] = {
    **{"add": add, "run": run, "list": list_requests, "show": show},
    **{"verify": verify, "revert": revert, "purge": purge},
}


def _append(folder: Path, kind: Any, date: Optional[str], **content: Any) -> Register:
    """Write one more entry into a register that other commands may have changed."""
    with locked(folder):
        register = Register.read(folder)
        register.append(kind, date, **content)
    return register


def _model(noted: Register, moved: Optional[str]) -> str:
    """The register's model, if it is still what it was."""
    name = _found(noted, moved)
    if (digest := testing.model_digest(name)) != noted.digest:
        why = f"{name} has digest {digest}; the register's model has {noted.digest}"
        raise WagleError(why, hint="wagle request verify --adopt takes another model")
    return name


def _found(noted: Register, moved: Optional[str]) -> str:
    """The folder or hub id of the register's model."""
    name = moved or noted.located(noted.model)
    is_folder = noted.model in noted.written or Path(name).is_absolute()
    if moved is None and is_folder and not Path(name).exists():
        raise WagleError(f"the register's model {name} is missing", hint="give --model if it moved")
    return name


def _folder(register: str, date: Optional[str]) -> Path:
    """The folder of a register, once the date of an entry is checked."""
    try:
        is_date = date is None or datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        is_date = False
    if not is_date:
        raise WagleError(f"must be a date as YYYY-MM-DD, got {date!r}", option="--date")
    return Path(register)


def _print_tests(tests: Mapping[str, Tested]) -> None:
    rows = []
    for name, tested in tests.items():
        before, after = tested["before"], tested["after"]
        numbers = (before and before["probability"], after["probability"], after["unseen"])
        left = f"{tested['left']} of {len(tested['known'])}"
        rows.append([name, tested["outcome"], *map(_number, numbers), left])
    header = ["request", "outcome", "before", "probability", "never seen", "rows known"]
    print(table(header, rows, left=(0, 1)))
    for name, tested in tests.items():
        if tested["outcome"] == "known" and not tested["left"]:
            print(f"request {name}: no row is known, but on average they are above their bound")


def _number(value: Optional[float]) -> str:
    return "–" if value is None else short_number(value)
