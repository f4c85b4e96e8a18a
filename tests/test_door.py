"""The door over real sockets, in front of an engine that records what reached it."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from contextlib import asynccontextmanager
from functools import partial
from io import BytesIO
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest

from whisper_fast import Settings, errors
from whisper_fast.door.app import build
from whisper_fast.door.server import Server, address_of, listener
from whisper_fast.message import Delta, Recalled, Reply, Usage

MEMORY = Recalled(id=7, text="Ana lives in Porto", score=0.9, at=1.0, scope="dm")
URL = "/v1/chat/completions"


class Stream:
    def __init__(self, engine, message):
        self.engine, self.message, self.closed, self.reply = engine, message, asyncio.Event(), None

    async def __aiter__(self):
        reply = await self.engine.respond(self.message)
        for i, word in enumerate(reply.text.split(" ")):
            if i:
                await self.engine.step()
            yield Delta(f" {word}" if i else word)
        if self.engine.later:
            raise self.engine.later
        yield Delta(finish_reason="stop", usage=reply.usage)
        self.reply = reply

    async def aclose(self):
        self.closed.set()


class RecordingEngine:
    """Answers with the message's own words, keeps what it was asked, raises what it is told to."""

    def __init__(self):
        self.asked, self.streams = [], []
        self.fault = self.later = None
        self.hold = None
        self.embedder = SimpleNamespace(name="static-128", dimension=2)
        self.llm = SimpleNamespace(models=("tiny-llm",))
        self.llm_description = "a tiny model answers"
        self.state = {"ready": True}

    async def embed(self, texts):
        return np.array([[len(text), 0.5] for text in texts], np.float32)

    async def step(self):
        if self.hold is not None:
            await self.hold.wait()

    async def respond(self, message):
        message.checked(1 << 16)
        self.asked.append(message)
        if self.fault:
            raise self.fault
        return Reply(
            id=message.id, user=message.user, text=f"you said {message.text}", emotion={"valence": 0.5},
            memories=(MEMORY,), partial=("weather",), timings={"total": 0.01}, usage=Usage(3, 4), model="tiny-llm",
        )  # fmt: skip

    def stream(self, message):
        self.streams.append(Stream(self, message))
        return self.streams[-1]

    def ready(self):
        return self.state

    def stats(self):
        return {"accepted": len(self.asked), "in_flight": 0, "llm": {"errors": {"LLMTimeout": 2}, "calls": 9}}


@asynccontextmanager
async def opened(engine, **settings):
    settings = Settings(**{"port": 0, "drain_seconds": 0.3, **settings})
    stop, up = asyncio.Event(), asyncio.Event()
    sock = listener("127.0.0.1", 0)
    server = Server(build(engine, settings), stop, settings.drain_seconds)
    server.announce = up.set
    serving = asyncio.create_task(server.serve(sockets=[sock]), name="test-server")
    await up.wait()
    try:
        async with aiohttp.ClientSession(address_of(sock)) as client:
            client.fetch = partial(fetched, client)
            client.stop = stop
            client.port = sock.getsockname()[1]
            yield client
    finally:
        stop.set()
        await serving


async def fetched(client, path, **more):
    """Read a whole answer, so that its connection is free again."""
    async with client.request("POST" if "json" in more else "GET", path, **more) as response:
        await response.read()
        return response


@pytest.fixture
def engine():
    return RecordingEngine()


@pytest.fixture
async def client(engine):
    async with opened(engine) as client:
        yield client


def asking(text="hi", **more):
    return {"model": "whisper-fast", "messages": [{"role": "user", "content": text}], **more}


