"""The Grafana dashboard: every query of it finds its figures on the page of a server that is busy and in trouble."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import combinations
from math import isfinite
from pathlib import Path

import pytest
from promql import Page, evaluated
from recording import opened
from test_ops import running

from whisper_fast import Message
from whisper_fast.errors import LLMUnavailable, Overloaded
from whisper_fast.llm import SimulatedLLM

DASHBOARD = json.loads((Path(__file__).parents[1] / "docs/grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


class Moody(SimulatedLLM):
    """A model that cannot be reached when the message says so."""

    async def chat(self, messages, **more):
        if "fail" in messages[-1]["content"]:
            raise LLMUnavailable("nobody there")
        return await super().chat(messages, **more)


async def scraped(client):
    response = await client.fetch("/metrics")
    return Page(await response.text(), time.monotonic())


async def busy(engine):
    """Answer, refuse, fail, miss a component, break an optimisation and hold the loop."""
    engine.component("late", never, deadline=0.001)
    engine.component("slow", hold, deadline=5.0)
    engine.flags.failed("caching", ValueError("x"))
    for text in ("hello", "again", "fail"):
        asked = [engine.respond(Message(user=f"u{n}", text=text, id=f"{text}{n}")) for n in range(8)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(answer) for answer in answers} <= ({LLMUnavailable} if text == "fail" else {type(answers[0])})
    engine._lanes.refusal = "memory is short"
    with pytest.raises(Overloaded):
        await engine.respond(Message(user="u", text="refused", id="refused"))


async def never(_):
    await asyncio.Event().wait()


async def hold(turn):
    if turn.message.id == "hello0":
        time.sleep(0.2)


async def test_every_query_finds_its_figures(tmp_path):
    async with running(tmp_path, Moody(latency=0.01), drain_seconds=0.1) as engine, opened(engine) as client:
        before = await scraped(client)
        await busy(engine)
        while not engine.record.loop.stats()["lines"]:
            await asyncio.sleep(0.01)
        now = await scraped(client)
    for title, query in QUERIES:
        found = evaluated(query, before, now)
        assert found, f"{title}: nothing is found by {query}"
        assert all(isfinite(value) for value in found.values()), f"{title}: {query} gives {found}"


async def test_the_figures_are_right(tmp_path):
    async with running(tmp_path, SimulatedLLM(latency=0.05)) as engine, opened(engine) as client:
        before = await scraped(client)
        for number in range(20):
            await engine.respond(Message(user="u", text="x", id=str(number)))
        while len(engine.record._latest) < 20:
            await asyncio.sleep(0.001)
        now = await scraped(client)
    of = {title: evaluated(query, before, now) for title, query in QUERIES if "accepted_total" in query}
    [accepted] = of["Messages a second"].values()
    assert accepted * (now.at - before.at) == pytest.approx(20)
    by_part = next(query for title, query in QUERIES if title.startswith("Ours and"))
    p99 = {dict(key)["part"]: value for key, value in evaluated(by_part, before, now).items()}
    assert 0.03 < p99["llm"] <= max(0.0625, dict(engine.record.replies.items())["llm"].largest * 2)


def test_the_dashboard_is_well_made():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above
