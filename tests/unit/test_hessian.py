"""Hessian estimates against exact diagonals by automatic differentiation."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from wagle_pl.attribution import AttributionModule
from wagle_pl.attribution.collect import Draws
from wagle_pl.attribution.hessian import (
    DIAGONAL,
    TRACE,
    DampedHessian,
    Fisher,
    GaussNewton,
    Hessian,
    Hutchinson,
    MicroBatch,
    estimator_of,
    rademacher,
    sample_labels,
)
from wagle_pl.attribution.sums import GradientSums
from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError
from wagle_pl.lab.planning import PlannedRun, sums_per_weight
from wagle_pl.lm.inference import Predictions, answer_places

VOCABULARY = 5
LABELS = torch.tensor(
    [[-100, -100, 1, 4, 0], [-100, 3, 2, -100, -100], [-100, -100, -100, -100, 2]]
)


class Toy(nn.Module):
    """Tokens to logits through one hidden layer; position t sees tokens t and t − 1. 65 weights, and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 3)
        self.hidden = nn.Linear(6, 4)
        self.out = nn.Linear(4, VOCABULARY)
        with torch.no_grad():
            self.out.weight.mul_(3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(torch.tanh(self.hidden(torch.cat([x, x.roll(1, 1)], -1))))


@pytest.fixture
def toy() -> tuple[Toy, Tensor]:
    return Toy(), torch.tensor([[0, 3, 1, 4, 0], [2, 3, 2, 0, 0], [1, 1, 4, 2, 2]])


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean negative log-likelihood per labelled token, written out."""
    rows = []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):
        mask = targets != -100
        rows.append(-row.log_softmax(-1)[mask].gather(1, targets[mask, None]).mean())
    return torch.stack(rows)


def predicted(logits: Tensor, labels: Tensor) -> Predictions:
    """At the labels, row after row."""
    return Predictions(logits.flatten(0, 1)).at(answer_places(labels))


def flat(named: dict[str, Tensor] | list[Tensor]) -> Tensor:
    tensors = named.values() if isinstance(named, dict) else named
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).double()


def exact_hessian(model: Toy, ids: Tensor) -> Tensor:
    """Diagonal of the Hessian of the summed row losses."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = hessian(lambda p: row_losses(functional_call(model, p, (ids,)), LABELS).sum())(
        parameters
    )
    diagonals = []
    for name, p in parameters.items():
        diagonals.append(blocks[name][name].reshape(p.numel(), p.numel()).diagonal())
    return flat(diagonals)


def exact_gauss_newton(model: Toy, ids: Tensor) -> Tensor:
    """Diagonal of Σ_n (1/T_n) Σ_t Jᵀ (diag(p) − ppᵀ) J, J the Jacobian of the logits."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = jacrev(lambda p: functional_call(model, p, (ids,)))(parameters)
    logits = model(ids).detach()
    total = 0.0
    for n, targets in enumerate(LABELS[:, 1:]):
        positions = (targets != -100).nonzero().view(-1)
        for t in positions:
            p = logits[n, t].softmax(-1)
            curvature = p.diag() - torch.outer(p, p)
            j = torch.cat([jacobians[name][n, t].reshape(VOCABULARY, -1) for name in parameters], 1)
            total = total + torch.einsum("vi,vw,wi->i", j, curvature, j) / len(positions)
    return total.double()


def exact_fisher(model: Toy, ids: Tensor) -> Tensor:
    """Σ_n (∇ℓ_n)²."""
    total = 0.0
    for n in range(len(ids)):
        loss = row_losses(model(ids[n : n + 1]), LABELS[n : n + 1])[0]
        total = total + flat(list(torch.autograd.grad(loss, model.parameters()))).square()
    return total


def lengths(labels: Tensor) -> list[int]:
    return (labels[:, 1:] != -100).sum(-1).tolist()


def estimate(
    estimator: Any, model: Toy, ids: Tensor, seed: int, by_row: bool = False
) -> GradientSums:
    """What an estimator adds for one batch, whole or row by row."""
    sums = GradientSums(model.named_parameters())
    for part in torch.arange(len(ids)).split(1 if by_row else len(ids)):
        labels = LABELS[part]
        seeds = [stable_seed(seed, int(row)) for row in part]

        def run(part: Tensor = part, labels: Tensor = labels) -> tuple[Predictions, Tensor]:
            logits = model(ids[part])
            return predicted(logits, labels), row_losses(logits, labels).sum()

        estimator.add(MicroBatch(run, labels, lengths(labels), seeds, seed), sums)
    estimator.end_step(sums)
    return sums


def mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over draws and its standard error."""
    return draws.mean(0), draws.std(0) / len(draws) ** 0.5


