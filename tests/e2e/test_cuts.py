"""A run goes on with the same global batches, however they are cut into devices, rows a device and micro-batches."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, weights, write_rows
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback

from wagle_pl.core.errors import WagleError
from wagle_pl.data.batches import GlobalBatchSampler, ResumableLoader
from wagle_pl.data.people import bundled
from wagle_pl.masks import WeightMask


def loader(lengths, cut, rank=0, **options):
    batch_size, accumulate, world = cut
    return ResumableLoader(
        GlobalBatchSampler(lengths, batch_size, accumulate, world, rank, **options),
        lambda draw: draw,
    )


CUTS = [
    (8, 1, 1),
    (4, 2, 1),
    (2, 4, 1),
    (1, 8, 1),
    (4, 1, 2),
    (1, 4, 2),
    (2, 1, 4),
    (1, 2, 4),
    (1, 1, 8),
]


@given(
    st.integers(1, 40),
    st.sampled_from(CUTS),
    st.sampled_from(CUTS),
    st.integers(0, 50),
    st.integers(0, 2),
)
def test_any_cut_goes_on_at_the_same_row(
    n: int, first: tuple, second: tuple, stop: int, epoch: int
):
    """Every row of an epoch is handed out once, with its weight, before the stop or after it."""
    lengths = {"forget": list(range(1, n + 1)), "retain": list(range(1, 12))}
    seen: dict[str, Counter] = {stream: Counter() for stream in lengths}
    state = None
    for cut, stops in ((first, stop), (second, None)):
        loaders = [loader(lengths, cut, rank) for rank in range(cut[2])]
        for each in loaders:
            each.sampler.set_epoch(epoch)
            if state is not None:
                each.load_state_dict(state)
        if state is not None and state["epoch"] > epoch:
            break
        expected = len(loaders[0].sampler) - loaders[0].sampler.micro_batches(
            loaders[0].sampler.start
        )
        draws = [list(islice(each, stops)) for each in loaders]
        assert stops is not None or all(len(part) == expected for part in draws)
        for draw in (draw for part in draws for draw in part):
            for stream, cell in draw.cells.items():
                seen[stream].update((row, occurrence) for row, weight, occurrence in cell if weight)
        state = loaders[0].state_at(epoch, len(draws[0]))
    whole = loader(lengths, (1, 1, 1))
    whole.sampler.set_epoch(epoch)
    once = {s: Counter((r, o) for draw in whole for r, _, o in draw.cells[s]) for s in lengths}
    assert {s: sorted(row for row, _ in c.elements()) for s, c in seen.items()} == {
        s: sorted(row for row, _ in c.elements()) for s, c in once.items()
    }


def test_what_differs_is_named():
    lengths = {"forget": [3] * 11, "retain": [3] * 17}
    state = loader(lengths, (4, 2, 1)).state_dict()

    def told(other):
        with pytest.raises(WagleError) as error:
            other.load_state_dict(state)
        return str(error.value)

    assert "had a global batch of 8 rows, this one has 4 (1 devices x data.batch_size 4 x" in told(
        loader(lengths, (4, 1, 1))
    )
    assert "drew its rows with data.seed 0, this one with 3" in told(
        loader(lengths, (8, 1, 1), seed=3)
    )
    assert "had 11 forget rows, this one has 10" in told(
        loader({**lengths, "forget": [3] * 10}, (8, 1, 1))
    )
    assert "drew from forget and retain rows, this one draws from forget" in told(
        loader({"forget": [3] * 11}, (8, 1, 1))
    )
    other = loader(lengths, (8, 1, 1))
    other.digests = {"forget": "x"}
    assert "had other forget rows, or another order of them" in told(other)


# -- runs -------------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Notes what a run does, and writes a checkpoint after so many micro-batches, at which it stops if asked."""

    save, stop = 0, False
    rows: list[int] = []  # noqa: RUF012  of the process's runs
    sizes: list[int] = []  # noqa: RUF012
    validated: list[int] = []  # noqa: RUF012
    seen = 0

    @classmethod
    def reset(cls, save: int = 0, stop: bool = True) -> None:
        cls.save, cls.stop, cls.seen = save, stop, 0
        cls.rows, cls.sizes, cls.validated = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        cls = type(self)
        weights = batch["forget"]["weight"]
        cls.rows += batch["forget"]["row"][weights > 0].tolist()
        cls.sizes.append(int((weights > 0).sum()))
        cls.seen += 1
        if cls.seen == cls.save:
            trainer.save_checkpoint("at.ckpt")
            if cls.stop:
                raise KeyboardInterrupt

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.validated.append(trainer.global_step)


