"""Model folders: written whole or not at all, in the dtypes in which the weights were stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from wagle_pl.core import distributed
from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path
from wagle_pl.core.hub import CARD_FILE
from wagle_pl.core.reading import read_json
from wagle_pl.core.records import Record
from wagle_pl.core.tensorfiles import DTYPES, INDEX_FILE, TensorFiles, fill, lay_out
from wagle_pl.core.weights import persistent_buffers, shapes_of, share_of
from wagle_pl.lm.models import checkpoint_dtype, load_model, weights_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


RECORD_FILE = "wagle.json"  # how a folder was made: the model card in machine-readable form


def read_record(name: str) -> Record:
    """The record in a folder that this package wrote; one of no runs for any other model."""
    file = Path(name) / RECORD_FILE
    record = read_json(file, Record) if file.is_file() else {}
    return {"format_version": 1, **record, "lineage": record.get("lineage") or []}


class Originals:
    """The weights that a model was loaded from, in the dtypes they are stored in.

    Loading may round them, for example from float16 to bfloat16. Values that have not changed since
    are written as they were stored, so that frozen weights keep their bits in the file, too.

    Args:
        name: of the model, as :func:`~wagle_pl.lm.models.load_model` takes it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.default = checkpoint_dtype(name)  # for weights whose dtype the files do not state
        self._files: Optional[TensorFiles] = None
        with suppress(WagleError, OSError):  # its weights are in another format
            if (folder := weights_folder(name)) is not None:
                self._files = TensorFiles(folder)
        self.names = frozenset(() if self._files is None else self._files.names)

    def dtype(self, weight: str) -> Optional[torch.dtype]:
        """The dtype a weight is stored in; the model's if its files lack a weight of this name."""
        name = self._files.dtype(weight) if weight in self.names else ""
        stored = next((dtype for dtype, known in DTYPES.items() if known == name), None)
        return stored if stored is not None and stored.is_floating_point else self.default

    @torch.no_grad()
    def restore(self, weight: str, values: Tensor, start: Optional[int] = None) -> Tensor:
        """A weight's values as they are to be stored.

        Args:
            values: of any floating-point dtype; others are returned as they are.
            start: for (n,) consecutive values, the index of the first in the flattened tensor.

        Returns:
            Values in the dtype they were stored in; the stored value itself wherever loading it
            gives the one in ``values``.
        """
        stored_as = self.dtype(weight)
        if stored_as is None or not values.is_floating_point():
            return values
        exact = torch.promote_types(values.dtype, stored_as) == values.dtype  # no rounding
        stored = None if exact else self.read(weight)
        if stored is not None and start is not None:
            stored = stored.reshape(-1)[start : start + len(values)]
        if stored is None or stored.shape != values.shape:
            return values.to(stored_as)
        stored = stored.to(values.device)
        same = values == stored.to(values.dtype)
        return torch.where(same, stored, values.to(stored_as))

    def read(self, weight: str) -> Optional[Tensor]:
        """A weight as it is stored; None if there is none of that name."""
        return self._files.tensor(weight) if weight in self.names else self._loaded.get(weight)

    @cached_property
    def _loaded(self) -> dict[str, Tensor]:
        """The whole model, for weights that its files keep under other names."""
        return dict(load_model(self.name, self.default).state_dict())


