"""The provider over real sockets: the protocol, every fault as its typed error in time, and no secret in any text."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from time import monotonic

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_fast.errors import (
    Closed,
    InvalidMessage,
    LLMError,
    LLMMisconfigured,
    LLMProtocolError,
    LLMRateLimited,
    LLMRejected,
    LLMTimeout,
    LLMUnavailable,
    SettingsError,
)
from whisper_fast.lab.faulty import FAULTS, FaultyLLM
from whisper_fast.llm import Completion, Endpoint, LLMPool, OpenAIProvider, SimulatedLLM
from whisper_fast.llm.sse import EventReader
from whisper_fast.llm.wire import retry_after
from whisper_fast.message import Delta, Usage

KEY = "sk-very-secret-key"
SECRET = "the-words-of-the-prompt"
MESSAGES = [{"role": "system", "content": "- likes tea"}, {"role": "user", "content": SECRET}]
TOOL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}

EXPECTED = {
    "refuse": LLMUnavailable,
    "certificate": LLMUnavailable,
    "reset": LLMUnavailable,
    "hang": LLMTimeout,
    "cut": LLMUnavailable,
    "end": LLMProtocolError,
    "drip": LLMTimeout,
    "rate_limited": LLMRateLimited,
    "error": LLMUnavailable,
    "rejected": LLMMisconfigured,
    "invalid": LLMRejected,
    "bad_sse": LLMProtocolError,
    "bad_json": LLMProtocolError,
    "bad_utf8": LLMProtocolError,
    "huge": LLMProtocolError,
    "redirect": LLMProtocolError,
}
ONLY_STREAMS = {"end"}
CASES = [(fault, stream) for fault in EXPECTED for stream in (False, True) if stream or fault not in ONLY_STREAMS]


@contextlib.asynccontextmanager
async def asking(server, *, timeout=5, model="m", key=KEY):
    provider = OpenAIProvider(Endpoint(server.url, model, key), timeout=timeout)
    try:
        yield provider
    finally:
        await provider.close()


@contextlib.asynccontextmanager
async def answering(*pieces, head="200 OK", close=True):
    """Serve `pieces` as the raw body of every answer, each in its own network write."""
    writers = set()

    async def handle(reader, writer):
        writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {head}\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n".encode())
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)
            if not close:
                await reader.read()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    provider = OpenAIProvider(Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", KEY), timeout=5)
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


def told(error):
    """Return all that a log could show of an error."""
    shown = "".join(traceback.format_exception(error))
    return f"{shown} {error!r} {error.args} {error.__dict__} {error.__cause__!r} {error.__context__!r}"


async def until(condition, seconds=5.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


# -- the protocol


async def test_a_chat_goes_to_the_server_as_it_is_and_comes_back():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    messages = [*MESSAGES, {"role": "tool", "tool_call_id": "call_0", "content": "sunny \u4f60\u597d"}]
    async with FaultyLLM(SimulatedLLM(0)) as server, asking(server) as provider:
        reply = await provider.chat(messages, temperature=0.2, tools=tools, unheard_of={"a": [1, None]})
    assert f'"{SECRET}"' in reply.text
    assert '"likes tea"' in reply.text
    assert (reply.finish_reason, reply.model) == ("stop", "simulated")
    assert reply.usage.prompt_tokens > 0
    assert server.seen[0] == {
        "model": "m", "messages": messages,
        "temperature": 0.2, "tools": tools, "unheard_of": {"a": [1, None]},
    }  # fmt: skip


async def test_a_stream_brings_the_same_text_its_end_and_the_usage():
    async with FaultyLLM(SimulatedLLM(0.02, tokens=120)) as server, asking(server) as provider:
        whole = await provider.chat(MESSAGES)
        pieces = await read(provider.stream(MESSAGES, temperature=1))
        assert "".join(pieces) == whole.text
        assert len(pieces) > 10
        assert {piece.finish_reason for piece in pieces} == {None, "stop"}
        assert pieces[-1].usage == whole.usage
        assert server.seen[-1]["stream_options"] == {"include_usage": True}
        await read(provider.stream(MESSAGES))
        assert server.requests["/v1/chat/completions"] == 3
        assert len(provider._transport._session.connector._conns) == 1, "a finished stream's connection is used again"


async def test_the_callers_parameters_win_where_they_are_ours_too():
    async with FaultyLLM(SimulatedLLM(0)) as server, asking(server) as provider:
        await provider.chat(MESSAGES, model="other", stream=True)
        assert (server.seen[-1]["model"], "stream" in server.seen[-1]) == ("other", False)
        await read(provider.stream(MESSAGES, stream_options={"include_usage": False}))
        assert server.seen[-1]["stream_options"] == {"include_usage": False}


async def test_a_server_without_stream_options_is_asked_without_them_from_then_on():
    async with FaultyLLM(SimulatedLLM(0)) as server, asking(server) as provider:
        server.fault = "no_options"
        for _ in range(2):
            assert SECRET in "".join(await read(provider.stream(MESSAGES)))
        assert ["stream_options" in body for body in server.seen] == [True, False, False]


async def test_a_wrong_request_is_not_taken_for_a_server_without_stream_options():
    async with FaultyLLM(SimulatedLLM(0)) as server, asking(server) as provider:
        server.faults.extend(["invalid", "invalid", None, "invalid"])
        with pytest.raises(LLMRejected):
            await read(provider.stream(MESSAGES))
        await read(provider.stream(MESSAGES))
        assert "stream_options" in server.seen[-1]
        with pytest.raises(LLMRejected):
            await read(provider.stream(MESSAGES))
        assert len(server.seen) == 4, "a server known to take the option is not asked twice"


async def test_tool_calls_come_back_whole_and_in_fragments():
    body = {"choices": [{"message": {"content": None, "tool_calls": [TOOL]}, "finish_reason": "tool_calls"}]}
    async with answering(msgspec.json.encode(body)) as provider:
        reply = await provider.chat(MESSAGES)
    assert msgspec.structs.replace(reply, usage=Usage()) == Completion(
        text="", finish_reason="tool_calls", tool_calls=(TOOL,)
    )
    chunk = {"choices": [{"delta": {"tool_calls": [TOOL | {"index": 0}]}, "finish_reason": None}]}
    last = {"choices": [{"delta": {}, "finish_reason": "tool_calls"}], "usage": None}
    async with answering(*(b"data: " + msgspec.json.encode(c) + b"\n\n" for c in (chunk, last))) as provider:
        pieces = await read(provider.stream(MESSAGES))
    assert [piece.tool_calls for piece in pieces] == [(TOOL | {"index": 0},), (), ()]
    assert [piece.finish_reason for piece in pieces] == [None, "tool_calls", None]


async def test_null_and_missing_parts_of_an_answer_are_no_error():
    body = b'{"choices":[{"message":{"content":"x"},"finish_reason":null}],"usage":{"prompt_tokens":null},"new":1}'
    async with answering(body) as provider:
        answer = await provider.chat(MESSAGES)
    assert (answer.text, answer.finish_reason, answer.usage.estimated) == ("x", "stop", True)


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b'"x"', b"{}", b'{"choices": []}', b"<html>", b'{"choices": [{}]}']
)
async def test_an_answer_of_another_shape_is_a_protocol_error(body):
    async with answering(body) as provider:
        with pytest.raises(LLMProtocolError):
            await provider.chat(MESSAGES)
        with pytest.raises(LLMProtocolError):
            await read(provider.stream(MESSAGES))


@pytest.mark.parametrize(
    ("code", "kind"),
    [("429", LLMRateLimited), ("502", LLMUnavailable), ("400", LLMRejected), ('"odd"', LLMUnavailable)],
)
async def test_an_error_in_the_middle_of_a_stream_is_typed(code, kind):
    error = f'data: {{"error": {{"code": {code}, "message": "{SECRET}"}}}}\n\n'.encode()
    async with answering(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', error) as provider:
        with pytest.raises(kind) as caught:
            await read(provider.stream(MESSAGES))
    assert SECRET not in told(caught.value).replace("MESSAGES", "")


async def test_raw_bytes_that_are_not_http_are_a_protocol_error():
    async def babble(reader, writer):
        writer.write(b"\x00\x01 SSH-2.0 hello\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        provider = OpenAIProvider(Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "m", KEY))
        with pytest.raises(LLMProtocolError) as caught:
            await provider.chat(MESSAGES)
        assert KEY not in told(caught.value)
        await provider.close()


@pytest.mark.parametrize("wrong", [{"role": "user", "content": "\ud800"}, {"role": "user", "content": object()}])
async def test_what_cannot_be_written_as_json_is_refused_before_it_is_sent(wrong):
    async with FaultyLLM() as server, asking(server) as provider:
        with pytest.raises(InvalidMessage) as caught:
            await provider.chat([*MESSAGES, wrong])
        assert SECRET not in told(caught.value)
        assert not server.requests


# -- faults


@pytest.mark.parametrize(("fault", "stream"), CASES)
async def test_every_fault_ends_in_its_typed_error_in_time_and_tells_no_secret(fault, stream, caplog):
    caplog.set_level(logging.DEBUG)
    timeout = 0.4 if EXPECTED[fault] is LLMTimeout else 5
    async with FaultyLLM(SimulatedLLM(0.01)) as server, asking(server, timeout=timeout) as provider:
        server.fault = fault
        begin = monotonic()
        with pytest.raises(LLMError) as caught:
            await (read(provider.stream(MESSAGES)) if stream else provider.chat(MESSAGES))
        assert monotonic() - begin < timeout + 0.25
        assert type(caught.value) is EXPECTED[fault]
        shown = told(caught.value) + repr(provider) + repr(provider.endpoint) + caplog.text
        assert KEY not in shown
        assert SECRET not in shown
        assert server.requests["/elsewhere"] == 0
        await until(lambda: server.open == 0)
        server.fault = None
        assert SECRET in (await provider.chat(MESSAGES)).text, "the next call is whole"


def test_every_fault_of_the_server_is_tried():
    assert FAULTS.keys() == EXPECTED.keys() | {"no_options"}


async def test_a_refused_connection_and_its_end():
    async with FaultyLLM(SimulatedLLM(0)) as server, asking(server) as provider:
        await server.refuse()
        with pytest.raises(LLMUnavailable, match="ECONNREFUSED"):
            await provider.chat(MESSAGES)
        await server.listen()
        assert (await provider.chat(MESSAGES)).text


async def test_a_kept_connection_that_the_server_has_closed_is_unavailable_and_the_pool_asks_again():
    async with FaultyLLM(SimulatedLLM(0)) as server, LLMPool([Endpoint(server.url, "m")]) as pool:
        server.faults.extend([None, "reset"])
        for _ in range(2):
            assert (await pool.chat(MESSAGES)).text
        assert pool.stats()["errors"] == {"LLMUnavailable": 1}


@pytest.mark.parametrize("value", ["9" * 400, "90000", "Wed, 21 Oct 9999 07:28:00 GMT"])
def test_a_retry_after_beyond_all_reason_is_a_day(value):
    assert retry_after(value) == 86400


@pytest.mark.parametrize(("header", "seconds"), [("2", 2), ("0", 0), (None, None), ("soon", None), ("-3", None)])
async def test_retry_after_in_seconds_reaches_the_error(header, seconds):
    async with FaultyLLM() as server, asking(server) as provider:
        server.fault, server.retry_after = "rate_limited", header
        with pytest.raises(LLMRateLimited) as caught:
            await provider.chat(MESSAGES)
    assert (caught.value.retry_after, caught.value.status) == (seconds, 429)


def test_retry_after_as_a_date():
    now = datetime.now(UTC)
    assert retry_after(format_datetime(now + timedelta(seconds=60), usegmt=True)) == pytest.approx(60, abs=2)
    assert retry_after(format_datetime(now - timedelta(seconds=60), usegmt=True)) == 0
    assert retry_after("Wed, 99 Foo 2025 00:00:00 GMT") is None


async def test_the_server_must_answer_within_one_budget_the_models_question_included():
    async with FaultyLLM(SimulatedLLM(3)) as server, asking(server, model=None, timeout=0.15) as provider:
        begin = monotonic()
        with pytest.raises(LLMTimeout):
            await provider.chat(MESSAGES)
        assert monotonic() - begin < 1


async def test_a_call_after_close_says_so():
    provider = OpenAIProvider(Endpoint("http://127.0.0.1:9", "m"))
    await provider.close()
    with pytest.raises(Closed):
        await provider.chat(MESSAGES)
    await provider.close()


# -- cancelling


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_a_caller_aborts_the_request_upstream(stream):
    async with FaultyLLM(SimulatedLLM(5)) as server, LLMPool([Endpoint(server.url, "m")], max_concurrent=1) as pool:
        call = asyncio.create_task(read(pool.stream(MESSAGES)) if stream else pool.chat(MESSAGES))
        await until(lambda: server.open == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert pool.stats()["in_flight"] == 0
        await until(lambda: server.open == 0)
        assert server.aborted == 1


@pytest.mark.parametrize("how", ["close", "cancel", "forget"])
async def test_a_stream_that_is_not_read_to_its_end_is_aborted_upstream(how):
    async with FaultyLLM(SimulatedLLM(0.8)) as server, LLMPool([Endpoint(server.url, "m")], max_concurrent=1) as pool:
        pieces = pool.stream(MESSAGES)
        assert isinstance(await anext(pieces), Delta)
        assert (server.open, pool.stats()["in_flight"]) == (1, 1)
        if how == "close":
            await pieces.aclose()
        elif how == "cancel":
            reader = asyncio.create_task(read(pieces))
            await asyncio.sleep(0.01)
            reader.cancel()
            await asyncio.wait([reader])
        else:
            del pieces
            gc.collect()
        await until(lambda: server.open == 0)
        assert (server.aborted, pool.stats()["in_flight"]) == (1, 0)


async def test_closing_the_pool_aborts_what_is_upstream():
    async with FaultyLLM(SimulatedLLM(5)) as server:
        pool = LLMPool([Endpoint(server.url, "m")])
        calls = [asyncio.create_task(pool.chat(MESSAGES)) for _ in range(5)]
        await until(lambda: server.open == 5)
        await pool.close()
        assert {type(result) for result in await asyncio.gather(*calls, return_exceptions=True)} == {Closed}
        await until(lambda: server.open == 0)


# -- which model


async def test_a_hundred_first_calls_ask_for_the_model_once():
    server = FaultyLLM(SimulatedLLM(0), models=("text-embed-x", "tiny"))
    async with server, LLMPool([Endpoint(server.url)], max_concurrent=100) as pool:
        await asyncio.gather(*(pool.chat(MESSAGES) for _ in range(100)))
        assert pool.models == ("tiny",)
    assert server.requests == {"/v1/models": 1, "/v1/chat/completions": 100}
    assert {body["model"] for body in server.seen} == {"tiny"}


async def test_one_cancelled_asker_does_not_cancel_the_others():
    async with FaultyLLM(SimulatedLLM(0)) as server, asking(server, model=None) as provider:
        first, second = (asyncio.create_task(provider.chat(MESSAGES)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).text
        assert server.requests["/v1/models"] == 1


async def test_a_failed_question_for_the_model_reaches_each_asker_and_is_asked_again():
    async with FaultyLLM(SimulatedLLM(0), models=()) as server, asking(server, model=None) as provider:
        errors = await asyncio.gather(*(provider.chat(MESSAGES) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [LLMMisconfigured] * 3
        assert len(set(map(id, errors))) == 3
        server.models.append("loaded-since")
        assert (await provider.chat(MESSAGES)).text
        assert (provider.model, server.requests["/v1/models"]) == ("loaded-since", 2)


# -- addresses


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1"),
        ("https://h/api", "https://h/api/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        (" http://[::1]:80/v1 ", "http://[::1]:80/v1"),
    ],
)
def test_an_address_has_one_form(given, normal):
    assert Endpoint(given).base_url == normal


@pytest.mark.parametrize(
    "wrong",
    [
        "", "h:1/v1", "//h/v1", "ftp://h/v1", "file:///etc/passwd", "http://", "http://h:99999", "http://[::1",
        f"http://user:{KEY}@h/v1", f"http://{KEY}@h/v1", f"http://h/v1?key={KEY}", f"http://h/v1#{KEY}",
        f"ftp://{KEY}:{KEY}@h", f"http://h:{KEY}/v1", "http://a b/v1",
    ],
)  # fmt: skip
def test_a_wrong_address_is_refused_without_repeating_a_secret(wrong):
    with pytest.raises(SettingsError) as caught:
        Endpoint(wrong)
    assert KEY not in told(caught.value)


@pytest.mark.parametrize("key", ["", "a b", "a\r\nX-Evil: 1", "schl\u00fcssel"])
def test_a_key_that_cannot_be_a_header_is_refused(key):
    with pytest.raises(SettingsError) as caught:
        Endpoint("http://h", api_key=key)
    assert not key or key not in str(caught.value)


def test_an_endpoints_repr_hides_its_key():
    assert KEY not in repr(Endpoint("http://h", "m", KEY)) + repr(OpenAIProvider(Endpoint("http://h", "m", KEY)))


# -- server-sent events

NEWLINES = st.sampled_from(["\n", "\r\n", "\r"])
DATA = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1)


@settings(deadline=None)
@given(st.data(), st.lists(DATA.filter(lambda text: not text.startswith(" "))), NEWLINES, st.booleans())
def test_events_survive_any_split_newline_and_comment(data, texts, newline, space):
    lines = []
    for text in texts:
        lines += [f": comment {text}", f"data:{' ' if space else ''}{text}", "id: 7", ""]
    raw = b"\xef\xbb\xbf" + newline.join([*lines, ""]).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)))))
    reader, events = EventReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        events += reader.feed(raw[start:end])
    assert [event.decode() for event in events + reader.end()] == texts


def test_an_event_of_several_data_lines_is_one():
    assert EventReader().feed(b"data: a\ndata:  b\ndata\n\nevent: x\n\ndata:c\n\n") == [b"a\n b", b"c"]


def test_a_newline_split_between_its_two_characters_is_one():
    reader = EventReader()
    raw = b"data: a\r\ndata: b\r\n\r\n"
    assert [event for byte in raw for event in reader.feed(bytes([byte]))] == [b"a\nb"]


def test_a_missing_last_line_is_forgiven_and_an_endless_stream_is_not():
    reader = EventReader(max_bytes=100)
    assert reader.feed(b"data: [DONE]") == []
    assert reader.end() == [b"[DONE]"]
    with pytest.raises(LLMProtocolError):
        reader.feed(b": ping\n" * 15)


async def test_a_stream_in_many_small_and_crlf_writes_is_read():
    raw = (
        ": hello\r\n\r\n"
        'data: {"choices":[{"index":1,"delta":{"content":"other"}},{"index":0,"delta":{"content":"\u4f60"}}]}\r\n\r\n'
        'data: {"choices":[{"delta":{"content":"\u597d"},"finish_reason":"stop"}]}\r\n\r\n'
        "data: [DONE]\r\n\r\n"
    ).encode()
    async with answering(*(raw[n : n + 7] for n in range(0, len(raw), 7))) as provider:
        assert "".join(await read(provider.stream(MESSAGES))) == "\u4f60\u597d"
    async with answering(raw, close=False) as provider:
        assert "".join(await read(provider.stream(MESSAGES))) == "\u4f60\u597d", (
            "an end that never comes is not waited for"
        )
