"""Studies: the mathematics of comparing at equal forgetting, the grid, and the summary of made-up runs."""

import re

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from scipy import integrate, interpolate, stats

from wagle_pl.core.errors import WagleError
from wagle_pl.lab.study.grid import Grid, middle_first, passes, read_masks, read_objectives
from wagle_pl.lab.study.recovery import HALF, at_the_level, tables
from wagle_pl.lab.study.runs import steps_of_tests
from wagle_pl.lab.study.summary import (
    Compared,
    Pace,
    Paired,
    Spread,
    at_equal_steps,
    envelope,
    mean_utility,
    paired,
    spread,
    summarise,
    utility_at,
    verdict,
)
from wagle_pl.lab.study.text import cells, markdown

approx = pytest.approx

START = {"forget/probability": 1.0, "retain/probability": 1.0}
BY = Compared("forget/probability", "retain/probability", START, level=0.2)

# -- curves ----------------------------------------------------------------------------------------


def test_utility_at_a_level_by_hand():
    """A prototype: dense at forget probability 0.59, on the way from (0.86, 0.973) to (0.44, 0.879)."""
    dense = [(-0.994, 0.994), (-0.86, 0.973), (-0.44, 0.879), (-0.23, 0.741)]
    expected = 0.973 + (0.86 - 0.59) / (0.86 - 0.44) * (0.879 - 0.973)
    assert utility_at(dense, -0.59) == approx(expected)
    assert utility_at(dense, -0.44) == 0.879 and utility_at(dense, -0.994) == 0.994
    assert utility_at(dense, -0.22) is None  # never extrapolated
    assert utility_at(dense, -2.0) == 0.994  # the target is past the level already


@pytest.mark.parametrize("seed", range(5))
def test_curves_against_numpy_and_scipy(seed):
    draw = np.random.default_rng(seed)
    x, u = np.concatenate([[0.0], draw.normal(0.4, 0.5, 12)]), draw.uniform(size=13)
    points = list(zip(x.tolist(), u.tolist(), strict=True))
    records = x >= np.maximum.accumulate(x)
    xs, us = x[records], u[records]
    assert envelope(points) == list(zip(xs.tolist(), us.tolist(), strict=True))
    for level in np.linspace(0, xs[-1], 7):
        assert utility_at(points, level) == approx(interpolate.interp1d(xs, us)(level))
    low, high = xs[-1] * 0.1, xs[-1] * 0.8
    knots = [low, *[knot for knot in xs if low < knot < high], high]
    area = integrate.trapezoid(np.interp(knots, xs, us), knots)
    assert mean_utility(points, low, high) == approx(area / (high - low))
    assert mean_utility(points, low, xs[-1] + 0.01) is None
    assert mean_utility(points, high, low) is None


@pytest.mark.parametrize("seed", range(50))
def test_two_arms_at_equal_steps_against_numpy(seed):
    rng = np.random.default_rng(seed)

    def draw(n):
        steps = rng.choice(99, n, replace=False).astype(float)
        return list(map(Pace, rng.permutation(n), steps, rng.random(n)))

    def faster(runs):
        """Runs that took fewer steps than all with slower learning rates, in the order of steps."""
        slower = [[other for other in runs if other.lr < run.lr] for run in runs]
        kept = zip(runs, slower, strict=True)
        kept = [run for run, others in kept if all(run.steps < other.steps for other in others)]
        return zip(*sorted(run[1:] for run in kept), strict=True)

    arm, dense = (draw(n) for n in rng.integers(1, 7, 2))
    found = at_equal_steps(arm, dense)
    (xs, us), (zs, vs) = faster(arm), faster(dense)
    last = min(max(xs), max(zs))
    if last < max(min(xs), min(zs)):
        assert found is None
    else:
        assert found == approx((last, np.interp(last, xs, us), np.interp(last, zs, vs)))
    assert at_equal_steps([], dense) is None and at_equal_steps(arm, []) is None


