"""The approximate index: it finds what the exact scan finds, never tells what may not be told, never runs damaged."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hashing import DIMENSION, HashEmbedder

from whisper_fast.errors import StoreCorrupt
from whisper_fast.memory import MemoryStore, rows
from whisper_fast.memory.index import Content, Index
from whisper_fast.memory.indexing import Indexing
from whisper_fast.store.sqlite import Database

pytest.importorskip(
    "hnswlib", reason="hnswlib is not installed (HNSWLIB_NO_NATIVE=1 pip install 'whisper-fast[hnsw]')"
)


def made(count, seed=0, first=1, dimension=DIMENSION):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(count, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scale = np.abs(vectors).max(axis=1) / 127
    packed = np.rint(vectors / scale[:, None]).astype(np.int8)
    return Content("hash", np.arange(first, first + count), packed, scale.astype(np.float32))


def recall(index, vectors, ids, queries, k=10):
    """The share of each query's true k nearest, as many as there are, that the index returns."""
    shares = []
    for query in queries:
        best = set(ids[np.argsort(-(vectors @ query))[:k]].tolist())
        found, _ = index.search(query, k)
        shares.append(len(best & set(found.tolist())) / len(best))
    return float(np.mean(shares))


# --- the index itself -----------------------------------------------------------------------------------------------


def test_it_finds_what_is_near_with_its_cosine():
    content = made(2000)
    index = Index.built(content)
    vectors = content.vectors()
    ids, cosines = index.search(vectors[77], 10)
    assert ids[0] == 78
    assert cosines == pytest.approx(vectors[ids - 1] @ vectors[77], abs=1e-5)
    assert recall(index, vectors, content.ids, made(50, seed=9).vectors()) >= 0.98
    assert len(index) == 2000
    assert index.holds(content)


def test_none_one_and_more_than_there_is():
    assert len(Index.built(made(0)).search(np.ones(DIMENSION, np.float32), 10)[0]) == 0
    index = Index.built(made(1))
    assert index.search(np.ones(DIMENSION, np.float32), 10)[0].tolist() == [1]


def test_what_is_removed_is_never_found_and_many_removals_ask_for_a_new_index():
    content = made(500)
    index = Index.built(content)
    for number in range(1, 101):
        index.remove(number)
        index.remove(number)
    assert not index.worn
    index.remove(101)
    index.remove(102)
    index.remove(9999)
    assert not set(index.search(content.vectors()[50], 398)[0].tolist()) & set(range(1, 103))
    for number in range(103, 140):
        index.remove(number)
    assert index.worn


def test_what_was_removed_does_not_come_back_by_being_added():
    content = made(50)
    index = Index.built(content)
    index.remove(7)
    index.add(content.ids.tolist(), content.vectors())
    assert len(index) == 49
    assert 7 not in index.search(content.vectors()[6], 49)[0]


