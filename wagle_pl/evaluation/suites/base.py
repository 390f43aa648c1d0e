"""What a suite is: it says what to observe of each test set, and makes measures of what was observed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Optional

from wagle_pl.evaluation.functional import TruthRatioForm, Undefined
from wagle_pl.evaluation.results import Results
from wagle_pl.evaluation.sets import SetMeasures, Table, Value, attempt
from wagle_pl.evaluation.suites.catalogue import Info, lookup

#: Observed of a test set that a suite says nothing about; each row answers what its kind can.
DEFAULT_NEEDS = frozenset({"answer", "tokens", "alternatives", "choices", "generation"})


@dataclass
class Observations:
    """What a test saw, for :meth:`Suite.measures`.

    Attributes:
        tables: test set -> its records, one a row in order, see :mod:`wagle_pl.evaluation.observe`.
        retrained: results of the model retrained without the forget set, if given.
        reference: results of the reference model of the reference attack, if given.
        truth_ratio_form: ``geometric`` or ``arithmetic``.
        general: measures of general ability found elsewhere, name -> value.
        tofu_retrained: results of the retrained model on whatever forget rows, for TOFU's own forget quality, if given.
    """

    tables: Mapping[str, Table]
    retrained: Optional[Results] = None
    reference: Optional[Results] = None
    truth_ratio_form: TruthRatioForm = "geometric"
    general: Mapping[str, float] = field(default_factory=dict)
    tofu_retrained: Optional[Results] = None

    def table(self, name: str) -> Table:
        """The records of a test set.

        Raises:
            Undefined: if there is no such test set.
        """
        if name not in self.tables:
            raise Undefined(f"there is no test set {name!r}")
        return self.tables[name]


class Suite:
    """A benchmark's measures. Override :meth:`measures`; the attributes say what it needs and how to read it.

    >>> class Length(Suite):
    ...     needs = {"forget": {"generation"}}
    ...     infos = {"forget/words": Info("words", "lower", "length of the answers")}
    ...
    ...     def measures(self, seen):
    ...         words = [len(record["generation"].split()) for record in seen.table("forget")]
    ...         return {"forget/words": sum(words) / len(words)}
    >>> Length().measures(Observations({"forget": [{"generation": "It meets in Sibiu."}]}))
    {'forget/words': 4.0}
    """

    #: Test sets the benchmark has; those that a test lacks are named in the sidecar.
    sets: tuple[str, ...] = ()
    #: Test set -> what to observe of its rows; a set not named here is observed as :data:`DEFAULT_NEEDS` says.
    needs: Mapping[str, Collection[str]] = {}
    #: Test set -> longest generation in tokens, where the benchmark fixes one.
    max_new_tokens: Mapping[str, int] = {}
    #: Test sets whose answers are recited: generations are as long as the longest of them at least, or what is recalled
    #: of an answer would be bounded by the length asked for.
    recited: Collection[str] = ()
    #: Test set -> text before each of its multiple choices. ``{subject}`` stands for the row's column of that name, its
    #: underscores as spaces; a row without one has no header then.
    headers: Mapping[str, str] = {}
    #: Measure -> what is known of it. Other names are looked up by what stands after the last slash.
    infos: Mapping[str, Info] = {}
    #: Test sets, by how their names begin, whose rows are to be forgotten: knowing them is bad.
    forget_sets: tuple[str, ...] = (
        "forget",
        "members",
        "verbmem_forget",
        "knowmem_forget",
        "wmdp_",
    )

    def measures(self, seen: Observations) -> dict[str, Value]:
        """The suite's measures.

        Returns:
            Name -> number, or an :class:`~wagle_pl.evaluation.functional.Undefined` that says why there is none.
            Names are ``<test set>/<measure>``, or ``<measure>`` of the whole.
        """
        return {
            name: value for each in seen.tables for name, value in of_set(self, seen, each).items()
        }

    def needs_of(self, name: str, names: Collection[str]) -> frozenset[str]:
        """What to observe of a test set, given the names of all."""
        return frozenset(self.needs.get(name, DEFAULT_NEEDS))

    def forgets(self, name: str) -> bool:
        """Whether a test set's rows are to be forgotten."""
        return name.startswith(self.forget_sets)

    def info(self, measure: str) -> Info:
        """What is known of a measure by its name."""
        set_name, _, short = measure.rpartition("/")
        return self.infos.get(measure) or lookup(short, bool(set_name) and self.forgets(set_name))


def defined(values: Mapping[str, Value], *names: str) -> list[float]:
    """The numbers of measures that another is made of.

    Raises:
        Undefined: naming the first that is missing or undefined, and why.
    """
    for name in names:
        if name not in values:
            raise Undefined(f"it needs {name}, which is not measured")
        if isinstance(values[name], Undefined):
            raise Undefined(f"it needs {name}: {values[name]}")
    return [values[name] for name in names]  # type: ignore[misc]


def of_set(
    suite: Suite, seen: Observations, name: str, measures: Collection[str] = ()
) -> dict[str, Value]:
    """Measures of one test set by name, ``<set>/<measure>``.

    Args:
        suite: says whether the rows are to be forgotten.
        seen: all tables.
        name: of the test set.
        measures: names of methods of :class:`SetMeasures`; those its kind of rows allows when empty.
    """
    found = SetMeasures(seen.table(name), suite.forgets(name), seen.truth_ratio_form)
    return {f"{name}/{each}": attempt(getattr(found, each)) for each in measures or found.usual()}
