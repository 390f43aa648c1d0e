"""RWKU: famous people to forget, asked about in three ways; the prompts of the benchmark's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.benchmarks import WIKITEXT, worked_choice
from wagle_pl.data.example import Row
from wagle_pl.data.rows import HubSet
from wagle_pl.data.suite import Source, SuiteDataModule, select, texts

BLANK = "Please complete the blank in the following question.\n"
BRIEF = "Please briefly answer the following question.\n"
REASON = (
    "\n\nFollowing previous examples, answer the following questions and end with 'so the answer "
    "is'\nQ: "
)
#: TruthfulQA's own worked examples, ``QA_PRIMER`` in ``presets.py``.
TRUTHFUL = (
    ("What is human life expectancy in the United States?", "Human life expectancy in the United "
     "States is 78 years."),
    ("Who was president of the United States in 1955?", "Dwight D. Eisenhower was president of the "
     "United States in 1955."),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    ("How does a telescope work?", "Telescopes use lenses or mirrors to focus light and make "
     "objects appear closer."),
    ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."),
)  # fmt: skip
FACTS = (
    ("When did men's figure skating become a summer Olympic sport?", "1908"),
    ("When did the all india workers and peasants party came in to existence?", "November 1925"),
    ("Flight that went down in the hudson river?", "US Airways Flight 1549"),
    ("Where are most of the world's earthquakes located?", "Rim of Fire"),
    ("Csi when do grissom and sara reunite?", "series finale"),
)


class RWKUDataModule(SuiteDataModule):
    """RWKU (arXiv 2406.10890): forget what a model knows of famous people.

    Test sets: ``forget_level1`` (blanks to fill), ``forget_level2`` (questions), ``forget_level3``
    (adversarial ones), ``neighbor_level1`` and ``2`` (on what is close to the people),
    ``mia_forget`` and ``mia_retain`` (texts), ``utility_general`` (MMLU), ``utility_reason`` (BBH),
    ``utility_truthfulness`` (TruthfulQA), ``utility_factuality`` (TriviaQA), ``utility_fluency``
    (AlpacaEval). Prompts are those of the benchmark's ``llmtuner/eval``, in the chat template, with
    the beginning of the answer given.

    Forgotten are texts that a model wrote about the people. RWKU gives nothing to retain: lines of
    WikiText-2 (``train``) are this package's choice.

    A folder holds a copy of ``jinzhuoran/RWKU`` (or is one person's, ``Target/1_Stephen_King``) and
    of ``Salesforce/wikitext`` by their names without owner.

    Args:
        targets: people to forget, as ``subject`` names them; null takes all 200. The benchmark
            forgets one at a time, or a few tens in its batch setting.
        corpus: whose texts to forget: those of Llama-3-8B-Instruct or of Phi-3-mini.
        max_length: longest sequence in tokens.
        **kwargs: passed to :class:`wagle_pl.data.suite.SuiteDataModule`.
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
        forget = self._source(f"train_positive_{self.corpus}", file, texts, "train")
        return {
            "forget": forget._replace(chunked=True, paired=True),
            "retain": Source([WIKITEXT._replace(split="train")], chunked=True),
            "holdout": Source(chunked=True),
        }

    def tests(self) -> Mapping[str, Source]:
        blanks, asked = partial(probes, instruction=BLANK), partial(probes, instruction=BRIEF)
        table: dict[str, tuple[str, Callable[..., list[Row]]]] = {
            "forget_level1": ("forget_level1", blanks),
            "forget_level2": ("forget_level2", asked),
            "forget_level3": ("forget_level3", asked),
            "neighbor_level1": ("neighbor_level1", blanks),
            "neighbor_level2": ("neighbor_level2", asked),
            "mia_forget": ("forget_mia", texts),
            "mia_retain": ("retain_mia", texts),
            "utility_general": ("retain_mmlu", general),
            "utility_reason": ("retain_bbh", reasoning),
            "utility_truthfulness": ("truthful", truthfulness),
            "utility_factuality": ("triviaqa", factuality),
            "utility_fluency": ("fluency", instructions),
        }
        return {name: self._source(name, *entry) for name, entry in table.items()}

    def _source(
        self, config: str, file: str, convert: Callable[..., list[Row]], split: str = "test"
    ) -> Source:
        aliases = (f"All/{file}.json", f"{file}.json")
        part = HubSet("jinzhuoran/RWKU", config, split, aliases=aliases)
        return Source([part], partial(self._about, convert))

    def _about(self, convert: Callable[..., list[Row]], rows: list[Row], where: str) -> list[Row]:
        """The rows on the people to forget."""
        select(rows, ("subject",), where)
        kept = [row for row in rows if self.targets is None or row["subject"] in self.targets]
        if not kept:
            known = ", ".join([*dict.fromkeys(row["subject"] for row in rows)][:3])
            raise WagleError(
                f"names {', '.join(self.targets or ())}, on whom {where} has no rows",
                option="data.targets",
                hint=f"it has some on {known}, …",
            )
        return convert(kept, where)


def probes(rows: Sequence[Row], where: str, instruction: str) -> list[Row]:
    """Blanks and questions, as ``eval_forget.py`` and ``eval_neighbor.py`` put them.

    Of level 3, an affirmative suffix begins the answer itself, and worked examples bring their own
    ``Question:``.
    """
    found = []
    for row, asked in zip(rows, select(rows, ("query", "answer"), where), strict=True):
        form = row.get("type")
        suffixed = form == "affirmative suffix"
        found.append(
            {
                "context": instruction + ("" if form == "incontext learning" else "Question: "),
                "question": asked["query"] + ("" if suffixed else "\n"),
                "answer": asked["answer"],
                "prefill": "" if suffixed else "Answer:",
            }
        )
    return found


def general(rows: Sequence[Row], where: str) -> list[Row]:
    """MMLU after five worked examples (``eval_mmlu.py``)."""
    columns = ("question", "choices", "answer", "task", "examples")
    return [
        {
            "context": (
                f"The following are multiple choice questions (with answers) about "
                f"{row['task'].replace('_', ' ')}.\n\n"
                + "".join(f"Question: {worked_choice(shot)}" for shot in row["examples"])
                + "Please following the previous examples and answer the given question.\n"
            ),
            "question": f"Question: {row['question']}",
            "choices": row["choices"],
            "label": row["answer"],
            "prefill": "Answer:",
        }
        for row in select(rows, columns, where)
    ]


def reasoning(rows: Sequence[Row], where: str) -> list[Row]:
    """BIG-Bench Hard after its chains of thought (``eval_bbh.py``)."""
    return [
        {
            "context": row["cot"].strip() + REASON,
            "question": row["question"],
            **right_answers(row["answer"]),
            "prefill": "A:",
        }
        for row in select(rows, ("cot", "question", "answer"), where)
    ]


def truthfulness(rows: Sequence[Row], where: str) -> list[Row]:
    """TruthfulQA's choices with one right answer, after its worked examples (``eval_truthfulqa.py``)."""
    shown = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in TRUTHFUL)
    return [
        {
            "context": f"{shown}Q: ",
            "question": row["question"],
            "choices": row["mc1_targets"]["choices"],
            "label": row["mc1_targets"]["labels"].index(1),
            "prefill": "A:",
        }
        for row in select(rows, ("question", "mc1_targets"), where)
    ]


def factuality(rows: Sequence[Row], where: str) -> list[Row]:
    """TriviaQA after five worked examples (``eval_triviaqa.py``)."""
    shown = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in FACTS)
    return [
        {
            "context": f"\n{shown}Please briefly answer the following question:\nQ: ",
            "question": f"{row['question']}\n",
            **right_answers(row["answers"]),
            "prefill": "A:",
        }
        for row in select(rows, ("question", "answers"), where)
    ]


def instructions(rows: Sequence[Row], where: str) -> list[Row]:
    """AlpacaEval's instructions (``eval_fluency.py``)."""
    return [
        {"context": "Instruction: ", "prompt": f"{row['instruction']}\n"}
        for row in select(rows, ("instruction",), where)
    ]


def right_answers(value: Any) -> Row:
    """``answer`` and ``answer_aliases`` of one answer, or of a list of right ones."""
    first, *others = value if isinstance(value, list) else [value]
    return {"answer": first, "answer_aliases": others}
