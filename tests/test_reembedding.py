"""A change of the embedder: recall goes on, never over two embedders' vectors, and a restart takes it up."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest
from hashing import DIMENSION, HashEmbedder

from whisper_fast.errors import InvalidMessage, LLMUnavailable
from whisper_fast.memory import MemoryStore, reembedding
from whisper_fast.memory.embedding import pack
from whisper_fast.models.embedder import StaticEmbedder


class Gated(HashEmbedder):
    """Embeds memories only as far as it is allowed to; questions always."""

    def __init__(self, name, allowed=0):
        super().__init__(name)
        self.allowed = asyncio.Semaphore(allowed)
        self.calls = 0

    async def embed(self, texts):
        if len(texts) > 1:
            await self.allowed.acquire()
        self.calls += 1
        return super().embed(texts)


async def fill(folder, embedder, users=3, each=40):
    async with MemoryStore.open(folder, embedder) as memory:
        for user in range(users):
            await memory.add_many(f"u{user}", [f"thing {i} of user {user}" for i in range(each)])


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def current(memory, user):
    """How many of a user's memories are held with a vector of the present embedder."""
    segment = await memory._segment(user)
    return sum(any(segment._rows.packed(row)[0]) for row in range(len(segment)))


async def test_recall_goes_on_with_words_and_with_what_is_embedded_already(tmp_path):
    await fill(tmp_path, HashEmbedder("old"))
    new = Gated("new")
    async with MemoryStore.open(tmp_path, new) as memory:
        await until(lambda: memory.stats()["reembedding"]["total"] == 120)
        assert (await memory.recall("u2", "thing 7 of user 2", k=1))[0].text == "thing 7 of user 2"
        assert await current(memory, "u0") == 0, "a vector of the old embedder is never compared"
        new.allowed.release()
        await until(lambda: memory.stats()["reembedding"]["done"] == reembedding.BATCH)
        assert await current(memory, "u0") == reembedding.BATCH
        assert (await memory.recall("u0", "thing 39 of user 0", k=1))[0].text == "thing 39 of user 0"
        for _ in range(10):
            new.allowed.release()
        assert (await memory.reembedded()) == {"total": 120, "done": 120, "refused": 0, "running": False}
        assert [await current(memory, f"u{user}") for user in range(3)] == [40, 40, 40]


async def test_a_restart_in_the_middle_goes_on_with_what_is_left(tmp_path):
    await fill(tmp_path, HashEmbedder("old"))
    async with MemoryStore.open(tmp_path, Gated("new", allowed=2)) as memory:
        await until(lambda: memory.stats()["reembedding"]["done"] == 2 * reembedding.BATCH)
    async with MemoryStore.open(tmp_path, Gated("new", allowed=10)) as memory:
        done = await memory.reembedded()
        assert done["total"] == done["done"] == 120 - 2 * reembedding.BATCH
    same = HashEmbedder("new")
    async with MemoryStore.open(tmp_path, same) as memory:
        assert (await memory.reembedded())["total"] == 0
    assert same.texts == []


async def test_another_dimension_under_the_same_name(tmp_path):
    class Wider(HashEmbedder):
        dimension = 2 * DIMENSION

        def embed(self, texts):
            rows = super().embed(texts)
            return np.concatenate([rows, rows], axis=1) / np.float32(2**0.5)

    await fill(tmp_path, HashEmbedder("same"))
    async with MemoryStore.open(tmp_path, Wider("same")) as memory:
        await memory.add("u0", "a new one before the end")
        assert (await memory.reembedded())["done"] == 120
        assert await current(memory, "u0") == 41
        assert (await memory.recall("u0", "new one", k=1))[0].text == "a new one before the end"


async def test_what_is_deleted_meanwhile_stays_deleted(tmp_path):
    await fill(tmp_path, HashEmbedder("old"), users=1)
    new = Gated("new")
    async with MemoryStore.open(tmp_path, new) as memory:
        await until(lambda: memory.stats()["reembedding"]["total"] == 40)
        await memory.delete("u0", 3)
        await memory.forget("u1")
        for _ in range(3):
            new.allowed.release()
        await memory.reembedded()
        assert 3 not in [m.id for m in await memory.recall("u0", "thing", k=100)]


class Failing(HashEmbedder):
    """Raises `error` for as long as it is set."""

    error = None

    def embed(self, texts):
        if self.error is not None and (error := self.error(texts)) is not None:
            raise error
        return super().embed(texts)


async def test_a_memory_whose_embedder_does_not_answer_is_stored_and_embedded_later(tmp_path, monkeypatch):
    monkeypatch.setattr(reembedding, "FIRST_PAUSE", 0.01)
    embedder = Failing()
    async with MemoryStore.open(tmp_path, embedder) as memory:
        embedder.error = lambda texts: LLMUnavailable("nobody there")
        number = await memory.add("ada", "my harpsichord")
        assert [m.id for m in await memory.recall("ada", "harpsichord", vector=())] == [number]
        embedder.error = None
        assert (await memory.reembedded())["done"] == 1
        assert await current(memory, "ada") == 1


async def test_a_text_that_the_embedder_refuses_is_left_and_counted(tmp_path, caplog):
    await fill(tmp_path, HashEmbedder("old"), users=1)
    embedder = Failing("new")
    embedder.error = lambda texts: InvalidMessage("no") if any("thing 7 " in text for text in texts) else None
    with caplog.at_level(logging.INFO):
        async with MemoryStore.open(tmp_path, embedder) as memory:
            done = await memory.reembedded()
            assert (done["done"], done["refused"]) == (39, 1)
            assert (await memory.recall("u0", "thing 7", k=1, vector=()))[0].text == "thing 7 of user 0"
    assert "thing 7" not in caplog.text


async def test_other_errors_of_an_embedder_are_the_callers(tmp_path):
    embedder = Failing()
    embedder.error = lambda texts: RuntimeError("broken")
    async with MemoryStore.open(tmp_path, embedder) as memory:
        with pytest.raises(RuntimeError, match="broken"):
            await memory.add("ada", "x")
        assert [item async for item in memory.export("ada")] == []


async def test_a_question_asked_again_is_not_embedded_again(tmp_path):
    embedder = HashEmbedder()
    async with MemoryStore.open(tmp_path, embedder) as memory:
        await memory.add("ada", "red apple")
        await memory.add("bob", "green pear")
        embedder.texts.clear()
        first = await memory.recall("ada", "apple?")
        assert await memory.recall("ada", "apple?") == first
        assert (await memory.recall("bob", "apple?"))[0].text == "green pear"
        assert embedder.texts == ["apple?"]


def test_packed_vectors_keep_their_length_of_one():
    vectors = StaticEmbedder().embed(["my cat sleeps"])
    [vector] = pack(vectors)
    assert np.linalg.norm(np.frombuffer(vector.packed, np.int8) * vector.scale) == pytest.approx(1, abs=0.02)
