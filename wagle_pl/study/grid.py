"""The grid of a study: objectives × masks × learning rates × seeds, checked, named, and put in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

from wagle_pl.attribution import AttributionModule
from wagle_pl.attribution.hessian import estimator_of
from wagle_pl.attribution.scores import Random, Score
from wagle_pl.attribution.specs import MaskSpec
from wagle_pl.core.errors import WagleError
from wagle_pl.objectives.forget import Objective
from wagle_pl.study.configured import Entry, definition, digest, make, typed
from wagle_pl.unlearning.adapters import LoRA

#: Options of the attribution pass that a mask may set, with the module's defaults.
ATTRIBUTION = {
    "hessian": "auto",
    "gamma": "auto",
    "damping": 0.1,
    "hessian_samples": 1,
    "hessian_data": "retain",
    "forget_loss": "ce",
    "reduction": "mean",
}
#: Options of the choice among scores, with the module's defaults.
SELECTION = {"density": 0.2, "select": "high", "scope": "global", "include": None, "exclude": None}
_OTHER = ("score", "adapter", "file", "name", "learning_rates")


@dataclass(frozen=True)
class ObjectiveChoice:
    """An objective of the grid.

    Attributes:
        name: how tables call it.
        entry: how the configuration describes it.
        definition: what tells it from others.
    """

    name: str
    entry: Entry = field(compare=False)
    definition: Mapping[str, Any] = field(compare=False, default_factory=dict)

    @cached_property
    def id(self) -> str:
        """A hash of what tells it from others."""
        return digest(dict(self.definition))[:8]

    def make(self) -> Objective:
        """A new instance for a run."""
        return make(Objective, self.entry, "objective", ("name",))


@dataclass(frozen=True)
class MaskChoice:
    """A mask of the grid, dense and LoRA included.

    Attributes:
        name: how tables call it, density included.
        kind: ``dense``, ``lora``, ``score`` or ``file``.
        score: of a mask by score: how the configuration describes it.
        density: share of weights that may move; None where it is not known beforehand.
        selection: options of the choice among scores, complete.
        attribution: options of the pass, complete.
        adapter: of LoRA: how the configuration describes it.
        file: of a mask from a file.
        learning_rates: its own in place of the study's.
        seeded: whether each seed of the study draws its own mask (a random score without a seed of its own).
    """

    name: str
    kind: str
    score: Optional[Entry] = field(compare=False, default=None)
    density: Optional[float] = None
    selection: Mapping[str, Any] = field(compare=False, default_factory=dict)
    attribution: Mapping[str, Any] = field(compare=False, default_factory=dict)
    adapter: Optional[Entry] = field(compare=False, default=None)
    file: Optional[str] = None
    learning_rates: Optional[tuple[float, ...]] = None
    seeded: bool = False

    def make_score(self) -> Score:
        """The score of a mask by score."""
        return make(Score, self.score, "mask")

    def spec(self, name: str) -> MaskSpec:
        """What attribution is asked for.

        Args:
            name: of the mask's file.
        """
        density = (
            self.density if self.density is not None else 0.5
        )  # the score says itself how many
        return MaskSpec(score=self.make_score(), density=density, name=name, **self.selection)

    def of_seed(self, seed: int) -> MaskChoice:
        """The mask that a run with this seed takes."""
        if not self.seeded:
            return self
        return replace(
            self, score={"class_path": "Random", "init_args": {"seed": seed}}, seeded=False
        )

    @cached_property
    def id(self) -> str:
        """A hash of what tells it from others."""
        return digest(self.definition)[:8]

    @property
    def described(self) -> str:
        """Name of a mask by score that its options alone make, whatever it is called."""
        words = [self.make_score().label, *_extras(self)]
        return " ".join(words if self.density is None else [*words, f"{self.density:g}"])

    @cached_property
    def score_name(self) -> Optional[str]:
        """Short name of the score; None for other kinds."""
        return self.make_score().label if self.kind == "score" else None

    @cached_property
    def definition(self) -> dict[str, Any]:
        """What tells it from other masks of the same model and data, whatever it is called."""
        if self.kind == "score":
            score = definition(self.make_score(), self.score, "mask")
            return {
                "score": score,
                **self.selection,
                **self.relevant,
                "density": self.density,
                "seeded": self.seeded,
            }
        if self.kind == "lora":
            return {
                "adapter": definition(make(LoRA, self.adapter, "adapter"), self.adapter, "adapter")
            }
        if self.kind == "file":
            return {"file": digest(Path(self.file or "").read_bytes().hex())}
        return {"kind": self.kind}

    @cached_property
    def relevant(self) -> dict[str, Any]:
        """The options of the pass that the score depends on."""
        needs = set(self.make_score().needs)
        names: list[str] = []
        if needs & {"h", "h_diagonal"}:
            names += ["hessian", "gamma", "damping", "hessian_samples", "hessian_data"]
        if needs & {"g_f", "fisher_f", "activation"}:
            names.append("forget_loss")
        if needs & {"g_f", "g_r"}:
            names.append("reduction")
        return {name: self.attribution[name] for name in names}


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        objective, mask, lr, seed: what it is made of.
        id: a hash of what defines it, the study's settings included.
    """

    objective: ObjectiveChoice
    mask: MaskChoice
    lr: float
    seed: int
    id: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.objective.name}, {self.mask.name}, lr {self.lr:g}, seed {self.seed}"


