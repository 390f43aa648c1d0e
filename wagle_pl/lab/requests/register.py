"""A register of requests to forget rows: an append-only file of what was asked, done and measured.

A register is a folder::

    register.jsonl      one entry a line, each with the SHA-256 of the entry before
    head.json           the number of entries and the SHA-256 of the last, written after each
    rows/ID.jsonl       the rows of a request, until it is purged
    patches/N.patch     what run N changed, and N.mask.safetensors, which weights it could change
    models/N            the model that run N wrote, unless another folder was named

Entries hold digests of rows, with a salt of the register's own, and numbers; never a row's text. A
register is a record. Its chain shows accidents and careless changes; who can write its files can
also write a new chain, so the last digest is worth noting elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, TypedDict

from wagle_pl.cli import LazyModule
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import absent, write_text
from wagle_pl.core.reading import parse_json, read_json, read_text
from wagle_pl.core.schema import Count, Json, check, filled

rows_of_api = LazyModule("wagle_pl.api.rows")
parsing = LazyModule("wagle_pl.data.example")
outputs = LazyModule("wagle_pl.core.outputs")

REGISTER_FILE, HEAD_FILE = "register.jsonl", "head.json"
#: What an id is: it names a file.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Kind = Literal["created", "added", "run", "verified", "reverted", "purged"]
State = Literal["open", "forgotten", "not known", "withdrawn"]


class Means(TypedDict):
    """Means of probabilities of a request's rows."""

    probability: float
    unseen: float  # of rows of the same form that the model has never seen
    reworded: float  # of the rows in other words


class Tested(TypedDict):
    """A test of a request on one model."""

    outcome: Literal["forgotten", "known", "not known before"]
    known: list[bool]  # rows that were known before anything was forgotten
    draws: list[Count]  # seeds of the rows' unseen counterparts, as the first test chose them
    left: Count  # rows that the model knows, asked directly or in other words
    before: Optional[Means]  # of the run, if the request was open
    after: Means


class StoredFile(TypedDict):
    """A file in the register's folder."""

    file: str
    sha256: str


class Entry(TypedDict):
    """What every entry has."""

    kind: Kind
    date: Optional[str]
    previous: str  # ``sha256`` of the entry before; empty for the first
    sha256: str  # of the entry without this key


class Created(Entry):
    """The first entry."""

    format: Literal["wagle_pl.register"]
    format_version: Literal[1]
    salt: str
    model: str
    digest: str  # of the model's tensors, see ``unlearning.patch.digest_of``


class Added(Entry):
    """A new request."""

    id: str
    rows: list[str]  # salted digests


class Ran(Entry):
    """A run; ``model`` and ``digest`` are None if it left the register's model as it was."""

    base: str  # digest
    model: Optional[str]
    digest: Optional[str]
    requests: dict[str, Tested]  # tests of the model that the register then has
    rejected: Optional[dict[str, Tested]]  # tests of a model that was not kept
    reopened: list[str]  # earlier requests that a first attempt brought back
    outcome: Optional[str]  # of ``forget``; None if nothing was trained
    retain: Optional[list[float]]  # probability of held-out retain rows, before and after
    settings: dict[str, Json]
    mask: Optional[StoredFile]
    patch: Optional[StoredFile]


class Verified(Entry):
    """A test of every request on a model, maybe rounded to ``bits``."""

    model: str
    adopted: Optional[bool]  # whether the model became the register's
    digest: Optional[str]  # None if the model's files are not safetensors
    bits: Optional[Count]
    requests: dict[str, Tested]


class Reverted(Entry):
    """The last run undone."""

    id: str
    reopened: list[str]  # other requests of the run
    model: str
    digest: str


class Purged(Entry):
    """The text of a request deleted."""

    id: str


SCHEMAS: dict[str, Any] = {
    **{"created": Created, "added": Added, "run": Ran, "verified": Verified},
    **{"reverted": Reverted, "purged": Purged},
}


class Head(TypedDict):
    """The last entry."""

    entries: Count  # number of entries
    sha256: str


@dataclass
class Request:
    """A request, as its entries leave it."""

    id: str
    digests: list[str]
    date: Optional[str]
    state: State = "open"
    purged: bool = False
    known: list[bool] = field(default_factory=list)  # see :class:`Tested`
    draws: Sequence[int] = ()
    run: Optional[int] = None  # number of the run that forgot it
    last: Optional[Tested] = None  # test of the register's model
    verified: str = ""  # digest of the model on which the last verification passed

    def take(self, tested: Tested) -> None:
        """Note a test of the register's model."""
        if {len(tested["known"]), len(tested["draws"])} != {len(self.digests)}:
            raise WagleError(f"the test of request {self.id} is not one of its rows")
        self.last, self.known, self.draws = tested, tested["known"], tested["draws"]
        states: dict[str, State] = {"known": "open", "not known before": "not known"}
        self.state = states.get(tested["outcome"], "forgotten")


