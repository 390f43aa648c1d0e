"""Frozen means frozen: whatever the optimiser, mask, precision, clipping, accumulation and resume point."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from helpers import random_bools, trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wagle_pl.core.errors import Diverged, WagleError
from wagle_pl.masks import WeightMask
from wagle_pl.masks.selected import SUFFIX
from wagle_pl.objectives import Objective, Streams
from wagle_pl.unlearning import FinetuneModule, UnlearnModule
from wagle_pl.unlearning.checks import FiniteSteps, FrozenWeights
from wagle_pl.unlearning.optim import MaskedAdamW, SignSGD, Sophia

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")

#: Name -> class and options.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MaskedAdamW": (MaskedAdamW, {"lr": 0.03}),
    "Sophia": (Sophia, {"lr": 0.03, "interval": 2}),
    "SignSGD": (SignSGD, {"lr": 0.03, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.03}),
    "AdamW maximize": (torch.optim.AdamW, {"lr": 0.03, "maximize": True, "amsgrad": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.03}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "maximize": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "RMSprop eps": (torch.optim.RMSprop, {"lr": 0.01, "eps": 0.0}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.03}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.03}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.03}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.1}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.03}),
}


def make(name: str, parameters: Any, decay: float) -> torch.optim.Optimizer:
    cls, options = KINDS[name]
    return cls(parameters, **options, **({} if name == "Rprop" else {"weight_decay": decay}))


class Stack(nn.Module):
    """A random model of matrices (all Muon takes), with one used twice and a tenth of the weights −0."""

    def __init__(self, widths: list[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [*pairwise(widths), (widths[-1], widths[-1])]
        self.weights = nn.ParameterList()
        for shape in shapes:
            drawn = torch.randn(shape, generator=generator) / shape[0] ** 0.5
            self.weights.append(
                nn.Parameter(torch.where(torch.rand(shape, generator=generator) < 0.1, -0.0, drawn))
            )

    def forward(self, x: Tensor) -> Tensor:
        for weight in (*self.weights, self.weights[-1]):
            x = torch.tanh(x @ weight)
        return x


class Apart(Objective):
    """Forget rows leave their first number, retain rows approach it; rows are no tokens here."""

    def forget_loss(self, at: Streams) -> Tensor:
        return -self.distance(at, "forget")

    def retain_loss(self, at: Streams) -> Tensor:
        return 2 * self.distance(at, "retain")

    @staticmethod
    def distance(at: Streams, stream: str) -> Tensor:
        x = at.batch[stream]["x"]
        return (at.lm(x) - x[:, :1]).float().pow(2).mean(-1)


class OnStack:
    """A module with all its steps, on a model without tokens."""

    def __init__(self, stack: Stack, mask: WeightMask, **kwargs: Any) -> None:
        super().__init__(model="none", output="none", **kwargs)
        self.stack, self.given_mask = stack, mask

    def setup(self, stage: str) -> None:
        """Nothing is written."""

    def configure_model(self) -> None:
        if self.lm is None:
            self.lm, self.model_fingerprint = self.stack, "of the stack"
            self.mask = self.given_mask
            self.select_weights()

    def planned_files(self) -> list[Any]:
        """Nothing is written."""
        return []

    def export(self, record: dict[str, Any]) -> None:
        self.written = self._verified

    def record(self) -> dict[str, Any]:
        return {}


class Unlearn(OnStack, UnlearnModule):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, objective=Apart(), **kwargs)


class Finetune(OnStack, FinetuneModule):
    def streams_of(self, batch: Any) -> Streams:
        return Streams(batch, self.run_lm, {}, self.lm)

    def losses(self, at: Streams) -> dict[str, Tensor]:
        return {"loss": Apart.distance(at, "retain").mean()}


@pytest.fixture(autouse=True, scope="module")
def no_files() -> Iterator[None]:
    """A stack is loaded from no files, which could round its values."""
    finetune = "wagle_pl.unlearning.finetune"
    with patch(f"{finetune}.Originals"), patch(f"{finetune}.moves_kept", return_value=None):
        yield


def made(widths: list[int], seed: int, precision: str) -> Stack:
    return Stack(widths, seed).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)


def bits(tensor: Tensor) -> Tensor:
    words = torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32
    return tensor.detach().clone().view(words)


def start_of(stack: Stack) -> dict[str, Tensor]:
    return {name: bits(parameter) for name, parameter in stack.named_parameters()}


def check_moved(stack: Stack, start: dict[str, Tensor], mask: WeightMask) -> bool:
    """Whether a weight has moved; no frozen one has."""
    moved = {name: bits(parameter) != start[name] for name, parameter in stack.named_parameters()}
    assert not any((changed & ~mask[name]).any() for name, changed in moved.items())
    return any(changed.any() for changed in moved.values())


def random_mask(stack: Stack, density: float, seed: int) -> WeightMask:
    """Each weight selected with probability ``density``, and one weight for sure."""
    bools = random_bools({n: p.shape for n, p in stack.named_parameters()}, density, seed)
    bools[list(bools)[seed % len(bools)]].view(-1)[0] = True
    return WeightMask.from_bools(bools)


def unlearning(
    make_optimizer: Any, precision: str = "32-true", cls: type = Unlearn, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """A run on a stack of which four tenths are selected, and the bits that it starts with."""
    stack = made([6, 5], 1, precision)
    start, module = start_of(stack), cls(stack, random_mask(stack, 0.4, 1), **options)
    module.make_optimizer = make_optimizer
    return module, start


def batch_of(rows: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """The same rows to forget and to keep."""
    x = torch.stack(rows)
    labels, weight = torch.ones(len(x), 2, dtype=torch.int64), torch.full((len(x),), 1 / len(x))
    return {stream: {"x": x, "labels": labels, "weight": weight} for stream in ("forget", "retain")}


def fit(
    module: Unlearn, folder: Path, steps: int, resume: str | None = None, **options: Any
) -> L.Trainer:
    generator = torch.Generator().manual_seed(0)
    width = module.stack.weights[0].shape[0]
    dtype = torch.bfloat16 if options.get("precision") == "bf16-true" else torch.float32
    data = torch.randn(24, width, generator=generator).to(dtype)
    loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=batch_of)
    callback = L.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=options.pop("every", 1)
    )
    callbacks = [callback, *options.pop("callbacks", ())]
    given = {"max_epochs": 99, "enable_checkpointing": True, **options}
    made = trainer(max_steps=steps, callbacks=callbacks, **given)
    made.fit(module, loader, ckpt_path=resume, weights_only=False if resume else None)
    return made


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    widths=st.lists(st.integers(3, 9), min_size=2, max_size=4),
    density=st.sampled_from([0.001, 0.05, 0.3, 0.5, 0.51, 0.8, 0.99, 1.0]),
    optimizer=st.sampled_from(sorted(KINDS)),
    decay=st.sampled_from([0.0, 0.3]),
    clip=st.sampled_from([None, ("norm", 0.01), ("value", 0.001)]),
    clip_scope=st.sampled_from(["selected", "all"]),
    accumulate=st.sampled_from([1, 2, 3]),
    resume_at=st.sampled_from([None, 1, 2]),
    kind=st.sampled_from([Unlearn, Finetune]),
    seed=st.integers(0, 99),
)
def test_frozen_weights_keep_their_bits(
    tmp_path_factory,
    widths,
    density,
    optimizer,
    decay,
    clip,
    clip_scope,
    accumulate,
    precision,
    resume_at,
    kind,
    seed,
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "precision": precision}
    if clip:
        options |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    folder = tmp_path_factory.mktemp("fit")

    def module() -> tuple[OnStack, dict[str, Tensor]]:
        stack, how = made(widths, seed, precision), {"clip_scope": clip_scope}
        unlearn = kind(stack, random_mask(stack, density, seed), verify="step", **how)
        unlearn.make_optimizer = partial(make, optimizer, decay=decay)
        return unlearn, start_of(stack)

    unlearn, start = module()
    fit(unlearn, folder, resume_at or 4, **options)
    if resume_at:
        (checkpoint,) = folder.glob(f"step={resume_at}*.ckpt")
        unlearn, start = module()
        fit(unlearn, folder, 4, resume=str(checkpoint), **options)
    moved = check_moved(unlearn.lm, start, unlearn.given_mask)
    frozen = unlearn.given_mask.total - unlearn.given_mask.count()
    assert unlearn.written == f"{frozen:,} frozen weights are bit-identical to the base model's"
    if density > 0.3 and optimizer == "MaskedAdamW" and precision != "bf16-true":
        assert moved  # the property is not an empty one


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_optimizer_moves_selected_weights_only(tmp_path: Path, precision: str) -> None:
    for name in KINDS:
        unlearn, start = unlearning(partial(make, name, decay=0.2), precision, verify="step")
        fit(unlearn, tmp_path / name, 3, precision=precision)
        assert check_moved(unlearn.lm, start, unlearn.given_mask), name


class OfOld(torch.optim.Optimizer):
    """Changes ``.data``, which torch's version counters do not see; with decay and noise."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.9).add_(parameter.grad.data, alpha=-0.1)
                parameter.data.add_(torch.randn_like(parameter.data), alpha=1e-3)
        return loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_optimizer_of_ones_own(tmp_path: Path, precision: str) -> None:
    """What it did is seen by the next forward pass, and frozen weights keep their bits."""
    (unlearn, start), seen = unlearning(OfOld, precision, verify="step"), []

    def loss(batch: Any, batch_idx: int) -> Tensor:
        weights = [(n, t.parameter, t.values) for n, t in unlearn.selected.tensors.items()]
        value = Unlearn.training_step(unlearn, batch, batch_idx)
        seen.append(all(torch.equal(p[unlearn.mask[n]], v.to(p.dtype)) for n, p, v in weights))
        return value

    unlearn.training_step = loss
    fit(unlearn, tmp_path, 3, precision=precision)
    assert seen == [True] * 3
    assert check_moved(unlearn.lm, start, unlearn.given_mask)


