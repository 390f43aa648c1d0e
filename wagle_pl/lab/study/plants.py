"""``Plants``: knowledge put into known weights, and which scores find them.

Where a model keeps its knowledge is unknown, unless rows were trained into it with all other
weights frozen. Then it is known which weights each attribution score should find.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import lightning as L
import pandas as pd
import torch
from torch import Tensor

from wagle_pl.attribution import MaskSpec
from wagle_pl.attribution.scoring import Collected
from wagle_pl.attribution.selection import Ranking, order_keys
from wagle_pl.attribution.units import Units
from wagle_pl.core.environment import prepare_libraries, silence
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import refuse_existing, write_text
from wagle_pl.core.needs import Needs
from wagle_pl.core.registry import Entry
from wagle_pl.core.schema import Count
from wagle_pl.core.text import count, markdown_table, table
from wagle_pl.core.weights import fingerprint, parameter_shapes
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.evaluation import Options
from wagle_pl.lab.study import grid
from wagle_pl.lab.study.places import KINDS, plant_mask
from wagle_pl.lab.study.references import rows_of
from wagle_pl.lab.study.report.curves import plants_overview
from wagle_pl.lab.study.report.figures import save_figure
from wagle_pl.lab.study.runs import (
    EvaluateAlong,
    RunTable,
    announced,
    attribute,
    locked,
    make_trainer,
    say,
)
from wagle_pl.lab.study.summary import Row, decimals, mean_std, paired, spread
from wagle_pl.lab.study.text import chance, duration, signed
from wagle_pl.lm import models
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import count_bits
from wagle_pl.objectives.forget import GradDiff
from wagle_pl.unlearning import UnlearnModule

TABLE_FILE = "plants.parquet"
COLUMNS = {
    **{"plant": str, "seed": int, "score": str, "run": str, "density": float, "forget": float},
    **{"retain": float, "steps": Count, "seconds": float, "auroc": float, "precision": float},
    **{"auroc_before": float, "precision_before": float},
}
Key = tuple[str, int]  # a plant and a seed
Found = tuple[float, float]  # AUROC and precision


# -- how well scores find it -----------------------------------------------------------------------


def auroc(
    scores: Iterable[tuple[str, Tensor]], masks: Sequence[WeightMask], ranking: Ranking
) -> list[float]:
    """Probability that a weight of a mask ranks before one outside it, for each of several masks:
    the Mann-Whitney statistic, ties counted half. Scores that agree in their upper sixteen bits are
    ties, so that one pass of counting is enough."""
    bins = 1 << 16
    counts = torch.zeros(len(masks), 2, bins, dtype=torch.int64)
    for name, values in scores:
        keys = (order_keys(values.reshape(-1), ranking).cpu() >> 16) + bins // 2
        both = torch.bincount(keys, minlength=bins)
        for mask, (outside, inside) in zip(masks, counts, strict=True):
            selected = torch.bincount(keys[mask[name].view(-1)], minlength=bins)
            inside += selected
            outside += both - selected
    outside, inside = counts.double().unbind(1)
    below = outside.cumsum(1) - outside / 2
    return ((inside * below).sum(1) / (inside.sum(1) * outside.sum(1))).tolist()


def by_weight(
    collected: Collected, spec: MaskSpec, names: Sequence[str], ranking: Ranking
) -> Iterator[tuple[str, Tensor]]:
    """(parameter, scores of its weights): those of their units, if units are selected."""
    scores = collected.scores(spec.score, set(names))
    if spec.unit == "weight":
        yield from scores
        return
    units = Units(spec.unit, {name: collected.shapes[name] for name in names}, collected.geometry)
    values = units.values(spec.score, lambda: scores, ranking, spec.pool, {})
    for name, (rows, columns) in units.places.items():
        yield name, values[rows[:, None] + columns].float()


def locate(
    collected: Collected, spec: MaskSpec, truths: Mapping[Any, WeightMask]
) -> dict[Any, Found]:
    """How well a score finds each of some masks: AUROC, and precision: the share of the mask among
    the weights that the score would select at the mask's density (by chance, the density)."""
    masks, names = list(truths.values()), spec.eligible(collected.shapes)
    ranking = Ranking(not spec.score.signed, spec.select == "low")
    areas = auroc(by_weight(collected, spec, names, ranking), masks, ranking)
    densities: list[Any] = [Fraction(mask.count(), mask.total) for mask in masks]
    specs = [replace(spec, density=density) for density in dict.fromkeys(densities)]
    chosen = {made.density: mask for made, mask in collected.masks(specs, {})}
    located = {}
    for (key, mask), area, density in zip(truths.items(), areas, densities, strict=True):
        best = chosen[density]
        hits = sum(count_bits(best.packed(name) & mask.packed(name)) for name in mask)
        located[key] = area, hits / best.count()
    return located


