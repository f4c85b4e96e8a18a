"""The official client, and signals, against a server in a process of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import urllib.request

import openai
import pytest
from served import served

ASK = {"model": "whisper-fast", "messages": [{"role": "user", "content": "Where does my sister live?"}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("data")) as child:
        yield child


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as client:
        yield client


def asking(text, user="ada", **more):
    return {"model": "whisper-fast", "messages": [{"role": "user", "content": text}], "user": user, **more}


def metric(server, name):
    with urllib.request.urlopen(f"{server.address}/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def test_what_was_told_is_recalled_and_reaches_the_model(client):
    client.chat.completions.create(**asking("My sister Ana lives in Porto."))
    answer = client.chat.completions.create(
        **asking("Where does my sister live?"), extra_headers={"X-Channel-Id": "another"}
    )
    assert "Porto" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
    extra = answer.model_extra["whisper_fast"]
    assert extra["user"] == "ada"
    assert extra["memories"][0]["text"] == "My sister Ana lives in Porto."
    assert extra["partial"] == []
    assert {"llm", "total"} <= set(extra["timings"])
    assert "valence" in extra["emotion"]


def test_another_user_knows_nothing_of_it(client):
    client.chat.completions.create(**asking("My sister Ana lives in Porto."))
    answer = client.chat.completions.create(**asking("Where does my sister live?", user="bob"))
    assert "Porto" not in answer.model_dump_json()


@pytest.mark.parametrize("include_usage", [False, True])
async def test_a_stream_is_understood(server, include_usage):
    async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as client:
        options = {"stream_options": {"include_usage": True}} if include_usage else {}
        stream = await client.chat.completions.create(**asking("tell me a lot"), stream=True, **options)
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert 'You said: "tell me a lot"' in text
    assert len(chunks) > 5
    assert chunks[-1].model_extra["whisper_fast"]["user"] == "ada"
    assert bool(chunks[-1].usage) is include_usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_clients_own_stream_accumulator_agrees(client):
    with client.chat.completions.stream(**asking("tell me a lot")) as stream:
        for _ in stream:
            pass
        whole = stream.get_final_completion()
    assert 'You said: "tell me a lot"' in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"


def test_the_same_idempotency_key_is_answered_once(server, client):
    before = metric(server, "whisper_fast_duplicates_total")
    headers = {"Idempotency-Key": "once"}
    first = client.chat.completions.create(**asking("say it once"), extra_headers=headers)
    again = client.chat.completions.create(**asking("say it once"), extra_headers=headers)
    streamed = client.chat.completions.create(**asking("say it once"), extra_headers=headers, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert again.choices == first.choices
    assert again.id == first.id
    assert again.model_extra == first.model_extra
    assert text == first.choices[0].message.content
    assert metric(server, "whisper_fast_duplicates_total") == before + 2


async def test_the_same_idempotency_key_at_the_same_time_is_answered_once(server):
    async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="unused", max_retries=0) as client:
        headers = {"Idempotency-Key": f"together {asyncio.get_running_loop()!r}"}
        asked = [client.chat.completions.create(**asking("together"), extra_headers=headers) for _ in range(8)]
        answers = await asyncio.gather(*asked)
    assert len({answer.model_extra["whisper_fast"]["timings"]["llm"] for answer in answers}) == 1


def test_store_false_is_not_remembered(client):
    client.chat.completions.create(**asking("The code word is xylophone.", user="cy"), store=False)
    answer = client.chat.completions.create(**asking("What is the code word?", user="cy"))
    assert "xylophone" not in answer.model_dump_json()


def test_models_and_embeddings(client):
    names = [model.id for model in client.models.list()]
    assert names[:2] == ["whisper-fast", "simulated"]
    assert client.models.retrieve(names[-1]).id == names[-1]
    packed = client.embeddings.create(model=names[-1], input=["a cat", "a dog"])  # base64 on the wire
    plain = client.embeddings.create(model=names[-1], input="a cat", encoding_format="float")
    assert (plain.usage.prompt_tokens, packed.usage.total_tokens) == (2, 4)
    assert plain.data[0].embedding == pytest.approx(packed.data[0].embedding)
    assert sum(x * x for x in plain.data[0].embedding) == pytest.approx(1, abs=1e-3)
    assert len(packed.data) == 2


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**(ASK | {"model": "gpt-9"}))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**ASK, n=2)
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asking("x" * 10_000_000))
    assert caught.value.status_code == 413


def test_keys(tmp_path):
    with (
        served(tmp_path, api_keys="plain", trusted_api_keys="proxy") as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong", max_retries=0) as client,
    ):
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(**ASK)
        with pytest.raises(openai.PermissionDeniedError):
            client.with_options(api_key="plain").chat.completions.create(**ASK, user="ada")
        own = client.with_options(api_key="plain").chat.completions.create(**ASK)
        named = client.with_options(api_key="proxy").chat.completions.create(**ASK, user="ada")
    assert own.model_extra["whisper_fast"]["user"].startswith("key-")
    assert named.model_extra["whisper_fast"]["user"] == "ada"


# ---- signals


def begun(server, **headers):
    """Ask for a stream, return the response once its first event is here."""
    body = json.dumps(asking("tell me a long story", stream=True)).encode()
    asked = urllib.request.Request(f"{server.address}/v1/chat/completions", body, headers)
    response = urllib.request.urlopen(asked)
    response.readline()
    return response


def rest(response):
    with response:
        lines = [line for line in response.read().decode().splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_sigterm_lets_a_stream_finish(tmp_path):
    with served(tmp_path, latency=1) as server:
        response = begun(server)
        server.terminate()
        last = rest(response)[-1]
        assert last["choices"][0]["finish_reason"] == "stop"
        assert "whisper_fast" in last
        assert server.wait(10) == 0


def test_what_sigterm_cut_off_is_answered_after_the_next_start(tmp_path):
    with served(tmp_path, latency=20, drain_seconds=0.2) as server:
        response = begun(server, **{"Idempotency-Key": "cut"})
        server.send_signal(signal.SIGINT)
        assert rest(response)[-1]["error"]["code"] == "shutting_down"
        assert server.wait(10) == 0
    with served(tmp_path) as server:
        answer = "".join(
            chunk["choices"][0]["delta"].get("content", "")
            for chunk in rest(begun(server, **{"Idempotency-Key": "cut"}))
        )
    assert "long story" in answer


def test_a_second_signal_ends_at_once(tmp_path):
    with served(tmp_path, latency=20) as server:
        response = begun(server)
        since = time.monotonic()
        server.terminate()
        with response:
            while server.poll() is None and time.monotonic() < since + 5:
                server.terminate()
                time.sleep(0.05)
        assert server.returncode == -signal.SIGTERM


def test_what_was_told_survives_kill_9(tmp_path):
    with served(tmp_path) as server, openai.OpenAI(base_url=f"{server.address}/v1", api_key="x") as client:
        client.chat.completions.create(**asking("My sister Ana lives in Porto."))
        server.kill()
        server.wait()
    with served(tmp_path) as server, openai.OpenAI(base_url=f"{server.address}/v1", api_key="x") as client:
        answer = client.chat.completions.create(**asking("Where does my sister live?"))
    assert "Porto" in answer.choices[0].message.content
