"""Millions of operations in a fresh process: references come back, and memory stays as it was."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CHILD = """
import asyncio, gc, json, random, sys
import psutil
from whisper_fast.cache import Cache

class Value:
    pass

shared, marker = Value(), "a key that comes again and again"
cache = Cache(5_000, ttl=3600, on_evict=lambda key, value: None)
many = [f"key-{n}" for n in range(12_000)]

async def load(key):
    if key == many[0]:
        raise LookupError(key)
    return shared

async def ask():
    for key in many[:50]:
        try:
            await cache.get_or_load(key, load)
        except LookupError:
            pass

def work(operations):
    rng, at = random.Random(1), 0
    while at < operations:
        key = many[min(int(rng.expovariate(1 / 3000)), 11_999)]
        if cache.get(key) is None:
            cache.put(key, Value())
        cache.put(marker, shared)
        at += 3
        if at % 999 == 0:
            start = rng.randrange(11_000)
            cache.get_many(many[start:start + 64])
            cache.put_many({k: shared for k in many[start:start + 64]}, ttl=rng.choice([0, 10]))
            cache.pop(key)
            at += 129
        if at % 99_900 == 0:
            asyncio.run(ask())
            cache.resize(rng.choice([0, 100]))
            cache.resize(5_000)
    cache.clear()
    gc.collect()
    return sys.getrefcount(shared), sys.getrefcount(marker), psutil.Process().memory_info().rss

operations = int(sys.argv[1])
print(json.dumps([work(max(operations // 5, 300_000)), work(operations)]))
"""


@pytest.mark.parametrize("operations", [300_000, pytest.param(10_000_000, marks=pytest.mark.soak)])
def test_references_and_memory_stay_flat(operations):
    ran = subprocess.run([sys.executable, "-c", CHILD, str(operations)], capture_output=True, text=True, check=True)
    before, after = json.loads(ran.stdout)
    assert after[:2] == before[:2]
    assert after[2] < before[2] + 2**20
