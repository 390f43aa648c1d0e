"""What a study runs: objectives × masks × learning rates × seeds, named, in order, and checked."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

import lightning as L
import torch

from wagle_pl.attribution import AttributionModule, MaskSpec
from wagle_pl.attribution.scores import Random, Score
from wagle_pl.core.environment import silence, trainer_errors
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import Entry, check_options, find_class, option_names, resolve, split
from wagle_pl.evaluation import Options
from wagle_pl.objectives.forget import Objective
from wagle_pl.unlearning import UnlearnModule
from wagle_pl.unlearning.adapters import LoRA
from wagle_pl.unlearning.step_rules import StepRule

#: Options that a mask may set: those of the selection by scores, and of the attribution pass.
SELECTION = ("select", "scope", "unit", "pool", "include", "exclude")
HESSIAN = ("hessian", "gamma", "damping", "hessian_samples", "hessian_data")
ATTRIBUTION = (*HESSIAN, "forget_loss", "reduction")
DEFAULTS = {
    name: inspect.signature(AttributionModule).parameters[name].default
    for name in (*SELECTION, *ATTRIBUTION, "density")
}
Entries = Sequence[Entry]
_KEYS = ("score", "adapter", "file", "name", "learning_rates", "density", *SELECTION, *ATTRIBUTION)


def digest(value: Any) -> str:
    """Plain data as a short name: 16 hexadecimal digits of SHA-256 over its JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def definition(cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes an object, as plain data: its class and the options given."""
    ours = cls.__module__.startswith("wagle_pl.")  # the same wherever the package keeps it
    name = cls.__qualname__ if ours else f"{cls.__module__}.{cls.__qualname__}"
    return {"class": name, "options": dict(options)}


# -- choices ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ObjectiveChoice:
    """An objective of the grid, with the step rule and the optimiser that its runs use."""

    name: str  # in tables
    entry: Entry  # from the configuration, without what the other fields hold
    step_rule: Optional[Entry] = None
    optimizer: Optional[Entry] = None  # in place of the study's
    learning_rates: Optional[tuple[float, ...]] = None  # its own, instead of study's and masks'

    def make(self) -> Objective:
        return resolve(Objective, self.entry, "objective")

    def rule(self) -> Optional[StepRule]:
        return None if self.step_rule is None else resolve(StepRule, self.step_rule, "step_rule")

    @cached_property
    def optimizer_maker(self) -> Optional[partial[torch.optim.Optimizer]]:
        """Its optimiser without the learning rate, if it has one of its own."""
        return None if self.optimizer is None else read_optimizer(self.optimizer)

    @cached_property
    def definition(self) -> dict[str, Any]:
        """What distinguishes it, independently of its name."""
        parts = definition(type(self.make()), split(self.entry, "objective")[1])
        if self.step_rule is not None:
            options = split(self.step_rule, "step_rule")[1]
            parts["step_rule"] = definition(type(self.rule()), options)
        if (made := self.optimizer_maker) is not None:
            parts["optimizer"] = definition(made.func, made.keywords)
        return parts

    @cached_property
    def id(self) -> str:
        return digest(self.definition)[:8]


@dataclass(frozen=True, eq=False)
class MaskChoice:
    """A mask of the grid, or what is used instead of one."""

    name: str  # in tables, density included
    entry: Entry  # how the configuration describes the score or adapter; path of a mask file
    kind: Literal["dense", "adapter", "file", "score"]
    density: Optional[float] = None  # share of weights that may move; None where it is not known
    learning_rates: Optional[tuple[float, ...]] = None  # its own in place of the study's
    options: Mapping[str, Any] = field(default_factory=dict)  # SELECTION and ATTRIBUTION, complete
    seeded: bool = False  # each seed draws its own mask: a random score without a seed

    @cached_property
    def score(self) -> Optional[Score]:
        """The score of a mask by score; None for other kinds."""
        return resolve(Score, self.entry, "mask") if self.kind == "score" else None

    def adapter(self) -> Optional[LoRA]:
        return resolve(LoRA, self.entry, "adapter") if self.kind == "adapter" else None

    def spec(self, name: str) -> MaskSpec:
        """The specification for attribution, to write the mask to a file of that name."""
        return MaskSpec(self.score, self.density, name=name, **self._chosen(SELECTION))

    def of_seed(self, seed: int) -> MaskChoice:
        """The mask that a run with this seed uses."""
        drawn = {"class_path": "Random", "init_args": {"seed": seed}}
        return replace(self, entry=drawn, seeded=False) if self.seeded else self

    @cached_property
    def definition(self) -> dict[str, Any]:
        """What distinguishes it among masks of the same model and data, apart from its name."""
        if self.kind == "file":
            return {"file": digest(Path(str(self.entry)).read_bytes().hex())}
        if self.kind == "dense":
            return {"kind": "dense"}
        options = split(self.entry, self.kind)[1]
        if self.kind == "adapter":
            return {"adapter": definition(type(self.adapter()), options)}
        single = ("unit", "pool") if self.options["unit"] == "weight" else ()  # as earlier studies
        return {
            "score": definition(type(self.score), options),
            **self._chosen(name for name in SELECTION if name not in single),
            **self.relevant,
            "density": self.density,
            "seeded": self.seeded,
        }

    @cached_property
    def id(self) -> str:
        return digest(self.definition)[:8]

    @cached_property
    def relevant(self) -> dict[str, Any]:
        """The options of the attribution pass on which the score depends."""
        of = {
            **{name: {"h", "h_diagonal"} for name in HESSIAN},
            "forget_loss": {"g_f", "fisher_f", "activation"},
            "reduction": {"g_f", "g_r"},
        }
        return self._chosen(name for name, needs in of.items() if needs & set(self.score.needs))

    def _chosen(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: self.options[name] for name in names}

    @property
    def described(self) -> str:
        """Name of a mask by score: the score, options other than the defaults, the density."""
        words = [self.score.label]
        for key, value in {**self._chosen(SELECTION), **self.relevant}.items():
            if value != DEFAULTS[key] and (key, value) != ("hessian", "scalar"):
                is_word = isinstance(value, str) and key in ("hessian", "scope", "unit")
                words.append(value if is_word else f"{key}={value}")
        return " ".join(words if self.density is None else [*words, f"{self.density:g}"])

    def file_name(self, settings: Mapping[str, Any]) -> str:
        """Name of the file of a mask by score, unique for it and ``settings``: model and rows."""
        readable = re.sub(r"[^A-Za-z0-9.=-]+", "-", self.described)
        return f"{readable}-{digest([dict(settings), self.definition])[:8]}"


Choice = Union[ObjectiveChoice, MaskChoice]


def passes(masks: Sequence[MaskChoice]) -> list[tuple[dict[str, Any], list[MaskChoice]]]:
    """The options of as few passes as possible, and the masks by score that each makes."""
    groups: list[tuple[dict[str, Any], list[MaskChoice]]] = []
    for mask in sorted(masks, key=lambda mask: -len(mask.relevant)):
        for options, others in groups:  # an option on which a score does not depend fits any pass
            if all(options.get(name, value) == value for name, value in mask.relevant.items()):
                options |= mask.relevant
                others.append(mask)
                break
        else:
            groups.append((dict(mask.relevant), [mask]))
    return groups


# -- a configuration -> choices --------------------------------------------------------------------


def read_objectives(entries: Entries) -> list[ObjectiveChoice]:
    """Objectives of a configuration, named by ``name`` or by their classes: NPO+SAM."""
    choices = []
    for entry in _some(entries, "objectives"):
        options = dict(entry) if isinstance(entry, Mapping) else {"class_path": entry}
        further = ("name", "learning_rates", "step_rule", "optimizer")
        name, rates, rule, optimizer = (options.pop(key, None) for key in further)
        rates = None if rates is None else check_rates(rates)
        choice = ObjectiveChoice("", options, rule, optimizer, rates)
        objective, made = choice.make(), choice.rule()
        parts: list[Any] = [type(objective)]
        if made is not None:
            made.check(objective)
            parts.append(type(made))
        if choice.optimizer_maker is not None:
            parts.append(choice.optimizer_maker.func)
        usual = "+".join(part.__name__ for part in parts)
        choices.append(replace(choice, name=str(name or usual)))
    _refuse_twins(choices, "objectives")
    return choices


def read_masks(entries: Entries) -> list[MaskChoice]:
    """Masks of a configuration; a list of densities makes a mask of each."""
    choices = [choice for entry in _some(entries, "masks") for choice in _read_mask(entry)]
    _refuse_twins(choices, "masks")
    seen: dict[str, str] = {}
    for choice in choices:
        if (other := seen.setdefault(choice.id, choice.name)) != choice.name:
            raise WagleError(f"masks: {other!r} and {choice.name!r} are the same: leave one out")
    return choices


def _read_mask(entry: Entry) -> list[MaskChoice]:
    options: dict[str, Any] = {"score": entry} if isinstance(entry, str) else dict(entry)
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
    kind: Any = next((key for key in ("dense", "adapter", "file") if key in options), "score")
    what = options.pop(kind, None)
    if what is None:
        raise WagleError(f"masks: {entry} names no mask: give score, adapter or file")
    if kind == "score":
        return _score_masks(name, what, options, rates)
    if options:
        raise WagleError(f"masks: {kind} has no option {next(iter(options))!r}")
    usual = "lora" if kind == "adapter" else kind
    if kind == "file":
        if not isinstance(what, str):
            raise WagleError(f"masks: file must be the path of a mask, got {what!r}")
        if not Path(what).is_file():
            raise WagleError(f"masks: file {what} does not exist")
        usual = Path(what).stem
    choice = MaskChoice(name or usual, what, kind, 1.0 if kind == "dense" else None, rates)
    choice.adapter()  # refuses wrong options
    return [choice]


def _score_masks(
    name: Optional[str], entry: Entry, options: dict[str, Any], rates: Optional[tuple[float, ...]]
) -> list[MaskChoice]:
    """The masks by one score, one for each density."""
    score = resolve(Score, entry, "mask", also=("dense", "lora"))
    where = f"masks: {score.label}"
    density = options.pop("density", DEFAULTS["density"])
    densities = density if isinstance(density, (list, tuple)) else [density]
    checked = typed(AttributionModule, options, where)
    if checked.get("gamma", "auto") != "auto":
        checked.setdefault("hessian", "scalar")
    complete = {key: checked.get(key, DEFAULTS[key]) for key in (*SELECTION, *ATTRIBUTION)}
    seeded = type(score) is Random and isinstance(entry, str)
    choices = []
    for share in _some(densities, "masks: density"):
        if share is not None:  # that of a plant's scores is the plant's
            share = typed(AttributionModule, {"density": share}, where)["density"]
        choice = MaskChoice("", entry, "score", share, rates, complete, seeded)
        end = "" if share is None else f" {share:g}"
        choice = replace(choice, name=choice.described if name is None else name + end)
        try:  # refuses options that have no meaning together
            passed = {key: complete[key] for key in ATTRIBUTION}
            AttributionModule(model="", masks=[choice.spec("mask")], **passed)
        except WagleError as error:
            raise WagleError(f"masks: {choice.name}: {error}") from None
        choices.append(choice)
    return choices


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(rate) for rate in rates)
    except (TypeError, ValueError):
        raise WagleError(f"learning_rates: must be a list of numbers, got {rates!r}") from None
    if not numbers or min(numbers) <= 0 or len(set(numbers)) < len(numbers):
        raise WagleError(f"learning_rates: must be different numbers above 0, got {list(numbers)}")
    return numbers


def _some(entries: Sequence[Any], what: str) -> Sequence[Any]:
    if not entries:
        raise WagleError(f"{what} is an empty list: name one, or leave it out")
    return entries


def _refuse_twins(choices: Sequence[Choice], what: str) -> None:
    for name, times in Counter(choice.name for choice in choices).items():
        if times > 1:
            raise WagleError(f"two {what} are called {name!r}: give one of them another name")


# -- options of other classes ----------------------------------------------------------------------

#: Options of UnlearnModule and of tests, and of Trainer, that the study sets itself.
_OF_STUDY = {
    "--module": "model output overwrite objective mask adapter lr target retrained generate",
    "--trainer": "max_steps max_epochs min_steps min_epochs max_time logger default_root_dir "
    "accumulate_grad_batches limit_val_batches fast_dev_run enable_checkpointing "
    "enable_progress_bar enable_model_summary",
}


def typed(cls: type, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a class, checked; text is converted to the value it stands for, all else stays."""
    converted = check_options(cls, options, where)
    return {k: converted[k] if isinstance(value, str) else value for k, value in options.items()}


def read_optimizer(entry: Entry) -> partial[torch.optim.Optimizer]:
    """The optimiser of all runs, without its learning rate."""
    name, options = split(entry, "optimizer")
    if "lr" in options:
        raise WagleError("optimizer.lr: it comes from --learning_rates: leave it out")
    cls = getattr(torch.optim, name, None)  # other libraries have classes of the same names
    if not isinstance(cls, type):
        cls = find_class(torch.optim.Optimizer, name, "optimizer")
    check_options(cls, options, f"optimizer {name}")
    made = partial(cls, **options)
    try:
        made([torch.nn.Parameter(torch.zeros(1))], lr=1e-5)
    except (TypeError, ValueError) as error:
        raise WagleError(f"optimizer {name}: {error}") from None
    return made


def read_module(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of :class:`UnlearnModule`, and of tests, that hold for all runs."""
    _refuse("--module", options)
    tests = {name: value for name, value in options.items() if name in option_names(Options)}
    module = {name: value for name, value in options.items() if name not in tests}
    module, tests = typed(UnlearnModule, module, "--module"), typed(Options, tests, "--module")
    try:
        UnlearnModule(model="", **module)
        Options(**tests)
    except WagleError as error:
        raise WagleError(f"--module: {error}") from None
    return module, tests


def read_trainer(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of Lightning's Trainer that hold for all runs, each on one device."""
    _refuse("--trainer", options)
    complete = {"devices": 1, **options}
    if str(complete["devices"]) != "1" or complete.get("num_nodes", 1) != 1:
        hint = "leave trainer.devices and trainer.num_nodes out"
        raise WagleError(f"a study runs on one device: {hint}")
    with silence(), trainer_errors():
        L.Trainer(**complete, logger=False, enable_checkpointing=False)
    return complete


def _refuse(option: str, names: Collection[str]) -> None:
    for name in names:
        if name in _OF_STUDY[option].split():
            raise WagleError(f"the study sets {name} itself: leave it out", option=option)


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
        return f"{self.objective.name}, {self.mask.name}, lr {self.lr:g}, seed {self.seed}"

    @property
    def labels(self) -> dict[str, Any]:
        """The columns of its rows in the study's table."""
        objective, mask = self.objective, self.mask
        score = None if mask.score is None else mask.score.label
        names = {"objective": objective.name, "mask": mask.name, "score": score}
        what = {"density": mask.density, "lr": self.lr, "seed": self.seed, "run": self.id}
        return {**names, **what, "objective_id": objective.id, "mask_id": mask.id}


class Grid(NamedTuple):
    """What runs are made of; objectives and masks may have their own rates: :meth:`rates_of`."""

    objectives: list[ObjectiveChoice]
    masks: list[MaskChoice]
    rates: tuple[float, ...]
    seeds: list[int]

    @classmethod
    def of(
        cls, objectives: Entries, masks: Entries, rates: Sequence[float], seeds: Sequence[int]
    ) -> Grid:
        """The grid of a configuration; refuses what is empty, unknown, or given twice."""
        if not seeds or len({s for s in seeds if 0 <= s < 1 << 32}) < len(seeds):
            raise WagleError(f"seeds: must be different numbers in [0, 2³²), got {list(seeds)}")
        return cls(read_objectives(objectives), read_masks(masks), check_rates(rates), list(seeds))

    def rates_of(self, objective: ObjectiveChoice, mask: MaskChoice) -> tuple[float, ...]:
        """The learning rates of an arm: the objective's own, else the mask's own, else the study's."""
        return objective.learning_rates or mask.learning_rates or self.rates

    def runs(self, settings: Mapping[str, Any]) -> Iterator[Run]:
        """All runs, in an order that leaves a study balanced if it is stopped early.

        The first seed comes for all arms before the second; within a seed, the middle learning rate
        for all arms before the next; within these, the masks as listed. Ids include ``settings``.
        """
        shared, arms = digest(settings), []
        for mask, objective in product(self.masks, self.objectives):
            arms.append((objective, mask, middle_first(self.rates_of(objective, mask))))
        most = max(len(rates) for _, _, rates in arms)
        for seed, rank, (objective, mask, rates) in product(self.seeds, range(most), arms):
            if rank < len(rates):
                what = [shared, objective.definition, mask.definition, rates[rank], seed]
                yield Run(objective, mask, rates[rank], seed, digest(what))


def middle_first(rates: Sequence[float]) -> list[float]:
    """Learning rates from the middle of the grid outwards; of two equally far, the lower first.

    >>> middle_first([1e-5, 3e-5, 1e-4]), middle_first([4, 3, 2, 1])
    ([3e-05, 1e-05, 0.0001], [2, 3, 1, 4])
    """
    ordered, middle = sorted(rates), (len(rates) - 1) / 2
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: (abs(i - middle), i))]
