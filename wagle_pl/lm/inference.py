"""What a language model says: predictions, log-probabilities of given tokens, generated text.

With a vocabulary of 128k, the logits of a whole batch would be the largest activation of all. A
forward pass therefore keeps only the hidden states of the places that matter. The output head turns
them into logits one chunk at a time (:func:`in_chunks`), and again in the backward pass; the result
is the same as with a single chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Optional, Union
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Maximum number of logits in a chunk: 128 MiB in fp32. A single chunk is not computed twice.
CHUNK = 1 << 25

#: Models that change the logits after the head: soft caps (Gemma), a scale (Granite, Cohere).
_BEYOND_THE_HEAD: WeakSet[nn.Module] = WeakSet()


@dataclass(eq=False)
class Predictions:
    """Predictions of the next token at N places: hidden states, and the head that reads them."""

    states: Tensor  # (N, d) hidden states; (N, V) logits if there is no head
    head: Optional[nn.Linear] = None  # makes logits, in the dtype it computes with
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # in which the head must run
    _logits: Optional[Tensor] = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def vocabulary(self) -> int:
        """Size V of the vocabulary."""
        return self.states.shape[-1] if self.head is None else self.head.out_features

    @property
    def at_once(self) -> int:
        """Number of places in a chunk."""
        return max(1, CHUNK // self.vocabulary)

    def at(self, places: Tensor) -> Predictions:
        """The predictions at some of the N places, by index."""
        part = replace(self, states=self.states.index_select(0, places))
        if self._logits is not None:
            part._logits = self._logits.index_select(0, places)
        return part

    def logits_of(self, states: Tensor) -> Tensor:
        """(n, V) logits of some of the states, in the dtype of the model."""
        if self.head is None:
            return states
        with self.context():
            return self.head(states)

    def logits(self) -> Tensor:
        """(N, V) logits in fp32, all at once; if they fit into a chunk, made once per graph."""
        logits = self.logits_of(self.states) if self._logits is None else self._logits
        if torch.is_grad_enabled() and len(self) <= self.at_once:
            self._logits = logits
        return logits.float()


def in_chunks(function: Callable[..., Any], *arguments: Union[Predictions, Tensor]) -> Any:
    """Apply a function to (N, V) logits, without having all of them in memory at once.

    Args:
        function: gets (n, V) logits in fp32 for every ``Predictions``, and (n, ...) rows of every
            tensor, n ≤ N; returns an (n, ...) tensor, or a tuple of them.
        arguments: ``Predictions`` first; all of the same N places.

    Returns:
        An (N, ...) tensor, or a tuple of them.
    """
    first = arguments[0]
    if len(first) <= first.at_once:
        return function(*(a.logits() if isinstance(a, Predictions) else a for a in arguments))

    def of_chunk(*rows: Tensor) -> Tensor:
        pairs = zip(arguments, rows, strict=True)
        return function(
            *(a.logits_of(r).float() if isinstance(a, Predictions) else r for a, r in pairs)
        )

    columns = [a.states if isinstance(a, Predictions) else a for a in arguments]
    chunks = zip(*(column.split(first.at_once) for column in columns), strict=True)
    run = partial(checkpoint, of_chunk, use_reentrant=False)
    results = [(run if torch.is_grad_enabled() else of_chunk)(*chunk) for chunk in chunks]
    if isinstance(results[0], tuple):
        return tuple(map(torch.cat, zip(*results, strict=True)))
    return torch.cat(results)


def predict(
    model: PreTrainedModel, places: Tensor, apart: bool = True, **inputs: Any
) -> tuple[Any, Predictions]:
    """Run a model and return what it predicts at some places.

    If the head cannot run separately, it runs here, on these places only. This is the case if the
    model changes the logits after the head, or if its weights are sharded over ranks (ZeRO-3): each
    run of a layer is then a collective, and ranks have different numbers of chunks.

    Args:
        places: (N,) indices into the flattened (B, T) tokens.
        apart: False always runs the head here, which guarantees a single forward pass.

    Returns:
        ``(output, predictions)``; the output's logits are not those of the tokens.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # a layer that knows its number of logits, and is not sharded
    alone = hasattr(head, "out_features") and not any(
        hasattr(p, "ds_id") for p in head.parameters()
    )
    apart = apart and alone and model not in _BEYOND_THE_HEAD
    seen: dict[str, Tensor] = {}

    def shorten(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        seen["states"] = arguments[0].flatten(0, -2).index_select(0, places)
        return ((seen["states"][:1] if apart else seen["states"])[None], *arguments[1:])

    def keep(_module: nn.Module, _arguments: Any, logits: Tensor) -> None:
        seen["logits"] = logits

    with ExitStack() as hooks:
        if isinstance(head, nn.Module):
            hooks.enter_context(head.register_forward_pre_hook(shorten))
            hooks.enter_context(head.register_forward_hook(keep))
        output = model(**inputs)
    if not seen:  # the model has no separate head
        return output, Predictions(output.logits.flatten(0, -2).index_select(0, places))
    if not apart:
        return output, Predictions(output.logits[0])
    if len(places) and output.logits.data_ptr() != seen["logits"].data_ptr():
        _BEYOND_THE_HEAD.add(model)
        return predict(model, places, **inputs)
    return output, Predictions(seen["states"], head)


IGNORE = -100  #: the label where there is nothing to predict, as in torch's ``cross_entropy``


# -- log-probabilities -----------------------------------------------------------------------------


def answer_places(labels: Tensor) -> Tensor:
    """(N,) places in the flattened (B, T) tokens that predict a labelled token, row by row.

    >>> answer_places(torch.tensor([[-100, -100, 7, 9], [-100, 5, -100, -100]]))
    tensor([1, 2, 4])
    """
    return F.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero().view(-1)


def forward_answers(
    model: PreTrainedModel, batch: Mapping[str, Any], apart: bool = True
) -> Predictions:
    """Run a model and return its predictions of the labelled tokens.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T). If known, to spare a
            GPU from waiting: ``places``, of the predictions, by default the :func:`answer_places`;
            and ``padded``, whether a row has padding. To run without padding, the output of
            :func:`pack`.
        apart: see :func:`predict`.
    """
    if "packed_ids" in batch:
        several = len(batch["labels"]) > 1
        with _answered(
            "find_packed_sequence_indices",
            lambda at: (at.diff(prepend=at[:, :1] - 1) != 1).cumsum(-1) if several else None,
        ):
            return predict(model, batch["packed_places"], apart, **_packed_inputs(model, batch))[1]
    places = batch["places"] if "places" in batch else answer_places(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    padded = batch.get("padded")
    with nullcontext() if padded is None else _answered("fast_all", lambda _: not padded):
        return predict(model, places, apart, **inputs, use_cache=False)[1]


@contextmanager
def _answered(name: str, answer: Any, owner: Any = None) -> Iterator[None]:
    """Context in which a question that makes a GPU wait for the host is answered by what the host
    knows: a private function of transformers, by default about masks, which some versions lack."""
    from transformers import masking_utils

    owner = owner or masking_utils
    asks = vars(owner).get(name)
    if asks is not None:
        setattr(owner, name, answer)
    try:
        yield
    finally:
        if asks is not None:
            setattr(owner, name, asks)


def pack(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the rows of a batch that has ``places`` into a single row, for :func:`forward_answers`.

    In transformers, attention recognises the start of a row by its position ids, which restart at
    0, but only if there is neither a mask nor a cache. (Recurrent layers ignore them: see
    :func:`keeps_rows_apart`.)
    """
    real = batch["attention_mask"].flatten()
    kept, order = real.nonzero().view(-1), real.cumsum(0) - 1
    positions = (batch["attention_mask"].cumsum(-1) - 1).flatten()
    return {
        "packed_ids": batch["input_ids"].flatten()[kept][None],
        "packed_positions": positions[kept][None],
        "packed_places": order[batch["places"]],
        "packed_starts": F.pad(batch["attention_mask"].sum(-1).cumsum(0), (1, 0)).int(),
    }


def _packed_inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model's forward takes for packed rows."""
    inputs: dict[str, Any] = {"attention_mask": None, "use_cache": False}
    inputs |= {"input_ids": batch["packed_ids"], "position_ids": batch["packed_positions"]}
    if "flash" in (model.config._attn_implementation or ""):  # it would synchronise otherwise
        inputs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch["packed_starts"])
        inputs |= dict.fromkeys(("max_length_q", "max_length_k"), batch["labels"].shape[1])
    return inputs


@torch.no_grad()
def keeps_rows_apart(model: PreTrainedModel) -> bool:
    """Whether packed rows do not see each other: compares two when packed, padded and joined."""
    ids = torch.arange(24, device=model.device).view(2, 12)
    real = ids != 11  # the first row is one token short
    batch = {"input_ids": ids, "attention_mask": real.long(), "labels": ids.where(real, IGNORE)}
    batch["places"] = answer_places(batch["labels"])
    packed = pack(batch)
    joined = torch.arange(23, device=model.device)[None]
    seeing = {**packed, "packed_positions": joined, "packed_starts": packed["packed_starts"][::2]}
    targets = batch["labels"].flatten()[batch["places"] + 1]
    right, tried, wrong = (
        in_chunks(logprobs_of, forward_answers(model, batch | how), targets)[10:]  # the second row
        for how in ({}, packed, seeing)
    )
    return bool((tried - right).norm() <= 0.1 * (wrong - right).norm())


def logprobs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-probabilities of (N,) tokens, given (N, V) logits."""
    return -F.cross_entropy(logits, targets, reduction="none")


def sequence_logprobs(predicted: Predictions, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) summed log-probability of each row's labelled tokens, and (B,) their number.

    Args:
        predicted: at the :func:`answer_places` of the labels.
        labels: (B, T) token ids, -100 where there is nothing to predict.
    """
    mask = labels[:, 1:] != IGNORE
    values = in_chunks(logprobs_of, predicted, labels[:, 1:][mask])
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(-1), mask.sum(-1)


def gradient_norm(lm: PreTrainedModel, ids: Sequence[int], labels: Sequence[int]) -> Tensor:
    """Mean over parameters of the L2 norm of the gradient of a text's loss (arXiv 2402.17012).

    Same as OpenUnlearning's ``mia_gradnorm`` with p = 2. Works inside ``torch.inference_mode``.

    Args:
        lm: a model with all its weights on this device.
        ids: tokens of the text.
        labels: the same tokens where the loss is computed, -100 elsewhere.
    """
    parameters = [parameter for parameter in lm.parameters() if parameter.is_floating_point()]
    wanted = [parameter.requires_grad for parameter in parameters]
    with torch.inference_mode(False), torch.enable_grad():
        tokens, targets = torch.tensor([list(ids), list(labels)], device=lm.device).split(1)
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            predicted = forward_answers(lm, {**batch, "labels": targets})
            sums, counts = sequence_logprobs(predicted, targets)
            gradients = torch.autograd.grad(-(sums / counts).sum(), parameters, allow_unused=True)
        finally:
            for parameter, want in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(want)
        norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
        return torch.stack(norms).mean()


# -- generation ------------------------------------------------------------------------------------


def generate(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    synced_gpus: bool = False,
    stops: Sequence[str] = (),
    **sampling: Any,
) -> list[str]:
    """Continuations of prompts, greedy unless ``sampling`` says otherwise.

    The model's own generation config is ignored, because its penalties or sampling are not to be
    measured. Only its end-of-text tokens are used, in addition to the tokenizer's: a chat model may
    end its turn with a different token than a text.

    Args:
        synced_gpus: whether each forward pass is a collective (ZeRO-3): then all ranks generate at
            the same time, and none finishes before the others.
        stops: texts, at each of which a continuation is cut.
        sampling: options of ``GenerationConfig``, such as ``do_sample=True, temperature=0.8``; with
            ``num_return_sequences=n`` each prompt has n texts, one after the other.

    Returns:
        Texts without special tokens and without white space at their ends; one may be empty.
    """
    from transformers import GenerationConfig
    from transformers.generation import utils

    usual = lm.generation_config
    ends = usual.eos_token_id if usual is not None else None
    ends = {*(ends if isinstance(ends, (list, tuple)) else [ends]), tokenizer.eos_token_id}
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else tokenizer.eos_token_id or 0
    rows = [torch.tensor(list(prompt)) for prompt in prompts]
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = padded(rows, padding_value=pad).to(lm.device)
    config = GenerationConfig(
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends - {None}) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    lm.generation_config = GenerationConfig()  # otherwise it fills in what ``config`` leaves out
    # whether all texts have ended is read a token late, as transformers does on some devices
    check = getattr(utils, "DeferredStopCheck", object)
    late = staticmethod(lambda device, *_, **__: device.type != "cpu" and not synced_gpus)
    uneven = any(len(row) < ids.shape[1] for row in rows)
    try:
        padding = _answered("fast_all", lambda _: not uneven)
        with padding, _answered("is_supported", late, check):
            texts = lm.generate(
                input_ids=ids,
                attention_mask=padded([torch.ones_like(row) for row in rows]).to(lm.device),
                generation_config=config,
                synced_gpus=synced_gpus,
            )
    finally:
        lm.generation_config = usual
    new = texts[:, ids.shape[1] :].cpu()
    continuations = tokenizer.batch_decode(new, skip_special_tokens=True)
    for stop in stops:  # before white space goes: one that begins with a stop becomes empty
        continuations = [text.partition(stop)[0] for text in continuations]
    return [text.strip() for text in continuations]


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """The first ``count`` tokens of a text: what a generation of that length can match."""
    ids = tokenizer(text)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[:count], skip_special_tokens=True)
