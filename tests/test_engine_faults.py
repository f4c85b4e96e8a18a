"""What goes wrong around the engine: nothing mixes, nothing hangs, and a start always starts."""

import asyncio

import pytest
from scripted import ScriptedLLM, quick, said

from whisper_fast import Engine, Settings
from whisper_fast.errors import (
    InvalidMessage,
    LLMMisconfigured,
    LLMRejected,
    LLMUnavailable,
    SettingsError,
    StoreError,
)
from whisper_fast.lab.audit import audit
from whisper_fast.llm.wire import refusal
from whisper_fast.store.backup import restore


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2, component_deadline=30)


async def test_what_can_never_be_answered_is_not_tried_at_every_start(settings):
    def refuse(_):
        raise LLMRejected("no such model")

    too_long = said("ada", "word " * 10_000, id="2")
    async with Engine.open(settings, llm=ScriptedLLM(refuse)) as engine:
        for wrong, kind in ((said("ada", "hi", id="1"), LLMRejected), (too_long, InvalidMessage)):
            with pytest.raises(kind):
                await engine.respond(wrong)
    found = audit(settings.data_dir)
    assert (found["open"], found["failed"]) == (0, 2)
    async with Engine.open(settings, llm=quick()) as engine:
        assert (await engine.respond(said("ada", "hi", id="1"))).text
    assert audit(settings.data_dir)["failed"] == 1


@pytest.mark.parametrize("status", [401, 402, 403, 404])
async def test_a_message_outlives_a_wrong_key_and_is_answered_when_it_is_right(settings, monkeypatch, status):
    monkeypatch.setattr("whisper_fast.retries.FIRST", 0.001)
    monkeypatch.setattr(LLMMisconfigured, "retry_after", 0.001)
    mended, asked_again = asyncio.Event(), asyncio.Event()

    def answer(_):
        if mended.is_set():
            asked_again.set()
            return "here I am"
        raise refusal(status, "model", b"")

    llm = ScriptedLLM(answer)
    async with Engine.open(settings, llm=llm) as engine:
        with pytest.raises(LLMMisconfigured) as caught:
            await engine.respond(said("ada", "hi", id="1"))
        assert not caught.value.retriable
        assert audit(settings.data_dir)["failed"] == 0
        mended.set()
        await asked_again.wait()
    found = audit(settings.data_dir)
    assert (found["open"], found["failed"], found["done"]) == (0, 0, 1)


MODERATED = (
    b'{"error": {"code": 403, "metadata": {"reasons": ["violence"], "flagged_input": "secret"}}}',
    b'{"error": {"type": "content_policy_violation", "message": "secret"}}',
    b'{"error": {"code": "content_filter"}}',
)


@pytest.mark.parametrize("body", MODERATED)
async def test_what_a_servers_moderation_refuses_is_refused_for_good_and_not_repeated(settings, body):
    def answer(_):
        raise refusal(403, "model", body)

    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        with pytest.raises(LLMRejected, match="moderation") as caught:
            await engine.respond(said("ada", "hi", id="1"))
    assert not isinstance(caught.value, LLMMisconfigured)
    assert "secret" not in str(caught.value)
    found = audit(settings.data_dir)
    assert (found["open"], found["failed"]) == (0, 1)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"error": "no"}', b'{"error": {"metadata": {"reasons": []}}}', b"\xff"]
)
def test_a_403_that_speaks_of_no_moderation_is_about_the_key(body):
    assert isinstance(refusal(403, "model", body), LLMMisconfigured)


