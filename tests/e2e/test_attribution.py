"""The attribution pass through the command line: what it collects, what it writes, that it resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import SaveAt, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from wagle_pl import WeightMask
from wagle_pl.attribution import AttributionModule, Gradient, Score, mask_from_scores
from wagle_pl.attribution.collect import Draws, Job, collect
from wagle_pl.attribution.hessian import GaussNewton, bartlett_loss, sample_labels
from wagle_pl.attribution.scoring import Collected
from wagle_pl.attribution.stored import StoredScores
from wagle_pl.attribution.sums import GradientSums
from wagle_pl.cli import app as cli
from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.lm import models
from wagle_pl.lm.inference import forward_answers

Attribute = Callable[..., AttributionModule]


def fit(model: str) -> list[str]:
    return ["fit", "--model", "AttributionModule", "--model.model", model]


def given(options: dict[str, Any]) -> list[str]:
    """Options as the command line has them, those without a dot of the module."""
    arguments = []
    for name, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        arguments += [f"--{name}" if "." in name else f"--model.{name}", text]
    return arguments


@pytest.fixture
def attribute(wagle: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> Attribute:
    """Run ``wagle fit`` with AttributionModule and options of it; the module keeps its sums in ``kept``."""
    torch.set_num_threads(1)

    def run(
        *args: Any, output: str = "mask", checkpoint: bool = False, **options: Any
    ) -> AttributionModule:
        options = {"output": output, "trainer.max_epochs": 1, **options}
        options["trainer.enable_checkpointing"] = checkpoint
        module = wagle(*fit(tiny_model), *given(options), *args).model
        module.kept = module.sums
        return module

    return run


def rows_of(module: AttributionModule, stream: str) -> list[dict[str, Tensor]]:
    """Every row of a stream that the pass saw, alone and without padding, in row order."""
    seen: dict[int, dict[str, Tensor]] = {}
    for batch in module.trainer.datamodule.train_dataloader():
        tensors = batch[stream]
        for i, row in enumerate(tensors["row"].tolist()):
            if tensors["weight"][i] > 0:
                width = int(tensors["attention_mask"][i].sum())
                seen[row] = {k: v[i : i + 1, :width] for k, v in tensors.items() if v.dim() > 1}
    return [seen[row] for row in sorted(seen)]


def nll(lm: Any, row: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood per answer token of one row, by the model's own loss."""
    return lm(
        input_ids=row["input_ids"], attention_mask=row["attention_mask"], labels=row["labels"]
    ).loss


def gradients(lm: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(lm.parameters())))


def plain_gradients(module: AttributionModule, stream: str) -> list[list[Tensor]]:
    """Of each row, by autograd of the plain formula."""
    return [gradients(module.lm, nll(module.lm, row)) for row in rows_of(module, stream)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-12)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def add(lists: list[list[Tensor]], power: int = 1) -> list[Tensor]:
    return [sum(g**power for g in position) for position in zip(*lists, strict=True)]


# -- what is collected -------------------------------------------------------------------------------------------------


def test_gradients_equal_autograd_of_the_formula(attribute: Attribute, tiny_model: str):
    module = attribute(gamma=2.0, density=0.25, **{"data.batch_size": 4})
    forget, retain = (plain_gradients(module, stream) for stream in ("forget", "retain"))
    assert len(forget) == len(retain) == 11
    sums = module.kept.sums
    assert_close(sums["g_f"], add(forget))
    assert_close(sums["g_r"], add(retain))
    assert set(sums) == {"g_f", "g_r"}  # nothing that is not needed

    mask = WeightMask.load("mask")
    of_each = zip(module.lm.parameters(), sums["g_f"], sums["g_r"], strict=True)
    score = flat((theta - g_r / 11 / 2.0) * g_f / 11 for theta, g_f, g_r in of_each).abs()
    taken = flat(mask[name] for name in mask)
    assert taken.sum() == int(0.25 * mask.total)
    assert score[taken].min() >= score[~taken].max() * (1 - 1e-5)


def test_attribution_moves_nothing(attribute: Attribute, tiny_model: str):
    before = models.load_model(tiny_model).state_dict()
    for number, options in enumerate(({}, {"hessian": "hutchinson"}, {"score": "wanda"})):
        module = attribute(output=f"mask{number}", **options)
        after = module.lm.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert all(parameter.grad is None for parameter in module.lm.parameters())


