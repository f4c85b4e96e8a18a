"""Sizes that follow what they bring: the climber on made-up scores, the controls on their parts, the engine."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import deque
from math import inf
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scripted import quick, said

from whisper_fast import Engine, Settings
from whisper_fast.batcher import MicroBatcher
from whisper_fast.executor import Executor, Load
from whisper_fast.monitor import Adaptation, adaptation, climbing, controls
from whisper_fast.monitor.climbing import Climber, student
from whisper_fast.monitor.controls import CALM, FEWEST, LONGEST, LingerControl, PoolControl

# ---- the climber


def climbed(curve, *, noise=0.0, seed=0, windows=600, **bounds):
    """Feed a climber the scores of a curve, with noise in each window and drift over all of them."""
    chance, drift = random.Random(seed), 1.0
    climber = Climber(**{"start": 8, "least": 1, "most": 64, "price": 0.05} | bounds)
    for _ in range(windows):
        drift *= chance.lognormvariate(0, noise / 5)
        climber.feed(curve(climber.value) * drift * chance.lognormvariate(0, noise))
    return climber


CURVES = {
    "waiting": (lambda n: n / 0.05, 64),
    "computing": (lambda n: 100 * (1 - 0.002 * n), 1),
    "both": (lambda n: min(n / 0.06, 1 / 0.01), 6),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("seed", range(4))
def test_it_comes_to_the_best_size_through_noise(name, seed):
    curve, best = CURVES[name]
    climber = climbed(curve, noise=0.03, seed=seed)
    assert curve(climber.best) >= 0.95 * curve(best)
    assert climber.best <= 1.1 * best + 1


@pytest.mark.parametrize("seed", range(5))
def test_what_makes_no_difference_is_settled_by_the_smaller_and_then_left_alone(seed):
    climber = climbed(lambda _: 100.0, noise=0.05, seed=seed, windows=1500)
    assert climber.best <= 3
    moves = climber.moves
    for _ in range(50):
        climber.feed(100.0)
    assert climber.moves <= moves + 1


def test_constants_end_at_the_smallest_and_rest_longer_and_longer():
    climber = climbed(lambda _: 7.0, windows=2000)
    assert climber.best == 1
    tried = 0
    for _ in range(1000):
        tried += climber.trying is not None
        climber.feed(7.0)
    assert tried < 200


def test_another_load_ends_the_rest():
    climber = climbed(lambda _: 100.0, windows=3000)
    assert climber.best == 1
    for _ in range(120):
        climber.feed(1000.0 * climber.value)
    assert climber.best > 8


def test_drift_that_is_larger_than_the_effect_does_not_mislead():
    climber, score = Climber(8, least=1, most=64, price=0.05), 100.0
    for _ in range(300):
        score *= 1.02  # the load grows by half in 20 windows
        climber.feed(score * climber.value)
    assert climber.best == 64


def test_a_load_that_goes_away_ends_an_experiment_and_a_bound_is_kept():
    climber = Climber(8, least=1, most=64, price=0.05)
    climber.feed(1.0)
    climber.feed(1.0)
    assert (climber.trying, climber.value) == (16, 16)
    climber.give_up()
    assert (climber.trying, climber.value) == (None, 8)
    climber.bound(3, "so many are there")
    assert (climber.value, climber.best, climber.why) == (3, 3, "so many are there")


@examples(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-9, 1e9), max_size=200),
    st.integers(1, 20),
    st.integers(1, 50),
    st.booleans(),
)
def test_whatever_it_is_fed_it_stays_within_its_bounds(scores, start, room, whole):
    climber = Climber(start, least=1, most=start + room, price=0.05, whole=whole)
    for score in scores:
        climber.feed(score)
        assert 1 <= climber.value <= start + room
        assert 1 <= climber.best <= start + room
        assert not whole or climber.value == int(climber.value)


@pytest.mark.parametrize("start", [0, 65, float("nan")])
def test_a_start_that_cannot_be(start):
    with pytest.raises(ValueError, match="start is"):
        Climber(start, least=1, most=64, price=0.05)


@pytest.mark.parametrize(("freedom", "t"), [(2, 4.303), (3, 3.182), (5, 2.571), (11, 2.201), (31, 2.040)])
def test_students_t(freedom, t):
    assert student(freedom) == pytest.approx(t, rel=0.035)


# ---- the controls


class MadeUpPool:
    """A pool of `calls` callers whose throughput is a curve of its size, on a clock by hand."""

    def __init__(self, curve, calls=40, size=8):
        self.curve, self.calls, self.size = curve, calls, size
        self.done, self.now = 0.0, 0.0
        self.sizes = []

    @property
    def load(self):
        busy = min(self.calls, self.size)
        return Load(self.size, busy, self.calls - busy, int(self.done))

    def resize(self, size):
        self.size = size
        self.sizes.append(size)

    def run(self, control, seconds):
        until = self.now + seconds
        while self.now < until:
            self.now += 0.1
            self.done += 0.1 * self.curve(min(self.size, self.calls))
            control.step(self.now)


def control_of(pool, most=64):
    return PoolControl("threads", lambda: pool.load, pool.resize, most=most, enabled=lambda: True)


def test_a_pool_grows_to_the_calls_that_are_there_and_never_above():
    pool = MadeUpPool(lambda n: 20.0 * n, calls=30)
    control = control_of(pool)
    pool.run(control, 200)
    assert control.climber.best == 30
    assert max(pool.sizes) <= 30


def test_a_pool_that_computes_shrinks():
    pool = MadeUpPool(lambda _: 400.0)
    pool.run(control := control_of(pool), 200)
    assert control.climber.best == 1


def test_with_nobody_waiting_nothing_is_tried():
    pool = MadeUpPool(lambda n: 20.0 * n, calls=5)
    pool.run(control_of(pool), 100)
    assert pool.sizes == []


def test_when_calm_it_is_as_it_was_set_again():
    pool = MadeUpPool(lambda n: 20.0 * n)
    pool.run(control := control_of(pool), 60)
    assert pool.size > 8
    pool.calls = 0
    pool.run(control, CALM + 2 * LONGEST)
    assert pool.size == control.climber.best == 8
    assert "nobody has waited" in control.climber.why


async def test_a_linger_that_never_ends_comes_down_to_what_items_stay():
    async def far(items):
        await asyncio.sleep(0.01)
        return items

    async with MicroBatcher(far, max_wait=10.0, max_batch=4) as batcher:
        control = LingerControl("far", batcher, enabled=lambda: True)

        async def calls():
            while True:
                await batcher.submit(1)

        callers = [asyncio.create_task(calls()) for _ in range(12)]
        async with asyncio.timeout(20):
            while batcher.max_wait > 1.0:
                await asyncio.sleep(0.01)
                control.step(asyncio.get_running_loop().time())
        for caller in callers:
            caller.cancel()
        await asyncio.wait(callers)
        assert "none lingers longer" in control.climber.why
        control.reset()
        assert batcher.max_wait == 10.0


def test_an_experiment_with_a_linger_in_which_nobody_is_ever_seen_goes_on():
    class Quick:
        """A batcher whose items are always gone when somebody looks."""

        max_wait, items = 1.0, 0

        def stats(self):
            self.items += 1000
            return SimpleNamespace(items=self.items, waiting=0, serving=0)

    batcher = Quick()
    control = LingerControl("quick", batcher, enabled=lambda: True)
    control.climber.feed(1.0)
    assert control.climber.trying is not None
    for second in range(1, 20):
        control.step(float(second))
    assert control.climber.trying is not None


async def test_a_timer_that_runs_follows_a_shorter_wait():
    started, gate = deque(), asyncio.Event()

    async def waits(items):
        started.append(len(items))
        await gate.wait()
        return items

    async with MicroBatcher(waits, max_wait=3600.0) as batcher:
        answers = [asyncio.create_task(batcher.submit(1))]
        while not started:
            await asyncio.sleep(0)
        answers.append(asyncio.create_task(batcher.submit(2)))
        await asyncio.sleep(0.01)
        assert len(started) == 1
        batcher.max_wait = 0.001
        async with asyncio.timeout(10):
            while len(started) < 2:
                await asyncio.sleep(0.001)
        gate.set()
        assert await asyncio.gather(*answers) == [1, 2]
        for wrong in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="max_wait is"):
                batcher.max_wait = wrong


# ---- all of it


class Stuck:
    """A control whose climber is moved by hand."""

    name = resource = flag = "threads"

    def __init__(self):
        self.on = True
        self.climber = Climber(4, least=1, most=8, price=0.05)

    def enabled(self):
        return self.on

    def step(self, _):
        pass

    def reset(self):
        self.climber.begin()


def test_every_move_is_kept_with_its_reason_and_told_with_the_bottleneck(caplog):
    caplog.set_level("INFO")
    control = Stuck()
    whole = Adaptation((control,), busy=lambda: True)
    for size in (2, 1):
        whole.step()
        control.step = lambda _, size=size: control.climber.bound(size, f"only {size} are there")
        whole.step()
    assert [(move.before, move.after) for move in whole.history] == [(4, 2), (2, 1)]
    assert "only 1 are there" in whole.lately("threads")
    assert whole.lately("disk") == ""
    assert "threads from 2 to 1: only 1 are there" in caplog.text
    control.on = False
    whole.step()
    assert whole.history[-1].reason == "off"
    assert control.climber.value == 4
    before = len(whole.history)
    whole.step()
    assert len(whole.history) == before
    for number in range(500):
        whole._note("threads", number, number + 1, "")
    assert len(whole.history) == adaptation.KEPT
    json.dumps(whole.stats())


@pytest.mark.one_loop
async def test_the_engine_grows_its_threads_says_so_and_takes_it_back_when_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "EVERY", 0.02)
    monkeypatch.setattr(adaptation, "REST", 0.02)
    monkeypatch.setattr(climbing, "CAUTION", 1.0)  # the step to 4 brings twice as much: three pairs show it
    settings = Settings(data_dir=tmp_path, thread_pool_size=2, process_pool_size=1, component_deadline=30)

    async def writes(user):
        while True:
            await engine.respond(said(user, "hello"))

    async with Engine.open(settings, llm=quick()) as engine:
        engine.component("weather", lambda _: time.sleep(0.02))
        writers = [asyncio.create_task(writes(f"u{number}")) for number in range(16)]
        async with asyncio.timeout(60):
            while engine.stats()["adaptation"]["threads"]["best"] <= 2:
                await asyncio.sleep(0.02)
        moves = [move for move in engine.stats()["adaptation"]["history"] if move["what"] == "threads"]
        assert moves[-1]["after"] > 2
        assert "elasticity" in moves[-1]["reason"]
        assert "Adaptation has set threads from" in engine._finder._done("threads")
        engine.flags.threads = False
        async with asyncio.timeout(10):
            while engine._executor.threads.size != 2:
                await asyncio.sleep(0.02)
        for writer in writers:
            writer.cancel()
        await asyncio.wait(writers)
        off = [move for move in engine.stats()["adaptation"]["history"] if move["what"] == "threads"][-1]
        assert off["reason"] == "off"


async def test_calls_under_way_survive_a_pool_that_is_resized_all_the_time():
    async with Executor(4, 1) as executor:
        control = PoolControl(
            "threads",
            lambda: executor.threads,
            lambda size: executor.resize(threads=size),
            most=16,
            enabled=lambda: True,
        )
        answers = [asyncio.create_task(executor.run(pow, 2, n, kind="thread")) for n in range(2000)]
        now = 0.0
        while not all(answer.done() for answer in answers):
            now += controls.SHORTEST
            control.step(now)
            executor.resize(threads=random.randint(1, 16))
            await asyncio.sleep(0)
        assert [await answer for answer in answers] == [2**n for n in range(2000)]
        assert executor.threads.done >= 2000 > FEWEST
        assert executor.threads.waiting < inf
