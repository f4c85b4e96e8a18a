"""What a message does while the same user's earlier one in its channel is not answered yet."""

import asyncio
import threading

import pytest
from scripted import ScriptedLLM, quick, said

from whisper_fast import Engine, Settings, retries
from whisper_fast.errors import Busy, DeadlineExceeded, Interrupted, InvalidMessage, SettingsError
from whisper_fast.lab.audit import audit
from whisper_fast.llm.completion import Completion
from whisper_fast.message import Delta


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path / "data", process_pool_size=1, thread_pool_size=2, component_deadline=30)


class Gated(ScriptedLLM):
    """Repeats the user's words, each call as soon as its gate is open."""

    def __init__(self):
        super().__init__(None)
        self.gates = []
        self.cancelled = 0

    async def chat(self, messages, **_):
        self.asked.append(messages[-1]["content"])
        self.gates.append(asyncio.Event())
        try:
            await self.gates[-1].wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Completion(text=f"answer to {messages[-1]['content']}")

    async def stream(self, messages, **parameters):
        yield Delta("well, ")
        yield Delta((await self.chat(messages, **parameters)).text)

    async def calls(self, count):
        async with asyncio.timeout(20):
            while len(self.asked) < count:
                await asyncio.sleep(0.002)


async def conversation(engine, user):
    sql = "SELECT text, reply FROM conversation WHERE user = ? ORDER BY turn"
    return await engine._database.read(lambda c: list(c.execute(sql, (user,))))


async def test_queue_answers_each_in_its_turn(settings):
    llm = Gated()
    async with Engine.open(settings, llm=llm) as engine:
        tickets = [await engine.submit(said("ada", text, id=text)) for text in ("a", "b", "c")]
        for n in range(3):
            await llm.calls(n + 1)
            llm.gates[n].set()
        assert [(await ticket.reply()).text for ticket in tickets] == [f"answer to {t}" for t in "abc"]
    assert audit(settings.data_dir)["done"] == 3


async def test_merge_answers_what_waits_together(settings):
    llm = Gated()
    merging = Settings(data_dir=settings.data_dir, when_busy="merge")
    async with Engine.open(merging, llm=llm) as engine:
        first = await engine.submit(said("ada", "a", id="1"))
        await llm.calls(1)  # it runs: what comes now waits, and joins what waits
        waiting = [await engine.submit(said("ada", text, id=number)) for text, number in (("b", "2"), ("c", "3"))]
        elsewhere = await engine.submit(said("ada", "d", id="4", channel="other"))
        after = await engine.submit(said("ada", "e", id="5"))  # behind another channel's: it may not overtake that
        for n in range(4):
            await llm.calls(n + 1)
            llm.gates[n].set()
        replies = [await ticket.reply() for ticket in (first, *waiting, elsewhere, after)]
        assert llm.asked == ["a", "b\nc", "d", "e"]
        assert [reply.id for reply in replies] == ["1", "2", "3", "4", "5"]
        assert replies[1].text == replies[2].text == "answer to b\nc"
        assert (await engine.respond(said("ada", "c", id="3"))).text == "answer to b\nc"  # delivered again
        assert ("b\nc", "answer to b\nc") in await conversation(engine, "ada")
        assert sorted([m["text"] async for m in engine.export("ada")]) == ["a", "b\nc", "d", "e"]
    found = audit(settings.data_dir)
    assert (found["accepted"], found["done"], found["held"], found["duplicated"]) == (5, 5, 0, 0)


async def test_interrupt_begins_the_running_turn_again_with_both(settings):
    llm = Gated()
    async with Engine.open(settings, llm=llm) as engine:
        first = asyncio.ensure_future(engine.respond(said("ada", "tell me of cats", id="1")))
        await llm.calls(1)
        second = asyncio.ensure_future(engine.respond(said("ada", "no, of dogs", id="2", when_busy="interrupt")))
        await llm.calls(2)
        llm.gates[1].set()
        one, two = await asyncio.gather(first, second)
        assert llm.cancelled == 1
        assert llm.asked == ["tell me of cats", "tell me of cats\nno, of dogs"]
        assert (one.id, two.id) == ("1", "2")
        assert one.text == two.text == "answer to tell me of cats\nno, of dogs"
        assert [m["text"] async for m in engine.export("ada")] == [llm.asked[1]]  # after the turn, as its lane is
        assert len(await conversation(engine, "ada")) == 1
        assert engine.stats()["in_flight"] == 0
    found = audit(settings.data_dir)
    assert (found["done"], found["open"], found["duplicated"]) == (2, 0, 0)


