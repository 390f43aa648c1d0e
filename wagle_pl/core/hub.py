"""Finds models by hub id, folder or GGUF file; failures are reported in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Optional, TypedDict, Union

import torch
import yaml
from safetensors import SafetensorError

from wagle_pl.core.errors import WagleError, first_line
from wagle_pl.core.files import absent, plainly_local
from wagle_pl.core.reading import parse_yaml, read_json
from wagle_pl.core.schema import check
from wagle_pl.core.tensorfiles import TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD_FILE: Final = "README.md"
ADAPTER_FILE = "adapter_config.json"  # of a folder that holds an adapter and names its base
#: Endings of file names, which no hub id has.
MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class AdapterConfig(TypedDict):
    """What is read of an adapter's configuration here."""

    base_model_name_or_path: str


#: What is used of a tokenizer's configuration, and transformers does not check.
TOKENIZER = {"chat_template": Union[str, dict[str, str], None], "model_max_length": float}


def locate(name: str) -> tuple[str, dict[str, str]]:
    """Source and options for ``from_pretrained``; only possible hub ids are left to the hub."""
    path = Path(name)
    if (file := _gguf_file(path)) is not None:
        return str(file.parent), {"gguf_file": file.name}
    if path.is_file():
        raise WagleError(
            f"model {name} is a file: give the folder that holds config.json and the weights, or "
            "a .gguf"
        )
    if not path.is_dir() and plainly_local(name, MODEL_SUFFIXES):
        raise absent("model file" if path.suffix == ".gguf" else "model folder", name, hub=True)
    for file in path.iterdir() if path.is_dir() else ():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise absent("model file", file)
    if path.is_dir() and not (path / "config.json").exists() and adapted(name) is None:
        several = len(list(path.glob("*.gguf")))
        what = f", but {several} .gguf files: name one" if several else ""
        raise WagleError(
            f"model folder {name} has no config.json{what or ': it is no Hugging Face model folder'}"
        )
    return name, {}


def card_of(base: str, library: str, text: str, card: str = "") -> str:
    """A Markdown card with the metadata that the hub reads: tags, base model and its licence.

    Args:
        card: the base's own, if not in its folder.
    """
    matter = {"library_name": library, "tags": ["unlearning", "wagle"]}
    if not Path(base).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        matter["base_model"] = base
    if (file := Path(base) / CARD_FILE).is_file():
        card = file.read_text(encoding="utf-8", errors="replace")
    header = re.match(r"\s*---\s*\n(.*?)\n---", card, re.DOTALL)
    fields = None
    with suppress(WagleError):  # the base's card is not ours to mend
        fields = parse_yaml(header[1], CARD_FILE) if header else None
    if isinstance(fields, dict):
        matter |= {key: fields[key] for key in ("license", "base_model") if key in fields}
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n\n{text}\n"


def upload(path: Path, repo_id: str, card: str = "", **options: Any) -> str:
    """Upload a file, or what is in a folder, to a repository on the hub; returns its address.

    Args:
        repo_id: ``owner/name``; created if it does not exist.
        **options: of ``huggingface_hub.HfApi.create_repo``, such as ``private=True``.

    Raises:
        WagleError: if the hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(repo_id, exist_ok=True, **options)
        if path.is_dir():
            api.upload_folder(repo_id=repo_id, folder_path=path)
        else:
            api.upload_file(repo_id=repo_id, path_or_fileobj=path, path_in_repo=path.name)
        if card:
            content = card.encode()
            api.upload_file(repo_id=repo_id, path_or_fileobj=content, path_in_repo=CARD_FILE)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise WagleError(f"{repo_id} cannot be uploaded: {first_line(error)}") from error
    return str(address)


def _gguf_file(path: Path) -> Optional[Path]:
    """The GGUF file at a path: the file itself, or the only one in a folder."""
    if path.is_dir() and not (path / "config.json").exists():
        files = list(path.glob("*.gguf"))
        return files[0] if len(files) == 1 else None
    return path if path.suffix == ".gguf" and path.is_file() else None


def adapted(name: str) -> Optional[str]:
    """The base model that an adapter folder names; None for any other model."""
    file = Path(name) / ADAPTER_FILE
    if not file.is_file() or (Path(name) / "config.json").exists():
        return None
    return read_json(file, AdapterConfig)["base_model_name_or_path"]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, by the model's name; one without a pad token pads with EOS."""
    from transformers import AutoTokenizer

    source, options = locate(name)
    with loading(f"tokenizer of {name!r}", name):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        for key, kind in TOKENIZER.items():
            check(getattr(tokenizer, key, None), kind, f"tokenizer of {name!r}", key)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


@contextmanager
def loading(what: str, name: str) -> Iterator[None]:
    """Say in one line why a model's files cannot be read, whatever a library raises."""
    try:
        yield
    except (WagleError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise WagleError(f"{what} cannot be loaded: {_why_not(name, error)}") from error


def _why_not(name: str, error: Exception) -> str:
    """Why loading failed; if the name is no path here, this says that the hub was asked."""
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
        return (
            "the GGUF file is damaged, cut short or of a kind that transformers does not read "
            f"({text})"
        )
    return text
