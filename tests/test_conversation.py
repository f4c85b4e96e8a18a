"""Recent conversations: in order, one user's alone, read once, and no more memory than they may take."""

import asyncio
import sys
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import said

from whisper_fast import clock
from whisper_fast.conversation import Conversations, Recent, exchange, merged, place, weight
from whisper_fast.errors import StoreIOError
from whisper_fast.store.sqlite import Database


class Counted:
    """A database that counts its reads, and may fail or wait before one."""

    def __init__(self, database):
        self.database, self.reads, self.gate, self.error = database, 0, None, None
        self.write = database.write

    async def read(self, job):
        self.reads += 1
        found = await self.database.read(job)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return found


@pytest.fixture
async def database(tmp_path):
    opened = await Database.open(tmp_path)
    yield Counted(opened)
    await opened.close()


def conversations(database, **fields):
    defaults = {"max_bytes": 1 << 20, "ttl": 900.0, "bootstrap": 20, "longest": 50, "caching": lambda: True}
    return Conversations(database, **defaults | fields)


async def turn(database, talk, number, message, reply="yes"):
    """Store one turn and show it, as the engine does."""
    await database.write(partial(talk.insert, turn=number, message=message, reply=reply))
    talk.publish(number, message, reply)


def words(messages):
    return [message["content"] for message in messages if message["role"] == "user"]


async def test_a_cold_place_is_read_once_however_many_ask(database):
    talk, message = conversations(database), said("ada", "hello")
    await turn(database, talk, 1, said("ada", "first"))
    database.gate = asyncio.Event()
    asking = [asyncio.ensure_future(talk.recent(message)) for _ in range(1000)]
    others = [asyncio.ensure_future(talk.recent(said(f"u{n}", "hi"))) for n in range(2)]
    await asyncio.sleep(0)
    asking[0].cancel()  # whoever came first may leave
    database.gate.set()
    answers = await asyncio.gather(*asking[1:], *others)
    assert answers[0] == [{"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"}]
    assert answers[:-2] == [answers[0]] * 999
    assert answers[-2:] == [[], []]
    assert database.reads == 3
    with pytest.raises(asyncio.CancelledError):
        await asking[0]


async def test_a_hundred_turns_are_read_from_the_store_once(database):
    talk = conversations(database)
    for n in range(100):
        found = words(await talk.recent(said("ada", "x")))
        assert found == [f"{k}" for k in range(max(0, n - 50), n)]  # 50 are kept, oldest first
        await turn(database, talk, n, said("ada", f"{n}"))
    assert database.reads == 1
    assert talk.stats()["loads"] == 1


async def test_twenty_are_read_for_a_cold_place(database):
    writer = conversations(database)
    for n in range(100):
        await turn(database, writer, n, said("ada", f"{n}"))
    for bootstrap, longest, count in ((20, 50, 20), (20, 5, 5), (0, 50, 0)):
        talk = conversations(database, bootstrap=bootstrap, longest=longest)
        assert words(await talk.recent(said("ada", "x"))) == [f"{n}" for n in range(100 - count, 100)]


async def test_fifteen_minutes_after_the_last_turn_a_place_is_cold(database):
    now = [1000.0]
    with clock.replaced(monotonic=lambda: now[0], wall=lambda: 0.0):
        talk = conversations(database)
        for step, reads in ((0, 1), (899, 1), (899, 1), (901, 2)):
            now[0] += step
            await talk.recent(said("ada", "x"))
            assert database.reads == reads
            await turn(database, talk, int(now[0]), said("ada", "x"))


async def test_nobody_finds_anothers_words_or_those_of_another_place(database):
    talk = conversations(database)
    places = [
        {"user": user, "channel": channel, "scope": scope}
        for user in ("ada", "bob") for channel in ("c1", "c2") for scope in ("dm", "server:1/public")
    ]  # fmt: skip
    for n, where in enumerate(places * 3):
        await talk.recent(said(text="x", **where))
        await turn(database, talk, n, said(text=f"{where}", **where))
    cold = conversations(database)
    for where in places:
        for held in (talk, cold):
            assert words(await held.recent(said(text="x", **where))) == [f"{where}"] * 3


async def test_thousands_of_places_stay_within_their_bytes(database):
    talk = conversations(database, max_bytes=1 << 18)
    await asyncio.gather(*(talk.recent(said(f"u{n}", "x")) for n in range(4_000)))
    stats = talk.stats()
    assert 0 < stats["bytes"] <= 1 << 18
    assert stats["evictions"] == 4_000 - stats["places"]


async def test_a_load_that_began_before_a_turn_is_not_kept(database):
    talk = conversations(database)
    database.gate = asyncio.Event()
    asking = asyncio.ensure_future(talk.recent(said("ada", "x")))
    while not database.reads:
        await asyncio.sleep(0)
    await turn(database, talk, 1, said("ada", "one"))
    database.gate.set()
    await asking
    assert words(await talk.recent(said("ada", "x"))) == ["one"]


