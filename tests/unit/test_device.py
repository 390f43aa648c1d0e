"""What a GPU would meet, on a device that counts: no operation mixes devices, and results are the CPU's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device
import lightning as L
import pytest
import torch
from helpers import random_bools, slow, trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from wagle_pl import (
    AttributionModule,
    EvaluationModule,
    FinetuneModule,
    ForgetRetainDataModule,
    UnlearnModule,
    WeightMask,
    forget,
)
from wagle_pl.api import subject
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.data.people import bundled
from wagle_pl.lm.models import load_model
from wagle_pl.lm.tiny import create_tiny_llama

pytestmark = pytest.mark.xdist_group("device")  # one model is made for all

FORGET, RETAIN = (
    [{key: row[key] for key in ("question", "answer")} for row in bundled(name)[:4]]
    for name in ("forget", "retain")
)
#: Times a step waits for the host; what it reads of the device has been copied a step before.
WAITS_OF_A_STEP = 0
#: What waits once nevertheless: PDU's weight of the next step depends on the losses, RandomLabel draws on the host.
WAITING = ("PDU", "RandomLabel")


def data() -> ForgetRetainDataModule:
    return ForgetRetainDataModule(forget=FORGET, retain=RETAIN, batch_size=4)


def fitted(
    make: type[L.LightningModule], model: str, on_device: bool, run: dict[str, Any], **options: Any
) -> Any:
    """A module after ``fit``, with what the device counted in ``counts``."""
    lm = load_model(model, torch.float32)
    lm.config.use_cache = False
    if not on_device:
        module = make(lm, **options)
        trainer(**run).fit(module, data())
        return module
    with device.counting() as counts:
        module = make(device.on_device(lm), **options)
        device.trainer(**run, callbacks=[_LastStep()]).fit(module, data())
    module.counts = counts
    return module


class _LastStep(L.Callback):
    """Leaves in the counts of the device only those of the steps after the second."""

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            module.batch_bytes = 0
        columns = [c for of_stream in batch.values() for c in of_stream.values()]
        copied = sum(column.nbytes for column in columns if isinstance(column, Tensor))
        module.batch_bytes = getattr(module, "batch_bytes", 0) + copied

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            device.COUNTS.reset()
        if trainer.global_step == 4:
            module.waits, module.launches = (
                dict(device.COUNTS.waits),
                device.COUNTS.launches.total(),
            )
            module.copied = device.COUNTS.to_device, device.COUNTS.to_host


def weights(module: Any) -> dict[str, Tensor]:
    parameters = module.lm.named_parameters(remove_duplicate=False)
    return {name: parameter.detach().cpu() for name, parameter in parameters}


@pytest.fixture(scope="module")
def mask(tiny_model: str) -> WeightMask:
    return fitted(AttributionModule, tiny_model, False, {}, density=0.2).mask


# -- the device ----------------------------------------------------------------------------------------------


def test_an_operation_that_mixes_devices_raises() -> None:
    with device.counting():
        there = torch.ones(3).to(device.DEVICE)
        with pytest.raises(RuntimeError, match="mixes the device with CPU tensors"):
            there + torch.ones(3)
        assert (there + torch.tensor(2.0)).tolist() == [3.0] * 3  # a number may be anywhere


def test_what_is_counted() -> None:
    with device.counting() as counts:
        before = counts.bytes
        there = torch.ones(1000).to(device.DEVICE)
        assert (counts.to_device, counts.to_host, counts.bytes - before) == (4000, 0, 4000)
        view = there.view(10, 100)[:5]
        assert counts.launches == {"aten::copy_": 1} and counts.bytes - before == 4000
        doubled = view * 2
        assert counts.launches["aten::mul"] == 1 and counts.bytes - before == 6000
        del there, view
        assert counts.bytes - before == 2000 and counts.peak - before == 6000
        assert not counts.waits
        assert doubled.sum().item() == 1000
        ((line, times),) = counts.waits.items()
        assert line.startswith("test_device.py:") and times == 1
        doubled.cpu()
        assert counts.to_host == 2000


def test_what_memory_is_for() -> None:
    with device.counting() as counts:
        weight = torch.ones(1000).to(device.DEVICE).requires_grad_()
        counts.name("weights", [weight])
        counts.reset()
        before = counts.at_peak()
        weight.exp().sum().backward()
        counts.name("state", [weight.grad])  # which is called a gradient at first
        more = {kind: size - before[kind] for kind, size in counts.at_peak().items()}
    assert {kind: size for kind, size in more.items() if size} == {
        "activations": 4008,
        "state": 4000,
    }
    assert sum(counts.at_peak().values()) == counts.peak


def test_gradients_are_those_of_the_cpu(tiny_model: str) -> None:
    tokens = torch.randint(3, 90, (2, 9))
    gradients = []
    for on_device in (False, True):
        lm = load_model(tiny_model, torch.float32)
        with device.counting():
            batch = tokens.to(device.DEVICE) if on_device else tokens
            (device.on_device(lm) if on_device else lm)(
                batch, labels=batch, use_cache=False
            ).loss.backward()
        gradients.append([parameter.grad.cpu() for parameter in lm.parameters()])
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there)


# -- what runs on it -----------------------------------------------------------------------------------------


def _objective(name: str, **options: Any) -> dict[str, Any]:
    return {"objective": {"class_path": name, "init_args": options}}


@pytest.mark.parametrize(
    ("options", "run"),
    [
        *((_objective(name), {}) for name in ("GradDiff", "PO", "DPO", "UNDIAL", "KL")),
        *(slow(_objective(name), {}) for name in ("GradAscent", "SimNPO", "WGA", "CEU", "SatImp")),
        *(slow(_objective(name), {}) for name in ("L1Sparse", "RandomLabel", "FineTune")),
        (_objective("RMU", layer=1, steering=5.0), {}),
        (_objective("PDU", epsilon=0.3), {}),
        (_objective("NPO", retain="KL"), {}),
        (_objective("NPO", retain="HiddenMSE"), {}),
        *(({**_objective("NPO"), "step_rule": r}, {}) for r in ("SAM", "RepSelect")),
        slow({**_objective("NPO"), "step_rule": "MUDMAN"}, {}),
        slow({**_objective("NPO"), "modules": ["mlp"]}, {}),
        ({**_objective("NPO"), "layers": "1"}, {}),
        slow({**_objective("NPO"), "packing": True}, {}),
        ({**_objective("NPO"), "gradient_checkpointing": True}, {}),
        ({**_objective("NPO"), "clip_scope": "all"}, {"gradient_clip_val": 0.1}),
        ({**_objective("NPO"), "clip_scope": "selected"}, {"gradient_clip_val": 0.1}),
        (_objective("NPO"), {"accumulate_grad_batches": 2}),
        (_objective("NPO"), {"precision": "bf16-true"}),
        (_objective("NPO"), {"precision": "bf16-mixed"}),
        ({**_objective("NPO", retain="KL"), "packing": True}, {}),
    ],
    ids=str,
)
def test_unlearning(
    tiny_model: str, mask: WeightMask, options: dict[str, Any], run: dict[str, Any]
) -> None:
    run = {"max_steps": 4, **run}
    modules = [
        fitted(UnlearnModule, tiny_model, where, run, mask=mask, lr=1e-3, **options)
        for where in (False, True)
    ]
    here, there = map(weights, modules)
    tolerance = 1e-4 if "precision" not in run else 1e-2
    for name, weight in here.items():
        torch.testing.assert_close(there[name], weight, atol=tolerance, rtol=0)
        frozen = ~mask[name] if name in mask.shapes else None
        if frozen is not None and "precision" not in run:
            assert torch.equal(there[name][frozen], weight[frozen])
    waits = WAITS_OF_A_STEP + any(name in str(options) for name in WAITING)
    assert sum(modules[1].waits.values()) <= 2 * waits, modules[1].waits


def test_dense_unlearning_and_finetuning(tiny_model: str) -> None:
    for make, options in ((UnlearnModule, _objective("NPO")), (FinetuneModule, {})):
        here, there = (
            weights(fitted(make, tiny_model, where, {"max_steps": 2}, lr=1e-3, **options))
            for where in (False, True)
        )
        for name, weight in here.items():
            torch.testing.assert_close(there[name], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        *({"score": s} for s in ("wagle", "gradient", "magnitude", "snip", "curvature", "random")),
        *({"score": s} for s in ("forget_retain_ratio", "fisher_ratio", "wanda", "signed")),
        *({"hessian": h} for h in ("gauss_newton", "fisher", "hutchinson")),
        *({"sums": s} for s in ("host", "passes=2")),
        {"score": "curvature", "hessian": "fisher", "sums": "host"},
        {"score": "fisher_ratio", "hessian": "gauss_newton", "sums": "passes=2"},
    ],
    ids=str,
)
def test_attribution(tiny_model: str, options: dict[str, Any]) -> None:
    here, there = (
        fitted(AttributionModule, tiny_model, where, {}, density=0.2, **options).mask
        for where in (False, True)
    )
    differing = sum(int((here[name] != there[name].cpu()).sum()) for name in here)
    assert differing <= 4  # scores that are equal but for the order of a sum


class _Save(L.Callback):
    """Writes a checkpoint after the second step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "middle.ckpt")


