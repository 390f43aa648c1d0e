"""MUSE, WMDP, the book and detoxification: rows from local folders of the hub's schema, and bad input."""

import gzip
import json
from types import SimpleNamespace

import pytest
from benchmark_folders import ALICE, CHOICES, QA, TEXTS, WIKI, write_lines
from helpers import write_rows

from wagle_pl import WagleError
from wagle_pl.data import CopyrightDataModule, DetoxDataModule, MUSEDataModule, WMDPDataModule
from wagle_pl.data.example import KINDS, Example, parse_rows, raw_rows
from wagle_pl.data.rows import HubSet, load_rows, local_files, read_set
from wagle_pl.data.suite import chunk_rows, chunk_text, continuation
from wagle_pl.data.template import IGNORE, Template
from wagle_pl.lm.models import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def columns(data, name):
    """The columns of the rows of a test set, as far as a kind of row needs them."""
    return {kind_of(row) for row in data.test_examples(f"{name}")}


def kind_of(example):
    return next(kind for kind in KINDS if all(example.row.get(c) is not None for c in kind))


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["tokens", "characters"])
@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
@pytest.mark.parametrize("text", [ALICE, "naïve café 🐇🐇 日本語 " * 5, "x" * 50, "  \n\n  a"])
def test_chunks_put_together_are_the_text(tokenizer, text, size, unit):
    chunks = chunk_text(text, size, tokenizer if unit == "tokens" else None)
    assert "".join(chunks) == text and all(chunks)
    assert chunks == chunk_text(text, size, tokenizer if unit == "tokens" else None)
    if unit == "characters":
        assert max(map(len, chunks)) <= size


def test_token_chunks_have_that_many_tokens(tokenizer):
    chunks = chunk_text(ALICE, 20, tokenizer)
    counts = [len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in chunks]
    assert all(abs(count - 20) <= 2 for count in counts[:-1]) and len(counts) == -(
        -sum(counts) // 20
    )


def test_character_chunks_keep_words_whole():
    words = ALICE.split()
    assert [word for chunk in chunk_text(ALICE, 60) for word in chunk.split()] == words


def test_chunk_rows_say_where_a_text_goes_on():
    rows = chunk_rows(["one two three", "four"], 8)
    assert rows == [{"text": "one two", "partial": True}, {"text": " three"}, {"text": "four"}]
    assert continuation(rows[0], 3) == {
        "prompt": "one",
        "response": " two",
        "continuation": True,
        "partial": True,
    }
    assert continuation(rows[2], 30) is None
    with pytest.raises(WagleError, match="fast tokenizer"):
        chunk_text("text", 4, SimpleNamespace(is_fast=False))


# -- rows and templates -----------------------------------------------------------------------------------------------


def test_only_as_many_lines_are_read_as_asked_for(tmp_path):
    lines = [json.dumps(row) + "\n" for row in QA[:3]]
    for path, opener in ((tmp_path / "a.jsonl.gz", gzip.open), (tmp_path / "a.jsonl", open)):
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines([*lines, "not JSON\n"])
        assert load_rows(str(path), limit=3) == QA[:3]
        with pytest.raises(WagleError, match="line 4: malformed JSON"):
            load_rows(str(path))


def test_new_kinds_of_rows(tokenizer):
    choice = {"question": "Which is a fruit?", "choices": ["a stone", "a pear"], "label": 1}
    prompt = Example.of({"prompt": "Go on"})
    assert [row.kind for row in (Example.of(choice), prompt)] == ["choices", "prompt"]
    with pytest.raises(WagleError, match="row 1: label 2 is no index"):
        parse_rows([{**choice, "label": 2}], "set")
    with pytest.raises(WagleError, match="row 1: 'prompt' is empty"):
        parse_rows([{"prompt": " "}], "set")
    template = Template(tokenizer)
    assert template.encode(Example.of(choice)) == template.encode(
        Example.of({"question": choice["question"], "answer": "a pear"})
    )
    assert tokenizer.decode(template.encode_prompt(prompt)) == "<|user|>Go on<|assistant|>"
    with pytest.raises(WagleError, match="no answer"):
        template.encode(prompt)
    with pytest.raises(WagleError, match="'response' is null"):
        template.encode(Example.of({"prompt": "Go on", "response": None}))