def options(
    module: str, model: str, output: str, batch_size: int, accumulate: int, *more: Any
) -> tuple:
    """Arguments of a fit of 11 forget rows, in steps of 4: three a epoch."""
    trains = module == "UnlearnModule"
    kind = (
        ("--model.objective", "GradDiff", "--optimizer", "MaskedAdamW", "--optimizer.lr", "1e-3")
        if trains
        else ()
    )
    return (
        *("fit", "--model", module, "--model.model", model, "--model.output", output, *kind),
        *("--data.batch_size", batch_size, "--trainer.accumulate_grad_batches", accumulate),
        *("--trainer.max_epochs", 3 if trains else 1, "--trainer.enable_checkpointing", "false"),
        *("--trainer.callbacks", "test_cuts.Watch", *more),
    )


def interrupted(wagle: Any, save: int, *args: Any) -> list[int]:
    """Run until a checkpoint is written; returns the rows that it has seen."""
    Watch.reset(save)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        wagle(*args)
    return Watch.rows


STOPS = [  # batch size and accumulation, micro-batches until the stop, batch size and accumulation from then on
    ((1, 4), 8, (2, 2)),
    ((2, 2), 4, (1, 4)),
    ((4, 1), 3, (1, 4)),
    ((1, 4), 12, (4, 1)),
    ((2, 2), 3, (4, 1)),
    ((4, 1), 5, (2, 2)),
]


@pytest.mark.parametrize("limit", [(), ("--trainer.max_steps", "7")], ids=["epochs", "steps"])
@pytest.mark.parametrize(("first", "saved_after", "second"), STOPS)
def test_training_goes_on_with_another_cut(wagle, tiny_model, first, saved_after, second, limit):
    """Within an epoch, at its end, in the middle of a step: as many steps, each row as often, the same weights."""
    watch = (
        "--data.val",
        "[forget]",
        "--trainer.val_check_interval",
        "1.0",
        "--trainer.num_sanity_val_steps",
        "0",
    )
    Watch.reset()
    whole = wagle(*options("UnlearnModule", tiny_model, "whole", *first, *watch, *limit)).trainer
    expected, validated = Counter(Watch.rows), Watch.validated
    before = interrupted(
        wagle, saved_after, *options("UnlearnModule", tiny_model, "resumed", *first, *watch, *limit)
    )
    steps = saved_after // first[1]
    kept = before[: sum(Watch.sizes[: steps * first[1]])]  # a step that was under way is made anew
    Watch.reset()
    args = options(
        "UnlearnModule", tiny_model, "resumed", *second, *watch, *limit, "--ckpt_path", "at.ckpt"
    )
    resumed = wagle(*args).trainer
    assert Counter(kept) + Counter(Watch.rows) == expected
    assert resumed.global_step == whole.global_step == (7 if limit else 9)
    assert resumed.current_epoch == whole.current_epoch
    assert Watch.validated == [step for step in validated if step > steps]
    assert difference(weights("whole"), weights("resumed")) < 1e-5


@pytest.mark.parametrize("limit", [(), ("--trainer.max_steps", "7")], ids=["epochs", "steps"])
def test_a_run_that_is_stopped_often(wagle, tiny_model, limit):
    """Stopped at every step, at the ends of epochs too, each time with another cut."""
    Watch.reset()
    wagle(*options("UnlearnModule", tiny_model, "whole", 4, 1, *limit))
    expected, cuts, resume, rows = Counter(Watch.rows), [(1, 4), (2, 2), (4, 1)], (), []
    for step in range(7 if limit else 9):
        cut = cuts[step % 3]
        rows += interrupted(
            wagle, cut[1], *options("UnlearnModule", tiny_model, "out", *cut, *limit, *resume)
        )
        assert torch.load("at.ckpt", weights_only=False)["global_step"] == step + 1
        resume = ("--ckpt_path", "at.ckpt")
    assert Counter(rows) == expected
    Watch.reset()
    wagle(
        *options("UnlearnModule", tiny_model, "out", 2, 2, *limit, *resume)
    )  # nothing is left to do but to write
    assert not Watch.rows and difference(weights("whole"), weights("out")) < 1e-5


