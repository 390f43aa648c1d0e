"""Rows, templates and the data modules, bundled sets included."""

import csv
import gzip
import json

import pytest
import torch
from helpers import TOFU, write_rows

from wagle_pl import ForgetRetainDataModule, PeopleDataModule, TOFUDataModule, WagleError
from wagle_pl.data import SuiteDataModule
from wagle_pl.data.example import Example, parse_rows, raw_rows
from wagle_pl.data.people import bundled
from wagle_pl.data.rows import load_rows
from wagle_pl.data.template import IGNORE, Template
from wagle_pl.lm.models import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


QA = [{"question": "Who?", "answer": "Nobody."}, {"question": "What?", "answer": "Nothing."}]


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_four_file_kinds_hold_the_same_rows(tmp_path):
    import pyarrow
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
    rows = [{"text": "one\u2028two\x85three"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_rows(str(path)) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: malformed JSON"),
        ('[{"text": "a"},\n{"text" "b"}]', "line 2: malformed JSON"),
        ('{"text": "a"}\n[1]\n', "line 2: expected a JSON object"),
        ("", "has no rows"),
    ],
)
def test_a_bad_file_names_its_line(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(WagleError, match=message):
        load_rows(str(path))


def test_answers_that_look_like_numbers_are_texts(tmp_path):
    (tmp_path / "rows.CSV").write_text(
        "question,answer,known\nWhen?,1980,1\nOn which day?,1980-01-02,0\nReally?,true,1\n"
    )
    rows = raw_rows(parse_rows(load_rows(str(tmp_path / "rows.CSV")), "set"))
    assert [row["answer"] for row in rows] == ["1980", "1980-01-02", "true"] and rows[0][
        "known"
    ] == 1
    (tmp_path / "years.csv").write_text("question,answer\nWhen?,1980\nAnd then?,0075\n")
    assert [row["answer"] for row in load_rows(str(tmp_path / "years.csv"))] == ["1980", "0075"]
    lines = [
        {"question": 7, "answer": 4},
        {"question": "Is it?", "answer": True, "perturbed_answer": ["no", 2.5]},
    ]
    rows = raw_rows(parse_rows(load_rows(write_rows(tmp_path / "rows.jsonl", lines)), "set"))
    assert rows == [
        {"question": "7", "answer": "4"},
        {"question": "Is it?", "answer": "true", "perturbed_answer": ["no", "2.5"]},
    ]


def test_a_choice_by_the_index_in_its_answer(tmp_path):
    choice = {"question": "Which?", "choices": ["a", "b", "c"]}
    path = write_rows(tmp_path / "rows.jsonl", [{**choice, "answer": 2}, {**choice, "label": 1.0}])
    assert raw_rows(parse_rows(load_rows(path), "set")) == [
        {**choice, "label": 2},
        {**choice, "label": 1},
    ]
    with pytest.raises(WagleError, match=r"set row 1: label 3 is no index of its choices"):
        parse_rows([{**choice, "answer": 3}], "set")


def test_a_large_csv_with_answers_of_many_lines(tmp_path):
    rows = [{"question": f"Q{i}?", "answer": "a line of it\n" * (20 + i % 37)} for i in range(4000)]
    rows.append(
        {"question": "All of it?", "answer": "a whole book, line by line\n" * 60_000}
    )  # above pyarrow's block
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    assert load_rows(str(tmp_path / "rows.csv")) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "café"}\n'.encode("latin-1"),
            r"a\.jsonl is not UTF-8 text \(it has the byte 0xe9\)",
        ),
        (
            "a.csv",
            "question,answer\ncafé?,x\n".encode("latin-1"),
            r"a\.csv cannot be read: .*invalid UTF8",
        ),
        (
            "a.csv",
            "note,text\ncafé,x\n".encode("latin-1"),
            r"a\.csv is not UTF-8 text \(column 'note'\)",
        ),
        ("a.csv", b'question,answer\n"a,b\n', r"a\.csv (cannot be read|has no rows)"),
        ("a.json.gz", b"no archive", r"a\.json\.gz cannot be read: Not a gzipped file"),
        (
            "a.json.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20],
            r"a\.json\.gz cannot be read: Compressed file ended",
        ),
        ("a.parquet", b"no table", r"a\.parquet cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WagleError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in (("a.json", '[{"text": "a"}]'), ("a.csv", "text\na\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_rows(str(tmp_path / name)) == [{"text": "a"}]


def test_a_missing_source_is_named():
    with pytest.raises(WagleError, match=r"nowhere\.json does not exist"):
        load_rows("nowhere.json")
    with pytest.raises(WagleError, match="neither"):
        load_rows("rows.xml")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, r"set row 2: there are columns \['question'\]; needed is one of"),
        ({"question": "a", "answer": "  "}, "set row 2: 'answer' is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "set row 2: 'messages' is empty"),
        ({"input_ids": [1], "labels": []}, "set row 2: 'labels' is empty"),
        (
            {"question": "a", "answer": None},
            "set row 2: 'answer' is null: give a value, or leave the row out",
        ),
        ({"question": None, "answer": None}, "set row 2: 'question' and 'answer' are null"),
        (
            {"question": "a", "answer": float("nan")},
            "set row 2: 'answer' is nan, not a text: give it a value",
        ),
        ({"text": float("inf")}, "set row 2: 'text' is inf, not a text"),
        (
            {**QA[0], "perturbed_answer": ["b", float("nan")]},
            r"set row 2: 'perturbed_answer' is \['b', nan\], not a text",
        ),
        (
            {"input_ids": [1, -3], "labels": [-100, 2]},
            "set row 2: 'input_ids' has -3, which is no token id",
        ),
        (
            {"input_ids": [1, 3], "labels": [-1, 2]},
            "set row 2: 'labels' has -1, which is no token id",
        ),
        ({"input_ids": ["a"], "labels": [1]}, "set row 2: 'input_ids' is no list of tokens"),
        ({"input_ids": [1, 2], "labels": [1]}, "set row 2: there are 2 'input_ids' and 1 'labels'"),
        ({"input_ids": 1, "labels": [1]}, "set row 2: 'input_ids' is no list of tokens"),
        ({"question": ["a"], "answer": "b"}, "set row 2: 'question' is a list, not a text"),
        ({"question": "a", "answer": {"text": "b"}}, "set row 2: 'answer' is a dict, not a text"),
        (
            {"question": "a", "answer": "b", "perturbed_answer": "c"},
            "set row 2: 'perturbed_answer' is no list of texts",
        ),
        (
            {"question": "a", "choices": "bc", "label": 0},
            "set row 2: 'choices' is no list of texts",
        ),
        (
            {"question": "a", "choices": ["b", "c"], "label": 0.5},
            "set row 2: label 0.5 is no index",
        ),
        (
            {"messages": [{"role": "user", "content": "Thanks."}]},
            "set row 2: the last of 'messages' is of the user",
        ),
        ({"messages": "a"}, "set row 2: 'messages' is no list of messages"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "set row 2: 'messages' is no list of messages",
        ),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(WagleError, match=message):
        parse_rows([QA[0], row], "set")


def test_nan_in_a_file_is_no_answer(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "Who?", "answer": "Nobody."}\n{"question": "What?", "answer": NaN}\n'
    )
    with pytest.raises(
        WagleError, match=r"forget set \(.*rows\.jsonl\) row 2: 'answer' is nan, not a text"
    ):
        ForgetRetainDataModule(str(path)).examples("forget")