def test_continuations_stand_in_no_template(tokenizer):
    template = Template(tokenizer)
    row = {"prompt": "Down the", "response": " rabbit-hole", "continuation": True}
    encoded = template.encode(Example.of(row))
    answer = [token for token, label in zip(*encoded.values(), strict=True) if label != IGNORE]
    assert tokenizer.decode(encoded["input_ids"]) == "Down the rabbit-hole<|end|>"
    assert tokenizer.decode(answer) == " rabbit-hole<|end|>"
    assert tokenizer.decode(template.encode_prompt(Example.of(row))) == "Down the"
    partial = template.encode(Example.of({**row, "partial": True}))
    assert tokenizer.decode(partial["input_ids"]) == "Down the rabbit-hole"
    refused = template.encode(Example.of({**row, "partial": True}), "I cannot say.")
    assert tokenizer.decode(refused["input_ids"]) == "Down the I cannot say.<|end|>"
    text = template.encode(Example.of({"text": "Down the", "partial": True}))
    assert tokenizer.decode(text["input_ids"]) == "Down the" and text["labels"] == text["input_ids"]


def test_context_stands_before_the_question(tokenizer):
    row = {"question": "Who?", "answer": "Nobody.", "context": "First this.\n"}
    assert (
        tokenizer.decode(Template(tokenizer).encode_prompt(Example.of(row)))
        == "<|user|>First this.\nWho?<|assistant|>"
    )
    template = Template(tokenizer, "Question: {question}\n", "Answer: {answer}")
    assert (
        tokenizer.decode(template.encode_prompt(Example.of(row)))
        == "First this.\nQuestion: Who?\nAnswer:"
    )


# -- where rows are ---------------------------------------------------------------------------------------------------


def test_a_set_is_found_in_a_copy_of_the_repository_or_a_folder_of_copies(tmp_path):
    part = HubSet("owner/name", "config", "test")
    write_lines(tmp_path / "copies/name/config/test.jsonl", QA)
    write_lines(tmp_path / "copy/config/test.jsonl", QA[:2])
    assert (
        read_set(part, str(tmp_path / "copies")) == QA
        and read_set(part, str(tmp_path / "copy")) == QA[:2]
    )
    assert read_set(part, str(tmp_path / "copies"), limit=3) == QA[:3]
    assert read_set(part._replace(split="train"), str(tmp_path / "copy")) is None
    assert local_files(part, tmp_path / "copy") == [tmp_path / "copy/config/test.jsonl"]


def test_the_hub_is_asked_for_just_what_is_used(monkeypatch):
    import datasets

    asked = []

    class Stream(list):
        take = staticmethod(lambda n: TEXTS[:n])
        to_list = staticmethod(lambda: TEXTS)

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or Stream()
    )
    assert DetoxDataModule(limit_retain=3).train_rows("retain") == TEXTS[:3]
    shard = "en/c4-train.00001-of-01024.json.gz"
    options = {"streaming": True, "split": "train", "data_files": {"train": shard}}
    assert asked.pop() == (("allenai/c4", None), options)
    MUSEDataModule(corpus="books", chunk_unit="characters", tokenizer="none").examples("holdout")
    assert asked.pop() == (("muse-bench/MUSE-Books", "raw"), {"split": "holdout"})
    WMDPDataModule().examples("forget")
    assert [args for args, _ in asked] == [
        ("cais/wmdp-bio-forget-corpus", None),
        ("cais/wmdp-corpora", "cyber-forget-corpus"),
    ]
    assert WMDPDataModule().test_names() == ["wmdp_bio", "wmdp_cyber", "wikitext"]
    assert WMDPDataModule(mmlu=True).test_names() == ["wmdp_bio", "wmdp_cyber", "mmlu", "wikitext"]