def test_a_weight_that_moved_is_noticed(attribute: Attribute, monkeypatch: pytest.MonkeyPatch):
    def moving(self: GradientSums, *args: Any) -> None:
        self.parameters[0].data[0, 0] += 1

    monkeypatch.setattr(GradientSums, "count", moving)
    with pytest.raises(WagleError, match="moved a weight"):
        attribute()
    assert not Path("mask.safetensors").exists()


def test_a_pass_without_a_trainer(tiny_model: str):
    """The sums of a plain model and plain batches are autograd's, and give scores and masks."""
    lm = models.load_model(tiny_model).train()
    rows = torch.randint(2, 400, (6, 9), generator=torch.Generator().manual_seed(0))
    batches = [{"forget": {"input_ids": ids, "labels": ids}} for ids in rows.split(2)]
    sums = collect(lm, batches, [Job("forget", total="g_f")])
    assert lm.training and sums.counts == {"forget_rows": 6}
    lm.eval()
    loss = sum(lm(input_ids=row[None], labels=row[None]).loss for row in rows)
    truth = torch.autograd.grad(loss, list(lm.parameters()))
    for found, expected in zip(sums.sums["g_f"], truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    collected = Collected(lm, sums)
    for (_, scores), expected in zip(collected.scores(Gradient()), truth, strict=True):
        torch.testing.assert_close(scores, expected.abs() / 6, rtol=1e-3, atol=1e-6)
    mask = collected.mask("gradient", density=0.1)
    assert mask.count() == sum(p.numel() for p in lm.parameters()) // 10


@pytest.mark.parametrize("batch_size", [1, 4])
def test_sum_is_the_sum_of_single_gradients(attribute: Attribute, batch_size: int):
    """As in the paper's code, which goes row by row and never divides."""
    module = attribute(gamma=1.0, reduction="sum", score="snip", **{"data.batch_size": batch_size})
    total = add(plain_gradients(module, "forget"))
    for i, (name, parameter) in enumerate(module.lm.named_parameters()):
        scores = dict(module.collected.scores(module.specs[0].score, {name}))
        torch.testing.assert_close(scores[name], parameter * total[i], rtol=1e-3, atol=1e-7)


def test_bf16_weights_are_summed_in_fp32(attribute: Attribute):
    module = attribute(gamma=1.0, **{"trainer.precision": "bf16-true", "data.batch_size": 1})
    assert next(module.lm.parameters()).dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for tensors in module.kept.sums.values() for t in tensors)
    module.lm.float()
    exact = add(plain_gradients(module, "forget"))
    for found, truth in zip(module.kept.sums["g_f"], exact, strict=True):
        assert float((found - truth).norm()) < 0.05 * float(truth.norm()) + 1e-6


# -- scores and what they need -----------------------------------------------------------------------------------------

#: Sums, and backward passes over three batches of eleven rows.
NEEDS = {
    "snip": ({"g_f"}, 3),
    "gradient": ({"g_f"}, 3),
    "forget_retain_ratio": ({"g_f", "g_r"}, 6),
    "fisher_ratio": ({"fisher_f", "fisher_r"}, 22),
    "curvature": ({"g_f", "h"}, 6),
    "signed": ({"g_f", "g_r"}, 9),
    "magnitude": (set(), 0),
    "random": (set(), 0),
    "wanda": (set(), 0),
}


@pytest.mark.parametrize("score", NEEDS)
def test_a_pass_collects_only_what_the_score_needs(
    attribute: Attribute, monkeypatch: pytest.MonkeyPatch, score: str
):
    needed, passes = NEEDS[score]
    backward_passes, backward = [], Tensor.backward
    monkeypatch.setattr(
        Tensor, "backward", lambda *a, **k: (backward_passes.append(1), backward(*a, **k))[1]
    )
    module = attribute(score=score, density=0.3, **{"data.batch_size": 4})
    assert set(module.kept.sums) == needed
    steps = module.trainer.global_step
    # Lightning makes one more a step, of the number that training_step returns
    assert (steps, len(backward_passes) - steps) == (3, passes)
    assert module.streams == (("forget", "retain") if passes > 3 else ("forget",))
    mask = WeightMask.load("mask")
    assert mask.count() == int(0.3 * mask.total)
    assert mask.metadata["score"].lower() == score.replace("_", "")