def test_equal_steps_are_read_along_the_learning_rates():
    """The bundled people, GradDiff, Wanda's fifth, seed 2: the fastest rate overshoots."""
    arm = [Pace(0.004, 53.1, 0.642), Pace(0.0056, 53.8, 0.462), Pace(0.0028, 67.4, 0.72)]
    dense = [Pace(0.001, 54.1, 0.8)]
    expected = 0.642 + (54.1 - 53.1) / (67.4 - 53.1) * (0.72 - 0.642)  # not between 0.462 and 0.72
    assert at_equal_steps(arm, dense) == approx((54.1, expected, 0.8))
    assert (
        at_equal_steps([Pace(1, 50.0, 0.7), Pace(2, 60.0, 0.3)], dense) is None
    )  # none takes 54.1


def test_a_run_that_remembers_again_is_read_along_its_envelope():
    points = [(0.0, 1.0), (0.5, 0.8), (0.2, 0.9), (1.0, 0.4)]
    assert utility_at(points, 0.75) == approx(0.6)  # between (0.5, 0.8) and (1, 0.4)
    assert mean_utility(points, 0, 1) == approx((0.5 * 0.9) + 0.5 * 0.6)


def test_the_paired_test_is_scipys():
    arm, dense = [0.91, 0.94, 0.90, 0.95], [0.88, 0.93, 0.91, 0.90]
    found = paired(arm, dense)
    assert found.p == approx(stats.ttest_1samp(np.subtract(arm, dense), 0).pvalue)
    assert found.difference == approx(np.mean(arm) - np.mean(dense)) and found.why == ""
    assert paired(arm[:2], dense[:2])[1:] == (None, "n too small", 2)
    assert paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])[1:] == (None, "no spread", 3)
    assert paired([], []) == (None, None, "no pairs", 0)
    assert spread(arm).std == approx(np.std(arm, ddof=1)) and spread([1.0]) == (1.0, None, 1)
    assert spread([]) == (None, None, 0)


@pytest.mark.parametrize(
    ("expected", "gain", "changes"),
    [
        ("wins", 0.031, {}),
        ("not resolved", 0.029, {}),
        ("not resolved", -0.029, {}),
        ("loses", -0.031, {}),
        ("wins", 0.031, {"p": 0.049}),
        ("not resolved", 0.031, {"p": 0.05}),
        ("wins", 0.031, {"p": None}),  # the same in every seed
        ("loses", 0.031, {"sign": -1}),
        ("wins", -0.031, {"sign": -1}),
        ("ahead, one seed", 0.1, {"arm": (0.9, None, 1), "runs": (1, 3)}),
        (
            "behind, 2 seeds",
            -0.1,
            {"arm": (0.9, 0.02, 2), "dense": (0.9, 0.02, 2), "runs": (2, 2)},
        ),
        ("never reaches it", None, {"arm": (None, None, 0)}),
        ("reaches it in 2 of 3 seeds", 0.1, {"arm": (0.9, 0.0, 2)}),
        ("dense does not always reach it", 0.1, {"dense": (0.9, 0.0, 2)}),
        ("dense never reaches it", None, {"dense": (None, None, 0)}),
    ],
)
def test_verdicts(expected, gain, changes):
    given = {"arm": (0.9, 0.02, 3), "dense": (0.9, 0.03, 3), "runs": (3, 3), "p": 0.01, "sign": 1}
    given |= changes
    arm, dense = Spread(*given["arm"]), Spread(*given["dense"])
    test = Paired(gain, given["p"], "", 0 if gain is None else min(arm.n, dense.n))
    assert verdict(test, given["sign"], arm, dense, *given["runs"]) == expected


def test_points_along_a_run():
    found = [steps_of_tests(*each) for each in ((126, 3), (3, 5), (7, 1))]
    assert found == [[42, 84, 126], [1, 2, 3], [7]]


