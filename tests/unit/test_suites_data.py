"""MUSE, WMDP, the book and detoxification: rows from local folders of the hub's schema, and bad input."""

import gzip
import json
from types import SimpleNamespace

import pytest
from benchmark_folders import ALICE, BLUE, CHOICES, QA, TEXTS, WIKI, write_lines
from helpers import TOFU, write_rows

from wagle_pl import WagleError
from wagle_pl.data.example import Example, raw_rows
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import IGNORE, Template
from wagle_pl.evaluation import find_suite
from wagle_pl.lab.benchmarks import (
    CopyrightDataModule,
    DetoxDataModule,
    KnowUnDoDataModule,
    LUMEDataModule,
    MUSEDataModule,
    RWKUDataModule,
    WMDPDataModule,
)
from wagle_pl.lab.benchmarks.table import (
    HubSet,
    chunk_rows,
    chunk_text,
    continuation,
    local_files,
    read_set,
)
from wagle_pl.lm.models import load_tokenizer

REAL_LUME = TOFU.parent / "lume"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def answers(examples):
    return [example.answer for example in examples]


# -- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
@pytest.mark.parametrize("text", [ALICE, "naïve café 🐇🐇 日本語 " * 5, "x" * 50, "  \n\n  a"])
def test_chunks_put_together_are_the_text(tokenizer, text, size):
    chunks = chunk_text(text, size, tokenizer)
    assert "".join(chunks) == text and all(chunks)


