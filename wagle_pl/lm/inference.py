"""What a language model says: predictions, log-probabilities of given tokens, generated text.

The logits of a whole batch would, with a vocabulary of 128k, be the largest activation of all. So a
forward pass keeps the hidden states of the places that matter; the output head makes logits of some
of them at a time (:func:`in_chunks`), and again in the backward pass, exactly as if there were one
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
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

#: Logits of a chunk at most: 128 MiB of them in fp32. What fits into one is not computed twice.
CHUNK = 1 << 25

#: Models that do more to logits than their head: soft caps (Gemma), a scale (Granite, Cohere).
_BEYOND_THE_HEAD: WeakSet[nn.Module] = WeakSet()


@dataclass(eq=False)
class Predictions:
    """Predictions of the next token at N places: hidden states, and the head that reads them."""

    states: Tensor  # (N, d) hidden states; (N, V) logits if there is no head
    head: Optional[nn.Module] = None  # makes logits, in the dtype it computes with
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # in which it must run
    _logits: Optional[Tensor] = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.states.shape[-1] if self.head is None else self.head.out_features

    @property
    def at_once(self) -> int:
        """Number of places in a chunk."""
        return max(1, CHUNK // self.vocabulary)

    def at(self, places: Tensor) -> Predictions:
        """Those at some of the N places, by index."""
        found = replace(self, states=self.states.index_select(0, places))
        if self._logits is not None:
            found._logits = self._logits.index_select(0, places)
        return found

    def within(self, context: Callable[[], AbstractContextManager[Any]]) -> Predictions:
        """The same, with a head that must run in a context."""
        return replace(self, context=context)

    def logits_of(self, states: Tensor) -> Tensor:
        """(n, V) logits of some of the states, in the dtype of the model."""
        if self.head is None:
            return states
        with self.context():
            return self.head(states)

    def logits(self) -> Tensor:
        """(N, V) logits in fp32, all at once; those that fit into a chunk are made once a graph."""
        logits = self.logits_of(self.states) if self._logits is None else self._logits
        if torch.is_grad_enabled() and len(self) <= self.at_once:
            self._logits = logits
        return logits.float()


def in_chunks(function: Callable[..., Any], *arguments: Union[Predictions, Tensor]) -> Any:
    """``function`` of (N, V) logits, without these as a whole.

    Args:
        function: gets (n, V) logits in fp32 for every ``Predictions``, and (n, ...) rows of every
            tensor, n ≤ N; returns (n, ...), or a tuple of such.
        arguments: ``Predictions`` first; all of the same N places.

    Returns:
        (N, ...), or a tuple.
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
    found = [(run if torch.is_grad_enabled() else of_chunk)(*chunk) for chunk in chunks]
    if isinstance(found[0], tuple):
        return tuple(map(torch.cat, zip(*found, strict=True)))
    return torch.cat(found)


