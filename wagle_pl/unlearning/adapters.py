"""Sparse and low-rank adapters of ``peft``: a baseline, and a format for masks and patches.

``LoRA`` trains a few new weights and does not change those of the model. An untrained adapter adds
exactly nothing, so log-probabilities at θ₀ may be computed before the first step, with the adapter
in place.

SHiRA (arXiv 2406.13175) adds r (m + n) numbers at places of each adapted linear layer, which has
m × n weights, with one r for all layers. Here r is the smallest that fits every layer's places. A
layer with fewer places repeats them and adds nothing there, so that the same places are changed or
trained; in training, a repeated place is moved by both copies. Layers without places are left out.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wagle_pl.core.errors import WagleError
from wagle_pl.core.files import atomic_path, refuse_existing
from wagle_pl.core.hub import ADAPTER_FILE, load_tokenizer
from wagle_pl.core.reading import read_json
from wagle_pl.core.tensorfiles import DTYPES, TensorFile, TensorFiles, write_tensors
from wagle_pl.lm import models
from wagle_pl.lm.saving import Originals, model_folder, save_model
from wagle_pl.masks import WeightMask
from wagle_pl.masks.bits import filled_bits, pack_bits
from wagle_pl.unlearning.export import empty_model
from wagle_pl.unlearning.patch import Patch, digest_of, make_patch


class LoRA:
    """Low-rank adapters W x + (alpha / r) B A x, through ``peft`` (arXiv 2106.09685).

    Args:
        r: rank of B A.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: of the adapter's input, during training.
        target_modules: endings of names of linear layers; ``all-linear``: all but the output layer.
        merge: write a whole model, with B A in the weights; False writes a folder with only the
            adapter, which can be loaded like a model if ``peft`` is installed and the base exists.
    """

    def __init__(
        self,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target_modules: Union[list[str], str] = "all-linear",
        merge: bool = True,
    ) -> None:
        for option, value, good, must in (
            ("r", r, r >= 1, "be at least 1"),
            ("alpha", alpha, alpha > 0, "be above 0"),
            ("dropout", dropout, 0 <= dropout < 1, "lie in [0, 1)"),
        ):
            if not good:
                raise WagleError(f"must {must}, got {value}", option=f"adapter.{option}")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.merge = merge
        self._peft: Any = None

    def add(self, lm: PreTrainedModel, base: str, trainable: Optional[str] = None) -> None:
        """Put adapters into a model, in place, and freeze everything else.

        Args:
            lm: a Hugging Face model; its class and its calls stay as they are.
            base: hub id or folder that an adapter folder will name as its base.
            trainable: regular expression for names of parameters that may move; None for all.
        """
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise WagleError("adapter: LoRA needs peft: pip install 'wagle-pl[lora]'") from None
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )
        try:
            self._peft = get_peft_model(lm, config)
        except ValueError as error:
            raise WagleError(
                f"{self.target_modules}: {error}", option="adapter.target_modules"
            ) from error
        for name, parameter in lm.named_parameters():
            if trainable is not None and not re.search(trainable, name):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in lm.parameters()):
            raise WagleError(
                f"the adapter has no weights in what the objective moves ({trainable}): adapt "
                "those modules"
            )

    def fold(self) -> None:
        """Add B A to the model's weights and remove the adapters, if there are any."""
        if self._peft is not None:
            self._peft.merge_and_unload()
        self._peft = None

    def save(
        self, tokenizer: PreTrainedTokenizerBase, folder: str, card: str, record: dict[str, Any]
    ) -> None:
        """Write a folder with only the adapter, the tokenizer, model card and record."""
        with model_folder(folder, tokenizer, card, record) as temporary:
            self._peft.save_pretrained(temporary)


# -- masks and patches as adapters, and back -------------------------------------------------------

