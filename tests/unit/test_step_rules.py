"""Step rules against a few lines of autograd, on quadratics and on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, random_bools, trainer, weights
from torch import Tensor

from wagle_pl import ForgetRetainDataModule, UnlearnModule, WagleError
from wagle_pl import objectives as o
from wagle_pl.core.needs import Needs
from wagle_pl.lm.models import load_model
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning.step_rules import MUDMAN, SAM, RepSelect, Step, StepRule, dot

A, B = torch.diag(torch.tensor([1.0, -2.0, 3.0, 0.5])), torch.diag(torch.tensor([2.0, 1, 1, 4]))


def step_of(theta: Tensor, number: int = 0) -> Step:
    """ℓ_f = −½ θᵀAθ, ℓ_r = ½ θᵀBθ; the adversary relearns ½ θᵀAθ. θ is two tensors."""
    values = {"a": theta[:3], "b": theta[3:]}

    def halves(gradient: Tensor) -> dict[str, Tensor]:
        return {"a": gradient[:3].clone(), "b": gradient[3:].clone()}

    def again(*losses: Any) -> list[dict[str, Tensor]]:
        return [halves((-A if loss == "forget_loss" else A) @ theta) for loss in losses]

    gradients = {"forget_loss": halves(-A @ theta), "retain_loss": halves(B @ theta)}
    return Step(number, values, gradients, again)


def whole(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient["a"], gradient["b"]])


def test_sam_shifts_along_the_forget_gradient() -> None:
    theta = torch.tensor([1.0, 2.0, -1.0, 3.0])
    before, g = theta.clone(), -A @ theta
    found = whole(SAM(rho=0.1).gradient(step_of(theta)))
    torch.testing.assert_close(found, -A @ (before + 0.1 * g / g.norm()) + B @ before)
    assert torch.equal(theta, before)


def test_mudman_is_the_loop_of_its_code() -> None:
    """Seven steps with SGD, as the paper's code takes them; its state goes on in another object."""
    theta, rate, retaining = torch.tensor([1.0, 2.0, -1.0, 3.0]), 0.05, 0.02
    base, acc, rule = theta.clone(), torch.zeros(4), MUDMAN(3, 0.1, 0.8)
    for number in range(7):
        step = step_of(theta, number)
        for gradient in step.gradients["retain_loss"].values():
            gradient.mul_(retaining / rate)
        state, rule = rule.state_dict(), MUDMAN(3, 0.1, 0.8)
        rule.load_state_dict(state)
        theta -= rate * whole(rule.gradient(step))

        if number % 3 == 0:
            adversary = base.clone()
        acc = 0.8 * acc + 0.2 * (B @ base)
        base = base - retaining * acc
        unlearn, relearn = -A @ adversary, A @ adversary
        adversary = adversary - 0.1 * relearn
        base = base - rate / unlearn.norm() * unlearn * (acc.sign() == unlearn.sign())
        torch.testing.assert_close(theta, base)


class Orthogonal(StepRule):
    """The example of the documentation."""

    def gradient(self, step: Step) -> dict[str, Tensor]:
        forget, retain = step.gradients["forget_loss"], step.gradients["retain_loss"]
        along = dot(forget, retain) / dot(retain, retain)
        return step.total(forget_loss={n: g - along * retain[n] for n, g in forget.items()})


def test_a_rule_of_ones_own() -> None:
    theta = torch.tensor([1.0, 2.0, -1.0, 3.0])
    found = whole(Orthogonal().gradient(step_of(theta)))
    retain = B @ theta
    torch.testing.assert_close(found @ retain, retain @ retain)


def collapsed(matrix: Tensor, basis: Tensor, count: int, soft: bool) -> Tensor:
    """Every one of the first components of a basis divided by D on both sides, in float64."""
    u, s, vt = torch.linalg.svd(basis.double())
    factors = {"left": torch.eye(len(u)).double(), "right": torch.eye(len(vt)).double()}
    count = min(count, int((s > 1e-6 * s[0]).sum()))
    for i in range(count):
        keep = s[count - 1] / s[i] if soft else 0.0
        factors["left"] -= (1 - keep) * torch.outer(u[:, i], u[:, i])
        factors["right"] -= (1 - keep) * torch.outer(vt[i], vt[i])
    return (factors["left"] @ matrix.double() @ factors["right"]).float()


@pytest.mark.parametrize("collapse", ["soft", "hard"])
@pytest.mark.parametrize("of", ["forget", "retain"])
def test_repselect_collapses_principal_components(of: Any, collapse: Any) -> None:
    shapes = {"tall": (9, 4), "low": (6, 8), "vector": (5,)}
    drawn = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    drawn[0]["low"] = torch.randn(6, 2) @ torch.randn(2, 8)  # of rank 2
    forget, retain = drawn
    step = Step(0, forget, {"forget_loss": forget, "retain_loss": retain}, None)
    found = RepSelect(3, of, collapse).gradient(step)
    basis = forget if of == "forget" else retain
    for name in ("tall", "low"):
        expected = collapsed(forget[name], basis[name], 3, collapse == "soft") + retain[name]
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["vector"], forget["vector"] + retain["vector"])


