"""Memories on a real Chroma server, and a bot's collections brought from there into ours."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hashing import HashEmbedder

from whisper_fast.errors import InvalidMessage, SettingsError, StoreUnavailable
from whisper_fast.memory import MemoryStore, chroma
from whisper_fast.memory.intake import at, record, scope

pytest.importorskip("chromadb", reason="chromadb is not installed (pip install 'whisper-fast[chroma]')")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def program():
    import chromadb

    beside = Path(chromadb.__file__).parents[4] / "bin" / "chroma"
    found = str(beside) if beside.exists() else shutil.which("chroma")
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("chromadb is installed without its program `chroma`", pytrace=False)
    return found or pytest.skip("the program `chroma` is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    folder = tmp_path_factory.mktemp("chroma")
    command = [program(), "run", "--path", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "ANONYMIZED_TELEMETRY": "FALSE"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def wait_for(port):
    for _ in range(600):
        with closing(socket.socket()) as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("the Chroma server did not start")


@pytest.fixture
async def memory(server):
    async with MemoryStore.open(server, HashEmbedder()) as opened:
        yield opened
        for user in ("ada", "bob"):
            await opened.forget(user)


async def test_what_was_added_is_recalled_with_all_that_belongs_to_it(memory):
    number = await memory.add("ada", "My cat is called Turing", at=5.5, scope="global", metadata={"mood": ["calm"]})
    await memory.add_many("ada", ["I like tea", "It rained"])
    [found] = await memory.recall("ada", "My cat is called Turing", k=1)
    assert (found.id, found.text, found.at, found.scope, found.metadata) == (
        number, "My cat is called Turing", 5.5, "global", {"mood": ["calm"]},
    )  # fmt: skip
    assert found.score == pytest.approx(1, abs=1e-4), "a cosine, not one less a squared distance"
    assert await memory.recall("ada", "x", k=0) == []
    assert len(await memory.recall("ada", "x", k=100)) == 3


async def test_nobody_sees_another_user(memory):
    await asyncio.gather(
        *(memory.add_many(user, [f"secret of {user} {i}" for i in range(5)]) for user in ("ada", "bob"))
    )
    answers = await memory.recall_many([("bob", "secret"), ("nobody", "secret"), ("ada", "secret"), ("bob", "of")])
    assert [{m.text.split()[2] for m in found} for found in answers] == [{"bob"}, set(), {"ada"}, {"bob"}]
    [one, *_] = await memory.recall("bob", "secret")
    assert not await memory.delete("ada", one.id), "an id of another user is not there"


@pytest.mark.parametrize(
    ("asking", "seen"),
    [
        ("dm", {"dm", "global", "server:1/public", "server:2/public"}),
        ("server:1/private", {"global", "server:1/private", "server:1/public"}),
        ("server:1/public", {"global", "server:1/public"}),
        ("global", {"global"}),
    ],
)
async def test_a_memory_is_recalled_only_where_it_may_be_told(memory, asking, seen):
    scopes = ["dm", "global", "server:1/private", "server:1/public", "server:2/private", "server:2/public"]
    await memory.add_many("ada", [{"text": f"secret of {scope}", "scope": scope} for scope in scopes])
    assert {found.scope for found in await memory.recall("ada", "secret", scope=asking)} == seen


async def test_the_same_source_once_and_the_same_words_three_times(memory):
    item = {"text": "hello", "source": "m1"}
    ids = await memory.add_many("ada", [item, item])
    assert await memory.add_many("ada", [item]) == [ids[0]] == [ids[1]]
    assert len(set(await memory.add_many("ada", ["ok", "ok", "ok"]))) == 3
    assert len(await memory.recall("ada", "ok")) == 4


async def test_delete_forget_export_and_many(memory):
    full = {
        "text": "full",
        "scope": "dm",
        "at": 1.0,
        "speaker": "s",
        "session": "x",
        "metadata": {"a": 1},
        "source": "q",
    }
    ids = await memory.add_many("ada", [full, *(f"thing {i}" for i in range(1200))])
    exported = [item async for item in memory.export("ada")]
    assert len(exported) == 1201
    assert full in exported
    assert await memory.delete("ada", ids[0])
    assert not await memory.delete("ada", ids[0])
    await memory.forget("ada")
    assert [item async for item in memory.export("ada")] == []


async def test_bad_input_is_refused(memory):
    for call in (
        lambda: memory.add("", "x"),
        lambda: memory.add("ada", " "),
        lambda: memory.recall("ada", "x", k=-1),
    ):
        with pytest.raises(InvalidMessage):
            await call()
    with pytest.raises(InvalidMessage):
        await memory.delete("ada", "1")


async def test_requests_under_way_are_bounded(memory, monkeypatch):
    running, most = 0, 0
    query = memory._collection.query

    async def counted(**arguments):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await query(**arguments)
        finally:
            running -= 1

    monkeypatch.setattr(type(memory._collection), "query", lambda self, **arguments: counted(**arguments))
    await memory.recall_many([(f"user{i}", "x") for i in range(40)])
    assert 1 < most <= chroma.PARALLEL


async def test_nobody_there():
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(StoreUnavailable, match="does not answer"):
        async with MemoryStore.open(f"http://127.0.0.1:{port}", HashEmbedder()):
            pass
    with pytest.raises(SettingsError, match="folder"):
        async with MemoryStore.open("redis://127.0.0.1", HashEmbedder()):
            pass


# --- a bot's collections --------------------------------------------------------------------------------------------


def test_a_bots_memory_keeps_its_circle():
    closest = {"security_level": "private_dm", "server_id": "7"}
    assert scope(closest) == "dm"
    assert scope({"context_type": "public_channel", "server_id": "7"}) == "server:7/public"
    assert scope({"context_type": "private_channel", "server_id": "7"}) == "server:7/private"
    assert scope({"security_level": "cross_context_safe"}) == "global"
    assert scope({"server_id": "7"}) == "server:7/private", "what says nothing of itself stays in the closest circle"
    assert scope({"security_level": "public_channel"}) == "dm", "a public place without a server is none"
    assert at("2025-09-01T12:00:00+00:00") == 1756728000.0
    assert at("yesterday") is at(None) is at(True) is None
    assert record("global_facts", "k", "x", {})[0] == "global_facts"


@pytest.fixture
async def bot(server):
    async with chroma.Connection.open(server) as connection:
        client = connection.client
        memories = await client.get_or_create_collection("user_memories", embedding_function=None)
        await memories.add(
            ids=[f"m{i}" for i in range(1100)] + ["empty"],
            embeddings=[[1.0, 0.0]] * 1101,
            documents=[f"memory {i}" for i in range(1100)] + [" "],
            metadatas=[
                {"user_id": f"u{i % 3}", "context_type": "public_channel", "server_id": "7", "timestamp": 1e9 + i,
                 "security_level": "public_channel" if i % 2 else "private_dm"}
                for i in range(1101)
            ],
        )  # fmt: skip
        facts = await client.get_or_create_collection("global_facts", embedding_function=None)
        await facts.add(ids=["f"], embeddings=[[0.0, 1.0]], documents=["Water is wet"], metadatas=[{"kind": "fact"}])
        yield
        for name in ("user_memories", "global_facts"):
            await client.delete_collection(name)


async def imported(server, folder, *more):
    command = [sys.executable, "-m", "whisper_fast", "import", "chroma", "--url", server, "--data-dir", str(folder)]
    process = await asyncio.create_subprocess_exec(
        *command, "--json", *more, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return json.loads(out)


async def test_import_chroma_counts_stores_once_and_keeps_circles(server, bot, tmp_path):
    counts = {"read": 1102, "known": 0, "invalid": 1, "users": 4}
    dry = await imported(server, tmp_path, "--dry-run")
    assert dry == {"source": "chroma", "dry_run": True, "stored": 1101, **counts}
    first = await imported(server, tmp_path)
    assert first == {"source": "chroma", "dry_run": False, "stored": 1101, **counts}
    again = await imported(server, tmp_path)
    assert (again["stored"], again["known"]) == (0, 1101)
    async with MemoryStore.open(tmp_path) as memory:
        held = [item async for item in memory.export("u1")]
        assert len(held) == 367
        assert {item["scope"] for item in held} == {"dm", "server:7/public"}
        found = await memory.recall("u1", "memory 7", scope="server:7/public", k=100)
        assert {m.scope for m in found} == {"server:7/public"}
        assert [item["text"] async for item in memory.export("global_facts")] == ["Water is wet"]