@pytest.mark.parametrize(
    ("kind", "exact", "by_row"),
    [
        (GaussNewton, exact_gauss_newton, False),
        (GaussNewton, exact_gauss_newton, True),
        (Hutchinson, exact_hessian, False),
    ],
)
def test_unbiased(kind: Any, exact: Any, by_row: bool, toy: tuple[Toy, Tensor]):
    model, ids = toy
    draws = torch.stack(
        [flat(estimate(kind(), model, ids, seed, by_row).buffers(DIAGONAL)) for seed in range(250)]
    )
    truth, (mean, error) = exact(model, ids), mean_and_error(draws)
    z = (mean - truth) / error.clamp(min=1e-9)
    assert z.abs().max() < 6  # of 65 weights; the draws are skewed
    assert z.square().mean() < 2
    relative = float((mean - truth).norm() / truth.norm())
    assert relative < 0.25
    assert float((draws[0] - truth).norm() / truth.norm()) > 2 * relative  # one draw is worse


def test_the_two_matrices_differ(toy: tuple[Toy, Tensor]):
    """So the test above tells one from the other."""
    model, ids = toy
    truth = exact_hessian(model, ids)
    assert (truth < 0).any()
    assert (exact_gauss_newton(model, ids) - truth).norm() > 0.2 * truth.norm()


def test_fisher_is_exact(toy: tuple[Toy, Tensor]):
    model, ids = toy
    found = flat(estimate(Fisher(), model, ids, 0, by_row=True).buffers(DIAGONAL))
    torch.testing.assert_close(found, exact_fisher(model, ids), rtol=1e-5, atol=1e-9)
    assert Fisher.per_example


@pytest.mark.parametrize("kind", [GaussNewton, Hutchinson])
def test_samples_add_up_independent_draws(kind: Any, toy: tuple[Toy, Tensor]):
    model, ids = toy
    one = flat(estimate(kind(samples=1), model, ids, 7).buffers(DIAGONAL))
    several = flat(estimate(kind(samples=100), model, ids, 7).buffers(DIAGONAL)) / 100
    again = flat(estimate(kind(samples=100), model, ids, 7).buffers(DIAGONAL)) / 100
    truth = exact_gauss_newton(model, ids) if kind is GaussNewton else exact_hessian(model, ids)
    assert torch.equal(several, again)
    assert (several - truth).norm() < 0.3 * (one - truth).norm()


def test_mean_only_is_the_mean_of_the_diagonal(toy: tuple[Toy, Tensor]):
    model, ids = toy
    diagonal = estimate(GaussNewton(samples=3), model, ids, 1)
    mean_only = estimate(GaussNewton(samples=3, diagonal=False), model, ids, 1)
    assert not mean_only.sums  # no buffer is made
    assert float(sum(mean_only.vectors[TRACE].values())) == pytest.approx(
        float(flat(diagonal.buffers(DIAGONAL)).sum())
    )


def test_labels_drawn_follow_the_model_and_the_row():
    logits = torch.tensor([[[0.0, 1.0, 2.0]] * 2]).expand(6000, -1, -1)
    labels = torch.tensor([[-100, 0]]).expand(6000, -1)
    drawn = sample_labels(predicted(logits, labels), [1] * 6000, list(range(6000)))
    shares = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), atol=0.03, rtol=0)
    alone = sample_labels(predicted(logits[:1], labels[:1]), [1], [41])
    assert torch.equal(alone[0], drawn[41])