# -- the grid --------------------------------------------------------------------------------------


def test_the_order_is_balanced():
    rates = [1e-5, 3e-5, 1e-4]
    grid = list(Grid.of(["NPO", "PO"], ["dense", "snip"], rates, [7, 8]).runs({}))
    assert len(grid) == len({run.id for run in grid}) == 2 * 2 * 3 * 2
    assert [run.seed for run in grid] == [7] * 12 + [8] * 12
    assert [run.lr for run in grid[:12]] == [3e-5] * 4 + [1e-5] * 4 + [1e-4] * 4
    arms = [(run.mask.name, run.objective.name) for run in grid]
    assert arms[:4] == [("dense", "NPO"), ("dense", "PO"), ("snip 0.2", "NPO"), ("snip 0.2", "PO")]
    assert arms == arms[:4] * 6
    assert middle_first([1, 2, 3, 4, 5]) == [3, 2, 4, 1, 5]


def test_a_run_is_known_by_what_defines_it():
    def ids(objective, mask, *more, settings="target"):
        grid = Grid.of([objective], [mask, *more], [1e-5], [0])
        return {run.id for run in grid.runs({"a": settings})}

    plain, snip = ids("NPO", "wagle"), ids("NPO", "snip")
    spelt = {"class_path": "wagle_pl.objectives.forget.NPO", "name": "mine"}
    assert ids(spelt, {"score": "wagle", "density": 0.2, "name": "x"}) == plain
    assert plain < ids("NPO", "wagle", "dense")  # a grown grid keeps its runs
    other = {"class_path": "NPO", "init_args": {"beta": 0.3}}
    others = [ids("NPO", "wagle", settings="other target"), ids(other, "wagle"), snip]
    others += [ids("NPO", {"score": "wagle", "gamma": 1e-6})]
    assert not any(plain & other for other in others)
    # what the score does not depend on
    assert ids("NPO", {"score": "snip", "hessian": "fisher"}) == snip


def test_masks_of_a_configuration():
    entries = ["dense", "lora", "random", {"score": "wagle", "density": [0.05, 0.8]}]
    entries += [{"score": "wagle", "hessian": "gauss_newton"}, {"score": "wagle", "gamma": 1e-6}]
    masks = read_masks([*entries, {"score": "wanda", "scope": "row"}])
    assert [mask.name for mask in masks] == [
        *("dense", "lora", "random 0.2", "wagle 0.05", "wagle 0.8", "wagle gauss_newton 0.2"),
        *("wagle gamma=1e-06 0.2", "wanda row 0.2"),
    ]
    assert [mask.density for mask in masks[:3]] == [1.0, None, 0.2]
    draws = [masks[2].of_seed(seed) for seed in (0, 1)]
    assert [draw.score.seed for draw in draws] == [0, 1]
    assert draws[0].definition != draws[1].definition
    grouped = passes([mask.of_seed(0) for mask in masks if mask.kind == "score"])
    assert len(grouped) == 3  # auto, gauss_newton, γ; the others go with one of them
    assert sum(len(group) for _, group in grouped) == 6


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("wagel", "mask: unknown name 'wagel'; choose one of dense, lora, Curvature"),
        ({"density": 0.2}, "names no mask"),
        ({"score": "dense", "density": 0.2}, "dense has no option 'density'"),
        (
            {"score": "magnitude", "hessian": "foo"},
            "masks: magnitude 0.2: hessian: unknown name 'foo'",
        ),
        (
            {"score": "snip", "learning_rates": [-1]},
            "learning_rates: must be different numbers abo",
        ),
        ({"file": "nowhere.safetensors"}, "file nowhere.safetensors does not exist"),
        ({"file": 5}, "file must be the path of a mask, got 5"),
        (
            {"adapter": {"class_path": "LoRA", "init_args": {"rank": 3}}},
            "adapter LoRA: LoRA has no option 'rank'; it has r, alpha",
        ),
    ],
)
def test_a_mistaken_mask(entry, said):
    with pytest.raises(WagleError) as error:
        read_masks(["dense", entry])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"densty": 0.2}, "unknown key 'densty'; there are score"),
        (
            {"density": [0.2, 1.5]},
            "masks: wagle 1.5: density: the share of weights to select must be in (0, 1]",
        ),
        ({"density": []}, "masks: density is an empty list"),
        ({"density": "most"}, "masks: wagle: density: must be"),
        ({"reduction": "foo"}, "masks: wagle: reduction: must be"),
        ({"hessian": "foo"}, "hessian: unknown name 'foo'; choose one of"),
        ({"hessian": "scalar"}, "masks: wagle 0.2: hessian: scalar needs a number"),
        ({"forget_loss": "foo"}, "masks: wagle: forget_loss: must be"),
        ({"hessian_data": "foo"}, "masks: wagle: hessian_data: must be"),
        ({"hessian_samples": 0}, "hessian_samples: must be above 0"),
        ({"gamma": "foo"}, "masks: wagle: gamma: must be"),
        ({"gamma": -1}, "gamma: must be above 0"),
        (
            {"gamma": 1, "hessian": "fisher"},
            "gamma: a number is for hessian scalar, not for fisher",
        ),
        ({"damping": "foo"}, "masks: wagle: damping: must be"),
        ({"scope": "foo"}, "masks: wagle: scope: must be"),
        ({"include": "["}, "include: '[' is no regular expression"),
    ],
)
def test_mistaken_options_of_a_mask(options, said):
    test_a_mistaken_mask({"score": "wagle", **options}, said)


