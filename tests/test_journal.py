"""The journal: nothing lost, nothing twice, and what cannot be decided by a program is listed for a person."""

import asyncio
import os
import subprocess
import sys
import time
from contextlib import closing

import aiohttp
import apsw
import pytest
from scripted import ScriptedLLM, quick, said, until
from served import served

from whisper_fast import Engine, Settings, clock, journal, retries
from whisper_fast.errors import IdReused, InvalidMessage, LLMUnavailable, Quarantined, StoreLocked
from whisper_fast.lab.audit import audit
from whisper_fast.outbox import nonce
from whisper_fast.store import schema
from whisper_fast.store.claims import Claims

YEAR = 365 * 86_400


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2, component_deadline=30)


async def entries(engine):
    return await engine._database.read(journal.listed)


# ---- what kills the process

KILLER = """
import asyncio, os, sys
from whisper_fast import Engine, Message, Settings
from whisper_fast.llm import SimulatedLLM

async def main():
    async def deadly(turn):
        await asyncio.sleep(0.05)
        if "poison" in turn.message.text:
            os._exit(9)

    class Slow(SimulatedLLM):
        async def chat(self, messages, **more):
            await asyncio.sleep(0 if "poison" in messages[-1]["content"] else float(sys.argv[2]))
            return await super().chat(messages, **more)

    async with Engine.open(Settings(data_dir=sys.argv[1]), llm=Slow(0)) as engine:
        engine.component("deadly", deadly, deadline=5)
        if len(sys.argv) > 3:
            await asyncio.gather(*(engine.submit(Message(user=u, text=t, id=t)) for u, t in (
                ("ann", "harmless"), ("bob", "poison"), ("bob", "behind it"))))
        await engine._lanes._settled.wait()

asyncio.run(main())
"""


def run_killer(settings, seconds, *more):
    command = [sys.executable, "-c", KILLER, str(settings.data_dir), str(seconds), *more]
    return subprocess.run(command, capture_output=True, timeout=60).returncode


async def test_a_message_that_kills_the_process_three_times_is_set_aside(settings):
    assert run_killer(settings, 30, "send") == 9  # a bystander waits for its model all the while
    assert run_killer(settings, 30) == 9
    assert run_killer(settings, 0) == 9  # now each suspect runs alone, the bystander first: it is answered
    assert audit(settings.data_dir)["answered"] == 1
    async with Engine.open(settings, llm=quick()) as engine:
        listed = [entry for entry in await entries(engine) if entry["state"] == "quarantined"]
        assert [(e["state"], e["message_id"], e["attempts"]) for e in listed] == [("quarantined", "poison", 3)]
        assert (await engine.respond(said("bob", "behind it", id="behind it"))).text  # never ran: never struck
        with pytest.raises(Quarantined, match="journal"):
            await engine.respond(said("bob", "poison", id="poison"))
        await engine._database.write(lambda c: journal.release(c, listed[0]["id"]))
        assert (await engine.respond(said("bob", "poison", id="poison"))).text
    found = audit(settings.data_dir)
    assert (found["accepted"], found["answered"], found["quarantined"]) == (3, 3, 0)


async def test_claims_tell_what_ran_when_the_process_died(tmp_path):
    claims = Claims(tmp_path / "claims")
    slots = [claims.take(one) for one in (7, 8, 9)]
    claims.give_back(slots[1])
    claims.close()
    after = Claims(tmp_path / "claims")
    assert after.left == (7, 9)
    after.clear()
    taken = [after.take(1) for _ in range(40_000)]  # more than there is room for: not noted, no error
    assert taken[-1] == -1
    for slot in taken:
        after.give_back(slot)
    after.close()
    last = Claims(tmp_path / "claims")
    assert last.left == ()
    last.close()