def test_probes():
    like = [torch.zeros(50, 40), torch.zeros(30, dtype=torch.bfloat16)]
    signs = rademacher(like, 3)
    assert [s.shape for s in signs] == [t.shape for t in like] and signs[1].dtype == torch.bfloat16
    assert set(signs[0].unique().tolist()) == {-1.0, 1.0} and abs(signs[0].mean()) < 0.1
    assert torch.equal(signs[0], rademacher(like, 3)[0])
    assert not torch.equal(signs[0], rademacher(like, 4)[0])


def test_damping_rule():
    diagonal = [torch.tensor([[-4.0, 0.0], [2.0, 6.0]]), torch.tensor([1e-30, -1e-9])]
    h = DampedHessian.of_diagonal(diagonal, scale=0.5, damping=0.1)
    assert h.mean == pytest.approx((0 + 0 + 1 + 3) / 6)
    torch.testing.assert_close(h.plain(0), torch.tensor([[0.0, 0.0], [1.0, 3.0]]))
    torch.testing.assert_close(h.damped(0), torch.tensor([[0.0, 0.0], [1.0, 3.0]]) + 0.1 * h.mean)
    assert (h.damped(1) >= 0.1 * h.mean).all()
    assert diagonal[0][0, 0] == -4.0  # the sums are left as they are
    with pytest.raises(WagleError, match="no curvature"):
        DampedHessian.of_diagonal([torch.tensor([-1.0, 0.0])], 1.0, 0.1)
    with pytest.raises(WagleError, match="no curvature"):
        DampedHessian(float("nan"))


