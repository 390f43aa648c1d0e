"""From the sums of a pass to scores and masks: at once, or later from scores on disk.

:class:`MaskSpec` holds the options of one mask, :class:`Collected` makes masks from sums, and
:func:`mask_from_scores` makes one from stored scores in seconds, without another pass. Scores on
disk are a folder with one safetensors file per rank, which holds its rows of every parameter, and
``index.json``: how the scores were made, for which model, and which files hold which parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, Optional, TypedDict, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wagle_pl.attribution.hessian import DIAGONAL, TRACE, DampedHessian, Hessian
from wagle_pl.attribution.scores import COLLECTED, Score, WeightStatistics, checked
from wagle_pl.attribution.selection import Ranking, Scope, select_each
from wagle_pl.attribution.sums import BLOCK, GradientSums, Shard
from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError, check_density
from wagle_pl.core.reading import read_json
from wagle_pl.core.records import MadeBy
from wagle_pl.core.registry import resolve
from wagle_pl.core.schema import Count, check_arguments
from wagle_pl.core.tensorfiles import check_version, write_tensors
from wagle_pl.core.weights import gathered, parameter_shapes
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import filled_bits

FORMAT = "wagle_pl.scores"
FORMAT_VERSION = 2
INDEX_FILE = "index.json"
SCORES_FILE = "scores-{:05d}.safetensors"  # of a rank, from 1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


# -- the options of a mask -------------------------------------------------------------------------


@dataclass
class MaskSpec:
    """One mask to write from the pass. Options that are None default to those of the same name of
    :class:`~wagle_pl.attribution.AttributionModule`, where they are explained.

    Args:
        score, density, select, scope, include, exclude: options of the module.
        name: of the mask's file; when None, made of score and density, and of select and scope if
            they are not the default.
    """

    score: Optional[Union[Score, str]] = None
    density: Optional[float] = None
    select: Optional[Literal["high", "low"]] = None
    scope: Optional[Literal["global", "tensor", "row"]] = None
    include: Optional[str] = None
    exclude: Optional[str] = None
    name: Optional[str] = None

    @property
    def passes(self) -> tuple[Any, ...]:
        """Specs for which this is equal are selected in the same passes over the scores."""
        return id(self.score), self.select, self.scope, self.include, self.exclude

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
        for option in ("include", "exclude"):
            pattern = getattr(self, option)
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise WagleError(f"{pattern!r} is no regular expression: {error}", option) from None

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
        name = [spec.score.label, f"{float(spec.density):g}", *ranking]
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
        default = MaskSpec(score, density, select="high", scope="global")
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
        first_rank = distributed.rank() == 0
        groups: dict[Any, list[MaskSpec]] = {}
        for spec in specs:
            groups.setdefault(spec.passes, []).append(spec)
        for group in groups.values():
            spec, names = group[0], group[0].eligible(self.shapes)
            densities = [spec.density for spec in group]
            selected: list[dict[str, Tensor]] = [{} for _ in group]
            scores = partial(self.scores, spec.score, set(names))
            ranking = Ranking(absolute=not spec.score.signed, low=spec.select == "low")
            for name, bits in select_each(scores, densities, ranking, spec.scope, shards):
                for chosen, packed in zip(selected, bits, strict=True):
                    bits_of_mask = shards[name].gather_bits(packed)
                    if first_rank:
                        chosen[name] = bits_of_mask
            for spec, density, chosen in zip(group, densities, selected, strict=True):
                made_by = {**metadata, **spec.options(), "density": float(density)}
                yield spec, _whole_mask(chosen, self.shapes, made_by) if first_rank else None


def _whole_mask(
    packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, Any]
) -> WeightMask:
    """A mask of all parameters, in their order: those that were not eligible are frozen."""
    frozen = {n: filled_bits(prod(shape), False) for n, shape in shapes.items() if n not in packed}
    return WeightMask({name: {**frozen, **packed}[name] for name in shapes}, shapes, metadata)


# -- scores on disk --------------------------------------------------------------------------------


def write_scores(
    folder: str | Path,
    scores: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    made_by: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder of scores atomically, one tensor at a time; an existing one is replaced.
    Collective: each rank writes a file with its rows.

    Args:
        folder: on a disk that the ranks share.
        scores: (parameter name, scores of this rank's rows) of every parameter of ``shapes``.
        made_by: metadata for masks made from them, and ``absolute`` (ranked by absolute value).
        dtype: of the file. In bf16, weights whose scores differ by less than 1/256 may tie.
    """
    header = {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    metadata = header | {"shapes": json.dumps(shapes), "made_by": json.dumps(made_by)}
    ranks = range(distributed.world_size())
    files = {
        name: [SCORES_FILE.format(r + 1) for r in ranks if prod(Shard(shape, r, len(ranks)).part)]
        for name, shape in shapes.items()
    }
    remaining = iter(scores)
    tensors = [
        (name, dtype, Shard(shape).part, lambda: next(remaining)[1])
        for name, shape in shapes.items()
    ]
    with distributed.shared_folder(Path(folder)) as temporary:
        try:
            write_tensors(temporary / SCORES_FILE.format(distributed.rank() + 1), tensors, metadata)
        except OSError:
            for _ in remaining:  # other ranks may need this one for them
                pass
            raise
        if distributed.rank() == 0:
            index = {**header, "shapes": shapes, "made_by": made_by, "files": files}
            text = json.dumps(index, indent=1) + "\n"
            (temporary / INDEX_FILE).write_text(text, encoding="utf-8")
    return Path(folder)


class Index(TypedDict):
    """``index.json`` of a folder of scores."""

    format: Literal["wagle_pl.scores"]
    format_version: Union[str, int]
    shapes: dict[str, list[Count]]
    made_by: MadeBy
    files: dict[str, list[str]]


class StoredScores:
    """A folder that :func:`write_scores` wrote, or a file in it; read one tensor at a time."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.folder = folder.parent if folder.is_file() else folder
        try:
            index = read_json(self.folder / INDEX_FILE, Index, "index")
        except WagleError as error:
            raise WagleError(
                f"{folder} is no folder of scores ({error})", hint="give what save_scores wrote"
            ) from None
        check_version(index["format_version"], FORMAT_VERSION, f"{folder} has")
        self.shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        self.made_by = index["made_by"]
        self._files = index["files"]
        for name in self.shapes.keys() ^ self._files.keys():
            raise WagleError(f"scores {folder} are damaged: {name} has no shape or no file")

    def stream(self, names: Optional[Iterable[str]] = None) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, float32 scores), of all parameters or of some, in order."""
        for name in self.shapes if names is None else names:
            rows = []
            for file in self._files[name]:
                path = self.folder / file
                try:
                    with safe_open(path, framework="pt") as stored:
                        rows.append(stored.get_tensor(name).float())
                except (SafetensorError, OSError) as error:
                    raise WagleError(f"{path} is missing or not whole: {error}") from None
            columns = {row.shape[1:] for row in rows}
            if len(columns) > 1 or sum(row.numel() for row in rows) != prod(self.shapes[name]):
                raise WagleError(f"scores {self.folder} are damaged: {name} is of another shape")
            scores = rows[0] if len(rows) == 1 else torch.cat(rows or [torch.empty(0)])
            yield name, scores.view(self.shapes[name])


def mask_from_scores(
    path: str | Path,
    density: float,
    select: Literal["high", "low"] = "high",
    scope: Scope = "global",
    include: Optional[str] = None,
    exclude: Optional[str] = None,
) -> WeightMask:
    """The mask from a folder of scores; if they are in fp32, the same as from the pass. Options are
    those of :class:`~wagle_pl.attribution.AttributionModule`."""
    options: dict[str, Any] = {"density": density, "select": select, "scope": scope}
    options |= {"include": include, "exclude": exclude}
    spec = MaskSpec(**options)
    spec.check()
    stored = StoredScores(path)
    names = spec.eligible(stored.shapes)
    ranking = Ranking(stored.made_by.get("absolute", True), low=select == "low")
    chosen = select_each(lambda: stored.stream(names), [density], ranking, scope)
    packed = {name: bits for name, (bits,) in chosen}
    made_by = {key: value for key, value in stored.made_by.items() if key != "absolute"}
    return _whole_mask(packed, stored.shapes, made_by | options)