def test_options_written_as_text_are_the_same_numbers():
    plain, text = (read_masks([{"score": "wagle", "gamma": g}])[0] for g in (1e-6, "1e-6"))
    assert plain.definition == text.definition and text.options["gamma"] == 1e-6


def test_empty_grids_and_twins():
    for read, what in ((read_masks, "masks"), (read_objectives, "objectives")):
        with pytest.raises(WagleError, match=f"{what} is an empty list"):
            read([])
    with pytest.raises(WagleError, match="are the same: leave one out"):
        read_masks(["wagle", {"score": "Wagle", "density": 0.2, "name": "other"}])
    with pytest.raises(WagleError, match="two objectives are called 'NPO'"):
        read_objectives(["NPO", {"class_path": "NPO", "init_args": {"beta": 1.0}}])


def test_a_step_rule_and_an_optimiser_are_part_of_an_objective():
    options = {"step_rule": {"class_path": "SAM", "init_args": {"rho": 0.1}}}
    signed = {"class_path": "NPO", "optimizer": "SignSGD", "learning_rates": [1e-6, "2e-6"]}
    entries = ["NPO", {"class_path": "NPO", **options}, signed]
    entries += [{**signed, "step_rule": "SAM", "name": "mine"}]
    grid = Grid.of(entries, ["dense", {"adapter": "LoRA", "learning_rates": [0.1]}], [1e-3], [0])
    plain, sam, sign, both = grid.objectives
    assert [o.name for o in grid.objectives] == ["NPO", "NPO+SAM", "NPO+SignSGD", "mine"]
    assert len({objective.id for objective in grid.objectives}) == 4
    assert plain.rule() is None and plain.optimizer_maker is None and sam.rule().rho == 0.1
    made = both.optimizer_maker([torch.zeros(1)], lr=1.0)
    assert type(made).__name__ == "SignSGD" and set(plain.definition) == {"class", "options"}
    rates = {(run.objective.name, run.mask.kind, run.lr) for run in grid.runs({})}
    assert len(rates) == 2 * 2 + 2 * 2 * 2
    assert {lr for name, kind, lr in rates if name in ("mine", sign.name)} == {1e-6, 2e-6}
    assert ("NPO", "adapter", 0.1) in rates and ("NPO+SAM", "dense", 1e-3) in rates
    named = Namespace(class_path="SignSGD", init_args=Namespace(momentum=0.5))  # of a file
    (found,) = read_objectives([{"class_path": "NPO", "optimizer": named}])
    assert found.optimizer_maker.keywords == {"momentum": 0.5}
    for wrong, said in (
        (
            {"step_rule": "MUDMAN", "class_path": "GradAscent"},
            "step_rule: MUDMAN needs retain rows",
        ),
        ({"optimizer": "NoSuch"}, "optimizer"),
        ({"learning_rates": [0]}, "learning_rates: must be different numbers above 0"),
        ({"beta": 1}, "unknown key 'beta'; options of the class go under init_args"),
        ({"init_args": {"beta": [0.1, "x"]}}, "beta"),
    ):
        with pytest.raises(WagleError, match=said):
            read_objectives([{"class_path": "NPO", **wrong}])


