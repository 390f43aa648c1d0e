"""Long texts into chunks, and chunks into a prompt and its continuation. Same text, same cuts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Optional

from wagle_pl.core.errors import WagleError
from wagle_pl.data.example import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chunk_text(
    text: str, size: int, tokenizer: Optional[PreTrainedTokenizerBase] = None
) -> list[str]:
    """Cut a text into pieces that put together give the text again.

    Args:
        text: the text.
        size: longest piece, in tokens or, without a tokenizer, in characters.
        tokenizer: a fast one: a cut is where a token of the whole text begins, every ``size``
            tokens (without special tokens; a piece tokenised alone may differ at its ends by one or
            two). None cuts before the last white space that keeps the piece within ``size``, so
            that words stay whole where they fit.

    Raises:
        WagleError: if ``size`` is below 1, or the tokenizer is not fast.

    >>> chunk_text("Down the rabbit-hole", 9)
    ['Down the', ' rabbit-h', 'ole']
    """
    if size < 1:
        raise WagleError(f"the size of a chunk must be at least 1, got {size}")
    if tokenizer is None:
        cuts = _character_cuts(text, size)
    elif not tokenizer.is_fast:
        raise WagleError(
            "cutting texts by tokens needs a fast tokenizer; cut them by characters (chunk_unit)"
        )
    else:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts = {start for start, _ in encoded["offset_mapping"][size::size]}
        cuts = sorted(start for start in starts if 0 < start < len(text))
    return [text[i:j] for i, j in pairwise([0, *cuts, len(text)]) if i < j]


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
    texts: Iterable[str], size: int, tokenizer: Optional[PreTrainedTokenizerBase] = None
) -> list[Row]:
    """The chunks of some texts as rows, blank ones left out.

    Returns:
        Rows with ``text``, and ``partial`` where the text goes on after the row.
    """
    rows: list[Row] = []
    for text in texts:
        chunks = chunk_text(text, size, tokenizer)
        last = len(chunks) - 1
        rows += [
            {"text": chunk, "partial": True} if number < last else {"text": chunk}
            for number, chunk in enumerate(chunks)
            if chunk.strip()
        ]
    return rows


def continuation(
    row: Row, prompt_size: int, tokenizer: Optional[PreTrainedTokenizerBase] = None
) -> Optional[Row]:
    """A ``text`` row as a prompt of that size and what follows; None if none does."""
    prompt = chunk_text(row["text"], prompt_size, tokenizer)[0]
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
