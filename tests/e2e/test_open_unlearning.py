"""OpenUnlearning's models: each by its name, on a tiny model of its architecture with a template of its family."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import LLAMA_3, QUIET, write_classifier, write_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from wagle_pl.cli import app as cli
from wagle_pl.cli.lightning import WagleCLI
from wagle_pl.cli.parser import expand

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
GEMMA = """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<bos>\
{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content \
+ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
SYSTEM = "You are a helpful assistant."
#: Prompts of ``{question}``, from the tags in OpenUnlearning's configs/model; Llama 3's template adds the two dates.
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    f"Today Date: 10 Apr 2025\n\n{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{{question}}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
QWEN = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{{question}}<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {
    "Llama-3": ("Llama", LLAMA_3, LLAMA),
    "Llama-2": ("Llama", None, "[INST] {question} [/INST]"),
    "Qwen2.5": ("Qwen2", CHATML, QWEN),
    "gemma": (
        "Gemma",
        GEMMA,
        "<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n",
    ),
    "Phi-3.5": (
        "Phi3",
        PHI,
        f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n{{question}}<|end|>\n<|assistant|>\n",
    ),
}
MODELS = {
    "Llama-3.2-1B-Instruct": "meta-llama",
    "Llama-3.2-3B-Instruct": "meta-llama",
    "Llama-3.1-8B-Instruct": "meta-llama",
    "Llama-2-7b-chat-hf": "meta-llama",
    "Qwen2.5-1.5B-Instruct": "Qwen",
    "Qwen2.5-3B-Instruct": "Qwen",
    "Qwen2.5-7B-Instruct": "Qwen",
    "gemma-7b-it": "google",
    "Phi-3.5-mini-instruct": "microsoft",
}


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> Any:
    """Folder of a tiny model of a family, made once."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        kind, template, _ = FAMILIES[name]
        if name not in made:
            tokenizer = AutoTokenizer.from_pretrained(tiny_model)
            tokenizer.chat_template = template
            made[name] = write_model(kind, tmp_path_factory.mktemp(name), tokenizer, **SIZE)
        return made[name]

    return make


def given(*options: str) -> dict[str, Any]:
    """What the configurations say of a run, one key a dotted path."""
    found: dict[str, Any] = {}

    def flatten(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            found[path] = value
            return
        for key, entry in value.items():
            flatten(entry, f"{path}.{key}".strip("."))

    for layer in expand(options)[1::2]:
        flatten(yaml.safe_load(layer), "")
    return {key.replace(".init_args", ""): value for key, value in found.items()}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_name_stands_for(name: str) -> None:
    chosen = ("--config", "model/open-unlearning", "--run.name", name)
    run = given("--config", "tofu/unlearn_open-unlearning", *chosen)
    assert run["model.model"] == f"open-unlearning/tofu_{name}_full"
    assert run["data.batch_size"] * run["trainer.accumulate_grad_batches"] == 32
    numbers = ("optimizer.lr", "optimizer.weight_decay", "trainer.max_epochs", "model.warmup")
    assert [run[number] for number in numbers] == [1e-5, 0.01, 10, 0.1]
    assert run["trainer.precision"] == "bf16-true" and run["model.mask"] is None
    tuned = given("--config", "tofu/finetune_7b", *chosen)
    assert tuned["model.model"] == f"{MODELS[name]}/{name}"
    muse = ("--config", "muse/unlearn", "--config", "method/npo", *chosen)
    target = "muse-bench/MUSE-Books_target"
    books = given(*muse, "--run.target", target)
    assert books["model.model"] == target and books["optimizer.lr"] == 1e-5
    assert books["model.output"] == f"runs/muse/{name}/npo" and "data.system_prompt" not in books


@pytest.fixture
def step(wagle: Any, family: Any, rows: dict[str, str]) -> Any:
    """A step of a family's model by their configurations: step("Phi-3.5", "option …"); returns the CLI object."""
    configs = "--config tofu/unlearn_open-unlearning --config model/open-unlearning"
    data = ("--data.forget", rows["forget"], "--data.retain", rows["retain"])
    quick = "--trainer.max_steps 2 --trainer.precision 32-true --trainer.callbacks null --trainer.devices 1"

    def run(kind: str, *options: str) -> Any:
        model = ("--model.model", family(kind))
        return wagle("fit", configs, *model, *data, QUIET, quick, *options, data=False)

    return run


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_on_its_architecture_and_its_prompt(step: Any, kind: str) -> None:
    name = next(name for name in MODELS if name.startswith(kind))
    ran = step(kind, f"--run.name {name}")
    assert ran.model.global_step == 2 and ran.model.prompts["prompt"] == FAMILIES[kind][2]
    objective = ran.model.objective
    assert (objective.beta, objective.reduction, objective.average) == (0.1, "sum", "tokens")


def test_their_files_are_written_and_compared_with(
    wagle: Any, rows: dict[str, str], tiny_model: str
) -> None:
    """The same model's file in the place of a retrained model's: the truth ratios are the same."""
    sets = f"{{forget: {rows['forget_test']}, retain: {rows['retain_test']}}}"
    data = ("--data.test", sets)
    test = (
        "test",
        f"--model EvaluationModule --model.model {tiny_model} --model.suite tofu --model.max_new_tokens 4",
    )
    tokenizer, first = AutoTokenizer.from_pretrained(tiny_model), "<|user|>"
    # so that no text is without a token
    begun = (first, tokenizer.convert_tokens_to_ids(first))
    form = TemplateProcessing(single=f"{first} $A", special_tokens=[begun])
    tokenizer.backend_tokenizer.post_processor = form
    write_classifier("classifier", tokenizer, "clean", "noise")
    options = "--format openunlearning --model.bootstrap 5 --model.gibberish_classifier classifier"
    wagle(*test, "--model.output out", options, *data)
    summary = json.loads(Path("out/TOFU_SUMMARY.json").read_text())
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert summary["forget_Q_A_Prob"] == pytest.approx(metrics["forget/probability"])
    assert summary["forget_truth_ratio"] == pytest.approx(metrics["forget/truth_ratio"])
    assert summary["forget_Q_A_gibberish"] == pytest.approx(metrics["forget/not_gibberish"])
    assert summary["forget_Q_A_PARA_ROUGE"] == metrics["forget/paraphrased_rougeL_recall"]
    info = json.loads(Path("out/metrics.info.json").read_text())
    low, high = info["intervals"]["forget/probability"]
    assert low <= metrics["forget/probability"] <= high
    shutil.copy("out/TOFU_EVAL.json", "retain90.json")
    module = wagle(*test, "--model.output again --model.retrained retain90.json", *data).model
    assert module.metrics["forget_quality"] == 1


def test_another_objective_takes_the_means_over(step: Any) -> None:
    ran = step("Llama-3", "--model.objective WGA --run.method wga")
    assert type(ran.model.objective).__name__ == "WGA" and ran.model.objective.average == "tokens"
    assert ran.model.output.endswith("wga")


def listed() -> list[tuple[str, ...]]:
    """Commands of the list of published numbers, with its variables filled in."""
    text = (Path(__file__).parents[2] / "configs/tofu/running.md").read_text()
    text = text[text.index("## OpenUnlearning's models") :]
    values = dict(re.findall(r'^(\w)="(.*?)"', text, re.MULTILINE))
    commands = re.findall(r"^\| [\w-]+ \| .*? \| `(wagle .*)` \|$", text, re.MULTILINE)

    def filled(command: str) -> str:
        while found := re.search(r"\$\{?(\w)\}?", command):
            command = command[: found.start()] + values[found[1]] + command[found.end() :]
        return command

    parts = [part for command in commands for part in filled(command).split(" && ")]
    return [tuple(part.split()[1:]) for part in dict.fromkeys(parts)]


@pytest.mark.parametrize("command", listed(), ids=lambda c: "-".join((c[0], *c[-1:])))
def test_the_listed_commands(
    command: tuple[str, ...], monkeypatch: Any, tiny_model: str, tmp_path: Path
) -> None:
    """Each makes its objects."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WagleCLI, "_run_subcommand", lambda self, subcommand: None)
    quiet = f"{QUIET} --trainer.devices 1 --model.model {tiny_model}".split()
    made = cli.run([*command, *quiet])
    if command[0] == "test":
        assert made.model.evaluate.options.retrained == "runs/retain90"
        return
    name = type(made.model.objective).__name__
    assert made.model.output == f"runs/tofu/Llama-3.2-1B-Instruct/{name.lower()}"
    assert made.model.objective.average == "tokens"
    if name == "SimNPO":
        assert (made.model.objective.beta, made.model.objective.forget_weight) == (4.5, 0.125)
