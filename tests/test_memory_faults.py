"""Memory under what goes wrong: damaged files, a full disk, two processes, cancellation at every await."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress
from functools import partial
from inspect import isasyncgen

import numpy as np
import pytest
from hashing import DIMENSION, HashEmbedder

from whisper_fast.errors import InvalidMessage, StoreCorrupt, StoreError, StoreFull, StoreLocked
from whisper_fast.memory import MemoryStore

TEXTS = [f"thing {i} of {i % 7} that was said on a day" for i in range(600)]


class Suspending(HashEmbedder):
    async def embed(self, texts):
        await asyncio.sleep(0)
        return super().embed(texts)


async def state(memory, user="ada"):
    return [item["text"] async for item in memory.export(user)]


async def consumed(call, memory):
    work = call(memory)
    return [item async for item in work] if isasyncgen(work) else await work


class CancelledAt:
    """Runs a coroutine and cancels it where it suspends for the `step`th time, as its task's cancel would.

    `reached` says whether there was such a step.
    """

    def __init__(self, coroutine, step):
        self._coroutine = coroutine
        self._left = step
        self.reached = False

    def __await__(self):
        steps = self._coroutine.__await__()
        resume = partial(steps.send, None)
        while True:
            try:
                awaited = resume()
            except StopIteration as end:
                return end.value
            if self._left == 0:
                self.reached = True
                if awaited is not None:
                    awaited._asyncio_future_blocking = False
                    awaited.cancel()
                resume = partial(steps.throw, asyncio.CancelledError())
            else:
                try:
                    yield awaited
                    resume = partial(steps.send, None)
                except BaseException as error:  # noqa: BLE001 - whatever was awaited raises it there
                    resume = partial(steps.throw, error)
            self._left -= 1


CALLS = {
    "add": lambda memory: memory.add("ada", "new"),
    "add_many": lambda memory: memory.add_many("ada", ["new 1", "new 2"]),
    "add_many of many": lambda memory: memory.add_many("ada", [f"new {i}" for i in range(400)]),
    "add_new": lambda memory: memory.add_new("ada", [{"text": "new", "source": "n"}]),
    "recall": lambda memory: memory.recall("ada", "thing 7"),
    "recall_many": lambda memory: memory.recall_many([("ada", "thing 7"), ("bob", "x"), ("ada", "thing 8")]),
    "delete": lambda memory: memory.delete("ada", 1),
    "forget": lambda memory: memory.forget("ada"),
    "export": lambda memory: memory.export("ada"),
    "warm": lambda memory: memory.warm("ada"),
    "settle": lambda memory: memory.settle(),
    "reembedded": lambda memory: memory.reembedded(),
}


@pytest.mark.parametrize("call", CALLS)
async def test_cancelled_at_any_await_it_leaves_all_or_nothing(tmp_path, call):
    for step in range(100):
        async with MemoryStore.open(tmp_path / str(step), Suspending()) as memory:
            await memory.add_many("ada", ["one", "two"])
            memory.clear_cache()
            cancelled = CancelledAt(consumed(CALLS[call], memory), step)
            with suppress(asyncio.CancelledError):
                await cancelled
            await memory.settle()
            held = await state(memory)
            assert held[:2] in (["one", "two"], ["two"], []), step
            assert len(held) in {0, 1, 2, 3, 4, 402}, "all or nothing"
            await memory.add("ada", "after")
            found = await memory.recall("ada", "after", k=1000)
            assert sorted(m.text for m in found) == sorted([*held, "after"]), "what is recalled is what is stored"
        if not cancelled.reached:
            return
    pytest.fail("the call never ended")


async def read(path):
    async with MemoryStore.open(path, HashEmbedder()) as memory:
        await state(memory)
        await memory.recall("ada", "thing")


async def test_a_store_cut_in_half_a_zeroed_page_and_random_bytes_are_named(tmp_path):
    async with MemoryStore.open(tmp_path / "whole.db", HashEmbedder()) as memory:
        await memory.add_many("ada", TEXTS * 3)
    raw = (tmp_path / "whole.db").read_bytes()
    assert len(raw) > 40 * 4096
    damaged = {
        "half": raw[: len(raw) // 2],
        "zeroed": raw[: 4096 * 8] + bytes(4096 * 24) + raw[4096 * 32 :],
        "random": np.random.default_rng(0).bytes(len(raw)),
        "header": bytes(100) + raw[100:],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.db"
        path.write_bytes(content)
        with pytest.raises(StoreCorrupt, match=name):
            await read(path)


async def test_a_disk_that_fills_during_add_many_keeps_nothing_of_it_and_goes_on(tmp_path):
    async with MemoryStore.open(tmp_path, HashEmbedder()) as memory:
        await memory.add("ada", "kept")
        await memory._database.write(lambda c: c.pragma("max_page_count", c.pragma("page_count") + 10))
        with pytest.raises(StoreFull):
            await memory.add_many("ada", TEXTS)
        assert await state(memory) == ["kept"]
        assert [m.text for m in await memory.recall("ada", "thing")] == ["kept"]
        await memory._database.write(lambda c: c.pragma("max_page_count", 1 << 30))
        assert len(await memory.add_many("ada", TEXTS)) == 600
        assert len(await memory.recall("ada", "thing", k=1000)) == 601


async def test_a_second_process_is_told_who_holds_the_store(tmp_path):
    async with MemoryStore.open(tmp_path, HashEmbedder()) as memory:
        await memory.add("ada", "kept")
        code = (
            "import asyncio, sys\n"
            "from whisper_fast.errors import StoreLocked\n"
            "from whisper_fast.memory import MemoryStore\n"
            "async def main():\n"
            "    async with MemoryStore.open(sys.argv[1]): pass\n"
            "try: asyncio.run(main())\n"
            "except StoreLocked as error: print(error)\n"
        )
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
        )
        assert "in use by process" in done.stdout, done.stderr
    assert issubclass(StoreLocked, StoreError)


async def test_an_embedder_that_gives_nan_for_one_text_stores_none_of_the_batch(tmp_path):
    class Sometimes(HashEmbedder):
        def embed(self, texts):
            rows = super().embed(texts)
            rows[[text == "bad" for text in texts]] = np.nan
            return rows

    async with MemoryStore.open(tmp_path, Sometimes()) as memory:
        with pytest.raises(InvalidMessage, match="not finite"):
            await memory.add_many("ada", ["good", "bad"])
        await memory.add("ada", "good")
        with pytest.raises(InvalidMessage, match="not finite"):
            await memory.recall("ada", "bad")
        assert await state(memory) == ["good"]
        assert np.isfinite(Sometimes().embed(["good"])).all()
        assert Sometimes.dimension == DIMENSION
