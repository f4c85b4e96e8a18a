"""What a cache's calls cost: a hit, many hits, a put that evicts, an awaited hit; beside dict and the peers.

Goals: a hit at most 1.5x dict.get; a put with eviction and admission at most 110 ns, or below cachebox's LFU; a key
of get_many(64) at most 25 ns; a hit through get_or_load at most 200 ns. `test_table` prints all of it with ratios to
dict.get in the same run; `hit, spread` asks for every key in turn, `churned` after many evictions, when the policy is
at work. Each figure is the best of seven rounds in which all take their turn. Hit ratios: cache_traces.py.
"""

import asyncio
from functools import lru_cache
from importlib import import_module
from itertools import count
from time import perf_counter
from timeit import timeit

import pytest

from whisper_fast.cache import Cache

SIZE = 10_000
KEYS = [f"user-{n}" for n in range(SIZE)]
FRESH = [f"fresh-{n}" for n in range(4 * SIZE)]
BATCH = KEYS[100:164]
ROUNDS = 7


def peer(module, name):
    """Return a peer's class, or None where it is not installed."""
    try:
        return getattr(import_module(module), name)
    except ImportError:
        return None


def stores():
    """Yield name, getter, putter of each store, filled with KEYS."""
    table = dict.fromkeys(KEYS, 1)
    yield "dict", table.get, None
    cache = Cache(SIZE)
    yield "Cache", cache.get, cache.put
    churned = Cache(SIZE)
    churned.put_many((key, 1) for key in FRESH)
    yield "Cache, churned", churned.get, churned.put
    for module, name, get, put in (
        ("cachetools", "LRUCache", "get", "__setitem__"),
        ("lru", "LRU", "get", "__setitem__"),
        ("cachebox", "LRUCache", "get", "insert"),
        ("cachebox", "LFUCache", "get", "insert"),
        ("theine", "Cache", "get", "set"),
        ("moka_py", "Moka", "get", "set"),
    ):
        kind = peer(module, name)
        if kind is None:
            print(f"{module} is not installed")
            continue
        store = kind(SIZE)
        yield f"{module}.{name}", getattr(store, get), getattr(store, put)


async def awaited(ask, arguments, number):
    started = perf_counter()
    for _ in range(number):
        await ask(*arguments)
    return (perf_counter() - started) / number


def calls():
    """Yield what is measured: kind, who, a function that returns the seconds of one call."""
    for name, get, put in stores():
        if put is not None:
            for key in KEYS:
                put(key, 1)
        one = {"get": get, "key": KEYS[-77], "keys": KEYS}
        yield "hit", name, lambda one=one: timeit("get(key)", globals=one, number=100_000) / 100_000
        yield (
            "hit, spread",
            name,
            lambda one=one: timeit("for key in keys: get(key)", globals=one, number=5) / 5 / SIZE,
        )
        if put is not None:
            new = {"put": put, "keys": FRESH}
            yield (
                "put that evicts",
                name,
                lambda new=new: timeit("for key in keys: put(key, 1)", globals=new, number=1) / len(FRESH),
            )
    same = {"cached": lru_cache(SIZE)(lambda key: 1), "key": KEYS[-77]}
    yield "hit", "functools.lru_cache", lambda: timeit("cached(key)", globals=same, number=100_000) / 100_000
    cache, table = Cache(SIZE), dict.fromkeys(KEYS, 1)
    cache.put_many((key, 1) for key in KEYS)
    many = {"cache": cache, "get": table.get, "batch": BATCH}
    yield (
        "get 64, each",
        "[dict.get ...]",
        lambda: timeit("[get(k) for k in batch]", globals=many, number=3000) / 192e3,
    )
    yield "get 64, each", "Cache", lambda: timeit("cache.get_many(batch)", globals=many, number=3000) / 192e3
    yield from awaitables(cache)


def awaitables(cache):
    yield (
        "awaited hit",
        "Cache.get_or_load",
        lambda: asyncio.run(awaited(cache.get_or_load, ("user-77", None), 20_000)),
    )
    alru_cache = peer("async_lru", "alru_cache")
    if alru_cache is None:
        print("async_lru is not installed")
        return

    async def load(key):
        return key

    yield "awaited hit", "async_lru", lambda: asyncio.run(awaited(alru_cache(SIZE)(load), ("user-77",), 20_000))


def measured():
    """Return {(kind, who): nanoseconds}, the best of rounds in which all take their turn."""
    todo, best = list(calls()), {}
    for _ in range(ROUNDS):
        for kind, who, run in todo:
            best[kind, who] = min(best.get((kind, who), float("inf")), run() * 1e9)
    return best


def sizes(cache, most):
    """Yield the bytes an entry takes as a cache grows whose bound does not tell how many it will hold."""
    for n in range(most):
        cache.put(n, n)
        if n >= 1000:
            yield cache.nbytes / len(cache)


def test_table(capsys):
    with capsys.disabled():
        found = measured()
        base = {"hit, spread": found["hit, spread", "dict"], "get 64, each": found["get 64, each", "[dict.get ...]"]}
        print(f"\n{'':18}{'':24}{'ns':>9}{'x dict.get':>12}")
        for (kind, who), spent in sorted(found.items(), key=lambda row: (row[0][0], row[1])):
            print(f"{kind:18}{who:24}{spent:9.1f}{spent / base.get(kind, found['hit', 'dict']):12.2f}")
        for bound in (1000, 10_000, 100_000):
            held = Cache(bound)
            held.put_many((n, n) for n in range(3 * bound))
            print(f"{'bytes an entry':18}{f'Cache, {bound:,}':24}{held.nbytes / len(held):9.1f}")
        worst = max(sizes(Cache(1e9), 100_000))
        print(f"{'bytes an entry':18}{'growing, at worst':24}{worst:9.1f}")


# ---- the same by pytest-benchmark, to compare revisions


def full():
    store = Cache(SIZE)
    store.put_many((key, 1) for key in KEYS)
    return store


def test_hit(benchmark):
    benchmark(full().get, KEYS[77])


def test_hit_with_ttl(benchmark):
    store = Cache(SIZE, ttl=3600)
    store.put("k", 1)
    benchmark(store.get, "k")


def test_put_that_evicts(benchmark):
    store, fresh = full(), count()
    benchmark(lambda: store.put(next(fresh), 1))


@pytest.mark.parametrize("most", [0, SIZE // 2])
def test_resize(benchmark, most):
    benchmark.pedantic(lambda store: store.resize(most), setup=lambda: ((full(),), {}), rounds=20)
