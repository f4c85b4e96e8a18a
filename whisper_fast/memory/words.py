"""Vectors of whole words, by which kindred words of a question and a memory are found."""

from __future__ import annotations

import re
from functools import cache
from typing import Final

import numpy as np

from .._recall import Words
from ..models.table import TokenTable

__all__ = ["NO_WORD", "number_of", "words"]

NO_WORD: Final = 65_535
WHOLE: Final = re.compile(r"[a-z]{2,}")


def number_of(word: str) -> int:
    """Return the row of a word in lower case among `words()`, NO_WORD if it has none."""
    return _loaded()[1].get(word.removesuffix("'s"), NO_WORD)


def words() -> Words:
    """Return the vectors of all whole words of the token table, centred over them."""
    return _loaded()[0]


@cache
def _loaded() -> tuple[Words, dict[str, int]]:
    table = TokenTable.shipped()
    kept = [i for i, piece in enumerate(table.vocabulary) if table.weight[i] > 0 and WHOLE.fullmatch(piece)]
    vectors = table.row[kept].astype(np.float32) * table.scale[kept, None]
    vectors -= vectors.mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scale = np.abs(vectors).max(axis=1) / 127
    rows = np.rint(vectors / scale[:, None]).astype(np.int8)
    return Words(rows, scale), {table.vocabulary[piece]: number for number, piece in enumerate(kept)}