WEIGHTS_FILE = "adapter_model.safetensors"
#: Floating-point type as the format names it -> dtype.
_FLOATS = {text: dtype for dtype, text in DTYPES.items() if dtype.is_floating_point}


class Places(NamedTuple):
    """Places of one weight tensor: its shape, their number, and a function that returns the (k,)
    places in the flattened tensor and the (k,) numbers to add there."""

    shape: tuple[int, ...]
    count: int
    read: Callable[[], tuple[Tensor, Tensor]]


def mask_to_shira(mask: WeightMask, base: str, output: str | Path) -> Path:
    """Write an adapter folder that trains the places of a mask, and adds nothing yet.

    Raises:
        WagleError: if the mask selects weights outside linear layers.
    """

    def read(name: str) -> tuple[Tensor, Tensor]:
        places = mask[name].view(-1).nonzero().view(-1)
        return places, torch.zeros(len(places))

    found = {
        name: Places(shape, mask.count(name), partial(read, name))
        for name, shape in mask.shapes.items()
    }
    return _write(mask.label, found, base, Path(output))


def mask_from_shira(
    folder: str | Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any]
) -> WeightMask:
    """The mask of an adapter's places.

    Args:
        shapes: parameter name -> shape of its base.
        metadata: of the base: ``model`` and ``model_fingerprint``.

    Raises:
        WagleError: if the folder holds no SHiRA adapter, or one of another model.
    """
    config = Path(folder) / ADAPTER_FILE
    kind = read_json(config, dict[str, Any]).get("peft_type") if config.is_file() else "none"
    if kind != "SHIRA":
        raise WagleError(f"{folder} is no SHiRA adapter of peft (its {ADAPTER_FILE}: {kind})")
    file = TensorFile(Path(folder) / WEIGHTS_FILE, "adapter")
    packed = {name: filled_bits(prod(shape), False) for name, shape in shapes.items()}
    with safe_open(file.path, framework="pt") as tensors:
        for key in file.names:
            if not (match := re.fullmatch(r"base_model\.model\.(.+)\.shira_indices", key)):
                continue
            name, at = f"{match[1]}.weight", tensors.get_tensor(key).long()
            shape = shapes.get(name, ())
            if len(shape) != 2 or (at < 0).any() or (at.amax(1) >= torch.tensor(shape)).any():
                raise WagleError(f"adapter {folder} has places in {name} that the model lacks")
            bits = torch.zeros(shape, dtype=torch.bool)
            bits[at[0], at[1]] = True
            packed[name] = pack_bits(bits)
    return WeightMask(packed, shapes, {**metadata, "operation": "import", "file": str(folder)})


def patch_to_shira(
    base: str | Path, patch: str | Path, output: str | Path, overwrite: bool = False
) -> Path:
    """Write an adapter folder that turns the patch's base into the unlearned model.

    It adds fp32 differences: in bf16 or fp16 the result is exactly the unlearned model, in fp32 up
    to the rounding of a sum.

    Args:
        base: folder of the patch's base model, which the adapter names.

    Raises:
        WagleError: if the patch is of another model, or changes weights outside linear layers.
    """
    refuse_existing(Path(output), overwrite, "--overwrite", kind="folder")
    opened, files = Patch(patch), TensorFiles(base)
    if (found := digest_of(files)) != opened.base:
        raise WagleError(
            f"patch {patch} is of the model with digest {opened.base[:12]}, {base} is {found[:12]}"
        )
    opened.check_layout(files)

    for name in opened.tensors:
        if files.dtype(name) not in _FLOATS:
            raise WagleError(f"{name} of {base} is {files.dtype(name)}: SHiRA adds to floats alone")

    def read(name: str) -> tuple[Tensor, Tensor]:
        words, dtype, start = files.words(name), _FLOATS[files.dtype(name)], 0
        places, added = [], []
        for changed, step in opened.frames(name, words.dtype):
            old = words[start : start + len(changed)][changed]
            before, after = (torch.from_numpy(w).view(dtype).double() for w in (old, old + step))
            places.append(torch.from_numpy(np.flatnonzero(changed)) + start)
            added.append((after - before).float())
            start += len(changed)
        return torch.cat(places), torch.cat(added)

    tensors = opened.tensors.items()
    changes = {
        name: Places(tuple(entry["shape"]), entry["changed"], partial(read, name))
        for name, entry in tensors
    }
    return _write(f"patch {patch}", changes, str(base), Path(output))


