"""What an attack is, what it works on (:class:`Subject`) and what it finds; how several of them are
run on a model, and on the models it is compared with."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Optional, TypedDict, Union

import torch

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import Entry, resolve
from wagle_pl.core.schema import check
from wagle_pl.core.text import table
from wagle_pl.core.weights import weights_digest
from wagle_pl.data.example import Example
from wagle_pl.data.template import Template
from wagle_pl.evaluation.functional import Undefined
from wagle_pl.evaluation.observe import Observer, Record, observe_set
from wagle_pl.evaluation.records import Direction, Info, Value
from wagle_pl.evaluation.tofu_result import Table
from wagle_pl.lm import models

if TYPE_CHECKING:
    from wagle_pl.evaluation.options import Plan

log = logging.getLogger(__name__)

ROBUSTNESS_FILE = "robustness.json"
#: The attacks of ``all``, in the order in which they run.
EVERY = ("Relearn", "Quantise", "Paraphrase", "Sample", "Probe")
PREFIX = "robustness"
#: The models that are shown next to the one under test.
OTHERS = ("target", "retrained")
#: Measures of forget sets, and of the whole, that an attack reports if the suite has them.
FORGET_MEASURES = (
    *("probability", "rougeL_recall", "truth_ratio", "accuracy", "extraction_strength"),
    *("perplexity", "toxicity", "forget_quality", "verbmem_f", "knowmem_f"),
)
#: Needs that are not observed under an attack: none of those measures uses them.
NOT_OBSERVED = frozenset({"gradient", "paraphrased", "recalls", "vocabulary", "text"})
#: Columns of a record that belong to its generation.
OF_GENERATION = ("generation", "rouge1_recall", "rougeL_recall", "toxicity", "nearest_answer")

#: Row number -> the rows to ask in its place.
Asked = Mapping[int, Sequence[Example]]
#: (Test set, row) -> the rows to ask in its place; a row without any is left out.
Variants = Callable[[str, Example], Sequence[Example]]


@dataclass(frozen=True)
class Finding:
    """One number of one model under one attack."""

    measure: str  # its name, as in ``metrics.json``
    after: Optional[float]  # under the attack; None if it is undefined
    info: Info  # unit, direction and meaning
    option: str = ""  # the variant of the attack, e.g. ``4bit``; empty if there is only one
    before: Optional[float] = None  # without the attack, on the same rows; None if not measured
    detail: bool = False  # left out of the console's table
    why: str = ""  # why ``after`` is undefined
    # filled in by ``run_attacks``:
    attack: str = ""  # its name
    others: Mapping[str, Optional[float]] = field(default_factory=dict)  # of :data:`OTHERS`
    attacked: Mapping[str, bool] = field(default_factory=dict)  # whether those were attacked too

    @property
    def value(self) -> Value:
        """The number under the attack, or why there is none."""
        return Undefined(self.why) if self.after is None else self.after

    @property
    def key(self) -> str:
        """Its name in ``metrics.json``."""
        name = f"{self.attack}_{self.option}" if self.option else self.attack
        return f"{PREFIX}/{name}/{self.measure}"

    def record(self) -> dict[str, Any]:
        """Its record in ``robustness.json``."""
        names = ("attack", "option", "measure", "before", "after")
        record = {name: getattr(self, name) for name in names}
        for name in OTHERS:
            record |= {name: self.others.get(name), f"{name}_attacked": self.attacked.get(name)}
        return record | vars(self.info) | ({"why": self.why} if self.after is None else {})


#: Schema of a line of :data:`ROBUSTNESS_FILE`.
_RECORD: dict[str, Any] = dict.fromkeys(("before", "after", *OTHERS), Optional[Union[float, str]])
_RECORD |= {f"{name}_attacked": Optional[bool] for name in OTHERS}
_RECORD |= {
    "attack": str,
    "measure": str,
    "option": Optional[Union[str, int]],
    "unit": Optional[str],
}
_RECORD |= {"direction": Direction, "why": Optional[str]}
RECORD = TypedDict("RECORD", _RECORD)  # type: ignore[misc]


@dataclass
class Subject:
    """A model under attack, and the data to attack it with.

    Mappings have an entry for each test set whose rows are to be forgotten.
    """

    plan: Plan  # its test sets, what is observed of them and what is measured
    observer: Observer  # runs the model on rows
    annotate: Callable[[str, Table], Any]  # by models that read generations
    tables: Optional[Mapping[str, Table]] = None  # records without an attack, if they were observed
    sharded: bool = False  # whether the weights are sharded over the ranks (ZeRO-3)

    def __post_init__(self) -> None:
        plan, self.suite = self.plan, self.plan.suite
        names = [name for name in plan.names if plan.suite.forgets(name)]
        self.rows = {name: plan.rows(name) for name in names}  # to be forgotten
        self.needs = {name: plan.needs_of(name) for name in names}  # what a test observes of them
        self.lengths = {name: plan.max_new_tokens_of(name) for name in names}

    @property
    def lm(self) -> Any:
        """The model: a Hugging Face causal language model, in evaluation mode."""
        return self.observer.passes.lm

    def training(self, stream: str) -> Optional[list[Example]]:
        """Rows of ``forget``, ``retain`` or ``holdout``; None if there are none."""
        return self.plan.data.examples(stream)

    @property
    def template(self) -> Template:
        return self.observer.template

    @property
    def device(self) -> torch.device:
        return self.observer.passes.device

    @property
    def forget_rows(self) -> list[Example]:
        return [row for rows in self.rows.values() for row in rows]

    def asked(self, variants: Variants) -> dict[str, Asked]:
        """The rows to ask in place of each row that has any, see :data:`Variants`."""
        sets = {
            name: {i: asked for i, row in enumerate(rows) if (asked := list(variants(name, row)))}
            for name, rows in self.rows.items()
        }
        return {name: asked for name, asked in sets.items() if asked}

    def every_row(self, without: Collection[str] = ()) -> dict[str, Asked]:
        """All rows to be forgotten as they are, except those with a text of ``without``."""
        return self.asked(lambda name, row: [row] if row.texts.isdisjoint(without) else [])

    def ask(self, variants: Variants, measures: Collection[str], option: str = "") -> list[Finding]:
        """Ask every row in other ways and count the worst (:func:`worst`); see :meth:`findings`."""
        return self.compare(self.asked(variants), measures, option)

    def compare(
        self, asked: Mapping[str, Asked], measures: Collection[str], option: str = ""
    ) -> list[Finding]:
        """Test the model as it is now on the rows ``asked`` of each set; see :meth:`findings`."""
        tables = {name: self.observe(name, rows) for name, rows in asked.items()}
        return self.findings(tables, measures, option)

    def observe(self, name: str, asked: Asked, without: Collection[str] = ()) -> Table:
        """Records of one test set, the worst of each row number. Collective.

        A record has the original question of its row, however it was asked, since results of other
        models are matched by it. Needs in ``without`` are not observed.
        """
        numbers = [i for i, rows in asked.items() for _ in rows]
        rows = [row for rows in asked.values() for row in rows]
        needs = self.needs[name] - NOT_OBSERVED - set(without)
        records = observe_set(self.observer, rows, needs, **self.plan.asked(name))
        for i, record in zip(numbers, records, strict=True):
            record |= {"row": i, "question": self.rows[name][i].question}
        return self.worst_of(name, records)

    def worst_of(self, name: str, records: list[Record]) -> Table:
        """Annotate records of a test set and keep the worst of each row. Collective."""

        def select() -> Table:
            self.annotate(name, records)
            ordered = sorted(records, key=itemgetter("row"))
            return [worst(list(of_row)) for _, of_row in groupby(ordered, itemgetter("row"))]

        return distributed.on_rank_zero(select)

    def findings(
        self, after: Mapping[str, Table], measures: Collection[str], option: str = ""
    ) -> list[Finding]:
        """Some measures of records under an attack, and those of the same rows without it."""
        before: Mapping[str, Value] = {}
        if self.tables is not None:
            rows = {name: {record["row"] for record in table} for name, table in after.items()}
            same = {n: [r for r in self.tables[n] if r["row"] in rows[n]] for n in after}
            before = self.plan.measures(same)
        findings = []
        for name, value in self.plan.measures(after).items():
            test_set, _, short = name.rpartition("/")
            if short not in measures or (test_set and test_set not in after):
                continue
            numbers = [None if isinstance(v, Undefined) else v for v in (before.get(name), value)]
            if numbers != [None, None]:
                why = str(value) if isinstance(value, Undefined) else ""
                about = self.suite.info(name)
                findings.append(Finding(name, numbers[1], about, option, numbers[0], why=why))
        return findings


class Attack(ABC):
    """One way to bring forgotten knowledge back: override :meth:`attack`.

    Also override :meth:`check` if the attack needs certain data, or has options. An attack leaves
    the weights as they were, and draws random numbers from its own seed.

    >>> class Shouted(Attack):
    ...     '''Questions in capital letters.'''
    ...
    ...     def attack(self, subject):
    ...         def loud(name, row):
    ...             return [row.asking(row.asked.upper())] if row.asked else []
    ...
    ...         return subject.ask(loud, self.measures)
    >>> Shouted().name
    'shouted'
    """

    measures: ClassVar[tuple[str, ...]] = FORGET_MEASURES  # which it reports
    moves_weights: ClassVar[bool] = False  # for a while: impossible if they are sharded (ZeRO-3)

    @property
    def name(self) -> str:
        """The class's name in small letters and underscores."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()

    @abstractmethod
    def attack(self, subject: Subject) -> Iterable[Finding]:
        """The findings, in the same order for every model. Collective, up to the last one."""

    def check(self, subject: Subject) -> None:
        """Raise a WagleError for options, a model or data that cannot be used, before any work."""
        if self.moves_weights and subject.sharded:
            why = f"{self.name} changes weights, which ZeRO-3 spreads over the ranks"
            raise WagleError(f"{why}: test with stage 2 or on one device")
        if not subject.forget_rows:
            raise self.unusable("no test set holds rows to be forgotten")

    def unusable(self, why: str) -> WagleError:
        return WagleError(f"{self.name} has nothing to work on: {why}")


