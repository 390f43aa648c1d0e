"""What is installed, away from the checkout: the package, its data files and its configurations."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this checkout holds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__", "results")
    for name in ("wagle_pl", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    made = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    target = tmp_path_factory.mktemp("installed")
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_wheel_carries_the_configurations(installed: Path, tmp_path: Path) -> None:
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    there = {str(p.relative_to(installed / "wagle_pl")) for p in installed.rglob("*.yaml")}
    assert there == here and (installed / "wagle_pl/py.typed").is_file()
    layers = ("people/unlearn", "method/graddiff", "strategy/zero1", "strategy/cpu")
    command = ["fit", *(part for name in layers for part in ("--config", name)), "--print_config"]
    ran = subprocess.run(
        [sys.executable, "-m", "wagle_pl", *command],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    printed = yaml.safe_load(ran.stdout)
    assert printed["model"]["init_args"]["objective"]["class_path"].endswith("GradDiff")
    assert printed["trainer"]["strategy"]["init_args"]["stage"] == 1


def test_data_files_are_carried(installed: Path) -> None:
    kept = {".jsonl", ".txt", ".css", ".j2"}
    files = [p.relative_to(ROOT) for p in (ROOT / "wagle_pl").rglob("*") if p.suffix in kept]
    assert files and all((installed / file).is_file() for file in files)