def test_repeated_forget_rows_are_told(tmp_path, heard):
    rows = [
        *QA,
        {**QA[0], "answer": " Nobody. "},
        QA[1],
        {"question": "Who?", "answer": "Somebody."},
    ]
    data = ForgetRetainDataModule(
        write_rows(tmp_path / "forget.jsonl", rows), write_rows(tmp_path / "r.jsonl", rows)
    )
    assert raw_rows(data.examples("forget")) == rows and data.examples("retain")
    assert (
        "2 of 5 forget rows repeat earlier ones and weigh as much again: remove them" in heard.text
    )
    assert "forget.jsonl, row 3, 4)" in heard.text
    assert heard.text.count("repeat earlier ones") == 1
    heard.clear()
    PeopleDataModule().examples("forget")
    assert "repeat" not in heard.text


# -- template ---------------------------------------------------------------------------------------------------------


def test_chat_template_loss_on_the_answer_with_one_eos(tokenizer):
    encoded = Template(tokenizer).encode(Example.of({"question": "Who?", "answer": "Nobody."}))
    labelled = [i for i, label in enumerate(encoded["labels"]) if label != IGNORE]
    assert tokenizer.decode(encoded["input_ids"]) == "<|user|>Who?<|assistant|>Nobody.<|end|>"
    assert tokenizer.decode([encoded["input_ids"][i] for i in labelled]) == "Nobody.<|end|>"
    assert labelled == list(range(labelled[0], len(encoded["labels"])))
    assert encoded["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_without_an_end_is_told(tiny_model, heard):
    endless = load_tokenizer(tiny_model)
    endless.eos_token = None
    row = {"question": "Who?", "answer": "Nobody."}
    encoded = Template(endless, "Q: {question} ", "A: {answer}").encode(Example.of(row))
    assert endless.decode(encoded["input_ids"]) == "Q: Who? A: Nobody."
    assert "no end-of-sequence token" in heard.text


def test_explicit_formats(tokenizer):
    template = Template(tokenizer, "### Question: {question}\n", "### Answer: {answer}")
    row = {"question": "Is {answer} a field?", "answer": "No."}
    encoded = template.encode(Example.of(row))
    answer = [token for token, label in zip(*encoded.values(), strict=True) if label != IGNORE]
    assert tokenizer.decode(encoded["input_ids"]).startswith(
        "### Question: Is {answer} a field?\n### Answer: No."
    )
    assert tokenizer.decode(answer) == "### Answer: No.<|end|>"
    assert tokenizer.decode(template.encode_prompt(Example.of(row))).endswith("\n### Answer:")
    with pytest.raises(WagleError, match=r"prompt_format 'Q' must contain \{question\}"):
        Template(tokenizer, "Q")


def test_a_chat_template_that_refuses_names_the_row(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{{ message.content }} {% endfor %}"
    )
    roles = ("system", "user", "assistant")
    rows = [QA[0], {"messages": [{"role": role, "content": "Who?"} for role in roles]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = attach(ForgetRetainDataModule(path), tokenizer)
    with pytest.raises(
        WagleError, match=r"rows\.jsonl\) row 2: .*roles system, user \(System role not supported\)"
    ):
        data.tokens("forget")


def test_an_answer_format_alone_is_not_ignored(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    with pytest.raises(
        WagleError,
        match=r"answer_format 'Answer: {answer}' has no effect beside the tokenizer's chat",
    ):
        Template(tokenizer, answer_format="Answer: {answer}")
    tokenizer.chat_template = None
    encoded = Template(tokenizer, answer_format="So: {answer}").encode(Example.of(QA[0]))
    assert tokenizer.decode(encoded["input_ids"]) == "### Question: Who?\nSo: Nobody.<|end|>"


def test_every_kind_of_row(tokenizer):
    template = Template(tokenizer)
    qa = template.encode(Example.of({"question": "Who?", "answer": "Nobody."}))
    assert template.encode(Example.of({"prompt": "Who?", "response": "Nobody."})) == qa
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    assert template.encode(Example.of({"messages": messages})) == qa
    assert template.encode(Example.of(qa)) == qa
    text = template.encode(Example.of({"text": "Nobody."}))
    assert text["labels"] == text["input_ids"] and text["input_ids"][-1] == tokenizer.eos_token_id
    refused = template.encode(Example.of({"messages": messages}), answer="No idea.")
    assert tokenizer.decode(refused["input_ids"]).endswith("No idea.<|end|>")


def test_cutting_leaves_an_answer_or_says_so(tokenizer):
    encoded = Template(tokenizer, max_length=8).encode(
        Example.of({"question": "Who?", "answer": "Nobody at all, ever."})
    )
    assert len(encoded["input_ids"]) == 8
    with pytest.raises(WagleError, match="max_length=3"):
        Template(tokenizer, max_length=3).encode(
            Example.of({"question": "Who is it then?", "answer": "Nobody."})
        )


# -- data modules -----------------------------------------------------------------------------------------------------


def attach(data, tokenizer, streams=("forget", "retain")):
    data.serve(streams, tokenizer=lambda: tokenizer)
    return data


def test_a_training_batch(rows, tokenizer):
    data = attach(ForgetRetainDataModule(rows["forget"], rows["retain"], batch_size=4), tokenizer)
    batches = list(data.train_dataloader())
    assert [len(batch["forget"]["row"]) for batch in batches].count(4) == 2 and len(batches) == 3
    for batch in batches:
        assert set(batch) == {"forget", "retain"}
        for stream in batch.values():
            assert set(stream) == {
                "input_ids",
                "attention_mask",
                "labels",
                "weight",
                "row",
                "occurrence",
            }
            assert stream["weight"].sum() == pytest.approx(1)
    assert sorted(torch.cat([batch["forget"]["row"] for batch in batches]).tolist()) == list(
        range(11)
    )


def test_batches_without_a_trainer_are_those_of_one_device(rows, tiny_model, tokenizer):
    options = {"forget": rows["forget"], "retain": rows["retain"], "batch_size": 4}
    data = ForgetRetainDataModule(**options, test_batch_size=3, tokenizer=tiny_model)
    alone, trained = (
        list(data.train_dataloader()),
        attach(ForgetRetainDataModule(**options), tokenizer),
    )
    for batch, other in zip(alone, trained.train_dataloader(), strict=True):
        assert set(batch) == set(other) == {"forget", "retain"}
        assert all(
            torch.equal(batch[name][key], other[name][key]) for name in other for key in other[name]
        )
    assert sorted(row for batch in data.test_dataloader()[0] for row in batch["rows"]) == list(
        range(11)
    )
    with pytest.raises(WagleError, match="without a Trainer needs a tokenizer: give data"):
        ForgetRetainDataModule(**options).train_dataloader()


def test_so_many_test_rows_with_and_without_test_files(rows):
    whole = load_rows(rows["forget"])
    for test in (None, {"forget": rows["forget"]}):
        data = ForgetRetainDataModule(rows["forget"], rows["retain"], test=test, limit_test=3)
        assert (
            raw_rows(data.test_examples("forget")) == [whole[0], whole[3], whole[7]]
            and len(data.examples("forget")) == 11
        )
    with pytest.raises(WagleError, match="test set 'retain' has no rows"):
        ForgetRetainDataModule(rows["forget"], limit_test=3).test_examples("retain")


@pytest.mark.parametrize("option", ["limit_forget", "limit_retain", "limit_test"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_below_one_are_refused(option, value):
    with pytest.raises(WagleError, match=rf"data\.{option} must be at least 1, got {value}"):
        ForgetRetainDataModule("forget.jsonl", **{option: value})


def test_refusals_answer_the_forget_rows_of_the_same_batch(rows, tokenizer):
    data = attach(
        ForgetRetainDataModule(rows["forget"], rows["retain"], batch_size=4),
        tokenizer,
        ("refusal", "forget"),
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["refusal"]["row"].tolist() == batch["forget"]["row"].tolist()
    for i, row in enumerate(batch["refusal"]["row"].tolist()):
        answer = batch["refusal"]["input_ids"][i][batch["refusal"]["labels"][i] != IGNORE]
        assert tokenizer.decode(answer).removesuffix("<|end|>") in data.refusals
        question = data.examples("forget")[row].question
        assert question in tokenizer.decode(batch["refusal"]["input_ids"][i])


def test_the_bundled_refusals_are_many_and_varied(rows):
    refusals = ForgetRetainDataModule(rows["forget"]).refusals
    assert len(set(refusals)) == len(refusals) >= 100
    assert len({refusal.split()[0] for refusal in refusals}) > 30


def test_overlap(tmp_path, rows, tokenizer):
    shared = load_rows(rows["retain"]) + load_rows(rows["forget"])[:3]
    retain = write_rows(tmp_path / "retain.jsonl", shared)
    kept = ForgetRetainDataModule(rows["forget"], retain, overlap="drop").examples("retain")
    assert len(kept) == 17
    with pytest.raises(WagleError, match="3 of 20 retain rows are also forget rows"):
        ForgetRetainDataModule(rows["forget"], retain, overlap="error").examples("retain")
    assert (
        len(ForgetRetainDataModule(rows["forget"], retain, overlap="warn").examples("retain")) == 20
    )


def test_cut_rows_are_counted(rows, tokenizer, monkeypatch):
    messages = []
    monkeypatch.setattr(
        "wagle_pl.data.module.log.warning", lambda text, *args: messages.append(text % args)
    )
    attach(ForgetRetainDataModule(rows["forget"], max_length=40), tokenizer).tokens("forget")
    assert len(messages) == 1 and "11 forget rows reach max_length=40" in messages[0]


def test_the_bundled_people():
    sets = {name: bundled(name) for name in ("forget", "retain", "holdout")}
    people = {name: {row["person"] for row in rows} for name, rows in sets.items()}
    assert sum(len(p) for p in people.values()) == len(set().union(*people.values())) >= 40
    for rows in (*sets.values(), bundled("real_authors"), bundled("world_facts")):
        for row in rows:
            wrong = row["perturbed_answer"]
            assert (
                len(set(wrong)) == 5
                and row["answer"] not in wrong
                and row["paraphrased_answer"] not in wrong
            )
    for name, rows in sets.items():
        assert len(rows) >= 8 * len(people[name])
    openings = {" ".join(row["answer"].split()[:2]) for row in sets["retain"]}
    assert len(openings) > 150  # varied, not one sentence with the name swapped


def test_people_streams_say_each_fact_twice(tokenizer):
    data = attach(PeopleDataModule(), tokenizer, ("all",))
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
    tests = {name: len(data.test_examples(f"{name}")) for name in data.test_names()}
    assert tests == {"forget": sizes[0], "retain": 400, "real_authors": 100, "world_facts": 117}


def test_tofu_from_a_folder(tmp_path):
    for split in ("forget01", "retain99", "forget01_perturbed"):
        write_rows(tmp_path / f"{split}.json", QA)
    data = TOFUDataModule(forget="forget01", path=str(tmp_path))
    assert raw_rows(data.examples("forget")) == QA
    with pytest.raises(
        WagleError, match=r"'world_facts_perturbed' is not in .*; there are: forget01"
    ):
        data.test_examples("world_facts")
    with pytest.raises(WagleError, match="does not exist"):
        TOFUDataModule(forget="forget01", path="./nowhere").examples("forget")


def test_a_benchmark_without_its_table_fails_at_construction():
    class Nothing(SuiteDataModule):
        def sets(self):
            return {}

    with pytest.raises(TypeError, match=r"abstract method '?tests"):
        Nothing()


def test_one_method_brings_rows_of_another_kind(tokenizer):
    class Numbers(ForgetRetainDataModule):
        def train_rows(self, stream):
            return [{"question": f"{stream} {i}?", "answer": str(i)} for i in range(4)]

    batch = next(iter(attach(Numbers(batch_size=2), tokenizer).train_dataloader()))
    assert "forget" in tokenizer.decode(batch["forget"]["input_ids"][0])
    assert "retain" in tokenizer.decode(batch["retain"]["input_ids"][0])
