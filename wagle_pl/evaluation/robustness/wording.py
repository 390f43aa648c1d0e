"""Other wordings of a question, by rule."""

from __future__ import annotations

import re
from collections.abc import Mapping

_COPULA = re.compile(
    r"(what|who|where|when|which\b.*?|how)\s+(is|are|was|were)\s+(.+)", re.IGNORECASE | re.DOTALL
)
_QUESTION = frozenset(("what", "who", "whom", "whose", "where", "when", "which", "why", "how"))
_STOP = _QUESTION | frozenset(
    (
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "by",
        "for",
        "from",
        "to",
        "with",
        "and",
        "or",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "do",
        "does",
        "did",
        "has",
        "have",
        "had",
        "can",
        "could",
        "would",
        "that",
        "this",
        "there",
        "their",
        "his",
        "her",
        "its",
        "it",
        "he",
        "she",
        "they",
        "you",
        "me",
    )
)
_WORDS = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")

#: Language -> how a question is put around, and its common words; other words stay English.
LANGUAGES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "es": (
        "Responde en inglés, por favor: ¿{question}?",
        dict(
            what="qué",
            who="quién",
            whom="quién",
            where="dónde",
            when="cuándo",
            which="cuál",
            why="por qué",
            how="cómo",
            the="el",
            a="un",
            an="un",
            of="de",
            by="por",
            on="en",
            at="en",
            to="a",
            and_="y",
            or_="o",
            with_="con",
            from_="de",
            for_="para",
            in_="en",
            is_="es",
            are="son",
            was="fue",
            were="fueron",
            has="tiene",
            have="tienen",
            does="",
            do="",
            did="",
            his="su",
            her="su",
            their="su",
            name="nombre",
            full="completo",
            book="libro",
            books="libros",
            author="autor",
            born="nacido",
            city="ciudad",
            country="país",
            year="año",
            father="padre",
            mother="madre",
            parents="padres",
            work="obra",
            first="primero",
            many="muchos",
        ),
    ),
    "fr": (
        "Répondez en anglais, s'il vous plaît : {question} ?",
        dict(
            what="quoi",
            who="qui",
            whom="qui",
            where="où",
            when="quand",
            which="quel",
            why="pourquoi",
            how="comment",
            the="le",
            a="un",
            an="un",
            of="de",
            by="par",
            on="sur",
            at="à",
            to="à",
            and_="et",
            or_="ou",
            with_="avec",
            from_="de",
            for_="pour",
            in_="dans",
            is_="est",
            are="sont",
            was="était",
            were="étaient",
            has="a",
            have="ont",
            does="",
            do="",
            did="",
            his="son",
            her="sa",
            their="leur",
            name="nom",
            full="complet",
            book="livre",
            books="livres",
            author="auteur",
            born="né",
            city="ville",
            country="pays",
            year="année",
            father="père",
            mother="mère",
            parents="parents",
            work="œuvre",
            first="premier",
            many="beaucoup",
        ),
    ),
    "de": (
        "Bitte auf Englisch antworten: {question}?",
        dict(
            what="was",
            who="wer",
            whom="wen",
            where="wo",
            when="wann",
            which="welches",
            why="warum",
            how="wie",
            the="die",
            a="ein",
            an="ein",
            of="von",
            by="von",
            on="auf",
            at="bei",
            to="zu",
            and_="und",
            or_="oder",
            with_="mit",
            from_="aus",
            for_="für",
            in_="in",
            is_="ist",
            are="sind",
            was="war",
            were="waren",
            has="hat",
            have="haben",
            does="tut",
            do="tun",
            did="tat",
            his="sein",
            her="ihr",
            their="ihr",
            name="Name",
            full="voller",
            book="Buch",
            books="Bücher",
            author="Autor",
            born="geboren",
            city="Stadt",
            country="Land",
            year="Jahr",
            father="Vater",
            mother="Mutter",
            parents="Eltern",
            work="Werk",
            first="erste",
            many="viele",
        ),
    ),
}


def paraphrases(question: str) -> list[str]:
    """Other wordings of an English question: asked by the way, asked politely, as an order, and as search words.

    >>> for text in paraphrases("What is the full name of the author born in Kuwait City?"): print(text)
    I have been wondering about something. What is the full name of the author born in Kuwait City?
    Could you help me with this question: what is the full name of the author born in Kuwait City?
    Tell me what the full name of the author born in Kuwait City is.
    full name author born Kuwait City
    """
    text = question.strip()
    bare = text.rstrip("?.! ")
    found = [
        f"I have been wondering about something. {text}",
        f"Could you help me with this question: {_lower(bare)}?",
    ]
    copula = _COPULA.fullmatch(bare)
    if copula:
        word, verb, rest = copula.groups()
        found.append(f"Tell me {_lower(word)} {rest} {verb}.")
    words = [word for word in bare.split() if word.lower().strip("',.:;()\"") not in _STOP]
    if words and words != bare.split():
        found.append(" ".join(words))
    return found


def translated(question: str, language: str) -> str:
    """A question as a hasty translation has it: asked in another language, common words in it, the rest English.

    Args:
        question: in English.
        language: one of :data:`LANGUAGES`.

    >>> translated("Who was the father of Ada?", "es")
    'Responde en inglés, por favor: ¿quién fue el padre de Ada?'
    >>> translated("When did it open?", "de")
    'Bitte auf Englisch antworten: wann tat it open?'
    """
    frame, words = LANGUAGES[language]
    known = {word.rstrip("_"): other for word, other in words.items()}
    bare = _lower(question.strip().rstrip("?.! "))
    changed = _WORDS.sub(lambda match: known.get(match[0], match[0]), bare)
    return frame.replace("{question}", " ".join(changed.split()))


def _lower(text: str) -> str:
    """The first letter small, unless its word is I or an abbreviation, or a name (no question word)."""
    first = text.split(maxsplit=1)[0] if text.split() else ""
    return text[:1].lower() + text[1:] if first.lower() in _STOP else text