# -- the whole -------------------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Plants:
    """Train rows into known weights of a model that never saw them; check which scores find these.

    A *plant* is a set of weights. For each plant and seed the model is trained on forget and retain
    rows, with all weights outside the plant frozen, until it recalls the forget rows. Every score
    then ranks the weights of that model, and, as a baseline, of the model before planting. The
    output folder holds ``plants.parquet`` (one line per plant, seed and score), ``plants.md``,
    ``plants.svg``, and for each plant and seed the model and ``plant.safetensors``, the mask of the
    plant, which a study of that model can use. The same command, started again, continues.

    Args:
        model: hub id, folder or GGUF file of a model that never saw the forget rows: the retrained
            model.
        output: folder to write.
        data: the data module: class_path and init_args, or --data CLASS --data.option VALUE.
        plants: where to plant -> how much: random (a share of all weights), block (MLPs of this
            many blocks), heads (columns of o_proj of this many heads), or spread (a share of the
            neurons of every MLP).
        scores: like the masks of a study: a score, or options: score, name, hessian and other
            options of attribution.
        seeds: random seeds of the choice of weights and of the order of rows.
        recall: planting stops when the forget answers have this probability.
        lr: learning rate of planting.
        steps: maximum number of optimiser steps of planting.
        points: number of tests of the probability within these steps.
        retain_weight: weight of the loss on retain rows in planting.
        module: options of UnlearnModule and of tests.
        trainer: options of Lightning's Trainer, such as precision, accelerator.
    """

    model: str
    output: str
    data: ForgetRetainDataModule
    plants: dict[str, float] = field(
        default_factory=lambda: {"random": 0.02, "block": 1, "heads": 3, "spread": 0.05}
    )
    scores: Sequence[Union[str, dict[str, Any]]] = ("wagle", "curvature", "gradient", "random")
    seeds: Sequence[int] = (0, 1, 2)
    recall: float = 0.8
    lr: float = 1e-3
    steps: int = 400
    points: int = 40
    retain_weight: float = 1.0
    module: Optional[dict[str, Any]] = None
    trainer: Optional[dict[str, Any]] = None

    def __post_init__(self) -> None:
        self.folder = Path(self.output)
        refuse_existing(self.folder, overwrite=True, kind="files")  # it continues in its folder
        self._choices = grid.read_masks([_without_density(entry) for entry in self.scores])
        for plant in self.plants:
            if plant not in KINDS:
                kinds = ", ".join(KINDS)
                raise WagleError(f"must be of {kinds}, got {plant!r}", option="--plants")
        self._module, self._tests = grid.read_module(self.module or {})
        self._trainer = partial(make_trainer, self.folder, grid.read_trainer(self.trainer or {}))
        self.data = copy.copy(self.data)

    def run(self) -> list[dict[str, Any]]:
        """Plant and locate what is not finished; returns what :func:`summarise` returns of all."""
        models.locate(self.model)
        with locked(self.folder):
            lm = models.load_model(self.model, torch.bfloat16)
            shapes, base = parameter_shapes(lm), fingerprint(lm)
            truths = {
                (f"{plant}-{amount:g}", seed): plant_mask(plant, amount, shapes, lm.config, seed)
                for seed in self.seeds  # balanced if it is stopped early
                for plant, amount in self.plants.items()
            }
            del lm
            self.data.needs = Needs(tokenizer=lambda: models.load_tokenizer(self.model))
            self.table = RunTable(self.folder, self._settings(base), TABLE_FILE, COLUMNS)
            done = self.table.finished()
            todo = {key: mask for key, mask in truths.items() if _name(key) not in done}
            say(f"{self.folder}: {count(len(truths), 'plant')}, {len(todo)} to do")
            before = self._locate(self.model, todo) if todo else {}
            for number, (key, mask) in enumerate(todo.items(), 1):
                with announced(f"[{number}/{len(todo)}] {_name(key)}, {mask.density:.2%}"):
                    rows = self._run(key, mask, before)
                self.table.append(rows)
                numbers = (f"{name} {decimals(rows[0][name])}" for name in ("forget", "retain"))
                steps, seconds = (rows[0][name] for name in ("steps", "seconds"))
                say(f"{', '.join(numbers)}, {count(steps, 'step')}, {duration(seconds)}")
            entries = summarise(self.table.rows)
            write_text(self.folder / "plants.md", markdown(entries))
            if entries:
                scores = [row[0] for row in overview(entries)[1]]
                save_figure(plants_overview(entries, scores), [self.folder / "plants.svg"])
        if entries:
            say(f"{table(*overview(entries))}\n{self.folder / 'plants.md'} has more")
        return entries

    def _settings(self, base: str) -> dict[str, Any]:
        """What all plants share, as plain data."""
        data = self.data
        names = ("recall", "lr", "steps", "points", "retain_weight")
        return {
            "model": base,
            **rows_of(data),
            "batch_size": data.batch_size,
            "scores": {choice.name: choice.definition for choice in self._choices},
            **{name: getattr(self, name) for name in names},
            "module": {**self._module, **self._tests},
        }

    def _run(
        self, key: Key, mask: WeightMask, before: Mapping[tuple[str, Key], Found]
    ) -> list[dict[str, Any]]:
        start, (plant, seed) = time.monotonic(), key
        L.seed_everything(seed, verbose=False)
        data = copy.copy(self.data)
        data.seed = seed
        folder = self.folder / _name(key)
        module = UnlearnModule(
            model=self.model,
            output=str(folder / "model"),
            overwrite=True,
            objective=GradDiff(forget_weight=-1.0, retain_weight=self.retain_weight),
            mask=mask,
            lr=self.lr,
            **{"warmup": 0.0, "decay": "constant", **self._module},
        )
        module.run_config = {"plants": self.table.settings, "plant": plant, "seed": seed}
        tests, sets = Options(generate=False, **self._tests), ("forget", "retain")

        def is_recalled(measures: Mapping[str, float]) -> bool:
            return measures["forget/probability"] >= self.recall

        along = EvaluateAlong(tests, self.points, "never", sets, is_recalled)
        with silence():
            options = {"max_steps": self.steps, "max_epochs": -1, "callbacks": [along]}
            self._trainer(**options).fit(module, datamodule=data)
        made, last = str(folder / "model"), along.tests[-1]
        made_for = {"model": made, "model_fingerprint": module.fingerprint()}
        mask.moved(mask.shapes, made_for).save(folder / "plant")
        after = self._locate(made, {key: mask})
        shared = {
            **{"plant": plant, "seed": seed, "run": _name(key)},
            **{"density": mask.density, "steps": last["step"]},
            **{name: last[f"{name}/probability"] for name in sets},
            "seconds": round(time.monotonic() - start, 1),
        }
        rows = []
        for (score, _), measured in after.items():
            numbers = zip([*COLUMNS][-4:], (*measured, *before[score, key]), strict=True)
            rows.append({**shared, "score": score, **dict(numbers)})
        return rows

    def _locate(self, model: str, truths: Mapping[Key, WeightMask]) -> dict[tuple[str, Key], Found]:
        """(name of a score, plant) -> how well it finds the plant in the weights of a model."""
        results: dict[tuple[str, Key], Found] = {}
        numbered = {str(number): choice for number, choice in enumerate(self._choices)}
        for _, module in attribute(model, numbered, self._trainer, self.data):
            for spec in module.specs:
                located = locate(module.collected, spec, truths)
                name = numbered[spec.name].name
                results |= {(name, key): numbers for key, numbers in located.items()}
        return results


