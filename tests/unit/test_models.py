"""Models that cannot be loaded: one line that says why, and no hub is asked for a plain path."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import transformers

from wagle_pl import ForgetRetainDataModule, TOFUDataModule, WagleError, WeightMask
from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation.classifiers import ToxicityClassifier, check_folder
from wagle_pl.lab.planning import architecture
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.lm.saving import save_model


@pytest.fixture
def copy(tiny_model, tmp_path, monkeypatch):
    """A copy of the tiny model to spoil, as ``broken`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_model, "broken"))


@pytest.fixture
def no_hub(monkeypatch):
    """Asking the hub for a model, a tokenizer, a configuration or a dataset is an error."""

    def asked(*args, **kwargs):
        raise AssertionError(f"the hub is asked for {args}")

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", asked)
    monkeypatch.setattr("datasets.load_dataset", asked)


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def said(load, name):
    """The one line that loading ends with."""
    with pytest.raises(WagleError) as error:
        load(str(name))
    assert "\n" not in str(error.value)
    return str(error.value)


# -- paths and hub ids -----------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_model, load_tokenizer, architecture])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gguf", "model file x.gguf does not exist"),
        ("nowhere/x.gguf", "model file nowhere/x.gguf does not exist"),
        ("broken/target", "model folder broken/target does not exist (there is a folder broken"),
        ("./target", "model folder ./target does not exist"),
        ("target/", "model folder target/ does not exist"),
        ("a/b/c", "model folder a/b/c does not exist"),
        ("broken/model.safetensors", "model broken/model.safetensors is a file: give the folder"),
    ],
)
def test_what_is_plainly_a_path_is_not_asked_of_the_hub(copy, no_hub, load, name, message):
    assert said(load, name).startswith(message)


def test_a_hub_id_is(copy, no_hub):
    for name in ("owner/name", "gpt2"):
        with pytest.raises(WagleError, match=f"AssertionError: the hub is asked for .'{name}'"):
            load_model(name)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (partial(load_rows, "broken/rows"), "data source broken/rows does not exist (there is"),
        (partial(load_rows, "broken"), "data source broken is a folder: name a file in it"),
        (partial(load_rows, "./rows"), "data source ./rows does not exist"),
        (partial(load_rows, "rows.json"), "data file rows.json is a folder: name a file in it"),
        (
            lambda: TOFUDataModule(path="broken/tofu").examples("forget"),
            "TOFU folder (data.path) broken/tofu does not exist (there is a folder broken here",
        ),
        (
            partial(check_folder, "broken/mini", "model.sentence_model"),
            "model.sentence_model: folder broken/mini does not exist (there is a folder broken",
        ),
        (
            lambda: ForgetRetainDataModule(refusals="broken").refusals,
            "refusals file broken is a folder: name a file in it",
        ),
        (partial(WeightMask.load, "mask.pt"), "mask.pt is not a .safetensors file: convert a mask"),
        (partial(WeightMask.load, "broken"), "mask file broken is a folder: name a file in it"),
        (partial(WeightMask.load, "mask"), "mask file mask.safetensors does not exist"),
    ],
)
def test_files_of_other_kinds_that_are_not_there(copy, no_hub, load, message):
    """What is there is not said to be missing."""
    Path("rows.json").mkdir()
    Path("mask.pt").write_bytes(b"mask")
    assert said(lambda _: load(), "").startswith(message)


def test_a_hub_id_of_data_is_asked_for(no_hub):
    with pytest.raises(WagleError, match=r"the hub is asked for .'owner/name'"):
        load_rows("owner/name:config")


def test_two_gguf_files_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.gguf").write_bytes(b"")
    assert said(load_model, ".") == (
        "model folder . has no config.json, but 2 .gguf files: name one"
    )


# -- damaged files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 50, 5000])
def test_weights_cut_short(copy, size):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    damage = "weight file broken/model.safetensors is not a whole"
    line = said(load_model, copy)
    assert line.startswith(f"model 'broken' cannot be loaded: {damage}")
    assert line.endswith("; copy or download it again")
    assert said(partial(load_model, sharded=True), copy).startswith(damage)
    line = said(ToxicityClassifier, copy)
    assert line.startswith(f"model.toxicity_classifier 'broken' cannot be loaded: {damage}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "its files lack 9 weights that its configuration has, such as"),
        ({"num_hidden_layers": 1}, "its files have 9 weights that its configuration has no layer"),
        ({"vocab_size": 401}, "model.embed_tokens.weight has the shape ("),
        ({"num_attention_heads": "four"}, "Validation error for field 'num_attention_heads'"),
        ({"model_type": "nonsense"}, "model type `nonsense`"),
    ],
)
def test_a_configuration_that_disagrees_with_the_weights(copy, changes, message, capfd):
    configure(copy, **changes)
    assert message in said(load_model, copy)
    assert message in said(partial(load_model, sharded=True), copy)
    assert "MISSING" not in capfd.readouterr().err


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}'])
def test_a_damaged_tokenizer_or_adapter(copy, content):
    (copy / "tokenizer.json").write_text(content)
    assert said(load_tokenizer, copy).startswith("tokenizer of 'broken' cannot be loaded: ")
    (copy / "config.json").unlink()
    (copy / "adapter_config.json").write_text(content)
    assert said(load_model, copy).startswith("broken/adapter_config.json")


def write_gguf(path):
    """A whole GGUF file of one block, 40 tokens."""
    gguf = pytest.importorskip("gguf")
    writer, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 32}
    numbers |= {"feed_forward_length": 64, "head_count": 4, "head_count_kv": 4, "vocab_size": 40}
    for name, value in {**numbers, "layer_norm_rms_eps": 1e-5}.items():
        getattr(writer, f"add_{name}")(value)
    shapes = dict.fromkeys(["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"], (32,))
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_up": (64, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"token_embd": (40, 32), "output": (40, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("spoil", ["", "text", "head", "half", "garbled"])
def test_a_damaged_gguf_file(tmp_path, spoil):
    file = tmp_path / "tiny.gguf"
    whole = write_gguf(file)
    assert load_model(str(file)).config.vocab_size == 40
    spoilt = {"": b"", "text": b"hello", "head": whole[:20], "half": whole[: len(whole) // 2]}
    file.write_bytes(spoilt.get(spoil, whole[:30] + b"\xff" * 60 + whole[90:]))
    for load in (load_model, load_tokenizer):
        line = said(load, file)
        assert "cannot be loaded: the GGUF file is damaged, cut short or of a kind" in line
    assert "cannot be loaded: the GGUF file is damaged" in said(architecture, file)


# -- on the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("named", [None, "PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_folder_is_read_by_transformers_before_5(tiny_model, tmp_path, named):
    """Its classes of tokenizers, its places of the chat template and special tokens, its names in config.json:
    without ``rope_theta``, it computes with 10,000 and gives no error."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    file = base / "tokenizer_config.json"
    content = json.loads(file.read_text()) | ({"tokenizer_class": named} if named else {})
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|note|>"]})
    model = load_model(str(base))
    rope = {"rope_type": "linear", "factor": 2.0}
    model.config.rope_parameters = rope | {"rope_theta": 5e5}
    folder = save_model(model, tokenizer, tmp_path / "saved", "card", {})
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == (named or "PreTrainedTokenizerFast")
    assert written["additional_special_tokens"] == ["<|note|>"]
    assert "extra_special_tokens" not in written  # a list, which 4.47 to 4.57 refuse
    assert written["chat_template"] == tokenizer.chat_template
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, rope)
    assert config["torch_dtype"] == config["dtype"]
    again, text = load_tokenizer(str(folder)), "<|note|> Where does it meet?"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert load_model(str(folder)).config.rope_parameters == model.config.rope_parameters


def test_loading_says_nothing_of_layers_that_are_not_sharded(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers compares a model with its plan for tensor parallelism if the level of one of its loggers is high."""
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    monkeypatch.setattr(library, "level", logging.WARNING)
    load_model(tiny_model)
    library.removeHandler(caplog.handler)
    assert not caplog.messages
