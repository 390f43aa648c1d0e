"""Generate answers in batches: the same text as one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from wagle_pl.lm.likelihood import sequence_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    synced_gpus: bool = False,
    **sampling: Any,
) -> list[str]:
    """Continuations of prompts as text, greedy unless ``sampling`` says otherwise.

    Of the model's own generation config only the tokens that end a text count, beside the
    tokenizer's: a chat model may end its turn with another token than a text, and its penalties or
    its sampling are not what is measured.

    Args:
        lm: a Hugging Face causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: longest continuation.
        synced_gpus: whether each forward pass is a collective (ZeRO-3): then all ranks generate at
            the same time, and none is done before all are. Otherwise a rank may generate alone.
        sampling: options of ``GenerationConfig``, such as ``do_sample=True, temperature=0.8``; with
            ``num_return_sequences=n`` each prompt has n texts, one after the other.

    Returns:
        Texts without special tokens and without white space at their ends; one may be empty.
    """
    from transformers import GenerationConfig

    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id or 0
    device = next(lm.parameters()).device
    rows = [torch.tensor(list(prompt)) for prompt in prompts]
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = padded(rows, padding_value=pad_id).to(device)
    attention = padded([torch.ones_like(row) for row in rows]).to(device)
    config = GenerationConfig(
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(lm, tokenizer) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    with _without_defaults(lm):
        texts = lm.generate(
            input_ids=ids,
            attention_mask=attention,
            generation_config=config,
            synced_gpus=synced_gpus,
        )
    new = texts[:, ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new.cpu(), skip_special_tokens=True)]


def stop_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a generation, by the model's generation config and the tokenizer."""
    own = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, (list, tuple)) else [own]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None})


@contextmanager
def _without_defaults(lm: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation config, which fills in what a given config leaves at None."""
    from transformers import GenerationConfig

    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """The first ``count`` tokens of a text: what a generation of that length can match."""
    ids = tokenizer(text)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[:count], skip_special_tokens=True)


def gradient_norm(lm: PreTrainedModel, ids: Sequence[int], labels: Sequence[int]) -> float:
    """Mean over parameters of the L2 norm of the gradient of a text's loss (arXiv 2402.17012).

    As OpenUnlearning's ``mia_gradnorm`` with p = 2. Works inside ``torch.inference_mode``.

    Args:
        lm: a model that is whole on this device.
        ids: tokens of the text.
        labels: the same where the loss is, -100 elsewhere.
    """
    device = next(lm.parameters()).device
    parameters = [parameter for parameter in lm.parameters() if parameter.is_floating_point()]
    wanted = [parameter.requires_grad for parameter in parameters]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            tokens = torch.tensor([list(ids)], device=device)
            sums, counts = sequence_logprobs(
                lm(input_ids=tokens, use_cache=False).logits,
                torch.tensor([list(labels)]).to(device),
            )
            gradients = torch.autograd.grad(-(sums / counts).sum(), parameters, allow_unused=True)
        finally:
            for parameter, want in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(want)
        norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
        return torch.stack(norms).mean().item()
