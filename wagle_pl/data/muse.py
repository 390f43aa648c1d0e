"""MUSE: unlearning of news articles and of books (Shi et al. 2024, arXiv 2407.06460)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Row
from wagle_pl.data.rows import HubSet, read_set
from wagle_pl.data.suite import Source, SuiteDataModule, need_columns, questions
from wagle_pl.data.template import following


class MUSEDataModule(SuiteDataModule):
    """``muse-bench/MUSE-News`` or ``muse-bench/MUSE-Books``, from the hub or a folder.

    Texts of a split are put together and cut into chunks, as the benchmark's baselines do. Test
    sets: ``verbmem_forget`` (prompt and response: verbatim memorisation), ``knowmem_forget`` and
    ``knowmem_retain`` (question and answer, after the benchmark's ten worked examples), and the
    texts ``members`` (of the forget set), ``nonmembers`` (never seen) and ``retain`` (privacy
    leakage). In a folder they are ``<subset>/<split>.*``, e.g. ``raw/forget.jsonl``.

    Args:
        corpus: ``news`` or ``books``.
        forget_split: subset and split to forget; ``scal/forget_2`` and ``sust/forget_2`` (and so
            on) are those of the benchmark's scalability and sustainability runs (News).
        retain_splits: splits of the subset ``raw`` to keep. Unlearning uses ``retain1``; a target
            model is fine-tuned on ``retain2`` as well, which the test sets ask about.
        examples: put the benchmark's worked examples before each question.
        chunk_size: longest chunk in ``chunk_unit``; the default fits 2,048 tokens.
        max_length: longest sequence in tokens.
        prompt_format: text of the prompt, with ``{question}``; the default is the benchmark's.
        answer_format: text of the answer, with ``{answer}``; the default is the benchmark's. What
            stands before ``{answer}`` is given when generating, with the space at its end, as the
            benchmark does.
        **kwargs: passed to :class:`wagle_pl.data.suite.SuiteDataModule`.
    """

    suite: ClassVar[str] = "muse"

    def __init__(
        self,
        corpus: Literal["news", "books"] = "news",
        forget_split: str = "raw/forget",
        retain_splits: Sequence[str] = ("retain1",),
        examples: bool = True,
        chunk_size: Optional[int] = 2040,
        max_length: int = 2048,
        prompt_format: Optional[str] = "Question: {question}\n",
        answer_format: Optional[str] = "Answer: {answer}",
        **kwargs: Any,
    ) -> None:
        if answer_format is not None and kwargs.get("generation_prefix") is None:
            kwargs["generation_prefix"] = answer_format.partition("{answer}")[0]
        super().__init__(
            chunk_size=chunk_size,
            max_length=max_length,
            prompt_format=prompt_format,
            answer_format=answer_format,
            **kwargs,
        )
        if forget_split.count("/") != 1:
            raise WagleError(
                f"data.forget_split must be SUBSET/SPLIT such as raw/forget, got {forget_split!r}"
            )
        self.corpus = corpus
        self.forget_split = forget_split
        self.retain_splits = tuple(retain_splits)
        self.worked_examples = examples

    def sets(self) -> Mapping[str, Source]:
        """Texts of the splits, each one text in parts."""
        texts = Source(joined=True, chunked=True)
        return {
            "forget": texts._replace(parts=[self._part(self.forget_split)], paired=True),
            "retain": texts._replace(parts=[self._part(f"raw/{s}") for s in self.retain_splits]),
            "holdout": texts._replace(parts=[self._part("raw/holdout")]),
        }

    def tests(self) -> Mapping[str, Source]:
        """The benchmark's six sets."""
        return {
            "verbmem_forget": Source([self._part("verbmem/forget")], _continuations),
            **{
                f"knowmem_{side}": Source(
                    [self._part(f"knowmem/{side}_qa")], partial(self._questions, side)
                )
                for side in ("forget", "retain")
            },
            "members": Source([self._part("privleak/forget")]),
            "nonmembers": Source([self._part("privleak/holdout")]),
            "retain": Source([self._part("privleak/retain")]),
        }

    def _part(self, name: str) -> HubSet:
        return HubSet(f"muse-bench/MUSE-{self.corpus.capitalize()}", *name.split("/"))

    def _questions(self, side: str, rows: Sequence[Row], where: str) -> list[Row]:
        """Questions after the worked examples of their side, where there are some."""
        part = self._part(f"knowmem/{side}_qa_icl")
        shots = read_set(part, self.folder) if self.worked_examples else None
        if not shots:
            return questions(rows, where)
        form = (self.prompt_format or "{question}\n") + (self.answer_format or "{answer}") + "\n\n"
        context = "".join(
            form.replace("{question}", shot["question"]).replace("{answer}", shot["answer"])
            for shot in questions(shots, str(part))
        )
        return [{**row, "context": context} for row in questions(rows, where)]


def _continuations(rows: Sequence[Row], where: str) -> list[Row]:
    """The benchmark's rows have lost the space at the seam, which the texts have."""
    need_columns(rows, ("prompt", "gt"), where)
    marks = {"continuation": True, "partial": True}
    return [
        {"prompt": row["prompt"], "response": following(row["prompt"], row["gt"]), **marks}
        for row in rows
    ]