async def test_a_start_without_room_for_claims_is_a_start(settings, caplog):
    (settings.data_dir / "claims").mkdir(parents=True)
    async with Engine.open(settings, llm=quick()) as engine:
        assert (await engine.respond(said("ada", "hi"))).text
    assert "will not be recognised" in caplog.text


async def test_an_orderly_stop_is_no_death(settings):
    async def never(_):
        await asyncio.Event().wait()

    hurried = Settings(data_dir=settings.data_dir, drain_seconds=0.01)
    for _ in range(5):
        async with Engine.open(hurried, llm=ScriptedLLM(never)) as engine:
            await engine.submit(said("ada", "hi", id="1"))
    assert audit(settings.data_dir)["quarantined"] == 0


# ---- who has the reply


async def test_a_reply_that_nobody_took_is_held_until_somebody_does(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        await engine.submit(said("ada", "hello", id="1"))
        ticket = await engine.submit(said("ada", "hello again", id="2"))
        await until(lambda: not engine.stats()["in_flight"])
        assert [e["message_id"] for e in await entries(engine)] == ["1", "2"]
        await ticket.reply()
        await engine.respond(said("ada", "hello", id="1"))
        await until(lambda: audit(settings.data_dir)["held"] == 0)
    assert audit(settings.data_dir)["done"] == 2


class Channel:
    """A chat network that shows a nonce once; `broken` makes sending fail after, or before, it was shown."""

    def __init__(self):
        self.shown, self.calls, self.broken = {}, [], None

    async def send(self, outgoing):
        self.calls.append(outgoing)
        if self.broken == "before":
            raise ConnectionError("no route")
        self.shown.setdefault(outgoing.nonce, outgoing.reply.text)
        if self.broken == "after":
            raise ConnectionError("reset")


async def test_replies_go_out_by_the_platforms_sender_in_order(settings):
    channel = Channel()
    async with Engine.open(settings, llm=ScriptedLLM(lambda messages: messages[-1]["content"])) as engine:
        engine.on_reply(channel.send, platform="discord")
        for n in range(5):
            await engine.submit(said("ada", f"n{n}", id=f"{n}", platform="discord", channel="c7"))
        await engine.respond(said("ada", "in the library"))
    assert list(channel.shown.values()) == [f"n{n}" for n in range(5)]
    assert {(out.channel, out.user, out.again) for out in channel.calls} == {("c7", "ada", False)}
    assert all(len(out.nonce) <= 25 for out in channel.calls)  # Discord's limit
    assert audit(settings.data_dir)["held"] == 0


@pytest.mark.parametrize("broken", ["before", "after"])
async def test_what_is_in_doubt_is_sent_again_with_the_same_nonce_where_that_is_safe(settings, broken):
    channel = Channel()
    channel.broken = broken
    message = said("ada", "hello", id="1", platform="discord", channel="c7")
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="discord", deduplicates=True)
        await engine.submit(message)
        await until(lambda: not engine.stats()["in_flight"])
    assert audit(settings.data_dir)["held"] == 1
    channel.broken = None
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="discord", deduplicates=True)
        await until(lambda: audit(settings.data_dir)["held"] == 0)
    assert len(channel.shown) == 1
    assert [out.again for out in channel.calls] == [False, True]
    assert {out.nonce for out in channel.calls} == {nonce("discord", "c7", "ada", "1")}


async def test_what_is_in_doubt_is_held_elsewhere_until_somebody_releases_it(settings):
    channel = Channel()
    channel.broken = "before"
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="irc")
        await engine.submit(said("ada", "hello", id="1", platform="irc"))
        await engine.submit(said("ada", "bye", id="2", platform="irc"))
        await until(lambda: not engine.stats()["in_flight"])
    channel.broken = None
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="irc")
        first, second = [e["id"] for e in await entries(engine)]
        assert await engine._database.write(lambda c: journal.release(c, first))
        assert await engine._database.write(lambda c: journal.drop(c, second))
        assert not await engine._database.write(lambda c: journal.drop(c, second))
        engine.on_reply(channel.send, platform="irc")  # it looks again
        await until(lambda: audit(settings.data_dir)["held"] == 0)
    assert [(out.message_id, out.again) for out in channel.calls] == [("1", False), ("2", False), ("1", True)]


