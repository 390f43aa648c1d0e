"""Frozen means frozen: whatever the optimiser, mask, precision, clipping, accumulation and resume point."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wagle_pl.masks import WeightMask
from wagle_pl.unlearning import UnlearnModule
from wagle_pl.unlearning.frozen import FrozenWeights
from wagle_pl.unlearning.optim import MaskedAdamW, Sophia
from wagle_pl.utilities import WagleError

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")

OPTIMIZERS: dict[str, Any] = {
    "MaskedAdamW": lambda p, decay: MaskedAdamW(p, lr=0.03, weight_decay=decay),
    "Sophia": lambda p, decay: Sophia(p, lr=0.03, weight_decay=decay, interval=2),
    "AdamW": lambda p, decay: torch.optim.AdamW(p, lr=0.03, weight_decay=decay),
    "AdamW maximize": lambda p, decay: torch.optim.AdamW(p, lr=0.03, weight_decay=decay, maximize=True, amsgrad=True),
    "Adam": lambda p, decay: torch.optim.Adam(p, lr=0.03, weight_decay=decay),
    "SGD": lambda p, decay: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=decay),
    "SGD maximize": lambda p, decay: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=decay, maximize=True),
    "RMSprop": lambda p, decay: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=decay),
    "RMSprop eps": lambda p, decay: torch.optim.RMSprop(p, lr=0.01, eps=0.0, weight_decay=decay),
    "Adagrad": lambda p, decay: torch.optim.Adagrad(p, lr=0.1, weight_decay=decay),
    "Adadelta": lambda p, decay: torch.optim.Adadelta(p, lr=1.0, weight_decay=decay),
    "NAdam": lambda p, decay: torch.optim.NAdam(p, lr=0.03, weight_decay=decay),
    "RAdam": lambda p, decay: torch.optim.RAdam(p, lr=0.03, weight_decay=decay),
    "Adamax": lambda p, decay: torch.optim.Adamax(p, lr=0.03, weight_decay=decay),
    "ASGD": lambda p, decay: torch.optim.ASGD(p, lr=0.1, lambd=0.1, weight_decay=decay),
    "Rprop": lambda p, decay: torch.optim.Rprop(p, lr=0.01),
}
for name in ("Adafactor", "Muon"):  # torch has them since 2.5 and 2.9
    if hasattr(torch.optim, name):
        OPTIMIZERS[name] = lambda p, decay, name=name: getattr(torch.optim, name)(p, lr=0.03, weight_decay=decay)


class Stack(nn.Module):
    """A random model of matrices (all Muon takes), with one used twice and a tenth of the weights −0."""

    def __init__(self, widths: list[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [*pairwise(widths), (widths[-1], widths[-1])]
        self.weights = nn.ParameterList()
        for shape in shapes:
            drawn = torch.randn(shape, generator=generator) / shape[0] ** 0.5
            self.weights.append(nn.Parameter(torch.where(torch.rand(shape, generator=generator) < 0.1, -0.0, drawn)))

    def forward(self, x: Tensor) -> Tensor:
        for weight in (*self.weights, self.weights[-1]):
            x = torch.tanh(x @ weight)
        return x


class Unlearn(UnlearnModule):
    """Everything of ``UnlearnModule`` that bears on the guarantee, on a model without tokens."""

    def __init__(self, stack: Stack, mask: WeightMask, **kwargs: Any) -> None:
        super().__init__(model="none", output="none", objective="GradDiff", **kwargs)
        self.stack, self.given_mask = stack, mask

    def setup(self, stage: str) -> None:
        """Nothing is written."""

    def configure_model(self) -> None:
        if self.lm is None:
            self.lm = self.stack
            self.lm.requires_grad_(True)
            self._restrict()

    def _find_mask(self) -> WeightMask:
        return self.given_mask

    def on_fit_start(self) -> None:
        """No references."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.lm(batch) - batch[:, :1]).float().pow(2).mean()

    def export(self, record: dict[str, Any]) -> None:
        self.written = self._verified

    def record(self) -> dict[str, Any]:
        return {}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def random_mask(stack: Stack, density: float, seed: int) -> WeightMask:
    """Each weight selected with probability ``density``, and one weight for sure."""
    generator = torch.Generator().manual_seed(seed)
    bools = {n: torch.rand(p.shape, generator=generator) < density for n, p in stack.named_parameters()}
    bools[list(bools)[seed % len(bools)]].view(-1)[0] = True
    return WeightMask.from_bools(bools)


