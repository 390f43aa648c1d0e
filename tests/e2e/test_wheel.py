"""What is installed, away from the checkout: the package, its data files and its configurations."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this checkout holds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("wagle_pl", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    made = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_wheel_carries_the_configurations(installed: Path) -> None:
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    there = {str(p.relative_to(installed / "wagle_pl")) for p in installed.rglob("*.yaml")}
    assert there == here and (installed / "wagle_pl/py.typed").is_file()
    assert not [*installed.rglob("results")]  # of studies


#: A ``sitecustomize.py``: any process finds what is installed, as if two libraries of the extra ``lab`` were not.
WITHOUT_THE_LABORATORY = """
import sys
from importlib.machinery import PathFinder

ABSENT = ("matplotlib", "pandas")

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, *where)

    @classmethod
    def find_distributions(cls, *context):
        return (found for found in super().find_distributions(*context) if found.name not in ABSENT)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
EACH = """
import sys
from wagle_pl.cli.app import main

for command in sys.argv[1:]:
    try:
        main([*command.split(), "a", "--output", "b.html"])
    except SystemExit as ended:
        assert ended.code == 2, command
"""


def python_alone(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with what is installed, but without the libraries of the extra ``lab``."""
    (installed / "sitecustomize.py").write_text(WITHOUT_THE_LABORATORY)
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_commands_of_the_laboratory_say_what_to_install(installed: Path, tmp_path: Path) -> None:
    """Each in one line, with exit status 2; one after another in one process."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.json").write_text('{"forget/probability": 0.5}')
    commands = ("report", "study", "plant", "mask plot")
    ran = python_alone(installed, tmp_path, "-c", EACH, *commands)
    assert ran.returncode == 0, ran.stderr
    for command, line in zip(commands, ran.stderr.splitlines(), strict=True):
        needs = f"wagle {command.split()[0]}: needs (pandas|matplotlib)"
        assert re.fullmatch(rf"wagle: error: {needs}; pip install 'wagle-pl\[lab\]'", line)


def test_the_package_alone_attributes_unlearns_and_tests(installed: Path, tmp_path: Path) -> None:
    """In an empty folder, on the bundled people, by configurations that it carries."""
    ran = python_alone(installed, tmp_path, "-m", "wagle_pl", "quickstart", "--trial")
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|")[1:-1] for line in ran.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["target", "retrained", "WAGLE NPO"]
    assert all(0 < float(row[1]) < 0.1 for row in rows[2:])  # hardly trained
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    made = tmp_path / "runs/people"
    assert (made / "masks/wagle.safetensors").is_file()
    assert (made / "wagle_npo/model.safetensors").is_file()


def test_data_files_are_carried(installed: Path) -> None:
    kept = {".jsonl", ".txt", ".css", ".j2"}
    files = [p.relative_to(ROOT) for p in (ROOT / "wagle_pl").rglob("*") if p.suffix in kept]
    assert files and all((installed / file).is_file() for file in files)
