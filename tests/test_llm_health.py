"""Failing endpoints on a virtual clock: left alone, probed once, stood in for, and never the cause of an outage."""

from __future__ import annotations

import asyncio

import pytest
from steered import HELLO, Gate, Scripted, idle, started, turns, words
from virtual import run

from whisper_fast.errors import LLMProtocolError, LLMRateLimited, LLMRejected, LLMTimeout, LLMUnavailable
from whisper_fast.llm import Completion, Endpoint, LLMPool
from whisper_fast.message import Usage


class Server:
    """Answers in a second, or raises after one, as `error` says; `hangs` answers in an hour."""

    def __init__(self, name="server", error=None):
        self.name, self.error = name, error
        self.asked = self.running = self.most = 0
        self.seconds, self.times = 1.0, []

    async def chat(self, messages, **params):
        self.asked += 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.times.append(asyncio.get_running_loop().time())
        error = self.error
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if error is not None:
            raise error
        return Completion(text="ok", model=self.name, usage=Usage(10, 10))

    async def close(self):
        pass


async def all_of(pool, count, **options):
    return await asyncio.gather(*(pool.chat(HELLO, **options) for _ in range(count)), return_exceptions=True)


def opened(pool, at=0):
    return pool.stats()["endpoints"][at]["breaker"]


def test_a_hiccup_of_a_healthy_server_costs_no_caller_anything():
    """All calls in flight break at once, the server is well again: 200 of 200 callers are answered."""

    async def main(clock):
        server = Server(error=LLMUnavailable("connection reset"))
        async with LLMPool([server], clock=clock, max_concurrent=10) as pool:
            calls = asyncio.ensure_future(all_of(pool, 200))
            await asyncio.sleep(0.5)
            server.error = None
            results = await calls
            assert {type(result).__name__ for result in results} == {"Completion"}
            assert (opened(pool), idle(pool)) == ("closed", True)
            assert pool.stats()["endpoints"][0]["breaker_opened"] == 1

    run(main)


def test_ten_thousand_callers_see_one_probe():
    async def main(clock):
        server = Server(error=LLMUnavailable("down"))
        async with LLMPool([server], clock=clock, queue_timeout=None) as pool:
            early = asyncio.ensure_future(all_of(pool, 5))
            await asyncio.sleep(1.01)
            assert opened(pool) == "open"
            asked = server.asked
            server.error, server.seconds = None, 5.0
            calls = asyncio.ensure_future(all_of(pool, 10_000))
            await asyncio.sleep(3)
            assert (server.asked - asked, opened(pool)) == (1, "half-open")
            results = await calls + await early
            assert {type(result).__name__ for result in results} == {"Completion"}

    run(main)


def test_a_long_outage_is_told_at_once_and_ends_by_itself():
    async def main(clock):
        server = Server(error=LLMUnavailable("down"))
        async with LLMPool([server], clock=clock) as pool:
            while pool.stats()["endpoints"][0]["shut_for"] <= 2:
                await all_of(pool, 5)
            begun, asked = clock(), server.asked
            results = await all_of(pool, 1000)
            assert {type(result) for result in results} == {LLMUnavailable}
            assert all(result.retry_after > 0 for result in results)
            assert (clock() - begun, server.asked - asked) == (0, 0)
            server.error = None
            await asyncio.sleep(35)
            assert {type(result).__name__ for result in await all_of(pool, 100)} == {"Completion"}
            assert (opened(pool), idle(pool)) == ("closed", True)

    run(main)


def test_a_probe_that_is_cancelled_leaves_its_place_to_the_next():
    async def main(clock):
        server = Server(error=LLMUnavailable("down"))
        async with LLMPool([server], clock=clock) as pool:
            early = asyncio.ensure_future(all_of(pool, 5))
            await asyncio.sleep(1.01)
            server.error = None
            asked = server.asked
            waiting = [asyncio.create_task(pool.chat(HELLO, user=f"u{number}")) for number in range(5)]
            await asyncio.sleep(1.5)
            assert server.asked - asked == 1
            waiting[0].cancel()  # the first in the queue was let in as the probe
            results = await asyncio.gather(*waiting, return_exceptions=True) + await early
            assert sum(isinstance(result, Completion) for result in results) == 9
            nobody = [asyncio.create_task(pool.chat(HELLO)) for _ in range(3)]
            for task in nobody:
                task.cancel()
            await asyncio.wait(nobody)
            assert (await pool.chat(HELLO)).text == "ok"
            assert idle(pool)

    run(main)


