"""What a question names: months, days, people; and what ends in asking."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_fast.memory.question import Asked, ends_asking

SPEAKERS = {"Caroline": 1, "Melanie Smith": 2, "May": 3}


def months(*numbers):
    return sum(1 << number for number in numbers)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("What did she do in January?", [1]),
        ("in jan or FEB", [1, 2]),
        ("between March and May", [3, 5]),
        ("they march, and it may rain", []),
        ("MAY, MARCH, Mar", [3, 5]),
        ("Sept, sep, September", [9]),
        ("June July august oct november Dec april", [4, 6, 7, 8, 10, 11, 12]),
        ("the marching band, mayor, junebug, decide, augment", []),
        ("", []),
    ],
)
def test_months(text, named):
    assert Asked.of(text, {}).months == months(*named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("on 3 June", [3]),
        ("June 21st and 22nd, the 3rd or 30th", [3, 21, 22, 30]),
        ("in June 2023", []),
        ("31 June 32 June 0 June", [0, 31]),
        ("on the 3rd", []),
    ],
)
def test_days_count_beside_a_month(text, named):
    assert Asked.of(text, {}).days == months(*named)


@pytest.mark.parametrize(
    ("text", "who"),
    [
        ("What did Caroline buy?", 1),
        ("what is caroline's dog called", 1),
        ("Caro likes what?", 1),
        ("What does Mel paint?", 2),
        ("Where does Smith live?", 2),
        ("Did Caroline and Melanie meet?", -1),
        ("What did Carl buy?", -1),
        ("What did she buy?", -1),
        ("", -1),
    ],
)
def test_the_one_person_whom_it_names(text, who):
    assert Asked.of(text, SPEAKERS).speaker == who


def test_names_are_no_terms_and_other_words_are():
    asked = Asked.of("Did Caroline's sister Mel see Smith's dogs?", SPEAKERS)
    assert asked.terms == ["sister", "see", "dog"]
    assert len(asked.numbers) == len(asked.terms)
    assert Asked.of("Did Caroline see dogs?", {}).terms == ["carolin", "see", "dog"]


@pytest.mark.parametrize("name", ["", "  ", "🎉", "李雷", "Zoë", "Анна", "a(b", "x" * 1000])
def test_any_name(name):
    asked = Asked.of(f"What did {name} say about bread?", {name: 1, "user": 2})
    assert "bread" in asked.terms
    assert asked.speaker in (1, -1)


def test_names_of_other_scripts():
    assert Asked.of("Что сказала Анна?", {"Анна": 1, "Пётр": 2}).speaker == 1
    assert Asked.of("Was hat Jürgen gekauft?", {"Jürgen": 4}).speaker == 4


@pytest.mark.parametrize(
    "text", ["why?", "why? ", "何\uff1f", "\u0644\u0645\u0627\u0630\u0627\u061f", "\u03b3\u037e"]
)
def test_it_asks(text):
    assert ends_asking(text)


@pytest.mark.parametrize("text", ["", "?!", "why? because", "¿qué", "."])
def test_it_does_not_ask(text):
    assert not ends_asking(text)


@given(st.text(), st.dictionaries(st.text(max_size=8), st.integers(1, 99), max_size=3))
def test_any_question_to_anybody(text, speakers):
    asked = Asked.of(text, speakers)
    assert asked.speaker == -1 or asked.speaker in speakers.values()
    assert asked.months & ~months(*range(1, 13)) == 0
    assert asked.days >> 32 == 0
    assert len(asked.terms) == len(asked.numbers)
