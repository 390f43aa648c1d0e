"""Models that cannot be loaded: one line that says why, and no question to the hub about what is plainly a path."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import transformers

from wagle_pl import ForgetRetainDataModule, TOFUDataModule, WagleError, WeightMask
from wagle_pl.data.rows import load_rows
from wagle_pl.evaluation.classifiers import ToxicityClassifier, check_folder
from wagle_pl.lm.models import load_model, load_tokenizer
from wagle_pl.planning.architecture import architecture


@pytest.fixture
def copy(tiny_model, tmp_path, monkeypatch):
    """A copy of the tiny model to spoil, as ``broken`` in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_model, "broken"))


@pytest.fixture
def no_hub(monkeypatch):
    """The hub must not be asked: neither for a model, a tokenizer or a configuration, nor for a dataset."""

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


# -- paths and hub ids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_model, load_tokenizer, architecture])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gguf", "model file x.gguf does not exist"),
        ("nowhere/x.gguf", "model file nowhere/x.gguf does not exist"),
        (
            "broken/target",
            "model folder broken/target does not exist (there is a folder broken here, so it is not taken for a hub",
        ),
        ("./target", "model folder ./target does not exist"),
        ("target/", "model folder target/ does not exist"),
        ("a/b/c", "model folder a/b/c does not exist"),
        (
            "broken/model.safetensors",
            "model broken/model.safetensors is a file: give the folder that holds",
        ),
    ],
)
def test_what_is_plainly_a_path_is_not_asked_of_the_hub(copy, no_hub, load, name, message):
    assert said(load, name).startswith(message)


def test_a_hub_id_is(copy, no_hub):
    for name in ("owner/name", "gpt2"):
        with pytest.raises(WagleError, match=f"AssertionError: the hub is asked for .'{name}'"):
            load_model(name)


def test_data_that_is_plainly_a_path(copy, no_hub, tmp_path):
    (tmp_path / "rows.json").mkdir()
    assert said(load_rows, "broken/rows") == (
        "data source broken/rows does not exist (there is a folder broken here, so it is not taken for a hub id)"
    )
    assert said(load_rows, "broken") == "data source broken is a folder: name a file in it"
    assert said(load_rows, "./rows") == "data source ./rows does not exist"
    assert said(load_rows, "rows.json") == "data file rows.json is a folder: name a file in it"
    assert said(
        lambda path: TOFUDataModule(path=path).examples("forget"), "broken/tofu"
    ).startswith(
        "TOFU folder (data.path) broken/tofu does not exist (there is a folder broken here"
    )
    assert said(lambda name: check_folder(name, "model.sentence_model"), "broken/mini").startswith(
        "model.sentence_model: folder broken/mini does not exist (there is a folder broken here"
    )
    with pytest.raises(WagleError, match=r"the hub is asked for .'owner/name'"):
        load_rows("owner/name:config")


def test_what_is_there_is_not_said_to_be_missing(copy, tmp_path):
    refusals = ForgetRetainDataModule(refusals="broken")
    assert (
        said(lambda _: refusals.refusals, "")
        == "refusals file broken is a folder: name a file in it"
    )
    (tmp_path / "mask.pt").write_bytes(b"mask")
    assert said(WeightMask.load, "mask.pt").startswith(
        "mask.pt is no .safetensors file: for a mask that torch.save"
    )
    assert said(WeightMask.load, "broken") == "mask file broken is a folder: name a file in it"
    assert said(WeightMask.load, "mask") == "mask file mask.safetensors does not exist"
    for file in copy.iterdir():
        file.unlink()
    for name in ("a", "b"):
        (copy / f"{name}.gguf").write_bytes(b"")
    assert (
        said(load_model, copy)
        == "model folder broken has no config.json, but 2 .gguf files: name one"
    )


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 50, 5000])
def test_weights_cut_short(copy, size):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    line = said(load_model, copy)
    assert line.startswith(
        "model 'broken' cannot be loaded: weight file broken/model.safetensors is not a whole"
    )
    assert line.endswith("; copy or download it again")
    assert said(partial(load_model, sharded=True), copy).startswith(
        "weight file broken/model.safetensors is not a"
    )
    line = said(ToxicityClassifier, copy)
    assert line.startswith(
        "model.toxicity_classifier 'broken' cannot be loaded: weight file broken/model.safetensors"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 3},
            "its files lack 9 weights that its configuration has, such as model.layers.2.",
        ),
        (
            {"num_hidden_layers": 1},
            "its files have 9 weights that its configuration has no layer for, such as model.l",
        ),
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
    assert said(load_model, copy).startswith("adapter 'broken' cannot be loaded: ")


def write_gguf(path):
    """A whole GGUF file of one block, 40 tokens."""
    gguf = pytest.importorskip("gguf")
    writer, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    numbers = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
    }
    numbers |= {"head_count": 4, "head_count_kv": 4, "layer_norm_rms_eps": 1e-5, "vocab_size": 40}
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    square, wide = (32, 32), (64, 32)
    shapes = {
        "attn_norm": (32,),
        "ffn_norm": (32,),
        "attn_q": square,
        "attn_k": square,
        "attn_v": square,
    }
    shapes |= {"attn_output": square, "ffn_up": wide, "ffn_gate": wide, "ffn_down": (32, 64)}
    tensors = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for name, shape in {
        **tensors,
        "token_embd": (40, 32),
        "output_norm": (32,),
        "output": (40, 32),
    }.items():
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
        assert "cannot be loaded: the GGUF file is damaged, cut short or of a kind" in said(
            load, file
        )
    assert "cannot be planned for: the GGUF file is damaged" in said(architecture, file)


# -- on the command line ----------------------------------------------------------------------------------------------
