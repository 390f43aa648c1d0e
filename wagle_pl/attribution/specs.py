"""``MaskSpec``: one mask to write, as a user asks for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Optional, Union

from wagle_pl.attribution.scores import COLLECTED, Score
from wagle_pl.attribution.selection import Ranking, check_density
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import resolve


@dataclass
class MaskSpec:
    """One mask to write from the pass; what is None is taken from the module's option of the same name.

    Args:
        score: class, short name or class path of a ``Score``.
        density: share of weights selected, in (0, 1], of those that take part.
        select: the ``high`` or the ``low`` end of the ranking.
        scope: weights compete over the whole model (``global``), within each ``tensor``, or within each ``row``.
        include: regular expression; only parameters whose name it finds take part.
        exclude: regular expression; parameters whose name it finds do not.
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
        """The order in which its weights are taken."""
        return Ranking(absolute=not self.score.signed, low=self.select == "low")

    @property
    def passes(self) -> tuple[Any, ...]:
        """Specs equal in this can be selected in the same passes."""
        return id(self.score), self.select, self.scope, self.include, self.exclude

    def taking_part(self, names: Iterable[str]) -> list[str]:
        """The parameters whose weights compete.

        Raises:
            WagleError: if there are none.
        """
        return taking_part(names, self.include, self.exclude)

    def options(self) -> dict[str, Any]:
        """What says which weights were taken, for records."""
        return {
            "score": type(self.score).__name__,
            "score_options": {
                k: v for k, v in vars(self.score).items() if not k.startswith("_") and _is_plain(v)
            },
            "select": self.select,
            "scope": self.scope,
            "include": self.include,
            "exclude": self.exclude,
        }


def taking_part(names: Iterable[str], include: Optional[str], exclude: Optional[str]) -> list[str]:
    """Names that ``include`` finds and ``exclude`` does not; None finds everything, or nothing.

    Raises:
        WagleError: if none is left, or one of them is no regular expression.
    """
    wanted, unwanted = _pattern("include", include), _pattern("exclude", exclude)
    kept = [
        name
        for name in names
        if (wanted is None or wanted.search(name))
        and (unwanted is None or not unwanted.search(name))
    ]
    if not kept:
        raise WagleError(f"include {include!r} and exclude {exclude!r} leave no parameter")
    return kept


def _pattern(option: str, text: Optional[str]) -> Optional[re.Pattern[str]]:
    """An option compiled, None if it is None; raises :class:`WagleError` if it is no regular expression."""
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise WagleError(f"{option} {text!r} is no regular expression: {error}") from None


def complete(
    spec: Union[MaskSpec, Mapping[str, Any]], default: MaskSpec, scores: dict[Any, Score]
) -> MaskSpec:
    """The spec with nothing missing, checked.

    Args:
        spec: what the user gave.
        default: the module's own options.
        scores: scores seen so far, so that specs of equal scores share one (and its passes).

    Raises:
        WagleError: if an option has no meaning.
    """
    if isinstance(spec, Mapping):
        unknown = sorted(set(spec) - {field.name for field in fields(MaskSpec)})
        if unknown:
            raise WagleError(f"masks: unknown key {unknown[0]!r}")
        spec = MaskSpec(**spec)
    given = {
        field.name: getattr(spec, field.name)
        for field in fields(spec)
        if getattr(spec, field.name) is not None
    }
    spec = replace(default, **given)
    score = resolve(Score, spec.score, "score")
    spec.score = scores.setdefault(_definition(score), score)
    check_density(spec.density)
    for option in ("include", "exclude"):
        _pattern(option, getattr(spec, option))
    for option, choices in (("select", ("high", "low")), ("scope", ("global", "tensor", "row"))):
        if getattr(spec, option) not in choices:
            raise WagleError(
                f"{option} must be one of {', '.join(choices)}, got {getattr(spec, option)!r}"
            )
    unknown = set(spec.score.needs) - set(COLLECTED)
    if unknown:
        name = type(spec.score).__name__
        raise WagleError(
            f"score {name} needs {unknown.pop()!r}, which no pass collects; choose from {COLLECTED}"
        )
    if _sets_its_share(
        spec.score
    ):  # it says which weights, all over the model: there is no ranking to read otherwise
        spec.select, spec.scope = "high", "global"
    return spec


def name_masks(specs: Sequence[MaskSpec]) -> list[str]:
    """File names: as given, or of score and density.

    Raises:
        WagleError: if two masks would have the same, or one is no plain file name.
    """
    names = [spec.name or _name(spec) for spec in specs]
    for name in names:
        if name in (".", "..") or "\0" in name or Path(name).name != name:
            raise WagleError(f"masks: name must be a file name without a folder, got {name!r}")
        if names.count(name) > 1:
            raise WagleError(f"two masks would be called {name!r}: give one of them a name")
    return names


def check_labels(specs: Sequence[MaskSpec]) -> None:
    """Raise :class:`WagleError` if two different scores would be saved under one name."""
    scores = {id(spec.score): spec.score.label for spec in specs}
    for label in scores.values():
        if list(scores.values()).count(label) > 1:
            raise WagleError(
                f"save_scores would save two different scores as {label}.scores: make two runs of them"
            )


def _definition(score: Score) -> tuple[type[Score], str]:
    """Equal for scores that are the same; what is no plain data is the same only as itself."""
    options = {
        name: value if _is_plain(value) else id(value) for name, value in vars(score).items()
    }
    return type(score), json.dumps(options, sort_keys=True)


def _is_plain(value: Any) -> bool:
    """Whether a value can go into a record as it is."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))


def _sets_its_share(score: Score) -> bool:
    return type(score).share is not Score.share


def _name(spec: MaskSpec) -> str:
    if _sets_its_share(spec.score):
        return spec.score.label
    extra = [
        value for value, usual in ((spec.select, "high"), (spec.scope, "global")) if value != usual
    ]
    return "-".join([spec.score.label, f"{spec.density:g}", *extra])