def read_objectives(entries: Sequence[Entry]) -> list[ObjectiveChoice]:
    """Check the objectives of a configuration and name them: by ``name``, or by class.

    Raises:
        WagleError: if there are none, one is unknown (naming those there are), or two would have the same name.
    """
    _some(entries, "objectives")
    found = []
    for entry in entries:
        made = make(Objective, entry, "objective", ("name",))
        given = entry.get("name") if isinstance(entry, Mapping) else None
        what = definition(made, entry, "objective", ("name",))
        found.append(ObjectiveChoice(str(given or type(made).__name__), entry, what))
    _apart([choice.name for choice in found], "objectives")
    return found


def read_masks(entries: Sequence[Entry]) -> list[MaskChoice]:
    """Check the masks of a configuration and name them; a list of densities makes a mask of each.

    Raises:
        WagleError: if there are none, one is unknown (naming those there are), an option has no meaning, or two would
            be the same.
    """
    _some(entries, "masks")
    found = [choice for entry in entries for choice in _read_mask(entry)]
    _apart([choice.name for choice in found], "masks")
    seen: dict[str, str] = {}
    for choice in found:
        key = digest(choice.definition)
        if key in seen:
            raise WagleError(
                f"masks {seen[key]!r} and {choice.name!r} are the same mask: leave one out"
            )
        seen[key] = choice.name
    return found


def _read_mask(entry: Entry) -> list[MaskChoice]:
    options = {"score": entry} if isinstance(entry, str) else dict(entry)
    known = (*_OTHER, *SELECTION, *ATTRIBUTION)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise WagleError(f"masks: unknown key {unknown[0]!r}; there are {', '.join(known)}")
    rates = options.pop("learning_rates", None)
    own = {"learning_rates": None if rates is None else check_rates(rates)}
    name, score = options.pop("name", None), options.get("score")
    if str(score).lower() in ("dense", "lora"):
        options.pop("score")
        if str(score).lower() == "lora":
            options.setdefault("adapter", "LoRA")
        elif options:
            raise WagleError(f"masks: dense has no option {next(iter(options))!r}")
        else:
            return [MaskChoice(name or "dense", "dense", density=1.0, **own)]
    for kind, key in (("lora", "adapter"), ("file", "file")):
        if key in options:
            value = options.pop(key)
            if options:
                raise WagleError(f"masks: with {key}, there is no {next(iter(options))!r}")
            return [_adapter(name, value, own) if kind == "lora" else _file(name, value, own)]
    if score is None:
        raise WagleError(f"masks: {dict(entry)} names no mask: give score, adapter or file")
    return _of_score(name, options, own)


def _adapter(name: Optional[str], value: Entry, own: Mapping[str, Any]) -> MaskChoice:
    make(LoRA, value, "adapter")
    return MaskChoice(name or "lora", "lora", adapter=value, **own)


def _file(name: Optional[str], value: str, own: Mapping[str, Any]) -> MaskChoice:
    if not isinstance(value, str):
        raise WagleError(f"masks: file must be the path of a mask, got {value!r}")
    if not Path(value).is_file():
        raise WagleError(f"masks: file {value} does not exist")
    return MaskChoice(name or Path(value).stem, "file", file=str(value), **own)