def test_no_retain_rows_are_needed_without_a_retain_gradient(
    attribute: Attribute, rows: dict[str, str]
):
    attribute("--data.retain", "null", score="gradient")
    assert Path("mask.safetensors").exists()


def test_fisher_sums_are_of_single_rows(attribute: Attribute):
    """Whatever the batch size; and beside the plain sums, in the same pass."""
    masks = [{"score": "fisher_ratio"}, {"score": "wagle"}]
    module = attribute(masks=masks, hessian="fisher", **{"data.batch_size": 8})
    forget, retain = (plain_gradients(module, stream) for stream in ("forget", "retain"))
    sums = module.kept.sums
    assert set(sums) == {"g_f", "g_r", "fisher_f", "fisher_r"}  # the Hessian is F_r: collected once
    assert_close(sums["fisher_f"], add(forget, 2))
    assert_close(sums["fisher_r"], add(retain, 2))
    assert_close(sums["g_f"], add(forget))
    assert_close(sums["g_r"], add(retain))
    mean = flat(sums["fisher_r"]).mean() / 11
    found = module.collected.hessian.damped(0)
    torch.testing.assert_close(found, sums["fisher_r"][0] / 11 + 0.1 * mean)


def test_wanda_norms_are_of_real_tokens(attribute: Attribute):
    module = attribute(score="wanda", scope="row", density=0.25, **{"data.batch_size": 4})
    seen: dict[str, list[Tensor]] = {}
    for name, layer in module.lm.named_modules():
        if isinstance(layer, torch.nn.Linear):
            inputs = seen.setdefault("model.embed_tokens" if name == "lm_head" else name, [])
            layer.register_forward_pre_hook(lambda _, x, to=inputs: to.append(x[0][0].detach()))
    for row in rows_of(module, "forget"):
        module.lm(input_ids=row["input_ids"])
    found = module.kept.vectors["activation"]
    assert found.keys() == {f"{name}.weight" for name in seen}  # the head's is tied
    for name, parts in seen.items():
        expected = torch.cat(parts).square().sum(0)
        torch.testing.assert_close(found[f"{name}.weight"].float(), expected, rtol=1e-4, atol=0)
    up = WeightMask.load("mask")["model.layers.0.mlp.up_proj.weight"]
    assert set(up.sum(1).tolist()) == {8}  # a quarter of 32 in each row


@pytest.mark.parametrize("forget_loss", ["npo", "po"])
def test_other_forget_losses(attribute: Attribute, forget_loss: str):
    module = attribute(forget_loss=forget_loss, score="gradient", **{"data.batch_size": 3})
    if forget_loss == "po":
        expected = [[-g for g in row] for row in plain_gradients(module, "refusal")]
        assert_close(module.kept.sums["g_f"], add(expected))
        return
    expected = []  # at θ₀ the gradient of NPO is that of the answer's log-probability
    for row in rows_of(module, "forget"):
        length = int((row["labels"] != -100).sum())
        expected.append([g * length for g in gradients(module.lm, nll(module.lm, row))])
    assert_close(module.kept.sums["g_f"], add(expected))


class Product(Score):
    """A score of a user's own."""

    needs = ("g_f", "g_r")

    def __call__(self, w):
        return w.g_f * w.g_r


class InPlace(Score):
    """Writes over what it is given."""

    def __call__(self, w):
        return w.theta.mul_(w.g_f)


class WrongShape(Score):
    needs = ()

    def __call__(self, w):
        return w.theta.sum(-1)


def test_a_score_of_ones_own(attribute: Attribute):
    module = attribute(score=f"{__name__}.Product")
    assert set(module.kept.sums) == {"g_f", "g_r"}
    assert WeightMask.load("mask").metadata["score"] == "Product"


class OfMatrices(Score):
    """Right of matrices, wrong of vectors."""

    needs = ("g_f", "g_r", "h", "h_diagonal", "fisher_f", "fisher_r", "activation")

    def __call__(self, w):
        seen = [w.g_f, w.g_r, w.h, w.h_diagonal, w.fisher_f, w.fisher_r]
        seen += [] if w.activation is None else [w.activation]
        values = w.theta + w.h_mean + sum(seen)
        return values if w.theta.ndim > 1 else values[:1]


class Integers(Score):
    def __call__(self, w):
        return (w.g_f * 1e6).long()


