"""Checks of options before a run, of numbers that are not finite, of frozen weights that moved."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wagle_pl.core import distributed
from wagle_pl.core.errors import Diverged, WagleError, first_line
from wagle_pl.core.late import LateReading
from wagle_pl.core.schema import check, schema_of
from wagle_pl.core.weights import chunks_of, digest, evaluating, share_of
from wagle_pl.lm.inference import keeps_rows_apart
from wagle_pl.lm.layers import expert_weights
from wagle_pl.masks import WeightMask
from wagle_pl.strategies import check_optimizer, is_zero

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from wagle_pl.lm.saving import Originals
    from wagle_pl.masks.selected import SelectedTensor
    from wagle_pl.unlearning.finetune import FinetuneModule


def check_run(module: FinetuneModule) -> None:
    """Refuse options of a module and of its trainer that cannot work, before any work is done."""
    if module.from_checkpoint:
        raise WagleError(
            "load_from_checkpoint gives a module to use and to test: to train on, make a new "
            "one and give trainer.fit the checkpoint as ckpt_path"
        )
    if module.fitted:
        raise WagleError(
            "this module was trained already, and its weights are no longer those of "
            f"{module.model_name}: to train again, make a new one"
        )
    trainer = module.trainer
    bound, output = trainer.gradient_clip_val, module.place and module.place.resolve()
    if bound is not None and not bound >= 0:
        raise WagleError(f"must be 0 or more, got {bound:g}", option="trainer.gradient_clip_val")
    if output is None and module.run_config:  # from Python the result is ``module.lm``
        raise WagleError("fit needs a folder for the model: give --model.output")
    if output is not None and output == Path(module.model_name).resolve():
        raise WagleError(
            f"output {module.output} is the model that this run starts from: choose another folder"
        )
    written = [("trainer.default_root_dir", trainer.default_root_dir)]
    for saver in trainer.checkpoint_callbacks:
        written.append(("dirpath of checkpoints", getattr(saver, "dirpath", None)))
    for what, folder in written if output is not None else ():
        if folder and Path(folder).resolve().is_relative_to(output):
            raise WagleError(
                f"{what}: {folder} lies in the output {module.output}, which the model's folder "
                "will replace: name another"
            )
    if module.output_dtype and is_zero(trainer.strategy):
        raise WagleError(
            "model.output_dtype: it does not work under DeepSpeed, whose optimisers hold the fp32 "
            "values: leave it out"
        )


def check_sharded(module: FinetuneModule) -> None:
    """Refuse what cannot work on weights that are sharded over ranks, once the model is loaded."""
    if not module.sharded:
        return
    if len(module.streams) > 1 and any(expert_weights(layer) for layer in module.lm.modules()):
        # an assertion in DeepSpeed's backward pass over several forward passes (its issue 5321)
        raise WagleError(
            f"ZeRO-3 cannot train experts on {' and '.join(module.streams)} rows in one step: "
            "choose another stage (--trainer.strategy deepspeed_stage_2)"
        )
    if module.compiles:
        raise WagleError(
            "ZeRO-3 gathers weights when a layer runs, which torch.compile does not allow: choose "
            "another stage",
            option="model.compile",
        )


def check_packing(module: FinetuneModule) -> None:
    """Refuse to pack rows that would see each other. Collective."""
    with evaluating(module.lm), module.trainer.precision_plugin.forward_context():
        apart = keeps_rows_apart(module.lm)
    if not apart:
        raise WagleError(
            f"packed rows would see each other in a {type(module.lm).__name__} with "
            f"{module.lm.config._attn_implementation} attention: leave --model.packing out",
            option="model.packing",
        )


# -- states of a checkpoint ------------------------------------------------------------------------


def check_resumed(module: FinetuneModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse states of an optimiser or a schedule that are not like those of this run, into which
    Lightning restores them unchecked."""
    where, trainer = module.checkpoint_label, module.trainer
    if not is_zero(trainer.strategy):  # which has read its own
        states = checkpoint.get("optimizer_states")
        if not states or None in map(states[0].get, ("param_groups", "state")):
            raise WagleError(
                f"{where} has no state of an optimizer (it may have been saved with "
                "save_weights_only): training cannot go on from it"
            )
        groups = states[0]["param_groups"]
        check_optimizer(groups, trainer.optimizers[0], where)
        own = trainer.optimizers[0].state_dict()["param_groups"]
        numbers = [group.get("params") for group in groups]
        check(numbers, list[list[int]], f"{where}: params")
        if numbers != [group["params"] for group in own]:
            raise WagleError(f"{where}: param_groups: its run trained other parameters")
        _check_state(states[0]["state"], trainer.optimizers[0], where)
    stored = checkpoint.get("lr_schedulers") or []
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    if [*map(_public, stored)] != [*map(_public, schedules)]:
        raise WagleError(
            f"{where} is of a run with another schedule of the learning rate: resume with the run's "
            "own --lr_scheduler"
        )
    check(stored, schema_of(schedules), f"{where}: lr_schedulers")
    for config, state in zip(trainer.lr_scheduler_configs, stored, strict=True):
        try:
            copy.copy(config.scheduler).load_state_dict(copy.deepcopy(state))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise WagleError(f"{where}: lr_schedulers: {first_line(error)}") from None