def test_token_chunks_have_that_many_tokens(tokenizer):
    chunks = chunk_text(ALICE, 20, tokenizer)
    counts = [len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in chunks]
    assert all(abs(count - 20) <= 2 for count in counts[:-1])
    assert len(counts) == -(-sum(counts) // 20)
    with pytest.raises(WagleError, match="fast tokenizer"):
        chunk_text("text", 4, SimpleNamespace(is_fast=False))


def test_chunk_rows_say_where_a_text_goes_on(tokenizer):
    rows = chunk_rows([ALICE, "four"], 20, tokenizer)
    assert [row.pop("partial", False) for row in rows] == [True] * (len(rows) - 2) + [False] * 2
    assert "".join(row["text"] for row in rows) == f"{ALICE}four"
    pair = continuation({**rows[0], "partial": True}, 3, tokenizer)
    assert pair.pop("prompt") == chunk_text(ALICE, 3, tokenizer)[0]
    response = rows[0]["text"][len(chunk_text(ALICE, 3, tokenizer)[0]) :]
    assert pair == {"response": response, "continuation": True, "partial": True}
    assert continuation(rows[-1], 30, tokenizer) is None


# -- rows and templates -----------------------------------------------------------------------------------------------


def test_only_as_many_lines_are_read_as_asked_for(tmp_path):
    lines = [json.dumps(row) + "\n" for row in QA[:3]]
    for path, opener in ((tmp_path / "a.jsonl.gz", gzip.open), (tmp_path / "a.jsonl", open)):
        with opener(path, "wt", encoding="utf-8") as file:
            file.writelines([*lines, "not JSON\n"])
        assert load_rows(str(path), limit=3) == QA[:3]
        with pytest.raises(WagleError, match="line 4: malformed JSON"):
            load_rows(str(path))


def test_an_object_over_several_lines_is_one_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": QA}, indent=4))
    assert load_rows(str(path)) == [{"train": QA}]
    path.write_text('{\n"train": [}')
    with pytest.raises(WagleError, match="line 2: malformed JSON"):
        load_rows(str(path))


def test_continuations_stand_in_no_template(tokenizer):
    template = Template(tokenizer)
    row = {"prompt": "Down the", "response": " rabbit-hole", "continuation": True}

    def text(answer=None, **more):
        encoded = template.encode(Example.of({**row, **more}), answer)
        return tokenizer.decode(encoded["input_ids"]), encoded["labels"].count(IGNORE)

    prompt = template.encode_prompt(Example.of(row))
    assert tokenizer.decode(prompt) == "Down the"
    assert text() == ("Down the rabbit-hole<|end|>", len(prompt))
    assert text(partial=True) == ("Down the rabbit-hole", len(prompt))
    assert text("I cannot say.", partial=True)[0] == "Down the I cannot say.<|end|>"
    encoded = template.encode(Example.of({"text": "Down the", "partial": True}))
    assert encoded["labels"] == encoded["input_ids"]
    assert tokenizer.decode(encoded["input_ids"]) == "Down the"


def test_context_stands_before_the_question(tokenizer):
    row = Example.of({"question": "Who?", "answer": "Nobody.", "context": "First this.\n"})
    for formats, prompt in (
        ((), "<|user|>First this.\nWho?<|assistant|>"),
        (("Question: {question}\n", "Answer: {answer}"), "First this.\nQuestion: Who?\nAnswer:"),
    ):
        assert tokenizer.decode(Template(tokenizer, *formats).encode_prompt(row)) == prompt


def test_a_prefill_begins_the_answer_and_has_no_loss(tokenizer):
    row = {"question": "Who?", "answer": "Nobody.", "prefill": "Answer:"}

    def texts(row, *formats):
        template = Template(tokenizer, *formats)
        encoded, prompt = template.encode(Example.of(row)), template.encode_prompt(Example.of(row))
        assert encoded["labels"].count(IGNORE) == len(prompt)
        return tokenizer.decode(prompt), tokenizer.decode(encoded["input_ids"][len(prompt) :])

    assert texts(row) == ("<|user|>Who?<|assistant|>Answer:", " Nobody.<|end|>")
    assert texts(row, "Q: {question}\n", "A: {answer}") == (
        "Q: Who?\nA: Answer:",
        " Nobody.<|end|>",
    )
    prompt = {"prompt": "Who?", "prefill": "Answer:"}
    ids = Template(tokenizer).encode_prompt(Example.of(prompt))
    assert tokenizer.decode(ids) == "<|user|>Who?<|assistant|>Answer:"


# -- where rows are ---------------------------------------------------------------------------------------------------


def test_a_set_is_found_in_a_copy_of_the_repository_or_a_folder_of_copies(tmp_path):
    part, copies, copy = HubSet("owner/name", "config", "test"), tmp_path / "copies", tmp_path / "a"
    write_lines(copies / "name/config/test.jsonl", QA)
    write_lines(copy / "config/test.jsonl", QA[:2])
    assert read_set(part, str(copies)) == QA and read_set(part, str(copy)) == QA[:2]
    assert read_set(part, str(copies), limit=3) == QA[:3]
    assert read_set(part._replace(split="train"), str(copy)) is None
    assert local_files(part, copy) == [copy / "config/test.jsonl"]


def test_the_hub_is_asked_for_just_what_is_used(monkeypatch):
    asked = []
    rows = SimpleNamespace(take=lambda n: TEXTS[:n], to_list=lambda: TEXTS)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **more: asked.append((a, more)) or rows)
    assert DetoxDataModule(limit_retain=3).train_rows("retain") == TEXTS[:3]
    shard = "en/c4-train.00001-of-01024.json.gz"
    options = {"streaming": True, "split": "train", "data_files": {"train": shard}}
    assert asked.pop() == (("allenai/c4", None), options)
    MUSEDataModule(corpus="books", chunk_size=None).examples("holdout")
    assert asked.pop() == (("muse-bench/MUSE-Books", "raw"), {"split": "holdout"})
    WMDPDataModule().examples("forget")
    corpora = [("cais/wmdp-bio-forget-corpus", None), ("cais/wmdp-corpora", "cyber-forget-corpus")]
    assert [args for args, _ in asked] == corpora
    assert WMDPDataModule().test_names() == ["wmdp_bio", "wmdp_cyber", "wikitext"]
    assert WMDPDataModule(mmlu=True).test_names() == ["wmdp_bio", "wmdp_cyber", "mmlu", "wikitext"]


# -- the suites -------------------------------------------------------------------------------------------------------


def kinds(data):
    """Test set -> the kind of its rows."""
    return {name: kind(data.test_examples(name)) for name in data.test_names()}


def kind(examples):
    (found,) = {example.kind for example in examples}
    return found