class Text(Score):
    def __call__(self, w):
        return "high"


class Chance(Score):
    def __call__(self, w):
        return torch.rand_like(w.g_f)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            "WrongShape",
            r"k_proj\.weight torch\.float32 of shape \(16,\), .* of its shape \(16, 32\)",
        ),
        ("OfMatrices", r"norm\.weight torch\.float32 of shape \(1,\), .* of its shape \(32,\)"),
        ("Integers", r"k_proj\.weight torch\.int64 of shape .* not floating-point numbers"),
        ("Text", r"k_proj\.weight a str, not floating-point numbers"),
        ("Chance", r"k_proj\.weight different values when called again"),
    ],
)
def test_a_score_is_tried_before_the_pass(
    attribute: Attribute, monkeypatch: pytest.MonkeyPatch, score: str, message: str
):
    monkeypatch.setattr(
        AttributionModule, "training_step", lambda *_: pytest.fail("the pass has begun")
    )
    with pytest.raises(WagleError, match=f"score {score} gave .*{message}"):
        attribute(score=f"{__name__}.{score}", hessian="gauss_newton")


def test_a_score_may_work_in_place(attribute: Attribute, tiny_model: str):
    attribute(score=f"{__name__}.InPlace", output="in_place")
    attribute(score="snip", output="snip")
    found = WeightMask.load("in_place")
    assert found == WeightMask.load("snip") and found.count() == int(0.2 * found.total)


# -- the Hessian in the pass -------------------------------------------------------------------------------------------


def test_auto_is_the_mean_of_the_gauss_newton_diagonal(attribute: Attribute):
    """Against draws made again, outside the pass, for the same batches."""
    module = attribute(**{"data.batch_size": 4})
    diagonal = attribute(hessian="gauss_newton", output="diagonal", **{"data.batch_size": 4})
    gamma = WeightMask.load("mask").metadata["gamma"]
    total = sum(float(tensor.double().sum()) for tensor in diagonal.kept.sums["h"])
    assert gamma == pytest.approx(total / 11 / models_size(module), rel=1e-5)
    assert gamma == pytest.approx(WeightMask.load("diagonal").metadata["gamma"], rel=1e-5)
    assert set(module.kept.sums) == {"g_f", "g_r"}  # a running number only

    again = 0.0
    for batch in module.trainer.datamodule.train_dataloader():
        retain = batch["retain"]
        inputs = {name: retain[name] for name in ("input_ids", "attention_mask")}
        labels = retain["labels"].masked_fill(retain["weight"][:, None] == 0, -100)
        seeds = [stable_seed(Draws(0, 0, 0, 1).of_row(row, 0), 0) for row in retain["row"].tolist()]
        predicted = forward_answers(module.lm, {**inputs, "labels": labels})
        lengths = (labels[:, 1:] != -100).sum(-1).tolist()
        loss = bartlett_loss(predicted, sample_labels(predicted, lengths, seeds), labels)
        again += sum(float(g.double().square().sum()) for g in gradients(module.lm, loss))
    assert gamma == pytest.approx(again / 11 / models_size(module), rel=1e-3)


def test_copies_of_a_row_do_not_swell_the_hessian(
    attribute: Attribute, rows: dict[str, str], tmp_path: Path
):
    """Eleven forget rows and two retain rows: a batch of eight holds four copies of each, which draw labels apart."""
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(Path(rows["retain"]).read_text().splitlines()[:2]))
    gammas = []
    for size in (1, 8):
        options = {"data.retain": str(few), "data.batch_size": size}
        attribute(output=f"m{size}", hessian_samples=32, **options)
        gammas.append(WeightMask.load(f"m{size}").metadata["gamma"])
    assert gammas[1] == pytest.approx(gammas[0], rel=0.25)


@pytest.mark.parametrize("limit", [1, 6])
def test_an_unfinished_step_counts(attribute: Attribute, limit: int):
    """A pass cut off within a step: the Hessian takes in what there was of it."""
    settings = {"data.batch_size": 1, "trainer.limit_train_batches": limit}
    cut = attribute(hessian="gauss_newton", **settings, **{"trainer.accumulate_grad_batches": 4})
    assert (
        limit - 1 <= cut.kept.counts["retain_rows"] <= limit
    )  # a smaller step deals an empty micro-batch
    assert not any(tensor.any() for tensors in cut.kept.step_sums.values() for tensor in tensors)
    assert WeightMask.load("mask").metadata["gamma"] > 0


