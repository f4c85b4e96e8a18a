"""The memory budget: its rule on made-up readings, and an engine that gives its caches for what a component takes."""

from __future__ import annotations

import asyncio
import random
from collections import deque

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scripted import quick, said

from whisper_fast import Engine, Settings
from whisper_fast.cache import Cache
from whisper_fast.conversation import exchange
from whisper_fast.errors import Overloaded, SettingsError
from whisper_fast.monitor import Budget, budget
from whisper_fast.monitor.budget import DEFAULT, FLOOR, HIGH, KEPT, LOW, SHED, STEP
from whisper_fast.monitor.pressure import Pressure

MIB = 1 << 20
SIZE = 1000 * MIB


def filled(mib):
    cache = Cache(mib * MIB, weigher=lambda value: value)
    for number in range(mib):
        cache.put(number, MIB)
    return cache


class Rig:
    """A budget on caches that are full, fed by hand."""

    def __init__(self, size=SIZE, **caches):
        self.caches = {name: filled(mib) for name, mib in (caches or {"a": 64, "b": 32}).items()}
        self.refusals = []
        self.enabled = True
        self.budget = Budget(
            None, self.caches, size=size, shed=self.refusals.append, enabled=lambda: self.enabled
        )  # fmt: skip

    async def feed(self, share, **known):
        await self.budget.follow(Pressure(rss=int(share * SIZE), **known))

    def bounds(self):
        return {name: cache.max_weight for name, cache in self.caches.items()}


# ---- the rule


@pytest.mark.parametrize("share", [0.1, LOW, 0.85, HIGH])
async def test_constants_below_the_mark_change_nothing(share):
    rig = Rig()
    for _ in range(1000):
        await rig.feed(share)
    assert rig.budget.changes == 0
    assert rig.budget.stats()["bounds"] == {"a": 64 * MIB, "b": 32 * MIB}


async def test_constants_above_it_end_at_the_floor_and_stay_there():
    rig = Rig()
    for _ in range(1000):
        await rig.feed(0.92)
    assert rig.bounds() == {"a": 64 * MIB * FLOOR, "b": 32 * MIB * FLOOR}
    assert rig.budget.changes < 30
    assert not rig.budget.shedding


async def test_caches_give_what_is_over_in_proportion_to_what_they_hold():
    rig = Rig()
    await rig.feed(HIGH + 0.03)
    held = [cache.weight for cache in rig.caches.values()]
    assert 96 * MIB - sum(held) == pytest.approx(30 * MIB, abs=2 * MIB)
    assert held[0] == pytest.approx(2 * held[1], rel=0.05)
    change = rig.budget.history[0]
    assert (change.what, change.before) == ("a", 64 * MIB)
    assert change.after == rig.caches["a"].max_weight
    assert "930 MiB of 1000 used" in change.reason


async def test_what_is_not_held_cannot_be_given():
    rig = Rig(a=64)
    rig.caches["a"].clear()
    await rig.feed(HIGH + 0.01)
    assert rig.budget.changes == 0
    await rig.feed(SHED)
    assert rig.budget.shedding  # nothing to give: messages are refused before the budget is reached


async def test_a_ramp_is_bounded_and_sheds_only_when_caches_have_given_all():
    rig, own = Rig(a=200), 0.6
    for _ in range(100):
        own += 0.005
        used = own + rig.caches["a"].weight / SIZE
        await rig.feed(used)
        if rig.budget.shedding:
            break
    assert rig.caches["a"].weight <= 200 * MIB * FLOOR
    assert SHED <= used < 1.0
    assert len(rig.refusals) == 1
    for _ in range(200):
        own = max(0.5, own - 0.005)
        await rig.feed(own + rig.caches["a"].weight / SIZE)
    assert not rig.budget.shedding
    assert rig.refusals[1:] == [""]
    assert rig.bounds() == {"a": 200 * MIB}  # it grew back


async def test_it_grows_slowly_and_never_into_the_mark():
    rig = Rig(a=200)
    await rig.feed(HIGH + 0.2)
    low = rig.caches["a"].max_weight
    steps = 0
    while rig.caches["a"].max_weight < 200 * MIB:
        before = rig.caches["a"].max_weight
        await rig.feed(0.5)
        assert rig.caches["a"].max_weight - before <= 200 * MIB * STEP
        steps += 1
    assert steps >= (1 - low / (200 * MIB)) / STEP
    await rig.feed(HIGH + 0.2)
    before = rig.caches["a"].max_weight
    await rig.feed(LOW - 0.001)
    assert rig.caches["a"].max_weight - before <= 0.0005 * SIZE


@pytest.mark.parametrize("seed", range(5))
async def test_noise_does_not_flap(seed):
    noise, rig = random.Random(seed), Rig()
    for _ in range(2000):
        await rig.feed(noise.uniform(LOW, HIGH + 0.004))
    signs = [change.after > change.before for change in rig.budget.history]
    assert not any(signs)  # it gave, and never took back and gave again
    assert rig.budget.changes < 60


