"""What θ₀ says, for objectives that compare with it.

Three ways, from the cheapest to the dearest:

* *sums*: one log-probability a row (NPO, DPO): constants, computed once before the first step, so that no second model
  is kept;
* *top k*: for each answer token the k most probable tokens, the true one always among them, and the probability of all
  others as one bucket (KL, UNDIAL with ``reference_logits: top_k``): 8·k + 4 bytes a token, computed once;
* *a frozen copy* (whole predictions, and hidden states): one more forward pass a step through the model with the values
  that its selected weights had at first (:meth:`wagle_pl.masks.selected.SelectedWeights.at_theta0`).

Sums and top k are kept in files named by what they depend on: model, tokens, precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.data.template import IGNORE
from wagle_pl.lm.hidden import capture
from wagle_pl.lm.likelihood import forward_answers, sequence_logprobs

FORMAT = "wagle_pl.reference"

Compute = Callable[[str], Mapping[str, Tensor]]  # a stream -> tensors to keep


class Buckets(NamedTuple):
    """Predictions of N answer tokens at θ₀ and now, over the same K buckets: single tokens, and perhaps all others.

    Attributes:
        reference: (N, K) log-probabilities at θ₀.
        current: (N, K) log-probabilities now.
        label: (N,) the bucket of the true token.
    """

    reference: Tensor
    current: Tensor
    label: Tensor


class TopK:
    """Predictions at θ₀ of the answer tokens of many rows: the k most probable tokens and the rest as one bucket.

    The true token is always among the k, first. A divergence KL(π₀ ‖ π) over the k + 1 buckets is a lower bound of the
    true one; what it misses is t₀ · KL of the two predictions *within* the rest, where t₀ is the probability of the
    rest at θ₀. (Chain rule of the divergence.)

    Args:
        ids: (N, k) int32 tokens; N the number of answer tokens, row after row.
        logprobs: (N, k) fp32, their log-probabilities.
        tail: (N,) fp32, log-probability of all other tokens together.
        offsets: (rows + 1,) int64, where each row begins.
    """

    def __init__(self, ids: Tensor, logprobs: Tensor, tail: Tensor, offsets: Tensor) -> None:
        self.ids = ids
        self.logprobs = logprobs
        self.tail = tail
        self.offsets = offsets

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, counts: Tensor, k: int) -> TopK:
        """The top k of (N, V) logits; ``targets`` (N,) are the true tokens, ``counts`` (rows,) says how many a row."""
        logprobs = logits.float().log_softmax(-1)
        k = min(k, logits.shape[-1] - 1)
        ids = logprobs.scatter(1, targets[:, None], 1.0).topk(k, -1).indices  # the true token first
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(ids.int(), logprobs.gather(1, ids), _outside(logprobs, ids), offsets)

    def rows(self, index: Tensor) -> TopK:
        """The predictions of some rows, in this order."""
        spans = [slice(self.offsets[i], self.offsets[i + 1]) for i in index.tolist()]
        counts = (self.offsets[1:] - self.offsets[:-1])[index.to(self.offsets.device)]
        parts = (
            torch.cat([tensor[span] for span in spans])
            for tensor in (self.ids, self.logprobs, self.tail)
        )
        return TopK(*parts, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def to(self, device: torch.device) -> TopK:
        """The same on a device."""
        return TopK(*(tensor.to(device) for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The arguments of :class:`TopK`, by name."""
        return {
            "ids": self.ids,
            "logprobs": self.logprobs,
            "tail": self.tail,
            "offsets": self.offsets,
        }

    def align(self, logits: Tensor) -> Buckets:
        """These predictions beside those of (N, V) logits."""
        logprobs, ids = logits.log_softmax(-1), self.ids.long()
        reference = torch.cat([self.logprobs, self.tail[:, None]], -1)
        current = torch.cat([logprobs.gather(1, ids), _outside(logprobs, ids)[:, None]], -1)
        return Buckets(
            reference, current, torch.zeros(len(ids), dtype=torch.long, device=logits.device)
        )


def _outside(logprobs: Tensor, ids: Tensor) -> Tensor:
    """(N,) log-probability of all tokens but ``ids``; no difference of nearly equal numbers is taken."""
    others = logprobs.scatter(1, ids, -torch.inf)
    none = (others == -torch.inf).all(-1)  # where logsumexp has no gradient
    return others.masked_fill(none[:, None], 0.0).logsumexp(-1).masked_fill(none, -torch.inf)


