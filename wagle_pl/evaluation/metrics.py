"""Measures as ``torchmetrics`` metrics, for any LightningModule.

Every registered measure has a class here, made when it is first used: ``TruthRatio`` of
``truth_ratio``, ``ForgetQuality`` of ``forget_quality``, ``PrivLeak`` of ``privleak``, and so on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache, lru_cache, partial
from typing import Any, ClassVar, Optional, Union, get_type_hints

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.reading import parse_json
from wagle_pl.core.registry import did_you_mean, import_further
from wagle_pl.core.schema import check, check_arguments
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.records import MEASURES, RECORD, Observations, Records, Value
from wagle_pl.evaluation.suites import Suite, find_suite
from wagle_pl.evaluation.tofu_result import Table

#: Makes values by name from the records of test sets.
Measures = Callable[[Mapping[str, Table]], Mapping[str, Value]]
#: Suite of the measures made of several test sets or other measures; TOFU's, if not named here.
SUITES = {
    **dict.fromkeys(("privleak", "verbmem_f", "knowmem_f", "knowmem_r"), "muse"),
    **dict.fromkeys(("unlearn_success", "retention_success"), "knowundo"),
    **dict.fromkeys(("task_aggregate", "mia_score", "final_score"), "lume"),
}


class MeasureMetric(Metric):
    """A registered measure as a metric: its state is the records of the rows seen.

    :meth:`update` takes columns as keyword arguments, one value or tensor row per test row, or
    records as :func:`~wagle_pl.evaluation.observe_set` gives them. The state is reduced over ranks;
    a row that two ranks have seen counts once if its records have its number in ``row``. The value
    is float64, and NaN if the data do not define it: :attr:`undefined` says why.

    Args:
        test_set: the set that the rows belong to, which decides whether they are to be forgotten
            (``forget``) or kept (``retain``).
        suite: suite that computes the value, by its name; by default the measure's function does.
        key: the suite's name of the value; the measure's own when None.
        measures: makes the values from the records, in place of ``suite``.
        options: fields of :class:`~wagle_pl.evaluation.Observations`, such as ``retrained``, or
            arguments of ``torchmetrics.Metric``.

    >>> from wagle_pl.metrics import AnswerProbability, TruthRatio
    >>> probability = AnswerProbability()
    >>> probability.update(nll=torch.tensor([0.0, 0.0]))
    >>> probability.update(nll=torch.tensor([1e9]))
    >>> probability.compute()
    tensor(0.6667, dtype=torch.float64)
    >>> ratio = TruthRatio("retain")
    >>> ratio.update(paraphrased_nll=torch.zeros(1), perturbed_nll=torch.tensor([[1e9, 1e9]]))
    >>> ratio.compute()
    tensor(1., dtype=torch.float64)
    """

    measure: ClassVar[str] = ""  # its name; empty for a value that only a suite knows
    is_differentiable = False
    full_state_update = False
    content: Union[list[Tensor], Tensor]  # JSON lines ``[test set, record]``, uint8

    def __init__(
        self,
        test_set: str = "forget",
        suite: Union[Suite, str, None] = None,
        key: Optional[str] = None,
        measures: Optional[Measures] = None,
        **options: Any,
    ) -> None:
        names = [column.name for column in fields(Observations) if column.name in options]
        compared = Observations({}, **{name: options.pop(name) for name in names})
        check_arguments(MeasureMetric.__init__, locals(), "")
        super().__init__(**options)
        self.test_set, self.key = test_set, key or self.measure
        if not self.key:
            raise WagleError("must be given for a metric without a measure", "key")
        if measures is None:
            alone = None
            of_one_set = not suite and self.measure in MEASURES
            if of_one_set and Records in get_type_hints(MEASURES[self.measure].compute).values():
                alone = test_set, self.measure
                self.key = "/".join(alone)
            suite = find_suite(suite or ("generic" if alone else SUITES.get(self.measure, "tofu")))
            measures = partial(_of_suite, suite, compared, alone)
        self.measures = measures
        #: Why the last value is NaN; empty if it is a number.
        self.undefined = ""
        self.add_state("content", default=[], dist_reduce_fx="cat")

    def update(
        self,
        records: Iterable[Mapping[str, Any]] = (),
        test_set: Optional[str] = None,
        **columns: Any,
    ) -> None:
        """Add rows of a test set: records, or columns of equal length; wrong types are refused."""
        where = f"{type(self).__name__}.update"
        test_set = check(test_set or self.test_set, str, f"{where}: test_set")
        try:
            text = json.dumps([[*records], columns], default=lambda value: value.tolist())
            rows, columns = parse_json(text, where)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            raise WagleError(f"{where}: {first_line(error)}") from None
        check(columns, dict[str, list[Any]], where)
        if len({*map(len, columns.values())}) > 1:
            lengths = {name: len(column) for name, column in columns.items()}
            raise WagleError(f"{where}: columns differ in length: {lengths}")
        rows += [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        check(rows, list[RECORD], where)
        lines = "".join(json.dumps([test_set, row]) + "\n" for row in rows)
        content = torch.tensor(list(lines.encode()), dtype=torch.uint8)
        self.content.append(content.to(self.device))

    def compute(self) -> Tensor:
        """The value, a float64 scalar (float32 on devices without float64)."""
        content = dim_zero_cat(self.content).cpu().numpy().tobytes() if len(self.content) else b""
        missing = Undefined(f"these rows have no {self.key}")
        try:
            value = _values(self.measures, content).get(self.key, missing)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            why = f"the columns of a row do not fit each other: {first_line(error)}"
            raise WagleError(why, self.key) from error
        self.undefined = str(value) if isinstance(value, Undefined) else ""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        number = float("nan") if isinstance(value, Undefined) else float(value)
        return torch.tensor(number, dtype=dtype, device=self.device)


def _of_suite(
    suite: Suite,
    compared: Observations,
    alone: Optional[tuple[str, str]],
    tables: Mapping[str, Table],
) -> Mapping[str, Value]:
    """A suite's measures, or one measure of one test set ``alone``."""
    if alone is None:
        return suite.measures(replace(compared, tables=tables))
    test_set, measure = alone
    return suite.of_set(replace(compared, tables={test_set: [], **tables}), test_set, [measure])