def fit(module: Unlearn, folder: Path, steps: int, resume: str | None = None, **options: Any) -> L.Trainer:
    generator = torch.Generator().manual_seed(0)
    width = module.stack.weights[0].shape[0]
    dtype = torch.bfloat16 if options.get("precision") == "bf16-true" else torch.float32
    data = torch.randn(24, width, generator=generator).to(dtype)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    callback = L.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=99, logger=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=resume, weights_only=False if resume else None)
    return trainer


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    widths=st.lists(st.integers(3, 9), min_size=2, max_size=4),
    density=st.sampled_from([0.001, 0.05, 0.3, 0.5, 0.51, 0.8, 0.99, 1.0]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    decay=st.sampled_from([0.0, 0.3]),
    clip=st.sampled_from([None, ("norm", 0.01), ("value", 0.001)]),
    clip_scope=st.sampled_from(["selected", "all"]),
    accumulate=st.sampled_from([1, 2, 3]),
    precision=st.sampled_from(["32-true", "bf16-mixed", "bf16-true"]),
    resume_at=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 99),
)
def test_frozen_weights_keep_their_bits(
    tmp_path_factory, widths, density, optimizer, decay, clip, clip_scope, accumulate, precision, resume_at, seed
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "precision": precision}
    if clip:
        options |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    folder = tmp_path_factory.mktemp("fit")

    def module() -> tuple[Unlearn, dict[str, Tensor]]:
        stack = Stack(widths, seed).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
        made = Unlearn(stack, random_mask(stack, density, seed), clip_scope=clip_scope, verify="step")
        made.make_optimizer = lambda p: OPTIMIZERS[optimizer](p, decay)
        return made, {n: bits(p) for n, p in stack.named_parameters()}

    unlearn, start = module()
    fit(unlearn, folder, resume_at or 4, **options)
    if resume_at:
        (checkpoint,) = folder.glob(f"step={resume_at}*.ckpt")
        unlearn, start = module()
        fit(unlearn, folder, 4, resume=str(checkpoint), **options)
    moved = 0
    for name, parameter in unlearn.lm.named_parameters():
        selected = unlearn.given_mask[name]
        assert torch.equal(bits(parameter)[~selected], start[name][~selected])
        moved += int((bits(parameter) != start[name]).sum())
    frozen = unlearn.given_mask.total - unlearn.given_mask.count()
    assert unlearn.written == f"{frozen:,} frozen weights are bit-identical to the base model's"
    if density > 0.3 and optimizer == "MaskedAdamW" and precision != "bf16-true":
        assert moved > 0  # the property is not an empty one


def test_every_optimizer_moves_selected_weights_only(tmp_path: Path) -> None:
    for name, make in OPTIMIZERS.items():
        stack = Stack([6, 5], seed=1)
        start = {n: bits(p) for n, p in stack.named_parameters()}
        unlearn = Unlearn(stack, random_mask(stack, 0.4, 1), verify="step")
        unlearn.make_optimizer = lambda p, make=make: make(p, 0.2)
        fit(unlearn, tmp_path / name, 3)
        changed = {n: bits(p) != start[n] for n, p in stack.named_parameters()}
        assert any(c.any() for c in changed.values()), name
        assert not any((c & ~unlearn.given_mask[n]).any() for n, c in changed.items()), name


# -- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["selected", "all"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_clip_scope(tmp_path: Path, scope: str, accumulate: int) -> None:
    """The gradient that the optimiser sees, against clip(g) computed by hand."""
    stack, reference = Stack([7, 5, 4], seed=2), Stack([7, 5, 4], seed=2)
    mask = random_mask(stack, 0.3, 2)
    mask.packed("weights.1").zero_()  # one tensor without any selected weight counts in the norm of all
    unlearn = Unlearn(stack, mask, clip_scope=scope)
    seen: dict[str, Tensor] = {}

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            seen.update({n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                         for n, p in stack.named_parameters()})  # fmt: skip
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
        torch.testing.assert_close(seen[name], gradient * 0.01 / (norm + 1e-6))


# -- verification -----------------------------------------------------------------------------------------------------


class Cheat(torch.optim.SGD):
    """Claims to be harmless, and after the second step flips the sign of a zero of a frozen weight."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 2:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.view(-1)[-1] *= -1
        return loss


@pytest.mark.parametrize(("verify", "step"), [("end", 4), ("step", 2)])
def test_a_violation_is_an_error_that_names_the_parameter(tmp_path: Path, monkeypatch, verify: str, step: int) -> None:
    stack = Stack([5, 4], seed=3)
    with torch.no_grad():
        stack.weights[0].view(-1)[-1] = 0.0
    bools = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in stack.named_parameters()}
    bools["weights.0"][0, 0] = True
    unlearn = Unlearn(stack, WeightMask.from_bools(bools), verify=verify)
    unlearn.make_optimizer = lambda p: Cheat(p, lr=0.1)
    monkeypatch.setattr("wagle_pl.unlearning.optim._stays_still", lambda optimizer: True)
    with pytest.raises(WagleError, match=rf"frozen weights of weights\.0 moved by step {step}"):
        fit(unlearn, tmp_path, 4)
    assert not hasattr(unlearn, "written")


def test_verify_off_does_not_look(tmp_path: Path, monkeypatch) -> None:
    stack = Stack([5, 4], seed=3)
    unlearn = Unlearn(stack, random_mask(stack, 0.2, 0), verify="off")
    unlearn.make_optimizer = lambda p: Cheat(p, lr=0.1)
    monkeypatch.setattr("wagle_pl.unlearning.optim._stays_still", lambda optimizer: True)
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


def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path) -> None:
    stack = Stack([5, 4], seed=4)
    fit(Unlearn(stack, random_mask(stack, 0.5, 0)), tmp_path, 1)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    with pytest.raises(WagleError, match="another mask"):
        fit(Unlearn(stack, random_mask(stack, 0.5, 1)), tmp_path, 2, resume=str(checkpoint))
