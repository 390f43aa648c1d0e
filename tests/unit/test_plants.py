"""Planted knowledge: the weights of each kind, how well scores find them, and what was published."""

from pathlib import Path

import pytest
import torch
from scipy.stats import mannwhitneyu

from wagle_pl.attribution import MaskSpec, Score
from wagle_pl.attribution.scoring import Collected, complete
from wagle_pl.attribution.selection import Ranking
from wagle_pl.attribution.sums import GradientSums
from wagle_pl.core.errors import WagleError
from wagle_pl.core.text import markdown_table
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.evaluation.results import load_table
from wagle_pl.lab.study.places import plant_mask
from wagle_pl.lab.study.plants import (
    auroc,
    locate,
    markdown,
    overview,
    shown,
    summarise,
)
from wagle_pl.lab.study.report.curves import plants_overview
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask

CONFIGS = Path(__file__).parents[2] / "configs"
AMOUNTS = {"random": 0.02, "block": 1, "heads": 3, "spread": 0.05}


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load_model(tiny_model)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("low", [True, False])
def test_auroc_is_the_mann_whitney_statistic(absolute, low):
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.randint(-9, 9, (31, 7), generator=draw).float() for name in "ab"}
    masks = [
        WeightMask.from_bools({n: torch.rand(31, 7, generator=draw) < p for n in "ab"})
        for p in (0.1, 0.6)
    ]
    flat = torch.cat([s.view(-1) for s in scores.values()])
    flat = (flat.abs() if absolute else flat) * (-1 if low else 1)
    for mask, found in zip(
        masks, auroc(scores.items(), masks, Ranking(absolute, low)), strict=True
    ):
        inside = torch.cat([mask[name].view(-1) for name in "ab"])
        u = mannwhitneyu(flat[inside], flat[~inside]).statistic
        assert found == pytest.approx(u / (inside.sum() * (~inside).sum()).item())


class Knows(Score):
    """A score that is the truth."""

    needs = ()

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, w):
        return self.mask[w.name].float() + 0.5


@pytest.mark.parametrize("plant", AMOUNTS)
def test_the_truth_finds_every_plant_and_chance_does_not(lm, plant):
    shapes = parameter_shapes(lm)
    mask = plant_mask(plant, AMOUNTS[plant], shapes, lm.config, seed=0)
    collected = Collected(lm, GradientSums(lm.named_parameters()))
    truths = {"here": mask, "elsewhere": ~mask}
    default = MaskSpec(Knows(mask), 0.5, "high", "global", "weight", "mean")
    knows, random = complete([{}, {"score": "random"}], default)
    found, n = locate(collected, knows, truths), mask.count()
    others = pytest.approx(
        1 - n / (mask.total - n)
    )  # all of the plant are among as many as are left
    assert found == {"here": (1.0, 1.0), "elsewhere": (0.0, others)}
    area, precision = locate(collected, random, truths)["here"]
    assert area == pytest.approx(0.5, abs=4 * (1 / 12 / n + 1 / 12 / (mask.total - n)) ** 0.5)
    spread = (mask.density * (1 - mask.density) / n) ** 0.5
    assert precision == pytest.approx(mask.density, abs=4 * spread)


def test_a_unit_has_one_score(lm):
    """Weights that tell nothing alone find the neurons that they are half of."""
    shapes = parameter_shapes(lm)
    mask = plant_mask("spread", 0.05, shapes, lm.config, seed=0)
    half = {n: mask[n] & (torch.arange(mask[n].numel()).view(mask[n].shape) % 2 == 0) for n in mask}
    default = MaskSpec(Knows(half), 0.5, "high", "global", "weight", "mean", include="mlp")
    collected = Collected(lm, GradientSums(lm.named_parameters()))
    truths = {"here": mask}
    alone, together = (
        locate(collected, spec, truths)["here"]
        for spec in complete([{}, {"unit": "neuron"}], default)
    )
    assert alone[0] < 0.8 and together == (1.0, 1.0)