def models_size(module: AttributionModule) -> int:
    return sum(parameter.numel() for parameter in module.lm.parameters())


def test_curvature_and_wagle_share_a_pass(attribute: Attribute):
    """With ``auto`` one takes the diagonal and the other its mean."""
    module = attribute(masks=[{"score": "curvature"}, {"score": "wagle"}])
    assert set(module.kept.sums) == {"g_f", "g_r", "h"}
    curvature = module.collected.hessian
    both = Score()
    both.needs = ("h", "h_diagonal")
    statistics = module.collected.statistics(0, both)
    assert statistics.h.dim() == 0 and float(statistics.h) == pytest.approx(curvature.mean)
    assert statistics.h_diagonal.dim() == 2


def test_a_hessian_of_one_s_own_is_an_option(attribute: Attribute):
    """Of the command line as of Python."""

    class Doubled(GaussNewton):
        def end_step(self, sums: GradientSums) -> None:
            super().end_step(sums)

    attribute(hessian="gauss_newton", output="known")
    attribute(hessian="doubled")
    assert WeightMask.load("mask").metadata["hessian"] == "doubled"
    assert WeightMask.load("mask") == WeightMask.load("known")


@pytest.mark.parametrize("data", ["forget", "holdout"])
def test_hessian_on_other_rows(attribute: Attribute, rows: dict[str, str], data: str):
    options = ["--data.holdout", rows["retain"]] if data == "holdout" else []
    module = attribute(*options, hessian="fisher", hessian_data=data, **{"data.batch_size": 4})
    assert_close(module.kept.sums["h"], add(plain_gradients(module, data), 2))
    assert WeightMask.load("mask").metadata["rows"][data] == 11


@pytest.mark.parametrize("hessian", ["auto", "gauss_newton", "fisher", "hutchinson"])
def test_gradient_checkpointing_changes_nothing(
    attribute: Attribute, monkeypatch: pytest.MonkeyPatch, hessian: str
):
    """Blocks are computed again, so the same sums come of more passes through them."""
    passes, forward = [0], LlamaMLP.forward

    def counted(self: Any, x: Tensor) -> Tensor:
        passes[0] += 1
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    masks = [{"score": s} for s in ("wagle", "wanda")]
    kept, counts = [], []
    for flag in (False, True):
        passes[0] = 0
        options = {"gradient_checkpointing": flag, "hessian": hessian, "hessian_samples": 2}
        module = attribute(masks=masks, output=f"m{flag}", **options)
        kept.append(module.kept)
        counts.append(passes[0])
    plain, saving = kept
    assert counts[1] >= 2 * counts[0]
    assert plain.sums.keys() == saving.sums.keys()
    for name in plain.sums:
        assert_close(saving.sums[name], plain.sums[name])
    for name, vector in plain.vectors["activation"].items():
        torch.testing.assert_close(saving.vectors["activation"][name], vector)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_several_masks_of_one_pass(attribute: Attribute):
    masks = [
        {"density": 0.1},
        {"density": 0.4},
        {"score": "magnitude", "select": "low", "scope": "tensor", "name": "small"},
        {"score": "magnitude", "include": r"layers\.1\.mlp", "density": 1.0, "name": "modules"},
        {"score": "gradient", "include": r"layers\.0", "exclude": "norm"},
    ]
    attribute(masks=masks, gamma=1.0, density=0.3, output="many")
    files = {path.name for path in Path("many").iterdir()}
    assert files == {
        f"{n}.safetensors" for n in ("wagle-0.1", "wagle-0.4", "small", "modules", "gradient-0.3")
    }
    for density in (0.1, 0.4):
        attribute(gamma=1.0, density=density, output=f"one{density}")
        mask = WeightMask.load(f"many/wagle-{density}")
        assert mask == WeightMask.load(f"one{density}") and mask.metadata["density"] == density
    inside = WeightMask.load("many/modules")
    assert all(inside[n].all() if "layers.1.mlp" in n else not inside[n].any() for n in inside)
    part = WeightMask.load("many/gradient-0.3")
    sizes = {n: part[n].numel() for n in part if "layers.0" in n and "norm" not in n}
    assert part.count() == sum(part.count(n) for n in sizes) == int(0.3 * sum(sizes.values()))
    small = WeightMask.load("many/small")
    assert all(abs(small.count(n) - 0.3 * small[n].numel()) < 1 for n in small)
    assert small.metadata["select"] == "low" and small.metadata["scope"] == "tensor"