async def error_of(response):
    """Return status and code of an error, which has the protocol's shape."""
    body = (await response.json())["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return response.status, body["code"]


async def events(response):
    raw = await response.read()
    found = [line.removeprefix(b"data: ") for line in raw.split(b"\n\n") if line]
    assert found.pop() == b"[DONE]"
    return [json.loads(line) for line in found]


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
        waits = {"overloaded": "3", "rate_limit_exceeded": "7", "store_full": "30"}
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


# ---- keys


async def test_keys_open_the_door_and_only_trusted_ones_name_users(engine):
    async with opened(engine, api_keys=("plain", "schlüssel"), trusted_api_keys=("proxy",), host="0.0.0.0") as client:

        async def status(key, path=URL, **more):
            headers = {"Authorization": key} if key is not None else {}
            async with client.post(path, json=asking(**more), headers=headers) as response:
                return response.status if response.status == 200 else await error_of(response)

        for wrong in (None, "", "Bearer", "Bearer ", "Bearer x", "Basic plain", "Bearer plain2"):
            assert await status(wrong) == (401, "invalid_api_key")
        assert await status("Bearer plain") == 200
        assert await status("Bearer schlüssel") == 200
        assert await status("Bearer plain", user="other") == (403, "user_not_allowed")
        own = engine.asked[0].user
        assert own.startswith("key-")
        assert len(own) == 20
        assert "plain" not in own
        assert await status("bearer plain", user=own) == 200
        assert await status("Bearer proxy", user="u9") == 200
        assert await status("Bearer proxy") == 200
        assert [m.user == own for m in engine.asked] == [True, False, True, False, False]
        assert engine.asked[3].user == "u9"
        for path in ("/v1/models", "/v1/models/whisper-fast", "/metrics"):
            assert (await client.fetch(path)).status == 401
        for path in ("/", "/chat.js", "/healthz", "/readyz"):
            assert (await client.fetch(path)).status == 200
        assert (await client.fetch("/v1/models", headers={"Host": "bot.example", "Authorization": "Bearer plain"})).ok


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "bot.example"])
def test_without_keys_only_this_machine_is_served(host, engine):
    with pytest.raises(errors.SettingsError, match=r"WHISPER_FAST_HOST.*WHISPER_FAST_API_KEYS"):
        build(engine, Settings(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_this_machine_needs_no_key(host, engine):
    assert build(engine, Settings(host=host))


# ---- other web pages


STRANGE_HOSTS = [
    "evil.example",
    "evil.example:8765",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil.example",
    "",
    "[::2]",
    "[::1",
]


@pytest.mark.parametrize("host", STRANGE_HOSTS)
async def test_a_name_that_is_not_ours_is_not_answered(client, engine, host):
    async with client.post(URL, json=asking(), headers={"Host": host}) as response:
        assert await error_of(response) == (403, "host_not_allowed")
    async with client.get("/", headers={"Host": host}) as response:
        assert response.status == 403
    assert engine.asked == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8765", "127.0.0.1", "[::1]:99"])
async def test_our_own_names_are_answered(client, host):
    async with client.get("/healthz", headers={"Host": host}) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://[::1", "http://localhost:3000", "http://127.0.0.1"]
)
async def test_a_page_of_another_origin_is_refused(client, engine, origin):
    async with client.post(URL, data=json.dumps(asking()), headers={"Origin": origin}) as response:
        assert await error_of(response) == (403, "origin_not_allowed")
        assert "Access-Control-Allow-Origin" not in response.headers
    assert engine.asked == []


async def test_our_own_page_is_answered(client):
    headers = {"Origin": f"http://127.0.0.1:{client.port}"}
    async with client.post(URL, json=asking(), headers=headers) as response:
        assert response.status == 200


# ---- the other routes


async def test_models_are_listed(client):
    body = await (await client.fetch("/v1/models")).json()
    assert [entry["id"] for entry in body["data"]] == ["whisper-fast", "tiny-llm", "static-128"]
    assert (await (await client.fetch("/v1/models/tiny-llm")).json())["id"] == "tiny-llm"
    assert await error_of(await client.fetch("/v1/models/gpt-9")) == (404, "model_not_found")
    assert (await client.fetch(URL, json=asking() | {"model": "tiny-llm"})).status == 200


@pytest.mark.parametrize("given", ["abc", ["abc"]])
async def test_texts_are_embedded(client, given):
    body = await (await client.fetch("/v1/embeddings", json={"model": "static-128", "input": given})).json()
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": [3.0, 0.5]}]
    asked = {"model": "static-128", "input": given, "encoding_format": "base64"}
    body = await (await client.fetch("/v1/embeddings", json=asked)).json()
    assert struct.unpack("<2f", base64.b64decode(body["data"][0]["embedding"])) == (3.0, 0.5)


NOT_EMBEDDED = [
    {},
    {"input": ""},
    {"input": []},
    {"input": [1, 2]},
    {"input": ["a", ""]},
    {"input": "a", "encoding_format": "hex"},
    {"input": "a", "dimensions": 3},
]


@pytest.mark.parametrize("asked", NOT_EMBEDDED)
async def test_what_cannot_be_embedded_is_refused(client, asked):
    response = await client.fetch("/v1/embeddings", json={"model": "static-128", **asked})
    assert (await error_of(response))[0] == 400


async def test_probes_tell_life_from_readiness(client, engine):
    assert (await client.fetch("/readyz")).status == 200
    engine.state = {"ready": False, "store": "read-only"}
    response = await client.fetch("/readyz")
    assert (response.status, await response.json()) == (503, engine.state | {"llm": "a tiny model answers"})
    assert (await client.fetch("/healthz")).status == 200


async def test_metrics_are_prometheus_text_without_users(client, engine):
    await client.fetch(URL, json=asking(user="secret-name"))
    await client.fetch("/secret-path")
    response = await client.fetch("/metrics")
    text = await response.text()
    assert response.content_type == "text/plain"
    assert "whisper_fast_accepted_total 1.0" in text
    assert 'whisper_fast_http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in text
    assert 'route="other",status="404"' in text
    assert 'whisper_fast_llm_errors_total{error="LLMTimeout"} 2.0' in text
    assert "whisper_fast_llm_calls_total 9.0" in text
    assert "whisper_fast_in_flight 0.0" in text
    assert "secret" not in text
    response = await client.fetch("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert (await response.text()).endswith("# EOF\n")


async def test_unknown_routes_and_methods_are_shaped_too(client):
    assert await error_of(await client.fetch("/v2")) == (404, "not_found")
    assert await error_of(await client.fetch(URL)) == (405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/", "/chat.css", "/chat.js", "/icon.svg"])
async def test_the_page_is_sealed(client, path):
    async with client.get(path) as response:
        policy, tag = response.headers["Content-Security-Policy"], response.headers["ETag"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    for part in ("default-src 'none'", "script-src 'self'", "base-uri 'none'", "frame-ancestors 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    async with client.get(path, headers={"If-None-Match": tag}) as response:
        assert response.status == 304


# ---- the address


def test_a_port_that_is_taken_is_named():
    with listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.SettingsError, match=f"WHISPER_FAST_PORT is {port}"):
            listener("127.0.0.1", port)


def test_an_address_that_is_not_ours_is_named():
    with pytest.raises(errors.SettingsError, match=r"WHISPER_FAST_HOST is '203\.0\.113\.7'"):
        listener("203.0.113.7", 0)
