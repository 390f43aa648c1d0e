"""What UnlearnModule writes: dtype, bits, whole or not at all, the record of a chain; restrictions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import moved, random_bools, trainer, two_steps, weights
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from wagle_pl.core.errors import WagleError
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.lm import models
from wagle_pl.lm.saving import read_record
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning import UnlearnModule
from wagle_pl.unlearning.export import export, forgotten

CHECKPOINTS = (
    "--trainer.enable_checkpointing true --trainer.callbacks ModelCheckpoint "
    "--trainer.callbacks.dirpath checkpoints"
)
MASK = "mask.safetensors"


@pytest.fixture
def unlearn(wagle: Any) -> Callable[..., Any]:
    return lambda *options, **places: wagle(*two_steps(*options, **places))


def random_mask(folder: str, density: float, path: str = MASK, seed: int = 0) -> WeightMask:
    """A mask file for the model of a folder."""
    lm = models.load_model(folder)
    bools = random_bools(parameter_shapes(lm), density, seed)
    mask = WeightMask.from_bools(bools, {"model_fingerprint": fingerprint(lm)})
    mask.save(path)
    return mask


def stored_as(folder: str, target: Path, dtypes: dict[str, torch.dtype]) -> str:
    """A copy of a model folder with each weight in the dtype of the first part of a name that fits."""
    shutil.copytree(folder, target)
    tensors = {
        name: tensor.to(next(dtype for part, dtype in dtypes.items() if part in name))
        for name, tensor in weights(folder).items()
    }
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = str(dtypes[""]).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


@pytest.mark.parametrize(
    ("dtypes", "precision"),
    [
        ({"": torch.float16}, "bf16-true"),
        ({"": torch.float32}, "bf16-true"),
        ({"norm": torch.float32, "": torch.bfloat16}, "32-true"),
        ({"norm": torch.float32, "": torch.bfloat16}, "bf16-true"),
        ({"": torch.bfloat16}, "32-true"),
        ({"": torch.bfloat16}, "bf16-mixed"),
    ],
    ids=["half", "single", "mixed", "mixed in bfloat16", "bfloat16", "bfloat16 in mixed"],
)
def test_frozen_bits_are_those_of_the_file(
    unlearn: Any, tiny_model: str, tmp_path: Path, dtypes: dict[str, torch.dtype], precision: str
) -> None:
    """Whatever dtype a run works in: its output, and what is made of its checkpoint."""
    base = stored_as(tiny_model, tmp_path / "base", dtypes)
    mask = random_mask(base, 0.1)
    unlearn(
        f"--model.mask {MASK} --trainer.precision {precision} --optimizer.weight_decay 0.1",
        f"--trainer.gradient_clip_val 1.0 --model.verify step {CHECKPOINTS}",
        model=base,
    )
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    export(checkpoint, "exported")
    with pytest.raises(WagleError, match="exported is no checkpoint of a run: leave"):
        export("exported", "again", mask=MASK)
    changed = moved(base, "out")
    assert not any((bits & ~mask[name]).any() for name, bits in changed.items())
    share = sum(int(bits.sum()) for bits in changed.values()) / mask.count()
    assert share > 0.5  # some are not used, and steps below a dtype's precision are lost
    assert not any(bits.any() for bits in moved("out", "exported").values())
    assert "frozen weights are bit-identical" in Path("out/README.md").read_text()


class OwnOptimizer(UnlearnModule):
    """Overrides what a Lightning user overrides first."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def test_an_optimizer_of_ones_own_leaves_frozen_weights_alone(wagle: Any, tiny_model: str) -> None:
    mask = random_mask(tiny_model, 0.2)
    options = two_steps(f"--model.mask {MASK}", model=tiny_model)
    options[options.index("UnlearnModule")] = f"{__name__}.OwnOptimizer"
    start = options.index("--optimizer")
    wagle(*options[:start], *options[start + 4 :])
    changed = moved(tiny_model, "out")
    assert any(bits.any() for bits in changed.values())
    assert not any((bits & ~mask[name]).any() for name, bits in changed.items())


class Plain(L.LightningDataModule):
    """Batches, and nothing else that the package's own data modules have."""

    def train_dataloader(self) -> Any:
        ids = torch.arange(24).view(2, 12) + 5
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        row |= {"row": torch.arange(2), "weight": torch.full((2,), 0.5)}
        return DataLoader([{"forget": row, "retain": row}] * 2, batch_size=None)


def test_from_python_with_paths_and_plain_data(tiny_model: str, tmp_path: Path) -> None:
    module = UnlearnModule(model=Path(tiny_model), output=tmp_path / "out", objective="GradDiff")
    trainer(max_steps=2, default_root_dir=tmp_path).fit(module, Plain())
    record = read_record(str(tmp_path / "out"))["lineage"][-1]
    assert (record["base"], record["steps"], record["data"]) == (tiny_model, 2, {})