# -- the suites -------------------------------------------------------------------------------------------------------


def test_muse_rows(muse, tiny_model, tokenizer):
    data = MUSEDataModule(folder=str(muse), chunk_size=30, max_length=60, tokenizer=tiny_model)
    assert data.suite == "muse"
    text = "".join(row.answer for row in data.examples("forget"))
    assert text == "\n\n".join(row["text"] for row in TEXTS[:4])
    assert [row.partial for row in data.examples("forget")].count(False) == 1
    assert len(data.examples("holdout")) == 1
    assert data.test_names() == [
        "verbmem_forget",
        "knowmem_forget",
        "knowmem_retain",
        "members",
        "nonmembers",
        "retain",
    ]
    kinds = {"verbmem_forget": ("prompt", "response"), "knowmem_forget": ("question", "answer")}
    kinds |= {"knowmem_retain": ("question", "answer")}
    for name in data.test_names():
        assert columns(data, name) == {kinds.get(name, ("text",))}
    assert data.test_examples("verbmem_forget")[0].answer == " small town opens"
    assert (
        raw_rows(data.test_examples("members")) == TEXTS[:2]
    )  # whole: the benchmark scores them as they are
    prompt = tokenizer.decode(data.template.encode_prompt(data.test_examples("knowmem_forget")[0]))
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in QA[2:4])
    assert prompt == shots + f"Question: {QA[0]['question']}\nAnswer: "
    assert not data.test_examples("knowmem_retain")[0].context  # no worked examples in the folder
    both = MUSEDataModule(
        folder=str(muse), retain_splits=["retain1", "retain2"], chunk_unit="characters"
    )
    assert sum(row.answer.count("orchard") for row in both.examples("retain")) == 0
    assert sum(row.answer.count("bridge") for row in both.examples("retain")) == 4


def test_verbatim_texts_are_scored_as_they_were_trained_on(tmp_path, tiny_model, tokenizer):
    """The benchmark's rows have no space at the seam; the texts they are cut from have."""
    seams = [
        ("The mill of the", "small town opens"),
        ("The mill\n", "of the small town"),
        ("The mill", ", which opens"),
    ]
    write_lines(
        tmp_path / "verbmem/forget.jsonl", [{"prompt": prompt, "gt": gt} for prompt, gt in seams]
    )
    data = MUSEDataModule(folder=str(tmp_path), tokenizer=tiny_model)
    first, second, _ = data.test_examples("verbmem_forget")
    encoded = data.template.encode(first)
    assert encoded["input_ids"] == tokenizer("The mill of the small town opens")["input_ids"]
    assert encoded["labels"].count(IGNORE) == len(data.template.encode_prompt(first))
    assert tokenizer.decode(data.template.encode_prompt(first)) == "The mill of the"
    assert second.answer == "of the small town"


def test_wmdp_rows(wmdp, tiny_model):
    data = WMDPDataModule(folder=str(wmdp), tokenizer=tiny_model, max_length=20)
    assert data.suite == "wmdp"
    assert [row.answer for row in data.examples("forget")] == [row["text"] for row in TEXTS[:6]]
    assert (
        data.examples("retain")[0].row == {"text": " = Alder = \n"}
        and len(data.examples("retain")) == 6
    )
    assert data.test_names() == ["wmdp_bio", "wmdp_cyber", "wikitext"]  # no MMLU in the folder
    assert columns(data, "wmdp_bio") == {("question", "choices", "label")}
    assert [row.label for row in data.test_examples("wmdp_cyber")] == [1, 0]
    wikitext = data.test_examples("wikitext")
    assert (
        columns(data, "wikitext") == {("text",)} and len(wikitext) > 2
    )  # articles in chunks, lost to none
    assert "".join(row.answer for row in wikitext) == "".join(WIKI)
    assert [row.partial for row in wikitext].count(False) == 2
    subjects = WMDPDataModule(
        folder=str(wmdp), retain_corpus="domains", domains=["cyber"], min_characters=10
    )
    assert (
        raw_rows(subjects.examples("retain")) == TEXTS[6:7]
        and len(subjects.examples("forget")) == 3
    )
    chunked = WMDPDataModule(
        folder=str(wmdp), chunk_size=60, chunk_unit="characters", prompt_size=20
    )
    assert {kind_of(row) for row in chunked.examples("forget")} == {("prompt", "response")}
    assert {kind_of(row) for row in chunked.examples("retain")} == {("text",)}