def _name(key: Key) -> str:
    return f"{key[0]}-{key[1]}"


def _without_density(entry: Entry) -> dict[str, Any]:
    """A mask of a study as a score, whose density will be the plant's."""
    options = {"score": entry} if isinstance(entry, str) else dict(entry)
    if "density" in options:
        raise WagleError(f"scores: {options} takes the density of the plant: leave density out")
    if str(options.get("score", "lora")).lower() in ("dense", "lora"):
        raise WagleError(f"scores: {entry} is no score")
    return {**options, "density": None}


# -- what was found --------------------------------------------------------------------------------

NOTES = (
    "AUROC: probability that a weight of the plant ranks before another; 0.5 by chance. Mean and "
    "standard deviation over seeds, of which each draws its plant.",
    "before: the same of the model before planting, which has nothing in these weights: what the "
    "score prefers anyway. difference and p (paired t-test over seeds): AUROC after planting "
    "against before.",
    "precision: share of the plant among as many weights as it has, those that the score ranks "
    "first. enrichment: precision divided by the plant's density, which is chance's precision.",
)


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every plant and score over the seeds; within a plant, the best AUROC first: means ``density``,
    ``forget``, ``retain``; :class:`Spread` of ``auroc``, ``precision``, ``enrichment`` (precision /
    density), and with ``_before`` of the model before planting; ``difference`` of AUROCs from
    before, and ``p`` of its paired t-test."""
    if not rows:
        return []
    table = pd.DataFrame(rows).sort_values("seed", kind="stable")
    entries = []
    for (plant, score), runs in table.groupby(["plant", "score"], sort=False):
        entry = {"plant": plant, "score": score, "n": len(runs)}
        entry |= {name: float(runs[name].mean()) for name in ("density", "forget", "retain")}
        for when in ("", "_before"):
            precision = runs[f"precision{when}"]
            values = {"auroc": runs[f"auroc{when}"], "precision": precision}
            values["enrichment"] = precision / runs["density"]
            entry |= {f"{name}{when}": spread(of) for name, of in values.items()}
        test = paired(runs["auroc"], runs["auroc_before"])
        entries.append({**entry, "difference": test.difference, "p": test.p})
    plants = list(dict.fromkeys(entry["plant"] for entry in entries))
    return sorted(entries, key=lambda entry: (plants.index(entry["plant"]), -entry["auroc"].mean))


def overview(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table, scores × plants: AUROC, and precision as a multiple of chance."""
    plants: dict[str, str] = {}
    rows: dict[str, dict[str, str]] = {}
    total: Counter[str] = Counter()
    for entry in entries:
        score, auroc = entry["score"], entry["auroc"].mean
        plants[entry["plant"]], total[score] = "–", total[score] + auroc
        cell = f"{auroc:.2f} ({entry['enrichment'].mean:.1f}×)"
        rows.setdefault(score, {})[entry["plant"]] = cell
    ordered = sorted(rows, key=lambda score: -total[score])
    return ["score", *plants], [[score, *{**plants, **rows[score]}.values()] for score in ordered]


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """Content of ``plants.md``: the overview, and a table per plant."""
    what = (
        "AUROC of each score, and its precision at the plant's density as a multiple of chance's."
    )
    parts = ["# Planted knowledge", what, markdown_table(*overview(entries))]
    for plant in dict.fromkeys(entry["plant"] for entry in entries):
        of_plant = [entry for entry in entries if entry["plant"] == plant]
        recall = ", ".join(f"{name} {decimals(of_plant[0][name])}" for name in ("forget", "retain"))
        seeds, share = count(of_plant[0]["n"], "seed"), f"{of_plant[0]['density']:.1%}"
        about = f"{seeds}, {share} of the weights; after planting {recall}."
        parts += [f"## {plant}", about, markdown_table(*shown(of_plant))]
    notes = "\n".join(f"- {line}" for line in NOTES)
    return "\n\n".join([*parts, "## How to read it", notes]) + "\n"


def shown(entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of one plant."""

    def cells(entry: Mapping[str, Any]) -> list[str]:
        return [
            entry["score"],
            mean_std(*entry["auroc"][:2]),
            decimals(entry["auroc_before"].mean),
            signed(entry["difference"]),
            "–" if entry["p"] is None else chance(entry["p"]),
            decimals(entry["precision"].mean),
            decimals(entry["enrichment"].mean, 2),
            decimals(entry["enrichment_before"].mean, 2),
        ]

    header = ["score", "AUROC", "before", "difference", "p", "precision", "enrichment", "before"]
    return header, list(map(cells, entries))


def plant(**options: Any) -> None:
    """Plant the unfinished part, then write which scores find the planted weights."""
    prepare_libraries()
    Plants(**options).run()
