"""Studies as a user runs them: from start to finish, stopped, grown, locked, and with mistakes in the input."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import write_rows
from safetensors.torch import load_file

from wagle_pl import WeightMask
from wagle_pl.cli import app as cli
from wagle_pl.cli.app import run as real_run
from wagle_pl.core.errors import WagleError
from wagle_pl.data.people import bundled
from wagle_pl.evaluation.results import load_table
from wagle_pl.lm.tiny import create_tiny_llama
from wagle_pl.study import Study
from wagle_pl.study.grid import passes
from wagle_pl.study.runs import LOCK_FILE, RunTable, locked
from wagle_pl.study.text import markdown

# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_table_grows_and_keeps_its_settings(tmp_path):
    table = RunTable(tmp_path, {"steps": 3, "target": "a"})
    table.append([{"run": "x", "step": 1, "forget/probability": 0.5}])
    table = RunTable(tmp_path, {"steps": 3, "target": "a"})
    table.append([{"run": "y", "step": 1, "model_utility": 0.25}])
    rows = load_table(tmp_path / "study.parquet")
    assert table.finished() == {"x", "y"} and [row["model_utility"] for row in rows] == [None, 0.25]
    with pytest.raises(
        WagleError, match=r"other settings \(steps, target\): choose another --output"
    ):
        RunTable(tmp_path, {"steps": 4, "target": "b"})


def test_pieces_of_a_study_are_joined(tmp_path):
    settings = {"steps": 3}
    for name, runs_ in (("a", "xy"), ("b", "yz"), ("c", "")):
        (tmp_path / name).mkdir()
        RunTable(tmp_path / name, settings).append(
            [{"run": run, "step": s, "lr": name} for run in runs_ for s in (1, 2)]
        )
    table = RunTable(tmp_path / "a", settings)
    assert table.join([str(tmp_path / "b"), str(tmp_path / "b")]) == 1
    assert [(row["run"], row["lr"]) for row in table.rows] == [("x", "a")] * 2 + [
        ("y", "a")
    ] * 2 + [("z", "b")] * 2
    with pytest.raises(WagleError, match=r"--join: there is no study in .*nowhere"):
        table.join([str(tmp_path / "nowhere")])
    with pytest.raises(WagleError, match=r"other settings \(steps\): it is another study"):
        RunTable(tmp_path / "d", {"steps": 4}).join([str(tmp_path / "b")])


def test_a_table_without_runs_binds_nobody(tmp_path):
    RunTable(tmp_path, {"steps": 3}).write()
    assert not (tmp_path / "study.parquet").exists()


def test_no_hours_leave_a_new_folder_free(config, models):
    study(config(), "--hours", "0")
    assert "0 of 2 runs are finished" in Path("out/study.md").read_text()
    study(
        config(steps=2, points=1, masks=["dense"], limit_test=3, target=f"{models}/base"),
        "--hours",
        "0",
    )
    study(config(steps=2, points=1, masks=["dense"]))
    assert [row["step"] for row in load_table(Path("out/study.parquet"))] == [2]


def test_a_damaged_table_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b/study.parquet").write_bytes(b"no table")
    with pytest.raises(WagleError, match=r"b/study.parquet cannot be read"):
        RunTable(tmp_path / "b", {})
    with pytest.raises(WagleError, match=r"b/study.parquet cannot be read"):
        RunTable(tmp_path / "a", {}).join([str(tmp_path / "b")])


def test_a_lock_of_another_host_stays(tmp_path):
    (tmp_path / LOCK_FILE).write_text(
        json.dumps({"pid": 1, "host": "elsewhere.invalid", "since": "then"})
    )
    with (
        pytest.raises(WagleError, match=r"process 1 on elsewhere.invalid, since then.*delete"),
        locked(tmp_path),
    ):
        pass


def test_a_second_study_is_kept_out_and_a_dead_one_replaced(tmp_path, heard):
    hold = (
        "import sys, time; from pathlib import Path; from wagle_pl.study.runs import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(WagleError, match=rf"another study works in .*process {other.pid} on"),
            locked(tmp_path),
        ):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with locked(tmp_path):
        assert "took over the lock" in heard.text and f"process {other.pid} on" in heard.text
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    heard.clear()
    with locked(tmp_path):
        assert not heard.text  # a study that ended well leaves nothing


# -- as a user runs it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder with a target that knows a few rows by heart, a retrained model, and the rows."""
    folder = tmp_path_factory.mktemp("study")
    for name, count in (("forget", 6), ("retain", 8)):
        write_rows(
            folder / f"{name}.jsonl",
            [{k: row[k] for k in ("question", "answer")} for row in bundled(name)[:count]],
        )
    texts = [row[column] for row in bundled("forget") for column in ("question", "answer")]
    create_tiny_llama(folder / "base", texts, vocab_size=400, hidden_size=32, layers=2, heads=4)
    quiet = [
        f"--trainer.{name}=false"
        for name in ("logger", "enable_progress_bar", "enable_checkpointing")
    ]
    for name, rows in (("target", "all"), ("retrained", "retain")):
        real_run(
            [
                "fit",
                "--model=FinetuneModule",
                f"--model.model={folder}/base",
                f"--model.output={folder}/{name}",
                f"--model.train_on={rows}",
                "--data=ForgetRetainDataModule",
                f"--data.forget={folder}/forget.jsonl",
                f"--data.retain={folder}/retain.jsonl",
                "--optimizer=MaskedAdamW",
                "--optimizer.lr=1e-2",
                "--trainer.max_epochs=60",
                "--trainer.accelerator=cpu",
                f"--trainer.default_root_dir={folder}",
                *quiet,
            ]
        )
    return folder


