"""Studies as a user runs them: from start to finish, stopped, grown, locked, and with mistakes in the input."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import QUIET, data_options, fit_arguments, weights, write_rows

from wagle_pl import WeightMask
from wagle_pl.cli import app as cli
from wagle_pl.cli.app import run as real_run
from wagle_pl.core.errors import WagleError
from wagle_pl.data.people import bundled
from wagle_pl.evaluation.results import load_table
from wagle_pl.lab.study.grid import passes
from wagle_pl.lab.study.runs import LOCK_FILE, RunTable, locked
from wagle_pl.lab.study.study import Study
from wagle_pl.lab.study.text import markdown

approx = pytest.approx

# -- the folder ------------------------------------------------------------------------------------


#: What each row of a table has.
ROW = dict.fromkeys(("objective", "mask", "objective_id", "mask_id"), "m")
ROW |= {"lr": 0.1, "seed": 0, "seconds": 1.0}


def table_in(folder, runs="", lr=0.1, **settings):
    folder.mkdir(exist_ok=True)
    table = RunTable(folder, settings)
    table.append([{**ROW, "run": run, "step": step, "lr": lr} for run in runs for step in (1, 2)])
    return table


def test_the_table_grows_and_keeps_its_settings(tmp_path):
    assert not table_in(tmp_path, steps=3).path.exists()  # without runs it binds nobody
    table = RunTable(tmp_path, {"steps": 3, "target": "a"})
    table.append([{**ROW, "run": "x", "step": 1, "forget/probability": 0.5}])
    table = RunTable(tmp_path, {"steps": 3, "target": "a"})
    table.append([{**ROW, "run": "y", "step": 1, "model_utility": 0.25}])
    rows = load_table(tmp_path / "study.parquet")
    assert table.finished() == {"x", "y"} and [row["model_utility"] for row in rows] == [None, 0.25]
    said = r"other settings \(steps, target\): choose another --output"
    with pytest.raises(WagleError, match=said):
        RunTable(tmp_path, {"steps": 4, "target": "b"})


def test_pieces_of_a_study_are_joined(tmp_path):
    a, b, nowhere = (tmp_path / name for name in ("a", "b", "nowhere"))
    table_in(b, "yz", 0.3, steps=3)
    table = table_in(a, "xy", 0.2, steps=3)
    assert table.join([str(b), str(b)]) == 1
    found = [(row["run"], row["lr"]) for row in table.rows]
    assert found == [("x", 0.2)] * 2 + [("y", 0.2)] * 2 + [("z", 0.3)] * 2
    with pytest.raises(WagleError, match=r"--join: there is no study in .*nowhere"):
        table.join([str(nowhere)])
    with pytest.raises(WagleError, match=r"other settings \(steps\): it is another study"):
        table_in(tmp_path / "d", steps=4).join([str(b)])
    (b / "study.parquet").write_bytes(b"no table")
    for read in (lambda: RunTable(b, {}), lambda: table.join([str(b)])):
        with pytest.raises(WagleError, match=r"b/study.parquet cannot be read"):
            read()


def test_a_second_study_is_kept_out_and_a_dead_one_replaced(tmp_path):
    said = "another study works in"
    with locked(tmp_path), pytest.raises(WagleError, match=said), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()  # which a killed study leaves, too
    with locked(tmp_path):
        pass


# -- as a user runs it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model):
    """Folder with a target that knows a few rows by heart, a retrained model, and the rows."""
    folder = tmp_path_factory.mktemp("study")
    for name, count in (("forget", 6), ("retain", 8)):
        rows = [{k: row[k] for k in ("question", "answer")} for row in bundled(name)[:count]]
        write_rows(folder / f"{name}.jsonl", rows)
    options = "--optimizer MaskedAdamW --optimizer.lr 1e-2 --trainer.max_epochs 60"
    options += " --trainer.enable_checkpointing false --model.output"
    for name, kind in (("target", "all"), ("retrained", "retain")):
        own = (options, folder / name, f"--model.train_on {kind}")
        real_run(fit_arguments("FinetuneModule", tiny_model, files(folder), *own))
    return folder


def files(models):
    return {name: f"{models}/{name}.jsonl" for name in ("forget", "retain")}


@pytest.fixture
def config(models, tmp_path, monkeypatch):
    """A study as a YAML file in an empty folder: config(**changes) -> its path."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        init = {**files(models), "batch_size": 4}
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