async def test_a_restore_never_gives_one_users_reply_to_another(settings, tmp_path):
    gate = asyncio.Event()

    async def answer(messages):
        if "ada" in messages[-1]["content"]:
            await gate.wait()
        return f"reply to {messages[-1]['content']}"

    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        await engine.respond(said("zoe", "hello"))
        await engine.backup(tmp_path / "b.db")
        ada = asyncio.ensure_future(engine.respond(said("ada", "this is ada", id="1")))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(restore, settings.data_dir, tmp_path / "b.db")
        assert (await engine.respond(said("bob", "this is bob", id="1"))).text == "reply to this is bob"
        gate.set()
        with pytest.raises(StoreError):  # its entry went with the restore, and it is told so
            await ada
        assert (await engine.respond(said("ada", "this is ada", id="1"))).text == "reply to this is ada"


async def test_more_open_messages_than_places_do_not_stop_a_start(settings):
    def dead(_):
        raise LLMUnavailable("nobody there")

    async with Engine.open(settings, llm=ScriptedLLM(dead)) as engine:
        messages = [said(f"u{n}", "hi", id="1") for n in range(8)]
        await asyncio.gather(*map(engine.respond, messages), return_exceptions=True)
    async with Engine.open(Settings(data_dir=settings.data_dir, max_waiting=3), llm=quick()):
        pass
    assert audit(settings.data_dir)["done"] == 8


@pytest.mark.parametrize(
    "wrong", [{"at": float("nan")}, {"at": "now"}, {"priority": "high"}, {"parameters": {"x": object()}}]
)
async def test_what_cannot_be_stored_is_refused_at_the_face(settings, wrong):
    async with Engine.open(settings, llm=quick()) as engine:
        with pytest.raises(InvalidMessage):
            await engine.respond(said("ada", "hi", **wrong))


async def test_a_journal_entry_that_cannot_be_read_does_not_stop_a_start(settings, caplog):
    async with Engine.open(settings, llm=quick()) as engine:
        sql = """INSERT INTO journal (platform, channel, user, message_id, accepted_at, message)
                 VALUES ('p', 'c', 'u', 'm', 0, 'not json')"""
        await engine._database.write(lambda c: c.execute(sql).get)
    async with Engine.open(settings, llm=quick()) as engine:
        assert (await engine.respond(said("ada", "hi"))).text
    assert "cannot be read" in caplog.text


async def test_forget_spares_what_came_after_it(settings):
    gate = asyncio.Event()

    async def answer(_):
        await gate.wait()
        return "mhm"

    async with Engine.open(settings, llm=ScriptedLLM(answer)) as engine:
        first = await engine.submit(said("ada", "before"))
        forgetting = asyncio.ensure_future(engine.forget("ada"))
        await asyncio.sleep(0.02)
        second = await engine.submit(said("ada", "after"))
        gate.set()
        await asyncio.gather(first.reply(), forgetting, second.reply())
        assert [memory["text"] async for memory in engine.export("ada")] == ["after"]
    assert audit(settings.data_dir)["done"] == 1


async def test_a_caller_that_leaves_while_its_message_is_accepted_keeps_its_place(settings):
    llm = ScriptedLLM(lambda _: "mhm")
    async with Engine.open(settings, llm=llm) as engine:
        leaving = asyncio.ensure_future(engine.respond(said("ada", "first")))
        await asyncio.sleep(0)
        leaving.cancel()
        await engine.respond(said("ada", "second"))
    assert [messages[-1]["content"] for messages in llm.asked] == ["first", "second"]


async def test_nonsense_from_components_never_ends_a_turn(settings):
    endless = []
    endless.append(endless)

    async def cancelled(_):
        await asyncio.sleep(0.01)
        raise asyncio.CancelledError

    async def nested(_):
        await asyncio.sleep(0.02)
        return endless

    async with Engine.open(settings, llm=quick()) as engine:
        engine.component("cancelled", cancelled)
        engine.component("nested", nested)
        engine.component("emotion", lambda _: "sad")
        for parallel in (True, False):
            engine.flags.parallel = parallel
            reply = await engine.respond(said("ada", "hi"))
            assert set(reply.partial) == {"cancelled", "nested", "emotion"}
        with pytest.raises(SettingsError):
            engine.component("recall", lambda _: ())