def test_the_weights_of_each_kind(lm):
    shapes, config = parameter_shapes(lm), lm.config
    masks = {plant: plant_mask(plant, n, shapes, config, 0) for plant, n in AMOUNTS.items()}
    assert masks["random"].count() == masks["random"].total // 50
    (block,) = {n.split(".")[2] for n in shapes if masks["block"].count(n)}
    assert (
        all(masks["block"][n].all() for n in shapes if f"layers.{block}.mlp" in n)
        and masks["block"].count() == 3 * 32 * 96
    )
    head = config.hidden_size // config.num_attention_heads
    assert masks["heads"].count() == 3 * head * config.hidden_size
    for name in shapes:
        by_head = masks["heads"][name].any(0) if "o_proj" in name else None
        assert by_head is None or (by_head.view(-1, head).sum(1) % head == 0).all()
    for layer in "01":
        up, gate, down = (
            masks["spread"][f"model.layers.{layer}.mlp.{n}_proj.weight"]
            for n in ("up", "gate", "down")
        )
        assert torch.equal(up, gate) and torch.equal(up, down.T) and up.any(1).sum() == 96 // 20
    assert plant_mask("heads", 3, shapes, config, 1) != masks["heads"]
    with pytest.raises(WagleError, match="has not 3 of that kind"):
        plant_mask("heads", 3, {"model.norm.weight": (32,)}, config, 0)


def test_the_summary_by_hand():
    def row(seed, score, now, before):
        shared = {"plant": "random", "seed": seed, "density": 0.02, "forget": 0.8, "retain": 0.9}
        numbers = {"auroc": now, "precision": 0.1, "auroc_before": before, "precision_before": 0.02}
        return {**shared, "score": score, **numbers}

    rows = [row(seed, "snip", 0.6 + seed / 10, 0.5) for seed in range(3)]
    rows += [row(seed, "gradient", 0.9, 0.5 + seed / 100) for seed in range(3)]
    best, worst = summarise(rows)
    assert (best["score"], worst["score"]) == ("gradient", "snip")
    assert worst["auroc"] == (pytest.approx(0.7), pytest.approx(0.1), 3)
    assert worst["enrichment"].mean == pytest.approx(5) and worst["enrichment_before"].mean == 1
    assert best["difference"] == pytest.approx(0.39) and best["p"] < 0.001
    assert overview([best, worst])[1] == [["gradient", "0.90 (5.0×)"], ["snip", "0.70 (5.0×)"]]
    said = markdown([best, worst])
    assert "3 seeds, 2.0% of the weights; after planting forget 0.800, retain 0.900." in said
    assert "| snip | 0.700 ± 0.100 | 0.500 | +0.200 | 0.074 | 0.100 | 5.00 | 1.00 |" in said


@pytest.mark.parametrize("page", ["people/README.md", "tofu/tables.md"])
def test_what_was_published_follows_from_the_rows(page):
    page = CONFIGS / page
    found = summarise(load_table(page.parent / "results/plants.parquet"))
    assert (page.parent / "results/plants.md").read_text() == markdown(found)
    assert markdown_table(*overview(found)) in page.read_text()


def test_the_table_of_heads_follows_from_the_rows():
    found = summarise(load_table(CONFIGS / "tofu/results/plants_heads.parquet"))
    assert markdown_table(*shown(found)) in (CONFIGS / "tofu/tables.md").read_text()


def test_the_figure_has_a_panel_a_plant_and_a_row_a_score():
    found = summarise(load_table(CONFIGS / "people/results/plants.parquet"))
    drawn = plants_overview(found, [row[0] for row in overview(found)[1]])
    assert [axes.get_title() for axes in drawn.axes] == list(
        dict.fromkeys(e["plant"] for e in found)
    )
    scores = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert scores == [row[0] for row in overview(found)[1]]
    for axes in drawn.axes:
        of = {e["score"]: e for e in found if e["plant"] == axes.get_title()}
        before = {scores[int(y)]: x for x, y in axes.collections[1].get_offsets()}
        assert before == {score: entry["auroc_before"].mean for score, entry in of.items()}
        dots = next(line for line in axes.lines if line.get_marker() == "o")
        after = {scores[int(y)]: x for x, y in dots.get_xydata()}
        assert after == {score: entry["auroc"].mean for score, entry in of.items()}
