"""What was accepted ends: answered, failed and said so, or set aside; whatever fails, and however often."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import apsw
import pytest
from scripted import ScriptedLLM, quick, said, until

from whisper_fast import Engine, Settings, journal, lanes, recovery, retries
from whisper_fast.errors import Closed, InvalidMessage, LLMRejected, LLMUnavailable, Overloaded
from whisper_fast.lab.audit import audit


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST", 0.02)
    return Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2, component_deadline=30)


# ---- a message that failed for good is sent again


async def test_a_failed_message_that_is_sent_again_is_kept_through_a_stop(settings):
    settings = settings.model_copy(update={"drain_seconds": 0.05})
    hangs = False

    async def answer(_):
        if hangs:
            await asyncio.Event().wait()
        raise LLMRejected("no", status=400)

    message = said("ada", "hello", id="1")
    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        with pytest.raises(LLMRejected):
            await engine.respond(message)
        await until(lambda: audit(settings.data_dir)["failed"] == 1)
        hangs = True
        ticket = await engine.submit(message)
        assert audit(settings.data_dir)["open"] == 1, "what submit has accepted is on the disk"
    with pytest.raises(Closed, match="next start"):
        await ticket.reply()
    async with Engine.open(settings, llm=quick()) as engine:
        await until(lambda: engine.stats()["answered"] == 1)


async def test_a_failed_message_that_is_sent_again_is_tried_until_it_is_answered(settings):
    error: Exception | None = None

    def answer(_):
        if error is not None:
            raise error
        return "here"

    message = said("ada", "hello", id="1")
    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        for error in (LLMRejected("no", status=400), LLMUnavailable("away", status=503)):
            with pytest.raises(type(error)):
                await engine.respond(message)
        error = None
        await until(lambda: engine.stats()["answered"] == 1)
        assert (await engine.respond(message)).text == "here"


async def test_a_message_sent_again_while_its_failure_is_written_down_is_not_lost(settings):
    """The second delivery comes between the failure and its being on the disk, or just before, or just after."""
    fails = True

    def answer(_):
        if fails:
            raise LLMRejected("no", status=400)
        return "here"

    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        for turns in range(12):
            fails, message = True, said("ada", "hello", id=f"{turns}")
            ticket = await engine.submit(message)
            failing = asyncio.gather(ticket.reply(), return_exceptions=True)
            await until(lambda ticket=ticket: ticket.done)
            fails = False
            for _ in range(turns):
                await asyncio.sleep(0)
            assert (await engine.respond(message)).text == "here"
            await failing
        await until(lambda: not engine._turns._in_flight)
    found = audit(settings.data_dir)
    assert (found["done"], found["open"], found["failed"]) == (12, 0, 0)


# ---- what others' code raises


async def test_an_error_of_foreign_code_is_tried_again(settings):
    errors = [ValueError("a bug"), ConnectionError("reset")]

    def answer(_):
        if errors:
            raise errors.pop(0)
        return "here"

    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        with pytest.raises(ValueError, match="a bug"):
            await engine.respond(said("ada", "hello", id="1"))
        await until(lambda: engine.stats()["answered"] == 1)


async def test_an_error_of_foreign_code_that_stays_closes_the_message(settings, monkeypatch):
    monkeypatch.setattr(recovery, "FOREIGN_FAILURES", 3)

    def answer(_):
        raise ValueError("a bug")

    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        with pytest.raises(ValueError, match="a bug"):
            await engine.respond(said("ada", "hello", id="1"))
        await until(lambda: audit(settings.data_dir)["failed"] == 1)
        assert engine.stats()["failed"] == 4


async def test_what_is_answered_is_remembered_when_a_foreign_embedder_is_well_again(settings, monkeypatch):
    async with Engine.open(settings, llm=quick()) as engine:
        real, errors = engine.memory.prepare, [ValueError("a bug")] * 12

        async def prepare(*args, **more):
            if errors:
                raise errors.pop()
            return await real(*args, **more)

        monkeypatch.setattr(engine.memory, "prepare", prepare)
        monkeypatch.setattr(retries, "LONGEST", 0.05)
        await engine.respond(said("ada", "my cat is called Miso", id="1"))
        await until(lambda: audit(settings.data_dir)["done"] == 1)
        assert [m["text"] async for m in engine.export("ada")] == ["my cat is called Miso"]


# ---- deaths

DIES = """
import asyncio, os, sys
from whisper_fast import Engine, Message, Settings
from whisper_fast.journal import Journal
from whisper_fast.llm import SimulatedLLM
from whisper_fast.memory import MemoryStore

async def dies(*_, **__):
    os._exit(9)

where = sys.argv[2]
if where == "remembering":
    MemoryStore.prepare = dies
if where == "starting":
    Journal.unfinished = dies

class Model(SimulatedLLM):
    async def chat(self, messages, **more):
        if where == "answering":
            os._exit(9)
        return await super().chat(messages, **more)

async def main():
    async with Engine.open(Settings(data_dir=sys.argv[1], process_pool_size=1), llm=Model(0)) as engine:
        if len(sys.argv) > 3:
            await engine.submit(Message(user="ada", text="hello", id="1"))
        await engine._lanes._settled.wait()

