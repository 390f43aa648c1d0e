"""A model and its tokenizer, as ``forget`` trains and measures them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import log
from statistics import fmean
from typing import Any, Optional

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wagle_pl.api.neighbours import halved, invented_neighbours, worded, words_of
from wagle_pl.api.verdict import (
    Asked,
    Scores,
    answer_recall,
    bound,
    clearest,
    each_has_gone,
    returned,
)
from wagle_pl.core.environment import half_precision_is_slow
from wagle_pl.core.weights import evaluating
from wagle_pl.data import ForgetRetainDataModule
from wagle_pl.data.batches import collate
from wagle_pl.data.example import IGNORE, Example, Row
from wagle_pl.data.template import check_ids
from wagle_pl.evaluation.functional import rouge
from wagle_pl.lm.inference import first_tokens, forward_answers, generate, sequence_logprobs
from wagle_pl.lm.models import vocabulary_size
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import place

BATCH = 32  # rows of a forward pass
GENERATED = 128  # prompts of a generation
ANSWER_TOKENS = 48
NEIGHBOURS = 4  # draws of invented names per row, of which the most probable counts
TENTH = 0.1  # of its probability before: the reference of a row without an unseen counterpart

#: What an earlier test said of a request: which rows were known, and :attr:`Questions.draws`.
Requested = tuple[Sequence[bool], Sequence[int]]

#: Share of the bound at which training ends: a later test, which sums in another order, agrees.
MARGIN = 0.99


@dataclass
class Subject:
    """A model with its tokenizer, as data modules, trainers and measures need them."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]  # of data modules
    progress: bool

    def __post_init__(self) -> None:
        self.template = self.data().template

    def ready(self) -> Subject:
        """The subject with its model on the GPU, if there is one, or in fp32 if a narrower type would
        be slow on this CPU."""
        if torch.cuda.is_available():
            self.lm.cuda()
        elif half_precision_is_slow() and self.lm.dtype in (torch.float16, torch.bfloat16):
            self.lm.float()
        return self

    def data(self, **sources: Any) -> ForgetRetainDataModule:
        """A data module of rows, for this model."""
        data = ForgetRetainDataModule(**{"overlap": "drop", **self.options, **sources})
        data.tokenizer = self.tokenizer
        return data

    def fit(self, module: L.LightningModule, data: ForgetRetainDataModule, **options: Any) -> None:
        """Fit a module on one device, in the model's own precision where that is fast."""
        fast = torch.cuda.is_available() or not half_precision_is_slow()
        trainer = L.Trainer(
            devices=1,
            precision="bf16-true" if fast and self.lm.dtype == torch.bfloat16 else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, data)

    @torch.no_grad()
    def probabilities(self, examples: Sequence[Example]) -> list[float]:
        """Geometric mean of the probabilities of each row's answer tokens."""
        tokens = [self.template.encode(example) for example in examples]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]["input_ids"]))
        probabilities = [0.0] * len(tokens)
        pad, vocabulary = self.tokenizer.pad_token_id or 0, vocabulary_size(self.lm)
        with evaluating(self.lm):
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                batch = collate([tokens[i] for i in chosen], pad)
                check_ids([int(batch["input_ids"].max())], vocabulary)
                batch = {name: tensor.to(self.lm.device) for name, tensor in batch.items()}
                sums, counts = sequence_logprobs(forward_answers(self.lm, batch), batch["labels"])
                for i, probability in zip(chosen, (sums / counts).exp().tolist(), strict=True):
                    probabilities[i] = probability
        return probabilities

    @torch.no_grad()
    def generate(self, examples: Sequence[Example]) -> list[str]:
        """The model's greedy answer to each row's prompt."""
        texts: list[str] = []
        with evaluating(self.lm):
            for start in range(0, len(examples), GENERATED):
                chosen = examples[start : start + GENERATED]
                prompts = [self.template.encode_prompt(example) for example in chosen]
                texts += generate(self.lm, self.tokenizer, prompts, ANSWER_TOKENS)
        return texts

    def answered(self, rows: Sequence[Row]) -> list[Row]:
        """The rows; those with only a question get the model's own answer."""
        asked = [i for i, row in enumerate(rows) if set(row) == {"question"}]
        prompts = [Example.of({"prompt": rows[i]["question"]}) for i in asked]
        texts = dict(zip(asked, self.generate(prompts), strict=True))
        return [{**r, "answer": texts[i]} if i in texts else r for i, r in enumerate(rows)]


