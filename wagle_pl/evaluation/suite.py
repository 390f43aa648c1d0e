"""``Suite``: which measures a benchmark has, and what must be observed for them."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, NamedTuple, Optional

from wagle_pl.evaluation import functional as F
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.measures import usual
from wagle_pl.evaluation.membership import MEMBERSHIP_NEEDS, membership
from wagle_pl.evaluation.records import (
    MEASURES,
    Info,
    Observations,
    Value,
    attempt,
    defined,
    measure,
    needs_of,
)

#: What to observe of a test set that a suite does not name; each row answers what its kind can.
DEFAULT_NEEDS = frozenset({"answer", "tokens", "alternatives", "choices", "generation"})


class SuiteSet(NamedTuple):
    """A test set of a benchmark: what is measured on its rows, and how they are asked."""

    measures: tuple[str, ...] = ()  # registered ones; those that its rows allow when empty
    #: What to observe of its rows; by default, what the measures need, or :data:`DEFAULT_NEEDS`.
    needs: Optional[Collection[str]] = None
    max_new_tokens: Optional[int] = None  # longest generation, if the benchmark fixes one
    stops: Sequence[str] = ()  # texts at each of which a generation is cut
    #: Answers are recited: generations are at least as long as the longest answer, since a shorter
    #: limit would also limit what can be recalled.
    recited: bool = False
    #: Text before each multiple choice. ``{subject}`` stands for the row's subject, with spaces for
    #: underscores; rows without a subject then have no header.
    header: str = ""


class Suite:
    """A benchmark's measures. Override :meth:`measures`; :attr:`sets` says what it needs.

    >>> class Length(Suite):
    ...     sets = {"forget": SuiteSet(needs={"generation"})}
    ...
    ...     def measures(self, seen):
    ...         words = [len(record["generation"].split()) for record in seen.table("forget")]
    ...         return {"forget/words": sum(words) / len(words)}
    >>> Length().measures(Observations({"forget": [{"generation": "It meets in Sibiu."}]}))
    {'forget/words': 4.0}
    """

    #: Test sets of the benchmark; those that a test lacks are named in ``metrics.info.json``.
    sets: ClassVar[Mapping[str, SuiteSet]] = {}
    #: Registered measures of all test sets together, listed before those of each.
    overall: ClassVar[Sequence[str]] = ()
    #: Beginnings of the names of test sets whose rows are to be forgotten: knowing them is bad.
    forget_sets: ClassVar[tuple[str, ...]] = (
        *("forget", "members", "verbmem_forget", "knowmem_forget", "wmdp_"),
    )

    openunlearning: ClassVar[Optional[str]] = None  # its name of the benchmark
    members: ClassVar[tuple[str, str]] = ("forget", "holdout")  # test sets: seen, never seen

    def measures(self, seen: Observations) -> dict[str, Value]:
        """The measures by name, ``<test set>/<measure>`` or ``<measure>`` of the whole; an
        :class:`~wagle_pl.evaluation.functional.Undefined` says why there is no number."""
        values = {name: attempt(MEASURES[name].compute, seen) for name in self.overall}
        for name in seen.tables:
            values |= self.of_set(seen, name, self.listed(seen, name))
        return values

    def listed(self, seen: Observations, name: str) -> Sequence[str]:
        """Names of a test set's measures."""
        return self.set_of(name).measures or usual(seen.records(name, self.forgets(name)))

    def set_of(self, name: str) -> SuiteSet:
        """What the benchmark says about a test set, which need not be one of its own."""
        return self.sets.get(name, SuiteSet())

    def of_set(self, seen: Observations, name: str, measures: Sequence[str]) -> dict[str, Value]:
        """Registered measures of one test set, ``<set>/<measure>``."""
        rows = seen.records(name, self.forgets(name))
        return {f"{name}/{short}": attempt(MEASURES[short].compute, rows) for short in measures}

    def needs_of(self, name: str, names: Collection[str]) -> frozenset[str]:
        """What to observe of a test set, given the names of all."""
        measures, needs, *_ = self.set_of(name)
        return frozenset(needs or needs_of(measures) or DEFAULT_NEEDS)

    def forgets(self, name: str) -> bool:
        return name.startswith(self.forget_sets)

    def info(self, measure: str) -> Info:
        """Unit, direction and meaning of a measure, if it is registered by its name or by that after
        the last slash."""
        if measure in MEASURES:
            return MEASURES[measure].info(forget=False)
        name, _, short = measure.rpartition("/")
        forgets = bool(name) and self.forgets(name)
        if short in MEASURES:
            return MEASURES[short].info(forgets)
        return Info("number", "lower" if forgets else "higher", short.replace("_", " "))


class Averages(Suite):
    """A suite, or a base before one, with the two averages of WAGLE's tables (arXiv 2410.17509)."""

    revealing: ClassVar[str] = ""  # measure of the sets to be forgotten that UE averages

    def measures(self, seen: Observations) -> dict[str, Value]:
        values = super().measures(seen)
        return values | self.averages(seen, values)

    def averages(self, seen: Observations, values: Mapping[str, Value]) -> dict[str, Value]:
        """``ue_average`` and ``ut_average``, from what has been measured."""
        parts = {"ue_average": self.efficacy, "ut_average": self.utility}
        return {name: attempt(average, seen, values) for name, average in parts.items()}

    @measure("score, 0 to 1", "higher", name="ue_average")
    def efficacy(self, seen: Observations, values: Mapping[str, Value]) -> float:
        """Average unlearning efficacy (UE) in WAGLE's tables.

        Where one measure reveals what a model still knows: the mean of 1 minus it.
        """
        names = [f"{n}/{self.revealing}" for n in seen.tables if n.startswith(self.forget_sets)]
        known = [name for name in names if name in values]
        if not known:
            raise Undefined(f"no test set to be forgotten has {self.revealing}")
        return F.unlearning_efficacy([], defined(values, *known))

    @measure("score, 0 to 1", "higher", name="ut_average")
    def utility(self, seen: Observations, values: Mapping[str, Value]) -> float:
        """Average utility (UT) in WAGLE's tables.

        As for WHP and DETOX: the mean of TruthfulQA and of the mean accuracy on other tasks.
        """
        truthful = [value for name, value in seen.general.items() if "truthfulqa" in name]
        others = [value for name, value in seen.general.items() if "truthfulqa" not in name]
        named = {"zero-shot accuracy": others, "TruthfulQA": truthful}
        if missing := " and ".join(name for name, numbers in named.items() if not numbers):
            raise Undefined(f"it needs {missing}, which lm-evaluation-harness measures")
        return statistics.mean([statistics.mean(truthful), statistics.mean(others)])


class GenericSuite(Suite):
    """Whatever the rows allow: every set's measures, and membership inference between sets."""

    pairs = (("members", "nonmembers"), ("forget", "holdout"))

    def needs_of(self, name: str, names: Collection[str]) -> frozenset[str]:
        attacked = any(name in pair and {*pair} <= {*names} for pair in self.pairs)
        return DEFAULT_NEEDS | (MEMBERSHIP_NEEDS if attacked else frozenset())

    def measures(self, seen: Observations) -> dict[str, Value]:
        values = super().measures(seen)
        for members, nonmembers in self.pairs:
            if members in seen.tables and nonmembers in seen.tables:
                values |= membership(seen, members, nonmembers)
        return values
