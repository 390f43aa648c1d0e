"""Objectives: each loss and its gradient against the formula in float64."""

from __future__ import annotations

import gc
import math
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from wagle_pl import objectives as o
from wagle_pl.core.distributed import stable_seed
from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import deal
from wagle_pl.lm import inference
from wagle_pl.lm.inference import Predictions
from wagle_pl.objectives.forget import RMU, Objective, Streams
from wagle_pl.objectives.objective import Schedule, as_schedule
from wagle_pl.objectives.retain import RetainTerm

STREAMS = ("forget", "refusal", "retain", "alternate")
LAYER = 1
EPOCH = 3

Row = SimpleNamespace  # one row of one stream in float64: its tensors as attributes
Data = dict[str, dict[str, Tensor]]


@dataclass
class Flat(Objective):
    """The example of the documentation."""

    target: float = 4.0

    def forget_loss(self, at):
        return (at["forget"].nll - self.target) ** 2


class Toy(nn.Module):
    """Three blocks that return what they are given: hidden states are an input like logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.weight = nn.Parameter(torch.linspace(-1, 2, 7))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)


def random_data(rows: int, width: int, vocabulary: int, seed: int = 0) -> Data:
    """Streams of random tensors; every row has an answer token at least."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    data = {}
    for stream in STREAMS:
        labels = torch.randint(vocabulary, (rows, width), generator=generator)
        hide = torch.rand(rows, width, generator=generator) < 0.4
        hide[torch.arange(rows), torch.randint(1, width, (rows,), generator=generator)] = False
        data[stream] = {
            "logits": 3 * draw(rows, width, vocabulary),
            "logits0": 3 * draw(rows, width, vocabulary),
            "hidden": draw(rows, width, 6),
            "hidden0": draw(rows, width, 6),
            "labels": labels.masked_fill(hide, -100),
            "reference": -3 * width * torch.rand(rows, generator=generator),
            "row": torch.arange(rows),
            "weight": torch.full((rows,), 1 / rows),
        }
    return data


def pick(data: Data, index: Tensor) -> Data:
    return {s: {key: t[index] for key, t in tensors.items()} for s, tensors in data.items()}


def streams(data: Data, progress: float = 0.0) -> Streams:
    """The data as a batch."""
    lm, now = Toy(), {"suffix": ""}

    def run(tensors: dict[str, Tensor]) -> Predictions:
        lm.layers[LAYER](tensors["hidden" + now["suffix"]])
        return Predictions(tensors["logits" + now["suffix"]].flatten(0, 1)).at(tensors["places"])

    @contextmanager
    def at_theta0() -> Iterator[None]:
        now["suffix"] = "0"
        yield
        now["suffix"] = ""

    known = {s: torch.zeros(99).scatter(0, t["row"], t["reference"]) for s, t in data.items()}
    return Streams(data, run, known, lm, (LAYER,), at_theta0, progress=progress, epoch=EPOCH)


def leaves(data: Data, dtype: torch.dtype) -> tuple[Data, list[Tensor]]:
    """A copy in a dtype whose logits and hidden states require gradients, and these."""
    copied = {
        stream: {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
        for stream, tensors in data.items()
    }
    for tensors in copied.values():
        for key in ("logits", "hidden"):
            tensors[key] = tensors[key].clone().requires_grad_()
    return copied, [copied[stream][key] for stream in STREAMS for key in ("logits", "hidden")]


# -- the formulas, one row at a time, in float64 --------------------------------------------------


def positions(row: Row) -> list[int]:
    """Positions that predict an answer token."""
    return [t - 1 for t in range(1, len(row.labels)) if row.labels[t] != -100]


def tokens(row: Row) -> list[tuple[Tensor, Tensor, int]]:
    """(log-probabilities now, at θ₀, true token) of each answer token."""
    normal = [
        logits - logits.exp().sum(-1, keepdim=True).log() for logits in (row.logits, row.logits0)
    ]
    return [(normal[0][t], normal[1][t], int(row.labels[t + 1])) for t in positions(row)]


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)


def total(row: Row) -> Tensor:
    return sum(now[y] for now, _, y in tokens(row))


def nll(row: Row) -> Tensor:
    return -total(row) / len(tokens(row))


def kl(row: Row) -> Tensor:
    return mean([(then.exp() * (then - now)).sum() for now, then, _ in tokens(row)])


def hidden_mse(row: Row, target: Tensor) -> Tensor:
    answer = [t for t in range(len(row.labels)) if row.labels[t] != -100]
    return mean([((row.hidden[t] - target[t]) ** 2).mean() for t in answer])


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


