"""The promises, at the engine's face: nothing lost, nothing twice, in order, nobody sees another's, never blocked."""

import asyncio
import subprocess
import sys
import time

import pytest
from hashing import HashEmbedder
from scripted import ScriptedLLM, quick, said

from whisper_fast import Engine, Settings
from whisper_fast.errors import (
    Closed,
    InvalidMessage,
    LLMError,
    LLMUnavailable,
    Overloaded,
    SettingsError,
    StoreFull,
)
from whisper_fast.lab.audit import audit
from whisper_fast.llm import LLMPool, SimulatedLLM
from whisper_fast.llm.completion import Completion


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2, component_deadline=30)


async def test_the_first_answer_and_all_that_belongs_to_it(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        reply = await engine.respond(said("ada", "I love my new dog Byron!", id="m1"))
        assert "Byron" in reply.text
        assert reply.emotion["valence"] > 0.3
        assert reply.partial == ()
        assert {"journal", "lane", "emotion", "embedding", "recall", "conversation", "llm", "total"} <= set(
            reply.timings
        )
        again = await engine.respond(said("ada", "What is my dog called?"))
        assert [memory.text for memory in again.memories] == ["I love my new dog Byron!"]


async def test_memory_and_conversation_survive_a_restart(settings):
    llm = ScriptedLLM(lambda messages: f"{len(messages)} messages")
    for n in range(3):
        async with Engine.open(settings, llm=llm) as engine:
            await engine.respond(said("ada", f"sentence {n}"))
    last = [(message["role"], message["content"]) for message in llm.asked[-1][1:]]
    assert last == [
        ("user", "sentence 0"), ("assistant", "2 messages"),
        ("user", "sentence 1"), ("assistant", "4 messages"),
        ("user", "sentence 2"),
    ]  # fmt: skip


async def test_redelivery_gives_the_same_answer_and_asks_once(settings):
    gate = asyncio.Event()

    async def answer(_):
        await gate.wait()
        return f"answer {len(llm.asked)}"

    llm = ScriptedLLM(answer)
    async with Engine.open(settings, llm=llm) as engine:
        message = said("ada", "hello", id="same")
        waiting = [asyncio.ensure_future(engine.respond(message)) for _ in range(5)]
        await asyncio.sleep(0.02)
        gate.set()
        replies = await asyncio.gather(*waiting)
        replies.append(await engine.respond(message))
        other = await engine.respond(said("bob", "hello", id="same"))
    async with Engine.open(settings, llm=llm) as engine:
        replies.append(await engine.respond(message))
    assert {reply.text for reply in replies} == {"answer 1"}
    assert other.text == "answer 2"
    assert len(llm.asked) == 2


async def test_a_thousand_messages_of_a_hundred_users_never_mix(settings):
    async with Engine.open(settings, llm=SimulatedLLM(latency=0.002)) as engine:
        users = [f"user{n}" for n in range(100)]
        words = {user: f"canary{user}x" for user in users}
        feelings = {user: ("I love this", "I hate this")[n % 2] for n, user in enumerate(users)}
        messages = [said(u, f"{feelings[u]}, {words[u]} number {n}", id=f"{u}-{n}") for n in range(10) for u in users]
        replies = await asyncio.gather(*map(engine.respond, messages))
    for message, reply in zip(messages, replies, strict=True):
        assert reply.id == message.id
        everything = repr(reply)
        assert words[message.user] in reply.text
        assert not [user for user in users if user != message.user and words[user] in everything]
        assert (reply.emotion["valence"] > 0) == message.text.startswith("I love")


async def test_one_users_messages_are_answered_in_order(settings):
    llm = ScriptedLLM(lambda messages: messages[-1]["content"].upper())
    async with Engine.open(settings, llm=llm) as engine:
        tickets = [await engine.submit(said("ada", f"n{n}")) for n in range(20)]
        await asyncio.gather(*(ticket.reply() for ticket in tickets))
    assert [messages[-1]["content"] for messages in llm.asked] == [f"n{n}" for n in range(20)]
    assert llm.asked[-1][-2]["content"] == "N18"  # each turn saw the one before


async def test_streams_give_every_piece_and_then_the_reply(settings):
    async with Engine.open(settings, llm=SimulatedLLM(latency=0.005)) as engine:
        stream = engine.stream(said("ada", "tell me something", id="s"))
        pieces = [piece async for piece in stream]
        assert len(pieces) > 1
        assert "".join(pieces) == stream.reply.text
        again = engine.stream(said("ada", "tell me something", id="s"))
        assert "".join([piece async for piece in again]) == stream.reply.text


async def test_a_caller_that_goes_away_loses_nothing(settings):
    async with Engine.open(settings, llm=SimulatedLLM(latency=0.02)) as engine:
        stream = engine.stream(said("ada", "I have a cat", id="gone"))
        await anext(stream)
        await stream.aclose()
        task = asyncio.ensure_future(engine.respond(said("ada", "and a parrot", id="gone too")))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.respond(said("ada", "I have a cat", id="gone"))).id == "gone"
        assert (await engine.respond(said("ada", "and a parrot", id="gone too"))).id == "gone too"
    found = audit(settings.data_dir)
    assert (found["accepted"], found["answered"], found["done"]) == (2, 2, 2)
    assert (found["open"], found["failed"], found["held"], found["duplicated"]) == (0, 0, 0, 0)


