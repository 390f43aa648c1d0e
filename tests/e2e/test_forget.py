"""``wagle forget`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import same_bits, trainer, words

from wagle_pl import FinetuneModule, ForgetRetainDataModule
from wagle_pl.cli import app as cli
from wagle_pl.data.people import bundled


def run(command: str, *options: Any) -> None:
    cli.main(words(*command.split(), *options))


@pytest.fixture(scope="module")
def known(tiny_model: str, rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learnt the rows."""
    folder = str(tmp_path_factory.mktemp("models") / "known")
    data = ForgetRetainDataModule(rows["forget"], rows["retain"], batch_size=28)
    trainer(max_epochs=120).fit(FinetuneModule(tiny_model, output=folder, lr=1e-2), data)
    return folder


def test_forget_writes_a_model_a_patch_and_a_page(
    empty_folder: None, known: str, rows: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--retain {rows['retain']} --max_steps 2 --density 0.1 --patch p.safetensors"
    with pytest.raises(SystemExit) as stopped:
        run(f"forget {known} {rows['forget']} -o out", options, "--report r.html --redact")
    printed = capsys.readouterr().out
    assert stopped.value.code == 3 and "partly forgotten: " in printed
    assert "model written to out" in printed
    step = json.loads(Path("out/wagle.json").read_text())["lineage"][-1]
    assert (step["objective"]["class"], step["steps"]) == ("NPO", 2)
    assert 0.099 < step["mask"]["density"] <= 0.1 and step["request"]["unit"] == "row"
    assert step["request"]["outcome"] == "partly forgotten"
    assert len(step["request"]["row_digests"]) == 11
    assert step["request"]["row_digests"][10] in Path("r.html").read_text()
    columns = [f"{kind}{side}" for kind in ("", "paraphrased_") for side in ("question", "answer")]
    texts = {row[column] for row in bundled("forget")[:11] for column in columns}
    written = b"".join(path.read_bytes() for path in Path().rglob("*") if path.is_file())
    assert len(texts) > 40 and not [text for text in texts if text.encode() in written]
    run(f"patch apply {known} p.safetensors -o applied")
    assert same_bits("out", "applied")


def test_rows_that_were_never_known_end_in_3_and_write_nothing(
    empty_folder: None, tiny_model: str, rows: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(f"forget {tiny_model} {rows['forget']} -o out --retain {rows['retain']}")
    assert stopped.value.code == 3
    assert capsys.readouterr().out.startswith("not known before: ") and not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("ROWS -o taken", "taken"),
        ("no-rows.jsonl -o x", "no-rows.jsonl"),
        ("ROWS -o MODEL --overwrite", "is the model before unlearning"),
        ("ROWS -o x --overwrite --patch ROWS", "a file of another kind, which would be lost"),
        ("ROWS -o x --density 1.5", "must be in (0, 1], got 1.5"),
    ],
)
def test_a_mistake_of_forget_is_one_line(
    fails: Any, tiny_model: str, rows: dict[str, str], options: str, said: str
) -> None:
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    options = options.replace("ROWS", rows["forget"]).replace("MODEL", tiny_model)
    forget = f"forget {tiny_model} {options}"
    assert said in fails(forget, data=False)
