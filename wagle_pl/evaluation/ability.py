"""General ability, measured by lm-evaluation-harness (an extra) on the model in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch

from wagle_pl.core import distributed
from wagle_pl.core.environment import errors_only
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import plainly_local
from wagle_pl.core.registry import did_you_mean
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.records import Info, Value

PREFIX = "ability"
SHARES = ("acc", "acc_norm", "exact_match")


@dataclass
class Ability:
    """What the harness measured, by ``ability/<task>/<metric>[_<filter>]``."""

    values: dict[str, Value] = field(default_factory=dict)
    infos: dict[str, Info] = field(default_factory=dict)
    asked: tuple[str, ...] = ()  # names of the tasks and groups that were asked for

    @property
    def general(self) -> dict[str, float]:
        """Each asked task's accuracy, for the suites' averages; tasks without one are left out."""
        accuracies = {task: self.values.get(f"{PREFIX}/{task}/acc") for task in self.asked}
        return {task: value for task, value in accuracies.items() if isinstance(value, float)}

    def shown(self) -> dict[str, Value]:
        """The values of what was asked for, without the parts of a group: for the console."""
        return {
            name: value for name, value in self.values.items() if name.split("/")[1] in self.asked
        }


class Harness:
    """lm-evaluation-harness with some of its tasks.

    Args:
        tasks: names of tasks, groups or tags of the harness, or folders with your own task YAMLs
            (all of the folder's groups, or tasks if it has no group); also as text with commas.
        shots: worked examples before each question; the task's own number when None.
        limit: use only this many rows of each task, from the start; for trials.
        option: name of the option that asks for the tasks, for errors.
    """

    def __init__(
        self,
        tasks: Union[str, Sequence[str]],
        shots: Optional[int] = None,
        limit: Optional[int] = None,
        option: str = "model.lm_eval",
    ) -> None:
        for name, value, least in (("shots", shots, 0), ("limit", limit, 1)):
            if value is not None and value < least:
                raise WagleError(f"{option}_{name}: must be at least {least}, got {value}")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            hint = "pip install 'wagle-pl[ability]'"
            raise WagleError(f"{option}: it needs lm-evaluation-harness: {hint}") from None
        entries = tasks.split(",") if isinstance(tasks, str) else tasks
        entries = [task.strip() for task in entries if task.strip()]
        if not entries:
            raise WagleError(f"{option}: it names no task")
        folders = [task for task in entries if Path(task).is_dir()]
        names = [task for task in entries if task not in folders]
        if absent := [name for name in names if plainly_local(name) or name.endswith("/")]:
            raise WagleError(f"{option}: folder {absent[0]} does not exist")
        with errors_only("lm_eval"):
            self.manager = TaskManager(include_path=folders or None, include_defaults=bool(names))
            for folder in folders:
                manager = TaskManager(include_path=folder, include_defaults=False)
                folder_tasks = manager.all_groups or manager.all_subtasks
                if not folder_tasks:
                    raise WagleError(f"{option}: folder {folder} has no task YAML")
                names += folder_tasks
        for name in names:
            if not self.manager.match_tasks([name]):
                hint = did_you_mean(name, self.manager.all_tasks)
                raise WagleError(f"{option}: lm-evaluation-harness has no task {name!r}", hint=hint)
        self.tasks = tuple(dict.fromkeys(self.manager.match_tasks(names)))
        self.shots, self.limit, self.option = shots, limit, option

    def measure(self, lm: Any, tokenizer: Any, batch_size: int, sharded: bool = False) -> Ability:
        """Run the tasks on a model in evaluation mode, with this batch size. Collective.

        The ranks share the rows, unless each forward pass is collective (``sharded``, ZeRO-3).
        """
        from lightning.pytorch.utilities.seed import isolate_rng
        from lm_eval import simple_evaluate

        with errors_only("lm_eval"), isolate_rng():
            try:
                results = simple_evaluate(
                    model=wrap(lm, tokenizer, batch_size, share=not sharded),
                    tasks=list(self.tasks),
                    task_manager=self.manager,
                    num_fewshot=self.shots,
                    limit=self.limit,
                    bootstrap_iters=0,
                    log_samples=False,
                    confirm_run_unsafe_code=False,
                )
            except OSError as error:
                rows = f"rows of {', '.join(self.tasks)} cannot be loaded"
                raise WagleError(f"{self.option}: {rows}: {first_line(error)}") from error
        return distributed.on_rank_zero(lambda: read(results, self.tasks))


def wrap(lm: Any, tokenizer: Any, batch_size: int, share: bool) -> Any:
    """The model as the harness takes it; with ``share`` the ranks divide the rows of a task."""
    from lm_eval.models.huggingface import HFLM

    class Shared(HFLM):
        """Ranks from torch.distributed; the harness itself would start ``accelerate``."""

        rank = property(lambda self: distributed.rank())
        world_size = property(lambda self: distributed.world_size())

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            parts = distributed.all_gather([tensor.cpu()])
            return torch.stack([part.to(tensor.device) for part in parts])

        def barrier(self) -> None:
            distributed.all_gather([None])

    kind = Shared if share else HFLM
    return kind(pretrained=lm, tokenizer=tokenizer, batch_size=batch_size)


def read(results: Mapping[str, Any], asked: Sequence[str]) -> Ability:
    """What ``lm_eval.simple_evaluate`` returned, by our names; standard errors are left out."""
    ability = Ability(asked=tuple(asked))
    for task, numbers in results["results"].items():
        higher = results.get("higher_is_better", {}).get(task, {})
        version = results.get("versions", {}).get(task)
        versioned = f", version {version:g}," if isinstance(version, (int, float)) else ""
        for key, value in numbers.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or isinstance(value, str):
                continue
            name = f"{PREFIX}/{task}/{metric}" + ("" if chosen == "none" else f"_{chosen}")
            known = isinstance(value, (int, float)) and math.isfinite(value)
            undefined = Undefined(f"the harness has {value} for it")
            ability.values[name] = float(value) if known else undefined
            ability.infos[name] = Info(
                "share, 0 to 1" if metric in SHARES else "number",
                "lower" if higher.get(metric) is False else "higher",
                f"{metric} on {task}{versioned} by lm-evaluation-harness",
            )
    return ability