def mixed(operations, size, seed=0):
    """Random additions and removals, rebuilt when worn; return the recall at its end, and its lowest on the way."""
    draw = random.Random(seed)
    everything = made(size + operations, seed)
    vectors = everything.vectors()
    queries = made(100, seed + 1).vectors()
    alive = list(range(size))
    index = Index.built(Content("hash", everything.ids[:size], everything.packed[:size], everything.scale[:size]))
    following, shares = size, []
    for step in range(1, operations + 1):
        if draw.random() < 0.5:
            index.add([following + 1], vectors[following : following + 1])
            alive.append(following)
            following += 1
        else:
            place = draw.randrange(len(alive))
            alive[place], alive[-1] = alive[-1], alive[place]
            index.remove(alive.pop() + 1)
        if index.worn:
            held = np.array(sorted(alive))
            index = Index.built(Content("hash", held + 1, everything.packed[held], everything.scale[held]))
        if step % max(operations // 10, 1) == 0:
            held = np.array(alive)
            shares.append(recall(index, vectors[held], held + 1, queries))
    return shares


def test_recall_holds_over_mixed_operations():
    assert min(mixed(4_000, 1_000)) >= 0.98


@pytest.mark.soak
def test_recall_holds_over_a_million_mixed_operations():
    shares = mixed(1_000_000, 5_000)
    sys.stdout.write(f"\nrecall@10 after each 100,000 operations: {[round(share, 4) for share in shares]}\n")
    assert min(shares) >= 0.98


def test_readers_and_a_writer_never_meet():
    content = made(3000)
    index = Index.built(made(1000))
    vectors, stop, answered, refused = content.vectors(), threading.Event(), [], []

    def read(seed):
        draw = np.random.default_rng(seed)
        while not stop.is_set():
            found = index.search(vectors[draw.integers(3000)], 10)
            (refused if found is None else answered).append(1)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for first in range(1000, 3000, 50):
        index.add(content.ids[first : first + 50].tolist(), vectors[first : first + 50])
        index.remove(first - 500)
    stop.set()
    for reader in readers:
        reader.join()
    assert answered
    assert len(index) == 2960


# --- its file -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    content = made(300)
    path = tmp_path_factory.mktemp("indexes") / "one.hnsw"
    Index.built(content).save(path, content.stamp())
    return path, content


def test_what_was_written_is_read_again(kept):
    path, content = kept
    index = Index.loaded(path, content)
    query = content.vectors()[5]
    assert index.search(query, 10)[0].tolist() == Index.built(content).search(query, 10)[0].tolist()
    index.add([301], made(1, seed=5).vectors())
    assert len(index) == 301
    assert [p.name for p in path.parent.iterdir()] == ["one.hnsw"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "other",
    [
        made(299),
        made(301),
        made(300, seed=1),
        made(300, first=2),
        made(300, dimension=DIMENSION * 2),
        Content("other", *(getattr(made(300), name) for name in ("ids", "packed", "scale"))),
    ],
    ids=["fewer", "more", "other vectors", "other ids", "another dimension", "another embedder"],
)
def test_a_file_of_anything_else_is_not_used(kept, other):
    with pytest.raises(StoreCorrupt, match="other memories"):
        Index.loaded(kept[0], other)


def damaged(raw, draw):
    """Cut, flip a bit, swap two pages, zero a page, or make it random."""
    raw, kind = bytearray(raw), draw.randrange(5)
    page = draw.choice((64, 512, 4096))
    one, two = (draw.randrange(max(len(raw) - page, 1)) for _ in "12")
    if kind == 0:
        return raw[: draw.randrange(len(raw))]
    if kind == 1:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        raw[one : one + page], raw[two : two + page] = raw[two : two + page], raw[one : one + page]
    elif kind == 3:
        raw[one : one + page] = bytes(page)
    else:
        raw = bytearray(draw.randbytes(draw.randrange(2 * len(raw))))
    return raw


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_index import Index, StoreCorrupt, damaged, made
import random
draw, content, folder = random.Random(int(sys.argv[4])), made(300), Path(sys.argv[3])
raw = Path(sys.argv[2]).read_bytes()
target, refused, same = folder / "damaged.hnsw", 0, 0
for _ in range(int(sys.argv[5])):
    bad = damaged(raw, draw)
    if bytes(bad) == raw:
        same += 1
        continue
    target.write_bytes(bad)
    try:
        Index.loaded(target, content)
    except StoreCorrupt:
        refused += 1
print(refused, same)
"""


def refusals(path, folder, count, seed):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(path), str(folder), str(seed), str(count)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    refused, same = map(int, done.stdout.split())
    assert refused + same == count
    return refused


def test_damaged_files_are_refused_without_a_crash(kept, tmp_path):
    assert refusals(kept[0], tmp_path, 300, 0) > 250


@pytest.mark.soak
def test_ten_thousand_damaged_files(kept, tmp_path):
    assert refusals(kept[0], tmp_path, 10_000, 1) > 9_900


# --- through the store ----------------------------------------------------------------------------------------------


@pytest.fixture
async def database(tmp_path):
    opened = await Database.open(tmp_path)
    yield opened
    await opened.close()


@pytest.fixture
async def memory(database):
    store = MemoryStore(database, HashEmbedder(), ann_rows=200)
    yield store
    await store.close()


async def ready(memory):
    """Wait until no index is being worked at."""
    while tasks := list(memory._indexing._work.values()):
        await asyncio.wait(tasks)
    return memory.stats()["index"]


def told(count, scope="dm"):
    return [{"text": f"thing {i} of {i % 17} in {i % 29}", "scope": scope, "at": 1e6 * i} for i in range(count)]


async def test_below_the_size_there_is_none_and_above_it_comes_at_the_first_recall(memory):
    await memory.add_many("ada", told(199))
    await memory.recall("ada", "thing 7")
    assert (await ready(memory))["held"] == 0
    await memory.add("ada", "one more")
    exact = await memory.recall("ada", "thing 7 of 7")
    assert (await ready(memory))["built"] == 1
    found = await memory.recall("ada", "thing 7 of 7")
    assert [m.id for m in found][:5] == [m.id for m in exact][:5]


async def test_growth_and_deletion_are_followed(memory):
    await memory.add_many("ada", told(300))
    await memory.recall("ada", "x")
    await ready(memory)
    number = await memory.add("ada", "the harpsichord of grandmother")
    assert (await memory.recall("ada", "harpsichord grandmother"))[0].id == number
    await ready(memory)
    assert memory._indexing.of("ada", 301).highest == number
    assert (await memory.recall("ada", "harpsichord grandmother"))[0].id == number
    await memory.delete("ada", number)
    assert number not in [m.id for m in await memory.recall("ada", "harpsichord grandmother")]
    await ready(memory)
    assert len(memory._indexing.of("ada", 300)) == 300


async def test_the_scope_is_filtered_before_the_best_are_chosen(memory):
    await memory.add_many("ada", told(600))
    await memory.add_many("ada", told(30, "server:1/public"))
    await memory.recall("ada", "x")
    await ready(memory)
    for k in (5, 20, 30):
        found = await memory.recall("ada", "thing 7 of 7", k=k, scope="server:1/public")
        assert [m.scope for m in found] == ["server:1/public"] * k


async def test_forget_takes_the_file_too(memory, database):
    await memory.add_many("ada", told(300))
    await memory.recall("ada", "x")
    await ready(memory)
    assert len(list((database.folder / "indexes").iterdir())) == 1
    await memory.forget("ada")
    assert not list((database.folder / "indexes").iterdir())
    assert await memory.recall("ada", "thing") == []
    assert "ada" not in str(memory._indexing._path("ada"))


async def test_a_restart_loads_the_file_and_a_damaged_one_is_made_anew(database):
    for damage in ("new", "none", "bit", "random", "cut"):
        memory = MemoryStore(database, HashEmbedder(), ann_rows=200)
        if damage == "new":
            await memory.add_many("ada", told(300))
        else:
            [path] = (database.folder / "indexes").iterdir()
            raw = bytearray(path.read_bytes())
            raw[100] ^= 4 if damage == "bit" else 0
            path.write_bytes({"random": b"\x01" * 5000, "cut": raw[:700]}.get(damage, raw))
        await memory.recall("ada", "thing 3")
        counts = await ready(memory)
        expected = {"new": (1, 0, 0), "none": (0, 1, 0)}.get(damage, (1, 0, 1))
        assert (counts["built"], counts["loaded"], counts["refused"]) == expected, damage
        assert (await memory.recall("ada", "thing 3 of 3 in 3"))[0].text == "thing 3 of 3 in 3"
        await memory.close()


async def test_the_flag_works_live_and_without_hnswlib_all_is_exact(database, monkeypatch):
    on = False
    memory = MemoryStore(database, HashEmbedder(), ann=lambda: on, ann_rows=200)
    await memory.add_many("ada", told(300))
    exact = await memory.recall("ada", "thing 7 of 7")
    assert not memory._indexing._work
    on = True
    await memory.recall("ada", "thing 7")
    assert (await ready(memory))["held"] == 1
    monkeypatch.setattr(memory._indexing, "_installed", False)
    assert await memory.recall("ada", "thing 7 of 7") == exact
    await memory.close()


async def test_what_changes_while_it_is_built_is_in_it(memory, database, monkeypatch):
    await memory.add_many("ada", told(300))
    begun, go_on = threading.Event(), threading.Event()
    build = Index.built

    def slow(content):
        begun.set()
        go_on.wait(10)
        return build(content)

    monkeypatch.setattr(Index, "built", slow)
    await memory.recall("ada", "x")
    await asyncio.to_thread(begun.wait, 10)
    added = await memory.add("ada", "harpsichord")
    await memory.delete("ada", 5)
    assert (await memory.recall("ada", "harpsichord"))[0].id == added, "exact search answers meanwhile"
    go_on.set()
    await ready(memory)
    content = await database.read(partial(rows.content, user="ada", embedder=HashEmbedder()))
    assert memory._indexing.of("ada", 300).holds(content)


async def test_closing_in_the_middle_of_a_build_leaves_nothing(database):
    memory = MemoryStore(database, HashEmbedder(), ann_rows=200)
    await memory.add_many("ada", told(300))
    await memory.recall("ada", "x")
    await memory.close()
    assert memory.stats()["index"]["at_work"] == 0
    assert isinstance(memory._indexing, Indexing)