asyncio.run(main())
"""


def lives(settings, where, *more):
    command = [sys.executable, "-c", DIES, str(settings.data_dir), where, *more]
    return subprocess.run(command, capture_output=True, timeout=60).returncode


def entry_of(settings):
    connection = apsw.Connection(str(settings.data_dir / "whisper-fast.db"))
    [row] = connection.execute("SELECT state, attempts FROM journal")
    connection.close()
    return row


def test_a_message_that_kills_the_process_while_it_is_remembered_is_set_aside(settings):
    assert [lives(settings, "remembering", "send"), *(lives(settings, "remembering") for _ in range(2))] == [9, 9, 9]
    assert lives(settings, "remembering") == 0
    assert entry_of(settings) == (journal.QUARANTINED, 3)


def test_a_death_is_counted_once_however_often_the_process_dies_while_starting(settings):
    assert lives(settings, "answering", "send") == 9
    assert [lives(settings, "starting") for _ in range(3)] == [9, 9, 9]
    assert entry_of(settings) == (journal.ACCEPTED, 1)


# ---- the end


async def stubborn(*_, **__):
    """Go on for a minute whoever cancels it, unless the test is over."""
    for _ in range(60):
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            if over.is_set():
                raise


over = asyncio.Event()


@pytest.mark.parametrize("where", ["model", "sender"])
async def test_who_ignores_being_cancelled_does_not_keep_the_engine_from_ending(settings, monkeypatch, caplog, where):
    monkeypatch.setattr(lanes, "ABORT_SECONDS", 0.05)
    over.clear()
    settings = settings.model_copy(update={"drain_seconds": 0.05})
    model = ScriptedLLM(stubborn if where == "model" else lambda _: "here")
    async with asyncio.timeout(10):
        async with Engine.open(settings, llm=model) as engine:
            if where == "sender":
                engine.on_reply(stubborn, platform="net")
            await engine.submit(said("ada", "hello", id="1", platform="net"))
            await until(lambda: engine.stats()["running"] or where == "sender")
            await asyncio.sleep(0.05)
    assert "turn:1 ignores that it is cancelled" in caplog.text
    over.set()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
        await asyncio.wait([task], timeout=5)


async def test_who_floods_can_be_forgotten_and_exported(settings):
    gate = asyncio.Event()

    async def answer(_):
        await gate.wait()
        return "here"

    settings = settings.model_copy(update={"max_waiting": lanes.PER_USER})
    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        for n in range(lanes.PER_USER):
            await engine.submit(said("ada", "hello", id=f"{n}"))
        with pytest.raises(Overloaded):
            await engine.submit(said("bob", "hello"))
        forgetting = [asyncio.create_task(engine.forget(user)) for user in ("ada", "bob")]
        exporting = asyncio.create_task(anext(engine.export("bob"), None))
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*forgetting, exporting)


# ---- looking around


async def test_writes_of_others_do_not_cost_a_read_for_each_message(settings):
    gate, reads = asyncio.Event(), 0

    async def answer(_):
        await gate.wait()
        return "here"

    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        for n in range(100):
            await engine.submit(said(f"u{n}", "hello", id="1"))
        real = engine._database.read

        def read(job):
            nonlocal reads
            reads += 1
            return real(job)

        engine._database.read = read
        for _ in range(10):
            engine._turns.recovery.look()
            await asyncio.sleep(0)
        await until(lambda: not engine._turns.recovery._retries._tasks and not len(engine._turns.recovery))
        assert 1 <= reads <= 10
        gate.set()
    assert audit(settings.data_dir)["duplicated"] == 0


# ---- what could not be read back


@pytest.mark.parametrize(
    "wrong",
    [
        {"remember": 0},
        {"priority": True},
        {"strict": 1},
        {"history": ("hello",)},
        {"parameters": None},
        {"system": None},
    ],
)
async def test_what_could_not_be_read_back_is_not_accepted(settings, wrong):
    async with Engine.open(settings, llm=quick()) as engine:
        with pytest.raises(InvalidMessage, match=next(iter(wrong))):
            await engine.submit(said("ada", "hello", id="1", **wrong))
        assert (await engine.respond(said("ada", "hello", id="1"))).text
    assert audit(settings.data_dir)["accepted"] == 1


# ---- what the log says of others' errors


async def test_the_log_does_not_quote_what_foreign_code_says(settings, monkeypatch, caplog):
    monkeypatch.setattr(recovery, "FOREIGN_FAILURES", 0)

    def answer(messages):
        raise ValueError(f"cannot answer {messages[-1]['content']}")

    async def send(outgoing):
        raise ValueError(f"cannot send {outgoing.reply.text}")

    def ill(turn):
        raise ValueError(f"cannot weigh {turn.message.text}")

    caplog.set_level("DEBUG")
    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        engine.component("ill", ill)
        with pytest.raises(ValueError, match="cannot answer"):
            await engine.respond(said("ada", "xylophone", id="1"))
        await until(lambda: audit(settings.data_dir)["failed"] == 1)
    async with Engine.open(settings, llm=ScriptedLLM(lambda messages: messages[-1]["content"])) as engine:
        engine.on_reply(send, platform="net")
        await engine.submit(said("ada", "xylophone", id="2", platform="net"))
        await until(lambda: audit(settings.data_dir)["held"] == 1)
    assert "xylophone" not in caplog.text
    for where in ("answer (test_recovery.py:", "send (test_recovery.py:", "ill (test_recovery.py:"):
        assert f"ValueError < {where}" in caplog.text
