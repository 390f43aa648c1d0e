"""Which runs of a grid come next: a search by Optuna, in place of the whole grid.

A *point* of the search is an objective, a mask and a learning rate, with the runs of all seeds. It
is worth more the more of them reach the level of forgetting; then by their mean utility there; then
by how far they get. Only the order of points is told: levels and utilities have any scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.study.grid import Run
from wagle_pl.study.summary import Compared, Row, run_table

ASKS = 100  # suggestions of finished points, after which the grid's order decides

Point = tuple[str, str, float]


def load_optuna() -> Any:
    """The library.

    Raises:
        WagleError: if it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise WagleError("--sampler optuna needs Optuna: pip install 'wagle-pl[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def next_runs(runs: Sequence[Run], rows: Sequence[Row], by: Compared) -> list[Run]:
    """The runs of the point that comes next: of one that lacks some seeds, or of a suggested one.

    Args:
        runs: of the grid, not all of them finished.
        rows: of the study's table, from which the sampler is made anew: the search does not depend
            on where it was interrupted.
        by: what runs are compared by.
    """
    points: dict[Point, list[Run]] = {}
    for run in runs:
        points.setdefault((run.objective.id, run.mask.id, run.lr), []).append(run)
    point_of = {run.id: point for point, own in points.items() for run in own}
    told: dict[Point, list[Any]] = {}
    for run in run_table(rows, by).itertuples() if rows else ():
        if run.run in point_of:
            told.setdefault(point_of[run.run], []).append(run)
    finished = {run.run for own in told.values() for run in own}
    left = {p: [run for run in own if run.id not in finished] for p, own in points.items()}
    for point in told:
        if left[point]:
            return left[point]
    grid, optuna = [own[0] for own in points.values()], load_optuna()
    sampler = optuna.samplers.TPESampler(seed=len(told))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    place = {p: i for i, p in enumerate(sorted(told, key=lambda p: _worth(told[p], by)))}
    for point in told:
        trial = optuna.trial.FixedTrial(points[point][0].axes)
        _walk(trial, grid)
        of = {"params": trial.params, "distributions": trial.distributions}
        study.add_trial(optuna.trial.create_trial(**of, value=float(place[point])))
    for _ in range(ASKS):
        run = _walk(study.ask(), grid)
        if found := left[run.objective.id, run.mask.id, run.lr]:
            return found
    return next(own for own in left.values() if own)


def _worth(runs: Sequence[Any], by: Compared) -> tuple[float, float, float]:
    reached = [run.reached for run in runs if not math.isnan(run.reached)]
    utility = by.utility_sign * sum(reached) / len(reached) if reached else 0.0
    return len(reached) / len(runs), utility, sum(run.deepest for run in runs) / len(runs)


def _walk(trial: Any, grid: Sequence[Run]) -> Run:
    """The run of a grid to which a trial's values lead, axis by axis; the nearest where they are
    between two."""
    left = list(grid)
    while (name := _open_axis(left)) is not None:
        values = sorted({run.axes[name] for run in left})
        if isinstance(values[0], str):
            value = trial.suggest_categorical(name, values)
        else:
            log = values[0] > 0
            given = trial.suggest_float(name, values[0], values[-1], log=log)
            scale = math.log if log else float
            value = min(values, key=lambda v: abs(scale(v) - scale(given)))
        left = [run for run in left if run.axes[name] == value]
    return left[0]


def _open_axis(runs: Sequence[Run]) -> Optional[str]:
    """The first axis in which runs differ."""
    axes = runs[0].axes
    return next((n for n in axes if any(r.axes.get(n) != axes[n] for r in runs)), None)