class Questions:
    """Rows, the unseen counterpart of each, and a wording of both.

    Args:
        seed: of invented names.
        draws: the seed of each row's counterpart; by default, of four from ``seed`` on, the one whose
            counterpart this model gives the largest probability: the closest to what might be true.
        requests: number of rows of each request, if they are of several: a row without names takes
            the answer of another row of its request.
    """

    def __init__(
        self,
        subject: Subject,
        examples: Sequence[Example],
        seed: int,
        draws: Sequence[int] = (),
        requests: Sequence[int] = (),
    ) -> None:
        self.subject = subject
        #: The rows as they are asked: a text is its second half, given the first.
        self.examples = examples = [*map(self._halved, examples)]
        ends = [*accumulate(requests or [len(examples)])]
        parts = [examples[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        invented = {
            number: [row for part in parts for row in invented_neighbours(part, number)]
            for number in {*draws} or range(seed, seed + NEIGHBOURS)
        }
        self.draws = [*draws]
        if not draws:
            of_rows = [*zip(*invented.values(), strict=True)]
            rows = subject.probabilities([e for of_row in of_rows for e in of_row if e])
            probabilities = iter(rows)
            for of_row in of_rows:
                scored = [e and (next(probabilities), -n) for n, e in enumerate(of_row)]
                self.draws.append(seed - max(filter(None, scored), default=(0, 0))[1])
        #: The counterpart of each row; None if a row has none.
        self.unseen = [invented[draw][row] for row, draw in enumerate(self.draws)]
        self._before: dict[tuple[bool, bool], list[float]] = {}
        self._answers: dict[bool, dict[int, str]] = {}

    def _halved(self, example: Example) -> Example:
        """A text, as much of it as is trained, as two halves; another row as it is."""
        if example.kind != "text":
            return example
        limit = self.subject.template.max_length
        start = first_tokens(self.subject.tokenizer, example.answer, limit)
        partial = example.partial or len(start) < len(example.answer)
        return halved(replace(example, answer=start, partial=partial))

    @property
    def without_unseen(self) -> int:
        """Number of rows that have no unseen counterpart."""
        return self.unseen.count(None)

    def ask(self, reworded: bool) -> Asked:
        """Probabilities of all rows, in their own or in other words; nothing is generated.

        A row with a paraphrased answer is asked for both answers in other words, and the clearer counts.
        """
        self._answers[reworded] = {}  # those of the model as it was at the last call
        asked = self._ask(reworded)
        if reworded and any(example.paraphrased_answer for example in self.examples):
            asked = clearest(asked, self._ask(reworded, paraphrased=True))
        return asked

    def _ask(self, reworded: bool, paraphrased: bool = False) -> Asked:
        words = (reworded, paraphrased)
        pairs = [
            (worded(example, number, *words), unseen and worded(unseen, number, *words))
            for number, (example, unseen) in enumerate(zip(self.examples, self.unseen, strict=True))
        ]
        rows = self.subject.probabilities([example for example, _ in pairs])
        of_unseen = iter(self.subject.probabilities([unseen for _, unseen in pairs if unseen]))
        before = self._before.setdefault(words, rows)
        references = [
            TENTH * probability if unseen is None else next(of_unseen)
            for unseen, probability in zip(self.unseen, before, strict=True)
        ]
        return Asked(rows, references, [1.0] * len(rows))

    def answers(self, rows: Sequence[int], reworded: bool = False) -> list[str]:
        """The model's greedy answers to some rows, generated once after each :meth:`ask`."""
        answers = self._answers[reworded]
        missing = [i for i in rows if i not in answers]
        prompts = [worded(self.examples[i], i, reworded) for i in missing]
        answers.update(zip(missing, self.subject.generate(prompts), strict=True))
        return [answers[i] for i in rows]

    def recalled(self, asked: Asked, reworded: bool) -> Asked:
        """What :meth:`ask` returned, with the recall of rows whose probability is above the bound."""
        recalls = self._recalls(asked.known, reworded)
        return replace(asked, recall=[1.0 if recall is None else recall for recall in recalls])

    def still_answered(self, chosen: Sequence[bool]) -> list[bool]:
        """Which of the chosen rows' answers the model still says whole, whatever comes after."""
        return [
            recall == 1
            and not set(words_of(self._answer(example))) <= set(words_of(example.question))
            for example, recall in zip(self.examples, self._recalls(chosen, False), strict=True)
        ]

    def _recalls(self, chosen: Sequence[bool], reworded: bool) -> list[Optional[float]]:
        """Recall of the chosen rows' answers in what the model says; None for the others."""
        recalls: list[Optional[float]] = [None] * len(self.examples)
        rows = [i for i, take in enumerate(chosen) if take]
        for i, text in zip(rows, self.answers(rows, reworded), strict=True):
            forms = [worded(self.examples[i], i, reworded, form) for form in {False, reworded}]
            recalls[i] = max(self._recall(form, text, self.unseen[i] is None) for form in forms)
        return recalls

    def _recall(self, example: Example, text: str, is_without_unseen: bool) -> float:
        """Recall of a row's answer in what the model says. If nothing shows what a guess has, only
        the whole answer counts."""
        question, answer = example.question, self._answer(example)
        if not is_without_unseen:
            return answer_recall(question, answer, text)
        repeats = set(words_of(answer)) <= set(words_of(question))
        return float(answer_recall("" if repeats else question, answer, text) == 1)

    def _answer(self, example: Example) -> str:
        """As much of an answer as a generation can have."""
        return first_tokens(self.subject.tokenizer, example.answer, ANSWER_TOKENS)


class Examination:
    """What is measured of a model before and after: forget rows, retain rows, earlier requests."""

    def __init__(
        self,
        subject: Subject,
        forget: Sequence[Example],
        retain: Sequence[Example],
        earlier: Sequence[Example],
        seed: int,
        requests: Sequence[Requested] = (),
    ) -> None:
        self.subject, self.retain = subject, retain
        draws = [draw for _, of_rows in requests for draw in of_rows]
        #: Number of rows of each request.
        self.requests = [len(known) for known, _ in requests]
        self.forget = Questions(subject, forget, seed, draws, self.requests)
        self.earlier = Questions(subject, earlier, seed) if earlier else None
        self.before = self._scores()
        #: Which forget rows count as known: those that were at an earlier test, or else are now.
        self.known = [k for known, _ in requests for k in known] or self.before.known
        self.before = self._with_answers(self.before)

    def scores(self) -> Scores:
        """All measures of the model as it is now, after training."""
        return self._with_answers(self._scores())

    def _with_answers(self, scores: Scores) -> Scores:
        """The scores, with which of the rows known before the model answers."""
        still_answered = self.forget.still_answered(self.known)
        return replace(scores, still_answered=still_answered)

    def _scores(self) -> Scores:
        forget = self.forget
        scores = Scores(
            forget.recalled(forget.ask(reworded=False), reworded=False),
            forget.recalled(forget.ask(reworded=True), reworded=True),
            self.subject.probabilities(self.retain),
        )
        if (earlier := self.earlier) is None:
            return scores
        return replace(scores, earlier=earlier.recalled(earlier.ask(False), False))

    def has_forgotten(self) -> tuple[bool, float]:
        """Whether the forget rows meet the verdict's bound; and their mean probability.

        Answers are generated, and other words tried, only once the mean meets it: a generation takes
        many forward passes.
        """
        forget, known = self.forget, self.known
        direct = forget.ask(reworded=False)
        if not each_has_gone(direct, known, self.requests, MARGIN):
            return False, fmean(direct.rows)
        reworded = forget.ask(reworded=True)
        gone = (
            each_has_gone(reworded, known, self.requests, MARGIN)
            and not any(forget.recalled(direct, reworded=False).known)
            and not any(forget.recalled(reworded, reworded=True).known)
            and not any(forget.still_answered(known))
            and not self._earlier_returned()
        )
        return gone, fmean(direct.rows)

    def _earlier_returned(self) -> bool:
        """Whether a row of an earlier request, unknown before, is known now."""
        if (earlier := self.earlier) is None:
            return False
        return any(returned(self.before.earlier, earlier.recalled(earlier.ask(False), False)))

    def expected_drop(self) -> float:
        """By how much the log-probability of a known row must fall to meet the bound, on average."""
        before, drops = self.before.direct, []
        rows = zip(self.forget.examples, before.rows, before.unseen, self.known, strict=True)
        for example, probability, unseen, known in rows:
            labels = self.subject.template.encode(example)["labels"]
            tokens = sum(label != IGNORE for label in labels)
            drops += [max(0.0, tokens * log(probability / bound(unseen)))] if known else []
        return fmean(drops)

    def measures(self, scores: Scores, answers: Sequence[str]) -> dict[str, float]:
        """The means that :class:`~wagle_pl.api.Forgotten` shows."""
        truths = [example.answer for example in self.forget.examples[: len(answers)]]
        return {
            "forget_probability": fmean(scores.direct.rows),
            "unseen_probability": fmean(scores.direct.unseen),
            "reworded_probability": fmean(scores.reworded.rows),
            "retain_probability": fmean(scores.retain),
            "forget_rougeL": float(rouge(answers, truths)["rougeL_recall"].mean()),
        }


class StopWhenForgotten(L.Callback):
    """Ends training when the forget rows meet the verdict's bound; looks every few steps.

    Args:
        doubles: double the learning rate every :data:`PATIENCE` steps: the rate that fits depends on
            the model and on the rows, and one that is too low never meets the bound.
    """

    PATIENCE = 25

    def __init__(
        self, examination: Examination, max_steps: int, doubles: bool, every: int = 5
    ) -> None:
        from tqdm.auto import tqdm

        self.examination, self.doubles, self.every, self.gone = examination, doubles, every, False
        options = {"unit": "step", "disable": not examination.subject.progress}
        self.bar = tqdm(total=max_steps, desc="unlearning", **options)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.bar.update(trainer.global_step - self.bar.n)
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self.gone, probability = self.examination.has_forgotten()
            self.bar.set_postfix_str(f"forget probability {probability:.3g}")
            trainer.should_stop = self.gone
        if self.doubles and trainer.global_step % self.PATIENCE == 0 and not self.gone:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= 2
            for config in trainer.lr_scheduler_configs:
                config.scheduler.base_lrs = [2 * rate for rate in config.scheduler.base_lrs]

    def teardown(self, *_: Any, **__: Any) -> None:
        self.bar.close()

    on_exception = teardown


# -- the user's model ------------------------------------------------------------------------------


class Origin:
    """Where and of which dtypes a user's model was, and its weights; a run restores all else.

    Args:
        lm: the model, in which only the weights that :meth:`keep` copies may change.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm = lm
        self._places = {name: (t.device, t.dtype) for name, t in _tensors(lm).items()}
        self.weights: dict[str, Tensor] = {}
        self._mask: Optional[WeightMask] = None

    def keep(self, mask: Optional[WeightMask]) -> None:
        """Copy the weights that may move."""
        self._mask = mask
        for name, parameter in self.lm.named_parameters():
            weight = parameter.detach()
            chosen = weight.clone() if mask is None else weight[mask[name].to(weight.device)]
            self.weights[name] = chosen

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that may have moved, as they were."""
        mask, parameters = self._mask, dict(self.lm.named_parameters())
        return {
            name: place(
                parameters[name].detach().clone(), None if mask is None else mask[name], values
            )
            for name, values in self.weights.items()
        }

    def move_back(self) -> None:
        """Give the model its devices and dtypes back, which rounds its weights."""
        for name, tensor in _tensors(self.lm).items():
            tensor.data = tensor.data.to(*self._places[name])

    def restore(self) -> None:
        """Give the model back as it was, with the weights as they were at :meth:`keep`."""
        self.lm.load_state_dict(self.parameters(), strict=False)
        self.move_back()


def _tensors(lm: PreTrainedModel) -> dict[str, Tensor]:
    return {**dict(lm.named_parameters()), **dict(lm.named_buffers())}
