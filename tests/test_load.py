"""Load: open-loop traffic, what it counts, and that a fault would be counted."""

from __future__ import annotations

import json
import time

import pytest
from typer.testing import CliRunner

from whisper_fast.cli.app import app
from whisper_fast.engine import Engine
from whisper_fast.lab.figures import Figures, milliseconds
from whisper_fast.lab.load import load
from whisper_fast.lab.traffic import Sessions, Traffic, arrivals

FIGURES = {
    "turns", "turns_per_s", "errors", "shed", "lost", "duplicated", "out_of_order", "in_flight_peak",
    "added_ms", "total_ms", "cpu_us_per_turn", "cpu_utilization", "rss_peak_mb",
}  # fmt: skip


def silent(*_):
    pass


async def test_load_sends_what_is_due_and_counts_from_then(tmp_path):
    traffic = Traffic(users=40, period=0.5, seconds=1.0, seed=1)
    lines = []
    result = await load(traffic, llm_latency=0.1, data_dir=tmp_path, progress=lines.append)
    assert set(result) >= FIGURES
    assert result["turns"] == len(list(arrivals(Sessions(traffic))))
    assert not any(result[name] for name in ("errors", "shed", "lost", "duplicated", "out_of_order"))
    assert result["total_ms"]["p50"] >= 100
    assert 0 < result["added_ms"]["p50"] <= result["added_ms"]["p99"] <= result["added_ms"]["p999"]
    assert result["in_flight_peak"] > 1
    assert result["cpu_us_per_turn"] > 0
    assert result["rss_peak_mb"] > 10
    assert any("in flight" in line for line in lines)


async def test_load_counts_the_time_that_a_stalled_engine_keeps_everyone_waiting(monkeypatch):
    """A closed loop would send nothing during a stall and report one slow message; here all of them are late."""
    real = Engine.submit
    calls = 0

    async def stall(self, message, *, streamed=False):
        nonlocal calls
        calls += 1
        if calls == 3:
            time.sleep(0.5)  # the stall
        return await real(self, message, streamed=streamed)

    monkeypatch.setattr(Engine, "submit", stall)
    result = await load(Traffic(users=400, period=4.0, seconds=0.6), llm_latency=0.0, progress=silent)
    assert result["added_ms"]["p50"] > 50


def test_percentiles_are_those_of_the_turns_less_the_model():
    figures = Figures(100, llm_latency=1.0)
    figures.start()
    for n in range(101):
        figures.note(1.0 + n / 1000)
    assert figures.added_ms(50, 99) == {"p50": 50.0, "p99": 99.0}
    assert figures.total_ms(99.9) == pytest.approx({"p999": 1099.9})
    assert milliseconds([], 50) == {}


def test_the_wait_for_ones_own_earlier_reply_is_not_counted_twice():
    figures = Figures(2, llm_latency=1.0)
    figures.note(1.5)
    figures.note(2.0, queued=0.75)
    assert figures.added_ms(0, 100) == {"p0": 250.0, "p100": 500.0}
    assert figures.total_ms(100) == {"p100": 2000.0}


def test_the_command_prints_one_object():
    done = CliRunner().invoke(
        app, ["load", "--users", "20", "--period", "0.5", "--llm-latency", "0", "--seconds", "0.3", "--json"]
    )
    assert done.exit_code == 0
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout)["lost"] == 0
