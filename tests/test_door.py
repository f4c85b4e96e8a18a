"""Messages through the door, in front of an engine that records what reached it."""

from __future__ import annotations

import asyncio
import json
from io import BytesIO

import pytest
from recording import URL, RecordingEngine, asking, error_of, events, opened

from whisper_fast import errors


@pytest.fixture
def engine():
    return RecordingEngine()


@pytest.fixture
async def client(engine):
    async with opened(engine) as client:
        yield client


async def test_a_completion_carries_the_answer_and_what_is_behind_it(client, engine):
    async with client.post(URL, json=asking("hello"), headers={"X-User-Id": "u1"}) as response:
        body = await response.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "you said hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert body["whisper_fast"] == {
        "user": "u1",
        "emotion": {"valence": 0.5},
        "memories": [{"id": 7, "text": "Ana lives in Porto", "score": 0.9, "at": 1.0, "scope": "dm"}],
        "partial": ["weather"],
        "timings": {"total": 0.01},
    }


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_stream_ends_with_what_is_behind_the_answer_and_done(client, engine, include_usage):
    asked = asking("hello", stream=True, stream_options={"include_usage": include_usage})
    async with client.post(URL, json=asked) as response:
        assert response.content_type == "text/event-stream"
        chunks = await events(response)
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == "you said hello"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
    assert ["whisper_fast" in c for c in chunks] == [False] * (len(chunks) - 1) + [True]
    if include_usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["total_tokens"] == 7
        assert all(c["usage"] is None for c in chunks[:-1])
    else:
        assert all("usage" not in c for c in chunks)
    assert engine.streams[0].closed.is_set()


async def test_every_part_of_a_conversation_goes_where_it_belongs(client, engine):
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "12 degrees"}
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    words = [{"type": "text", "text": "and"}, image, {"type": "text", "text": "now?"}]
    lines = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello", "name": "bo"},
        {"role": "assistant", "content": "hi"},
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": words},
        call,
        result,
    ]
    asked = {"messages": lines, "temperature": 0.3, "tools": [{"type": "function"}], "min_p": 0.1, "store": False}
    headers = {"X-Channel-Id": "room", "X-Scope": "server:1/public", "X-User-Id": "Zoë", "Idempotency-Key": "k1"}
    async with client.post(URL, json=asked, headers=headers) as response:
        assert response.status == 200, await response.text()
    (message,) = engine.asked
    assert (message.text, message.parts) == ("and\nnow?", (image,))
    assert message.system == (lines[0], lines[3])
    assert message.history == (lines[1], lines[2])
    assert message.continuation == (call, result)
    assert message.parameters == {"temperature": 0.3, "tools": [{"type": "function"}], "min_p": 0.1}
    assert (message.user, message.channel, message.scope) == ("Zoë", "room", "server:1/public")
    assert (message.id, message.platform, message.remember) == ("k1", "http", False)


async def test_without_earlier_messages_the_stored_conversation_is_used(client, engine):
    async with client.post(URL, json=asking("x", user="u2")) as response:
        assert response.status == 200
    (message,) = engine.asked
    assert message.history is None
    assert (message.user, message.channel, message.scope, message.remember) == ("u2", "default", "dm", True)


async def test_who_names_nobody_is_local_and_the_header_wins(client, engine):
    async with client.post(URL, json=asking()):
        pass
    async with client.post(URL, json=asking(user="body"), headers={"X-User-Id": "header"}):
        pass
    assert [message.user for message in engine.asked] == ["local", "header"]