def test_the_model_it_starts_from_is_no_output(fails: Any, tiny_model: str) -> None:
    same = Path(tiny_model) / ".." / Path(tiny_model).name
    line = fails(*two_steps("--model.overwrite true", model=tiny_model, output=same))
    assert "is the model that this run starts from" in line and weights(tiny_model)


@pytest.mark.parametrize(
    "inside",
    ["--trainer.default_root_dir out", f"{CHECKPOINTS.rpartition(' ')[0]} out/checkpoints"],
    ids=["root", "checkpoints"],
)
def test_nothing_is_kept_in_the_output(fails: Any, tiny_model: str, inside: str) -> None:
    """The model's folder would take the place of checkpoints and logs."""
    assert "lies in the output out" in fails(*two_steps(inside, model=tiny_model))
    assert not Path("out/model.safetensors").exists()


@pytest.mark.parametrize(("interval", "rate"), [("step", 0.0), ("epoch", 0.005)])
def test_a_scheduler_steps_as_told(
    unlearn: Any, tiny_model: str, interval: str, rate: float
) -> None:
    done = unlearn(
        f"--model.lr_interval {interval} --trainer.limit_train_batches 5",
        "--lr_scheduler CosineAnnealingLR --lr_scheduler.T_max 2",
        model=tiny_model,
    )
    assert done.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_failing_to_write_leaves_the_old_folder_whole(
    unlearn: Any, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file in ("config.json", "model.safetensors", "wagle.json"):
        (out / file).write_text("the old one")

    def full(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_text("half a mo")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(WagleError, match="No space"):
        unlearn("--model.overwrite true", model=tiny_model, output=out)
    assert [path.read_text() for path in out.iterdir()] == ["the old one"] * 3
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_chain_of_requests_keeps_its_lineage(
    unlearn: Any, tiny_model: str, rows: dict[str, str]
) -> None:
    masks, second = ("mask1.safetensors", "mask2.safetensors"), rows["retain_test"]
    random_mask(tiny_model, 0.2, masks[0], 1)
    unlearn(f"--model.mask {masks[0]}", model=tiny_model, output="first")
    random_mask("first", 0.2, masks[1], 2)
    tests = json.dumps({"now": second, "before": rows["forget_test"]}, separators=(",", ":"))
    options = f"--model.mask {masks[1]} --data.forget {second} --data.test {tests}"
    unlearn(options, model="first", output="second")
    record = read_record("second")
    one, two = record["lineage"][-2:]
    assert forgotten(record) == [rows["forget"], second]
    assert (one["mask"]["file"], two["mask"]["file"]) == masks
    assert two["base"] == "first" and two["base_fingerprint"] != one["base_fingerprint"]
    assert "bit-identical" in one["verified"] and "bit-identical" in two["verified"]
    card = Path("second/README.md").read_text()
    assert all(text in card for text in (rows["forget"], second, *masks, "Test all of them"))


@pytest.mark.parametrize(
    ("options", "moves", "with_mask"),
    [
        ("--model.modules [mlp]", ".mlp.", False),
        ("--model.layers 1", ".layers.1.", True),
        ("--model.modules [self_attn] --model.layers 0", ".layers.0.self_attn.", True),
    ],
)
def test_restriction_by_module_and_layer(
    unlearn: Any, tiny_model: str, options: str, moves: str, with_mask: bool
) -> None:
    mask = random_mask(tiny_model, 0.5)
    cli = unlearn(options, f"--model.mask {MASK}" if with_mask else "", model=tiny_model)
    for name, bits in moved(tiny_model, "out").items():
        assert bool(bits.any()) == (moves in name), name
        assert not (bits & ~cli.model.mask[name]).any()
        assert not with_mask or not (bits & ~mask[name]).any()
    assert read_record("out")["lineage"][-1]["mask"]["density"] == cli.model.mask.density


def test_nothing_to_move_is_refused(fails: Any, tiny_model: str) -> None:
    def line(options: str) -> str:
        return fails(*two_steps(options, model=tiny_model))

    shapes = parameter_shapes(models.load_model(tiny_model))
    bools = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    WeightMask.from_bools(bools).save("empty.safetensors")
    assert "selects nothing" in line("--model.mask empty.safetensors")
    bools["model.layers.0.mlp.up_proj.weight"][0, 0] = True
    WeightMask.from_bools(bools).save("one.safetensors")
    assert "selects nothing" in line("--model.mask one.safetensors --model.layers 1")
    assert "layers" in line("--model.layers 7")
    assert "no_such" in line("--model.modules [no_such]")
    assert "LBFGS" in line("--optimizer torch.optim.LBFGS --model.layers 1")
    assert not Path("out").exists()
