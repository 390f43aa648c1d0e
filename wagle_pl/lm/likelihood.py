"""Log-probabilities of labelled tokens: what objectives minimise and metrics report."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


IGNORE = -100  #: the label where there is nothing to predict, as torch's ``cross_entropy`` has it


def token_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every labelled token, in fp32.

    Args:
        logits: (B, T, V); position t predicts token t + 1.
        labels: (B, T) token ids, -100 where there is nothing to predict.

    Returns:
        ``(logprobs, mask)``, both (B, T - 1): log p(label at t + 1), 0 where ``mask`` is False.

    >>> import torch
    >>> logits = torch.zeros(1, 3, 4)
    >>> logprobs, mask = token_logprobs(logits, torch.tensor([[-100, 2, 1]]))
    >>> logprobs.exp(), mask
    (tensor([[0.2500, 0.2500]]), tensor([[True, True]]))
    """
    # the labels move, not the logits: a shifted or indexed view of those would be copied, forward
    # and backward
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -losses.view(targets.shape)[:, :-1], targets[:, :-1] != IGNORE


def sequence_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) summed log-probability of each row's labelled tokens, and (B,) their number."""
    logprobs, mask = token_logprobs(logits, labels)
    return logprobs.sum(-1), mask.sum(-1)


def forward_answers(
    model: PreTrainedModel, batch: Mapping[str, Tensor], whole: bool = False, **options: Any
) -> tuple[Any, Tensor]:
    """Run a model on a batch, with logits from the first position that predicts a label on.

    The vocabulary projection of prompt tokens is never needed; on short answers it is a large part
    of the work.

    Args:
        model: a Hugging Face causal language model.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T).
        whole: logits of all positions after all.
        options: for the model's forward, such as ``output_hidden_states=True``.

    Returns:
        ``(output, labels)``: the model's output and the labels that go with its logits, (B, T')
        with T' ≤ T.
    """
    labels = batch["labels"]
    first = int((labels != IGNORE).any(0).int().argmax())
    start = max(first - 1, 0)
    if _keeps_logits(type(model)) and not whole:
        options["logits_to_keep"] = labels.shape[1] - start
    else:
        start = 0
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        **options,
    )
    return output, labels[:, start:]


@cache
def _keeps_logits(model_class: type) -> bool:
    return "logits_to_keep" in signature(model_class.forward).parameters
