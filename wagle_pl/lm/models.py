"""Causal language models and tokenizers: load (hub id, folder, GGUF), name by content, save whole; and a tiny one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from wagle_pl.core import distributed
from wagle_pl.core.environment import errors_only
from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import absent, atomic_path, plainly_local
from wagle_pl.core.tensorfiles import DTYPES, INDEX_FILE, SINGLE_FILE, TensorFiles, write_tensors
from wagle_pl.masks.names import layer_of

CARD_FILE = "README.md"
ADAPTER_FILE = "adapter_config.json"  # of a folder that holds an adapter and names its base
MODEL_SUFFIXES = (
    ".gguf",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
)  # of files: no hub id ends so
RECORD_FILE = "wagle.json"  # what made a folder of ours: machine-readable twin of the model card

#: safetensors' names of dtypes -> torch's.
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_model(
    name: str,
    dtype: Optional[torch.dtype] = None,
    sharded: bool = False,
    attn_implementation: Optional[str] = None,
) -> Any:
    """Load a causal language model for training or testing.

    Args:
        name: hub id, a folder in Hugging Face format, or a ``.gguf`` file (or a folder with just one). A folder of an
            adapter stands for its base with the adapter merged.
        dtype: of the weights in memory; torch's default dtype when None.
        sharded: inside DeepSpeed's ``zero.Init``: no rank holds more than its part of the weights and one whole tensor.
        attn_implementation: what computes attention, as transformers names it; its own choice when None.

    Raises:
        WagleError: if there is no such model, it is no causal language model, or it has no such attention here.
    """
    from transformers import AutoModelForCausalLM

    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if sharded:
        return _load_sharded(name, attention)
    if (base := _adapted(name)) is not None:
        return _merged(load_model(base, dtype, attn_implementation=attn_implementation), name)
    source, options = locate(name)
    dtype = dtype or torch.get_default_dtype()
    with loading(f"model {name!r}", name), errors_only("transformers.modeling_utils"):
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **attention,
            **options,
        )
    _check_found(name, model, found)
    if (
        "gguf_file" in options
    ):  # the weights are plain once loaded, but saving refuses what looks quantised
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.config.use_cache = False
    return model


def _check_found(name: str, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit the configuration, which transformers would draw at random or leave out.

    Args:
        name: of the model.
        model: as its configuration says.
        found: ``missing_keys`` (names), ``mismatched_keys`` (name, shape stored, shape of the model) and
            ``unexpected_keys`` (names stored; those of a layer beyond the model's are refused, others have no use).

    Raises:
        WagleError: naming the first weight that does not fit.
    """
    shapes = parameter_shapes(model)
    layers = {_any_layer(weight): layer_of(weight) for weight in shapes}
    beyond = [
        n
        for n in found.get("unexpected_keys", ())
        if n not in shapes and (layers.get(_any_layer(n)) is not None)
    ]
    fault = None
    if mismatched := sorted(found.get("mismatched_keys", ())):
        weight, stored, own = mismatched[0]
        fault = f"{weight} has the shape {tuple(stored)} in its files and {tuple(own)} by its configuration"
    elif missing := sorted(found.get("missing_keys", ())):
        fault = f"its files lack {len(missing)} weights that its configuration has, such as {missing[0]}"
    elif beyond:
        fault = f"its files have {len(beyond)} weights that its configuration has no layer for, such as {min(beyond)}"
    if fault:
        raise WagleError(
            f"model {name!r} cannot be loaded: {fault}; check config.json, or get the model again"
        )


def _any_layer(weight: str) -> str:
    """The name of a weight without its numbers: the same in every layer."""
    return re.sub(r"\d+", "#", weight)


