"""MUSE, WMDP, a book to forget, and detoxification: the benchmarks of the WAGLE paper beside TOFU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Optional

from wagle_pl.core.errors import WagleError, check_counts
from wagle_pl.data.example import Row
from wagle_pl.data.template import following
from wagle_pl.lab.benchmarks.table import (
    HubSet,
    Source,
    SourceRow,
    SuiteDataModule,
    choices,
    questions,
    read_set,
    source_rows,
)

WIKITEXT = HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
ARTICLES = Source([WIKITEXT], articles=True)
#: The shard of C4 that the SOUL and WAGLE papers' code reads.
C4 = HubSet("allenai/c4", None, "train", "en/c4-train.00001-of-01024.json.gz")

CORPORA = "cais/wmdp-corpora"
#: WMDP's forget corpora. The biosecurity one is gated: access to its repository has to be
#: requested.
HAZARDS = {
    "bio": HubSet(
        "cais/wmdp-bio-forget-corpus",
        aliases=("bio-forget-corpus.*", "wmdp-corpora/bio-forget-corpus.*"),
    ),
    "cyber": HubSet(CORPORA, "cyber-forget-corpus"),
}

BOOKS = "muse-bench/MUSE-Books"  # has the book that the papers forget, and questions about it
SAFE_RLHF = "PKU-Alignment/PKU-SafeRLHF"
MMLU = HubSet("cais/mmlu", "all", "test")


class MUSEDataModule(SuiteDataModule):
    """MUSE (arXiv 2407.06460): news articles or books, from the hub or a folder.

    Texts of a split are put together and cut into chunks, as the benchmark's baselines do. Test
    sets: ``verbmem_forget`` (prompt and response: verbatim memorisation), ``knowmem_forget`` and
    ``knowmem_retain`` (question and answer), and the texts ``members`` (of the forget set),
    ``nonmembers`` (never seen) and ``retain`` (privacy leakage). In a folder they are
    ``<subset>/<split>.*``, e.g. ``raw/forget.jsonl``.

    Args:
        corpus: ``news`` or ``books``.
        forget_split: subset and split to forget; ``scal/forget_2``, ``sust/forget_2`` and so on are
            those of the scalability and sustainability runs (News).
        retain_splits: splits of ``raw`` to keep. Unlearning uses ``retain1``; a target model is
            fine-tuned on ``retain2`` as well, which the test sets ask about.
        examples: put the benchmark's ten worked examples before each question.
        chunk_size: longest chunk in tokens; the default fits ``max_length``.
        max_length: longest sequence in tokens.
        prompt_format: text of the prompt, with ``{question}``; the default is the benchmark's.
        answer_format: text of the answer, with ``{answer}``. The text before it, with the space at
            its end, is given to the model for generation, as in the benchmark.
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
            why = f"must be SUBSET/SPLIT such as raw/forget, got {forget_split!r}"
            raise WagleError(why, "data.forget_split")
        self.corpus = corpus
        self.forget_split = forget_split
        self.retain_splits = tuple(retain_splits)
        self.worked_examples = examples

    def sets(self) -> Mapping[str, Source]:
        text = Source(joined=True, chunked=True)
        return {
            "forget": text._replace(parts=[self._part(self.forget_split)], paired=True),
            "retain": text._replace(parts=[self._part(f"raw/{s}") for s in self.retain_splits]),
            "holdout": text._replace(parts=[self._part("raw/holdout")]),
        }

    def tests(self) -> Mapping[str, Source]:
        def asked(side: str) -> Source:
            return Source([self._part(f"knowmem/{side}_qa")], partial(self._questions, side))

        return {
            "verbmem_forget": Source([self._part("verbmem/forget")], continuations),
            "knowmem_forget": asked("forget"),
            "knowmem_retain": asked("retain"),
            "members": Source([self._part("privleak/forget")]),
            "nonmembers": Source([self._part("privleak/holdout")]),
            "retain": Source([self._part("privleak/retain")]),
        }

    def _part(self, name: str) -> HubSet:
        subset, split = name.split("/")
        return HubSet(f"muse-bench/MUSE-{self.corpus.capitalize()}", subset, split)

    def _questions(self, side: str, rows: Sequence[SourceRow]) -> list[Row]:
        part = self._part(f"knowmem/{side}_qa_icl")
        shots = read_set(part, self.folder) if self.worked_examples else None
        form = (self.prompt_format or "{question}\n") + (self.answer_format or "{answer}") + "\n\n"
        context = "".join(
            form.replace("{question}", shot["question"]).replace("{answer}", shot["answer"])
            for shot in source_rows(shots or (), str(part))
        )
        added = {"context": context} if shots else {}
        return [{**row, **added} for row in questions(rows)]


