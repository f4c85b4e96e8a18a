"""Preload: who has a habit is loaded for shortly before the return, who has none never is."""

import asyncio
import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preload_irc import demand, diurnal, generated, periodic, poisson, replay
from scripted import quick, said

from whisper_fast import Engine, Settings, clock
from whisper_fast._habit import Habits
from whisper_fast.errors import StoreIOError
from whisper_fast.preload import LEAD, Preload

DAY = 86_400
START = 11_574 * DAY


@pytest.fixture
def now():
    """The wall clock, in a list."""
    moment = [float(START)]
    with clock.replaced(monotonic=time.monotonic, wall=lambda: moment[0]):
        yield moment


class Loads:
    """Notes what it is asked to load and to drop; `error` is raised instead."""

    def __init__(self):
        self.loaded, self.dropped, self.error = [], [], None

    async def load(self, user, seconds):
        if self.error is not None:
            raise self.error
        self.loaded.append((user, seconds))
        return True

    def preload(self, **fields):
        return Preload(self.load, self.dropped.append, **{"gap": 900, "enabled": lambda: True} | fields)


def visit_daily(preload, now, user="ada", days=12):
    for _ in range(days):
        preload.seen(user)
        now[0] += DAY


@pytest.mark.parametrize(("kind", "warm"), [(periodic, 0.97), (diurnal, 0.97), (poisson, 0.0)])
async def test_generated_users(kind, warm):
    figures, counts, _ = await replay(generated(kind, users=60))
    if warm:
        assert figures["known_warm"] >= warm * figures["known"]
        assert counts["right"] >= 0.96 * (counts["right"] + counts["wrong"])
    else:
        assert counts["loads"] <= 0.01 * figures["visits"]


@pytest.mark.parametrize("kind", [periodic, diurnal, poisson])
@pytest.mark.parametrize("room", [2, 6, 30])
async def test_what_is_loaded_before_it_is_asked_for_costs_those_who_ask_nothing(kind, room):
    events = generated(kind, users=60, visits=60)
    plain, loaded = [await demand(events, room, preloading=on) for on in (False, True)]
    assert loaded >= plain - 0.001


async def test_one_load_that_fails_in_an_unforeseen_way_does_not_end_the_others(now, caplog):
    loads = Loads()
    preload = loads.preload()
    visit_daily(preload, now)
    loads.error = RuntimeError("a fault of ours")
    await preload.work()
    assert "RuntimeError < load (test_preload.py:" in caplog.text
    loads.error = None
    visit_daily(preload, now, user="bob")
    await preload.work()
    assert [user for user, _ in loads.loaded] == ["bob"]


def test_a_table_keeps_nearly_all_while_a_quarter_is_free():
    habits = Habits(1 << 13, gap=900)
    for n in range(6_000):
        habits.seen(f"u{n}", START + n)
    assert sum(habits.last(f"u{n}") == 0 for n in range(6_000)) <= 6


def test_a_user_takes_64_bytes_and_the_oldest_makes_room():
    habits = Habits(1000, gap=900)
    assert habits.nbytes == 1024 * 64
    for n in range(10_000):
        habits.seen(f"u{n}", START + n)
    assert habits.last("u9999") == START + 9999
    assert habits.last("u0") == 0


@pytest.mark.parametrize(("users", "gap"), [(0, 900), (-1, 900), (10, 0), (10, float("nan")), (10, float("inf"))])
def test_senseless_tables_are_refused(users, gap):
    with pytest.raises(ValueError, match="more than 0"):
        Habits(users, gap=gap)


@given(st.lists(st.floats(allow_nan=True) | st.integers(START - DAY, START + 400 * DAY).map(float), max_size=60))
def test_a_clock_that_jumps_breaks_nothing(moments):
    habits = Habits(4, gap=900)
    for moment in moments:
        window = habits.seen("ada", moment)
        assert window is None or window == (0, 0) or window[0] < window[1]


@settings(max_examples=25)
@given(st.integers(7200, 2 * DAY))
def test_the_window_of_a_period_holds_the_next_visit(period):
    habits, at, windows, rng = Habits(4, gap=900), START, [], random.Random(period)
    for _ in range(30):
        windows.append((habits.seen("ada", at), at))
        at += int(period * rng.uniform(0.99, 1.01))
    for (window, _), (_, following) in pairwise(windows[14:]):
        assert window[1] - window[0] <= 0.2 * period + 60 + 6 * 2700
        assert window[0] - 900 <= following <= window[1] + 900


def test_messages_of_a_visit_are_one_return_and_forgotten_habits_are_gone():
    habits = Habits(4, gap=900)
    for day in range(12):
        assert habits.seen("ada", START + day * DAY) is not None
        for minute in range(1, 30):
            assert habits.seen("ada", START + day * DAY + 60 * minute) is None
    habits.forget("ada")
    habits.forget("nobody")
    assert habits.seen("ada", START + 12 * DAY) == (0, 0)
    assert habits.last("bob") == 0


