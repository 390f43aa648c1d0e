"""Functions that tests of several rooms share."""

from __future__ import annotations

import json
import os
import pickle
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TOFU = Path(__file__).parents[2] / "shared/data/tofu"
TOFU_LOGS = Path(__file__).parents[2] / "shared/data/tofu_eval_logs"

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


QUIET = (
    "--trainer.accelerator cpu --trainer.logger false --trainer.enable_progress_bar false "
    "--trainer.enable_model_summary false"
)


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

    def init(self: Any, args: list[str]) -> None:
        self.asked = {name: skipped for name, skipped in every().items() if name in args[:1]}
        make(self, args=args)

    WagleCLI.__init__, WagleCLI.subcommands = init, lambda self: self.asked or every()
    WagleArgumentParser.dump = partialmethod(dump, skip_validation=True)
    SaveConfigCallback.setup = lambda *_, **__: None


def data_options(rows: dict[str, str]) -> list[str]:
    """Command-line options for the shared forget and retain rows."""
    files = ["--data.forget", rows["forget"], "--data.retain", rows["retain"]]
    return ["--data", "ForgetRetainDataModule", *files]


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


def weights(folder: Path | str) -> dict[str, Tensor]:
    """What an exported model holds."""
    return load_file(Path(folder) / "model.safetensors")


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert left.keys() == right.keys()
    pairs = ((left[name].double(), right[name].double()) for name in left)
    return max(float((one - other).norm() / one.norm()) for one, other in pairs)


def close(a: Path | str, b: Path | str) -> bool:
    """Whether two model folders hold the same weights, but for the order of sums in fp32."""
    return difference(weights(a), weights(b)) < 1e-5


def same_bits(a: Path | str, b: Path | str) -> bool:
    """Whether two model folders hold the same weights, bit for bit."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
