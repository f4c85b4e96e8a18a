"""The simulated model: what it repeats, how long it takes, and that both depend on the messages alone."""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast.errors import LLMRejected
from whisper_fast.llm import Constant, Empirical, LogNormal, SimulatedLLM
from whisper_fast.llm.simulated import heard

MEMORIES = ["likes green tea", "has a cat called Ada"]
MESSAGES = [
    {
        "role": "system",
        "content": "You are kind.\n\nWhat you know:\n- likes green tea\n- has a cat called Ada\nBe brief.",
    },
    {"role": "user", "content": "earlier words"},
    {"role": "assistant", "content": "- not a memory"},
    {"role": "user", "content": "where is my umbrella?"},
]


async def test_the_reply_quotes_the_last_words_and_each_memory():
    reply = await SimulatedLLM(latency=0).chat(MESSAGES)
    for quote in [*MEMORIES, "where is my umbrella?"]:
        assert f'"{quote}"' in reply.text
    assert "earlier words" not in reply.text
    assert "not a memory" not in reply.text
    assert reply.finish_reason == "stop"


async def test_content_may_be_a_list_of_parts_or_missing():
    parts = [{"type": "text", "text": "- one memory"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": None}]
    assert '"one memory"' in (await SimulatedLLM(latency=0).chat(messages)).text


async def test_tokens_fill_the_reply_and_never_cut_a_quote():
    llm = SimulatedLLM(latency=0, tokens=200)
    reply = await llm.chat(MESSAGES)
    assert len(reply.text) == 800
    assert reply.usage.completion_tokens == 200
    assert reply.usage.prompt_tokens == -(-sum(len(m["content"]) for m in MESSAGES) // 4)
    short = await SimulatedLLM(latency=0, tokens=3).chat(MESSAGES)
    assert all(quote in short.text for quote in MEMORIES)


async def test_max_tokens_cuts_and_says_so():
    reply = await SimulatedLLM(latency=0, tokens=200).chat(MESSAGES, max_tokens=7, temperature=0.5)
    assert (len(reply.text), reply.finish_reason, reply.usage.completion_tokens) == (28, "length", 7)
    assert (await SimulatedLLM(latency=0, tokens=200).chat(MESSAGES, max_tokens=201)).finish_reason == "stop"


@pytest.mark.parametrize("limit", [0, -1, "many", 1.5])
async def test_an_absurd_max_tokens_is_rejected(limit):
    with pytest.raises(LLMRejected, match="max_tokens"):
        await SimulatedLLM(latency=0).chat(MESSAGES, max_tokens=limit)


async def test_the_latency_is_kept_whole_and_streaming():
    clock = asyncio.get_running_loop().time
    llm = SimulatedLLM(latency=0.1, tokens=100)
    begin = clock()
    await llm.chat(MESSAGES)
    assert 0.09 <= clock() - begin < 1
    begin, times, texts = clock(), [], []
    async for piece in llm.stream(MESSAGES):
        times.append(clock() - begin)
        texts.append(piece)
    assert 0.02 <= times[0] < times[-1]
    assert 0.09 <= times[-1] < 1
    assert len(texts) <= 21
    assert "".join(texts) == (await llm.chat(MESSAGES)).text
    assert piece.finish_reason == "stop"
    assert piece.usage == (await llm.chat(MESSAGES)).usage


async def drawn(seed, words):
    llm = SimulatedLLM(latency=LogNormal(0.0005, 1.0), tokens=LogNormal(200, 0.7), seed=seed)
    return (await llm.chat([{"role": "user", "content": words}])).text


async def test_what_is_drawn_depends_on_seed_and_messages_alone():
    llm = SimulatedLLM(latency=0, tokens=LogNormal(100, 0.7), seed=3)
    asked = [[{"role": "user", "content": f"words {n}"}] for n in range(50)]
    forward = [await llm.chat(messages) for messages in asked]
    together = await asyncio.gather(*(llm.chat(messages) for messages in reversed(asked)))
    assert forward == together[::-1]
    assert len({len(reply.text) for reply in forward}) > 25
    assert await drawn(1, "hello") != await drawn(2, "hello")


def test_another_process_draws_the_same():
    script = (
        "import asyncio; from whisper_fast.llm import *;"
        "m=[{'role':'user','content':'hello \\u4f60'}];"
        "print(len(asyncio.run(SimulatedLLM(0,LogNormal(100,.7),5).chat(m)).text))"
    )
    runs = {subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout for _ in range(2)}
    assert len(runs) == 1
    assert int(runs.pop()) > 4


def test_distributions_draw_what_they_say():
    rng = random.Random(1)
    draws = [LogNormal(0.3, 0.5)(rng) for _ in range(4000)]
    assert statistics.median(draws) == pytest.approx(0.3, rel=0.1)
    assert {Empirical([1, 2, 3])(rng) for _ in range(100)} == {1, 2, 3}
    assert Constant(4)(rng) == 4
    with pytest.raises(ValueError, match="empty"):
        Empirical([])
    assert "values" not in repr(Empirical([1.0] * 10_000))


async def test_a_callable_of_the_callers_own_is_a_distribution():
    reply = await SimulatedLLM(latency=lambda rng: 0.0, tokens=lambda rng: 50 + rng.random()).chat(MESSAGES)
    assert len(reply.text) in (200, 204)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\n\r"), min_size=1).filter(lambda t: t == t.rstrip())))
def test_every_list_line_of_a_system_message_is_heard(lines):
    text = "Persona.\n" + "\n".join(f"- {line}" for line in lines) + "\nEnd."
    assert heard([{"role": "system", "content": text}])[1] == lines


async def test_it_says_that_it_is_a_simulation():
    assert "simulation" in SimulatedLLM.__doc__
    assert "simulated" in (await SimulatedLLM(latency=0, tokens=100).chat(MESSAGES)).text