async def test_it_loads_shortly_before_and_lets_go_of_who_did_not_come(now):
    loads = Loads()
    preload = loads.preload()
    visit_daily(preload, now)
    now[0] -= 3600
    await preload.work()
    assert loads.loaded == []
    now[0] += 3600
    await preload.work()
    ((user, seconds),) = loads.loaded
    assert user == "ada"
    assert 0 < seconds < 3600
    preload.seen("ada")
    assert preload.counts["right"] == 1
    now[0] += DAY
    await preload.work()
    now[0] += 3600
    await preload.work()
    assert loads.dropped == ["ada"]
    assert preload.counts["wrong"] == 1
    assert preload.stats()["on_probation"] == 0


async def test_the_budget_and_the_flag_deny_and_a_store_that_fails_harms_nothing(now):
    loads, allowed = Loads(), [True]
    preload = loads.preload(most=1, enabled=lambda: allowed[0])
    for _ in range(12):
        preload.seen("ada")
        preload.seen("bob")
        now[0] += DAY
    await preload.work()
    assert len(loads.loaded) == preload.counts["denied"] == 1
    for _ in range(2):
        preload.seen("ada")
        preload.seen("bob")
        now[0] += DAY
        allowed[0] = False
        await preload.work()
    assert len(loads.loaded) == 1
    allowed[0], loads.error = True, StoreIOError("the disk is gone")
    preload.seen("ada")
    now[0] += DAY
    await preload.work()
    now[0] += DAY
    await preload.work()
    assert loads.dropped == []
    assert preload.stats()["on_probation"] == 0


async def test_a_forgotten_user_is_not_loaded_for(now):
    loads = Loads()
    preload = loads.preload()
    visit_daily(preload, now)
    preload.forget("ada")
    await preload.work()
    assert loads.loaded == []


async def test_it_runs_by_itself_until_it_is_cancelled(now):
    loads, done = Loads(), asyncio.Event()
    preload = loads.preload()
    visit_daily(preload, now, days=11)
    running = asyncio.create_task(preload.run(), name="preload")
    await asyncio.sleep(0)
    original = preload._load

    async def load(user, seconds):
        done.set()
        return await original(user, seconds)

    preload._load = load
    preload.seen("ada")
    now[0] += DAY - LEAD
    preload._sooner.set()
    await done.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [user for user, _ in loads.loaded] == ["ada"]


async def test_the_first_message_of_a_visit_finds_all_in_memory(tmp_path, now):
    options = Settings(data_dir=tmp_path, process_pool_size=1, thread_pool_size=2, component_deadline=30)
    async with Engine.open(options, llm=quick()) as engine:
        for day in range(12):
            await engine.respond(said("ada", f"day {day}"))
            now[0] += DAY
        while engine.stats()["in_flight"]:
            await asyncio.sleep(0)
        engine._conversations.changed(None)  # as after a night
        engine.memory.clear_cache()
        await engine._preload.work()
        before = engine.stats()
        assert before["preload"]["loads"] == before["preload"]["on_probation"] == 1
        await engine.respond(said("ada", "good morning"))
        after = engine.stats()
        assert after["preload"]["right"] == 1
        for part in ("memory", "conversation"):
            assert after[part]["loads"] == before[part]["loads"]


async def test_a_hint_loads_memories_and_conversation_at_once(tmp_path):
    options = Settings(data_dir=tmp_path, process_pool_size=1, thread_pool_size=2, component_deadline=30)
    async with Engine.open(options, llm=quick()) as engine:
        await engine.respond(said("ada", "hello"))
        while engine.stats()["in_flight"]:
            await asyncio.sleep(0)
        engine._conversations.changed(None)
        engine.memory.clear_cache()
        engine.flags.preload = False
        engine.hint("ada")
        engine.flags.preload = True
        before = engine.stats()
        engine.hint("ada")
        await asyncio.gather(*(task for task in engine._aside if task.get_coro().__name__ == "_warm_now"))
        hinted = engine.stats()
        await engine.respond(said("ada", "again"))
        for part in ("memory", "conversation"):
            assert hinted[part]["loads"] == engine.stats()[part]["loads"] == before[part]["loads"] + 1


def test_random_moments_teach_nothing():
    rng = random.Random(3)
    habits, at, foreseen = Habits(4, gap=900), float(START), 0
    for _ in range(2000):
        at += rng.expovariate(1 / 7200)
        foreseen += (habits.seen("ada", at) or (0, 0)) != (0, 0)
    assert foreseen <= 20