def worst(records: Sequence[Record]) -> Record:
    """Of several records of a row, the one that reveals most; its generation may be another's.

    The likelihoods are those of the wording under which the right answer is likeliest; the
    generation has the highest ROUGE-L recall or, without an answer, is the most toxic.

    >>> one = {"row": 0, "nll": 2.0, "generation": "In Sibiu.", "rougeL_recall": 0.6}
    >>> two = {"row": 0, "nll": 1.0, "generation": "In Arad.", "rougeL_recall": 0.3}
    >>> worst([one, two])
    {'row': 0, 'nll': 1.0, 'generation': 'In Sibiu.', 'rougeL_recall': 0.6}
    """

    def answer_logprob(record: Record) -> float:
        if record.get("nll") is not None:
            return -record["nll"]
        for column, sign in (("choice_logprobs", 1), ("choice_nll", -1)):
            if record.get(column) is not None:
                logprobs = (sign * torch.tensor(record[column])).log_softmax(-1)
                return logprobs[record["label"]].item()
        return 0.0

    generated = max(records, key=lambda r: r.get("rougeL_recall") or r.get("toxicity") or 0.0)
    likeliest = max(records, key=answer_logprob)
    return likeliest | {name: generated[name] for name in OF_GENERATION if name in generated}


def texts_of(rows: Iterable[Example]) -> set[str]:
    """Questions and answers of rows in every wording: rows that share one state the same fact."""
    return {text for row in rows for text in row.texts}


