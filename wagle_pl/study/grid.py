"""The grid of a study: objectives × masks × learning rates × seeds, checked, named, in order."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import torch

from wagle_pl.attribution import AttributionModule
from wagle_pl.attribution.scores import Random, Score
from wagle_pl.attribution.specs import MaskSpec
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import Entry, resolve, split
from wagle_pl.objectives.forget import Objective
from wagle_pl.study.options import typed
from wagle_pl.unlearning.adapters import LoRA

#: Options of the attribution pass, and of the choice among scores, that a mask may set.
ATTRIBUTION = (
    *("hessian", "gamma", "damping", "hessian_samples", "hessian_data", "forget_loss", "reduction"),
)
SELECTION = ("select", "scope", "include", "exclude")
DEFAULTS = {
    name: inspect.signature(AttributionModule).parameters[name].default
    for name in (*SELECTION, *ATTRIBUTION, "density")
}
_KEYS = ("score", "adapter", "file", "name", "learning_rates", "density", *SELECTION, *ATTRIBUTION)

#: Module paths that studies record for the package's own classes. Ids of runs are hashes over them,
#: so they stay when a class moves.
_RECORDED = {
    Objective: "wagle_pl.unlearning.objectives",
    Score: "wagle_pl.attribution.scores",
    LoRA: "wagle_pl.unlearning.adapters",
    torch.optim.Optimizer: "wagle_pl.unlearning.optim",
}


def digest(value: Any) -> str:
    """Plain data as a short name: 16 hexadecimal digits of SHA-256 over its JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def definition(base: type, cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes an object, as plain data: its class and the options given."""
    own = cls.__module__.startswith("wagle_pl.")
    path = f"{_RECORDED[base] if own else cls.__module__}.{cls.__qualname__}"
    return {"class": path, "options": dict(options)}


# -- choices ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ObjectiveChoice:
    """An objective of the grid: how tables call it, how the configuration describes it."""

    name: str
    entry: Entry

    def make(self) -> Objective:
        """A new instance for a run."""
        return resolve(Objective, self.entry, "objective")

    @cached_property
    def definition(self) -> dict[str, Any]:
        """What distinguishes it, whatever it is called."""
        return definition(Objective, type(self.make()), split(self.entry, "objective")[1])

    @cached_property
    def id(self) -> str:
        """A hash of its definition."""
        return digest(self.definition)[:8]


@dataclass(frozen=True, eq=False)
class MaskChoice:
    """A mask of the grid, or what stands in its place."""

    name: str  # how tables call it, density included
    kind: Literal["dense", "adapter", "file", "score"]
    entry: Entry  # how the configuration describes the score or adapter; path of a mask file
    density: Optional[float] = None  # share of weights that may move; None where it is not known
    learning_rates: Optional[tuple[float, ...]] = None  # its own in place of the study's
    selection: Mapping[str, Any] = field(default_factory=dict)  # SELECTION, complete
    attribution: Mapping[str, Any] = field(default_factory=dict)  # ATTRIBUTION, complete
    seeded: bool = False  # each seed draws its own mask: a random score without a seed

    @cached_property
    def score(self) -> Optional[Score]:
        """The score of a mask by score; None for other kinds."""
        return resolve(Score, self.entry, "mask") if self.kind == "score" else None

    def adapter(self) -> Optional[LoRA]:
        """A new adapter for a run; None for other kinds."""
        return resolve(LoRA, self.entry, "adapter") if self.kind == "adapter" else None

    def spec(self, name: str) -> MaskSpec:
        """What attribution is asked for, to write it to a file of that name."""
        density = 0.5 if self.density is None else self.density  # None: the score sets its share
        return MaskSpec(score=self.score, density=density, name=name, **self.selection)

    def of_seed(self, seed: int) -> MaskChoice:
        """The mask that a run with this seed takes."""
        drawn = {"class_path": "Random", "init_args": {"seed": seed}}
        return replace(self, entry=drawn, seeded=False) if self.seeded else self

    @cached_property
    def definition(self) -> dict[str, Any]:
        """What distinguishes it among masks of the same model and data, whatever it is called."""
        if self.kind == "file":
            return {"file": digest(Path(str(self.entry)).read_bytes().hex())}
        if self.kind == "dense":
            return {"kind": "dense"}
        options = split(self.entry, self.kind)[1]
        if self.kind == "adapter":
            return {"adapter": definition(LoRA, type(self.adapter()), options)}
        return {
            "score": definition(Score, type(self.score), options),
            **self.selection,
            **self.relevant,
            "density": self.density,
            "seeded": self.seeded,
        }

    @cached_property
    def id(self) -> str:
        """A hash of its definition."""
        return digest(self.definition)[:8]

    @cached_property
    def relevant(self) -> dict[str, Any]:
        """The options of the pass that the score depends on."""
        needs, names = set(self.score.needs), []
        if needs & {"h", "h_diagonal"}:
            names += ["hessian", "gamma", "damping", "hessian_samples", "hessian_data"]
        if needs & {"g_f", "fisher_f", "activation"}:
            names.append("forget_loss")
        if needs & {"g_f", "g_r"}:
            names.append("reduction")
        return {name: self.attribution[name] for name in names}

    @property
    def described(self) -> str:
        """Name of a mask by score: the score, options that are not the usual ones, the density."""
        words = [self.score.label]
        for key, value in {**self.selection, **self.relevant}.items():
            if value == DEFAULTS[key] or (key == "hessian" and value == "scalar"):
                continue
            is_word = isinstance(value, str) and key in ("hessian", "scope")
            words.append(value if is_word else f"{key}={value}")
        return " ".join(words if self.density is None else [*words, f"{self.density:g}"])

    def file_name(self, settings: Mapping[str, Any]) -> str:
        """Name of the file of a mask by score, unique for it and ``settings``: model and rows."""
        readable = re.sub(r"[^A-Za-z0-9.=-]+", "-", self.described)
        return f"{readable}-{digest([dict(settings), self.definition])[:8]}"


def passes(masks: Sequence[MaskChoice]) -> list[tuple[dict[str, Any], list[MaskChoice]]]:
    """Masks by score that can be made in one pass, together with the options of that pass.

    An option on which a mask's score does not depend fits any pass.
    """
    found: list[tuple[dict[str, Any], list[MaskChoice]]] = []
    for mask in sorted(masks, key=lambda mask: -len(mask.relevant)):
        for options, others in found:
            if all(options.get(name, value) == value for name, value in mask.relevant.items()):
                options |= mask.relevant
                others.append(mask)
                break
        else:
            found.append((dict(mask.relevant), [mask]))
    return found


# -- a configuration -> choices --------------------------------------------------------------------


def read_objectives(entries: Sequence[Entry]) -> list[ObjectiveChoice]:
    """Objectives of a configuration, named by ``name`` or by class."""
    found = []
    for entry in _some(entries, "objectives"):
        name, plain = None, entry
        if isinstance(entry, Mapping):
            name = entry.get("name")
            plain = {key: value for key, value in entry.items() if key != "name"}
        objective = resolve(Objective, plain, "objective")
        found.append(ObjectiveChoice(str(name or type(objective).__name__), plain))
    _refuse_twins([choice.name for choice in found], "objectives")
    return found


def read_masks(entries: Sequence[Entry]) -> list[MaskChoice]:
    """Masks of a configuration; a list of densities makes a mask of each."""
    found = [choice for entry in _some(entries, "masks") for choice in _read_mask(entry)]
    _refuse_twins([choice.name for choice in found], "masks")
    seen: dict[str, str] = {}
    for choice in found:
        other = seen.setdefault(choice.id, choice.name)
        if other != choice.name:
            raise WagleError(f"masks {other!r} and {choice.name!r} are the same: leave one out")
    return found


def _read_mask(entry: Entry) -> list[MaskChoice]:
    options = {"score": entry} if isinstance(entry, str) else dict(entry)
    for key in options:
        if key not in _KEYS:
            raise WagleError(f"masks: unknown key {key!r}; there are {', '.join(_KEYS)}")
    name, rates = options.pop("name", None), options.pop("learning_rates", None)
    rates = None if rates is None else check_rates(rates)
    word = str(options.get("score")).lower()
    if word == "dense":
        options["dense"] = options.pop("score")
    elif word == "lora":
        options["adapter"] = options.get("adapter", "LoRA")
        del options["score"]
    kind = next((kind for kind in ("dense", "adapter", "file") if kind in options), "score")
    if kind not in options:
        raise WagleError(f"masks: {dict(entry)} names no mask: give score, adapter or file")
    what = options.pop(kind)
    if kind == "score":
        return _score_masks(name, what, options, rates)
    if options:
        raise WagleError(f"masks: {kind} has no option {next(iter(options))!r}")
    usual = kind
    if kind == "adapter":
        usual = "lora"
        resolve(LoRA, what, "adapter")
    elif kind == "file":
        if not isinstance(what, str):
            raise WagleError(f"masks: file must be the path of a mask, got {what!r}")
        if not Path(what).is_file():
            raise WagleError(f"masks: file {what} does not exist")
        usual = Path(what).stem
    return [MaskChoice(name or usual, kind, what, 1.0 if kind == "dense" else None, rates)]


def _score_masks(
    name: Optional[str], entry: Entry, options: dict[str, Any], rates: Optional[tuple[float, ...]]
) -> list[MaskChoice]:
    """The masks by one score, one for each density."""
    score = resolve(Score, entry, "mask", also=("dense", "lora"))
    where = f"masks: {score.label}"
    density = options.pop("density", DEFAULTS["density"])
    densities = density if isinstance(density, (list, tuple)) else [density]
    if type(score).share is not Score.share:  # the score says itself how many
        densities = [None]
    given = typed(AttributionModule, options, where)
    if given.get("gamma", "auto") != "auto":
        given.setdefault("hessian", "scalar")
    complete = DEFAULTS | given
    found = []
    for each in _some(densities, "masks: density"):
        if each is not None:
            each = typed(AttributionModule, {"density": each}, where)["density"]
        options = (
            {key: complete[key] for key in SELECTION},
            {key: complete[key] for key in ATTRIBUTION},
        )
        seeded = type(score) is Random and isinstance(entry, str)
        choice = MaskChoice("", "score", entry, each, rates, *options, seeded)
        end = "" if choice.density is None else f" {choice.density:g}"
        choice = replace(choice, name=choice.described if name is None else name + end)
        try:  # refuses options that have no meaning together
            AttributionModule(model="", masks=[choice.spec("mask")], **choice.attribution)
        except WagleError as error:
            raise WagleError(f"masks: {choice.name}: {error}") from None
        found.append(choice)
    return found


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Learning rates as numbers."""
    try:
        found = tuple(float(rate) for rate in rates)
    except (TypeError, ValueError):
        raise WagleError(f"learning_rates must be a list of numbers, got {rates!r}") from None
    if not found or min(found) <= 0 or len(set(found)) < len(found):
        raise WagleError(f"learning_rates must be different numbers above 0, got {list(found)}")
    return found


def _some(entries: Sequence[Any], what: str) -> Sequence[Any]:
    if not entries:
        raise WagleError(f"{what} is an empty list: name one, or leave it out")
    return entries


def _refuse_twins(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise WagleError(f"two {what} are called {name!r}: give one of them another name")


def present_name(
    name: str, id: str, choices: Sequence[ObjectiveChoice] | Sequence[MaskChoice]
) -> str:
    """What an objective or mask of an earlier sitting, by its name then, is called now.

    As in this grid if it is in it; otherwise as before, with its id if another has that name now.
    """
    names = {choice.id: choice.name for choice in choices}
    return names.get(id) or (f"{name} ({id[:4]})" if name in names.values() else name)


# -- runs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of the grid; ``id`` is a hash of what defines it, the study's settings included."""

    objective: ObjectiveChoice
    mask: MaskChoice
    lr: float
    seed: int
    id: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.objective.name}, {self.mask.name}, lr {self.lr:g}, seed {self.seed}"

    @property
    def labels(self) -> dict[str, Any]:
        """The columns of its rows in the study's table."""
        return {
            "objective": self.objective.name,
            "mask": self.mask.name,
            "score": None if self.mask.score is None else self.mask.score.label,
            "density": self.mask.density,
            "lr": self.lr,
            "seed": self.seed,
            "run": self.id,
            "objective_id": self.objective.id,
            "mask_id": self.mask.id,
        }


class Grid(NamedTuple):
    """What runs are made of; masks with learning rates of their own do not take ``rates``."""

    objectives: list[ObjectiveChoice]
    masks: list[MaskChoice]
    rates: tuple[float, ...]
    seeds: list[int]

    @classmethod
    def of(
        cls,
        objectives: Sequence[Entry],
        masks: Sequence[Entry],
        rates: Sequence[float],
        seeds: Sequence[int],
    ) -> Grid:
        """The grid of a configuration.

        Raises:
            WagleError: if one of them is empty, unknown, without meaning, or there twice.
        """
        if not seeds or len(set(seeds)) < len(seeds):
            raise WagleError(f"seeds must be different numbers, got {list(seeds)}")
        return cls(read_objectives(objectives), read_masks(masks), check_rates(rates), list(seeds))

    def runs(self, settings: Mapping[str, Any]) -> Iterator[Run]:
        """All runs, in an order in which a study that is cut off early is balanced.

        The first seed over all arms before the second; within a seed the middle learning rate over
        all arms before the next; within these the masks as listed.

        Args:
            settings: what all runs share, in their ids.
        """
        shared = digest(settings)
        for seed in self.seeds:
            for rank in range(max(len(mask.learning_rates or self.rates) for mask in self.masks)):
                for mask in self.masks:
                    own = middle_first(mask.learning_rates or self.rates)
                    for objective in self.objectives if rank < len(own) else ():
                        what = [shared, objective.definition, mask.definition, own[rank], seed]
                        yield Run(objective, mask, own[rank], seed, digest(what))


def middle_first(rates: Sequence[float]) -> list[float]:
    """Learning rates from the middle of the grid outwards; of two as far, the lower one first.

    >>> middle_first([1e-5, 3e-5, 1e-4]), middle_first([4, 3, 2, 1])
    ([3e-05, 1e-05, 0.0001], [2, 3, 1, 4])
    """
    ordered = sorted(rates)
    middle = (len(ordered) - 1) / 2
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: (abs(i - middle), i))]