BAD = {
    "empty body": (b"", 400, "invalid_json"),
    "malformed": (b'{"messages": [', 400, "invalid_json"),
    "not UTF-8": (b'{"messages": "\xff"}', 400, "invalid_json"),
    "not an object": (b"[]", 400, "invalid_type"),
    "nested without end": (b'{"messages":' + b"[" * 100_000, 400, "invalid_json"),
    "surrogates nested without end": (b'{"a":"\\ud800","messages":' + b"[" * 100_000, 400, "invalid_json"),
    "surrogates and NaN": (b'{"a":"\\\\ud800","b":NaN}', 400, "invalid_json"),
    "infinite": (b'{"temperature": 1e999, "messages": []}', 400, "invalid_type"),
    "no messages": (b"{}", 400, "invalid_type"),
    "messages empty": (b'{"messages": []}', 400, "invalid_type"),
    "messages of text": (b'{"messages": ["hi"]}', 400, "invalid_type"),
    "role unknown": (b'{"messages": [{"role": "king", "content": "x"}]}', 400, "invalid_type"),
    "content a number": (b'{"messages": [{"role": "user", "content": 5}]}', 400, "invalid_type"),
    "text part without text": (
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        400,
        "invalid_type",
    ),
    "nobody speaks": (b'{"messages": [{"role": "system", "content": "x"}]}', 400, "missing_user_message"),
    "says nothing": (b'{"messages": [{"role": "user", "content": ""}]}', 400, "invalid_message"),
    "content null": (b'{"messages": [{"role": "user", "content": null}]}', 400, "invalid_message"),
    "two answers": (json.dumps(asking(n=2)).encode(), 400, "unsupported_value"),
    "stream a word": (json.dumps(asking(stream="yes")).encode(), 400, "invalid_type"),
    "user a number": (json.dumps(asking(user=5)).encode(), 400, "invalid_type"),
    "user empty": (json.dumps(asking(user="")).encode(), 400, "invalid_message"),
    "user long": (json.dumps(asking(user="u" * 10_000)).encode(), 400, "invalid_message"),
    "user with newline": (json.dumps(asking(user="a/b\nc")).encode(), 400, "invalid_message"),
    "model unknown": (json.dumps(asking() | {"model": "gpt-9"}).encode(), 404, "model_not_found"),
    "text of 100 KB": (json.dumps(asking("x" * 100_000)).encode(), 413, "message_too_large"),
    "text of 10 MB": (json.dumps(asking("x" * 10_000_000)).encode(), 413, "request_too_large"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_is_refused_clearly(client, engine, name):
    body, status, code = BAD[name]
    async with client.post(URL, data=BytesIO(body)) as response:
        assert await error_of(response) == (status, code)
    assert engine.asked == []


async def test_a_stream_that_is_refused_has_the_real_status(client):
    async with client.post(URL, json=asking("", stream=True)) as response:
        assert await error_of(response) == (400, "invalid_message")


async def test_what_is_wrong_is_named(client):
    async with client.post(URL, data=b'{"messages": [{"role": "user", "content": "x"}, {"role": 5}]}') as response:
        error = (await response.json())["error"]
    assert error["param"] == "messages[1].role"


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [("X-User-Id", "u" * 10_000, 400), ("X-User-Id", "", 400), ("X-Scope", "everywhere", 400),
     ("X-Scope", "server:/public", 400), ("X-Channel-Id", "c" * 600, 400), ("Idempotency-Key", "", 400),
     ("X-User-Id", "a/b", 200), ("X-Scope", "server:9/private", 200)],
)  # fmt: skip
async def test_a_header_is_checked(client, header, value, status):
    async with client.post(URL, json=asking(), headers={header: value}) as response:
        assert response.status == status


@pytest.mark.parametrize("value", [b"a\nb", b"a\x00b", b"\xff\xfe"])
async def test_a_header_that_is_no_text_is_refused(client, engine, value):
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    body = json.dumps(asking()).encode()
    head = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nX-User-Id: %b\r\n\r\n"
    writer.write(head % (URL.encode(), len(body), value) + body)
    assert b" 400 " in await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert engine.asked == []


@pytest.mark.parametrize(
    ("sent", "understood"),
    [(b"\\ud83d", "\ufffd"), (b"ok \\uD83D\\uDE00 \\udc00", "ok 😀 \ufffd"), (b"a\\u0000b", "a\x00b"),
     ("🙂🙃".encode(), "🙂🙃"), (b"\\\\ud800", "\\ud800")],
)  # fmt: skip
async def test_strange_text_arrives(client, engine, sent, understood):
    async with client.post(URL, data=b'{"messages": [{"role": "user", "content": "%b"}]}' % sent) as response:
        assert response.status == 200
    assert engine.asked[0].text == understood


async def test_a_body_without_length_is_cut_off_while_it_is_read(client):
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % URL.encode())
    writer.write(b"10000\r\n%b\r\n" % (b" " * 0x10000) * 80)  # 5 MiB, and no end
    assert b" 413 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_a_client_that_leaves_in_mid_request_is_no_fault(client, engine, caplog):
    _, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{" % URL.encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with asyncio.timeout(5):
        while 'status="400"' not in await (await client.fetch("/metrics")).text():
            pass
    assert not caplog.records
    assert engine.asked == []


FAULTS = [
    (errors.Overloaded("full", retry_after=2.5), 503, "overloaded"),
    (errors.LLMRateLimited("slow down", retry_after=7), 429, "rate_limit_exceeded"),
    (errors.LLMTimeout("late"), 504, "llm_timeout"),
    (errors.DeadlineExceeded("late"), 504, "deadline_exceeded"),
    (errors.LLMUnavailable("gone"), 502, "llm_unavailable"),
    (errors.LLMProtocolError("html"), 502, "llm_protocol_error"),
    (errors.LLMRejected("no"), 502, "llm_rejected"),
    (errors.LLMMisconfigured("wrong key"), 502, "llm_misconfigured"),
    (errors.StoreFull("full"), 507, "store_full"),
    (errors.StoreReadOnly("read-only"), 503, "store_unavailable"),
    (errors.Closed("closed"), 503, "shutting_down"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "status", "code"), FAULTS)
async def test_an_error_of_ours_has_its_status(client, engine, fault, status, code, stream):
    engine.fault = fault
    async with client.post(URL, json=asking(stream=stream)) as response:
        assert await error_of(response) == (status, code)
        waits = {"overloaded": "3", "rate_limit_exceeded": "7", "store_full": "30", "llm_misconfigured": "30"}
        assert response.headers.get("Retry-After") == waits.get(code)


async def test_an_unexpected_fault_keeps_its_text_to_itself(client, engine, caplog):
    engine.fault = RuntimeError("u1 said: my secret")
    async with client.post(URL, json=asking()) as response:
        body = await response.text()
        assert await error_of(response) == (500, "internal_error")
    assert "secret" not in body


async def test_a_stream_that_fails_on_the_way_says_so_and_ends(client, engine):
    engine.later = errors.LLMTimeout("it stopped talking")
    async with client.post(URL, json=asking("hello", stream=True)) as response:
        chunks = await events(response)
    assert chunks[-1]["error"]["code"] == "llm_timeout"
    assert not any(
        "finish_reason" in c.get("choices", [{}])[0] and c["choices"][0]["finish_reason"] for c in chunks[:-1]
    )


async def test_a_client_that_goes_away_ends_its_stream(client, engine):
    engine.hold = asyncio.Event()
    async with client.post(URL, json=asking("one two three", stream=True)) as response:
        await response.content.readline()
        response.close()
    async with asyncio.timeout(5):
        await engine.streams[0].closed.wait()


@pytest.mark.parametrize("stream", [False, True])
async def test_stopping_gives_answers_under_way_a_last_word(engine, stream):
    engine.hold = asyncio.Event()
    async with opened(engine) as client:
        if stream:
            async with client.post(URL, json=asking("one two three", stream=True)) as response:
                client.stop.set()
                assert (await events(response))[-1]["error"]["code"] == "shutting_down"
            return

        async def held(message):
            client.stop.set()
            await engine.step()

        engine.respond = held
        async with client.post(URL, json=asking()) as response:
            assert await error_of(response) == (503, "shutting_down")


async def test_stopping_waits_for_answers_that_come_in_time(engine):
    engine.hold = asyncio.Event()
    asked = asking("one two", stream=True)
    async with opened(engine, drain_seconds=30) as client, client.post(URL, json=asked) as response:
        client.stop.set()
        asyncio.get_running_loop().call_later(0.15, engine.hold.set)
        assert "whisper_fast" in (await events(response))[-1]