# -- the summary -----------------------------------------------------------------------------------


def made_up(mask, score, density, rates_of_seed, seeds=range(3)):
    """Rows of runs with tests: rates_of_seed(seed) is lr -> ((forget, utility), ...)."""
    labels = {"objective": "NPO", "mask": mask, "score": score, "density": density, "note": None}
    return [
        {
            **labels,
            **{"lr": lr, "seed": seed, "run": f"{mask} {lr} {seed}", "step": step},
            **{"forget": forget, "utility": utility, "ue_average": seed / 10.0},
        }
        for seed in seeds
        for lr, tests in rates_of_seed(seed).items()
        for step, (forget, utility) in enumerate(tests)
    ]


def dense_rows(rates_of_seed, **options):
    return made_up("dense", None, 1.0, rates_of_seed, **options)


def by_mask(rows, by=BY):
    return {arm["mask"]: arm for arm in summarise(rows, by)}


def test_utility_at_equal_forgetting_by_hand():
    found = by_mask(
        dense_rows(lambda s: {1: ((0.6, 0.9), (0.1, 0.5 + s / 100)), 2: ((0.5, 0.7), (0.0, 0.1))})
        + made_up(
            *("good", "wagle", 0.2),
            lambda s: {1: ((0.6, 0.95), (0.5, 0.94)), 2: ((0.6, 0.9), (0.1, 0.8 - s / 50))},
        )
        + made_up(
            *("slow", "random", 0.2),
            lambda s: {1: ((0.9, 0.99), (0.8, 0.98)), 2: ((0.8, 0.97), (0.7, 0.96))},
        )
    )
    dense, good, slow = (found[name] for name in ("dense", "good", "slow"))
    # four fifths of the way from 0.6 to 0.1
    at = [0.9 + 0.8 * (0.5 + s / 100 - 0.9) for s in range(3)]
    assert list(dense["values"].values()) == approx(at)
    assert dense["learning_rates"] == {"0": 1, "1": 1, "2": 1} and dense["verdict"] == ""
    assert dense["area"]["difference"] is None and dense["area"]["p"] is None  # from itself
    ours = [0.9 + 0.8 * (0.8 - s / 50 - 0.9) for s in range(3)]
    assert good["mean"] == approx(np.mean(ours)) and good["std"] == approx(np.std(ours, ddof=1))
    assert good["learning_rates"] == {"0": 2, "1": 2, "2": 2} and good["reached"] == 0.5
    assert good["p"] == approx(stats.ttest_rel(ours, at).pvalue) and good["verdict"] == "wins"
    assert good["difference"] == approx(np.mean(ours) - np.mean(at))
    assert good["ue_average"] == approx(0.1)
    curve = np.array(good["curve"])  # from 1 down to 0.1, through 0.6
    end = [0.1, np.mean([0.8 - s / 50 for s in range(3)])]
    assert curve[0] == approx([1, 1]) and curve[-1] == approx(end)
    expected = np.interp(curve[:, 0], [0.1, 0.6, 1], [end[1], 0.9, 1])
    np.testing.assert_allclose(curve[:, 1], expected)
    assert slow["mean"] is None and slow["reached"] == slow["n"] == 0
    assert slow["verdict"] == "never reaches it"
    assert slow["learning_rates"] == {"0": 2, "1": 2, "2": 2}  # the one that comes nearest
    over = slow["area"]  # down to 0.7, where slow ends: dense is at 1 − 0.25 · 0.3 there
    assert over["to"] == approx(0.7) and over["dense"] == approx(1 - 0.25 * 0.3 / 2)
    assert over["mean"] == approx((0.2 * (1 + 0.97) / 2 + 0.1 * (0.97 + 0.96) / 2) / 0.3)


