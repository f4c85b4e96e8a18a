"""A hit, a miss, a put that evicts, and many at once, beside dict, functools.lru_cache and cachetools.

Goals: a hit at most 1.5x dict.get; a put with eviction at most 110 ns; get_many(64) at most 25 ns a key; a hit
through get_or_load at most 200 ns. The last test prints all of it as a table with ratios.
"""

import asyncio
from functools import lru_cache
from itertools import count
from timeit import repeat

import pytest

from whisper_fast.cache import Cache

SIZE = 10_000
KEYS = [f"user-{n}" for n in range(SIZE)]
BATCH = KEYS[100:164]


def full(kind):
    if kind == "dict":
        return dict.fromkeys(KEYS, 1)
    if kind == "Cache":
        store = Cache(SIZE)
        store.put_many((key, 1) for key in KEYS)
        return store
    store = pytest.importorskip("cachetools").LRUCache(SIZE)
    store.update(dict.fromkeys(KEYS, 1))
    return store


@pytest.mark.parametrize("kind", ["dict", "Cache", "cachetools"])
def test_hit(benchmark, kind):
    benchmark.group = "hit"
    benchmark(full(kind).get, KEYS[77])


def test_hit_lru_cache(benchmark):
    benchmark.group = "hit"
    cached = lru_cache(SIZE)(lambda key: 1)
    for key in KEYS:
        cached(key)
    benchmark(cached, KEYS[77])


def test_hit_with_ttl(benchmark):
    benchmark.group = "hit"
    store = Cache(SIZE, ttl=3600)
    store.put("k", 1)
    benchmark(store.get, "k")


@pytest.mark.parametrize("kind", ["Cache", "cachetools"])
def test_put_that_evicts(benchmark, kind):
    benchmark.group = "put that evicts"
    store, fresh = full(kind), count()
    put = store.put if kind == "Cache" else store.__setitem__
    benchmark(lambda: put(next(fresh), 1))


def test_get_many(benchmark):
    benchmark.group = "get 64"
    benchmark(full("Cache").get_many, BATCH)


def test_get_many_dict(benchmark):
    benchmark.group = "get 64"
    get = full("dict").get
    benchmark(lambda: [get(key) for key in BATCH])


# ---- the table


def cost(statement, number=200_000, **names):
    """Return nanoseconds for one run of `statement`, the best of five."""
    return min(repeat(statement, globals=names, number=number, repeat=5)) / number * 1e9


def evicting(store, put):
    fresh = [f"fresh-{n}" for n in range(SIZE * 4)]
    spent = cost("for key in fresh: put(key, 1)", number=1, fresh=fresh, put=put) / len(fresh)
    assert len(store) == SIZE
    return spent


def loaded(number=20_000):
    """Return nanoseconds for a hit through `get_or_load`, its coroutine and its await included."""

    async def ask(store):
        for _ in range(number):
            await store.get_or_load("user-77", None)

    store = full("Cache")
    return cost("run(ask(store))", number=1, run=asyncio.run, ask=ask, store=store) / number


def rows():
    base, ours = full("dict"), full("Cache")
    cached = lru_cache(SIZE)(lambda key: 1)
    cached("user-77")
    yield "hit", "dict.get", cost("d.get(k)", d=base, k=KEYS[77])
    yield "hit", "Cache.get", cost("d.get(k)", d=ours, k=KEYS[77])
    yield "hit", "lru_cache", cost("f(k)", f=cached, k=KEYS[77])
    many = {"d": ours, "b": BATCH, "base": base}
    yield "get 64, each", "[dict.get ...]", cost("[base.get(k) for k in b]", number=5000, **many) / 64
    yield "get 64, each", "Cache.get_many", cost("d.get_many(b)", number=5000, **many) / 64
    yield "put, evicting", "Cache.put", evicting(ours, ours.put)
    try:
        theirs = full("cachetools")
    except pytest.skip.Exception:
        theirs = None
    if theirs is not None:
        yield "hit", "cachetools.LRUCache", cost("d.get(k)", d=theirs, k=KEYS[77])
        yield "put, evicting", "cachetools.LRUCache", evicting(theirs, theirs.__setitem__)
    yield "hit", "get_or_load", loaded()


def test_table(capsys):
    found = list(rows())
    dict_get = found[0][2]
    with capsys.disabled():
        print(f"\n{'':16}{'':24}{'ns':>9}{'x dict.get':>12}")
        for what, who, spent in sorted(found, key=lambda row: row[0]):
            print(f"{what:16}{who:24}{spent:9.1f}{spent / dict_get:12.2f}")
