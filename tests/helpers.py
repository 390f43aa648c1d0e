"""Functions that tests of several rooms share."""

from __future__ import annotations

import json
import os
import pickle
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

TOFU = Path(__file__).parents[2] / "shared/data/tofu"
TOFU_LOGS = Path(__file__).parents[2] / "shared/data/tofu_eval_logs"

#: Shapes of the weights of a Llama of four blocks.
LLAMA: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (11, 4),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(4)
        for name, shape in {
            "self_attn.q_proj": (4, 4),
            "self_attn.k_proj": (2, 4),
            "mlp.up_proj": (5, 4),
            "mlp.down_proj": (4, 5),
            "input_layernorm": (4,),
            "post_attention_layernorm": (4,),
        }.items()
    },
    "model.norm.weight": (4,),
    "lm_head.weight": (11, 4),
}

#: Meta's template of Llama-3.2-Instruct without its parts for tools; that of Llama-3.1 has a fixed date in place of the
#: clock, where ``date_string`` is not defined.
LLAMA_3 = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


#: A run in a ``wagle.json``, with the keys that every run has.
RUN: dict[str, Any] = {
    "module": "UnlearnModule",
    "base": "base",
    "base_fingerprint": "0" * 64,
    "data": {"forget": "forget.jsonl"},
    "streams": ["forget", "retain"],
    "steps": 2,
    "seed": 0,
}

QUIET = (
    "--trainer.accelerator cpu --trainer.logger false --trainer.enable_progress_bar false "
    "--trainer.enable_model_summary false"
)


def slow(*values: Any, **options: Any) -> Any:
    """A case for ``bin/test --all``: what the other cases leave of all combinations."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def words(*arguments: Any) -> list[str]:
    """Arguments of a command: text that begins with dashes is split at spaces, other values stay whole.

    >>> words("--model.output", "a folder", "--trainer.max_steps 2 --model.masks", '[{"density": 0.1}]')
    ['--model.output', 'a folder', '--trainer.max_steps', '2', '--model.masks', '[{"density": 0.1}]']
    """
    parts = [str(argument) for argument in arguments]
    return [word for part in parts for word in (part.split() if part.startswith("--") else [part])]


def quicken() -> None:
    """Spare commands of this process what all of them do alike: parsers of subcommands that are not asked for, a second
    check of what was parsed, ``config.yaml`` beside the run. Tests that start a process see the whole command line."""
    from lightning.pytorch.cli import SaveConfigCallback

    from wagle_pl.cli.lightning import WagleArgumentParser, WagleCLI

    make, every, dump = WagleCLI.__init__, WagleCLI.subcommands, WagleArgumentParser.dump

    def init(self: Any, args: list[str], **options: Any) -> None:
        self.asked = {name: skipped for name, skipped in every().items() if name in args[:1]}
        make(self, args=args, **options)

    WagleCLI.__init__, WagleCLI.subcommands = init, lambda self: self.asked or every()
    WagleArgumentParser.dump = partialmethod(dump, skip_validation=True)
    SaveConfigCallback.setup = lambda *_, **__: None


def trainer(**options: Any) -> L.Trainer:
    """A Trainer of one device, the CPU, that writes and prints nothing; options go before that."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(**{**dict.fromkeys(off, False), "accelerator": "cpu", "devices": 1, **options})


class SaveAt(L.Callback):
    """Writes ``middle.ckpt`` after a number of micro-batches, wherever in a step that is, and stops the run."""

    left = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        type(self).left -= 1
        if not type(self).left:
            trainer.save_checkpoint("middle.ckpt")
            raise KeyboardInterrupt


def data_options(rows: dict[str, str]) -> list[str]:
    """Command-line options for the shared forget and retain rows."""
    files = ["--data.forget", rows["forget"], "--data.retain", rows["retain"]]
    return ["--data", "ForgetRetainDataModule", *files]


def fit_arguments(module: str, model: str, rows: dict[str, str], *options: Any) -> list[str]:
    """Arguments of a quiet fit of a module on the shared rows, into ``out``."""
    common = ("--model.model", model, "--model.output out", *data_options(rows), QUIET)
    return ["fit", *words("--model", module, *common, *options)]


