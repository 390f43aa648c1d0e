"""The model card: a record of ours, for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from wagle_pl.masks import describe_origin


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown model card from a record (``wagle.json``), whose ``lineage`` lists the runs that
    made the model."""
    *earlier, last = record["lineage"]
    lines = ["---", "library_name: transformers", "tags: [unlearning, wagle]", "---", ""]
    title = "Unlearned model" if last.get("objective") else "Fine-tuned model"
    lines += [f"# {title}", "", f"Made by `wagle_pl` ({last['module']}) from `{last['base']}`.", ""]
    lines += [
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in _facts(last).items() if value),
    ]
    if earlier:
        lines += [
            "",
            "## Lineage",
            "",
            "| run | made from | forget set | retain set | mask |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {i}. {run['module']} | `{run['base']}` | {_set(run, 'forget')} | {_set(run, 'retain')} | {_mask(run)} |"
            for i, run in enumerate(record["lineage"], 1)
        ]
    if len(forgotten(record)) > 1:
        sets = ", ".join(f"`{name}`" for name in forgotten(record))
        lines += [
            "",
            f"Forgotten so far: {sets}. Test all of them: a later run can bring an earlier set back.",
        ]
    if last.get("prompts"):
        prompts = yaml.safe_dump(
            last["prompts"], sort_keys=False, allow_unicode=True, width=1000
        ).rstrip()
        lines += ["", "## Prompts", "", "```yaml", prompts, "```"]
    if last["config"]:
        config = yaml.safe_dump(last["config"], sort_keys=False).rstrip()
        lines += ["", "## Configuration", "", "```yaml", config, "```"]
    return "\n".join(lines) + "\n"


def forgotten(record: Mapping[str, Any]) -> list[str]:
    """The forget sets of every unlearning run in a record, oldest first, each once."""
    sets = [run["data"].get("forget") for run in record["lineage"] if run.get("objective")]
    return list(dict.fromkeys(name for name in sets if name))


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
        facts["Mask"] = _mask(run)
        facts["Guarantee"] = run.get("verified") or "not checked"
    return facts


def _set(run: Mapping[str, Any], name: str) -> str:
    return f"`{run['data'][name]}`" if run["data"].get(name) else ""


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
