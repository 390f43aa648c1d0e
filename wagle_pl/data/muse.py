"""MUSE: six-way evaluation of unlearning, on news articles and on books (Shi et al. 2024, arXiv 2407.06460)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Row
from wagle_pl.data.sources import HubSet, need_columns, read_set
from wagle_pl.data.suite import SuiteDataModule
from wagle_pl.data.template import following


class MUSEDataModule(SuiteDataModule):
    """MUSE-News or MUSE-Books, from the hub (``muse-bench/MUSE-News``, ``muse-bench/MUSE-Books``) or a folder.

    Texts of a split are put together and cut into chunks, as the benchmark's baselines do. Test sets:
    ``verbmem_forget`` (prompt and response: verbatim memorisation), ``knowmem_forget`` and ``knowmem_retain`` (question
    and answer, after the benchmark's ten worked examples), and the texts ``members`` (of the forget set),
    ``nonmembers`` (never seen) and ``retain`` (privacy leakage). In a folder they are ``<subset>/<split>.*``, e.g.
    ``raw/forget.jsonl``.

    Args:
        corpus: ``news`` or ``books``.
        forget_split: subset and split to forget; ``scal/forget_2`` and ``sust/forget_2`` (and so on) are those of the
            benchmark's scalability and sustainability runs (News).
        retain_splits: splits of the subset ``raw`` to keep. Unlearning uses ``retain1``; a target model is fine-tuned
            on ``retain2`` as well, which the test sets ask about.
        examples: put the benchmark's worked examples before each question.
        chunk_size: longest chunk in ``chunk_unit``; the default fits 2,048 tokens.
        max_length: longest sequence in tokens.
        prompt_format: text of the prompt, with ``{question}``; the default is the benchmark's.
        answer_format: text of the answer, with ``{answer}``; the default is the benchmark's. What stands before
            ``{answer}`` is given when generating, with the space at its end, as the benchmark does.
        kwargs: see :class:`wagle_pl.data.suite.SuiteDataModule`.
    """

    suite: ClassVar[str] = "muse"
    joined: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "holdout"})

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
        self.examples = examples

    def sets(self) -> Mapping[str, Sequence[HubSet]]:
        """See :meth:`SuiteDataModule.sets`."""
        subset, _, split = self.forget_split.partition("/")
        return {
            "forget": [self._part(subset, split)],
            "retain": [self._part("raw", split) for split in self.retain_splits],
            "holdout": [self._part("raw", "holdout")],
            "test/verbmem_forget": [self._part("verbmem", "forget")],
            "test/knowmem_forget": [self._part("knowmem", "forget_qa")],
            "test/knowmem_retain": [self._part("knowmem", "retain_qa")],
            "test/members": [self._part("privleak", "forget")],
            "test/nonmembers": [self._part("privleak", "holdout")],
            "test/retain": [self._part("privleak", "retain")],
        }

    def _part(self, subset: str, split: str) -> HubSet:
        return HubSet(f"muse-bench/MUSE-{self.corpus.capitalize()}", subset, split)

    def convert(self, name: str, rows: list[Row]) -> list[Row]:
        """See :meth:`SuiteDataModule.convert`."""
        where = f"{name} set ({self.describe(name)})"
        if name == "test/verbmem_forget":
            need_columns(rows, ("prompt", "gt"), where)
            marks = {"continuation": True, "partial": True}
            # the benchmark's rows have lost the space between the two: without it the first word is glued to the prompt
            return [
                {"prompt": r["prompt"], "response": following(r["prompt"], r["gt"]), **marks}
                for r in rows
            ]
        if name in ("test/knowmem_forget", "test/knowmem_retain"):
            need_columns(rows, ("question", "answer"), where)
            context = self._worked_examples(name.removeprefix("test/knowmem_"))
            return [
                {"question": row["question"], "answer": row["answer"], **context} for row in rows
            ]
        return super().convert(name, rows)

    def _worked_examples(self, side: str) -> dict[str, str]:
        """The column ``context`` of the questions on one side (``forget`` or ``retain``); none if there are none."""
        part = self._part("knowmem", f"{side}_qa_icl")
        shots = read_set(part, self.folder) if self.examples else None
        if not shots:
            return {}
        need_columns(shots, ("question", "answer"), str(part))
        template = (
            (self.prompt_format or "{question}\n") + (self.answer_format or "{answer}") + "\n\n"
        )
        texts = [
            template.replace("{question}", s["question"]).replace("{answer}", s["answer"])
            for s in shots
        ]
        return {"context": "".join(texts)}