@torch.no_grad()
def predictions_of(
    lm: Any, tensors: Mapping[str, Tensor], layers: Collection[int], whole: bool = False
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Logits of a model (of all positions if ``whole``), their labels, and outputs of some blocks, of one stream."""
    with capture(lm, layers) as hidden:
        output, labels = forward_answers(lm, tensors, whole=whole)
    return output.logits, labels, hidden


# -- passes over a stream at θ₀ ---------------------------------------------------------------------------------------


def _pass(module: Any, stream: str) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(rows, logits, labels) of this rank's rows of a stream, under the module's current weights, without dropout.

    Every row is some rank's, and a few may be two ranks'.
    """
    training = module.lm.training
    module.lm.eval()
    with torch.no_grad(), module.trainer.precision_plugin.forward_context():
        for batch in module.trainer.datamodule.stream_loader(stream, shared=True):
            tensors = {k: v.to(module.device) for k, v in batch[stream].items()}
            output, labels = forward_answers(module.lm, tensors)
            yield tensors["row"].tolist(), output.logits, labels
    module.lm.train(training)


def compute_reference(module: Any, stream: str) -> Tensor:
    """Summed answer log-probability of every row of a stream under the module's current weights.

    Args:
        module: a LightningModule with ``lm``, attached to a trainer with a data module.
        stream: a stream of the data module.

    Returns:
        (rows,) float32, on the CPU, in row order.
    """
    values: dict[int, float] = {}
    for rows, logits, labels in _pass(module, stream):
        values.update(zip(rows, sequence_logprobs(logits, labels)[0].tolist(), strict=True))
    values = dict(distributed.all_gather(values.items()))
    return torch.tensor([values[row] for row in range(len(values))])


def compute_top_k(module: Any, stream: str, k: int) -> TopK:
    """Top-k predictions of every answer token of a stream under the module's current weights, on the CPU."""
    found: dict[int, TopK] = {}
    for rows, logits, labels in _pass(module, stream):
        mask = labels[:, 1:] != IGNORE
        batch = TopK.of(logits[:, :-1][mask], labels[:, 1:][mask], mask.sum(-1), k).to(
            torch.device("cpu")
        )
        found.update({row: batch.rows(torch.tensor([i])) for i, row in enumerate(rows)})
    found = dict(distributed.all_gather(found.items()))
    ordered = [found[row] for row in range(len(found))]
    counts = torch.tensor([len(row.tail) for row in ordered])
    parts = (
        torch.cat([getattr(row, name) for row in ordered]) for name in ("ids", "logprobs", "tail")
    )
    return TopK(*parts, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


# -- files ------------------------------------------------------------------------------------------------------------


def reference_key(
    model_fingerprint: str, data: Any, stream: str, precision: str, kind: str
) -> tuple[str, int]:
    """What the predictions of a stream at θ₀ depend on, as one name; and the number of rows."""
    tokens: dict[int, str] = {}
    for batch in data.stream_loader(stream):
        tensors = batch[stream]
        for row, ids, labels, mask in zip(
            tensors["row"].tolist(),
            tensors["input_ids"],
            tensors["labels"],
            tensors["attention_mask"],
            strict=True,
        ):
            tokens[row] = json.dumps([ids[mask > 0].tolist(), labels[mask > 0].tolist()])
    digest = hashlib.sha256(f"{model_fingerprint} {stream} {precision} {kind}".encode())
    for row in range(len(tokens)):
        digest.update(tokens[row].encode())
    return digest.hexdigest()[:32], len(tokens)


def load_reference(path: Path, key: str, rows: int) -> Optional[dict[str, Tensor]]:
    """The tensors stored under ``key``; None if there are none.

    Raises:
        WagleError: if the file is cut short, or not what its name says.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise WagleError(
            f"reference cache {path} is not a whole safetensors file ({error}); delete it"
        ) from None
    if metadata.get("key") != key or metadata.get("rows") != str(rows):
        raise WagleError(f"reference cache {path} is of other data or another model; delete it")
    return tensors


def save_reference(path: Path, key: str, rows: int, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors under ``key``, whole or not at all."""
    header = {"format": FORMAT, "format_version": "1", "key": key, "rows": str(rows)}
    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, metadata=header)


class References:
    """Sums and top k of a run, found or computed before its first step and kept in its checkpoints."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.top_k: dict[str, TopK] = {}
        self._stored: dict[str, dict[str, Any]] = {}
        self._resumed = False

    def prepare(
        self, module: Any, folder: Path, sums: Collection[str], top_k: Collection[str], k: int
    ) -> None:
        """Make everything ready.

        Args:
            module: a LightningModule with ``lm`` and ``model_fingerprint``, attached to a trainer with a data module.
            folder: where the files are.
            sums: streams whose sums are needed.
            top_k: streams whose top k are needed.
            k: how many tokens.

        Raises:
            WagleError: if a checkpoint's are of other data, or it has none and θ₀ is gone.
        """
        for stream in sums:
            tensors = self._get(
                module, folder, stream, "sum", lambda s: {"logprobs": compute_reference(module, s)}
            )
            self.sums[stream] = tensors["logprobs"]
        for stream in top_k:
            tensors = self._get(
                module, folder, stream, f"top {k}", lambda s: compute_top_k(module, s, k).tensors()
            )
            self.top_k[stream] = TopK(**tensors)

    def _get(
        self, module: Any, folder: Path, stream: str, kind: str, compute: Compute
    ) -> dict[str, Tensor]:
        """Tensors of the checkpoint, of a file, or computed now."""
        trainer = module.trainer
        key, rows = reference_key(
            module.model_fingerprint, trainer.datamodule, stream, str(trainer.precision), kind
        )
        name = f"{stream} {kind}"
        if name in self._stored:
            if self._stored[name]["key"] != key:
                raise WagleError(
                    f"the checkpoint's reference probabilities of the {stream} rows are of other data, "
                    "another model or precision: resume with what the run began with"
                )
            return self._stored[name]["tensors"]
        path = folder / f"{key}.safetensors"
        tensors = distributed.on_rank_zero(lambda: load_reference(path, key, rows))
        if tensors is None:
            if self._resumed:
                raise WagleError(
                    f"the checkpoint has no reference log-probabilities of the {stream} rows, and the "
                    "model has moved since: start the run anew"
                )
            tensors = compute(stream)
            if trainer.is_global_zero:
                save_reference(path, key, rows, tensors)
        self._stored[name] = {"key": key, "tensors": tensors}
        return tensors

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What was used, by stream and kind; with it a resumed run needs no θ₀."""
        return self._stored

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Take what a checkpoint kept; nothing is computed from now on, as the weights are no longer θ₀."""
        self._stored = dict(state)
        self._resumed = True
