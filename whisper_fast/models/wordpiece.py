"""BERT's uncased WordPiece: text to vocabulary ids, in plain Python with a bounded memory of words seen.

The rules are those of `BertNormalizer`, `BertPreTokenizer` and `WordPiece` of the tokenizers library (checked against
its output), with one difference on purpose: "[CLS]" and its like in a user's text are text, not control tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

__all__ = ["WordPiece"]

MAX_WORD = 100  # characters; a longer word is one unknown token, as BERT has it
REMEMBERED = 1 << 15  # chunks
REMEMBERED_LENGTH = 40  # characters; longer chunks are addresses and noise, seen once

# Unicode's White_Space without the control characters, which BERT removes before it looks for spaces.
CHUNK = re.compile("[^ \t\n\r\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
ASCII_WORD = re.compile(r"[a-z0-9]+|[!-/:-@\[-`{-~]")
ASCII_CONTROL = dict.fromkeys((*range(32), 127))
REMOVED = frozenset({"Cc", "Cf", "Co", "Cs"})
IDEOGRAPHS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


def stands_alone(character: str) -> bool:
    """Tell whether a character is a word of its own: punctuation, an ASCII symbol, or an ideograph."""
    code = ord(character)
    if code < 128:
        return not character.isalnum()
    if code >= 0x3400 and any(first <= code <= last for first, last in IDEOGRAPHS):
        return True
    return unicodedata.category(character)[0] == "P"


def normalise(chunk: str) -> str:
    """Remove control characters and accents, and lower the case letter by letter (no final sigma)."""
    if chunk.isascii():
        return chunk.lower().translate(ASCII_CONTROL)
    kept = (c for c in chunk if c != "\ufffd" and unicodedata.category(c) not in REMOVED)
    decomposed = unicodedata.normalize("NFD", "".join(kept))
    return "".join(c.lower() for c in decomposed if unicodedata.category(c) != "Mn")


def words(chunk: str) -> Iterator[str]:
    """Cut a chunk that holds no space into normalised words."""
    chunk = normalise(chunk)
    if chunk.isascii():
        yield from ASCII_WORD.findall(chunk)
        return
    start = 0
    for at, character in enumerate(chunk):
        if stands_alone(character):
            if start < at:
                yield chunk[start:at]
            yield character
            start = at + 1
    if start < len(chunk):
        yield chunk[start:]


class WordPiece:
    """Tokeniser over a vocabulary in which a piece that continues a word starts with "##".

    `vocabulary[i]` is the text of id `i`; `unknown` is the id of a word that cannot be put together from pieces.
    Calls may come from several threads. What it remembers is bounded: 32,768 chunks of at most 40 characters.
    """

    def __init__(self, vocabulary: Sequence[str], unknown: int) -> None:
        self._unknown = (unknown,)
        self._first = dict(zip(vocabulary, range(len(vocabulary)), strict=True))
        self._next = {piece[2:]: i for piece, i in self._first.items() if piece.startswith("##")}
        self._longest = max(map(len, vocabulary))
        self._seen: dict[str, tuple[int, ...]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text's pieces, without [CLS] and [SEP]."""
        seen = self._seen
        found: list[int] = []
        for chunk in CHUNK.findall(text):
            pieces = seen.get(chunk)
            found += self._chunk(chunk) if pieces is None else pieces
        return found

    def _chunk(self, chunk: str) -> tuple[int, ...]:
        pieces = tuple(i for word in words(chunk) for i in self._word(word))
        if len(chunk) <= REMEMBERED_LENGTH:
            if len(self._seen) >= REMEMBERED:
                self._seen.clear()
            self._seen[chunk] = pieces
        return pieces

    def _word(self, word: str) -> Sequence[int]:
        """Cut a word into the longest pieces from the left."""
        whole = self._first.get(word)
        if whole is not None:
            return (whole,)
        if len(word) > MAX_WORD:
            return self._unknown
        found: list[int] = []
        pieces, start = self._first, 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                piece = pieces.get(word[start:end])
                if piece is not None:
                    break
            else:
                return self._unknown
            found.append(piece)
            pieces, start = self._next, end
        return found