async def test_the_budget_itself_sheds_even_while_caches_hold_something():
    rig = Rig(a=900)
    await rig.feed(1.3)
    assert rig.budget.shedding


async def test_tasks_that_stall_for_memory_count_as_too_much():
    rig = Rig()
    await rig.feed(0.85, stalled=50.0)
    assert rig.bounds()["a"] < 64 * MIB
    assert "50 % stalled" in rig.budget.history[0].reason


async def test_unknown_moves_nothing():
    rig = Rig()
    await rig.budget.follow(Pressure(stalled=90.0, limit=MIB))
    assert rig.budget.changes == 0


async def test_switched_off_everything_is_as_configured():
    rig = Rig()
    await rig.feed(2.0)
    assert rig.budget.shedding
    rig.enabled = False
    await rig.budget.step()
    assert rig.bounds() == {"a": 64 * MIB, "b": 32 * MIB}
    assert not rig.budget.shedding
    assert rig.refusals[-1] == ""


async def test_the_size():
    async def size(wanted, **reading):
        rig = Rig(size=wanted)
        await rig.budget.follow(Pressure(**reading))
        return rig.budget.size

    assert await size(None, rss=MIB) == DEFAULT
    assert await size(None, rss=MIB, limit=512 * MIB) == 384 * MIB
    assert await size(300 * MIB, rss=MIB) == 300 * MIB
    assert await size(900 * MIB, rss=MIB, limit=512 * MIB) == 512 * MIB
    assert await size(None, rss=3 << 30) == 6 << 30  # it was large before the engine came
    with pytest.raises(SettingsError, match="WHISPER_FAST_MEMORY_BUDGET"):
        Settings(memory_budget=5)


SHARES = st.lists(st.floats(0, 3, allow_nan=False), max_size=40)


@examples(max_examples=50, deadline=None)
@given(shares=SHARES, stalls=st.lists(st.sampled_from([None, 0.0, 100.0]), min_size=40, max_size=40))
def test_whatever_it_is_fed_bounds_stay_between_floor_and_configured(shares, stalls):
    async def run():
        rig = Rig(a=16, b=2)
        for share, stalled in zip(shares, stalls, strict=False):
            await rig.feed(share, stalled=stalled)
            for name, most in (("a", 16 * MIB), ("b", 2 * MIB)):
                assert most * FLOOR <= rig.caches[name].max_weight <= most
                assert rig.caches[name].max_weight == rig.budget.stats()["bounds"][name]
        assert len(rig.budget.history) <= KEPT

    asyncio.run(run())


async def test_while_it_sheds_what_was_freed_is_given_back(monkeypatch):
    class Full:
        def read(self):
            return Pressure(rss=SIZE)

    trims = []
    monkeypatch.setattr(budget, "trim", lambda: trims.append(1))
    full = Budget(Full(), {}, size=SIZE)
    for _ in range(3):
        await full.step()
    assert full.shedding
    assert len(trims) == 3


# ---- the real engine


async def until(true):
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


@pytest.mark.soak  # what the process holds in RAM also depends on the tests before it
async def test_an_allocation_of_twice_the_rate_is_made_up_for_by_full_caches_and_then_by_shedding(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(budget, "PERIOD", 0.02)
    kept, rate = [], [1]

    async def hoards(_):
        kept.append(np.ones(rate[0] * MIB // 8))

    options = {"component_deadline": 30, "process_pool_size": 1, "conversation_cache_bytes": 160 * MIB}
    async with Engine.open(Settings(data_dir=tmp_path, **options), llm=quick()) as engine:
        engine.component("hoards", hoards)
        conversations, process = engine._conversations.cache, psutil.Process()
        for number in range(1100):
            conversations.put((f"u{number}", "", "", ""), deque([exchange(number, 1.0, "x" * 100_000, str(number))]))
        full = conversations.weight
        assert full > 100 * MIB
        size = engine._budget._wanted = int((process.memory_info().rss + 20 * MIB) / HIGH)  # 20 MiB below the mark
        for number in range(60):
            rate[0] = 1 if number < 15 else 2
            await engine.respond(said(f"v{number}", "hello"))
        await until(lambda: engine._budget.pressure.rss <= HIGH * size + 4 * MIB)
        assert conversations.weight < full - 50 * MIB
        stats = engine.stats()["budget"]
        assert stats["rss"] < stats["bytes"] == size
        assert any(change["what"] == "conversations" for change in stats["history"])
        assert engine.stats()["shed"] == 0

        rate[0] = 4

        async def flood():
            for number in range(200):
                await engine.respond(said(f"w{number}", "hello"))
                await engine._budget.step()

        with pytest.raises(Overloaded) as refused:  # the caches have given what they have: now nobody is let in
            await flood()
        assert refused.value.retry_after > 0
        assert "WHISPER_FAST_MEMORY_BUDGET" in str(refused.value)
        assert process.memory_info().rss < size
        assert engine.stats()["shed"] == 1
        await engine.forget("v1")  # what frees memory goes on
        kept.clear()
        await until(lambda: not engine._budget.shedding)
        assert (await engine.respond(said("ada", "hello"))).text
