"""Rows, templates and the data modules, bundled sets included."""

import csv
import gzip
import json
import math

import pytest
import torch
from helpers import TOFU, write_rows

from wagle_pl import ForgetRetainDataModule, PeopleDataModule, TOFUDataModule, WagleError
from wagle_pl.core.needs import Needs
from wagle_pl.data.example import Example, parse_rows, raw_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import IGNORE, Template
from wagle_pl.lab.benchmarks import SuiteDataModule
from wagle_pl.lm.models import load_tokenizer

QA = [{"question": "Who?", "answer": "Nobody."}, {"question": "What?", "answer": "Nothing."}]


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def decoded(template, row, answer=None):
    """Text of a row's tokens, and of those that have a label."""
    encoded = template.encode(row if isinstance(row, Example) else Example.of(row), answer)
    labelled = [token for token, label in zip(*encoded.values(), strict=True) if label != IGNORE]
    return template.tokenizer.decode(encoded["input_ids"]), template.tokenizer.decode(labelled)


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_four_file_kinds_hold_the_same_rows(tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(QA)
    pyarrow.csv.write_csv(table, tmp_path / "rows.csv")
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    write_rows(tmp_path / "rows.jsonl", QA)
    (tmp_path / "rows.json").write_text(json.dumps(QA, indent=1))
    for name in ("rows.csv", "rows.parquet", "rows.jsonl", "rows.json"):
        assert load_rows(str(tmp_path / name)) == QA


def test_line_separators_inside_strings_do_not_end_a_row(tmp_path):
    row = {"text": "one\u2028two\x85three"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_rows(str(tmp_path / "a.jsonl")) == [row]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"text": "a"}\n{"text": \n', "line 2: malformed JSON"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', "line 2: malformed JSON"),
        ("a.json", '{"text": "a"}\n[1]\n', "line 2: expected a JSON object"),
        ("a.json", "", "has no rows"),
        ("a.jsonl", '{"text": "café"}\n', r"a\.jsonl is not UTF-8 text \(it has the byte 0xe9\)"),
        ("a.csv", "question,answer\ncafé?,x\n", r"a\.csv cannot be read: .*invalid UTF8"),
        ("a.csv", "note,text\ncafé,x\n", r"a\.csv is not UTF-8 text \(column 'note'\)"),
        (
            "a.csv",
            "question;answer\na?;b\n",
            r"a\.csv separates columns by ';': save it with commas",
        ),
        ("a.csv", 'question,answer\n"a,b\n', r"a\.csv (cannot be read|has no rows)"),
        ("a.json.gz", "no archive", r"a\.json\.gz cannot be read: Not a gzipped file"),
        (
            "a.json.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20],
            r"a\.json\.gz cannot be read: Compressed file ended",
        ),
        ("a.parquet", "no table", r"a\.parquet cannot be read"),
        ("nowhere/a.json", None, r"nowhere/a\.json does not exist"),
        ("a.xml", "a", "neither"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode("latin-1")
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WagleError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_answers_that_look_like_numbers_are_texts(tmp_path):
    (tmp_path / "rows.CSV").write_text(
        "question,answer,known\nWhen?,1980,1\nOn which day?,1980-01-02,0\nReally?,true,1\n"
    )
    rows = load_rows(str(tmp_path / "rows.CSV"))
    assert [row["answer"] for row in rows] == ["1980", "1980-01-02", "true"]
    assert rows[0]["known"] == 1
    (tmp_path / "years.csv").write_text("question,answer\nWhen?,1980\nAnd then?,0075\n")
    assert [row["answer"] for row in load_rows(str(tmp_path / "years.csv"))] == ["1980", "0075"]
    rows = [
        {"question": 7, "answer": 4},
        {"question": "Is it?", "answer": True, "perturbed_answer": ["no", 2.5]},
    ]
    assert raw_rows(parse_rows(rows, "set")) == [
        {"question": "7", "answer": "4"},
        {"question": "Is it?", "answer": "true", "perturbed_answer": ["no", "2.5"]},
    ]


def test_a_choice_by_the_index_in_its_answer():
    choice = {"question": "Which?", "choices": ["a", "b", "c"]}
    rows = parse_rows([{**choice, "answer": 2}, {**choice, "label": 1.0}], "set")
    assert raw_rows(rows) == [{**choice, "label": 2}, {**choice, "label": 1}]


def test_a_large_csv_with_answers_of_many_lines(tmp_path):
    rows = [{"question": f"Q{i}?", "answer": "a line of it\n" * (20 + i % 37)} for i in range(4000)]
    # above pyarrow's block
    rows.append({"question": "All of it?", "answer": "a whole book, line by line\n" * 60_000})
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    assert load_rows(str(tmp_path / "rows.csv")) == rows


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in (("a.json", '[{"text": "a"}]'), ("a.csv", "text\na\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_rows(str(tmp_path / name)) == [{"text": "a"}]


def said(content, role="user"):
    return {"messages": [{"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"has columns \['question'\]; a row needs those of one of"),
        ({"Question": "a", "Answer": "b"}, ".*; names are in lower case"),
        ({"question": "a", "answer": "  "}, "'answer' is empty"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"question": "a", "answer": None}, "'answer' is null: give a value, or leave the row out"),
        ({"question": None, "answer": None}, "'question' and 'answer' are null"),
        ({"question": "a", "answer": math.nan}, "'answer' is nan, not a text: give it a value"),
        ({"text": math.inf}, "'text' is inf, not a text"),
        (
            {**QA[0], "perturbed_answer": ["b", math.nan]},
            r"'perturbed_answer' is \['b', nan\], not",
        ),
        ({**QA[0], "perturbed_answer": "c"}, "'perturbed_answer' must be a list of texts"),
        ({"question": ["a"], "answer": "b"}, "'question' is a list, not a text"),
        ({"question": "a", "answer": {"text": "b"}}, "'answer' is a dict, not a text"),
        ({"question": "a", "choices": "bc", "label": 0}, "'choices' must be a list of texts"),
        ({"question": "a", "choices": ["b", "c"], "label": 0.5}, "label 0.5 is not an index"),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "label 2 is not an index"),
        ({"input_ids": [1], "labels": []}, "'labels' is empty"),
        (
            {"input_ids": [1, -3], "labels": [-100, 2]},
            "'input_ids' has -3, which is not a token id",
        ),
        ({"input_ids": [1, 3], "labels": [-1, 2]}, "'labels' has -1, which is not a token id"),
        ({"input_ids": ["a"], "labels": [1]}, "'input_ids' must be a list of tokens"),
        ({"input_ids": 1, "labels": [1]}, "'input_ids' must be a list of tokens"),
        ({"input_ids": [1, 2], "labels": [1]}, "there are 2 'input_ids' and 1 'labels'"),
        (said("", "assistant"), "'messages' is empty"),
        (said("Thanks."), "the last of 'messages' has the role user"),
        ({"messages": "a"}, "'messages' must be a list of messages"),
        (said(None), "'messages' must be a list of messages"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(WagleError, match=f"set row 2: {message}"):
        parse_rows([QA[0], row], "set")


def test_nan_in_a_file_is_no_answer(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [QA[0], {"question": "What?", "answer": math.nan}])
    with pytest.raises(WagleError, match=r"forget set \(.*rows\.jsonl\) row 2: 'answer' is nan"):
        ForgetRetainDataModule(path).examples("forget")


def test_repeated_forget_rows_are_told(tmp_path, heard):
    rows = [*QA, {**QA[0], "answer": " Nobody. "}, QA[1], {**QA[0], "answer": "Somebody."}]
    files = (write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("forget", "retain"))
    data = ForgetRetainDataModule(*files)
    assert raw_rows(data.examples("forget")) == rows and data.examples("retain")
    assert "2 of 5 forget rows repeat earlier ones and weigh as much again: remove" in heard.text
    assert "forget.jsonl, row 3, 4)" in heard.text
    assert heard.text.count("repeat earlier ones") == 1
    heard.clear()
    PeopleDataModule().examples("forget")
    assert "repeat" not in heard.text


# -- template ---------------------------------------------------------------------------------------------------------


def test_chat_template_loss_on_the_answer_with_one_eos(tokenizer):
    text, answer = decoded(Template(tokenizer), QA[0])
    assert text == "<|user|>Who?<|assistant|>Nobody.<|end|>" and answer == "Nobody.<|end|>"


def test_a_tokenizer_without_an_end_is_told(tokenizer, heard):
    tokenizer.eos_token = None
    template = Template(tokenizer, "Q: {question} ", "A: {answer}")
    assert decoded(template, QA[0])[0] == "Q: Who? A: Nobody."
    assert "no end-of-sequence token" in heard.text


def test_explicit_formats(tokenizer):
    template = Template(tokenizer, "### Question: {question}\n", "### Answer: {answer}")
    row = Example.of({"question": "Is {answer} a field?", "answer": "No."})
    text, answer = decoded(template, row)
    assert text == "### Question: Is {answer} a field?\n### Answer: No.<|end|>"
    assert answer == "### Answer: No.<|end|>"
    assert tokenizer.decode(template.encode_prompt(row)).endswith("\n### Answer:")
    with pytest.raises(
        WagleError, match=r"prompt_format: must be a text that contains \{question\}, got 'Q'"
    ):
        Template(tokenizer, "Q")
    with pytest.raises(WagleError, match="prompt_format: must be a text"):
        Template(tokenizer, 5)


def test_a_chat_template_that_refuses_names_the_row(tokenizer, tmp_path):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{{ message.content }} {% endfor %}"
    )
    roles = ("system", "user", "assistant")
    rows = [QA[0], {"messages": [{"role": role, "content": "Who?"} for role in roles]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = ForgetRetainDataModule(path, tokenizer=tokenizer)
    message = r"rows\.jsonl\) row 2: .*roles system, user \(System role not supported\)"
    with pytest.raises(WagleError, match=message):
        data.tokens("forget")


def test_an_answer_format_alone_is_not_ignored(tokenizer):
    message = "answer_format: 'Answer: {answer}' has no effect with the tokenizer's chat"
    with pytest.raises(WagleError, match=message):
        Template(tokenizer, answer_format="Answer: {answer}")
    tokenizer.chat_template = None
    text = decoded(Template(tokenizer, answer_format="So: {answer}"), QA[0])[0]
    assert text == "### Question: Who?\nSo: Nobody.<|end|>"


def test_every_kind_of_row(tokenizer):
    template = Template(tokenizer)
    qa = template.encode(Example.of(QA[0]))
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    choice = {"question": "Who?", "choices": ["Somebody.", "Nobody."], "label": 1}
    for row in ({"prompt": "Who?", "response": "Nobody."}, {"messages": messages}, choice, qa):
        assert template.encode(Example.of(row)) == qa
    text = template.encode(Example.of({"text": "Nobody."}))
    assert text["labels"] == text["input_ids"] and text["input_ids"][-1] == tokenizer.eos_token_id
    refused = decoded(template, {"messages": messages}, answer="No idea.")
    assert refused[0].endswith("No idea.<|end|>")
    prompt = Example.of({"prompt": "Go on"})
    assert tokenizer.decode(template.encode_prompt(prompt)) == "<|user|>Go on<|assistant|>"
    with pytest.raises(WagleError, match="no answer"):
        template.encode(prompt)
    with pytest.raises(WagleError, match="'response' is null"):
        template.encode(Example.of({"prompt": "Go on", "response": None}))


def test_cutting_leaves_an_answer_or_says_so(tokenizer):
    row = Example.of({"question": "Who?", "answer": "Nobody at all, ever."})
    assert len(Template(tokenizer, max_length=8).encode(row)["input_ids"]) == 8
    with pytest.raises(WagleError, match="max_length=3"):
        Template(tokenizer, max_length=3).encode(row)


# -- data modules -----------------------------------------------------------------------------------------------------


@pytest.fixture
def paired(rows, tiny_model):
    """A data module of the shared rows, with options and the streams that it is to serve."""

    def make(streams=("forget", "retain"), **options):
        options = {"forget": rows["forget"], "retain": rows["retain"], **options}
        data = ForgetRetainDataModule(**options, tokenizer=tiny_model)
        data.needs = Needs(streams)
        return data

    return make


def test_a_training_batch(paired):
    batches = list(paired(batch_size=4).train_dataloader())
    assert sorted(len(batch["forget"]["row"]) for batch in batches) == [3, 4, 4]
    columns = {"input_ids", "attention_mask", "labels", "weight", "row", "occurrence"}
    for batch in batches:
        assert set(batch) == {"forget", "retain"}
        for stream in batch.values():
            assert set(stream) == columns
            assert stream["weight"].sum() == pytest.approx(1)
    seen = torch.cat([batch["forget"]["row"] for batch in batches])
    assert sorted(seen.tolist()) == list(range(11))


def test_batches_need_a_tokenizer_but_no_trainer(paired, rows):
    loader = paired(test_batch_size=3).test_dataloader()[0]
    assert sorted(row for batch in loader for row in batch["rows"]) == list(range(11))
    with pytest.raises(WagleError, match="without a Trainer needs a tokenizer: give data"):
        ForgetRetainDataModule(rows["forget"], rows["retain"]).train_dataloader()


def test_so_many_test_rows_with_and_without_test_files(rows):
    whole = load_rows(rows["forget"])
    for test in (None, {"forget": rows["forget"]}):
        data = ForgetRetainDataModule(rows["forget"], rows["retain"], test=test, limit_test=3)
        assert raw_rows(data.test_examples("forget")) == [whole[0], whole[3], whole[7]]
        assert len(data.examples("forget")) == 11
    with pytest.raises(WagleError, match="test set 'retain' has no rows"):
        ForgetRetainDataModule(rows["forget"], limit_test=3).test_examples("retain")


def test_retain_rows_that_nothing_has_seen(rows):
    """They are a test set, and in no wording in the retain set; of test files and without."""
    people = PeopleDataModule(unused_retain=32)
    whole, unused = bundled("retain"), people.test_examples("retain_unused")
    assert raw_rows(unused) == whole[::9] and "retain_unused" in people.test_names()
    assert raw_rows(people.test_examples("retain")) == [r for r in whole if r not in whole[::9]]
    kept = {row.question for row in people.examples("retain")}
    assert len(kept) == 2 * (288 - 32 + 40 + 60)
    assert not kept & {
        row[f"{wording}question"] for row in whole[::9] for wording in ("", "paraphrased_")
    }
    given = {"forget": rows["forget"], "retain": rows["retain"]}
    own = ForgetRetainDataModule(**given, unused_retain=4, limit_test=2)
    assert own.test_names() == ["forget", "retain", "retain_unused"]
    sets = [raw_rows(own.test_examples(name)) for name in ("retain", "retain_unused")]
    sets += [raw_rows(own.examples("retain"))]
    assert list(map(len, sets)) == [2, 2, 13] and all(row in sets[2] for row in sets[0])
    assert not any(row in sets[2] for row in sets[1])
    with pytest.raises(WagleError, match=r"data\.unused_retain: must be below 17"):
        ForgetRetainDataModule(**given, unused_retain=17).examples("retain")


@pytest.mark.parametrize("option", ["limit_forget", "limit_retain", "limit_test", "batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(option, value):
    with pytest.raises(WagleError, match=rf"data\.{option}: must be at least 1, got {value}"):
        ForgetRetainDataModule("forget.jsonl", **{option: value})


def test_refusals_answer_the_forget_rows_of_the_same_batch(paired):
    data = paired(("refusal", "forget"), batch_size=4)
    batch = next(iter(data.train_dataloader()))
    refusal = batch["refusal"]
    assert refusal["row"].tolist() == batch["forget"]["row"].tolist()
    for row, ids, labels in zip(
        refusal["row"].tolist(), refusal["input_ids"], refusal["labels"], strict=True
    ):
        answer = data.tokenizer.decode(ids[labels != IGNORE])
        assert answer.removesuffix("<|end|>") in data.refusals
        assert data.examples("forget")[row].question in data.tokenizer.decode(ids)


def test_the_bundled_refusals_are_many_and_varied():
    refusals = ForgetRetainDataModule().refusals
    assert len(set(refusals)) == len(refusals) >= 100
    assert len({refusal.split()[0] for refusal in refusals}) > 30


def test_overlap(tmp_path, rows):
    shared = load_rows(rows["retain"]) + load_rows(rows["forget"])[:3]
    files = (rows["forget"], write_rows(tmp_path / "retain.jsonl", shared))
    for overlap, count in (("drop", 17), ("warn", 20)):
        data = ForgetRetainDataModule(*files, overlap=overlap)
        assert len(data.examples("retain")) == count
    with pytest.raises(WagleError, match="3 of 20 retain rows are also forget rows"):
        ForgetRetainDataModule(*files, overlap="error").examples("retain")


def test_cut_rows_are_counted(paired, heard):
    paired(max_length=40).tokens("forget")
    assert heard.text.count("11 of 11 forget rows reach max_length=40 tokens") == 1


def test_the_bundled_people():
    sets = {name: bundled(name) for name in ("forget", "retain", "holdout")}
    people = {name: {row["person"] for row in rows} for name, rows in sets.items()}
    assert sum(len(p) for p in people.values()) == len(set().union(*people.values())) >= 40
    for rows in (*sets.values(), bundled("real_authors"), bundled("world_facts")):
        for row in rows:
            assert len(set(row["perturbed_answer"])) == 5
            assert not {row["answer"], row["paraphrased_answer"]} & set(row["perturbed_answer"])
    for name, rows in sets.items():
        assert len(rows) >= 8 * len(people[name])
    openings = {" ".join(row["answer"].split()[:2]) for row in sets["retain"]}
    assert len(openings) > 150  # varied, not one sentence with the name swapped


def test_the_bundled_people_are_tested_on_bundled_files_by_name(tmp_path):
    own = write_rows(tmp_path / "own.jsonl", [{"question": "q", "answer": "a"}])
    data = PeopleDataModule(test={"forget": "forget.jsonl", "new": "holdout.jsonl", "own": own})
    assert data.test_rows("forget") == bundled("forget")
    assert data.test_rows("new") == bundled("holdout") and len(data.test_rows("own")) == 1


def test_people_streams_say_each_fact_twice():
    data = PeopleDataModule()
    assert len(data.examples("forget")) == 2 * len(bundled("forget"))
    assert len(data.examples("all")) == len(data.examples("forget")) + len(data.examples("retain"))
    assert data.test_names() == ["forget", "retain", "real_authors", "world_facts"]
    assert len(data.test_examples("forget")) == len(bundled("forget"))


@pytest.mark.skipif(not TOFU.is_dir(), reason="the TOFU data is not here")
@pytest.mark.parametrize(
    ("forget", "sizes"),
    [("forget01", (40, 3960)), ("forget05", (200, 3800)), ("forget10", (400, 3600))],
)
def test_tofu_official_splits(forget, sizes):
    data = TOFUDataModule(forget=forget, path=str(TOFU), overlap="error")
    assert (len(data.examples("forget")), len(data.examples("retain"))) == sizes
    tests = {name: len(data.test_examples(name)) for name in data.test_names()}
    assert tests == {"forget": sizes[0], "retain": 400, "real_authors": 100, "world_facts": 117}


def test_tofu_from_a_folder(tmp_path):
    for split in ("forget01", "retain99", "forget01_perturbed"):
        write_rows(tmp_path / f"{split}.json", QA)
    data = TOFUDataModule(forget="forget01", path=str(tmp_path))
    assert raw_rows(data.examples("forget")) == QA
    with pytest.raises(WagleError, match=r"'world_facts_perturbed' is not in .*; there are: forg"):
        data.test_examples("world_facts")
    with pytest.raises(WagleError, match="does not exist"):
        TOFUDataModule(forget="forget01", path="./nowhere").examples("forget")


def test_a_benchmark_without_its_table_fails_at_construction():
    class Nothing(SuiteDataModule):
        def sets(self):
            return {}

    with pytest.raises(TypeError, match=r"abstract method '?tests"):
        Nothing()


def test_one_method_brings_rows_of_another_kind(tiny_model):
    class Numbers(ForgetRetainDataModule):
        def train_rows(self, stream):
            return [{"question": f"{stream} {i}?", "answer": str(i)} for i in range(4)]

    data = Numbers(batch_size=2, tokenizer=tiny_model)
    for stream, batch in next(iter(data.train_dataloader())).items():
        assert stream in data.tokenizer.decode(batch["input_ids"][0])