def undial(row: Row, beta: float) -> Tensor:
    values = []
    for t in positions(row):
        teacher = row.logits0[t].clone()
        teacher[row.labels[t + 1]] -= beta
        values.append(-(teacher.softmax(0) * row.logits[t].log_softmax(0)).sum())
    return mean(values)


def ceu(row: Row, skip: int) -> Tensor:
    values = []
    for t in positions(row)[skip:]:
        logits = row.logits[t]
        others = torch.arange(len(logits)) != row.labels[t + 1]
        target = logits.detach()[others].softmax(0)
        values.append(-(target * logits.log_softmax(0)[others]).sum())
    return mean(values) if values else row.logits.sum() * 0


def random_label(row: Row, seed: int) -> Tensor:
    found = tokens(row)
    generator = torch.Generator().manual_seed(stable_seed(seed, EPOCH, int(row.row)))
    drawn = torch.randint(len(found[0][0]), (len(found),), generator=generator)
    return -mean([now[u] for (now, _, _), u in zip(found, drawn, strict=True)])


def weighted(row: Row, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of log-probabilities times a weight of the probability, without its gradient."""
    return mean([now[y] * weight(now[y].exp().detach()) for now, _, y in tokens(row)])


def npo(change: Tensor, beta: float) -> Tensor:
    return -2 / beta * log_sigmoid(-beta * change)


def margin(row: Row) -> Tensor:
    """The square of the largest logit less the mean one, as the mean over tokens."""
    chosen = [row.logits[t] for t in positions(row)]
    return mean([(max(logits) - sum(logits) / len(logits)) ** 2 for logits in chosen])


#: (objective, its forget term of (forget row, refusal or alternate), its retain term).
CASES: dict[str, tuple[Objective, Any, Any]] = {
    "GradDiff": (o.GradDiff(retain_weight=0.5), lambda f, r: -nll(f), nll),
    "GradAscent": (o.GradAscent(), lambda f, r: -nll(f), None),
    "GradAscent+kl": (o.GradAscent(retain="kl"), lambda f, r: -nll(f), kl),
    "NPO sum": (o.NPO(0.3), lambda f, r: npo(total(f) - f.reference, 0.3), nll),
    "NPO mean": (
        o.NPO(2.0, "mean", retain="kl"),
        lambda f, r: npo((total(f) - f.reference) / len(tokens(f)), 2.0),
        kl,
    ),
    "SimNPO": (o.SimNPO(2.5, 0.7), lambda f, r: -2 / 2.5 * log_sigmoid(2.5 * nll(f) - 0.7), nll),
    "PO": (o.PO(), lambda f, r: nll(r), nll),
    "DPO": (
        o.DPO(0.1),
        lambda f, r: npo((total(f) - f.reference) - (total(r) - r.reference), 0.1),
        nll,
    ),
    "AltPO": (
        o.AltPO(0.2),
        lambda f, a: npo((total(f) - f.reference) - (total(a) - a.reference), 0.2),
        nll,
    ),
    "PDU": (o.PDU(0.5, retain_weight=3.0), lambda f, r: margin(f), nll),
    "KL": (o.KL(), lambda f, r: -kl(f), nll),
    "UNDIAL": (o.UNDIAL(3.0), lambda f, r: undial(f, 3.0), nll),
    "CEU": (o.CEU(1), lambda f, r: ceu(f, 1), nll),
    "CEU all": (o.CEU(0), lambda f, r: ceu(f, 0), nll),
    "WGA": (o.WGA(0.8), lambda f, r: weighted(f, lambda p: p**0.8), nll),
    "SatImp": (o.SatImp(5.0, 1.0), lambda f, r: weighted(f, lambda p: p**5 * (1 - p)), nll),
    "RandomLabel": (o.RandomLabel(seed=4), lambda f, r: random_label(f, 4), nll),
    "RMU": (
        o.RMU(LAYER, 6.5),
        lambda f, r: hidden_mse(f, o.RMU(LAYER, 6.5).control(6).double().expand_as(f.hidden)),
        lambda r: hidden_mse(r, r.hidden0),
    ),
    "FineTune": (o.FineTune(), None, nll),
    "Flat": (Flat(5.0), lambda f, r: (nll(f) - 5) ** 2, nll),
}
for _objective, _, _ in CASES.values():
    _objective.retain.prepare(Toy(), _objective.layer)


def oracle(name: str, data: Data) -> tuple[Tensor, Tensor]:
    """The forget and the retain term of a batch's loss by formula."""
    objective, forget, retain = CASES[name]
    forget_term = retain_term = torch.zeros((), dtype=torch.float64)
    for i in range(len(data["forget"]["row"])):
        read = ("forget", (objective.forget_streams or STREAMS)[-1], "retain")
        f, r, kept = (Row(**{key: t[i] for key, t in data[s].items()}) for s in read)
        if forget is not None:
            forget_term = forget_term + f.weight * forget(f, r)
        if retain is not None:
            retain_term = retain_term + objective.retain_weight * kept.weight * retain(kept)
    return forget_term, retain_term


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(
    rows=st.integers(1, 4),
    width=st.integers(2, 7),
    vocabulary=st.integers(3, 30),
    seed=st.integers(0, 2**31),
    chunk=st.sampled_from([1, 50, inference.CHUNK]),
)
def test_loss_and_gradient_equal_the_formula(
    name: str, rows: int, width: int, vocabulary: int, seed: int, chunk: int
) -> None:
    data = random_data(rows, width, vocabulary, seed)
    exact, exact_inputs = leaves(data, torch.float64)
    terms = oracle(name, exact)
    size = sum(abs(term.item()) for term in terms)  # large terms may cancel
    expected_gradients = torch.autograd.grad(sum(terms), exact_inputs, allow_unused=True)

    single, inputs = leaves(data, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "CHUNK", chunk)
        loss = CASES[name][0](streams(single))["loss"]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)

    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(terms).item(), abs=1e-6 * max(1, size))
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        if reference is None or gradient is None:
            assert gradient is None or not gradient.any()
            assert reference is None or not reference.any()
        else:
            torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("rows", "world_size", "accumulate"), [(5, 2, 2), (3, 2, 2), (4, 1, 2), (7, 3, 1)]
)
def test_the_split_of_a_batch_does_not_matter(
    name: str, rows: int, world_size: int, accumulate: int
) -> None:
    """Invariant 4: ranks and micro-batches, padded with rows of weight 0, give the whole's loss."""
    objective = CASES[name][0]
    whole, inputs = leaves(random_data(rows, 6, 11, seed=rows), torch.float32)
    loss = objective(streams(whole))["loss"]
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    parts = []
    for ranks in deal(torch.arange(rows).numpy(), world_size, accumulate):
        for cell in ranks:
            part = pick(whole, torch.tensor([row for row, _, _ in cell]))
            for tensors in part.values():
                tensors["weight"] = torch.tensor([weight for _, weight, _ in cell])
            parts.append(objective(streams(part))["loss"])
    torch.testing.assert_close(mean(parts), loss, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(mean(parts), inputs, allow_unused=True)
    for mine, reference in zip(found, gradients, strict=True):
        if reference is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_rows_of_weight_zero_contribute_nothing(name: str) -> None:
    data, inputs = leaves(random_data(4, 6, 11, seed=1), torch.float32)
    for tensors in data.values():
        tensors["weight"] = torch.tensor([0.5, 0.0, 0.5, 0.0])
    objective = CASES[name][0]
    loss = objective(streams(data))["loss"]
    alone = objective(streams(pick(data, torch.tensor([0, 2]))))["loss"]
    torch.testing.assert_close(loss, alone)
    for gradient in torch.autograd.grad(loss, inputs, allow_unused=True):
        assert gradient is None or not gradient[[1, 3]].any()


# -- one objective each ----------------------------------------------------------------------------


def test_l1_counts_the_weights_that_may_move_once_a_step() -> None:
    losses = o.L1Sparse(alpha="linear:0.1->0")(streams(random_data(3, 5, 7), progress=0.5))
    expected = 0.05 * torch.linspace(-1, 2, 7).abs().sum()
    torch.testing.assert_close(losses["penalty"], expected)
    torch.testing.assert_close(losses["loss"], losses["retain_loss"] + expected)


def test_the_dual_weight_of_pdu_follows_the_violation() -> None:
    """λ ← max(0, λ + η (ℓ_r − ε)) after its warm-up; its state goes on in another object."""
    objective, dual, data = o.PDU(2.0, dual_step=0.5, dual_warmup=1), 1.0, random_data(3, 5, 7)
    for epoch, retain in ((0, 9.0), (1, 3.0), (1, 2.5), (2, 0.1), (2, -5.0), (3, 2.2)):
        losses = objective(streams(data))
        torch.testing.assert_close(
            losses["loss"], losses["forget_loss"] + dual * losses["retain_loss"]
        )
        assert losses["dual"].item() == pytest.approx(dual)
        objective.after_step({"retain_loss": retain}, epoch)
        dual = dual if epoch < 1 else max(0.0, dual + 0.5 * (retain - 2.0))
    other = o.PDU(2.0)
    other.load_state_dict(objective.state_dict())
    assert other.dual == objective.dual == pytest.approx(dual)


def test_random_labels_depend_on_seed_row_and_epoch_alone() -> None:
    data = random_data(4, 9, 50, seed=3)
    values = o.RandomLabel().forget_loss(streams(data))
    backwards = streams(pick(data, torch.arange(4).flip(0)))
    torch.testing.assert_close(o.RandomLabel().forget_loss(backwards).flip(0), values)
    later = streams(data)
    later.epoch += 1
    assert not torch.allclose(o.RandomLabel().forget_loss(later), values)
    assert not torch.allclose(o.RandomLabel(seed=1).forget_loss(streams(data)), values)


def test_rmu_steers_along_one_fixed_direction() -> None:
    control = o.RMU(steering=3.0).control(16)
    assert torch.equal(control, o.RMU(steering=3.0).control(16))
    assert control.norm().item() == pytest.approx(3.0)
    assert (control >= 0).all()
    assert not torch.allclose(control, o.RMU(steering=3.0, seed=1).control(16))


def test_wga_and_npo_tend_to_gradient_ascent() -> None:
    """β → 0: WGA's weights become 1, and NPO's gradient that of the summed log-probability."""
    data, inputs = leaves(random_data(3, 6, 11, seed=5), torch.float32)
    at = streams(data)
    wga, ascent = o.WGA(1e-7).forget_loss(at), o.GradDiff().forget_loss(at)
    torch.testing.assert_close(wga, ascent, rtol=1e-5, atol=1e-6)
    npo = torch.autograd.grad(o.NPO(1e-6).forget_loss(at).sum(), inputs[0], retain_graph=True)[0]
    ascent = torch.autograd.grad(at["forget"].logprob.sum(), inputs[0])[0]
    torch.testing.assert_close(npo, ascent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sizes", "moved"),
    [
        ("Mistral", {"num_hidden_layers": 4}, "model.layers.{}.mlp.down_proj.weight"),
        ("GPT2", {"n_layer": 4}, "transformer.h.{}.mlp.c_proj"),
        ("GPTJ", {"n_layer": 4}, "transformer.h.{}.mlp.fc_out"),
        ("GPTNeoX", {"num_hidden_layers": 4}, "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
        ("OPT", {"num_hidden_layers": 4}, "model.decoder.layers.{}.fc2"),
        ("Mpt", {"n_layers": 4}, "transformer.blocks.{}.ffn.down_proj"),
        ("Falcon", {"num_hidden_layers": 4}, "transformer.h.{}.mlp.dense_4h_to_h"),
        ("Mixtral", {"num_hidden_layers": 4}, "model.layers.{}.mlp.experts.down_proj"),
        (
            "Qwen2Moe",
            {"num_hidden_layers": 4},
            "model.layers.{0}.mlp.experts.down_proj model.layers.{0}.mlp.shared_expert.down_proj",
        ),
    ],
)
def test_rmu_finds_the_down_projections(kind: str, sizes: dict[str, int], moved: str) -> None:
    """Of blocks 1 to 3 and of no other, by the names that models have for them."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes))
    objective = RMU(layer=3)
    objective.prepare(lm)
    found = [name for name, _ in lm.named_parameters() if re.search(objective.trainable, name)]
    starts = tuple(start for block in (1, 2, 3) for start in moved.format(block).split())
    assert all(name.startswith(starts) for name in found)
    assert all(any(name.startswith(start) for name in found) for start in starts)


# -- weights, options ------------------------------------------------------------------------------


def test_schedules() -> None:
    ramp, cosine = as_schedule("linear:0->2", "w"), as_schedule("cosine:1->0@0.5", "w")
    step = as_schedule("step: 1 -> 0.25 @ 0.5", "w")
    assert [ramp(p) for p in (0, 0.25, 1)] == [0, 0.5, 2]
    assert [round(cosine(p), 6) for p in (0, 0.25, 0.5, 1)] == [1, 0.5, 0, 0]
    assert [step(p) for p in (0, 0.49, 0.5, 1)] == [1, 1, 0.25, 0.25]
    assert as_schedule(3, "w")(0.7) == as_schedule("3", "w")(0.0) == 3
    assert vars(as_schedule("linear:-1->1e-3@0.1", "w")) == vars(Schedule("linear", -1, 1e-3, 0.1))


@pytest.mark.parametrize(
    "text", ["linear", "linear:0", "line:0->1", "linear:a->1", "nan", "step:1->0@x", "x"]
)
def test_schedules_that_mean_nothing(text: str) -> None:
    message = r"objective.retain_weight: .* is neither a number nor a schedule"
    with pytest.raises(WagleError, match=message):
        o.NPO(retain_weight=text)
    with pytest.raises(WagleError, match="share of the run"):
        Schedule("linear", 0, 1, until=0)


def test_weights_follow_the_run() -> None:
    objective = o.GradDiff(forget_weight="linear:0->1", retain_weight="cosine:1->0.5")
    for progress, forget, retain in ((0.0, 0.0, 1.0), (0.5, 0.5, 0.75), (1.0, 1.0, 0.5)):
        losses = objective(streams(random_data(3, 5, 7), progress))
        expected = forget * losses["forget_loss"] + retain * losses["retain_loss"]
        torch.testing.assert_close(losses["loss"], expected)


def test_terms_say_what_they_need() -> None:
    assert o.NPO().streams == ("forget", "retain") and o.NPO().references == ("forget",)
    assert o.NPO(retain="none").streams == o.NPO(retain_weight=0).streams == ("forget",)
    assert o.NPO(retain="kl").needs_theta0 and o.KL().needs_theta0 and not o.NPO().needs_theta0
    assert o.DPO().streams == ("forget", "refusal", "retain")
    assert o.DPO().references == ("forget", "refusal")
    assert o.FineTune().streams == ("retain",)
    assert o.RMU(layer=5).hidden_layers == (5,) and not o.RMU(retain="nll").needs_theta0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: o.NPO(beta=0), "objective.beta: must be above 0, got 0"),
        (lambda: o.SimNPO(beta=-1), "objective.beta: must be above 0, got -1"),
        (lambda: o.DPO(beta=math.nan), "objective.beta: must be a number, got nan"),
        (lambda: o.SatImp(beta2=0), "objective.beta2: must be above 0"),
        (lambda: o.UNDIAL(beta=0), "objective.beta: must be above 0"),
        (lambda: o.RMU(steering=0), "objective.steering: must be above 0"),
        (lambda: o.RMU(trainable="("), "not a regular expression"),
        (lambda: o.CEU(skip_first=-1), "objective.skip_first: must be 0 or more"),
        (lambda: o.PDU(0.0), "objective.epsilon: must be above 0, got 0"),
        (
            lambda: o.PDU(1.0, retain="none"),
            "objective.retain_weight: the dual weight begins there",
        ),
        (lambda: o.PDU(1.0, retain_weight="linear:0->1"), "give a number above 0"),
        (lambda: o.FineTune(retain="none"), "neither a forget nor a retain term"),
        (
            lambda: o.NPO(retain="klx"),
            "objective.retain: unknown name 'klx'; choose one of HiddenMSE, KL",
        ),
    ],
)
def test_options_that_mean_nothing(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(WagleError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(("base", "method"), [(Objective, "forget_loss"), (RetainTerm, "__call__")])
def test_the_one_method_cannot_be_forgotten(base: type, method: str) -> None:
    with pytest.raises(TypeError, match=method):
        type("Forgetful", (base,), {})()


# -- batches ---------------------------------------------------------------------------------------


def test_a_batch_is_freed_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        at = streams(random_data(2, 4, 5))
        logits = weakref.ref(at["forget"].predicted.states)
        del at
        assert logits() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["KL", "UNDIAL", "CEU", "PDU", "retain kl"])
def test_tokens_that_cannot_be_change_nothing(name: str) -> None:
    """A vocabulary padded with logits of -inf gives the loss and the gradient of it without."""
    objective = o.GradDiff(retain="kl") if name == "retain kl" else CASES[name][0]
    stream = "retain" if name == "retain kl" else "forget"
    term = objective.retain_loss if name == "retain kl" else objective.forget_loss

    def loss(padding: int) -> tuple[Tensor, Tensor]:
        data = random_data(3, 6, 7, seed=4)
        for key in ("logits", "logits0"):
            whole = nn.functional.pad(data[stream][key], (0, padding), value=-math.inf)
            data[stream][key] = whole.requires_grad_(key == "logits")
        answers = streams(data)[stream]
        values = term({stream: answers})
        (gradient,) = torch.autograd.grad(values.sum(), data[stream]["logits"])
        return values.detach(), gradient[..., :7]

    for found, expected in zip(loss(4), loss(0), strict=True):
        torch.testing.assert_close(found, expected)
