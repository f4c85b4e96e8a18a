"""Flags: switched on the running engine, off by themselves where one fails, and never at a message's cost."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from itertools import count
from types import SimpleNamespace

import pytest
from recording import RecordingEngine, error_of, opened
from served import served
from test_ops import running
from typer.testing import CliRunner

from whisper_fast import Message, Settings, clock, flags
from whisper_fast.cli.app import app
from whisper_fast.errors import BatchMismatch, LLMUnavailable, SettingsError
from whisper_fast.flags import DOES, FAILURES, LONGEST, REST, SPAN, Flags, either
from whisper_fast.lab import audit
from whisper_fast.limits import AdaptiveLimit
from whisper_fast.llm import LLMPool, SimulatedLLM
from whisper_fast.llm.flight import Flights
from whisper_fast.llm.hedge import Hedges
from whisper_fast.monitor import budget
from whisper_fast.pipeline import Fan

BOOM = RuntimeError("the optimisation is broken")


def boom(*_, **__):
    raise BOOM


# ---- the rule, in virtual time


class Loop:
    """Timers that go off when the test says so."""

    def __init__(self):
        self.now, self.timers = 1000.0, []

    def call_later(self, seconds, what, *args):
        timer = SimpleNamespace(
            at=self.now + seconds, run=lambda: what(*args), cancel=lambda: self.timers.remove(timer)
        )
        self.timers.append(timer)
        return timer

    def wait(self, seconds):
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.at <= self.now]:
            self.timers.remove(timer)
            timer.run()


@pytest.fixture
def loop(monkeypatch):
    loop = Loop()
    monkeypatch.setattr(flags.asyncio, "get_running_loop", lambda: loop)
    with clock.replaced(monotonic=lambda: loop.now, wall=lambda: loop.now):
        yield loop


@pytest.fixture
def switches():
    return Flags(Settings())


def test_a_flag_that_fails_repeatedly_goes_off_and_is_tried_again(loop, switches):
    for _ in range(FAILURES):
        assert switches.caching
        switches.failed("caching", BOOM)
    assert not switches.caching
    assert switches.failures["caching"] == FAILURES
    assert "RuntimeError" in switches.history[-1].reason
    loop.wait(REST - 0.1)
    assert not switches.caching
    loop.wait(0.1)
    assert switches.caching
    assert [change.on for change in switches.history] == [False, True]


def test_failures_that_are_far_apart_switch_nothing_off(loop, switches):
    for _ in range(10):
        switches.failed("caching", BOOM)
        loop.wait(SPAN / 2 + 1)
    assert switches.caching


def test_on_trial_one_failure_is_enough_and_the_rest_is_longer(loop, switches):
    for _ in range(FAILURES):
        switches.failed("ann", BOOM)
    rest = REST
    for _ in range(10):
        loop.wait(rest)
        assert switches.ann
        switches.failed("ann", BOOM)
        assert not switches.ann
        rest = min(LONGEST, 2 * rest)
    assert rest == LONGEST
    loop.wait(rest)
    loop.wait(LONGEST + 1)  # the trial is over, it is as good as any
    switches.failed("ann", BOOM)
    assert switches.ann


@pytest.mark.parametrize("wanted", [True, False])
def test_whoever_sets_a_flag_decides_over_its_rest(loop, switches, wanted):
    for _ in range(FAILURES):
        switches.failed("ann", BOOM)
    switches.ann = wanted
    assert loop.timers == []
    loop.wait(2 * LONGEST)
    assert switches.ann is wanted


def test_what_fails_while_it_is_off_is_counted_alone(loop, switches):
    switches.switch("ann", False, "not needed")
    for _ in range(10):
        switches.failed("ann", BOOM)
    assert loop.timers == []
    assert switches.failures["ann"] == 10


def test_closing_leaves_no_timer(loop, switches):
    for _ in range(FAILURES):
        switches.failed("ann", BOOM)
    switches.close()
    assert loop.timers == []


def test_every_change_is_logged_and_kept_with_its_reason(switches, caplog):
    switches.switch("hedging", False, "the model is paid by the call")
    switches.switch("hedging", False, "again")
    switches.hedging = True
    assert [(one.flag, one.on) for one in switches.history] == [("hedging", False), ("hedging", True)]
    assert "the model is paid by the call" in caplog.text
    assert switches.changes["hedging"] == 2


def test_a_flag_that_does_not_exist_or_a_value_that_is_none_is_refused(switches):
    with pytest.raises(SettingsError, match="there is no flag 'speed'"):
        switches.switch("speed", True, "why not")
    with pytest.raises(SettingsError, match="True or False"):
        switches.caching = "yes"


async def test_the_plain_way_is_taken_only_where_the_optimisation_is_to_blame():
    told = []

    async def plain():
        return "plain"

    def raising(error):
        async def fast():
            raise error

        return either("caching", fast, plain, lambda name, error: told.append((name, error)))

    assert await raising(BOOM) == "plain"
    assert await raising(mismatch := BatchMismatch("one too few")) == "plain"
    with pytest.raises(LLMUnavailable):
        await raising(LLMUnavailable("nobody there"))
    with pytest.raises(asyncio.CancelledError):
        await raising(asyncio.CancelledError())
    assert told == [("caching", BOOM), ("caching", mismatch)]


async def test_an_error_of_both_ways_is_not_the_optimisations():
    async def bad():
        raise ValueError("the text")

    with pytest.raises(ValueError, match="the text"):
        await either("caching", bad, bad, boom)


# ---- each optimisation, broken in a running engine


class Broken:
    """Whatever is asked of it raises."""

    def __getattr__(self, _):
        return boom

    def __len__(self):
        return 0


class Half:
    """A cache of which one method raises."""

    def __init__(self, cache, broken):
        self._cache = cache
        setattr(self, broken, boom)

    def __getattr__(self, name):
        return getattr(self._cache, name)

    def __contains__(self, key):
        return key in self._cache


def break_caches(method):
    def do(engine, patch):
        for owner in (engine.memory, engine._conversations):
            patch.setattr(owner, "_cache", Half(owner._cache, method))

    return do


BREAK = {
    "parallel": lambda engine, patch: patch.setattr(Fan, "start", boom),
    "parallel later": lambda engine, patch: patch.setattr(Fan, "go_on", boom),
    "batching": lambda engine, patch: patch.setattr(engine._embedding.batcher, "_append", boom),
    "batching of recalls": lambda engine, patch: patch.setattr(engine.memory._recalling._batcher, "_append", boom),
    "caching": break_caches("get_or_load"),
    "caching of what is new": break_caches("get"),
    "preload": lambda engine, patch: patch.setattr(engine._preload, "_habits", Broken()),
    "adaptive": lambda engine, patch: patch.setattr(AdaptiveLimit, "answered", boom),
    "ann": lambda engine, patch: patch.setattr(engine.memory._indexing, "of", lambda *_: Broken()),
}


async def conversation(engine):
    replies = []
    for number in range(FAILURES + 2):
        text = f"My cat number {number} is called Miso{number}. Which cats do I have?"
        reply = await engine.respond(Message(user="u", text=text, id=str(number), channel="c"))
        replies.append((reply.text, reply.partial))
        while engine._lanes.places:  # what is said next sees this turn
            await asyncio.sleep(0.001)
    return replies


@pytest.mark.parametrize("what", BREAK)
async def test_a_broken_optimisation_costs_no_message_and_goes_off(tmp_path, monkeypatch, what):
    name = what.partition(" ")[0]
    async with running(tmp_path / "well", max_concurrent_requests=1) as engine:
        expected = await conversation(engine)
    async with running(tmp_path / "broken", max_concurrent_requests=1) as engine:
        with monkeypatch.context() as patch:
            BREAK[what](engine, patch)
            assert await conversation(engine) == expected
        assert engine.stats()["failed"] == 0
        assert engine.flags.failures[name] >= FAILURES
        assert not getattr(engine.flags, name)
        assert {n for n, c in engine.flags.changes.items() if c} == {name}
        assert await conversation(engine) == expected  # their ids are known: the same answers
    assert audit.lost(tmp_path / "broken", map(str, range(FAILURES + 2))) == 0
    assert audit.duplicated(tmp_path / "broken") == 0


async def test_a_flag_is_tried_again_in_the_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(flags, "REST", 0.01)
    async with running(tmp_path) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Fan, "start", boom)
            for number in range(FAILURES):
                await engine.respond(Message(user="u", text="x", id=str(number)))
            while engine.flags.changes["parallel"] < 2:
                await asyncio.sleep(0.001)
        assert [change.on for change in engine.flags.history] == [False, True]
        await engine.respond(Message(user="u", text="x", id="last"))
        assert engine.flags.parallel


async def test_a_broken_budget_goes_off_and_the_engine_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "PERIOD", 0.001)
    monkeypatch.setattr(budget.Budget, "step", boom)
    async with running(tmp_path) as engine:
        while engine.flags.budget:
            await asyncio.sleep(0.001)
        assert (await engine.respond(Message(user="u", text="x", id="1"))).text


@pytest.mark.parametrize("broken", [(Hedges, "_arm", "hedging"), (Flights, "join", "batching")])
async def test_a_broken_way_in_the_pool_costs_no_call(monkeypatch, broken):
    owner, method, name = broken
    told = []
    async with LLMPool([SimulatedLLM(latency=0.0)], failed=lambda *failure: told.append(failure)) as pool:
        for seconds in range(200):
            pool._upstreams[0].whole.observe(0.1 + seconds / 1000)
        monkeypatch.setattr(owner, method, boom)
        answer = await pool.chat([{"role": "user", "content": "hi"}], user="u", temperature=0)
        assert "hi" in answer.text
    assert told == [(name, BOOM)]


# ---- all of them, under load


@asynccontextmanager
async def toggling(engine):
    """Switch every flag ten times a second, one after the other, until the block ends."""

    async def toggle():
        for tick in count():
            name = list(DOES)[tick % len(DOES)]
            setattr(engine.flags, name, not getattr(engine.flags, name))
            await asyncio.sleep(0.1 / len(DOES))

    task = asyncio.create_task(toggle(), name="toggling")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def chatter(engine, user, turns, replies):
    """Send a user's messages, up to four before the first of them is answered; keep the replies in their order."""
    room = asyncio.Semaphore(4)

    async def one(number):
        text = f"My secret number {number} is token-{user}-{number}. What are my secrets?"
        reply = await engine.respond(Message(user=user, text=text, id=f"{user}-{number}", channel="c"))
        replies[user].append((number, reply))
        room.release()

    async with asyncio.TaskGroup() as group:
        for number in range(turns):
            await room.acquire()
            group.create_task(one(number))
            await asyncio.sleep(0)


