"""From the sums of a pass to scores and masks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
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
    """Statistics that a pass has collected of a model, and the scores and masks made of them.

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
        """Number of rows of a stream that the pass has seen."""
        return self.counts[f"{stream}_rows"]

    def _scale(self, stream: str) -> float:
        return 1.0 / self.rows(stream) if self._mean else 1.0

    # -- scores ------------------------------------------------------------------------------------

    def scores(
        self, score: Score, names: Optional[Collection[str]] = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, fp32 scores in its shape) of all parameters or of some, one at a time.

        With several ranks: the scores of this rank's rows.

        Raises:
            WagleError: if the score returns another shape, or no floating-point numbers.
        """
        for position, (name, _) in enumerate(self._parameters):
            if names is None or name in names:
                values = checked(score, self.statistics(position, score))
                yield name, values if score.by_row else self.sums.shards[position].of(values)

    @torch.no_grad()
    def statistics(self, position: int, score: Score) -> WeightStatistics:
        """What a score needs of one parameter: of this rank's rows if it scores by row, else of
        all."""
        name, parameter = self._parameters[position]
        shard, needs = self.sums.shards[position], score.needs
        device = self.device or parameter.device

        def part(rows: Tensor) -> Tensor:
            return (rows if score.by_row else shard.gather(rows)).to(device)

        with gathered(parameter) as weights:
            theta = shard.of(weights) if score.by_row else weights
            # a copy, since a score may modify it
            theta = theta.detach().to(device, torch.float32, copy=True)
        w = WeightStatistics(name, theta)
        for field in ("g_f", "g_r", "fisher_f", "fisher_r"):
            if field in needs:
                stream = self._forget if field.endswith("f") else "retain"
                fisher = field.startswith("fisher")
                scale = 1.0 / self.rows(stream) if fisher else self._scale(stream)
                setattr(w, field, part(self.sums.buffers(field)[position]) * scale)
        if "activation" in needs and name in self.vectors.get("activation", {}):
            norms = self.vectors["activation"][name].sqrt().float()
            along_rows = score.by_row and norms.ndim == theta.ndim and len(norms) == shard.shape[0]
            w.activation = (norms[shard.start : shard.stop] if along_rows else norms).to(device)
        if "h" in needs and self._scalar:
            w.h = torch.tensor(self.hessian.mean, device=device)
        elif "h" in needs:
            w.h = part(self.hessian.damped(position))
        if "h_diagonal" in needs:
            w.h_diagonal, w.h_mean = part(self.hessian.plain(position)), self.hessian.mean
        return w

    def whole_scores(self, score: Score) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, its scores), of all ranks' rows."""
        for (name, rows), shard in zip(self.scores(score), self.sums.shards, strict=True):
            yield name, shard.gather(rows)

    # -- masks -------------------------------------------------------------------------------------

    def mask(
        self, score: Union[Score, str] = "wagle", density: float = 0.2, **options: Any
    ) -> Optional[WeightMask]:
        """The mask of one score; None on other ranks than 0.

        Args:
            score, density: see :class:`~wagle_pl.attribution.MaskSpec`.
            **options: passed to :class:`~wagle_pl.attribution.MaskSpec`.
        """
        default = MaskSpec(score, density, select="high", scope="global")
        ((_, mask),) = self.masks([complete(MaskSpec(**options), default, {})], {})
        return mask

    def masks(
        self, specs: Sequence[MaskSpec], metadata: dict[str, Any]
    ) -> Iterator[tuple[MaskSpec, Optional[WeightMask]]]:
        """(spec, its mask; None on other ranks than 0) of complete specs.

        Specs that differ in density only share their passes over the scores. Each rank selects
        among the scores of its rows and sends the bits, one a weight, to rank 0.
        """
        shards = dict(zip(self.shapes, self.sums.shards, strict=True))
        groups: dict[Any, list[MaskSpec]] = {}
        for spec in specs:
            groups.setdefault(spec.passes, []).append(spec)
        for group in groups.values():
            first, names = group[0], group[0].eligible(self.shapes)
            share = first.score.share({name: self.shapes[name] for name in names})
            densities = [spec.density if share is None else share for spec in group]
            selected: list[dict[str, Tensor]] = [{} for _ in group]
            scores = partial(self.scores, first.score, set(names))
            for name, bits in select_each(scores, densities, first.ranking, first.scope, shards):
                for chosen, packed in zip(selected, bits, strict=True):
                    whole = shards[name].gather_bits(packed)
                    if distributed.rank() == 0:
                        chosen[name] = whole
            for spec, density, packed in zip(group, densities, selected, strict=True):
                made_by = {**metadata, **spec.options(), "density": float(density)}
                first_rank = distributed.rank() == 0
                yield spec, whole_mask(packed, self.shapes, made_by) if first_rank else None