async def test_two_that_interrupt_at_the_same_moment_are_both_answered(settings):
    asked, writer = asyncio.Event(), threading.Event()

    async def answer(messages):
        asked.set()
        if messages[-1]["content"] == "a":
            await asyncio.Event().wait()
        return f"answer to {messages[-1]['content']}"

    interrupting = Settings(data_dir=settings.data_dir, when_busy="interrupt")
    async with Engine.open(interrupting, llm=ScriptedLLM(answer)) as engine:
        first = await engine.submit(said("ada", "a", id="a"))
        await asked.wait()
        held = asyncio.ensure_future(engine._database.write(lambda _: writer.wait()))
        more = asyncio.gather(*(engine.submit(said("ada", text, id=text)) for text in "bc"))
        await asyncio.sleep(0)  # both are handed to the writer, which accepts them in one commit
        writer.set()
        tickets = [first, *await more]
        assert await held
        assert {(await ticket.reply()).text for ticket in tickets} == {"answer to a\nb\nc"}


async def test_interrupt_ends_a_stream_that_has_begun_and_keeps_its_reply_for_later(settings):
    llm = Gated()
    async with Engine.open(settings, llm=llm) as engine:
        stream = engine.stream(said("ada", "cats", id="1"))
        assert await anext(stream) == "well, "
        newer = engine.stream(said("ada", "dogs", id="2", when_busy="interrupt"))
        opened = asyncio.ensure_future(anext(newer))
        with pytest.raises(Interrupted):
            async for _ in stream:
                pass
        again = asyncio.ensure_future(engine.respond(said("ada", "cats", id="1")))  # joins what runs
        await llm.calls(2)
        llm.gates[1].set()
        text = await opened + "".join([piece async for piece in newer])
        assert text == newer.reply.text == "well, answer to cats\ndogs"
        assert (await again).text == text


async def test_who_keeps_on_interrupting_is_answered_all_the_same(settings):
    llm = Gated()
    async with Engine.open(settings, llm=llm) as engine:
        tickets = []
        for n in range(20):
            tickets.append(await engine.submit(said("ada", f"n{n}", id=f"{n}", when_busy="interrupt")))
            await llm.calls(min(n + 1, 16))
        llm.gates[15].set()
        assert (await tickets[0].reply()).text.endswith("n15")  # 16 in one round, then the next one begins
        await llm.calls(17)
        llm.gates[16].set()
        assert (await tickets[19].reply()).text.endswith("n19")


async def test_drop_refuses_the_newer_and_keeps_nothing_of_it(settings):
    llm = Gated()
    dropping = Settings(data_dir=settings.data_dir, when_busy_by_channel={"busy": "drop"})
    async with Engine.open(dropping, llm=llm) as engine:
        first = await engine.submit(said("ada", "a", id="1", channel="busy"))
        await llm.calls(1)
        with pytest.raises(Busy) as refused:
            await engine.submit(said("ada", "b", id="2", channel="busy"))
        assert refused.value.retriable
        assert refused.value.retry_after > 0
        same = await engine.submit(said("ada", "a", id="1", channel="busy"))  # the same message again is no other one
        await engine.submit(said("bob", "b", id="2", channel="busy"))
        await engine.submit(said("ada", "b", id="2", channel="calm"))
        for n in range(3):
            await llm.calls(n + 1)
            llm.gates[n].set()
        assert (await first.reply()).text == (await same.reply()).text
    assert audit(settings.data_dir)["accepted"] == 3


async def test_drop_gives_an_answered_message_its_reply_while_another_one_runs(settings):
    llm = Gated()
    dropping = Settings(data_dir=settings.data_dir, when_busy="drop")
    async with Engine.open(dropping, llm=llm) as engine:
        first = await engine.submit(said("ada", "a", id="1"))
        await llm.calls(1)
        llm.gates[0].set()
        reply = await first.reply()
        await engine._lanes._settled.wait()
        second = await engine.submit(said("ada", "b", id="2"))
        await llm.calls(2)
        assert (await engine.respond(said("ada", "a", id="1"))).text == reply.text
        with pytest.raises(Busy):
            await engine.submit(said("ada", "c", id="3"))
        llm.gates[1].set()
        await second.reply()
    assert audit(settings.data_dir)["accepted"] == 2