async def under_load(folder, *, users, turns, toggled, **settings):
    names = [f"user{n}" for n in range(users)]
    replies = {name: [] for name in names}
    async with running(folder, SimulatedLLM(latency=0.005), **settings) as engine:
        async with asyncio.TaskGroup() as group:
            load = [group.create_task(chatter(engine, name, turns, replies)) for name in names]
            if toggled:
                async with toggling(engine):
                    await asyncio.wait(load)
        changes = sum(engine.flags.changes.values())
        assert engine.flags.failures.total() == 0
        assert engine.stats()["answered"] == users * turns
    check(folder, replies, turns)
    return changes


def check(folder, replies, turns):
    """Nothing lost, doubled, out of order, or told to somebody else."""
    assert audit.lost(folder, [f"{name}-{number}" for name in replies for number in range(turns)]) == 0
    assert audit.duplicated(folder) == 0
    recalled = 0
    for name, answers in replies.items():
        assert [number for number, _ in answers] == list(range(turns))
        for _, reply in answers:
            told = json.dumps([reply.text, [memory.text for memory in reply.memories]])
            assert not any(f"token-{other}-" in told for other in replies if other != name)
            recalled += f"token-{name}-" in told
    assert recalled  # else the question would prove nothing


async def test_with_every_flag_off_nothing_is_lost_doubled_reordered_or_leaked(tmp_path):
    off = {f"feature_{name}": False for name in DOES}
    await under_load(tmp_path, users=10, turns=10, toggled=False, **off)


