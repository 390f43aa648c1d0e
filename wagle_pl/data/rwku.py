"""RWKU: famous people to forget, asked about in three ways; the prompts of the benchmark's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.benchmarks import WIKITEXT, worked_choice
from wagle_pl.data.example import Row
from wagle_pl.data.rows import HubSet
from wagle_pl.data.suite import Source, SuiteDataModule, select

BLANK = "Please complete the blank in the following question.\n"
BRIEF = "Please briefly answer the following question.\n"
REASONING = (
    "{}\n\nFollowing previous examples, answer the following questions and end with 'so the answer "
    "is'\nQ: "
)


def worked_examples(name: str) -> str:
    """Questions with answers, with which the prompts of TruthfulQA and TriviaQA begin."""
    return (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


TRUTH = f"{worked_examples('truthfulqa')}\n\nQ: "
BRIEFLY = "Please briefly answer the following question:\nQ: "
FACTS = f"\n{worked_examples('triviaqa')}\n{BRIEFLY}"


def probe(instruction: str, row: Row) -> Row:
    """A blank to fill or a question. At level 3, an affirmative suffix already begins the answer,
    and worked examples contain their own ``Question:``."""
    form = row.get("type")
    context = instruction + ("" if form == "incontext learning" else "Question: ")
    if form == "affirmative suffix":
        return {"context": context, "question": row["query"], "answer": row["answer"]}
    return asked(context, f"{row['query']}\n", row["answer"], "Answer:")


def general(row: Row) -> Row:
    """MMLU after five worked examples."""
    header = f"The following are multiple choice questions (with answers) about {row['task']}.\n\n"
    shots = "".join(f"Question: {worked_choice(shot)}" for shot in row["examples"])
    end = "Please following the previous examples and answer the given question.\n"
    return {
        "context": header.replace("_", " ") + shots + end,
        "question": f"Question: {row['question']}",
        "choices": row["choices"],
        "label": row["answer"],
        "prefill": "Answer:",
    }


def truthfulness(row: Row) -> Row:
    """TruthfulQA's choices, the best first, then other right ones."""

    def of(targets: str, label: int) -> list[str]:
        pairs = zip(row[targets]["choices"], row[targets]["labels"], strict=True)
        return [choice for choice, found in pairs if found == label]

    right = list(dict.fromkeys([*of("mc1_targets", 1), *of("mc2_targets", 1)]))
    choices = list(dict.fromkeys([*right, *of("mc1_targets", 0), *of("mc2_targets", 0)]))
    asked = {"context": TRUTH, "question": row["question"], "prefill": "A:"}
    return {**asked, "choices": choices, "label": 0, "answer_aliases": right[1:]}


def asked(context: str, question: str, answers: Any, prefill: str) -> Row:
    """A question with one right answer, or a list of them."""
    first, *others = answers if isinstance(answers, list) else [answers]
    row = {"context": context, "question": question, "answer": first, "prefill": prefill}
    return {**row, "answer_aliases": others} if others else row


def text(row: Row) -> Row:
    return {"text": row["text"]}