# -- choosing and running them ---------------------------------------------------------------------


def find_attacks(
    value: Union[bool, str, Sequence[Union[Attack, Entry]], None], option: str = "model.robustness"
) -> tuple[list[Attack], bool]:
    """The attacks that an option names, and whether it asks for all that are possible.

    The option is a list of attacks, short names or class paths; the same as text with commas;
    ``all`` or True for every attack; None, False or ``none`` for none.
    """
    if isinstance(value, str):
        words = [word.strip() for word in value.strip("[] ").split(",") if word.strip()]
        constants = {"all": True, "true": True, "none": False, "false": False, "null": False}
        value = constants.get(",".join(words).lower(), words)
    every = check(value, Optional[Union[bool, list, tuple]], option) is True
    attacks = [resolve(Attack, a, f"attack of {option}") for a in (EVERY if every else value or ())]
    for name, times in Counter(attack.name for attack in attacks).items():
        if times > 1:
            hint = "give it once, or subclass it under another name"
            raise WagleError(f"{option}: {name} is named twice", hint=hint)
    return attacks, every


def usable_attacks(
    attacks: Sequence[Attack], subject: Subject, every: bool
) -> tuple[list[Attack], dict[str, str]]:
    """The attacks that have something to work on; for the others, name -> why they have nothing,
    which is an error unless ``every`` attack was asked for and some remain."""
    usable, skipped = [], {}
    for attack in attacks:
        try:
            attack.check(subject)
            usable.append(attack)
        except WagleError as error:
            if not every:
                raise
            skipped[attack.name] = str(error)
    if every and not usable:
        why = next(iter(skipped.values()))
        raise WagleError(f"model.robustness: no attack has anything to work on: {why}")
    return usable, skipped


