"""``forget``: from a model and some rows to a model that has forgotten them, in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Optional, Union

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wagle_pl.attribution import AttributionModule, Score
from wagle_pl.attribution.scores import Curvature
from wagle_pl.core.environment import half_precision_is_slow, silence
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import write_text
from wagle_pl.core.html import templates
from wagle_pl.core.hub import load_tokenizer, upload
from wagle_pl.core.registry import resolve
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.data.example import Example, Row, parse_rows
from wagle_pl.data.people import invented_neighbours, retain_questions
from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation.functional import rouge
from wagle_pl.lm.inference import forward_answers, generate, sequence_logprobs
from wagle_pl.lm.models import checkpoint_dtype, load_model
from wagle_pl.lm.saving import Originals, save_model
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import place
from wagle_pl.objectives import Objective
from wagle_pl.unlearning import UnlearnModule
from wagle_pl.unlearning.export import model_card
from wagle_pl.unlearning.patch import make_patch

if TYPE_CHECKING:
    from datasets import Dataset

Rows = Union[str, Sequence[Union[str, Row]], "Dataset"]

#: Learning rates of AdamW on values of selected weights, by the number of weights of a model.
LEARNING_RATES = ((30e6, 1e-4), (500e6, 5e-5), (float("inf"), 2e-5))
CHECKED_ROWS = 64  # number of forget rows whose answers are generated
ANSWER_TOKENS = 48


@dataclass
class Forgotten:
    """What :func:`forget` returns.

    ``before`` and ``after`` are means over rows: ``forget_probability`` and ``retain_probability``
    (geometric mean of the probabilities of the answer's tokens), ``forget_rougeL`` (recall of the
    answer in a greedy generation) and ``unseen_probability`` (of rows like the forget rows, but
    about people and things that do not exist).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    mask: Optional[WeightMask]
    before: dict[str, float]
    after: dict[str, float]
    #: ``forgotten``, ``partly forgotten`` or ``model damaged``, with numbers.
    verdict: str
    steps: int
    #: (question, answer to forget, what the model said before, and after) of some forget rows.
    answers: list[tuple[str, str, str, str]] = field(repr=False)
    #: What made the model, as in the ``wagle.json`` of its folder.
    record: dict[str, Any] = field(repr=False)
    #: The model before: its name, or the values of the weights that could move.
    _before: Union[str, dict[str, torch.Tensor]] = field(repr=False)

    def save(self, folder: Union[str, Path]) -> Path:
        """Write the model, its tokenizer, a model card and ``wagle.json`` into a new folder."""
        originals = Originals(self._before) if isinstance(self._before, str) else None
        card = model_card(self.record)
        save_model(self.model, self.tokenizer, str(folder), card, self.record, originals)
        return Path(folder)

    def report(self, path: Union[str, Path]) -> Path:
        """Write an HTML page: the verdict, the measures, and what the model answers."""
        title = f"Unlearning of {self.record['lineage'][-1]['base']}"
        write_text(
            Path(path),
            templates().get_template("forgotten.html.j2").render(title=title, result=self),
        )
        return Path(path)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what :meth:`save` writes, see :func:`wagle_pl.core.hub.upload`."""
        with tempfile.TemporaryDirectory() as folder:
            return upload(self.save(Path(folder) / "model"), repo_id, **options)

    def patch(self, path: Union[str, Path]) -> Path:
        """Write the difference from the model before, for ``wagle patch apply`` and ``revert``."""
        with tempfile.TemporaryDirectory() as folder:
            after = self.save(Path(folder) / "after")
            if isinstance(self._before, str):
                make_patch(self._before, after, path)
                return Path(path)
            own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            state = {
                name: place(weight, self.mask and self.mask[name], self._before[name])
                for name, weight in own.items()
            }
            self.model.load_state_dict(state, strict=False)
            before = str(Path(folder) / "before")
            save_model(self.model, self.tokenizer, before, "", {"lineage": []}, None)
            self.model.load_state_dict(own, strict=False)
            make_patch(before, after, path)
        return Path(path)


def forget(
    model: Union[str, PreTrainedModel],
    forget: Rows,
    retain: Optional[Rows] = None,
    density: Optional[float] = 0.2,
    tokenizer: Optional[PreTrainedTokenizerBase] = None,
    objective: Union[Objective, str] = "npo",
    score: Union[Score, str, None] = None,
    lr: Optional[float] = None,
    seed: int = 0,
    max_steps: int = 300,
    progress: bool = True,
    **data: Any,
) -> Forgotten:
    """Make a model forget rows and keep the rest; nothing is written.

    First, a mask selects the weights that matter for the forget rows. Then these weights are
    trained with the objective until the mean probability of the forget rows is at most that of rows
    which the model has never seen: the forget rows with invented names and numbers.

    Args:
        model: hub id, folder or GGUF file; or a loaded model, which is changed in place.
        forget: rows to forget: a file, a hub dataset, a ``datasets.Dataset``, or a list of
            questions and of dicts with the columns that :class:`~wagle_pl.ForgetRetainDataModule`
            knows. A question without an answer gets the model's own.
        retain: rows to keep, likewise. None takes the model's own answers to bundled questions on
            many subjects, without those that share a name or a rare word with a forget row.
        density: share of the weights that may move; None is dense unlearning, without a mask.
        tokenizer: the model's own when None.
        objective: see :class:`~wagle_pl.UnlearnModule`.
        score: see :class:`~wagle_pl.AttributionModule`; the paper's is ``wagle``. None takes
            ``Curvature`` with power 1, which forgets most for a given damage if all weights take
            steps of the same size, as with Adam.
        lr: of AdamW; chosen by the size of the model when None, see :data:`LEARNING_RATES`.
        seed: random seed.
        max_steps: step at which training ends if the probability is still too high.
        progress: show bars and log what is done.
        **data: options of :class:`~wagle_pl.ForgetRetainDataModule`, such as ``prompt_format``.
    """
    asked = _listed(forget, "forget")
    kept = None if retain is None else _listed(retain, "retain")
    with isolate_rng(), nullcontext() if progress else silence():
        L.seed_everything(seed, verbose=False)
        named = isinstance(model, str)
        lm = load_model(model, checkpoint_dtype(model) or torch.float32) if named else model
        if tokenizer is None:
            tokenizer = load_tokenizer(model if named else lm.config.name_or_path)
        score = Curvature(power=1.0) if score is None else score
        attribution = None if density is None else AttributionModule(lm, None, density, score)
        objective = resolve(Objective, objective, "objective")
        subject = _Subject(lm, tokenizer, {"seed": seed, **data}, progress)
        rows = subject.answered(asked)
        examples = parse_rows(rows, "forget")
        unseen = [example.row for example in invented_neighbours(examples, seed)]
        kept = subject.answered(retain_questions(examples) if kept is None else kept)
        kept = [row for row in kept if row.get("answer") != ""]  # the model may say nothing
        module_data = subject.data(forget=rows, retain=kept, holdout=unseen or None)
        before, said_before = subject.measure(module_data)
        if attribution is not None:
            subject.fit(attribution, module_data)
        mask = None if attribution is None else attribution.mask
        start = model if named else _moving(lm, mask)
        rate = lr or next(r for limit, r in LEARNING_RATES if lm.num_parameters() < limit)
        schedule = {"lr": rate, "warmup": 0, "decay": "constant"}
        module = UnlearnModule(lm, objective=objective, mask=mask, **schedule)
        bound = before.get("unseen_probability", 0.0)
        stop = StopAt(lambda: subject.probability(module_data, "forget"), bound)
        subject.fit(module, module_data, max_steps=max_steps, max_epochs=-1, callbacks=[stop])
        lm.to(subject.dtype)
        after, said_after = subject.measure(module_data)
        rows = module_data.examples("forget")[:CHECKED_ROWS]
        shown = zip(rows, said_before, said_after, strict=True)
        answers = [(row.question, row.answer, *said) for row, *said in shown]
        said, steps = verdict(before, after), module.global_step
        found = (lm, tokenizer, mask, before, after, said, steps, answers)
        return Forgotten(*found, module.record(), start)


def verdict(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """``forgotten``, ``partly forgotten`` or ``model damaged``, with the numbers that say so."""
    unseen = before.get("unseen_probability", 0.0)
    names = ("forget_probability", "retain_probability")
    forget, retain = ([side[name] for side in (before, after)] for name in names)
    word = "forgotten" if forget[1] <= 1.1 * unseen + 0.01 else "partly forgotten"
    word = "model damaged" if retain[1] < 0.8 * retain[0] else word
    return (
        f"{word}: the probability of the forget rows went from {forget[0]:.3g} to {forget[1]:.3g} "
        f"(rows never seen: {unseen:.3g}), that of the retain rows from {retain[0]:.3g} to "
        f"{retain[1]:.3g}"
    )


class StopAt(L.Callback):
    """Ends training when a measure is at most a bound; measures every few steps."""

    def __init__(self, measure: Callable[[], float], bound: float, every: int = 5) -> None:
        self.measure, self.bound, self.every = measure, bound, every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            trainer.should_stop = self.measure() <= self.bound


@dataclass
class _Subject:
    """A model with its tokenizer, as data modules, trainers and measures need them."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]  # of data modules
    progress: bool

    def __post_init__(self) -> None:
        self.dtype = self.lm.dtype
        if torch.cuda.is_available():
            self.lm.cuda()

    def data(self, **sources: Any) -> ForgetRetainDataModule:
        """A data module of rows, for this model."""
        data = ForgetRetainDataModule(**{"overlap": "drop", **self.options, **sources})
        data.tokenizer = self.tokenizer
        return data

    def fit(self, module: L.LightningModule, data: ForgetRetainDataModule, **options: Any) -> None:
        """Fit a module on one device, in the model's own precision where that is fast."""
        fast = torch.cuda.is_available() or not half_precision_is_slow()
        L.Trainer(
            devices=1,
            precision="bf16-true" if fast and self.dtype == torch.bfloat16 else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=self.progress,
            **options,
        ).fit(module, data)

    @torch.no_grad()
    def probability(self, data: ForgetRetainDataModule, stream: str) -> float:
        """Geometric mean of the probabilities of a row's tokens, averaged over a stream's rows."""
        training, found = self.lm.training, []
        self.lm.eval()
        for batch in data.stream_loader(stream):
            tensors = {name: t.to(self.lm.device) for name, t in batch[stream].items()}
            predicted = forward_answers(self.lm, tensors)
            sums, counts = sequence_logprobs(predicted, tensors["labels"])
            found += (sums / counts).exp().tolist()
        self.lm.train(training)
        return fmean(found)

    def measure(self, data: ForgetRetainDataModule) -> tuple[dict[str, float], list[str]]:
        """The measures of :class:`Forgotten`, and the model's answers to the first forget rows."""
        streams = {"forget": "forget", "retain": "retain", "holdout": "unseen"}
        found = {
            f"{name}_probability": self.probability(data, stream)
            for stream, name in streams.items()
            if data.examples(stream)
        }
        rows = data.examples("forget")[:CHECKED_ROWS]
        said = self.generate(rows)
        recall = rouge(said, [row.answer for row in rows])["rougeL_recall"]
        return found | {"forget_rougeL": float(recall.mean())}, said

    def answered(self, rows: Sequence[Row]) -> list[Row]:
        """The rows; those with only a question get the model's own answer."""
        asked = [i for i, row in enumerate(rows) if set(row) == {"question"}]
        prompts = [Example.of({"prompt": rows[i]["question"]}) for i in asked]
        texts = dict(zip(asked, self.generate(prompts), strict=True))
        return [{**r, "answer": texts[i]} if i in texts else r for i, r in enumerate(rows)]

    @torch.no_grad()
    def generate(self, examples: Sequence[Example]) -> list[str]:
        """The model's greedy answer to each row's prompt."""
        template, texts = self.data().template, []
        self.lm.eval()
        for start in range(0, len(examples), 128):
            prompts = [template.encode_prompt(e) for e in examples[start : start + 128]]
            texts += generate(self.lm, self.tokenizer, prompts, ANSWER_TOKENS)
        return texts


def _listed(source: Rows, name: str) -> list[Row]:
    """Rows as a list of dicts; a string becomes a row with only a question."""
    if isinstance(source, str):
        return load_rows(source)
    rows = [{"question": row} if isinstance(row, str) else row for row in source]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        kinds = "a file, a dataset or a list of questions and rows"
        raise WagleError(f"{name}: must be {kinds}, got {source!r:.80}")
    return [dict(row) for row in rows]


def _moving(lm: PreTrainedModel, mask: Optional[WeightMask]) -> dict[str, torch.Tensor]:
    """A copy of the weights that may move."""
    return {
        name: p.detach().clone() if mask is None else p.detach()[mask[name].to(p.device)]
        for name, p in lm.named_parameters()
    }
