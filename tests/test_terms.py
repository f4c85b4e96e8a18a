"""Words to terms, in every script."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_fast.memory.terms import Terms, terms


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The dogs aren't running", ["dog", "run"]),
        ("John's dog\u2019s bowls", ["john", "dog", "bowl"]),
        ("CAFÉ café cafe", ["cafe", "cafe", "cafe"]),
        ("東京に行く", ["東京", "京に", "に行", "行く"]),
        ("猫", ["猫"]),
        ("안녕하세요", ["안녕", "녕하", "하세", "세요"]),
        ("собаки бегут", ["собак", "бегут"]),
        ("किताबें", ["किताबें"]),
        ("🎉 at 10:30", ["🎉", "10", "30"]),
        ("", []),
        ("?!...", []),
    ],
)
def test_terms(text, found):
    assert terms(text) == found


def test_the_dictionary_of_stems_is_bounded_and_gives_the_same_stems():
    few = Terms(kept=10)
    words = [f"running{i % 37}" for i in range(500)] + ["dogs", "the", "w" * 10_000]
    assert [few(word) for word in words] == [terms(word) for word in words]
    assert len(few._stems) + len(few._older) <= 12


@given(st.text())
def test_any_text_has_terms_without_spaces(text):
    assert all(term and not any(c.isspace() for c in term) for term in terms(text))
