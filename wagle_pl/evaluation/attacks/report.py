"""Choose attacks, run them on a model and on those beside it, and report what they found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

import torch

from wagle_pl.core.errors import WagleError
from wagle_pl.core.hub import ADAPTER_FILE
from wagle_pl.core.registry import Entry, resolve
from wagle_pl.core.text import table
from wagle_pl.core.weights import fingerprint
from wagle_pl.evaluation.attacks.attack import OTHERS, PREFIX, Attack, Finding, Subject
from wagle_pl.evaluation.attacks.probing import Probe, Sample
from wagle_pl.evaluation.attacks.prompts import InContext, Paraphrase, TranslatedStyle
from wagle_pl.evaluation.attacks.weights import Quantise, Relearn
from wagle_pl.evaluation.measures import Info
from wagle_pl.evaluation.results import INFO_FILE, METRICS_FILE, read_json
from wagle_pl.lm import models

log = logging.getLogger(__name__)

ROBUSTNESS_FILE = "robustness.json"

#: The attacks of ``all``, in the order in which they run.
EVERY = (Relearn, Quantise, Paraphrase, TranslatedStyle, InContext, Sample, Probe)


def find_attacks(
    value: Union[bool, str, Sequence[Union[Attack, Entry]], None], option: str = "model.robustness"
) -> tuple[list[Attack], bool]:
    """The attacks that an option names, and whether it asks for all that can be done.

    It is a list of attacks, short names or class paths; the same as text with commas; ``all`` or
    True for every attack; None, False or ``none`` for none.
    """
    if isinstance(value, str):
        words = [word.strip() for word in value.strip("[] ").split(",") if word.strip()]
        constants = {"all": True, "true": True, "none": False, "false": False, "null": False}
        value = constants.get(",".join(words).lower(), words)
    if value is True:
        return [attack() for attack in EVERY], True
    attacks = [resolve(Attack, attack, f"attack of {option}") for attack in value or ()]
    names = [attack.name for attack in attacks]
    for name in names:
        if names.count(name) > 1:
            raise WagleError(
                f"{option} names {name} twice; give it once, or subclass it under another name"
            )
    return attacks, False


def usable_attacks(
    attacks: Sequence[Attack], subject: Subject, every: bool
) -> tuple[list[Attack], dict[str, str]]:
    """The attacks that have something to work on; for the others, name -> why they have not.

    Raises:
        WagleError: for the first of these, unless ``every`` attack was asked for and some are left.
    """
    found, skipped = [], {}
    for attack in attacks:
        try:
            attack.check(subject)
            found.append(attack)
        except WagleError as error:
            if not every:
                raise
            skipped[attack.name] = str(error)
    if every and not found:
        why = next(iter(skipped.values()))
        raise WagleError(f"model.robustness: no attack has anything to work on: {why}")
    return found, skipped


@dataclass
class RobustnessReport:
    """What all attacks found, in their order, and why those that are ``skipped`` found nothing."""

    findings: Sequence[Finding]
    skipped: Mapping[str, str]

    def metrics(self) -> dict[str, float]:
        """Name in ``metrics.json`` -> number under the attack."""
        return {each.key: each.after for each in self.findings if each.after is not None}

    def undefined(self) -> dict[str, str]:
        """Name -> why there is no number."""
        found = {each.key: each.why for each in self.findings if each.after is None}
        return found | {f"{PREFIX}/{name}": why for name, why in self.skipped.items()}

    def infos(self) -> dict[str, Info]:
        """Name -> unit, direction and meaning, for ``metrics.info.json``."""
        skipped = {f"{PREFIX}/{name}": Info("", "retrained", "an attack") for name in self.skipped}
        return {each.key: each.info for each in self.findings} | skipped

    def records(self) -> list[dict[str, Any]]:
        """The content of ``robustness.json``."""
        return [each.record() for each in self.findings]

    def table(self) -> str:
        """The console's table; a number of another model that was not attacked has a star."""
        others = [name for name in OTHERS if any(name in each.attacked for each in self.findings)]
        rows, starred = [], {}
        for each in self.findings:
            numbers = [each.before, each.after, *(each.others.get(name) for name in others)]
            cells = ["" if number is None else f"{number:.4g}" for number in numbers]
            for i, name in enumerate(others, 2):
                if not each.attacked.get(name, True):
                    starred[name] = True
                    cells[i] = cells[i] and f"{cells[i]}*"
            if not each.detail and each.after is not None:
                rows.append([f"{each.attack} {each.option}".strip(), each.measure, *cells])
        header = ["attack", "measure", "before", "after", *others]
        lines = [table(header, rows, left=(0, 1))]
        if starred:
            names = " and ".join(starred)
            lines.append(f"* {names}: without the attack (results are given, and no model)")
        lines += [f"undefined: {name}: {why}" for name, why in self.undefined().items()]
        return "\n".join(lines)