@pytest.fixture
def config(models, tmp_path, monkeypatch):
    """A study as a YAML file in an empty folder: config(**changes) -> its path."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        init = {
            "forget": f"{models}/forget.jsonl",
            "retain": f"{models}/retain.jsonl",
            "batch_size": 4,
        }
        content = {
            "target": f"{models}/target",
            "retrained": f"{models}/retrained",
            "output": "out",
            "data": {"class_path": "ForgetRetainDataModule", "init_args": init},
            "objectives": ["GradDiff"],
            "masks": ["dense", {"score": "wagle", "density": 0.3}],
            "learning_rates": [1e-2],
            "seeds": [0],
            "steps": 6,
            "points": 3,
            "generate": "never",
            "trainer": {"accelerator": "cpu"},
            **changes,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "study.yaml")

    return write


@pytest.mark.parametrize(
    ("file", "arms", "count", "groups"),
    [
        ("tofu/study", 3 * 23, 3 * (22 * 7 + 3) * 3, 3),
        ("tofu/study_po", 23, (22 * 8 + 3) * 3, 3),
        ("people/study", 3, 18, 1),
        ("people/study_full", 2 * 23, 2 * (22 * 7 + 3) * 3, 3),
        ("people/study_po", 23, (22 * 7 + 3) * 3, 3),
    ],
)
def test_the_studies_of_the_benchmarks(monkeypatch, file, arms, count, groups):
    made = []
    monkeypatch.setattr(Study, "run", lambda self: made.append(self))
    study(file)
    grid = list(made[0].grid.runs({}))
    assert len(grid) == len({run.id for run in grid}) == count
    assert len({(run.objective.name, run.mask.name) for run in grid}) == arms
    assert len(passes([m.of_seed(0) for m in made[0].grid.masks if m.kind == "score"])) == groups
    # the runs of the published table are known again, wherever classes have moved to since
    found = Path(__file__).parents[2] / f"configs/{file.replace('/', '/results/')}.json"
    if found.is_file():
        settings = json.loads(found.read_text())["settings"]
        there = {row["run"] for row in load_table(found.with_suffix(".parquet"))}
        assert there <= {run.id for run in made[0].grid.runs(settings)}


def study(*args):
    cli.main(["study", "--config", *map(str, args)])


def test_a_study_from_start_to_finish(config, capsys, tmp_path):
    """It runs, is started again and runs nothing, grows, and forgets at every point what it says."""
    study(config())
    said = capsys.readouterr().out
    assert (
        "[2/2] GradDiff, wagle 0.3, lr 0.01, seed 0: forget 0." in said and "Against dense:" in said
    )
    rows = load_table(Path("out/study.parquet"))
    assert [row["step"] for row in rows] == [2, 4, 6] * 2 and {row["score"] for row in rows} == {
        None,
        "wagle",
    }
    assert all(
        row["forget"] == row["forget/probability"] and row["utility"] == row["retain/probability"]
        for row in rows
    )
    assert rows[2]["forget"] < rows[0]["forget"] < 0.999
    found = json.loads(Path("out/study.json").read_text())
    assert found["forget"] == "forget/probability" and found["utility"] == "retain/probability"
    assert (
        found["target"]["forget/probability"] > 0.8 > 0.3 > found["retrained"]["forget/probability"]
    )
    assert [arm["mask"] for arm in found["headline"]] == ["dense", "wagle 0.3"]
    metrics = json.loads(Path("out/target/metrics.json").read_text())
    assert metrics["forget/probability"] == found["target"]["forget/probability"]
    drawn = Path("out/study.svg").read_text()
    assert all(word in drawn for word in ("dense", "wagle 0.3", "retrained", "forget/probability"))
    text = Path("out/study.md").read_text()
    assert "2 of 2 runs are finished" in text and "| dense |" in text and text == markdown(found)
    before = Path("out/study.parquet").read_bytes()
    masks = {file: file.stat().st_mtime_ns for file in Path("out/masks").iterdir()}
    study(config())
    assert "2 runs, 2 of them finished; 0 to do" in capsys.readouterr().out
    assert Path("out/study.parquet").read_bytes() == before
    study(
        config(
            seeds=[0, 1], masks=["dense", {"score": "wagle", "density": 0.3, "name": "w"}, "random"]
        )
    )
    said = capsys.readouterr().out
    assert (
        "6 runs, 2 of them finished; 4 to do" in said and "attribution, 2 masks" in said
    )  # a random one each seed
    earlier, rows = rows, load_table(Path("out/study.parquet"))
    assert len(rows) == 18
    for row, kept in zip(
        earlier, rows[:6], strict=True
    ):  # what was measured stays, whatever a mask is called now
        assert kept == row | {"mask": kept["mask"]}
    assert {row["mask"] for row in rows} == {
        "dense",
        "w 0.3",
        "random 0.2",
    }  # also of the runs of before
    assert all(file.stat().st_mtime_ns == masks[file] for file in masks)
    assert not list(Path("out").glob("*.tmp")) and Path("out/study.lock").read_text() == ""


def test_points_do_not_change_the_run_and_a_kept_model_tests_the_same(config, tmp_path, models):
    study(
        config(
            output="three",
            masks=["dense"],
            keep_models=True,
            generate="end",
            module={"max_new_tokens": 4},
        )
    )
    study(config(output="one", masks=["dense"], points=1))
    three, one = (load_table(Path(f"{name}/study.parquet")) for name in ("three", "one"))
    assert three[-1]["forget"] == one[-1]["forget"] and three[-1]["utility"] == one[-1]["utility"]
    assert (
        three[0]["forget/rougeL_recall"] is None and three[-1]["forget/rougeL_recall"] is not None
    )
    data = [
        "--data=ForgetRetainDataModule",
        f"--data.forget={models}/forget.jsonl",
        f"--data.retain={models}/retain.jsonl",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
    ]
    real_run(
        [
            "fit",
            "--model=UnlearnModule",
            f"--model.model={models}/target",
            "--model.output=fitted",
            "--model.objective=GradDiff",
            "--optimizer=MaskedAdamW",
            "--optimizer.lr=1e-2",
            "--trainer.max_steps=6",
            "--trainer.enable_checkpointing=false",
            *data,
        ]
    )
    kept = f"three/models/{three[0]['run']}"
    ours, fitted = (load_file(f"{folder}/model.safetensors") for folder in (kept, "fitted"))
    assert all(
        torch.equal(ours[name], fitted[name]) for name in fitted
    )  # a run is what wagle fit does
    tested = real_run(
        [
            "test",
            "--model=EvaluationModule",
            f"--model.model={kept}",
            "--model.output=test",
            "--model.max_new_tokens=4",
            *data,
        ]
    )
    for name, value in tested.model.metrics.items():
        assert three[-1][name] == pytest.approx(value, rel=1e-4), name


def test_short_tests_along_the_way_and_an_end_at_the_level(config, tmp_path):
    """Each point has the numbers of a full test, as far as it has any; a run ends where the level is reached."""
    study(config(output="full", masks=["dense"], points=6))
    study(config(output="lean", masks=["dense"], points=6, along="answers"))
    full, lean = (load_table(Path(f"{name}/study.parquet")) for name in ("full", "lean"))
    for one, other in zip(lean, full, strict=True):
        assert all(
            one[name] == pytest.approx(other[name], rel=1e-4)
            for name in ("step", "forget", "utility")
        )
    assert {row["forget/exact_memorization"] for row in lean[:-1]} == {None} and full[0][
        "forget/exact_memorization"
    ] is not None
    measured = {name for name, value in full[-1].items() if value is not None}
    assert measured == {name for name, value in lean[-1].items() if value is not None}
    level = (full[1]["forget"] + full[2]["forget"]) / 2
    assert full[2]["forget"] < level < full[1]["forget"]
    study(
        config(
            output="short",
            masks=["dense"],
            points=6,
            along="answers",
            until_level=True,
            forget_level=level,
        )
    )
    short = load_table(Path("short/study.parquet"))
    assert [row["step"] for row in short] == [1, 2, 3]
    assert [row["forget"] for row in short] == pytest.approx(
        [row["forget"] for row in full[:3]], rel=1e-4
    )
    assert short[-1]["forget/exact_memorization"] == pytest.approx(
        full[2]["forget/exact_memorization"]
    )
    results = [
        json.loads(Path(f"{name}/study.json").read_text())["settings"]["ends_at"]
        for name in ("lean", "short")
    ]
    assert results == [None, {"forget/probability": level}]


def test_a_study_that_builds_on_another(config, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Study, "run", lambda self: made.append(self))
    config()
    (tmp_path / "more.yaml").write_text("base: study.yaml\nseeds: [3]\n")
    study("more.yaml")
    assert made[0].seeds == [3] and [mask.name for mask in made[0].grid.masks] == [
        "dense",
        "wagle 0.3",
    ]


def test_a_killed_study_goes_on(config, capsys, monkeypatch):
    real, ran = Study._run, []

    def run(self, run):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(run.name)
        return real(self, run)

    monkeypatch.setattr(Study, "_run", run)
    with pytest.raises(SystemExit) as exit_:
        study(config(generate="never"))
    assert exit_.value.code == 130
    assert "stopped; the same command goes on (1 of 2 runs are missing)" in capsys.readouterr().out
    assert len({row["run"] for row in load_table(Path("out/study.parquet"))}) == 1
    monkeypatch.setattr(Study, "_run", real)
    study(config())
    assert "2 runs, 1 of them finished; 1 to do" in capsys.readouterr().out
    assert len({row["run"] for row in load_table(Path("out/study.parquet"))}) == 2


def test_a_diverging_run_is_noted_and_the_study_goes_on(config, capsys):
    study(config(learning_rates=[1e-2, 1e30], masks=["dense"]))
    said = capsys.readouterr().out
    assert "lr 1e+30, seed 0: diverged at step" in said
    rows = load_table(Path("out/study.parquet"))
    assert sum(row["note"] is not None for row in rows) == 1
    assert json.loads(Path("out/study.json").read_text())["headline"][0]["diverged"] == 1
    assert "1 run diverged" in Path("out/study.md").read_text()


def test_another_target_in_the_folder_of_a_study_is_refused(config, capsys, models):
    study(config(steps=1, points=1, masks=["dense"]))
    before = {file: file.read_bytes() for file in Path("out").rglob("*") if file.is_file()}
    line = refused(capsys, config(steps=1, points=1, masks=["dense"], target=f"{models}/retrained"))
    assert "holds results of another test (other model); choose another --output" in line
    line = refused(capsys, config(steps=2, points=1, masks=["dense"]))
    assert (
        "out/study.parquet holds runs with other settings (length): choose another --output" in line
    )
    assert before == {file: file.read_bytes() for file in Path("out").rglob("*") if file.is_file()}


def test_in_pieces(config, capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "'[NPO, dense, wagle 0.2]'" in said and "'[runs/one, runs/two]'" in said
    study(config(objectives=["GradDiff", "PO"], steps=2, points=1), "--only", "PO", "--hours", "0")
    assert "4 runs, 0 of them finished; 2 to do" in capsys.readouterr().out
    study(config(objectives=["GradDiff", "PO"], steps=2, points=1), "--only", "[PO, dense]")
    said = capsys.readouterr().out
    assert "4 runs, 0 of them finished; 1 to do" in said and "PO, dense" in said
    other = {"class_path": "GradDiff", "init_args": {"retain_weight": 2.0}}
    study(config(objectives=[other], masks=["dense"], steps=2, points=1))
    kept = config(
        objectives=["PO", {**other, "name": "weighted"}], masks=["dense"], steps=2, points=1
    )
    study(kept, "--objectives", "[GradDiff]")
    found = json.loads(Path("out/study.json").read_text())["headline"]
    assert len({arm["objective"] for arm in found}) == 3 and all(arm["runs"] == 1 for arm in found)
    study(kept)
    names = [arm["objective"] for arm in json.loads(Path("out/study.json").read_text())["headline"]]
    assert names == [
        "PO",
        "weighted",
        "GradDiff",
    ]  # what is described the same is the same, whatever it is called
    capsys.readouterr()
    study(config(objectives=["GradDiff", "PO"], steps=2, points=1), "--hours", "0")
    said = capsys.readouterr().out
    assert "0 h are over; the same command goes on with the 2 runs left" in said
    assert "attribution" not in said


def refused(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        study(*args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        exit_.value.code == 2
        and len([line for line in lines if line.startswith("wagle: error: ")]) == 1
    )
    return next(line for line in lines if line.startswith("wagle: error: "))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": ["NPQ"]}, "unknown objective 'NPQ'; choose one of CEU, DPO"),
        ({"masks": ["wagel"]}, "unknown mask 'wagel'; choose one of dense, lora, Curvature"),
        ({"target": "./nowhere"}, "model folder ./nowhere does not exist"),
        (
            {"retrained": None},
            "give --retrained, the model trained without the forget rows, or --forget_level",
        ),
        ({"optimizer": "Adamant"}, "unknown optimizer 'Adamant'; choose one of"),
        ({"optimizer": {"class_path": "AdamW", "init_args": {"momentum": 1}}}, "optimizer AdamW: "),
        ({"steps": 3, "epochs": 1}, "give --steps or --epochs, not both"),
        ({"trainer": {"devices": 2}}, "a study runs on one device"),
        ({"trainer": {"max_steps": 2}}, "--trainer: the study sets max_steps itself"),
        (
            {"module": {"mask": "x"}},
            "--module: the study sets mask itself: leave it out",
        ),
        (
            {"module": {"warmup": "foo"}},
            "--module: warmup must be a number, got foo",
        ),
        (
            {"module": {"wamup": 1}},
            "--module: UnlearnModule has no option 'wamup'; did you mean warmup?",
        ),
        ({"module": {"decay": "foo"}}, "--module: decay must be "),
        ({"module": {"max_new_tokens": 0}}, "--module: max_new_tokens must be at least 1, got 0"),
        ({"masks": []}, "masks is an empty list"),
        ({"output": "study.yaml/x"}, "output study.yaml/x cannot be written: study.yaml is a file"),
        ({"output": "study.yaml"}, "output study.yaml is a file, and a folder is to be written"),
        ({"objectives": []}, "objectives is an empty list"),
        (
            {"masks": [{"score": "wagle", "hessian": "foo"}]},
            "masks: wagle foo 0.2: unknown hessian 'foo'; choose one of",
        ),
        ({"trainer": {"precision": "17-true"}}, "trainer: Precision '17-true' is invalid"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        (
            {"along": "answers", "generate": "always"},
            "--along answers generates nothing before a run's end",
        ),
        ({"points": 0}, "--points must be at least 1, got 0"),
        (
            {"only": ["SNIP"]},
            "--only: no objective or mask is called 'SNIP'; there are: GradDiff, dense, wagle 0.3",
        ),
    ],
)
def test_mistakes_that_show_at_once(config, capsys, changes, said):
    assert said in refused(capsys, config(**changes))
    assert not Path("out").exists()


def test_mistakes_that_the_model_shows(config, capsys, tmp_path):
    line = refused(capsys, config(utility="retain/bleu"))
    assert (
        "--utility: 'retain/bleu' is not measured at every point; there are: forget/exact_memorization"
        in line
    )
    line = refused(
        capsys, config(utility="retain/rougeL_recall", generate="end", module={"max_new_tokens": 2})
    )
    assert "is not measured at every point (it needs --generate always)" in line
    line = refused(
        capsys, config(output="lean", utility="retain/exact_memorization", along="answers")
    )
    assert "is not measured at every point (it needs --along all)" in line
    other = WeightMask.from_bools({"lm_head.weight": torch.ones(3, 2, dtype=torch.bool)}).save(
        tmp_path / "other"
    )
    line = refused(capsys, config(masks=["dense", {"file": str(other)}]))
    assert f"masks: mask {other}" in line and "another model" in line


def test_a_target_that_does_not_know_the_rows(config, capsys, heard, tiny_model):
    study(config(target=tiny_model, steps=1, points=1, masks=["dense"], forget_level=0.5))
    assert any(
        "does not know the forget set" in record.message and "nothing to unlearn" in record.message
        for record in heard.records
    )
    assert "there is nothing to unlearn" in Path("out/study.md").read_text()
    assert math.isclose(json.loads(Path("out/study.json").read_text())["forget_level"], 0.5)