ESTIMATORS = {
    "auto": GaussNewton,
    "gauss_newton": GaussNewton,
    "fisher": Fisher,
    "hutchinson": Hutchinson,
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_is_an_option(name: str, toy: tuple[Toy, Tensor]):
    """Of the module and of the plan, by its name; made as the module makes it, it sums what it says."""
    assert estimator_of(name) is ESTIMATORS[name]
    module = AttributionModule("model", hessian=name, hessian_samples=3)
    estimator = module.estimator
    assert type(estimator) is ESTIMATORS[name]
    model, ids = toy
    sums = GradientSums(model.named_parameters())
    for part in torch.arange(len(ids)).split(1 if estimator.per_example else len(ids)):
        piece = MicroBatch(
            lambda part=part: (
                predicted(model(ids[part]), LABELS[part]),
                row_losses(model(ids[part]), LABELS[part]).sum(),
            ),
            LABELS[part],
            lengths(LABELS[part]),
            part.tolist(),
        )
        estimator.add(piece, sums)
    assert len(sums.step_sums) == 3 * estimator.step_sums  # one per draw
    estimator.end_step(sums)
    assert set(sums.sums) == ({DIAGONAL} if estimator.diagonal else set())
    found = [*sums.sums.get(DIAGONAL, []), *sums.vectors.get(TRACE, {}).values()]
    assert sum(float(tensor.abs().sum()) for tensor in found) > 0


def test_an_estimator_of_one_s_own():
    class Mine(Hutchinson):
        step_sums = 2

    for name in ("mine", f"{__name__}.Own"):
        module = AttributionModule("model", hessian=name)
        assert type(module.jobs[1].hessian) is estimator_of(name) in (Mine, Own)
    run = PlannedRun("attribution", estimator=Mine, diagonal=True)
    assert sums_per_weight(run) == 4 * (2 + 1 + 2)
    listed = (
        r"hessian: unknown name .gausnewton.; choose one of auto, scalar, Fisher, GaussNewton, "
    )
    for wrong in (lambda name: AttributionModule("model", hessian=name), estimator_of):
        with pytest.raises(WagleError, match=listed):
            wrong("gausnewton")
        with pytest.raises(WagleError, match="or a class path"):
            wrong(f"{__name__}.Toy")


class Own(Fisher):
    """By class path."""


def test_an_estimator_as_an_object():
    """Its options are kept; the rest of the module goes by them."""
    own = Hutchinson(samples=4)
    module = AttributionModule("model", hessian=own)
    assert module.estimator is own and module.jobs[1].hessian is own and not module.scalar
    assert AttributionModule("model", hessian=GaussNewton(diagonal=False)).scalar
    entry = {"class_path": "GaussNewton", "init_args": {"samples": 2}}
    assert AttributionModule("model", hessian=entry).estimator.samples == 2
    assert AttributionModule("model", score="magnitude", hessian=own).estimator is None
    for options, message in (
        ({"hessian": own, "hessian_samples": 2}, "hessian_samples: must be 1 for a Hessian object"),
        ({"hessian": own, "gamma": 2.0}, "a number is for hessian scalar, not for Hutchinson"),
        ({"hessian": Hutchinson}, "model.hessian: must be a text or a Hessian, got <class"),
        ({"hessian": Hessian()}, "hessian: Hessian must override add"),
        ({"hessian": f"{Hessian.__module__}.Hessian"}, "hessian: Hessian must override add"),
        (
            {"hessian": GaussNewton(diagonal=False), "score": "curvature"},
            "a score here needs a Hessian diagonal",
        ),
    ):
        with pytest.raises(WagleError, match=message):
            AttributionModule("model", **options)


def test_seeds_are_those_of_a_stated_hash():
    """The same in every Python: what is drawn is part of a mask's definition."""
    assert stable_seed(1, "a", -1) == int(hashlib.sha256(b"1 a -1").hexdigest()[:16], 16) >> 1
    draws = Draws(seed=0, epoch=1, step=2, job=1)
    assert draws.of_row(3, 0) == int(hashlib.sha256(b"row 0 1 1 3 0").hexdigest()[:16], 16) >> 1
    assert draws.of_step() == int(hashlib.sha256(b"step 0 1 1 2").hexdigest()[:16], 16) >> 1
    logits, labels = torch.zeros(1, 9, 50), torch.zeros(1, 9).long()
    found = predicted(logits, labels)
    drawn = [sample_labels(found, [8], [draws.of_row(row, 0)]) for row in (3, 4)]
    assert not torch.equal(*drawn)


# -- the sums -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_fp32(dtype: torch.dtype):
    """A thousand gradients of 1 + 2⁻⁷, which bf16 holds but whose bf16 sum stops growing at 256."""
    weight = nn.Parameter(torch.zeros(3, dtype=dtype))
    sums = GradientSums([("w", weight)])
    value = 1 + 2**-7
    for _ in range(1000):
        with sums.into("g", squares="s"):
            (weight * value).sum().backward()
        with sums.into("direct"):
            (weight * value).sum().backward()
    assert weight.grad is None
    assert all(buffers[0].dtype == torch.float32 for buffers in sums.sums.values())
    torch.testing.assert_close(sums.buffers("g")[0], torch.full((3,), 1000 * value))
    torch.testing.assert_close(sums.buffers("direct")[0], torch.full((3,), 1000 * value))
    torch.testing.assert_close(
        sums.buffers("s")[0], torch.full((3,), 1000 * value**2), rtol=1e-5, atol=0
    )


def test_tied_weights_are_squared_once():
    """The gradient of a weight used twice is squared as a whole."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    sums = GradientSums([("w", weight)])
    with sums.into(squares="s", in_step="step"):
        (2 * weight + F.relu(weight) * 3).sum().backward()
    sums.fold("step", squared_norm="n")
    assert sums.buffers("s")[0].tolist() == [25.0, 25.0]
    assert float(sum(sums.vectors["n"].values())) == pytest.approx(50.0)


def test_sums_survive_a_checkpoint(tmp_path):
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    sums = GradientSums([("w", weight)])
    with sums.into("g"):
        weight.float().square().sum().backward()
    sums.count("rows", 3)
    sums.add_vector("norm", "w", torch.tensor([1.5, 2.5]))
    torch.save(sums.state_dict(), tmp_path / "sums.pt")
    other = GradientSums([("w", weight)])
    other.load_state_dict(torch.load(tmp_path / "sums.pt", weights_only=True))
    assert (
        torch.equal(other.buffers("g")[0], sums.buffers("g")[0])
        and other.buffers("g")[0].dtype == torch.float32
    )
    assert other.counts == {"rows": 3} and other.vectors["norm"]["w"].tolist() == [1.5, 2.5]
