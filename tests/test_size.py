"""A value's deep size against what the allocator gave for it."""

import gc
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import quick, said

from whisper_fast import Engine, Settings
from whisper_fast.cache import Cache
from whisper_fast.door.metrics import leaves
from whisper_fast.size import deep_size

LEAVES = st.text(min_size=20, max_size=300) | st.binary(min_size=20, max_size=300) | st.floats(allow_nan=False)
VALUES = st.recursive(
    LEAVES | st.integers(1000, 3000).map(lambda n: np.arange(float(n))),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(min_size=20, max_size=40), inner, max_size=8),
    max_leaves=30,
)


def allocated(data):
    """Return what 20 copies of a pickled value take, and one of them."""
    gc.collect()  # which gives back what Python keeps for new dicts, lists and numbers
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        copies = [pickle.loads(data) for _ in range(20)]
        return tracemalloc.get_traced_memory()[0] - before, copies[0]
    finally:
        tracemalloc.stop()


@settings(max_examples=30, deadline=None)
@given(VALUES)
def test_it_is_what_was_allocated(value):
    pickle.loads(data := pickle.dumps(value))
    taken, copy = allocated(data)
    assert deep_size(copy) == pytest.approx(taken / 20, rel=0.05, abs=100)


def test_views_cycles_attributes_and_slots_count_once():
    array = np.zeros(10_000)
    assert deep_size([array, array[:10], array[5:]]) == pytest.approx(80_000, rel=0.02)
    endless = [b"x" * 1000]
    endless.append(endless)
    assert 1000 < deep_size(endless) < 1300

    class Slotted:
        __slots__ = ("text",)

    class Plain:
        pass

    for kind in (Slotted, Plain):
        thing = kind()
        thing.text = "x" * 5000
        assert 5000 < deep_size(thing) < 5600


def test_it_is_a_weigher():
    cache = Cache(10_000, weigher=deep_size)
    assert cache.put("k", {"vector": np.zeros(500)})
    assert 4000 < cache.weight < 4600
    assert not cache.put("heavy", b"x" * 20_000)


async def test_each_cache_of_an_engine_is_in_its_stats_and_metrics(tmp_path):
    options = Settings(data_dir=tmp_path, process_pool_size=1, thread_pool_size=2, component_deadline=30)
    async with Engine.open(options, llm=quick()) as engine:
        await engine.respond(said("ada", "hello"))
        await engine.memory.recall_many([("ada", "what did I say?")])
        stats = engine.stats()
        held = stats["budget"]["caches"]
        assert set(held) == {"segments", "indexes", "questions", "conversations"}
        assert held["questions"]["entries"] == 1
        assert 0 < held["questions"]["bytes"] <= held["questions"]["max_bytes"]
        assert {"budget_caches_questions_bytes", "budget_caches_conversations_table_bytes"} <= {
            path for path, _ in leaves(stats)
        }
