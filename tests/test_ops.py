"""What the operations page shows: the same snapshot as JSON and as events, for who may see it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import msgspec
import pytest
from recording import RecordingEngine, error_of, opened

from whisper_fast import Engine, Message, Settings
from whisper_fast.door.app import build
from whisper_fast.door.auth import Keys
from whisper_fast.door.ops import VIEWERS, Operations
from whisper_fast.errors import LLMUnavailable, StoreError
from whisper_fast.llm import SimulatedLLM
from whisper_fast.monitor import Snapshots

ROUTES = ["/ops/snapshot", "/ops/events", "/ops/turn?id=m1"]


@asynccontextmanager
async def running(folder, llm=None, **settings):
    settings = Settings(data_dir=folder, process_pool_size=1, **settings)
    async with Engine.open(settings, llm=llm or SimulatedLLM(latency=0.02)) as engine:
        yield engine


@pytest.fixture
async def engine(tmp_path):
    async with running(tmp_path) as engine:
        yield engine


def told(number, text="hello"):
    return Message(user="secret-name", text=text, id=f"m{number}", channel="c")


async def remembered(engine, message):
    """Answer a message and return when it is taken down."""
    await engine.respond(message)
    while engine.record.find(message.id) is None:
        await asyncio.sleep(0.001)


async def snapshot(client, **more):
    response = await client.fetch("/ops/snapshot", **more)
    assert response.status == 200
    return await response.json()


def snapshots(engine):
    return Snapshots(engine.stats, engine.record, engine.flags, engine.ready)


# ---- what is in it


async def test_a_snapshot_tells_what_happened(engine):
    async with opened(engine) as client:
        assert (await snapshot(client))["health"] == {"ready": True, "problems": []}
        await remembered(engine, told(1))
        engine.flags.hedging = False
        await asyncio.sleep(1)  # a snapshot serves everybody who looks for 0.9 s
        found = await snapshot(client)
    traffic = found["traffic"]
    assert (traffic["accepted"], traffic["answered"], traffic["shed"], traffic["running"]) == (1, 1, 0, 0)
    assert 0 < traffic["answered_per_s"] <= 1
    assert traffic["slots"] > 50
    assert (traffic["lost"], traffic["doubled"]) == (0, 0)
    assert found["bottleneck"].keys() >= {"resource", "share", "confidence", "advice", "ranking"}
    assert [found["replies"][part]["count"] for part in ("reply", "llm", "ours")] == [1, 1, 1]
    assert found["replies"]["llm"]["p50"] >= 0.0195
    assert {"journal", "lane", "gather", "llm", "record", "emotion"} <= {one["name"] for one in found["stages"]}
    assert found["endpoints"][0]["name"] == "simulated"
    assert found["endpoints"][0]["limit_why"]
    assert found["batchers"][0]["fill"] == pytest.approx(1 / 32)
    assert [one["name"] for one in found["caches"]] == ["memories", "conversations"]
    for cache in found["caches"]:
        assert cache["ratio"] == cache["hits"] / (cache["hits"] + cache["misses"])
        assert 0 < cache["bytes"] < cache["bound"]
    assert found["memory"]["rss"] > 1 << 20
    assert found["loop"]["beats"] >= 0
    assert found["slowest"][0]["id"] == "m1"
    on = {flag["name"]: flag["on"] for flag in found["flags"]}
    assert on == {**engine.flags.as_dict(), "hedging": False, "caching": True}
    assert [(one["flag"], one["on"]) for one in found["flag_changes"]] == [("hedging", False)]


async def test_reply_is_the_models_share_and_ours(engine):
    await remembered(engine, told(1))
    whole, llm, ours = (dict(engine.record.replies.items())[name].sum for name in ("reply", "llm", "ours"))
    assert whole == pytest.approx(llm + ours)
    laps = {stage.name: stage.seconds for stage in engine.record.find("m1").stages}
    assert ours == pytest.approx(sum(laps[name] for name in ("journal", "lane", "gather", "record")))


async def test_nothing_that_users_wrote_is_shown_and_no_name(engine):
    await remembered(engine, told(1, "secret words"))
    text = msgspec.json.encode(snapshots(engine).take()).decode()
    assert "secret" not in text
    assert '"m1"' in text


async def test_one_reply_is_found_by_its_id(engine):
    await remembered(engine, told(1))
    async with opened(engine) as client:
        found = await (await client.fetch("/ops/turn?id=m1")).json()
        assert {stage["name"] for stage in found["stages"]} >= {"journal", "lane", "gather", "llm", "record"}
        for missing in ("/ops/turn?id=m2", "/ops/turn"):
            response = await client.fetch(missing)
            assert await error_of(response) == (404, "turn_not_found")


async def test_without_monitoring_what_is_not_measured_is_not_there(tmp_path):
    async with running(tmp_path, performance_monitoring_enabled=False) as engine, opened(engine) as client:
        await engine.respond(told(1))
        found = await snapshot(client)
        assert found["traffic"]["answered"] == 1
        assert not {"replies", "stages", "loop", "slowest", "errors"} & found.keys()
        assert (await client.fetch("/ops/turn?id=m1")).status == 404


async def test_who_is_refused_is_told_apart_by_the_reason(engine):
    engine._lanes.refusal = "memory is short"
    with pytest.raises(Exception, match="memory is short"):
        await engine.respond(told(1))
    taken = snapshots(engine)
    found = taken.take()
    assert found["traffic"]["refused"] == {"memory": 1}
    assert [one["kind"] for one in found["health"]["problems"]] == ["shed"]


async def test_a_model_that_keeps_failing_is_something_to_see_to(tmp_path):
    class Dead(SimulatedLLM):
        async def chat(self, *_, **__):
            raise LLMUnavailable("nobody there")

    async with running(tmp_path, Dead(), drain_seconds=0.1) as engine:
        asked = [engine.respond(Message(user=f"u{n}", text="x", id=str(n))) for n in range(5)]
        failed = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(error) for error in failed} == {LLMUnavailable}
        found = snapshots(engine).take()
        assert [one["kind"] for one in found["health"]["problems"]] == ["breaker simulated", "retrying"]
        assert found["errors"]["LLMUnavailable"] >= 5
        assert found["endpoints"][0]["breaker"] == "open"


@pytest.mark.parametrize(
    ("sql", "kind"),
    [("DELETE FROM journal", "lost"), ("UPDATE journal SET state = 2, reply = CAST('{}' AS BLOB)", "doubled")],
)
async def test_a_message_that_was_lost_or_has_two_answers_is_told(tmp_path, sql, kind):
    class Vandal(SimulatedLLM):
        async def chat(self, *asked, **more):
            await engine._database.write(lambda connection: connection.execute(sql) and None)
            return await super().chat(*asked, **more)

    async with running(tmp_path, Vandal(latency=0.0), drain_seconds=0.1) as engine:
        with pytest.raises(StoreError):
            await engine.respond(told(1))
        found = snapshots(engine).take()
    assert {name: found["traffic"][name] for name in ("lost", "doubled")} == {"lost": 0, "doubled": 0, kind: 1}
    assert found["health"]["problems"][0]["kind"] == "lost"


async def test_a_store_that_fails_and_an_engine_that_stops_are_told(engine):
    states = iter([{"ready": False, "store": "the disk is full"}, {"ready": False, "store": "ok"}])
    taken = Snapshots(engine.stats, engine.record, engine.flags, lambda: next(states))
    assert taken.take()["health"] == {"ready": False, "problems": [{"kind": "store", "text": "the disk is full"}]}
    assert [one["kind"] for one in taken.take()["health"]["problems"]] == ["stopping"]


# ---- who looks, and how


async def events_of(response, number):
    found = []
    async for line in response.content:
        if line.startswith(b"data: {"):
            found.append(json.loads(line[6:]))
            if len(found) == number:
                return found
    return found


async def test_events_come_every_second_and_are_the_same_snapshot(engine):
    async with opened(engine) as client, client.get("/ops/events") as response:
        assert response.content_type == "text/event-stream"
        first, second = await events_of(response, 2)
        assert first.keys() == second.keys() == (await snapshot(client)).keys()
        assert second["at"] > first["at"]


async def test_all_who_look_share_one_snapshot(engine):
    operations = Operations(engine, Keys())
    assert operations._look() is operations._look()


async def test_a_page_that_looks_keeps_no_server_from_stopping(engine):
    async with asyncio.timeout(20), opened(engine, drain_seconds=60) as client:
        response = await client.get("/ops/events")
        await events_of(response, 1)
        client.stop.set()
        assert (await events_of(response, 10))[-1]["error"]["code"] == "shutting_down"
        response.close()


async def test_a_page_that_is_closed_is_let_go(engine):
    async with opened(engine) as client:
        for _ in range(VIEWERS + 5):  # one after the other, so that none is refused
            response = await client.get("/ops/events")
            assert response.status == 200
            response.close()
            await asyncio.sleep(0)


async def test_too_many_pages_at_once_are_refused(engine, monkeypatch):
    monkeypatch.setattr("whisper_fast.door.ops.VIEWERS", 1)
    async with opened(engine) as client, client.get("/ops/events") as first:
        await events_of(first, 1)
        response = await client.fetch("/ops/events")
        assert await error_of(response) == (503, "too_many_viewers")


@pytest.mark.parametrize("route", ROUTES)
async def test_operations_need_a_key_that_may_speak_for_others(engine, route):
    await remembered(engine, told(1))
    async with opened(engine, api_keys="plain", trusted_api_keys="operator") as client:
        assert (await client.fetch(route)).status == 401
        response = await client.fetch(route, headers={"authorization": "Bearer plain"})
        assert await error_of(response) == (403, "operations_not_allowed")
        async with client.get(route, headers={"authorization": "Bearer operator"}) as response:
            assert response.status == 200


async def test_the_page_itself_needs_no_key_and_is_sealed():
    async with opened(RecordingEngine(), api_keys="plain") as client:
        for file in ("/ops", "/ops.css", "/ops.js", "/look.css"):
            response = await client.fetch(file)
            assert response.status == 200
            assert "script-src 'self'" in response.headers["content-security-policy"]
            text = await response.text()
            assert "http://" not in text
            assert "https://" not in text


async def test_the_routes_are_counted_by_their_names(engine):
    assert {"/ops", "/ops/snapshot", "/ops/events", "/ops/turn"} <= {
        route.path for route in build(engine, Settings()).routes
    }
