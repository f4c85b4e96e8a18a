"""Memory at its public face: what is stored is found, by its user alone, where it may be told, after any restart."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hashing import DIMENSION, HashEmbedder

from whisper_fast.errors import InvalidMessage, SettingsError, StoreError, StoreLocked
from whisper_fast.lab.locomo import conversations
from whisper_fast.memory import MemoryStore, Recalled, recalling
from whisper_fast.memory.scopes import may_see
from whisper_fast.store.sqlite import Database


@pytest.fixture
def embedder():
    return HashEmbedder()


@pytest.fixture
async def memory(tmp_path, embedder):
    async with MemoryStore.open(tmp_path, embedder) as opened:
        yield opened


async def texts(memory, user, query, **how):
    return [found.text for found in await memory.recall(user, query, **how)]


# --- what goes in comes out -------------------------------------------------------------------------------------


async def test_what_was_added_is_recalled_with_all_that_belongs_to_it(memory):
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    number = await memory.add("ada", "My cat is called Turing", scope="global", at=at, metadata={"mood": ["calm"]})
    [found] = await memory.recall("ada", "what is the cat called?")
    assert found == Recalled(
        number, "My cat is called Turing", found.score, at.timestamp(), "global", {"mood": ["calm"]}
    )


async def test_the_best_fit_comes_first(memory):
    await memory.add_many("ada", ["I like tea", "My sister plays the violin", "It rained all day", "Trains are late"])
    assert (await texts(memory, "ada", "who plays violin?", k=2))[0] == "My sister plays the violin"


async def test_ids_count_up_per_user_and_are_never_used_again(memory):
    assert await memory.add_many("ada", ["one", "two"]) == [1, 2]
    assert await memory.add("bob", "one") == 1
    await memory.delete("ada", 2)
    assert await memory.add("ada", "three") == 3


async def test_a_memory_without_a_time_was_told_now(memory):
    before = time.time()
    await memory.add("ada", "hello")
    [found] = await memory.recall("ada", "hello")
    assert before <= found.at <= time.time()


@pytest.mark.parametrize("place", ["folder", "file.db"])
async def test_memories_survive_a_restart(tmp_path, embedder, place):
    async with MemoryStore.open(tmp_path / place, embedder) as memory:
        await memory.add("ada", "My cat is called Turing")
    async with MemoryStore.open(str(tmp_path / place), embedder) as memory:
        assert await texts(memory, "ada", "cat") == ["My cat is called Turing"]
    assert (tmp_path / place).is_file() == (place == "file.db")


async def test_two_files_in_one_folder_are_two_stores_and_one_file_is_one(tmp_path, embedder):
    async with MemoryStore.open(tmp_path / "a.db", embedder) as a, MemoryStore.open(tmp_path / "b.db", embedder) as b:
        await a.add("ada", "in a")
        assert await b.recall("ada", "in a") == []
        with pytest.raises(StoreLocked):
            async with MemoryStore.open(tmp_path / "a.db", embedder):
                pass


async def test_the_same_words_three_times_are_three_memories(memory):
    assert await memory.add_many("ada", ["ok", "ok", "ok"]) == [1, 2, 3]
    assert await texts(memory, "ada", "ok") == ["ok", "ok", "ok"]


async def test_the_same_source_is_stored_once_per_user(memory):
    item = {"text": "hello", "source": "m1"}
    assert await asyncio.gather(*(memory.add_many("ada", [item, item]) for _ in range(5))) == [[1, 1]] * 5
    assert await memory.add_many("bob", [item]) == [1]
    assert await texts(memory, "ada", "hello") == ["hello"]
    memory.clear_cache()
    assert await texts(memory, "ada", "hello") == ["hello"]


async def test_what_follows_in_the_same_session_is_found_with_it(memory):
    filler = [{"text": f"filler {i}", "at": 50_000.0 * i, "session": str(i)} for i in range(20)]
    told = [
        {"text": "Which instrument does your grandmother play?", "at": 7.0, "session": "s"},
        {"text": "Harpsichord, since 1950", "at": 8.0, "session": "s"},
    ]
    await memory.add_many("ada", filler + told)
    found = await texts(memory, "ada", "instrument grandmother", k=2)
    assert found == [item["text"] for item in reversed(told)]  # what answers comes before what asks


async def test_half_an_hour_of_silence_ends_a_session(memory):
    times = {"near": 100.0, "far": 100.0 + 31 * 60}
    for user, at in times.items():
        filler = [{"text": f"filler {i}", "at": -50_000.0 * (30 - i)} for i in range(20)]
        await memory.add_many(user, [*filler, {"text": "grandmother", "at": 0.0}, {"text": "harpsichord", "at": at}])
    score = {user: (await memory.recall(user, "grandmother", vector=(), k=2))[1].score for user in times}
    assert score["near"] > 0 == score["far"]


# --- who may hear it ------------------------------------------------------------------------------------------------

SCOPES = ["dm", "global", "server:1/private", "server:1/public", "server:2/private", "server:2/public"]
SEEN = {
    "dm": {"dm", "global", "server:1/public", "server:2/public"},
    "global": {"global"},
    "server:1/private": {"global", "server:1/private", "server:1/public"},
    "server:1/public": {"global", "server:1/public"},
}


@pytest.mark.parametrize("asking", SEEN)
async def test_a_memory_is_recalled_only_where_it_may_be_told(memory, asking):
    await memory.add_many("ada", [{"text": f"secret of {scope}", "scope": scope} for scope in SCOPES])
    assert {found.scope for found in await memory.recall("ada", "secret", scope=asking)} == SEEN[asking]
    assert {told for told in SCOPES if may_see(asking, told)} == SEEN[asking]


async def test_the_scope_is_filtered_before_the_best_are_chosen(memory):
    await memory.add_many("ada", [{"text": "the dog barks", "scope": "dm"}] * 50)
    await memory.add_many("ada", [{"text": f"number {i}", "scope": "server:1/public"} for i in range(30)])
    for k in (20, 25, 26):
        assert len(await memory.recall("ada", "the dog barks", k=k, scope="server:1/public")) == k


async def test_no_user_sees_another_users_memories(memory):
    users = [f"user{i}" for i in range(20)]
    await asyncio.gather(*(memory.add_many(user, [f"secret {user} {i}" for i in range(5)]) for user in users))
    answers = await memory.recall_many([(user, "secret user7") for user in users], k=10)
    for user, found in zip(users, answers, strict=True):
        assert {memory.text.split()[1] for memory in found} == {user}
        assert len(found) == 5


async def test_a_user_id_is_not_a_pattern(memory):
    await memory.add("a%' OR 1=1 --", "mine")
    assert await memory.recall("a", "mine") == []
    assert await texts(memory, "a%' OR 1=1 --", "mine") == ["mine"]


# --- questions ------------------------------------------------------------------------------------------------------


async def test_a_user_without_memories_has_none(memory, embedder):
    assert await memory.recall("nobody", "anything") == []
    assert embedder.texts == []


async def test_k(memory):
    await memory.add_many("ada", [f"thing {i}" for i in range(30)])
    assert await memory.recall("ada", "thing", k=0) == []
    assert len(await memory.recall("ada", "thing", k=20)) == 20
    assert len(await memory.recall("ada", "thing", k=1000)) == 30


async def test_a_question_of_stop_words_is_answered_by_vectors(memory):
    await memory.add_many("ada", ["where were you", "who is it", "what do they do"])
    assert (await texts(memory, "ada", "who is it"))[0] == "who is it"


async def test_a_question_that_says_nothing_gets_the_newest(memory):
    await memory.add_many("ada", [{"text": f"thing {at}", "at": at} for at in (3, 9, 5)])
    assert await texts(memory, "ada", "", k=2) == ["thing 9", "thing 5"]


async def test_an_empty_vector_means_words_alone(memory, embedder):
    await memory.add_many("ada", ["red apple", "green pear"])
    embedder.texts.clear()
    assert (await texts(memory, "ada", "pears", vector=()))[0] == "green pear"
    assert embedder.texts == []


async def test_a_known_vector_is_used(memory, embedder):
    await memory.add_many("ada", ["red apple", "green pear"])
    assert (await texts(memory, "ada", "?", vector=embedder.vector("green pear")))[0] == "green pear"


async def test_recall_many_embeds_once_and_keeps_the_order(memory, embedder):
    for user in ("ada", "bob"):
        await memory.add(user, f"I am {user}")
    embedder.texts.clear()
    answers = await memory.recall_many([("bob", "who?"), ("nobody", "me?"), ("ada", "who?"), ("bob", "you?")], k=1)
    assert [[m.text for m in found] for found in answers] == [["I am bob"], [], ["I am ada"], ["I am bob"]]
    assert embedder.texts == ["who?", "me?", "you?"], "a question that many ask is embedded once"
    assert await memory.recall_many([]) == []


async def test_a_large_segment_is_asked_in_a_thread_with_the_same_answer(memory, monkeypatch):
    await memory.add_many("ada", [f"thing {i} of {i % 7}" for i in range(300)])
    inline = await memory.recall("ada", "thing 41")
    monkeypatch.setattr(recalling, "INLINE_ROWS", 10)
    assert await memory.recall("ada", "thing 41") == inline


async def test_questions_that_come_together_share_a_call_with_the_same_answers(memory):
    for user in ("ada", "bob"):
        await memory.add_many(user, [f"{user} has thing {i} of {i % 7}" for i in range(30)])
    asked = [(user, f"thing {i}") for i in range(20) for user in ("ada", "bob")]
    alone = [await memory.recall(*question) for question in asked]
    before = memory.stats()["recalling"]["calls"]
    assert await memory.recall_many(asked) == alone
    assert memory.stats()["recalling"]["calls"] - before == 3  # of at most sixteen


async def test_batching_switched_off_answers_each_question_alone(tmp_path, embedder):
    batching = True
    async with AsyncExitStack() as stack:
        database = await Database.open(tmp_path)
        stack.push_async_callback(database.close)
        memory = MemoryStore(database, embedder, batching=lambda: batching)
        stack.push_async_callback(memory.close)
        await memory.add_many("ada", ["red apple", "green pear"])
        asked = [("ada", "apple"), ("ada", "pear")]
        together = await memory.recall_many(asked)
        batching = False
        assert await memory.recall_many(asked) == together
        stats = memory.stats()["recalling"]
    assert (stats["batches"], stats["direct"]) == (1, 2)


async def test_who_stops_waiting_for_a_recall_disturbs_nobody(memory, monkeypatch):
    monkeypatch.setattr(recalling, "INLINE_ROWS", 10)
    await memory.add_many("ada", [f"thing {i}" for i in range(30)])
    expected = await memory.recall("ada", "thing 7")
    tasks = [asyncio.create_task(memory.recall("ada", "thing 7")) for _ in range(5)]
    for tick in range(4):
        await asyncio.sleep(0)
        tasks[tick].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[4] == expected
    assert memory.stats()["recalling"]["waiting"] == 0


# --- taking away ----------------------------------------------------------------------------------------------------


async def test_delete(memory):
    await memory.add_many("ada", ["red apple", "green pear"])
    assert await memory.delete("ada", 1)
    assert not await memory.delete("ada", 1)
    assert not await memory.delete("bob", 2)
    assert await texts(memory, "ada", "red apple") == ["green pear"]
    memory.clear_cache()
    assert await texts(memory, "ada", "red apple") == ["green pear"]


async def test_forget_takes_all_of_one_user_and_nothing_of_others(tmp_path, embedder):
    async with MemoryStore.open(tmp_path, embedder) as memory:
        for user in ("ada", "bob"):
            await memory.add_many(user, ["red apple", "green pear"])
        await memory.forget("ada")
        assert await memory.recall("ada", "apple") == []
        assert [item async for item in memory.export("ada")] == []
        assert len(await memory.recall("bob", "apple")) == 2
    async with MemoryStore.open(tmp_path, embedder) as memory:
        assert await memory.recall("ada", "apple") == []
        assert len(await memory.recall("bob", "apple")) == 2


async def test_what_is_exported_can_be_added_again(memory):
    await memory.add_many(
        "ada",
        [
            "plain",
            {"text": "full", "scope": "server:1/public", "at": 5.5, "speaker": "bot", "session": "s", "source": "m",
             "metadata": {"a": [1, None, "é"]}},
            *(f"thing {i}" for i in range(1200)),
        ],
    )  # fmt: skip
    exported = [item async for item in memory.export("ada")]
    assert len(exported) == 1202
    await memory.add_many("bob", exported)
    assert [item async for item in memory.export("bob")] == exported
    assert exported[1]["metadata"] == {"a": [1, None, "é"]}


# --- embedders ------------------------------------------------------------------------------------------------------


async def test_memories_of_another_embedder_are_embedded_again_once(tmp_path):
    async with MemoryStore.open(tmp_path, HashEmbedder("old")) as memory:
        await memory.add_many("ada", ["where were you", "who is it"])
    for seen in (["where were you", "who is it", "who is it"], ["who is it"]):
        new = HashEmbedder("new")
        async with MemoryStore.open(tmp_path, new) as memory:
            await memory.reembedded()
            assert (await texts(memory, "ada", "who is it", k=1)) == ["who is it"]
        assert new.texts == seen


async def test_an_async_embedder(tmp_path):
    class Asynchronous(HashEmbedder):
        async def embed(self, texts):
            await asyncio.sleep(0)
            return super().embed(texts)

    async with MemoryStore.open(tmp_path, Asynchronous()) as memory:
        await memory.add_many("ada", ["red apple", "green pear"])
        assert (await texts(memory, "ada", "pear"))[0] == "green pear"


async def test_the_embedder_that_comes_with_the_package(tmp_path):
    async with MemoryStore.open(tmp_path) as memory:
        await memory.add_many("ada", ["I adopted a puppy", "The meeting is on Monday", "My car broke down"])
        assert (await texts(memory, "ada", "pet dog"))[0] == "I adopted a puppy"


@pytest.mark.parametrize(
    "vectors",
    [
        np.full((1, DIMENSION), np.nan, np.float32),
        np.full((1, DIMENSION), np.inf, np.float32),
        np.zeros((1, DIMENSION + 1), np.float32),
        np.zeros((2, DIMENSION), np.float32),
        np.zeros(DIMENSION, np.float32),
        None,
        "vectors",
        [[1, 2], [3]],
    ],
    ids=str,
)
async def test_a_vector_that_cannot_be_is_refused_and_nothing_is_stored(memory, embedder, vectors):
    embedder.embed = lambda texts: vectors
    with pytest.raises(InvalidMessage, match="embedder hash"):
        await memory.add("ada", "hello")
    assert [item async for item in memory.export("ada")] == []


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    [
        "",
        " \n",
        None,
        7,
        b"bytes",
        ["list"],
        {},
        {"text": None},
        {"text": "x" * ((1 << 20) + 1)},
        {"text": "é" * (1 << 20)},
        {"text": "x", "scope": "everywhere"},
        {"text": "x", "scope": "server:1"},
        {"text": "x", "at": float("nan")},
        {"text": "x", "at": "yesterday"},
        {"text": "x", "at": True},
        {"text": "x", "metadata": ["list"]},
        {"text": "x", "metadata": {"o": object()}},
        {"text": "x", "metadata": {"big": "x" * 70_000}},
        {"text": "x", "session": ""},
        {"text": "x", "speaker": 5},
        {"text": "x", "source": "a\x00b"},
        {"text": "x", "colour": "red"},
    ],
    ids=lambda item: repr(item)[:40],
)
async def test_a_memory_that_cannot_be_is_refused_with_all_that_came_with_it(memory, item):
    with pytest.raises(InvalidMessage):
        await memory.add_many("ada", ["fine", item])
    assert [item async for item in memory.export("ada")] == []


@pytest.mark.parametrize("text", ["\ud800 lone", "a\x00b", "🎉🎉", "\u202e right to left", "x" * 100_000, "?!"])
async def test_strange_texts_are_stored_and_found(memory, text):
    await memory.add("ada", text)
    [found] = await memory.recall("ada", text)
    assert found.text == text.replace("\ud800", "\ufffd")


@pytest.mark.parametrize("user", ["", "u" * 10_000, "a\nb", "\ud800", None, 5])
async def test_a_user_that_cannot_be_is_refused_everywhere(memory, user):
    calls = [
        lambda: memory.add(user, "x"),
        lambda: memory.recall(user, "x"),
        lambda: memory.recall_many([(user, "x")]),
        lambda: memory.forget(user),
        lambda: memory.delete(user, 1),
        lambda: memory.warm(user),
        lambda: anext(memory.export(user)),
    ]
    for call in calls:
        with pytest.raises(InvalidMessage, match="user"):
            await call()


async def test_a_question_that_cannot_be_is_refused(memory):
    await memory.add("ada", "hello")
    wrong = [{"k": -1}, {"k": 1.5}, {"k": True}, {"scope": "everywhere"}, {"query": None}, {"vector": [1.0]}]
    for how in wrong:
        with pytest.raises(InvalidMessage):
            await memory.recall(**({"user": "ada", "query": "hello"} | how))
    with pytest.raises(InvalidMessage):
        await memory.delete("ada", "1")


async def test_a_servers_address_is_no_path(embedder):
    with pytest.raises(SettingsError, match="folder"):
        async with MemoryStore.open("redis://localhost", embedder):
            pass


async def test_what_the_disk_refuses_is_said_and_not_shown(memory):
    await memory.add("ada", "kept")
    limit = await memory._database.write(lambda c: c.pragma("page_count"))
    await memory._database.write(lambda c: c.pragma("max_page_count", limit))
    with pytest.raises(StoreError):
        await memory.add("ada", "x" * 900_000)
    await memory._database.write(lambda c: c.pragma("max_page_count", 1 << 30))
    assert await texts(memory, "ada", "kept") == ["kept"]
    await memory.add("ada", "kept again")
    assert len(await memory.recall("ada", "kept")) == 2


# --- the real thing -------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "locomo"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"there are no conversations in {DATA} (WHISPER_FAST_DATA)")
def test_locomos_evidence_is_found(tmp_path):
    async def shares():
        async with MemoryStore.open(tmp_path) as memory:
            for talk in conversations(DATA):
                ids = await memory.add_many(talk.name, talk.turns)
                sources = dict(zip(ids, (turn["source"] for turn in talk.turns), strict=True))
                answers = await memory.recall_many([(talk.name, question.text) for question in talk.questions])
                for question, found in zip(talk.questions, answers, strict=True):
                    yield question.recall(sources[memory.id] for memory in found)

    async def mean():
        found = [share async for share in shares()]
        return sum(found) / len(found)

    assert asyncio.run(mean()) >= 0.70