async def test_a_failed_round_is_tried_again_whole(settings, monkeypatch):
    monkeypatch.setattr(retries, "FIRST", 0.01)
    failing = True

    async def answer(messages):
        await asyncio.sleep(0.01)
        if failing:
            raise DeadlineExceeded("the model was too slow")
        return f"answer to {messages[-1]['content']}"

    merging = Settings(data_dir=settings.data_dir, when_busy="merge")
    async with Engine.open(merging, llm=ScriptedLLM(answer)) as engine:
        tickets = [await engine.submit(said("ada", text, id=text)) for text in ("a", "b", "c")]
        ends = await asyncio.gather(*(ticket.reply() for ticket in tickets), return_exceptions=True)
        assert {type(end) for end in ends} == {DeadlineExceeded}
        failing = False
        async with asyncio.timeout(20):
            while engine.stats()["answered"] < 3:
                await asyncio.sleep(0.01)
            await engine._lanes._settled.wait()
        texts = "\n".join([text for text, _ in await conversation(engine, "ada")])
        assert sorted(texts.split("\n")) == ["a", "b", "c"]


@pytest.mark.parametrize("policy", ["merge", "interrupt"])
async def test_a_crash_in_a_round_loses_and_doubles_nothing(settings, policy):
    async def never(_):
        await asyncio.Event().wait()

    cut = Settings(data_dir=settings.data_dir, when_busy=policy, drain_seconds=0.01)
    async with Engine.open(cut, llm=ScriptedLLM(never)) as engine:
        for n in range(4):
            await engine.submit(said("ada", f"n{n}", id=f"{n}"))
    assert audit(settings.data_dir)["open"] == 4
    llm = ScriptedLLM(lambda messages: "mhm")
    async with Engine.open(cut, llm=llm) as engine:
        replies = [await engine.respond(said("ada", f"n{n}", id=f"{n}")) for n in range(4)]
        assert [reply.id for reply in replies] == [f"{n}" for n in range(4)]
        texts = "\n".join([text for text, _ in await conversation(engine, "ada")])
        assert texts.split("\n") == [f"n{n}" for n in range(4)]
    found = audit(settings.data_dir)
    assert (found["done"], found["open"], found["duplicated"]) == (4, 0, 0)


async def test_forget_between_two_messages_keeps_them_apart(settings):
    llm = Gated()
    merging = Settings(data_dir=settings.data_dir, when_busy="interrupt")
    async with Engine.open(merging, llm=llm) as engine:
        first = await engine.submit(said("ada", "before", id="1"))
        await llm.calls(1)
        forgetting = asyncio.ensure_future(engine.forget("ada"))
        await asyncio.sleep(0.01)
        second = await engine.submit(said("ada", "after", id="2"))
        llm.gates[0].set()
        await llm.calls(2)
        llm.gates[1].set()
        await asyncio.gather(first.reply(), forgetting, second.reply())
        assert [m["text"] async for m in engine.export("ada")] == ["after"]


async def test_wrong_policies_and_weights_are_refused(settings):
    async with Engine.open(settings, llm=quick()) as engine:
        for wrong in ({"when_busy": "wait"}, {"weight": 0}, {"weight": "much"}, {"weight": float("nan")}):
            with pytest.raises(InvalidMessage):
                await engine.respond(said("ada", "hi", **wrong))


def test_the_policy_of_a_channel_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("WHISPER_FAST_WHEN_BUSY_BY_CHANNEL", '{"general": "merge"}')
    assert Settings().when_busy_by_channel == {"general": "merge"}
    for wrong in ("merge", '{"general": "wait"}', "[]"):
        monkeypatch.setenv("WHISPER_FAST_WHEN_BUSY_BY_CHANNEL", wrong)
        with pytest.raises(SettingsError, match="WHISPER_FAST_WHEN_BUSY_BY_CHANNEL"):
            Settings()