async def test_with_every_flag_toggled_nothing_is_lost_doubled_reordered_or_leaked(tmp_path):
    changes = await under_load(tmp_path, users=10, turns=80, toggled=True)
    assert changes > 3 * len(DOES)


@pytest.mark.soak
async def test_toggled_for_minutes(tmp_path):
    assert await under_load(tmp_path, users=20, turns=1000, toggled=True) > 500


# ---- through the door


async def test_flags_are_listed_and_switched_through_the_door(tmp_path):
    async with running(tmp_path) as engine, opened(engine, trusted_api_keys="operator") as client:
        key = {"authorization": "Bearer operator"}
        listed = await (await client.fetch("/ops/flags", headers=key)).json()
        assert {flag["name"]: flag["on"] for flag in listed["flags"]} == engine.flags.as_dict()
        asked = {"flags": {"caching": False, "hedging": False}, "reason": "stale\nanswers"}
        told = await (await client.fetch("/ops/flags", json=asked, headers=key)).json()
        assert not engine.flags.caching
        assert not engine.flags.hedging
        assert told["changes"][0]["reason"].startswith("key-")
        assert told["changes"][0]["reason"].endswith(": stale answers")
        text = await (await client.fetch("/metrics", headers=key)).text()
    assert 'whisper_fast_flag_on{flag="caching"} 0.0' in text
    assert 'whisper_fast_flag_changes_total{flag="caching"} 1.0' in text
    assert 'whisper_fast_flag_failures_total{flag="caching"} 0.0' in text


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ({"flags": {"speed": True}, "reason": "x"}, 404, "flag_not_found"),
        ({"flags": {"caching": False, "speed": True}, "reason": "x"}, 404, "flag_not_found"),
        ({"flags": {"caching": "no"}, "reason": "x"}, 400, "invalid_type"),
        ({"flags": {"caching": False}}, 400, "invalid_type"),
        ({"flags": {"caching": False}, "reason": " \n "}, 400, "invalid_value"),
        ([], 400, "invalid_type"),
    ],
)
async def test_a_change_that_cannot_be_changes_nothing(asked, status, code):
    engine = RecordingEngine()
    async with opened(engine) as client:
        assert await error_of(await client.fetch("/ops/flags", json=asked)) == (status, code)
    assert engine.flags.caching


