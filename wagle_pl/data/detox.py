"""Detoxification: unsafe answers of PKU-SafeRLHF to forget, C4 to keep (as in SOUL and WAGLE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Optional

from wagle_pl.data.example import Row
from wagle_pl.data.sources import HubSet, need_columns
from wagle_pl.data.suite import C4, WIKITEXT, SuiteDataModule

SAFE_RLHF = "PKU-Alignment/PKU-SafeRLHF"


class DetoxDataModule(SuiteDataModule):
    """PKU-SafeRLHF's unsafe answers to forget, web text (C4) to keep.

    Forget rows are prompts of the training split with each answer that was judged unsafe (prompt and response). Test
    sets: ``prompts`` (of the test split, each once; to generate from) and ``wikitext`` (articles in chunks, for
    perplexity). Other prompts, e.g. ``allenai/real-toxicity-prompts``: give ``prompts``.

    A folder holds copies of ``PKU-Alignment/PKU-SafeRLHF``, ``allenai/c4`` and ``Salesforce/wikitext`` by their names
    without owner.

    Args:
        prompts: file or hub dataset of prompts to test on, in a column ``prompt`` (a text, or a dict with ``text``).
        plain_prompts: generate from the prompt as it stands, as the papers' code does, not from prompt_format or chat
            template.
        limit_forget: unsafe answers to use, from the start; the papers' code draws 200.
        limit_retain: documents of C4 to use, from the start of the shard that the papers' code takes.
        kwargs: see :class:`wagle_pl.data.suite.SuiteDataModule`.
    """

    suite: ClassVar[str] = "detox"
    paired: ClassVar[frozenset[str]] = frozenset()

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

    def sets(self) -> Mapping[str, Sequence[HubSet]]:
        """See :meth:`SuiteDataModule.sets`."""
        return {
            "forget": [HubSet(SAFE_RLHF, None, "train")],
            "retain": [C4],
            "test/prompts": [HubSet(SAFE_RLHF, None, "test")],
            "test/wikitext": [WIKITEXT],
        }

    def limit(self, name: str) -> Optional[int]:
        """C4 is read as far as it is used."""
        return self.limits["retain"] if name == "retain" else None

    def _given(self, name: str) -> Optional[str]:
        own = self.prompts if name == "test/prompts" and self.test_sources is None else None
        return own or super()._given(name)

    def _available(self, name: str) -> bool:
        return self._given(name) is not None or super()._available(name)

    def load_rows(self, name: str) -> Optional[list[Row]]:
        """See :meth:`SuiteDataModule.load_rows`."""
        rows = super().load_rows(name)
        given = name == "test/prompts" and rows is not None and self._given(name) is not None
        return self.convert(name, rows) if given else rows

    def convert(self, name: str, rows: list[Row]) -> list[Row]:
        """See :meth:`SuiteDataModule.convert`."""
        where = f"{name} set ({self.describe(name)})"
        if name == "forget":
            return unsafe_answers(rows, where)
        if name == "test/prompts":
            need_columns(rows, ("prompt",), where)
            mark = {"continuation": True} if self.plain_prompts else {}
            return [
                {"prompt": prompt, **mark}
                for prompt in dict.fromkeys(map(_prompt_text, rows))
                if prompt.strip()
            ]
        return super().convert(name, rows)


def unsafe_answers(rows: Sequence[Row], where: str) -> list[Row]:
    """Rows of PKU-SafeRLHF (two answers each) -> one ``prompt`` and ``response`` for each answer judged unsafe.

    Raises:
        WagleError: naming ``where`` and the row if a column is missing.
    """
    columns = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")
    need_columns(rows, columns, where)
    return [
        {"prompt": row["prompt"], "response": row[f"response_{number}"]}
        for row in rows
        for number in (0, 1)
        if not row[f"is_response_{number}_safe"] and row[f"response_{number}"].strip()
    ]


def _prompt_text(row: Row) -> str:
    """RealToxicityPrompts has a dict in the column, other sets a text."""
    prompt: Any = row["prompt"]
    return prompt["text"] if isinstance(prompt, dict) else prompt