def _of_score(
    name: Optional[str], options: dict[str, Any], own: Mapping[str, Any]
) -> list[MaskChoice]:
    try:
        score = make(Score, options["score"], "mask")
    except WagleError as error:
        raise WagleError(
            str(error).replace("choose one of", "choose one of dense, lora,")
        ) from None
    passed = {
        key: value
        for key, value in options.items()
        if key in {*SELECTION, *ATTRIBUTION} - {"density"}
    }
    options |= typed(AttributionModule, passed, f"masks: {score.label}")
    try:
        estimator_of(options.get("hessian", ATTRIBUTION["hessian"]))
    except WagleError as error:
        raise WagleError(f'masks: {score.label}: option "hessian": {error}') from None
    if options.get("gamma", "auto") != "auto":
        options.setdefault("hessian", "scalar")
    selection = {key: options.get(key, default) for key, default in SELECTION.items()}
    densities = selection.pop("density")
    attribution = {key: options.get(key, default) for key, default in ATTRIBUTION.items()}
    seeded = type(score) is Random and isinstance(options["score"], str)
    whole = type(score).share is not Score.share  # the score says itself how many
    base = MaskChoice(
        "", "score", options["score"], None, selection, attribution, seeded=seeded, **own
    )
    several = isinstance(densities, Sequence) and not isinstance(densities, str)
    if several:
        _some(densities, "masks: density")
    found = []
    for density in [None] if whole else densities if several else [densities]:
        if density is not None and (not isinstance(density, (int, float)) or not 0 < density <= 1):
            raise WagleError(f"masks: density must lie in (0, 1], got {density}")
        choice = replace(base, density=density)
        named = (
            choice.described if name is None else name if density is None else f"{name} {density:g}"
        )
        _check_pass(choice, named)
        found.append(replace(choice, name=named))
    return found


def _check_pass(choice: MaskChoice, name: str) -> None:
    """Refuse options that have no meaning together, by making the pass that would make the mask alone."""
    try:
        AttributionModule(model="", masks=[choice.spec("mask")], **choice.relevant)
    except WagleError as error:
        raise WagleError(f"masks: {name}: {str(error).replace('--model.', '')}") from None


def _extras(choice: MaskChoice) -> list[str]:
    """Words for the options that are not the usual ones."""
    words = []
    for key, value in {**choice.selection, **choice.relevant}.items():
        if value == {**SELECTION, **ATTRIBUTION}[key] or (key == "hessian" and value == "scalar"):
            continue
        words.append(
            str(value)
            if isinstance(value, str) and key in ("hessian", "scope")
            else f"{key}={value}"
        )
    return words


def present_name(
    row_name: str, row_id: str, choices: Sequence[ObjectiveChoice] | Sequence[MaskChoice]
) -> str:
    """What an objective or mask of an earlier sitting is called now.

    By this grid's name if it is in it; otherwise by its own, with its id if something else has that name now.

    Args:
        row_name: its name then.
        row_id: its id.
        choices: the grid's objectives or masks.
    """
    names = {choice.id: choice.name for choice in choices}
    if row_id in names:
        return names[row_id]
    return f"{row_name} ({row_id[:4]})" if row_name in names.values() else row_name


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Learning rates as numbers.

    Raises:
        WagleError: if there are none, one is not above 0, or one is there twice.
    """
    try:
        found = tuple(float(rate) for rate in rates)
    except (TypeError, ValueError):
        raise WagleError(f"learning_rates must be a list of numbers, got {rates!r}") from None
    if not found or min(found) <= 0 or len(set(found)) < len(found):
        raise WagleError(f"learning_rates must be different numbers above 0, got {list(found)}")
    return found


def middle_first(rates: Sequence[float]) -> list[float]:
    """Learning rates from the middle of the grid outwards; of two as far, the lower one first.

    >>> middle_first([1e-5, 3e-5, 1e-4]), middle_first([4, 3, 2, 1])
    ([3e-05, 1e-05, 0.0001], [2, 3, 1, 4])
    """
    ordered = sorted(rates)
    middle = (len(ordered) - 1) / 2
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: (abs(i - middle), i))]


def runs(
    objectives: Sequence[ObjectiveChoice],
    masks: Sequence[MaskChoice],
    rates: Sequence[float],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> Iterator[Run]:
    """All runs, so ordered that a study cut off early is balanced: the first seed over all arms before the second;
    within a seed the middle learning rate over all arms before the next; within these dense first if listed first.

    Args:
        objectives, masks, seeds: of the grid.
        rates: learning rates; a mask's own take their place by rank.
        settings: what all runs share.
    """
    shared = digest(settings)
    most = max(len(mask.learning_rates or rates) for mask in masks)
    for seed in seeds:
        for rank in range(most):
            for mask in masks:
                own = middle_first(mask.learning_rates or rates)
                for objective in objectives if rank < len(own) else ():
                    what = [shared, dict(objective.definition), mask.definition, own[rank], seed]
                    yield Run(objective, mask, own[rank], seed, digest(what))


def _some(entries: Sequence[Any], what: str) -> None:
    if not entries:
        raise WagleError(f"{what} is an empty list: name one, or leave it out")


def _apart(names: Sequence[str], what: str) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise WagleError(f"two {what} are called {name!r}: give one of them another name")