def test_scores_are_kept_for_another_density(attribute: Attribute):
    module = attribute(gamma=1.0, density=0.1, save_scores="fp32")
    attribute(gamma=1.0, density=0.37, output="other")
    mask = mask_from_scores("mask.scores", 0.37)
    assert mask == WeightMask.load("other")
    mask.check(parameter_shapes(module.lm), module.model_fingerprint)
    stored = dict(StoredScores("mask.scores").stream())
    assert all(torch.equal(stored[n], s) for n, s in module.collected.scores(module.specs[0].score))


def test_signed_scores_are_ranked_with_their_sign(attribute: Attribute):
    module = attribute(score="signed", gamma=1.0, density=0.2, save_scores="bf16")
    mask = WeightMask.load("mask")
    values = flat(dict(module.collected.scores(module.specs[0].score)).values())
    taken = flat(mask[n] for n in mask)
    assert values[taken].min() >= values[~taken].max()
    again = mask_from_scores("mask.scores", 0.2)
    assert (flat(again[n] for n in mask) & taken).sum() > 0.98 * taken.sum()


def test_tied_weights_are_in_the_mask_once(attribute: Attribute):
    module = attribute(score="magnitude")
    assert module.lm.lm_head.weight is module.lm.model.embed_tokens.weight
    assert "lm_head.weight" not in WeightMask.load("mask")