def patch_from_shira(
    base: str | Path, adapter: str | Path, output: str | Path, overwrite: bool = False
) -> Patch:
    """Write the patch of a base model and an adapter of ``peft`` on it, of any kind."""
    refuse_existing(Path(output), overwrite, "--overwrite")
    name = str(base)
    lm = models.merged(models.load_model(name, torch.float32), str(adapter))
    with tempfile.TemporaryDirectory() as folder:
        files = load_tokenizer(name), folder, "", {"lineage": []}, Originals(name)
        return make_patch(base, save_model(lm, *files), output, overwrite)


def _write(what: str, found: Mapping[str, Places], base: str, output: Path) -> Path:
    """Write an adapter folder, one tensor at a time; ``what`` names mask or patch in errors."""
    found = {name: places for name, places in found.items() if places.count}
    r = _rank(what, found, base)
    read = lru_cache(1)(lambda name: found[name].read())

    def indices(name: str, size: int, columns: int) -> Tensor:
        """(2, size) rows and columns of the places, repeated."""
        places, _ = read(name)
        places = places.repeat(-(-size // len(places)))[:size]
        return torch.stack([places // columns, places % columns])

    def weight(name: str, size: int) -> Tensor:
        """(size,) the numbers to add, then zeros."""
        _, added = read(name)
        return nn.functional.pad(added, (0, size - len(added)))

    tensors = []
    for name, (shape, _, _) in found.items():
        key, size = f"base_model.model.{name.removesuffix('.weight')}", r * sum(shape)
        at = partial(indices, name, size, shape[1])
        tensors += [
            (f"{key}.shira_indices", torch.int32, (2, size), at),
            (f"{key}.shira_weight", torch.float32, (size,), partial(weight, name, size)),
        ]
    config = {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "mask_type": "wagle",  # not one of peft's, so that loading draws no places
        "target_modules": [name.removesuffix(".weight") for name in found],
        "inference_mode": True,
    }
    with atomic_path(output) as temporary:
        temporary.mkdir()
        (temporary / ADAPTER_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_tensors(temporary / WEIGHTS_FILE, tensors, {"format": "pt"})
    return output


def _rank(what: str, found: Mapping[str, Places], base: str) -> int:
    """The r of an adapter with these places, if there can be one."""
    lm = empty_model(base)
    own = dict(lm.named_parameters())  # without weights that are tied to others
    linear = {f"{name}.weight" for name, m in lm.named_modules() if isinstance(m, nn.Linear)}
    for name, places in found.items():
        if name not in linear or name not in own:
            raise WagleError(
                f"{what} has {places.count:,} weights of {name}, and peft's SHiRA takes the "
                "matrices of linear layers alone",
                hint="make a mask of attention and MLP only (wagle mask modules, --model.modules)",
            )
    if not found:
        raise WagleError(f"{what} has no weights: there is nothing to adapt")
    needed = {name: -(-places.count // sum(places.shape)) for name, places in found.items()}
    largest = max(needed, key=needed.__getitem__)
    r = needed[largest]
    for name, (shape, _, _) in found.items():
        if r * sum(shape) > prod(shape):
            raise WagleError(
                f"{what}: the weights of {largest} need r {r}, and {name} has room for r "
                f"{prod(shape) // sum(shape)}; peft's SHiRA has one r for all layers",
                hint="take a lower density, or leave the smaller layers out",
            )
    return r