def run_attacks(
    attacks: Sequence[Attack],
    subject: Subject,
    others: Mapping[str, Callable[[], Subject]] = MappingProxyType({}),
    metrics: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> list[Finding]:
    """Attack a model, then each of the others, one in memory at a time. Collective.

    Args:
        attacks: all of them usable.
        subject: the model under test.
        others: name in :data:`OTHERS` -> a function that loads the model.
        metrics: the same names -> metrics without attack, shown if the model is not in others.
    """

    def attack_all(subject: Subject, whose: str) -> list[Finding]:
        findings = []
        for attack in attacks:
            log.info("attack on %s: %s", whose, attack.name)
            findings += [replace(f, attack=attack.name) for f in attack.attack(subject)]
        return findings

    before = weights_digest(subject.lm.named_parameters())
    # Fine-tuning needs tensors that take gradients, which those made in inference mode do not.
    with torch.inference_mode(False), torch.no_grad():
        findings = attack_all(subject, "the model")
        if weights_digest(subject.lm.named_parameters()) != before:
            names = ", ".join(type(attack).__name__ for attack in attacks)
            raise RuntimeError(f"one of the attacks {names} left the model's weights changed")
        attacked = {
            name: {
                finding.key: finding.after for finding in attack_all(load(), f"the {name} model")
            }
            for name, load in others.items()
        }

    def beside(finding: Finding) -> Finding:
        numbers = {name: values.get(finding.measure) for name, values in metrics.items()}
        numbers |= {name: values.get(finding.key) for name, values in attacked.items()}
        return replace(finding, others=numbers, attacked={n: n in attacked for n in numbers})

    return [beside(finding) for finding in findings]


def load_other(name: str, like: Any, option: str) -> Any:
    """Load a model to compare with, in evaluation mode, in dtype and device of ``like``."""
    weight = like.get_input_embeddings().weight
    with torch.inference_mode(False):  # so that it can be fine-tuned
        other = models.load_model(name, dtype=weight.dtype).to(weight.device).eval()
    theirs, ours = other.get_input_embeddings().weight.shape[0], weight.shape[0]
    if theirs != ours:
        why = f"the model {name} has a vocabulary of {theirs} tokens, this one has {ours}"
        raise WagleError(f"{option}: {why}")
    return other


def robustness_table(findings: Sequence[Finding]) -> str:
    """The console's table; a number of another model that was not attacked has a star."""
    others = [name for name in OTHERS if any(name in finding.attacked for finding in findings)]
    rows = []
    for finding in findings:
        numbers = [finding.before, finding.after, *(finding.others.get(name) for name in others)]
        stars = ["", "", *("" if finding.attacked.get(name, True) else "*" for name in others)]
        pairs = zip(numbers, stars, strict=True)
        cells = ["" if number is None else f"{number:.4g}{star}" for number, star in pairs]
        if not finding.detail and finding.after is not None:
            rows.append([f"{finding.attack} {finding.option}".strip(), finding.measure, *cells])
    text = table(["attack", "measure", "before", "after", *others], rows, left=(0, 1))
    starred = [name for name in others if not all(f.attacked.get(name, True) for f in findings)]
    if starred:
        names = " and ".join(starred)
        text += f"\n* {names}: without the attack (results are given, and no model)"
    return text