def test_repselect_of_a_large_matrix_is_approximate_and_draws_nothing() -> None:
    matrix = torch.randn(300, 300) + 40 * torch.outer(torch.randn(300), torch.randn(300))
    step = Step(0, {"a": matrix}, {"forget_loss": {"a": matrix}}, None)
    state = torch.get_rng_state()
    found = RepSelect(1, collapse="hard").gradient(step)["a"]
    torch.testing.assert_close(found, collapsed(matrix, matrix, 1, soft=False), rtol=0, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    matrix[0, 0] = float("nan")
    assert RepSelect(1).gradient(step)["a"].isnan().any()  # the run says that it diverged


# -- in a run --------------------------------------------------------------------------------------


@pytest.fixture
def unlearn(tiny_model: str, rows: dict[str, str], tmp_path: Path) -> Any:
    """Steps of SGD with a rule: unlearn("name of the output", rule, …); returns the module."""

    def run(
        name: str,
        rule: Any,
        batch_size: int = 8,
        accumulate: int = 1,
        steps: int = 1,
        **options: Any,
    ) -> UnlearnModule:
        given = {"objective": o.NPO(retain_weight=0.5), "decay": "constant", "warmup": 0} | options
        module = UnlearnModule(tiny_model, str(tmp_path / name), step_rule=rule, **given)
        module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.5)
        data = ForgetRetainDataModule(rows["forget"], rows["retain"], batch_size=batch_size)
        trainer(max_steps=steps, accumulate_grad_batches=accumulate).fit(module, data)
        return module

    return run


def losses_of(lm: Any, batch: Any, theta0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(ℓ_f, ℓ_r, log-probabilities at θ₀) of NPO with half of the retain loss, by cross-entropy."""
    found = {}
    for stream, tensors in batch.items():
        logits = lm(tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
        labels = tensors["labels"][:, 1:]
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels, reduction="none")
        found[stream] = -nll.sum(-1), (labels != -100).sum(-1)
    logprob = found["forget"][0]
    start = logprob.detach() if theta0 is None else theta0
    forget = -2 / 0.1 * torch.nn.functional.logsigmoid(-0.1 * (logprob - start))
    return forget.mean(), -0.5 * (found["retain"][0] / found["retain"][1]).mean(), start


@pytest.mark.parametrize("rule", [SAM(rho=0.5), RepSelect(3, "retain", "hard")])
def test_a_rule_on_selected_weights_of_a_model(
    unlearn: Any, tiny_model: str, rows: dict[str, str], tmp_path: Path, rule: StepRule
) -> None:
    """A step in two micro-batches, against autograd on the whole batch; frozen weights keep their bits."""
    lm = load_model(tiny_model).train()
    named = dict(lm.named_parameters())
    mask = WeightMask.from_bools(random_bools({n: p.shape for n, p in named.items()}, seed=3))
    options = {"batch_size": 4, "accumulate": 2, "mask": str(mask.save(tmp_path / "mask"))}
    module = unlearn("out", rule, **options)
    data = ForgetRetainDataModule(rows["forget"], rows["retain"], batch_size=8)
    data.needs = Needs(tokenizer=lambda: module.tokenizer)
    batch = next(iter(data.train_dataloader()))

    forget, retain, start = losses_of(lm, batch, None)
    whole = torch.autograd.grad(forget, list(named.values()))
    own = {n: g * mask[n] for n, g in zip(named, whole, strict=True)}
    retained = torch.autograd.grad(retain, list(named.values()))
    size = torch.cat([g.view(-1) for g in own.values()]).norm()
    theta = {n: p.detach().clone() for n, p in named.items()}
    if isinstance(rule, SAM):
        with torch.no_grad():
            for n, p in named.items():
                p += 0.5 * own[n] / size
        shifted = torch.autograd.grad(losses_of(lm, batch, start)[0], list(named.values()))
    else:
        masked = (r * mask[n] for n, r in zip(named, retained, strict=True))
        shifted = [
            collapsed(g, r, 3, soft=False) if g.dim() == 2 else g
            for g, r in zip(own.values(), masked, strict=True)
        ]
    written = weights(module.output)
    for n, s, r in zip(named, shifted, retained, strict=True):
        expected = theta[n] - 0.5 * (s + r) * mask[n]
        torch.testing.assert_close(written[n], expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(written[n][~mask[n]], theta[n][~mask[n]])
    assert not torch.allclose(shifted[0], whole[0], rtol=0.01)


@pytest.mark.parametrize(
    "make", [lambda: SAM(0.05), lambda: MUDMAN(2), lambda: RepSelect(4, "retain")]
)
def test_the_split_of_a_batch_does_not_matter(unlearn: Any, make: Any) -> None:
    first = unlearn("whole", make(), 8, 1, steps=3, objective="GradDiff")
    parts = unlearn("parts", make(), 2, 4, steps=3, objective="GradDiff")
    assert close(first.output, parts.output)


def test_what_a_rule_cannot_do(unlearn: Any) -> None:
    for rule, options, said in (
        (
            "SAM",
            {"clip_scope": "all"},
            "step_rule: SAM makes gradients of its own passes: use it on",
        ),
        ("SAM", {"objective": "FineTune"}, "step_rule: SAM needs a forget term, and objective"),
        ("MUDMAN", {"objective": "GradAscent"}, "step_rule: MUDMAN needs retain rows, which"),
        (RepSelect(of="retain"), {"objective": "GradAscent"}, "RepSelect of retain needs retain"),
    ):
        with pytest.raises(WagleError, match=said):
            unlearn("refused", rule, **options)
    with pytest.raises(WagleError, match=r"step_rule\.rho: must be above 0"):
        SAM(rho=0)
    with pytest.raises(WagleError, match=r"step_rule\.momentum: must lie in"):
        MUDMAN(momentum=1)