def test_another_endpoint_stands_in_and_the_first_is_used_again_when_it_is_well():
    async def main(clock):
        first, second = Server("first", LLMUnavailable("down")), Server("second")
        async with LLMPool([first, second], clock=clock) as pool:
            results = await all_of(pool, 200)
            assert {result.model for result in results} == {"second"}
            asked = first.asked
            assert {result.model for result in await all_of(pool, 100)} == {"second"}
            assert first.asked - asked <= 1
            first.error = None
            await asyncio.sleep(35)
            await all_of(pool, 1)
            assert {result.model for result in await all_of(pool, 20)} == {"first"}

    run(main)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (LLMRejected("bad request", status=400), "closed"),
        (LLMRejected("bad key", status=401), "closed"),
        (LLMRateLimited("slow down"), "closed"),
        (LLMUnavailable("down", status=500), "open"),
        (LLMProtocolError("html"), "open"),
    ],
)
def test_what_counts_as_a_failure_of_the_server(error, state):
    async def main(clock):
        async with LLMPool([Server(error=error)], clock=clock) as pool:
            results = await all_of(pool, 40)
            assert all(isinstance(result, type(error)) or state == "open" for result in results)
            assert opened(pool) == state or pool.stats()["endpoints"][0]["breaker_opened"]

    run(main)


def test_a_rejected_key_is_asked_once_and_no_secret_is_in_the_error():
    async def main(clock):
        server = Server(error=LLMRejected("server: it refused the request (401)", status=401))
        async with LLMPool([server, Server("other")], clock=clock) as pool:
            with pytest.raises(LLMRejected):
                await pool.chat(words("my secret words"))
            assert server.asked == 1

    run(main)


def test_callers_who_go_away_or_are_in_a_hurry_say_nothing_about_the_server():
    async def main(clock):
        async with LLMPool([Server()], clock=clock) as pool:
            for _ in range(20):
                task = await started(pool.chat(HELLO))
                task.cancel()
                await asyncio.wait([task])
            results = await all_of(pool, 20, timeout=0.1)
            assert {type(result) for result in results} == {LLMTimeout}
            assert (opened(pool), pool.stats()["limit"]) == ("closed", 50)

    run(main)


def test_a_server_that_hangs_is_left_alone():
    async def main(clock):
        server = Server()
        server.seconds = 3600
        async with LLMPool([server], clock=clock, timeout=10) as pool:
            await all_of(pool, 50)
            assert opened(pool) == "open"
            assert idle(pool)

    run(main)


def test_a_server_that_asks_for_a_pause_gets_it():
    async def main(clock):
        server = Server(error=LLMRateLimited("slow down", retry_after=10))
        async with LLMPool([server], clock=clock, max_concurrent=4) as pool:
            calls = asyncio.ensure_future(all_of(pool, 40))
            await asyncio.sleep(2)
            server.error = None
            begun = clock()
            results = await calls
            assert {type(result).__name__ for result in results} == {"Completion"}
            assert not [at for at in server.times if begun < at < 10.9], "nobody asked before its time"
            assert server.asked == 44
            server.error = LLMRateLimited("slow down", retry_after=50)
            await all_of(pool, 1, timeout=5)
            assert pool.stats()["endpoints"][0]["shut_for"] > 40
            assert pool.stats()["limit"] >= 1

    run(main)


def test_retries_have_a_budget():
    async def main(clock):
        server = Server(error=LLMUnavailable("busy", status=500))
        async with LLMPool([server], clock=clock, max_concurrent=500) as pool:
            results = await all_of(pool, 400)
            assert {type(result) for result in results} == {LLMUnavailable}
            assert server.asked <= 400 + 10
            assert pool.stats()["retries"] == 10
            assert pool.stats()["retries_denied"] > 300

    run(main)


async def test_an_endpoint_of_concurrency_one_gets_one_call_at_a_time():
    gate = Gate()
    endpoint = Endpoint("http://127.0.0.1:9", "m", max_concurrent=1)
    pool = LLMPool([endpoint])
    pool._upstreams[0].provider = gate
    async with pool:
        calls = [await started(pool.chat(words(str(number)), user=f"u{number}")) for number in range(5)]
        for number in range(5):
            assert (len(gate.order), pool.stats()["in_flight"]) == (number + 1, 1)
            gate.pass_one()
            await turns()
        await asyncio.gather(*calls)
        assert pool.stats()["limit"] == 1


def test_an_idle_endpoint_is_never_asked():
    async def main(clock):
        server = Server()
        async with LLMPool([server, Server("other")], clock=clock) as pool:
            await all_of(pool, 3)
            asked = server.asked
            await asyncio.sleep(7 * 24 * 3600)
            assert server.asked == asked
            server.error = LLMUnavailable("down")
            await all_of(pool, 30)
            asked = server.asked
            await asyncio.sleep(7 * 24 * 3600)
            assert server.asked == asked, "what is ill is asked by the next call, not on the side"

    run(main)


async def test_stats_say_what_is_going_on():
    async with LLMPool([Scripted(LLMUnavailable("down")), Scripted(name="b")]) as pool:
        await pool.chat(HELLO, user="u")
        stats = pool.stats()
    assert stats["retries"] == 1
    first = stats["endpoints"][0]
    assert (first["breaker"], first["limit"], first["limit_why"]) == ("closed", 50, "where it starts")
    assert (first["waiting_by_priority"], first["oldest_waiting"], first["shut_for"]) == ({}, 0.0, 0.0)
    assert {"hedges", "hedges_won", "coalesced", "oldest_waiting", "retries_denied"} <= stats.keys()