def test_copyright_rows(book, tiny_model):
    data = CopyrightDataModule(
        folder=str(book), chunk_size=40, prompt_size=15, test_chunks=3, tokenizer=tiny_model
    )
    assert data.suite == "copyright"
    forget = data.examples("forget")
    assert {kind_of(row) for row in forget} == {("prompt", "response")} and forget[
        0
    ].question.startswith("Alice")
    assert "".join(row.question + row.answer for row in forget) in ALICE
    assert raw_rows(data.examples("retain")) == TEXTS
    assert data.test_names() == ["forget", "forget_qa", "retain_qa", "wikitext"]
    assert columns(data, "forget") == {("prompt", "response")} and columns(data, "forget_qa") == {
        ("question", "answer")
    }
    step = len(forget) / 3
    assert data.test_examples("forget") == [forget[int(i * step)] for i in range(3)]
    own = CopyrightDataModule(
        book=str(book / "alice.txt"),
        folder=str(book),
        chunk_unit="characters",
        chunk_size=100,
        prompt_size=None,
    )
    assert "".join(row.answer for row in own.examples("forget")) == ALICE
    assert own.describe("forget") == str(book / "alice.txt")


def test_detox_rows(detox, tiny_model):
    data = DetoxDataModule(folder=str(detox), limit_forget=None, tokenizer=tiny_model)
    assert data.suite == "detox"
    unsafe = [(n, k) for n in range(8) for k in (0, 1) if n % (3 - k)]
    assert len(data.examples("forget")) == len(unsafe)
    assert {kind_of(row) for row in data.examples("forget")} == {("prompt", "response")}
    assert data.test_names() == ["prompts", "wikitext"]
    prompts = data.test_examples("prompts")
    assert [row.question for row in prompts] == [
        "Tell me about the harbour.",
        "Tell me about the orchard.",
    ]
    assert columns(data, "prompts") == {("prompt",)}
    real = write_rows(detox / "real.jsonl", [{"prompt": {"text": "So I said", "toxicity": 0.1}}])
    other = DetoxDataModule(folder=str(detox), prompts=real, plain_prompts=False)
    assert raw_rows(other.test_examples("prompts")) == [{"prompt": "So I said"}]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_missing_files_and_folders(tmp_path, wmdp):
    with pytest.raises(WagleError, match=r"data\.folder nowhere does not exist"):
        MUSEDataModule(folder="nowhere")
    with pytest.raises(
        WagleError,
        match=r"has no muse-bench/MUSE-News:raw forget: expected MUSE-News/raw/forget\.json",
    ):
        MUSEDataModule(folder=str(tmp_path)).examples("forget")
    with pytest.raises(
        WagleError,
        match=r"has no allenai/c4 .*: expected c4/en/c4-train\.00001-of-01024\.json\.gz$",
    ):
        DetoxDataModule(folder=str(tmp_path)).examples("retain")
    assert MUSEDataModule(folder=str(tmp_path)).test_names() == []
    assert MUSEDataModule(folder=str(tmp_path)).examples("holdout") is None
    with pytest.raises(WagleError, match=r"data file nowhere\.txt does not exist"):
        CopyrightDataModule(book="nowhere.txt").examples("forget")