def test_resume_and_export(tiny_model: str, mask: WeightMask, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint of the device, and the model that it writes."""
    results = []
    for on_device in (False, True):
        folder = tmp_path / str(on_device)
        for name, checkpoint in (("unbroken", None), ("resumed", folder / "middle.ckpt")):
            lm = load_model(tiny_model, torch.float32)
            lm.config.use_cache = False
            make = device.trainer if on_device else trainer
            run = {"max_steps": 4, "default_root_dir": folder, "callbacks": [_Save()]}
            with device.counting():
                given = device.on_device(lm) if on_device else lm
                options = {"mask": mask, "lr": 1e-3, "output": str(folder / name)}
                module = UnlearnModule(given, objective="NPO", **options)
                make(**run).fit(module, data(), ckpt_path=checkpoint)
            results.append(weights(module))
        for name, weight in load_model(str(folder / "resumed"), torch.float32).named_parameters():
            assert torch.equal(weight, results[-1][name])
    for name, here in results[0].items():
        assert torch.equal(results[1][name], here)
        assert torch.equal(results[3][name], results[2][name])
        torch.testing.assert_close(results[2][name], here, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shown", [False, True])
def test_a_step_waits_for_the_host(
    tiny_model: str, tmp_path: Path, mask: WeightMask, shown: bool
) -> None:
    """With a logger and a progress bar too, which shows the losses a step late."""
    run: dict[str, Any] = {"max_steps": 4}
    if shown:
        run |= {"logger": CSVLogger(tmp_path), "enable_progress_bar": True}
    options = {"mask": mask, "lr": 1e-3, "objective": "GradDiff"}
    module = fitted(UnlearnModule, tiny_model, True, run, **options)
    waits = module.waits
    print(*(f"{times / 2:4.1f}  {line}" for line, times in waits.items()), sep="\n")
    assert sum(waits.values()) <= 2 * WAITS_OF_A_STEP, waits
    losses = module.trainer.progress_bar_metrics
    assert losses.keys() >= {"train/loss", "train/forget_loss", "train/retain_loss"}
    assert all(isinstance(loss, float) for loss in losses.values())


@pytest.mark.parametrize(
    "options", [{}, {"hessian": "fisher"}, {"score": "fisher_ratio"}, {"sums": "passes=2"}], ids=str
)
def test_a_micro_batch_of_attribution_waits(tiny_model: str, options: dict[str, Any]) -> None:
    """For nothing, and it copies nothing but two numbers for each stream."""
    counts = []

    class LastBatch(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            device.COUNTS.reset()

        def on_train_batch_end(self, *_: Any) -> None:
            counts.append((dict(device.COUNTS.waits), device.COUNTS.to_host))

    lm = load_model(tiny_model, torch.float32)
    with device.counting():
        module = AttributionModule(device.on_device(lm), density=0.2, **options)
        rows = ForgetRetainDataModule(forget=FORGET, retain=RETAIN, batch_size=2)
        device.trainer(callbacks=[LastBatch()]).fit(module, rows)
    waits, to_host = counts[-1]
    assert not waits and to_host <= 16


def test_sums_on_the_host_take_the_gradients_alone(tiny_model: str) -> None:
    counts = []

    class LastBatch(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            device.COUNTS.reset()

        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(device.COUNTS.to_host)

    lm = load_model(tiny_model, torch.float32)
    weights = sum(parameter.numel() for parameter in lm.parameters())
    with device.counting():
        options = {"score": "forget_retain_ratio", "sums": "host"}
        module = AttributionModule(device.on_device(lm), density=0.2, **options)
        device.trainer(callbacks=[LastBatch()]).fit(module, data())
    gradients = 2 * 4 * weights  # of both streams
    assert counts == [gradients + 16]  # and the two losses, and whether they are finite


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_copies_its_batch_alone(tiny_model: str, mask: WeightMask, accumulate: int) -> None:
    run = {"max_steps": 4, "accumulate_grad_batches": accumulate}
    module = fitted(UnlearnModule, tiny_model, True, run, mask=mask, objective="NPO")
    to_device, to_host = module.copied
    assert to_device == module.batch_bytes
    losses = 3 * accumulate  # of a micro-batch: the loss and its two terms
    assert to_host == 2 * 4 * (1 + losses)  # and whether all that was checked is finite


def test_launches_of_a_masked_step(tmp_path: Path) -> None:
    """Beside those of a dense step, for a Llama of 16 blocks."""
    texts = [" ".join(row.values()) for row in FORGET + RETAIN]
    folder = str(create_tiny_llama(tmp_path / "model", texts, 300, hidden_size=16, layers=16))
    bools = random_bools(parameter_shapes(load_model(folder)), 0.2, seed=0)
    dense, masked = (
        fitted(UnlearnModule, folder, True, {"max_steps": 4}, mask=of, objective="GradDiff")
        for of in (None, WeightMask.from_bools(bools))
    )
    print(dense.launches / 2, masked.launches / 2)
    assert masked.launches <= 1.15 * dense.launches


def test_forget(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is on the device when it is given."""
    lm = load_model(tiny_model, torch.float32)
    trainer(max_epochs=40).fit(FinetuneModule(lm, lr=1e-2), data())
    results = []
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    for on_device in (False, True):
        lm = load_model(tiny_model, torch.float32)
        lm.load_state_dict(before)
        lm.config.use_cache = False
        if on_device:
            made = SimpleNamespace(Trainer=lambda devices, **options: device.trainer(**options))
            monkeypatch.setattr(subject, "L", made)
        with device.counting():
            model = device.on_device(lm) if on_device else lm
            options = {"tokenizer": tiny_model, "max_steps": 2, "progress": False}
            results.append(forget(model, FORGET, RETAIN, **options))
            assert next(model.parameters()).device.type == ("sim" if on_device else "cpu")
    here, there = results
    assert here.outcome == there.outcome and here.steps == there.steps
    assert there.after == pytest.approx(here.after, rel=1e-3)


def evaluated(model: str, on_device: bool, count: int, **options: Any) -> Any:
    """A module after ``test`` of forget and retain rows in batches of 4, with the device's waits."""
    other = {"paraphrased_answer": "It is so.", "perturbed_answer": ["In Arad.", "Near the river."]}
    rows = {name: [row | other for row in bundled(name)[:count]] for name in ("forget", "retain")}
    lm = load_model(model, torch.float32)
    where = device.trainer if on_device else trainer
    with device.counting() as counts:
        lm = device.on_device(lm) if on_device else lm
        options = {"suite": "tofu", "max_new_tokens": 5, "overwrite": True, **options}
        module = EvaluationModule(lm, **options)
        where().test(module, ForgetRetainDataModule(FORGET, test=rows, test_batch_size=4))
        module.waits = dict(counts.waits)
    return module


def test_testing(tiny_model: str, tmp_path: Path) -> None:
    """With generations, likelihoods, gradients and an attack."""
    options = {"gradient_norm": True, "robustness": ["Quantise", "Relearn"]}
    here, there = (
        evaluated(tiny_model, where, 4, output=str(tmp_path / str(where)), **options)
        for where in (False, True)
    )
    assert "forget/rougeL_recall" in here.metrics and "forget/truth_ratio" in here.metrics
    assert any(name.startswith("robustness/quantise_4bit/") for name in here.metrics)
    assert there.metrics == pytest.approx(here.metrics, rel=1e-3, abs=1e-5)
    assert there.undefined == here.undefined


def test_a_test_batch_waits_for_the_host(tiny_model: str, tmp_path: Path) -> None:
    """Of this package's lines, each waits once a batch, whatever the number of rows and tokens; the others are
    transformers': its attention mask, and once for each generation."""
    lines = ("scoring.py", "observe.py", "inference.py", "measures.py", "evaluation.py")
    totals = []
    for batches, count, tokens in ((1, 4, 5), (2, 8, 5), (2, 8, 10)):
        options = {"output": str(tmp_path / str(count)), "max_new_tokens": tokens}
        waits = evaluated(tiny_model, True, count, **options).waits
        ours = {line: times for line, times in waits.items() if line.startswith(lines)}
        assert set(ours.values()) == {2 * batches}, waits
        totals.append(sum(waits.values()))
    assert totals[1] <= 2 * totals[0] and totals[2] == totals[1]
