"""Every measure as a ``torchmetrics`` metric: see :mod:`wagle_pl.evaluation.metrics`."""

from wagle_pl.evaluation import metrics
from wagle_pl.evaluation.metrics import MeasureMetric, metric_class, suite_metrics

__all__ = ["MeasureMetric", "metric_class", "suite_metrics"]


def __getattr__(name: str) -> type[MeasureMetric]:
    made: type[MeasureMetric] = getattr(metrics, name)
    return made


def __dir__() -> list[str]:
    return dir(metrics)
