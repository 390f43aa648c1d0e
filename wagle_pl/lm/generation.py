"""Generate answers in batches: the same text as one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from wagle_pl.data.batches import collate
from wagle_pl.lm.likelihood import sequence_logprobs


def generate(
    lm: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    meets: bool = False,
    **sampling: Any,
) -> list[str]:
    """Continuations of prompts as text, greedy unless ``sampling`` says otherwise.

    Of the model's own generation config only the tokens that end a text count, beside the tokenizer's: a chat model may
    end its turn with another token than a text, and its penalties or its sampling are not what is measured.

    Args:
        lm: a Hugging Face causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        max_new_tokens: longest continuation.
        meets: whether each of the model's passes is a meeting of all ranks (ZeRO-3): then all generate at the same
            time, and none is done before all are. Otherwise a rank may generate while others do not.
        sampling: options of ``GenerationConfig``, such as ``do_sample=True, temperature=0.8``; with
            ``num_return_sequences=n`` each prompt has n texts, one after the other.

    Returns:
        Texts without special tokens and without white space at their ends; one may be empty.
    """
    from transformers import GenerationConfig

    pad_id = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    batch = collate([{"input_ids": list(prompt)} for prompt in prompts], pad_id, left=True)
    device = next(lm.parameters()).device
    config = GenerationConfig(
        **{"do_sample": False, **sampling},
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_tokens(lm, tokenizer) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    with _without_defaults(lm):
        ids = lm.generate(
            **{name: tensor.to(device) for name, tensor in batch.items()},
            generation_config=config,
            synced_gpus=meets,
        )
    new = ids[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new.cpu(), skip_special_tokens=True)]


def stop_tokens(lm: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a generation: those that the model's generation config lists, and the tokenizer's."""
    own = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, (list, tuple)) else [own]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None})


@contextmanager
def _without_defaults(lm: Any) -> Iterator[None]:
    """Hide the model's generation config: ``generate`` takes from it whatever a config given leaves at None."""
    from transformers import GenerationConfig

    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own


def first_tokens(tokenizer: Any, text: str, count: int) -> str:
    """The beginning of a text, at most ``count`` tokens of it: what a generation of that length can match."""
    ids = tokenizer(text)["input_ids"]
    return text if len(ids) <= count else tokenizer.decode(ids[:count], skip_special_tokens=True)


def gradient_norm(lm: Any, ids: Sequence[int], labels: Sequence[int]) -> float:
    """Mean over parameters of the L2 norm of the gradient of one text's mean token loss (arXiv 2402.17012).

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