def _load_sharded(name: str, attention: Mapping[str, str]) -> Any:
    """Make the model with no weights to speak of, then fill it from its safetensors files, a tensor at a time."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    source, options = locate(name)
    if options or _adapted(name) is not None:
        raise WagleError(
            f"ZeRO-3 reads models in safetensors; {name} is none: write it as a folder first with "
            f"wagle export {name} -o FOLDER"
        )
    with loading(f"model {name!r}", name):
        config = AutoConfig.from_pretrained(source)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.get_default_dtype(), **attention
            )
        model.tie_weights()
        model.generation_config = GenerationConfig.from_pretrained(source)
    stored = TensorFiles(_folder_of(source))
    shapes, names = parameter_shapes(model), set(stored.names)
    missing = [weight for weight in shapes if weight not in names]
    if missing and _any_layer(missing[0]) not in set(map(_any_layer, names)):
        raise WagleError(
            f"model {name!r} stores its weights under names other than its own (no {missing[0]}): for "
            "ZeRO-3, load it once with transformers and write it by save_pretrained(FOLDER, "
            "save_original_format=False), or take ZeRO-2"
        )
    mismatched = [
        (n, stored.shape(n), shape)
        for n, shape in shapes.items()
        if n in names and stored.shape(n) != shape
    ]
    _check_found(
        name,
        model,
        {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": names},
    )
    for parameter_name, parameter in model.named_parameters():
        assign(parameter, lambda name=parameter_name: stored.tensor(name))
    for buffer_name, buffer in model.named_buffers():
        if buffer_name in names:
            buffer.copy_(stored.tensor(buffer_name))
    model.config.use_cache = False
    return model.eval()


def _folder_of(source: str) -> Path:
    """Where a model's files are: the folder itself, or the hub's cache; a meeting of all ranks."""
    return (
        Path(source)
        if Path(source).is_dir()
        else Path(distributed.on_rank_zero(lambda: _downloaded(source)))
    )


def _downloaded(source: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(source, allow_patterns=["*.safetensors", INDEX_FILE])


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model (same names as :func:`load_model`); one without a pad token pads with EOS."""
    from transformers import AutoTokenizer

    source, options = locate(name)
    with loading(f"tokenizer of {name!r}", name):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def checkpoint_dtype(name: str) -> Optional[torch.dtype]:
    """The dtype a model is stored in, None if its configuration does not say."""
    from transformers import AutoConfig

    if (base := _adapted(name)) is not None:
        return checkpoint_dtype(base)
    source, options = locate(name)
    with loading(f"configuration of model {name!r}", name):
        dtype = AutoConfig.from_pretrained(source, **options).dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


class Originals:
    """The weights that a model was loaded from, in the dtypes they are stored in.

    Loading may round them: float16 in memory as bfloat16, say. What has not moved since is then written as it was
    stored, so that frozen weights keep their bits in the file and not in memory alone.

    Args:
        name: of the model, as :func:`load_model` takes it.

    Attributes:
        default: the dtype that the model's configuration names, None if it names none.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.default = checkpoint_dtype(name)
        self._files = _weight_files(name)
        self._names = frozenset(() if self._files is None else self._files.names)

    def dtype(self, weight: str) -> Optional[torch.dtype]:
        """The dtype a weight is stored in; the model's where its files do not have the weight under this name."""
        if weight not in self._names:
            return self.default
        stored = TORCH_DTYPES.get(self._files.dtype(weight))
        return stored if stored is not None and stored.is_floating_point else self.default

    @torch.no_grad()
    def restore(
        self, weight: str, values: Tensor, loaded_as: Optional[torch.dtype] = None
    ) -> Tensor:
        """A weight's values as they are to be stored.

        Args:
            weight: its name.
            values: of any floating-point dtype; others are returned as they are.
            loaded_as: the dtype that the stored ones were loaded in; that of ``values`` when None.

        Returns:
            Values in the dtype they were stored in; those that are what loading made of the stored ones are the stored.
        """
        stored_as, loaded_as = self.dtype(weight), loaded_as or values.dtype
        if stored_as is None or not values.is_floating_point():
            return values
        stored = None if _holds(loaded_as, stored_as) else self.read(weight)
        if stored is None or stored.shape != values.shape:
            return values.to(stored_as)
        stored = stored.to(values.device)
        return torch.where(
            values == stored.to(loaded_as).to(values.dtype), stored, values.to(stored_as)
        )

    def read(self, weight: str) -> Optional[Tensor]:
        """A weight as it is stored; None if there is none of that name."""
        return self._files.tensor(weight) if weight in self._names else self._loaded.get(weight)

    @cached_property
    def _loaded(self) -> dict[str, Tensor]:
        """The whole model, for weights that its files keep under other names."""
        return dict(load_model(self.name, self.default).state_dict())


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of one dtype is a number of another."""
    return torch.promote_types(wide, narrow) == wide


def _weight_files(name: str) -> Optional[TensorFiles]:
    """A model's safetensors files; None if it has none of its own."""
    source, options = locate(name)
    if options or _adapted(name) is not None:
        return None
    try:
        return TensorFiles(source if Path(source).is_dir() else _downloaded(source))
    except (WagleError, OSError):
        return None


