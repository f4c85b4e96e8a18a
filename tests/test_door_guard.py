"""Who is let in: keys, other web pages, addresses; and the routes beside the messages."""

from __future__ import annotations

import base64
import json
import struct

import pytest
from recording import URL, RecordingEngine, asking, error_of, opened

from whisper_fast import Settings, errors
from whisper_fast.door.app import build
from whisper_fast.door.server import listener


@pytest.fixture
def engine():
    return RecordingEngine()


@pytest.fixture
async def client(engine):
    async with opened(engine) as client:
        yield client


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


async def test_strangers_are_not_told_where_the_data_lies(engine):
    engine.state = {"ready": False, "store": "/home/ada/data/whisper-fast.db: no space is left"}
    async with opened(engine, api_keys=("plain",)) as client:
        response = await client.fetch("/readyz")
        assert (response.status, await response.json()) == (503, {"ready": False, "store": "see the server's log"})


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


def test_monitoring_off_takes_the_metrics_away(engine):
    paths = {route.path for route in build(engine, Settings(performance_monitoring_enabled=False)).routes}
    assert "/readyz" in paths
    assert "/metrics" not in paths