async def test_a_dead_model_loses_nothing(settings):
    def dead(_):
        raise LLMUnavailable("nobody there")

    message = said("ada", "are you there?", id="m")
    async with Engine.open(settings, llm=ScriptedLLM(dead)) as engine:
        with pytest.raises(LLMError) as error:
            await engine.respond(message)
        assert error.value.retriable
        assert (engine.stats()["running"], engine.stats()["retrying"]) == (0, 1)
    assert audit(settings.data_dir)["open"] == 1
    llm = ScriptedLLM(lambda _: "here I am")
    async with Engine.open(settings, llm=llm) as engine:
        assert (await engine.respond(message)).text == "here I am"
    assert len(llm.asked) == 1
    assert audit(settings.data_dir)["open"] == 0


async def test_a_slow_component_costs_its_deadline_and_is_named(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        engine.component("hangs", lambda turn: time.sleep(0.3), deadline=0.02)
        engine.component("weather", lambda turn: "rain, said the barometer")
        reply = await engine.respond(said("ada", "hello"))
        assert reply.partial == ("hangs",)
        assert reply.text


async def test_a_components_value_reaches_the_prompt(settings):
    llm = ScriptedLLM(lambda _: "fine")
    async with Engine.open(settings, llm=llm) as engine:
        engine.component("weather", lambda turn: f"rain for {turn.message.user}")
        await engine.respond(said("ada", "hello"))
    assert "weather: rain for ada" in llm.asked[0][0]["content"]


async def test_full_is_said_before_anything_is_done(settings):
    gate = asyncio.Event()

    async def answer(_):
        await gate.wait()
        return "at last"

    async with Engine.open(Settings(data_dir=settings.data_dir, max_waiting=2), llm=ScriptedLLM(answer)) as engine:
        tickets = [await engine.submit(said(f"u{n}", "hi")) for n in range(2)]
        with pytest.raises(Overloaded) as full:
            await engine.submit(said("u3", "hi", id="shed"))
        assert full.value.retry_after
        gate.set()
        await asyncio.gather(*(ticket.reply() for ticket in tickets))
    assert audit(settings.data_dir)["accepted"] == 2


async def test_private_words_are_not_told_in_public(settings):
    llm = ScriptedLLM(lambda _: "mhm")
    async with Engine.open(settings, llm=llm) as engine:
        await engine.respond(said("ada", "my secret is kryptonite", scope="dm"))
        await engine.respond(said("ada", "the server meets on tuesday", scope="server:1/public"))
        public = await engine.respond(said("ada", "what is my secret kryptonite tuesday", scope="server:1/public"))
        private = await engine.respond(said("ada", "what is my secret kryptonite tuesday", scope="dm"))
    assert [m.text for m in public.memories] == ["the server meets on tuesday"]
    assert "kryptonite" not in str(llm.asked[2][:-1])
    assert {m.scope for m in private.memories} == {"dm", "server:1/public"}


async def test_forget_removes_everything_of_one_user(settings):
    llm = ScriptedLLM(lambda _: "mhm")
    async with Engine.open(settings, llm=llm) as engine:
        for user in ("ada", "bob"):
            await engine.respond(said(user, f"{user} likes violets", id="1"))
        await engine.forget("ada")
        reply = await engine.respond(said("ada", "what do I like?"))
        assert reply.memories == ()
        assert [message["content"] for message in llm.asked[-1]][1:] == ["what do I like?"]
        assert [memory["text"] async for memory in engine.export("bob")] == ["bob likes violets"]
        assert (await engine.respond(said("bob", "what do I like?"))).memories


async def test_remember_false_leaves_no_trace_but_the_journal(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        await engine.respond(said("ada", "do not keep this", remember=False))
        assert (await engine.respond(said("ada", "what did I say?"))).memories == ()
        kept = await engine._database.read(lambda c: c.execute("SELECT message FROM journal").fetchall())
        assert b"keep this" not in b"".join(row[0] for row in kept)


async def test_the_same_words_three_times_are_three_memories(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        for _ in range(3):
            await engine.respond(said("ada", "ok"))
        assert len([memory async for memory in engine.export("ada")]) == 3


FLAGS = [
    "parallel",
    "batching",
    "caching",
    "preload",
    "hedging",
    "adaptive",
    "budget",
    "threads",
    "processes",
    "linger",
]


@pytest.mark.parametrize("flag", [*FLAGS, "all"])
async def test_each_flag_off_gives_the_same_answers(settings, tmp_path, flag):
    texts = ["I live in Oslo", "my sister is called Mia", "I love skiing", "where do I live?", "who is Mia?"]

    async def answers(folder, off):
        async with Engine.open(Settings(data_dir=folder, component_deadline=30), llm=quick()) as engine:
            for name in off:
                setattr(engine.flags, name, False)
            engine.hint("ada")
            return [await engine.respond(said("ada", text, id=text, at=float(n))) for n, text in enumerate(texts)]

    off = FLAGS if flag == "all" else [flag]
    with_it, without = await answers(tmp_path / "on", []), await answers(tmp_path / "off", off)
    assert [(r.text, r.emotion, r.memories) for r in with_it] == [(r.text, r.emotion, r.memories) for r in without]


async def test_unknown_flags_and_values(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        with pytest.raises(SettingsError):
            engine.flags.turbo = True
        with pytest.raises(SettingsError):
            engine.flags.parallel = "yes"


async def test_bad_messages_are_refused_and_nothing_is_accepted(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        for wrong in (said("ada", ""), said("", "hi"), said("a\nb", "hi"), said("ada", "x" * 10_000_000)):
            with pytest.raises(InvalidMessage):
                await engine.respond(wrong)
        with pytest.raises(InvalidMessage):
            await engine.respond(said("ada", "hi", scope="everywhere"))
        for unusual in ("😀", "a\x00b", "\ud83d broken"):
            assert (await engine.respond(said("ada", unusual))).text
    assert audit(settings.data_dir)["accepted"] == 3


async def test_a_full_disk_acknowledges_nothing_and_recovers(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        await engine.respond(said("ada", "before"))
        database = engine._database
        pages = await database.write(lambda c: c.pragma("page_count"))
        await database.write(lambda c: c.pragma("max_page_count", pages))
        big = [said("ada", f"{n} " + "x" * 5000, id=f"big{n}") for n in range(20)]
        ends = await asyncio.gather(*map(engine.respond, big), return_exceptions=True)
        assert any(isinstance(end, StoreFull) for end in ends)
        assert engine.ready()["ready"] is False
        await database.write(lambda c: c.pragma("max_page_count", pages + 10_000))
        await engine.respond(said("ada", "after"))
        assert engine.ready()["ready"] is True


async def test_stopping_leaves_nobody_waiting(settings):
    async def never(_):
        await asyncio.Event().wait()

    async with Engine.open(
        Settings(data_dir=settings.data_dir, drain_seconds=0.05), llm=ScriptedLLM(never)
    ) as engine:
        waiting = [asyncio.ensure_future(engine.respond(said("ada", f"hi {n}"))) for n in range(3)]
        await asyncio.sleep(0.02)
    for ended in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(ended, Closed)
    async with Engine.open(settings, llm=quick()) as engine:
        pass
    assert audit(settings.data_dir)["done"] == 3


async def test_a_pool_that_was_handed_in_stays_open(settings):
    async with LLMPool([quick()], max_concurrent=2) as pool:
        for _ in range(2):
            async with Engine.open(settings, llm=pool) as engine:
                await engine.respond(said("ada", "hi"))
        assert pool.stats()["calls"] == 2


async def test_a_round_of_tools_is_remembered_once(settings):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}

    class Calling(ScriptedLLM):
        async def chat(self, messages, **_):
            if messages[-1]["role"] == "tool":
                return Completion(text="Rain, says the tool.")
            return Completion(text="", finish_reason="tool_calls", tool_calls=(call,))

    async with Engine.open(settings, llm=Calling(None)) as engine:
        first = await engine.respond(said("ada", "what is the weather?"))
        assert first.tool_calls == (call,)
        results = (
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
        )
        second = await engine.respond(said("ada", "what is the weather?", continuation=results))
        assert second.text == "Rain, says the tool."
        assert [memory["text"] async for memory in engine.export("ada")] == ["what is the weather?"]


async def test_a_persona_of_ones_own(settings, tmp_path):
    (tmp_path / "ada.txt").write_text("You are Ada, and dry.")
    llm = ScriptedLLM(lambda _: "indeed")
    with_persona = Settings(data_dir=settings.data_dir, persona_file=tmp_path / "ada.txt")
    async with Engine.open(with_persona, llm=llm) as engine:
        await engine.respond(said("bob", "hello", system=({"role": "system", "content": "Speak French."},)))
    assert llm.asked[0][0]["content"].startswith("You are Ada, and dry.\n\nSpeak French.")
    with pytest.raises(SettingsError, match="WHISPER_FAST_PERSONA_FILE"):
        async with Engine.open(Settings(data_dir=settings.data_dir, persona_file=tmp_path / "missing"), llm=quick()):
            pass


CHILD = """
import asyncio, pathlib, sys
from whisper_fast import Engine, Message, Settings
from whisper_fast.llm import SimulatedLLM
async def main():
    async with Engine.open(Settings(data_dir=sys.argv[1]), llm=SimulatedLLM(latency=0.01)) as engine:
        async def one(n):
            ticket = await engine.submit(Message(user=f"u{n % 20}", text=f"message {n}", id=str(n)))
            print(n, flush=True)
            await ticket.reply()
        for n in range(0, 1_000_000, 50):
            await asyncio.gather(*(one(n + m) for m in range(50)))
asyncio.run(main())
"""


async def test_what_was_accepted_survives_kill_9_and_is_answered_once(settings):
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(settings.data_dir)], stdout=subprocess.PIPE, text=True)
    accepted = [int(child.stdout.readline()) for _ in range(220)]
    child.kill()
    accepted += [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    child.stdout.close()
    child.wait()
    async with Engine.open(settings, llm=SimulatedLLM(latency=0.001)) as engine:
        for n in accepted:
            assert (await engine.respond(said(f"u{n % 20}", f"message {n}", id=str(n)))).id == str(n)
        memories = {m["text"] for u in range(20) async for m in engine.export(f"u{u}")}
        assert engine.stats()["accepted"] == 0  # every one of them was known
    assert {f"message {n}" for n in accepted} <= memories
    found = audit(settings.data_dir)
    assert (found["open"], found["duplicated"]) == (0, 0)


async def test_worker_processes_are_there_soon_after_the_start(settings, monkeypatch):
    monkeypatch.setattr("whisper_fast.executor.SETTLED", 0)
    async with Engine.open(settings, llm=quick()) as engine:
        while engine._executor.stats().processes < settings.process_pool_size:
            await asyncio.sleep(0.001)
        assert (await engine.respond(said("ada", "hello"))).text


async def test_an_engine_that_closes_at_once_starts_no_worker(settings, monkeypatch):
    monkeypatch.setattr("whisper_fast.executor.SETTLED", 60)
    async with Engine.open(settings, llm=quick()) as engine:
        await engine.respond(said("ada", "hello"))
    assert engine._executor.stats().processes == 0


class GatedEmbedder(HashEmbedder):
    """Notes each batch, and embeds it when the gate is open."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.gate = asyncio.Event()

    async def embed(self, texts):
        self.batches.append(list(texts))
        await self.gate.wait()
        return super().embed(texts)


async def test_memories_that_one_user_brings_in_by_the_thousand_hold_up_nobody_elses_question(settings):
    embedder = GatedEmbedder()
    async with Engine.open(settings, llm=quick(), embedder=embedder) as engine:
        embedder.gate.set()
        await engine.memory.add("light", "my cat is called Turing")
        embedder.gate.clear()

        async def handed_in(count):
            while engine._embedding.batcher.stats().items < count:
                await asyncio.sleep(0.001)

        flood = asyncio.create_task(engine.memory.add_many("flood", [f"sentence {n}" for n in range(2000)]))
        await handed_in(2001)
        asked = asyncio.create_task(engine.memory.recall("light", "what is my cat called", k=1))
        await handed_in(2002)
        before = len(embedder.batches)
        embedder.gate.set()
        [found] = await asked
        place = next(n for n, batch in enumerate(embedder.batches) if "what is my cat called" in batch)
        assert place - before <= 1
        assert found.text == "my cat is called Turing"
        assert len(await flood) == 2000
