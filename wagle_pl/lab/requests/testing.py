"""One run of a register: open requests are forgotten, and every request is tested."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Optional

import torch

from wagle_pl import api
from wagle_pl.api.subject import Origin, Questions, Subject
from wagle_pl.api.verdict import Scores, each_has_gone, left_rows, was_known
from wagle_pl.core.errors import WagleError
from wagle_pl.core.schema import Count
from wagle_pl.core.tensorfiles import TensorFiles
from wagle_pl.data.example import Example
from wagle_pl.lab.requests.register import Means, Register, Tested
from wagle_pl.lm.models import checkpoint_dtype, load_model, load_tokenizer, weights_folder
from wagle_pl.lm.quantised import quantise_
from wagle_pl.unlearning.patch import digest_of, make_patch

log = logging.getLogger(__name__)

#: What the entry of a run holds of the settings of :func:`~wagle_pl.forget`, if they were chosen.
CHOSEN = ("objective", "score", "lr", "lr_doubles_every", "retain", "verdict")


def load(name: str, bits: Optional[int] = None) -> tuple[Any, Any]:
    """A model as ``forget`` loads it, maybe rounded to ``bits``, and its tokenizer."""
    lm = load_model(name, checkpoint_dtype(name) or torch.float32)
    if bits is not None:
        quantise_(lm, bits)
    return lm, load_tokenizer(name)


def model_digest(name: str) -> Optional[str]:
    """SHA-256 of a model's tensors; None if it has no safetensors files of its own."""
    folder = weights_folder(name)
    return None if folder is None else digest_of(TensorFiles(Path(folder)))


def examine(
    lm: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    known: Sequence[bool],
    draws: Sequence[int],
    seed: int,
) -> Tested:
    """Ask a model for the rows of a request, in their own and in other words.

    The rule is that of ``forget``: no row is known, and the means of those that were meet the bound.

    Args:
        known: which rows were known before anything was forgotten; none of them if the request is
            new, or if the model knew no more of it than chance explains.
        draws: seeds of the rows' unseen counterparts, see
            :class:`~wagle_pl.api.subject.Questions`: the bound of a request stays that of its first
            test, whichever model is asked.
    """
    origin = Origin(lm)
    try:
        subject = Subject(lm, tokenizer, {"seed": seed}, False).ready()
        questions = Questions(subject, rows, seed, draws)
        direct = questions.recalled(questions.ask(reworded=False), reworded=False)
        reworded = questions.recalled(questions.ask(reworded=True), reworded=True)
        scores = Scores(direct, reworded, ())
        flags = [any(pair) for pair in zip(known or scores.known, scores.known, strict=True)]
        scores = replace(scores, still_answered=questions.still_answered(flags))
    finally:
        origin.move_back()
    return judged(scores, flags, questions.draws, any(known))


def judged(
    scores: Scores, flags: list[bool], draws: Sequence[int], was_request_known: bool
) -> Tested:
    """What a test says of a request; see :func:`examine`."""
    left = left_rows(flags, scores)
    means: Means = {
        "probability": fmean(scores.direct.rows),
        "unseen": fmean(scores.direct.unseen),
        "reworded": fmean(scores.reworded.rows),
    }
    tested: Tested = {
        "outcome": "known",
        "known": flags,
        "draws": [*map(Count, draws)],
        "left": Count(sum(left)),
        "before": None,
        "after": means,
    }
    if was_request_known:
        asked_twice = (scores.direct, scores.reworded)
        if not any(left) and all(each_has_gone(asked, flags) for asked in asked_twice):
            tested["outcome"] = "forgotten"
    elif not was_known(scores):
        tested |= {"outcome": "not known before", "known": [False] * len(flags)}
    return tested


def forget_open(
    register: Register, base: str, target: Path, options: Mapping[str, Any], overwrite: bool
) -> dict[str, Any]:
    """Forget the open requests, test all, and write the model, patch and mask; returns the entry.

    An earlier request that comes back is forgotten with the open ones, from the same base. The model
    is kept only if it is not damaged, knows no earlier request, and has forgotten an open one.
    """
    requests = {request.id: request for request in register.testable()}
    rows = {name: register.rows(request) for name, request in requests.items()}
    known = {name: request.known for name, request in requests.items()}
    draws: dict[str, Sequence[int]] = {name: request.draws for name, request in requests.items()}

    def tests_of(lm: Any, tokenizer: Any, names: Sequence[str]) -> dict[str, Tested]:
        seed = options["seed"]
        return {n: examine(lm, tokenizer, rows[n], known[n], draws[n], seed) for n in names}

    opened = [name for name, request in requests.items() if request.state == "open"]
    before = tests_of(*load(base), opened)
    known |= {name: tested["known"] for name, tested in before.items()}
    draws |= {name: tested["draws"] for name, tested in before.items()}
    targets = [name for name, tested in before.items() if tested["outcome"] == "known"]
    entry: dict[str, Any] = dict.fromkeys(("model", "digest", "outcome", "retain", "mask", "patch"))
    entry |= {"base": register.digest, "requests": before, "rejected": None, "reopened": []}
    entry["settings"] = dict(options)
    returned = targets
    while returned:
        others = [name for name in rows if name not in targets]
        chosen, earlier = ([e.row for n in names for e in rows[n]] for names in (targets, others))
        asked = [(known[name], draws[name]) for name in targets]
        result = api.forget(base, chosen, earlier=earlier or None, requests=asked, **options)
        after = tests_of(result.model, result.tokenizer, list(rows))
        returned = [name for name in others if after[name]["outcome"] == "known"]
        if returned:
            log.warning("known again, to be forgotten with the others: %s", ", ".join(returned))
        targets = targets + returned
    if not targets:
        return entry
    entry["reopened"] = [name for name in targets if name not in opened]
    sides = (result.before, result.after)
    entry |= {"outcome": result.outcome, "retain": [s["retain_probability"] for s in sides]}
    for name, tested in before.items():
        after[name]["before"] = tested["after"]
    forgotten = any(after[name]["outcome"] == "forgotten" for name in opened)
    returned = [name for name in rows if name not in opened and after[name]["outcome"] == "known"]
    if not (result.steps and forgotten) or returned or result.outcome == "model damaged":
        return entry | {"rejected": after}
    request = result.record["lineage"][-1]["request"]
    entry["settings"] |= {"steps": result.steps, **{key: request[key] for key in CHOSEN}}
    result.save(target, overwrite)
    return entry | {"requests": after, **_beside(register, base, target, result)}


def _beside(register: Register, base: str, target: Path, result: Any) -> dict[str, Any]:
    """Write a run's mask and patch; returns what its entry says of them and of the model."""
    entry: dict[str, Any] = {
        "model": register.place(str(target)),
        "digest": model_digest(str(target)),
    }
    stem = register.folder / "patches" / str(register.run_count + 1)
    if result.mask is not None:
        entry["mask"] = register.stored(result.mask.save(f"{stem}.mask.safetensors"))
    try:
        path = make_patch(weights_folder(base), target, f"{stem}.patch", overwrite=True).path
        entry["patch"] = register.stored(path)
    except WagleError as error:  # the run counts more than its way back
        log.warning("no patch was written, so this run cannot be reverted: %s", error)
    return entry
