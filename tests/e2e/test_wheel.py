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


WITHOUT_THE_LABORATORY = """
import sys
from importlib.machinery import PathFinder

ABSENT = ("matplotlib", "pandas")

class Finder(PathFinder):  # finds what is installed, as if these two were not
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, *where)

    @classmethod
    def find_distributions(cls, *context):
        return (found for found in super().find_distributions(*context) if found.name not in ABSENT)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
from wagle_pl.__main__ import main
main(sys.argv[1:])
"""


def wagle_alone(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command without the libraries of the extra ``lab``, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_LABORATORY, *arguments],
        cwd=folder,
        env={**environment(), "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("command", ["report", "study", "plant", "mask plot"])
def test_a_command_of_the_laboratory_says_what_to_install(
    installed: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/metrics.json").write_text('{"forget/probability": 0.5}')
    ran = wagle_alone(installed, tmp_path, *command.split(), "a", "--output", "b.html")
    name = command.split()[0]
    message = (
        rf"wagle: error: wagle {name}: needs (pandas|matplotlib); pip install 'wagle-pl\[lab\]'"
    )
    assert (ran.returncode, bool(re.fullmatch(message, ran.stderr.splitlines()[-1]))) == (
        2,
        True,
    ), ran


def test_the_package_alone_attributes_unlearns_and_tests(installed: Path, tmp_path: Path) -> None:
    """In an empty folder, on the bundled people, by configurations that it carries."""
    ran = wagle_alone(installed, tmp_path, "quickstart", "--trial")
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