def two_steps(*options: str, model: Path | str, output: Path | str = "out") -> list[str]:
    """Arguments of a run of two steps with options, which are separated by spaces."""
    steps = "--trainer.max_steps 2 --trainer.enable_checkpointing false --model.objective GradDiff"
    optimizer = "--optimizer MaskedAdamW --optimizer.lr 0.01"
    run = f"fit --model UnlearnModule {steps} {optimizer} --model.model {model} --model.output {output}"
    return " ".join([run, *options]).split()


def random_bools(
    shapes: Mapping[str, Sequence[int]], density: float = 0.3, seed: int = 0, lines: bool = True
) -> dict[str, Tensor]:
    """Bits by name, each set with a probability; with ``lines``, in one matrix of three those of whole rows,
    and in another those of whole columns."""
    generator, bools = torch.Generator().manual_seed(seed), {}
    for i, (name, shape) in enumerate(shapes.items()):
        numbers = torch.rand(tuple(shape), generator=generator)
        if lines and len(shape) == 2 and i % 3 and numbers.numel():
            numbers = numbers.narrow(i % 3 - 1, 0, 1).expand(numbers.shape).clone()
        bools[name] = numbers < density
    return bools


def write_model(kind: str, folder: Path | str, tokenizer: Any, **sizes: Any) -> str:
    """A model folder of an architecture, with random weights and a tokenizer."""
    names = [f"{name}_token_id" for name in ("pad", "bos", "eos")]
    special = {name: getattr(tokenizer, name) for name in names}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **special, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_classifier(folder: Path | str, tokenizer: Any, *labels: str) -> Any:
    """Write a tiny classifier of texts with random weights, and return it."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64}
    named = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes, **named)
    classifier = transformers.BertForSequenceClassification(config).eval()
    tokenizer.save_pretrained(folder)
    classifier.save_pretrained(folder)
    return classifier


def write_config(folder: Path, config: dict[str, Any]) -> str:
    """A model folder of a configuration alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False, **config}))
    return str(folder)


def cut_log(result: dict[str, Any], numbers: Any) -> dict[str, Any]:
    """A published result of TOFU, cut to these rows of its forget set."""
    log = result["eval_log_forget.json"].items()
    cut = {name: {str(n): column[str(n)] for n in numbers} for name, column in log}
    return {"eval_log_forget.json": cut}


class Trap:
    """What is unpickled into a call of ``os.mkdir("trapped")``."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def trapped(path: Path, kind: str) -> Path:
    """The checkpoint with a trap in it: in torch's own container, or as a plain pickle."""
    content = {**torch.load(path, weights_only=True), "more": Trap()}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def environment() -> dict[str, str]:
    """Of a command typed in a shell: without what a strategy of another test has left in this process."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {name: value for name, value in os.environ.items() if name not in left}
    return {**own, "PYTHONPATH": str(Path(__file__).parents[1])}


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Until something another process does is so; an error if it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it is not so after {seconds} s"
        time.sleep(0.05)


def weights(folder: Path | str) -> dict[str, Tensor]:
    """What an exported model holds."""
    return load_file(Path(folder) / "model.safetensors")


def moved(base: Path | str, made: Path | str) -> dict[str, Tensor]:
    """Which weights of a model folder have other bits than those of its base."""
    before, after = weights(base), weights(made)
    assert before.keys() == after.keys()
    found = {}
    for name, old in before.items():
        assert after[name].dtype == old.dtype
        bits = old.view(torch.uint8) != after[name].view(torch.uint8)
        found[name] = bits.view(*old.shape, -1).any(-1)
    return found


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert left.keys() == right.keys()
    pairs = ((left[name].double(), right[name].double()) for name in left)
    return max(float((one - other).norm() / one.norm()) for one, other in pairs)


def close(a: Path | str, b: Path | str) -> bool:
    """Whether two model folders hold the same weights, but for the order of sums in fp32."""
    return difference(weights(a), weights(b)) < 1e-5


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file become larger: every writer meets a real error of the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def same_bits(a: Path | str, b: Path | str) -> bool:
    """Whether two model folders hold the same weights, bit for bit."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    yield at
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in inner:
        yield from places(child, (*at, key))


def changed(value: Any, at: tuple[Any, ...], other: Any) -> Any:
    """A JSON value with another in a place; without that place if the other is ``...``."""
    if not at:
        return {} if other is ... else other
    value, (key, *rest) = value.copy(), at
    if other is ... and not rest:
        del value[key]
    else:
        value[key] = changed(value[key], tuple(rest), other)
    return value
