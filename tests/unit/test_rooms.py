"""The rooms of the package: what may import what, and how large they may grow. Nothing is executed."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "wagle_pl"
#: Rooms from the ground up; those of one line do not import each other.
FLOORS = (
    ("core",),
    ("strategies",),
    ("lm", "masks", "data"),
    ("objectives",),
    ("attribution", "unlearning", "evaluation"),
    ("api", "cli", "metrics"),
    ("lab",),
)
SUITE = tuple(room for floor in FLOORS[:-1] for room in floor)
#: What a row and a mask pass through.
PATH = ("core", "data", "masks", "lm", "objectives", "attribution", "unlearning", "strategies")

#: Lines allowed, today's measure rounded up: lower them with everything that goes. Units of weights have added 500.
LIMITS = {"path": 15_800, "suite": 23_960, "all": 30_920, "file": 450, "function": 60}
AIMS = {"path": 12_000, "suite": 16_500, "all": 22_500, "file": 450, "function": 60}
#: Files and functions that are above their aim.
LARGE = {"file": 0, "function": 0}

SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
LINES = {path: len(source.splitlines()) for path, source in SOURCES.items()}


def room_of(path: Path) -> str:
    """The folder of the package that a file is in, or the name of a file beside the folders."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of the package, inside functions too."""
    for node in ast.walk(ast.parse(SOURCES[path])):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *inside = name.split(".")
            if package == PACKAGE.name and inside and inside[0] != "__version__":
                yield node.lineno, inside[0]


def test_rooms_import_downward_only() -> None:
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {room}"
        for path in SOURCES
        if (above := room_of(path)) in floor_of
        for line, room in imports(path)
        if room != above and floor_of[room] >= floor_of[above]
    ]
    assert not wrong, "\n".join(wrong)
    named = {room_of(path) for path in SOURCES} - {*floor_of}
    assert named == {"__init__", "__main__"}, "a room that has no floor"


def test_the_suite_finds_the_laboratory_by_name_only_in_two_places() -> None:
    """Commands and classes of the laboratory are found when a user names them."""
    naming = {str(p.relative_to(PACKAGE)) for p in SOURCES if "wagle_pl.lab" in SOURCES[p]}
    suite = {name for name in naming if not name.startswith("lab/")}
    in_strings = {
        "__init__.py",
        "cli/app.py",
        "cli/mask.py",
        "core/registry.py",
        "evaluation/attacks/__init__.py",
    }
    assert suite <= in_strings, suite - in_strings


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def test_sizes() -> None:
    rooms: Counter[str] = Counter()
    for path, lines in LINES.items():
        rooms[room_of(path)] += lines
    functions = {
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}": length(node)
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    files = {str(path.relative_to(PACKAGE)): lines for path, lines in LINES.items()}
    sizes = {
        "path": sum(rooms[room] for room in PATH),
        "suite": rooms.total() - rooms["lab"],
        "all": rooms.total(),
        "file": max(files.values()),
        "function": max(functions.values()),
    }
    print(*(f"{room:12} {lines:6,}" for room, lines in rooms.items()), sep="\n")
    for name, size in sizes.items():
        print(f"{name:12} {size:6,}  at most {LIMITS[name]:6,}, aim {AIMS[name]:6,}")
    for name, entries in (("file", files), ("function", functions)):
        large = {entry: size for entry, size in entries.items() if size > AIMS[name]}
        print(
            f"{name}s above the aim:", *(f"  {size:4} {e}" for e, size in large.items()), sep="\n"
        )
        assert len(large) <= LARGE[name], large
    assert all(size <= LIMITS[name] for name, size in sizes.items()), sizes