def test_equal_steps_by_hand():
    """Faster runs lose more: at equal steps the arm is level with dense, though its best is ahead."""
    slow = ((0.6, 0.9), (0.2, 0.8))  # at the level after a step; the others from the start
    found = by_mask(
        dense_rows(lambda s: {1: ((0.2, 0.4), (0.1, 0.3))})
        + made_up(
            "other", "random", 0.2, lambda s: {1: ((0.2, 0.4 + s / 100), (0.1, 0.3)), 2: slow}
        )
    )
    dense, other = found["dense"], found["other"]
    assert other["difference"] == approx(0.4) and dense["equal_steps"] is None
    assert (dense["steps"], other["steps"]) == (0, 1)
    equal = other["equal_steps"]
    assert (equal["n"], equal["steps"]) == (3, 0) and equal["difference"] == approx(0.01)
    assert equal["p"] == approx(stats.ttest_rel([0.4, 0.41, 0.42], [0.4] * 3).pvalue)
    row = cells(other)
    assert row["equal steps"] == f"+0.010 (p {equal['p']:.3f})" and row["steps"] == "1"


def test_a_bar_in_a_name_does_not_end_a_cell():
    rows = dense_rows(lambda s: {1: ((0.6, 0.9), (0.1, 0.5))}, seeds=[0])
    name = "wagle include=q|k 0.2"
    rows += made_up(name, "wagle", 0.2, lambda s: {1: ((0.6, 0.9), (0.1, 0.6))}, seeds=[0])
    summary = {"forget": BY.forget, "utility": BY.utility, "forget_level": BY.level}
    summary |= {"target": BY.target, "retrained": {}, "runs": {"finished": 2, "planned": 2}}
    text = markdown({"headline": summarise(rows, BY), **summary}).split("## NPO")[1]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "include=q\\|k" in text


def test_a_measure_that_rises_and_a_utility_that_falls():
    """The same curves with both measures mirrored give the same comparison."""
    rows = dense_rows(lambda s: {1: ((0.6, 0.9), (0.1, 0.5 + s / 100))})
    rows += made_up("good", "wagle", 0.2, lambda s: {1: ((0.6, 0.9), (0.1, 0.8 - s / 50))})
    mirrored = [{**row, "forget": 1 - row["forget"], "utility": 5 - row["utility"]} for row in rows]
    target = {"forget/probability": 0.0, "retain/probability": 4.0}
    by = BY._replace(target=target, level=0.8, forget_sign=1, utility_sign=-1)
    plain, other = by_mask(rows)["good"], by_mask(mirrored, by)["good"]
    assert other["mean"] == approx(5 - plain["mean"]) and other["p"] == approx(plain["p"])
    assert plain["verdict"] == other["verdict"] == "wins"
    assert not BY.nothing_to_unlearn and by._replace(level=-0.1).nothing_to_unlearn


def test_a_run_that_diverged_counts_with_its_tests_before():
    rows = dense_rows(lambda s: {1: ((0.6, 0.9), (0.1, 0.5))[: 2 - s]}, seeds=[0, 1])
    last = {**rows[-1], "step": 9, "forget": None, "utility": None, "note": "diverged at step 9"}
    lost = {**last, "run": "lost", "seed": 2}  # before its first test
    (arm,) = summarise([*rows, last, lost], BY)
    assert (arm["n"], arm["seeds"], arm["runs"], arm["diverged"]) == (1, 3, 3, 2)


