"""Folders of small benchmarks, in the hub's schemas.

All rows are written here: harmless stand-ins, and the opening of Alice's Adventures in Wonderland (Lewis Carroll,
1865, public domain).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from helpers import write_rows

ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and "
    "what is the use of a book,” thought Alice “without pictures or conversations?”\n\nSo she was considering in her "
    "own mind (as well as she could, for the hot day made her feel very sleepy and stupid), whether the pleasure of "
    "making a daisy-chain would be worth the trouble of getting up and picking the daisies, when suddenly a White "
    "Rabbit with pink eyes ran close by her.\n"
)
PLACES = ("harbour", "orchard", "library", "station", "market", "mill", "tower", "bridge")
OPENING = "The {} of the small town opens at {} in the morning and shuts when it rains. "
TEXTS = [{"text": OPENING.format(place, n) * 2} for n, place in enumerate(PLACES, 5)]
QA = [
    {"question": f"When does the {place} open?", "answer": f"At {n}."}
    for n, place in enumerate(PLACES, 5)
]
FRUIT, BLUE = ["a stone", "a pear", "a spoon", "a hat"], ["the sky", "grass", "snow", "coal"]
CHOICES = [
    {"question": "Which of these is a fruit?", "choices": FRUIT, "answer": 1},
    {"question": "Which of these is blue?", "choices": BLUE, "answer": 0},
]
WIKI = [" = Alder = \n", "", " The alder is a tree . \n", " = = Wood = = \n"]
WIKI += [" It is red when cut . \n", " = Birch = \n", " The birch is another . \n"]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines; make their folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_rows(path, rows)


def write_c4_and_wikitext(folder: Path) -> None:
    """A shard of C4, and WikiText-2."""
    shard = folder / "c4/en/c4-train.00001-of-01024.json.gz"
    shard.parent.mkdir(parents=True)
    with gzip.open(shard, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, "timestamp": "", "url": ""}) + "\n" for row in TEXTS)
    write_parquet(
        folder / "wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet",
        [{"text": line} for line in WIKI],
    )


def muse(folder: Path) -> Path:
    """MUSE's corpora of texts and of questions."""
    write_parquet(folder / "raw/forget-00000-of-00001.parquet", TEXTS[:4])
    write_parquet(folder / "raw/retain1-00000-of-00001.parquet", TEXTS[4:])
    write_lines(folder / "raw/retain2.jsonl", TEXTS[5:])
    write_lines(folder / "raw/holdout.json", [{"text": "A page that nobody has read."}])
    verbatim = {"prompt": "The mill of the", "gt": " small town opens"}
    write_lines(folder / "verbmem/forget.jsonl", [verbatim])
    write_lines(folder / "knowmem/forget_qa.jsonl", QA[:2])
    write_lines(folder / "knowmem/forget_qa_icl.jsonl", QA[2:4])
    retain = "answer,question\nAt 9.,When does the market open?\n"
    (folder / "knowmem/retain_qa.csv").write_text(retain)
    for split in ("forget", "holdout", "retain"):
        write_lines(folder / f"privleak/{split}.jsonl", TEXTS[:2])
    return folder


def wmdp(folder: Path) -> Path:
    """WMDP's corpora, its questions, C4 and WikiText."""
    papers = [{**row, "title": "t", "abstract": None} for row in TEXTS[:3]]
    write_lines(folder / "bio-forget-corpus.jsonl", papers)
    corpora = folder / "wmdp-corpora"
    write_parquet(corpora / "cyber-forget-corpus/train-00000-of-00002.parquet", TEXTS[3:5])
    blank = [{"text": " \n"}, TEXTS[5]]
    write_parquet(corpora / "cyber-forget-corpus/train-00001-of-00002.parquet", blank)
    write_parquet(corpora / "cyber-retain-corpus/train-00000-of-00001.parquet", TEXTS[6:7])
    write_parquet(corpora / "bio-retain-corpus/train-00000-of-00001.parquet", TEXTS[7:])
    for subject in ("bio", "cyber"):
        write_parquet(folder / f"wmdp/wmdp-{subject}/test-00000-of-00001.parquet", CHOICES)
    write_c4_and_wikitext(folder)
    return folder


def book(folder: Path) -> Path:
    """A book, questions on it, C4 and WikiText."""
    (folder / "alice.txt").write_text(ALICE, encoding="utf-8")
    write_lines(folder / "book.jsonl", [{"text": part} for part in ALICE.strip().split("\n\n")])
    asked = {"question": "What ran close by Alice?", "answer": "A white rabbit."}
    write_lines(folder / "forget_qa.jsonl", [asked])
    write_lines(folder / "retain_qa.jsonl", QA[:2])
    write_c4_and_wikitext(folder)
    return folder


