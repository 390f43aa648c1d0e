"""What a training step costs beside its mathematics."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import random_bools, trainer, write_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from wagle_pl import WagleError
from wagle_pl.core.weights import weights_digest
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.lm.inference import answer_places, forward_answers, pack, sequence_logprobs
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.saving import read_record
from wagle_pl.masks import WeightMask
from wagle_pl.objectives import GradDiff, Streams
from wagle_pl.objectives.forget import L1Sparse
from wagle_pl.unlearning import FinetuneModule, UnlearnModule
from wagle_pl.unlearning.step_rules import Step, StepRule


def run(
    module: FinetuneModule, rows: dict[str, str], *callbacks: L.Callback, **options: Any
) -> dict[str, Tensor]:
    """Three steps of three rows each; the weights then."""
    data = ForgetRetainDataModule(forget=rows["forget"], retain=rows["retain"], batch_size=3)
    trainer(max_steps=3, callbacks=list(callbacks), **options).fit(module, datamodule=data)
    return dict(module.lm.state_dict())


@pytest.fixture
def mask(tiny_model: str, tmp_path: Path) -> str:
    """File of a mask that selects about a third of every tensor."""
    parameters = dict(load_model(tiny_model).named_parameters())
    bools = random_bools({name: p.shape for name, p in parameters.items()})
    made_by = {"model": tiny_model, "model_fingerprint": weights_digest(parameters.items())}
    return str(WeightMask.from_bools(bools, made_by).save(tmp_path / "mask.safetensors"))


@pytest.mark.slow  # seconds of tracing; with AOTAutograd five times as many
def test_compiled_blocks_take_the_same_steps(
    tiny_model: str, rows: dict[str, str], mask: str, monkeypatch: Any
) -> None:
    """With a mask; all blocks share a program, which nothing breaks."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counters.clear()
    plain, compiled = (
        run(
            UnlearnModule(tiny_model, objective="GradDiff", mask=mask, compile=compile),
            rows,
            precision="bf16-mixed",
        )
        for compile in (False, True)
    )
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-6) for name in plain)
    assert 1 <= counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


# -- a penalty ----------------------------------------------------------------------------------------


class Logged(L.Callback):
    """A value that each step logs."""

    def __init__(self, name: str) -> None:
        self.name, self.values = name, []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics[self.name]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_penalty_sums_the_weights_that_may_move(
    masked: bool, precision: str, tiny_model: str, rows: dict[str, str], mask: str
) -> None:
    """Against a sum in fp64 over a model that is loaded anew; one step moves each by lr α sign θ."""
    lm = load_model(tiny_model, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    given = {"mask": mask} if masked else {}
    bits = WeightMask.load(mask) if masked else None
    start = {
        name: (p if bits is None else p[bits[name]]).detach().double().view(-1)
        for name, p in lm.named_parameters()
    }
    alpha, penalty = 1e3, Logged("train/penalty")
    module = UnlearnModule(
        tiny_model, objective=L1Sparse(alpha=alpha), warmup=0, decay="constant", **given
    )
    module.make_optimizer = partial(torch.optim.SGD, lr=1e-6)
    run(module, rows, penalty, precision=precision)
    norm = sum(float(values.abs().sum()) for values in start.values())
    assert penalty.values[0] == pytest.approx(alpha * norm, rel=1e-5)
    stepped = sum(float((v - 1e-3 * v.sign()).abs().sum()) for v in start.values())
    assert penalty.values[1] == pytest.approx(alpha * stepped, rel=1e-3)


# -- tensors that transformers keeps in fp32 ----------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_what_transformers_keeps_in_fp32_moves_under_bf16(
    given: bool, tiny_model: str, rows: dict[str, str], tmp_path: Path
) -> None:
    """Steps far below bf16's precision; a router of experts, and the positions of RoPE."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    folder = write_model(
        "Ernie4_5_Moe", tmp_path / "ernie", load_tokenizer(tiny_model), **sizes, use_bias=False
    )
    lm = load_model(folder, torch.bfloat16)
    start = {n: p.detach().clone() for n, p in lm.named_parameters() if p.dtype == torch.float32}
    assert start and lm.model.rotary_emb.inv_freq.dtype == torch.float32
    kept = {}

    class Dtypes(L.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            kept.update({name: p.dtype for name, p in module.lm.named_parameters()})
            kept["inv_freq"] = module.lm.model.rotary_emb.inv_freq.dtype
            counters = {int(of["step"]) for of in trainer.optimizers[0].state.values()}
            assert counters == {trainer.global_step}  # each tensor is stepped once

    module = FinetuneModule(load_model(folder) if given else folder, lr=1e-5, warmup=0)
    run(module, rows, Dtypes(), precision="bf16-true")
    assert all(kept[name] == torch.float32 for name in [*start, "inv_freq"])
    ended = dict(module.lm.named_parameters())
    for name, before in start.items():
        if name.endswith("gate.weight"):
            assert (ended[name] != before).float().mean() > 0.9, name


# -- one graph at a time ------------------------------------------------------------------------------


class Unchanged(StepRule):
    """The gradient of the objective."""

    def gradient(self, step: Step) -> dict[str, Tensor]:
        return step.total()


class Kept(L.Callback):
    """The most bytes of activations that graphs keep at once."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def setup(self, *_: Any, **__: Any) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box[0])
        self.hooks = hooks.__enter__() or hooks

    def teardown(self, *_: Any, **__: Any) -> None:
        self.hooks.__exit__(None, None, None)

    def pack(self, tensor: Tensor) -> Any:
        class Box(list):
            __hash__ = object.__hash__

        box, size = Box([tensor.detach()]), 0 if tensor.is_leaf else tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(box, lambda: setattr(self, "now", self.now - size))
        return box


