"""Stopping under load: it ends in time with 0, streams end with a proper last event, and nothing accepted is lost."""

import asyncio
import json
import signal

import aiohttp
import pytest
from scripted import said
from served import served

from whisper_fast import Engine, Settings
from whisper_fast.errors import Closed
from whisper_fast.lab.audit import audit, states
from whisper_fast.llm import SimulatedLLM

URL = "/v1/chat/completions"


class Client:
    """Users who write without waiting for each other, half of them streaming; knows how each answer ended."""

    def __init__(self, session, tag):
        self.session, self.tag = session, tag
        self.whole, self.told, self.silent = [], [], []

    async def ask(self, number):
        name = f"{self.tag}-{number}"
        body = {"messages": [{"role": "user", "content": f"message {name}"}], "stream": number % 2 == 0}
        headers = {"X-User-Id": f"u{number % 30}", "Idempotency-Key": name}
        try:
            async with self.session.post(URL, json=body, headers=headers) as response:
                text = (await response.read()).decode()
        except aiohttp.ClientConnectionError:
            return  # it was not taken any more
        self.note(name, response.status, text)

    def note(self, name, status, text):
        if status == 200 and text.startswith("data:"):
            events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
            proper = events[-1] == "[DONE]" and ("error" in json.loads(events[-2]) or "whisper_fast" in events[-2])
            ended = self.whole if "whisper_fast" in events[-2] else self.told
            (ended if proper else self.silent).append(name)
        elif status == 200:
            self.whole.append(name)
        else:
            assert json.loads(text)["error"]["code"] in {"shutting_down", "overloaded"}, text
            if "the message is kept" in text:
                self.told.append(name)


async def drained(folder, tag, *, signals=1, requests=120, latency=0.4, drain_seconds=4):
    """Serve, load, stop in the middle; return the client once the server has ended with 0."""
    with served(folder, latency=latency, drain_seconds=drain_seconds, process_pool_size=1) as server:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(server.address, connector=connector) as session:
            client = Client(session, tag)
            async with asyncio.TaskGroup() as group:
                for number in range(requests):
                    group.create_task(client.ask(number))
                    if number == requests * 3 // 4:
                        await asyncio.sleep(0.5)  # some are answered, some run, some wait
                        server.send_signal(signal.SIGTERM)
                        for _ in range(signals - 1):
                            await asyncio.sleep(0.2)
                            server.send_signal(signal.SIGTERM)
                    await asyncio.sleep(0.002)
            assert await asyncio.to_thread(server.wait, 30) == 0
    return client


async def nothing_lost(folder, *clients):
    """Start again: every message that was accepted is answered, and whoever was told to come again finds it so."""
    async with Engine.open(Settings(data_dir=folder), llm=SimulatedLLM(latency=0.001)):
        pass
    found = audit(folder)
    assert (found["open"], found["failed"], found["quarantined"], found["duplicated"]) == (0, 0, 0, 0)
    assert found["answered"] == found["accepted"]
    known = states(folder)
    for client in clients:
        assert client.silent == []
        assert known.keys() >= {*client.whole, *client.told}


@pytest.mark.parametrize("signals", [1, 2])
async def test_sigterm_under_load_ends_with_0_and_loses_nothing(tmp_path, signals):
    client = await drained(tmp_path, "a", signals=signals)
    assert client.whole
    if signals == 2:
        assert client.told  # cut short, and told to come again
    await nothing_lost(tmp_path, client)


async def test_what_does_not_end_in_time_is_told_so_and_answered_after_the_next_start(tmp_path):
    client = await drained(tmp_path, "a", requests=40, latency=20, drain_seconds=1)
    assert client.whole == []
    assert len(client.told) >= 30
    await nothing_lost(tmp_path, client)


async def test_a_bot_drains_by_hand_and_is_hurried(tmp_path):
    async with Engine.open(Settings(data_dir=tmp_path), llm=SimulatedLLM(latency=0.05)) as engine:
        ticket = await engine.submit(said("ada", "hi"))
        assert await engine.drain(30)
        assert (await ticket.reply()).text
        with pytest.raises(Closed) as closed:
            await engine.submit(said("ada", "too late"))
        assert closed.value.retry_after
    async with Engine.open(Settings(data_dir=tmp_path), llm=SimulatedLLM(latency=3600)) as engine:
        ticket = await engine.submit(said("ada", "hi"))
        draining = asyncio.ensure_future(engine.drain(3600))
        await asyncio.sleep(0)
        engine.hurry()
        assert await draining is False
    with pytest.raises(Closed):
        await ticket.reply()
    assert audit(tmp_path)["open"] == 1


@pytest.mark.soak
async def test_a_hundred_drains_under_load_on_each_loop(tmp_path, capsys):
    clients = [
        await drained(tmp_path, f"{cycle}", signals=1 + cycle % 2, latency=(0.05, 0.4, 2.0)[cycle % 3])
        for cycle in range(100)
    ]
    await nothing_lost(tmp_path, *clients)
    ends = {kind: sum(len(getattr(client, kind)) for client in clients) for kind in ("whole", "told", "silent")}
    with capsys.disabled():
        print(f"\n100 drains: {ends}, {audit(tmp_path)}")  # noqa: T201 - the figure of a soak
