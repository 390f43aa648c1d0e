"""``forget``: from a model and some rows to a model that has forgotten them, in one call."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wagle_pl.api.neighbours import restated, retain_questions
from wagle_pl.api.result import HISTORY, Forgotten
from wagle_pl.api.rows import Earlier, GivenRows, Rows, restating, row_digest, rows_of
from wagle_pl.api.subject import Examination, Origin, Requested, StopWhenForgotten, Subject
from wagle_pl.api.verdict import judge, was_known
from wagle_pl.attribution import AttributionModule, Score
from wagle_pl.attribution.scores import Curvature
from wagle_pl.core.environment import silence
from wagle_pl.core.errors import WagleError, check_density, check_positive
from wagle_pl.core.hub import load_tokenizer
from wagle_pl.core.registry import describe, did_you_mean, option_names, resolve
from wagle_pl.core.schema import check, check_arguments
from wagle_pl.core.stopping import undone_at_sigterm
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.data.example import Example, Row, parse_rows
from wagle_pl.data.rows import spread
from wagle_pl.lm.models import checkpoint_dtype, load_model
from wagle_pl.lm.saving import read_record
from wagle_pl.masks import WeightMask
from wagle_pl.objectives import Objective
from wagle_pl.objectives.forget import NPO
from wagle_pl.unlearning import UnlearnModule

log = logging.getLogger(__name__)

#: Learning rates of AdamW on values of selected weights, by the number of weights of a model.
LEARNING_RATES = ((30e6, 1e-4), (500e6, 5e-5), (float("inf"), 2e-5))
SHOWN_ROWS = 64  # number of forget rows whose answers are generated
HELD_OUT, MOST_HELD_OUT = 0.2, 64  # share and number of retain rows kept out of training
FEW_ROWS = 5  # with fewer retain rows, none is held out


@undone_at_sigterm()
def forget(
    model: Union[str, Path, PreTrainedModel],
    forget: Rows,
    retain: Optional[Rows] = None,
    density: Optional[float] = 0.2,
    tokenizer: Optional[Union[str, Path, PreTrainedTokenizerBase]] = None,
    objective: Union[Objective, str, None] = None,
    score: Union[Score, str, None] = None,
    lr: Optional[float] = None,
    seed: int = 0,
    max_steps: int = 300,
    earlier: Optional[Rows] = None,
    requests: Sequence[Requested] = (),
    progress: bool = True,
    unit: str = "row",
    **data: Any,
) -> Forgotten:
    """Make a model forget rows and keep the rest; nothing is written.

    First, a mask selects the weights that matter for the forget rows. Then these weights are
    trained with the objective until the forget rows are no more probable than rows of the same form
    that the model has never seen (other names, other numbers), in the rows' words and in others.
    The verdict applies the same bound, see :mod:`wagle_pl.api.verdict`. If the model does not know
    the rows, it is not trained. The verdict is about what was asked: the model may still know a fact
    in another form, such as a statement to complete or a yes-or-no question, if no row has it. The
    columns ``paraphrased_question`` and ``paraphrased_answer`` of a row are forgotten and asked, too;
    other wordings of an answer are tested only if they are given there. A text is asked for its second
    half, given the first.

    A loaded model is changed in place. If the call fails or is interrupted, by Ctrl-C or SIGTERM, its
    weights are again what they were; in every case its flags, dtypes, devices and the random state
    are.

    Args:
        model: hub id, folder or GGUF file; or a loaded model.
        forget: rows to forget: a file, a hub dataset, a row, or a list, dataset, data frame or
            generator of rows (dicts with the columns that
            :class:`~wagle_pl.ForgetRetainDataModule` knows) and strings. A string that ends with a
            question mark is a question, and the model's own answer is forgotten; any other string
            is a text.
        retain: rows to keep, likewise; a fifth of them is held out of training to measure what is
            kept, and rows that say a forget row in other words are left out. None takes the
            model's own answers to bundled questions on many subjects, without those that share a
            name or a rare word with a forget row.
        density: share of the weights that may move; None is dense unlearning, without a mask.
        tokenizer: name, folder or object; the model's own when None.
        objective: see :class:`~wagle_pl.UnlearnModule`. None takes ``NPO`` with a β at which its
            gradient does not vanish before the bound is met (with the usual 0.1, that of a long
            answer does).
        score: see :class:`~wagle_pl.AttributionModule`; the paper's is ``wagle``, of the unit
            ``weight``. None takes ``Curvature`` with power 1, which forgets most for a given damage
            if all weights take steps of the same size, as with Adam.
        lr: of AdamW. None starts with a rate for the size of the model, see
            :data:`LEARNING_RATES`, and doubles it every 25 steps.
        seed: random seed.
        max_steps: step at which training ends if the bound is not met.
        earlier: rows of earlier requests, which are tested again; training does not end while it
            has brought one back. Rows that this function has forgotten before are found by
            themselves, if their file is where it was or the model is the same object.
        requests: if the forget rows are of several requests, what an earlier test said of each:
            which of its rows were known, and the seeds of their unseen counterparts. Each request
            must meet its bound, and is trained on until then, also if no row is known any more.
        progress: show bars and log what is done.
        unit: select whole units, see :class:`~wagle_pl.AttributionModule`; rows save computation.
        **data: options of :class:`~wagle_pl.ForgetRetainDataModule`, such as ``prompt_format``.

    Raises:
        WagleError: if an argument is wrong, or a retain row was forgotten by an earlier request.
    """
    _check_options(data)
    rows = {"forget": rows_of(forget, "forget")}
    for name, source in (("retain", retain), ("earlier", earlier)):
        if source is not None:
            rows[name] = rows_of(source, name)
    for name, (content, _) in rows.items():
        parse_rows(({"answer": "?", **r} if set(r) == {"question"} else r for r in content), name)
    count = len(rows["forget"].rows)
    check([*requests], list[tuple[list[bool], list[int]]], "requests")
    sizes = [sum(len(request[side]) for request in requests) for side in (0, 1)]
    if requests and sizes != [count, count]:
        raise WagleError(f"must add up to {count} forget rows, got {sizes}", "requests")
    chosen = None if objective is None else resolve(Objective, objective, "objective")
    settings = _Settings(density, chosen, score, lr, seed, max_steps, unit)
    failure: Optional[BaseException] = None
    with isolate_rng(), nullcontext() if progress else silence():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            return _Run(model, tokenizer, settings, data, progress).forget(rows, requests)
        except BaseException as error:  # raised below, since isolate_rng restores nothing after one
            failure = error
    raise failure


@dataclass
class _Settings:
    """Arguments of :func:`forget` about how to train."""

    density: Optional[float]
    objective: Optional[Objective]
    score: Union[Score, str, None]
    lr: Optional[float]
    seed: int
    max_steps: int
    unit: str

    def __post_init__(self) -> None:
        check_arguments(_Settings.__init__, vars(self), "")
        if self.density is not None:
            check_density(self.density)
        if self.lr is not None:
            check_positive(self.lr, "lr")
        for name, least in (("seed", 0), ("max_steps", 1)):
            if not least <= (value := getattr(self, name)) < 2**32:
                raise WagleError(f"must be from {least} to {2**32 - 1}, got {value}", name)
        self.doubles = self.lr is None
        if self.score is None:
            self.score = Curvature(power=1.0)

    def choose_objective(self, drop: float) -> Objective:
        """The objective, for rows whose log-probability must fall by ``drop`` on average.

        The gradient of NPO is 2σ(−βΔ) times that of gradient ascent once it has fallen by Δ.
        """
        if self.objective is None:
            self.objective = NPO(beta=5 / max(50.0, drop))
        return self.objective

    def describe(self) -> dict[str, Any]:
        """The settings as plain data."""
        score = self.score
        return {
            "density": self.density,
            "objective": describe(self.objective),
            "score": describe(score) if isinstance(score, Score) else score,
            "unit": self.unit,
            "lr": self.lr,
            "lr_doubles_every": StopWhenForgotten.PATIENCE if self.doubles else None,
            "seed": self.seed,
            "max_steps": self.max_steps,
            "stop": "the bound of the verdict, or max_steps",
        }


class _Run:
    """One call of :func:`forget`."""

    def __init__(
        self,
        model: Union[str, Path, PreTrainedModel],
        tokenizer: Optional[Union[str, Path, PreTrainedTokenizerBase]],
        settings: _Settings,
        data: Mapping[str, Any],
        progress: bool,
    ) -> None:
        check_arguments(_Run.__init__, locals(), "")
        if isinstance(model, PreTrainedModel):
            self.base, source = None, model.config.name_or_path
            if tokenizer is None and not source:
                raise WagleError("tokenizer: give one; this model has no name to load it from")
        else:
            self.base = source = str(model)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = load_tokenizer(str(tokenizer or source))
        if isinstance(model, PreTrainedModel):
            self.lm = model
        else:
            self.lm = load_model(source, checkpoint_dtype(source) or torch.float32)
        self.settings = settings
        if settings.lr is None:
            weights = self.lm.num_parameters()
            settings.lr = next(rate for limit, rate in LEARNING_RATES if weights < limit)
        self.record, self.history = HISTORY.get(self.lm) or (read_record(source), [])
        self.origin = Origin(self.lm)
        options = {"seed": settings.seed, **data}
        self.subject = Subject(self.lm, tokenizer, options, progress)

    def forget(self, rows: Mapping[str, GivenRows], requests: Sequence[Requested]) -> Forgotten:
        """Measure, train if the rows are known, measure again; on failure restore the model."""
        try:
            return self._forget(rows, requests)
        except BaseException:
            self.origin.restore()
            raise

    def _forget(self, rows: Mapping[str, GivenRows], requests: Sequence[Requested]) -> Forgotten:
        subject = self.subject.ready()
        forget_rows = subject.answered(rows["forget"].rows)
        examples = parse_rows(forget_rows, "forget")
        earlier, untested = self._earlier(rows.get("earlier"), examples)
        trained, held_out, origin = self._retain(rows.get("retain"), [*examples, *earlier])
        seed = self.settings.seed
        examination = Examination(subject, examples, held_out, earlier, seed, requests)
        shown_rows = range(min(SHOWN_ROWS, len(examples)))
        before, answers = examination.before, examination.forget.answers(shown_rows)
        mask, steps, record = None, 0, self.record
        after, answers_after, trains = before, answers, bool(requests) or was_known(before)
        if trains:
            others = restated(examination.forget.examples, examples)
            stream = subject.data(forget=[*forget_rows, *others], retain=trained)
            mask = self._mask(stream)
            module = self._unlearn(stream, mask, examination)
            self.origin.move_back()  # which rounds the weights: that model is the result
            subject.ready()
            after = examination.scores()
            answers_after = examination.forget.answers(shown_rows)
            steps, record = module.global_step, module.record()
        self.origin.move_back()
        used = len(trained) if trained == [example.row for example in held_out] else 0
        notes = _notes(examination.forget.without_unseen, used)
        if not trains:
            notes = f"{notes}{'. ' * bool(notes)}{_example(examples[0], answers[0])}"
        verdict = judge(before, after, untested, notes, examination.requests, examination.known)
        shown = zip(examples, answers, answers_after, strict=False)
        result = Forgotten(
            model=self.lm,
            tokenizer=subject.tokenizer,
            mask=mask,
            before=examination.measures(before, answers),
            after=examination.measures(after, answers_after),
            verdict=verdict.sentence,
            outcome=verdict.outcome,
            steps=steps,
            answers=[(e.question, e.answer, old, new) for e, old, new in shown],
            record=record,
            _base=self.base,
            _origin=self.origin,
        )
        origins = {"forget": rows["forget"].origin, "retain": origin}
        if steps:
            self._note_request(result, origins, examples)
        return result

    def _retain(
        self, source: Optional[GivenRows], forget: Sequence[Example]
    ) -> tuple[list[Row], list[Example], str]:
        """Rows to train on, rows held out of training, and where both come from."""
        rows = retain_questions(forget) if source is None else source.rows
        origin = f"{len(rows)} bundled questions" if source is None else source.origin
        answered = self.subject.answered(rows)
        if source is None:  # the model may say nothing
            answered = [row for row in answered if row["answer"]]
        examples = parse_rows(answered, "retain")
        Earlier(self.record).refuse(examples, "retain")
        forgotten = {row_digest(example, "") for example in forget}
        examples = [e for e in examples if row_digest(e, "") not in forgotten]
        examples = self._without_restatements(examples, forget)
        if not examples:
            raise WagleError("retain: every row says a forget row; give rows to keep")
        if len(examples) < FEW_ROWS:
            return [example.row for example in examples], examples, origin
        held_out = spread(examples, min(MOST_HELD_OUT, max(2, ceil(HELD_OUT * len(examples)))))
        apart = set(map(id, held_out))
        return [e.row for e in examples if id(e) not in apart], held_out, origin

    def _without_restatements(
        self, retain: list[Example], forget: Sequence[Example]
    ) -> list[Example]:
        """The retain rows without those that say a forget row in other words; training on them
        would undo the forgetting."""
        again, overlap = restating(retain, forget), self.subject.options.get("overlap", "drop")
        if not again:
            return retain
        shown = (again[0].question or again[0].answer)[:60]
        message = (
            f"retain: {len(again)} of {len(retain)} rows say a forget row in other words, "
            f"{shown!r} for one"
        )
        if overlap == "error":
            raise WagleError(f"{message}; remove them or pass overlap='drop'")
        if overlap == "warn":
            log.warning("%s; they may keep it known (overlap='drop' leaves them out)", message)
            return retain
        log.warning("%s; they are left out", message)
        return [example for example in retain if example not in again]

    def _earlier(
        self, source: Optional[GivenRows], forget: Sequence[Example]
    ) -> tuple[list[Example], int]:
        """Rows of earlier requests, and the number of those that cannot be tested again."""
        rows = self.subject.answered(source.rows) if source else []
        candidates = [*self.history, *(parse_rows(rows, "earlier") if rows else [])]
        return Earlier(self.record).rows(candidates, forget)

    def _mask(self, stream: ForgetRetainDataModule) -> Optional[WeightMask]:
        """The weights that may move; None for all."""
        density = self.settings.density
        if density is None:
            return None
        attribution = AttributionModule(
            self.lm, None, density, self.settings.score, unit=self.settings.unit
        )
        self.subject.fit(attribution, stream, enable_progress_bar=self.subject.progress)
        return attribution.mask

    def _unlearn(
        self, stream: ForgetRetainDataModule, mask: Optional[WeightMask], examination: Examination
    ) -> UnlearnModule:
        """Train until the bound is met; returns the module."""
        settings = self.settings
        if self.base is None:
            self.origin.keep(mask)
        objective = settings.choose_objective(examination.expected_drop())
        module = UnlearnModule(
            self.lm, objective=objective, mask=mask, lr=settings.lr, warmup=0, decay="constant"
        )
        stop = StopWhenForgotten(examination, settings.max_steps, settings.doubles)
        length = {"max_steps": settings.max_steps, "max_epochs": -1}
        self.subject.fit(module, stream, callbacks=[stop], enable_progress_bar=False, **length)
        return module

    def _note_request(
        self, result: Forgotten, origins: dict[str, str], examples: list[Example]
    ) -> None:
        """Write into the record what was asked for and what came of it."""
        run = result.record["lineage"][-1]
        result.record["lineage"] = [*self.record.get("lineage", []), run]
        run["data"] = origins
        run["request"] = {
            **self.settings.describe(),
            **origins,
            "row_digests": [row_digest(example, run["base_fingerprint"]) for example in examples],
            "outcome": result.outcome,
            "verdict": result.verdict,
            "before": result.before,
            "after": result.after,
        }
        HISTORY[self.lm] = (result.record, [*self.history, *examples])


def _notes(without_unseen: int, retain: int) -> str:
    """How the verdict was reached, where that is not as usual: some forget rows have no unseen
    counterpart, or ``retain`` rows that were tested were also trained on."""
    notes = []
    if without_unseen:
        notes.append(
            f"For {without_unseen} rows without names no row of the same form could be made: known if "
            "the model says the whole answer, like rows never seen at a tenth of the probability before"
        )
    if retain:
        notes.append(
            f"The {retain} retain rows were also trained on: what else was lost is not measured"
        )
    return ". ".join(notes)


def _example(example: Example, answer: str) -> str:
    """What the model says, so that a user sees why a row counts as unknown."""
    if example.kind == "text":
        return f"Continuing the first text, the model says {answer[:60]!r}"
    return f"Asked {example.question[:60]!r}, the model says {answer[:60]!r}"


def _check_options(data: Mapping[str, Any]) -> None:
    """Refuse a call without gradients, and options that are none of the data module's."""
    if torch.is_inference_mode_enabled():
        raise WagleError("forget: needs gradients; call it outside torch.inference_mode()")
    options = option_names(ForgetRetainDataModule)
    for name in data:
        if name not in options:
            others = ["density", "objective", "score", "unit", "max_steps", "tokenizer"]
            hint = did_you_mean(name, [*options, *others])
            raise WagleError(f"{name}: is no option of forget", hint=hint)