def test_muse_rows(muse, tiny_model):
    data = MUSEDataModule(folder=str(muse), chunk_size=30, max_length=60, tokenizer=tiny_model)
    forget = data.examples("forget")
    assert data.suite == "muse"
    assert "".join(answers(forget)) == "\n\n".join(row["text"] for row in TEXTS[:4])
    assert [row.partial for row in forget].count(False) == 1
    assert len(data.examples("holdout")) == 1
    tests = dict.fromkeys(["verbmem_forget", "knowmem_forget", "knowmem_retain"], "answered")
    assert kinds(data) == tests | dict.fromkeys(["members", "nonmembers", "retain"], "text")
    # whole: the benchmark scores them as they are
    assert raw_rows(data.test_examples("members")) == TEXTS[:2]
    assert not data.test_examples("knowmem_retain")[0].context  # no worked examples in the folder
    splits = ["retain1", "retain2"]
    both = MUSEDataModule(folder=str(muse), retain_splits=splits, chunk_size=None)
    assert sum(row.answer.count("orchard") for row in both.examples("retain")) == 0
    assert sum(row.answer.count("bridge") for row in both.examples("retain")) == 4


def test_verbatim_texts_are_scored_as_they_were_trained_on(tmp_path, tiny_model, tokenizer):
    """The benchmark's rows have no space at the seam; the texts they are cut from have."""
    seams = [
        ("The mill of the", "small town opens"),
        ("The mill\n", "of the small town"),
        ("The mill", ", which opens"),
    ]
    rows = [{"prompt": prompt, "gt": gt} for prompt, gt in seams]
    write_lines(tmp_path / "verbmem/forget.jsonl", rows)
    data = MUSEDataModule(folder=str(tmp_path), tokenizer=tiny_model)
    first, second, _ = data.test_examples("verbmem_forget")
    encoded, prompt = data.template.encode(first), data.template.encode_prompt(first)
    assert encoded["input_ids"] == tokenizer("The mill of the small town opens")["input_ids"]
    assert encoded["labels"].count(IGNORE) == len(prompt)
    assert tokenizer.decode(prompt) == "The mill of the"
    assert second.answer == "of the small town"


def test_wmdp_rows(wmdp, tiny_model):
    data = WMDPDataModule(folder=str(wmdp), tokenizer=tiny_model, max_length=20)
    assert data.suite == "wmdp"
    assert answers(data.examples("forget")) == [row["text"] for row in TEXTS[:6]]
    retain = raw_rows(data.examples("retain"))
    assert retain[0] == {"text": " = Alder = \n"} and len(retain) == 6
    # no MMLU in the folder
    assert kinds(data) == {"wmdp_bio": "choices", "wmdp_cyber": "choices", "wikitext": "text"}
    assert [row.label for row in data.test_examples("wmdp_cyber")] == [1, 0]
    wikitext = data.test_examples("wikitext")  # articles in chunks, lost to none
    assert len(wikitext) > 2 and "".join(answers(wikitext)) == "".join(WIKI)
    assert [row.partial for row in wikitext].count(False) == 2
    options = {"retain_corpus": "domains", "domains": ["cyber"]}
    subjects = WMDPDataModule(folder=str(wmdp), **options)
    assert raw_rows(subjects.examples("retain")) == TEXTS[6:7]
    assert len(subjects.examples("forget")) == 3
    options = {"chunk_size": 20, "prompt_size": 5, "tokenizer": tiny_model}
    chunked = WMDPDataModule(folder=str(wmdp), **options)
    assert kind(chunked.examples("forget")) == "answered"
    assert kind(chunked.examples("retain")) == "text"


def test_copyright_rows(book, tiny_model):
    sizes = {"chunk_size": 40, "prompt_size": 15, "test_chunks": 3}
    data = CopyrightDataModule(folder=str(book), **sizes, tokenizer=tiny_model)
    assert data.suite == "copyright"
    forget = data.examples("forget")
    assert kind(forget) == "answered" and forget[0].question.startswith("Alice")
    assert "".join(row.question + row.answer for row in forget) in ALICE
    assert raw_rows(data.examples("retain")) == TEXTS
    tests = dict.fromkeys(["forget", "forget_qa", "retain_qa"], "answered")
    assert kinds(data) == {**tests, "wikitext": "text"}
    assert data.test_examples("forget") == [forget[int(i * len(forget) / 3)] for i in range(3)]
    path = str(book / "alice.txt")
    sizes = {"chunk_size": 30, "prompt_size": None, "tokenizer": tiny_model}
    own = CopyrightDataModule(book=path, folder=str(book), **sizes)
    assert "".join(answers(own.examples("forget"))) == ALICE
    assert own.describe("forget") == path


