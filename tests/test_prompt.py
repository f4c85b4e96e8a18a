"""The prompt holds what was found, in order, and fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_fast.errors import InvalidMessage
from whisper_fast.message import Message, Recalled, Turn
from whisper_fast.prompt import History, compose, tokens


def turn(values=None, **fields):
    made = Turn(Message(**{"user": "u", "text": "and now?", **fields}))
    made.values.update(values or {})
    return made


def memory(number, text):
    return Recalled(number, text, 1.0, 0.0, "dm")


def chat(*texts):
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(texts)]


def test_everything_in_its_order():
    found = compose(
        turn(
            {
                "persona": "You are Ada.",
                "emotion": {"valence": 0.9},
                "recall": (memory(1, "likes tea"), memory(2, "has\na dog")),
                "weather": {"sky": "grey"},
                "nothing": None,
                "conversation": chat("hi", "hello"),
                "embedding": object(),
            },
            system=({"role": "system", "content": "Speak French."},),
            continuation=({"role": "tool", "tool_call_id": "1", "content": "42"},),
        ),
        8192,
    )
    system, *rest = found
    assert system["role"] == "system"
    parts = [
        "You are Ada.",
        "Speak French.",
        "strongly positive",
        'weather: {"sky":"grey"}',
        "- (1970-01-01) likes tea",
    ]
    places = [system["content"].index(part) for part in (*parts, "- (1970-01-01) has a dog")]
    assert places == sorted(places)
    assert "nothing" not in system["content"]
    assert rest == [*chat("hi", "hello", "and now?"), {"role": "tool", "tool_call_id": "1", "content": "42"}]


def test_nothing_known_is_only_the_users_words():
    assert compose(turn(), 8192) == [{"role": "user", "content": "and now?"}]


def test_images_stay_with_their_text():
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    assert compose(turn(parts=(image,)), 8192)[-1]["content"] == [{"type": "text", "text": "and now?"}, image]


def test_the_oldest_conversation_and_the_weakest_memories_go_first():
    memories = tuple(memory(n, f"memory {n} " + "m" * 400) for n in range(50))
    found = compose(turn({"recall": memories, "conversation": chat(*(f"{n} " + "c" * 400 for n in range(50)))}), 4096)
    assert "memory 0 " in found[0]["content"]
    assert "memory 49 " not in found[0]["content"]
    assert found[-2]["content"].startswith("49 ")
    assert not any(message["content"].startswith("0 ") for message in found)


def test_a_message_over_the_window_is_refused():
    with pytest.raises(InvalidMessage, match="CONTEXT_TOKENS"):
        compose(turn(text="word " * 1000), 1200)


def test_the_history_never_begins_with_a_tools_result():
    call = {"role": "assistant", "content": "x" * 4000, "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    found = compose(turn({"conversation": [call, result, *chat("then")]}), 1500)
    assert [message["role"] for message in found] == ["user", "user"]


@given(
    st.lists(st.text(max_size=300), max_size=30),
    st.lists(st.text(max_size=300), max_size=30),
    st.integers(1200, 4000),
)
def test_it_always_fits(remembered, said, window):
    values = {"recall": tuple(memory(n, t) for n, t in enumerate(remembered)), "conversation": chat(*said)}
    found = compose(turn(values), window)
    assert sum(map(tokens, found)) <= window - 1024 + 40  # the memories' heading and line breaks


@given(st.lists(st.text(max_size=30), max_size=20), st.integers(0, 300), st.booleans())
def test_known_tokens_cut_the_conversation_where_estimates_do(texts, window, added):
    history = History(chat(*texts), [tokens(message) for message in chat(*texts)])
    if added:
        history.append({"role": "user", "content": "from a component"})
    window += 1100
    assert compose(turn({"conversation": history}), window) == compose(turn({"conversation": [*history]}), window)
