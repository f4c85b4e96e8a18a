"""What a simulated day's verdict finds: engines that give up, blame, forget to send or send twice."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest
from msgspec.structs import replace

from whisper_fast import journal, outbox
from whisper_fast.errors import LLMRateLimited, LLMRejected, LLMUnavailable
from whisper_fast.lab.faulty_disk import memory_folder
from whisper_fast.lab.simulation import simulate
from whisper_fast.lab.simulation.loop import VirtualLoop
from whisper_fast.lab.simulation.plan import Plan
from whisper_fast.message import Message
from whisper_fast.outbox import Outbox
from whisper_fast.recovery import Recovery
from whisper_fast.turns import Turns


@pytest.fixture
def days():
    """Live days until one of them finds the figure; return what it found."""

    def find(figure, seeds=60, first=0):
        with memory_folder() as place:
            for seed in range(first, first + seeds):
                found = simulate(seed, place / "day").broken
                if figure in found:
                    return found[figure]
        raise AssertionError(f"{seeds} days, and no {figure}")

    return find


def test_the_days_have_chat_networks():
    sent = {act.detail.platform for seed in range(50) for act in Plan(seed).acts if isinstance(act.detail, Message)}
    assert sent == {"lab", "discord", "irc"}


def test_an_engine_that_gives_up_for_a_passing_reason(monkeypatch, days):
    monkeypatch.setattr(LLMUnavailable, "final", True)
    assert days("lost")


def test_an_engine_that_tries_nothing_again_before_its_next_start(monkeypatch, days):
    monkeypatch.setattr(Recovery, "failed", lambda self, around, error: None)
    monkeypatch.setattr(Recovery, "look", lambda self: None)
    assert days("left")


def test_a_refusal_that_is_told_to_somebody_else(monkeypatch, days):
    failed = Turns._failed

    async def blaming(self, around, error):
        await failed(self, around, LLMRejected("never", status=400) if isinstance(error, LLMRateLimited) else error)

    monkeypatch.setattr(Turns, "_failed", blaming)
    assert days("blamed")


def test_a_reply_that_is_sent_again_where_it_is_shown_twice(monkeypatch, days):
    register = Outbox.register
    monkeypatch.setattr(
        Outbox, "register", lambda self, name, send, *, deduplicates: register(self, name, send, deduplicates=True)
    )
    assert "twice" in days("resent")[0]


def test_replies_that_a_crash_left_and_nobody_sends(monkeypatch, days):
    monkeypatch.setattr(Outbox, "held", lambda self, platform: None)
    assert days("left", seeds=120)


def test_a_reply_that_was_shown_and_is_listed_as_held(monkeypatch, days):
    send = Turns._send

    async def forgetting(self, around, reply):
        await send(self, around, reply)
        return lambda: False

    monkeypatch.setattr(Turns, "_send", forgetting)
    assert days("misbooked")


def test_a_reply_that_counts_as_sent_and_never_was(monkeypatch, days):
    async def nothing(self, *_, **__):
        return True

    monkeypatch.setattr(Outbox, "send", nothing)
    assert days("unsent")


def test_a_failed_message_that_is_accepted_again_and_stays_failed(monkeypatch, days):
    insert = journal.insert

    def stays(connection, message, body, age):
        names = (message.id, message.user, journal.FAILED)
        was = connection.execute("SELECT id FROM journal WHERE message_id = ? AND user = ? AND state = ?", names).get
        entry = insert(connection, message, body, age)
        if was is not None:
            connection.execute("UPDATE journal SET state = ? WHERE id = ?", (journal.FAILED, was))
        return entry

    monkeypatch.setattr(journal, "insert", stays)
    assert days("lost", first=85)


def test_a_nonce_that_is_new_each_time(monkeypatch, days):
    numbers = count()
    monkeypatch.setattr(outbox, "nonce", lambda *_: str(next(numbers)))
    assert "nonce" in days("resent")[0]


def test_somebody_elses_words_on_a_platform(monkeypatch, days):
    send = Outbox.send

    async def mixed(self, entry, reply, **more):
        return await send(self, entry, replace(reply, text=reply.text.replace("zq0qz", "zq77qz")), **more)

    monkeypatch.setattr(Outbox, "send", mixed)
    assert days("leaks")


def test_a_death_ends_what_others_begin_in_their_last_words():
    begun = []

    async def heir():
        begun.append("never")

    async def main(loop):
        try:
            await asyncio.sleep(1000)
        finally:
            begun.append(loop.create_task(heir()))

    loop = VirtualLoop(0.0, lambda: 0.5, lambda: True)
    loop.create_task(main(loop))
    loop.call_later(1.0, loop.stop)
    loop.run_forever()
    loop.die()
    [task] = begun
    assert task.get_coro().cr_frame is None