@pytest.mark.parametrize("kept", ["epoch=0-step=3.ckpt", "epoch=1-step=5.ckpt"])
def test_more_steps_after_the_end(wagle, tiny_model, kept):
    """A run of max_steps whose checkpoints were written at the ends of epochs, or where max_steps cut one short."""
    saving = json.dumps(
        [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept", "save_top_k": -1}}]
    )
    saving = ("--trainer.enable_checkpointing", "true", "--trainer.callbacks", saving)
    constant = ("--model.decay", "constant", "--model.warmup", "0")
    longer = ("--trainer.max_steps", "8", *constant)
    Watch.reset()
    wagle(*options("UnlearnModule", tiny_model, "whole", 4, 1, *longer))
    expected, sizes = Watch.rows, Watch.sizes
    wagle(
        *options(
            "UnlearnModule",
            tiny_model,
            "short",
            2,
            2,
            *saving,
            "--trainer.max_steps",
            "5",
            *constant,
        )
    )
    Watch.reset()
    wagle(
        *options("UnlearnModule", tiny_model, "long", 1, 4, *longer, "--ckpt_path", f"kept/{kept}")
    )
    done = int(kept[-6])
    assert Counter(Watch.rows) == Counter(expected[sum(sizes[:done]) :])
    assert difference(weights("whole"), weights("long")) < 1e-5


@pytest.mark.parametrize(
    ("first", "saved_after", "second"),
    [
        ((1, 4), 4, (2, 2)),
        ((1, 4), 6, (2, 2)),
        ((1, 4), 7, (4, 1)),
        ((2, 2), 3, (1, 4)),
        ((4, 1), 2, (1, 4)),
        ((2, 2), 6, (4, 1)),
    ],
)
def test_attribution_goes_on_with_another_cut(wagle, tiny_model, first, saved_after, second):
    """Within a step too, whose sums are kept: the same rows, once each, and the same masks."""
    masks = ("--model.masks", json.dumps([{"score": score} for score in ("wagle", "fisher_ratio")]))
    masks += ("--model.hessian", "gauss_newton")
    whole = wagle(*options("AttributionModule", tiny_model, "whole", *first, *masks)).model
    counts = whole.collected.counts
    before = interrupted(
        wagle, saved_after, *options("AttributionModule", tiny_model, "resumed", *first, *masks)
    )
    Watch.reset()
    args = options(
        "AttributionModule", tiny_model, "resumed", *second, *masks, "--ckpt_path", "at.ckpt"
    )
    resumed = wagle(*args).model
    assert sorted(before + Watch.rows) == list(range(11))
    assert resumed.collected.counts == counts
    names = [path.name for path in Path("whole").glob("*.safetensors")]
    assert len(names) == 2
    assert all(
        WeightMask.load(f"whole/{name}") == WeightMask.load(f"resumed/{name}") for name in names
    )


@pytest.mark.parametrize("module", ["UnlearnModule", "AttributionModule"])
def test_another_run_is_refused(wagle, fails, tiny_model, rows, module):
    interrupted(wagle, 2, *options(module, tiny_model, "out", 2, 2))
    resume = options(module, tiny_model, "out", 4, 1, "--ckpt_path", "at.ckpt")
    assert "had a global batch of 4 rows, this one has 8" in fails(*resume, "--data.batch_size", 8)
    assert "drew its rows with data.seed 0, this one with 1" in fails(*resume, "--data.seed", 1)
    assert "had 11 forget rows, this one has 10" in fails(*resume, "--data.limit_forget", 10)
    other = write_rows(Path("other.jsonl"), bundled("forget")[1:12])
    assert "had other forget rows, or another order of them" in fails(
        *resume, "--data.forget", other
    )
    assert not list(Path().glob("out*"))