def run_attacks(
    attacks: Sequence[Attack],
    subject: Subject,
    others: Mapping[str, Callable[[], Subject]],
    metrics: Mapping[str, Mapping[str, float]],
    skipped: Mapping[str, str],
) -> RobustnessReport:
    """Attack a model, then each of the others, one in memory at a time. Collective.

    Args:
        attacks: all of them usable.
        subject: the model under test.
        others: name of :data:`OTHERS` -> loads it.
        metrics: the same names -> metrics without attack, shown where there is no such model.
        skipped: attack -> why it is left out.

    Raises:
        RuntimeError: if an attack did not restore the weights.
    """

    def attack_all(subject: Subject, whose: str) -> list[Finding]:
        found = []
        for attack in attacks:
            log.info("attack on %s: %s", whose, attack.name)
            found += [replace(each, attack=attack.name) for each in attack.attack(subject)]
        return found

    before = fingerprint(subject.lm.named_parameters())
    # Fine-tuning needs tensors that take gradients, which those made in inference mode do not.
    with torch.inference_mode(False), torch.no_grad():
        found = attack_all(subject, "the model")
        if fingerprint(subject.lm.named_parameters()) != before:
            names = ", ".join(type(attack).__name__ for attack in attacks)
            raise RuntimeError(f"one of the attacks {names} left the model's weights changed")
        beside = {
            name: {each.key: each.after for each in attack_all(load(), f"the {name} model")}
            for name, load in others.items()
        }
    results = []
    for each in found:
        numbers = {name: values.get(each.measure) for name, values in metrics.items()}
        numbers |= {name: values.get(each.key) for name, values in beside.items()}
        attacked = {name: name in beside for name in numbers}
        results.append(replace(each, others=numbers, attacked=attacked))
    return RobustnessReport(results, skipped)


# -- the other models ------------------------------------------------------------------------------


def model_of(path: Union[str, Path]) -> Optional[str]:
    """The model that a folder, or results in it, are of; None if that is unknown.

    It is the folder itself or the one above, if that holds a model, or the one that the results
    name, if it still exists. Of a published result file it is unknown, wherever that lies.
    """
    path = Path(path)
    if path.is_file() and path.name != METRICS_FILE:
        return None
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.absolute().parent):
        if _holds_model(place):
            return str(place)
    named = read_json(folder / INFO_FILE).get("model") if (folder / INFO_FILE).is_file() else None
    return named if named is not None and _holds_model(Path(named)) else None


def results_of(path: Union[str, Path]) -> Optional[Path]:
    """Where the results of a path are: ``test`` in a model's folder; None if it has none."""
    folder = Path(path)
    if not _holds_model(folder) or (folder / METRICS_FILE).is_file():
        return folder
    return folder / "test" if (folder / "test" / METRICS_FILE).is_file() else None


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_FILE))


def load_other(name: str, like: Any, option: str) -> Any:
    """Load a model to compare with: in the dtype and on the device of ``like``, in evaluation mode.

    Raises:
        WagleError: if it cannot be loaded, or its vocabulary is another.
    """
    weight = like.get_input_embeddings().weight
    with torch.inference_mode(False):  # so that it can be fine-tuned
        other = models.load_model(name, dtype=weight.dtype).to(weight.device).eval()
    theirs, ours = other.get_input_embeddings().weight.shape[0], weight.shape[0]
    if theirs != ours:
        raise WagleError(
            f"{option}: the model {name} has a vocabulary of {theirs} tokens, this one has {ours}"
        )
    return other