def _adapted(name: str) -> Optional[str]:
    """The base model that an adapter folder names; None for any other model."""
    file = Path(name) / ADAPTER_FILE
    if not file.is_file() or (Path(name) / "config.json").exists():
        return None
    with loading(f"adapter {name!r}", name):
        return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]


def _merged(base: Any, folder: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise WagleError(
            f"{folder} is an adapter, which needs peft: pip install 'wagle-pl[lora]'"
        ) from None
    with loading(f"adapter {folder!r}", folder):
        return PeftModel.from_pretrained(base, folder).merge_and_unload().requires_grad_(True)


@contextmanager
def loading(what: str, name: str, how: str = "loaded") -> Iterator[None]:
    """Say in one line why a model's files cannot be read: the libraries that do have exceptions of many classes for it.

    Raises:
        WagleError: naming ``what`` and the reason.
    """
    try:
        yield
    except (WagleError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise WagleError(f"{what} cannot be {how}: {_why_not(name, error)}") from error


def _why_not(name: str, error: BaseException) -> str:
    """Why loading failed; of a name that is no path here, that the hub was asked."""
    if "backend tokenizer" in str(error):
        return "it has no tokenizer files"
    text = first_line(error)
    if text.endswith(":"):  # what matters is below
        text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, ImportError)):
        text = f"{type(error).__name__}: {text}"
    if not Path(name).exists():
        return f"there is no such folder here, and asked of the hub: {text}"
    if isinstance(error, SafetensorError):
        try:
            TensorFiles(name)
        except WagleError as damaged:
            return f"{damaged}; copy or download it again"
    if not isinstance(error, ImportError) and _gguf_file(Path(name)) is not None:
        return f"the GGUF file is damaged, cut short or of a kind that transformers does not read ({text})"
    return text


def locate(name: str) -> tuple[str, dict[str, str]]:
    """What to give ``from_pretrained``: source and options. Only what may be a hub id is left for the hub.

    Raises:
        WagleError: if it is a path and there is no model.
    """
    path = Path(name)
    if (file := _gguf_file(path)) is not None:
        return str(file.parent), {"gguf_file": file.name}
    if path.is_dir():
        if not (path / "config.json").exists() and _adapted(name) is None:
            several = len(list(path.glob("*.gguf")))
            what = (
                f", but {several} .gguf files: name one"
                if several
                else ": it is no Hugging Face model folder"
            )
            raise WagleError(f"model folder {name} has no config.json{what}")
    elif path.is_file():
        raise WagleError(
            f"model {name} is a file: give the folder that holds config.json and the weights, or a .gguf"
        )
    elif plainly_local(name, MODEL_SUFFIXES):
        raise absent("model file" if path.suffix == ".gguf" else "model folder", name, hub=True)
    return name, {}