def continuations(rows: Sequence[SourceRow]) -> list[Row]:
    """MUSE's prompts and ``gt``, with the space between them that the benchmark's files lack."""
    marks = {"continuation": True, "partial": True}
    return [
        {"prompt": row["prompt"], "response": following(row["prompt"], row["gt"]), **marks}
        for row in rows
    ]


class WMDPDataModule(SuiteDataModule):
    """WMDP (arXiv 2403.03218): hazardous knowledge in biosecurity and cybersecurity.

    Test sets: ``wmdp_bio`` and ``wmdp_cyber`` (question, choices, label), ``mmlu`` if asked for,
    and ``wikitext`` (articles in chunks, for perplexity).

    A folder holds copies of ``cais/wmdp-corpora`` and ``cais/wmdp-bio-forget-corpus`` (or the
    ``bio-forget-corpus.jsonl`` and ``cyber-forget-corpus.jsonl`` that WMDP provides),
    ``cais/wmdp``, ``Salesforce/wikitext`` and ``cais/mmlu`` by their names without owner.

    Args:
        domains: what to forget: ``bio``, ``cyber`` or both; also chooses the test sets.
        retain_corpus: ``wikitext`` (lines of WikiText-2, as in the paper's code), or the
            ``domains``' own retain corpora, without the hazard (as in WAGLE's code).
        wikitext_split: split of WikiText-2 to retain. With ``test``, as in the paper's code,
            perplexity is measured on retain rows: use ``train`` if that number matters.
        mmlu: also test on MMLU (14,042 questions). With a folder, it is tested if it is there.
    """

    suite: ClassVar[str] = "wmdp"

    def __init__(
        self,
        domains: Sequence[Literal["bio", "cyber"]] = ("bio", "cyber"),
        retain_corpus: Literal["wikitext", "domains"] = "wikitext",
        wikitext_split: Literal["train", "validation", "test"] = "test",
        mmlu: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not domains or set(domains) - set(HAZARDS):
            raise WagleError(f"data.domains: must name bio, cyber or both, got {list(domains)}")
        self.domains = tuple(dict.fromkeys(domains))
        self.retain_corpus = retain_corpus
        self.wikitext_split = wikitext_split
        self.mmlu = mmlu

    def sets(self) -> Mapping[str, Source]:
        retain = [WIKITEXT._replace(split=self.wikitext_split)]
        if self.retain_corpus == "domains":
            retain = [HubSet(CORPORA, f"{domain}-retain-corpus") for domain in self.domains]
        forget = [HAZARDS[domain] for domain in self.domains]
        return {
            "forget": Source(forget, chunked=True, paired=True),
            "retain": Source(retain, chunked=True),
            "holdout": Source(chunked=True),
        }

    def tests(self) -> Mapping[str, Source]:
        hubs = {f"wmdp_{d}": HubSet("cais/wmdp", f"wmdp-{d}", "test") for d in self.domains}
        if self.mmlu or self.folder is not None:
            hubs["mmlu"] = MMLU
        asked = {name: Source([hub], choices) for name, hub in hubs.items()}
        return {**asked, "wikitext": ARTICLES}


class CopyrightDataModule(SuiteDataModule):
    """A book in chunks to forget (arXiv 2310.02238, as in SOUL and WAGLE), web text (C4) to keep.

    Test sets: ``forget`` (continuations: BLEU, ROUGE), ``forget_qa`` and ``retain_qa`` (question
    and answer), ``wikitext`` (articles in chunks, for perplexity).

    A folder may hold ``book.txt`` (or ``.jsonl``, ``.parquet``, … with a column ``text``),
    ``forget_qa.jsonl``, ``retain_qa.jsonl`` (``question`` and ``answer``), and copies of
    ``allenai/c4``, ``Salesforce/wikitext`` and ``muse-bench/MUSE-Books`` by their names without
    owner.

    Args:
        book: text file, or file of rows with ``text``; None takes the Harry Potter books of
            MUSE-Books from the hub, or from the folder: the papers name a book but give no file.
        chunk_size: longest chunk in tokens, prompt and continuation together.
        prompt_size: length of the prompt within a chunk; null makes rows of whole chunks, to
            fine-tune a target.
        test_chunks: number of chunks, evenly spaced, in the test set ``forget``; null takes all.
        limit_retain: number of documents of C4 to use, from the start of the papers' shard.
    """

    suite: ClassVar[str] = "copyright"

    def __init__(
        self,
        book: Optional[str] = None,
        chunk_size: Optional[int] = 500,
        prompt_size: Optional[int] = 200,
        test_chunks: Optional[int] = 200,
        limit_retain: Optional[int] = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            chunk_size=chunk_size, prompt_size=prompt_size, limit_retain=limit_retain, **kwargs
        )
        check_counts("data.", test_chunks=test_chunks)
        part = HubSet(BOOKS, "raw", "forget", aliases=("book.*",))
        self.book = Source([part], file=book, joined=True, chunked=True, paired=True)
        self.test_chunks = test_chunks

    def sets(self) -> Mapping[str, Source]:
        return {"forget": self.book, "retain": Source([C4], limit=self.limits["retain"])}

    def tests(self) -> Mapping[str, Source]:
        asked = {
            name: Source([HubSet(BOOKS, "knowmem", name, aliases=(f"{name}.*",))], questions)
            for name in ("forget_qa", "retain_qa")
        }
        forget = self.book._replace(taken=self.test_chunks)
        return {"forget": forget, **asked, "wikitext": ARTICLES}


class DetoxDataModule(SuiteDataModule):
    """PKU-SafeRLHF's unsafe answers to forget, web text (C4) to keep (as in SOUL and WAGLE).

    Test sets: ``prompts`` (of the test split, each once; to generate from) and ``wikitext``
    (articles in chunks, for perplexity).

    A folder holds copies of ``PKU-Alignment/PKU-SafeRLHF``, ``allenai/c4`` and
    ``Salesforce/wikitext`` by their names without owner.

    Args:
        prompts: other prompts to test on, e.g. ``allenai/real-toxicity-prompts``: a file or hub
            dataset with a column ``prompt`` (a text, or a dict with ``text``).
        limit_forget: number of unsafe answers to use, from the start; the papers' code draws 200.
        limit_retain: number of documents of C4 to use, from the start of the papers' shard.
    """

    suite: ClassVar[str] = "detox"

    def __init__(
        self,
        prompts: Optional[str] = None,
        limit_forget: Optional[int] = 200,
        limit_retain: Optional[int] = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(limit_forget=limit_forget, limit_retain=limit_retain, **kwargs)
        self.prompts = prompts

    def sets(self) -> Mapping[str, Source]:
        return {
            "forget": Source([HubSet(SAFE_RLHF)], unsafe_answers, chunked=True),
            "retain": Source([C4], limit=self.limits["retain"], chunked=True),
            "holdout": Source(chunked=True),
        }

    def tests(self) -> Mapping[str, Source]:
        parts = [HubSet(SAFE_RLHF, split="test")]
        prompts = Source(parts, each_prompt, self.prompts, converts_given=True)
        return {"prompts": prompts, "wikitext": ARTICLES}


def each_prompt(rows: Sequence[SourceRow]) -> list[Row]:
    """Each prompt once; RealToxicityPrompts has a dict in the column, other sets a text."""
    prompts = [row["prompt"] for row in rows]
    prompts = [prompt["text"] if isinstance(prompt, dict) else prompt for prompt in prompts]
    kept = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip()]
    return [{"prompt": prompt, "continuation": True} for prompt in kept]


def unsafe_answers(rows: Sequence[SourceRow]) -> list[Row]:
    """A row for each answer (of two) that was judged unsafe."""
    return [
        {"prompt": row["prompt"], "response": row[f"response_{number}"]}
        for row in rows
        for number in (0, 1)
        if row[f"response_{number}"].strip() and not row[f"is_response_{number}_safe"]
    ]