def averaged(
    tmp_path: Path, callback: Any, precision: str, steps: int = 5, **options: Any
) -> tuple[Unlearn, dict[str, list[Tensor]]]:
    """A run with an averaging callback; what it ends with, and the values after each step."""
    sgd, values = partial(torch.optim.SGD, lr=0.3, weight_decay=0.1), {}
    unlearn, start = unlearning(sgd, precision, verify="step")

    class Note(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            for name, tensor in unlearn.selected.tensors.items():
                if tensor.values is not None:
                    values.setdefault(name, []).append(tensor.values.detach().clone())

    fit(unlearn, tmp_path, steps, precision=precision, callbacks=[Note(), callback], **options)
    assert check_moved(unlearn.lm, start, unlearn.given_mask)
    return unlearn, values


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_exponential_moving_average(tmp_path: Path, precision: str, use_buffers: bool) -> None:
    """0.9x + 0.1x is not x in fp32: averages of frozen weights would move them."""
    callback = L.pytorch.callbacks.EMAWeightAveraging(decay=0.9, use_buffers=use_buffers)
    unlearn, values = averaged(tmp_path, callback, precision)
    for name, steps in values.items():
        average = steps[0]
        for step in steps[1:]:
            average = 0.9 * average + 0.1 * step
        written = dict(unlearn.lm.named_parameters())[name][unlearn.given_mask[name]]
        torch.testing.assert_close(
            written.float(), average.to(written.dtype).float(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_stochastic_weight_averaging_averages(tmp_path: Path, precision: str) -> None:
    callback = L.pytorch.callbacks.StochasticWeightAveraging(
        swa_lrs=0.3, swa_epoch_start=1, annealing_epochs=1
    )
    unlearn, values = averaged(tmp_path, callback, precision, steps=-1, max_epochs=3)
    last = {name: steps[-1] for name, steps in values.items()}
    for name, value in last.items():
        written = dict(unlearn.lm.named_parameters())[name][unlearn.given_mask[name]]
        assert not torch.equal(written, value.to(written.dtype))  # not the last step's


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (torch.optim.Muon, r"optimizer: Muon .*\(with a mask, parameters are vectors"),
        (torch.optim.LBFGS, "optimizer: LBFGS evaluates the loss several times"),
        (torch.optim.SparseAdam, "optimizer: SparseAdam takes sparse gradients alone"),
    ],
)
def test_optimizers_that_are_refused(tmp_path: Path, cls: Any, message: str) -> None:
    with pytest.raises(WagleError, match=message):
        fit(unlearning(partial(cls, lr=0.1))[0], tmp_path, 1)


# -- what is not finite -----------------------------------------------------------------------------------------------


class Spoilt(Unlearn):
    """Its gradient is NaN in the third micro-batch, its loss is not."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        parameter = next(self.lm.parameters())
        zero = (parameter - parameter.detach()).sum()
        # d√x/dx at 0 is infinite, and times 0 is NaN
        return loss + (zero.abs().sqrt() if batch_idx == 2 else 0.0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(
    tmp_path: Path, precision: str
) -> None:
    unlearn, _ = unlearning(partial(torch.optim.AdamW, lr=0.1), precision, Spoilt)
    with pytest.raises(
        WagleError, match=r"gradient of weights\.0 is not finite at step 2, though the loss"
    ):
        fit(unlearn, tmp_path, 4, precision=precision)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]
    assert all(p.isfinite().all() for p in unlearn.lm.parameters()) and not hasattr(
        unlearn, "written"
    )


@pytest.mark.parametrize(("steps", "every"), [(4, 1), (4, 9), (3, 9)])
def test_on_a_gpu_it_stops_the_run_a_step_late_and_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, every: int
) -> None:
    """Before the next checkpoint, step or end, whichever comes first."""
    monkeypatch.setattr(FiniteSteps, "waits", staticmethod(lambda device: False))
    unlearn, _ = unlearning(partial(torch.optim.AdamW, lr=0.1), cls=Spoilt)
    with pytest.raises(Diverged, match=r"gradient of weights\.0 is not finite at step 2, though"):
        fit(unlearn, tmp_path, steps, every=every)
    written = [f"step={step}.ckpt" for step in (1, 2) if every == 1]
    assert sorted(path.name for path in tmp_path.glob("*")) == written
    assert unlearn.global_step == 3 and not hasattr(unlearn, "written")


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    """An optimiser makes them of a gradient that is finite."""

    class Overflowing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"] = float("inf")
            return super().step(closure)

    unlearn, _ = unlearning(partial(Overflowing, lr=1.0))
    with pytest.raises(
        WagleError, match=r"weights\.\d_selected are not finite at step 1: they are not written"
    ):
        fit(unlearn, tmp_path, 4)
    assert not list(tmp_path.iterdir()) and not hasattr(unlearn, "written")


# -- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["selected", "all"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_clip_scope(tmp_path: Path, scope: str, accumulate: int) -> None:
    """The gradient that the optimiser sees, against clip(g) computed by hand."""
    stack, reference = Stack([7, 5, 4], seed=2), Stack([7, 5, 4], seed=2)
    mask = random_mask(stack, 0.3, 2)
    mask.packed("weights.1").zero_()  # a tensor without selected weights counts in the norm of all
    unlearn = Unlearn(stack, mask, clip_scope=scope)
    seen: dict[str, Tensor] = {}

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for name, parameter in unlearn.lm.named_parameters():
                of = name.removesuffix(SUFFIX)
                seen[of] = torch.zeros(mask.shapes[of]).masked_scatter(mask[of], parameter.grad)
            return loss

    unlearn.make_optimizer = lambda p: Spy(p, lr=0.1)
    fit(unlearn, tmp_path, 1, gradient_clip_val=0.01, accumulate_grad_batches=accumulate)
    data = torch.randn(24, 7, generator=torch.Generator().manual_seed(0))
    for batch in data.split(4)[:accumulate]:
        ((reference(batch) - batch[:, :1]).pow(2).mean() / accumulate).backward()
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    masked = {n: g * mask[n] for n, g in gradients.items()}
    counted = gradients if scope == "all" else masked
    norm = torch.stack([g.pow(2).sum() for g in counted.values()]).sum().sqrt()
    assert norm > 0.01
    for name, gradient in masked.items():
        torch.testing.assert_close(
            seen.get(name, torch.zeros_like(gradient)), gradient * 0.01 / (norm + 1e-6)
        )


def test_without_a_bound_no_dense_gradient_is_kept(tmp_path: Path) -> None:
    unlearn, _ = unlearning(lambda p: torch.optim.SGD(p, lr=0.1), clip_scope="all")

    class Look(L.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            assert all(t.dense_gradient is None for t in unlearn.selected.tensors.values())

    fit(unlearn, tmp_path, 3, callbacks=[Look()])


# -- verification -----------------------------------------------------------------------------------------------------


def cheat(unlearn: Unlearn) -> Any:
    """An optimiser whose second step flips the sign of a zero of a frozen weight, which it takes from the model."""

    class Cheat(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 2:
                unlearn.selected.tensors["weights.0"].parameter.data.view(-1)[-1] *= -1
            return loss

    return lambda p: Cheat(p, lr=0.1)


@pytest.mark.parametrize(("verify", "step"), [("end", 4), ("step", 2)])
def test_a_violation_is_an_error_that_names_the_parameter(
    tmp_path: Path, verify: str, step: int
) -> None:
    stack = Stack([5, 4], seed=3)
    with torch.no_grad():
        stack.weights[0].view(-1)[-1] = 0.0
    bools = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in stack.named_parameters()}
    bools["weights.0"][0, 0] = True
    unlearn = Unlearn(stack, WeightMask.from_bools(bools), verify=verify)
    unlearn.make_optimizer = cheat(unlearn)
    with pytest.raises(WagleError, match=rf"frozen weights of weights\.0 moved by step {step}"):
        fit(unlearn, tmp_path, 4)
    assert not hasattr(unlearn, "written")


def test_verify_off_does_not_look(tmp_path: Path) -> None:
    stack = Stack([5, 4], seed=3)
    unlearn = Unlearn(stack, random_mask(stack, 0.2, 0), verify="off")
    unlearn.make_optimizer = cheat(unlearn)
    fit(unlearn, tmp_path, 3)
    assert unlearn.written is None


def test_digests_see_every_frozen_bit() -> None:
    parameters = {
        "matrix": nn.Parameter(torch.randn(5, 3)),
        "half": nn.Parameter(torch.randn(4).bfloat16()),
        "scalar": nn.Parameter(torch.tensor(0.0)),
    }
    bools = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in parameters.items()}
    bools["matrix"][0] = True
    frozen = FrozenWeights(WeightMask.from_bools(bools), parameters.items())
    parameters["matrix"].data[0] = 9
    assert frozen.check(parameters.items(), 0).startswith("17 frozen")
    for name, words in (("matrix", torch.int32), ("half", torch.int16), ("scalar", torch.int32)):
        word = parameters[name].data.reshape(-1).view(words)
        word[-1] ^= 1
        with pytest.raises(WagleError, match=name):
            frozen.check(parameters.items(), 0)
        word[-1] ^= 1


@pytest.mark.parametrize("kind", [Unlearn, Finetune])
def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path, kind: Any) -> None:
    stack = Stack([5, 4], seed=4)
    fit(kind(stack, random_mask(stack, 0.5, 0)), tmp_path, 1)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    with pytest.raises(WagleError, match="another mask"):
        fit(kind(stack, random_mask(stack, 0.5, 1)), tmp_path, 2, resume=str(checkpoint))