def study(*args):
    cli.main(["study", "--config", *map(str, args)])


def rows_of(output="out"):
    return load_table(Path(output) / "study.parquet")


def found_in(output="out"):
    return json.loads((Path(output) / "study.json").read_text())


SHORT = {"steps": 2, "points": 1}


@pytest.fixture
def made(monkeypatch):
    """Studies that are made, and not run."""
    found = []
    monkeypatch.setattr(Study, "run", lambda self: found.append(self))
    return found


def cell_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where in the grid a run is."""
    return tuple(row[name] for name in ("objective", "mask", "lr", "seed"))


def published_runs(table: Path) -> set[tuple[Any, ...]]:
    return {cell_of(row) for row in load_table(table)}


@pytest.mark.parametrize(
    ("file", "arms", "count", "groups"),
    [
        ("tofu/study", 3 * 23, 3 * (22 * 7 + 3) * 3, 3),
        ("people/study", 3, 18, 1),
        ("people/study_full", 2 * 23, 2 * (22 * 7 + 3) * 3, 3),
        ("people/study_recovery", 2 * 6, 2 * 6 * 2 * 3, 1),
        ("people/study_survival", 8 * 3, (5 * 2 + 3 * 3) * 3 * 3, 1),
    ],
)
def test_the_studies_of_the_benchmarks(made, file, arms, count, groups):
    study(file)
    grid = list(made[0].grid.runs({}))
    assert len(grid) == len({run.id for run in grid}) == count
    assert len({(run.objective.name, run.mask.name) for run in grid}) == arms
    assert len(passes([m.of_seed(0) for m in made[0].grid.masks if m.kind == "score"])) == groups
    published = Path(__file__).parents[2] / f"configs/{file.replace('/', '/results/')}.parquet"
    if published.is_file():
        assert published_runs(published) <= {cell_of(run.labels) for run in grid}


@pytest.mark.parametrize(
    ("file", "rates", "options", "count"),
    [
        (
            "tofu/study",
            "[0.35e-4, 0.5e-4, 0.7e-4, 1.0e-4, 1.4e-4, 2.0e-4, 2.8e-4, 4.0e-4]",
            ("--data.test", "{forget: forget05_perturbed, retain: retain_perturbed}"),
            (22 * 8 + 3) * 3,
        ),
        (
            "people/study_full",
            "[0.35e-3, 0.55e-3, 0.9e-3, 1.4e-3, 2.2e-3, 3.5e-3, 5.6e-3]",
            ("--objectives", "[{class_path: PO, init_args: {retain_weight: 8.0}}]"),
            (22 * 7 + 3) * 3,
        ),
    ],
)
def test_the_studies_of_answers(made, file, rates, options, count):
    study(file, "--config", "study_answers", "--learning_rates", rates, *options)
    assert len(list(made[0].grid.runs({}))) == count and made[0].forget == "forget/rougeL_recall"
    table = Path(__file__).parents[2] / f"configs/{file.split('/')[0]}/results/study_po.parquet"
    assert published_runs(table) <= {cell_of(run.labels) for run in made[0].grid.runs({})}


def test_attacks_on_the_command_line(made):
    one = "[{class_path: Relearn, init_args: {rows: [5, 20], every: 5}}, quantise]"
    for given, names in ((one, ["relearn", "quantise"]), ("probe", ["probe"])):
        study("people/study_recovery", "--attacks", given)
        assert [attack.name for attack in made[-1]._attacks] == names
    assert made[0]._attacks[0].rows == [5, 20] and made[0].data.unused_retain == 32


def test_a_study_that_builds_on_another(config, tmp_path, made):
    config()
    (tmp_path / "more.yaml").write_text("base: study.yaml\nseeds: [3]\n")
    study("more.yaml")
    assert made[0].seeds == [3] and len(made[0].grid.masks) == 2


def test_a_study_from_start_to_finish(config, capsys):
    """It runs, is started again and runs nothing, grows, and forgets at every point what it says."""
    study(config())
    said = capsys.readouterr().out
    assert "[2/2] GradDiff, wagle 0.3, lr 0.01, seed 0: forget 0." in said
    assert "Against dense:" in said
    rows, found = rows_of(), found_in()
    assert [row["step"] for row in rows] == [2, 4, 6] * 2
    assert {row["score"] for row in rows} == {None, "wagle"}
    assert all(row["forget"] == row["forget/probability"] for row in rows)
    assert all(row["utility"] == row["retain/probability"] for row in rows)
    assert rows[2]["forget"] < rows[0]["forget"] < 0.999
    assert (found["forget"], found["utility"]) == ("forget/probability", "retain/probability")
    known, unknown = (found[name]["forget/probability"] for name in ("target", "retrained"))
    assert known > 0.8 > 0.3 > unknown
    assert [arm["mask"] for arm in found["headline"]] == ["dense", "wagle 0.3"]
    assert json.loads(Path("out/target/metrics.json").read_text())["forget/probability"] == known
    drawn = Path("out/study.svg").read_text()
    assert all(word in drawn for word in ("dense", "wagle 0.3", "retrained", "forget/probability"))
    text = Path("out/study.md").read_text()
    assert "2 of 2 runs are finished" in text and "| dense |" in text and text == markdown(found)
    before = Path("out/study.parquet").read_bytes()
    masks = {file: file.stat().st_mtime_ns for file in Path("out/masks").iterdir()}
    study(config())
    assert "2 runs, 2 of them finished; 0 to do" in capsys.readouterr().out
    assert Path("out/study.parquet").read_bytes() == before
    renamed = {"score": "wagle", "density": 0.3, "name": "w"}
    study(config(seeds=[0, 1], masks=["dense", renamed, "random"]))
    said = capsys.readouterr().out
    assert "6 runs, 2 of them finished; 4 to do" in said
    assert "attribution, 2 masks" in said  # a random one each seed
    now = rows_of()
    assert len(now) == 18
    for row, kept in zip(rows, now[:6], strict=True):  # what was measured stays, by its name now
        assert kept == row | {"mask": kept["mask"]}
    assert {row["mask"] for row in now} == {"dense", "w 0.3", "random 0.2"}
    assert all(file.stat().st_mtime_ns == masks[file] for file in masks)
    assert not list(Path("out").glob("*.tmp"))


def test_arms_with_a_rule_and_an_optimiser_of_their_own(config):
    """A run takes the step rule, optimiser and rate of its objective."""
    sam = {"class_path": "SAM", "init_args": {"rho": 0.1}}
    own = {"step_rule": sam, "optimizer": "SignSGD", "learning_rates": [1e-3]}
    arms = ["GradDiff", {"class_path": "GradDiff", **own}]
    search = config(objectives=arms, masks=["dense"], keep_models=True, **SHORT)
    study(search)
    runs = {row["objective"]: row["run"] for row in rows_of()}
    record, plain = (
        json.loads(Path(f"out/models/{runs[name]}/wagle.json").read_text())["lineage"][-1]
        for name in ("GradDiff+SAM+SignSGD", "GradDiff")
    )
    assert record["step_rule"] == {"class": "SAM", "rho": 0.1} and "step_rule" not in plain
    before = weights(record["base"])
    after = weights(f"out/models/{runs['GradDiff+SAM+SignSGD']}")
    moved = torch.cat([(after[n] - before[n]).abs().flatten() for n in after])
    assert 1e-3 < moved.max() <= 2.001e-3  # two steps of the learning rate


@pytest.mark.slow
def test_points_do_not_change_the_run_and_a_kept_model_tests_the_same(config, models):
    kept = {"keep_models": True, "generate": "end", "module": {"max_new_tokens": 4}}
    study(config(output="three", masks=["dense"], **kept))
    study(config(output="one", masks=["dense"], points=1))
    three, one = rows_of("three"), rows_of("one")
    assert all(three[-1][name] == one[-1][name] for name in ("forget", "utility"))
    assert [row["forget/rougeL_recall"] is None for row in three] == [True, True, False]
    data = [*data_options(files(models)), *QUIET.split(), "--data.batch_size=4"]
    unlearn = ["--model=UnlearnModule", f"--model.model={models}/target", "--model.output=fitted"]
    unlearn += ["--model.objective=GradDiff", "--optimizer=MaskedAdamW", "--optimizer.lr=1e-2"]
    trainer = ["--trainer.max_steps=6", "--trainer.enable_checkpointing=false"]
    real_run(["fit", *unlearn, *trainer, *data])
    kept = f"three/models/{three[0]['run']}"
    ours, fitted = weights(kept), weights("fitted")  # a run is what wagle fit does
    assert all(torch.equal(ours[name], fitted[name]) for name in fitted)
    test = ["--model=EvaluationModule", f"--model.model={kept}", "--model.output=test"]
    tested = real_run(["test", *test, "--model.max_new_tokens=4", *data])
    for name, value in tested.model.metrics.items():
        assert three[-1][name] == approx(value, rel=1e-4), name


def test_short_tests_along_the_way_and_an_end_at_the_level(config):
    """Each point has the numbers of a full test, as far as it has any; a run ends at the level."""
    common = {"masks": ["dense"], "points": 6}
    study(config(output="full", **common))
    study(config(output="lean", along="answers", **common))
    full, lean = rows_of("full"), rows_of("lean")
    for one, other in zip(lean, full, strict=True):
        for name in ("step", "forget", "utility"):
            assert one[name] == approx(other[name], rel=1e-4)
    memorised = "forget/exact_memorization"
    assert {row[memorised] for row in lean[:-1]} == {None} and full[0][memorised] is not None
    ends = [{name for name, v in rows[-1].items() if v is not None} for rows in (full, lean)]
    assert ends[0] == ends[1]
    level = (full[1]["forget"] + full[2]["forget"]) / 2
    assert full[2]["forget"] < level < full[1]["forget"]
    study(config(output="short", along="answers", until_level=True, forget_level=level, **common))
    short = rows_of("short")
    assert [row["step"] for row in short] == [1, 2, 3]
    assert [row["forget"] for row in short] == approx([row["forget"] for row in full[:3]], rel=1e-4)
    assert short[-1][memorised] == approx(full[2][memorised])
    ends = [found_in(name)["settings"]["ends_at"] for name in ("lean", "short")]
    assert ends == [None, {"forget/probability": level}]


def test_attacks_at_the_level(config, models, capsys):
    """Runs that reach the level are attacked as wagle test attacks the models that they leave."""
    options = {"steps": 2, "rows": [1, 2], "every": 1, "learning_rate": 1e-3}
    attacks = [{"class_path": "Relearn", "init_args": options}, "quantise"]
    common = {"attacks": attacks, "until_level": True, "forget_level": 0.9}
    rates = [{"score": "wagle", "density": 0.3, "learning_rates": [1e-9]}, "lora"]
    given = {**common, "generate": "end", "module": {"max_new_tokens": 2}, "points": 6}
    study(config(masks=rates, **given))
    name = "robustness/relearn_forget_2/forget/probability"
    last = {row["mask"]: row for row in rows_of()}
    assert last["wagle 0.3"][name] is None  # it does not get there
    test = [*data_options(files(models)), *QUIET.split(), "--data.batch_size=4"]
    test += ["--model=EvaluationModule", "--model.max_new_tokens=2", "--model.output=test"]
    test += [f"--model.robustness={json.dumps(attacks)}", "--model.overwrite=true"]
    found = found_in()
    study(config(masks=["lora"], output="kept", keep_models=True, **given))
    kept = f"kept/models/{last['lora']['run']}"
    for model, ours in ((kept, last["lora"]), (f"{models}/target", found["target"])):
        metrics = real_run(["test", f"--model.model={model}", *test]).model.metrics
        compared = {k: v for k, v in metrics.items() if k.startswith("robustness/")}
        assert len(compared) > 20 and compared == approx({k: ours[k] for k in compared}, rel=1e-4)
    assert Path("out/relearn_forget_2.svg").is_file()
    assert "### GradDiff, steps to half" in Path("out/study.md").read_text()
    assert found["settings"]["attacks"][0]["options"] == options
    capsys.readouterr()
    before = Path("out/attacked_target.parquet").stat().st_mtime_ns
    study(config(masks=rates, **given))  # what was attacked stays so
    assert "0 to do" in capsys.readouterr().out
    assert Path("out/attacked_target.parquet").stat().st_mtime_ns == before


def test_a_killed_study_goes_on(config, capsys, monkeypatch):
    real, ran = Study._run, []

    def run(self, run):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(run.name)
        return real(self, run)

    monkeypatch.setattr(Study, "_run", run)
    with pytest.raises(SystemExit) as exit_:
        study(config())
    assert exit_.value.code == 130
    said = "stopped; the same command continues (1 of 2 runs are missing)"
    assert said in capsys.readouterr().out
    assert len({row["run"] for row in rows_of()}) == 1
    monkeypatch.setattr(Study, "_run", real)
    study(config())
    assert "2 runs, 1 of them finished; 1 to do" in capsys.readouterr().out
    assert len({row["run"] for row in rows_of()}) == 2


def test_a_diverging_run_is_noted_and_the_study_goes_on(config, capsys):
    study(config(learning_rates=[1e-2, 1e30], masks=["dense"]))
    assert "lr 1e+30, seed 0: diverged at step" in capsys.readouterr().out
    assert sum(row["note"] is not None for row in rows_of()) == 1
    assert found_in()["headline"][0]["diverged"] == 1
    assert "1 run diverged" in Path("out/study.md").read_text()


@pytest.mark.slow
def test_in_pieces(config, capsys):
    with pytest.raises(SystemExit):
        cli.main(["study", "--help", "all"])
    said = " ".join(capsys.readouterr().out.split())
    assert "'[NPO, dense, wagle 0.2]'" in said and "'[runs/one, runs/two]'" in said
    two = {"objectives": ["GradDiff", "PO"], **SHORT}
    study(config(**two), "--only", "PO", "--hours", "0")
    assert "4 runs, 0 of them finished; 2 to do" in capsys.readouterr().out
    assert "0 of 4 runs are finished" in Path("out/study.md").read_text()
    study(config(**two), "--only", "[PO, dense]")
    said = capsys.readouterr().out
    assert "4 runs, 0 of them finished; 1 to do" in said and "PO, dense" in said
    other = {"class_path": "GradDiff", "init_args": {"retain_weight": 2.0}}
    study(config(objectives=[other], masks=["dense"], **SHORT))
    named = config(objectives=["PO", {**other, "name": "weighted"}], masks=["dense"], **SHORT)
    study(named, "--objectives", "[GradDiff]")
    found = found_in()["headline"]
    assert len({arm["objective"] for arm in found}) == 3 and all(arm["runs"] == 1 for arm in found)
    study(named)  # what is described the same is the same, whatever it is called
    assert [arm["objective"] for arm in found_in()["headline"]] == ["PO", "weighted", "GradDiff"]
    capsys.readouterr()
    study(config(**two), "--hours", "0")
    said = capsys.readouterr().out
    assert "0 h are over; the same command continues with the 2 runs left" in said
    assert "attribution" not in said


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": ["NPQ"]}, "objective: unknown name 'NPQ'; choose one of AltPO, CEU, DPO"),
        ({"masks": ["wagel"]}, "mask: unknown name 'wagel'; choose one of dense, lora, Curvature"),
        ({"seeds": [1, 1]}, "seeds: must be different numbers"),
        ({"target": "./nowhere"}, "model folder ./nowhere does not exist"),
        ({"retrained": None}, "give --retrained, the model trained without the forget rows, or --"),
        ({"optimizer": "Adamant"}, "optimizer: unknown name 'Adamant'; choose one of"),
        ({"optimizer": {"class_path": "AdamW", "init_args": {"momentum": 1}}}, "optimizer AdamW: "),
        ({"steps": 3, "epochs": 1}, "give --steps or --epochs, not both"),
        ({"trainer": {"devices": 2}}, "a study runs on one device"),
        ({"trainer": {"max_steps": 2}}, "--trainer: the study sets max_steps itself"),
        ({"trainer": {"precision": "17-true"}}, "trainer: Precision '17-true' is invalid"),
        ({"module": {"mask": "x"}}, "--module: the study sets mask itself: leave it out"),
        ({"module": {"warmup": "foo"}}, "--module: warmup: "),
        (
            {"module": {"wamup": 1}},
            "--module: UnlearnModule has no option 'wamup'; did you mean warmup?",
        ),
        ({"module": {"decay": "foo"}}, "--module: decay: must be "),
        ({"module": {"max_new_tokens": 0}}, "--module: max_new_tokens: must be at least 1, got 0"),
        ({"output": "study.yaml/x"}, "output study.yaml/x cannot be written: study.yaml is a file"),
        ({"output": "study.yaml"}, "output study.yaml is a file, and a folder is to be written"),
        (
            {"along": "answers", "generate": "always"},
            "--along answers generates nothing before a run's end",
        ),
        ({"points": 0}, "--points: must be at least 1, got 0"),
        (
            {"attacks": "relearn"},
            "--attacks: the attacked model is the one that reaches the level: give",
        ),
        ({"attacks": ["relern"]}, "attack of --attacks: unknown name 'relern'; choose one of"),
        (
            {"only": ["SNIP"]},
            "--only: no objective or mask is called 'SNIP'; there are: GradDiff, dense, wagle 0.3",
        ),
    ],
)
def test_mistakes_that_show_at_once(config, fails, changes, said):
    assert said in fails("study --config", config(**changes), data=False)
    assert not Path("out").exists()


def test_mistakes_that_the_model_shows(config, fails, tmp_path):
    def refused(**changes):
        return fails("study --config", config(**changes), data=False)

    said = "is not measured at every point"
    line = refused(utility="retain/bleu")
    assert f"--utility: 'retain/bleu' {said}; there are: forget/exact_memorization" in line
    generating = {"generate": "end", "module": {"max_new_tokens": 2}}
    line = refused(utility="retain/rougeL_recall", **generating)
    assert f"{said} (it needs --generate always)" in line
    lean = {"output": "lean", "along": "answers"}
    line = refused(utility="retain/exact_memorization", **lean)
    assert f"{said} (it needs --along all)" in line
    bools = {"lm_head.weight": torch.ones(3, 2, dtype=torch.bool)}
    other = WeightMask.from_bools(bools).save(tmp_path / "other")
    line = refused(masks=["dense", {"file": str(other)}])
    assert f"masks: mask {other}" in line and "another model" in line


def test_another_study_in_the_folder_is_refused_once_there_are_runs(
    config, fails, models, tiny_model
):
    quick = {"masks": ["dense"], **SHORT}
    study(config(target=tiny_model, **quick), "--hours", "0")
    study(config(**quick))
    assert [row["step"] for row in rows_of()] == [2]
    before = {file: file.read_bytes() for file in Path("out").rglob("*") if file.is_file()}
    line = fails("study --config", config(target=f"{models}/retrained", **quick), data=False)
    assert "holds results of another test (other model); choose another --output" in line
    line = fails("study --config", config(**{**quick, "steps": 3}), data=False)
    assert "out/study.parquet holds runs with other settings (length): choose another --" in line
    assert before == {file: file.read_bytes() for file in Path("out").rglob("*") if file.is_file()}


def test_a_target_that_does_not_know_the_rows(config, heard, tiny_model):
    study(config(target=tiny_model, masks=["dense"], forget_level=0.5, **SHORT))
    assert "does not know the forget set" in heard.text and "nothing to unlearn" in heard.text
    assert "there is nothing to unlearn" in Path("out/study.md").read_text()
    assert found_in()["forget_level"] == 0.5