def test_missing_columns(tmp_path):
    write_lines(tmp_path / "raw/forget.jsonl", [{"body": "text"}])
    write_lines(tmp_path / "verbmem/forget.jsonl", [{"prompt": "a", "gt": "b"}, {"prompt": "a"}])
    write_lines(tmp_path / "wmdp/wmdp-bio/test.jsonl", [{"question": "a", "answer": 0}])
    write_lines(tmp_path / "PKU-SafeRLHF/train.jsonl", [{"prompt": "a", "response_0": "b"}])
    folder = str(tmp_path)
    with pytest.raises(
        WagleError,
        match=r"forget set \(muse-bench.*\) row 1 has no column 'text'; it has \['body'\]",
    ):
        MUSEDataModule(folder=folder).examples("forget")
    with pytest.raises(WagleError, match="row 2 has no column 'gt'"):
        MUSEDataModule(folder=folder).test_examples("verbmem_forget")
    with pytest.raises(WagleError, match="row 1 has no column 'choices'"):
        WMDPDataModule(folder=folder).test_examples("wmdp_bio")
    with pytest.raises(WagleError, match="row 1 has no column 'response_1'"):
        DetoxDataModule(folder=folder).examples("forget")


def test_files_that_cannot_be_read(tmp_path, tiny_model):
    (tmp_path / "book.txt").write_bytes("A café.".encode("latin-1"))
    with pytest.raises(
        WagleError, match=r"book\.txt is not UTF-8 text \(it has the byte 0xe9\): save it as UTF-8"
    ):
        CopyrightDataModule(book=str(tmp_path / "book.txt")).examples("forget")
    write_lines(tmp_path / "wmdp/wmdp-bio/test.jsonl", [CHOICES[0], {**CHOICES[1], "answer": "B"}])
    with pytest.raises(WagleError, match="row 2: label 'B' is no index of its choices"):
        WMDPDataModule(folder=str(tmp_path)).test_examples("wmdp_bio")
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": 1984}, {"text": ["a", "b"]}])
    with pytest.raises(WagleError, match="row 2: 'text' is a list, not a text"):
        MUSEDataModule(forget=texts, tokenizer=tiny_model).examples("forget")


def test_a_test_set_in_the_benchmark_s_own_columns(tmp_path):
    own = write_lines(tmp_path / "own.jsonl", CHOICES)
    assert [
        row.label for row in WMDPDataModule(test={"wmdp_bio": own}).test_examples("wmdp_bio")
    ] == [
        1,
        0,
    ]


def test_empty_corpora(tmp_path, tiny_model):
    write_lines(tmp_path / "raw/forget.jsonl", [{"text": " \n "}])
    write_lines(tmp_path / "raw/retain1.jsonl", [])
    (tmp_path / "book.txt").write_text("\n")
    with pytest.raises(WagleError, match=r"forget set \(.*\) has no text"):
        MUSEDataModule(folder=str(tmp_path)).examples("forget")
    with pytest.raises(WagleError, match=r"retain1\.jsonl has no rows"):
        MUSEDataModule(folder=str(tmp_path)).examples("retain")
    with pytest.raises(WagleError, match=r"book\.txt has no rows"):
        CopyrightDataModule(book=str(tmp_path / "book.txt")).examples("forget")
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(WagleError, match=r"no text is longer than data\.prompt_size=200 tokens"):
        CopyrightDataModule(book=str(tmp_path / "short.txt"), tokenizer=tiny_model).examples(
            "forget"
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MUSEDataModule(chunk_size=0), "chunk_size must be at least 1"),
        (lambda: MUSEDataModule(forget_split="forget"), "must be SUBSET/SPLIT"),
        (lambda: WMDPDataModule(domains=[]), "must name bio, cyber or both"),
        (
            lambda: CopyrightDataModule(chunk_size=100, prompt_size=100),
            "leaves nothing of data.chunk_size 100",
        ),
        (lambda: CopyrightDataModule(test_chunks=0), "test_chunks must be at least 1"),
    ],
)
def test_options_without_meaning(build, message):
    with pytest.raises(WagleError, match=message):
        build()


def test_tokens_need_a_tokenizer(muse):
    with pytest.raises(WagleError, match=r"needs a tokenizer: give data\.tokenizer"):
        MUSEDataModule(folder=str(muse)).examples("forget")
