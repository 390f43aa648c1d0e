"""Run attacks on a model, and on the target and the retrained model beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Optional, Union

import torch

from wagle_pl.core.errors import WagleError
from wagle_pl.core.registry import resolve
from wagle_pl.evaluation.robustness.base import Attack
from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.robustness.report import Line, Report
from wagle_pl.evaluation.robustness.subject import Subject

log = logging.getLogger(__name__)

Attacks = Optional[Union[bool, str, list[Union[Attack, str]]]]
Found = dict[tuple[str, str, str], Finding]


def find_attacks(value: Attacks, every: Sequence[type[Attack]]) -> tuple[list[Attack], bool]:
    """The attacks that an option names.

    Args:
        value: a list of attacks, short names or class paths; the same as text with commas; ``all`` or True for every
            one; None, False or ``none`` for none.
        every: the classes of ``all``.

    Returns:
        ``(attacks, all)``: whether all were meant, so that one with nothing to work on is left out, not refused.

    Raises:
        WagleError: listing the valid names.
    """
    if isinstance(value, str):
        words = [word.strip() for word in value.strip("[] ").split(",") if word.strip()]
        lone = words[0].lower() if len(words) == 1 else ""
        value = {"all": True, "true": True, "none": False, "false": False, "null": False}.get(
            lone, words
        )
    if value is True:
        return [attack() for attack in every], True
    attacks = [resolve(Attack, attack, "attack of model.robustness") for attack in value or ()]
    names = [attack.name for attack in attacks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise WagleError(
            f"model.robustness names {twice} twice; give it once, or subclass it under another name"
        )
    return attacks, False


def usable(
    attacks: Sequence[Attack], subject: Subject, every: bool
) -> tuple[list[Attack], dict[str, str]]:
    """The attacks that have something to work on, and why others do not.

    Raises:
        WagleError: for the first that has not, unless ``every`` attack was asked for at once.
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
        raise WagleError(
            f"model.robustness: no attack has anything to work on: {next(iter(skipped.values()))}"
        )
    return found, skipped


def run_attacks(
    attacks: Sequence[Attack],
    subject: Subject,
    others: Mapping[str, Callable[[], Subject]],
    results: Mapping[str, Mapping[str, float]],
    skipped: Optional[Mapping[str, str]] = None,
) -> Report:
    """Attack a model, then each of the others, one in memory at a time; a meeting of all ranks.

    Args:
        attacks: all of them usable.
        subject: the model under test.
        others: ``target`` or ``retrained`` -> loads it.
        results: ``target`` or ``retrained`` -> its metrics without attack, shown where there is no such model.
        skipped: attack -> why it is left out, for the report.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # fine-tuning needs tensors that take gradients
        found = _attack(attacks, subject, "the model")
        beside: dict[str, Found] = {}
        for name, load in others.items():
            beside[name] = _attack(attacks, load(), f"the {name} model")
    lines = []
    for (attack, _, measure), finding in found.items():
        line = Line(attack, finding)
        for name in ("target", "retrained"):
            if name in beside:
                other = beside[name].get((attack, finding.option, measure))
                line.others[name], line.attacked[name] = other and other.after, True
            elif name in results:
                line.others[name], line.attacked[name] = results[name].get(measure), False
        lines.append(line)
    return Report(lines, skipped or {})


def _attack(attacks: Sequence[Attack], subject: Subject, whose: str) -> Found:
    found: Found = {}
    for attack in attacks:
        log.info("attack on %s: %s", whose, attack.name)
        for finding in attack.attack(subject):
            found[attack.name, finding.option, finding.measure] = finding
    return found
