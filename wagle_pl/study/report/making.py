"""Section about how the models were made: lineage, configuration, versions, time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from wagle_pl.core.environment import versions
from wagle_pl.masks import describe_origin
from wagle_pl.study.report.html import Content, Markup, element, facts, note, number
from wagle_pl.study.report.sources import Run, Sources
from wagle_pl.unlearning.card import forgotten

_GIB = 2**30


def making(sources: Sources) -> Content:
    """For each model the runs that made it, oldest first; a run that made several is shown once."""
    parts: list[Content] = []
    told: list[tuple[Any, str]] = []
    for run in sources.everyone:
        parts += [element("h3", run.name), _about(run)]
        for i, step in enumerate(run.lineage):
            name = f"{i + 1}. {step.get('module', 'run')}"
            earlier = next((model for other, model in told if other == step), None)
            told.append((step, run.name))
            body = _step(step) if earlier is None else note(f"The same run as {name} of {earlier}.")
            parts.append(element("div", element("h4", name), body, class_="step"))
        parts += [note(f"{run.name}: {said}.") for said in dict.fromkeys(run.notes)]
    ours = ", ".join(f"{name} {found}" for name, found in versions().items())
    parts.append(note(f"This report was made with {ours}."))
    return parts


def _about(run: Run) -> Markup:
    sets = forgotten(run.record) if run.lineage else []
    rows = run.info.get("rows", {})
    return facts(
        [
            ("results", element("code", str(run.results.path))),
            ("measured as", str(run.info.get("suite", ""))),
            ("test rows", ", ".join(f"{name} {count}" for name, count in rows.items())),
            ("forgotten so far", ", ".join(sets) if len(sets) > 1 else None),
        ]
    )


def _step(step: Mapping[str, Any]) -> list[Content]:
    """What is known of one run of a lineage."""
    data, memory = step.get("data", {}), step.get("peak_memory_bytes")
    pairs: list[tuple[str, Content]] = [
        ("made from", [element("code", str(step.get("base", "unknown"))), _fingerprint(step)]),
        ("forget set", str(data.get("forget") or "")),
        ("retain set", str(data.get("retain") or "")),
        ("trained on", ", ".join(step.get("streams", ()))),
        ("objective", _options(step.get("objective"))),
        ("adapter", _options(step.get("adapter"))),
        ("mask", _mask(step)),
        ("guarantee", str(step.get("verified") or "")),
        ("steps", _number(step.get("steps"))),
        ("seed", "" if step.get("seed") is None else str(step["seed"])),
        (
            "time",
            [_number(step.get("seconds")), " s"]
            if step.get("seconds") is not None
            else "not recorded",
        ),
        (
            "peak memory",
            [number(memory / _GIB, f"{memory / _GIB:.3g}"), " GiB"] if memory else "not recorded",
        ),
        ("versions", _options(step.get("versions")) or "not recorded"),
    ]
    parts: list[Content] = [facts(pairs)]
    if step.get("config"):
        config = yaml.safe_dump(step["config"], sort_keys=False).rstrip()
        parts.append(
            element("details", element("summary", "configuration"), element("pre", config))
        )
    return parts


def _number(value: Any) -> Content:
    return number(value) if isinstance(value, (int, float)) else ""


def _fingerprint(step: Mapping[str, Any]) -> str:
    found = step.get("base_fingerprint")
    return f" (fingerprint {found[:12]})" if found else ""


def _options(value: Any) -> str:
    """Plain data in a line: the class first, then its options.

    >>> _options({"class": "NPO", "beta": 0.1, "retain": {"class": "NLL"}})
    'NPO, beta 0.1, retain (NLL)'
    """
    if not isinstance(value, Mapping):
        return "" if value is None else str(value)
    parts = [str(value["class"])] if "class" in value else []
    parts += [
        f"{key} ({_options(each)})" if isinstance(each, Mapping) else f"{key} {each}"
        for key, each in value.items()
        if key != "class"
    ]
    return ", ".join(parts)


def _mask(step: Mapping[str, Any]) -> Content:
    if not step.get("objective") or step.get("adapter"):
        return ""
    mask = step.get("mask")
    if not mask:
        return "none (dense: every weight may move)"
    file = [element("code", mask["file"]), ", "] if mask.get("file") else None
    return [
        file,
        "density ",
        number(mask["density"]),
        f", made by {describe_origin(mask.get('made_by') or {})}",
    ]
