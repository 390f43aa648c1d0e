"""``wagle plant``: what is planted, what stays, and what the folder holds."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import weights

from wagle_pl import WeightMask
from wagle_pl.cli import app as cli
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.evaluation.results import load_table
from wagle_pl.lm.models import load_model


@pytest.fixture
def plant(tiny_model, rows, tmp_path, monkeypatch):
    """Run ``wagle plant`` in an empty folder: plant(**changes)."""
    monkeypatch.chdir(tmp_path)

    def run(**changes):
        init = {name: rows[name] for name in ("forget", "retain")}
        content = {
            "model": tiny_model,
            "output": "out",
            "data": {"class_path": "ForgetRetainDataModule", "init_args": init},
            "plants": {"block": 1},
            "scores": ["gradient", {"score": "curvature", "hessian": "fisher"}],
            "seeds": [0],
            "recall": 0.005,
            "lr": 1e-2,
            "steps": 60,
            "points": 6,
            "trainer": {"accelerator": "cpu"},
            **changes,
        }
        Path("plants.yaml").write_text(yaml.safe_dump(content))
        cli.main(["plant", "--config", "plants.yaml"])

    return run


def test_from_start_to_finish(plant, tiny_model, capsys):
    plant()
    table = load_table(Path("out/plants.parquet"))
    assert {row["score"] for row in table} == {"gradient", "curvature fisher"}
    assert all(row["forget"] >= 0.005 and row["steps"] < 60 for row in table)
    mask, lm = WeightMask.load("out/block-1-0/plant"), load_model("out/block-1-0/model")
    mask.check(parameter_shapes(lm), fingerprint(lm))
    before, after = weights(tiny_model), weights("out/block-1-0/model")
    moved = {name for name in mask if not torch.equal(before[name], after[name])}
    assert moved == {name for name in mask if mask.count(name)}
    assert mask.density == table[0]["density"]
    assert "| gradient |" in Path("out/plants.md").read_text()
    assert "AUROC" in Path("out/plants.svg").read_text()
    kept = Path("out/plants.parquet").read_bytes()
    plant()
    assert "1 plant, 0 to do" in capsys.readouterr().out
    assert Path("out/plants.parquet").read_bytes() == kept
    with pytest.raises(SystemExit):
        plant(recall=0.006)
    assert "other settings (recall)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plants": {"mlp": 1}}, "--plants: must be of random, block, heads, spread, got 'mlp'"),
        ({"scores": ["dense"]}, "scores: dense is no score"),
        ({"scores": [{"score": "snip", "density": 0.1}]}, "the density of the plant"),
    ],
)
def test_mistakes(plant, changes, said, capsys):
    with pytest.raises(SystemExit):
        plant(**changes)
    assert said in capsys.readouterr().err
