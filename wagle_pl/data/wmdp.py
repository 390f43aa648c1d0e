"""WMDP: hazardous knowledge in biosecurity and cybersecurity (Li et al. 2024, arXiv 2403.03218)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Row
from wagle_pl.data.rows import HubSet
from wagle_pl.data.suite import ARTICLES, WIKITEXT, Source, SuiteDataModule, choices, texts

CORPORA = "cais/wmdp-corpora"

#: Forget corpora. The biosecurity one is gated: its repository gives it to those who asked for
#: access.
FORGET = {
    "bio": HubSet(
        "cais/wmdp-bio-forget-corpus",
        aliases=("bio-forget-corpus.*", "wmdp-corpora/bio-forget-corpus.*"),
    ),
    "cyber": HubSet(CORPORA, "cyber-forget-corpus"),
}


class WMDPDataModule(SuiteDataModule):
    """WMDP's corpora and questions, from the hub or from a folder.

    Forget rows are the documents of the forget corpora, retain rows the lines of WikiText-2 (as the
    paper's code has it) or the corpora of the same subjects without the hazard (as WAGLE's code has
    it). Test sets: ``wmdp_bio`` and ``wmdp_cyber`` (question, choices, label), ``mmlu`` if asked
    for, and ``wikitext`` (articles in chunks, for perplexity).

    A folder holds copies of ``cais/wmdp-corpora``, ``cais/wmdp-bio-forget-corpus``, ``cais/wmdp``,
    ``Salesforce/wikitext`` and ``cais/mmlu`` by their names without owner.
    ``bio-forget-corpus.jsonl`` and ``cyber-forget-corpus.jsonl``, as WMDP hands them out, will do
    too.

    Args:
        domains: what to forget: ``bio``, ``cyber`` or both. Their test sets go with them.
        retain_corpus: ``wikitext``, or the ``domains``' own retain corpora.
        wikitext_split: split of WikiText-2 that is retained. With ``test``, which the paper's code
            takes, the perplexity on the test set ``wikitext`` is on retain rows: take ``train``
            where that number matters.
        min_characters: shorter texts are left out of the training rows; blank ones always are.
        mmlu: test on MMLU too (14,042 questions). With a folder it is tested if it is there.
        **kwargs: passed to :class:`wagle_pl.data.suite.SuiteDataModule`.
    """

    suite: ClassVar[str] = "wmdp"

    def __init__(
        self,
        domains: Sequence[Literal["bio", "cyber"]] = ("bio", "cyber"),
        retain_corpus: Literal["wikitext", "domains"] = "wikitext",
        wikitext_split: Literal["train", "validation", "test"] = "test",
        min_characters: int = 0,
        mmlu: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not domains or set(domains) - set(FORGET):
            raise WagleError(f"data.domains must name bio, cyber or both, got {list(domains)}")
        self.domains = tuple(dict.fromkeys(domains))
        self.retain_corpus = retain_corpus
        self.wikitext_split = wikitext_split
        self.min_characters = min_characters
        self.mmlu = mmlu

    def sets(self) -> Mapping[str, Source]:
        """The documents of the forget corpora; lines of WikiText, or the retain corpora."""
        retain = [WIKITEXT._replace(split=self.wikitext_split)]
        if self.retain_corpus == "domains":
            retain = [HubSet(CORPORA, f"{domain}-retain-corpus") for domain in self.domains]
        forget = [FORGET[domain] for domain in self.domains]
        return {
            "forget": Source(forget, self._long_texts, chunked=True, paired=True),
            "retain": Source(retain, self._long_texts, chunked=True),
            "holdout": Source(chunked=True),
        }

    def tests(self) -> Mapping[str, Source]:
        """Questions of the domains, MMLU and WikiText."""
        hubs = {f"wmdp_{d}": HubSet("cais/wmdp", f"wmdp-{d}", "test") for d in self.domains}
        if self.mmlu or self.folder is not None:
            hubs["mmlu"] = HubSet("cais/mmlu", "all", "test")
        return {**{n: Source([hub], choices) for n, hub in hubs.items()}, "wikitext": ARTICLES}

    def _long_texts(self, rows: Sequence[Row], where: str) -> list[Row]:
        return [row for row in texts(rows, where) if len(row["text"]) >= self.min_characters]
