"""The model card: a record of ours, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from wagle_pl.masks import describe_origin


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown model card from a record (``wagle.json``), whose ``lineage`` lists the runs."""
    *earlier, last = record["lineage"]
    title = "Unlearned model" if last.get("objective") else "Fine-tuned model"
    parts = [
        "---\nlibrary_name: transformers\ntags: [unlearning, wagle]\n---",
        f"# {title}",
        f"Made by `wagle_pl` ({last['module']}) from `{last['base']}`.",
        _table(["", ""], [[key, value] for key, value in _facts(last).items() if value]),
    ]
    if earlier:
        runs = [
            [f"{number}. {run['module']}", f"`{run['base']}`"]
            + [f"`{run['data'][s]}`" if run["data"].get(s) else "" for s in ("forget", "retain")]
            + [_mask(run)]
            for number, run in enumerate(record["lineage"], 1)
        ]
        header = ["run", "made from", "forget set", "retain set", "mask"]
        parts += ["## Lineage", _table(header, runs)]
    if len(forgotten(record)) > 1:
        sets = ", ".join(f"`{name}`" for name in forgotten(record))
        parts.append(
            f"Forgotten so far: {sets}. Test all of them: a later run can bring an earlier set "
            "back."
        )
    for heading, key in (("Prompts", "prompts"), ("Configuration", "config")):
        if last.get(key):
            text = yaml.safe_dump(last[key], sort_keys=False, allow_unicode=True, width=1000)
            parts += [f"## {heading}", f"```yaml\n{text.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def forgotten(record: Mapping[str, Any]) -> list[str]:
    """The forget sets of every unlearning run in a record, oldest first, each once."""
    sets = [run["data"].get("forget") for run in record["lineage"] if run.get("objective")]
    return list(dict.fromkeys(name for name in sets if name))


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    facts = {
        "Base model": f"`{run['base']}` (fingerprint {run['base_fingerprint'][:12]})",
        "Forget set": run["data"].get("forget"),
        "Retain set": run["data"].get("retain"),
        "Trained on": ", ".join(run["streams"]),
        "Objective": run.get("objective"),
        "Steps": run["steps"],
        "Seed": run["seed"] if run["seed"] is None else str(run["seed"]),
    }
    if run.get("adapter"):
        facts["Adapter"] = run["adapter"]
    elif run.get("objective"):
        facts |= {"Mask": _mask(run), "Guarantee": run.get("verified") or "not checked"}
    return facts


def _mask(run: Mapping[str, Any]) -> str:
    if not run.get("objective"):
        return ""
    if run.get("adapter"):
        return f"none ({run['adapter']['class']})"
    mask = run.get("mask")
    if not mask:
        return "none (dense: every weight may move)"
    file = f"`{mask['file']}`, " if mask["file"] else ""
    return f"{file}density {mask['density']:.4f}, made by {describe_origin(mask['made_by'])}"
