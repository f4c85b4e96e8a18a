"""An embedding server as the embedder: unit rows in the right order, typed errors, no secret told."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from aiohttp import web
from hashing import DIMENSION, HashEmbedder

from whisper_fast.batcher import MicroBatcher
from whisper_fast.errors import (
    Closed,
    LLMProtocolError,
    LLMRateLimited,
    LLMRejected,
    LLMUnavailable,
    SettingsError,
)
from whisper_fast.llm import Endpoint
from whisper_fast.memory import MemoryStore
from whisper_fast.models.chosen import chosen_embedder, close_embedder
from whisper_fast.models.embedder import Embedder, StaticEmbedder
from whisper_fast.models.openai import OpenAIEmbedder
from whisper_fast.settings import Settings

KEY = "sk-very-secret-key"


class Server:
    """`/v1/embeddings` over the hash embedder; `answer`, when set, is what it says instead."""

    def __init__(self):
        self.bodies, self.keys = [], []
        self.answer = None

    async def embeddings(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if self.answer is not None:
            return self.answer()
        rows = HashEmbedder().embed(body["input"]) * 3
        data = [{"object": "embedding", "index": i, "embedding": row.tolist()} for i, row in enumerate(rows)]
        return web.json_response({"data": data[::-1], "model": body["model"], "usage": {"total_tokens": 1}})


@pytest.fixture
async def server():
    served = Server()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/embeddings", served.embeddings)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    served.url = f"http://127.0.0.1:{port}"
    yield served
    await runner.cleanup()


@pytest.fixture
async def embedder(server):
    opened = await OpenAIEmbedder.open(Endpoint(server.url, "tiny", KEY), DIMENSION)
    yield opened
    await opened.close()


async def test_rows_are_of_unit_length_and_in_the_texts_order(embedder, server):
    texts = ["red apple", " ", "green pear"]
    rows = await embedder.embed(texts)
    assert np.allclose(rows[[0, 2]], HashEmbedder().embed(["red apple", "green pear"]), atol=1e-6)
    assert not rows[1].any(), "a text that says nothing is not sent and has a zero row"
    assert server.bodies == [{"model": "tiny", "input": ["red apple", "green pear"], "encoding_format": "float"}]
    assert server.keys == [f"Bearer {KEY}"]
    assert isinstance(embedder, Embedder)


async def test_the_dimension_is_asked_for_where_it_is_not_known(server):
    opened = await OpenAIEmbedder.open(Endpoint(server.url, "tiny"))
    assert (opened.dimension, opened.name) == (DIMENSION, f"openai:tiny:{DIMENSION}")
    await opened.close()


async def test_many_texts_go_in_requests_of_bounded_size_and_long_ones_are_cut(embedder, server):
    await embedder.embed(["x" * 20_000, *(f"text {i}" for i in range(600))])
    assert [len(body["input"]) for body in server.bodies] == [256, 256, 89]
    assert len(server.bodies[0]["input"][0]) == 8000


async def test_the_answer_for_a_full_request_of_a_large_model_is_taken(server):
    numbers = ", ".join(["-0.12345678901234567"] * 3072)
    items = (f'{{"index": {i}, "embedding": [{numbers}]}}' for i in range(256))
    body = f'{{"data": [{", ".join(items)}]}}'.encode()
    assert len(body) > 16 << 20
    server.answer = lambda: web.Response(body=body, content_type="application/json")
    large = OpenAIEmbedder(Endpoint(server.url, "large"), 3072)
    rows = await large.embed([f"text {i}" for i in range(256)])
    await large.close()
    assert rows.shape == (256, 3072)


async def test_the_texts_of_many_callers_go_in_one_request(embedder, server):
    async with MicroBatcher(embedder.embed) as batcher:
        await asyncio.gather(*(batcher.submit(f"text {i}") for i in range(20)))
    assert len(server.bodies) <= 2


def rows(*lists, index=None):
    return lambda: web.json_response(
        {"data": [{"index": i if index is None else index, "embedding": row} for i, row in enumerate(lists)]}
    )


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda: web.Response(status=429, headers={"Retry-After": "7"}), LLMRateLimited),
        (lambda: web.Response(status=500, text=KEY), LLMUnavailable),
        (lambda: web.Response(status=401, text=KEY), LLMRejected),
        (lambda: web.Response(text="<html>"), LLMProtocolError),
        (lambda: web.json_response({"data": [{"index": 0, "embedding": ["x"]}]}), LLMProtocolError),
        (lambda: web.Response(text='{"data": [{"index": 0, "embedding": [NaN]}]}'), LLMProtocolError),
        (rows(), LLMProtocolError),
        (rows([1.0] * DIMENSION), LLMProtocolError),
        (rows([1.0] * DIMENSION, [1.0] * DIMENSION, index=0), LLMProtocolError),
        (rows([1.0] * DIMENSION, [1.0]), LLMProtocolError),
        (lambda: web.Response(body=b"\xff\xfe"), LLMProtocolError),
    ],
    ids=[
        "429",
        "500",
        "401",
        "html",
        "words",
        "nan",
        "none",
        "too few",
        "one index twice",
        "another dimension",
        "bytes",
    ],
)
async def test_what_the_server_does_wrong_is_a_typed_error_without_secrets(embedder, server, answer, error):
    server.answer = answer
    with pytest.raises(error) as caught:
        await embedder.embed(["my secret", "words"])
    assert KEY not in str(caught.value) + repr(embedder)
    assert "secret" not in str(caught.value)
    if error is LLMRateLimited:
        assert caught.value.retry_after == 7.0


async def test_nobody_there_and_closed(free_address):
    opened = await OpenAIEmbedder.open(Endpoint(free_address, "tiny"), 4)
    with pytest.raises(LLMUnavailable):
        await opened.embed(["x"])
    await opened.close()
    with pytest.raises(Closed):
        await opened.embed(["x"])


@pytest.fixture
async def free_address():
    closed = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = closed.sockets[0].getsockname()[1]
    closed.close()
    await closed.wait_closed()
    return f"http://127.0.0.1:{port}"


async def test_a_model_must_be_named():
    with pytest.raises(SettingsError, match="EMBEDDING_MODEL"):
        OpenAIEmbedder(Endpoint("http://127.0.0.1:1"), 4)


async def test_memories_through_a_server(embedder, tmp_path):
    async with MemoryStore.open(tmp_path, embedder) as memory:
        await memory.add_many("ada", ["red apple", "green pear"])
        [found] = await memory.recall("ada", "pear", k=1)
        assert found.text == "green pear"


async def test_settings_choose(server, tmp_path):
    plain = Settings(data_dir=tmp_path)
    assert isinstance(await chosen_embedder(plain), StaticEmbedder)
    with pytest.raises(SettingsError, match="EMBEDDING_API_URL"):
        await chosen_embedder(Settings(data_dir=tmp_path, embedder="openai"))
    chosen = await chosen_embedder(
        Settings(
            data_dir=tmp_path,
            embedder="openai",
            embedding_api_url=server.url,
            embedding_model="tiny",
            embedding_api_key=KEY,
        )
    )
    assert (await chosen.embed(["x"])).shape == (1, DIMENSION)
    await close_embedder(chosen)
    with pytest.raises(SettingsError, match="static"):
        Settings(embedder="word2vec")
    assert KEY not in json.dumps(repr(chosen))
