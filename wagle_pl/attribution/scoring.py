"""From the sums of a pass to scores and masks.

:class:`MaskSpec` holds the options of one mask, :class:`Collected` computes scores from sums, and
:func:`masks_of` makes masks from scores, those of a pass or those on disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, Optional, Union

import torch
from torch import Tensor, nn

from wagle_pl.attribution.hessian import DIAGONAL, TRACE, DampedHessian, Hessian
from wagle_pl.attribution.scores import COLLECTED, Score, WeightStatistics, checked
from wagle_pl.attribution.selection import Ranking, Scope, select_each
from wagle_pl.attribution.sums import BLOCK, GradientSums, Shard
from wagle_pl.attribution.units import Geometry, Pool, Units, check_unit
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError, check_density
from wagle_pl.core.registry import resolve
from wagle_pl.core.schema import check_arguments
from wagle_pl.core.weights import gathered, parameter_shapes
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import filled_bits

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# -- the options of a mask -------------------------------------------------------------------------


@dataclass
class MaskSpec:
    """One mask to write from the pass. Options that are None default to those of the same name of
    :class:`~wagle_pl.attribution.AttributionModule`, where they are explained.

    Args:
        score, density, select, scope, unit, pool, include, exclude: options of the module.
        name: of the mask's file; when None, made of score and density, and of select, scope and
            unit if they are not the default.
    """

    score: Optional[Union[Score, str]] = None
    density: Optional[float] = None
    select: Optional[Literal["high", "low"]] = None
    scope: Optional[Scope] = None
    unit: Optional[str] = None
    pool: Optional[Pool] = None
    include: Optional[str] = None
    exclude: Optional[str] = None
    name: Optional[str] = None

    @property
    def passes(self) -> tuple[Any, ...]:
        """Specs for which this is equal are selected in the same passes over the scores."""
        options = {**vars(self), "score": id(self.score), "density": None, "name": None}
        return tuple(options.values())

    def eligible(self, names: Iterable[str]) -> list[str]:
        """The parameters whose weights compete; there must be at least one."""
        kept = [name for name in names if re.search(self.include or "", name)]
        kept = [n for n in kept if self.exclude is None or not re.search(self.exclude, n)]
        if not kept:
            none = f"include {self.include!r} and exclude {self.exclude!r} leave no parameter"
            raise WagleError(none)
        return kept

    def check(self) -> None:
        check_arguments(MaskSpec.__init__, vars(self), "")
        check_density(self.density)
        check_unit(self.unit)
        if self.unit != "weight" and self.scope != "global":
            raise WagleError(f"must be global with unit {self.unit}, got {self.scope}", "scope")
        for option in ("include", "exclude"):
            pattern = getattr(self, option)
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise WagleError(f"{pattern!r} is no regular expression: {error}", option) from None

    def options(self) -> dict[str, Any]:
        """What determines which weights are selected, for metadata."""
        names = ["select", "scope", "include", "exclude"]
        names += [] if self.unit == "weight" else ["unit", "pool"]
        options = {name: getattr(self, name) for name in names}
        if self.score is None:
            return options
        score = {k: v for k, v in vars(self.score).items() if k[0] != "_" and _is_plain(v)}
        return {"score": type(self.score).__name__, "score_options": score, **options}


def complete(
    specs: Sequence[Union[MaskSpec, Mapping[str, Any]]], default: MaskSpec
) -> list[MaskSpec]:
    """The specs with every option set and checked, and named; those with equal scores share one."""
    if not specs:
        raise WagleError("the list is empty", option="masks", hint="leave it out, or name a mask")
    complete_specs, scores = [], dict[tuple[type, str], Score]()
    for spec in specs:
        if isinstance(spec, Mapping):
            strange = sorted(set(spec) - {field.name for field in fields(MaskSpec)})
            if strange:
                raise WagleError(f"unknown key {strange[0]!r}", option="masks")
            spec = MaskSpec(**spec)
        spec = replace(default, **{k: v for k, v in vars(spec).items() if v is not None})
        spec.score = resolve(Score, spec.score, "score")
        options = {k: v if _is_plain(v) else id(v) for k, v in vars(spec.score).items()}
        key = type(spec.score), json.dumps(options, sort_keys=True)
        spec.score = scores.setdefault(key, spec.score)
        spec.check()
        if unknown := set(spec.score.needs) - set(COLLECTED):
            lacking = f"{type(spec.score).__name__} needs {unknown.pop()!r}, which no pass collects"
            raise WagleError(lacking, option="score", hint=f"choose from {COLLECTED}")
        ranking = [word for word in (spec.select, spec.scope) if word not in ("high", "global")]
        unit = [] if spec.unit == "weight" else [spec.unit.replace(":", "")]
        name = [spec.score.label, f"{float(spec.density):g}", *ranking, *unit]
        spec.name = spec.name or "-".join(name)
        complete_specs.append(spec)
    return complete_specs


def _is_plain(value: Any) -> bool:
    """Whether a value can be written to JSON as it is."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))


