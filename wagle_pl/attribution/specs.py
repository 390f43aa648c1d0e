"""``MaskSpec``: the options of one mask."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Optional, Union

from wagle_pl.attribution.scores import COLLECTED, Score
from wagle_pl.attribution.selection import Ranking, check_density, check_pattern, eligible_names
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import resolve


@dataclass
class MaskSpec:
    """One mask to write from the pass; what is None defaults to the module's option of that name.

    Args:
        score: class, short name or class path of a ``Score``.
        density: share of the eligible weights that is selected, in (0, 1].
        select: the ``high`` or the ``low`` end of the ranking.
        scope: weights compete over the whole model (``global``), within each ``tensor``, or within
            each ``row``.
        include: regular expression; only parameters in whose name it is found are eligible.
        exclude: regular expression; parameters in whose name it is found are not.
        name: of the mask's file; score and density when None.
    """

    score: Optional[Union[Score, str]] = None
    density: Optional[float] = None
    select: Optional[Literal["high", "low"]] = None
    scope: Optional[Literal["global", "tensor", "row"]] = None
    include: Optional[str] = None
    exclude: Optional[str] = None
    name: Optional[str] = None

    @property
    def ranking(self) -> Ranking:
        """The order in which its weights are selected."""
        return Ranking(absolute=not self.score.signed, low=self.select == "low")

    @property
    def passes(self) -> tuple[Any, ...]:
        """Specs equal in this are selected in the same passes over the scores."""
        return id(self.score), self.select, self.scope, self.include, self.exclude

    @property
    def sets_share(self) -> bool:
        """Whether the score itself decides how many weights are selected."""
        return type(self.score).share is not Score.share

    @property
    def default_name(self) -> str:
        """Score and density, and select and scope where they are not the default."""
        if self.sets_share:
            return self.score.label
        extra = [value for value in (self.select, self.scope) if value not in ("high", "global")]
        return "-".join([self.score.label, f"{self.density:g}", *extra])

    def eligible(self, names: Iterable[str]) -> list[str]:
        """The parameters whose weights compete.

        Raises:
            WagleError: if there are none.
        """
        return eligible_names(names, self.include, self.exclude)

    def options(self) -> dict[str, Any]:
        """What determines which weights are selected, for metadata."""
        options = vars(self.score).items()
        return {
            "score": type(self.score).__name__,
            "score_options": {k: v for k, v in options if k[0] != "_" and _is_plain(v)},
            "select": self.select,
            "scope": self.scope,
            "include": self.include,
            "exclude": self.exclude,
        }


def complete(
    spec: Union[MaskSpec, Mapping[str, Any]], default: MaskSpec, scores: dict[Any, Score]
) -> MaskSpec:
    """The spec with every option set and checked.

    Args:
        spec: what the user gave.
        default: the module's own options.
        scores: scores made so far, so that specs with equal scores share one (and its passes).

    Raises:
        WagleError: if an option has no meaning.
    """
    if isinstance(spec, Mapping):
        unknown = sorted(set(spec) - {field.name for field in fields(MaskSpec)})
        if unknown:
            raise WagleError(f"masks: unknown key {unknown[0]!r}")
        spec = MaskSpec(**spec)
    spec = replace(default, **{k: v for k, v in vars(spec).items() if v is not None})
    spec.score = resolve(Score, spec.score, "score")
    options = {k: v if _is_plain(v) else id(v) for k, v in vars(spec.score).items()}
    key = type(spec.score), json.dumps(options, sort_keys=True)
    spec.score = scores.setdefault(key, spec.score)
    check_density(spec.density)
    check_pattern("include", spec.include)
    check_pattern("exclude", spec.exclude)
    for option, choices in (("select", ("high", "low")), ("scope", ("global", "tensor", "row"))):
        value = getattr(spec, option)
        if value not in choices:
            raise WagleError(f"must be one of {', '.join(choices)}, got {value!r}", option)
    unknown = set(spec.score.needs) - set(COLLECTED)
    if unknown:
        raise WagleError(
            f"score {type(spec.score).__name__} needs {unknown.pop()!r}, which no pass collects; "
            f"choose from {COLLECTED}"
        )
    if spec.sets_share:  # the score selects whole modules: there is no ranking to choose
        spec.select, spec.scope = "high", "global"
    return spec


def complete_all(
    specs: Sequence[Union[MaskSpec, Mapping[str, Any]]], default: MaskSpec
) -> list[MaskSpec]:
    """:func:`complete` of several specs, of which there must be at least one."""
    if not specs:
        raise WagleError("is an empty list", option="masks", hint="leave it out, or name a mask")
    scores: dict[Any, Score] = {}
    return [complete(spec, default, scores) for spec in specs]


def name_masks(specs: Sequence[MaskSpec]) -> list[str]:
    """File names: as given, or of score and density.

    Raises:
        WagleError: if two masks would have the same, or one is not a plain file name.
    """
    names = [spec.name or spec.default_name for spec in specs]
    for name in names:
        if name in (".", "..") or "\0" in name or Path(name).name != name:
            raise WagleError(f"masks: name must be a file name without a folder, got {name!r}")
        if names.count(name) > 1:
            raise WagleError(
                f"two masks would be called {name!r}", hint="give one of them a name of its own"
            )
    return names


def check_labels(specs: Sequence[MaskSpec]) -> None:
    """Raise :class:`WagleError` if two different scores would be saved under one name."""
    labels = list({id(spec.score): spec.score.label for spec in specs}.values())
    for label in labels:
        if labels.count(label) > 1:
            raise WagleError(
                f"would save two different scores as {label}.scores",
                option="save_scores",
                hint="make two runs of them",
            )


def _is_plain(value: Any) -> bool:
    """Whether a value can be written to JSON as it is."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))
