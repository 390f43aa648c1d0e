"""What all attacks found, beside target and retrained model: for ``robustness.json`` and the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from wagle_pl.evaluation.robustness.finding import Finding
from wagle_pl.evaluation.suites.catalogue import Info

ROBUSTNESS_FILE = "robustness.json"
PREFIX = "robustness"


@dataclass
class Line:
    """One finding, and that of the other models.

    Attributes:
        attack: name of the attack.
        finding: of the model under test.
        others: ``target`` or ``retrained`` -> its number; None if it has none.
        attacked: ``target`` or ``retrained`` -> whether that number is under the same attack.
    """

    attack: str
    finding: Finding
    others: dict[str, Optional[float]] = field(default_factory=dict)
    attacked: dict[str, bool] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name in ``metrics.json``."""
        name = f"{self.attack}_{self.finding.option}" if self.finding.option else self.attack
        return f"{PREFIX}/{name}/{self.finding.measure}"

    def record(self) -> dict[str, Any]:
        """As plain data."""
        found = self.finding
        record: dict[str, Any] = {
            "attack": self.attack,
            "option": found.option,
            "measure": found.measure,
            "before": found.before,
            "after": found.after,
        }
        for name in ("target", "retrained"):
            record |= {name: self.others.get(name), f"{name}_attacked": self.attacked.get(name)}
        record |= {
            "unit": found.info.unit,
            "direction": found.info.direction,
            "what": found.info.what,
        }
        return record | ({"why": found.why} if found.after is None else {})


class Report:
    """All lines, and the attacks that were left out.

    Args:
        lines: in the order of the attacks.
        skipped: attack -> why there was nothing to work on.
    """

    def __init__(self, lines: Sequence[Line], skipped: Mapping[str, str]) -> None:
        self.lines = list(lines)
        self.skipped = dict(skipped)

    def metrics(self) -> dict[str, float]:
        """Name in ``metrics.json`` -> number under the attack."""
        return {
            line.key: line.finding.after for line in self.lines if line.finding.after is not None
        }

    def undefined(self) -> dict[str, str]:
        """Name -> why there is no number."""
        found = {line.key: line.finding.why for line in self.lines if line.finding.after is None}
        return found | {f"{PREFIX}/{name}": why for name, why in self.skipped.items()}

    def infos(self) -> dict[str, Info]:
        """Name -> unit, direction and meaning, for the sidecar."""
        skipped = {f"{PREFIX}/{name}": Info("", "retrained", "an attack") for name in self.skipped}
        return {line.key: line.finding.info for line in self.lines} | skipped

    def records(self) -> list[dict[str, Any]]:
        """The content of ``robustness.json``."""
        return [line.record() for line in self.lines]

    def table(self) -> str:
        """The console's table; a number of another model that was not attacked has a star."""
        others = [
            name
            for name in ("target", "retrained")
            if any(name in line.attacked for line in self.lines)
        ]
        cells = [["attack", "measure", "before", "after", *others]]
        for line in self.lines:
            if line.finding.detail or line.finding.after is None:
                continue
            name = f"{line.attack} {line.finding.option}".strip()
            numbers = [_shown(line.finding.before), _shown(line.finding.after)]
            for other in others:
                star = (
                    "" if line.attacked.get(other, True) or line.others.get(other) is None else "*"
                )
                numbers.append(_shown(line.others.get(other)) + star)
            cells.append([name, line.finding.measure, *numbers])
        return "\n".join([*_aligned(cells), *self._notes(others)])

    def _notes(self, others: Sequence[str]) -> Iterator[str]:
        starred = [
            name for name in others if any(not line.attacked.get(name, True) for line in self.lines)
        ]
        if starred:
            yield f"* {' and '.join(starred)}: without the attack (results are given, and no model)"
        for name, why in self.undefined().items():
            yield f"undefined: {name}: {why}"


def _shown(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.4g}"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
            + [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        ).rstrip()
        for line in cells
    ]