def _gguf_file(path: Path) -> Optional[Path]:
    """The GGUF file that a path is, or that is the one model in a folder."""
    if path.is_dir() and not (path / "config.json").exists():
        files = list(path.glob("*.gguf"))
        return files[0] if len(files) == 1 else None
    return path if path.suffix == ".gguf" and path.is_file() else None


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids a model knows, from 0 on."""
    embeddings = model.get_input_embeddings()
    return getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, in parameter order, tied weights once."""
    return shapes_of(model.named_parameters())


def shapes_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of (name, parameter) pairs, whole where they are spread over ranks."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """A parameter's weights, whole: brought together from all ranks while inside, if they are spread (ZeRO-3)."""
    if not hasattr(parameter, "ds_id"):
        yield parameter.data
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter.data


def whole(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weights) of parameters that may be spread over ranks, one at a time; a meeting of all ranks."""
    for name, parameter in parameters:
        with gathered(parameter) as weights:
            yield name, weights


@torch.no_grad()
def assign(parameter: nn.Parameter, read: Callable[[], Tensor]) -> None:
    """Set a parameter's weights, whole or spread over ranks (then rank 0 reads); a meeting of all ranks.

    Args:
        parameter: of any dtype; a spread one keeps its part only.
        read: gives the whole tensor.
    """
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(read())
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if distributed.rank() == 0:
            parameter.data.copy_(read())


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Name a model by its content: SHA-256 over names, shapes and values.

    Values are rounded to bfloat16 first, so that a checkpoint has one fingerprint whether it is loaded in bfloat16 or
    in float32.

    Args:
        tensors: (name, tensor) pairs in parameter order, e.g. ``model.named_parameters()``.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        rounded = tensor.detach().to(torch.bfloat16).contiguous().cpu()
        digest.update(memoryview(rounded.view(torch.int16).numpy()).cast("B"))
    return digest.hexdigest()


def save_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    card: str,
    record: dict[str, Any],
    originals: Optional[Originals] = None,
) -> Path:
    """Write a folder that ``from_pretrained`` loads, with tokenizer, model card and record; whole or not at all.

    Args:
        model: a Hugging Face model; where its weights are spread over ranks (ZeRO-3), a meeting of all of them.
        tokenizer: its tokenizer.
        folder: where to; replaced if it exists (the caller has asked for it).
        card: Markdown text of ``README.md``.
        record: JSON-serialisable; written as ``wagle.json``.
        originals: what the model was loaded from, which says the dtypes in the file, and keeps the bits of what has not
            moved; dtypes are those in memory when None.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return _save_spread(model, tokenizer, folder, card, record, originals)
    state_dict = dict(model.state_dict())
    if originals is not None:
        restored: dict[
            Any, Tensor
        ] = {}  # tied weights are one tensor before and after, and so saved once
        for name, tensor in state_dict.items():
            key = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
            if key not in restored:
                restored[key] = originals.restore(name, tensor)
            state_dict[name] = restored[key]

    def write_weights(temporary: Path) -> None:
        model.config.use_cache = True
        try:
            model.save_pretrained(temporary, state_dict=state_dict)
        finally:
            model.config.use_cache = False

    dtype = None if originals is None else originals.default
    return _save_folder(folder, write_weights, tokenizer, card, record, dtype)


