"""What UnlearnModule writes: dtype, bits, whole or not at all, the record of a chain; restrictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.lm import models
from wagle_pl.lm.saving import read_record, save_model
from wagle_pl.masks import WeightMask
from wagle_pl.unlearning import UnlearnModule
from wagle_pl.unlearning.export import export, forgotten

UNLEARN = (
    "fit",
    "--model",
    "UnlearnModule",
    "--model.objective",
    "GradDiff",
    "--trainer.max_steps",
    "2",
    "--trainer.enable_checkpointing",
    "false",
    "--optimizer",
    "MaskedAdamW",
    "--optimizer.lr",
    "0.01",
)


def stored(folder: str | Path) -> dict[str, torch.Tensor]:
    return {
        name: t
        for file in sorted(Path(folder).glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def random_mask(folder: str, density: float, path: str, seed: int = 0) -> WeightMask:
    """A mask file for the model of a folder."""
    lm = models.load_model(folder)
    generator = torch.Generator().manual_seed(seed)
    bools = {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in lm.named_parameters()
    }
    mask = WeightMask.from_bools(bools, {"model_fingerprint": fingerprint(lm.named_parameters())})
    mask.save(path)
    return mask


def in_bfloat16(folder: str, target: Path) -> str:
    lm = models.load_model(folder, torch.bfloat16)
    return str(save_model(lm, models.load_tokenizer(folder), target, "", {}))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [("MaskedAdamW", "32-true"), ("Sophia", "bf16-true"), ("torch.optim.AdamW", "bf16-mixed")],
)
def test_a_bfloat16_base_keeps_its_frozen_bits(
    wagle: Any, tiny_model: str, tmp_path: Path, optimizer: str, precision: str
) -> None:
    base = in_bfloat16(tiny_model, tmp_path / "base")
    mask = random_mask(base, 0.1, "mask.safetensors")
    options = (
        "--optimizer",
        optimizer,
        "--optimizer.weight_decay",
        "0.1",
        "--trainer.precision",
        precision,
    )
    options += (
        "--model.verify",
        "step",
        "--trainer.gradient_clip_val",
        "1.0",
        "--trainer.accumulate_grad_batches",
        "2",
    )
    wagle(
        *UNLEARN[:-4],
        *options,
        "--optimizer.lr",
        "0.01",
        "--model.model",
        base,
        "--model.output",
        "out",
        "--model.mask",
        "mask.safetensors",
    )
    before, after = stored(base), stored("out")
    assert before.keys() == after.keys()
    for name in before:
        assert after[name].dtype == torch.bfloat16
        differ = before[name].view(torch.int16) != after[name].view(torch.int16)
        assert not (differ & ~mask[name]).any()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "frozen weights are bit-identical" in Path("out/README.md").read_text()


def stored_as(folder: str, target: Path, dtypes: dict[str, torch.dtype]) -> str:
    """A copy of a model folder with each weight in the dtype of the first part of a name that fits."""
    shutil.copytree(folder, target)
    tensors = {
        name: tensor.to(next(dtype for part, dtype in dtypes.items() if part in name))
        for name, tensor in stored(folder).items()
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
    ],
    ids=["half", "single", "mixed", "mixed in bfloat16", "bfloat16"],
)
def test_frozen_bits_are_those_of_the_file(
    wagle: Any, tiny_model: str, tmp_path: Path, dtypes: dict[str, torch.dtype], precision: str
) -> None:
    """Whatever dtype a run works in: its output, and what is made of its checkpoint."""
    base = stored_as(tiny_model, tmp_path / "base", dtypes)
    mask = random_mask(base, 0.1, "mask.safetensors")
    options = [option if option != "false" else "true" for option in UNLEARN]
    wagle(
        *options,
        "--model.model",
        base,
        "--model.output",
        "out",
        "--model.mask",
        "mask.safetensors",
        "--trainer.precision",
        precision,
        "--trainer.callbacks",
        "ModelCheckpoint",
        "--trainer.callbacks.dirpath",
        "checkpoints",
    )
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    export(checkpoint, "exported")
    before = stored(base)
    for folder in ("out", "exported"):
        after = stored(folder)
        assert {name: tensor.dtype for name, tensor in after.items()} == {
            n: t.dtype for n, t in before.items()
        }
        moved = {
            name: before[name].view(torch.uint8) != after[name].view(torch.uint8) for name in before
        }
        moved = {n: bits.view(*before[n].shape, -1).any(-1) for n, bits in moved.items()}
        assert not any((moved[name] & ~mask[name]).any() for name in before)
        share = sum(int(bits.sum()) for bits in moved.values()) / mask.count()
        assert (
            share > 0.5
        )  # of the selected, some are not used, and steps below a dtype's precision are lost
    assert all(torch.equal(stored("out")[name], stored("exported")[name]) for name in before)


class OwnOptimizer(UnlearnModule):
    """Overrides what a Lightning user overrides first."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def test_an_optimizer_of_ones_own_leaves_frozen_weights_alone(wagle: Any, tiny_model: str) -> None:
    mask = random_mask(tiny_model, 0.2, "mask.safetensors")
    wagle(
        *UNLEARN[:-4],
        "--model",
        f"{__name__}.OwnOptimizer",
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--model.objective",
        "GradDiff",
        "--model.mask",
        "mask.safetensors",
    )
    before, after = stored(tiny_model), stored("out")
    moved = {name: before[name] != after[name] for name in before}
    assert any(bits.any() for bits in moved.values())
    assert not any((moved[name] & ~mask[name]).any() for name in moved)