async def test_a_turn_that_is_published_twice_is_shown_once(database):
    talk = conversations(database)
    await talk.recent(said("ada", "x"))
    for _ in range(2):
        await turn(database, talk, 1, said("ada", "one"))
    assert words(await talk.recent(said("ada", "x"))) == ["one"]


async def test_a_store_that_fails_is_not_remembered(database):
    talk = conversations(database)
    database.error = StoreIOError("the disk is gone")
    answers = await asyncio.gather(*(talk.recent(said("ada", "x")) for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [StoreIOError] * 3
    database.error = None
    assert await talk.recent(said("ada", "x")) == []


async def test_forgetting_drops_what_is_held_and_what_is_under_way(database):
    talk = conversations(database)
    for user in ("ada", "bob"):
        await talk.recent(said(user, "x"))
    database.gate = asyncio.Event()
    asking = asyncio.ensure_future(talk.recent(said("ada", "x", channel="other")))
    while database.reads < 3:
        await asyncio.sleep(0)
    talk.forget("ada")
    database.gate.set()
    await asking
    assert talk.stats()["places"] == 1


async def test_warm_loads_the_place_of_the_last_turn(database):
    talk = conversations(database)
    await turn(database, talk, 1, said("ada", "one", channel="c1"))
    await turn(database, talk, 2, said("ada", "two", channel="c2"))
    await talk.warm("ada")
    await talk.warm("nobody")
    before = database.reads
    assert words(await talk.recent(said("ada", "x", channel="c2"))) == ["two"]
    assert database.reads == before


async def test_a_guess_counts_for_nothing_and_makes_no_room(database):
    talk = conversations(database, max_bytes=2000)
    for n in range(8):
        await turn(database, talk, n, said(f"u{n}", "one"))
    for n in range(8):
        await talk.recent(said(f"u{n}", "x"))
    held = set(talk.cache.keys())
    assert talk.stats()["evictions"] > 0
    cold = {f"u{n}" for n in range(8)} - {key[0] for key in held}
    await talk.warm(cold.pop(), 600)
    assert held == set(talk.cache.keys())
    roomy = conversations(database)
    await roomy.warm("u1", 600)
    await turn(database, roomy, 9, said("u1", "two"))
    after = roomy.stats()
    assert (after["places"], after["hits"], after["misses"], after["loads"]) == (1, 0, 0, 1)


async def test_the_index_of_places_holds_what_is_held(database):
    talk = conversations(database, max_bytes=4000)
    for n in range(200):
        await talk.recent(said(f"u{n % 20}", "x", channel=f"c{n % 7}"))
    assert {key for keys in talk._places.values() for key in keys} == set(talk.cache.keys())
    for n in range(20):
        talk.changed(f"u{n}")
    assert talk.stats()["places"] == len(talk._places) == 0
    database.error = StoreIOError("the disk is gone")
    with pytest.raises(StoreIOError):
        await talk.recent(said("ada", "x"))
    assert not talk._places


async def test_without_caching_each_message_reads(database):
    talk = conversations(database, caching=lambda: False)
    for n in range(3):
        await talk.recent(said("ada", "x"))
        await turn(database, talk, n, said("ada", f"{n}"))
    await talk.warm("ada")
    assert words(await talk.recent(said("ada", "x"))) == ["0", "1", "2"]
    assert database.reads == 4
    assert talk.stats()["places"] == 0


def deep(value, seen):
    if id(value) in seen or value in ("role", "content", "user", "assistant", ""):
        return 0
    seen.add(id(value))
    inner = value.items() if isinstance(value, dict) else () if isinstance(value, str | int | float) else value
    return sys.getsizeof(value) + sum(
        deep(part, seen) for one in inner for part in (one if isinstance(value, dict) else (one,))
    )


TEXT = st.text(min_size=2, max_size=300)  # Python keeps shorter ones once for all


@settings(max_examples=40)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=50))
def test_the_weight_is_what_python_keeps(pairs):
    key = place(said("ada", "x"))
    recent = Recent(
        exchange((1 << 20) + n, 1e9 + n, f"{n} {text}", f"{n} {reply}") for n, (text, reply) in enumerate(pairs)
    )
    assert weight(key, recent) == pytest.approx(deep(recent, set()) + deep(key, set()), rel=0.05, abs=120)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_merged_is_in_the_order_of_time_and_keeps_ones_own(own, others):
    mine = [exchange(n, at, "", "") for n, at in enumerate(own)]
    theirs = [exchange(n, at, "", "", "x") for n, at in enumerate(others)]
    both = merged(mine, list(theirs))
    assert [kept for kept in both if not kept.node] == mine
    assert len(both) == len(mine) + len(theirs)
    if own == sorted(own):
        assert [kept.at for kept in both] == sorted(own + others)
