"""Replies that platforms send: once, again where that is safe, and never twice because something else failed."""

from __future__ import annotations

import pytest
from scripted import quick, said, until

from whisper_fast import Engine, Settings, journal, retries
from whisper_fast.errors import StoreIOError
from whisper_fast.lab.audit import audit


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "FIRST", 0.02)
    return Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2, component_deadline=30)


class Channel:
    """A chat network that keeps what it was sent; `broken(outgoing)` says what fails, after it has been shown."""

    def __init__(self, broken=lambda outgoing: False):
        self.broken, self.calls = broken, []

    async def send(self, outgoing):
        self.calls.append((outgoing.message_id, outgoing.again))
        if self.broken(outgoing):
            raise ConnectionError("reset")


def fails_to_complete(engine, times):
    """Let the disk fail passingly when the first messages are remembered."""
    real, left = engine._journal.complete, times

    async def complete(*args, **more):
        nonlocal left
        if left:
            left -= 1
            raise StoreIOError("passing", retry_after=0.01)
        return await real(*args, **more)

    engine._journal.complete = complete


@pytest.mark.parametrize("deduplicates", [True, False])
async def test_a_reply_known_as_sent_stays_so_when_the_disk_fails_after_it(settings, deduplicates):
    channel = Channel()
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="net", deduplicates=deduplicates)
        fails_to_complete(engine, 2)
        await engine.submit(said("ada", "hello", id="1", platform="net"))
        await until(lambda: audit(settings.data_dir)["done"] == 1)
    assert channel.calls == [("1", False)]
    assert audit(settings.data_dir)["held"] == 0
    assert not engine._turns._delivered


async def test_a_reply_that_its_caller_has_is_not_held_when_the_disk_fails_after_it(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        fails_to_complete(engine, 2)
        await engine.respond(said("ada", "hello", id="1"))
        await until(lambda: audit(settings.data_dir)["done"] == 1)
    assert audit(settings.data_dir)["held"] == 0


async def test_a_reply_that_is_taken_before_it_is_remembered_is_not_held(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        fails_to_complete(engine, 3)
        await engine.submit(said("ada", "hello", id="1"))  # nobody waits for the reply
        await until(lambda: audit(settings.data_dir)["answered"] == 1 and not engine._turns._in_flight)
        assert (await engine.respond(said("ada", "hello", id="1"))).text
        await until(lambda: audit(settings.data_dir)["done"] == 1)
    assert audit(settings.data_dir)["held"] == 0


async def test_after_a_crash_between_recording_and_sending_the_platform_is_sent_the_reply(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        await engine.respond(said("ada", "hello", id="1", platform="net"))
        undo, body = (
            "UPDATE journal SET state = 1, message = ?",
            journal.encoded(said("ada", "hello", id="1", platform="net")),
        )
        await engine._database.write(lambda c: c.execute(undo, (body,)).get)  # as the disk is right after `record`
        for table in ("memory", "conversation"):
            await engine._database.write(lambda c, t=table: c.execute(f"DELETE FROM {t}").get)
    channel = Channel()
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="net", deduplicates=True)
        await until(lambda: channel.calls == [("1", True)] and audit(settings.data_dir)["held"] == 0)
    assert audit(settings.data_dir)["done"] == 1


async def test_a_send_that_failed_is_tried_again_also_when_the_disk_fails_meanwhile(settings):
    channel = Channel(lambda _: len(channel.calls) == 1)
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="net", deduplicates=True)
        fails_to_complete(engine, 3)
        await engine.submit(said("ada", "hello", id="1", platform="net"))
        await until(lambda: channel.calls == [("1", False), ("1", True)] and audit(settings.data_dir)["held"] == 0)


async def test_one_release_sends_once_where_the_platform_does_not_deduplicate(settings):
    channel = Channel(lambda _: True)
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="irc")
        await engine.submit(said("ada", "hello", id="1", platform="irc"))
        await until(lambda: audit(settings.data_dir)["held"] == 1)
        [held] = await engine._database.read(journal.listed)
        for sent in (2, 3):
            await engine._database.write(lambda c: journal.release(c, held["id"]))
            engine._outbox.look()
            await until(lambda sent=sent: len(channel.calls) == sent)
            await until(lambda: not engine._outbox._again._tasks)
            [again] = await engine._database.read(journal.listed)
            assert again["state"] == "held", "in doubt once more: a person decides"
            assert not len(engine._outbox._again), "nothing is sent again without a decision"


async def test_a_reply_that_cannot_be_sent_blocks_nobody_elses(settings):
    up = False
    channel = Channel(lambda out: out.channel == "deleted" or not up)
    async with Engine.open(settings, llm=quick()) as engine:
        engine.on_reply(channel.send, platform="net", deduplicates=True)
        for name, place in (("1", "deleted"), ("2", "fine"), ("3", "deleted")):
            await engine.submit(said("ada", "hello", id=name, platform="net", channel=place))
            await until(lambda: not engine.stats()["in_flight"])
        up = True
        await until(lambda: ("2", True) in channel.calls)
        await until(lambda: audit(settings.data_dir)["held"] == 2)
    again = [name for name, again in channel.calls if again]
    assert "3" not in again, "a user's replies keep their order in a channel"