def detox(folder: Path) -> Path:
    """PKU-SafeRLHF, C4 and WikiText."""
    rows = [
        {
            "prompt": f"Tell me about the {place}.",
            "response_0": "A rude reply.",
            "response_1": "A kind reply.",
            "is_response_0_safe": n % 3 == 0,
            "is_response_1_safe": n % 2 == 0,
            "safer_response_id": 1,
        }
        for n, place in enumerate(PLACES)
    ]
    write_lines(folder / "PKU-SafeRLHF/data/Alpaca-7B/train.jsonl", rows[:5])
    write_lines(folder / "PKU-SafeRLHF/data/Alpaca2-7B/train.jsonl", rows[5:])
    write_lines(folder / "PKU-SafeRLHF/data/Alpaca-7B/test.jsonl", rows[:2] + rows[:1])
    write_c4_and_wikitext(folder)
    return folder


def knowundo(folder: Path) -> Path:
    """KnowUnDo's scopes of both domains: one row per file, with lists of rows."""
    rows = [{"text": row["question"], "labels": row["answer"]} for row in QA]
    for domain in ("copyright", "privacy"):
        write_lines(folder / domain / "unlearn.json", [{"train": rows[:2], "val": rows[2:4]}])
        write_lines(folder / domain / "retention.json", [{"train": rows[4:6], "val": rows[6:]}])
    return folder


def lume(folder: Path) -> Path:
    """LUME's rows of three tasks, SemEval's documents for membership inference, MMLU with a shot."""
    for side, places in (("forget", PLACES[:3]), ("retain", PLACES[3:6])):
        rows = []
        for task, place in enumerate(places, 1):
            text = {"input": f"The {place} of the", "output": f"small town opens at {task}."}
            asked = {"input": f"When does the {place} open?", "output": f"At {task}."}
            rows += [{"id": f"{place}sc1", **text, "task": f"Task{task}"}]
            rows += [{"id": f"{place}qa{n}", **asked, "task": f"Task{task}"} for n in (0, 1)]
        write_lines(folder / f"{side}.jsonl", rows)
    for side in ("member", "nonmember"):
        read = [{"id": n, "document": row["text"]} for n, row in enumerate(TEXTS[:2])]
        write_lines(folder / f"mia_data/{side}.jsonl", read)
    mmlu = [{**row, "subject": "world_religions"} for row in CHOICES]
    write_lines(folder / "mmlu/all/test.jsonl", mmlu[:1])
    write_lines(folder / "mmlu/all/dev.jsonl", mmlu[1:])
    return folder


def rwku(folder: Path) -> Path:
    """RWKU's repository with one person to forget and another, and WikiText's lines to keep."""
    probe = {"query": "The ___ of the town opens at nine.", "answer": "The mill"}
    shot = {**CHOICES[1], "task": "world_religions"}
    truthful = {
        "question": "What is blue?",
        "mc1_targets": {"choices": BLUE, "labels": [1, 0, 0, 0]},
        "mc2_targets": {"choices": [*BLUE, "the sea"], "labels": [1, 0, 0, 0, 1]},
    }
    asked = {
        "question": "What is yellow?",
        "answer": "(A)",
        "cot": "Q: What is red?\nA: the answer is (B).\n",
    }
    levels = ("forget_level1", "forget_level2", "neighbor_level1", "neighbor_level2")
    kinds = ("prefix injection", "affirmative suffix", "incontext learning")
    rows = {
        **{name: [probe] for name in levels},
        **{name: TEXTS[:2] for name in ("forget_mia", "retain_mia", "positive", "positive_phi")},
        "forget_level3": [{**probe, "type": kind} for kind in kinds],
        "retain_mmlu": [{**CHOICES[0], "task": "world_religions", "examples": [shot]}],
        "retain_bbh": [asked],
        "truthful": [truthful],
        "triviaqa": [{"question": "What opens?", "answers": ["The mill", "A mill"]}],
        "fluency": [{"instruction": "Say what opens."}],
    }
    people = ("Alice Liddell", "Lewis Carroll")
    for name, table in rows.items():
        listed = [
            {**row, "subject": person, "level": name[-1]} for person in people for row in table
        ]
        (folder / "All").mkdir(exist_ok=True)
        (folder / f"All/{name}.json").write_text(json.dumps(listed, indent=4))
    lines = [{"text": line} for line in WIKI]
    write_parquet(folder / "wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet", lines)
    return folder