async def test_what_is_released_beside_a_running_engine_is_sent_once(settings, monkeypatch):
    monkeypatch.setattr("whisper_fast.engine.LOOK", 0.05)
    channel, command = Channel(), [sys.executable, "-m", "whisper_fast", "journal", "--data-dir", settings.data_dir]
    channel.broken = "before"
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="irc")
        await engine.submit(said("ada", "hello", id="1", platform="irc"))
        await until(lambda: not engine.stats()["in_flight"])
        channel.broken = None
        [held] = await entries(engine)
        await asyncio.to_thread(subprocess.run, [*command, "--release", str(held["id"])], check=True, timeout=60)
        await until(lambda: len(channel.calls) == 2)
        for _ in range(3):
            engine._outbox.look()
        await until(lambda: audit(settings.data_dir)["held"] == 0)
    assert [(out.message_id, out.again) for out in channel.calls] == [("1", False), ("1", True)]


async def test_a_crash_between_recording_and_sending_loses_no_reply(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        await engine.respond(said("ada", "my cat is called Miso", id="1"))
        undo = "UPDATE journal SET state = 1, message = ? WHERE message_id = '1'"
        body = journal.encoded(said("ada", "my cat is called Miso", id="1"))
        await engine._database.write(lambda c: c.execute(undo, (body,)).get)  # as the disk is right after `record`
        for table in ("memory", "conversation"):
            await engine._database.write(lambda c, t=table: c.execute(f"DELETE FROM {t}").get)
    llm = ScriptedLLM(lambda _: "asked again")
    async with Engine.open(settings, llm=llm) as engine:
        await until(lambda: audit(settings.data_dir)["held"] == 1)
        assert "Miso" in (await engine.respond(said("ada", "my cat is called Miso", id="1"))).text
        assert [m["text"] async for m in engine.export("ada")] == ["my cat is called Miso"]
    assert llm.asked == []
    assert audit(settings.data_dir)["held"] == 0


async def test_the_same_id_for_other_words(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        first = await engine.respond(said("ada", "hello", id="1", strict=True))
        assert (await engine.respond(said("ada", "hello", id="1", strict=True))).text == first.text
        with pytest.raises(IdReused):
            await engine.respond(said("ada", "other words", id="1", strict=True))
        assert (await engine.respond(said("ada", "other words", id="1"))).text == first.text  # a platform's edit
        assert (await engine.respond(said("bob", "other words", id="1", strict=True))).text != first.text


async def test_the_door_refuses_a_key_that_was_used_for_other_words(tmp_path):
    async def ask(session, text, key):
        body = {"messages": [{"role": "user", "content": text}]}
        async with session.post("/v1/chat/completions", json=body, headers={"Idempotency-Key": key}) as response:
            answer = await response.json()
            return response.status, answer.get("error", {}).get("code"), answer.get("choices")

    with served(tmp_path, latency=0.01, process_pool_size=1) as server:
        async with aiohttp.ClientSession(server.address) as session:
            first = await ask(session, "hello", "k")
            assert first[:2] == (200, None)
            assert await ask(session, "hello", "k") == first
            assert (await ask(session, "other words", "k"))[:2] == (422, "idempotency_key_reused")
            assert (await ask(session, "other words", "k2"))[0] == 200


# ---- failures that pass


async def test_a_message_that_failed_is_answered_when_the_model_is_back(settings, monkeypatch):
    monkeypatch.setattr(retries, "FIRST", 0.01)
    dead = True

    def answer(messages):
        if dead:
            raise LLMUnavailable("nobody there")
        return "back"

    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        tickets = [await engine.submit(said(f"u{n}", "hello", id="1")) for n in range(2)]
        ends = await asyncio.gather(*(ticket.reply() for ticket in tickets), return_exceptions=True)
        assert all(isinstance(end, LLMUnavailable) for end in ends)
        dead = False
        await until(lambda: engine.stats()["answered"] == 2)
        assert (await engine.respond(said("u1", "hello", id="1"))).text == "back"
        await until(lambda: not engine.stats()["retrying"])
    assert audit(settings.data_dir)["duplicated"] == 0


def test_pauses_grow_and_spread():
    for failures, most in ((1, 1.5), (4, 12), (20, 90)):
        drawn = {retries.pause(failures) for _ in range(100)}
        assert most / 3 <= min(drawn) < max(drawn) <= most
        assert len(drawn) > 50
    assert retries.pause(1, at_least=30) >= 30


# ---- bad input


async def test_a_clock_that_jumps_changes_no_order(settings):
    wall = 0.0
    llm = ScriptedLLM(lambda messages: messages[-1]["content"].upper())
    with clock.replaced(monotonic=time.monotonic, wall=lambda: time.time() + wall):
        async with Engine.open(settings, llm=llm) as engine:
            for wall, text in ((YEAR, "a"), (-YEAR, "b"), (0, "c")):
                await engine.respond(said("ada", text, id=text, at=time.time() + wall))
        async with Engine.open(settings, llm=llm) as engine:
            await engine.respond(said("ada", "d"))
    assert [m["content"] for m in llm.asked[-1][1:]] == ["a", "A", "b", "B", "c", "C", "d"]


async def test_ids_of_ten_kilobytes_are_refused(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        for name in ("id", "channel", "platform"):
            with pytest.raises(InvalidMessage, match="10000 characters"):
                await engine.respond(said("ada", "hi", **{name: "x" * 10_000}))
        with pytest.raises(InvalidMessage):
            await engine.respond(said("x" * 10_000, "hi"))
    assert audit(settings.data_dir)["accepted"] == 0


async def test_a_second_engine_on_a_folder_is_refused_with_the_firsts_pid(settings):
    async with Engine.open(settings, llm=quick()):
        code = """
import asyncio, sys
from whisper_fast import Engine, Settings
from whisper_fast.errors import StoreLocked
async def main():
    try:
        async with Engine.open(Settings(data_dir=sys.argv[1])):
            pass
    except StoreLocked as error:
        print(error)
asyncio.run(main())
"""
        said_ = subprocess.run([sys.executable, "-c", code, str(settings.data_dir)], capture_output=True, text=True)
        assert f"in use by process {os.getpid()};" in said_.stdout
        with pytest.raises(StoreLocked):
            async with Engine.open(settings, llm=quick()):
                pass


async def test_a_folder_of_the_first_schema_goes_on(settings):
    settings.data_dir.mkdir()
    open_, done = journal.encoded(said("ada", "open", id="open")), journal.encoded(said("ada", "", id="done"))
    reply = b'{"id": "done", "user": "ada", "text": "was done"}'
    with closing(apsw.Connection(str(settings.data_dir / "whisper-fast.db"))) as connection:
        connection.execute(schema.MIGRATIONS[0])
        connection.pragma("application_id", schema.APPLICATION_ID)
        connection.pragma("user_version", 1)
        sql = """INSERT INTO journal (platform, channel, user, message_id, state, accepted_at, message, reply)
                 VALUES ('library', 'default', 'ada', ?, ?, 0, ?, ?)"""
        connection.executemany(sql, [("open", 0, open_, None), ("done", 2, done, reply)])
    async with Engine.open(settings, llm=quick()) as engine:
        assert (await engine.respond(said("ada", "?", id="done"))).text
        assert (await engine.respond(said("ada", "open", id="open"))).text
        assert engine.stats()["accepted"] == 0
    assert audit(settings.data_dir)["open"] == 0
