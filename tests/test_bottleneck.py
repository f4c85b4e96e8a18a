"""Twelve causes, each injected into the real engine under load: the one that limits is named, at first place."""

from __future__ import annotations

import asyncio
import multiprocessing.resource_tracker
import time
from contextlib import asynccontextmanager, suppress

import apsw
import numpy as np
import pytest
from scripted import quick, said

from whisper_fast import Engine, Settings
from whisper_fast.errors import LLMRateLimited, WhisperFastError
from whisper_fast.llm import SimulatedLLM
from whisper_fast.monitor import finder
from whisper_fast.monitor.pressure import Gauge
from whisper_fast.store.sqlite import Database

MIB = 1 << 20
pytestmark = pytest.mark.one_loop


@pytest.fixture(scope="module", autouse=True)
def tracker():
    """Python's own resource tracker lives as long as the interpreter; start it before any test counts processes."""
    multiprocessing.resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def often(monkeypatch, request):
    """Readings of 0.4 s, so that a case needs no more than a second; in `make soak` they are as they are."""
    if not request.config.getoption("--soak"):
        monkeypatch.setattr(finder, "SECONDS", 0.4)
        monkeypatch.setattr(finder, "REST", 0.02)


class Disk(apsw.VFS):
    """A disk whose fsync takes so many seconds, for certain."""

    def __init__(self, name, seconds):
        self.seconds = seconds
        super().__init__(name, "")

    def xOpen(self, name, flags):  # noqa: N802 - SQLite's name
        return File(name, flags, self.seconds)


class File(apsw.VFSFile):
    def __init__(self, name, flags, seconds):
        self.seconds = seconds
        super().__init__("", name, flags)

    def xSync(self, flags):  # noqa: N802 - SQLite's name
        time.sleep(self.seconds)


def on(disk):
    """The engine, on such a disk."""

    class OnDisk(Database):
        @classmethod
        async def open(cls, folder, **options):
            return await super().open(folder, vfs=disk, **options)

    class EngineOnDisk(Engine):
        database = OnDisk

    return EngineOnDisk


Quick, Slow = on("quick-disk"), on("slow-disk")


@pytest.fixture(scope="module", autouse=True)
def disks():
    """What this machine's disk does at the moment is not what is tested."""
    made = Disk("quick-disk", 0.001), Disk("slow-disk", 0.1)
    yield
    for disk in made:
        disk.unregister()


