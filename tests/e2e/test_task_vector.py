"""Task arithmetic on a tiny model, against a line of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import weights

from wagle_pl import WagleError
from wagle_pl.attribution import importance_from_scores
from wagle_pl.attribution.scoring import write_scores
from wagle_pl.cli import app as cli
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.saving import save_model
from wagle_pl.masks import WeightMask


@pytest.fixture
def finetuned(tiny_model: str, tmp_path: Path) -> str:
    lm = load_model(tiny_model)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return str(save_model(lm, load_tokenizer(tiny_model), tmp_path / "finetuned", "", {}))


@pytest.mark.parametrize("absolute", [True, False])
def test_a_share_of_each_weight_within_a_mask(
    tiny_model: str, finetuned: str, tmp_path: Path, absolute: bool
) -> None:
    """θ − λ w ⊙ (θ_ft − θ), w by the median of all sizes; frozen bits; the record and card."""
    before, after = weights(tiny_model), weights(finetuned)
    lm = load_model(tiny_model)
    names = [name for name, _ in lm.named_parameters()]
    scores = {name: torch.randn(before[name].shape) for name in names}
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    write_scores(tmp_path / "s.scores", iter(scores.items()), shapes, {"absolute": absolute})
    mask = WeightMask.from_bools({name: torch.rand(shapes[name]) < 0.3 for name in names})
    own = mask.save(tmp_path / "mask")
    given = ["--scores", f"{tmp_path}/s.scores", "--mask", str(own), "--strength", "0.7"]
    cli.main(["patch", "subtract", tiny_model, finetuned, "-o", f"{tmp_path}/out", *given])
    written = weights(tmp_path / "out")
    sizes = {name: s.abs() if absolute else s.relu() for name, s in scores.items()}
    whole = torch.cat([size.flatten() for size in sizes.values()]).sort(descending=True).values
    scale = whole[len(whole) // 2 - 1]
    for name, size in sizes.items():
        step = 0.7 * size / (size + scale) * (after[name] - before[name]) * mask[name]
        torch.testing.assert_close(written[name], before[name] - step)
        assert torch.equal(written[name][~mask[name]], before[name][~mask[name]])
    run = json.loads((tmp_path / "out/wagle.json").read_text())["lineage"][-1]
    assert run["importance"]["scale"] == pytest.approx(scale.item())
    assert "PerTA" in (tmp_path / "out/README.md").read_text()


def test_plain_task_arithmetic_from_another_origin(
    tiny_model: str, finetuned: str, tmp_path: Path
) -> None:
    options = ["--origin", finetuned, "-o", f"{tmp_path}/out"]
    cli.main(["patch", "subtract", finetuned, tiny_model, *options])
    ours, base, origin = (weights(m) for m in (tmp_path / "out", tiny_model, finetuned))
    for name, found in ours.items():
        torch.testing.assert_close(found, 2 * origin[name] - base[name])


def test_scores_of_a_ratio_are_relative_importance(tmp_path: Path) -> None:
    forget, retain = torch.rand(5, 7), torch.rand(5, 7)
    made = {"absolute": True}
    write_scores(tmp_path / "s", iter([("a", forget / retain)]), {"a": (5, 7)}, made)
    importance, _ = importance_from_scores(tmp_path / "s", scale=1.0)
    torch.testing.assert_close(importance("a"), forget / (forget + retain))
    with pytest.raises(WagleError, match="have no b: they are of another model"):
        importance("b")


def test_mistakes(fails: Any, tiny_model: str, finetuned: str) -> None:
    other = {"absolute": True, "model_fingerprint": "f" * 64}
    write_scores("s", iter([("a", torch.rand(3))]), {"a": (3,)}, other)
    for options, said in (
        ("--scores s", "the scores are of the model with fingerprint ffffffffffff"),
        ("--scale 2", "--scale: it needs --scores: give both, or neither"),
        ("--scores s --scale -1", "scale: must be above 0"),
        ("--strength 0", "strength: must be above 0"),
        ("--mask nowhere", "nowhere"),
    ):
        subtract = f"patch subtract {tiny_model} {finetuned} -o o {options}"
        assert said in fails(subtract, data=False)