@pytest.fixture
def passing(
    tiny_model: str, rows: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Attribute from Python with options of the Trainer; returns it. Eleven rows, four a step: three steps a pass."""
    monkeypatch.chdir(tmp_path)

    def run(score: str = "snip", **options: Any) -> L.Trainer:
        made = trainer(**options)
        data = ForgetRetainDataModule(rows["forget"], rows["retain"], batch_size=4)
        made.fit(AttributionModule(tiny_model, "mask", score=score), data)
        return made

    return run


@pytest.mark.parametrize(
    "length",
    [
        {},
        {"max_epochs": -1},
        {"max_epochs": 1},
        {"max_time": "00:01:00:00"},
        {"max_steps": 3},
        {"limit_train_batches": 3},
        {"max_epochs": -1, "max_steps": 3},
    ],
)
def test_one_pass_unless_told_otherwise(passing: Any, heard: Any, length: dict[str, Any]):
    """Lightning's own default is 1000 epochs, or no end where there is a max_time."""
    assert passing(**length).global_step == 3
    mask = WeightMask.load("mask")
    assert mask.metadata["passes"] == 1 and mask.metadata["rows"]["forget"] == 11
    assert mask.origin == "Snip, density 0.2"
    assert not warnings(heard)


def warnings(heard: pytest.LogCaptureFixture) -> list[str]:
    """What the package warned of."""
    ours = [record for record in heard.records if record.name.startswith("wagle_pl")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("length", "steps", "count", "reason"),
    [
        ({"max_epochs": 3}, 9, 33, "trainer.max_epochs 3"),
        ({"max_steps": 4}, 4, None, "trainer.max_steps 4"),
        ({"max_steps": 2}, 2, None, "trainer.max_steps 2"),
        ({"max_epochs": 2, "max_steps": 1}, 1, None, "trainer.max_steps 1"),
        ({"limit_train_batches": 2}, 2, None, "trainer.limit_train_batches 2"),
        ({"max_epochs": 2, "limit_train_batches": 0.67}, 4, None, "trainer.max_epochs 2, trainer."),
        ({"max_epochs": 5, "max_steps": 100}, 15, 55, "trainer.max_epochs 5"),
    ],
)
def test_other_than_one_pass_is_said(
    passing: Any,
    heard: Any,
    capsys: pytest.CaptureFixture[str],
    length: Any,
    steps: int,
    count: Any,
    reason: str,
):
    assert passing(**length).global_step == steps
    metadata = WeightMask.load("mask").metadata
    seen = metadata["rows"]["forget"]
    assert metadata["passes"] == pytest.approx(seen / 11) and seen == (count or seen) != 11
    (warning,) = warnings(heard)
    assert "passes over the forget rows, not one" in warning and f"({reason}" in warning
    capsys.readouterr()
    cli.main(["mask", "info", "mask.safetensors"])
    told = capsys.readouterr().out
    assert f"{seen / 11:.4g} ({seen} rows seen, 11 forget rows)" in told
    assert f"Snip, density 0.2, {seen / 11:.4g} passes" in told


def test_an_end_that_nobody_planned_is_said_afterwards(passing: Any, heard: Any):
    """A callback, or a time limit, that stops the run in its first pass."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    passing(max_time="00:01:00:00", callbacks=[Stop()])
    seen = WeightMask.load("mask").metadata["rows"]["forget"]
    assert 0 < seen < 11
    (warning,) = warnings(heard)
    assert f"the mask is of {seen / 11:.4g} passes over the 11 forget rows, not of one" in warning


@pytest.mark.parametrize("option", ["max_epochs", "max_steps", "limit_train_batches"])
def test_no_pass_at_all_is_refused(passing: Any, option: str):
    with pytest.raises(WagleError, match="nothing was trained, so nothing is written"):
        passing(**{option: 0})


def test_the_command_line_takes_one_pass(
    wagle: Any, tiny_model: str, recwarn: pytest.WarningsRecorder
):
    options = {"output": "mask", "score": "snip", "data.batch_size": 4}
    options["trainer.enable_checkpointing"] = False
    made = wagle(*fit(tiny_model), *given(options))
    assert made.trainer.global_step == 3
    assert not [warning for warning in recwarn if "1000 epochs" in str(warning.message)]


def test_two_epochs_see_each_row_twice(attribute: Attribute):
    once = attribute(score="gradient", **{"data.batch_size": 3}).kept
    twice = attribute(
        "--trainer.max_epochs", 2, score="gradient", output="two", **{"data.batch_size": 3}
    ).kept
    assert (once.counts["forget_rows"], twice.counts["forget_rows"]) == (11, 22)
    assert_close(twice.sums["g_f"], [2 * g for g in once.sums["g_f"]])


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "killed_at"),
    [({}, 2), ({"masks": [{"score": s} for s in ("curvature", "fisher_ratio", "wanda")]}, 5)],
)
def test_resume_ends_with_the_same_mask(
    attribute: Attribute, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], killed_at: int
):
    settings = {"data.batch_size": 2, **options}
    whole = attribute(output="whole", **settings).kept
    masks = sorted(Path().glob("whole*.safetensors")) + sorted(Path().glob("whole/*.safetensors"))
    assert len(masks) == (3 if "masks" in options else 1)
    step, seen = AttributionModule.training_step, []

    def killed(self: AttributionModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == killed_at:
            raise KeyboardInterrupt
        step(self, batch, batch_idx)

    def counted(self: AttributionModule, batch: Any, batch_idx: int) -> None:
        seen.append(batch_idx)
        step(self, batch, batch_idx)

    arguments = {"dirpath": "ckpt", "every_n_train_steps": 1}
    callback = {"class_path": "ModelCheckpoint", "init_args": arguments}
    saving = ["--trainer.callbacks", json.dumps([callback])]
    monkeypatch.setattr(AttributionModule, "training_step", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        attribute(*saving, output="resumed", checkpoint=True, **settings)
    assert not Path("resumed.safetensors").exists() and not Path("resumed").exists()
    (checkpoint,) = Path("ckpt").glob("*.ckpt")
    assert not torch.load(checkpoint, weights_only=False)["state_dict"]  # sums, and no weights

    monkeypatch.setattr(AttributionModule, "training_step", counted)
    resumed = attribute("--ckpt_path", checkpoint, output="resumed", **settings).kept
    assert seen == list(range(killed_at, 6))
    assert_same_sums(resumed, whole)
    for mask in masks:
        assert WeightMask.load(str(mask).replace("whole", "resumed")) == WeightMask.load(mask)


def assert_same_sums(found: GradientSums, expected: GradientSums) -> None:
    assert found.counts == expected.counts
    for name, tensors in expected.sums.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, found.sums[name], strict=True))


def test_a_checkpoint_within_a_step_keeps_the_step(attribute: Attribute):
    settings = {"hessian": "gauss_newton", "data.batch_size": 1}
    settings["trainer.accumulate_grad_batches"] = 3
    whole = attribute(output="whole", **settings).kept
    for SaveAt.left in (1, 5):
        output = f"resumed{SaveAt.left}"
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            attribute("--trainer.callbacks", "helpers.SaveAt", output=output, **settings)
        resumed = attribute("--ckpt_path", "middle.ckpt", output=output, **settings).kept
        assert_same_sums(resumed, whole)


def test_sums_elsewhere_resume_with_the_same_bits(attribute: Attribute):
    """In a step of the first pass, at its beginning, in the second, and (of twelve each) before the end of it."""
    settings = {"data.batch_size": 1, "trainer.accumulate_grad_batches": 3}
    settings["masks"] = [{"score": s} for s in ("wagle", "curvature", "wanda")]
    attribute(output="device", **settings)
    stopping = ["--trainer.callbacks", "helpers.SaveAt"]
    for sums, stops in {"host": (1, 6, 11), "passes=3": (2, 7, 12, 22)}.items():
        settings["sums"] = sums
        for SaveAt.left in stops:
            output = f"{sums}-{SaveAt.left}"
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                attribute(*stopping, output=output, **settings)
            attribute("--ckpt_path", "middle.ckpt", output=output, **settings)
            for mask in Path("device").glob("*.safetensors"):
                resumed = WeightMask.load(Path(output) / mask.name)
                assert resumed == WeightMask.load(mask)
                assert resumed.metadata["passes"] == 1 and resumed.metadata["rows"]["forget"] == 11
            assert not list(Path().glob(".sums*")) and not list(Path(output).glob(".sums*"))


class StopAtOnce(Callback):
    """Ends the run, as ``max_time`` does, after the first micro-batch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = True


def test_a_run_that_ends_before_all_passes_writes_no_mask(fails: Any, tiny_model: str):
    options = {"output": "mask", "sums": "passes=2", "trainer.enable_checkpointing": False}
    said = fails(*fit(tiny_model), *given(options), "--trainer.callbacks", f"{__name__}.StopAtOnce")
    assert "pass 1 of 2 ended early, so there is no mask" in said
    assert not Path("mask.safetensors").exists()


def test_passes_see_the_same_rows_whatever_the_epoch(attribute: Attribute):
    """Two epochs, refusals that vary with the epoch, checkpointing: three groups see what one does."""
    settings = {"forget_loss": "po", "trainer.max_epochs": 2, "gradient_checkpointing": True}
    settings |= {"hessian": "gauss_newton", "data.batch_size": 4}
    attribute(output="device", **settings)
    attribute(output="passes", sums="passes=3", **settings)
    assert WeightMask.load("device") == WeightMask.load("passes")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1e-9}, "selects none"),
        ({"hessian": "scalar"}, "give --model.gamma"),
        ({"gamma": 1.0, "hessian": "fisher"}, "gamma: a number is for hessian scalar"),
        ({"gamma": 1.0, "score": "curvature"}, "needs a Hessian diagonal"),
        ({"damping": 0.0}, "damping: must be above 0"),
        ({"hessian_samples": 0}, "hessian_samples: must be above 0"),
        ({"include": "vision"}, "leave no parameter"),
        ({"masks": []}, "masks: the list is empty"),
        ({"sums": "passes=2", "hessian": "hutchinson"}, "needs all parameters at once"),
        ({"sums": "passes=2", "trainer.max_steps": 3}, "steps cannot bound several passes"),
    ],
)
def test_mistakes_are_one_line(fails: Any, tiny_model: str, options: dict[str, Any], message: str):
    options |= {"output": "mask", "trainer.max_epochs": 1, "trainer.enable_checkpointing": False}
    assert message in fails(*fit(tiny_model), *given(options))
    assert not Path("mask.safetensors").exists()


def test_an_output_that_exists_is_kept(fails: Any, tiny_model: str, tmp_path: Path):
    (tmp_path / "mask.safetensors").write_text("mine")
    (tmp_path / "many").mkdir()
    (tmp_path / "other.scores").write_text("mine")
    for options in (
        {"output": "mask"},
        {"output": "many", "masks": "[{density: 0.1}]"},
        {"output": "other", "save_scores": "bf16"},
    ):
        said = fails(*fit(tiny_model), *given({"score": "magnitude", **options}))
        assert "exists already" in said
    assert (tmp_path / "mask.safetensors").read_text() == "mine"