def _public(state: Mapping[str, Any]) -> set[str]:
    return {key for key in state if not key.startswith("_")}


def _check_state(stored: Mapping[int, Mapping[str, Any]], optimizer: Optimizer, where: str) -> None:
    """Refuse an optimiser's state, by the number of the parameter, that is not like its own."""
    trained = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    own = {
        parameter.dim(): _first_state(optimizer, group, parameter) for group, parameter in trained
    }
    for number, state in stored.items():
        if not 0 <= number < len(trained):
            raise WagleError(f"{where}: state: the run trains no parameter {number}")
        parameter = trained[number][1]
        small, values = own[parameter.dim()]
        check(state, schema_of(values), f"{where}: state.{number}")
        for key, value in values.items():
            if torch.is_tensor(value):
                shape = parameter.shape if value.shape == small.shape else state[key].shape
                if state[key].shape != shape or state[key].dim() != value.dim():
                    raise WagleError(
                        f"{where}: state.{number}.{key}: has shape {tuple(state[key].shape)}, and "
                        f"its parameter {tuple(parameter.shape)}"
                    )


def _first_state(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """A small parameter like another one, and an optimiser's state of it after a step."""
    small = nn.Parameter(parameter.detach().new_zeros(*range(2, 2 + parameter.dim())))
    small.grad = torch.zeros_like(small)
    copied = object.__new__(type(optimizer))  # copy.copy loses what Optimizer does not know
    copied.__dict__ = {key: value for key, value in vars(optimizer).items() if key != "step"}
    copied._optimizer_step_pre_hooks, copied._optimizer_step_post_hooks = {}, {}
    copied.state, copied.param_groups = defaultdict(dict), [{**group, "params": [small]}]
    copied.step()
    return small, dict(copied.state[small])


# -- numbers that are not finite -------------------------------------------------------------------


class StepLosses(NamedTuple):
    """One micro-batch of a step: its number in the epoch, its rows by stream, and its losses."""

    number: int
    rows: dict[str, Tensor]
    losses: Mapping[str, Any]  # tensors; numbers, once they have been read


class FiniteSteps(LateReading):
    """Refuses steps whose losses or gradients are not finite, without making a device wait.

    On a CPU, a step is refused before it is taken; elsewhere before the next one, or before weights
    are written.
    """

    def __init__(self) -> None:
        super().__init__()
        #: The losses of the last micro-batch that has been read.
        self.losses: dict[str, float] = {}

    def check(
        self, batches: Sequence[StepLosses], gradients: Mapping[str, Tensor], step: int
    ) -> None:
        """Start the check of a step, and finish that of the last one. Collective.

        If no gradients are given, fp16's scaler takes care of them: it skips such a step.

        Raises:
            Diverged: on all ranks, naming the rows, or a parameter.
        """
        names, largest = list(gradients), _largest(gradients.values()) if gradients else None
        checked = [batch.losses["loss"].float().view(1) for batch in batches]
        checked += [] if largest is None else [largest]
        finite = torch.cat(checked or [torch.zeros(1)]).isfinite().all()
        failed = distributed.all_reduce_sum((~finite).float()).view(1)
        losses = [loss for batch in batches for loss in batch.losses.values()]
        losses = [loss.float().view(1).to(failed.device) for loss in losses]

        def read(numbers: list[float]) -> None:
            failed, *values = numbers
            known = iter(values)
            read_batches = [
                batch._replace(losses={name: next(known) for name in batch.losses})
                for batch in batches
            ]
            self.losses = dict(read_batches[-1].losses) if read_batches else {}
            if failed:
                entries = [] if largest is None else largest.tolist()
                _refuse_step(read_batches, dict(zip(names, entries, strict=True)), step)

        self.start(torch.cat([failed, *losses]), read)


def _refuse_step(
    batches: Iterable[StepLosses], largest: Mapping[str, float], step: int
) -> NoReturn:
    """Say which loss, or the largest entry of which gradient, is not finite. Collective."""
    reasons = []
    for number, rows_of, losses in batches:
        if not math.isfinite(losses["loss"]):
            rows = {stream: row.tolist() for stream, row in rows_of.items()}
            values = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            reasons.append(
                f"loss is not finite at step {step} (batch {number}, rows {rows}): {values}"
            )
    if not reasons:
        reasons = [
            f"the gradient of {name} is not finite at step {step}, though the loss is"
            for name, value in largest.items()
            if not math.isfinite(value)
        ]
    advice = "lower the learning rate. Checkpoints written so far are kept"
    raise Diverged(f"{distributed.all_gather(reasons)[0]}; {advice}")


def check_weights(weights: Mapping[str, Tensor], step: int) -> None:
    """Refuse to write weights that are not finite; each rank checks those it holds. Collective."""
    finite = _largest(weight.detach() for weight in weights.values()).isfinite().tolist()
    broken = [name for name, good in zip(weights, finite, strict=True) if not good]
    if broken := distributed.all_gather(broken):
        raise WagleError(
            f"weights of {broken[0]} are not finite at step {step}: they are not written. Resume "
            "from an earlier checkpoint with a lower learning rate"
        )


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """(n,) largest absolute value of each of n tensors, in fp32; NaN if it has one, 0 if empty."""
    tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if tensors[0].device.type != "cpu":  # one kernel for all
        return torch.stack(torch._foreach_norm(tensors, math.inf)).float()
    ends = [tensor.aminmax() for tensor in tensors]  # on a CPU, much faster than a norm
    low, high = (torch.stack(end).float() for end in zip(*ends, strict=True))
    return torch.maximum(high, -low)


# -- moves that files round away -------------------------------------------------------------------


@torch.no_grad()
def moves_kept(tensors: Mapping[str, SelectedTensor], originals: Originals) -> Optional[float]:
    """Share of the weights that moved which still differ from the base model's once they are
    rounded to its files' dtypes, which is logged; None if nothing is rounded, or nothing moved."""
    moved = kept = 0
    for name, tensor in tensors.items():
        stored = None if tensor.values is None else originals.read(name)
        if stored is None or stored.dtype not in (torch.bfloat16, torch.float16):
            continue
        now = tensor.values.detach().view(-1)
        stored = tensor.taken(stored.to(now.device), stored.dtype).view(-1)
        start = stored.to(tensor.parameter.dtype)
        moves = now != start
        moved += int(moves.sum())
        kept += int((moves & (now.to(stored.dtype) != start.to(stored.dtype))).sum())
    if not moved:
        return None
    few = "; --model.output_dtype float32 keeps all" if kept < 0.5 * moved else ""
    message = "rounding to the base model's dtype leaves %.1f %% of the weights moved%s"
    log.info(message, 100 * kept / moved, few)
    return kept / moved


# -- frozen weights that moved ---------------------------------------------------------------------


class FrozenWeights:
    """Digests of the frozen weights of every tensor at θ₀; each rank has those of its shard."""

    def __init__(self, mask: WeightMask, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.mask = mask
        self.digests = {name: self._digests(name, tensor) for name, tensor in weights}

    @torch.no_grad()
    def _digests(self, name: str, tensor: Tensor) -> Tensor:
        """Digests of the chunks of this rank's shard: :func:`wagle_pl.core.weights.digest`."""
        start, share = share_of(tensor)
        digests = []
        for first, end in chunks_of(start, len(share)):
            selected = self.mask.part(name, start + first, start + end).to(share.device)
            digests.append(digest(share[first:end].masked_fill(selected, 0), start + first))
        return torch.stack(digests).cpu() if digests else torch.empty(0, dtype=torch.int64)

    def check(self, weights: Iterable[tuple[str, Tensor]], step: int) -> str:
        """Check the guarantee; returns a text: how many weights are unchanged. Collective.

        Raises:
            WagleError: on all ranks, if a frozen weight moved.
        """
        moved = [
            name
            for name, tensor in weights
            if not torch.equal(self._digests(name, tensor), self.digests[name])
        ]
        if moved := distributed.all_gather(moved):
            raise WagleError(
                f"frozen weights of {moved[0]} moved by step {step}: the result is not written"
            )
        frozen = self.mask.total - self.mask.count()
        return f"{frozen:,} frozen weights are bit-identical to the base model's"
