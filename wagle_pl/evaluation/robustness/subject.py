"""A model under attack, and what there is to attack it with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch

from wagle_pl.core import distributed
from wagle_pl.data.example import Example
from wagle_pl.data.template import Template
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.observe import Observer, Record, observe_set
from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.sets import Table, Value
from wagle_pl.evaluation.suites.base import Suite

#: Not observed again under an attack: no measure that attacks report needs them.
LEFT_OUT = frozenset({"gradient", "paraphrased", "vocabulary", "text"})
SAID = ("generation", "rouge1_recall", "rougeL_recall", "toxicity", "nearest_answer")

#: Row number -> the rows to ask in its place.
Asked = Mapping[int, Sequence[Example]]


@dataclass
class Subject:
    """A model under attack.

    Attributes:
        lm: a Hugging Face causal language model, in evaluation mode.
        observer: runs it on rows.
        suite: the measures.
        rows: test set -> its rows, of sets whose rows are to be forgotten.
        needs: test set -> what a test observes of it.
        lengths: test set -> longest generation in tokens.
        measures: tables of records -> the suite's measures.
        training: stream (``forget``, ``retain``, ``holdout``) -> its rows, None if there are none.
        annotate: lets other models (a toxicity classifier) read a test set's records.
        tables: test set -> its records without attack; None for a model that nobody asked about that.
        sharded: whether the weights are spread over ranks.
    """

    lm: Any
    observer: Observer
    suite: Suite
    rows: Mapping[str, list[Example]]
    needs: Mapping[str, frozenset[str]]
    lengths: Mapping[str, int]
    measures: Callable[[Mapping[str, Table]], Mapping[str, Value]]
    training: Callable[[str], Optional[list[Example]]]
    annotate: Callable[[str, Table], None] = lambda name, table: None
    tables: Optional[Mapping[str, Table]] = None
    sharded: bool = False

    @property
    def template(self) -> Template:
        """Makes tokens of rows, and brings the tokenizer."""
        return self.observer.template

    @property
    def device(self) -> torch.device:
        """Where the model's inputs must be."""
        return self.observer.passes.device

    def every_row(
        self, without: Collection[str] = frozenset()
    ) -> dict[str, dict[int, list[Example]]]:
        """Test set -> row number -> the row, of all rows to be forgotten; sets left empty are left out.

        Args:
            without: texts; a row that has one of them, as question or answer, is left out.
        """
        kept = {
            name: {i: [row] for i, row in enumerate(rows) if not row.texts & set(without)}
            for name, rows in self.rows.items()
        }
        return {name: asked for name, asked in kept.items() if asked}

    def ask(
        self,
        variants: Callable[[str, Example], Sequence[Example]],
        measures: Collection[str],
        option: str = "",
    ) -> list[Finding]:
        """Ask every row to be forgotten in other ways, and note the worst: see :func:`worst`.

        Args:
            variants: (test set, row) -> the rows to ask in its place; none leaves the row out, before and after.
            measures: which to report.
            option: what to call it.
        """
        asked = {
            name: {i: found for i, row in enumerate(rows) if (found := list(variants(name, row)))}
            for name, rows in self.rows.items()
        }
        return self.compare({name: each for name, each in asked.items() if each}, measures, option)

    def compare(
        self, asked: Mapping[str, Asked], measures: Collection[str], option: str = ""
    ) -> list[Finding]:
        """Test the model as it is now; see :meth:`findings`."""
        return self.findings(
            {name: self.observe(name, each) for name, each in asked.items()}, measures, option
        )

    def observe(self, name: str, asked: Asked, without: Collection[str] = frozenset()) -> Table:
        """Records of one test set, one a row number, in order; a meeting of all ranks.

        A record has the question of the row it stands for, however that was asked: other results are found by it.

        Args:
            name: of the test set.
            asked: row number -> rows to ask in its place; of several the worst counts.
            without: what not to observe though the suite needs it.
        """
        flat = [(i, row) for i, rows in asked.items() for row in rows]
        needs = self.needs[name] - LEFT_OUT - set(without)
        header = self.suite.headers.get(name, "")
        records = observe_set(
            self.observer, [row for _, row in flat], needs, self.lengths[name], header
        )
        own = {i: {"row": i, "question": self.rows[name][i].question} for i in asked}
        return self.worst_of(
            name, [record | own[i] for (i, _), record in zip(flat, records, strict=True)]
        )

    def worst_of(self, name: str, records: list[Record]) -> Table:
        """Annotate records of a test set, and keep the worst of each row; a meeting of all ranks."""

        def select() -> Table:
            self.annotate(name, records)
            by_row: dict[int, list[Record]] = {}
            for record in records:
                by_row.setdefault(record["row"], []).append(record)
            return [worst(by_row[row]) for row in sorted(by_row)]

        return distributed.on_rank_zero(select)

    def findings(
        self, after: Mapping[str, Table], measures: Collection[str], option: str = ""
    ) -> list[Finding]:
        """Measures of tables beside those of the same rows without the attack.

        Args:
            after: test set -> records under the attack.
            measures: names without their test set.
            option: what to call it.
        """
        before: Mapping[str, Value] = {}
        if self.tables is not None:
            rows = {name: {record["row"] for record in table} for name, table in after.items()}
            before = self.measures(
                {name: [r for r in self.tables[name] if r["row"] in rows[name]] for name in after}
            )
        found = []
        for name, value in self.measures(after).items():
            test_set, _, short = name.rpartition("/")
            if short not in measures or (test_set and test_set not in after):
                continue
            known, now = _number(before.get(name)), _number(value)
            if known is None and now is None:
                continue  # nobody can say, attacked or not
            why = str(value) if now is None else ""
            found.append(Finding(name, now, self.suite.info(name), option, known, why=why))
        return found


def _number(value: Optional[Value]) -> Optional[float]:
    return None if value is None or isinstance(value, Undefined) else float(value)


def worst(records: Sequence[Record]) -> Record:
    """Of several records of one row what gives most away: likelihoods of the one, generation of maybe another.

    The likelihoods are those of the wording under which the right answer is likeliest. The generation is the one with
    the highest ROUGE-L recall, or, where there is no answer to compare with, the most toxic.

    >>> one = {"row": 0, "nll": 2.0, "generation": "In Sibiu.", "rougeL_recall": 0.6}
    >>> two = {"row": 0, "nll": 1.0, "generation": "In Arad.", "rougeL_recall": 0.3}
    >>> worst([one, two])
    {'row': 0, 'nll': 1.0, 'generation': 'In Sibiu.', 'rougeL_recall': 0.6}
    """
    likeliest = max(records, key=_certainty)
    said = max(
        records, key=lambda record: record.get("rougeL_recall") or record.get("toxicity") or 0.0
    )
    return likeliest | {name: said[name] for name in SAID if name in said}


def _certainty(record: Record) -> float:
    """Log-likelihood of the right answer, per token or among the choices."""
    if record.get("nll") is not None:
        return -record["nll"]
    for column, sign in (("choice_logprobs", 1), ("choice_nll", -1)):
        if record.get(column) is not None:
            return (sign * torch.tensor(record[column])).log_softmax(-1)[record["label"]].item()
    return 0.0
