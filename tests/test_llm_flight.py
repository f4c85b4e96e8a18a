"""Equal deterministic requests under way are one call, and equal beginnings go to the same endpoint."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from steered import HELLO, Gate, Scripted, idle, started, turns, words

from whisper_fast.errors import Closed, LLMRejected, LLMTimeout, SettingsError
from whisper_fast.llm import LLMPool, SimulatedLLM
from whisper_fast.llm.prefix import prefix, ranked

COLD = {"temperature": 0}


async def settled(gate, calls):
    while gate.waiting:
        gate.pass_one()
        await turns()
    return await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("params", [COLD, {"temperature": 0.0}, {"seed": 7, "temperature": 1}])
async def test_equal_requests_of_one_user_are_one_call(params):
    gate = Gate()
    async with LLMPool([gate]) as pool:
        calls = [await started(pool.chat(words("same"), user="u", **params)) for _ in range(100)]
        assert len(gate.order) == 1
        results = await settled(gate, calls)
        assert {result.text for result in results} == {"ok"}
        assert (pool.stats()["coalesced"], pool.stats()["calls"], idle(pool)) == (99, 1, True)
        call = await started(pool.chat(words("same"), user="u", **params))
        assert len(gate.order) == 2, "what has landed is no cache"
        await settled(gate, [call])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"user": "u"}, {"user": "v"}),
        ({"user": None}, {"user": None}),
        ({"user": "u"}, {"user": "u", "shared": True}),
        ({"user": "u", "max_tokens": 5}, {"user": "u", "max_tokens": 6}),
        ({"user": "u", "timeout": 5}, {"user": "u", "timeout": 6}),
        ({"user": "u", "priority": 1}, {"user": "u"}),
        ({"user": "u", "temperature": 0.7}, {"user": "u", "temperature": 0.7}),
    ],
)
async def test_what_is_not_equal_is_not_joined(a, b):
    gate = Gate()
    async with LLMPool([gate]) as pool:
        calls = [await started(pool.chat(words("same"), **{**COLD, **options})) for options in (a, b)]
        assert len(gate.order) == 2
        await settled(gate, calls)


async def test_shared_requests_of_several_users_are_one_call():
    gate = Gate()
    async with LLMPool([gate]) as pool:
        calls = [await started(pool.chat(words("same"), user=f"u{n}", shared=True, **COLD)) for n in range(5)]
        assert len(gate.order) == 1
        await settled(gate, calls)


async def test_a_cancelled_first_waiter_takes_nobody_along_and_the_last_one_ends_the_call():
    gate = Gate()
    async with LLMPool([gate]) as pool:
        calls = [await started(pool.chat(words("same"), user="u", **COLD)) for _ in range(3)]
        calls[0].cancel()
        await asyncio.wait(calls[:1])
        assert (gate.cancelled, pool.stats()["in_flight"]) == (0, 1)
        results = await settled(gate, calls[1:])
        assert [result.text for result in results] == ["ok", "ok"]
        calls = [await started(pool.chat(words("same"), user="u", **COLD)) for _ in range(3)]
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await asyncio.sleep(0)
        assert (gate.cancelled, idle(pool)) == (1, True)
        gate.waiting.clear()


async def test_who_comes_after_the_last_has_left_begins_anew():
    gate = Gate()
    async with LLMPool([gate]) as pool:
        call = await started(pool.chat(words("same"), user="u", **COLD))
        call.cancel()
        again = await started(pool.chat(words("same"), user="u", **COLD))
        gate.waiting = gate.waiting[1:]
        assert len(gate.order) == 2
        assert [result.text for result in await settled(gate, [again])] == ["ok"]


async def test_each_waiter_gets_its_own_error():
    llm = Scripted(LLMRejected("no", status=400))
    async with LLMPool([llm]) as pool:
        calls = [pool.chat(HELLO, user="u", **COLD) for _ in range(3)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [(type(result), result.status) for result in results] == [(LLMRejected, 400)] * 3
        assert len({id(result) for result in results}) == 3
        assert llm.asked == 1
    async with LLMPool([SimulatedLLM(5)], timeout=0.05) as pool:
        with pytest.raises(LLMTimeout):
            await pool.chat(HELLO, user="u", **COLD)


async def test_switched_off_every_request_is_a_call():
    gate = Gate()
    async with LLMPool([gate], coalescing=lambda: False) as pool:
        calls = [await started(pool.chat(words("same"), user="u", **COLD)) for _ in range(3)]
        assert len(gate.order) == 3
        await settled(gate, calls)


async def test_close_ends_those_who_joined():
    gate = Gate()
    pool = LLMPool([gate])
    calls = [await started(pool.chat(words("same"), user="u", **COLD)) for _ in range(3)]
    await pool.close()
    assert {type(result) for result in await asyncio.gather(*calls, return_exceptions=True)} == {Closed}


# ---- endpoints

PERSONA = {"role": "system", "content": "You are kind. " * 200}


def conversation(persona, text):
    return [{"role": "system", "content": f"{persona} " + "You are kind. " * 200}, {"role": "user", "content": text}]


async def test_equal_beginnings_go_to_the_same_endpoint_and_different_ones_are_spread():
    endpoints = [Scripted(name=f"e{n}") for n in range(4)]
    async with LLMPool(endpoints, order="prefix") as pool:
        places = {}
        for persona in range(200):
            models = {(await pool.chat(conversation(persona, f"text {n}"))).model for n in range(3)}
            assert len(models) == 1
            places[persona] = models.pop()
    assert min(Counter(places.values()).values()) > 25


async def test_one_popular_beginning_does_not_overload_its_endpoint():
    gates = [Gate() for _ in range(4)]
    for number, gate in enumerate(gates):
        gate.name = f"e{number}"
    async with LLMPool(gates, order="prefix") as pool:
        calls = [await started(pool.chat(conversation("same", f"text {n}"))) for n in range(80)]
        loads = [len(gate.order) for gate in gates]
        assert max(loads) <= 1.25 * 80 / 4 + 1
        for gate in gates:
            await settled(gate, [])
        await asyncio.gather(*calls)


async def test_the_fastest_endpoint_is_asked_first():
    slow, quick = SimulatedLLM(0.02, name="slow"), SimulatedLLM(0.001, name="quick")
    async with LLMPool([slow, quick], order="fastest") as pool:
        models = [(await pool.chat(HELLO)).model for _ in range(30)]
    assert models.count("quick") >= 28


def test_rendezvous_moves_only_what_it_must():
    rng = random.Random(3)
    keys = [rng.randbytes(16) for _ in range(1000)]
    four, five = [f"e{n}" for n in range(4)], [f"e{n}" for n in range(5)]
    moved = [key for key in keys if ranked(key, four)[0] != ranked(key, five)[0]]
    assert all(ranked(key, five)[0] == 4 for key in moved)
    assert 120 < len(moved) < 280


def test_a_short_or_odd_beginning_has_no_place():
    assert prefix(HELLO) is None
    assert prefix([{"role": "user", "content": [{"type": "image"}]}, {"role": "user"}]) is None
    assert prefix([PERSONA]) == prefix([PERSONA, {"role": "user", "content": "x"}]) is not None
    assert prefix([{"role": "system", "content": "\ud800" * 2000}]) is not None


async def test_an_order_that_does_not_exist_is_refused():
    with pytest.raises(SettingsError, match="listed, fastest, prefix"):
        LLMPool([SimulatedLLM()], order="random")
