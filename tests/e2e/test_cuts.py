"""A run goes on with the same global batches, however they are cut into devices, rows per device and micro-batches."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, weights, write_rows
from lightning.pytorch.callbacks import Callback

from wagle_pl.data.people import bundled
from wagle_pl.masks import WeightMask

RESUME = ("--ckpt_path", "at.ckpt")
SEVEN_STEPS = ("--trainer.max_steps", "7")  # of nine


class Watch(Callback):
    """Notes what a run does; after so many micro-batches, writes a checkpoint and stops."""

    save = 0
    rows: list[int] = []  # noqa: RUF012  of the process's runs
    sizes: list[int] = []  # noqa: RUF012
    validated: list[int] = []  # noqa: RUF012

    @classmethod
    def reset(cls, save: int = 0) -> None:
        cls.save, cls.rows, cls.sizes, cls.validated = save, [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rows = batch["forget"]["row"][batch["forget"]["weight"] > 0].tolist()
        self.rows.extend(rows)
        self.sizes.append(len(rows))
        if len(self.sizes) == self.save:
            trainer.save_checkpoint("at.ckpt")
            raise KeyboardInterrupt

    def on_validation_end(self, trainer, module):
        self.validated.append(trainer.global_step)


@pytest.fixture
def fit(wagle, tiny_model):
    """A fit of 11 forget rows, in steps of 4 and three an epoch; stopped after ``save`` micro-batches."""

    def run(module: str, output: str, cut: tuple[int, int], *more: Any, save: int = 0) -> Any:
        arguments = options(module, tiny_model, output, cut, *more)
        Watch.reset(save)
        if not save:
            return wagle(*arguments)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            wagle(*arguments)

    return run


def options(module: str, model: str, output: str, cut: tuple[int, int], *more: Any) -> tuple:
    objective = ("--model.objective", "GradDiff", "--optimizer", "MaskedAdamW", "--optimizer.lr")
    trains = module == "UnlearnModule"
    return (
        *("fit", "--model", module, "--model.model", model, "--model.output", output),
        *((*objective, "1e-3") if trains else ()),
        *("--data.batch_size", cut[0], "--trainer.accumulate_grad_batches", cut[1]),
        *("--trainer.max_epochs", 3 if trains else 1, "--trainer.enable_checkpointing", "false"),
        *("--trainer.callbacks", "test_cuts.Watch", *more),
    )


#: Batch size and accumulation, micro-batches until the stop, batch size and accumulation then; in runs of nine steps,
#: and of seven.
TRAINED = {
    (): [((1, 4), 8, (2, 2)), ((4, 1), 3, (1, 4)), ((2, 2), 3, (4, 1)), ((4, 1), 5, (2, 2))],
    SEVEN_STEPS: [((2, 2), 4, (1, 4)), ((1, 4), 12, (4, 1)), ((2, 2), 3, (4, 1))],
}


@pytest.mark.parametrize("limit", TRAINED, ids=["epochs", "steps"])
def test_training_goes_on_with_another_cut(fit, limit):
    """Within an epoch, at its end, in the middle of a step: as many steps, each row as often, the same weights."""
    more = ("--data.val", "[forget]", "--trainer.val_check_interval", "1.0", *limit)
    more += ("--trainer.num_sanity_val_steps", "0")
    whole = fit("UnlearnModule", "whole", (4, 1), *more).trainer
    expected, validated = Counter(Watch.rows), Watch.validated
    for number, (first, save, second) in enumerate(TRAINED[limit]):
        output = f"resumed{number}"
        fit("UnlearnModule", output, first, *more, save=save)
        steps = save // first[1]  # a step that was under way is made anew
        kept = Watch.rows[: sum(Watch.sizes[: steps * first[1]])]
        resumed = fit("UnlearnModule", output, second, *more, *RESUME).trainer
        assert Counter(kept) + Counter(Watch.rows) == expected
        assert resumed.global_step == whole.global_step == (7 if limit else 9)
        assert resumed.current_epoch == whole.current_epoch
        assert Watch.validated == [step for step in validated if step > steps]
        assert difference(weights("whole"), weights(output)) < 1e-5


def test_a_run_that_is_stopped_often(fit):
    """Stopped at every step, at the ends of epochs too, each time with another cut."""
    fit("UnlearnModule", "whole", (4, 1))
    expected, rows, resume = Counter(Watch.rows), [], ()
    for step, cut in zip(range(9), cycle([(1, 4), (2, 2), (4, 1)])):
        fit("UnlearnModule", "out", cut, *resume, save=cut[1])
        rows += Watch.rows
        assert torch.load("at.ckpt", weights_only=False)["global_step"] == step + 1
        resume = RESUME
    assert Counter(rows) == expected
    fit("UnlearnModule", "out", (2, 2), *RESUME)  # nothing is left to do but to write
    assert not Watch.rows and difference(weights("whole"), weights("out")) < 1e-5


def test_more_steps_after_the_end(fit):
    """A run of max_steps whose checkpoints were written at the ends of epochs, or where max_steps cut one short."""
    saving = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept", "save_top_k": -1}}
    short = ("--trainer.enable_checkpointing", "true", "--trainer.callbacks", json.dumps([saving]))
    constant = ("--model.decay", "constant", "--model.warmup", "0")
    longer = ("--trainer.max_steps", "8", *constant)
    fit("UnlearnModule", "whole", (4, 1), *longer)
    rows, sizes = Watch.rows, Watch.sizes
    fit("UnlearnModule", "short", (2, 2), *short, "--trainer.max_steps", "5", *constant)
    for epoch, step in ((0, 3), (1, 5)):
        kept, output = f"kept/epoch={epoch}-step={step}.ckpt", f"long{step}"
        fit("UnlearnModule", output, (1, 4), *longer, "--ckpt_path", kept)
        assert Counter(Watch.rows) == Counter(rows[sum(sizes[:step]) :])
        assert difference(weights("whole"), weights(output)) < 1e-5


#: The same of attribution.
ATTRIBUTED = [((1, 4), 4, (2, 2)), ((1, 4), 6, (2, 2)), ((2, 2), 3, (1, 4)), ((4, 1), 2, (1, 4))]
ATTRIBUTED += [((1, 4), 7, (4, 1)), ((2, 2), 6, (4, 1))]


def test_attribution_goes_on_with_another_cut(fit):
    """Within a step too, whose sums are kept: the same rows, once each, and the same masks."""
    masks = ("--model.masks", json.dumps([{"score": score} for score in ("wagle", "fisher_ratio")]))
    masks += ("--model.hessian", "gauss_newton")
    whole = fit("AttributionModule", "whole", (4, 1), *masks).model
    counts, names = whole.collected.counts, sorted(os.listdir("whole"))
    assert len(names) == 2
    for number, (first, save, second) in enumerate(ATTRIBUTED):
        output = f"resumed{number}"
        fit("AttributionModule", output, first, *masks, save=save)
        before = Watch.rows
        resumed = fit("AttributionModule", output, second, *masks, *RESUME).model
        assert sorted(before + Watch.rows) == list(range(11))
        assert resumed.collected.counts == counts
        for name in names:
            assert WeightMask.load(f"whole/{name}") == WeightMask.load(f"{output}/{name}")


@pytest.mark.parametrize("module", ["UnlearnModule", "AttributionModule"])
def test_another_run_is_refused(fit, fails, tiny_model, module):
    fit(module, "out", (2, 2), save=2)
    other = write_rows(Path("other.jsonl"), bundled("forget")[1:12])
    resume = options(module, tiny_model, "out", (4, 1), *RESUME)
    message = "had other forget rows, or another order of them"
    assert message in fails(*resume, "--data.forget", other)
    assert not list(Path().glob("out*"))