class Weight(NamedTuple):
    """A tensor to be written, which is read only when it is its turn."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextmanager
def model_folder(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    record: Mapping[str, Any],
    dtype: Optional[torch.dtype] = None,
    together: bool = False,
) -> Iterator[Path]:
    """A temporary folder for a model's weights and configuration, which then replaces ``folder``.

    Args:
        folder: destination; replaced if it exists (the caller has asked for it).
        card: Markdown text of ``README.md``.
        record: JSON-serialisable; written as ``wagle.json``.
        dtype: dtype of the weights to write into the configuration; left as it is when None.
        together: all ranks write into it, which makes this a collective.
    """
    place = distributed.shared_output if together else atomic_path
    with place(Path(folder)) as temporary:
        temporary.mkdir(exist_ok=together)
        yield temporary
        if together and distributed.rank():
            return
        file = temporary / "config.json"
        if file.exists():
            config = read_json(file, dict[str, Any]) | {"use_cache": True}
            if dtype is not None:  # transformers writes the dtype in memory, not in the files
                config["dtype"] = str(dtype).removeprefix("torch.")
            _write_json(file, config | _before_5(config))
        save_tokenizer(tokenizer, temporary)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        _write_json(temporary / RECORD_FILE, record)


def _before_5(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a configuration under the names that transformers before version 5 reads: it takes
    defaults for those it misses, so that a model computes something else.

    >>> _before_5({"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    {'torch_dtype': 'bfloat16', 'rope_theta': 500000.0}
    """
    entries = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:  # otherwise there are several, by the kind of layer
        entries["rope_theta"] = rope.pop("rope_theta")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            entries["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if rope.get("rope_type", "default") != "default":
            entries["rope_scaling"] = rope
    return entries


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that transformers before version 5 reads it, too: its generic class has
    another name there, and the chat template stands in ``tokenizer_config.json``."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    file = folder / "tokenizer_config.json"
    config = read_json(file, dict[str, Any])
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if tokens := config.pop("extra_special_tokens", None):
        config["additional_special_tokens"] = tokens
    _write_json(file, config)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    card: str,
    record: Mapping[str, Any],
    originals: Optional[Originals] = None,
    together: bool = False,
) -> Path:
    """Write a folder that ``from_pretrained`` loads.

    Args:
        originals: weights that the model was loaded from: the file has their dtypes, and their bits
            where nothing has changed. When None, dtypes are those in memory.
        together: each rank writes its share, under the model's own names: a collective, which is
            needed if the weights are sharded.
    """
    if together:
        tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
        shapes = shapes_of(tensors.items())
        weights = {
            name: Weight(tensor.dtype, shapes[name], partial(tensors.get, name))
            for name, tensor in tensors.items()
        }
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        configs = (model.config, model.generation_config)
        return save_weights(weights, configs, tokenizer, folder, card, record, originals)
    dtype = None if originals is None else originals.default
    state_dict = dict(model.state_dict())
    if originals is not None:
        restored: dict[Any, Tensor] = {}  # tied weights stay one tensor, and so are saved once
        for name, tensor in state_dict.items():
            key = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
            if key not in restored:
                restored[key] = originals.restore(name, tensor.cpu())  # a device may be full
            state_dict[name] = restored[key]
    with model_folder(folder, tokenizer, card, record, dtype) as temporary:
        model.save_pretrained(temporary, state_dict=state_dict)
    return Path(folder)


def save_weights(
    weights: Mapping[str, Weight],
    configs: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    card: str,
    record: Mapping[str, Any],
    originals: Optional[Originals] = None,
) -> Path:
    """Write a model folder from weights that are read one at a time, in files of 5 GB at most.

    Collective: each rank writes its share of every weight, see
    :func:`~wagle_pl.core.weights.share_of`, into files that are the same for any number of ranks.

    Args:
        weights: all weights of the model by name, tied ones once; whole, or sharded over ranks.
        configs: the model's configurations; None stands for one that it does not have.
    """
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    if originals is not None:
        floats = [name for name, dtype in dtypes.items() if dtype.is_floating_point]
        dtypes |= {name: originals.dtype(name) or dtypes[name] for name in floats}
    layout = {n: torch.empty(w.shape, dtype=dtypes[n], device="meta") for n, w in weights.items()}
    plan = split_torch_state_dict_into_shards(layout, max_shard_size="5GB")
    files = plan.filename_to_tensors

    def share(name: str) -> tuple[str, int, Tensor]:
        start, values = share_of(weights[name].read())
        if originals is not None:
            values = originals.restore(name, values, start)
        return name, start, values

    def begin() -> None:
        for file, names in files.items():
            tensors = [(name, dtypes[name], weights[name].shape) for name in names]
            lay_out(temporary / file, tensors, {"format": "pt"})

    dtype = None if originals is None else originals.default
    with model_folder(folder, tokenizer, card, record, dtype, together=True) as temporary:
        distributed.on_rank_zero(begin)
        for file, names in files.items():
            fill(temporary / file, map(share, names))
        if distributed.rank() == 0:
            if plan.is_sharded:
                index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
                _write_json(temporary / INDEX_FILE, index)
            for config in configs:
                if config is not None:
                    config.save_pretrained(temporary)
    return Path(folder)