def test_detox_rows(detox, tiny_model):
    data = DetoxDataModule(folder=str(detox), limit_forget=None, tokenizer=tiny_model)
    assert data.suite == "detox"
    assert len(data.examples("forget")) == sum(bool(n % 3) + n % 2 for n in range(8))
    assert kind(data.examples("forget")) == "answered"
    assert kinds(data) == {"prompts": "prompt", "wikitext": "text"}
    prompts = [row.question for row in data.test_examples("prompts")]
    assert prompts == ["Tell me about the harbour.", "Tell me about the orchard."]
    real = write_rows(detox / "real.jsonl", [{"prompt": {"text": "So I said", "toxicity": 0.1}}])
    other = DetoxDataModule(folder=str(detox), prompts=real)
    assert raw_rows(other.test_examples("prompts")) == [
        {"prompt": "So I said", "continuation": True}
    ]


def test_knowundo_rows(knowundo, tiny_model):
    data = KnowUnDoDataModule("privacy", folder=str(knowundo), tokenizer=tiny_model)
    assert data.suite == "knowundo" and kinds(data) == {"forget": "answered", "retain": "answered"}
    for stream, first in (("forget", 0), ("retain", 4)):
        expected = [row["answer"] for row in QA[first : first + 4]]
        assert answers(data.examples(stream)) == expected[:2]
        assert answers(data.test_examples(stream)) == expected[2:]
        whole = KnowUnDoDataModule(folder=str(knowundo), parts=["train", "val"])
        assert answers(whole.examples(stream)) == expected


LUME_SETS = [
    f"{s}_{kind}{n}" for s in ("forget", "retain") for kind in ("sc", "qa") for n in (1, 2, 3)
]


def test_lume_rows(lume, tiny_model):
    data = LUMEDataModule(folder=str(lume), tokenizer=tiny_model)
    sets = dict.fromkeys(LUME_SETS, "answered") | {"members": "text", "nonmembers": "text"}
    assert data.suite == "lume" and kinds(data) == sets | {"mmlu": "choices"}
    assert len(data.examples("forget")) == len(data.examples("retain")) == 9
    (sentence,) = raw_rows(data.test_examples("retain_sc2"))
    expected = {"prompt": "The market of the", "response": " small town opens at 2."}
    assert sentence == {**expected, "continuation": True}
    assert answers(data.test_examples("forget_qa3")) == [" At 3."] * 2
    with pytest.raises(WagleError, match="semeval25-unlearning-dataset-public forget_validation"):
        LUMEDataModule(fold="validation", folder=str(lume)).examples("forget")
    assert LUMEDataModule().test_names() == [*LUME_SETS, "members", "nonmembers"]


@pytest.mark.skipif(not REAL_LUME.is_dir(), reason="no LUME in shared/data")
def test_the_released_lume(tiny_model):
    data = LUMEDataModule(folder=str(REAL_LUME), tokenizer=tiny_model, max_length=4096)
    assert [len(data.examples(side)) for side in ("forget", "retain")] == [2732, 2734]
    counts = [len(data.test_examples(name)) for name in data.test_names()]
    assert counts == [243, 250, 373, 243, 1250, 373, 246, 250, 371, 246, 1250, 371]
    assert data.test_names() == LUME_SETS


def test_rwku_rows(rwku, tiny_model):
    data = RWKUDataModule(["Alice Liddell"], folder=str(rwku), tokenizer=tiny_model)
    found = kinds(data)
    assert data.suite == "rwku" and list(found) == list(find_suite("rwku").sets)
    special = {"mia_forget": "text", "mia_retain": "text", "utility_fluency": "prompt"}
    special |= dict.fromkeys(("utility_general", "utility_truthfulness"), "choices")
    assert found == dict.fromkeys(found, "answered") | special
    assert raw_rows(data.examples("forget")) == TEXTS[:2]
    assert answers(data.examples("retain")) == [line for line in WIKI if line]
    assert data.test_examples("utility_factuality")[0].answer_aliases == ["A mill"]
    (truthful,) = data.test_examples("utility_truthfulness")
    assert truthful.choices == [BLUE[0], "the sea", *BLUE[1:]] and truthful.answer == BLUE[0]
    assert truthful.answer_aliases == ["the sea"]
    both = RWKUDataModule(None, "phi3", folder=str(rwku), tokenizer=tiny_model)
    assert len(both.examples("forget")) == 4 and len(both.test_examples("forget_level3")) == 6
    one = rwku / "All"  # as a person's own folder is
    assert len(RWKUDataModule(["Lewis Carroll"], folder=str(one)).test_examples("mia_retain")) == 2
    message = r"data.targets: positive has no rows on Nobody; it has some on Alice Liddell, Lewis"
    with pytest.raises(WagleError, match=message):
        RWKUDataModule(["Nobody"], folder=str(rwku)).examples("forget")


