"""What θ₀ says, for objectives that compare with it.

Three ways, the cheapest first:

* *sums*: one log-probability a row (NPO, DPO): constants, computed once before the first step, so
  that no second model is kept;
* *top k*: see :mod:`wagle_pl.objectives.top_k` (KL, UNDIAL with ``reference_logits: top_k``),
  likewise computed once;
* *a frozen copy* (whole predictions, and hidden states): one more forward pass a step through the
  model with the values that its selected weights had at first
  (:meth:`wagle_pl.masks.selected.SelectedWeights.at_theta0`).

Sums and top k are kept in files named by what they depend on: model, tokens, precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.lm.layers import capture
from wagle_pl.lm.likelihood import IGNORE, forward_answers, sequence_logprobs
from wagle_pl.objectives.top_k import TopK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from wagle_pl.lm.module import LanguageModule, StreamData


FORMAT = "wagle_pl.reference"


@torch.no_grad()
def predictions_of(
    lm: PreTrainedModel, tensors: Mapping[str, Tensor], layers: Collection[int], whole: bool = False
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """What a model says of one stream's tensors.

    Returns:
        Logits (of all positions if ``whole``), their labels, and outputs of the blocks ``layers``.
    """
    with capture(lm, layers) as hidden:
        output, labels = forward_answers(lm, tensors, whole=whole)
    return output.logits, labels, hidden


def _pass(
    module: LanguageModule, data: StreamData, stream: str
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(rows, logits, labels) of this rank's batches of a stream, without dropout.

    Every row is some rank's, and a few may be two ranks'.
    """
    training = module.lm.training
    module.lm.eval()
    with torch.no_grad(), module.trainer.precision_plugin.forward_context():
        for batch in data.stream_loader(stream, shared=True):
            tensors = {k: v.to(module.device) for k, v in batch[stream].items()}
            output, labels = forward_answers(module.lm, tensors)
            yield tensors["row"].tolist(), output.logits, labels
    module.lm.train(training)


def compute_reference(module: LanguageModule, data: StreamData, stream: str) -> Tensor:
    """(rows,) float32: summed answer log-probability of each row under the current weights.

    Args:
        module: a :class:`~wagle_pl.lm.module.LanguageModule` with a trainer.
        data: gives the rows: :meth:`wagle_pl.data.ForgetRetainDataModule.stream_loader`.
        stream: which.
    """
    values: dict[int, float] = {}
    for rows, logits, labels in _pass(module, data, stream):
        values.update(zip(rows, sequence_logprobs(logits, labels)[0].tolist(), strict=True))
    values = dict(distributed.all_gather(values.items()))
    return torch.tensor([values[row] for row in range(len(values))])


def compute_top_k(module: LanguageModule, data: StreamData, stream: str, k: int) -> TopK:
    """Top-k predictions of every answer token under the current weights, on the CPU."""
    found: dict[int, TopK] = {}
    for rows, logits, labels in _pass(module, data, stream):
        mask = labels[:, 1:] != IGNORE
        batch = TopK.of(logits[:, :-1][mask], labels[:, 1:][mask], mask.sum(-1), k)
        batch = batch.to(torch.device("cpu"))
        found.update({row: batch.rows(torch.tensor([i])) for i, row in enumerate(rows)})
    found = dict(distributed.all_gather(found.items()))
    return TopK.cat([found[row] for row in range(len(found))])


def reference_key(
    fingerprint: str, data: StreamData, stream: str, precision: str, kind: str
) -> tuple[str, int]:
    """What the predictions of a stream at θ₀ depend on, as one name; and the number of rows."""
    tokens: dict[int, str] = {}
    for batch in data.stream_loader(stream):
        columns = (batch[stream][c] for c in ("row", "input_ids", "labels", "attention_mask"))
        for row, ids, labels, mask in zip(*columns, strict=True):
            tokens[int(row)] = json.dumps([ids[mask > 0].tolist(), labels[mask > 0].tolist()])
    digest = hashlib.sha256(f"{fingerprint} {stream} {precision} {kind}".encode())
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
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
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
    """Sums and top k of a run, made or found before its first step and kept in its checkpoints.

    Attributes:
        sums: stream -> (rows,) summed log-probabilities at θ₀.
        top_k: stream -> top-k predictions at θ₀.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.top_k: dict[str, TopK] = {}
        self._stored: dict[str, dict[str, Any]] = {}
        self._resumed = False

    def prepare(
        self,
        module: LanguageModule,
        data: StreamData,
        folder: Path,
        sums: Collection[str],
        top_k: Collection[str],
        k: int,
    ) -> None:
        """Make everything ready.

        Args:
            module, data: see :func:`compute_reference`.
            folder: where the files are.
            sums: streams whose sums are needed.
            top_k: streams whose top k are needed.
            k: how many tokens.

        Raises:
            WagleError: if a checkpoint's are of other data, or it has none and θ₀ is gone.
        """

        def sums_of(stream: str) -> dict[str, Tensor]:
            return {"logprobs": compute_reference(module, data, stream)}

        def top_k_of(stream: str) -> dict[str, Tensor]:
            return compute_top_k(module, data, stream, k)._asdict()

        for stream in sums:
            found = self._get(module, data, folder, stream, "sum", sums_of)
            self.sums[stream] = found["logprobs"]
        for stream in top_k:
            self.top_k[stream] = TopK(
                **self._get(module, data, folder, stream, f"top {k}", top_k_of)
            )

    def _get(
        self,
        module: LanguageModule,
        data: StreamData,
        folder: Path,
        stream: str,
        kind: str,
        compute: Callable[[str], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Tensors of the checkpoint, of a file, or computed now."""
        precision = str(module.trainer.precision)
        key, rows = reference_key(module.model_fingerprint, data, stream, precision, kind)
        name = f"{stream} {kind}"
        if name in self._stored:
            if self._stored[name]["key"] != key:
                raise WagleError(
                    f"the checkpoint's reference probabilities of the {stream} rows are of other "
                    "data, another model or precision: resume with what the run began with"
                )
            return self._stored[name]["tensors"]
        path = folder / f"{key}.safetensors"
        tensors = distributed.on_rank_zero(lambda: load_reference(path, key, rows))
        if tensors is None:
            if self._resumed:
                raise WagleError(
                    f"the checkpoint has no reference log-probabilities of the {stream} rows, and "
                    "the model has moved since: start the run anew"
                )
            tensors = compute(stream)
            if distributed.rank() == 0:
                save_reference(path, key, rows, tensors)
        self._stored[name] = {"key": key, "tensors": tensors}
        return tensors

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """What was used, by stream and kind; with it a resumed run needs no θ₀."""
        return self._stored

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Take what a checkpoint kept; from now on nothing is computed: the weights have moved."""
        self._stored = dict(state)
        self._resumed = True