class Register:
    """A register as it is now: ``requests``, the ``model`` with its ``digest``, and the ``runs`` that
    led to it, by number."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / REGISTER_FILE
        self.entries: list[dict[str, Any]] = []
        self.requests: dict[str, Request] = {}
        self.runs: dict[int, dict[str, Any]] = {}
        self.lines: list[str] = []
        self.run_count, self.written = 0, set[str]()  # models that are folders, whether they exist
        self.model = self.digest = self.salt = self.head = ""

    @classmethod
    def read(cls, folder: Path) -> Register:
        """The register in a folder.

        Raises:
            WagleError: if it does not exist, or an entry is damaged, changed, added or removed.
        """
        register = cls(folder)
        if not folder.is_dir():
            raise absent("register", folder)
        file = folder / HEAD_FILE  # read first: an entry may be appended meanwhile
        head: Optional[Head] = read_json(file, Head) if file.exists() else None
        # no other character ends a line: a text may have it
        register.lines = [*filter(None, read_text(register.path, "register").split("\n"))]
        for number, line in enumerate(register.lines, 1):
            register._follow(parse_json(line, str(register.path), Entry, line=number), number)
        if not register.entries:
            raise WagleError(f"register {register.path} is empty: its first entry is missing")
        if head is None and len(register.entries) > 1:
            ends = json.dumps({"entries": len(register.entries), "sha256": register.head})
            why = f"{file} is missing, so entries at the end may have been cut off"
            raise WagleError(why, hint=f"if the last digest is the one you know, write {ends}")
        digests = ["", *(entry["sha256"] for entry in register.entries)]
        if head is not None and digests[head["entries"] :][:1] != [head["sha256"]]:
            count = f"{len(register.entries)} of {head['entries']} entries are left"
            raise WagleError(
                f"{register.path}: entries at the end were cut off or changed: {count}"
            )
        return register

    def begin(self, date: Optional[str], model: str, digest: str) -> None:
        """Write the first entry; the caller holds :func:`locked`."""
        about = {"format": "wagle_pl.register", "format_version": 1}
        salt = secrets.token_hex(16)
        self.append("created", date, **about, salt=salt, model=model, digest=digest)

    def append(self, kind: Kind, date: Optional[str], **content: Any) -> None:
        """Write one more entry, whole or not at all; the caller holds :func:`locked`."""
        entry = {"kind": kind, "date": date, **content, "previous": self.head}
        entry["sha256"] = _digest(entry)
        self._follow(entry, len(self.entries) + 1)
        self.lines.append(json.dumps(entry, ensure_ascii=False))
        write_text(self.path, "".join(f"{line}\n" for line in self.lines))
        head: Head = {"entries": Count(len(self.entries)), "sha256": self.head}
        write_text(self.folder / HEAD_FILE, json.dumps(head))

    # -- what entries do ---------------------------------------------------------------------------

    def _follow(self, entry: dict[str, Any], number: int) -> None:
        """Check an entry, and do to the register what it tells of."""
        where = f"{self.path} line {number}"
        if entry["sha256"] != _digest(entry):
            raise WagleError(f"{where}: the entry was changed after it was written")
        if entry["previous"] != self.head or (entry["kind"] == "created") != (number == 1):
            raise WagleError(f"{where}: an entry before it was changed, added or removed")
        check(entry, schema := SCHEMAS[entry["kind"]], where)
        entry = filled(entry, schema)
        try:
            getattr(self, f"_{entry['kind']}")(entry)
        except WagleError as error:
            raise WagleError(f"{where}: {error}") from None
        self.entries.append(entry)
        self.head = entry["sha256"]

    def _take_model(self, entry: dict[str, Any]) -> None:
        """Go on from the model of an entry."""
        if None in (entry["model"], entry["digest"]):
            raise WagleError("it names no model, or no digest of it")
        self.model, self.digest = entry["model"], entry["digest"]
        if entry["kind"] in ("run", "reverted"):
            self.written.add(self.model)
        for request in self.requests.values():
            request.last = None  # a test of the model before

    def _created(self, entry: dict[str, Any]) -> None:
        self.salt = entry["salt"]
        self._take_model(entry)

    def _added(self, entry: dict[str, Any]) -> None:
        name = entry["id"]
        if not ID.fullmatch(name) or name in self.requests:
            raise WagleError(f"{name!r} is no id, or that of an earlier request")
        self.requests[name] = Request(name, entry["rows"], entry["date"])

    def _run(self, entry: dict[str, Any]) -> None:
        self.run_count += 1
        if entry["digest"] is not None:
            self._take_model(entry)
            self.runs[self.run_count] = entry
        for name, tested in entry["requests"].items():
            request = self.request(name)
            if entry["digest"] and request.state == "open" and tested["outcome"] == "forgotten":
                request.run = self.run_count
            request.take(tested)

    def _verified(self, entry: dict[str, Any]) -> None:
        if entry["adopted"]:
            self._take_model(entry)
            self.runs.clear()  # their patches do not fit
        if entry["digest"] != self.digest or entry["bits"]:
            return
        for name, tested in entry["requests"].items():
            request = self.request(name)
            request.verified = "" if tested["outcome"] == "known" else self.digest
            if request.state == "open":  # which only a run ends
                request.last = tested
            else:
                request.take(tested)

    def _reverted(self, entry: dict[str, Any]) -> None:
        if not self.runs:
            raise WagleError("there is no run that it could have undone")
        self._take_model(entry)
        self.runs.popitem()
        for name in (entry["id"], *entry["reopened"]):
            request = self.request(name)
            request.state = "withdrawn" if name == entry["id"] else "open"
            request.run = None

    def _purged(self, entry: dict[str, Any]) -> None:
        self.request(entry["id"]).purged = True

    # -- requests and files ------------------------------------------------------------------------

    def request(self, name: str) -> Request:
        """A request by its id."""
        if name not in self.requests:
            raise WagleError(f"register {self.folder} has no request {name!r}")
        return self.requests[name]

    def of_run(self, number: int) -> list[Request]:
        """The requests that a run forgot."""
        return [request for request in self.requests.values() if request.run == number]

    def sweep(self) -> None:
        """Delete patches and masks of runs that were reverted, whose requests are all purged, or that
        did not end: they may lead back to a model that knows rows. The caller holds the model."""
        for file in (self.folder / "patches").glob("*"):
            match = re.fullmatch(r"(\d+)\.(?:patch|mask\.safetensors)", file.name)
            if match and all(request.purged for request in self.of_run(int(match[1]))):
                file.unlink()

    def testable(self) -> list[Request]:
        """The requests whose rows are there, without those that are withdrawn."""
        return [r for r in self.requests.values() if not r.purged and r.state != "withdrawn"]

    def rows_file(self, name: str) -> Path:
        """The file of a request's rows."""
        return self.folder / "rows" / f"{name}.jsonl"

    def rows(self, request: Request) -> list[Any]:
        """The rows of a request as examples; refused if they are not those that were added."""
        path = self.rows_file(request.id)
        examples = parsing.parse_rows(rows_of_api.rows_of(path, "rows").rows, str(path))
        if [rows_of_api.row_digest(row, self.salt) for row in examples] != request.digests:
            raise WagleError(f"{path}: the rows are not those that were added as {request.id}")
        return examples

    def located(self, name: str) -> str:
        """A model of an entry, as a path from here; a hub id stays as it is."""
        path = self.folder / name
        return str(path) if name in self.written or path.exists() else name

    def place(self, name: str) -> str:
        """A model as entries name it: its path in the register, or else its absolute path; a hub id
        as it is."""
        if not Path(name).exists():
            return name
        path, folder = Path(name).resolve(), self.folder.resolve()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def stored(self, path: Path) -> StoredFile:
        """What an entry holds of a file in the folder."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return {"file": path.relative_to(self.folder).as_posix(), "sha256": digest}


def _digest(entry: dict[str, Any]) -> str:
    """SHA-256 of an entry without its own digest."""
    content = {key: value for key, value in entry.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def with_model(folder: Path) -> Iterator[Register]:
    """The register in a folder, whose model no other command changes meanwhile."""
    Register.read(folder)  # before a lock makes the folder
    with locked(folder, "model"):
        yield Register.read(folder)


@contextmanager
def locked(folder: Path, what: Literal["entries", "model"] = "entries") -> Iterator[None]:
    """Hold the ``entries`` of a register, for a moment; or its ``model``, for a whole command."""
    lock = outputs.hold(folder / f".{what}.lock", f"another command works on register {folder}")
    try:
        yield
    finally:
        lock.release()
