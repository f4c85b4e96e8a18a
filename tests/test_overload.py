"""Offered more than it can do: it refuses at once and says when to come back, and does what it can all the while."""

import asyncio
import random
import time
from collections import Counter

import pytest
from scripted import said
from served import served

from whisper_fast import Engine, Settings, clock
from whisper_fast.admission import UNMEASURED, Admission
from whisper_fast.errors import Overloaded
from whisper_fast.lab.audit import audit
from whisper_fast.lanes import Lanes
from whisper_fast.llm import SimulatedLLM

TICK = 0.005  # seconds
FIXED = {"feature_adaptive": False, "process_pool_size": 1}  # the model's limit stays what it is


class Clock:
    """A clock that stands until it is moved."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def hand():
    hand = Clock()
    with clock.replaced(monotonic=hand, wall=time.time):
        yield hand


def busy(hand, *, slots, turn, rounds, max_wait=5.0):
    """An admission that has seen `rounds` of all slots, each given back after `turn` seconds, while others waited."""
    admission = Admission(max_wait)
    admission.waits()
    for _ in range(rounds):
        hand.now += turn
        for _ in range(slots):
            admission.served(100, slots)
    return admission


@pytest.mark.parametrize("slots", [1, 10, 300])
@pytest.mark.parametrize("turn", [0.01, 4.0])
def test_the_wait_is_predicted_from_how_fast_slots_come_back(hand, slots, turn):
    admission = busy(hand, slots=slots, turn=turn, rounds=6)
    assert admission.predicted(3 * slots, slots) == pytest.approx(3 * turn, rel=0.3)


def test_ones_own_messages_ahead_count_with_their_turns_and_waits(hand):
    admission = busy(hand, slots=10, turn=1.0, rounds=20)  # a slot comes back each 0.1 s
    admission.lasted(0.5)
    admission.check(10, 10, behind=2)  # 3 waits of 1 s, 2 turns of 0.5 s
    with pytest.raises(Overloaded, match="would wait 5"):
        admission.check(10, 10, behind=3)


async def test_a_few_users_who_flood_do_not_wait_longer_than_is_allowed(hand):
    lanes = Lanes(1000, 1 << 20, slots=lambda: 1, max_wait=5.0)
    lanes._admission = busy(hand, slots=1, turn=1.0, rounds=20)
    gate = asyncio.Event()
    for user in ("ada", "bob"):  # one runs, the other waits for the slot
        lanes.enter(user).start(gate.wait, user)
    places = [lanes.enter("bob") for _ in range(4)]
    with pytest.raises(Overloaded):
        lanes.enter("bob")
    assert lanes.refused["wait"] == 1
    gate.set()
    for place in places:
        place.leave()
    assert await lanes.drain(5)


async def test_whoever_has_waited_as_long_as_one_may_is_next(hand):
    """Users who come for the first time go before one who was served already; without end, if they keep coming."""
    lanes = Lanes(1000, 1 << 20, slots=lambda: 1, max_wait=5.0)
    served, over = [], {}

    def come(user):
        async def turn():
            served.append(user)
            await over.setdefault(len(served), asyncio.Event()).wait()

        lanes.enter(user, admitted=True).start(turn, user)

    for _ in range(3):
        come("ada")
    for second in range(12):
        await asyncio.sleep(0)
        come(f"new {second}")
        hand.now += 1.0
        over.setdefault(len(served), asyncio.Event()).set()
        for _ in range(5):
            await asyncio.sleep(0)
    assert served[:3] == ["ada", "new 0", "ada"]
    assert served.index("ada", 3) in (7, 8, 9), "it began to wait when the second one ran"
    lanes.hurry()
    await lanes.abort()


def test_who_would_wait_too_long_is_refused_with_the_time_above_the_limit(hand):
    admission = busy(hand, slots=10, turn=1.0, rounds=20)
    admission.check(40, 10)
    with pytest.raises(Overloaded) as refused:
        admission.check(80, 10)
    assert 3 * 0.7 <= refused.value.retry_after <= 3 * 1.25 * 1.3
    with pytest.raises(Overloaded) as refused:
        admission.check(1_000_000, 10)
    assert refused.value.retry_after == 60


def test_who_finds_nobody_waiting_is_let_in_whatever_was(hand):
    busy(hand, slots=1, turn=100.0, rounds=5).check(0, 1)


def test_while_nothing_is_known_a_bounded_number_may_wait(hand):
    admission = Admission(5.0)
    admission.check(UNMEASURED - 1, 10)
    with pytest.raises(Overloaded):
        admission.check(UNMEASURED, 10)
    admission.check(UNMEASURED, 1000)


def test_a_stall_counts(hand):
    admission = busy(hand, slots=2, turn=0.01, rounds=50)
    admission.check(100, 2)
    hand.now += 60
    with pytest.raises(Overloaded):
        admission.check(100, 2)
    for _ in range(200):  # and is forgotten when slots come back as before
        hand.now += 0.005
        admission.served(100, 2)
    admission.check(100, 2)


def test_pauses_without_waiters_are_no_stalls(hand):
    admission = busy(hand, slots=2, turn=0.01, rounds=50)
    admission.served(0, 2)
    hand.now += 3600
    admission.waits()
    assert admission.predicted(100, 2) < 2


# ---- a whole engine


class Watched(SimulatedLLM):
    """Notes at each call's end how many calls are in flight, and what `look` says."""

    def __init__(self, latency):
        super().__init__(latency)
        self.running, self.seen, self.look = 0, [], lambda: None

    async def chat(self, messages, **more):
        self.running += 1
        try:
            return await super().chat(messages, **more)
        finally:
            self.seen.append((self.running, self.look()))
            self.running -= 1


