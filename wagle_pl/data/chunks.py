"""Long texts into chunks, and chunks into a prompt and its continuation. Same text, same cuts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Row

Unit = Literal["tokens", "characters"]


def chunk_text(text: str, size: int, unit: Unit = "tokens", tokenizer: Any = None) -> list[str]:
    """Cut a text into pieces that put together give the text again.

    Args:
        text: the text.
        size: longest piece, in ``unit``.
        unit: ``tokens`` cuts where a token of the whole text begins, every ``size`` tokens (without
            special tokens; a piece tokenised alone may differ at its ends by a token or two).
            ``characters`` cuts before the last white space that keeps the piece within ``size``, so
            that words stay whole where they fit.
        tokenizer: a fast Hugging Face tokenizer, for ``tokens``.

    Raises:
        WagleError: if ``size`` is below 1, or ``tokens`` are asked for without a fast tokenizer.

    >>> chunk_text("Down the rabbit-hole", 9, "characters")
    ['Down the', ' rabbit-h', 'ole']
    """
    if size < 1:
        raise WagleError(f"the size of a chunk must be at least 1, got {size}")
    cuts = _token_cuts(text, size, tokenizer) if unit == "tokens" else _character_cuts(text, size)
    return [
        text[start:end]
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
        if start < end
    ]


def _token_cuts(text: str, size: int, tokenizer: Any) -> list[int]:
    """Where every ``size``-th token begins, the first apart: ascending positions in the text."""
    if tokenizer is None or not tokenizer.is_fast:
        raise WagleError(
            "cutting texts by tokens needs a fast tokenizer; cut them by characters (chunk_unit)"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return sorted({start for start in starts[size::size] if 0 < start < len(text)})


def _character_cuts(text: str, size: int) -> list[int]:
    """Positions of white space, or of a letter where a word is longer than a piece: ascending."""
    cuts, start = [], 0
    while len(text) - start > size:
        end = start + size
        if not text[end].isspace():
            space = next((i for i in range(end - 1, start, -1) if text[i].isspace()), end)
            end = space if text[start:space].strip() else end
        cuts.append(end)
        start = end
    return cuts


def chunk_rows(
    texts: Iterable[str], size: int, unit: Unit = "tokens", tokenizer: Any = None
) -> list[Row]:
    """The chunks of some texts as rows, blank ones left out.

    Returns:
        Rows with ``text``, and ``partial`` where the text goes on after the row.
    """
    rows: list[Row] = []
    for text in texts:
        chunks = chunk_text(text, size, unit, tokenizer)
        last = len(chunks) - 1
        rows += [
            {"text": chunk, "partial": True} if number < last else {"text": chunk}
            for number, chunk in enumerate(chunks)
            if chunk.strip()
        ]
    return rows


def continuation(
    row: Row, prompt_size: int, unit: Unit = "tokens", tokenizer: Any = None
) -> Optional[Row]:
    """A ``text`` row as a prompt of ``prompt_size`` units and what follows; None if none does."""
    prompt = chunk_text(row["text"], prompt_size, unit, tokenizer)[0]
    response = row["text"][len(prompt) :]
    if not prompt.strip() or not response.strip():
        return None
    kept = {column: value for column, value in row.items() if column != "text"}
    return {"prompt": prompt, "response": response, "continuation": True, **kept}


def articles(lines: Iterable[str]) -> list[str]:
    """WikiText's lines put together to articles; a line ``= Title =`` begins one.

    >>> articles([" = A = \\n", "One.\\n", " = = Part = = \\n", "", " = B = \\n", "Two.\\n"])
    [' = A = \\nOne.\\n = = Part = = \\n', ' = B = \\nTwo.\\n']
    """
    found = [""]
    for line in lines:
        words = line.split()
        title = len(words) > 2 and words[0] == words[-1] == "=" and "=" not in (words[1], words[-2])
        if title and found[-1]:
            found.append("")
        found[-1] += line
    return [text for text in found if text.strip()]
