"""Log-probabilities at θ₀, computed once: constants, so no second model is kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from wagle_pl.evaluation.likelihood import forward_answers, sequence_logprobs
from wagle_pl.utilities import WagleError, atomic_path


def reference_key(model_fingerprint: str, tokens: Any, stream: str, precision: str) -> str:
    """What the log-probabilities of a stream depend on, as one name."""
    digest = hashlib.sha256(f"{model_fingerprint} {stream} {precision}".encode())
    for row in tokens:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()[:32]


@torch.no_grad()
def compute_reference(module: Any, stream: str) -> Tensor:
    """Summed answer log-probability of every row of a stream under the module's current weights.

    Args:
        module: a LightningModule with ``lm``, attached to a trainer with a data module.
        stream: a stream of the data module.

    Returns:
        (rows,) float32, on the CPU, in row order.
    """
    data = module.trainer.datamodule
    training = module.lm.training
    module.lm.eval()
    values: dict[int, float] = {}
    with module.trainer.precision_plugin.forward_context():
        for batch in data.stream_loader(stream):
            tensors = {k: v.to(module.device) for k, v in batch[stream].items()}
            output, labels = forward_answers(module.lm, tensors)
            sums, _ = sequence_logprobs(output.logits, labels)
            values.update(zip(tensors["row"].tolist(), sums.tolist(), strict=True))
    module.lm.train(training)
    return torch.tensor([values[row] for row in range(len(values))])


def load_reference(path: Path, key: str, rows: int) -> Tensor | None:
    """The log-probabilities stored under ``key``; None if there are none.

    Raises:
        WagleError: if the file is not what its name says.
    """
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        logprobs = file.get_tensor("logprobs")
    if metadata.get("key") != key or len(logprobs) != rows:
        raise WagleError(f"reference cache {path} is of other data or another model; delete it")
    return logprobs


def save_reference(path: Path, key: str, logprobs: Tensor) -> None:
    """Store log-probabilities under ``key``, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({"logprobs": logprobs}, temporary, metadata={"format": "wagle_pl.reference", "key": key})