class Flood:
    """Messages in open loop: `rate` a second whether they are answered or not, from many users."""

    def __init__(self, engine, users, seed=0):
        self.engine, self.users, self.rng = engine, users, random.Random(seed)
        self.number = 0
        self.ends, self.retry, self.shed_seconds, self.took = Counter(), [], [], []
        self.tasks = set()

    async def send(self, number):
        began = time.perf_counter()
        try:
            await self.engine.respond(said(f"u{self.rng.randrange(self.users)}", f"m{number}", id=f"{number}"))
        except Overloaded as error:
            self.ends["shed"] += 1
            self.shed_seconds.append(time.perf_counter() - began)
            self.retry.append(error.retry_after)
        else:
            self.ends["answered"] += 1
            self.took.append(time.perf_counter() - began)

    async def run(self, rate, seconds):
        began, sent = time.perf_counter(), 0
        while (now := time.perf_counter() - began) < seconds:
            while sent < rate * now:
                task = asyncio.create_task(self.send(self.number))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
                self.number += 1
                sent += 1
            await asyncio.sleep(TICK)

    async def rest(self):
        if self.tasks:
            await asyncio.wait(self.tasks)


async def test_ten_times_its_capacity_for_some_seconds(tmp_path):
    settings = Settings(data_dir=tmp_path, max_concurrent_requests=10, max_wait_seconds=1, **FIXED)
    llm = Watched(0.05)  # 200 a second at most
    async with Engine.open(settings, llm=llm) as engine:
        flood = Flood(engine, users=100_000)
        await flood.run(200, 1)  # what it can do: now its pace is known
        await flood.rest()
        llm.seen.clear()
        llm.look = lambda: (engine._lanes.waiting, engine._lanes.running)
        await flood.run(2000, 2)
        await flood.rest()
        slots = engine._slots()
        assert any(waiting for _, (waiting, _) in llm.seen)
        assert all(running == slots for _, (waiting, running) in llm.seen if waiting)  # no slot idle while one waits
        assert flood.ends["shed"] > flood.ends["answered"]
        assert all(0 < seconds <= 75 for seconds in flood.retry)
        await engine._lanes._settled.wait()  # the last ones are being remembered
        stats = engine.stats()
        assert (stats["waiting"], stats["running"], stats["in_flight"], stats["failed"]) == (0, 0, 0, 0)
        assert engine._lanes._lanes == {}  # whoever is silent costs nothing
        assert engine._lanes._queue.remembered == 0
    found = audit(tmp_path)
    assert found["accepted"] == found["done"] == flood.ends["answered"]  # what was accepted was answered, no more