def _save_spread(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    card: str,
    record: dict[str, Any],
    originals: Optional[Originals] = None,
) -> Path:
    """:func:`save_model` of a model spread over ranks: rank 0 writes a tensor at a time."""
    parameters = list(model.named_parameters())
    if distributed.rank():
        for _ in whole(parameters):
            pass
        return Path(folder)

    def dtype_of(name: str, parameter: nn.Parameter) -> torch.dtype:
        return (None if originals is None else originals.dtype(name)) or parameter.dtype

    def read(name: str, parameter: nn.Parameter) -> Tensor:
        with gathered(parameter) as weights:
            values = weights if originals is None else originals.restore(name, weights)
            return values.to("cpu", copy=True)  # the gathered ones are gone in a moment

    weights = [
        Weight(
            name,
            dtype_of(name, parameter),
            tuple(parameter.ds_shape),
            partial(read, name, parameter),
        )
        for name, parameter in parameters
    ]
    buffers = persistent_buffers(model)
    weights += [
        Weight(n, b.dtype, tuple(b.shape), partial(torch.clone, b)) for n, b in buffers.items()
    ]
    model.config.architectures = [type(model).__name__]
    dtype = None if originals is None else originals.default
    return save_weights(
        weights, model.config, model.generation_config, tokenizer, folder, card, record, dtype
    )


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's files."""
    names = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


class Weight(NamedTuple):
    """A tensor to be written, read when its turn has come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def save_weights(
    weights: Sequence[Weight],
    config: Any,
    generation_config: Any,
    tokenizer: Any,
    folder: str | Path,
    card: str,
    record: dict[str, Any],
    dtype: Optional[torch.dtype] = None,
    shard_bytes: int = 5 << 30,
) -> Path:
    """Write a model folder from weights that are read one at a time, in files of at most ``shard_bytes`` each."""
    shards: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        bytes_ = prod(weight.shape) * weight.dtype.itemsize
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += bytes_
    files = [
        SINGLE_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]

    def write_weights(temporary: Path) -> None:
        for file, shard in zip(files, shards, strict=True):
            write_tensors(temporary / file, shard, {"format": "pt"})
        if len(shards) > 1:
            places = {
                weight.name: file
                for file, shard in zip(files, shards, strict=True)
                for weight in shard
            }
            total = sum(prod(weight.shape) * weight.dtype.itemsize for weight in weights)
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (temporary / INDEX_FILE).write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )
        config.save_pretrained(temporary)
        if generation_config is not None:
            generation_config.save_pretrained(temporary)

    return _save_folder(folder, write_weights, tokenizer, card, record, dtype)


def _save_folder(
    folder: str | Path,
    write_weights: Callable[[Path], None],
    tokenizer: Any,
    card: str,
    record: dict[str, Any],
    dtype: Optional[torch.dtype],
) -> Path:
    """Weights, configuration, tokenizer, model card and record; whole or not at all."""
    with atomic_path(Path(folder)) as temporary:
        temporary.mkdir()
        write_weights(temporary)
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config["use_cache"] = True
        if (
            dtype is not None
        ):  # transformers writes the dtype in memory, whatever the weights it is given
            config["dtype"] = str(dtype).removeprefix("torch.")
        (temporary / "config.json").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )
        tokenizer.save_pretrained(temporary)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")
        (temporary / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def read_record(name: str) -> dict[str, Any]:
    """The record of a folder of ours; empty for any other model."""
    file = Path(name) / RECORD_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def create_tiny_llama(
    folder: str | Path,
    texts: Iterable[str],
    vocab_size: int = 2048,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    seed: int = 0,
) -> Path:
    """Write a small Llama-architecture model with random weights and a byte-level BPE tokenizer trained on ``texts``.

    Args:
        folder: where to; replaced if it exists.
        texts: what the tokenizer is trained on.
        vocab_size: largest number of tokens.
        hidden_size: width; the MLP is three times as wide.
        layers: transformer blocks.
        heads: attention heads, half as many key-value heads.
        seed: of the weights.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=special[0],
        eos_token=special[1],
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=512,
        initializer_range=0.05,  # wider than usual: a narrow model with few rows memorises in a third of the steps
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    record = {
        "kind": "tiny llama",
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    size = f"{record['parameters']:,} parameters, seed {seed}"
    card = f"# A tiny Llama\n\nRandom weights ({size}), for trials and tests.\n"
    return save_model(model, tokenizer, folder, card, record)