async def test_nobody_else_switches_a_flag():
    engine = RecordingEngine()
    asked = {"flags": {"caching": False}, "reason": "x"}
    async with opened(engine, api_keys="plain") as client:
        assert (await client.fetch("/ops/flags", json=asked)).status == 401
        assert (await client.fetch("/ops/flags", json=asked, headers={"authorization": "Bearer plain"})).status == 403
    async with opened(engine) as client:
        other = {"origin": "http://elsewhere.example"}
        assert (await client.fetch("/ops/flags", json=asked, headers=other)).status == 403
    assert engine.flags.caching


# ---- on the command line


def command(server, *arguments, **environment):
    env = {"WHISPER_FAST_PORT": server.address.rpartition(":")[2], **environment}
    return CliRunner().invoke(app, ["flags", *arguments], env=env)


def test_flags_on_the_command_line(tmp_path):
    keys = {"api_keys": "plain", "trusted_api_keys": "operator", "process_pool_size": 1}
    with served(tmp_path, **keys) as server:
        operator = {"WHISPER_FAST_TRUSTED_API_KEYS": "operator"}
        listed = command(server, **operator).stdout
        assert all(f"{name:9} on: {does}" in listed for name, does in DOES.items())
        told = command(server, "caching=off", "ann=off", "--reason", "stale answers", "--json", **operator)
        off = {flag["name"] for flag in json.loads(told.stdout)["flags"] if not flag["on"]}
        assert off == {"caching", "ann"}
        assert "caching   off: " in command(server, "ann=on", "--reason", "it was not this", **operator).stdout
        for arguments, environment, sentence in [
            (["caching=off"], operator, "--reason is missing"),
            (["caching=maybe", "--reason", "x"], operator, "write it as caching=off or caching=on"),
            (["speed=on", "--reason", "x"], operator, "there is no flag 'speed'"),
            ([], {"WHISPER_FAST_API_KEYS": "plain"}, "WHISPER_FAST_TRUSTED_API_KEYS"),
            ([], {}, "an API key is needed"),
        ]:
            failed = command(server, *arguments, **environment).exception
            assert isinstance(failed, SettingsError)
            assert sentence in str(failed)
    failed = command(server).exception
    assert isinstance(failed, SettingsError)
    assert "no whisper-fast server answers" in str(failed)