@lru_cache(maxsize=1)
def _values(measures: Measures, content: bytes) -> Mapping[str, Value]:
    """All values of some content: the metrics of one collection share them. A row with a number
    counts once; rows without one stay in order."""
    tables: dict[str, dict[Any, dict[str, Any]]] = {}
    for number, line in enumerate(content.splitlines()):
        test_set, record = json.loads(line)
        row = record.get("row")  # those without one come first
        tables.setdefault(test_set, {})[(-1, number) if row is None else (row, 0)] = record
    return measures({name: [rows[key] for key in sorted(rows)] for name, rows in tables.items()})


def class_name(measure: str) -> str:
    """The class of a measure.

    >>> class_name("rougeL_recall"), class_name("wagle/mia"), class_name("privleak")
    ('RougeLRecall', 'WagleMia', 'PrivLeak')
    """
    words = re.split(r"[_/]", {"probability": "answer_probability"}.get(measure, measure))
    return "".join(word[:1].upper() + word[1:] for word in words).replace("Privleak", "PrivLeak")


@cache
def metric_class(measure: str) -> type[MeasureMetric]:
    """The metric of a registered measure."""
    if measure not in MEASURES:
        raise WagleError(f"there is no measure {measure!r}", hint=did_you_mean(measure, MEASURES))
    about = MEASURES[measure]
    doc = f"{about.what[:1].upper()}{about.what[1:]}; in {about.unit}. See :class:`MeasureMetric`."
    better = (
        {"higher": True, "lower": False}.get(about.keep) if about.keep == about.forget else None
    )
    body = {"measure": measure, "higher_is_better": better, "__doc__": doc, "__module__": __name__}
    return type(class_name(measure), (MeasureMetric,), body)


def collection(measures: Measures, names: Sequence[str]) -> MetricCollection:
    """Values by their names in ``metrics.json`` as metrics with one state: ``update(records,
    test_set)`` takes the records of each test set."""
    metrics: dict[str, MeasureMetric] = {}
    for name in names:
        test_set, _, short = name.rpartition("/")
        measure = name if name in MEASURES else short
        kind = metric_class(measure) if measure in MEASURES else MeasureMetric
        metrics[name] = kind(test_set or "forget", key=name, measures=measures)
    return MetricCollection(metrics)


def suite_metrics(
    suite: Union[Suite, str], names: Sequence[str], **compared: Any
) -> MetricCollection:
    """The :func:`collection` of a suite.

    Args:
        suite: a suite, or its name.
        names: of the measures, such as ``forget/probability`` and ``forget_quality``.
        **compared: fields of :class:`~wagle_pl.evaluation.Observations`, such as ``retrained``.
    """
    observations = Observations({}, **compared)
    return collection(partial(_of_suite, find_suite(suite), observations, None), names)


def __getattr__(name: str) -> type[MeasureMetric]:
    if not name.startswith("_"):
        import_further("Suite")  # whose measures are registered with it
        for measure in MEASURES:
            if class_name(measure) == name:
                return metric_class(measure)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import_further("Suite")
    return sorted({*globals(), *map(class_name, MEASURES)})
