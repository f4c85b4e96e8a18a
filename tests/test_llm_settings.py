"""The pool as the engine builds it: from the settings, with flags that are flipped while it runs."""

from __future__ import annotations

import asyncio

import pytest
from scripted import said
from steered import HELLO, Scripted, started

from whisper_fast import Engine, Settings
from whisper_fast.errors import InvalidMessage, LLMTimeout, SettingsError
from whisper_fast.lab.faulty import FaultyLLM
from whisper_fast.llm import Completion, Endpoint, LLMPool, SimulatedLLM
from whisper_fast.llm.wire import completion
from whisper_fast.message import Delta, Usage


async def test_a_fallback_server_answers_when_the_first_one_is_down(tmp_path):
    async with FaultyLLM(SimulatedLLM(0.001, name="spare")) as spare:
        settings = Settings(
            data_dir=tmp_path,
            llm_chat_api_url="http://127.0.0.1:9",
            llm_chat_model="m",
            llm_fallback_urls=spare.url,
            llm_concurrency=3,
            max_concurrent_requests=7,
        )
        async with Engine.open(settings) as engine:
            assert "hello" in (await engine.respond(said("u", "hello"))).text
            first, second = engine.stats()["llm"]["endpoints"]
            assert (first["limit"], second["limit"]) == (3, 7)
            assert first["errors"]["LLMUnavailable"] >= 1
            assert second["calls"] == 1


async def test_flags_reach_the_pool_while_it_runs(tmp_path):
    async with Engine.open(Settings(data_dir=tmp_path), llm=SimulatedLLM(0)) as engine:
        pool = engine.llm
        for on in (False, True, False):
            engine.flags.adaptive = engine.flags.hedging = engine.flags.batching = on
            assert (pool._hedging(), pool._coalescing()) == (on, on)
            assert (await engine.respond(said("u", f"hello {on}"))).text
            assert pool._upstreams[0].limit.adaptive is on


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WHISPER_FAST_LLM_CONCURRENCY", "0"),
        ("WHISPER_FAST_LLM_ORDER", "random"),
        ("WHISPER_FAST_LLM_QUEUE_TIMEOUT", "-1"),
        ("WHISPER_FAST_FEATURE_HEDGING", "perhaps"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_its_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        Settings()


async def test_a_wrong_fallback_is_named_without_its_secret(tmp_path):
    settings = Settings(data_dir=tmp_path, llm_fallback_urls="http://me:hunter2@models.lan/v1")
    with pytest.raises(SettingsError, match="WHISPER_FAST_LLM_FALLBACK_URLS") as caught:
        async with Engine.open(settings, llm=SimulatedLLM(0)):
            pass
    assert "hunter2" not in str(caught.value)


async def test_what_a_cancelled_stream_has_used_is_counted():
    async with FaultyLLM(SimulatedLLM(2, tokens=400)) as stub, LLMPool([Endpoint(stub.url, "m")]) as pool:
        pieces = pool.stream(HELLO)
        for _ in range(3):
            await anext(pieces)
        await pieces.aclose()
        used = pool.stats()["tokens"]
        assert used["prompt_tokens"] > 0
        assert 0 < used["completion_tokens"] < 400
        call = await started(pool.chat(HELLO))
        await asyncio.sleep(0.1)
        call.cancel()
        await asyncio.wait([call])
        assert pool.stats()["tokens"]["prompt_tokens"] > used["prompt_tokens"]
        with pytest.raises(LLMTimeout):
            await pool.chat(HELLO, timeout=0.1)
        assert pool.stats()["in_flight"] == 0


@pytest.mark.parametrize("wrong", [{"user": 7}, {"user": b"u"}, {"priority": "high"}, {"timeout": -1}])
async def test_who_asks_in_a_wrong_way_is_told(wrong):
    async with LLMPool([Scripted()]) as pool:
        with pytest.raises((InvalidMessage, SettingsError), match=next(iter(wrong))):
            await pool.chat(HELLO, **wrong)
        with pytest.raises((InvalidMessage, SettingsError)):
            await anext(pool.stream(HELLO, **wrong))
        assert pool.stats()["in_flight"] == 0


async def test_a_priority_beyond_all_bounds_is_the_last_or_the_first():
    async with LLMPool([SimulatedLLM(0.001)], max_concurrent=1) as pool:
        answers = await asyncio.gather(*(pool.chat(HELLO, priority=n) for n in (10**30, 0, -(10**30))))
        assert len(answers) == 3


class Miscounting(Scripted):
    """A provider of the caller's own that counts `usage` tokens, whatever it was asked."""

    def __init__(self, usage):
        super().__init__()
        self.usage = usage

    async def chat(self, messages, **params):
        return Completion(text=self.step(), usage=self.usage)

    async def stream(self, messages, **params):
        yield Delta(self.step(), finish_reason="stop", usage=self.usage)


@pytest.mark.parametrize("count", [10**9, 10**12, -5000, 10**400], ids=["large", "huge", "negative", "no float"])
async def test_a_count_of_tokens_that_cannot_be_true_costs_nobody_anything(count):
    async with LLMPool([Miscounting(Usage(count, count))], max_concurrent=2) as pool:
        for _ in range(3):
            answers = await asyncio.gather(*(pool.chat(HELLO, user="u") for _ in range(5)))
            assert [answer.text for answer in answers] == ["ok"] * 5
            assert [str(piece) async for piece in pool.stream(HELLO, user="u")] == ["ok"]
        assert pool.stats()["in_flight"] == 0


@pytest.mark.parametrize(
    "count", [b"1000000000000", b"-7", b"1" + b"0" * 30], ids=["huge", "negative", "beyond 64 bits"]
)
def test_a_servers_count_that_cannot_be_true_is_not_believed(count):
    body = b'{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":%s,"completion_tokens":1}}' % count
    assert completion(body, "here").usage == Usage()