@asynccontextmanager
async def load(engine, users=20, pause=0.0, text="I had a good day with my dog Byron"):
    """Users who write, wait for the answer, and write again, one after the other."""

    async def writes(user):
        while True:
            with suppress(WhisperFastError):
                await engine.respond(said(user, text))
            await asyncio.sleep(pause)

    tasks = [asyncio.create_task(writes(f"u{number}")) for number in range(users)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def named(engine, resource, seconds=10.0):
    """Wait until `resource` is at first place in two findings that follow each other; return the second."""
    seen, before = [], ""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                found = engine._finder.finding
                if found.at and (not seen or found.at != seen[-1].at):
                    seen.append(found)
                    if before == found.resource == resource:
                        return found
                    before = found.resource
                await asyncio.sleep(0.02)
    told = "\n".join(f"{one.resource} {[(b.resource, round(b.share, 2)) for b in one.ranking]}" for one in seen)
    raise AssertionError(f"{resource} was not named; found was:\n{told}")


@pytest.fixture
def settings(tmp_path):
    def make(**fields):
        usual = {"component_deadline": 30, "thread_pool_size": 4, "process_pool_size": 2, "feature_adaptive": False}
        usual["drain_seconds"] = 0.1  # what is left is the next start's
        return Settings(data_dir=tmp_path / "data", **{**usual, **fields})

    return make


async def test_a_slow_emotion(settings):
    async def emotion(_):
        await asyncio.sleep(0.3)
        return {"valence": 0.0}

    async with Quick.open(settings(), llm=SimulatedLLM(latency=0.05)) as engine:
        engine.component("emotion", emotion)
        async with load(engine):
            found = await named(engine, "component emotion")
    assert "emotion" in found.advice
    assert found.share > 0.5


async def test_a_slow_disk(settings):
    async with Slow.open(settings(), llm=quick()) as engine, load(engine):
        found = await named(engine, "disk")
    assert "WHISPER_FAST_DATA_DIR" in found.advice


async def test_a_slow_model(settings):
    model = SimulatedLLM(latency=0.3)
    async with Quick.open(settings(max_concurrent_requests=4), llm=model) as engine, load(engine):
        found = await named(engine, "llm simulated")
    assert "MAX_CONCURRENT_REQUESTS" in found.advice


class Rationed(SimulatedLLM):
    """A model that lets 10 calls a second through, and refuses the others."""

    def __init__(self):
        super().__init__(latency=0.05)
        self.next = 0.0

    async def chat(self, messages, **params):
        now = asyncio.get_running_loop().time()
        if now < self.next:
            raise LLMRateLimited("too many requests", status=429, retry_after=0.2)
        self.next = now + 0.1
        return await super().chat(messages, **params)


@pytest.mark.parametrize("adaptive", [False, True])
async def test_a_model_that_refuses_by_rate(settings, adaptive):
    async with Quick.open(settings(feature_adaptive=adaptive), llm=Rationed()) as engine, load(engine):
        found = await named(engine, "llm limit simulated")
    assert "WHISPER_FAST_LLM_FALLBACK_URLS" in found.advice


def naps(_):
    time.sleep(0.05)


async def test_too_few_threads(settings):
    async with Quick.open(settings(thread_pool_size=2), llm=quick()) as engine:
        engine.component("weather", naps)
        async with load(engine):
            found = await named(engine, "threads")
    assert "THREAD_POOL_SIZE" in found.advice


async def test_too_few_processes(settings):
    async with Quick.open(settings(process_pool_size=1), llm=quick()) as engine:

        async def weather(_):
            await engine._executor.run(time.sleep, 0.05, kind="process")

        engine.component("weather", weather)
        async with load(engine):
            found = await named(engine, "processes")
    assert "PROCESS_POOL_SIZE" in found.advice


async def test_a_cache_that_is_too_small(settings):
    async with Quick.open(settings(memory_cache_bytes=MIB), llm=quick()) as engine:
        for number in range(6):
            await engine.memory.add_many(f"u{number}", [f"memory {n} of the dog Byron" for n in range(4000)])
        async with load(engine, users=6):
            found = await named(engine, "cache recall")
    assert "WHISPER_FAST_MEMORY_CACHE_BYTES" in found.advice


async def test_one_user_who_floods(settings):
    model = SimulatedLLM(latency=0.05)
    async with Quick.open(settings(), llm=model) as engine, load(engine, users=10, pause=0.1):
        flood = [asyncio.create_task(engine.respond(said("flood", f"word {n}"))) for n in range(150)]
        found = await named(engine, "one user")
        for task in flood:
            task.cancel()
        await asyncio.wait(flood)
    assert "WHISPER_FAST_WHEN_BUSY" in found.advice


async def test_a_loop_that_a_users_component_blocks(settings):
    async def weather(_):
        time.sleep(0.06)

    async with Quick.open(settings(), llm=SimulatedLLM(latency=0.05)) as engine:
        engine.component("weather", weather)
        async with load(engine, users=8):
            found = await named(engine, "loop")
    assert "weather" in found.advice


async def test_memory_pressure(settings, tmp_path):
    root = tmp_path / "root"
    files = {
        "proc/self/statm": "900 100 50 1 0 80 0\n",
        "proc/self/cgroup": "0::/bot\n",
        "proc/self/mountinfo": "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/bot/memory.max": f"{512 * MIB}\n",
        "sys/fs/cgroup/bot/memory.current": f"{500 * MIB}\n",
        "sys/fs/cgroup/bot/memory.pressure": "some avg10=80.00 avg60=1.00 total=9\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    async with Quick.open(settings(feature_adaptive=True), llm=SimulatedLLM(latency=0.05)) as engine:
        engine._budget._gauge = Gauge(root)
        async with load(engine, pause=0.05):
            found = await named(engine, "memory")
    assert "WHISPER_FAST_MEMORY_BUDGET" in found.advice


class FarEmbedder:
    """An embedder behind a network."""

    name, dimension = "far", 4

    async def embed(self, texts):
        await asyncio.sleep(0.2)
        return np.ones((len(texts), 4), np.float32)


async def test_a_linger_that_is_too_long(settings):
    slow = settings(batch_timeout_ms=5000, batch_size=2)
    async with Quick.open(slow, llm=quick(), embedder=FarEmbedder()) as engine, load(engine):
        found = await named(engine, "batch embedding")
    assert "BATCH_TIMEOUT_MS" in found.advice


def computes(_):
    until = time.thread_time() + 0.03
    while time.thread_time() < until:
        sum(range(1000))


async def test_a_component_that_holds_the_interpreter(settings):
    async with Quick.open(settings(thread_pool_size=8), llm=quick()) as engine:
        engine.component("weather", computes)
        async with load(engine):
            found = await named(engine, "interpreter")
    assert "process" in found.advice
