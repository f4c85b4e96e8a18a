"""Streams: pieces of one read together, a server held back, silence ended, tokens counted or estimated."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast.errors import LLMProtocolError, LLMTimeout, LLMUnavailable
from whisper_fast.lab.faulty import FaultyLLM
from whisper_fast.llm import Endpoint, LLMPool, OpenAIProvider, SimulatedLLM, Timeouts
from whisper_fast.llm.pieces import PieceReader
from whisper_fast.llm.silence import Silence
from whisper_fast.llm.slots import Slots
from whisper_fast.llm.tokens import Tokens
from whisper_fast.llm.upstream import TOKENS
from whisper_fast.message import Usage

HELLO = [{"role": "user", "content": "hello"}]
MB = 1_000_000


def event(text=None, **more):
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": None, **more}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


LAST = event(finish_reason="stop") + b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def serving(script, **limits):
    """Serve every request with `script(writer)`; yields a provider for it."""
    writers = set()

    async def handle(reader, writer):
        writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
            await script(writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    provider = OpenAIProvider(Endpoint(url, "m", timeouts=Timeouts(**limits)), timeout=30)
    try:
        yield provider
    finally:
        await provider.close()
        server.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def read(pieces):
    return [piece async for piece in pieces]


async def gather_into(got, pieces):
    async for piece in pieces:
        got.append(piece)


# -- pieces


async def test_the_chunks_of_one_read_come_together():
    async def at_once(writer):
        writer.write(b"".join(event(f"{n} ") for n in range(200)) + LAST)
        await writer.drain()

    async with serving(at_once) as provider:
        batches = await read(provider.batches(HELLO))
        assert "".join("".join(batch) for batch in batches) == "".join(f"{n} " for n in range(200))
        assert len(batches) < 20
        assert "".join(await read(provider.stream(HELLO))) == "".join(f"{n} " for n in range(200))


async def test_what_came_before_a_broken_event_is_given_first():
    async def broken(writer):
        writer.write(event("a") + event("b") + b"data: {]\n\n" + event("c") + LAST)
        await writer.drain()

    got = []
    async with serving(broken) as provider:
        with pytest.raises(LLMProtocolError):
            await gather_into(got, provider.stream(HELLO))
    assert got == ["a", "b"]


TEXTS = st.lists(st.one_of(st.none(), st.just(""), st.text(st.characters(exclude_categories=["Cs"]), max_size=9)))


@settings(deadline=None)
@given(st.data(), TEXTS, st.sampled_from(["\n", "\r\n"]))
def test_any_split_gives_the_same_pieces(data, texts, newline):
    raw = b": hi\n\n" + b"".join(map(event, texts)) + LAST
    raw = raw.replace(b"\n", newline.encode())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    reader, pieces = PieceReader("here"), []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        if end > start:
            pieces += reader.feed(raw[start:end])
    assert [str(piece) for piece in pieces] == [text for text in texts if text] + [""]
    assert (reader.over, reader.failure, pieces[-1].finish_reason) == (True, None, "stop")
    assert reader.size == sum(len((text or "").encode()) for text in texts)
    assert reader.events == len(texts) + 2


@pytest.mark.parametrize("null", ["choices", "delta", "usage", "error"])
def test_null_parts_of_an_event_bring_nothing(null):
    whole = {"choices": [{"delta": {"content": None}}], "usage": None, "error": None}
    if null == "delta":
        whole["choices"] = [{"delta": None}]
    else:
        whole[null] = None
    reader = PieceReader("here")
    assert reader.feed(b"data: " + json.dumps(whole).encode() + b"\n\n" + event("x")) == ["x"]
    assert reader.failure is None


def test_empty_events_bring_nothing():
    reader = PieceReader("here")
    assert reader.feed(event("a") + b"data: \n\ndata:\n\n\n\n" + event("b") + b"data: \n\n" + LAST) == ["a", "b", ""]
    assert (reader.over, reader.failure) == (True, None)


# -- a reader that stalls


async def test_a_stalled_reader_holds_the_server_back():
    block = event("x" * 200) * 300
    sent, stalled = 0, asyncio.Event()

    async def flood(writer):
        nonlocal sent
        while sent < 100 * MB:
            writer.write(block)
            sent += len(block)
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except TimeoutError:
                stalled.set()
                await writer.drain()

    async with serving(flood) as provider:
        before = psutil.Process().memory_info().rss
        pieces = provider.stream(HELLO)
        assert await anext(pieces)
        await stalled.wait()
        assert sent < 30 * MB, "the rest is in the kernel's buffers, not here"
        assert psutil.Process().memory_info().rss - before < 12 * MB
        with pytest.raises(LLMProtocolError, match="more than"):
            await read(pieces)


# -- silence


async def test_a_server_that_falls_silent_between_tokens_is_left():
    gone = asyncio.Event()

    async def silent(writer):
        writer.write(event("a"))
        with contextlib.suppress(ConnectionError):
            while True:  # comments are no tokens
                writer.write(b": still here\n\n")
                await writer.drain()
                await asyncio.sleep(0.02)
        gone.set()

    async with serving(silent, between_tokens=0.2) as provider:
        pieces = provider.stream(HELLO)
        assert await anext(pieces) == "a"
        with pytest.raises(LLMTimeout, match="next token"):
            await anext(pieces)
        await gone.wait()


async def test_a_first_token_that_does_not_come_is_not_waited_for():
    async def comments(writer):
        while True:
            writer.write(b": thinking\n\n")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with serving(comments, first_token=0.2) as provider:
        with pytest.raises(LLMTimeout, match="first token"):
            await read(provider.stream(HELLO))


async def test_thoughts_without_text_are_a_sign_of_life_and_a_slow_reader_is_no_silence():
    async def thinking(writer):
        for _ in range(8):
            writer.write(event(delta={"reasoning_content": "hm"}))
            await writer.drain()
            await asyncio.sleep(0.1)
        writer.write(event("a") + event("b"))
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.write(LAST)

    async with serving(thinking, between_tokens=0.6) as provider:
        got = []
        async for piece in provider.stream(HELLO):
            got.append(str(piece))
            if piece == "b":
                await asyncio.sleep(0.9)
    assert "".join(got) == "ab"


async def test_silence_keeps_one_timer_and_takes_a_nearer_time():
    class Content:
        def set_exception(self, error):
            ended.set_result(error)

    class Response:
        content = Content()

        def close(self):
            pass

    ended = asyncio.get_running_loop().create_future()
    silence = Silence(Response(), "here")
    silence.expect("nothing", None)
    assert silence._timer is None
    silence.expect("far", 60)
    first = silence._timer
    silence.expect("farther", 90)
    assert silence._timer is first
    silence.expect("near", 0.01)
    assert "near did not come within 0.01 s" in str(await ended)
    silence.end()


async def test_a_connection_that_nobody_takes_is_given_up():
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # the queue of connections is full: the kernel answers no further one
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        provider = OpenAIProvider(Endpoint(url, "m", timeouts=Timeouts(connect=0.1)), timeout=30)
        with pytest.raises(LLMUnavailable, match="accept a connection"):
            await provider.chat(HELLO)
        await provider.close()


# -- tokens


async def test_a_server_that_does_not_count_is_estimated_by_what_its_counts_taught():
    counted = True

    async def answer(writer):
        writer.write(event("x" * 600))
        if counted:
            usage = {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 300}}
            writer.write(b"data: " + json.dumps(usage).encode() + b"\n\n")
        writer.write(LAST)
        await writer.drain()

    async with serving(answer) as provider:
        for _ in range(30):
            pieces = await read(provider.stream(HELLO))
            assert {piece.usage for piece in pieces} == {None, Usage(30, 300)}
        counted = False
        *_, last = await read(provider.stream(HELLO))
        assert last.usage.estimated
        assert last.usage.completion_tokens == pytest.approx(300, rel=0.1)
        assert last.usage.prompt_tokens == pytest.approx(30, rel=0.3)
        stats = provider.tokens.stats()
        assert stats["estimated_tokens"] == last.usage.total_tokens
        assert stats["completion_tokens"] == 30 * 300 + last.usage.completion_tokens


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_the_tokens_of_a_stream_that_was_left_are_kept(how):
    async def endless(writer):
        writer.write(event("word " * 80))
        await writer.drain()
        await asyncio.Event().wait()

    async with serving(endless) as provider:
        pieces = provider.stream(HELLO)
        assert await anext(pieces)
        if how == "close":
            await pieces.aclose()
        else:
            task = asyncio.create_task(anext(pieces))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        stats = provider.tokens.stats()
        assert stats["completion_tokens"] == 100
        assert stats["estimated_tokens"] == stats["completion_tokens"] + stats["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_was_left_before_it_was_answered_counts_its_prompt(stream):
    messages = [{"role": "user", "content": "x" * 4000}]
    async with FaultyLLM(SimulatedLLM(60)) as server:
        provider = OpenAIProvider(Endpoint(server.url, "m"))
        task = asyncio.create_task(read(provider.stream(messages)) if stream else provider.chat(messages))
        async with asyncio.timeout(5):
            while not server.open:
                await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.wait([task])
        assert provider.tokens.stats()["prompt_tokens"] > 900
        await provider.close()


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 900), st.integers(0, 900))))
def test_estimates_stay_between_the_ratios_that_were_seen(calls):
    tokens = Tokens()
    ratios = [4.0]
    for sent, received, prompt, completion in calls:
        tokens.settle(sent, received, Usage(prompt, completion))
        ratios += [received / completion] if received and completion else []
    guess = tokens.settle(0, 10_000, None)
    assert guess.estimated
    assert 10_000 / max(ratios) - 1 <= guess.completion_tokens <= 10_000 / min(ratios) + 1


# -- leaving


async def test_the_server_learns_at_once_that_a_stream_was_left():
    async with FaultyLLM(SimulatedLLM(30)) as server, LLMPool([Endpoint(server.url, "m")]) as pool:
        tasks = [asyncio.create_task(read(pool.stream(HELLO))) for _ in range(20)]
        async with asyncio.timeout(10):
            while server.open < 20:
                await asyncio.sleep(0.002)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert pool.stats()["in_flight"] == 0
        async with asyncio.timeout(10):
            while server.open:
                await asyncio.sleep(0.002)
        assert server.aborted == 20


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_may_be_cancelled_at_any_await(stream):
    async with FaultyLLM(SimulatedLLM(0.004)) as server:
        pool = LLMPool([Endpoint(server.url)], max_concurrent=2)
        for steps in range(60):
            call = read(pool.stream(HELLO)) if stream else pool.chat(HELLO)
            task = asyncio.create_task(call)
            for _ in range(steps):
                await asyncio.sleep(0.0005 if steps > 30 else 0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or task.exception() is None
            assert pool.stats()["in_flight"] == 0
        assert (await pool.chat(HELLO)).text
        async with asyncio.timeout(10):
            while server.open:
                await asyncio.sleep(0.002)
        await pool.close()
        async with asyncio.timeout(10):
            while server.connections:
                await asyncio.sleep(0.002)


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_stream_that_does_not_end_is_charged_what_it_took(cancelled):
    """Not what a call is expected to cost: whoever leaves long answers before their end would get them cheaply."""

    async def script(writer):
        writer.write(event("word " * 4000))
        await writer.drain()
        if cancelled:
            await writer.wait_closed()

    async with serving(script) as provider:
        pool = LLMPool([provider], max_concurrent=1, hedging=lambda: False)
        charged = []
        settle = Slots.settle

        def noted(slots, caller, difference, since):
            charged.append((caller.user, difference, since))
            settle(slots, caller, difference, since)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Slots, "settle", noted)
            pieces = pool.stream(HELLO, user="ada")
            assert await anext(pieces)
            if cancelled:
                await pieces.aclose()
            else:
                with pytest.raises(LLMProtocolError):
                    await read(pieces)
        [(user, difference, since)] = charged
        assert (user, since > 0) == ("ada", True)
        tokens = pool.stats()["tokens"]
        assert TOKENS + difference == tokens["prompt_tokens"] + tokens["completion_tokens"]
        assert difference > 0
        await pool.close()
