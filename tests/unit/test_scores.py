"""Scores against direct formulas; what WAGLE's score predicts; options of a mask."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wagle_pl import attribution as A
from wagle_pl.attribution.collect import watch_inputs
from wagle_pl.attribution.scores import COLLECTED
from wagle_pl.attribution.scoring import MaskSpec, by_label, check_names, complete
from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import resolve


def statistics(
    shape: tuple[int, ...] = (4, 3), name: str = "model.layers.2.mlp.up_proj.weight"
) -> A.WeightStatistics:
    """Random values in every field; h_mean is not that of h, as there are other parameters."""
    g = torch.Generator().manual_seed(0)
    normal = [torch.randn(shape, generator=g) for _ in range(3)]
    positive = [torch.rand(shape, generator=g) + 0.1 for _ in range(4)]
    activation = torch.rand(shape[-1], generator=g)
    theta, g_f, g_r = normal
    h, h_diagonal, fisher_f, fisher_r = positive
    return A.WeightStatistics(
        name, theta, g_f, g_r, h, h_diagonal, 0.7, fisher_f, fisher_r, activation
    )


FORMULAS = {
    "wagle": lambda w: (w.theta - w.g_r / w.h) * w.g_f,
    "snip": lambda w: w.theta * w.g_f,
    "gradient": lambda w: abs(w.g_f),
    "forget_retain_ratio": lambda w: abs(w.g_f) / (abs(w.g_r) + 1e-12),
    "fisher_ratio": lambda w: w.fisher_f / (w.fisher_r + 1e-20),
    "curvature": lambda w: abs(w.g_f) / (w.h_diagonal + 0.1 * 0.7).sqrt(),
    "signed": lambda w: -w.g_r * w.g_f / w.h,
    "magnitude": lambda w: abs(w.theta),
    "wanda": lambda w: abs(w.theta) * w.activation[None, :],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str):
    score, w = resolve(A.Score, name, "score"), statistics()
    before = {field: getattr(w, field).clone() for field in COLLECTED}
    torch.testing.assert_close(score(w), FORMULAS[name](w), rtol=1e-6, atol=0)
    assert score.label == name
    assert all(torch.equal(getattr(w, field), value) for field, value in before.items())


@pytest.mark.parametrize("name", FORMULAS)
def test_a_score_reads_only_what_it_needs(name: str):
    score, full = resolve(A.Score, name, "score"), statistics()
    w = A.WeightStatistics(full.name, full.theta)
    for need in score.needs:
        setattr(w, need, getattr(full, need))
    w.h_mean = full.h_mean if "h_diagonal" in score.needs else None
    assert torch.equal(score(w), score(full))
    assert set(score.needs) <= set(COLLECTED)


def test_scalar_hessian():
    w = statistics()
    w.h = torch.tensor(3.0)
    torch.testing.assert_close(A.Wagle()(w), (w.theta - w.g_r / 3) * w.g_f)
    torch.testing.assert_close(A.Signed()(w), -w.g_r * w.g_f / 3)


def test_no_gradient_at_all_is_finite():
    w = statistics()
    for field in ("g_f", "g_r", "fisher_f", "fisher_r", "h_diagonal"):
        setattr(w, field, torch.zeros(4, 3))
    for name in FORMULAS:
        assert torch.isfinite(resolve(A.Score, name, "score")(w)).all()
    w.g_f = torch.ones(4, 3)
    assert torch.isfinite(A.ForgetRetainRatio()(w)).all()


def test_random_depends_on_seed_and_name():
    w, other = statistics(), statistics(name="other")
    assert torch.equal(A.Random(1)(w), A.Random(1)(w))
    assert not torch.equal(A.Random(1)(w), A.Random(2)(w))
    assert not torch.equal(A.Random(1)(w), A.Random(1)(other))


@pytest.mark.parametrize(("chunk", "drawn_once"), [(64, 64), (1000, 1000)])
def test_random_of_some_rows_are_those_of_all(
    chunk: int, drawn_once: int, monkeypatch: pytest.MonkeyPatch
):
    """In any cut, and little more is drawn than is used; one generator draws those of a small parameter."""
    monkeypatch.setattr(A.Random, "chunk", chunk)
    name, theta, rand, drawn = "w", torch.zeros(100, 10), torch.rand, []
    once = rand(drawn_once, generator=torch.Generator().manual_seed(stable_seed(3, name)))
    monkeypatch.setattr(torch, "rand", lambda n, **options: drawn.append(n) or rand(n, **options))
    numbers = A.Random(3)(A.WeightStatistics(name, theta)).view(-1)
    assert torch.equal(numbers[:drawn_once], once) == (chunk == 1000)
    assert len(numbers.unique()) > 990 and sum(drawn) == 1000
    for start, stop in pairwise([0, 30, 31, 31, 50, 100, 100]):
        drawn.clear()
        part = A.WeightStatistics(name, theta[start:stop], first=10 * start, total=1000)
        assert torch.equal(A.Random(3)(part).view(-1), numbers[10 * start : 10 * stop])
        assert sum(drawn) < 10 * (stop - start) + chunk


@pytest.mark.parametrize("make", [A.ForgetRetainRatio, A.FisherRatio, A.Curvature])
def test_constants_must_be_positive(make):
    with pytest.raises(WagleError, match="must be above 0"):
        make(0.0)


@given(st.integers(0, 2**31))
def test_the_ranking_by_curvature_holds_the_best_set(seed):
    """Among all sets of weights, the one with the largest Σ|g| / √(Σh) is the first few by power 1."""
    generator = torch.Generator().manual_seed(seed)
    w = A.WeightStatistics("w", torch.zeros(8))
    w.g_f = torch.randn(8, generator=generator)
    w.h_diagonal = torch.rand(8, generator=generator).double() ** 4
    w.h_mean = float(w.h_diagonal.mean())
    damped = w.h_diagonal + 0.1 * w.h_mean
    ranked = A.Curvature(power=1.0)(w).argsort(descending=True).tolist()
    sets = torch.arange(1, 256).unsqueeze(1).bitwise_and(2 ** torch.arange(8)).ne(0).double()
    gain = (sets @ w.g_f.abs().double()) / (sets @ damped).sqrt()
    best = sets[gain.argmax()].nonzero().flatten().tolist()
    assert sorted(ranked[: len(best)]) == best


def test_controls_of_curvature():
    """``one`` ranks by the lowest h and needs no forget pass; ``shuffled`` has other places, the same sizes."""
    w = A.WeightStatistics("w", torch.zeros(6, 5))
    w.g_f, w.h_diagonal, w.h_mean = torch.randn(6, 5), torch.rand(6, 5), 0.5
    lowest = A.Curvature(numerator="one")
    assert lowest.needs == ("h_diagonal",) and A.Curvature.needs == ("g_f", "h_diagonal")
    ranked = lowest(w).view(-1).argsort(descending=True)
    assert torch.equal(ranked, w.h_diagonal.view(-1).argsort())
    shuffled = A.Curvature(power=1.0, numerator="shuffled")
    sizes = shuffled(w) * (w.h_diagonal + 0.05)
    assert torch.equal(shuffled(w), shuffled(w))
    assert not torch.allclose(sizes, w.g_f.abs())
    assert torch.allclose(sizes.view(-1).sort().values, w.g_f.abs().view(-1).sort().values)
    with pytest.raises(WagleError, match="numerator"):
        A.Curvature(numerator="none")


# -- activations -------------------------------------------------------------------------------------------------------


def test_input_norms_leave_padding_out():
    torch.manual_seed(0)
    inner, outer = nn.Linear(3, 4), nn.Linear(4, 2)
    outer.weight = nn.Parameter(outer.weight)
    model = nn.ModuleDict({"inner": inner, "outer": outer, "again": nn.Linear(4, 2)})
    model["again"].weight = outer.weight  # tied
    x, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    sums: dict[str, Tensor] = {}

    def add(name: str, squares: Tensor) -> None:
        sums[name] = sums.get(name, 0) + squares

    with watch_inputs(model, mask, add):
        hidden = inner(x)
        outer(hidden)
        model["again"](hidden[:, -2:])  # the last two positions only
    inner(x)  # no longer watched
    real = mask.bool()
    torch.testing.assert_close(sums["inner.weight"], x[real].double().square().sum(0))
    tail = hidden[:, -2:][real[:, -2:]].double().square().sum(0)
    torch.testing.assert_close(sums["outer.weight"], hidden[real].double().square().sum(0) + tail)
    assert set(sums) == {"inner.weight", "outer.weight"}


class _Products(TorchFunctionMode):
    """Notes Σ x² of what every matrix of `model` is multiplied with, by the place of the matrix in memory. Only theirs:
    activations come and go, and a second one of another width may lie where the first one lay."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.squares: dict[int, Tensor] = {}
        self.storages = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (nn.functional.linear, Tensor.matmul, Tensor.__matmul__, torch.matmul)
        if func in (*products, torch.addmm):
            x, weight = args[1:3] if func is torch.addmm else args[:2]
            if weight.untyped_storage().data_ptr() in self.storages:
                found = x.detach().reshape(-1, x.shape[-1]).double().square().sum(0)
                self.squares[weight.data_ptr()] = self.squares.get(weight.data_ptr(), 0) + found
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss", "GPT2"])
def test_input_norms_of_other_layers(kind: str):
    """Experts in one tensor, (experts, out, in), the same transposed and with biases, and layers stored as (in, out):
    against the products that the model computes when it runs its experts one by one."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 24, "num_experts": 4} if kind == "Qwen3Moe" else {}
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2} if kind == "GPT2" else sizes
    config = getattr(transformers, f"{kind}Config")(**sizes)
    plain = {} if kind == "GPT2" else {"experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **plain).eval()
    ids, mask = torch.randint(50, (2, 7)), torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    sums: dict[str, Tensor] = {}

    def add(name: str, squares: Tensor) -> None:
        sums[name] = sums.get(name, 0) + squares

    with torch.no_grad(), watch_inputs(model, mask, add):
        model(input_ids=ids, attention_mask=mask)
    seen = _Products(model)
    with torch.no_grad(), seen:
        for row, real in zip(ids, mask, strict=True):
            model(input_ids=row[real.bool()][None])
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    blocks = [name for name in matrices if re.search(r"\.layers\.|\.h\.", name)]
    blocks = [name for name in blocks if not re.search(r"router|mlp\.gate\.|bias", name)]
    assert blocks and set(blocks) <= set(sums)
    for name in blocks:
        weight = model.get_parameter(name)
        matrices = weight if weight.ndim == 3 else [weight]
        norms = sums[name] if weight.ndim == 3 else [sums[name]]
        assert (weight.abs() * sums[name]).shape == weight.shape
        for matrix, found in zip(matrices, norms, strict=True):
            expected = seen.squares.get(
                matrix.data_ptr(), torch.zeros(found.numel(), dtype=torch.float64)
            )
            torch.testing.assert_close(found.reshape(-1), expected, rtol=1e-4, atol=1e-9)


# -- the theory --------------------------------------------------------------------------------------------------------


def test_score_predicts_the_change_of_the_forget_loss():
    """ℓ_r = ½ (θ − a)ᵀ diag(h) (θ − a), ℓ_f = bᵀθ + ½ θᵀAθ. The weights are re-fitted to ℓ_r, once with weight i pruned
    (θ_i = 0) and once without; ℓ_f(without) − ℓ_f(with) is S_i to first order in the size of the weights."""
    generator = torch.Generator().manual_seed(3)
    n = 12
    b, a, theta = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3))
    root = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    h = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    errors = []
    for size in (1e-1, 1e-2, 1e-3):

        def retain(x: Tensor, size: float = size) -> Tensor:
            return (h * (x - size * a).square()).sum() / 2

        def forget(x: Tensor) -> Tensor:
            return b @ x + x @ (root @ root.T) @ x / 2

        start = (size * theta).requires_grad_()
        (g_f,) = torch.autograd.grad(forget(start), start)
        (g_r,) = torch.autograd.grad(retain(start), start)
        diagonal = torch.autograd.functional.hessian(retain, start).diagonal()
        predicted = A.Wagle()(A.WeightStatistics("w", start.detach(), g_f, g_r, diagonal))
        change = torch.stack(
            [forget(refit(retain, start, None)) - forget(refit(retain, start, i)) for i in range(n)]
        )
        errors.append(float((predicted - change).norm() / change.norm()))
    assert errors[0] < 0.2
    # the relative error is of first order
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.02)


def refit(loss, start: Tensor, pruned: int | None) -> Tensor:
    """The minimum of a quadratic loss over all weights, or over all but one that is held at zero: one Newton step."""
    free = [i for i in range(len(start)) if i != pruned]
    x = start.detach().clone()
    if pruned is not None:
        x[pruned] = 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    curvature = torch.autograd.functional.hessian(loss, x)[free][:, free]
    step = torch.zeros_like(x)
    step[free] = torch.linalg.solve(curvature, gradient[free])
    return x.detach() - step


def test_score_is_exact_where_the_forget_loss_is_linear():
    """With ℓ_f = bᵀθ there is no second order: S_i is the change itself."""
    generator = torch.Generator().manual_seed(4)
    theta, a, h, b = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    h = h.square() + 0.1
    w = A.WeightStatistics("w", theta, g_f=b, g_r=h * (theta - a), h=h)
    torch.testing.assert_close(A.Wagle()(w), a * b)  # re-fitted θ_i = a_i, pruned θ_i = 0


# -- options of a mask -------------------------------------------------------------------------------------------------

DEFAULT = MaskSpec("wagle", 0.2, "high", "global", "weight", "mean")


def test_a_spec_takes_what_it_lacks_from_the_default():
    first, second, third = complete(
        [{"density": 0.1}, MaskSpec(select="low"), {"density": 0.3}], DEFAULT
    )
    assert (first.density, second.density) == (0.1, 0.2)
    assert (second.select, second.scope) == ("low", "global")
    assert first.score is second.score and isinstance(first.score, A.Wagle)
    assert first.passes == third.passes != second.passes
    assert [spec.name for spec in (first, second)] == ["wagle-0.1", "wagle-0.2-low"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"density": 2.0}, "must be in"),
        ({"include": "("}, "no regular expression"),
        ({"scope": "layer"}, "scope: must be 'global', 'tensor' or 'row'"),
        ({"sparsity": 0.1}, "unknown key 'sparsity'"),
        ({"score": "gradients"}, "score: unknown name 'gradients'"),
    ],
)
def test_a_spec_that_means_nothing(spec: dict, message: str):
    with pytest.raises(WagleError, match=message):
        complete([spec], DEFAULT)


def test_a_need_that_no_pass_collects():
    class Odd(A.Score):
        needs = ("g_x",)

    with pytest.raises(WagleError, match="needs 'g_x', which no pass collects"):
        complete([{"score": Odd()}], DEFAULT)


def test_names_must_differ():
    specs = complete([{"score": A.Random(seed)} for seed in (0, 1)], DEFAULT)
    with pytest.raises(WagleError, match=r"masks: two masks are called 'random-0\.2'"):
        check_names(specs)
    with pytest.raises(WagleError, match="two different scores would be saved as random"):
        by_label(specs)


def test_equal_scores_share_a_pass():
    scores = [A.Curvature(power=1.0), A.Curvature(), "curvature", A.Curvature(power=1.0)]
    specs = complete([{"score": score} for score in scores], DEFAULT)
    first, usual, named, again = (spec.score for spec in specs)
    assert first is again and usual is named and first is not usual


@given(st.lists(st.sampled_from(["mlp.up", "mlp.down", "attn.q", "norm"]), min_size=1))
def test_include_and_exclude(names: list[str]):
    spec = MaskSpec(include="mlp|attn", exclude="down$")
    wanted = [name for name in names if name in ("mlp.up", "attn.q")]
    if wanted:
        assert spec.eligible(names) == wanted
    else:
        with pytest.raises(WagleError, match="leave no parameter"):
            spec.eligible(names)
