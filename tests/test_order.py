"""One user's messages are answered in order, also when one of them fails for a passing reason."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest
from scripted import ScriptedLLM, said

from whisper_fast import Engine, Settings, retries
from whisper_fast.errors import Closed, StoreIOError
from whisper_fast.lab.audit import audit


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2, component_deadline=30)


class Echo(ScriptedLLM):
    """Repeats the words and keeps them."""

    def __init__(self):
        super().__init__(self._say)
        self.words = []

    def _say(self, messages):
        self.words.append(messages[-1]["content"])
        return self.words[-1]


@asynccontextmanager
async def failing(settings, failures, error=None):
    """An engine that cannot record the reply to "a" the first `failures` times."""
    async with Engine.open(settings, llm=(llm := Echo())) as engine:
        record, left = engine._journal.record, failures

        async def recorded(entry, reply, joined=(), message=None):
            nonlocal left
            if entry.message.text == "a" and left:
                left -= 1
                raise error or StoreIOError("the disk is tired", retry_after=0.01)
            await record(entry, reply, joined, message)
            engine.replied.append(message.text)

        engine._journal.record, engine.words, engine.replied = recorded, llm.words, []
        yield engine


async def answered(engine, count):
    async with asyncio.timeout(30):
        while engine.stats()["answered"] < count:
            await asyncio.sleep(0.002)
        await engine._lanes._settled.wait()


async def three(engine):
    tickets = [await engine.submit(said("ada", text, id=text)) for text in ("a", "b", "c")]
    return await asyncio.gather(*(ticket.reply() for ticket in tickets), return_exceptions=True)


@pytest.mark.parametrize("failures", [1, 2])
async def test_later_messages_wait_while_one_is_tried_again(settings, monkeypatch, failures):
    monkeypatch.setattr(retries, "FIRST", 0.05)
    async with failing(settings, failures) as engine:
        first, *others = await three(engine)
        assert isinstance(first, StoreIOError)
        assert [reply.text for reply in others] == ["b", "c"]
        await answered(engine, 3)
        assert engine.replied == ["a", "b", "c"]
        assert engine._lanes.running == engine._lanes.places == engine._lanes.bytes == 0


async def test_a_message_that_goes_on_failing_gives_its_place_up(settings, monkeypatch):
    monkeypatch.setattr(retries, "FIRST", 0.01)
    async with failing(settings, 3) as engine:
        await three(engine)
        await answered(engine, 3)
        assert engine.words[:4] == ["a", "a", "a", "b"]
        assert sorted(engine.replied) == ["a", "b", "c"]


async def test_nobody_waits_for_a_long_pause(settings):
    async with failing(settings, 1, StoreIOError("later", retry_after=3600)) as engine:
        _, *others = await three(engine)
        assert [reply.text for reply in others] == ["b", "c"]
        assert engine.replied == ["b", "c"]


async def test_the_message_sent_again_is_answered_at_once_in_its_place(settings, monkeypatch):
    monkeypatch.setattr(retries, "FIRST", 2.0)
    monkeypatch.setattr(retries, "uniform", lambda low, high: 1.0)
    async with failing(settings, 1) as engine:
        tickets = [await engine.submit(said("ada", text, id=text)) for text in ("a", "b")]
        with pytest.raises(StoreIOError):
            await tickets[0].reply()
        again = await engine.submit(said("ada", "a", id="a"))  # before the lane has seen the end of the work
        assert (await again.reply()).text == "a"
        assert (await tickets[1].reply()).text == "b"
        assert len(engine._turns.recovery) == 0
        await answered(engine, 2)
        assert engine.replied == ["a", "b"]
        assert engine._lanes.running == engine._lanes.places == 0


async def test_a_failed_round_keeps_the_order_of_its_messages(settings, monkeypatch):
    monkeypatch.setattr(retries, "FIRST", 0.05)
    interrupting = Settings(data_dir=settings.data_dir, when_busy="interrupt")
    async with failing(interrupting, 1) as engine:
        ends = await three(engine)
        assert StoreIOError in map(type, ends)
        await answered(engine, 3)
        assert "\n".join(engine.replied) == "a\nb\nc"
        assert engine._lanes.places == 0


async def test_a_redelivery_that_is_through_first_does_not_take_the_message_back(settings):
    writer = threading.Event()
    async with failing(settings, 0) as engine:
        held = asyncio.ensure_future(engine._database.write(lambda _: writer.wait()))
        first, other, again = (asyncio.ensure_future(engine.submit(said("ada", text, id=text))) for text in "aba")
        await asyncio.sleep(0)  # all three have their places and are handed to the writer
        again.cancel()
        await asyncio.wait([again])
        writer.set()
        assert await held
        assert [(await (await submitted).reply()).text for submitted in (first, other)] == ["a", "b"]
        await answered(engine, 2)
        assert engine.replied == ["a", "b"]
        assert engine._lanes.places == 0
        assert not engine._turns._entered


async def test_a_stop_leaves_what_waits_for_a_failed_message_to_the_next_start(settings, monkeypatch):
    monkeypatch.setattr(retries, "FIRST", 2.0)
    monkeypatch.setattr(retries, "uniform", lambda low, high: 1.0)
    async with failing(settings, 1) as engine:
        tickets = [await engine.submit(said("ada", text, id=text)) for text in ("a", "b", "c")]
        with pytest.raises(StoreIOError):
            await tickets[0].reply()
        ends = asyncio.gather(*(ticket.reply() for ticket in tickets[1:]), return_exceptions=True)
    assert set(map(type, await ends)) == {Closed}
    assert audit(settings.data_dir)["open"] == 3
    async with failing(settings, 0) as engine:
        await answered(engine, 3)
        assert engine.replied == ["a", "b", "c"]