def check_names(specs: Sequence[MaskSpec]) -> None:
    """Refuse names of masks that are not plain file names, or not unique."""
    names = [spec.name for spec in specs]
    for name in names:
        if name in (".", "..") or "\0" in name or Path(name).name != name:
            must = "a name must be a file name without a folder"
            raise WagleError(f"{must}, got {name!r}", option="masks")
        if names.count(name) > 1:
            raise WagleError(f"two masks are called {name!r}", "masks", "rename one of them")


def by_label(specs: Sequence[MaskSpec]) -> dict[str, MaskSpec]:
    """Label of each score -> a spec that has it; two different scores may not share one."""
    labels: dict[str, MaskSpec] = {}
    for spec in specs:
        if labels.setdefault(spec.score.label, spec).score is not spec.score:
            twins = f"two different scores would be saved as {spec.score.label}.scores"
            raise WagleError(twins, "save_scores", "make two runs of them")
    return labels


# -- masks of a pass -------------------------------------------------------------------------------


class Collected:
    """Statistics that a pass has collected on a model, and the scores and masks made from them.

    Creating it is collective, and so are its methods: all ranks must call them.

    Args:
        lm: the model, with the weights it had in the pass.
        sums: of the pass: ``g_f``, ``g_r``, ``fisher_f``, ``fisher_r``, as far as scores need them.
        forget: name of the forget rows' stream.
        mean: gradients are of the mean over rows, as in the paper; of the sum if False, as in its
            code.
        hessian: the estimator that has filled the sums, or the scalar γ; None if no score needs h.
        hessian_stream: the rows that the estimator ran on.
        diagonal: name of the sum that holds its diagonal.
        scalar: use the mean of the diagonal as h.
        damping: see :class:`~wagle_pl.attribution.hessian.DampedHessian`.
        device: where scores are computed; the parameter's own when None.
    """

    def __init__(
        self,
        lm: nn.Module,
        sums: GradientSums,
        forget: str = "forget",
        mean: bool = True,
        hessian: Optional[Union[Hessian, float]] = None,
        hessian_stream: str = "retain",
        diagonal: str = DIAGONAL,
        scalar: bool = False,
        damping: float = 0.1,
        device: Optional[torch.device] = None,
    ) -> None:
        self.sums, self.device = sums, device
        self.shapes = parameter_shapes(lm)
        self.geometry = Geometry.of(lm)
        self._parameters = list(lm.named_parameters())
        small = sums.small()
        self.counts, self.vectors = small["counts"], small["vectors"]
        self._forget, self._mean, self._scalar = forget, mean, scalar
        self.hessian: Optional[DampedHessian] = None
        if isinstance(hessian, Hessian):
            scale = self._scale(hessian_stream) / hessian.samples
            if hessian.diagonal:
                self.hessian = DampedHessian.of_diagonal(sums.buffers(diagonal), scale, damping)
            else:
                self._scalar = True
                weights = sum(shard.total for shard in sums.shards)
                trace = float(sum(self.vectors[TRACE].values()))
                self.hessian = DampedHessian(trace * scale / weights)
        elif hessian is not None:
            self._scalar, self.hessian = True, DampedHessian(hessian)

    def rows(self, stream: str) -> float:
        return self.counts[f"{stream}_rows"]

    def _scale(self, stream: str) -> float:
        return 1.0 / self.rows(stream) if self._mean else 1.0

    def scores(
        self, score: Union[Score, str], names: Optional[Collection[str]] = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, fp32 scores in its shape, or of this rank's rows) of all parameters or
        of some, one at a time."""
        score = resolve(Score, score, "score")
        for position, (name, _) in enumerate(self._parameters):
            if names is None or name in names:
                if score.by_row:
                    yield name, self._by_row(position, score)
                else:
                    values = checked(score, self.statistics(position, score))
                    yield name, self.sums.shards[position].of(values)

    def _by_row(self, position: int, score: Score) -> Tensor:
        """Scores of this rank's rows, computed at most :data:`BLOCK` weights at a time."""
        shape = self.sums.shards[position].part
        rows, *rest = shape or (1,)
        block_rows = max(1, BLOCK // max(1, prod(rest)))
        if rows <= block_rows:
            return checked(score, self.statistics(position, score))
        scores = torch.empty(shape, device=self.device or self._parameters[position][1].device)
        for start in range(0, rows, block_rows):
            block = slice(start, start + block_rows)
            scores[block] = checked(score, self.statistics(position, score, block))
        return scores

    @torch.no_grad()
    def statistics(self, position: int, score: Score, rows: Any = ...) -> WeightStatistics:
        """What a score needs about one parameter: about some of this rank's rows (by default all)
        if it scores by row, else about the whole parameter."""
        name, parameter = self._parameters[position]
        shard, needs = self.sums.shards[position], score.needs
        device = self.device or parameter.device

        def part(mine: Tensor) -> Tensor:
            return (mine if score.by_row else shard.gather(mine)).to(device)

        with gathered(parameter) as weights:
            theta = shard.of(weights)[rows] if score.by_row else weights
            # a copy, since a score may modify it
            theta = theta.detach().to(device, torch.float32, copy=True)
        w = WeightStatistics(name, theta, total=shard.total)
        if score.by_row:
            start = rows.start if isinstance(rows, slice) else 0
            w.first = shard.first + start * prod(shard.shape[1:])
        for field in ("g_f", "g_r", "fisher_f", "fisher_r"):
            if field in needs:
                stream = self._forget if field.endswith("f") else "retain"
                fisher = field.startswith("fisher")
                scale = 1.0 / self.rows(stream) if fisher else self._scale(stream)
                setattr(w, field, part(self.sums.buffers(field)[position][rows]) * scale)
        if "activation" in needs and name in self.vectors.get("activation", {}):
            norms = self.vectors["activation"][name].sqrt().float()
            if score.by_row and norms.ndim == theta.ndim and len(norms) == shard.shape[0]:
                norms = norms[shard.start : shard.stop][rows]
            w.activation = norms.to(device)
        if "h" in needs and self._scalar:
            w.h = torch.tensor(self.hessian.mean, device=device)
        elif "h" in needs:
            w.h = part(self.hessian.damped(position, rows))
        if "h_diagonal" in needs:
            w.h_diagonal, w.h_mean = part(self.hessian.plain(position, rows)), self.hessian.mean
        return w

    def mask(
        self, score: Union[Score, str] = "wagle", density: float = 0.2, **options: Any
    ) -> Optional[WeightMask]:
        """The mask of one :class:`MaskSpec`; None on ranks other than 0."""
        default = MaskSpec(score, density, "high", "global", "weight", "mean")
        ((_, mask),) = self.masks(complete([MaskSpec(**options)], default), {})
        return mask

    def masks(
        self, specs: Sequence[MaskSpec], metadata: dict[str, Any]
    ) -> Iterator[tuple[MaskSpec, Optional[WeightMask]]]:
        """(spec, its mask; None on ranks other than 0) of :func:`complete` specs.

        Specs that differ only in density share their passes over the scores. Each rank selects
        among the scores of its rows and sends the bits, one per weight, to rank 0.
        """
        shards = dict(zip(self.shapes, self.sums.shards, strict=True))
        groups: dict[Any, list[MaskSpec]] = {}
        for spec in specs:
            groups.setdefault(spec.passes, []).append(spec)
        for group in groups.values():
            score = group[0].score
            scores = partial(self.scores, score)
            options = (metadata, not score.signed, self.geometry, shards)
            yield from masks_of(group, scores, self.shapes, *options)


def masks_of(
    specs: Sequence[MaskSpec],
    scores: Callable[[Collection[str]], Iterable[tuple[str, Tensor]]],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, Any],
    absolute: bool,
    geometry: Optional[Geometry],
    shards: Optional[Mapping[str, Shard]] = None,
) -> Iterator[tuple[MaskSpec, Optional[WeightMask]]]:
    """(spec, its mask; None on ranks other than 0) of specs that differ only in density. Collective.

    Args:
        scores: called with names of parameters, gives (name, scores of this rank's rows).
        shapes: of all parameters.
        metadata: of the masks, besides the options of the specs.
        absolute: rank by absolute value.
        geometry: of the model, for heads and neurons.
        shards: the rows of this rank; all rows when None.
    """
    spec, names = specs[0], specs[0].eligible(shapes)
    densities = [spec.density for spec in specs]
    ranking = Ranking(absolute, low=spec.select == "low")
    stream = partial(scores, names)
    shards = shards or {name: Shard(shape, 0, 1) for name, shape in shapes.items()}
    notes: list[dict[str, Any]] = [{} for _ in specs]
    if spec.unit == "weight":
        selected = select_each(stream, densities, ranking, spec.scope, shards)
    else:
        units = Units(spec.unit, {name: shapes[name] for name in names}, geometry)
        values = units.values(spec.score, stream, ranking, spec.pool, shards)
        taken = units.choose(values, densities, ranking.low)
        notes = [units.describe(chosen) for chosen in taken]
        selected = units.select(taken, shards)
    packed: list[dict[str, Tensor]] = [{} for _ in specs]
    first_rank = distributed.rank() == 0
    for name, bits in selected:
        for of_spec, bits_of_rows in zip(packed, bits, strict=True):
            bits_of_mask = shards[name].gather_bits(bits_of_rows)
            if first_rank:
                of_spec[name] = bits_of_mask
    for spec, of_spec, note in zip(specs, packed, notes, strict=True):
        made_by = {**metadata, **spec.options(), "density": float(spec.density), **note}
        yield spec, _whole_mask(of_spec, shapes, made_by) if first_rank else None


def _whole_mask(
    packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, Any]
) -> WeightMask:
    """A mask of all parameters, in their order: those that were not eligible are frozen."""
    frozen = {n: filled_bits(prod(shape), False) for n, shape in shapes.items() if n not in packed}
    return WeightMask({name: {**frozen, **packed}[name] for name in shapes}, shapes, metadata)
