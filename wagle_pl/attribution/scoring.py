"""From the sums of a pass to scores and masks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from wagle_pl.attribution.hessian import DIAGONAL, TRACE, DampedHessian, Hessian
from wagle_pl.attribution.scores import Score, WeightStatistics, checked
from wagle_pl.attribution.selection import select_each
from wagle_pl.attribution.specs import MaskSpec, complete
from wagle_pl.attribution.stored import whole_mask
from wagle_pl.attribution.sums import GradientSums
from wagle_pl.core import distributed
from wagle_pl.core.weights import gathered, parameter_shapes
from wagle_pl.masks import WeightMask


class Collected:
    """What a pass has collected of a model. Making it is collective, and so is what it gives.

    Args:
        lm: the model, its weights those of the pass.
        sums: of the pass: ``g_f``, ``g_r``, ``fisher_f``, ``fisher_r``, as far as scores need them.
        forget: the forget rows' stream.
        mean: gradients are of the mean over rows, as in the paper; of the sum if False, as in its code.
        hessian: the estimator that has filled the sums, or the scalar γ; None if no score needs h.
        hessian_stream: the rows that it is of.
        diagonal: name of the sum that holds its diagonal.
        scalar: h is one number, the mean, even where a score reads the diagonal.
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
        self.lm, self.sums, self.device = lm, sums, device
        self.shapes = parameter_shapes(lm)
        small = sums.small()
        self.counts, self.vectors = small["counts"], small["vectors"]
        self._streams = {"f": forget, "r": "retain"}
        self._mean, self._scalar = mean, scalar
        self.hessian: Optional[DampedHessian] = None
        if isinstance(hessian, Hessian):
            scale = self._scale(hessian_stream) / hessian.samples
            if hessian.diagonal:
                buffers = sums.buffers(diagonal)
                self.hessian = DampedHessian.of_diagonal(buffers, scale, damping)
            else:
                self._scalar = True
                weights = sum(shard.total for shard in sums.shards)
                trace = float(sum(self.vectors[TRACE].values()))
                self.hessian = DampedHessian(trace * scale / weights)
        elif hessian is not None:
            self._scalar, self.hessian = True, DampedHessian(hessian)

    def rows(self, stream: str) -> float:
        """Rows of a stream that the pass has seen."""
        return self.counts[f"{stream}_rows"]

    def _scale(self, stream: str) -> float:
        return 1.0 / self.rows(stream) if self._mean else 1.0

    def scores(
        self, score: Score, names: Optional[Collection[str]] = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, fp32 scores in its shape) of all parameters or of some, computed one parameter at a time.

        With several ranks: the scores of this rank's rows.

        Raises:
            WagleError: if the score returns another shape, or no floating-point numbers.
        """
        for position, (name, parameter) in enumerate(self.lm.named_parameters()):
            if names is None or name in names:
                values = checked(score, self._statistics(position, name, parameter, score))
                yield name, values if score.by_row else self.sums.shards[position].of(values)

    @torch.no_grad()
    def _statistics(
        self, position: int, name: str, parameter: nn.Parameter, score: Score
    ) -> WeightStatistics:
        """What a score needs of one parameter: of this rank's rows if it scores by row, else of all."""
        shard, needs = self.sums.shards[position], score.needs
        device = self.device or parameter.device

        def part(rows: Tensor) -> Tensor:
            return (rows if score.by_row else shard.gather(rows)).to(device)

        with gathered(parameter) as weights:
            theta = shard.of(weights) if score.by_row else weights
            # a copy, since a score may work in place
            theta = theta.detach().to(device, torch.float32, copy=True)
        w = WeightStatistics(name, theta)
        for field in ("g_f", "g_r", "fisher_f", "fisher_r"):
            if field in needs:
                stream = self._streams[field[-1]]
                mean = field.startswith("fisher") or self._mean
                scale = 1.0 / self.rows(stream) if mean else 1.0
                setattr(w, field, part(self.sums.buffers(field)[position]) * scale)
        if "activation" in needs and name in self.vectors.get("activation", {}):
            norms = self.vectors["activation"][name].sqrt().float()
            along_rows = score.by_row and norms.ndim == theta.ndim and len(norms) == shard.shape[0]
            w.activation = (norms[shard.start : shard.stop] if along_rows else norms).to(device)
        if "h" in needs:
            h = torch.tensor(self.hessian.mean, device=device) if self._scalar else None
            w.h = part(self.hessian.damped(position)) if h is None else h
        if "h_diagonal" in needs:
            w.h_diagonal, w.h_mean = part(self.hessian.plain(position)), self.hessian.mean
        return w

    def whole_scores(self, score: Score) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, its scores), of all ranks' rows."""
        for (name, rows), shard in zip(self.scores(score), self.sums.shards, strict=True):
            yield name, shard.gather(rows)

    def mask(
        self, score: Union[Score, str] = "wagle", density: float = 0.2, **options: Any
    ) -> Optional[WeightMask]:
        """The mask of one score; options are those of :class:`~wagle_pl.attribution.MaskSpec`."""
        default = MaskSpec(score, density, select="high", scope="global")
        (mask,) = self.masks([complete(MaskSpec(**options), default, {})], {})
        return mask

    def masks(
        self, specs: Sequence[MaskSpec], metadata: dict[str, Any]
    ) -> Iterator[Optional[WeightMask]]:
        """The masks of specs that differ in density only, in the same passes over their scores.

        With several ranks each selects among the scores of its rows; rank 0 is sent the bits, one a weight, and other
        ranks' masks are None.
        """
        score, names = specs[0].score, specs[0].taking_part(self.shapes)
        share = score.share({name: self.shapes[name] for name in names})
        densities = [spec.density if share is None else share for spec in specs]
        selected: list[dict[str, Tensor]] = [{} for _ in specs]
        shards = dict(zip(self.shapes, self.sums.shards, strict=True))
        found = select_each(
            lambda: self.scores(score, set(names)),
            densities,
            specs[0].ranking,
            specs[0].scope,
            shards,
        )
        first = distributed.rank() == 0
        for name, bits in found:
            for chosen, packed in zip(selected, bits, strict=True):
                whole = shards[name].gather_bits(packed)
                if first:
                    chosen[name] = whole
        for spec, density, packed in zip(specs, densities, selected, strict=True):
            made_by = {**metadata, **spec.options(), "density": float(density)}
            yield whole_mask(packed, self.shapes, made_by) if first else None