class Plain(L.LightningDataModule):
    """Batches, and nothing else that the package's own data modules have."""

    def train_dataloader(self) -> Any:
        ids = torch.arange(24).view(2, 12) + 5
        row = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids,
            "row": torch.arange(2),
            "weight": torch.full((2,), 0.5),
        }
        return DataLoader([{"forget": row, "retain": row}] * 2, batch_size=None)


def test_from_python_with_paths_and_plain_data(tiny_model: str, tmp_path: Path) -> None:
    module = UnlearnModule(model=Path(tiny_model), output=tmp_path / "out", objective="GradDiff")
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, Plain())
    record = read_record(str(tmp_path / "out"))["lineage"][-1]
    assert (record["base"], record["steps"], record["data"]) == (tiny_model, 2, {})


def test_the_model_it_starts_from_is_no_output(fails: Any, tiny_model: str) -> None:
    same = str(Path(tiny_model) / ".." / Path(tiny_model).name)
    assert "is the model that this run starts from" in fails(
        *UNLEARN, "--model.model", tiny_model, "--model.output", same, "--model.overwrite", "true"
    )
    assert stored(tiny_model)


@pytest.mark.parametrize("where", ["root", "checkpoints"])
def test_nothing_is_kept_in_the_output(fails: Any, tiny_model: str, where: str) -> None:
    """The model's folder would take the place of checkpoints and logs."""
    inside = {
        "root": ("--trainer.default_root_dir", "out"),
        "checkpoints": (
            "--trainer.enable_checkpointing",
            "true",
            "--trainer.callbacks",
            "ModelCheckpoint",
            "--trainer.callbacks.dirpath",
            "out/checkpoints",
        ),
    }
    message = fails(*UNLEARN, *inside[where], "--model.model", tiny_model, "--model.output", "out")
    assert "lies in the output out" in message and not Path("out/model.safetensors").exists()