def predict(
    model: PreTrainedModel, places: Tensor, apart: bool = True, **inputs: Any
) -> tuple[Any, Predictions]:
    """Run a model, and find out what it predicts at some places.

    Where the head cannot run on its own it is run here, on these places alone: that of a model that
    does more to logits, or of one whose weights are spread over ranks (ZeRO-3), where each run of a
    layer is collective and ranks have different numbers of chunks.

    Args:
        places: (N,) indices into the (B, T) tokens, flattened.
        apart: False runs the head here in any case, which makes this one forward pass for certain.

    Returns:
        ``(output, predictions)``; the output's logits are not those of the tokens.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # a layer that says how many logits it makes, and is whole here
    alone = hasattr(head, "out_features") and not any(
        hasattr(p, "ds_id") for p in head.parameters()
    )
    apart = apart and alone and model not in _BEYOND_THE_HEAD
    seen: dict[str, Tensor] = {}

    def shorten(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        seen["states"] = given[0].flatten(0, -2).index_select(0, places)
        return ((seen["states"][:1] if apart else seen["states"])[None], *given[1:])

    def keep(_module: nn.Module, _given: Any, logits: Tensor) -> None:
        seen["logits"] = logits

    with ExitStack() as hooks:
        if isinstance(head, nn.Module):
            hooks.enter_context(head.register_forward_pre_hook(shorten))
            hooks.enter_context(head.register_forward_hook(keep))
        output = model(**inputs)
    if not seen:  # nothing of its own makes the logits
        return output, Predictions(output.logits.flatten(0, -2).index_select(0, places))
    if not apart:
        return output, Predictions(output.logits[0])
    if len(places) and output.logits.data_ptr() != seen["logits"].data_ptr():
        _BEYOND_THE_HEAD.add(model)
        return predict(model, places, **inputs)
    return output, Predictions(seen["states"], head)


IGNORE = -100  #: the label where there is nothing to predict, as torch's ``cross_entropy`` has it


# -- log-probabilities -----------------------------------------------------------------------------


def answer_places(labels: Tensor) -> Tensor:
    """(N,) places, in (B, T) tokens flattened, that predict one with a label; row after row.

    >>> answer_places(torch.tensor([[-100, -100, 7, 9], [-100, 5, -100, -100]]))
    tensor([1, 2, 4])
    """
    return F.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero().view(-1)


def forward_answers(
    model: PreTrainedModel, batch: Mapping[str, Tensor], whole: bool = False, apart: bool = True
) -> Predictions:
    """Run a model, and find out what it predicts where it should predict a label.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T); and their
            :func:`answer_places` as ``places``, if known: a GPU is waited for otherwise; and what
            :func:`pack` makes of them, to run without padding.
        whole: at all (B · T,) places after all.
        apart: see :func:`~wagle_pl.lm.inference.predict`.
    """
    places = batch.get("places")
    if "packed_ids" in batch and not whole:
        return predict(model, batch["packed_places"], apart, **_packed_inputs(model, batch))[1]
    if whole:
        places = torch.arange(batch["labels"].numel(), device=batch["labels"].device)
    elif places is None:
        places = answer_places(batch["labels"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return predict(model, places, apart, **inputs, use_cache=False)[1]


def pack(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a batch that has ``places``, one after the other in a single one, for
    :func:`forward_answers`.

    Positions that begin anew tell attention where a row begins, in transformers, but only where
    there is no attention mask and no cache. (A recurrent layer does not ask: see
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
    inputs = {"input_ids": batch["packed_ids"], "position_ids": batch["packed_positions"]}
    if "flash" in (model.config._attn_implementation or ""):  # which would ask the device
        ends = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch["packed_starts"])
        longest = batch["labels"].shape[1]
        inputs |= {**ends, **dict.fromkeys(("max_length_q", "max_length_k"), longest)}
    return {**inputs, "attention_mask": None, "use_cache": False}


@torch.no_grad()
def keeps_rows_apart(model: PreTrainedModel) -> bool:
    """Whether packed rows do not see each other: tried on two, beside padded ones and joined ones."""
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
    """(N,) log-probabilities of (N,) tokens by (N, V) logits."""
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


def gradient_norm(lm: PreTrainedModel, ids: Sequence[int], labels: Sequence[int]) -> float:
    """Mean over parameters of the L2 norm of the gradient of a text's loss (arXiv 2402.17012).

    As OpenUnlearning's ``mia_gradnorm`` with p = 2. Works inside ``torch.inference_mode``.

    Args:
        lm: a model that is whole on this device.
        ids: tokens of the text.
        labels: the same where the loss is, -100 elsewhere.
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
        return torch.stack(norms).mean().item()


# -- generation ------------------------------------------------------------------------------------


def generate(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    synced_gpus: bool = False,
    **sampling: Any,
) -> list[str]:
    """Continuations of prompts, greedy unless ``sampling`` says otherwise.

    Of the model's own generation config only the tokens that end a text count, beside the
    tokenizer's: a chat model may end its turn with another token than a text, and its penalties or
    its sampling are not what is measured.

    Args:
        synced_gpus: whether each forward pass is a collective (ZeRO-3): then all ranks generate at
            the same time, and none is done before all are.
        sampling: options of ``GenerationConfig``, such as ``do_sample=True, temperature=0.8``; with
            ``num_return_sequences=n`` each prompt has n texts, one after the other.

    Returns:
        Texts without special tokens and without white space at their ends; one may be empty.
    """
    from transformers import GenerationConfig

    own = lm.generation_config
    ends = own.eos_token_id if own is not None else None
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
    lm.generation_config = GenerationConfig()  # the model's fills in what a given one leaves out
    try:
        texts = lm.generate(
            input_ids=ids,
            attention_mask=padded([torch.ones_like(row) for row in rows]).to(lm.device),
            generation_config=config,
            synced_gpus=synced_gpus,
        )
    finally:
        lm.generation_config = own
    new = texts[:, ids.shape[1] :].cpu()
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """The first ``count`` tokens of a text: what a generation of that length can match."""
    ids = tokenizer(text)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[:count], skip_special_tokens=True)