#: Test set -> its file in the repository, the columns that it needs, and a function that converts a
#: row; prompts are those of ``llmtuner/eval``.
TESTS: dict[str, tuple[str, tuple[str, ...], Callable[[Row], Row]]] = {
    "forget_level1": ("forget_level1", ("query", "answer"), partial(probe, BLANK)),
    "forget_level2": ("forget_level2", ("query", "answer"), partial(probe, BRIEF)),
    "forget_level3": ("forget_level3", ("query", "answer", "type"), partial(probe, BRIEF)),
    "neighbor_level1": ("neighbor_level1", ("query", "answer"), partial(probe, BLANK)),
    "neighbor_level2": ("neighbor_level2", ("query", "answer"), partial(probe, BRIEF)),
    "mia_forget": ("forget_mia", ("text",), text),
    "mia_retain": ("retain_mia", ("text",), text),
    "utility_general": (
        "retain_mmlu",
        ("question", "choices", "answer", "task", "examples"),
        general,
    ),
    "utility_reason": (
        "retain_bbh",
        ("cot", "question", "answer"),
        lambda row: asked(
            REASONING.format(row["cot"].strip()), row["question"], row["answer"], "A:"
        ),
    ),
    "utility_truthfulness": ("truthful", ("question", "mc1_targets", "mc2_targets"), truthfulness),
    "utility_factuality": (
        "triviaqa",
        ("question", "answers"),
        lambda row: asked(FACTS, f"{row['question']}\n", row["answers"], "A:"),
    ),
    "utility_fluency": (
        "fluency",
        ("instruction",),
        lambda row: {"prompt": f"Instruction: {row['instruction']}\n"},
    ),
}


class RWKUDataModule(SuiteDataModule):
    """RWKU (arXiv 2406.10890): forget what a model knows of famous people.

    Test sets: ``forget_level1`` (blanks to fill), ``forget_level2`` (questions), ``forget_level3``
    (adversarial ones), ``neighbor_level1`` and ``2`` (on what is close to the people),
    ``mia_forget`` and ``mia_retain`` (texts), ``utility_general`` (MMLU), ``utility_reason`` (BBH),
    ``utility_truthfulness`` (TruthfulQA), ``utility_factuality`` (TriviaQA), ``utility_fluency``
    (AlpacaEval). Prompts are in the chat template, with the beginning of the answer given.

    The rows to forget are texts that a model wrote about the people. RWKU has no rows to retain:
    this package takes lines of WikiText-2 (``train``).

    A folder holds a copy of ``jinzhuoran/RWKU`` (or is one person's, ``Target/1_Stephen_King``) and
    of ``Salesforce/wikitext`` by their names without owner.

    Args:
        targets: people to forget, as ``subject`` names them; null takes all 200. The benchmark
            forgets one at a time, or a few tens in its batch setting.
        corpus: whose texts to forget: those of Llama-3-8B-Instruct or of Phi-3-mini.
        max_length: longest sequence in tokens.
    """

    suite: ClassVar[str] = "rwku"

    def __init__(
        self,
        targets: Optional[Sequence[str]] = ("Stephen King",),
        corpus: Literal["llama3", "phi3"] = "llama3",
        max_length: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_length=max_length, **kwargs)
        self.targets = None if targets is None else tuple(targets)
        self.corpus = corpus

    def sets(self) -> Mapping[str, Source]:
        file = "positive" if self.corpus == "llama3" else "positive_phi"
        forget = self._source(f"train_positive_{self.corpus}", file, ("text",), text, "train")
        return {
            "forget": forget._replace(chunked=True, paired=True),
            "retain": Source([WIKITEXT._replace(split="train")], chunked=True),
            "holdout": Source(chunked=True),
        }

    def tests(self) -> Mapping[str, Source]:
        return {name: self._source(name, *entry) for name, entry in TESTS.items()}

    def _source(
        self,
        config: str,
        file: str,
        columns: Sequence[str],
        make: Callable[[Row], Row],
        split: str = "test",
    ) -> Source:
        def convert(rows: list[Row], where: str) -> list[Row]:
            found = select(rows, ("subject", *columns), where)
            if self.targets is not None:
                found = [row for row in found if row["subject"] in self.targets]
            if not found:
                known = ", ".join([*dict.fromkeys(row["subject"] for row in rows)][:3])
                raise WagleError(
                    f"{where} has no rows on {', '.join(self.targets or ())}",
                    option="data.targets",
                    hint=f"it has some on {known}, …",
                )
            return [make(row) for row in found]

        aliases = (f"All/{file}.json", f"{file}.json")
        return Source([HubSet("jinzhuoran/RWKU", config, split, aliases=aliases)], convert)
