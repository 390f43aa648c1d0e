"""Detoxification: unsafe answers of PKU-SafeRLHF to forget, C4 to keep (as in SOUL and WAGLE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

from wagle_pl.data.example import Row
from wagle_pl.data.rows import HubSet
from wagle_pl.data.suite import ARTICLES, C4, Source, SuiteDataModule, need_columns

SAFE_RLHF = "PKU-Alignment/PKU-SafeRLHF"


class DetoxDataModule(SuiteDataModule):
    """PKU-SafeRLHF's unsafe answers to forget, web text (C4) to keep.

    Forget rows are prompts of the training split with each answer that was judged unsafe (prompt
    and response). Test sets: ``prompts`` (of the test split, each once; to generate from) and
    ``wikitext`` (articles in chunks, for perplexity). Other prompts, e.g.
    ``allenai/real-toxicity-prompts``: give ``prompts``.

    A folder holds copies of ``PKU-Alignment/PKU-SafeRLHF``, ``allenai/c4`` and
    ``Salesforce/wikitext`` by their names without owner.

    Args:
        prompts: file or hub dataset of prompts to test on, in a column ``prompt`` (a text, or a
            dict with ``text``).
        plain_prompts: generate from the prompt as it stands, as the papers' code does, not from
            prompt_format or chat template.
        limit_forget: unsafe answers to use, from the start; the papers' code draws 200.
        limit_retain: documents of C4 to use, from the start of the shard that the papers' code
            takes.
        **kwargs: passed to :class:`wagle_pl.data.suite.SuiteDataModule`.
    """

    suite: ClassVar[str] = "detox"

    def __init__(
        self,
        prompts: Optional[str] = None,
        plain_prompts: bool = True,
        limit_forget: Optional[int] = 200,
        limit_retain: Optional[int] = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(limit_forget=limit_forget, limit_retain=limit_retain, **kwargs)
        self.prompts = prompts
        self.plain_prompts = plain_prompts

    def sets(self) -> Mapping[str, Source]:
        """Unsafe answers, and C4 as far as it is used."""
        return {
            "forget": Source([HubSet(SAFE_RLHF, None, "train")], unsafe_answers, chunked=True),
            "retain": Source([C4], limit=self.limits["retain"], chunked=True),
            "holdout": Source(chunked=True),
        }

    def tests(self) -> Mapping[str, Source]:
        """Prompts, and WikiText."""
        parts = [HubSet(SAFE_RLHF, None, "test")]
        prompts = Source(parts, self._prompts, self.prompts, converts_given=True)
        return {"prompts": prompts, "wikitext": ARTICLES}

    def _prompts(self, rows: Sequence[Row], where: str) -> list[Row]:
        """Each prompt once; RealToxicityPrompts has a dict in the column, other sets a text."""
        need_columns(rows, ("prompt",), where)
        prompts = [p["text"] if isinstance(p := row["prompt"], dict) else p for row in rows]
        mark = {"continuation": True} if self.plain_prompts else {}
        return [{"prompt": prompt, **mark} for prompt in dict.fromkeys(prompts) if prompt.strip()]


def unsafe_answers(rows: Sequence[Row], where: str) -> list[Row]:
    """``prompt`` and ``response`` for each answer (of two a row) that was judged unsafe."""
    columns = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
    need_columns(rows, columns, where)
    return [
        {"prompt": row["prompt"], "response": row[f"response_{number}"]}
        for row in rows
        for number in (0, 1)
        if not row[f"is_response_{number}_safe"] and row[f"response_{number}"].strip()
    ]