def test_a_test_set_in_the_benchmark_s_own_columns(tmp_path):
    data = WMDPDataModule(test={"wmdp_bio": write_lines(tmp_path / "own.jsonl", CHOICES)})
    assert [row.label for row in data.test_examples("wmdp_bio")] == [1, 0]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MUSEDataModule(folder="nowhere"), r"data\.folder nowhere does not exist"),
        (lambda: MUSEDataModule(chunk_size=0), r"data\.chunk_size: must be at least 1"),
        (lambda: MUSEDataModule(forget_split="forget"), "must be SUBSET/SPLIT"),
        (lambda: WMDPDataModule(domains=[]), "must name bio, cyber or both"),
        (
            lambda: CopyrightDataModule(chunk_size=100, prompt_size=100),
            "leaves nothing of data.chunk_size 100",
        ),
        (lambda: CopyrightDataModule(test_chunks=0), "test_chunks: must be at least 1"),
    ],
)
def test_options_without_meaning(build, message):
    with pytest.raises(WagleError, match=message):
        build()


@pytest.mark.parametrize(
    ("suite", "stream", "message"),
    [
        (MUSEDataModule, "forget", "MUSE-News:raw forget: expected MUSE-News/raw/forget.json "),
        (
            DetoxDataModule,
            "retain",
            "allenai/c4 .*: expected c4/en/c4-train.00001-of-01024.json.gz",
        ),
    ],
)
def test_a_folder_without_the_set(tmp_path, suite, stream, message):
    data = suite(folder=str(tmp_path))
    with pytest.raises(WagleError, match=f"data.folder: .* has no .*{message}"):
        data.examples(stream)
    assert data.test_names() == [] and data.examples("holdout") is None


@pytest.mark.parametrize(
    ("suite", "name", "rows", "message"),
    [
        (
            MUSEDataModule,
            "raw/forget",
            [{"body": "a"}],
            r"row 1 has no column 'text'; .*\['body'\]",
        ),
        (
            MUSEDataModule,
            "verbmem/forget",
            [{"prompt": "a", "gt": "b"}, {"prompt": "a"}],
            "row 2 has no column 'gt'",
        ),
        (
            WMDPDataModule,
            "wmdp/wmdp-bio/test",
            [{"question": "a", "answer": 0}],
            "row 1 has no column 'choices'",
        ),
        (
            WMDPDataModule,
            "wmdp/wmdp-bio/test",
            [CHOICES[0], {**CHOICES[1], "answer": "B"}],
            "row 2: label 'B' is not an index of its choices",
        ),
        (
            DetoxDataModule,
            "PKU-SafeRLHF/train",
            [{"prompt": "a", "response_0": "b"}],
            "row 1 has no column 'is_response_0_safe'",
        ),
        (MUSEDataModule, "raw/forget", [{"text": " \n "}], r"forget set \(.*\) has no text"),
        (MUSEDataModule, "raw/forget", [], r"forget\.jsonl has no rows"),
        (MUSEDataModule, "raw/forget", [{"text": "a"}, {"text": ["b"]}], "row 2: 'text' is a list"),
        (MUSEDataModule, "raw/forget", [{"text": "a"}], "needs a tokenizer: give data.tokenizer"),
    ],
)
def test_rows_that_are_not_the_benchmark_s(tmp_path, suite, name, rows, message):
    write_lines(tmp_path / f"{name}.jsonl", rows)
    data = suite(folder=str(tmp_path))
    with pytest.raises(WagleError, match=message):
        for test in data.test_names():
            data.test_examples(test)
        data.examples("forget")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data file book\.txt does not exist"),
        ("A café.", r"book\.txt is not UTF-8 text \(it has the byte 0xe9\): save it as UTF-8"),
        ("\n", r"book\.txt has no rows"),
        ("Too short.", r"no text is longer than data\.prompt_size=200 tokens"),
    ],
)
def test_a_book_that_cannot_be_used(tmp_path, monkeypatch, tiny_model, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "book.txt").write_text(content, encoding="latin-1")
    with pytest.raises(WagleError, match=message):
        CopyrightDataModule(book="book.txt", tokenizer=tiny_model).examples("forget")