# -- at the ends of runs ---------------------------------------------------------------------------


def test_what_is_kept_and_comes_back_by_hand():
    """Of the chosen runs alone: the slow dense runs keep less, and those of "fast" never get there."""
    under = "robustness/relearn_forget_5/forget/probability"
    steps = {f"{under}_step_{k}": k for k in (0, 10, 20)}

    def ends(rows, after, curve):
        """The same with measures at the ends of runs at the level: after(seed), curve(seed)."""
        for row in rows:
            if row["forget"] <= BY.level:
                seed = row["seed"]
                row |= {"forget/probability": row["forget"], "retain/probability": row["utility"]}
                row |= {"facts/probability": 0.5, under: after(seed)}
                row |= dict(zip(steps, curve(seed), strict=True))
        return rows

    rates = {1: ((0.6, 0.9), (0.1, 0.5)), 2: ((0.5, 0.8), (0.2, 0.4))}
    rows = ends(dense_rows(lambda s: rates), lambda s: 0.6 + s / 100, lambda s: (0.1, 0.3, 0.7))
    slow = {1: ((0.6, 0.9), (0.1, 0.6))}
    rows += ends(made_up("good", "wagle", 0.2, lambda s: slow), lambda s: 0.3 + s / 100, curve_of)
    rows += made_up("never", "random", 0.2, lambda s: {1: ((0.6, 0.9), (0.5, 0.6))})
    target = {**START, under: 0.9, f"{under}_step_0": 0.9}
    found = at_the_level(rows, BY._replace(target=target), {under: 0.2})
    of = {(entry["mask"], entry["measure"], entry["what"]): entry for entry in found}
    good, dense = (of[m, "forget/probability", "relearn_forget_5"] for m in ("good", "dense"))
    assert (
        good["mean"] == approx(0.31) and good["std"] == approx(0.01) and good["verdict"] == "wins"
    )
    assert dense["mean"] == approx(0.61) and dense["values"]["2"] == approx(0.62)
    assert (good["target"], good["retrained"]) == (0.9, 0.2)
    assert good["difference"] == approx(-0.3) and good["why"] == "no spread"
    assert of["never", "forget/probability", "relearn_forget_5"]["seeds"] == 0
    half = {mask: of[mask, HALF, "relearn_forget_5"] for mask in ("good", "dense")}
    assert half["dense"]["mean"] == approx(15)  # half of the way from 0.1 to 0.9: 0.3 + 0.5 · 0.4
    assert half["good"]["n"] == 1 and half["good"]["seeds"] == 3
    assert half["good"]["mean"] == approx(20 * 0.4 / 0.5)
    assert half["dense"]["curve"] == [(0, approx(0.1)), (10, approx(0.3)), (20, approx(0.7))]
    kept = of["good", "probability kept", "retain"]
    assert kept["mean"] == approx(0.6) and of["good", "probability kept", "facts"]["mean"] == 0.5
    shown = {title: (header, rows) for title, header, rows in tables(found)}
    header, lines = shown["NPO, forget/probability"]
    assert header == ["mask", "no attack", "relearn_forget_5"]
    assert lines[1] == ["good", "0.100 ± 0.000", "0.310 ± 0.010 ▲"]
    assert lines[2:] == [["retrained", "–", "0.200"], ["target", "1.000", "0.900"]]
    assert ["good", "16.0 (1/3)"] in shown[f"NPO, {HALF}"][1]
    assert at_the_level(dense_rows(lambda s: rates), BY, {}) == []


def curve_of(seed):
    """Half of the way back with one seed only, between steps 0 and 20."""
    return (0.1, 0.35, 0.6) if seed == 0 else (0.1, 0.2, 0.3)
