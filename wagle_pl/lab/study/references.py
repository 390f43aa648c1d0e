"""Tests of a study's target and retrained model, each made once, with the study's attacks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypedDict

import lightning as L

from wagle_pl.core.environment import silence
from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import option_names
from wagle_pl.core.weights import parameter_shapes
from wagle_pl.data.example import raw_rows
from wagle_pl.data.module import ForgetRetainDataModule
from wagle_pl.evaluation import EvaluationModule, Results
from wagle_pl.evaluation.attacks.attack import Attack, usable_attacks
from wagle_pl.evaluation.results import read_table, write_table
from wagle_pl.evaluation.suites import Suite
from wagle_pl.evaluation.tofu_result import Table
from wagle_pl.lab.study import TABLE_FILE
from wagle_pl.lab.study.grid import definition, digest
from wagle_pl.lab.study.runs import announced
from wagle_pl.lm.module import LanguageModule

log = logging.getLogger(__name__)


def rows_of(data: ForgetRetainDataModule, tests: Sequence[str] = ()) -> dict[str, Any]:
    """What distinguishes the rows of a study, as plain data."""
    settings: dict[str, Any] = {
        f"{name}_rows": digest(raw_rows(data.examples(name))) for name in ("forget", "retain")
    }
    settings["template"] = digest(data.template.identity())
    test_rows = {name: digest(raw_rows(data.test_examples(name))) for name in tests}
    return settings | ({"test_rows": test_rows} if tests else {})


def attacks_of(attacks: Sequence[Attack]) -> dict[str, Any]:
    """What distinguishes the attacks of a study: their options that are not defaults."""
    definitions = []
    for attack in attacks:
        usual = vars(type(attack))  # where a dataclass keeps its defaults
        options = {k: v for k, v in vars(attack).items() if v != usual.get(k)}
        definitions.append(definition(type(attack), options))
    return {"attacks": definitions} if definitions else {}


class Measured(TypedDict):
    """A row of a table of measures under attack."""

    measure: str
    value: float


@dataclass(eq=False)
class References:
    """Tests the models that a study compares its runs with."""

    folder: Path  # of the study
    trainer: Callable[..., L.Trainer]
    data: ForgetRetainDataModule
    options: Mapping[str, Any]  # of UnlearnModule and of tests
    generate: bool
    attacks: Sequence[Attack]
    every_attack: bool  # all attacks: those that cannot be used are left out
    usable: Sequence[Attack] = ()  # once a model has been attacked
    suite: Optional[Suite] = None  # once a model has been tested
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of its parameters

    def test(
        self, name: str, model: str, retrained: Optional[str] = None
    ) -> tuple[str, dict[str, float]]:
        """Fingerprint and measures of the ``target`` or ``retrained`` model."""
        # once there are runs, other results are a sign of another study
        overwrite = not (self.folder / TABLE_FILE).is_file()
        taken = option_names(EvaluationModule)
        module = EvaluationModule(
            model=model,
            output=str(self.folder / name),
            overwrite=overwrite,
            generate=self.generate,
            retrained=retrained,
            **{option: value for option, value in self.options.items() if option in taken},
        )
        try:
            with announced(f"{name} model {model}"), silence():
                trainer = self.trainer()
                trainer.test(module, datamodule=copy.copy(self.data), verbose=False)
                attacked = self._attacked(name, trainer, module) if self.attacks else {}
        except WagleError as error:
            if not error.hint:
                raise
            raise WagleError(error.message, error.option, hint="choose another --output") from None
        self.suite, self.shapes = module.evaluation.plan.suite, parameter_shapes(module.lm)
        return module.model_fingerprint, module.metrics | attacked

    def _attacked(
        self, name: str, trainer: L.Trainer, module: EvaluationModule
    ) -> dict[str, float]:
        subject = module.evaluation.subject()
        self.usable, skipped = usable_attacks(self.attacks, subject, self.every_attack)
        for attack, why in skipped.items():
            log.info("attack %s is left out: %s", attack, why)
        file = self.folder / f"attacked_{name}.parquet"
        key = {"model": module.model_fingerprint, **attacks_of(self.attacks)}
        key |= rows_of(self.data, self.data.test_names())
        rows = read_table(file, key, not (self.folder / TABLE_FILE).is_file(), Measured)
        if rows is None:
            tables = Results.read(self.folder / name).tables
            measures = self.attack(trainer, module, module.evaluation, tables)
            rows = [{"measure": measure, "value": value} for measure, value in measures.items()]
            write_table(file, rows, key)
        return {row["measure"]: row["value"] for row in rows}

    def attack(
        self,
        trainer: L.Trainer,
        module: LanguageModule,
        evaluation: Any,
        tables: Mapping[str, Table],
    ) -> dict[str, float]:
        """Measures of a module's model under the attacks."""
        module.to(trainer.strategy.root_device)  # Lightning has moved it away
        module.lm.eval()
        evaluation.lm = module.lm
        findings = evaluation.attack(self.usable, tables)
        return {finding.key: finding.after for finding in findings if finding.after is not None}