async def test_the_model_is_never_asked_for_longer_than_it_may_queue(tmp_path):
    """Turns wait in the lanes, where nothing times out; the pool's own queue stays short."""
    settings = Settings(data_dir=tmp_path, max_concurrent_requests=4, **FIXED)
    llm = Watched(0.02)
    async with Engine.open(settings, llm=llm) as engine:
        waiting = []

        async def send(n):
            reply = await engine.respond(said(f"u{n}", "hi", id="1"))
            waiting.append(engine.llm.stats()["waiting"])
            return reply

        assert len(await asyncio.gather(*map(send, range(300)))) == 300
        assert max(waiting) <= engine._slots() - 4
        assert max(running for running, _ in llm.seen) == 4


@pytest.mark.parametrize("turns", [1500, pytest.param(11_000, marks=pytest.mark.soak)])
async def test_thousands_of_turns_run_at_once(tmp_path, turns):
    gate = asyncio.Event()

    class Gated(SimulatedLLM):
        asked = 0

        async def chat(self, messages, **more):
            Gated.asked += 1
            await gate.wait()
            return await super().chat(messages, **more)

    settings = Settings(data_dir=tmp_path, max_concurrent_requests=turns, process_pool_size=1, component_deadline=60)
    async with Engine.open(settings, llm=Gated(0)) as engine:
        sending = [asyncio.ensure_future(engine.respond(said(f"u{n}", "hi", id="1"))) for n in range(turns)]
        async with asyncio.timeout(120):
            while Gated.asked < turns:
                await asyncio.sleep(0.05)
        assert engine.stats()["running"] == turns
        gate.set()
        await asyncio.gather(*sending)


async def test_ten_thousand_messages_of_one_user_at_once(tmp_path):
    order = []

    class Noting(SimulatedLLM):
        async def chat(self, messages, **more):
            order.append(int(messages[-1]["content"]))
            return await super().chat(messages, **more)

    settings = Settings(data_dir=tmp_path, process_pool_size=1)
    async with Engine.open(settings, llm=Noting(0)) as engine:
        ends = await asyncio.gather(
            *(engine.respond(said("ada", f"{n}", id=f"{n}")) for n in range(10_000)),
            engine.respond(said("bob", "10000")),  # somebody else is answered all the same
            return_exceptions=True,
        )
    refused = [end for end in ends if isinstance(end, Overloaded)]
    answered = [int(end.id) for end in ends[:-1] if not isinstance(end, Exception)]
    assert len(refused) + len(answered) == 10_000
    assert all(error.retry_after > 0 for error in refused)
    assert len(answered) == 256
    assert [n for n in order if n < 10_000] == sorted(answered)
    assert ends[-1].user == "bob"


async def test_who_is_refused_costs_no_work(tmp_path):
    """No journal entry, no task, no component, no call to the model: the refusal is one look at the lanes."""
    gate = asyncio.Event()

    class Gated(SimulatedLLM):
        asked = 0

        async def chat(self, messages, **more):
            Gated.asked += 1
            await gate.wait()
            return await super().chat(messages, **more)

    async with Engine.open(Settings(data_dir=tmp_path, max_waiting=1, **FIXED), llm=Gated(0)) as engine:
        first = asyncio.create_task(engine.respond(said("ada", "hello")))
        while not Gated.asked:
            await asyncio.sleep(0)
        before = audit(tmp_path), engine.stats()["commits"], Gated.asked, len(asyncio.all_tasks())
        answer = engine.respond(said("bob", "hello"))
        with pytest.raises(Overloaded):  # at its first step: nothing was awaited
            answer.send(None)
        assert (audit(tmp_path), engine.stats()["commits"], Gated.asked, len(asyncio.all_tasks())) == before
        gate.set()
        await first


async def test_the_door_says_503_and_when_to_come_back(tmp_path):
    import aiohttp

    with served(tmp_path, latency=1, max_waiting=3, process_pool_size=1) as server:
        async with aiohttp.ClientSession(server.address) as session:

            async def ask(n):
                body = {"messages": [{"role": "user", "content": "hi"}], "stream": n % 2 == 0}
                async with session.post(
                    "/v1/chat/completions", json=body, headers={"X-User-Id": f"u{n}"}
                ) as response:
                    await response.read()
                    return response.status, response.headers.get("Retry-After")

            ends = Counter(await asyncio.gather(*(ask(n) for n in range(12))))
            assert ends[200, None] >= 3
            assert set(ends) == {(200, None), (503, "1")}