@pytest.mark.parametrize(("interval", "rate"), [("step", 0.0), ("epoch", 0.005)])
def test_a_scheduler_steps_as_told(wagle: Any, tiny_model: str, interval: str, rate: float) -> None:
    done = wagle(
        *UNLEARN,
        "--model.model",
        tiny_model,
        "--model.output",
        "out",
        "--model.lr_interval",
        interval,
        "--lr_scheduler",
        "CosineAnnealingLR",
        "--lr_scheduler.T_max",
        "2",
        "--trainer.limit_train_batches",
        "5",
    )
    assert done.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_failing_to_write_leaves_the_old_folder_whole(
    wagle: Any, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file in ("config.json", "model.safetensors"):
        (out / file).write_text("the old one")

    def full(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_text("half a mo")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(WagleError, match="No space"):
        wagle(
            *UNLEARN,
            "--model.model",
            tiny_model,
            "--model.output",
            str(out),
            "--model.overwrite",
            "true",
        )
    assert [path.read_text() for path in out.iterdir()] == ["the old one"] * 2
    assert [path.name for path in tmp_path.glob(".*") if path.name != ".references"] == []


def test_a_chain_of_requests_keeps_its_lineage(
    wagle: Any, tiny_model: str, rows: dict[str, str]
) -> None:
    options = UNLEARN
    random_mask(tiny_model, 0.2, "mask1.safetensors", 1)
    wagle(
        *options,
        "--model.model",
        tiny_model,
        "--model.output",
        "first",
        "--model.mask",
        "mask1.safetensors",
    )
    random_mask("first", 0.2, "mask2.safetensors", 2)
    second = rows["retain_test"]
    wagle(
        *options,
        "--model.model",
        "first",
        "--model.output",
        "second",
        "--model.mask",
        "mask2.safetensors",
        "--data.forget",
        second,
        "--data.test",
        f"{{now: {second}, before: {rows['forget_test']}}}",
    )
    record = read_record("second")
    one, two = record["lineage"][-2:]
    assert forgotten(record) == [rows["forget"], second]
    assert (one["mask"]["file"], two["mask"]["file"]) == ("mask1.safetensors", "mask2.safetensors")
    assert two["base"] == "first" and two["base_fingerprint"] != one["base_fingerprint"]
    assert "bit-identical" in one["verified"] and "bit-identical" in two["verified"]
    card = Path("second/README.md").read_text()
    for text in (
        rows["forget"],
        second,
        "mask1.safetensors",
        "mask2.safetensors",
        "Test all of them",
    ):
        assert text in card


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        (("--model.modules", "[mlp]"), lambda name: ".mlp." in name),
        (("--model.layers", "1"), lambda name: ".layers.1." in name),
        (
            ("--model.modules", "[self_attn]", "--model.layers", "0"),
            lambda name: ".layers.0.self_attn." in name,
        ),
    ],
)
@pytest.mark.parametrize("with_mask", [False, True])
def test_restriction_by_module_and_layer(
    wagle: Any, tiny_model: str, options: tuple[str, ...], moves: Any, with_mask: bool
) -> None:
    mask = random_mask(tiny_model, 0.5, "mask.safetensors")
    if with_mask:
        options += ("--model.mask", "mask.safetensors")
    cli = wagle(*UNLEARN, *options, "--model.model", tiny_model, "--model.output", "out")
    before, after = stored(tiny_model), stored("out")
    for name in before:
        differ = before[name].view(torch.int32) != after[name].view(torch.int32)
        assert bool(differ.any()) == moves(name), name
        assert not (differ & ~cli.model.mask[name]).any()
        if with_mask:
            assert not (differ & ~mask[name]).any()
    assert read_record("out")["lineage"][-1]["mask"]["density"] == cli.model.mask.density


def test_nothing_to_move_is_refused(fails: Any, tiny_model: str) -> None:
    options = (*UNLEARN, "--model.model", tiny_model, "--model.output", "out")
    bools = {
        n: torch.zeros(s, dtype=torch.bool)
        for n, s in parameter_shapes(models.load_model(tiny_model)).items()
    }
    WeightMask.from_bools(bools).save("empty.safetensors")
    assert "selects nothing" in fails(*options, "--model.mask", "empty.safetensors")
    bools["model.layers.0.mlp.up_proj.weight"][0, 0] = True
    WeightMask.from_bools(bools).save("one.safetensors")
    assert "selects nothing" in fails(
        *options, "--model.mask", "one.safetensors", "--model.layers", "1"
    )
    assert "layers" in fails(*options, "--model.layers", "7")
    assert "no_such" in fails(*options, "--model.modules", "[no_such]")
    assert "LBFGS" in fails(
        *options[:-7], "torch.optim.LBFGS", *options[-6:], "--model.layers", "1"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize("before", ["nothing", "a file", "a folder"])
def test_a_folder_takes_the_place_of_what_was_there(tmp_path, before):

    place = tmp_path / "place"
    if before == "a file":
        place.write_text("old")
    elif before == "a folder":
        place.mkdir()
        (place / "old").write_text("old")
    with atomic_path(place) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert [path.name for path in place.iterdir()] == ["new"] and [
        path.name for path in tmp_path.iterdir()
    ] == ["place"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "elsewhere/models").mkdir(parents=True)
    (tmp_path / "elsewhere/models/old").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere/models")
    with atomic_path(link) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert link.is_symlink() and [path.name for path in link.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["models"]
