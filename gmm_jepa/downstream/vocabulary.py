"""Texts to tokens and back: characters for transcripts, characters and slot tags for slots.

Token 0 is CTC's blank in both vocabularies, and the names of the special tokens are SUPERB's.
"""

from __future__ import annotations

import re
import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

LETTERS = string.ascii_uppercase + "'"
_TAG = re.compile(r"([BE])-(\S*\w)[^\w\s]*")  # punctuation may cling to it
_APOSTROPHES = "’‘ʼ`´"


def normalise(text: str) -> str:
    """Upper-case words of A to Z and apostrophes, one space between them.

    Punctuation is dropped, dashes part words, ``&`` is AND, accents stay an error.

    Raises:
        ValueError: a letter or digit is outside the vocabulary; the message names it.
    """
    kept = []
    for character in text:
        upper = "'" if character in _APOSTROPHES else character.upper()
        if all(letter in LETTERS for letter in upper):
            kept.append(upper)
        elif character == "&":
            kept.append(" AND ")
        elif character.isspace() or unicodedata.category(character) in ("Pd", "Pc"):
            kept.append(" ")
        elif unicodedata.category(character)[0] not in "PS":
            raise ValueError(
                f"character {character!r} is not in the vocabulary (A-Z and apostrophe); "
                "spell it out"
            )
    return " ".join("".join(kept).split())


def normalise_slots(text: str) -> str:
    """As `normalise`, with tags ``B-type`` and ``E-type`` kept as they are.

    Raises:
        ValueError: a character is outside the vocabulary, or a slot is never opened, never
            closed, opened twice or empty.
    """
    parts: list[str] = []
    opened: dict[str, int] = {}
    for word in text.split():
        tag = _TAG.fullmatch(word)
        if tag is None:
            parts += normalise(word).split()
            continue
        side, kind = tag.groups()
        if side == "B":
            if kind in opened:
                raise ValueError(f"slot {kind!r} is opened again before it is closed")
            opened[kind] = len(parts)
        else:
            if kind not in opened:
                raise ValueError(
                    f"slot {kind!r} is closed, but was not opened ({word!r} reads as a slot tag)"
                )
            if all(_TAG.fullmatch(part) for part in parts[opened.pop(kind) :]):
                raise ValueError(f"slot {kind!r} is empty")
        parts.append(f"{side}-{kind}")
    if opened:
        kind = next(iter(opened))
        raise ValueError(f"slot {kind!r} is never closed ('B-{kind}' reads as a slot tag)")
    return " ".join(parts)


def slot_types(texts: Iterable[str]) -> tuple[str, ...]:
    """All slot types of tagged texts, sorted."""
    return tuple(sorted({tag for text in texts for tag in re.findall(r"(?:^|\s)B-(\S+)", text)}))


class Vocabulary(ABC):
    """Tokens of a CTC head; a token's number is its place."""

    tokens: tuple[str, ...]
    blank = 0

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tuple(tokens)
        self._number = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Tokens of a normalised text, the end token last."""

    @abstractmethod
    def decode(self, numbers: Iterable[int]) -> str:
        """The text of tokens without blanks and repeats."""


class CharacterVocabulary(Vocabulary):
    """Transcripts: 32 tokens, ``|`` after every word."""

    def __init__(self) -> None:
        super().__init__(("<s>", "<pad>", "</s>", "<unk>", "|", *LETTERS))

    def encode(self, text: str) -> list[int]:
        """Characters, ``|`` between words and at the end, then the end token."""
        words = text.split()
        spelled = "".join(f"{word}|" for word in words)
        return [*(self._number[c] for c in spelled), self._number["</s>"]]

    def decode(self, numbers: Iterable[int]) -> str:
        """Special tokens are dropped wherever they stand."""
        spelled = "".join(self.tokens[n] for n in numbers if n >= 4)
        return " ".join(spelled.replace("|", " ").split())


class SlotVocabulary(Vocabulary):
    """Transcripts with slots: one token opens a slot, one closes it, and none parts them."""

    def __init__(self, kinds: Sequence[str]) -> None:
        tags = [f"{side}-{kind}" for kind in kinds for side in "BE"]
        super().__init__(("<pad>", "<eos>", "<unk>", " ", *LETTERS, *tags))

    def encode(self, text: str) -> list[int]:
        """A slot's opening stands right before its first character, its closing after the last."""
        numbers: list[int] = []
        space_before = False
        for word in text.split():
            tag = _TAG.fullmatch(word)
            if space_before and not (tag and tag[1] == "E"):
                numbers.append(self._number[" "])
            if tag:
                numbers.append(self._number[word])
            else:
                numbers += [self._number[c] for c in word]
            space_before = not (tag and tag[1] == "B")
        return [*numbers, self._number["<eos>"]]

    def decode(self, numbers: Iterable[int]) -> str:
        """Up to the first end token."""
        parts: list[str] = []
        for n in numbers:
            if n == 1:
                break
            token = self.tokens[n]
            if n in (0, 2):
                continue
            if _TAG.fullmatch(token):
                token = f" {token} "
            parts.append(token)
        return " ".join("".join(parts).split())