@pytest.mark.parametrize(
    ("precision", "accumulate"), [("bf16-true", 2), ("bf16-mixed", 1), ("32-true", 1)]
)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("objective", ["NPO", "KL"])
def test_a_term_at_a_time_takes_the_same_steps(
    objective: str,
    masked: bool,
    precision: str,
    accumulate: int,
    tiny_model: str,
    rows: dict[str, str],
    mask: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the activations of one stream at a time; sums over a tied tensor have another order."""
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    weights, peaks = [], []
    for by_term in (True, False):
        if not by_term:
            monkeypatch.setattr(UnlearnModule, "_by_term", ())
        given = {"mask": mask} if masked else {}
        module, kept = UnlearnModule(tiny_model, objective=objective, **given), Kept()
        weights.append(run(module, rows, kept, gradient_clip_val=1.0, **options))
        peaks.append(kept.peak)
    assert all(torch.allclose(weights[0][n], w, atol=2e-6) for n, w in weights[1].items())
    assert peaks[0] < 0.75 * peaks[1]  # retain rows are longer


# -- overrides ----------------------------------------------------------------------------------------


class Anew(GradDiff):
    """Computes its loss without the base class."""

    def __call__(self, at: Streams) -> dict[str, Tensor]:
        forget, retain = (at.mean(stream, at[stream].nll) for stream in ("forget", "retain"))
        return {"loss": 2 * retain - 3 * forget}


class OnTop(GradDiff):
    """Changes what the base class computes; reads streams before and after it does."""

    def __call__(self, at: Streams) -> dict[str, Tensor]:
        before = at.mean("retain", at["retain"].nll)
        losses = super().__call__(at)
        after = at.mean("forget", at["forget"].nll)
        loss = losses["loss"] ** 2 + 2 * losses["retain_loss"] + 3 * before - after
        return {**losses, "loss": loss}


class OwnLosses(UnlearnModule):
    def losses(self, at: Streams) -> dict[str, Tensor]:
        losses = super().losses(at)
        return {**losses, "loss": 2 * losses["loss"] - losses["retain_loss"]}


class OwnStep(UnlearnModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return 3 * loss + sum(p.sum() for p in self.lm.parameters() if p.requires_grad)


class OwnStreams(UnlearnModule):
    def streams_of(self, batch: Any) -> Streams:
        return super().streams_of({**batch, "retain": batch["forget"]})


#: Module, objective, and the loss as a function of the two likelihoods and of the sum of weights.
OVERRIDES = {
    "objective anew": (UnlearnModule, Anew(), lambda f, r, _: 2 * r - 3 * f),
    "objective on top": (
        UnlearnModule,
        OnTop(retain_weight=0.5),
        lambda f, r, _: (0.5 * r - f) ** 2 + 2 * r + 3 * r - f,
    ),
    "losses": (OwnLosses, GradDiff(), lambda f, r, _: r - 2 * f),
    "training_step": (OwnStep, GradDiff(), lambda f, r, total: 3 * (r - f) + total),
    "streams_of": (OwnStreams, GradDiff(retain_weight=3), lambda f, r, _: 2 * f),
    "a schedule from 0": (UnlearnModule, GradDiff(forget_weight=0), lambda f, r, _: r),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("rule", [None, Unchanged()])
@pytest.mark.parametrize("case", OVERRIDES)
def test_an_override_is_what_is_minimised(
    case: str,
    rule: Any,
    accumulate: int,
    masked: bool,
    tiny_model: str,
    rows: dict[str, str],
    mask: str,
) -> None:
    """Two steps of SGD against a loop of autograd on the loss that the override returns."""
    cls, objective, loss_of = OVERRIDES[case]
    bits = WeightMask.load(mask) if masked else None
    batches = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            batches.append(batch)

    given = {"mask": mask} if masked else {}
    module = cls(
        tiny_model, objective=objective, step_rule=rule, warmup=0, decay="constant", **given
    )
    module.make_optimizer = partial(torch.optim.SGD, lr=0.01)
    data = ForgetRetainDataModule(forget=rows["forget"], retain=rows["retain"], batch_size=3)
    options = {"max_steps": 2, "accumulate_grad_batches": accumulate}
    trainer(callbacks=[Note()], **options).fit(module, datamodule=data)

    lm = load_model(tiny_model)
    start = {name: p.detach().clone() for name, p in lm.named_parameters()}
    for number, batch in enumerate(batches, 1):
        at = Streams(batch, partial(forward_answers, lm), {})
        forget, retain = (at.mean(stream, at[stream].nll) for stream in ("forget", "retain"))
        moving = [p if bits is None else p[bits[n]] for n, p in lm.named_parameters()]
        loss = loss_of(forget, retain, sum(p.sum() for p in moving)) / accumulate
        loss.backward()
        if number % accumulate == 0:
            for name, p in lm.named_parameters():
                selected = 1.0 if bits is None else bits[name]
                p.data -= 0.01 * p.grad * selected
                p.grad = None
    assert len(batches) == 2 * accumulate
    ended = dict(module.lm.named_parameters())
    for name, p in lm.named_parameters():
        distance, moved = (ended[name] - p).norm(), (p - start[name]).norm()
        assert distance <= 1e-4 * moved + 1e-6, (name, distance, moved)


# -- as Hugging Face's Trainer ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
@pytest.mark.parametrize("masked", [True, False])
def test_weight_decay_can_leave_out_what_the_trainer_does(
    kind: str, masked: bool, tiny_model: str, rows: dict[str, str], tmp_path: Path
) -> None:
    folder = tiny_model
    if kind == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
        folder = write_model("GPT2", tmp_path / "gpt2", load_tokenizer(tiny_model), **sizes)
    lm = load_model(folder)
    bools = random_bools({name: p.shape for name, p in lm.named_parameters()})
    module = UnlearnModule(
        folder,
        objective="GradDiff",
        mask=WeightMask.from_bools(bools) if masked else None,
        decay_norms_and_biases=False,
    )
    module.make_optimizer = partial(torch.optim.AdamW, weight_decay=0.3, lr=0.01)
    decayed = set()

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            for group in trainer.optimizers[0].param_groups:
                held = {id(p) for p in group["params"] if group["weight_decay"]}
                tensors = module.selected.tensors.items()
                decayed.update(name for name, tensor in tensors if id(tensor.values) in held)

    run(module, rows, Look())
    expected = set(Trainer.get_decay_parameter_names(None, lm))
    assert decayed == expected & {name for name, _ in lm.named_parameters()}


def test_moves_that_the_file_keeps_are_counted(
    tiny_model: str,
    rows: dict[str, str],
    tmp_path: Path,
    heard: pytest.LogCaptureFixture,
) -> None:
    """Of a base in bf16, against the files of two runs: rounded, and in fp32."""
    heard.set_level("INFO", logger="wagle_pl")
    base = str(tmp_path / "base")
    load_model(tiny_model, torch.bfloat16).save_pretrained(base)
    load_tokenizer(tiny_model).save_pretrained(base)
    bools = random_bools({name: p.shape for name, p in load_model(base).named_parameters()})
    files, shares = {}, {}
    for output_dtype in (None, "float32"):
        output = str(tmp_path / f"{output_dtype}")
        module = UnlearnModule(
            base,
            output,
            objective="GradDiff",
            mask=WeightMask.from_bools(bools),
            output_dtype=output_dtype,
            lr=1e-6,
        )
        run(module, rows, precision="bf16-true")
        files[output_dtype] = load_model(output, torch.float32).state_dict()
        shares[output_dtype] = read_record(output)["lineage"][-1]["moves_kept_by_rounding"]
    start = load_model(base, torch.float32).state_dict()
    kept, moved = (
        sum(int((files[dtype][name] != start[name]).sum()) for name in bools)
        for dtype in (None, "float32")
    )
    assert shares == {None: kept / moved, "float32": None} and 0 < kept / moved < 0.5
    assert "model.output_dtype float32" in heard.text


# -- waiting for the device ---------------------------------------------------------------------------

#: Operations that read a number, or a shape, from a device.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}


class Reads(TorchDispatchMode, L.Callback):
    """Counts the reads of each step, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append(Counter())
        self.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in READS or by_mask:
            self.steps[-1][name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", [None, "NPO", "KL"])
def test_a_step_does_not_wait_for_the_device(
    objective: str | None, tiny_model: str, rows: dict[str, str], tmp_path: Path
) -> None:
    """What it reads has been copied to the host a step before."""
    options = {"output": str(tmp_path / "out")}
    if objective is None:
        module = FinetuneModule(tiny_model, **options)
    else:
        module = UnlearnModule(tiny_model, objective=objective, layers="0", **options)
    reads = Reads()
    run(module, rows, reads, gradient_clip_val=1.0)
    assert reads.steps == [Counter()] * 3


# -- padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_losses_of_padded_ones(
    attention: str, tiny_model: str, rows: dict[str, str], tmp_path: Path
) -> None:
    lm = load_model(tiny_model, attn_implementation=attention)
    data = ForgetRetainDataModule(retain=rows["retain"], tokenizer=tiny_model)
    batch = next(iter(data.stream_loader("retain", 17)))["retain"]
    batch["places"] = answer_places(batch["labels"])
    packed = {**batch, **pack(batch)}
    assert packed["packed_ids"].numel() < batch["input_ids"].numel()
    padded_sums, packed_sums = (
        sequence_logprobs(forward_answers(lm, inputs), batch["labels"])[0]
        for inputs in (batch, packed)
    )
    assert torch.allclose(padded_sums, packed_sums, atol=1e-4, rtol=1e-6)
    forward = (
        lm.forward
    )  # with a mask of ones, as transformers' own collators give, rows see others
    lm.forward = lambda **inputs: forward(
        **inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}
    )
    wrong = sequence_logprobs(forward_answers(lm, packed), batch["labels"])[0]
    assert (wrong - padded_sums).abs().max() > 1e-2


def test_packed_rows_take_the_same_steps(tiny_model: str, rows: dict[str, str], mask: str) -> None:
    options = {"objective": "NPO", "mask": mask}
    padded, packed = (
        run(UnlearnModule(tiny_model, packing=packing, **options), rows)
        for packing in (False, True)
    )
    assert all(torch.allclose(padded[name], packed[name], atol=1e-6) for name in padded)


def test_packing_is_refused_where_rows_would_see_each_other(
    tiny_model: str, rows: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def with_a_mask(self: Any, **inputs: Any) -> Any:
        ones = torch.ones_like(inputs["input_ids"])
        given = inputs.get("attention_mask")
        return forward(self, **inputs | {"attention_mask": ones if given is None else given})

    monkeypatch.setattr(LlamaForCausalLM, "forward", with_a_mask)
    with pytest.raises(WagleError, match=r"model\.packing.*see each other in a LlamaForCausalLM"):
        run(FinetuneModule(tiny_model, str(tmp_path / "out"), packing=True), rows)
